"""Operators: their accounts in the database, and their logins to the management API (management 3.11).

Hides how a password is found to be right, and how seldom that has to be worked out. What HTTP looks like is not known
here.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from kamado.auth import LOCAL_OPERATOR, Principal
from kamado.errors import BadRequest, Conflict, NotFound, Unauthorized, Unavailable
from kamado.passwords import PasswordHasher
from kamado.store import Change, ChangeKind, Lookups, Operator, OperatorRow, Store, Transaction

__all__ = [
    "ANONYMOUS_OPERATOR",
    "Login",
    "OperatorLoginSettings",
    "OperatorLogins",
    "add_operator",
    "change_operator_password",
    "find_anonymous",
    "remove_operator",
]

_log = logging.getLogger(__name__)

ANONYMOUS_OPERATOR: Final = Principal(name="anonymous")
"""Who calls the management API where everybody may, on other addresses than loopback: secrets are not revealed."""


def find_anonymous(*, is_local: bool, allow_anonymous: bool) -> Principal | None:
    """Tell who calls without a login while there is no account (management 3.11).

    Args:
        is_local: Only this machine reaches the API.
        allow_anonymous: Whoever reaches it may use it.

    Returns:
        `None` if a login is required even then: nobody gets in.
    """
    if is_local:
        return LOCAL_OPERATOR
    return ANONYMOUS_OPERATOR if allow_anonymous else None


# Logins


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """What a caller presents."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorLoginSettings:
    """How logins are watched over."""

    remember_time: float = 300.0
    """Seconds for which a password that was right need not be hashed again."""
    refusal_delay: float = 0.5
    """Seconds from the beginning of a login to its refusal, whatever is the reason."""
    max_attempts: int = 5
    """Logins of one source address that may be under way, the delay included; one more is turned away."""
    max_remembered: int = 1000
    """Passwords that are remembered; beyond that the oldest is forgotten."""


class OperatorLogins:
    """Decides over logins of operators.

    The account is read for each request, so that one that was added, changed or removed counts at once, also if
    another process did it. What is remembered of a password is a digest under a key of this process, made together
    with what is stored of the account: once that is another, nothing is remembered.

    Args:
        lookups: Where the accounts are.
        passwords: Verifies hashes. Nobody else should wait for it.
        anonymous: Who calls without a login while there is no account at all; `None`: nobody.
        settings: See there.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        lookups: Lookups,
        passwords: PasswordHasher,
        anonymous: Principal | None,
        settings: OperatorLoginSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookups = lookups
        self._passwords = passwords
        self._anonymous = anonymous
        self._settings = settings or OperatorLoginSettings()
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._remembered: dict[bytes, tuple[float, Principal]] = {}
        """Digest -> until when, and who that is."""
        self._running: dict[bytes, asyncio.Future[bool]] = {}
        """Digest -> whether the password is right, while that is worked out: who presents the same waits for it."""
        self._attempts: dict[str, int] = {}

    async def __call__(self, login: Login | None, source: str) -> Principal:
        """Find out who calls.

        Args:
            login: What the caller presents, if anything.
            source: Its address.

        Raises:
            Unauthorized: A login is required, or this one is wrong: some time later, and not telling what is wrong.
            Unavailable: The database does not answer, or too many logins wait.
        """
        row = await self._lookups.find_operator(login.name) if login is not None else None
        if row is None and self._anonymous is not None and not await self._lookups.has_operators():
            return self._anonymous
        if login is None:
            raise Unauthorized("a login is required: name and password of an operator's account")
        digest = self._digest(login, row)
        remembered = self._remembered.get(digest)
        if remembered is not None and remembered[0] > self._clock():
            return remembered[1]
        return await self._log_in(login, row, digest, source)

    def _digest(self, login: Login, row: OperatorRow | None) -> bytes:
        account = "" if row is None else f"{row.password_hash}{row.may_reveal_secrets}"
        # With lengths, so that no two logins make the same text.
        text = f"{len(login.name)}:{login.name}{len(login.password)}:{login.password}{account}"
        return hashlib.blake2b(text.encode(), key=self._key).digest()

    async def _log_in(self, login: Login, row: OperatorRow | None, digest: bytes, source: str) -> Principal:
        refusal = self._clock() + self._settings.refusal_delay
        running = self._running.get(digest)
        if running is not None:
            # Connections that are opened side by side present the same: one of them has it worked out.
            is_right = await asyncio.shield(running)
        else:
            with self._attempt(source):
                is_right = await self._verify(login, row, digest)
                if not is_right:
                    _log.warning("login of an operator refused", extra={"principal": login.name, "source": source})
                    await asyncio.sleep(max(0.0, refusal - self._clock()))
        if is_right:
            # It took a while: the account may have been changed or removed.
            current = await self._lookups.find_operator(login.name)
            if current is not None and current == row:
                principal = Principal(name=login.name, may_reveal_secrets=current.may_reveal_secrets)
                self._remember(digest, principal)
                return principal
        await asyncio.sleep(max(0.0, refusal - self._clock()))
        raise Unauthorized("wrong name or password")

    async def _verify(self, login: Login, row: OperatorRow | None, digest: bytes) -> bool:
        running = self._running[digest] = asyncio.get_running_loop().create_future()
        try:
            if row is None:
                # Whether an account exists is not to be told by the time it takes.
                await self._passwords.pretend(login.password)
                is_right = False
            else:
                is_right = await self._passwords.verify(login.password, row.password_hash)
        except BaseException as error:
            running.set_exception(Unavailable(str(error) or "the login was given up; try again"))
            running.exception()  # nobody may be waiting for it
            raise
        else:
            running.set_result(is_right)
            return is_right
        finally:
            del self._running[digest]

    @contextmanager
    def _attempt(self, source: str) -> Iterator[None]:
        """Take one of the places that a source has."""
        number = self._attempts.get(source, 0)
        if number >= self._settings.max_attempts:
            raise Unavailable("too many logins at once from this address; try again later")
        self._attempts[source] = number + 1
        try:
            yield
        finally:
            if self._attempts[source] > 1:
                self._attempts[source] -= 1
            else:
                del self._attempts[source]

    def _remember(self, digest: bytes, principal: Principal) -> None:
        self._remembered.pop(digest, None)
        while len(self._remembered) >= self._settings.max_remembered:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = self._clock() + self._settings.remember_time, principal


# Accounts

_MAX_NAME_SIZE = 256


async def add_operator(
    store: Store,
    passwords: PasswordHasher,
    *,
    principal: Principal,
    name: str,
    password: str,
    may_reveal_secrets: bool,
    now: datetime,
) -> None:
    """Add an operator's account; it may log in at once, and from now on everybody has to.

    Args:
        may_reveal_secrets: Whether reading credentials shows it the keys of `psk` secrets (management 6.10).

    Raises:
        BadRequest: The name or the password cannot be used.
        Conflict: There is an account of that name.
        Unavailable: The database cannot be written.
    """
    if name in {LOCAL_OPERATOR.name, ANONYMOUS_OPERATOR.name}:
        raise BadRequest(f"{name} is what callers without a login are called")
    # A colon ends the name in HTTP Basic (RFC 7617, 2).
    if not name or ":" in name or not name.isprintable() or len(name) > _MAX_NAME_SIZE:
        raise BadRequest(
            f"the name of an operator has 1 to {_MAX_NAME_SIZE} printable characters, none of them a colon"
        )
    operator = Operator(
        name=name,
        password_hash=await _hash(passwords, password),
        may_reveal_secrets=may_reveal_secrets,
        created=now,
    )

    async def add(transaction: Transaction) -> None:
        if await transaction.find_operator(name) is not None:
            raise Conflict(f"there is an operator {name} already")
        await transaction.put_operator(operator)
        await transaction.record(_change(principal, name, before=None, after=_version(operator)))

    await store.write(add)


async def change_operator_password(
    store: Store, passwords: PasswordHasher, *, principal: Principal, name: str, password: str
) -> None:
    """Give an operator another password; the old one opens nothing from now on.

    Raises:
        BadRequest: The password cannot be used.
        NotFound: There is no such account.
        Unavailable: The database cannot be written.
    """
    password_hash = await _hash(passwords, password)

    async def change(transaction: Transaction) -> None:
        old = await _get(transaction, name)
        new = Operator(
            name=name,
            password_hash=password_hash,
            may_reveal_secrets=old.may_reveal_secrets,
            created=old.created,
        )
        await transaction.put_operator(new)
        await transaction.record(_change(principal, name, before=_version(old), after=_version(new)))

    await store.write(change)


async def remove_operator(store: Store, *, principal: Principal, name: str) -> bool:
    """Remove an operator's account; its next request is refused.

    Returns:
        Whether there is any account left.

    Raises:
        NotFound: There is no such account.
        Unavailable: The database cannot be written.
    """

    async def remove(transaction: Transaction) -> bool:
        old = await _get(transaction, name)
        await transaction.delete_operator(name)
        await transaction.record(_change(principal, name, before=_version(old), after=None))
        return bool(await transaction.list_operators())

    return await store.write(remove)


async def _get(transaction: Transaction, name: str) -> Operator:
    operator = await transaction.find_operator(name)
    if operator is None:
        raise NotFound(f"there is no operator {name}")
    return operator


async def _hash(passwords: PasswordHasher, password: str) -> str:
    # Control characters cannot be presented (RFC 7617, 2).
    if not password or any(character < " " or character == "\x7f" for character in password):
        raise BadRequest("a password must not be empty nor contain control characters")
    return await passwords.hash(password)


def _version(operator: Operator) -> str:
    """A fingerprint; the salt makes the hash, and so this, tell nothing about the password."""
    text = f"{operator.password_hash} {operator.may_reveal_secrets} {operator.name}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _change(principal: Principal, name: str, *, before: str | None, after: str | None) -> Change:
    return Change(
        principal=principal.name,
        kind=ChangeKind.OPERATOR,
        tenant_id=None,
        resource_id=name,
        before=before,
        after=after,
    )
