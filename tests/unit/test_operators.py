"""Operators: who gets in, how often bcrypt is asked, what guessers see; accounts."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.sample_store import Clock, SampleStore

from kamado.auth import LOCAL_OPERATOR, Principal
from kamado.errors import BadRequest, Conflict, NotFound, Unauthorized, Unavailable
from kamado.operators import (
    ANONYMOUS_OPERATOR,
    Login,
    OperatorLogins,
    OperatorLoginSettings,
    add_operator,
    change_operator_password,
    find_anonymous,
    remove_operator,
)
from kamado.passwords import PasswordHasher

SETTINGS = OperatorLoginSettings(refusal_delay=0.0)
HERE = "192.0.2.1"


class CountingHasher(PasswordHasher):
    """Counts what it is asked, and waits for `gate` before it answers."""

    def __init__(self) -> None:
        super().__init__(workers=1, queue=16, cost=4)
        self.verified = 0
        self.pretended = 0
        self.gate: Callable[[], Awaitable[object]] | None = None

    async def verify(self, password: str, hashed: str) -> bool:
        self.verified += 1
        if self.gate is not None:
            await self.gate()
        return await super().verify(password, hashed)

    async def pretend(self, password: str) -> None:
        self.pretended += 1
        if self.gate is not None:
            await self.gate()
        await super().pretend(password)


class MonotonicClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A database, and logins on it."""

    def __init__(self, directory: Path) -> None:
        self.sample = SampleStore(directory, Clock())
        self.hasher = CountingHasher()
        self.clock = MonotonicClock()
        self.logins = self.make(LOCAL_OPERATOR)

    def make(self, anonymous: Principal | None, settings: OperatorLoginSettings = SETTINGS) -> OperatorLogins:
        return OperatorLogins(self.sample.store.lookups, self.hasher, anonymous, settings, self.clock)

    def add(self, name: str, password: str = "secret", *, may_reveal_secrets: bool = False) -> None:
        self.sample.run(
            add_operator(
                self.sample.store,
                self.hasher,
                principal=LOCAL_OPERATOR,
                name=name,
                password=password,
                may_reveal_secrets=may_reveal_secrets,
                now=self.sample.clock(),
            )
        )

    async def changing(self, name: str, password: str) -> None:
        await change_operator_password(
            self.sample.store, self.hasher, principal=LOCAL_OPERATOR, name=name, password=password
        )

    async def removing(self, name: str) -> bool:
        return await remove_operator(self.sample.store, principal=LOCAL_OPERATOR, name=name)

    def log_in(self, name: str, password: str = "secret") -> Principal:
        return self.sample.run(self.logins(Login(name=name, password=password), HERE))

    def refuse(self, name: str, password: str = "secret") -> str:
        with pytest.raises(Unauthorized) as refused:
            self.log_in(name, password)
        return str(refused.value)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    yield one
    one.hasher.close()
    one.sample.close()


# Who gets in (management 3.11)


def test_who_needs_no_login() -> None:
    assert find_anonymous(is_local=True, allow_anonymous=False) is LOCAL_OPERATOR
    # Permission to open the API is not the same as opening it.
    assert find_anonymous(is_local=True, allow_anonymous=True) is LOCAL_OPERATOR
    assert find_anonymous(is_local=False, allow_anonymous=True) is ANONYMOUS_OPERATOR
    assert find_anonymous(is_local=False, allow_anonymous=False) is None


def test_only_callers_on_this_machine_are_shown_secrets_without_a_login() -> None:
    """Management 6.10, PSK `key`."""
    assert LOCAL_OPERATOR.may_reveal_secrets
    assert not ANONYMOUS_OPERATOR.may_reveal_secrets


def test_nobody_has_to_log_in_while_there_is_no_account(world: World) -> None:
    assert world.sample.run(world.logins(None, HERE)) is LOCAL_OPERATOR
    assert world.log_in("any", "thing") is LOCAL_OPERATOR
    assert world.hasher.verified + world.hasher.pretended == 0


def test_the_first_account_closes_the_api_and_the_last_opens_it_on_this_machine(world: World) -> None:
    world.add("ada")
    with pytest.raises(Unauthorized):
        world.sample.run(world.logins(None, HERE))
    world.refuse("bob")
    assert world.log_in("ada") == Principal(name="ada")
    assert world.sample.run(world.removing("ada")) is False
    assert world.log_in("ada") is LOCAL_OPERATOR


@pytest.mark.parametrize("login", [None, Login(name="ada", password="secret")])
def test_without_an_account_nobody_gets_in_where_others_reach_the_api(world: World, login: Login | None) -> None:
    """Also after the last account was removed."""
    logins = world.make(None)
    with pytest.raises(Unauthorized):
        world.sample.run(logins(login, HERE))
    world.add("ada")
    assert world.sample.run(logins(Login(name="ada", password="secret"), HERE)).name == "ada"
    world.sample.run(world.removing("ada"))
    with pytest.raises(Unauthorized):
        world.sample.run(logins(login, HERE))


def test_the_right_to_reveal_secrets_comes_from_the_account(world: World) -> None:
    """Management 6.10."""
    world.add("ada", may_reveal_secrets=True)
    world.add("bob")
    assert world.log_in("ada").may_reveal_secrets
    assert not world.log_in("bob").may_reveal_secrets


@pytest.mark.parametrize(
    ("name", "password"), [("ada", "Secret"), ("ada", ""), ("Ada", "secret"), ("", ""), ("a\0", "x")]
)
def test_a_refusal_does_not_tell_what_is_wrong(world: World, name: str, password: str) -> None:
    """Configuration 7.6: the same words and the same work for unknown names."""
    world.add("ada")
    assert world.refuse(name, password) == "wrong name or password"
    assert world.hasher.verified + world.hasher.pretended == 1


def test_a_password_that_is_too_long_for_bcrypt_is_wrong(world: World) -> None:
    world.add("ada", "x" * 72)
    world.log_in("ada", "x" * 72)
    world.refuse("ada", "x" * 73)
    world.refuse("ada", "x" * 10_000)


# What is remembered


def test_a_password_is_hashed_once_in_a_while(world: World) -> None:
    world.add("ada")
    for _ in range(10):
        assert world.log_in("ada").name == "ada"
    assert world.hasher.verified == 1
    world.clock.now += SETTINGS.remember_time + 0.1
    world.log_in("ada")
    assert world.hasher.verified == 2


def test_a_wrong_password_is_wrong_beside_a_remembered_one(world: World) -> None:
    world.add("ada")
    world.add("bob", "other")
    world.log_in("ada")
    world.log_in("bob", "other")
    world.refuse("ada", "other")
    world.refuse("bob", "secret")
    # Nor is anything glued together: name, password and hash are kept apart.
    world.refuse("ad", "asecret")


def test_a_changed_password_counts_at_once(world: World) -> None:
    world.add("ada")
    world.log_in("ada")
    world.sample.run(world.changing("ada", "newer"))
    world.refuse("ada", "secret")
    assert world.log_in("ada", "newer").name == "ada"
    # Neither is the old one remembered when the same password is set again.
    world.sample.run(world.changing("ada", "secret"))
    verified = world.hasher.verified
    world.log_in("ada", "secret")
    assert world.hasher.verified == verified + 1


def test_a_removed_account_counts_at_once(world: World) -> None:
    world.add("ada")
    world.add("bob")
    world.log_in("ada")
    world.sample.run(world.removing("ada"))
    world.refuse("ada")
    world.log_in("bob")


@pytest.mark.parametrize("is_removed", [True, False])
def test_an_account_that_is_changed_while_its_password_is_hashed(world: World, is_removed: bool) -> None:
    world.add("ada")
    world.add("bob")

    async def change() -> None:
        world.hasher.gate = None
        if is_removed:
            await world.removing("ada")
        else:
            await world.changing("ada", "newer")

    world.hasher.gate = change
    world.refuse("ada")


def test_what_is_remembered_is_bounded(world: World) -> None:
    world.logins = world.make(LOCAL_OPERATOR, replace(SETTINGS, max_remembered=2))
    for name in ("a", "b", "c"):
        world.add(name)
        world.log_in(name)
    assert len(world.logins._remembered) == 2
    verified = world.hasher.verified
    world.log_in("b")
    world.log_in("c")
    assert world.hasher.verified == verified
    world.log_in("a")
    assert world.hasher.verified == verified + 1


def test_no_password_is_kept(world: World) -> None:
    world.add("ada", "tea-pot-42")
    world.log_in("ada", "tea-pot-42")
    assert "tea-pot-42" not in repr(world.logins.__dict__) + repr(Login(name="ada", password="tea-pot-42"))


# Many at once


class Gate:
    """Holds whoever comes until it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self._arrived = asyncio.Semaphore(0)

    async def __call__(self) -> None:
        self._arrived.release()
        await self.opened.wait()

    async def arrival(self, number: int = 1) -> None:
        """Wait until so many more have come."""
        for _ in range(number):
            await self._arrived.acquire()


def test_the_same_login_on_many_connections_is_worked_out_once(world: World) -> None:
    world.add("ada")

    async def main() -> None:
        gate = world.hasher.gate = Gate()
        login = Login(name="ada", password="secret")
        tasks = [asyncio.ensure_future(world.logins(login, HERE)) for _ in range(50)]
        await gate.arrival()
        # One that gives up while it waits does not matter to the others.
        tasks[-1].cancel()
        gate.opened.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [outcome.name for outcome in outcomes[:-1] if isinstance(outcome, Principal)] == ["ada"] * 49
        assert isinstance(outcomes[-1], asyncio.CancelledError)

    world.sample.run(main())
    assert world.hasher.verified == 1


def test_who_waits_for_a_login_that_is_given_up_may_try_again(world: World) -> None:
    world.add("ada")

    async def main() -> None:
        gate = world.hasher.gate = Gate()
        login = Login(name="ada", password="secret")
        tasks = [asyncio.ensure_future(world.logins(login, HERE)) for _ in range(2)]
        await gate.arrival()
        tasks[0].cancel()
        with pytest.raises(Unavailable):
            await tasks[1]
        world.hasher.gate = None
        assert (await world.logins(login, HERE)).name == "ada"

    world.sample.run(main())


def test_one_address_has_few_attempts_at_a_time(world: World) -> None:
    """Configuration 7.7. Others, and passwords that are remembered, do not notice."""
    world.add("ada")
    world.log_in("ada")

    async def main() -> None:
        gate = world.hasher.gate = Gate()
        guesses = [Login(name="ada", password=f"guess-{number}") for number in range(SETTINGS.max_attempts + 1)]
        tasks = [asyncio.ensure_future(world.logins(guess, HERE)) for guess in guesses[:-1]]
        await gate.arrival(len(tasks))
        with pytest.raises(Unavailable, match="too many logins"):
            await world.logins(guesses[-1], HERE)
        assert (await world.logins(Login(name="ada", password="secret"), HERE)).name == "ada"
        elsewhere = asyncio.ensure_future(world.logins(guesses[-1], "192.0.2.2"))
        await gate.arrival()
        gate.opened.set()
        outcomes = await asyncio.gather(*tasks, elsewhere, return_exceptions=True)
        assert all(isinstance(outcome, Unauthorized) for outcome in outcomes)
        # The places are free again, and nothing of the guesses is left.
        with pytest.raises(Unauthorized):
            await world.logins(guesses[0], HERE)
        assert not world.logins._attempts
        assert not world.logins._running

    world.sample.run(main())


def test_a_full_queue_of_the_hasher_is_told(world: World) -> None:
    """Configuration 7.5: overflow answers 503."""
    world.add("ada")

    async def full() -> None:
        raise Unavailable("too many passwords are being hashed; try again later")

    world.hasher.gate = full
    with pytest.raises(Unavailable, match="too many passwords"):
        world.log_in("ada")


def test_a_refusal_comes_after_the_same_time_whatever_is_wrong(world: World) -> None:
    """Configuration 7.6: the delay counts from the beginning of the login."""
    world.add("ada")
    delays: list[float] = []

    async def no_sleep(seconds: float) -> None:
        delays.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kamado.operators.asyncio.sleep", no_sleep)
        world.logins = world.make(LOCAL_OPERATOR, replace(SETTINGS, refusal_delay=0.5))
        for name in ("ada", "bob"):
            delays.clear()

            async def hash_slowly() -> None:
                world.clock.now += 0.2

            world.hasher.gate = hash_slowly
            world.refuse(name, "wrong")
            assert delays[0] == pytest.approx(0.3)


def test_refusals_are_logged_with_name_and_address_but_no_password(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Configuration 7.9: failed logins. One line in a while: `log.RepeatFilter` goes by the fixed message."""
    world.add("ada", "tea-pot-42")
    world.refuse("ada", "tea-pot-43")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "login of an operator refused"
    assert record.__dict__["principal"] == "ada"
    assert record.__dict__["source"] == HERE
    assert "tea-pot" not in repr(record.__dict__)


# Accounts


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "x" * 257, "local-operator", "anonymous"])
def test_names_that_cannot_be_used(world: World, name: str) -> None:
    with pytest.raises(BadRequest):
        world.add(name)


@pytest.mark.parametrize("password", ["", "x" * 73, "a\0b", "a\nb", "a\x7fb"])
def test_passwords_that_cannot_be_used(world: World, password: str) -> None:
    with pytest.raises(BadRequest):
        world.add("ada", password)
    world.add("ada")
    with pytest.raises(BadRequest):
        world.sample.run(world.changing("ada", password))
    assert world.log_in("ada").name == "ada"


def test_any_other_characters_may_be_in_a_password(world: World) -> None:
    world.add("Jörg Ⅷ", "pä:ss wörd ✓")
    assert world.log_in("Jörg Ⅷ", "pä:ss wörd ✓").name == "Jörg Ⅷ"


def test_an_account_is_not_replaced_and_keeps_its_right(world: World) -> None:
    world.add("ada", may_reveal_secrets=True)
    with pytest.raises(Conflict, match="there is an operator ada"):
        world.add("ada", "other")
    world.sample.run(world.changing("ada", "newer"))
    assert world.log_in("ada", "newer").may_reveal_secrets


def test_what_is_not_there_cannot_be_changed(world: World) -> None:
    world.add("bob")
    for work in (world.changing("ada", "newer"), world.removing("ada")):
        with pytest.raises(NotFound, match="there is no operator ada"):
            world.sample.run(work)


def test_removing_tells_whether_an_account_is_left(world: World) -> None:
    world.add("ada")
    world.add("bob")
    assert world.sample.run(world.removing("ada")) is True
    assert world.sample.run(world.removing("bob")) is False
