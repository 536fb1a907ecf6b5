"""Use cases that keep in step: what they ask at the same moment is asked once, and each has its own outcome."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from kamado.errors import Conflict
from kamado.storage.sql import Row, Session, Value
from kamado.storage.together import Outcome, StepSession, is_write, run_together

SELECT = "SELECT value FROM t WHERE key = ?1"
OTHER = "SELECT other FROM t WHERE key = ?1"
INSERT = "INSERT INTO t (key) VALUES (?1) ON CONFLICT (key) DO NOTHING"


class Table:
    """A database with one table, and what was asked of it."""

    def __init__(self) -> None:
        self.keys: set[Value] = set()
        self.asked: list[tuple[str, list[tuple[Value, ...]]]] = []

    async def execute(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        self.asked.append((statement, [tuple(row) for row in rows]))
        if not is_write(statement):
            return [[(str(row[0]) + "!",)] for row in rows]
        results: list[list[Row]] = []
        for (key,) in rows:
            results.append([] if key in self.keys else [()])
            self.keys.add(key)
        return results

    def run(self, *works: Awaitable[Any]) -> list[Outcome[Any]]:
        return asyncio.run(run_together(works, self.execute))


session = StepSession()


async def look(key: str) -> object:
    row = await session.one(SELECT, key)
    return None if row is None else row[0]


async def create(key: str) -> str:
    await session.one(SELECT, key)
    if not await session.run(INSERT, key):
        raise Conflict(key)
    return key


def test_equal_statements_of_a_moment_are_asked_as_one() -> None:
    table = Table()
    outcomes = table.run(look("a"), look("b"), look("c"))
    assert [outcome.value for outcome in outcomes] == ["a!", "b!", "c!"]
    assert table.asked == [(SELECT, [("a",), ("b",), ("c",)])]


def test_different_statements_of_a_moment_are_each_asked_once() -> None:
    async def look_elsewhere(key: str) -> object:
        row = await session.one(OTHER, key)
        assert row is not None
        return row[0]

    table = Table()
    table.run(look("a"), look_elsewhere("b"), look("c"))
    assert table.asked == [(SELECT, [("a",), ("c",)]), (OTHER, [("b",)])]


def test_each_use_case_has_its_own_outcome() -> None:
    table = Table()
    outcomes = table.run(create("a"), create("b"), create("a"))
    assert [outcome.value for outcome in outcomes] == ["a", "b", None]
    assert isinstance(outcomes[2].error, Conflict)
    assert [outcome.has_changed for outcome in outcomes] == [True, True, False], "nothing of the last is to be undone"
    assert table.asked[1] == (INSERT, [("a",), ("b",), ("a",)])


def test_a_failure_after_a_change_is_told_as_one() -> None:
    async def change_and_fail() -> None:
        await session.run(INSERT, "a")
        raise Conflict("late")

    failed, done = Table().run(change_and_fail(), create("b"))
    assert failed.has_changed
    assert isinstance(failed.error, Conflict)
    assert done.value == "b"


def test_a_use_case_of_more_steps_goes_on_alone() -> None:
    async def look_twice(key: str) -> list[object]:
        return [await look(key), await look(key + key)]

    table = Table()
    outcomes = table.run(look("a"), look_twice("b"))
    assert outcomes[1].value == ["b!", "bb!"]
    assert table.asked == [(SELECT, [("a",), ("b",)]), (SELECT, [("bb",)])]


def test_rows_of_several_are_kept_apart() -> None:
    async def many(*keys: str) -> object:
        return await session.each(SELECT, [(key,) for key in keys])

    table = Table()
    outcomes = table.run(many("a", "b"), many(), many("c"))
    assert [outcome.value for outcome in outcomes] == [[("a!",), ("b!",)], [], [("c!",)]]
    assert table.asked == [(SELECT, [("a",), ("b",), ("c",)])]


def test_what_can_be_combined_is_called_once() -> None:
    calls: list[list[int]] = []

    async def add_up(inner: Session, numbers: Sequence[int]) -> list[int]:
        calls.append(list(numbers))
        await inner.run(INSERT, "counted")
        return [sum(numbers[: index + 1]) for index in range(len(numbers))]

    async def count(number: int) -> int:
        return await session.combine(add_up, number)

    table = Table()
    outcomes = table.run(count(1), count(2), count(3))
    assert [outcome.value for outcome in outcomes] == [1, 3, 6]
    assert calls == [[1, 2, 3]]
    assert all(outcome.has_changed for outcome in outcomes)
    assert table.asked == [(INSERT, [("counted",)])]


def test_what_can_be_combined_waits_for_those_that_have_more_steps() -> None:
    """Else devices are counted that are not there yet, or not those that are: `device_ranges` would drift."""
    counted: list[int] = []

    async def count(inner: Session, numbers: Sequence[int]) -> list[int]:
        counted.append(len(numbers))
        return list(numbers)

    async def create(steps: int) -> int:
        for step in range(steps):
            await session.run(INSERT, f"{steps}-{step}")
        return await session.combine(count, steps)

    outcomes = Table().run(create(1), create(3), create(2))
    assert [outcome.value for outcome in outcomes] == [1, 3, 2]
    assert counted == [3]


def test_what_the_database_raises_ends_all() -> None:
    ended: list[str] = []

    async def look_and_tell(key: str) -> None:
        try:
            await look(key)
        finally:
            ended.append(key)

    async def fail(statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        asyncio.run(run_together([look_and_tell("a"), look_and_tell("b")], fail))
    assert sorted(ended) == ["a", "b"]
