"""The PostgreSQL dialect: connections, transactions that are shared, look-ups that are joined, and the driver's errors
in our words.

Everything goes through a few lanes. Each has a queue, and so many statements or transactions under way at once; what
has come into the queue by the time a lane is free goes to the database together:

* **look-ups** of a kind become one query (`postgresql_statements.py`), by turns for each tenant;
* **writes** that say which device they change share a transaction (`together.py`), and with it a wait for the disk;
  any other has one of its own;
* **reads** share a snapshot.

When the database cannot be reached, whoever asks hears of it at once, and one connection is tried again and again.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from kamado.connections import ConnectionTransaction, Key
from kamado.errors import OutcomeUnknown, Unavailable
from kamado.storage import shown_url
from kamado.storage.connections import SqlConnectionLookups, SqlConnectionTransaction
from kamado.storage.escape import escape, unescape
from kamado.storage.migrations import Migration, apply_migrations, find_version, load_migrations
from kamado.storage.postgresql_search import PostgresqlSearches
from kamado.storage.postgresql_statements import Statement, translate
from kamado.storage.records import RegistryTransaction
from kamado.storage.sql import (
    OPERATOR_STATEMENTS,
    OlderSchema,
    Row,
    SqlLookups,
    StorageError,
    StoreSettings,
    Value,
)
from kamado.storage.together import LOCK_NAME, DirectSession, Outcome, StatementSession, StepSession, run_together
from kamado.store import DeviceKey, Lookups, Searches, Transaction

__all__ = [
    "Database",
    "FairQueue",
    "PostgresqlConnections",
    "PostgresqlStore",
    "migrate_postgresql",
    "open_postgresql",
    "open_postgresql_connections",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

_MINIMUM_VERSION: Final = 13
_MIGRATION_LOCK: Final = 0x4B41_4D41_444F
"""The advisory lock under which a schema is made."""
_SETTINGS: Final = {
    "application_name": "kamado",
    # Whatever the statistics say of a table that was empty a minute ago: a point read goes by its index. Searches take
    # these back for themselves.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
_LOOK_UPS_AT_ONCE: Final = 2
_WRITES_AT_ONCE: Final = 2
_READS_AT_ONCE: Final = 2
_CONNECTIONS: Final = _LOOK_UPS_AT_ONCE + _WRITES_AT_ONCE + _READS_AT_ONCE + 1
"""Connections that are used at once, those of searches left out; the last one is for pings."""
_MAX_JOINED: Final = 256
"""Look-ups of one query."""
_MAX_GROUP: Final = 128
"""Use cases of one transaction."""
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_BEGIN_SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_MAX_TRIES: Final = 6
_PROBE_INTERVALS: Final = (0.1, 0.2, 0.5)
"""Seconds between two tries to reach a database that is away; the last one for all that follow."""
_NEXT_HOST: Final = 0.25
"""Seconds after which the next of several hosts is tried, too."""
_SPARE_PAUSE: Final = 0.05
"""Seconds between two tries to get a connection from a database that has none to spare."""
_CONNECT_PAUSES: Final = (0.2, 5.0)
"""The first and the longest pause between two tries at the start, seconds."""
_STATUS_TIME: Final = 3.0
"""Seconds in which the outcome of a commit can be asked for, once its connection was lost."""
_RUN: Final = "kamado.run"
_FIND_RUN: Final = "concat(pg_postmaster_start_time(), ' ', (SELECT stats_reset FROM pg_stat_bgwriter))"
"""Tells one run of a server from the next: it is another after each crash, with which the statistics go. A setting of
each connection, since none outlives a run."""
_LOG_INTERVAL: Final = 1.0
_GRACE: Final = 1.0
"""Seconds by which we wait longer than the database itself does."""

_AWAY: Final = "the database cannot be reached"
_SLOW: Final = "the database took too long"


class _Cause(Enum):
    """What is behind an error of the driver."""

    LOST = "the connection"
    CLASH = "something that goes on side by side"
    PART = "what a statement was given, perhaps by one of many"
    OTHER = "the state of the database"


_CLASHES: Final = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    # Long before a statement has had its time: what waits for a lock is told from a database that is slow, and a
    # deadlock is undone, which the database itself notices no sooner than after a second.
    asyncpg.LockNotAvailableError,
    # Whatever a use case relies on is there when it looks; if not at the end, somebody else was faster.
    asyncpg.ForeignKeyViolationError,
    asyncpg.UniqueViolationError,
    asyncpg.InvalidCachedStatementError,
)
_LOSSES: Final = (
    OSError,
    TimeoutError,
    EOFError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # A primary that was demoted: the next connection leads to the new one.
    asyncpg.ReadOnlySQLTransactionError,
)
_PASSING: Final = (
    *_LOSSES,
    *_CLASHES,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
)
"""What may be over in a moment, and so is waited for at the start."""
_DRIVER_ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError)
_MESSAGES: Final = (
    (asyncpg.QueryCanceledError, _SLOW),
    (asyncpg.LockNotAvailableError, "somebody else keeps what is asked for locked"),
    (TimeoutError, _SLOW),
    (asyncpg.DiskFullError, "the database cannot grow: the disk is full"),
    (asyncpg.TooManyConnectionsError, "the database has no connection to spare"),
    (asyncpg.ReadOnlySQLTransactionError, "the database is read only"),
    (asyncpg.InsufficientPrivilegeError, "the database refuses: the role has no right to do that"),
    (asyncpg.UndefinedTableError, "the database is not the one that was opened"),
    *((loss, _AWAY) for loss in _LOSSES),
)


_PARTS: Final = (
    asyncpg.exceptions.DataError,  # of the database
    asyncpg.DataError,  # of the driver, which is an `InterfaceError`
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)


def _cause_of(error: BaseException) -> _Cause:
    if isinstance(error, asyncpg.ClientConfigurationError):
        return _Cause.OTHER  # for the driver one of those that the connection is lost with
    for kinds, cause in ((_CLASHES, _Cause.CLASH), (_PARTS, _Cause.PART), (_LOSSES, _Cause.LOST)):
        if isinstance(error, kinds):
            return cause
    return _Cause.OTHER


def _say(error: BaseException) -> str:
    if not isinstance(error, _PARTS):
        for kind, text in _MESSAGES:
            if isinstance(error, kind):
                return text
    return "the database cannot be used now"


class _Failed(Unavailable):
    """A failure of the driver in our words, with what is behind it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(_say(error))
        self.cause = _cause_of(error)
        self.is_locked = isinstance(error, asyncpg.LockNotAvailableError)


def _split_hosts(url: str) -> list[str]:
    """Return a URL for each host of one."""
    parts = urlsplit(url)
    userinfo, at, hosts = parts.netloc.rpartition("@")
    return [urlunsplit(parts._replace(netloc=f"{userinfo}{at}{host}")) for host in hosts.split(",")]


def _give_up(task: "asyncio.Task[asyncpg.Connection[asyncpg.Record]]") -> None:
    """Close a connection that came too late."""
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


def _drop(connection: Connection) -> None:
    # One that is closed has gone back to the pool by itself, and lets nobody call it any more.
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


async def _keep(connection: Connection) -> None:
    """Leave a connection as it is when it goes back: nobody changes its settings but for a transaction."""


class Database:
    """Connections to one PostgreSQL database, and whether it can be reached.

    Args:
        url: See `open_store`.
        settings: See there.
        min_size: How many connections there are at least.
        max_size: How many there may be.
        target: What a server must be if there are several and the URL does not say: `target_session_attrs`.
    """

    def __init__(
        self, url: str, settings: StoreSettings, *, min_size: int, max_size: int, target: str = "read-write"
    ) -> None:
        self._urls = _split_hosts(url)
        self._target = target
        self.name = shown_url(url)
        self._settings = settings
        self._min_size = min_size
        self._max_size = max_size
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._is_closed = False
        self._logged = ("", 0.0)

    async def connect(self, patience: float | None = None) -> "asyncpg.Connection[asyncpg.Record]":
        """Make a connection outside of the pool.

        Args:
            patience: Seconds; `storage.acquire_timeout` if omitted.
        """
        patience = self._settings.acquire_timeout if patience is None else patience
        async with asyncio.timeout(patience):
            connection = await self._connect(timeout=patience)
            try:
                await self._prepare(connection)
            except BaseException:
                connection.terminate()
                raise
        return connection

    async def _connect(self, *_: object, **options: Any) -> "asyncpg.Connection[asyncpg.Record]":
        """Connect to the first host that will do: the one that did the last time, then the others, each a moment later.

        The driver's own way with several hosts has one time-out for all, so that one which does not answer is in the
        way of those behind it.
        """
        if len(self._urls) == 1:
            return await asyncpg.connect(self._urls[0], **options)
        if "target_session_attrs" not in self._urls[0]:
            options["target_session_attrs"] = self._target
        tries: dict[asyncio.Task[asyncpg.Connection[asyncpg.Record]], str] = {}
        errors: list[Exception] = []
        urls = deque(self._urls)
        try:
            while urls or tries:
                if urls:
                    task = asyncio.get_running_loop().create_task(asyncpg.connect(urls[0], **options))
                    tries[task] = urls.popleft()
                done, _rest = await asyncio.wait(
                    tries, timeout=_NEXT_HOST if urls else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    url = tries.pop(task)
                    try:
                        connection = task.result()
                    except _DRIVER_ERRORS as error:
                        errors.append(error)
                    else:
                        self._urls.sort(key=lambda one: one != url)
                        return connection
        finally:
            for task in tries:
                task.add_done_callback(_give_up)
                task.cancel()
        # What does not pass by itself says more than that another host is away.
        raise next((error for error in errors if not isinstance(error, _PASSING)), errors[0])

    async def _prepare(self, connection: Connection) -> None:
        # Not as parameters of the start: poolers in between refuse what they do not know.
        timeout = self._settings.statement_timeout * 1000
        settings = _SETTINGS | {"statement_timeout": f"{timeout:.0f}ms", "lock_timeout": f"{timeout / 2:.0f}ms"}
        names = ", ".join(f"set_config(${2 * n + 1}, ${2 * n + 2}, false)" for n in range(len(settings)))
        words = [word for pair in settings.items() for word in pair]
        await connection.fetch(f"SELECT {names}, set_config('{_RUN}', {_FIND_RUN}, false)", *words)

    async def open(self) -> None:
        """Make the pool.

        Raises:
            Unavailable: The database cannot be reached.
        """
        try:
            self._pool = await asyncpg.create_pool(
                connect=self._connect,
                min_size=self._min_size,
                max_size=self._max_size,
                max_queries=2**31,
                timeout=self._settings.acquire_timeout,
                command_timeout=self._settings.statement_timeout + _GRACE,
                statement_cache_size=512,
                max_cached_statement_lifetime=0,
                init=self._prepare,
                reset=_keep,
            )
        except _DRIVER_ERRORS as error:
            raise self.failed(error) from error

    def check(self) -> None:
        """Tell at once that the database is away.

        Raises:
            Unavailable: It is.
        """
        if self._probe is not None:
            raise Unavailable(_AWAY)

    async def open_when_possible(self) -> None:
        """Make the pool of a database that is not needed to start."""
        try:
            await self.open()
        except Unavailable:
            self.watch()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection; whatever the driver raises inside comes out as `Unavailable`.

        Raises:
            Unavailable: The database cannot be reached, or has failed.
        """
        self.check()
        assert self._pool is not None, "it was opened"
        try:
            connection = await self._acquire(self._pool)
        except _DRIVER_ERRORS as error:
            failed = self.failed(error)
            if failed.cause is _Cause.LOST:
                self.watch()
            raise failed from error
        try:
            yield connection
        except _DRIVER_ERRORS as error:
            failed = self.failed(error)
            if failed.cause is _Cause.LOST:
                # Others that lie idle have probably gone the same way.
                _drop(connection)
                await self._pool.expire_connections()
                if isinstance(error, TimeoutError):
                    # Nothing comes back: perhaps nothing goes through.
                    self.watch()
            raise failed from error
        finally:
            await self._release(connection)

    async def _acquire(
        self, pool: "asyncpg.Pool[asyncpg.Record]"
    ) -> "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]":
        end = time.monotonic() + self._settings.acquire_timeout
        was_lost = False
        while True:
            try:
                return await pool.acquire(timeout=max(0.0, end - time.monotonic()))
            except asyncpg.TooManyConnectionsError:
                # One of those that there are may be free in a moment.
                if time.monotonic() + _SPARE_PAUSE > end:
                    raise
                await asyncio.sleep(_SPARE_PAUSE)
            except _DRIVER_ERRORS as error:
                # One that was cut while it was made says nothing about the database.
                if was_lost or isinstance(error, TimeoutError) or _cause_of(error) is not _Cause.LOST:
                    raise
                was_lost = True

    async def _release(self, connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]") -> None:
        assert self._pool is not None, "the connection came from there"
        try:
            if not connection.is_closed() and connection.is_in_transaction():
                await connection.execute("ROLLBACK", timeout=_GRACE)
            await self._pool.release(connection, timeout=_GRACE)
        except _DRIVER_ERRORS:
            _drop(connection)

    def failed(self, error: BaseException) -> _Failed:
        """Log a failure of the driver and put it in our words."""
        name, now = type(error).__name__, time.monotonic()
        if _cause_of(error) is not _Cause.CLASH and (self._logged[0] != name or now - self._logged[1] >= _LOG_INTERVAL):
            self._logged = name, now
            _log.error("database failed", extra={"database": self.name, "error": f"{name}: {error}"})
        return _Failed(error)

    def watch(self) -> None:
        """Refuse everything from now on until the database answers again."""
        if self._probe is None and not self._is_closed:
            self._probe = asyncio.get_running_loop().create_task(self._wait_until_back())

    async def _wait_until_back(self) -> None:
        _log.warning("database away, everything is refused until it is back", extra={"database": self.name})
        tries = 0
        try:
            while not await self._is_back():
                await asyncio.sleep(_PROBE_INTERVALS[min(tries, len(_PROBE_INTERVALS) - 1)])
                tries += 1
            _log.warning("database back", extra={"database": self.name})
        finally:
            self._probe = None

    async def _is_back(self) -> bool:
        try:
            # Half the time: what was sent while nothing came through may never arrive, so ask again soon.
            connection = await self.connect(self._settings.acquire_timeout / 2)
        except _DRIVER_ERRORS:
            return False
        connection.terminate()
        if self._pool is not None:
            await self._pool.expire_connections()
            return True
        try:
            await self.open()
        except Unavailable:
            return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        self._is_closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        if self._pool is not None:
            try:
                async with asyncio.timeout(_GRACE):
                    await self._pool.close()
            except (TimeoutError, *_DRIVER_ERRORS):
                self._pool.terminate()


# Statements


class _Statements:
    """Statements that were translated, and the types of their parameters, which the database tells once."""

    def __init__(self) -> None:
        self._translated: dict[tuple[str, bool], Statement] = {}
        self._joined: dict[str, str] = {}

    def get(self, statement: str, *, may_lock: bool) -> Statement:
        found = self._translated.get((statement, may_lock))
        if found is None:
            found = self._translated[statement, may_lock] = translate(statement, may_lock=may_lock)
        return found

    async def joined(self, connection: Connection, statement: Statement) -> str:
        text = self._joined.get(statement.text)
        if text is None:
            assert statement.joined is not None
            prepared = await connection.prepare(statement.text)
            types = [parameter.name for parameter in prepared.get_parameters()]
            text = self._joined[statement.text] = statement.joined.format(source=statement.source(types))
        return text


_statements = _Statements()


def _sent(value: Value) -> Value:
    # What is `Joined` is no plain text any more.
    return escape(value) if type(value) is str else value


def _read(row: Any) -> Row:
    for value in row:
        if type(value) is str and "\x01" in value:
            return tuple(unescape(one) if type(one) is str else one for one in row)
    return cast(Row, row)


class Executor:
    """Runs statements of `sql.py` on one connection.

    Args:
        connection: The connection.
        may_lock: See `postgresql_statements.translate`.
    """

    def __init__(self, connection: Connection, *, may_lock: bool) -> None:
        self._connection = connection
        self._may_lock = may_lock

    async def execute(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        """`together.Execute`."""
        if statement == LOCK_NAME and not self._may_lock:
            return [[]] * len(rows)
        found = _statements.get(statement, may_lock=self._may_lock)
        if not found.is_select:
            return await self._change(found, rows)
        # Many ask for the same tenant.
        different = dict.fromkeys(map(tuple, rows))
        if len(different) == 1:
            result: Sequence[Row] = await self._run_one(found, rows[0])
            return [result] * len(rows)
        results = dict(zip(different, await self._run_many(found, list(different)), strict=True))
        return [results[tuple(row)] for row in rows]

    async def _change(self, statement: Statement, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        if len(rows) == 1:
            return [await self._run_one(statement, rows[0])]
        return await self._run_many(statement, rows)

    async def _run_one(self, statement: Statement, parameters: Sequence[Value]) -> Sequence[Row]:
        sent = [_sent(value) for value in parameters]
        if statement.returns_rows:
            return [_read(row) for row in await self._connection.fetch(statement.text, *sent)]
        status = await self._connection.execute(statement.text, *sent)
        number = status.rpartition(" ")[2]
        return [()] * (int(number) if number.isdigit() else 0)

    async def _run_many(self, statement: Statement, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        if statement.joined is None:
            return [await self._run_one(statement, row) for row in rows]
        text = await _statements.joined(self._connection, statement)
        found = await self._connection.fetch(
            text, *([_sent(value) for value in column] for column in zip(*rows, strict=True))
        )
        if statement.is_certain:
            return [[()]] * len(rows)
        results: list[list[Row]] = [[] for _ in rows]
        if not statement.key:
            for row in found:
                results[row[0] - 1].append(_read(row[1:]))
            return results
        width = len(statement.key)
        inserted = {tuple(map(unescape, row[:width])): _read(row[width:]) for row in found}
        for parameters, result in zip(rows, results, strict=True):
            # Of two with one key, the first has come in.
            come = inserted.pop(tuple(cast(str, parameters[index]) for index in statement.key), None)
            if come is not None:
                result.append(come)
        return results


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


class _LookUps(StatementSession):
    """The session of look-ups: those that wait at the same moment are joined."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self._database = database
        self._settings = settings
        self._queues: dict[str, FairQueue] = {}
        self._waiting = 0
        self._lanes = _Lanes(self._serve, _LOOK_UPS_AT_ONCE)
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
            if isinstance(error, _Failed) and error.cause is _Cause.PART and len(batch) > 1:
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
        except _Failed as error:
            if error.cause is not _Cause.LOST or str(error) == _SLOW:
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
    ) -> None:
        self._database = database
        self._transaction = transaction
        self._settings = settings
        self._begin = begin
        self._writes = writes
        self._jobs: deque[_Job] = deque()
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
            started = time.perf_counter()
            jobs = [job for job in group if not job.future.done()]
            try:
                outcomes = await self._run_group(jobs)
            except Exception as error:  # a mistake of ours, which must not keep anybody waiting
                outcomes = [(job, Outcome(error=error)) for job in jobs]
            finally:
                self._busy -= devices
                self.waiting -= len(group)
            self._settle(outcomes, time.perf_counter() - started)

    def _take(self) -> list[_Job]:
        """Take the next use cases that may share a transaction; none if there are none, or none that may run now."""
        group: list[_Job] = []
        devices: set[DeviceKey] = set()
        passed: list[_Job] = []
        while self._jobs and len(group) < _MAX_GROUP:
            job = self._jobs[0]
            if self._writes and job.device is None:
                if not group and not passed:
                    group.append(self._jobs.popleft())
                break
            self._jobs.popleft()
            if job.device is not None and (job.device in devices or job.device in self._busy):
                passed.append(job)
                continue
            if job.device is not None:
                devices.add(job.device)
            group.append(job)
        self._jobs.extendleft(reversed(passed))
        # In one order everywhere, so that no two transactions wait for each other.
        group.sort(key=lambda job: job.device or ("", ""))
        return group

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
            end: Until when (monotonic) a lock that somebody else has is waited for again.
        """
        if not jobs:
            return []
        if end is None:
            end = time.monotonic() + 3 * self._settings.statement_timeout
        tries = 0
        while True:
            tries += 1
            try:
                outcomes = await self._try(jobs)
                break
            except _Failed as error:
                if error.is_locked and time.monotonic() >= end:
                    return _fail_all(jobs, error)
                if error.cause in (_Cause.CLASH, _Cause.PART) and len(jobs) > 1:
                    half = len(jobs) // 2
                    return await self._run_group(jobs[:half], end) + await self._run_group(jobs[half:], end)
                may_help = error.cause is _Cause.CLASH or (
                    # Nothing was committed, and a connection that was cut says nothing about the database.
                    error.cause is _Cause.LOST and str(error) != _SLOW and tries == 1
                )
                if not may_help or tries == _MAX_TRIES:
                    return _fail_all(jobs, error)
                if error.cause is _Cause.CLASH:
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

    async def _try(self, jobs: list[_Job]) -> list[Outcome[Any]]:
        """Run use cases in one transaction, which is undone if one has failed that has changed something.

        Raises:
            OutcomeUnknown: The connection was lost in the commit, and nobody can say what has become of it.
            Unavailable: Nothing was changed.
        """
        mark = _Mark()
        outcomes: list[Outcome[Any]] = []
        try:
            async with self._database.connection() as connection:
                await connection.execute(self._begin)
                if self._writes:
                    row = await connection.fetchrow(_FIND_MARK)
                    assert row is not None
                    mark.number, mark.timeline, mark.run = row
                executor = Executor(connection, may_lock=self._writes)
                outcomes = await run_together([job.work(self._transaction) for job in jobs], executor.execute)
                if any(map(_is_spoilt, outcomes)):
                    await connection.execute("ROLLBACK")
                else:
                    mark.is_committing = self._writes
                    await connection.execute("COMMIT")
        except _Failed as error:
            if not mark.is_committing or error.cause is not _Cause.LOST:
                raise
            is_committed = await self._find_outcome(mark)
            if is_committed is None:
                raise OutcomeUnknown(
                    "the database was lost before it said whether the change was made: see, or ask once more"
                ) from error
            if not is_committed:
                raise
        return outcomes

    async def _find_outcome(self, mark: _Mark) -> bool | None:
        """Ask the database what has become of a transaction; `None` if it cannot be said (soon)."""
        end = time.monotonic() + _STATUS_TIME
        while time.monotonic() < end:
            try:
                connection = await self._database.connect()
                try:
                    row = await connection.fetchrow(_FIND_OUTCOME, mark.number, timeout=_GRACE)
                finally:
                    connection.terminate()
            except asyncpg.InvalidParameterValueError:
                # A number that is still to come: the server has crashed before anything of the transaction was on disk.
                return False
            except _DRIVER_ERRORS:
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
            await asyncio.sleep(_PROBE_INTERVALS[0])
        return None


_TIMELINE: Final = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
_FIND_MARK: Final = f"SELECT txid_current(), {_TIMELINE}, current_setting('{_RUN}', true)"
_FIND_OUTCOME: Final = f"SELECT {_TIMELINE}, current_setting('{_RUN}', true), txid_status($1)"


def _is_spoilt(outcome: Outcome[Any]) -> bool:
    return outcome.error is not None and outcome.has_changed


def _fail_all(jobs: list[_Job], error: Unavailable) -> list[tuple[_Job, Outcome[Any]]]:
    # Each its own: a traceback grows where it is raised.
    kind = OutcomeUnknown if isinstance(error, OutcomeUnknown) else Unavailable
    return [(job, Outcome(error=kind(str(error)))) for job in jobs]


# The store


class _ReplicaLookUps(StatementSession):
    """Look-ups in a replica. It may not have yet what is there, so nothing is said to be missing before the database
    itself has said so; it may still have what is not there any more, for as long as it lags behind.
    """

    def __init__(self, replica: _LookUps, database: _LookUps) -> None:
        self._replica = replica
        self._database = database

    async def _ask(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        if statement not in OPERATOR_STATEMENTS:
            try:
                found = await self._replica.ask(statement, rows)
            except Unavailable:
                pass  # logged where it came about
            else:
                if found[0]:
                    return found
        return await self._database.ask(statement, rows)


class PostgresqlStore:
    """`store.Store` over PostgreSQL; see there. Made by `open_postgresql`."""

    def __init__(self, database: Database, replica: Database | None, settings: StoreSettings) -> None:
        self._database = database
        self._replica = replica
        transaction = RegistryTransaction(StepSession())
        self._writes = Transactions(
            database,
            transaction,
            settings,
            begin=_BEGIN,
            writes=True,
            at_once=_WRITES_AT_ONCE,
        )
        self._reads = Transactions(
            database,
            transaction,
            settings,
            begin=_BEGIN_SNAPSHOT,
            writes=False,
            at_once=_READS_AT_ONCE,
        )
        # Whoever gets its turn finds a connection: waiting for one would look as if the database were away.
        searches = min(settings.search_workers, (settings.pool_max - _CONNECTIONS) // 2)
        self._searches = PostgresqlSearches(database.connection, replace(settings, search_workers=searches))
        self._look_ups = [_LookUps(database, settings)]
        session: StatementSession = self._look_ups[0]
        if replica is not None:
            self._look_ups.append(_LookUps(replica, settings))
            session = _ReplicaLookUps(self._look_ups[1], self._look_ups[0])
        self._lookups = SqlLookups(session)

    @property
    def lookups(self) -> Lookups:
        return self._lookups

    async def read(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        return await self._reads.run(work)

    async def write(self, work: Callable[[Transaction], Awaitable[T]], *, device: DeviceKey | None = None) -> T:
        return await self._writes.run(work, device)

    @property
    def waiting_writes(self) -> int:
        return self._writes.waiting

    async def search(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool = False) -> T:
        return await self._searches.run(work, is_heavy=is_heavy)

    async def ping(self) -> None:
        async with self._database.connection() as connection:
            await connection.fetchrow("SELECT version FROM schema_version LIMIT 1")

    async def close(self) -> None:
        await self._searches.close()
        await self._writes.close()
        await self._reads.close()
        for look_ups in self._look_ups:
            await look_ups.close()
        for database in (self._database, self._replica):
            if database is not None:
                await database.close()


class PostgresqlConnections:
    """`connections.Connections` over tables of the same database; see there. Made by `open_postgresql_connections`."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self._database = database
        self._writes = Transactions(
            database, SqlConnectionTransaction(StepSession()), settings, begin=_BEGIN, writes=True, at_once=1
        )
        self._look_ups = _LookUps(database, settings)
        lookups = SqlConnectionLookups(self._look_ups)
        self.batch = lookups.batch
        self.find_connection = lookups.find_connection
        self.find_adapter_instances = lookups.find_adapter_instances

    async def write(self, work: Callable[[ConnectionTransaction], Awaitable[T]], *, device: Key | None = None) -> T:
        return await self._writes.run(work, device)

    async def close(self) -> None:
        await self._writes.close()
        await self._look_ups.close()
        await self._database.close()


# Opening


class _SchemaSession(DirectSession):
    """`migrations.SchemaSession` over one connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(Executor(connection, may_lock=True).execute)
        self._connection = connection

    async def begin(self) -> None:
        await self._connection.execute("BEGIN")
        await self._connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)

    async def commit(self) -> None:
        await self._connection.execute("COMMIT")

    async def rollback(self) -> None:
        if not self._connection.is_closed():
            await self._connection.execute("ROLLBACK")

    async def list_tables(self) -> Sequence[str]:
        rows = await self._connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        return [row[0] for row in rows]


async def _make_schema(database: Database, migrations: tuple[Migration, ...], *, may_migrate: bool) -> tuple[int, int]:
    """Look at the schema, and make what is missing.

    Returns:
        Its version before and after.
    """
    connection = await database.connect()
    try:
        await connection.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        await _check_server(connection, database.name)
        session = _SchemaSession(connection)
        before = await find_version(session, database.name, migrations)
        if before >= migrations[-1].number:
            return before, before
        if not may_migrate:
            raise OlderSchema(
                f"{database.name} has schema {before}, this version of Kamado needs {migrations[-1].number}, and "
                "storage.auto_migrate is off; run: kamado migrate"
            )
        await apply_migrations(session, database.name, migrations, datetime.now(UTC))
        return before, migrations[-1].number
    finally:
        connection.terminate()


async def _check_server(connection: Connection, name: str) -> None:
    version = connection.get_server_version()
    if version.major < _MINIMUM_VERSION:
        raise StorageError(f"{name}: PostgreSQL {version.major} is too old; Kamado needs {_MINIMUM_VERSION} or newer")
    encoding = await connection.fetchval("SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise StorageError(f"{name} has the encoding {encoding}; create the database with encoding UTF8")


async def _open_schema(
    database: Database,
    settings: StoreSettings,
    migrations: tuple[Migration, ...],
    *,
    may_migrate: bool,
    then: Callable[[], Awaitable[None]] | None = None,
) -> tuple[int, int]:
    """Make the schema, and what has to follow, as soon as the database can be reached."""
    end = time.monotonic() + settings.open_timeout
    pause, longest = _CONNECT_PAUSES
    while True:
        try:
            versions = await _make_schema(database, migrations, may_migrate=may_migrate)
            if then is not None:
                await then()
            return versions
        except (*_DRIVER_ERRORS, _Failed) as error:
            cause = error.__cause__ if isinstance(error, _Failed) and error.__cause__ is not None else error
            text = _opening_text(database.name, cause)
            wait = pause * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            is_final = not isinstance(cause, _PASSING) or isinstance(cause, ValueError)
            if is_final or time.monotonic() + wait > end:
                raise StorageError(text) from error
            _log.warning("database not open yet", extra={"database": database.name, "error": text})
            await asyncio.sleep(wait)
            pause = min(2 * pause, longest)


def _opening_text(name: str, error: BaseException) -> str:
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            return f"{name} refuses the login: {error}"
        case asyncpg.InvalidCatalogNameError():
            return f"{name} does not exist: create the database first ({error})"
        case asyncpg.InsufficientPrivilegeError():
            return f"{name}: the role has no right to do that: {error}"
        case ValueError():
            return f"storage.url: {error}"
        case asyncpg.UndefinedTableError():
            return f"{name} holds tables of another program, or the role sees another schema: {error}"
        case TimeoutError():
            return f"{name} cannot be reached: no answer"
        case ConnectionRefusedError():
            return f"{name} cannot be reached: no server listens there"
        case FileNotFoundError():
            return f"{name} cannot be used: a file that the URL names does not exist"
        case OSError() if error.strerror:
            return f"{name} cannot be reached: {error.strerror}"
    return f"{name} cannot be used: {error or type(error).__name__}"


async def open_postgresql(
    url: str, settings: StoreSettings, migrations: tuple[Migration, ...] | None = None
) -> PostgresqlStore:
    """Open a store; see `open_store`. `migrations` are the package's own if omitted."""
    database = Database(url, settings, min_size=settings.pool_min, max_size=settings.pool_max)
    migrations = load_migrations("postgresql") if migrations is None else migrations
    await _open_schema(database, settings, migrations, may_migrate=settings.auto_migrate, then=database.open)
    replica = None
    if settings.read_url is not None and settings.read_url != url:
        replica = Database(settings.read_url, settings, min_size=1, max_size=_LOOK_UPS_AT_ONCE, target="any")
        await replica.open_when_possible()
    return PostgresqlStore(database, replica, settings)


async def open_postgresql_connections(url: str, settings: StoreSettings) -> PostgresqlConnections:
    """Open what is kept of device connections in a database that has its schema."""
    database = Database(url, settings, min_size=1, max_size=_LOOK_UPS_AT_ONCE + 1)
    await database.open_when_possible()
    return PostgresqlConnections(database, settings)


async def migrate_postgresql(
    url: str, settings: StoreSettings, migrations: tuple[Migration, ...] | None = None
) -> tuple[int, int]:
    """Create or upgrade the schema; see `migrate`."""
    database = Database(url, settings, min_size=1, max_size=1)
    migrations = load_migrations("postgresql") if migrations is None else migrations
    return await _open_schema(database, settings, migrations, may_migrate=True)
