"""bcrypt in threads: what hashes look like, what matches, what is bounded."""

import asyncio
import threading
from collections.abc import Iterator

import bcrypt
import pytest

from kamado.errors import BadRequest, Unavailable
from kamado.passwords import BCRYPT_HASH, PasswordHasher


@pytest.fixture
def passwords() -> Iterator[PasswordHasher]:
    hasher = PasswordHasher(workers=1, queue=1, cost=4)
    yield hasher
    hasher.close()


def hash_with(prefix: str, password: bytes = b"secret") -> str:
    made = bcrypt.hashpw(password, bcrypt.gensalt(4)).decode()
    return f"${prefix}{made[3:]}"


def test_hashes_have_the_prefix_that_adapters_verify(passwords: PasswordHasher) -> None:
    """README of the specification: written with prefix `$2a$`; amqp-apis 11.4."""
    made = asyncio.run(passwords.hash("hono-secret"))
    assert made.startswith("$2a$04$")
    assert BCRYPT_HASH.fullmatch(made)
    assert asyncio.run(passwords.verify("hono-secret", made))
    assert not asyncio.run(passwords.verify("hono-secreT", made))


def test_salts_differ(passwords: PasswordHasher) -> None:
    assert asyncio.run(passwords.hash("same")) != asyncio.run(passwords.hash("same"))


@pytest.mark.parametrize("prefix", ["2a", "2b", "2y"])
def test_all_equivalent_prefixes_verify(passwords: PasswordHasher, prefix: str) -> None:
    """authentication 4.2."""
    assert asyncio.run(passwords.verify("secret", hash_with(prefix)))
    assert not asyncio.run(passwords.verify("Secret", hash_with(prefix)))


@pytest.mark.parametrize(
    "hashed",
    ["", "secret", hash_with("2x"), hash_with("2a")[:-1], hash_with("2a") + "\n"],
    ids=["empty", "plain", "2x", "cut", "line-end"],
)
def test_other_hashes_match_nothing(passwords: PasswordHasher, hashed: str) -> None:
    assert not asyncio.run(passwords.verify("secret", hashed))


def test_72_bytes_are_the_limit(passwords: PasswordHasher) -> None:
    longest = "é" * 36
    made = asyncio.run(passwords.hash(longest))
    assert asyncio.run(passwords.verify(longest, made))
    # bcrypt itself would ignore what follows.
    assert not asyncio.run(passwords.verify(longest + "x", made))
    with pytest.raises(BadRequest, match="72 bytes"):
        asyncio.run(passwords.hash(longest + "x"))


def test_a_password_without_utf8_form_is_refused(passwords: PasswordHasher) -> None:
    with pytest.raises(BadRequest):
        asyncio.run(passwords.hash("\ud800"))
    assert not asyncio.run(passwords.verify("\ud800", hash_with("2a")))


def test_pretending_works_for_any_password(passwords: PasswordHasher) -> None:
    for password in ("", "x", "é" * 100, "\ud800"):
        asyncio.run(passwords.pretend(password))


def test_waiting_is_bounded_and_the_places_come_back(
    passwords: PasswordHasher, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def wait(*_: object) -> bool:
        assert release.wait(60)
        return True

    async def scenario() -> None:
        monkeypatch.setattr("kamado.passwords.bcrypt.checkpw", wait)
        running = [asyncio.ensure_future(passwords.verify("x", hash_with("2a"))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await passwords.verify("x", hash_with("2a"))
        # Who gives up frees its place only with the thread.
        running[0].cancel()
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await passwords.verify("x", hash_with("2a"))
        release.set()
        assert await running[1]
        assert await passwords.verify("x", hash_with("2a"))

    asyncio.run(scenario())


def test_after_the_end_nothing_is_hashed() -> None:
    hasher = PasswordHasher(workers=1, queue=1, cost=4)
    hasher.close()
    for _ in range(3):
        with pytest.raises(Unavailable):
            asyncio.run(hasher.hash("x"))
