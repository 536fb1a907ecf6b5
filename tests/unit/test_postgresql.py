"""Parts of the PostgreSQL dialect that need no server."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import asyncpg
import pytest

from kamado.storage.postgresql_database import Connection, Database, Failed
from kamado.storage.postgresql_lanes import BEGIN, FairQueue, Transactions
from kamado.storage.postgresql_lanes import _Job as Job
from kamado.storage.postgresql_statements import Executor
from kamado.storage.sql import Row, StoreSettings
from kamado.storage.together import LOCK_NAME, Outcome


def test_a_transaction_that_only_reads_waits_for_no_name() -> None:
    """Logins are read all the time, and must not wait for each other as their changes do."""
    nobody = cast(Connection, None)  # whoever asks it fails
    assert asyncio.run(Executor(nobody, may_lock=False).execute(LOCK_NAME, [("a",), ("b",)])) == [[], []]


def test_what_waits_for_a_device_is_in_the_way_of_nothing_else() -> None:
    """A device, or a tenant that is kept apart, may be busy for seconds; a tenant is created meanwhile."""

    async def create_tenant_beside_a_busy_device() -> list[object]:
        transactions = Transactions(cast(Database, None), None, StoreSettings(), begin=BEGIN, writes=True, at_once=2)
        transactions._busy.add(("t", "d"))
        loop = asyncio.get_running_loop()
        for name, device in (("device", ("t", "d")), ("tenant", None), ("behind", ("u", "d"))):
            transactions._jobs.append(Job(cast(Any, name), loop.create_future(), device))
        return [[job.work for job in transactions._take()] for _ in range(3)]

    assert asyncio.run(create_tenant_beside_a_busy_device()) == [["tenant"], ["behind"], []]


def test_who_wants_a_row_that_somebody_keeps_locked_takes_nobody_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operating, "Somebody keeps rows locked": only what needs these rows fails, however long it took to find out."""
    waits: list[bool] = []

    async def attempt(_: Transactions, jobs: list[Job], *, is_late: bool = False) -> list[Outcome[object]]:
        waits.append(not is_late)
        if any(job.device == ("t", "7") for job in jobs):
            raise Failed(asyncpg.LockNotAvailableError("no"))
        return [Outcome() for _ in jobs]

    async def run_late() -> dict[str, bool]:
        transactions = Transactions(cast(Database, None), None, StoreSettings(), begin=BEGIN, writes=True, at_once=2)
        loop = asyncio.get_running_loop()
        jobs = [Job(cast(Any, None), loop.create_future(), ("t", str(number))) for number in range(20)]
        for job in jobs:
            job.has_waited = True
        outcomes = await transactions._run_group(jobs, time.monotonic() - 1)
        return {cast("tuple[str, str]", job.device)[1]: outcome.error is None for job, outcome in outcomes}

    monkeypatch.setattr(Transactions, "_try", attempt)
    assert asyncio.run(run_late()) == {str(number): number != 7 for number in range(20)}
    assert not any(waits), "nobody waits for it any more"


def test_tenants_have_turns() -> None:
    nobody = cast("asyncio.Future[Sequence[Row]]", None)
    queue = FairQueue()
    for number in range(6):
        queue.add((("loud", number), nobody))
    for tenant in ("a", "b", "c"):
        queue.add(((tenant, 0), nobody))
        queue.add(((tenant, 1), nobody))

    def take(number: int) -> list[object]:
        return ["/".join(map(str, parameters)) for parameters, _ in queue.take(number)]

    assert take(3) == ["loud/0", "a/0", "b/0"]
    assert take(3) == ["c/0", "loud/1", "a/1"], "whoever has had none is first"
    assert take(100) == ["b/1", "c/1", "loud/2", "loud/3", "loud/4", "loud/5"]
    assert not queue
    queue.add(((), nobody))
    assert queue.take(1) == [((), nobody)], "a look-up without parameters"
