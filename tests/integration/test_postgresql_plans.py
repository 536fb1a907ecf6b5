"""A point read or write goes by its index on PostgreSQL, whatever the statistics say, and whenever it was planned.

Whether it does is told by the rows that the database has read for it, not by the time that this took.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import pytest
from tests.contract.records import stored_credentials, stored_device, stored_tenant
from tests.integration.registry import poll
from tests.postgresql import PostgresqlServer

from kamado.errors import Unavailable
from kamado.storage import StoreSettings, open_store, postgresql_database
from kamado.store import Store

TENANT = "acme"
SETTINGS = StoreSettings(statement_timeout=20, acquire_timeout=20)
"""So that nothing is refused because the machine is busy."""
AT_ONCE = 50
MANY = 20_000
ROWS = 50 * AT_ONCE
"""Rows that may be read for so many look-ups; for one that passes over a table it is hundreds of times as many."""


class Database:
    """A database with one tenant, of which a test asks what happens in it."""

    def __init__(self, server: PostgresqlServer) -> None:
        self._server = server
        self.url = server.create_database()
        self.name = self.url.rpartition("/")[2]

    async def run(self, sql: str) -> str:
        """Run SQL as somebody else."""
        return await asyncio.to_thread(self._server.run_sql, sql, self.name)

    async def count_rows(self, *others: str) -> int:
        """Count the rows that were read by all who have left, as they tell when they do.

        Args:
            others: Applications that may still be there.
        """
        await asyncio.to_thread(poll, lambda: self._has_nobody_but(others))
        return int(
            await self.run(
                """
                SELECT (SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_user_tables)
                     + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes)
                """
            )
        )

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncIterator[None]:
        """Lock a table, so that nobody else can even read it."""
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield
        finally:
            await connection.close()

    def _has_nobody_but(self, applications: Sequence[str]) -> bool:
        names = ", ".join(f"'{name}'" for name in ("", *applications))
        return not self._server.run_sql(
            f"""
            SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name NOT IN ({names})
            """,
            self.name,
        )

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        store = await open_store(self.url, SETTINGS)
        try:
            yield store
        finally:
            await store.close()


@pytest.fixture
def database(postgresql: PostgresqlServer) -> Iterator[Database]:
    database = Database(postgresql)
    yield database
    postgresql.drop_database(database.url)


ADD_TENANTS = f"""
INSERT INTO tenants SELECT 't' || n, 'v', 1, NULL, '{{}}' FROM generate_series(1, {MANY}) n;
INSERT INTO trust_anchor_names
SELECT kind || 'CN=' || n, 'tenant:t' || n FROM generate_series(1, {MANY}) n, unnest(ARRAY['k:', 's:']) kind;
INSERT INTO trust_anchors
SELECT 't' || n, kind || 'CN=' || n, 'tenant:t' || n FROM generate_series(1, {MANY}) n, unnest(ARRAY['k:', 's:']) kind;
"""


@pytest.mark.parametrize("planned", ["while it was empty", "without statistics", "with statistics"])
def test_tenants_are_found_by_an_anchor_without_passing_over_all(database: Database, planned: str) -> None:
    async def look_up(store: Store, number: int) -> list[list[str]]:
        names = [f"CN={n}" for n in range(1, number + 1)]
        found = await asyncio.gather(*(store.lookups.find_tenants_by_anchor(name, name) for name in names))
        return [[row.tenant_id for row in rows] for rows in found]

    async def test() -> None:
        async with database.store() as store:
            await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))
            await database.run("ANALYZE")
            if planned == "while it was empty":
                for number in [1, AT_ONCE] * 12:
                    await look_up(store, number)
            await database.run(ADD_TENANTS)
            if planned == "with statistics":
                await database.run("ANALYZE")
            before = await database.count_rows("kamado")
            for number in [1, AT_ONCE]:
                assert await look_up(store, number) == [[f"t{n}"] for n in range(1, number + 1)]
        assert await database.count_rows() - before < ROWS

    asyncio.run(test())


ADD_CREDENTIALS = f"""
INSERT INTO credential_sets SELECT '{TENANT}', 'x' || n, 'v' FROM generate_series(1, {MANY}) n;
INSERT INTO credentials SELECT '{TENANT}', 'psk', 'x' || n, 'x' || n, 0, '{{}}' FROM generate_series(1, {MANY}) n;
"""


async def replace_devices(store: Store) -> None:
    """Delete devices, look for one's credentials, and create them again, so that each statement is for all of them."""

    async def insert(device_id: str) -> None:
        device, credentials = stored_device(TENANT, device_id), stored_credentials(TENANT, device_id)
        await store.write(lambda tx: tx.insert_device(device, credentials), device=(TENANT, device_id))

    ids = [f"d{number}" for number in range(AT_ONCE)]
    await asyncio.gather(*map(insert, ids))
    await asyncio.gather(*(store.lookups.find_credential(TENANT, "psk", one) for one in ids))
    await asyncio.gather(
        *(store.write(lambda tx, one=one: tx.delete_device(TENANT, one), device=(TENANT, one)) for one in ids)  # type: ignore[misc]
    )


async def be_cancelled(store: Store, database: Database) -> None:
    """Have a look-up cancelled, as happens to one that takes too long."""
    async with database.locked("tenants"):
        asking = asyncio.create_task(store.lookups.find_tenant(TENANT))
        waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        while not await database.run(f"SELECT pg_cancel_backend(pid) FROM ({waiting}) s"):
            pass
        with pytest.raises(Unavailable, match="took too long"):
            await asking


@pytest.mark.parametrize("planned_anew", ["after a while", "when one took too long"])
def test_what_was_planned_for_an_empty_table_is_planned_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch, planned_anew: str
) -> None:
    monkeypatch.setattr(postgresql_database, "_PLAN_LIFETIME", float("inf"), raising=False)

    async def test() -> None:
        async with database.store() as store:
            await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))
            await database.run("ANALYZE")
            for _ in range(12):
                await replace_devices(store)
            await database.run(ADD_CREDENTIALS)
            if planned_anew == "after a while":
                monkeypatch.setattr(postgresql_database, "_PLAN_LIFETIME", 0.0)
            else:
                await be_cancelled(store, database)
            before = await database.count_rows("kamado")
            await replace_devices(store)
        assert await database.count_rows() - before < MANY

    asyncio.run(test())
