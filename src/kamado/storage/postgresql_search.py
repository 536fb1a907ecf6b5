"""Searches on PostgreSQL: two lanes, a snapshot and a time limit for each search, and what SQL needs to read documents.

A document is read by operators and no function of our own: a statement is made for each search anyway, so it can spell
out the pointer's steps, and nothing has to be in the database that an upgrade would have to replace. Type `json`, not
`jsonb`: it is read once and thrown away, which is quicker than building a tree, and keeps apart `1e23` and the integer.
"""

# ruff: noqa: S608 - the parts of a statement are texts of this file; what comes from outside is a parameter

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Final, TypeVar, cast

import asyncpg

from kamado.errors import Unavailable
from kamado.search import Filter, Scalar, Sort, is_index
from kamado.storage.escape import escape, unescape
from kamado.storage.lanes import Lane, Lanes, TooSlow
from kamado.storage.postgresql_database import Connection
from kamado.storage.search import Order, SqlSearches
from kamado.storage.sql import Row, StoreSettings, Value
from kamado.store import Searches

__all__ = ["PostgresqlSearches"]

T = TypeVar("T")

_SLACK: Final = 0.01
"""Seconds by which a statement may outlast its search: below this the server is not told that less time is left."""
_GRACE: Final = 1.0
"""Seconds after which a server that should have ended a statement is given up."""
_BEGIN: Final = "; ".join(
    (
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        # Each statement is planned for its own parameters: whether a range of an index is small depends on them.
        "SET LOCAL plan_cache_mode = force_custom_plan",
        # Takes longer than most searches.
        "SET LOCAL jit = off",
        # No search takes more than one processor.
        "SET LOCAL max_parallel_workers_per_gather = 0",
        # What an index has in the wanted order is read in that order. A planner without statistics expects few rows,
        # and would read and sort all of them for a page of 30. Where there is no such index, it sorts all the same.
        "SET LOCAL enable_sort = off",
        # What the store's connections have otherwise, for point reads.
        "SET LOCAL enable_seqscan = on",
        "SET LOCAL enable_hashjoin = on",
        "SET LOCAL enable_mergejoin = on",
    )
)


class PostgresqlSearches:
    """Runs searches: those that are quick, and beside them those that are not.

    Args:
        acquire: Lends a connection that no transaction runs on. Whatever the driver raises inside comes out as
            `Unavailable`.
        settings: See there.
    """

    def __init__(self, acquire: Callable[[], AbstractAsyncContextManager[Connection]], settings: StoreSettings) -> None:
        self._acquire = acquire
        self._lanes = Lanes(settings)
        self._turns = {
            lane: asyncio.Semaphore(settings.search_workers) for lane in (self._lanes.quick, self._lanes.heavy)
        }
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    async def run(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool) -> T:
        """Run a search; see `store.Store.search`. Cancelled, it ends on the server, too."""

        async def attempt(lane: Lane, deadline: float) -> T:
            if self._closing:
                raise Unavailable("the database is closed")
            lane.enter()
            limit = asyncio.timeout(deadline - time.monotonic())
            self._running.add(limit)
            self._idle.clear()
            has_begun = False
            try:
                async with limit, self._turns[lane], self._acquire() as connection:
                    now = time.monotonic()
                    if now >= deadline:
                        raise TooSlow(has_begun=False)
                    has_begun = True
                    # From here on the server keeps the time, which leaves the connection usable.
                    limit.reschedule(None)
                    return await self._search(work, connection, min(deadline, now + lane.time_limit))
            except TimeoutError as error:
                raise (
                    Unavailable("the database is closed") if self._closing else TooSlow(has_begun=has_begun)
                ) from error
            finally:
                lane.leave()
                self._running.discard(limit)
                if not self._running:
                    self._idle.set()

        return await self._lanes.run(attempt, is_heavy=is_heavy)

    async def _search(self, work: Callable[[Searches], Awaitable[T]], connection: Connection, end: float) -> T:
        session = _Session(connection, end)
        try:
            await session.begin()
            return await work(SqlSearches(session, _Dialect()))
        except asyncpg.QueryCanceledError as error:
            if time.monotonic() >= end:
                raise TooSlow(has_begun=True) from error
            raise
        finally:
            await connection.execute("ROLLBACK", timeout=_GRACE)

    async def close(self) -> None:
        """Give up what runs, and wait until it has given back its connections."""
        self._closing = True
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(0)
        await self._idle.wait()


class _Session:
    """`storage.search.SearchSession` for one search, on one snapshot."""

    def __init__(self, connection: Connection, end: float) -> None:
        self._connection = connection
        self._end = end
        self._allowed = 0.0
        """Seconds after which the server ends a statement."""

    async def begin(self) -> None:
        """Begin the snapshot."""
        await self._connection.execute(f"{_BEGIN}; {self._limit()}", timeout=self._patience)

    async def one(self, statement: str, *parameters: Value) -> Row | None:
        rows = await self.all(statement, *parameters)
        return rows[0] if rows else None

    async def all(self, statement: str, *parameters: Value) -> list[Row]:
        if time.monotonic() + self._allowed > self._end + _SLACK:
            await self._connection.execute(self._limit(), timeout=self._patience)
        values = [escape(value) if isinstance(value, str) else value for value in parameters]
        rows = await self._connection.fetch(_translate(statement), *values, timeout=self._patience)
        return [tuple(unescape(value) if isinstance(value, str) else value for value in row) for row in rows]

    def array(self, values: Sequence[str]) -> Value:
        return cast(Value, [escape(value) for value in values])

    @property
    def _patience(self) -> float:
        return self._allowed + _GRACE

    def _limit(self) -> str:
        """Return what tells the server how much time is left."""
        # In whole milliseconds, of which 0 would be no limit.
        milliseconds = math.ceil(max(self._end - time.monotonic(), 0.0) * 1000) + 1
        self._allowed = milliseconds / 1000
        return f"SET LOCAL statement_timeout = {milliseconds}"


_PARAMETER: Final = re.compile(r"\?(?=[0-9])")


@lru_cache(maxsize=1024)
def _translate(statement: str) -> str:
    # No statement of searches has a question mark elsewhere: what is looked for is a parameter.
    return _PARAMETER.sub("$", statement)


# Documents

# Text of JSON writes these characters like this, except after a backslash that is itself escaped, which is therefore
# written otherwise first. Then they are escaped as in `storage.escape`: type json reads no NUL.
_ESCAPES: Final = (
    (r"\\", r"\u005c"),
    (r"\u0001", r"\u0001\u0004"),
    (r"\u0002", r"\u0001\u0005"),
    (r"\u0000", r"\u0001\u0003"),
)


def _literal(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\") + "'"


def _json(document: str) -> str:
    """Return a document as a value of type json, with its texts as all texts are stored."""
    escaped = document
    for written, replacement in _ESCAPES:
        escaped = f"replace({escaped}, {_literal(written)}, {_literal(replacement)})"
    is_concerned = f"strpos({document}, {_literal(chr(92) + 'u000')}) > 0"
    return f"CAST(CASE WHEN {is_concerned} THEN {escaped} ELSE {document} END AS json)"


_TEXT: Final = """(v #>> '{}') COLLATE "C\""""
"""What a string says."""
_MAX_INDEX: Final = 2**31 - 1


def _index(token: str) -> str:
    return str(min(int(token[:10]), _MAX_INDEX))


def _indexes(pointer: Sequence[str]) -> str:
    """Return the array indexes that tokens are, NULL for those that are none."""
    indexes = [_index(token) if is_index(token) else "NULL" for token in pointer]
    return f"CAST(ARRAY[{', '.join(indexes)}] AS int[])"


def _tokens(pointer: Sequence[str], add: Callable[[Value], str]) -> str:
    return f"CAST(ARRAY[{', '.join(map(add, pointer))}] AS text[])"


class _Dialect:
    """`storage.search.SearchDialect`."""

    def is_match(self, text: str, pattern: str, add: Callable[[Value], str]) -> str:
        pattern = _WILDCARDS.sub(_in_order, pattern)
        quickly = f"{text} LIKE {add(_like(pattern))}"
        if not _MISREAD.search(pattern):
            return quickly
        return f"CASE WHEN strpos({text}, E'\\x01') = 0 THEN {quickly} ELSE {text} ~ {add(_expression(pattern))} END"

    reads_documents_quickly = True

    def meets(self, document: str, condition: Filter, add: Callable[[Value], str]) -> str:
        # Where the pointer leads to one value without passing an array but by index, as mostly, that one counts; and
        # where there is no array at all, there is no other. `OFFSET 0` makes it be looked for once.
        return f"""(
 SELECT CASE
  WHEN json_typeof(v) IN ('string', 'number', 'boolean') THEN {self._is_equal(condition.value, add)}
  WHEN strpos({document}, '[') = 0 THEN false
  ELSE {self._meets_somewhere(document, condition, add)} END
 FROM (SELECT {_at(_json(document), condition.pointer, add)} AS v OFFSET 0) a)"""

    def _meets_somewhere(self, document: str, condition: Filter, add: Callable[[Value], str]) -> str:
        tokens, indexes = _tokens(condition.pointer, add), _indexes(condition.pointer)
        # As in `search._resolve`: an array is passed by its index or else by all its elements; `->` with an index finds
        # nothing in an object, and with a name nothing in an array.
        return f"""EXISTS (
 WITH RECURSIVE walk (v, step) AS (
  SELECT {_json(document)}, 1
  UNION ALL
  SELECT n.v, n.step FROM walk w CROSS JOIN LATERAL (
   SELECT e.v, w.step
   FROM json_array_elements(
    CASE WHEN json_typeof(w.v) = 'array' AND ({indexes})[w.step] IS NULL THEN w.v END) e (v)
   UNION ALL
   SELECT coalesce(w.v -> ({tokens})[w.step], w.v -> ({indexes})[w.step]), w.step + 1) n (v, step)
  WHERE n.v IS NOT NULL)
 SELECT 1 FROM walk WHERE step = {len(condition.pointer) + 1} AND {self._is_equal(condition.value, add)})"""

    def _is_equal(self, wanted: Scalar, add: Callable[[Value], str]) -> str:
        if isinstance(wanted, str):
            is_pattern = Filter(pointer=(), value=wanted).is_pattern
            compared = self.is_match(_TEXT, wanted, add) if is_pattern else f"{_TEXT} = {add(wanted)}"
            return f"json_typeof(v) = 'string' AND {compared}"
        if isinstance(wanted, bool):
            return f"CAST(v AS text) = '{'true' if wanted else 'false'}'"
        # Exactly, as Python compares: a fraction is what the nearest double is, an integer has all its digits.
        whole = int(wanted) if wanted == math.floor(wanted) else None
        integer = (
            "false"
            if whole is None
            else f"CAST(CAST(v AS text) AS numeric) = CAST(CAST({add(str(whole))} AS text) AS numeric)"
        )
        double = _double(wanted)
        fraction = (
            "false"
            if double is None
            else (f"CAST(CAST(v AS text) AS float8) = CAST(CAST({add(repr(double))} AS text) AS float8)")
        )
        return (
            "CASE WHEN json_typeof(v) <> 'number' THEN false "
            f"WHEN CAST(v AS text) ~ '[.eE]' THEN {fraction} ELSE {integer} END"
        )

    def timestamp(self, column: str) -> str:
        return f"""to_char(to_timestamp({column} / 1000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"""

    def order(self, document: str, sort: Sort, name: str, add: Callable[[Value], str]) -> Order:
        # `OFFSET 0` keeps the planner from reading the document once for each part.
        join = f" CROSS JOIN LATERAL (SELECT {_at(_json(document), sort.pointer, add)} AS v OFFSET 0) {name}"
        v = f"{name}.v"
        rank = (
            f"CASE json_typeof({v}) WHEN 'number' THEN 1 WHEN 'string' THEN 2 WHEN 'object' THEN 3 WHEN 'array' THEN 4 "
            f"WHEN 'boolean' THEN CASE CAST({v} AS text) WHEN 'false' THEN 5 ELSE 6 END ELSE 0 END"
        )
        number = f"CASE json_typeof({v}) WHEN 'number' THEN {_number(f'CAST({v} AS text)')} END"
        text = f"""(CASE json_typeof({v}) WHEN 'string' THEN {v} #>> '{{}}' END) COLLATE "C\""""
        return Order(join, [rank, number, text])


def _double(number: float) -> float | None:
    """Return the double that equals a number, if one does."""
    try:
        double = float(number)
    except OverflowError:
        return None
    return double if double == number else None


# Patterns

_WILDCARDS: Final = re.compile(r"[?*]*[*][?*]*")
_MISREAD: Final = re.compile("[?]|[*][\x03-\x05]")
"""What LIKE takes for other than it is in a text that has escaped characters: `?` for half of one, and what follows a
`*` for the second half of one."""
_LIKE: Final = {"*": "%", "?": "_", "%": r"\%", "_": r"\_", "\\": r"\\"}
_ONE: Final = r"(?:[^\u0001]|\u0001.)"
_SPECIAL: Final = re.compile(r"[^\w\s]", re.ASCII)


def _in_order(found: re.Match[str]) -> str:
    # The same with one `*`: a regular expression with hundreds of them in a row takes minutes.
    return "?" * found[0].count("?") + "*"


def _like(pattern: str) -> str:
    return "".join(_LIKE.get(character, character) for character in pattern)


def _expression(pattern: str) -> str:
    """Return a pattern as a regular expression over texts as they are stored."""
    return f"^{''.join(map(_expression_of, pattern))}$"


def _expression_of(character: str) -> str:
    if character == "*":
        return _ONE + "*"
    if character == "?":
        return _ONE
    if character < "\x03":
        return rf"\u0001\u000{ord(character) + 3}"
    return "\\" + character if _SPECIAL.fullmatch(character) and character < "\x80" else character


# Orders

_LOOSE_INDEX: Final = re.compile(r"\s*[+-]?[0-9]+", re.ASCII)
"""What `#>` takes for an array index."""


def _at(json: str, pointer: Sequence[str], add: Callable[[Value], str]) -> str:
    """Return what a pointer leads to that passes arrays by index only."""
    if all(is_index(token) or not _LOOSE_INDEX.fullmatch(token) for token in pointer):
        return f"{json} #> {_tokens(pointer, add)}"
    for token in pointer:
        name = f"CAST({add(token)} AS text)"
        if is_index(token):
            # One of the two is NULL.
            json = f"(SELECT coalesce(v -> {name}, v -> {_index(token)}) FROM (SELECT {json} AS v) a)"
        else:
            json = f"({json} -> {name})"
    return json


def _number(text: str) -> str:
    """Return the exact value of a number, of which a fraction stands for the nearest double.

    Up to 10**16 a double that is whole is written with all its digits; beyond, it is an integer of 61 bits (of which
    the last are 0) times a power of two.
    """
    double = f"CAST({text} AS float8)"
    power = f"greatest(floor(ln(abs({double})) / ln(CAST(2 AS float8))) - 60, 0)"
    whole = f"CAST(CAST({double} / power(CAST(2 AS float8), {power}) AS int8) AS numeric)"
    return (
        f"CASE WHEN {text} ~ '[eE]' AND abs({double}) >= 1e16 "
        f"THEN {whole} * power(CAST(2 AS numeric), CAST({power} AS numeric)) ELSE CAST({text} AS numeric) END"
    )
