"""Migrations: from every version with data, side by side, and what is refused without damage."""

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from kamado.errors import Unavailable
from kamado.search import Filter, Query
from kamado.storage import NewerSchema, OlderSchema, StorageError, StoreSettings, migrate, open_store, search
from kamado.storage.migrations import Migration, load_migrations
from kamado.storage.sql import instant_of
from kamado.storage.sqlite import migrate_sqlite, open_sqlite
from kamado.store import CredentialRow, OperatorRow, RegistrationRow, Store, TenantRow

RELEASED = load_migrations("sqlite")
LATEST = RELEASED[-1].number

# Data as each version of the schema held it. A version gets its entry when it is released and keeps it for ever.
DATA = {
    1: """
INSERT INTO tenants VALUES ('acme', 'v-tenant', 1714636800000000, NULL, '{"enabled":true,"alias":"al"}');
INSERT INTO tenant_aliases VALUES ('al', 'acme');
INSERT INTO trust_anchor_names VALUES ('s:CN=ca', 'tenant:acme'), ('k:cn=ca', 'tenant:acme');
INSERT INTO trust_anchors VALUES ('acme', 's:CN=ca', 'tenant:acme'), ('acme', 'k:cn=ca', 'tenant:acme');
INSERT INTO tenant_usage VALUES ('acme', 1);
INSERT INTO devices VALUES
  ('acme', 'gw', 'v-device', 1714636800000000, 1714636800000001, 1, 0, '{"enabled":true,"memberOf":["g"]}');
INSERT INTO device_groups VALUES ('acme', 'g', 'gw');
INSERT INTO credential_sets VALUES ('acme', 'gw', 'v-credentials');
INSERT INTO credentials VALUES ('acme', 'psk', 'x', 'gw', 0, '{"type":"psk","auth-id":"x"}');
INSERT INTO identities VALUES ('adapter', 'PLAIN', '$2a$10$x', '{"r:*":"W"}', 1714636800000000);
""",
}


DATA[2] = f"""{DATA[1]}
INSERT INTO operators VALUES ('alice', '$2a$10$y', 1, 1714636800000000);
"""


DATA[3] = f"""{DATA[2]}
INSERT INTO tenant_members VALUES ('/alias', 'sal', 'acme', NULL);
INSERT INTO device_members VALUES ('acme', '/memberOf', 'sg', 'gw', NULL);
INSERT INTO device_ranges VALUES ('acme', '', 1);
"""
DATA[4] = DATA[3]
DATA[5] = DATA[4]


def at_version(path: Path, number: int) -> None:
    """Make a database of an old version, with data."""
    asyncio.run(migrate_sqlite(str(path), StoreSettings(), RELEASED[:number]))
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(DATA[number])


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def everything(path: Path) -> dict[str, str]:
    """The content of a database file and of all files beside it."""
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in path.parent.iterdir()}


def run_sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def step(number: int, *statements: str) -> Migration:
    return Migration(number, f"step_{number}", statements)


def test_every_version_has_its_data() -> None:
    assert set(DATA) == set(range(1, LATEST + 1))


@pytest.mark.parametrize("number", range(1, LATEST + 1))
def test_data_of_every_version_is_there_after_migration(tmp_path: Path, number: int) -> None:
    path = tmp_path / "registry.db"
    at_version(path, number)

    async def look() -> None:
        store = await open_store(url(path))
        try:
            lookups = store.lookups
            tenant = TenantRow("acme", "v-tenant", '{"enabled":true,"alias":"al"}')
            assert await lookups.find_tenant("acme") == tenant
            assert await lookups.find_tenant("al") == tenant
            assert await lookups.find_tenants_by_anchor("cn=ca", "CN=other") == [tenant]
            assert await lookups.find_tenants_by_anchor("other", "CN=ca") == [tenant]
            registration = RegistrationRow("gw", '{"enabled":true,"memberOf":["g"]}')
            assert await lookups.find_registration("acme", "gw") == registration
            assert await lookups.find_group_members("acme", ["g"]) == ["gw"]
            credential = CredentialRow("gw", '{"type":"psk","auth-id":"x"}')
            assert await lookups.find_credential("acme", "psk", "x") == credential
            assert await store.read(lambda tx: tx.count_devices("acme")) == 1
            device = await store.read(lambda tx: tx.find_device("acme", "gw"))
            assert device is not None
            assert (device.version, device.auto_provisioned, device.notification_sent) == ("v-device", True, False)
            assert device.created.isoformat() == "2024-05-02T08:00:00+00:00"
            assert device.updated is not None
            identity = await store.read(lambda tx: tx.find_identity("adapter"))
            assert identity is not None
            assert identity.authorities == {"r:*": "W"}
            assert await lookups.has_operators() == (number >= 2)
            operator = OperatorRow("$2a$10$y", may_reveal_secrets=True) if number >= 2 else None
            assert await lookups.find_operator("alice") == operator
            for query in (Query(), Query(filters=(Filter(pointer=("memberOf",), value="g"),))):
                assert await find_devices(store, "acme", query) == (1, ["gw"])
            alias = Query(filters=(Filter(pointer=("alias",), value="a*"),))
            tenants = await store.search(lambda searches: searches.find_tenants(alias))
            assert [tenant.tenant_id for tenant in tenants.results] == ["acme"]
        finally:
            await store.close()

    asyncio.run(look())
    assert query(path, "SELECT version FROM schema_version") == [(n,) for n in range(1, LATEST + 1)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "PRAGMA foreign_key_check") == []


def test_an_empty_database_gets_the_whole_schema_once(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    assert asyncio.run(migrate(url(path))) == (0, LATEST)
    before = query(path, "SELECT name, sql FROM sqlite_master")
    assert asyncio.run(migrate(url(path))) == (LATEST, LATEST)
    assert query(path, "SELECT name, sql FROM sqlite_master") == before
    assert query(path, "PRAGMA application_id") == [(int.from_bytes(b"KAMA", "big"),)]
    assert query(path, "PRAGMA journal_mode") == [("wal",)]


def test_an_empty_file_is_an_empty_database(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.touch()
    assert asyncio.run(migrate(url(path))) == (0, LATEST)


def test_later_steps_are_applied_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    at_version(path, LATEST)
    later = (
        *RELEASED,
        step(LATEST + 1, "ALTER TABLE tenants ADD COLUMN colour TEXT", "UPDATE tenants SET colour = 'red'"),
        step(LATEST + 2, "CREATE TABLE colours AS SELECT tenant_id, colour FROM tenants"),
    )
    assert asyncio.run(migrate_sqlite(str(path), StoreSettings(), later)) == (LATEST, LATEST + 2)
    assert query(path, "SELECT tenant_id, colour FROM colours") == [("acme", "red")]


def test_a_step_that_fails_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    at_version(path, LATEST)
    schema = query(path, "SELECT name, sql FROM sqlite_master")
    good = step(LATEST + 1, "CREATE TABLE good (a INTEGER)")
    bad = step(LATEST + 2, "CREATE TABLE bad (a INTEGER)", "DELETE FROM devices_misspelt")
    with pytest.raises(Unavailable) as raised:
        asyncio.run(migrate_sqlite(str(path), StoreSettings(), (*RELEASED, good, bad)))
    assert str(path) in str(raised.value)
    assert [name for name, _ in query(path, "SELECT name, sql FROM sqlite_master")] == [
        *(name for name, _ in schema),
        "good",
    ]
    assert query(path, "SELECT max(version) FROM schema_version") == [(LATEST + 1,)]
    mended = step(LATEST + 2, "CREATE TABLE bad (a INTEGER)")
    assert asyncio.run(migrate_sqlite(str(path), StoreSettings(), (*RELEASED, good, mended))) == (
        LATEST + 1,
        LATEST + 2,
    )


def test_many_may_migrate_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "registry.db"
    steps: Sequence[Migration] = (*RELEASED, *(step(LATEST + n, f"CREATE TABLE t{n} (a INTEGER)") for n in range(1, 6)))

    async def at_once() -> None:
        outcomes = await asyncio.gather(*(migrate_sqlite(str(path), StoreSettings(), tuple(steps)) for _ in range(8)))
        assert all(after == LATEST + 5 for _, after in outcomes)

    asyncio.run(at_once())
    assert query(path, "SELECT version FROM schema_version") == [(n,) for n in range(1, LATEST + 6)]


def test_a_newer_schema_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    at_version(path, LATEST)
    run_sql(path, f"INSERT INTO schema_version (version, name, applied) VALUES ({LATEST + 1}, 'later', 'now')")
    before = everything(path)
    for call in (lambda: open_store(url(path)), lambda: migrate(url(path))):
        with pytest.raises(NewerSchema, match=f"schema {LATEST + 1}, made by a later version") as raised:
            asyncio.run(call())
        assert str(path) in str(raised.value)
        assert everything(path) == before


def test_a_newer_schema_that_works_with_this_version_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    known = load_migrations("sqlite")

    def later(number: int, works_with: int | None) -> Migration:
        return Migration(number, f"step_{number}", (f"CREATE TABLE later_{number} (x INTEGER)",), None, works_with)

    async def use(*more: Migration) -> None:
        store = await open_sqlite(str(path), StoreSettings(), (*known, *more))
        try:
            await store.write(lambda tx: tx.has_tenants())
        finally:
            await store.close()

    asyncio.run(use(later(LATEST + 1, LATEST), later(LATEST + 2, LATEST)))
    asyncio.run(use())
    assert asyncio.run(migrate(url(path))) == (LATEST + 2, LATEST + 2)
    assert query(path, "SELECT max(version) FROM schema_version") == [(LATEST + 2,)]
    # One step that does not is enough.
    asyncio.run(use(later(LATEST + 1, LATEST), later(LATEST + 2, LATEST), later(LATEST + 3, None)))
    with pytest.raises(NewerSchema):
        asyncio.run(use())


async def find_devices(store: Store, tenant_id: str, query: Query) -> tuple[int, list[str]]:
    found = await store.search(lambda searches: searches.find_devices(tenant_id, query))
    return found.total, [device.device_id for device in found.results]


async def delete_devices(store: Store, tenant_id: str) -> int:
    return (await store.write(lambda tx: tx.delete_devices(tenant_id, "", 100, instant_of(1)))).number


def test_what_was_there_before_the_tables_of_searches_is_entered_into_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_SLICE", 3)
    path = tmp_path / "registry.db"
    asyncio.run(migrate_sqlite(str(path), StoreSettings(), RELEASED[:2]))
    sizes = {"a": 1, "b": 7, "c": 2, "d": 6}
    for tenant, size in sizes.items():
        run_sql(
            path,
            f"INSERT INTO tenants VALUES ('{tenant}', 'v', 1, NULL, '{{\"enabled\":true}}')",
            f"INSERT INTO tenant_usage VALUES ('{tenant}', {size})",
            *(
                f"INSERT INTO devices VALUES ('{tenant}', 'd{n}', 'v', 1, NULL, 0, 0, '{{\"ext\":{{\"n\":{n}}}}}')"
                for n in range(size)
            ),
        )

    async def look() -> None:
        store = await open_store(url(path))
        try:
            for tenant, size in sizes.items():
                for offset in range(size + 1):
                    page = Query(page_size=2, page_offset=offset)
                    wanted = [f"d{n}" for n in range(size)][offset : offset + 2]
                    assert await find_devices(store, tenant, page) == (size, wanted)
                one = Query(filters=(Filter(pointer=("ext", "n"), value=size - 1),))
                assert await find_devices(store, tenant, one) == (1, [f"d{size - 1}"])
                assert await delete_devices(store, tenant) == size
        finally:
            await store.close()

    asyncio.run(look())
    assert query(path, "SELECT * FROM device_members") == []
    assert query(path, "SELECT sum(devices) FROM device_ranges") == [(0,)]


@pytest.mark.parametrize("table", ["notes", "tenants", "schema_version"])
def test_the_database_of_another_program_is_refused_and_left_untouched(tmp_path: Path, table: str) -> None:
    path = tmp_path / "other.db"
    run_sql(path, f"CREATE TABLE {table} (version INTEGER)", f"INSERT INTO {table} VALUES (1)")
    before = everything(path)
    with pytest.raises(StorageError, match="another program"):
        asyncio.run(open_store(url(path)))
    assert everything(path) == before


def test_without_auto_migrate_nothing_is_made(tmp_path: Path) -> None:
    settings = StoreSettings(auto_migrate=False)
    absent = tmp_path / "absent" / "registry.db"
    with pytest.raises(OlderSchema, match="does not exist; create it by kamado migrate, or by kamado serve"):
        asyncio.run(open_store(url(absent), settings))
    assert not absent.parent.exists()
    empty = tmp_path / "registry.db"
    empty.touch()
    with pytest.raises(OlderSchema, match=r"has no tables yet; make them by kamado migrate, or by kamado serve"):
        asyncio.run(open_store(url(empty), settings))
    assert empty.read_bytes() == b""


def test_without_auto_migrate_an_old_schema_is_refused_and_the_latest_opened(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    at_version(path, LATEST)
    before = everything(path)
    later = (*RELEASED, step(LATEST + 1, "CREATE TABLE t (a INTEGER)"))
    settings = StoreSettings(auto_migrate=False)
    with pytest.raises(OlderSchema, match=f"schema {LATEST} and .* needs {LATEST + 1}"):
        asyncio.run(open_sqlite(str(path), settings, later))
    assert everything(path) == before

    async def open_and_close() -> None:
        store = await open_store(url(path), settings)
        await store.close()

    asyncio.run(open_and_close())


def test_files_of_a_dialect_take_the_place_of_the_common_ones(tmp_path: Path) -> None:
    (tmp_path / "0001_initial.sql").write_text("-- A comment; with a semicolon\nCREATE TABLE a (x, -- why\n y);\n\n")
    (tmp_path / "0002_more.sql").write_text("SELECT 'common; text';\nSELECT 2\n;\n")
    (tmp_path / "0002_more.postgresql.sql").write_text("SELECT 'special'")
    (tmp_path / "README").write_text("no migration")
    common = Migration(2, "more", ("SELECT 'common; text'", "SELECT 2"))
    special = Migration(2, "more", ("SELECT 'special'",))
    first = Migration(1, "initial", ("CREATE TABLE a (x, -- why\n y)",))
    assert load_migrations("sqlite", tmp_path) == (first, common)
    assert load_migrations("postgresql", tmp_path) == (first, special)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mysql://db/registry", "'mysql'.*sqlite"),
        ("memory://", "'memory'.*sqlite"),
        ("/var/lib/registry.db", "without a scheme.*sqlite"),
        ("sqlite:/registry.db", "without a scheme.*sqlite"),
        ("", "without a scheme"),
        ("sqlite://", "absolute/path"),
        ("sqlite:///", "absolute/path"),
        ("sqlite://host/registry.db", "absolute/path"),
        ("sqlite:///registry.db?mode=ro", "no options"),
        ("sqlite:///registry.db#x", "no options"),
        ("sqlite:///a\0b", "NUL"),
    ],
)
def test_urls_that_name_no_database(text: str, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        asyncio.run(open_store(text))
    with pytest.raises(StorageError, match=says):
        asyncio.run(migrate(text))


def test_paths_may_be_relative_and_odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert asyncio.run(migrate("sqlite:///100% größe & ünter/a b.db")) == (0, LATEST)
    assert (tmp_path / "100% größe & ünter" / "a b.db").is_file()


def test_files_and_directories_are_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "registry.db"

    async def look() -> None:
        store = await open_store(url(path))
        try:
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
            assert modes == dict.fromkeys(("registry.db", "registry.db-wal", "registry.db-shm"), 0o600)
            assert path.parent.stat().st_mode & 0o777 == 0o700
            assert path.parent.parent.stat().st_mode & 0o777 == 0o700
        finally:
            await store.close()

    asyncio.run(look())
    assert [file.name for file in path.parent.iterdir()] == ["registry.db"], "the log is folded in at the end"
