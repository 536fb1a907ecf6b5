"""Which use cases share a transaction, and whose turn it is."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from kamado.storage.turns import MAX_GROUP, FairQueue, Job, Turns
from kamado.store import DeviceKey


def job(device: DeviceKey | None = None, tenant_id: str | None = None, *, end: float = 10.0) -> Job:
    return Job(
        work=cast(Any, None),
        future=cast("asyncio.Future[Any]", None),
        device=device,
        tenant_id=tenant_id if device is None else device[0],
        may_share=device is not None,
        end=end,
    )


def take(turns: Turns) -> list[Job] | None:
    taken = turns.take()
    return None if taken is None else taken.jobs


def test_tenants_have_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(6):
        queue.add("loud", f"loud/{number}")
    for tenant in ("a", "b", "c"):
        queue.add(tenant, f"{tenant}/0")
        queue.add(tenant, f"{tenant}/1")
    assert queue.take(3) == ["loud/0", "a/0", "b/0"]
    assert queue.take(3) == ["c/0", "loud/1", "a/1"], "whoever has had none is first"
    assert queue.take(100) == ["b/1", "c/1", "loud/2", "loud/3", "loud/4", "loud/5"]
    assert not queue


def test_a_queue_gives_what_is_of_one_key() -> None:
    queue: FairQueue[int] = FairQueue()
    for key, number in (("a", 1), ("b", 2), ("a", 3), ("a", 4)):
        queue.add(key, number)
    assert queue.keys == 2
    assert queue.take_of_one(2) == [1, 3]
    assert queue.take_of_one(2) == [2], "the others have turns, too"
    assert queue.take_of_one(2) == [4]
    assert queue.take_of_one(2) == []


def test_what_is_meant_is_removed_from_a_queue_and_the_rest_keeps_its_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(6):
        queue.add(number % 2, number)
    assert queue.remove_if(lambda number: number in (1, 2, 3, 5)) == [2, 1, 3, 5]
    assert list(queue.remove(0)) == [0, 4]
    assert list(queue.remove(1)) == []
    assert not queue


def test_a_tenant_with_many_writes_does_not_keep_another_one_waiting() -> None:
    turns = Turns()
    for number in range(3 * MAX_GROUP):
        turns.add(job(("loud", f"d{number:04}")), 0.0)
    quiet = job(("quiet", "d"))
    turns.add(quiet, 0.0)
    first = take(turns)
    assert first is not None
    assert len(first) == MAX_GROUP
    assert quiet in first


def test_a_use_case_without_a_device_is_alone_and_has_its_turn() -> None:
    turns = Turns()
    devices = [job(("t", f"d{number}")) for number in range(3)]
    tenant = job(tenant_id="t")
    for one in (tenant, *devices):
        turns.add(one, 0.0)
    assert [take(turns) for _ in range(3)] == [devices, [tenant], None]


def test_use_cases_of_one_device_follow_each_other() -> None:
    """Store, `device`; and whatever waits for a device is in the way of nothing else."""
    turns = Turns()
    first, second, third, other = job(("t", "d")), job(("t", "d")), job(("t", "d")), job(("t", "e"))
    for one in (first, second, third, other):
        turns.add(one, 0.0)
    assert take(turns) == [first, other]
    assert take(turns) is None
    assert not turns.finish([other], 0.0)
    assert turns.finish([first], 0.0), "there is more to do"
    assert take(turns) == [second]
    turns.finish([second], 0.0)
    assert take(turns) == [third]
    assert not turns.finish([third], 0.0)
    turns.add(first, 0.0)
    assert take(turns) == [first]


def test_what_waits_for_a_device_may_be_taken_when_it_has_waited_for_long_enough() -> None:
    turns = Turns()
    first, late, later = job(("t", "d"), end=3.0), job(("t", "d"), end=3.5), job(("t", "d"), end=4.0)
    for one in (first, late, later):
        turns.add(one, 0.0)
    assert take(turns) == [first]
    assert turns.take_behind([first, job()], 3.5) == [late]
    assert turns.finish([first], 3.5)
    assert take(turns) == [later]
    assert not turns.finish([later], 3.5)


def test_a_tenant_that_is_apart_leaves_the_others_a_lane() -> None:
    turns = Turns()
    locked: Sequence[Job] = [job(("t", "a")), job(tenant_id="t"), job(("t", "b")), job(tenant_id="t")]
    for one in locked[:2]:
        turns.add(one, 0.0)
    turns.keep_apart("t", 0.0)
    for one in locked[2:]:
        turns.add(one, 1.0)
    others = [job(("u", "a")), job(("v", "a"))]
    for one in others:
        turns.add(one, 1.0)
    assert take(turns) == others
    apart = turns.take()
    assert apart is not None
    assert apart.is_apart
    assert apart.jobs == [locked[0], locked[2]]
    assert turns.take() is None, "one transaction of what is apart at a time"
    turns.end_apart()
    assert take(turns) == [locked[1]], "what may not share is alone"
    turns.end_apart()
    assert take(turns) == [locked[3]]


def test_a_tenant_is_apart_for_a_while() -> None:
    turns = Turns()
    turns.keep_apart("t", 0.0)
    turns.keep_apart("u", 10.0)
    together = [job(("t", "a")), job(("v", "a"))]
    for one in together:
        turns.add(one, 10.0)
    assert take(turns) == together


def test_what_waits_for_a_lock_waits_by_tenant_and_has_turns() -> None:
    turns = Turns()
    waiting = [job(("t", "a")), job(("u", "a")), job(("t", "b")), job(tenant_id="t")]
    turns.set_aside(waiting)
    assert turns.locked == 3
    assert turns.take_locked() == [waiting[0], waiting[2]]
    assert turns.take_locked() == [waiting[1]]
    assert turns.take_locked() == [waiting[3]]
    assert turns.take_locked() == []
    assert take(turns) is None


def test_what_has_waited_for_a_lock_for_long_enough_is_told() -> None:
    turns = Turns()
    late, other = job(("t", "a"), end=3.0), job(("t", "b"), end=4.0)
    turns.set_aside([late, other])
    assert turns.take_late(2.9) == []
    assert turns.take_late(3.0) == [late]
    assert turns.take_locked() == [other]
    assert turns.take_late(9.0) == []
