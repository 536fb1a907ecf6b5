"""The registry's store on PostgreSQL: its lanes, a replica for look-ups, and how all of that is opened.

When the database cannot be reached, whoever asks hears of it at once, and one connection is tried again and again.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, TypeVar

import asyncpg

from kamado.connections import ConnectionTransaction, Key
from kamado.errors import Unavailable
from kamado.storage.connections import SqlConnectionLookups, SqlConnectionTransaction
from kamado.storage.migrations import Migration, apply_migrations, find_version, load_migrations
from kamado.storage.postgresql_database import (
    DRIVER_ERRORS,
    PASSING,
    Connection,
    Database,
    Failed,
)
from kamado.storage.postgresql_lanes import BEGIN, BEGIN_SNAPSHOT, LOOK_UPS_AT_ONCE, LookUps, Transactions
from kamado.storage.postgresql_search import PostgresqlSearches
from kamado.storage.postgresql_statements import Executor
from kamado.storage.records import HAS_COPY, UNFINISHED, RegistryTransaction
from kamado.storage.sql import (
    NOT_FOR_REPLICAS,
    OlderSchema,
    Row,
    SqlLookups,
    StorageError,
    StoreSettings,
    UnfinishedCopy,
    Value,
)
from kamado.storage.together import DirectSession, StatementSession, StepSession
from kamado.store import DeviceKey, Lookups, Searches, Transaction

__all__ = [
    "PostgresqlConnections",
    "PostgresqlStore",
    "migrate_postgresql",
    "open_postgresql",
    "open_postgresql_connections",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MINIMUM_VERSION: Final = 13
_MIGRATION_LOCK: Final = 0x4B41_4D41_444F
"""The advisory lock under which a schema is made."""
_WRITES_AT_ONCE: Final = 2
_READS_AT_ONCE: Final = 2
_CONNECTIONS: Final = LOOK_UPS_AT_ONCE + (_WRITES_AT_ONCE + 1) + (_READS_AT_ONCE + 1) + 1
"""Connections that are used at once, those of searches left out: of writes and of reads one waits for locks, the last
one is for pings."""
_RIGHTS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")
_SHOWN_TABLES: Final = 4
"""Tables that are named to whoever has no right to them."""
_CONNECT_PAUSES: Final = (0.2, 1.0)
"""The first and the longest pause between two tries at the start, seconds."""
_LAST_PATIENCE: Final = 0.3
"""Seconds for connecting at the end of the time in which a database is tried again."""


# The store


class _ReplicaLookUps(StatementSession):
    """Look-ups in a replica. It may not have yet what is there, or only a part, so nothing is said to be missing before
    the database itself has said so; it may still have what is not there any more, for as long as it lags behind.
    """

    def __init__(self, replica: LookUps, database: LookUps) -> None:
        self._replica = replica
        self._database = database

    async def ask(self, statement: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        if statement not in NOT_FOR_REPLICAS:
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
        self._may_be_unfinished = settings.may_be_unfinished
        transaction = RegistryTransaction(StepSession())
        self._writes = Transactions(
            database,
            transaction,
            settings,
            begin=BEGIN,
            writes=True,
            at_once=_WRITES_AT_ONCE,
            is_guarded=not settings.may_be_unfinished,
        )
        self._reads = Transactions(
            database,
            transaction,
            settings,
            begin=BEGIN_SNAPSHOT,
            writes=False,
            at_once=_READS_AT_ONCE,
        )
        # Whoever gets its turn finds a connection: waiting for one would look as if the database were away.
        searches = min(settings.search_workers, (settings.pool_max - _CONNECTIONS) // 2)
        self._searches = PostgresqlSearches(database.connection, replace(settings, search_workers=searches))
        self._look_ups = [LookUps(database, settings)]
        session: StatementSession = self._look_ups[0]
        if replica is not None:
            self._look_ups.append(LookUps(replica, settings))
            session = _ReplicaLookUps(self._look_ups[1], self._look_ups[0])
        self._lookups = SqlLookups(session)

    @property
    def lookups(self) -> Lookups:
        return self._lookups

    async def read(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        return await self._reads.run(work)

    async def write(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        device: DeviceKey | None = None,
        tenant_id: str | None = None,
    ) -> T:
        return await self._writes.run(work, device, tenant_id)

    @property
    def waiting_writes(self) -> int:
        return self._writes.waiting

    async def search(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool = False) -> T:
        return await self._searches.run(work, is_heavy=is_heavy)

    async def ping(self) -> None:
        async with self._database.connection() as connection:
            # The copy may have begun after this was opened.
            if await connection.fetchval(HAS_COPY) and not self._may_be_unfinished:
                raise Unavailable(UNFINISHED)

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
            database, SqlConnectionTransaction(StepSession()), settings, begin=BEGIN, writes=True, at_once=1
        )
        self._look_ups = LookUps(database, settings)
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


async def _make_schema(
    database: Database, settings: StoreSettings, migrations: tuple[Migration, ...], patience: float
) -> tuple[int, int]:
    """Look at the schema, make what is missing, and see that it can be used.

    Args:
        database: It.
        settings: What may be made, and which rights the role needs.
        migrations: All of them.
        patience: Seconds for connecting.

    Returns:
        Its version before and after.
    """
    connection = await database.connect(patience)
    try:
        await connection.execute(
            "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0"
        )
        await _check_server(connection, database.name)
        session = _SchemaSession(connection)
        before = after = await find_version(session, database.name, migrations)
        if before < migrations[-1].number:
            if not settings.auto_migrate:
                raise OlderSchema(database.name, before, migrations[-1].number)
            await apply_migrations(session, database.name, migrations, datetime.now(UTC))
            after = migrations[-1].number
        if settings.must_write:
            await _check_rights(connection, database.name, migrations)
        if not settings.may_be_unfinished and await connection.fetchval(HAS_COPY):
            raise UnfinishedCopy(database.name)
        return before, after
    finally:
        connection.terminate()


async def _check_rights(connection: Connection, name: str, migrations: tuple[Migration, ...]) -> None:
    """See that the role may do whatever is done with the tables."""
    rows = await connection.fetch(
        """
        SELECT relname, lacks FROM pg_class, unnest($2::text[]) WITH ORDINALITY AS u (lacks, o)
        WHERE relnamespace = to_regnamespace(quote_ident(current_schema())) AND relname = ANY($1)
        AND NOT has_table_privilege(pg_class.oid, lacks) ORDER BY o, relname
        """,
        [table for migration in migrations for table in migration.tables],
        _RIGHTS,
    )
    if rows:
        rights, tables = list(dict.fromkeys(row[1] for row in rows)), list(dict.fromkeys(row[0] for row in rows))
        more = len(tables) - _SHOWN_TABLES
        shown = ", ".join(tables[:_SHOWN_TABLES]) + (f" and {more} more" if more > 0 else "")
        raise StorageError(
            f"{name}: the role {await connection.fetchval('SELECT current_user')} has no right to {', '.join(rights)} "
            f"in {shown}: grant it, or set management.read_only"
        )


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
    then: Callable[[], Awaitable[None]] | None = None,
) -> tuple[int, int]:
    """Make the schema, and what has to follow, as soon as the database can be reached."""
    end = time.monotonic() + settings.open_timeout
    pause, longest = _CONNECT_PAUSES
    patience = settings.acquire_timeout
    while True:
        try:
            versions = await _make_schema(database, settings, migrations, patience)
            if then is not None:
                await then()
            return versions
        except (*DRIVER_ERRORS, Failed, OverflowError) as error:
            cause = error.__cause__ if isinstance(error, Failed) and error.__cause__ is not None else error
            text = _opening_text(database.name, cause)
            left = end - time.monotonic()
            if not isinstance(cause, PASSING) or isinstance(cause, ValueError | OverflowError) or left <= 0:
                raise StorageError(text) from error
            _log.warning("database not open yet", extra={"database": database.name, "error": text})
            # The last try is when the time is over: the database may come up at any moment.
            wait = min(pause * random.uniform(0.8, 1.2), left)  # noqa: S311 - no secret
            await asyncio.sleep(wait)
            patience = min(settings.acquire_timeout, max(left - wait, _LAST_PATIENCE))
            pause = min(2 * pause, longest)


def _opening_text(name: str, error: BaseException) -> str:
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            return f"{name} refuses the login: {error}"
        case asyncpg.TargetServerAttributeNotMatched():
            return (
                f"{name} leads to no server that takes writes, only to a standby; or its target_session_attrs asks for "
                "something else that is not there"
            )
        case asyncpg.InvalidCatalogNameError():
            return f"{name} does not exist: create the database first ({error})"
        case asyncpg.InsufficientPrivilegeError():
            return f"{name}: the role has no right to do that: {error}"
        case ValueError() | OverflowError():
            return f"storage.url: {error}"
        case asyncpg.UndefinedTableError():
            return f"{name} holds tables of another program, or the role sees another schema: {error}"
        case TimeoutError():
            return f"{name} cannot be reached: no answer"
        case ConnectionRefusedError():
            return f"{name} cannot be reached: connection refused"
        case FileNotFoundError():
            return f"{name} cannot be used: a file that the URL names does not exist"
        case OSError() if error.strerror:
            return f"{name} cannot be reached: {error.strerror}"
    return f"{name} cannot be used: {error or type(error).__name__}"


async def open_postgresql(
    url: str, settings: StoreSettings, migrations: tuple[Migration, ...] | None = None
) -> PostgresqlStore:
    """Open a store; see `open_store`. `migrations` are the package's own if omitted."""
    database = Database(
        url, settings, min_size=settings.pool_min, max_size=settings.pool_max, is_written=not settings.only_reads
    )
    replica = None
    if settings.read_url is not None and settings.read_url != url:
        replica = Database(
            settings.read_url, settings, min_size=1, max_size=LOOK_UPS_AT_ONCE, is_written=False, primary=database
        )
    migrations = load_migrations("postgresql") if migrations is None else migrations
    await _open_schema(database, settings, migrations, then=database.open)
    if replica is not None:
        await replica.open_when_possible()
    return PostgresqlStore(database, replica, settings)


async def open_postgresql_connections(url: str, settings: StoreSettings) -> PostgresqlConnections:
    """Open what is kept of device connections in a database that has its schema."""
    database = Database(url, settings, min_size=1, max_size=LOOK_UPS_AT_ONCE + 2)
    await database.open_when_possible()
    return PostgresqlConnections(database, settings)


async def migrate_postgresql(
    url: str, settings: StoreSettings, migrations: tuple[Migration, ...] | None = None
) -> tuple[int, int]:
    """Create or upgrade the schema; see `migrate`."""
    database = Database(url, settings, min_size=1, max_size=1)
    migrations = load_migrations("postgresql") if migrations is None else migrations
    return await _open_schema(database, replace(settings, auto_migrate=True, may_be_unfinished=True), migrations)
