"""The statements of `sql.py` in PostgreSQL's words: one at a time, or for many sets of parameters at once.

A statement with numbered parameters is joined with a table of parameter sets, `unnest($1::text[], ...)`: a look-up
becomes a join, an insertion one of many rows. Which set a row belongs to is told by its ordinal or, where an insertion
cannot say that, by its key.
"""

# ruff: noqa: S608 - the parts of a statement are texts of `sql.py`; what comes from outside is a parameter

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from kamado.storage.escape import escape, unescape
from kamado.storage.postgresql_database import Connection
from kamado.storage.sql import Row, Value
from kamado.storage.together import LOCK_NAME

__all__ = ["Executor", "Statement", "translate"]

_MAX_ROWS: Final = 1000
"""Sets of parameters of one statement, each of which has its time."""
_PARAMETER: Final = re.compile(r"\?(\d+)")
_ARRAY: Final = re.compile(r"= ANY\(\?(\d+)\)")
_LOCK: Final = re.compile(r"\s+FOR (KEY SHARE|UPDATE)$")
_BOUND: Final = re.compile(r"\b(LIMIT|OFFSET) \?")
_INSERT: Final = re.compile(
    r"INSERT INTO (?P<table>\w+)\s*\((?P<columns>[^)]*)\)\s*VALUES\s*\((?P<values>[^)]*)\)"
    r"(?P<conflict>\s*ON CONFLICT(?:\s*\((?P<key>[^)]*)\))?.*?)?(?:\s*RETURNING (?P<returning>.*))?",
    re.DOTALL,
)
_UPDATE: Final = re.compile(
    r"(?P<head>UPDATE .*?)\s+WHERE (?P<where>.*?)(?:\s*RETURNING (?P<returning>.*))?", re.DOTALL
)
_DELETE: Final = re.compile(
    r"(?P<head>DELETE FROM \w+)\s+WHERE (?P<where>.*?)(?:\s*RETURNING (?P<returning>.*))?", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement, translated."""

    text: str
    """For one set of parameters."""
    parameters: int
    is_select: bool
    returns_rows: bool
    joined: str | None
    """For many sets, with `{source}` for the table of these, `p`; `None` if they must be run one after the other.
    What it returns begins with the ordinal, or with the key."""
    key: tuple[int, ...] = ()
    """For an insertion that may leave rows out: which parameters (from 0) are the key that its result begins with."""
    is_certain: bool = False
    """An insertion that inserts every row or fails."""

    def source(self, types: Sequence[str]) -> str:
        """Return the table of parameter sets, for parameters of these types."""
        arrays = ", ".join(f"${number}::{name}[]" for number, name in enumerate(types, 1))
        names = ", ".join(f"p{number}" for number in range(1, len(types) + 1))
        return f"unnest({arrays}) WITH ORDINALITY AS p({names}, o)"


def translate(statement: str, *, may_lock: bool) -> Statement:
    """Translate a statement.

    Args:
        statement: In the words of `sql.py`.
        may_lock: Whether the transaction may lock rows; one that only reads may not.
    """
    statement = statement.strip()
    if statement == LOCK_NAME:
        statement = "SELECT pg_advisory_xact_lock(hashtextextended(?1, 0))"
    if not may_lock:
        statement = _LOCK.sub("", statement)
    numbers = {int(number) for number in _PARAMETER.findall(statement)}
    is_select = statement.startswith(("SELECT", "WITH"))
    joined, key, is_certain = _join(statement) if numbers else (None, (), False)
    return Statement(
        text=_with_parameters(statement, "$"),
        parameters=len(numbers),
        is_select=is_select,
        returns_rows=is_select or "RETURNING" in statement,
        joined=joined,
        key=key,
        is_certain=is_certain,
    )


def _with_parameters(statement: str, name: str) -> str:
    statement = _ARRAY.sub(rf"= ANY(string_to_array({name}\1, E'\\x02'))", statement)
    return _PARAMETER.sub(rf"{name}\1", statement)


def _join(statement: str) -> tuple[str | None, tuple[int, ...], bool]:
    """Return the joined statement, the key and whether it is certain; see `Statement`."""
    text = _with_parameters(statement, "p.p")
    if statement.startswith("SELECT"):
        # A bound on the rows cannot come from another table.
        if _BOUND.search(statement):
            return None, (), False
        # The offset keeps the planner inside: there everything of a key is known, and so the index that has all of it
        # is the best, whatever the statistics say. Otherwise it may begin with the tenant and pass all its devices.
        return f"SELECT p.o, s.* FROM {{source}}, LATERAL ({text} OFFSET 0) AS s", (), False
    if statement.startswith("INSERT"):
        return _join_insert(statement)
    for form, word in ((_UPDATE, "FROM"), (_DELETE, "USING")):
        parts = form.fullmatch(text)
        if parts is not None:
            returning = f", {parts['returning']}" if parts["returning"] else ""
            return f"{parts['head']} {word} {{source}} WHERE {parts['where']} RETURNING p.o{returning}", (), False
    return None, (), False


def _join_insert(statement: str) -> tuple[str | None, tuple[int, ...], bool]:
    parts = _INSERT.fullmatch(statement)
    if parts is None:
        return None, (), False
    insert = (
        f"INSERT INTO {parts['table']} ({parts['columns']}) "
        f"SELECT {_with_parameters(parts['values'], 'p.p')} FROM {{source}} ORDER BY p.o"
    )
    if parts["conflict"] is None:
        return (None, (), False) if parts["returning"] else (insert, (), True)
    if parts["key"] is None:
        return None, (), False
    columns = [column.strip() for column in parts["columns"].split(",")]
    values = [value.strip() for value in parts["values"].split(",")]
    names = [name.strip() for name in parts["key"].split(",")]
    key = tuple(int(values[columns.index(name)].removeprefix("?")) - 1 for name in names)
    returning = ", ".join(
        [f"{parts['table']}.{name}" for name in names] + ([parts["returning"]] * bool(parts["returning"]))
    )
    return f"{insert} {parts['conflict'].strip()} RETURNING {returning}", key, False


# Running them


class _Statements:
    """Statements that were translated, and the types of their parameters, which the database tells once."""

    def __init__(self) -> None:
        self._translated: dict[tuple[str, bool], Statement] = {}
        self._joined: dict[str, str] = {}

    def get(self, statement: str, *, may_lock: bool) -> Statement:
        found = self._translated.get((statement, may_lock))
        if found is None:
            found = self._translated[statement, may_lock] = translate(statement, may_lock=may_lock)
        return found

    async def joined(self, connection: Connection, statement: Statement) -> str:
        text = self._joined.get(statement.text)
        if text is None:
            assert statement.joined is not None
            prepared = await connection.prepare(statement.text)
            types = [parameter.name for parameter in prepared.get_parameters()]
            text = self._joined[statement.text] = statement.joined.format(source=statement.source(types))
        return text


_statements = _Statements()


def _sent(value: Value) -> Value:
    # What is `Joined` is no plain text any more.
    return escape(value) if type(value) is str else value


def _read(row: Any) -> Row:
    for value in row:
        if type(value) is str and "\x01" in value:
            return tuple(unescape(one) if type(one) is str else one for one in row)
    return cast(Row, row)


class Executor:
    """Runs statements of `sql.py` on one connection.

    Args:
        connection: The connection.
        may_lock: See `postgresql_statements.translate`.
    """

    def __init__(self, connection: Connection, *, may_lock: bool) -> None:
        self._connection = connection
        self._may_lock = may_lock

    async def execute(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        """`together.Execute`."""
        if statement == LOCK_NAME and not self._may_lock:
            return [[]] * len(rows)
        found = _statements.get(statement, may_lock=self._may_lock)
        if not found.is_select:
            return await self._change(found, rows)
        # Many ask for the same tenant.
        different = dict.fromkeys(map(tuple, rows))
        if len(different) == 1:
            result: Sequence[Row] = await self._run_one(found, rows[0])
            return [result] * len(rows)
        results = dict(zip(different, await self._run_many(found, list(different)), strict=True))
        return [results[tuple(row)] for row in rows]

    async def _change(self, statement: Statement, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        if len(rows) == 1:
            return [await self._run_one(statement, rows[0])]
        return await self._run_many(statement, rows)

    async def _run_one(self, statement: Statement, parameters: Sequence[Value]) -> Sequence[Row]:
        sent = [_sent(value) for value in parameters]
        if statement.returns_rows:
            return [_read(row) for row in await self._connection.fetch(statement.text, *sent)]
        status = await self._connection.execute(statement.text, *sent)
        number = status.rpartition(" ")[2]
        return [()] * (int(number) if number.isdigit() else 0)

    async def _run_many(self, statement: Statement, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        if statement.joined is None:
            return [await self._run_one(statement, row) for row in rows]
        if len(rows) > _MAX_ROWS:
            done: list[Sequence[Row]] = []
            for start in range(0, len(rows), _MAX_ROWS):
                done += await self._run_many(statement, rows[start : start + _MAX_ROWS])
            return done
        text = await _statements.joined(self._connection, statement)
        ordered = rows
        if statement.key:
            # In one order everywhere: of two transactions that want the same keys, one waits for the other, not both.
            ordered = sorted(rows, key=lambda row: [str(row[index]) for index in statement.key])
        columns = [[_sent(value) for value in column] for column in zip(*ordered, strict=True)]
        found = await self._connection.fetch(text, *columns)
        if statement.is_certain:
            return [[()]] * len(rows)
        results: list[list[Row]] = [[] for _ in rows]
        if not statement.key:
            for row in found:
                results[row[0] - 1].append(_read(row[1:]))
            return results
        width = len(statement.key)
        inserted = {tuple(map(unescape, row[:width])): _read(row[width:]) for row in found}
        for parameters, result in zip(rows, results, strict=True):
            # Of two with one key, the first has come in.
            come = inserted.pop(tuple(cast(str, parameters[index]) for index in statement.key), None)
            if come is not None:
                result.append(come)
        return results
