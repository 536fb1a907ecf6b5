"""Searches on SQLite: threads with connections of their own, a time limit, and the functions that SQL lacks.

A search may take seconds where a look-up takes microseconds, so it has neither the event loop's connection nor the
writer's thread. SQLite works without holding the interpreter's lock, so look-ups go on beside it.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol, TypeVar

import msgspec

from kamado.errors import Unavailable
from kamado.search import Filter, Pointer, Sort, matches, order_key
from kamado.storage.search import SqlSearches
from kamado.storage.sql import Session, StoreSettings
from kamado.store import Searches

__all__ = ["SearchPool", "SearchSession"]

T = TypeVar("T")

_STEPS = 20_000
"""Instructions of SQLite between two looks at the clock: about a millisecond."""


class SearchSession(Session, Protocol):
    """What a thread of the pool reads with."""

    connection: sqlite3.Connection

    def end_snapshot(self) -> None:
        """End the transaction that `begin_snapshot` began."""

    def begin_snapshot(self) -> None:
        """Begin a transaction that reads.

        Raises:
            Unavailable: The driver failed.
        """

    def close(self) -> None:
        """Close the connection."""


class Drive(Protocol):
    """Runs a coroutine that never suspends to its end."""

    def __call__(self, work: Awaitable[T]) -> T:
        """Run it."""


class SearchPool:
    """Runs searches in threads.

    Args:
        open_session: Opens a session for the thread that calls.
        drive: See there.
        settings: See there.
    """

    def __init__(
        self,
        open_session: Callable[[], SearchSession],
        drive: Drive,
        settings: StoreSettings,
    ) -> None:
        self._open_session = open_session
        self._drive = drive
        self._settings = settings
        self._threads = ThreadPoolExecutor(settings.search_workers, thread_name_prefix="kamado-search")
        self._waiting = 0
        self._closing = threading.Event()
        self._sessions: list[SearchSession] = []
        self._local = threading.local()

    async def run(self, work: Callable[[Searches], Awaitable[T]]) -> T:
        """Run a search; see `store.Store.search`."""
        if self._closing.is_set():
            raise Unavailable("the database is closed")
        if self._waiting >= self._settings.max_waiting_searches:
            raise Unavailable("too many searches are waiting for the database")
        cancelled = threading.Event()
        deadline = time.monotonic() + self._settings.search_timeout
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._search, work, deadline, cancelled)
        future.add_done_callback(self._finished)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def _finished(self, future: "asyncio.Future[T]") -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # if the caller was cancelled, nobody else asks for it

    async def close(self) -> None:
        """Give up what runs, then end the threads and their connections."""
        self._closing.set()
        await asyncio.to_thread(self._threads.shutdown)
        for session in self._sessions:
            session.close()

    # In a thread of the pool

    def _search(self, work: Callable[[Searches], Awaitable[T]], deadline: float, cancelled: threading.Event) -> T:
        def is_over() -> bool:
            return cancelled.is_set() or self._closing.is_set() or time.monotonic() > deadline

        if is_over():
            raise self._given_up()
        session = self._session()
        session.connection.set_progress_handler(is_over, _STEPS)
        _add_functions(session.connection)
        session.begin_snapshot()
        try:
            return self._drive(work(SqlSearches(session, _Dialect())))
        except Unavailable as error:
            if is_over():
                raise self._given_up() from error
            raise
        finally:
            session.connection.set_progress_handler(None, 0)
            session.end_snapshot()

    def _given_up(self) -> Unavailable:
        if self._closing.is_set():
            return Unavailable("the database is closed")
        timeout = self._settings.search_timeout
        return Unavailable(f"the search took longer than {timeout:g} s; a filter by equality or prefix is quicker")

    def _session(self) -> SearchSession:
        session: SearchSession | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = self._open_session()
            self._sessions.append(session)
        return session


# What SQL lacks


def _add_functions(connection: sqlite3.Connection) -> None:
    connection.create_function("kamado_meets", 2, _meets, deterministic=True)
    connection.create_function("kamado_rank", 2, _rank, deterministic=True)
    connection.create_function("kamado_value", 2, _value, deterministic=True)


_decode = msgspec.json.Decoder().decode


@lru_cache(maxsize=64)
def _read_condition(text: str) -> Filter:
    pointer, value = _decode(text)
    return Filter(pointer=tuple(pointer), value=value)


@lru_cache(maxsize=64)
def _read_sort(text: str) -> Sort:
    return Sort(pointer=tuple(_decode(text)))


def _meets(document: str, condition: str) -> bool:
    return matches(_read_condition(condition), _decode(document))


def _rank(document: str, pointer: str) -> int:
    return order_key(_read_sort(pointer), _decode(document))[0]


def _value(document: str, pointer: str) -> float | int | str:
    value = order_key(_read_sort(pointer), _decode(document))[1]
    # SQLite has integers of 64 bits.
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


class _Dialect:
    """`storage.search.SearchDialect`."""

    def is_match(self, text: str, pattern: str) -> str:
        return f"{text} GLOB {pattern}"

    def pattern_value(self, pattern: str) -> str:
        return pattern.replace("[", "[[]")

    def meets(self, document: str, condition: str) -> str:
        return f"kamado_meets({document}, {condition})"

    def condition_value(self, condition: Filter) -> str:
        return msgspec.json.encode([condition.pointer, condition.value]).decode()

    def timestamp(self, column: str) -> str:
        return f"strftime('%Y-%m-%dT%H:%M:%SZ', {column} / 1000000, 'unixepoch')"

    def order(self, document: str, sort: Sort, pointer: str) -> tuple[str, str]:
        if _has_path(sort):
            # In the order of management 7.3; text compares by its bytes, so by code points.
            rank = (
                f"CASE json_type({document}, {pointer}) WHEN 'integer' THEN 1 WHEN 'real' THEN 1 WHEN 'text' THEN 2 "
                "WHEN 'object' THEN 3 WHEN 'array' THEN 4 WHEN 'false' THEN 5 WHEN 'true' THEN 6 ELSE 0 END"
            )
            value = (
                f"CASE WHEN json_type({document}, {pointer}) IN ('integer', 'real', 'text') "
                f"THEN json_extract({document}, {pointer}) END"
            )
            return rank, value
        return f"kamado_rank({document}, {pointer})", f"kamado_value({document}, {pointer})"

    def pointer_value(self, sort: Sort) -> str:
        return _path(sort.pointer) if _has_path(sort) else msgspec.json.encode(sort.pointer).decode()


def _has_path(sort: Sort) -> bool:
    """Tell whether SQLite's own paths can say what a pointer says: no index, and no label that JSON escapes."""
    return not sort.has_index and all(
        character >= " " and character not in '"\\' for token in sort.pointer for character in token
    )


def _path(pointer: Pointer) -> str:
    return "$" + "".join(f'."{token}"' for token in pointer)
