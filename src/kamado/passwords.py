"""Passwords and bcrypt: hashing and verifying in threads of their own.

bcrypt is slow on purpose (cost 10: some 60 ms of one core), so it never runs on the event loop, and neither the threads
nor what waits for them may grow without bound. Nothing here knows whose password it is.
"""

import asyncio
import functools
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import bcrypt

from kamado.credentials import MAX_PASSWORD_SIZE
from kamado.errors import BadRequest, Unavailable

__all__ = ["BCRYPT_HASH", "PasswordHasher"]

T = TypeVar("T")

BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}", re.ASCII)
"""A complete bcrypt hash of one of the three equivalent prefixes; the group is its cost."""


class PasswordHasher:
    """A bounded pool of threads with a bounded queue.

    Args:
        workers: Threads.
        queue: Passwords that may wait beyond those being worked on.
        cost: bcrypt cost of new hashes.
        observe: Takes the seconds that each password took in its thread; called there.
    """

    def __init__(
        self, *, workers: int, queue: int, cost: int, observe: Callable[[float], None] = lambda _: None
    ) -> None:
        self.cost = cost
        self._observe = observe
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="bcrypt")
        self._workers = workers
        self._places = workers + queue
        self._taken = 0
        self._turn = threading.Lock()

    @property
    def waiting(self) -> int:
        """Passwords that wait for a thread."""
        return max(0, self._taken - self._workers)

    async def hash(self, password: str) -> str:
        """Hash a password with a fresh salt, prefix `$2a$`: the only one that stock adapters verify.

        Waits for a thread; a cancelled caller leaves nothing behind.

        Raises:
            BadRequest: The password has more than 72 bytes of UTF-8, or no UTF-8 form.
            Unavailable: Too many passwords wait already.
        """
        secret = _encode(password)
        if secret is None:
            raise BadRequest(f"a password must not have more than {MAX_PASSWORD_SIZE} bytes in UTF-8")
        return await self._run(functools.partial(_hash, secret, self.cost))

    async def verify(self, password: str, hashed: str) -> bool:
        """Tell whether a password belongs to a bcrypt hash (`$2a$`, `$2b$`, `$2y$`).

        A password that is too long, or a hash of another form, matches nothing, after the same work.

        Raises:
            Unavailable: Too many passwords wait already.
        """
        secret = _encode(password)
        if secret is None or not BCRYPT_HASH.fullmatch(hashed):
            await self.pretend(password)
            return False
        return await self._run(functools.partial(bcrypt.checkpw, secret, hashed.encode("ascii")))

    async def pretend(self, password: str) -> None:
        """Take as long as `verify` of a hash of our own cost, so that timing does not tell who exists.

        Raises:
            Unavailable: As `verify`.
        """
        secret = (_encode(password) or b"")[:MAX_PASSWORD_SIZE]
        hashed = b"$2a$%02d$" % self.cost + b"." * 53
        await self._run(functools.partial(bcrypt.checkpw, secret, hashed))

    def close(self) -> None:
        """Drop what waits, finish what runs, end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        with self._turn:
            if self._taken >= self._places:
                raise Unavailable("too many passwords are being hashed; try again later")
            self._taken += 1
        try:
            future = self._pool.submit(self._measure, work)
        except RuntimeError as error:
            self._release()
            raise Unavailable("the registry is stopping") from error
        # The place is free when the thread is, not when the caller gives up.
        future.add_done_callback(self._release)
        return await asyncio.wrap_future(future)

    def _measure(self, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self._observe(time.perf_counter() - started)
        return result

    def _release(self, _: "Future[T] | None" = None) -> None:
        with self._turn:
            self._taken -= 1


def _encode(password: str) -> bytes | None:
    try:
        secret = password.encode()
    except UnicodeEncodeError:
        return None
    return secret if len(secret) <= MAX_PASSWORD_SIZE else None


def _hash(secret: bytes, cost: int) -> str:
    return bcrypt.hashpw(secret, bcrypt.gensalt(rounds=cost, prefix=b"2a")).decode("ascii")
