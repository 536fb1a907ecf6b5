"""Connections to a PostgreSQL database: a pool, whether it can be reached, and the driver's errors in our words.

What is behind an error decides what is done about it: a lost connection is tried once more on another, a clash with
somebody else after a pause, a value that cannot be stored without the others.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias, cast

import asyncpg

from kamado.errors import Unavailable
from kamado.storage import shown_url
from kamado.storage.postgresql_url import parse_url
from kamado.storage.sql import StorageError, StoreSettings

__all__ = [
    "DRIVER_ERRORS",
    "FIND_MARK",
    "PASSING",
    "Cause",
    "Connection",
    "Database",
    "Failed",
    "Mark",
]

_log = logging.getLogger(__name__)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

_RUN: Final = "kamado.run"
_FIND_RUN: Final = "concat(pg_postmaster_start_time(), ' ', (SELECT stats_reset FROM pg_stat_bgwriter))"
"""Tells one run of a server from the next: it is another after each crash, with which the statistics go. A setting of
each connection, since none outlives a run."""
_SETTINGS: Final = {
    "application_name": "kamado",
    # Whatever the statistics say of a table that was empty a minute ago: a point read goes by its index. Searches take
    # these back for themselves.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    # A process that is stopped or cut off in a transaction keeps others from its rows no longer than this.
    "idle_in_transaction_session_timeout": "10s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
_UNLIMITED: Final = {"idle_session_timeout": 14, "transaction_timeout": 17}
"""What has no limit, and the version that knows of it."""
_PROBE_INTERVALS: Final = (0.1, 0.2, 0.5)
"""Seconds between two tries to reach a database that is away; the last one for all that follow."""
_NEXT_HOST: Final = 0.25
"""Seconds after which the next of several hosts is tried, too."""
_SPARE_PAUSE: Final = 0.05
"""Seconds between two tries to get a connection from a database that has none to spare."""
_FIND_IDENTITY: Final = """
SELECT concat(system_identifier, '/', (SELECT oid FROM pg_database WHERE datname = current_database()))
FROM pg_control_system()"""
"""Tells one database from all others, and is the same on its physical replicas, also once one was promoted."""
_STATUS_TIME: Final = 3.0
"""Seconds in which the outcome of a commit can be asked for, once its connection was lost."""
_LOG_INTERVAL: Final = 1.0
_PLAN_LIFETIME: Final = 5.0
"""Seconds after which a connection has its statements planned anew, which takes some milliseconds for all of them."""
_GRACE: Final = 1.0
"""Seconds by which we wait longer than the database itself does."""
_AWAY: Final = "the database cannot be reached"
_SLOW: Final = "the database took too long"


class Cause(Enum):
    """What is behind an error of the driver."""

    LOST = "the connection"
    SILENT = "the connection, of which nothing came in time"
    SLOW = "a statement that took too long"
    LOCKED = "a lock that somebody else has"
    CLASH = "something that goes on side by side"
    PART = "what a statement was given, perhaps by one of many"
    OTHER = "the state of the database"


_CLASHES: Final = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
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
PASSING: Final = (
    *_LOSSES,
    *_CLASHES,
    asyncpg.LockNotAvailableError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
)
"""What may be over in a moment, and so is waited for at the start."""
DRIVER_ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError)
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


_OVERHEARD: Final = "another operation (2) is in progress"
"""What the driver says when it has thrown away the server's last words, since nothing had been asked."""
_PARTS: Final = (
    asyncpg.exceptions.DataError,  # of the database
    asyncpg.DataError,  # of the driver, which is an `InterfaceError`
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)


_CAUSES: Final = (
    (asyncpg.QueryCanceledError, Cause.SLOW),
    # Long before a statement has had its time: what waits for a lock is told from a database that is slow, and a
    # deadlock is undone, which the database itself notices no sooner than after a second.
    (asyncpg.LockNotAvailableError, Cause.LOCKED),
    (_CLASHES, Cause.CLASH),
    (_PARTS, Cause.PART),
    (TimeoutError, Cause.SILENT),
    (_LOSSES, Cause.LOST),
)


def _cause_of(error: BaseException) -> Cause:
    if isinstance(error, asyncpg.ClientConfigurationError):
        return Cause.OTHER  # for the driver one of those that the connection is lost with
    return next((cause for kinds, cause in _CAUSES if isinstance(error, kinds)), Cause.OTHER)


def _say(error: BaseException) -> str:
    if not isinstance(error, _PARTS):
        for kind, text in _MESSAGES:
            if isinstance(error, kind):
                return text
    return "the database cannot be used now"


def _words_of(error: BaseException) -> str:
    """Return what the log says of an error."""
    text = str(error)
    if isinstance(error, TimeoutError):
        text = text or "no answer in time"
    elif isinstance(error, asyncpg.InternalClientError) and text.endswith(_OVERHEARD):
        text = "the server has ended the connection"
    return f"{type(error).__name__}: {text}"


class _Events(NamedTuple):
    """What the log says of a database."""

    failed: str
    away: str
    back: str


_PRIMARY_EVENTS: Final = _Events(
    "database failed", "database away, everything is refused until it is back", "database back"
)
_REPLICA_EVENTS: Final = _Events(
    "replica failed", "replica away, look-ups go to the primary until it is back", "replica back"
)
_MAY_NOT_ASK: Final = (
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedFunctionError,
    asyncpg.FeatureNotSupportedError,
)


class _OtherDatabaseError(asyncpg.InterfaceError):
    """What should be a replica of the primary is not."""


class Failed(Unavailable):
    """A failure of the driver in our words, with what is behind it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(_say(error))
        self.cause = _cause_of(error)


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


def _target(hosts: int, *, is_written: bool) -> str:
    """Choose what a server must be."""
    if not is_written:
        return "any"
    # One host, too: its name or address may lead to a standby for a moment. That transactions are read only unless they
    # say otherwise, as ours do, tells which of several servers is meant; with one it is no reason to do without.
    return "read-write" if hosts > 1 else "primary"


class Mark(NamedTuple):
    """How a transaction is found again: its number, and the history of the database and the run of the server that this
    belongs to."""

    number: int
    timeline: str
    run: str | None


_TIMELINE: Final = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
FIND_MARK: Final = f"SELECT txid_current(), {_TIMELINE}, current_setting('{_RUN}', true)"
"""Asks for the `Mark` of a transaction that writes; more columns may follow."""
_FIND_OUTCOME: Final = f"SELECT {_TIMELINE}, current_setting('{_RUN}', true), txid_status($1)"


class _PooledConnection(asyncpg.Connection):
    """Knows when it has had its statements planned."""

    planned = 0.0

    async def plan_anew(self, planned_before: float) -> None:
        """Have statements planned anew if their plans may be from before this (monotonic)."""
        if self.planned < planned_before:
            self.planned = time.monotonic()
            await self.execute("DISCARD PLANS")


class Database:
    """Connections to one PostgreSQL database, and whether it can be reached.

    Args:
        url: See `open_store`.
        settings: See there.
        min_size: How many connections there are at least.
        max_size: How many there may be.
        is_written: Whether it must be one that takes writes, unless the URL says otherwise (`target_session_attrs`).
        primary: What this is a replica of. While this cannot be used, the primary is.

    Raises:
        StorageError: The URL asks for something that cannot be had.
    """

    def __init__(
        self,
        url: str,
        settings: StoreSettings,
        *,
        min_size: int,
        max_size: int,
        is_written: bool = True,
        primary: "Database | None" = None,
    ) -> None:
        self.name = shown_url(url)
        try:
            parsed = parse_url(url)
        except ValueError as error:
            raise StorageError(f"{self.name}: {error}") from error
        self._urls = list(parsed.hosts)
        self._target = None if parsed.has_target else _target(len(self._urls), is_written=is_written)
        self._connect_timeout = parsed.connect_timeout
        self._application_name = parsed.application_name
        self._settings = settings
        self._min_size = min_size
        self._max_size = max_size
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._is_closed = False
        self._logged = ("", 0.0)
        self._slow_plans = 0.0
        """When (monotonic) a statement took too long, perhaps because of its plan: older ones are not used again."""
        self._events = _PRIMARY_EVENTS if primary is None else _REPLICA_EVENTS
        self._primary = primary
        self._replica: Database | None = None
        self._identity: str | None = None
        """Of a primary that has a replica, as the last connection found it; `None` if nobody may say."""
        self._told = ""
        """What was said last of a replica that may not be one."""
        if primary is not None:
            primary._replica = self

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
        if self._connect_timeout is not None:
            options["timeout"] = min(options["timeout"], self._connect_timeout)
        if self._target is not None:
            options["target_session_attrs"] = self._target
        if len(self._urls) == 1:
            return await asyncpg.connect(self._urls[0], **options)
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
                    except DRIVER_ERRORS as error:
                        errors.append(error)
                    else:
                        self._urls.sort(key=lambda one: one != url)
                        return connection
        finally:
            for task in tries:
                task.add_done_callback(_give_up)
                task.cancel()
        # What does not pass by itself says more than that another host is away.
        raise next((error for error in errors if not isinstance(error, PASSING)), errors[0])

    async def _prepare(self, connection: Connection) -> None:
        # Not as parameters of the start: poolers in between refuse what they do not know.
        timeout = self._settings.statement_timeout * 1000
        # By itself, and first: until then what the role or the database say of it counts, also for the rest.
        await connection.execute(f"SET statement_timeout = {timeout:.0f}")
        version = connection.get_server_version().major
        settings = _SETTINGS | {"lock_timeout": f"{timeout / 2:.0f}ms"}
        settings |= {name: "0" for name, first in _UNLIMITED.items() if version >= first}
        if self._application_name is not None:
            settings["application_name"] = self._application_name
        names = ", ".join(f"set_config(${2 * n + 1}, ${2 * n + 2}, false)" for n in range(len(settings)))
        words = [word for pair in settings.items() for word in pair]
        await connection.fetch(f"SELECT {names}, set_config('{_RUN}', {_FIND_RUN}, false)", *words)
        if self._primary is not None or self._replica is not None:
            await self._identify(connection)

    async def _identify(self, connection: Connection) -> None:
        """See that a replica is one of the primary: another registry's would give wrong answers for good.

        Raises:
            _OtherDatabaseError: It is not.
        """
        try:
            identity: str | None = await connection.fetchval(_FIND_IDENTITY)
        except _MAY_NOT_ASK:
            identity = None
        if self._primary is None:
            has_changed = self._identity not in (None, identity)
            self._identity = identity
            if has_changed and self._replica is not None:
                # Connections that it has belong to what there was before.
                self._replica.watch()
            return
        wanted = self._primary._identity
        if identity is None or wanted is None:
            text = "a role may not call pg_control_system()"
            self._tell_once(logging.WARNING, "replica used without knowing whose it is", text)
        elif identity != wanted:
            text = f"it is another database (system identifier and OID {identity}) than the primary ({wanted})"
            self._tell_once(logging.ERROR, "replica not used, look-ups go to the primary", text)
            raise _OtherDatabaseError(text)
        else:
            self._told = ""

    def _tell_once(self, level: int, message: str, error: str) -> None:
        if self._told != error:
            self._told = error
            _log.log(level, message, extra={"database": self.name, "error": error})

    async def open(self) -> None:
        """Make the pool.

        Raises:
            Unavailable: The database cannot be reached.
        """
        try:
            self._pool = await asyncpg.create_pool(
                connect=self._connect,
                connection_class=_PooledConnection,
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
        except DRIVER_ERRORS as error:
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
        except DRIVER_ERRORS as error:
            failed = self.failed(error)
            if failed.cause in (Cause.LOST, Cause.SILENT):
                self.watch()
            raise failed from error
        try:
            # What was planned while a table was empty passes over all of it, and would do so until the next ANALYZE.
            lent = cast(_PooledConnection, connection)  # which answers in its stead
            await lent.plan_anew(max(self._slow_plans, time.monotonic() - _PLAN_LIFETIME))
            yield connection
        except DRIVER_ERRORS as error:
            failed = self.failed(error)
            if failed.cause is Cause.SLOW:
                self._slow_plans = time.monotonic()
            if failed.cause in (Cause.LOST, Cause.SILENT):
                # Others that lie idle have probably gone the same way.
                _drop(connection)
                await self._pool.expire_connections()
                if failed.cause is Cause.SILENT:
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
            except DRIVER_ERRORS as error:
                # One that was cut while it was made says nothing about the database.
                if was_lost or _cause_of(error) is not Cause.LOST:
                    raise
                was_lost = True

    async def _release(self, connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]") -> None:
        assert self._pool is not None, "the connection came from there"
        try:
            if not connection.is_closed() and connection.is_in_transaction():
                await connection.execute("ROLLBACK", timeout=_GRACE)
            await self._pool.release(connection, timeout=_GRACE)
        except DRIVER_ERRORS:
            _drop(connection)
        except BaseException:
            # Cancelled meanwhile: nobody would give it back any more.
            _drop(connection)
            raise

    def failed(self, error: BaseException) -> Failed:
        """Log a failure of the driver and put it in our words."""
        name, now = type(error).__name__, time.monotonic()
        is_told = isinstance(error, _OtherDatabaseError) or _cause_of(error) in (Cause.CLASH, Cause.LOCKED)
        if not is_told and (self._logged[0] != name or now - self._logged[1] >= _LOG_INTERVAL):
            self._logged = name, now
            _log.error(self._events.failed, extra={"database": self.name, "error": _words_of(error)})
        return Failed(error)

    def watch(self) -> None:
        """Refuse everything from now on until the database answers again."""
        if self._probe is None and not self._is_closed:
            self._probe = asyncio.get_running_loop().create_task(self._wait_until_back())

    async def _wait_until_back(self) -> None:
        _log.warning(self._events.away, extra={"database": self.name})
        tries = 0
        try:
            while not await self._is_back():
                await asyncio.sleep(_PROBE_INTERVALS[min(tries, len(_PROBE_INTERVALS) - 1)])
                tries += 1
            _log.warning(self._events.back, extra={"database": self.name})
        finally:
            self._probe = None

    async def _is_back(self) -> bool:
        try:
            return await self._try_again()
        except Exception:
            # Nobody would look any more.
            _log.exception("cannot look whether the database is back", extra={"database": self.name})
            return False

    async def _try_again(self) -> bool:
        try:
            # Half the time: what was sent while nothing came through may never arrive, so ask again soon.
            connection = await self.connect(self._settings.acquire_timeout / 2)
        except asyncpg.TooManyConnectionsError:
            return self._pool is not None  # it answers; there may be connections of ours
        except DRIVER_ERRORS:
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

    async def find_outcome(self, mark: Mark) -> bool | None:
        """Ask whether a transaction was committed; `None` if that cannot be said (soon).

        Args:
            mark: Of a transaction whose connection was lost in the commit.
        """
        end = time.monotonic() + _STATUS_TIME
        while time.monotonic() < end:
            try:
                connection = await self.connect()
                try:
                    row = await connection.fetchrow(_FIND_OUTCOME, mark.number, timeout=_GRACE)
                finally:
                    connection.terminate()
            except asyncpg.InvalidParameterValueError:
                # A number that is still to come: the server has crashed before anything of the transaction was on disk.
                return False
            except DRIVER_ERRORS:
                self.watch()
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
            except (TimeoutError, *DRIVER_ERRORS):
                self._pool.terminate()
