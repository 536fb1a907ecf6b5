"""The SQLite dialect: connections, threads, grouped commits, and the driver's errors in our words.

Two connections to one file in WAL mode, so that they never wait for each other:

* The **writer** belongs to a thread of its own. Writes that wait at the same moment share one transaction and so one
  wait for the disk: `BEGIN IMMEDIATE`, each use case inside a savepoint, `COMMIT`, and only then does any caller
  hear of its outcome. A use case that fails undoes its savepoint; a commit that fails undoes the group.
* The **reader** belongs to the event loop's thread and is used there directly: a point read takes less time than
  handing it to a thread and fetching the answer (docs/decisions).

Neither ever suspends inside SQLite, so the coroutines of `sql.py` are driven to their end by one `send`.

`SqliteEngine` is all that, whatever the file holds; `Content` says what that is. `SqliteStore` is the registry's own
database, `volatile.py` has another that may be lost.
"""

import asyncio
import errno
import fcntl
import json
import logging
import os
import queue
import re
import shlex
import sqlite3
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

from kamado.errors import Unavailable
from kamado.storage.migrations import Migration, apply_migrations, find_version, load_migrations
from kamado.storage.records import HAS_COPY, UNFINISHED, RegistryTransaction
from kamado.storage.sql import (
    Combined,
    OlderSchema,
    Row,
    Session,
    SqlLookups,
    StorageError,
    StoreSettings,
    UnusableFile,
    Value,
)
from kamado.storage.sqlite_search import SearchPool, add_functions
from kamado.store import DeviceKey, Lookups, Searches

__all__ = ["Content", "SqliteEngine", "SqliteStore", "migrate_sqlite", "open_sqlite"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")
X = TypeVar("X")
"""A kind of transaction."""

# The statements need RETURNING; no older one than this comes with a Python that Kamado runs on.
_MINIMUM_VERSION = (3, 35, 0)
_APPLICATION_ID = 0x4B41_4D41  # "KAMA" in the file's header: a look at the file tells whose it is
_PRAGMAS = (
    "PRAGMA foreign_keys = ON",
    # What macOS calls a flush of the disk does not reach it without.
    "PRAGMA fullfsync = ON",
    "PRAGMA checkpoint_fullfsync = ON",
    # After a large transaction the write-ahead log is cut to this size.
    "PRAGMA journal_size_limit = 67108864",
)
_DURABLE = "PRAGMA synchronous = FULL"
_WRITER_PRAGMAS = (*_PRAGMAS, "PRAGMA cache_size = -16384", "PRAGMA wal_autocheckpoint = 4000")
# Search entries come in anywhere in their tables: with a small cache, each page is written again and again.
_BULK_PRAGMAS = (
    *_PRAGMAS,
    "PRAGMA synchronous = NORMAL",
    "PRAGMA cache_size = -262144",
    "PRAGMA wal_autocheckpoint = 32000",
)
# Small, because each commit makes the reader drop its cache, and pages come back from the system's cache in a
# microsecond. No mmap: a file that grows is mapped anew after each commit, and the page faults cost more than the
# reads they save (14 instead of 7 us for a point read beside a writer).
_READER_PRAGMAS = ("PRAGMA query_only = ON", "PRAGMA cache_size = -8192")
# The reader blocks the event loop while it waits. With WAL it waits only while another process recovers the log.
_READER_TIMEOUT = 0.02
_LOCK_INTERVAL = 0.001
# On this byte of the log's index whoever has it open holds a shared lock (SQLite's "dead man's switch").
_INDEX_LOCK = 128
_RECONNECT_INTERVAL = 0.5
_LOG_INTERVAL = 1.0
_MAX_TRANSLATED = 512
_WRITER_FAILED = "the database cannot be written any more; restart the registry"

_creating = threading.Lock()

_LOCK = re.compile(r"\s+FOR (KEY SHARE|UPDATE)$")
_PARAMETER = re.compile(r"\?(\d+)")
_ARRAY = re.compile(r"= ANY\((\?\d+)\)")

# Primary result codes (the low byte of an extended one) -> what a caller is told.
_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY: "the database is busy: another process has been writing for too long",
    sqlite3.SQLITE_LOCKED: "the database is busy: another process has been writing for too long",
    sqlite3.SQLITE_FULL: "the database cannot grow: the disk is full",
    sqlite3.SQLITE_IOERR: "the database cannot be read or written: input/output error",
    sqlite3.SQLITE_READONLY: "the database is read only",
    sqlite3.SQLITE_PERM: "the database is read only",
    sqlite3.SQLITE_CORRUPT: "the database file is damaged",
    sqlite3.SQLITE_NOTADB: "the database file is damaged",
    sqlite3.SQLITE_CANTOPEN: "the database cannot be opened",
}
_UNUSABLE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_TRANSIENT = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_NOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class Content(Generic[X]):
    """What a file holds, and how it is kept."""

    transaction: Callable[[Session], X]
    """Makes the transaction that use cases are handed, once for a connection."""
    migrations: tuple[Migration, ...]
    marker: str = "tenants"
    """A table by which a file is known to be of this kind."""
    application_id: int = _APPLICATION_ID
    durable: bool = True
    """Whether a write has to be on disk when it is acknowledged. If not, no write waits for the disk, and the file is
    looked through when it is opened, since a power cut may have damaged it."""

    is_bulk: bool = False
    """See `StoreSettings`."""

    @property
    def pragmas(self) -> tuple[str, ...]:
        """What a connection that writes begins with."""
        if self.is_bulk:
            return _BULK_PRAGMAS
        return (_DURABLE if self.durable else "PRAGMA synchronous = OFF", *_WRITER_PRAGMAS)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", type(error).__name__)


def _drive(work: Awaitable[T]) -> T:
    """Run a coroutine that never suspends; the event loop has no part in it.

    Raises:
        RuntimeError: It does suspend, which is a mistake in the use case.
    """
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as done:
        result: T = done.value
        return result
    if isinstance(work, Coroutine):
        work.close()
    raise RuntimeError("a use case must await nothing but its transaction")


def _translate(statement: str) -> tuple[str, "itemgetter[Any] | None"]:
    """Turn a statement of `sql.py` into SQLite's, and the order in which it takes the parameters.

    Plain `?` because sqlite3 of Python 3.12.0 to 3.12.3 warns of each numbered one.
    """
    # Writers are one after the other anyway.
    statement = _ARRAY.sub(r"IN (SELECT value FROM json_each(\1))", _LOCK.sub("", statement))
    order = [int(number) - 1 for number in _PARAMETER.findall(statement)]
    text = _PARAMETER.sub("?", statement)
    if order == list(range(len(order))):
        return text, None
    assert len(order) > 1, "a single parameter is number 1"
    return text, itemgetter(*order)


class _Session:
    """`sql.Session` and `migrations.SchemaSession` over one connection."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        connect: Callable[[], sqlite3.Connection],
        path: str,
        *,
        lock_timeout: float = 0.0,
        quiet: bool = False,
    ) -> None:
        self.connection = connection
        self.path = path
        self.has_snapshot = False
        self.is_damaged = False
        """Whether SQLite has found that the file is damaged or something else."""
        self._lock_timeout = lock_timeout
        self._quiet = quiet
        self._connect = connect
        self._connected = time.monotonic()
        self._closed = False
        self._translated: dict[str, tuple[str, itemgetter[Any] | None]] = {}
        self._logged = ("", 0.0)

    async def one(self, statement: str, *parameters: Value) -> Row | None:
        text, order = self._translated.get(statement) or self._add(statement)
        try:
            row: Row | None = self.connection.execute(
                text, parameters if order is None else order(parameters)
            ).fetchone()
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return row

    async def all(self, statement: str, *parameters: Value) -> list[Row]:
        text, order = self._translated.get(statement) or self._add(statement)
        try:
            return self.connection.execute(text, parameters if order is None else order(parameters)).fetchall()
        except sqlite3.Error as error:
            raise self.failed(error) from error

    async def run(self, statement: str, *parameters: Value) -> int:
        text, order = self._translated.get(statement) or self._add(statement)
        try:
            return self.connection.execute(text, parameters if order is None else order(parameters)).rowcount
        except sqlite3.Error as error:
            raise self.failed(error) from error

    async def many(self, statement: str, rows: Sequence[Sequence[Value]]) -> None:
        text, order = self._translated.get(statement) or self._add(statement)
        try:
            self.connection.executemany(text, rows if order is None else map(order, rows))
        except sqlite3.Error as error:
            raise self.failed(error) from error

    async def each(self, statement: str, rows: Sequence[Sequence[Value]]) -> list[Row | None]:
        return [await self.one(statement, *parameters) for parameters in rows]

    async def combine(self, function: Combined[A, R], argument: A) -> R:
        (result,) = await function(self, (argument,))
        return result

    async def lock(self, name: str) -> None:
        # Only one transaction writes at a time.
        return

    def array(self, values: Sequence[str]) -> Value:
        return json.dumps(list(values))

    def _add(self, statement: str) -> tuple[str, "itemgetter[Any] | None"]:
        if len(self._translated) >= _MAX_TRANSLATED:  # searches make statements of their own
            self._translated.clear()
        translated = self._translated[statement] = _translate(statement)
        return translated

    def failed(self, error: sqlite3.Error) -> Unavailable:
        """Log a failure of the driver and put it in our words."""
        name, now = _name(error), time.monotonic()
        # A statement that is wrong has no table: the file is not what it was, or empty.
        if _code(error) in {*_UNUSABLE, sqlite3.SQLITE_ERROR}:
            self.is_damaged = True
        # A disk that is full fails thousands of times a second; the log needs it once.
        # What is interrupted has taken too long, or its caller has gone: no failure.
        if (
            not self._quiet
            and _code(error) != sqlite3.SQLITE_INTERRUPT
            and (self._logged[0] != name or now - self._logged[1] >= _LOG_INTERVAL)
        ):
            self._logged = name, now
            logger.error("database failed", extra={"database": self.path, "error": f"{name}: {error}"})
        return Unavailable(_UNAVAILABLE.get(_code(error), "the database cannot be used now"))

    def batch(self) -> "_Batch":
        return _Batch(self)

    def reconnect(self, error: sqlite3.Error) -> None:
        """Replace the connection if `error` says that it may be broken, now and then until it works."""
        now = time.monotonic()
        if self._closed or _code(error) in _TRANSIENT or now - self._connected < _RECONNECT_INTERVAL:
            return
        self._connected = now
        try:
            connection = self._connect()
        except sqlite3.Error as again:
            fields = {"database": self.path, "error": f"{_name(again)}: {again}"}
            logger.error("database cannot be opened again", extra=fields)
        else:
            self.connection.close()
            self.connection = connection
            self.has_snapshot = False

    def close(self) -> None:
        self._closed = True
        self.connection.close()

    def begin_writing(self) -> None:
        """Begin a transaction that writes, once no other process does.

        SQLite's own waiting looks at the lock every 0.1 s in the end, which is seldom when it is free if another
        process writes without a pause: it starved for seconds.

        Raises:
            sqlite3.OperationalError: Another process is still writing at the end of the time-out.
        """
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
                time.sleep(_LOCK_INTERVAL)
            else:
                return

    async def begin(self) -> None:
        try:
            self.begin_writing()
        except sqlite3.Error as error:
            raise self.failed(error) from error

    async def commit(self) -> None:
        await self.run("COMMIT")

    async def rollback(self) -> None:
        if self.connection.in_transaction:
            await self.run("ROLLBACK")

    def begin_snapshot(self) -> None:
        try:
            self.connection.execute("BEGIN")
        except sqlite3.Error as error:
            raise self.failed(error) from error
        self.has_snapshot = True

    def end_snapshot(self) -> None:
        if self.has_snapshot:  # a connection that broke was replaced by one without
            self.has_snapshot = False
            connection = self.connection
            try:
                connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                self.failed(error)
                # Whatever it is, nobody may go on reading from this snapshot.
                connection.close()

    async def list_tables(self) -> Sequence[str]:
        rows = await self.all("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        return [row[0] for row in rows]


class _Batch:
    """A snapshot for look-ups. A class and not a generator, because it is entered for each lot of them."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._begun = False

    def __enter__(self) -> None:
        session = self._session
        if not session.has_snapshot:
            try:
                session.connection.execute("BEGIN")
                session.has_snapshot = self._begun = True
            except sqlite3.Error as error:
                # Each look-up then stands alone, and raises what there is to raise.
                session.failed(error)

    def __exit__(self, *_: object) -> None:
        if self._begun:
            self._session.end_snapshot()


class _ReadSession(_Session):
    """A session that gets over a broken connection by itself: whatever it runs stands alone."""

    def failed(self, error: sqlite3.Error) -> Unavailable:
        unavailable = super().failed(error)
        self.reconnect(error)
        return unavailable


def _connect(
    path: str, mode: str, timeout: float, pragmas: Sequence[str], *, is_shared: bool = False
) -> sqlite3.Connection:
    """Connect. One that is shared may be closed by another thread than the one that uses it."""
    connection = sqlite3.connect(
        f"file:{quote(path)}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=timeout,
        cached_statements=256,
        check_same_thread=not is_shared,
    )
    try:
        for pragma in pragmas:
            connection.execute(pragma).fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_writer(path: str, content: Content[Any]) -> sqlite3.Connection:
    return _connect(path, "rw", 0, content.pragmas)


def _connect_reader(path: str) -> sqlite3.Connection:
    return _connect(path, "ro", _READER_TIMEOUT, _READER_PRAGMAS)


def _connect_searcher(path: str) -> sqlite3.Connection:
    # It is closed when all searches have ended, by another thread.
    connection = _connect(path, "ro", _READER_TIMEOUT, _READER_PRAGMAS, is_shared=True)
    add_functions(connection)
    return connection


def _create_file(path: Path) -> None:
    """Create the database's file and directories, if absent, for this user alone; make their names durable."""
    # Closing a descriptor of a file gives up this process's locks on it, SQLite's among them. So a file that exists
    # is not opened here, and nobody connects to one that is being made.
    with _creating:
        missing = []
        directory = path.parent
        while not directory.exists():
            missing.append(directory)
            directory = directory.parent
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
        try:
            # SQLite gives the files beside the database the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return
        for directory in {path.parent, *(directory.parent for directory in missing)}:
            descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _opening_error(path: str, error: sqlite3.Error) -> StorageError:
    texts = {
        sqlite3.SQLITE_NOTADB: f"{path} is not a SQLite database",
        sqlite3.SQLITE_CORRUPT: f"{path} is damaged; restore a backup",
        sqlite3.SQLITE_BUSY: f"{path} is locked by another process",
        sqlite3.SQLITE_LOCKED: f"{path} is locked by another process",
        sqlite3.SQLITE_READONLY: f"{path} cannot be written: the file, its directory or its disk is read only",
        sqlite3.SQLITE_CANTOPEN: f"{path} cannot be opened: check the rights on the file and on its directory, in "
        "which SQLite needs to create files",
        sqlite3.SQLITE_FULL: f"{path} cannot grow: the disk is full",
        sqlite3.SQLITE_IOERR: f"{path} cannot be read or written: input/output error (is the disk full?)",
    }
    kind = UnusableFile if _code(error) in _UNUSABLE else StorageError
    return kind(texts.get(_code(error), f"{path} cannot be opened ({_name(error)}: {error})"))


def _open_writer(
    path: str, settings: StoreSettings, content: Content[Any], *, may_migrate: bool
) -> tuple[sqlite3.Connection, int, int]:
    """Open, check, migrate. Nothing is changed before it is certain that the file is ours to change.

    Returns:
        The connection; the schema's version before and after.
    """
    if sqlite3.sqlite_version_info < _MINIMUM_VERSION:
        raise StorageError(
            f"this Python has SQLite {sqlite3.sqlite_version}; at least "
            f"{'.'.join(map(str, _MINIMUM_VERSION))} is needed"
        )
    file = Path(path)
    try:
        if may_migrate:
            _create_file(file)
        elif not file.exists():
            raise OlderSchema(path, None, content.migrations[-1].number)
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):
            raise StorageError(f"{path} is not a file")
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        # Large transactions spill into temporary files: where the database is there is room, and the right to write.
        os.environ.setdefault("SQLITE_TMPDIR", str(file.parent))
        connection = _connect(path, "rw", settings.busy_timeout, ())
    except sqlite3.Error as error:
        raise _opening_error(path, error) from error
    try:
        before, after = _drive(_prepare(path, connection, settings, content, may_migrate=may_migrate))
    except BaseException as error:
        connection.close()
        cause = _driver_error(error)
        if cause is None:
            raise
        raise _opening_error(path, cause) from cause
    if content.durable and mode & (stat.S_IRWXG | stat.S_IRWXO):
        # Not changed here: perhaps somebody wants it so. The files beside the database have the same mode.
        logger.warning(
            "other users have rights on the database, which holds password hashes and keys",
            extra={"mode": f"{stat.S_IMODE(mode):04o}", "remedy": f"chmod 600 {shlex.quote(path)}"},
        )
    return connection, before, after


async def _prepare(
    path: str,
    connection: sqlite3.Connection,
    settings: StoreSettings,
    content: Content[Any],
    *,
    may_migrate: bool,
) -> tuple[int, int]:
    # Quiet: whoever opens is told all there is to tell.
    connect = partial(_connect_writer, path, content)
    session = _Session(connection, connect, path, lock_timeout=settings.busy_timeout, quiet=True)
    migrations = content.migrations
    before = await find_version(session, path, migrations, content.marker)
    latest = migrations[-1].number
    if before < latest and not may_migrate:
        raise OlderSchema(path, before, latest)
    _prove_writable(connection, settings)
    _switch_to_wal(path, connection, settings)
    for pragma in content.pragmas:
        connection.execute(pragma).fetchall()
    if not content.durable:
        # Not the quick one, which takes half the time (0.3 s for a million rows): pages of different moments are each
        # sound, and only their order shows that they do not belong together.
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise UnusableFile(f"{path} is damaged: {found}")
    if before < latest:
        if before == 0:
            connection.execute(f"PRAGMA application_id = {content.application_id}")
        for migration in await apply_migrations(session, path, migrations, datetime.now(UTC), content.marker):
            fields = {"database": path, "schema": migration.number, "migration": migration.name}
            logger.info("schema migrated", extra=fields)
    # From here on nothing waits but `_Session.lock`, in its own way.
    connection.execute("PRAGMA busy_timeout = 0").fetchall()
    return before, max(before, latest)


def _prove_writable(connection: sqlite3.Connection, settings: StoreSettings) -> None:
    # SQLite opens a file that it may not write without a word and fails at the first write.
    connection.execute("PRAGMA busy_timeout = 0").fetchall()
    try:
        connection.execute("BEGIN IMMEDIATE")  # which takes a read-only file for granted
        try:
            (unused,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version = {unused}")
        finally:
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        # Somebody else is writing, so it can be written.
        if _code(error) != sqlite3.SQLITE_BUSY:
            raise
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(settings.busy_timeout * 1000)}").fetchall()


def _switch_to_wal(path: str, connection: sqlite3.Connection, settings: StoreSettings) -> None:
    # Not every lock in the way of this one statement is waited for by SQLite itself: another process may be
    # switching, too.
    deadline = time.monotonic() + settings.busy_timeout
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if _code(error) not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED} or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
            continue
        if mode != "wal":
            raise StorageError(f"{path} cannot have a write-ahead log: its file system has no shared memory")
        return


def _identify(path: str) -> tuple[int, int] | None:
    """Return which file is at a path, if any; nothing else gets that identity while the file is open."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Files:
    """The database, its log and the log's index, as they are while they are open.

    SQLite finds the log by the database's name alone. So the log of a database whose file was replaced would be
    applied to the new file at the next start, and SQLite itself leaves it there.

    Args:
        path: The database, which must have been read already: that makes the log.
    """

    def __init__(self, path: str) -> None:
        self._database = os.path.realpath(path)  # beside which SQLite puts the others
        self._log, self._index = f"{self._database}-wal", f"{self._database}-shm"
        self._opened = {name: _identify(name) for name in (self._database, self._log, self._index)}

    def is_ours(self, name: str) -> bool:
        opened = self._opened[name]
        return opened is not None and opened == _identify(name)

    def close(self, connection: sqlite3.Connection) -> None:
        """Close this process's last connection; the log goes with it if the database is no longer at its path."""
        try:
            if not self.is_ours(self._database):
                self._take_log_away(connection)
        except (OSError, sqlite3.Error) as error:
            logger.error(
                "database file was replaced: remove its log before the next start",
                extra={"log": self._log, "error": f"{type(error).__name__}: {error}"},
            )
        finally:
            connection.close()

    def _take_log_away(self, connection: sqlite3.Connection) -> None:
        if not self.is_ours(self._log):
            return  # gone already, or of the new database
        descriptor = None
        try:
            if _identify(self._index) is not None:
                # Closing it gives up this process's locks on the index, of which it is the last user.
                descriptor = os.open(self._index, os.O_RDWR | os.O_CLOEXEC)
                # With it nobody else can begin to use the log, and nobody uses it already.
                if not self.is_ours(self._index) or not _lock(descriptor):
                    logger.warning(
                        "database file was replaced, and another process uses the old one's log: stop that, too, "
                        "remove the log and its index, and restore the backup again",
                        extra={"log": self._log},
                    )
                    return
            # The old file may live on under another name: it gets what it was told to keep.
            try:
                busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                is_complete = not busy
            except sqlite3.Error:
                is_complete = False
            os.unlink(self._log)
            if descriptor is not None:
                os.unlink(self._index)
            logger.warning(
                "database file was replaced: the old one's log was removed, so that the new one is not damaged by it",
                extra={"log": self._log, "old_is_complete": is_complete},
            )
        finally:
            # Not before the connection: it would unlock the index.
            connection.close()
            if descriptor is not None:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _INDEX_LOCK)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EAGAIN}:
            raise
        return False
    return True


class _Job(NamedTuple):
    work: Callable[[Any], Awaitable[Any]]
    future: "asyncio.Future[Any]"


class _Outcome(NamedTuple):
    future: "asyncio.Future[Any]"
    value: Any
    error: BaseException | None


class SqliteEngine(Generic[X]):
    """One SQLite file: transactions of one kind, one writer, one reader.

    Args:
        path: Of the file.
        settings: See there.
        content: What the file holds.
    """

    def __init__(self, path: str, settings: StoreSettings, content: Content[X]) -> None:
        # A change of the working directory must not change the database.
        self._path = os.path.abspath(path)
        self._settings = settings
        self._content = content
        self._loop = asyncio.get_running_loop()
        # Unbounded by itself: `_waiting` is its bound, counted on the event loop without a lock.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting = 0
        self._group: list[_Job] = []
        self._closed = False
        self._writer_opened: asyncio.Future[None] = self._loop.create_future()
        self._writer_ended: asyncio.Future[None] = self._loop.create_future()
        # Not waited for by an interpreter that ends without `close`: what was acknowledged is on disk anyway.
        self._thread = threading.Thread(target=self._serve_writes, name="sqlite-writer", daemon=True)

    async def open(self) -> None:
        """Open both connections; raises as `open_store`."""
        self._thread.start()
        try:
            await asyncio.shield(self._writer_opened)
        except asyncio.CancelledError:
            self._jobs.put(None)
            raise
        try:
            connect = partial(_connect_reader, self._path)
            self._reader = _ReadSession(connect(), partial(self._connect_again, connect), self._path)
        except sqlite3.Error as error:
            self._jobs.put(None)
            await self._writer_ended
            raise _opening_error(self._path, error) from error
        self._read_transaction = self._content.transaction(self._reader)

    async def read(self, work: Callable[[X], Awaitable[T]]) -> T:
        """Run reads on one snapshot; see `store.Store.read`."""
        reader = self._reader
        if reader.has_snapshot:  # inside of a batch
            return _drive(work(self._read_transaction))
        reader.begin_snapshot()
        try:
            return _drive(work(self._read_transaction))
        finally:
            reader.end_snapshot()

    async def write(
        self, work: Callable[[X], Awaitable[T]], *, device: DeviceKey | None = None, tenant_id: str | None = None
    ) -> T:
        """Run a use case in one transaction; see `store.Store.write`. All that wait share one, one after the other."""
        if self._closed:
            raise Unavailable("the database is closed")
        if self._writer_ended.done():
            raise Unavailable(_WRITER_FAILED)
        if self._waiting >= self._settings.max_waiting_writes:
            raise Unavailable("too many writes are waiting for the database")
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting += 1
        self._jobs.put(_Job(work, future))
        return await future

    @property
    def waiting_writes(self) -> int:
        """How many writes wait or run."""
        return self._waiting

    @property
    def is_lost(self) -> bool:
        """Whether the file is gone, replaced or damaged, or cannot be written any more: only opening it anew helps."""
        try:
            self._check_file()
        except Unavailable:
            return True
        return self._writer_ended.done() or self.is_damaged

    @property
    def is_damaged(self) -> bool:
        """Whether SQLite has found that the file is damaged."""
        return self._writer.is_damaged or self._reader.is_damaged

    async def ping(self) -> None:
        """Prove that the database answers; see `store.Store.ping`."""
        if self._writer_ended.done():
            raise Unavailable(_WRITER_FAILED)
        self._check_file()
        await self._reader.one("SELECT version FROM schema_version LIMIT 1")

    async def close(self) -> None:
        """Finish what was accepted, then release file and thread."""
        if not self._closed:
            self._closed = True
            # First, because the last connection to go folds the log into the database, and a reader could not.
            self._reader.close()
            self._jobs.put(None)
        await asyncio.shield(self._writer_ended)

    def _check_file(self) -> None:
        # A file that was removed or replaced can be written for as long as it is open, and is lost afterwards.
        try:
            now = os.stat(self._path)
        except OSError as error:
            raise Unavailable("the database file is gone") from error
        if (now.st_dev, now.st_ino) != self._file:
            raise Unavailable("the database file was replaced; stop the registry, then start it")

    def _connect_again(self, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        try:
            self._check_file()
        except Unavailable as error:
            # A connection to the new file would apply the old one's log to it.
            raise sqlite3.OperationalError(str(error)) from error
        return connect()

    def _settle(self, outcomes: list[_Outcome]) -> None:
        self._waiting -= len(outcomes)
        for future, value, error in outcomes:
            if future.done():
                continue  # its caller was cancelled
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    def _end_writes(self, group: list[_Job]) -> None:
        # On the event loop, as `write` is: nothing comes into the queue once this has been here.
        self._take_waiting(group, self._settings.max_waiting_writes)
        self._settle([_Outcome(job.future, None, Unavailable(_WRITER_FAILED)) for job in group])
        _succeed(self._writer_ended)

    # What follows runs in the writer's thread.

    def _serve_writes(self) -> None:
        try:
            connection, _, _ = _open_writer(
                self._path, self._settings, self._content, may_migrate=self._settings.auto_migrate
            )
            session = self._writer = _Session(
                connection,
                partial(self._connect_again, partial(_connect_writer, self._path, self._content)),
                self._path,
                lock_timeout=self._settings.busy_timeout,
            )
            status = os.stat(self._path)
            self._file = status.st_dev, status.st_ino
            files = _Files(self._path)
        except BaseException as error:
            self._tell_loop(_fail, self._writer_opened, error)
            return
        try:
            transaction = self._content.transaction(session)
            self._tell_loop(_succeed, self._writer_opened)
            closing = False
            while not closing and (job := self._jobs.get()) is not None:
                started = time.perf_counter()
                outcomes, closing = self._run_group(job, session, transaction)
                self._observe(outcomes, time.perf_counter() - started)
                self._group = []
                self._tell_loop(self._settle, outcomes)
        except BaseException:
            # Nobody would miss this thread: reads go on, and writes would wait for it for ever.
            fields = {"database": self._path}
            logger.critical("database writer failed, nothing is written any more", exc_info=True, extra=fields)
        finally:
            try:
                files.close(session.connection)
            finally:
                self._tell_loop(self._end_writes, self._group)

    def _run_group(self, first: _Job, session: _Session, transaction: X) -> tuple[list[_Outcome], bool]:
        """Run a job, and what else is waiting, in one transaction.

        Returns:
            The outcomes, good to be told; whether the end of the queue was met.
        """
        execute = session.connection.execute
        group = self._group = [first]
        outcomes: list[_Outcome] = []
        closing = False
        try:
            self._check_file()
            self._begin(session)
            deadline = time.monotonic() + self._settings.max_group_time
            for job in group:  # which grows meanwhile
                if job.future.cancelled():
                    outcomes.append(_Outcome(job.future, None, None))
                else:
                    execute("SAVEPOINT job")
                    outcome = _run_job(job, transaction)
                    outcomes.append(outcome)
                    if outcome.error is not None:
                        if not session.connection.in_transaction:
                            # Out of space or I/O: SQLite has given up the whole transaction.
                            raise Unavailable(str(outcome.error)) from outcome.error
                        execute("ROLLBACK TO job")
                    execute("RELEASE job")
                if len(group) < self._settings.max_group_size and time.monotonic() < deadline:
                    closing = self._take_waiting(group, 1)
            execute("COMMIT")
        except (sqlite3.Error, Unavailable, MemoryError) as error:
            text = str(session.failed(error) if isinstance(error, sqlite3.Error) else error) or "out of memory"
            _undo(session, error)
            # Whoever waits behind would wait as long again for the same answer.
            closing = closing or self._take_waiting(group, self._settings.max_waiting_writes)
            # Also for those that failed by themselves: what they saw of the others has not happened.
            outcomes = [_Outcome(job.future, None, Unavailable(text)) for job in group]
        return outcomes, closing

    def _begin(self, session: _Session) -> None:
        """Begin a transaction that writes; raises `Unavailable` if that may not be now."""
        session.begin_writing()

    def _observe(self, outcomes: list[_Outcome], seconds: float) -> None:
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        # A transaction that is lost takes all with it, and nothing else does that.
        lost = len(outcomes) if all(isinstance(outcome.error, Unavailable) for outcome in outcomes) else 0
        self._settings.observe(len(outcomes) - len(errors), 0 if lost else len(errors), lost, seconds)

    def _take_waiting(self, group: list[_Job], number: int) -> bool:
        """Add up to `number` waiting jobs to a group; return whether the end of the queue was met."""
        try:
            for _ in range(number):
                job = self._jobs.get_nowait()
                if job is None:
                    return True
                group.append(job)
        except queue.Empty:
            pass
        return False

    def _tell_loop(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is closed: nobody is left to be told. What was committed stays committed.
            logger.debug("event loop ended before the database was closed")


def _undo(session: _Session, error: Exception) -> None:
    """Leave the transaction that `error` ended, whatever state it is in."""
    try:
        if session.connection.in_transaction:
            session.connection.execute("ROLLBACK")
    except sqlite3.Error as another:
        session.failed(another)
        error = another
    cause = _driver_error(error)
    if cause is not None:
        session.reconnect(cause)


def _driver_error(error: BaseException) -> sqlite3.Error | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, sqlite3.Error):
        cause = cause.__cause__
    return cause


def _run_job(job: _Job, transaction: object) -> _Outcome:
    try:
        return _Outcome(job.future, _drive(job.work(transaction)), None)
    except BaseException as error:  # its caller's affair, whatever it is
        return _Outcome(job.future, None, error)


def _succeed(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: "asyncio.Future[None]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


class SqliteStore(SqliteEngine[RegistryTransaction]):
    """`store.Store` over one SQLite file; see there. Made by `open_sqlite`."""

    async def open(self) -> None:
        await super().open()
        self._lookups = SqlLookups(self._reader)
        self._searches = SearchPool(self._open_search_session, _drive, self._settings)

    @property
    def lookups(self) -> Lookups:
        return self._lookups

    async def search(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool = False) -> T:
        return await self._searches.run(work, is_heavy=is_heavy)

    async def ping(self) -> None:
        await super().ping()
        _drive(self._check_finished(self._reader))

    def _begin(self, session: _Session) -> None:
        super()._begin(session)
        _drive(self._check_finished(session))

    async def _check_finished(self, session: _Session) -> None:
        # The copy may have begun after this was opened.
        if not self._settings.may_be_unfinished:
            row = await session.one(HAS_COPY)
            assert row is not None
            if row[0]:
                raise Unavailable(UNFINISHED)

    def _open_search_session(self) -> _ReadSession:
        connect = partial(_connect_searcher, self._path)
        try:
            return _ReadSession(connect(), partial(self._connect_again, connect), self._path)
        except sqlite3.Error as error:
            raise Unavailable("the database cannot be opened") from error

    async def close(self) -> None:
        await self._searches.close()
        await super().close()


def _registry(settings: StoreSettings, migrations: tuple[Migration, ...] | None) -> Content[RegistryTransaction]:
    return Content(
        transaction=RegistryTransaction,
        migrations=load_migrations("sqlite") if migrations is None else migrations,
        is_bulk=settings.is_bulk,
    )


async def open_sqlite(
    path: str, settings: StoreSettings, migrations: tuple[Migration, ...] | None = None
) -> SqliteStore:
    """Open a store; see `open_store`. `migrations` are the package's own if omitted."""
    store = SqliteStore(path, settings, _registry(settings, migrations))
    await store.open()
    return store


async def migrate_sqlite(
    path: str, settings: StoreSettings, migrations: tuple[Migration, ...] | None = None
) -> tuple[int, int]:
    """Create or upgrade the schema; see `migrate`."""

    def run() -> tuple[int, int]:
        connection, before, after = _open_writer(
            os.path.abspath(path), settings, _registry(settings, migrations), may_migrate=True
        )
        connection.close()
        return before, after

    return await asyncio.to_thread(run)
