"""`docs/postgresql.md` and `docs/sharding.md`: their SQL is run as it stands there, what they say of it is tried."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from tests.databases import query
from tests.integration.pages import PROJECT, read_steps
from tests.integration.registry import Registry, kamado
from tests.postgresql import PostgresqlServer

PAGE = PROJECT / "docs" / "postgresql.md"
SHARDING = PROJECT / "docs" / "sharding.md"
TENANT = "DEFAULT_TENANT"
DEVICE = {"ext": {"serial": "4711"}, "memberOf": ["presses"]}
CREDENTIALS = [{"type": "hashed-password", "auth-id": "sensor-1", "secrets": [{"pwd-plain": "a-first-secret"}]}]
TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"


def sql_of(page: Path, section: str) -> list[str]:
    """Return the SQL of a section of a page."""
    text = page.read_text()
    start = text.index(f"\n## {section}\n")
    return re.findall(r"^```sql\n(.*?)^```$", text[start : text.find("\n## ", start + 1)], re.MULTILINE | re.DOTALL)


def table_of(page: Path, section: str) -> dict[str, list[str]]:
    """Return the rows of a table whose first column is code."""
    text = page.read_text()
    start = text.index(f"\n## {section}\n")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text[start : text.find("\n## ", start + 1)], re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


@dataclass(frozen=True)
class Prepared:
    """A server on which the page was followed, up to the first instance."""

    server: PostgresqlServer
    registry: Registry

    def url(self, role: str) -> str:
        parts = urlsplit(self.server.url("kamado"))
        return urlunsplit(parts._replace(netloc=f"{role}:{parts.password}@127.0.0.1:{self.server.port}"))


def fill(registry: Registry) -> None:
    registry.create_tenant(TENANT, {"alias": "default"})
    registry.create_device(TENANT, "sensor-1", DEVICE)
    registry.set_credentials(TENANT, "sensor-1", CREDENTIALS)


@pytest.fixture(scope="module", params=[16, 18])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    roles, report = sql_of(PAGE, "Setting up")
    with PostgresqlServer(version=request.param) as server:
        server.run_sql(roles)
        server.run_sql(report.partition(";")[0])
        password = urlsplit(server.url("kamado")).password
        for role in ("owner", "serve", "read", "report"):
            server.run_sql(f"ALTER ROLE kamado_{role} PASSWORD '{password}'")
        made = Prepared(server, Registry(tmp_path_factory.mktemp("page"), {"storage.auto_migrate": "false"}))
        made.registry.settings["storage.url"] = made.url("kamado_serve")
        made.registry.settings["auth.first_login_dir"] = str(made.registry.data_dir)
        early = made.registry.run("serve", expect_status=69)
        assert "by kamado migrate" in early.stdout
        kamado("migrate", "--set", f"storage.url={made.url('kamado_owner')}")
        server.run_sql(report.partition(";")[2], "kamado")
        with made.registry:
            fill(made.registry)
            yield made


def refused(url: str, sql: str) -> bool:
    try:
        query(url, sql)
    except asyncpg.InsufficientPrivilegeError:
        return True
    return False


def test_the_read_write_role_serves(prepared: Prepared) -> None:
    registry = prepared.registry
    assert registry.username == "adapter"
    assert registry.request("PUT", f"/v1/devices/{TENANT}/sensor-1", DEVICE | {"enabled": False}).status == 204
    assert registry.request("GET", f"/v1/tenants/{TENANT}").status == 200
    assert registry.request("POST", f"/v1/devices/{TENANT}/gone").status == 201
    assert registry.request("DELETE", f"/v1/devices/{TENANT}/gone").status == 204
    assert registry.run("identity", "add", "second").returncode == 0


def test_the_read_write_role_may_ask_for_the_outcome_of_a_commit(prepared: Prepared) -> None:
    sql = "SELECT txid_status(txid_current()), pg_walfile_name(pg_current_wal_lsn()), pg_advisory_xact_lock(1)"
    assert query(prepared.url("kamado_serve"), sql)[0][0] == "in progress"


def test_the_read_write_role_changes_no_table(prepared: Prepared) -> None:
    url = prepared.url("kamado_serve")
    for (table,) in query(url, TABLES):
        assert refused(url, f"DROP TABLE {table}"), table
        assert refused(url, f"TRUNCATE {table}"), table
        assert refused(url, f"ALTER TABLE {table} ADD COLUMN more int"), table
    assert refused(url, "CREATE TABLE more (id int)")


def test_the_read_only_role_reads_all_and_writes_nothing(prepared: Prepared) -> None:
    url = prepared.url("kamado_read")
    for (table,) in query(url, TABLES):
        query(url, f"SELECT * FROM {table}")
        assert refused(url, f"DELETE FROM {table}"), table
        assert refused(url, f"DROP TABLE {table}"), table
    assert refused(url, "CREATE TABLE more (id int)")


def test_the_role_for_reports_sees_no_secrets(prepared: Prepared) -> None:
    url = prepared.url("kamado_report")
    assert query(url, "SELECT device_id FROM devices") == [("sensor-1",)]
    for table in ("credentials", "identities", "operators"):
        assert refused(url, f"SELECT * FROM {table}"), table


def test_rights_follow_what_a_later_migration_adds(prepared: Prepared) -> None:
    query(prepared.url("kamado_owner"), "CREATE TABLE later (id int)")
    try:
        query(prepared.url("kamado_serve"), "INSERT INTO later VALUES (1)")
        assert query(prepared.url("kamado_read"), "SELECT id FROM later") == [(1,)]
    finally:
        query(prepared.url("kamado_owner"), "DROP TABLE later")


def test_what_is_in_the_database_can_be_looked_at(prepared: Prepared) -> None:
    (looks,) = sql_of(PAGE, "What is in the database")
    devices, tenants, members = looks.strip().split(";\n")
    url = prepared.url("kamado_read")
    assert query(url, devices)[0][:2] == ("sensor-1", '{"serial": "4711"}')
    assert query(url, tenants) == [(TENANT, 1)]
    assert ("/ext/serial", 1) in query(url, members)


def test_statements_for_watching_run(prepared: Prepared) -> None:
    (watched,) = sql_of(PAGE, "Watching it")
    shown = prepared.server.run_sql(watched, "kamado")
    assert "kamado_serve|idle" in shown
    assert re.search(r"^schema_version\|[0-9]+\|", shown, re.MULTILINE)
    assert re.search(r"^\w+\|32 kB$", shown, re.MULTILINE)


def test_a_dump_by_the_read_only_role_is_restored(prepared: Prepared, tmp_path: Path) -> None:
    """The commands of the page, with this server's addresses; rights and owner come with the dump."""
    query(prepared.url("kamado_serve"), "INSERT INTO device_connections (tenant_id, device_id) VALUES ('t', 'd')")
    section = PAGE.read_text().partition("\n## Backup\n")[2]
    backup, restore = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[:2]
    run_shell(prepared.server, (backup + restore).replace("db.example", "127.0.0.1"), tmp_path)
    restored = {
        role: prepared.url(role).removesuffix("kamado") + "kamado_2" for role in ("kamado_read", "kamado_serve")
    }
    assert query(restored["kamado_read"], "SELECT device_id FROM credentials") == [("sensor-1",)]
    assert query(restored["kamado_read"], "SELECT count(*) FROM device_connections") == [(0,)]
    assert refused(restored["kamado_serve"], "DROP TABLE devices")
    assert refused(restored["kamado_read"], "DELETE FROM devices")
    query(restored["kamado_serve"], "DELETE FROM credentials")


def run_shell(server: PostgresqlServer, script: str, directory: Path, **variables: str) -> None:
    """Run commands of a page with the programs of a server."""
    password = urlsplit(server.url("postgres")).password
    assert password is not None
    result = subprocess.run(
        ["/bin/sh", "-ec", script],
        cwd=directory,
        env=os.environ
        | {"PATH": f"{server.programs}:{os.environ['PATH']}", "PGPORT": str(server.port), "PGPASSWORD": password}
        | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# Both pages name every table


def test_every_table_is_on_the_pages(prepared: Prepared) -> None:
    tables = {name for (name,) in query(prepared.url("kamado_read"), TABLES)}
    described = table_of(PAGE, "What is in the database")
    assert set(described) == tables
    unlogged = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relpersistence = 'u'"
    assert {name for name, (text,) in described.items() if "UNLOGGED" in text} == {
        name for (name,) in query(prepared.url("kamado_read"), unlogged)
    }
    assert set(table_of(SHARDING, "The distribution column")) == tables


def test_distributed_tables_can_be_distributed(prepared: Prepared) -> None:
    """Each key begins with the distribution column or at least has it; foreign keys lead where Citus lets them lead."""
    columns = {name: row[0].strip("`") for name, row in table_of(SHARDING, "The distribution column").items()}
    assert set(columns.values()) == {"tenant_id", "reference", "local"}
    keys = query(
        prepared.url("kamado_read"),
        """
        SELECT c.conrelid::regclass::text, c.contype::text, c.confrelid::regclass::text,
          array_agg(a.attname ORDER BY k.n)
        FROM pg_constraint c, unnest(c.conkey) WITH ORDINALITY AS k (number, n), pg_attribute a
        WHERE a.attrelid = c.conrelid AND a.attnum = k.number AND c.contype IN ('p', 'u', 'f')
          AND c.connamespace = 'public'::regnamespace
        GROUP BY c.oid, 1, 2, 3""",
    )
    assert {table for table, kind, *_ in keys if kind == "p"} == set(columns)
    for table, kind, other, names in keys:
        if columns[table] == "tenant_id":
            assert names[0] == "tenant_id", (table, names)
            assert kind != "f" or columns[other] == "tenant_id", (table, other)
        elif kind == "f":
            assert columns[table] == columns[other] == "reference", (table, other)


# Sharding


def new_registry(directory: Path, url: str) -> Registry:
    return Registry(directory, {"auth.first_login_dir": str(directory)}, url=url)


def test_partitioned_tables_serve(postgresql: PostgresqlServer, tmp_path: Path) -> None:
    url = postgresql.create_database()
    registry = new_registry(tmp_path, url)
    with registry:
        fill(registry)
    (partition,) = sql_of(SHARDING, "Partitions")
    definitions = (
        "SELECT conrelid::regclass::text, conname::text, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE contype IN ('p', 'f') AND conparentid = 0 AND connamespace = 'public'::regnamespace ORDER BY 1, 2"
    )
    before = query(url, definitions)
    indexes = "SELECT tablename::text, indexname::text FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2"
    old_indexes = query(url, indexes)
    postgresql.run_sql(f"SET ROLE kamado; {partition}", urlsplit(url).path[1:])
    columns = table_of(SHARDING, "The distribution column")
    partitioned = {name for (name,) in query(url, "SELECT partrelid::regclass::text FROM pg_partitioned_table")}
    assert partitioned == {name for name, row in columns.items() if row[1] == "`tenant_id`"}
    assert query(url, definitions) == before
    assert set(old_indexes) <= set(query(url, indexes))
    unlogged = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relpersistence = 'u'"
    assert query(url, unlogged) == [(32,)]

    with registry:
        assert registry.request("GET", f"/v1/devices/{TENANT}/sensor-1").object["ext"] == DEVICE["ext"]
        tenants = [registry.create_tenant() for _ in range(20)]
        for tenant in tenants:
            registry.create_device(tenant, "sensor-1", DEVICE)
            registry.set_credentials(tenant, "sensor-1", CREDENTIALS)
            found = registry.request(
                "GET", f"/v1/devices/{tenant}?filterJson=%7B%22field%22:%22/ext/serial%22,%22value%22:%224711%22%7D"
            )
            assert found.object["total"] == 1
        assert registry.request("POST", f"/v1/devices/{TENANT}/sensor-1").status == 409
        assert registry.request("DELETE", f"/v1/devices/{TENANT}").status == 204
    assert query(url, "SELECT count(*), count(DISTINCT tableoid) > 1 FROM devices") == [(20, True)]


def test_a_tenant_moves_to_another_registry(postgresql: PostgresqlServer, tmp_path: Path) -> None:
    first, second = postgresql.create_database(), postgresql.create_database()
    with new_registry(tmp_path / "first", first) as registry:
        fill(registry)
        registry.create_device(registry.create_tenant(), "stays")
        shown = registry.request("GET", f"/v1/credentials/{TENANT}/sensor-1")
    registry = new_registry(tmp_path / "second", second)
    with registry:
        registry.create_tenant("other", {"alias": "another"})
    (step,) = read_steps(SHARDING)
    run_shell(postgresql, step.commands, tmp_path, FROM=first, TO=second, TENANT=TENANT)
    hashes = "SELECT document FROM credentials"
    assert query(first, hashes) == query(second, hashes)
    with registry:
        moved = registry.request("GET", f"/v1/credentials/{TENANT}/sensor-1")
        assert (moved.etag, moved.array) == (shown.etag, shown.array)
        assert registry.request("GET", f"/v1/devices/{TENANT}").object["total"] == 1
        registry.create_device(TENANT, "sensor-2", DEVICE)
        assert registry.request("GET", f"/v1/devices/{TENANT}").object["total"] == 2
    assert query(second, "SELECT tenant_id FROM tenants ORDER BY 1") == [(TENANT,), ("other",)]
