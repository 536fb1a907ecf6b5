"""Lanes: what waits at the same moment goes to PostgreSQL together.

Each lane has a queue, and so many statements or transactions under way at once; what has come into the queue by the
time a lane is free goes to the database as one:

* **look-ups** of a kind become one query (`postgresql_statements.py`), by turns for each tenant;
* **writes** that say which device they change share a transaction (`together.py`), and with it a wait for the disk;
  any other has one of its own;
* **reads** share a snapshot.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import asyncpg

from kamado.errors import OutcomeUnknown, Unavailable
from kamado.storage.postgresql_database import (
    FIND_MARK,
    Cause,
    Connection,
    Database,
    Failed,
    Mark,
)
from kamado.storage.postgresql_statements import Executor
from kamado.storage.records import COPY_LOCK, HAS_COPY, UNFINISHED
from kamado.storage.sql import (
    Row,
    StoreSettings,
    Value,
)
from kamado.storage.together import Outcome, StatementSession, run_together
from kamado.storage.turns import FairQueue, Job, Turns
from kamado.store import DeviceKey

__all__ = ["BEGIN", "BEGIN_SNAPSHOT", "LOOK_UPS_AT_ONCE", "LookUps", "Transactions"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_UPS_AT_ONCE: Final = 2
_MAX_JOINED: Final = 256
"""Look-ups of one query."""
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
BEGIN_SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_MAX_TRIES: Final = 6
_MOMENT: Final = 0.01
"""Seconds for a lock that probably somebody keeps."""
_PARTS: Final = 8
"""Into so many a transaction is cut to find who wants what is locked: of a hundred use cases one is found in some
twenty transactions, and if all of them want it that is not many more transactions than use cases."""
_LOOK_INTERVAL: Final = 0.3
"""Seconds after which it is asked again whether commits have ended."""
_MAX_VAIN: Final = 32
"""Locks waited for in vain, after which it is not looked for any further who wants them."""
_LOCKED: Final = "somebody else keeps what is asked for locked"
_UNENDED: Final = "commits do not end: the database waits for a synchronous standby, or for its disk"
_GIVEN_UP: Final = "nobody waits for it any more"


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


class LookUps(StatementSession):
    """The session of look-ups: those that wait at the same moment are joined."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self._database = database
        self._settings = settings
        self._queues: dict[str, FairQueue[_Waiting]] = {}
        self._waiting = 0
        self._lanes = _Lanes(self._serve, LOOK_UPS_AT_ONCE)
        self._loop = asyncio.get_running_loop()

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
        # The tenant comes first.
        queue.add(parameters[0] if parameters else None, (parameters, future))
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
            if error.cause is not Cause.LOST:
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
class _Hunt:
    """The transactions that become of one because something is locked."""

    wait: float | None
    """Seconds for each lock, until one was waited for in vain; `None`: half of those for a statement."""
    vain: int = 0
    """Locks that were waited for in vain."""
    locked: list[Job] = field(default_factory=list)
    """Who wants them."""


@dataclass(slots=True)
class _Asked:
    """What a transaction was at when it ended."""

    asking: list[int] = field(default_factory=list)
    """Which of its use cases."""
    rows: Sequence[Sequence[Value]] = ((),)
    """Parameters of the statement; before the first one all ask for the same."""

    @property
    def is_one(self) -> bool:
        """Whether they all ask for the same."""
        return len(self.asking) == 1 or len(set(map(tuple, self.rows))) == 1


class _Commits:
    """Commits that nobody has waited for to their end, while the database is still at them: a synchronous standby is
    gone, or the disk does not answer. Each keeps a connection of the server, whatever we do."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._unended: dict[int, Mark] = {}
        self._watching: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Tell at once that another commit would not end either.

        Raises:
            Unavailable: One has not ended yet.
        """
        if self._unended:
            raise Unavailable(_UNENDED)

    def abandon(self, mark: Mark) -> None:
        """Say that a commit was not waited for any longer."""
        self._unended[mark.number] = mark
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        is_told = False
        try:
            while self._unended:
                # What holds up no commit but a connection on which nothing came back is seen at the first look.
                waits_for = await self._look()
                if waits_for and not is_told:
                    is_told = True
                    _log.error(
                        "commits do not end, writes are refused until they do",
                        extra={"database": self._database.name, "waits_for": ", ".join(waits_for)},
                    )
                if self._unended:
                    await asyncio.sleep(_LOOK_INTERVAL)
            if is_told:
                _log.warning("commits end again", extra={"database": self._database.name})
        finally:
            self._watching = None

    async def _look(self) -> list[str]:
        """Forget the commits that the database is not at any more; return what it waits for in the others."""
        numbers = list(self._unended)
        try:
            async with self._database.connection() as connection:
                rows = await connection.fetch(_FIND_COMMITS, [number % 2**32 for number in numbers])
        except Unavailable:
            return []
        except Exception:
            # Nobody would look any more, and writes be refused for good.
            _log.exception("cannot look whether commits have ended", extra={"database": self._database.name})
            return []
        there = {row[0] for row in rows}
        for number in numbers:
            if number % 2**32 not in there:
                del self._unended[number]
        return sorted({row[1] or "?" for row in rows})

    async def close(self) -> None:
        """Do not wait for them."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])


class Transactions:
    """Runs use cases in transactions; those that may are run together.

    What waits for something that somebody else keeps locked is tried again in a lane of its own (`turns.py`), and
    refused when three times the time for a statement is over.

    Args:
        database: The database.
        transaction: What use cases are handed, over a `StepSession`.
        settings: See there.
        begin: How a transaction begins.
        writes: Whether use cases change something.
        at_once: How many transactions are under way at once; there is one more while something is locked.
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
        self._begin = begin
        self._guard = _SHARE_COPY_LOCK if is_guarded else ""
        self._find_mark = f"{FIND_MARK}, ({HAS_COPY})" if is_guarded else f"{FIND_MARK}, false"
        self._writes = writes
        self._turns = Turns()
        self._commits = _Commits(database)
        self._lanes = _Lanes(self._serve, at_once)
        self._locked_lane = _Lanes(self._serve_locked, 1)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.waiting = 0
        """Use cases that wait or run."""

    async def run(
        self, work: Callable[[Any], Awaitable[T]], device: DeviceKey | None = None, tenant_id: str | None = None
    ) -> T:
        """Run a use case; see `store.Store.read` and `write`."""
        if self._closed:
            raise Unavailable("the database is closed")
        self._database.check()
        try:
            self._commits.check()
        except Unavailable:
            # Readiness says nothing of it, since look-ups go on.
            self._settings.observe(0, 0, 1, 0.0)
            raise
        if self.waiting >= self._settings.max_waiting_writes:
            what = "writes" if self._writes else "reads"
            raise Unavailable(f"too many {what} are waiting for the database")
        future: asyncio.Future[T] = self._loop.create_future()
        now = time.monotonic()
        job = Job(
            work=work,
            future=future,
            device=device,
            tenant_id=tenant_id if device is None else device[0],
            may_share=device is not None or not self._writes,
            end=now + 3 * self._settings.statement_timeout,
        )
        self._turns.add(job, now)
        self.waiting += 1
        self._lanes.call()
        return await future

    async def close(self) -> None:
        """Finish what was accepted."""
        self._closed = True
        while self.waiting:
            await self._lanes.finish()
            await self._locked_lane.finish()
        await self._commits.close()

    async def _serve(self) -> None:
        while (taken := self._turns.take()) is not None:
            try:
                locked = await self._run_jobs(taken.jobs, _MOMENT if taken.is_apart else None)
            finally:
                if taken.is_apart:
                    self._turns.end_apart()
            # Apart, they have waited for no more than a moment: perhaps for each other.
            self._set_aside(locked, is_certain=not taken.is_apart)

    async def _serve_locked(self) -> None:
        while True:
            self._refuse(self._turns.take_late(time.monotonic()))
            # Each has its turn every half a statement's time, however many there are.
            wait = self._settings.statement_timeout / 2 / max(1, self._turns.locked)
            jobs = self._turns.take_locked()
            if not jobs:
                return
            left = min(job.end for job in jobs) - time.monotonic()
            # That it goes through says nothing of what else is locked in the tenant: that stays apart for its time.
            self._set_aside(await self._run_jobs(jobs, max(_MOMENT, min(wait, left))), is_certain=True)

    def _set_aside(self, jobs: list[Job], *, is_certain: bool) -> None:
        """Let use cases that want something locked wait for it, or refuse them if they have.

        Args:
            jobs: Use cases.
            is_certain: It has been waited for long enough to say that somebody keeps it.
        """
        if not jobs:
            return
        now = time.monotonic()
        if is_certain:
            for tenant_id in {job.tenant_id for job in jobs}:
                self._turns.keep_apart(tenant_id, now)
        self._turns.set_aside(job for job in jobs if job.end > now)
        self._refuse([job for job in jobs if job.end <= now])
        self._locked_lane.call()

    def _refuse(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        # They would want the same, each for a moment, one after the other.
        behind = self._turns.take_behind(jobs, time.monotonic())
        self.waiting -= len(behind)
        self._leave(jobs)
        refused = [(job, Outcome[Any](error=Unavailable(_LOCKED))) for job in (*jobs, *behind)]
        self._answer(refused, 3 * self._settings.statement_timeout)

    async def _run_jobs(self, jobs: list[Job], wait: float | None) -> list[Job]:
        """Run use cases and tell their callers what became of them.

        Args:
            jobs: Use cases.
            wait: See `_Hunt`.

        Returns:
            Those that want something locked: nobody has been told of them.
        """
        started = time.perf_counter()
        wanted = [job for job in jobs if not job.future.done()]
        self._leave([job for job in jobs if job.future.done()])
        hunt = _Hunt(wait)
        try:
            outcomes = await self._run_group(wanted, hunt)
        except Exception as error:  # a mistake of ours, which must not keep anybody waiting
            hunt.locked = []
            outcomes = [(job, Outcome(error=error)) for job in wanted]
        self._settle(outcomes, time.perf_counter() - started)
        return hunt.locked

    def _leave(self, jobs: list[Job]) -> None:
        """Let others have the place, and the devices, of use cases that are over."""
        self.waiting -= len(jobs)
        if self._turns.finish(jobs, time.monotonic()):
            self._lanes.call()

    def _settle(self, outcomes: "list[tuple[Job, Outcome[Any]]]", seconds: float) -> None:
        self._leave([job for job, _ in outcomes])
        self._answer(outcomes, seconds)

    def _answer(self, outcomes: "list[tuple[Job, Outcome[Any]]]", seconds: float) -> None:
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

    async def _run_group(self, jobs: list[Job], hunt: _Hunt) -> "list[tuple[Job, Outcome[Any]]]":
        """Run use cases in one transaction; in several, if one of them is in the way of the others.

        Args:
            jobs: Use cases.
            hunt: Is given those that want something locked; they have no outcome yet.
        """
        if not jobs:
            return []
        if hunt.vain >= _MAX_VAIN:
            hunt.locked += jobs
            return []
        tries = 0
        while True:
            tries += 1
            asked = _Asked(list(range(len(jobs))))
            try:
                outcomes = await self._try(jobs, hunt.wait, asked)
                break
            except Failed as error:
                if error.cause is Cause.LOCKED:
                    return await self._part(jobs, asked, hunt)
                if error.cause in (Cause.CLASH, Cause.PART) and len(jobs) > 1:
                    half = len(jobs) // 2
                    return await self._run_group(jobs[:half], hunt) + await self._run_group(jobs[half:], hunt)
                may_help = error.cause is Cause.CLASH or (
                    # Nothing was committed, and a connection that was cut says nothing about the database.
                    error.cause is Cause.LOST and tries == 1
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
        done = await self._run_group(others, hunt)
        for job in spoilt:
            if job.future.done():
                done.append((job, Outcome(error=Unavailable(_GIVEN_UP))))
            else:
                done += await self._run_group([job], hunt)
        return done

    async def _part(self, jobs: list[Job], asked: _Asked, hunt: _Hunt) -> "list[tuple[Job, Outcome[Any]]]":
        """Run those who do not want what is locked without those who do."""
        hunt.vain += 1
        # That it was locked for so long is known now, and what else is will be waited for later.
        hunt.wait = _MOMENT
        indices = set(asked.asking)
        asking = [job for index, job in enumerate(jobs) if index in indices]
        done = await self._run_group([job for index, job in enumerate(jobs) if index not in indices], hunt)
        if asked.is_one:
            hunt.locked += asking
        else:
            for part in _parts_of(asking):
                done += await self._run_group(part, hunt)
        return done

    async def _try(self, jobs: list[Job], wait: float | None, asked: _Asked) -> list[Outcome[Any]]:
        """Run use cases in one transaction, which is undone if one has failed that has changed something.

        Args:
            jobs: Use cases.
            wait: See `_Hunt`.
            asked: Is given what they were at.

        Raises:
            OutcomeUnknown: The connection was lost in the commit, and nobody can say what has become of it.
            Unavailable: Nothing was changed.
        """
        mark: Mark | None = None
        is_committing = False
        outcomes: list[Outcome[Any]] = []
        self._commits.check()
        try:
            async with self._database.connection() as connection:
                await self._begin_on(connection, wait)
                if self._writes:
                    row = await connection.fetchrow(self._find_mark)
                    assert row is not None
                    *marked, is_unfinished = row
                    mark = Mark(*marked)
                    if is_unfinished:
                        raise Unavailable(UNFINISHED)
                executor = Executor(connection, may_lock=self._writes)

                async def execute(statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
                    asked.rows = rows
                    return await executor.execute(statement, rows)

                outcomes = await run_together([job.work(self._transaction) for job in jobs], execute, asked.asking)
                for job, outcome in zip(jobs, outcomes, strict=True):
                    if job.future.done():
                        # Its caller has gone, and perhaps told somebody that nothing was changed.
                        outcome.error = Unavailable(_GIVEN_UP)
                if any(map(_is_spoilt, outcomes)):
                    await connection.execute("ROLLBACK")
                else:
                    is_committing = True
                    await connection.execute("COMMIT")
        except Failed as error:
            if mark is None or not is_committing or error.cause not in (Cause.LOST, Cause.SILENT):
                raise
            if error.cause is Cause.SILENT:
                self._commits.abandon(mark)
            is_committed = await self._database.find_outcome(mark)
            if is_committed is None:
                raise OutcomeUnknown(
                    "the database was lost before it said whether the change was made: see, or ask once more"
                ) from error
            if not is_committed:
                raise
        return outcomes

    async def _begin_on(self, connection: Connection, wait: float | None) -> None:
        patience = "" if wait is None else f"SET LOCAL lock_timeout = {wait * 1000:.0f};"
        try:
            await connection.execute(f"{self._begin}; {patience} {self._guard}")
        except asyncpg.FeatureNotSupportedError as error:
            # What a standby says to a transaction that is to write, and not that it is read only.
            raise asyncpg.ReadOnlySQLTransactionError(str(error)) from error


_SHARE_COPY_LOCK: Final = f"SELECT pg_advisory_xact_lock_shared(hashtextextended('{COPY_LOCK}', 0))"
"""Keeps a copy from beginning before the transaction ends, and waits for one that is beginning. A statement of its own,
so that the next one sees what that has written."""
_FIND_COMMITS: Final = """
SELECT backend_xid::text::bigint, wait_event FROM pg_stat_activity
WHERE state = 'active' AND backend_xid::text::bigint = ANY($1::bigint[])"""
"""A commit that never arrived is not active: its backend waits for a statement, and is ended after a while."""


def _parts_of(jobs: list[Job]) -> list[list[Job]]:
    size = -(-len(jobs) // _PARTS)
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def _is_spoilt(outcome: Outcome[Any]) -> bool:
    return outcome.error is not None and outcome.has_changed


def _fail_all(jobs: list[Job], error: Unavailable) -> list[tuple[Job, Outcome[Any]]]:
    # Each its own: a traceback grows where it is raised.
    kind = OutcomeUnknown if isinstance(error, OutcomeUnknown) else Unavailable
    return [(job, Outcome(error=kind(str(error)))) for job in jobs]
