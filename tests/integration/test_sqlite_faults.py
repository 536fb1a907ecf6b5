"""SQLite when things go wrong: killed processes, full disks, locked, damaged, removed and forbidden files."""

import asyncio
import json
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.contract.records import CREATED, credential, stored_credentials, stored_device
from tests.integration.sqlite_process import NOBODY, TENANT, create_device, ensure_tenant

from kamado.errors import NotFound, RegistryError, Unavailable
from kamado.storage import StorageError, StoreSettings, open_store
from kamado.storage.sql import SqlTransaction
from kamado.storage.sqlite import SqliteStore, open_sqlite
from kamado.store import DamagedRow, Identity, Transaction, Work

PROGRAM = Path(__file__).with_name("sqlite_process.py")
DEADLINE = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@contextmanager
def process(task: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, PROGRAM, task, path], stdout=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def with_store(
    path: Path, test: Callable[[SqliteStore], Coroutine[object, object, None]], settings: StoreSettings | None = None
) -> None:
    """Run a coroutine function of an open store that has the tenant."""

    async def opened() -> None:
        store = await open_sqlite(str(path), settings or StoreSettings())
        try:
            await ensure_tenant(store)
            await test(store)
        finally:
            await store.close()

    asyncio.run(opened())


def check(path: Path, acknowledged: set[str]) -> None:
    """Open the database, as the next start would, and prove that it is whole and has all that was acknowledged."""

    async def look() -> None:
        store = await open_store(f"sqlite:///{path}")
        try:
            for device_id in acknowledged:
                assert await store.lookups.find_registration(TENANT, device_id) is not None, device_id
                assert await store.read(lambda tx, d=device_id: tx.find_credentials(TENANT, d)) is not None  # type: ignore[misc]
            counted = await store.read(lambda tx: tx.count_devices(TENANT))
        finally:
            await store.close()
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            assert connection.execute("SELECT count(*) FROM devices").fetchall() == [(counted,)]
            assert connection.execute("SELECT count(*) FROM credential_sets").fetchall() == [(counted,)]

    asyncio.run(look())


# Killed processes


def test_killed_writers_lose_no_acknowledged_write(path: Path) -> None:
    """Two writers on one file, killed at random moments, again and again on what they left."""
    acknowledged: set[str] = set()
    choice = random.Random(20240502)
    for _ in range(10):
        with process("write_for_ever", path) as one, process("write_for_ever", path) as two:
            for running in (one, two):
                assert running.stdout is not None
                for _ in range(choice.randrange(1, 300)):
                    acknowledged.add(running.stdout.readline().decode().strip())
            for running in (one, two):
                running.send_signal(signal.SIGKILL)
            for running in (one, two):
                assert running.stdout is not None
                # What was acknowledged between the last line read and the end; the very last may be torn.
                lines = running.stdout.read().split(b"\n")[:-1]
                acknowledged.update(line.decode() for line in lines)
                assert running.wait() == -signal.SIGKILL
        check(path, acknowledged)
    assert len(acknowledged) > 20


def test_a_process_killed_while_it_opens_leaves_a_database_that_opens(tmp_path: Path) -> None:
    choice = random.Random(20250131)
    with process("write_for_ever", tmp_path / "measure.db") as running:
        assert running.stdout is not None
        began = time.monotonic()
        running.stdout.readline()
        usual = time.monotonic() - began
    for number in range(12):
        path = tmp_path / f"registry-{number}.db"
        with process("write_for_ever", path) as running:
            # The last part of its start, in which it makes file and schema.
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(usual * choice.uniform(0.7, 1.05))
            running.send_signal(signal.SIGKILL)
            assert running.stdout is not None
            acknowledged = {line.decode() for line in running.stdout.read().split(b"\n")[:-1]}
        check(path, acknowledged)


def test_a_process_that_ends_without_closing_loses_nothing(path: Path) -> None:
    with process("write_some", path) as running:
        output, _ = running.communicate(timeout=DEADLINE)
        assert running.returncode == 0
    acknowledged = set(output.decode().split())
    assert len(acknowledged) == 200
    check(path, acknowledged)


def test_processes_that_start_at_once_share_a_new_file(path: Path) -> None:
    with (
        process("write_some", path) as one,
        process("write_some", path) as two,
        process("write_some", path) as three,
    ):
        outputs = [running.communicate(timeout=DEADLINE)[0] for running in (one, two, three)]
        assert [running.returncode for running in (one, two, three)] == [0, 0, 0]
    acknowledged = {line for output in outputs for line in output.decode().split()}
    assert len(acknowledged) == 600
    check(path, acknowledged)


# No space


def test_files_that_cannot_grow_refuse_writes_and_harm_nothing(path: Path) -> None:
    with process("run_out_of_space", path) as running:
        output, _ = running.communicate(timeout=DEADLINE)
        assert running.returncode == 0
    result = json.loads(output)
    assert result["errors"] == ["the database cannot be read or written: input/output error"]
    assert result["readable"]
    assert result["counted"] == len(result["acknowledged"]) - 1
    check(path, set(result["acknowledged"]))


def test_a_full_database_refuses_writes_and_harms_nothing(path: Path) -> None:
    async def limit(tx: Transaction, pages: int) -> None:
        assert isinstance(tx, SqlTransaction)
        await tx._one(f"PRAGMA max_page_count = {pages}")

    async def test(store: SqliteStore) -> None:
        await store.write(lambda tx: limit(tx, 60))
        acknowledged: set[str] = set()
        failures: list[BaseException] = []
        while not failures:
            outcomes = await asyncio.gather(*(create_device(store, 3000) for _ in range(20)), return_exceptions=True)
            acknowledged |= {outcome for outcome in outcomes if isinstance(outcome, str)}
            failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert {(type(failure), str(failure)) for failure in failures} == {
            (Unavailable, "the database cannot grow: the disk is full")
        }
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == len(acknowledged)
        await store.ping()
        with pytest.raises(Unavailable):
            await create_device(store, 300_000)
        await store.write(lambda tx: limit(tx, 100_000))
        acknowledged.add(await create_device(store, 3000))
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == len(acknowledged)

    with_store(path, test)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# Locked by another process


def test_what_becomes_of_writes_is_told(path: Path) -> None:
    """Configuration 4.2, `kamado_db_writes_total`: committed, refused by themselves, lost with their transaction."""
    told: list[tuple[int, int, int]] = []

    async def refuse(tx: Transaction) -> None:
        raise NotFound("no")

    async def test(store: SqliteStore) -> None:
        told.clear()  # what the test's own data took
        await asyncio.gather(create_device(store), create_device(store), store.write(refuse), return_exceptions=True)
        assert [sum(numbers) for numbers in zip(*told, strict=True)] == [2, 1, 0]
        told.clear()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await asyncio.gather(create_device(store), create_device(store), return_exceptions=True)
        assert [sum(numbers) for numbers in zip(*told, strict=True)] == [0, 0, 2]

    def observe(committed: int, refused: int, failed: int, seconds: float) -> None:
        assert seconds > 0
        told.append((committed, refused, failed))

    with_store(path, test, StoreSettings(busy_timeout=0.3, observe=observe))


def test_a_locked_database_refuses_all_that_waits_and_is_still_read(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        device_id = await create_device(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            outcomes = await asyncio.gather(*(create_device(store) for _ in range(20)), return_exceptions=True)
            took = time.monotonic() - began
            assert {(type(outcome), str(outcome)) for outcome in outcomes} == {
                (Unavailable, "the database is busy: another process has been writing for too long")
            }
            assert 0.3 <= took < 20 * 0.3, "those that wait at the same moment wait once"
            assert await store.lookups.find_registration(TENANT, device_id) is not None
            await store.ping()
            other.execute("ROLLBACK")
        await create_device(store)
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == 2

    with_store(path, test, StoreSettings(busy_timeout=0.3))


def test_a_process_that_writes_without_pause_starves_no_other(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        for _ in range(40):
            await create_device(store)

    with process("write_without_pause", path) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        with_store(path, test, StoreSettings(busy_timeout=20.0))
        assert running.poll() is None


def test_a_short_lock_is_waited_for(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.create_task(create_device(store))
            done, _ = await asyncio.wait([waiting], timeout=0.1)
            assert not done
            other.execute("COMMIT")
            await waiting

    with_store(path, test)


def test_a_database_that_another_process_keeps_for_itself_is_not_opened(path: Path) -> None:
    async def nothing(_store: SqliteStore) -> None: ...

    with_store(path, nothing)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="locked by another process") as raised:
            with_store(path, nothing, StoreSettings(busy_timeout=0.2))
        assert str(path) in str(raised.value)


def test_a_long_write_of_another_process_does_not_keep_from_starting(path: Path) -> None:
    async def look(store: SqliteStore) -> None:
        await store.ping()

    with_store(path, look)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        async def open_and_close() -> None:
            store = await open_sqlite(str(path), StoreSettings(busy_timeout=0.2))
            await store.ping()
            await store.close()

        asyncio.run(open_and_close())


# Files that are something else


def test_a_file_that_is_no_database_is_refused_and_left_untouched(path: Path) -> None:
    content = b"This is a diary.\n" * 1000
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is not a SQLite database") as raised:
        asyncio.run(open_store(f"sqlite:///{path}"))
    assert str(path) in str(raised.value)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a file"):
        asyncio.run(open_store(f"sqlite:///{tmp_path}"))


def test_a_path_below_a_file_is_refused(path: Path) -> None:
    path.touch()
    with pytest.raises(StorageError, match="cannot be opened: Not a directory"):
        asyncio.run(open_store(f"sqlite:///{path}/below/registry.db"))


def test_a_damaged_database_says_so(path: Path) -> None:
    async def fill(store: SqliteStore) -> None:
        for _ in range(50):
            await create_device(store, 500)

    with_store(path, fill)
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match="is damaged; restore a backup") as raised:
        asyncio.run(open_store(f"sqlite:///{path}"))
    assert str(path) in str(raised.value)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("document", ["", "{", "[]", '{"enabled": NaN}', "null"])
def test_a_damaged_document_is_nothing_that_the_caller_has_done(path: Path, document: str) -> None:
    """A `RegistryError` would tell an operator that his request is wrong."""
    device_id = "urn:one"

    async def spoil(store: SqliteStore) -> None:
        device = stored_device(TENANT, device_id)
        made = stored_credentials(TENANT, device_id, [credential("psk", "one")])
        await store.write(lambda tx: tx.insert_device(device, made))
        identity = Identity(name="someone", mechanism="PLAIN", password_hash=None, authorities={}, created=CREATED)
        await store.write(lambda tx: tx.put_identity(identity))
        with closing(sqlite3.connect(path)) as connection, connection:
            for table, column in (
                ("tenants", "document"),
                ("devices", "document"),
                ("credentials", "document"),
                ("identities", "authorities"),
            ):
                connection.execute(f"UPDATE {table} SET {column} = ?", (document,))
        uses: list[tuple[str, Work[object]]] = [
            ("tenants of 'acme'", lambda tx: tx.find_tenant(TENANT)),
            ("devices of 'acme', 'urn:one'", lambda tx: tx.find_device(TENANT, device_id)),
            ("credentials of 'acme', 'urn:one'", lambda tx: tx.find_credentials(TENANT, device_id)),
            ("credentials of 'acme', 'urn:one'", lambda tx: tx.find_credential(TENANT, "psk", "one")),
            ("identities of 'someone'", lambda tx: tx.find_identity("someone")),
        ]
        for says, use in uses:
            for run in (store.read, store.write):
                with pytest.raises(DamagedRow, match=says) as raised:
                    await run(use)
                assert not isinstance(raised.value, RegistryError)

    with_store(path, spoil)


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_file_taken_away_from_a_running_store_refuses_writes(path: Path, replaced: bool) -> None:
    def take_away() -> None:
        path.unlink()
        if replaced:
            path.touch()

    async def test(store: SqliteStore) -> None:
        take_away()
        says = "was replaced" if replaced else "is gone"
        with pytest.raises(Unavailable, match=says):
            await create_device(store)
        with pytest.raises(Unavailable, match=says):
            await store.ping()

    with_store(path, test)


def back_up(path: Path, to: Path) -> None:
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def has_log(path: Path) -> tuple[bool, bool]:
    return path.with_name(f"{path.name}-wal").exists(), path.with_name(f"{path.name}-shm").exists()


@pytest.mark.parametrize("when", ["replaced", "removed", "moved away"])
def test_the_log_of_a_database_that_was_replaced_is_not_applied_to_the_backup(
    path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    backup, aside = path.with_name("backup.db"), path.with_name("aside.db")
    old: set[str] = set()
    later: set[str] = set()

    def take_away() -> None:
        if when == "replaced":
            os.link(path, aside)
            backup.replace(path)
        elif when == "removed":
            path.unlink()
        else:
            path.rename(aside)

    async def test(store: SqliteStore) -> None:
        old.update([await create_device(store, 500) for _ in range(50)])
        back_up(path, backup)
        later.update([await create_device(store, 5000) for _ in range(50)])
        take_away()
        with pytest.raises(Unavailable):
            await create_device(store)

    with_store(path, test)
    assert has_log(path) == (False, False)
    assert "the old one's log was removed" in caplog.text
    if when != "replaced":
        backup.replace(path)
    for file, expected in ((path, old), (aside, old | later)):
        if file.exists():
            check(file, expected)
            with closing(sqlite3.connect(file)) as connection:
                assert connection.execute("SELECT count(*) FROM devices").fetchall() == [(len(expected),)]


def test_a_log_that_belongs_to_the_new_database_is_kept(path: Path) -> None:
    backup = path.with_name("backup.db")

    async def test(store: SqliteStore) -> None:
        await create_device(store)
        back_up(path, backup)
        await create_device(store)
        for name in ("registry.db-wal", "registry.db-shm"):
            path.with_name(name).unlink()
        backup.replace(path)
        other = await open_sqlite(str(path), StoreSettings())
        try:
            acknowledged.add(await create_device(other))
            await store.close()
            assert has_log(path) == (True, True)
            acknowledged.add(await create_device(other))
        finally:
            await other.close()

    acknowledged: set[str] = set()
    with_store(path, test)
    assert len(acknowledged) == 2
    check(path, acknowledged)


USE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_log_that_another_process_uses_is_kept_and_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backup = path.with_name("backup.db")

    async def test(store: SqliteStore) -> None:
        await create_device(store)
        back_up(path, backup)
        backup.replace(path)
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        await store.close()
        assert has_log(path) == (True, True)

    make(path)
    with subprocess.Popen([sys.executable, "-c", USE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            with_store(path, test)
        finally:
            other.kill()
    assert "another process uses the old one's log" in caplog.text


def test_no_connection_is_made_to_a_file_that_was_replaced(path: Path) -> None:
    backup = path.with_name("backup.db")

    async def test(store: SqliteStore) -> None:
        back_up(path, backup)
        backup.replace(path)
        connection = store._reader.connection
        store._reader._connected -= 1
        store._reader.reconnect(sqlite3.OperationalError("broken"))
        assert store._reader.connection is connection

    with_store(path, test)
    assert has_log(path) == (False, False)


def test_a_broken_read_connection_is_replaced(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        device_id = await create_device(store)
        store._reader.connection.close()
        store._reader._connected -= 1  # as if it had been open for a second
        with pytest.raises(Unavailable):
            await store.lookups.find_registration(TENANT, device_id)
        assert await store.lookups.find_registration(TENANT, device_id) is not None
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == 1

    with_store(path, test)


def test_a_batch_of_look_ups_is_one_snapshot(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        find = store.lookups.find_tenant
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            with store.lookups.batch():
                assert await find(TENANT) is not None
                other.execute("DELETE FROM tenants")
                assert await find(TENANT) is not None
            assert await find(TENANT) is None

    with_store(path, test)


def test_a_connection_that_breaks_inside_a_batch_is_replaced(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        with store.lookups.batch():
            store._reader.connection.close()
            store._reader._connected -= 1
            with pytest.raises(Unavailable):
                await store.lookups.find_tenant(TENANT)
            assert await store.lookups.find_tenant(TENANT) is not None
        store._reader.connection.close()
        store._reader._connected -= 1
        with store.lookups.batch():
            assert await store.lookups.find_tenant(TENANT) is not None

    with_store(path, test)


def test_a_broken_write_connection_is_replaced(path: Path) -> None:
    async def break_it(tx: Transaction, connection: sqlite3.Connection) -> None:
        connection.close()
        await tx.count_devices(TENANT)

    async def test(store: SqliteStore) -> None:
        await create_device(store)
        session = store._writer
        session._connected -= 1
        with pytest.raises(Unavailable):
            await store.write(lambda tx: break_it(tx, session.connection))
        await create_device(store)
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == 2

    with_store(path, test)


@pytest.mark.parametrize("error", [RuntimeError("injected"), SystemExit()], ids=["error", "exit"])
def test_a_writer_that_fails_lets_nobody_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def fail() -> None:
        all_wait.wait(DEADLINE)
        raise error

    async def test(store: SqliteStore) -> None:
        device_id = await create_device(store)
        monkeypatch.setattr(store, "_check_file", fail)
        waiting = [asyncio.create_task(create_device(store)) for _ in range(20)]
        await asyncio.sleep(0)
        all_wait.set()
        async with asyncio.timeout(DEADLINE):
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
                assert "cannot be written any more" in str(outcome)
            for use in (create_device(store), store.ping()):
                with pytest.raises(Unavailable, match="cannot be written any more"):
                    await use
        assert await store.lookups.find_registration(TENANT, device_id) is not None
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == 1

    all_wait = threading.Event()
    with_store(path, test)
    failures = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert [record.exc_info is not None for record in failures] == [True]
    with_store(path, lambda store: store.ping())


# Mistakes of a caller


def test_a_use_case_that_waits_for_something_else_is_a_mistake_and_undone(path: Path) -> None:
    async def wait(tx: Transaction) -> None:
        await tx.delete_tenant(TENANT)
        await asyncio.sleep(0)

    async def test(store: SqliteStore) -> None:
        for run in (store.write, store.read):
            with pytest.raises(RuntimeError, match="must await nothing but its transaction"):
                await run(wait if run == store.write else lambda _tx: asyncio.sleep(0))
        assert await store.lookups.find_tenant(TENANT) is not None
        await create_device(store)

    with_store(path, test)


def test_a_transaction_kept_after_its_end_is_useless(path: Path) -> None:
    async def keep(tx: Transaction) -> Transaction:
        return tx

    async def test(store: SqliteStore) -> None:
        kept = await store.write(keep)
        with pytest.raises(Unavailable):
            await kept.delete_tenant(TENANT)
        assert await store.lookups.find_tenant(TENANT) is not None

    with_store(path, test)


def test_a_read_cannot_write(path: Path) -> None:
    async def test(store: SqliteStore) -> None:
        with pytest.raises(Unavailable, match="read only"):
            await store.read(lambda tx: tx.delete_tenant(TENANT))
        assert await store.lookups.find_tenant(TENANT) is not None

    with_store(path, test)


# Rights: as nobody if the tests run as root, to whom no mode applies


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that nobody may pass, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        database = directory / "data"
        database.mkdir()
        yield database
        database.chmod(0o755)


def open_without_rights(path: Path, file_mode: int, directory_mode: int) -> str:
    if path.exists():
        if os.getuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        path.chmod(file_mode)
    if os.getuid() == 0:
        os.chown(path.parent, NOBODY, NOBODY)
    path.parent.chmod(directory_mode)
    with process("open_without_rights", path) as running:
        output, _ = running.communicate(timeout=DEADLINE)
    assert running.returncode == 0
    return output.decode().strip()


def make(path: Path) -> bytes:
    async def nothing(store: SqliteStore) -> None:
        await create_device(store)

    with_store(path, nothing)
    return path.read_bytes()


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o644, True)])
@pytest.mark.parametrize("empty", [False, True], ids=["restored", "empty"])
def test_rights_of_others_are_told_and_left(
    path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool, empty: bool
) -> None:
    if empty:
        path.touch()
    else:
        make(path)
    path.chmod(mode)
    caplog.clear()
    with_store(path, lambda store: store.ping())
    told = [(record.__dict__["mode"], record.__dict__["remedy"]) for record in caplog.records if "mode" in vars(record)]
    assert told == ([(f"{mode:04o}", f"chmod 600 {shlex.quote(str(path))}")] if warned else [])
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("file_mode", "directory_mode", "says"),
    [
        (0o600, 0o700, "opened"),
        (0o400, 0o700, "cannot be written: the file, its directory or its disk is read only"),
        (0o000, 0o700, "cannot be opened: check the rights on the file and on its directory"),
        (0o600, 0o500, "cannot be written: the file, its directory or its disk is read only"),
        (0o600, 0o000, "cannot be opened: Permission denied"),
    ],
    ids=["all rights", "read-only file", "no right to the file", "read-only directory", "no right to the directory"],
)
def test_missing_rights_are_told(shared_directory: Path, file_mode: int, directory_mode: int, says: str) -> None:
    path = shared_directory / "registry.db"
    before = make(path)
    assert says in open_without_rights(path, file_mode, directory_mode)
    shared_directory.chmod(0o755)
    path.chmod(0o600)
    assert path.read_bytes() == before


def test_a_directory_in_which_no_file_may_be_made_is_told(shared_directory: Path) -> None:
    says = open_without_rights(shared_directory / "registry.db", 0o600, 0o500)
    assert "registry.db cannot be opened: Permission denied" in says
    assert list(shared_directory.iterdir()) == []
