"""Use cases that run side by side in one transaction, so that what they ask at the same moment is asked as one.

A use case awaits nothing but its session, so it can be run without an event loop: it is stepped until it asks for
something, everybody else is stepped as far, and equal statements go to the database as one, with the parameters of all.
Use cases of a kind keep in step from the first statement to the last: a hundred creations of devices take as many
round trips as one.

Knows no driver: `Execute` runs one statement for several sets of parameters.
"""

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from kamado.storage.escape import join
from kamado.storage.sql import Combined, Row, Value

__all__ = [
    "LOCK_NAME",
    "DirectSession",
    "Execute",
    "Outcome",
    "StatementSession",
    "StepSession",
    "is_write",
    "run_together",
]

T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")

Parameters = Sequence[Value]
Execute = Callable[[str, Sequence[Parameters]], Awaitable[Sequence[Sequence[Row]]]]
"""Runs a statement for each set of parameters; returns the rows of each, and one without columns for each row that a
statement has changed that returns none."""

LOCK_NAME: Final = "LOCK ?1"
"""Stands for what `sql.Session.lock` does, in the words of a driver."""


@lru_cache(maxsize=1024)
def is_write(statement: str) -> bool:
    """Tell whether a statement changes rows."""
    return not statement.lstrip().startswith(("SELECT", "WITH", LOCK_NAME))


class StatementSession:
    """`sql.Session` over something that takes statements; a subclass says what."""

    async def ask(self, statement: str, rows: Sequence[Parameters]) -> Sequence[Sequence[Row]]:
        """Run a statement for each set of parameters; see `Execute`."""
        raise AssertionError("a subclass says")

    async def one(self, statement: str, *parameters: Value) -> Row | None:
        (found,) = await self.ask(statement, (parameters,))
        return found[0] if found else None

    async def all(self, statement: str, *parameters: Value) -> list[Row]:
        (found,) = await self.ask(statement, (parameters,))
        return list(found)

    async def run(self, statement: str, *parameters: Value) -> int:
        (changed,) = await self.ask(statement, (parameters,))
        return len(changed)

    async def many(self, statement: str, rows: Sequence[Parameters]) -> None:
        if rows:
            await self.ask(statement, rows)

    async def each(self, statement: str, rows: Sequence[Parameters]) -> list[Row | None]:
        if not rows:
            return []
        return [found[0] if found else None for found in await self.ask(statement, rows)]

    async def combine(self, function: Combined[A, R], argument: A) -> R:
        (result,) = await function(self, (argument,))
        return result

    async def lock(self, name: str) -> None:
        await self.ask(LOCK_NAME, ((name,),))

    def array(self, values: Sequence[str]) -> Value:
        return join(values)

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()


class DirectSession(StatementSession):
    """A session whose statements are run as they come.

    Args:
        execute: Runs them.
    """

    def __init__(self, execute: Execute) -> None:
        self._execute = execute

    async def ask(self, statement: str, rows: Sequence[Parameters]) -> Sequence[Sequence[Row]]:
        return await self._execute(statement, rows)


class _Request(NamedTuple):
    """What a use case waits for: a statement with its parameters, or a function with its argument."""

    asked: str | Combined[Any, Any]
    arguments: Sequence[Any]


@types.coroutine
def _wait_for(request: _Request) -> Generator[_Request, Any, Any]:
    return (yield request)


class StepSession(StatementSession):
    """The session of use cases under `run_together`. It keeps nothing, so one serves all."""

    async def ask(self, statement: str, rows: Sequence[Parameters]) -> Sequence[Sequence[Row]]:
        return cast(Sequence[Sequence[Row]], await _wait_for(_Request(statement, rows)))

    async def combine(self, function: Combined[A, R], argument: A) -> R:
        return cast(R, await _wait_for(_Request(function, (argument,))))


@dataclass(slots=True)
class Outcome(Generic[T]):
    """What became of a use case."""

    value: T | None = None
    error: BaseException | None = None
    has_changed: bool = False
    """Whether it has changed anything: if it failed, that has to be undone."""


async def run_together(
    works: Sequence[Awaitable[Any]], execute: Execute, concerned: list[int] | None = None
) -> list[Outcome[Any]]:
    """Run use cases side by side.

    Args:
        works: Coroutines over a `StepSession`.
        execute: Runs statements; whatever it raises ends all.
        concerned: Is told which of them wait for what is being executed: who is concerned if that fails.

    Returns:
        The outcome of each, in their order.
    """
    session = DirectSession(execute)
    outcomes: list[Outcome[Any]] = [Outcome() for _ in works]
    running = {index: cast(Coroutine[Any, Any, Any], work) for index, work in enumerate(works)}
    answers: list[tuple[int, Any]] = [(index, None) for index in running]
    # What is combined waits until nobody has a plain statement to go before it: then it is done once, for all, and for
    # instance all devices that have been inserted are counted.
    held: dict[str | Combined[Any, Any], list[tuple[int, Sequence[Any]]]] = {}
    try:
        while answers or held:
            requests: dict[str | Combined[Any, Any], list[tuple[int, Sequence[Any]]]] = {}
            for index, answer in answers:
                try:
                    request: _Request = running[index].send(answer)
                except StopIteration as done:
                    outcomes[index].value = done.value
                    del running[index]
                except BaseException as error:  # its caller's affair, whatever it is
                    outcomes[index].error = error
                    del running[index]
                else:
                    asking = requests if isinstance(request.asked, str) else held
                    asking.setdefault(request.asked, []).append((index, request.arguments))
            answers = []
            if not requests:
                requests, held = held, {}
            for asked, askers in requests.items():
                arguments = [argument for _, some in askers for argument in some]
                if concerned is not None:
                    concerned[:] = [index for index, _ in askers]
                if isinstance(asked, str):
                    found = await execute(asked, arguments)
                    start = 0
                    for index, some in askers:
                        answer = found[start : start + len(some)]
                        start += len(some)
                        answers.append((index, answer))
                        if is_write(asked) and any(answer):
                            outcomes[index].has_changed = True
                else:
                    results = await asked(session, arguments)
                    for (index, _), result in zip(askers, results, strict=True):
                        answers.append((index, result))
                        outcomes[index].has_changed = True
    finally:
        for work in running.values():
            work.close()
    return outcomes
