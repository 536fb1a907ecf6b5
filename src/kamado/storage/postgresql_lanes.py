"""Lanes: what waits at the same moment goes to PostgreSQL together.

Each lane has a queue, and so many statements or transactions under way at once; what has come into the queue by the
time a lane is free goes to the database as one:

* **look-ups** of a kind become one query (`postgresql_statements.py`), by turns for each tenant;
* **writes** that say which device they change share a transaction (`together.py`), and with it a wait for the disk;
  any other has one of its own;
* **reads** share a snapshot.
"""

import asyncio
import random
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import asyncpg

from kamado.errors import OutcomeUnknown, Unavailable
from kamado.storage.postgresql_database import (
    DRIVER_ERRORS,
    GRACE,
    PROBE_INTERVALS,
    RUN,
    SLOW,
    Cause,
    Connection,
    Database,
    Failed,
)
from kamado.storage.postgresql_statements import Executor
from kamado.storage.records import COPY_LOCK, HAS_COPY, UNFINISHED
from kamado.storage.sql import (
    Row,
    StoreSettings,
    Value,
)
from kamado.storage.together import Outcome, StatementSession, run_together
from kamado.store import DeviceKey

__all__ = ["BEGIN", "BEGIN_SNAPSHOT", "LOOK_UPS_AT_ONCE", "FairQueue", "LookUps", "Transactions"]

T = TypeVar("T")

LOOK_UPS_AT_ONCE: Final = 2
_MAX_JOINED: Final = 256
"""Look-ups of one query."""
_MAX_GROUP: Final = 128
"""Use cases of one transaction."""
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
BEGIN_SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_MAX_TRIES: Final = 6
_APART: Final = 2.0
"""Seconds for which a tenant in which somebody else has locked something is kept apart."""
_BRIEF_WAIT: Final = "SET LOCAL lock_timeout = '100ms'"
"""For a use case that may be in the way of others for no longer; a whole group of them takes some seconds."""
_STATUS_TIME: Final = 3.0
"""Seconds in which the outcome of a commit can be asked for, once its connection was lost."""


class _Lanes:
    """Tasks that take work from a queue until it is empty.

    Args:
        serve: Takes work and does it, until there is none; must not wait between seeing that and its end.
        number: Tasks side by side.
    """

    def __init__(self, serve: Callable[[], Coroutine[Any, Any, None]], number: int) -> None:
        self._serve = serve
        self._number = number
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def call(self) -> None:
        """Say that there is work."""
        if self._running < self._number:
            self._running += 1
            task = self._loop.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        try:
            await self._serve()
        finally:
            # Here and not when the task is done: work may come in between.
            self._running -= 1

    async def finish(self) -> None:
        """Wait until all work is done."""
        while self._tasks:
            await asyncio.wait(self._tasks)


# Look-ups


_Waiting = tuple[Sequence[Value], "asyncio.Future[Sequence[Row]]"]
"""A look-up's parameters, and who waits for its rows."""


class FairQueue:
    """Look-ups that wait, by turns for each tenant, their first parameter."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[Value, deque[_Waiting]] = OrderedDict()

    def add(self, look_up: _Waiting) -> None:
        """Add one; it is the last of its tenant."""
        tenant = look_up[0][0] if look_up[0] else None
        waiting = self._tenants.get(tenant)
        if waiting is None:
            waiting = self._tenants[tenant] = deque()
        waiting.append(look_up)

    def take(self, number: int) -> list[_Waiting]:
        """Take so many, or all."""
        taken: list[_Waiting] = []
        tenants = self._tenants
        while tenants and len(taken) < number:
            tenant, waiting = next(iter(tenants.items()))
            taken.append(waiting.popleft())
            if waiting:
                tenants.move_to_end(tenant)
            else:
                del tenants[tenant]
        return taken

    def __bool__(self) -> bool:
        return bool(self._tenants)


class LookUps(StatementSession):
    """The session of look-ups: those that wait at the same moment are joined."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self._database = database
        self._settings = settings
        self._queues: dict[str, FairQueue] = {}
        self._waiting = 0
        self._lanes = _Lanes(self._serve, LOOK_UPS_AT_ONCE)
        self._loop = asyncio.get_running_loop()

    async def _ask(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        return await self.ask(statement, rows)

    async def ask(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        """Run a look-up with its one set of parameters."""
        (parameters,) = rows
        self._database.check()
        if self._waiting >= self._settings.max_waiting_lookups:
            raise Unavailable("too many look-ups are waiting for the database")
        future: asyncio.Future[Sequence[Row]] = self._loop.create_future()
        queue = self._queues.get(statement)
        if queue is None:
            queue = self._queues[statement] = FairQueue()
        queue.add((parameters, future))
        self._waiting += 1
        self._lanes.call()
        return (await future,)

    async def _serve(self) -> None:
        while True:
            statement = next((statement for statement, queue in self._queues.items() if queue), None)
            if statement is None:
                return
            # Statements have turns, too.
            queue = self._queues[statement] = self._queues.pop(statement)
            batch = queue.take(_MAX_JOINED)
            self._waiting -= len(batch)
            waiting = [one for one in batch if not one[1].done()]
            if waiting:
                await self._run(statement, waiting)

    async def _run(self, statement: str, batch: list[_Waiting]) -> None:
        try:
            found = await self._read(statement, [parameters for parameters, _ in batch])
        except Unavailable as error:
            if isinstance(error, Failed) and error.cause is Cause.PART and len(batch) > 1:
                # Perhaps one of them cannot be asked for; it must not be in the way of the others.
                half = len(batch) // 2
                await self._run(statement, batch[:half])
                await self._run(statement, batch[half:])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(Unavailable(str(error)))
        except Exception as error:  # a mistake of ours, which must not keep anybody waiting
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), rows in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(rows)

    async def _read(self, statement: str, parameters: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        try:
            return await self._read_once(statement, parameters)
        except Failed as error:
            if error.cause is not Cause.LOST or str(error) == SLOW:
                raise
        # A connection that was cut says nothing about the database, and to read again is safe.
        return await self._read_once(statement, parameters)

    async def _read_once(self, statement: str, parameters: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        async with self._database.connection() as connection:
            return await Executor(connection, may_lock=False).execute(statement, parameters)

    async def close(self) -> None:
        """Answer what is under way."""
        await self._lanes.finish()


# Transactions


@dataclass(slots=True)
class _Job:
    work: Callable[[Any], Awaitable[Any]]
    future: "asyncio.Future[Any]"
    device: DeviceKey | None = None
    has_waited: bool = False
    """Whether it has come across a lock and waited for its turn once more."""


@dataclass(slots=True)
class _Mark:
    """How a transaction is found again: its number, and the history of the database and the run of the server that this
    belongs to."""

    number: int = 0
    timeline: str = ""
    run: str | None = None
    is_committing: bool = False


class Transactions:
    """Runs use cases in transactions; those that may are run together.

    Args:
        database: The database.
        transaction: What use cases are handed, over a `StepSession`.
        settings: See there.
        begin: How a transaction begins.
        writes: Whether use cases change something.
        at_once: How many transactions are under way at once.
        is_guarded: Nothing is changed while the database is an unfinished copy.
    """

    def __init__(
        self,
        database: Database,
        transaction: object,
        settings: StoreSettings,
        *,
        begin: str,
        writes: bool,
        at_once: int,
        is_guarded: bool = False,
    ) -> None:
        self._database = database
        self._transaction = transaction
        self._settings = settings
        self._begin = f"{begin}; {_SHARE_COPY_LOCK}" if is_guarded else begin
        self._find_mark = f"{_FIND_MARK}, ({HAS_COPY})" if is_guarded else f"{_FIND_MARK}, false"
        self._writes = writes
        self._jobs: deque[_Job] = deque()
        self._apart: dict[str, float] = {}
        """Tenants that are kept apart, each until when (monotonic)."""
        self._lane_apart = False
        """Whether one of these has a transaction under way."""
        self._busy: set[DeviceKey] = set()
        """Devices of transactions that are under way."""
        self._lanes = _Lanes(self._serve, at_once)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.waiting = 0
        """Use cases that wait or run."""

    async def run(self, work: Callable[[Any], Awaitable[T]], device: DeviceKey | None = None) -> T:
        """Run a use case; see `store.Store.read` and `write`."""
        if self._closed:
            raise Unavailable("the database is closed")
        self._database.check()
        if self.waiting >= self._settings.max_waiting_writes:
            what = "writes" if self._writes else "reads"
            raise Unavailable(f"too many {what} are waiting for the database")
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.append(_Job(work, future, device))
        self.waiting += 1
        self._lanes.call()
        return await future

    async def close(self) -> None:
        """Finish what was accepted."""
        self._closed = True
        await self._lanes.finish()

    async def _serve(self) -> None:
        while group := self._take():
            devices = {job.device for job in group if job.device is not None}
            self._busy |= devices
            is_apart = self._is_apart(group[0])
            self._lane_apart |= is_apart
            started = time.perf_counter()
            jobs = [job for job in group if not job.future.done()]
            self.waiting -= len(group) - len(jobs)
            try:
                outcomes = await self._run_group(jobs)
            except Exception as error:  # a mistake of ours, which must not keep anybody waiting
                outcomes = [(job, Outcome(error=error)) for job in jobs]
            finally:
                self._busy -= devices
                if is_apart:
                    self._lane_apart = False
            self.waiting -= len(outcomes)
            self._settle(outcomes, time.perf_counter() - started)

    def _take(self) -> list[_Job]:
        """Take the next use cases that may share a transaction; none if there are none, or none that may run now."""
        group: list[_Job] = []
        devices: set[DeviceKey] = set()
        passed: list[_Job] = []
        while self._jobs and len(group) < _MAX_GROUP:
            job = self._jobs[0]
            if self._writes and job.device is None:
                # Those that were passed may wait for long; this one need not.
                if not group:
                    group.append(self._jobs.popleft())
                break
            self._jobs.popleft()
            if job.device is None:
                group.append(job)
            elif job.device in devices or job.device in self._busy or not self._may_join(job, group):
                passed.append(job)
            else:
                devices.add(job.device)
                group.append(job)
        self._jobs.extendleft(reversed(passed))
        # In one order everywhere, so that no two transactions wait for each other.
        group.sort(key=lambda job: job.device or ("", ""))
        return group

    # A tenant in which somebody else keeps rows locked is apart for a while: its use cases share transactions with
    # no other tenant's, and use one lane at a time, so that everybody else has the others.

    def _is_apart(self, job: _Job) -> bool:
        if job.device is None or job.device[0] not in self._apart:
            return False
        if self._apart[job.device[0]] > time.monotonic():
            return True
        del self._apart[job.device[0]]
        return False

    def _may_join(self, job: _Job, group: list[_Job]) -> bool:
        is_apart = bool(self._apart) and self._is_apart(job)
        if not group:
            return not (is_apart and self._lane_apart)
        if is_apart or (self._apart and self._is_apart(group[0])):
            return _tenant_of(job) == _tenant_of(group[0])
        return True

    def _set_apart(self, jobs: list[_Job]) -> bool:
        """Keep a tenant apart, and let its use cases wait for their turn once more; `False` if they have had that."""
        tenant = _tenant_of(jobs[0])
        if tenant is None:
            return False
        self._apart[tenant] = time.monotonic() + _APART
        if any(job.has_waited for job in jobs):
            return False
        for job in jobs:
            job.has_waited = True
        self._jobs.extendleft(reversed(jobs))
        return True

    def _settle(self, outcomes: "list[tuple[_Job, Outcome[Any]]]", seconds: float) -> None:
        refused = lost = 0
        for job, outcome in outcomes:
            if outcome.error is not None:
                if isinstance(outcome.error, Unavailable):
                    lost += 1
                else:
                    refused += 1
            if job.future.done():
                continue  # its caller was cancelled
            if outcome.error is None:
                job.future.set_result(outcome.value)
            else:
                job.future.set_exception(outcome.error)
        if self._writes and outcomes:
            self._settings.observe(len(outcomes) - refused - lost, refused, lost, seconds)

    async def _run_group(self, jobs: list[_Job], end: float | None = None) -> "list[tuple[_Job, Outcome[Any]]]":
        """Run use cases in one transaction; in several, if one of them is in the way of the others.

        Args:
            jobs: Use cases.
            end: Until when (monotonic) a lock that somebody else has is waited for again. Afterwards it is only found
                out, in no time, who of them wants it.
        """
        if not jobs:
            return []
        if end is None:
            end = time.monotonic() + 3 * self._settings.statement_timeout
        tries = 0
        while True:
            tries += 1
            is_late = time.monotonic() >= end
            try:
                outcomes = await self._try(jobs, is_late=is_late)
                break
            except Failed as error:
                if error.is_locked:
                    tenants = _by_tenant(jobs)
                    if len(tenants) > 1:
                        # Whoever it is, nobody else's tenant is to suffer.
                        apart = [await self._run_group(some, end) for some in tenants]
                        return [done for some in apart for done in some]
                    if self._set_apart(jobs):
                        return []
                    if is_late and len(jobs) == 1:
                        return _fail_all(jobs, error)
                if error.cause in (Cause.CLASH, Cause.PART) and len(jobs) > 1:
                    half = len(jobs) // 2
                    return await self._run_group(jobs[:half], end) + await self._run_group(jobs[half:], end)
                may_help = error.cause is Cause.CLASH or (
                    # Nothing was committed, and a connection that was cut says nothing about the database.
                    error.cause is Cause.LOST and str(error) != SLOW and tries == 1
                )
                if not may_help or tries == _MAX_TRIES:
                    return _fail_all(jobs, error)
                if error.cause is Cause.CLASH:
                    await asyncio.sleep(random.uniform(0.0, 0.01 * 2**tries))  # noqa: S311 - no secret
            except Unavailable as error:
                return _fail_all(jobs, error)
        done = list(zip(jobs, outcomes, strict=True))
        spoilt = [job for job, outcome in done if _is_spoilt(outcome)]
        if not spoilt or len(jobs) == 1:
            return done
        # What these have changed had to be undone, and with it what everybody else has.
        others = [job for job, outcome in done if not _is_spoilt(outcome)]
        done = await self._run_group(others, end)
        for job in spoilt:
            done += await self._run_group([job], end)
        return done

    async def _try(self, jobs: list[_Job], *, is_late: bool = False) -> list[Outcome[Any]]:
        """Run use cases in one transaction, which is undone if one has failed that has changed something.

        Args:
            jobs: Use cases.
            is_late: Wait for locks only for a moment.

        Raises:
            OutcomeUnknown: The connection was lost in the commit, and nobody can say what has become of it.
            Unavailable: Nothing was changed.
        """
        mark = _Mark()
        outcomes: list[Outcome[Any]] = []
        try:
            async with self._database.connection() as connection:
                await self._begin_on(connection)
                if is_late:
                    await connection.execute(_BRIEF_WAIT)
                if self._writes:
                    row = await connection.fetchrow(self._find_mark)
                    assert row is not None
                    mark.number, mark.timeline, mark.run, is_unfinished = row
                    if is_unfinished:
                        raise Unavailable(UNFINISHED)
                executor = Executor(connection, may_lock=self._writes)
                outcomes = await run_together([job.work(self._transaction) for job in jobs], executor.execute)
                if any(map(_is_spoilt, outcomes)):
                    await connection.execute("ROLLBACK")
                else:
                    mark.is_committing = self._writes
                    await connection.execute("COMMIT")
        except Failed as error:
            if not mark.is_committing or error.cause is not Cause.LOST:
                raise
            is_committed = await self._find_outcome(mark)
            if is_committed is None:
                raise OutcomeUnknown(
                    "the database was lost before it said whether the change was made: see, or ask once more"
                ) from error
            if not is_committed:
                raise
        return outcomes

    async def _begin_on(self, connection: Connection) -> None:
        try:
            await connection.execute(self._begin)
        except asyncpg.FeatureNotSupportedError as error:
            # What a standby says to a transaction that is to write, and not that it is read only.
            raise asyncpg.ReadOnlySQLTransactionError(str(error)) from error

    async def _find_outcome(self, mark: _Mark) -> bool | None:
        """Ask the database what has become of a transaction; `None` if it cannot be said (soon)."""
        end = time.monotonic() + _STATUS_TIME
        while time.monotonic() < end:
            try:
                connection = await self._database.connect()
                try:
                    row = await connection.fetchrow(_FIND_OUTCOME, mark.number, timeout=GRACE)
                finally:
                    connection.terminate()
            except asyncpg.InvalidParameterValueError:
                # A number that is still to come: the server has crashed before anything of the transaction was on disk.
                return False
            except DRIVER_ERRORS:
                self._database.watch()
            else:
                assert row is not None
                timeline, run, status = row
                if timeline != mark.timeline or status is None:
                    # Another server has taken over: it may have got this transaction or not, and has its own numbers.
                    return None
                if status == "aborted":
                    return False
                if status == "committed":
                    # After a crash, numbers of which nothing was on disk are given again: it may be another one.
                    return True if run is not None and run == mark.run else None
            await asyncio.sleep(PROBE_INTERVALS[0])
        return None


_TIMELINE: Final = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
_FIND_MARK: Final = f"SELECT txid_current(), {_TIMELINE}, current_setting('{RUN}', true)"
_SHARE_COPY_LOCK: Final = f"SELECT pg_advisory_xact_lock_shared(hashtextextended('{COPY_LOCK}', 0))"
"""Keeps a copy from beginning before the transaction ends, and waits for one that is beginning. A statement of its own,
so that the next one sees what that has written."""
_FIND_OUTCOME: Final = f"SELECT {_TIMELINE}, current_setting('{RUN}', true), txid_status($1)"


def _tenant_of(job: _Job) -> str | None:
    return None if job.device is None else job.device[0]


def _by_tenant(jobs: list[_Job]) -> list[list[_Job]]:
    tenants: dict[str | None, list[_Job]] = {}
    for job in jobs:
        tenants.setdefault(_tenant_of(job), []).append(job)
    return list(tenants.values())


def _is_spoilt(outcome: Outcome[Any]) -> bool:
    return outcome.error is not None and outcome.has_changed


def _fail_all(jobs: list[_Job], error: Unavailable) -> list[tuple[_Job, Outcome[Any]]]:
    # Each its own: a traceback grows where it is raised.
    kind = OutcomeUnknown if isinstance(error, OutcomeUnknown) else Unavailable
    return [(job, Outcome(error=kind(str(error)))) for job in jobs]
