"""Whose turn it is: what waits for the database, by turns for each tenant, and which use cases share a transaction.

A use case that has come across a row which somebody else keeps locked is set aside and waits in a lane of its own, and
the tenant that it belongs to is **apart** for a while: what comes in for that tenant shares transactions with no other,
in one lane at a time, and waits for locks only for a moment before it is set aside as well. So whatever is locked in
one tenant, the others have a lane in which nobody waits for locks of that tenant.

Knows no driver and asks no clock.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

from kamado.store import DeviceKey

__all__ = ["MAX_GROUP", "FairQueue", "Job", "Taken", "Turns"]

T = TypeVar("T")

MAX_GROUP: Final = 128
"""Use cases of one transaction."""
_APART: Final = 2.0
"""Seconds for which a tenant is apart after the last time that somebody has waited for a lock in vain."""


class FairQueue(Generic[T]):
    """What waits, by turns for each key: a tenant, mostly."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def add(self, key: Hashable, one: T) -> None:
        """Add one; it is the last of its key."""
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = deque()
        waiting.append(one)

    def take(self, number: int) -> list[T]:
        """Take so many, or all."""
        taken: list[T] = []
        while self._waiting and len(taken) < number:
            key, waiting = next(iter(self._waiting.items()))
            taken.append(waiting.popleft())
            if waiting:
                self._waiting.move_to_end(key)
            else:
                del self._waiting[key]
        return taken

    def take_of_one(self, number: int) -> list[T]:
        """Take so many, or all, of the key whose turn it is."""
        if not self._waiting:
            return []
        key, waiting = next(iter(self._waiting.items()))
        taken = [waiting.popleft() for _ in range(min(number, len(waiting)))]
        if waiting:
            self._waiting.move_to_end(key)
        else:
            del self._waiting[key]
        return taken

    def remove(self, key: Hashable) -> Iterable[T]:
        """Take all of a key."""
        return self._waiting.pop(key, ())

    def remove_if(self, is_meant: Callable[[T], bool]) -> list[T]:
        """Take all that are meant."""
        removed: list[T] = []
        for key, waiting in list(self._waiting.items()):
            gone = [one for one in waiting if is_meant(one)]
            if gone:
                removed += gone
                stay = deque(one for one in waiting if not is_meant(one))
                if stay:
                    self._waiting[key] = stay
                else:
                    del self._waiting[key]
        return removed

    @property
    def keys(self) -> int:
        """How many keys have something waiting."""
        return len(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)


@dataclass(slots=True, eq=False)
class Job:
    """A use case that waits or runs."""

    work: Callable[[Any], Awaitable[Any]]
    future: "asyncio.Future[Any]"
    device: DeviceKey | None
    """The one device that it changes: two of one device never run side by side."""
    tenant_id: str | None
    """The tenant that it belongs to, if it is known."""
    may_share: bool
    """Whether it may share a transaction."""
    end: float
    """Until when it may wait for locks."""

    @property
    def unit(self) -> Hashable:
        """What may share a transaction with it, were it apart."""
        return self.tenant_id if self.may_share else self


class Taken(NamedTuple):
    """Use cases that run in one transaction now."""

    jobs: list[Job]
    is_apart: bool = False
    """They are to wait for locks only for a moment."""


class Turns:
    """Use cases that wait. Each instant is one of a monotonic clock, seconds."""

    def __init__(self) -> None:
        self._shared: FairQueue[Job] = FairQueue()
        self._alone: FairQueue[Job] = FairQueue()
        self._apart: FairQueue[Job] = FairQueue()
        self._locked: FairQueue[Job] = FairQueue()
        self._order = deque((self._shared, self._alone, self._apart))
        self._has_apart = False
        """Whether one of those that are apart has a transaction under way."""
        self._until: dict[str | None, float] = {}
        """Tenants that are apart, each until when."""
        self._behind: dict[DeviceKey, deque[Job]] = {}
        """What waits until the use case before it has done with the same device."""

    def add(self, job: Job, now: float) -> None:
        """Add a use case; it is the last of its tenant."""
        if job.device is not None:
            behind = self._behind.get(job.device)
            if behind is not None:
                behind.append(job)
                return
            self._behind[job.device] = deque()
        self._enqueue(job, now)

    def _enqueue(self, job: Job, now: float) -> None:
        if self._until.get(job.tenant_id, now) > now:
            self._apart.add(job.unit, job)
        else:
            (self._shared if job.may_share else self._alone).add(job.tenant_id, job)

    def take(self) -> Taken | None:
        """Take the next use cases that may share a transaction; `None` if there are none that may run now."""
        for _ in range(len(self._order)):
            queue = self._order[0]
            self._order.rotate(-1)
            if queue is self._apart:
                if queue and not self._has_apart:
                    self._has_apart = True
                    return Taken(_sorted(queue.take_of_one(MAX_GROUP)), is_apart=True)
            elif queue:
                return Taken(_sorted(queue.take(MAX_GROUP if queue is self._shared else 1)))
        return None

    def finish(self, jobs: Iterable[Job], now: float) -> bool:
        """Say that use cases are over.

        Returns:
            Whether others may run now that had to wait for them.
        """
        has_more = False
        for job in jobs:
            if job.device is not None:
                behind = self._behind[job.device]
                if behind:
                    self._enqueue(behind.popleft(), now)
                    has_more = True
                else:
                    del self._behind[job.device]
        return has_more

    def take_behind(self, jobs: Iterable[Job], now: float) -> list[Job]:
        """Take what waits for the devices of use cases that are still to finish, and may wait for locks no longer."""
        late: list[Job] = []
        for job in jobs:
            if job.device is not None:
                behind = self._behind[job.device]
                while behind and behind[0].end <= now:
                    late.append(behind.popleft())
        return late

    def end_apart(self) -> None:
        """Say that the transaction of those that were taken as apart has ended."""
        self._has_apart = False

    # Those that have come across a lock

    def set_aside(self, jobs: Iterable[Job]) -> None:
        """Let use cases that were taken wait for what is locked."""
        for job in jobs:
            self._locked.add(job.unit, job)

    def keep_apart(self, tenant_id: str | None, now: float) -> None:
        """Keep a tenant apart for a while."""
        self._until = {one: until for one, until in self._until.items() if until > now}
        self._until[tenant_id] = now + _APART
        for queue in (self._shared, self._alone):
            for job in queue.remove(tenant_id):
                self._apart.add(job.unit, job)

    def take_locked(self) -> list[Job]:
        """Take what waits for locks and may share a transaction, the one that has waited longest first."""
        return _sorted(self._locked.take_of_one(MAX_GROUP))

    def take_late(self, now: float) -> list[Job]:
        """Take what has waited for locks for as long as it may."""
        return self._locked.remove_if(lambda job: job.end <= now) if self._locked else []

    @property
    def locked(self) -> int:
        """How many transactions what waits for locks takes, at least."""
        return self._locked.keys


def _sorted(jobs: list[Job]) -> list[Job]:
    # In one order everywhere, so that no two transactions wait for each other.
    return sorted(jobs, key=lambda job: job.device or ("", ""))
