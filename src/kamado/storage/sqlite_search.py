"""Searches on SQLite: threads with connections of their own, a time limit, and the functions that SQL lacks.

A search may take seconds where a look-up takes microseconds, so it has neither the event loop's connection nor the
writer's thread; nor do searches that take seconds and those that take milliseconds share theirs. SQLite works without
holding the interpreter's lock, so look-ups go on beside it.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

import msgspec

from kamado.errors import Unavailable
from kamado.search import Filter, Pointer, Sort, is_match, matches, order_key
from kamado.storage.lanes import Lane, Lanes, TooSlow
from kamado.storage.search import Order, SqlSearches
from kamado.storage.sql import Session, StoreSettings, Value
from kamado.store import Searches

__all__ = ["SearchPool", "SearchSession", "add_functions"]

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
    """Runs searches in threads: those that are quick, and beside them those that are not.

    Args:
        open_session: Opens a session for the thread that calls, whose connections have been through `add_functions`.
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
        self._lanes = Lanes(settings)
        self._threads = {
            lane: ThreadPoolExecutor(settings.search_workers, thread_name_prefix=f"kamado-search-{lane.name}")
            for lane in (self._lanes.quick, self._lanes.heavy)
        }
        self._closing = threading.Event()
        self._sessions: list[SearchSession] = []
        self._local = threading.local()

    async def run(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool) -> T:
        """Run a search; see `store.Store.search`."""

        async def attempt(lane: Lane, deadline: float) -> T:
            if self._closing.is_set():
                raise Unavailable("the database is closed")
            lane.enter()
            cancelled = threading.Event()
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._threads[lane], self._search, work, lane, deadline, cancelled)
            future.add_done_callback(partial(_leave, lane))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        return await self._lanes.run(attempt, is_heavy=is_heavy)

    async def close(self) -> None:
        """Give up what runs, then end the threads and their connections."""
        self._closing.set()
        for threads in self._threads.values():
            await asyncio.to_thread(threads.shutdown)
        for session in self._sessions:
            session.close()

    # In a thread of the pool

    def _search(
        self,
        work: Callable[[Searches], Awaitable[T]],
        lane: Lane,
        deadline: float,
        cancelled: threading.Event,
    ) -> T:
        def has_left() -> bool:
            return cancelled.is_set() or self._closing.is_set()

        end = min(deadline, time.monotonic() + lane.time_limit)

        def is_over() -> bool:
            return has_left() or time.monotonic() > end

        if is_over():
            raise self._given_up(has_begun=False)
        session = self._session()
        session.connection.set_progress_handler(is_over, _STEPS)
        session.begin_snapshot()
        try:
            return self._drive(work(SqlSearches(session, _Dialect())))
        except Unavailable as error:
            if is_over():
                raise self._given_up(has_begun=True) from error
            raise
        finally:
            session.connection.set_progress_handler(None, 0)
            session.end_snapshot()

    def _given_up(self, *, has_begun: bool) -> Unavailable:
        return Unavailable("the database is closed") if self._closing.is_set() else TooSlow(has_begun=has_begun)

    def _session(self) -> SearchSession:
        session: SearchSession | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = self._open_session()
            self._sessions.append(session)
        return session


def _leave(lane: Lane, future: "asyncio.Future[Any]") -> None:
    lane.leave()
    if not future.cancelled():
        future.exception()  # if the caller was cancelled, nobody else asks for it


# What SQL lacks


def add_functions(connection: sqlite3.Connection) -> None:
    """Prepare a connection for searches. Once: to define a function anew makes SQLite compile each statement anew."""
    connection.create_function("kamado_is_match", 2, _is_match, deterministic=True)
    connection.create_function("kamado_meets", 2, _meets, deterministic=True)
    connection.create_function("kamado_rank", 2, _rank, deterministic=True)
    connection.create_function("kamado_value", 2, _value, deterministic=True)


_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_UNREADABLE = ("\0", "\ufffe", "\uffff")
"""GLOB ends with the first, and takes the others for U+FFFD."""


def _is_match(text: str | None, pattern: str) -> bool:
    return text is not None and is_match(pattern, text)


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

    reads_documents_quickly = False

    def is_match(self, text: str, pattern: str, add: Callable[[Value], str]) -> str:
        slowly = f"kamado_is_match({text}, {add(pattern)})"
        if any(character in pattern for character in _UNREADABLE):
            return slowly
        quickly = f"{text} GLOB {add(pattern.replace('[', '[[]'))}"
        has_unreadable = " OR ".join(f"instr({text}, char({ord(character)}))" for character in _UNREADABLE)
        return f"CASE WHEN {has_unreadable} THEN {slowly} ELSE {quickly} END"

    def meets(self, document: str, condition: Filter, add: Callable[[Value], str]) -> str:
        return f"kamado_meets({document}, {add(_encode([condition.pointer, condition.value]).decode())})"

    def timestamp(self, column: str) -> str:
        return f"strftime('%Y-%m-%dT%H:%M:%SZ', {column} / 1000000, 'unixepoch')"

    def order(self, document: str, sort: Sort, name: str, add: Callable[[Value], str]) -> Order:
        if not _has_path(sort):
            pointer = add(_encode(sort.pointer).decode())
            return Order("", [f"kamado_rank({document}, {pointer})", f"kamado_value({document}, {pointer})"])
        path = add(_path(sort.pointer))
        # In the order of management 7.3; text compares by its bytes, so by code points.
        rank = (
            f"CASE json_type({document}, {path}) WHEN 'integer' THEN 1 WHEN 'real' THEN 1 WHEN 'text' THEN 2 "
            "WHEN 'object' THEN 3 WHEN 'array' THEN 4 WHEN 'false' THEN 5 WHEN 'true' THEN 6 ELSE 0 END"
        )
        # SQLite's own function takes a NUL for the end of a text.
        pointer = add(_encode(sort.pointer).decode())
        value = (
            f"CASE WHEN json_type({document}, {path}) = 'text' AND instr({document}, '\\u0000') "
            f"THEN kamado_value({document}, {pointer}) "
            f"WHEN json_type({document}, {path}) IN ('integer', 'real', 'text') "
            f"THEN json_extract({document}, {path}) END"
        )
        return Order("", [rank, value])


def _has_path(sort: Sort) -> bool:
    """Tell whether SQLite's own paths can say what a pointer says: no index, and no label that JSON escapes."""
    return not sort.has_index and all(
        character >= " " and character not in '"\\' for token in sort.pointer for character in token
    )


def _path(pointer: Pointer) -> str:
    return "$" + "".join(f'."{token}"' for token in pointer)
