"""Parts of the PostgreSQL dialect that need no server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import pytest

from kamado.errors import Unavailable
from kamado.storage.postgresql_database import Connection, Database, Failed, Mark
from kamado.storage.postgresql_lanes import BEGIN, Transactions, _Commits
from kamado.storage.postgresql_statements import Executor
from kamado.storage.sql import StoreSettings
from kamado.storage.together import LOCK_NAME, Outcome
from kamado.storage.turns import Job


def test_a_transaction_that_only_reads_waits_for_no_name() -> None:
    """Logins are read all the time, and must not wait for each other as their changes do."""
    nobody = cast(Connection, None)  # whoever asks it fails
    assert asyncio.run(Executor(nobody, may_lock=False).execute(LOCK_NAME, [("a",), ("b",)])) == [[], []]


def test_a_connection_whose_rollback_is_cancelled_leaves_its_place_to_another() -> None:
    events: list[str] = []

    class Interrupted:
        def is_closed(self) -> bool:
            return False

        def is_in_transaction(self) -> bool:
            return True

        async def execute(self, *_: object, **__: object) -> None:
            events.append("begun")
            await asyncio.sleep(60)

        def terminate(self) -> None:
            events.append("given up")

    async def test() -> None:
        database = Database("postgresql://db/kamado", StoreSettings(), min_size=1, max_size=1)
        database._pool = cast(Any, SimpleNamespace())
        releasing = asyncio.create_task(database._release(cast(Any, Interrupted())))
        await asyncio.sleep(0)
        releasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await releasing

    asyncio.run(test())
    assert events == ["begun", "given up"]


def test_commits_are_watched_until_they_end_whatever_the_driver_raises() -> None:
    """Nobody would look any more, and writes be refused for good."""
    asked = 0

    @asynccontextmanager
    async def connection() -> AsyncIterator[SimpleNamespace]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise RuntimeError("nobody has foreseen this")
        yield SimpleNamespace(fetch=find_nothing)

    async def find_nothing(*_: object) -> list[object]:
        return []

    async def test() -> None:
        commits = _Commits(cast(Database, SimpleNamespace(connection=connection, name="somewhere")))
        commits.abandon(Mark(1, "1", "a"))
        with pytest.raises(Unavailable):
            commits.check()
        assert commits._watching is not None
        await asyncio.wait_for(commits._watching, 30)
        commits.check()

    asyncio.run(test())


Wanted = tuple[str, ...]
"""What a use case asks for, one after the other."""


class Locks:
    """A database of which somebody keeps something locked. Whoever waits for that does so until it is unlocked."""

    def __init__(self, *locked: str, is_patient: bool = False) -> None:
        self.locked = set(locked)
        self.tries: list[tuple[set[Wanted], float | None]] = []
        """What was wanted in each transaction, and how long it was to wait for locks."""
        self.is_patient = is_patient
        self.is_waited_for = asyncio.Event()
        self.unlocked = asyncio.Event()

    async def attempt(self, jobs: list[Job], wait: float | None, asked: Any) -> list[Outcome[object]]:
        """Run use cases in step."""
        await asyncio.sleep(0)
        wanted = [cast(Wanted, job.work) for job in jobs]
        self.tries.append((set(wanted), wait))
        if "begin" in self.locked:
            raise Failed(asyncpg.LockNotAvailableError("no"))
        for step in range(max(map(len, wanted))):
            asked.asking[:] = [index for index, one in enumerate(wanted) if len(one) > step]
            asked.rows = [(wanted[index][step],) for index in asked.asking]
            if self.locked & {row[0] for row in asked.rows}:
                if self.is_patient and wait is not None and wait > 0.05:
                    self.is_waited_for.set()
                    await self.unlocked.wait()
                    if self.locked:
                        self.unlocked.clear()
                raise Failed(asyncpg.LockNotAvailableError("no"))
        return [Outcome(one) for one in wanted]

    def unlock(self) -> None:
        """Give back what is locked."""
        self.locked.clear()
        self.unlocked.set()


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> Callable[[Locks, float], Transactions]:
    """Makes transactions over what is locked, with so much time for a statement."""

    def make(locks: Locks, statement_timeout: float) -> Transactions:
        settings = StoreSettings(statement_timeout=statement_timeout)
        database = cast(Database, SimpleNamespace(check=lambda: None))
        monkeypatch.setattr(Transactions, "_try", lambda _, *arguments: locks.attempt(*arguments))
        return Transactions(database, None, settings, begin=BEGIN, writes=True, at_once=2)

    return make


Make = Callable[[Locks, float], Transactions]


async def outcomes_of(
    transactions: Transactions, *wanted: Wanted, tenant_id: str | None = None
) -> dict[Wanted, object]:
    """Run use cases; the first thing that each wants tells the device. Return whether each was done."""
    results = await asyncio.gather(
        *(transactions.run(cast(Any, one), ("t", one[0]) if tenant_id is None else None, tenant_id) for one in wanted),
        return_exceptions=True,
    )
    assert all(isinstance(result, tuple | Unavailable) for result in results), results
    return {one: isinstance(result, tuple) for one, result in zip(wanted, results, strict=True)}


def test_who_wants_a_row_that_somebody_keeps_locked_takes_nobody_along(transactions: Make) -> None:
    """Operating, "Somebody keeps rows locked": only what needs these rows fails."""
    devices = [(f"d{number}",) for number in range(20)]

    async def test() -> dict[Wanted, object]:
        return await outcomes_of(transactions(Locks("d7"), 0.1), *devices)

    assert asyncio.run(test()) == {one: one != ("d7",) for one in devices}


def test_those_who_want_the_same_row_are_not_looked_for_one_by_one(transactions: Make) -> None:
    creations = [(f"d{number}", "tenant", "usage") for number in range(100)]
    updates = [(f"u{number}", "tenant") for number in range(20)]
    locks = Locks("usage", is_patient=True)

    async def test() -> dict[Wanted, object]:
        running = asyncio.create_task(outcomes_of(transactions(locks, 600.0), *creations, *updates))
        async with asyncio.timeout(60):
            await locks.is_waited_for.wait()
        locks.unlock()
        return await running

    assert all(asyncio.run(test()).values())
    assert [wanted for wanted, _ in locks.tries[:3]] == [{*creations, *updates}, set(updates), set(creations)]
    assert len(locks.tries) < 10


def test_what_a_transaction_wants_to_begin_with_is_wanted_by_all_in_it(transactions: Make) -> None:
    """A copy keeps everybody from writing: nobody is to be looked for."""
    locks = Locks("begin")
    devices = [(f"d{number}",) for number in range(100)]

    async def test() -> dict[Wanted, object]:
        return await outcomes_of(transactions(locks, 0.0), *devices)

    assert not any(asyncio.run(test()).values())
    assert [wanted for wanted, _ in locks.tries] == [set(devices)]


def test_what_is_locked_in_one_tenant_is_in_no_other_ones_way(transactions: Make) -> None:
    """Operating, "Somebody keeps rows locked"."""
    locks = Locks("tenant t", is_patient=True)

    async def test() -> None:
        store = transactions(locks, 600.0)

        async def write(tenant_id: str, number: int) -> None:
            what = f"{tenant_id}{number}"
            await store.run(cast(Any, (what, f"tenant {tenant_id}")), (tenant_id, what))

        async def change_tenant() -> None:
            await store.run(cast(Any, ("tenant t",)), tenant_id="t")

        waiting = [asyncio.create_task(write("t", 0)), asyncio.create_task(change_tenant())]
        for number in range(1, 50):
            waiting += [asyncio.create_task(write("t", number)), asyncio.create_task(change_tenant())]
            async with asyncio.timeout(60):
                await write("u", number)
        assert not any(task.done() for task in waiting)
        locks.unlock()
        await asyncio.gather(*waiting)
        await store.close()

    asyncio.run(test())


def test_what_goes_through_does_not_let_out_what_is_locked_in_the_same_tenant(transactions: Make) -> None:
    """A change of the tenant waits for creations of our own, which have its row and wait for another."""
    locks = Locks("usage", "tenant t", is_patient=True)

    async def test() -> None:
        store = transactions(locks, 600.0)
        creation = asyncio.create_task(outcomes_of(store, ("d1", "usage")))
        changes = asyncio.create_task(outcomes_of(store, ("tenant t",), tenant_id="t"))
        async with asyncio.timeout(60):
            await locks.is_waited_for.wait()
            locks.locked.remove("tenant t")
            locks.unlocked.set()
            await changes
            other = asyncio.create_task(outcomes_of(store, ("d2", "usage")))
            while True:
                tries = [wait for wanted, wait in locks.tries if ("d2", "usage") in wanted]
                if tries:
                    break
                await asyncio.sleep(0)
        assert tries[0] is not None, "it is in nobody's way"
        locks.unlock()
        await asyncio.gather(creation, other)

    asyncio.run(test())


def test_many_that_wait_for_the_same_locked_device_are_told_at_once(transactions: Make) -> None:
    """Each had its turn when the one before it was refused, and was tried once more."""
    locks = Locks("d1")

    async def test() -> None:
        store = transactions(locks, 0.1)
        assert not any((await outcomes_of(store, *(("d1", str(number)) for number in range(500)))).values())
        assert store.waiting == 0
        locks.unlock()
        assert all((await outcomes_of(store, ("d1", "again"))).values())
        await store.close()

    asyncio.run(test())
    wanted_late = {one for wanted, _ in locks.tries for one in wanted}
    assert len(wanted_late) < 50


def test_a_lock_is_waited_for_no_longer_than_three_statements_may_take(transactions: Make) -> None:
    """Also by whoever had to wait for another one of the same device."""
    locks = Locks("d1", "usage")

    async def test() -> dict[str, bool]:
        store = transactions(locks, 0.2)
        began = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(
            *(outcomes_of(store, ("d1", str(number))) for number in range(10)),
            *(outcomes_of(store, (f"c{number}", "usage")) for number in range(200)),
            *(outcomes_of(store, ("usage", str(number)), tenant_id="t") for number in range(10)),
        )
        # Nobody waits in this database, so what takes time is the machine.
        assert 0.6 <= asyncio.get_running_loop().time() - began < 20
        await store.close()
        return {one[0]: bool(done) for outcome in outcomes for one, done in outcome.items()}

    assert not any(asyncio.run(test()).values())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "TimeoutError: no answer in time"),
        (TimeoutError("in vain"), "TimeoutError: in vain"),
        (
            asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
            "InternalClientError: the server has ended the connection",
        ),
        (
            asyncpg.InternalClientError("cannot switch to state 12; another operation (11) is in progress"),
            "InternalClientError: cannot switch to state 12; another operation (11) is in progress",
        ),
    ],
)
def test_the_log_says_what_happened_where_the_driver_does_not(
    error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    Database("postgresql://db/kamado", StoreSettings(), min_size=1, max_size=1).failed(error)
    assert [vars(record)["error"] for record in caplog.records] == [words]
