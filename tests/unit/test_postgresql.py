"""Parts of the PostgreSQL dialect that need no server."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from kamado.storage.postgresql_database import Connection, Database
from kamado.storage.postgresql_lanes import BEGIN, FairQueue, Transactions
from kamado.storage.postgresql_lanes import _Job as Job
from kamado.storage.postgresql_statements import Executor
from kamado.storage.sql import Row, StoreSettings
from kamado.storage.together import LOCK_NAME


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
