"""The file of device connections when things go wrong: it may be lost, and nothing else may be."""

import asyncio
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.integration.sqlite_process import NOBODY, TENANT

from kamado.connections import Connections, ConnectionTransaction, DeviceConnection
from kamado.errors import Unavailable
from kamado.storage import StoreSettings, open_connections
from kamado.storage.connections import SqlConnectionTransaction
from kamado.storage.sqlite import SqliteEngine
from kamado.storage.volatile import SqliteConnections, connections_path

PROGRAM = Path(__file__).with_name("sqlite_process.py")
NOW = datetime(2026, 1, 31, 8, 15, 30, tzinfo=UTC)
DEADLINE = 60.0

Test = Callable[[SqliteConnections], Coroutine[object, object, None]]


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kamado.storage.volatile._LOOK_INTERVAL", 0.02)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def path(database: Path) -> Path:
    return database.with_name("registry.connections.db")


@contextmanager
def process(task: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, PROGRAM, task, path], stdout=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


async def open_them(database: Path) -> SqliteConnections:
    connections = await open_connections(f"sqlite:///{database}")
    assert isinstance(connections, SqliteConnections)
    return connections


def with_connections(database: Path, test: Test) -> None:
    async def opened() -> None:
        connections = await open_them(database)
        try:
            await test(connections)
        finally:
            await connections.close()

    asyncio.run(opened())


async def put(connections: Connections, device_id: str = "d") -> None:
    async def work(transaction: ConnectionTransaction) -> None:
        if not await transaction.update_gateway("t", device_id, "gw", NOW):
            await transaction.insert_connection("t", device_id, DeviceConnection("gw", NOW))

    await connections.write(work)


async def fill(connections: Connections, number: int = 500) -> None:
    await asyncio.gather(*(put(connections, f"device-{index:05}") for index in range(number)))


async def has(connections: Connections, device_id: str = "d") -> bool:
    return await connections.find_connection("t", device_id) is not None


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what comes about by itself; failures meanwhile are `Unavailable` and nothing else."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                if await check():
                    return
            except Unavailable:
                pass
            await asyncio.sleep(0.02)


async def works(connections: Connections) -> bool:
    await put(connections, "works")
    return await has(connections, "works")


def aside(path: Path) -> Path:
    return Path(f"{path}.damaged")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


SET_ASIDE = "device connections are lost, their file was set aside: adapters will tell them again"


def test_the_file_lies_beside_the_database_under_every_name_of_it(tmp_path: Path) -> None:
    assert connections_path(str(tmp_path / "kamado.db")) == str(tmp_path / "kamado.connections.db")
    assert connections_path(str(tmp_path / "registry")) == str(tmp_path / "registry.connections")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.db"
    link.symlink_to(tmp_path / "kamado.db")
    assert connections_path(str(link)) == str(tmp_path / "kamado.connections.db")


def test_no_write_waits_for_the_disk(database: Path) -> None:
    """Nor does a commit force anything on it: what wears it out is what the system writes in its own time."""

    async def test(connections: SqliteConnections) -> None:
        async def synchronous(transaction: ConnectionTransaction) -> object:
            assert isinstance(transaction, SqlConnectionTransaction)
            return await transaction._one("PRAGMA synchronous")

        assert await connections.write(synchronous) == (0,)

    with_connections(database, test)


def test_updates_that_wait_together_share_a_commit(database: Path) -> None:
    groups: list[int] = []

    async def test() -> None:
        def observe(committed: int, refused: int, failed: int, seconds: float) -> None:
            groups.append(committed + refused + failed)

        connections = await open_connections(f"sqlite:///{database}", StoreSettings(observe=observe))
        await fill(connections)
        await connections.close()

    asyncio.run(test())
    assert sum(groups) == 500
    assert len(groups) < 100


# A file that cannot be used


def spoil(path: Path) -> None:
    path.write_bytes(b"This is a diary.\n" * 1000)


def damage(path: Path, first: int = 4096) -> None:
    """Overwrite all pages but the first, which alone is looked at when a file is opened."""
    content = bytearray(path.read_bytes())
    assert len(content) > first + 4096
    content[first:] = b"\xff" * (len(content) - first)
    path.write_bytes(content)


def swap_rows(path: Path) -> None:
    """Put a leaf in the place of another: each page is sound, as when some of them came to the disk and others not."""
    content = bytearray(path.read_bytes())
    leaves = [at for at in range(4096, len(content), 4096) if content[at] == 0x0A]
    one, two = leaves[-1], leaves[-2]
    content[one : one + 4096], content[two : two + 4096] = content[two : two + 4096], content[one : one + 4096]
    path.write_bytes(content)


def make_newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO schema_version (version, name, applied) VALUES (9999, 'later', '2030-01-01')")


def make_foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE tenants (a)")
        connection.execute("CREATE TABLE schema_version (version)")


@pytest.mark.parametrize("harm", [spoil, damage, swap_rows, make_newer, make_foreign])
def test_a_file_that_cannot_be_used_is_set_aside(
    database: Path, path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    async def look(connections: SqliteConnections) -> None:
        assert not await has(connections, "device-00001")
        assert await works(connections)

    with_connections(database, fill)
    harm(path)
    harmed = path.read_bytes()
    with_connections(database, look)
    assert warnings(caplog) == [SET_ASIDE]
    assert aside(path).read_bytes() == harmed
    with_connections(database, works)  # type: ignore[arg-type]
    assert warnings(caplog) == [SET_ASIDE]


def test_an_empty_file_is_used(database: Path, path: Path) -> None:
    path.touch(0o600)
    with_connections(database, works)  # type: ignore[arg-type]
    assert not aside(path).exists()


def test_the_log_of_a_file_that_was_removed_does_no_harm(database: Path, path: Path) -> None:
    """Whoever deletes the file leaves the other two behind, perhaps."""

    async def look(connections: SqliteConnections) -> None:
        assert not await has(connections, "device-00001")
        assert await works(connections)

    async def copy_log(connections: SqliteConnections) -> None:
        await fill(connections)
        shutil.copy(f"{path}-wal", kept)

    kept = path.with_name("kept")
    with_connections(database, copy_log)
    path.unlink()
    kept.replace(f"{path}-wal")
    with_connections(database, look)


# A file that is harmed while it is open


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()


def remove_alone(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE diary (a)")
    other.replace(path)


@pytest.mark.parametrize("harm", [damage, empty, remove, remove_alone, replace])
def test_a_file_that_is_harmed_under_way_is_made_anew(database: Path, path: Path, harm: Callable[[Path], None]) -> None:
    async def test(connections: SqliteConnections) -> None:
        await fill(connections)
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        harm(path)

        async def check() -> bool:
            return not await has(connections, "device-00300") and await works(connections)

        await eventually(check)
        await fill(connections)

    with_connections(database, test)
    with_connections(database, lambda connections: eventually(lambda: has(connections, "device-00300")))


def test_processes_meet_again_on_the_new_file(database: Path, path: Path) -> None:
    async def test(one: SqliteConnections) -> None:
        two = await open_them(database)
        try:
            await fill(one)
            with closing(sqlite3.connect(path)) as other:
                other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            damage(path)

            async def meet() -> bool:
                await put(one, "of-one")
                await put(two, "of-two")
                return await has(one, "of-two") and await has(two, "of-one") and not await has(two, "device-00001")

            await eventually(meet)
        finally:
            await two.close()
        assert await has(one, "of-two")

    with_connections(database, test)
    with_connections(database, lambda connections: eventually(lambda: has(connections, "of-two")))


def test_a_writer_that_fails_is_replaced(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("injected")

    async def test(connections: SqliteConnections) -> None:
        await put(connections)
        monkeypatch.setattr(connections._engine, "_check_file", fail)
        with pytest.raises(Unavailable, match="cannot be written any more"):
            await put(connections)
        monkeypatch.undo()
        await eventually(lambda: works(connections))
        assert await has(connections)

    with_connections(database, test)
    # The watch over the file may have come across what was injected, too.
    failures = [record for record in caplog.records if record.exc_info and record.name != "kamado.storage.volatile"]
    assert [record.levelname for record in failures] == ["CRITICAL"]


def test_what_nobody_foresaw_does_not_end_the_watch(
    database: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, though it happens each time that the file is looked at."""
    opened, failures = SqliteEngine.open, 3

    async def fail(engine: SqliteEngine[Any]) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError("injected")
        await opened(engine)

    async def test(connections: SqliteConnections) -> None:
        await put(connections)
        monkeypatch.setattr(SqliteEngine, "open", fail)
        remove(path)
        await eventually(lambda: works(connections))

    with_connections(database, test)
    assert failures == 0
    (event,) = [record for record in caplog.records if record.exc_info]
    assert (event.message, vars(event)["error"]) == ("device connections cannot be kept", "RuntimeError: injected")


def test_killed_writers_lose_nothing_and_damage_nothing(
    database: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not on disk is in the system's cache, which outlives the process."""

    async def look(connections: SqliteConnections) -> None:
        missing = [each for each in told if await connections.find_connection(TENANT, each) is None]
        assert not missing
        counted = await connections.write(lambda transaction: transaction.count_connections(TENANT))
        assert counted >= len(told)

    told: set[str] = set()
    choice = random.Random(20260131)
    for _ in range(4):
        with process("connect_for_ever", database) as one, process("connect_for_ever", database) as two:
            for running in (one, two):
                assert running.stdout is not None
                told |= {running.stdout.readline().decode().strip() for _ in range(choice.randrange(1, 400))}
            for running in (one, two):
                running.kill()
            for running in (one, two):
                assert running.stdout is not None
                # The very last line may be torn.
                told |= {line.decode() for line in running.stdout.read().split(b"\n")[:-1]}
        with_connections(database, look)
    assert warnings(caplog) == []
    assert not aside(path).exists()


# A place where nothing can be written


def test_a_full_disk_refuses_what_is_new_and_keeps_what_is_there(database: Path) -> None:
    async def limit(transaction: ConnectionTransaction, pages: int) -> None:
        assert isinstance(transaction, SqlConnectionTransaction)
        await transaction._one(f"PRAGMA max_page_count = {pages}")

    async def test(connections: SqliteConnections) -> None:
        await put(connections)
        await connections.write(lambda transaction: limit(transaction, 20))
        with pytest.raises(Unavailable, match="full"):
            await fill(connections, 3000)
        assert await has(connections)
        await connections.write(lambda transaction: limit(transaction, 100_000))
        await fill(connections, 3000)
        assert await has(connections, "device-02999")
        assert await has(connections)

    with_connections(database, test)


def test_files_that_cannot_grow_refuse_writes_and_go_on_afterwards(database: Path) -> None:
    with process("connect_without_space", database) as running:
        output, _ = running.communicate(timeout=120)
    result = json.loads(output)
    assert result["errors"] == ["the database cannot be read or written: input/output error"]
    assert result["readable"]
    assert result["afterwards"]


@pytest.mark.parametrize("mode", [0o500, 0o000], ids=["read only", "no right to the directory"])
def test_a_directory_without_rights_is_told_and_nothing_else(mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        directory = Path(name) / "data"
        directory.mkdir()
        if os.getuid() == 0:
            os.chown(directory, NOBODY, NOBODY)
        directory.chmod(mode)
        try:
            with process("connect_without_rights", directory / "registry.db") as running:
                output, _ = running.communicate(timeout=120)
        finally:
            directory.chmod(0o755)
        assert running.returncode == 0
        assert output.decode() == "Unavailable: device connections cannot be kept now\n"


def test_what_is_in_the_way_is_logged_once_and_then_gone(
    database: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(connections: SqliteConnections) -> None:
        tried = asyncio.Event()
        try_to_open = connections._open

        async def try_again() -> None:
            await try_to_open()
            tried.set()

        monkeypatch.setattr(connections, "_open", try_again)
        for use in (put, has):
            with pytest.raises(Unavailable, match="cannot be kept now"):
                await use(connections)
        with connections.batch(), pytest.raises(Unavailable):
            await has(connections)
        async with asyncio.timeout(DEADLINE):
            for _ in range(3):
                tried.clear()
                await tried.wait()
        assert [record.message for record in caplog.records] == ["device connections cannot be kept"]
        os.rmdir(path)
        await eventually(lambda: works(connections))

    path.mkdir()
    with_connections(database, test)
