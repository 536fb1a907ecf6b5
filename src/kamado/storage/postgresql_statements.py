"""The statements of `sql.py` in PostgreSQL's words: one at a time, or for many sets of parameters at once.

A statement with numbered parameters is joined with a table of parameter sets, `unnest($1::text[], ...)`: a look-up
becomes a join, an insertion one of many rows. Which set a row belongs to is told by its ordinal or, where an insertion
cannot say that, by its key.
"""

# ruff: noqa: S608 - the parts of a statement are texts of `sql.py`; what comes from outside is a parameter

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kamado.storage.together import LOCK_NAME

__all__ = ["Statement", "translate"]

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
