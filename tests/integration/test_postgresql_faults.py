"""PostgreSQL when things go wrong, as the store meets it: killed backends, cut and silent connections, locks, limits.

What the whole process makes of it is in `test_postgresql_outages.py`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from tests.contract.records import (
    CREATED,
    credential,
    stored_credentials,
    stored_device,
    stored_tenant,
    tenant_with_names,
)
from tests.integration.proxy import Proxy
from tests.integration.registry import new_id, poll
from tests.postgresql import PostgresqlServer

from kamado import load
from kamado.auth import LOCAL_OPERATOR
from kamado.connections import DeviceConnectionService, DeviceConnectionSettings
from kamado.credentials import CredentialRules
from kamado.document import Identifiers
from kamado.errors import Conflict, OutcomeUnknown, Unavailable
from kamado.management import Management, ManagementSettings
from kamado.passwords import PasswordHasher
from kamado.storage import OlderSchema, StorageError, StoreSettings, connections, open_connections, open_store, sql
from kamado.storage.migrations import load_migrations
from kamado.storage.postgresql import PostgresqlStore, open_postgresql
from kamado.storage.postgresql_statements import Executor
from kamado.storage.sql import Row, Value
from kamado.store import Transaction

TENANT = "acme"
SETTINGS = StoreSettings(statement_timeout=20, acquire_timeout=20)
"""So that nothing is refused because the machine is busy."""
HASTY = StoreSettings(statement_timeout=1.0, acquire_timeout=1.0)
"""For tests of what takes too long."""
RECOVERY = 6.0
"""Seconds until everything works again; promised are 2 on a machine that has nothing else to do."""
COMMIT = b"COMMIT\0"
"""The end of a statement: a transaction begins with words that have this in them."""
ALL_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresqlServer]:
    """A server that tests may stop, and leave running."""
    with PostgresqlServer() as server:
        yield server


@pytest.fixture(scope="module")
def template(server: PostgresqlServer) -> str:
    """A database with the tables and the tenant."""
    return fill(server.create_database())


@pytest.fixture
def url(server: PostgresqlServer, template: str) -> Iterator[str]:
    """A database of a test's own."""
    url = server.create_database(template)
    yield url
    server.drop_database(url)


def fill(url: str) -> str:
    async def filled() -> None:
        store = await open_store(url)
        await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))
        await store.close()

    asyncio.run(filled())
    return url


Test = Callable[[PostgresqlStore], Coroutine[object, object, None]]


def with_store(url: str, test: Test, settings: StoreSettings = SETTINGS) -> None:
    async def opened() -> None:
        store = await open_store(url, settings)
        assert isinstance(store, PostgresqlStore)
        try:
            await test(store)
        finally:
            await store.close()

    asyncio.run(opened())


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Any]:
    """Somebody else who is connected to the database."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


async def create(store: PostgresqlStore, device_id: str | None = None, **members: object) -> str:
    device_id = device_id or new_id("d")
    device, credentials = stored_device(TENANT, device_id, members), stored_credentials(TENANT, device_id)
    await store.write(lambda tx: tx.insert_device(device, credentials), device=(TENANT, device_id))
    return device_id


async def update(store: PostgresqlStore, device_id: str, **members: object) -> None:
    async def work(tx: Transaction) -> None:
        found = await tx.find_device(TENANT, device_id, to_change=True)
        assert found is not None
        await tx.update_device(replace(stored_device(TENANT, device_id, members), created=found.created))

    await store.write(work, device=(TENANT, device_id))


async def has(store: PostgresqlStore, device_id: str) -> bool:
    return await store.lookups.find_registration(TENANT, device_id) is not None


async def outcomes_of(*works: Coroutine[object, object, object]) -> list[object]:
    return await asyncio.gather(*works, return_exceptions=True)


async def eventually(check: Callable[[], Coroutine[object, object, bool]], patience: float = 60.0) -> float:
    """Wait for what comes about by itself; failures meanwhile are `Unavailable` and nothing else.

    Returns:
        Seconds that it took.
    """
    began = time.monotonic()
    async with asyncio.timeout(patience):
        while True:
            try:
                if await check():
                    return time.monotonic() - began
            except Unavailable:
                pass
            await asyncio.sleep(0.01)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if check():
                return
            await asyncio.sleep(0.001)


async def somebody_waits(connection: Any) -> None:
    """Wait until a transaction waits for a lock."""
    async with asyncio.timeout(60):
        while True:
            if await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                return
            await asyncio.sleep(0.005)


# Cut connections


def test_look_ups_do_not_notice_that_their_connections_were_cut(server: PostgresqlServer, url: str) -> None:
    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        for _ in range(3):
            await asyncio.gather(*(has(store, device_id) for _ in range(100)))
            await asyncio.to_thread(server.run_sql, f"SELECT pg_terminate_backend(pid) FROM ({ALL_BACKENDS}) s", name)
            assert await asyncio.gather(*(has(store, device_id) for _ in range(100))) == [True] * 100

    name = url.rpartition("/")[2]
    with_store(url, test)


def test_backends_that_are_terminated_all_the_time_lose_no_write_and_disturb_no_look_up(
    server: PostgresqlServer, url: str
) -> None:
    acknowledged: set[str] = set()
    refused: list[BaseException] = []
    wrong: list[object] = []

    async def test(store: PostgresqlStore) -> None:
        known = await create(store)
        is_over = asyncio.Event()
        looked = 0

        async def write() -> None:
            while not is_over.is_set():
                try:
                    acknowledged.add(await create(store))
                except Unavailable as error:
                    refused.append(error)
                    await asyncio.sleep(0.001)

        async def look() -> None:
            nonlocal looked
            while not is_over.is_set():
                try:
                    if not await has(store, known):
                        wrong.append("not found")
                    looked += 1
                except Unavailable as error:
                    wrong.append(error)
                await asyncio.sleep(0.001)

        async def terminate() -> None:
            async with client(server.url(url.rpartition("/")[2], user="postgres")) as other:
                for _ in range(20):
                    before, seen = len(acknowledged), looked
                    await other.execute(f"SELECT pg_terminate_backend(pid) FROM ({ALL_BACKENDS}) s")
                    await asyncio.sleep(0.1)
                    # A look-up is tried twice: whatever was cut has had its second try before the next time, be the
                    # machine as slow as it likes.
                    await until(lambda: len(acknowledged) > before + 16 and looked > seen + 16)  # noqa: B023
            is_over.set()

        async with asyncio.TaskGroup() as group:
            for work in (*[write] * 8, *[look] * 8, terminate):
                group.create_task(work())

    with_store(url, test)
    assert not wrong
    assert len(acknowledged) > 20
    stored = set(server.run_sql("SELECT device_id FROM devices", url.rpartition("/")[2]).split())
    assert acknowledged <= stored
    # One more is the device that is looked for; what was refused and is there nevertheless was said to be unknown.
    unknown = [error for error in refused if isinstance(error, OutcomeUnknown)]
    assert len(stored) <= len(acknowledged) + 1 + len(unknown)
    assert_consistent(server, url)


def assert_consistent(server: PostgresqlServer, url: str) -> None:
    """Nothing is half done: what is counted agrees with what is there."""
    counted = server.run_sql(
        """
        SELECT (SELECT count(*) FROM devices), (SELECT sum(devices) FROM tenant_usage),
               (SELECT sum(devices) FROM device_ranges), (SELECT count(*) FROM credential_sets)
        """,
        url.rpartition("/")[2],
    )
    assert len(set(counted.split("|"))) == 1, counted


def test_a_commit_that_never_arrived_is_made_again(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            proxy.cut_before = COMMIT
            device_id = await create(store)
            assert not proxy.will_cut
            assert await has(store, device_id)
            proxy.cut_before = COMMIT
            await update(store, device_id, ext={"a": 1})

        with_store(proxy.through(url), test)
    assert_consistent(server, url)


def test_a_commit_whose_answer_was_lost_is_found_out(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            proxy.cut_after = COMMIT
            device_id = await create(store)
            assert not proxy.will_cut
            assert await has(store, device_id)
            with pytest.raises(Conflict):
                await create(store, device_id)

        with_store(proxy.through(url), test)
    assert_consistent(server, url)


def test_a_commit_that_nobody_can_be_asked_about_is_told_as_such(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            device_id = new_id("d")
            began = time.monotonic()
            proxy.cut_after, proxy.refuses_then = COMMIT, True
            with pytest.raises(OutcomeUnknown, match="ask once more"):
                await create(store, device_id)
            assert time.monotonic() - began < 20
            proxy.accept()

            async def is_there() -> bool:
                return await has(store, device_id)

            await eventually(is_there)
            with pytest.raises(Conflict):
                await create(store, device_id)

        with_store(proxy.through(url), test, HASTY)


def test_a_server_that_was_restarted_is_asked_what_became_of_a_commit(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            for immediate in (False, True):
                device_id = new_id("d")
                proxy.cut_after = COMMIT
                creating = asyncio.create_task(create(store, device_id))
                await until(lambda: not proxy.will_cut)
                await asyncio.to_thread(server.restart, immediate=immediate)
                with suppress(OutcomeUnknown):
                    await creating

                async def is_there(device_id: str = device_id) -> bool:
                    return await has(store, device_id)

                await eventually(is_there)

        with_store(proxy.through(url), test)


@pytest.mark.parametrize("version", [16, 18])
@pytest.mark.parametrize("restarts", [True, False])
def test_after_a_crash_no_other_transaction_is_taken_for_the_one_that_was_lost(version: int, restarts: bool) -> None:
    """A server that has crashed gives numbers of transactions again, of which nothing had been written yet."""
    settings = {"wal_writer_delay": "10000ms"}
    with PostgresqlServer(version=version, settings=settings) as server, Proxy(server.port) as proxy:
        url = server.create_database()
        name = url.rpartition("/")[2]

        def starts() -> int:
            return server.log.read_text().count("database system is ready to accept connections")

        def crash() -> None:
            if restarts:
                server.kill()
                server.start()
            else:
                # One backend, because of which the server throws all others out and recovers.
                before = starts()
                with pytest.raises(AssertionError, match="server closed the connection"):
                    server.run_sql("COPY (SELECT 1) TO PROGRAM 'kill -9 $PPID'", name)
                poll(lambda: starts() > before, what="recovery")
            server.run_sql("SELECT txid_current();" * 100, name)

        async def test(store: PostgresqlStore) -> None:
            await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))
            await create(store)
            device_id = new_id("d")
            proxy.cut_before, proxy.refuses_then = COMMIT, True
            creating = asyncio.create_task(create(store, device_id))
            await until(lambda: not proxy.will_cut)
            await asyncio.to_thread(crash)
            proxy.refuses_then = False
            proxy.accept()
            try:
                await creating
            except Unavailable:
                return
            assert await has(store, device_id)

        with_store(proxy.through(url), test)


# Whatever is raised


@pytest.mark.parametrize("raised", [RuntimeError("?"), AssertionError("!")])
def test_nobody_waits_for_ever_whatever_is_raised(url: str, monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)

        async def fail(*_: object) -> Sequence[Sequence[object]]:
            raise raised

        with monkeypatch.context() as patched:
            patched.setattr(Executor, "execute", fail)
            async with asyncio.timeout(60):
                outcomes = await outcomes_of(
                    *(has(store, device_id) for _ in range(10)),
                    *(create(store) for _ in range(10)),
                    store.read(lambda tx: tx.find_device(TENANT, device_id)),
                )
        assert outcomes == [raised] * 21
        assert await has(store, device_id)
        await create(store)

    with_store(url, test)


# Silence


def test_silence_is_noticed_and_then_nobody_has_to_wait(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            device_id = await create(store)
            proxy.swallow()
            began = time.monotonic()
            outcomes = await outcomes_of(
                has(store, device_id), create(store), store.read(lambda tx: tx.find_device(TENANT, device_id))
            )
            # Each statement has its time and a second; the transaction's connection may be another.
            assert time.monotonic() - began < 2 * (HASTY.statement_timeout + 1) + 10
            assert all(isinstance(one, Unavailable) for one in outcomes), outcomes
            began = time.monotonic()
            for _ in range(10):
                outcomes = await outcomes_of(has(store, device_id), create(store))
                assert all(isinstance(one, Unavailable) for one in outcomes)
            # Whoever waited would do so for a second each time.
            assert time.monotonic() - began < 10 * HASTY.acquire_timeout / 2
            proxy.let_through()

            async def is_back() -> bool:
                await create(store)
                return await has(store, device_id)

            assert await eventually(is_back) < RECOVERY

        with_store(proxy.through(url), test, HASTY)


def test_silence_while_the_connection_is_made_is_noticed_as_well(server: PostgresqlServer, url: str) -> None:
    """The database was away; now it takes connections and says nothing."""
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            device_id = await create(store)
            proxy.refuse()
            await outcomes_of(*(has(store, device_id) for _ in range(3)))
            proxy.swallow()
            proxy.accept()
            await asyncio.sleep(2)
            proxy.cut()
            proxy.let_through()

            async def is_back() -> bool:
                return await has(store, device_id)

            assert await eventually(is_back) < RECOVERY

        with_store(proxy.through(url), test, HASTY)


def test_a_slow_network_is_not_taken_for_an_outage(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            proxy.delay = 0.02
            created = await asyncio.gather(*(create(store) for _ in range(20)))
            assert all(await asyncio.gather(*(has(store, one) for one in created)))

        with_store(proxy.through(url), test)


# Replicas that are none


def test_a_replica_of_another_database_is_not_asked(
    server: PostgresqlServer, url: str, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A backup was restored into another database, and `storage.read_url` still leads to the old one's replica."""
    old = server.create_database(template)

    async def fill(store: PostgresqlStore) -> None:
        await create(store, "deleted")

    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        assert await has(store, device_id)
        for _ in range(20):
            assert not await has(store, "deleted")

    with_store(old, fill)
    with_store(url, test, replace(SETTINGS, read_url=old))
    assert told(caplog) == [
        ("ERROR", "replica not used, look-ups go to the primary"),
        ("WARNING", "replica away, look-ups go to the primary until it is back"),
    ]
    server.drop_database(old)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    # Not what asyncio says of earlier tests, whenever their rest is collected.
    return [(record.levelname, record.message) for record in caplog.records if record.name.startswith("kamado")]


def test_a_database_is_looked_for_until_it_is_back_whatever_the_driver_raises(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        database = store._database
        connect, tries = database.connect, 0

        async def fail_at_first(patience: float | None = None) -> Any:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise RuntimeError("nobody has foreseen this")
            return await connect(patience)

        monkeypatch.setattr(database, "connect", fail_at_first)
        database.watch()
        with pytest.raises(Unavailable):
            await has(store, device_id)
        assert database._probe is not None
        await asyncio.wait_for(database._probe, 20)
        assert tries == 3
        assert await has(store, device_id)

    with_store(url, test)
    assert told(caplog) == [
        ("WARNING", "database away, everything is refused until it is back"),
        ("ERROR", "cannot look whether the database is back"),
        ("ERROR", "cannot look whether the database is back"),
        ("WARNING", "database back"),
    ]


def test_a_replica_is_left_as_soon_as_the_primary_is_another_database(
    server: PostgresqlServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = urlsplit(url).path[1:]
    oid = server.run_sql(f"SELECT oid FROM pg_database WHERE datname = '{name}'").encode()
    with Proxy(server.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            replica = store._replica
            assert replica is not None

            async def is_used() -> bool:
                await has(store, device_id)
                replica.check()
                return True

            async def is_left() -> bool:
                try:
                    return not await is_used()
                except Unavailable:
                    return True

            device_id = await create(store)
            assert await is_used()
            proxy.replace = b"/" + oid, b"/" + b"9" * len(oid)
            proxy.cut()

            async def is_written() -> bool:
                return bool(await create(store))

            await eventually(is_written)
            await eventually(is_left)
            assert await has(store, device_id)
            proxy.replace = None
            proxy.cut()
            await eventually(is_written)
            await eventually(is_used)

        with_store(proxy.through(url), test, replace(SETTINGS, read_url=url))
    assert ("ERROR", "replica not used, look-ups go to the primary") in told(caplog)


def test_a_replica_of_which_nobody_may_say_whose_it_is_is_used(
    server: PostgresqlServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.run_sql("REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC", urlsplit(url).path[1:])

    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        await asyncio.gather(*(has(store, device_id) for _ in range(1000)))
        assert store._replica is not None
        store._replica.check()

    with_store(url, test, replace(SETTINGS, read_url=f"{url}?application_name=replica"))
    assert told(caplog) == [("WARNING", "replica used without knowing whose it is")]


def test_commits_that_do_not_end_take_a_few_connections_and_no_more() -> None:
    """PostgreSQL, "Fail-over": writes are refused at once until commits end again, and look-ups go on."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    failed: list[int] = []
    settings = replace(HASTY, observe=lambda _committed, _refused, lost, _seconds: failed.append(lost))
    with PostgresqlServer() as own:
        url = own.create_database()

        def set_standby(value: str) -> None:
            own.run_sql(f"ALTER SYSTEM SET synchronous_standby_names = {value}")
            own.run_sql("SELECT pg_reload_conf()")

        async def test(store: PostgresqlStore) -> None:
            await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))
            device_id = await create(store)
            await asyncio.to_thread(set_standby, "'nobody'")

            async def is_refused() -> bool:
                outcomes = await outcomes_of(*(create(store) for _ in range(10)))
                assert all(outcome is None or isinstance(outcome, str | Unavailable) for outcome in outcomes)
                return all("do not end" in str(outcome) for outcome in outcomes)

            await eventually(is_refused)
            for _ in range(100):
                await outcomes_of(*(create(store) for _ in range(10)))
                assert await has(store, device_id)
                await asyncio.sleep(0.03)
            failed.clear()
            assert await is_refused()
            assert sum(failed) == 10, "metrics tell"
            assert 1 <= int(await asyncio.to_thread(own.run_sql, waiting)) <= 3
            await store.ping()
            await asyncio.to_thread(set_standby, "DEFAULT")

            async def is_back() -> bool:
                return bool(await create(store))

            await eventually(is_back)

        with_store(url, test, settings)


# Locks, and others that change the same


def test_a_deadlock_with_somebody_else_is_not_noticed(url: str) -> None:
    async def test(store: PostgresqlStore) -> None:
        one, two = sorted([await create(store), await create(store)])
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute("SELECT 1 FROM devices WHERE device_id = $1 FOR UPDATE", two)

            async def both(tx: Transaction) -> None:
                for device_id in (one, two):
                    found = await tx.find_device(TENANT, device_id, to_change=True)
                    assert found is not None
                    await tx.update_device(replace(found, version=new_id(), updated=CREATED))

            writing = asyncio.create_task(store.write(both))
            await somebody_waits(other)
            # Now each has what the other wants.
            await other.execute("SELECT 1 FROM devices WHERE device_id = $1 FOR UPDATE", one)
            await other.execute("COMMIT")
            await writing

    with_store(url, test, StoreSettings())


def test_what_somebody_else_keeps_locked_does_not_fail_the_others(url: str) -> None:
    async def test(store: PostgresqlStore) -> None:
        devices = await asyncio.gather(*(create(store) for _ in range(20)))
        locked = devices[7]
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute("SELECT 1 FROM devices WHERE device_id = $1 FOR UPDATE", locked)
            began = time.monotonic()
            outcomes = await outcomes_of(*(update(store, one, ext={"n": 1}) for one in devices))
            assert time.monotonic() - began < 20
            failed = {one: outcome for one, outcome in zip(devices, outcomes, strict=True) if outcome is not None}
            assert isinstance(failed.pop(locked), Unavailable)
            assert not failed
            assert await has(store, locked), "look-ups wait for no lock"
            await other.execute("ROLLBACK")
        await update(store, locked, ext={"n": 2})

    with_store(url, test, StoreSettings())


def test_a_tenant_that_somebody_keeps_locked_does_not_keep_other_tenants_waiting(url: str) -> None:
    """Operating, "Somebody keeps rows locked": only what needs these rows waits, and not for ever."""
    settings = StoreSettings(statement_timeout=4.0)

    async def test(store: PostgresqlStore) -> None:
        await store.write(lambda tx: tx.insert_tenant(stored_tenant("other")))
        is_over = asyncio.Event()

        async def keep_asking(work: Callable[[], Coroutine[object, object, object]]) -> None:
            while not is_over.is_set():
                with suppress(Unavailable):
                    await work()

        async def create_in(tenant_id: str) -> None:
            device_id = new_id("d")
            device, credentials = stored_device(tenant_id, device_id, {}), stored_credentials(tenant_id, device_id)

            async def work(tx: Transaction) -> None:
                assert await tx.find_tenant(tenant_id) is not None
                await tx.insert_device(device, credentials)

            await store.write(work, device=(tenant_id, device_id))

        async def change_tenant() -> None:
            await store.write(lambda tx: tx.find_tenant(TENANT, to_change=True), tenant_id=TENANT)

        async with client(url) as other, asyncio.TaskGroup() as group:
            await other.execute("BEGIN")
            await other.execute("SELECT 1 FROM tenants WHERE tenant_id = $1 FOR UPDATE", TENANT)
            for work in (partial(create_in, TENANT), change_tenant) * 3:
                group.create_task(keep_asking(work))
            await somebody_waits(other)
            began = time.monotonic()
            for _ in range(12):
                await create_in("other")
            # The first one may have come along with those that found out what is locked.
            assert time.monotonic() - began < 3 * settings.statement_timeout
            is_over.set()
            await other.execute("ROLLBACK")

    with_store(url, test, settings)


def test_who_has_given_up_while_something_was_locked_has_changed_nothing(server: PostgresqlServer, url: str) -> None:
    """Operating: 503 means that nothing was changed; an adapter is told so when its time is over."""

    async def test(store: PostgresqlStore) -> None:
        await create(store)
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute("SELECT 1 FROM tenant_usage FOR UPDATE")
            creating = {device_id: asyncio.create_task(create(store, device_id)) for device_id in ("a", "b", "c")}
            await somebody_waits(other)
            creating["b"].cancel()
            await asyncio.sleep(0)
            await other.execute("COMMIT")
        await asyncio.gather(creating["a"], creating["c"])
        assert [await has(store, device_id) for device_id in creating] == [True, False, True]

    with_store(url, test)
    assert_consistent(server, url)


def test_a_lock_that_is_given_back_soon_costs_nobody_anything(url: str) -> None:
    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute("SELECT 1 FROM devices WHERE device_id = $1 FOR UPDATE", device_id)
            writing = asyncio.create_task(update(store, device_id, ext={"n": 1}))
            await asyncio.sleep(0.8)
            await other.execute("ROLLBACK")
            await writing

    with_store(url, test, StoreSettings())


INSERT_DEVICE = "INSERT INTO devices (tenant_id, device_id, version, created, document) VALUES ($1, $2, '1', 1, '{}')"


def plan_of(directory: Path, number: int) -> load.LoadPlan:
    """A file with so many devices for the tenant, `d0` and on."""
    path = directory / "devices.json"
    devices = [{"device-id": f"d{n}", "data": {"ext": {"n": n}}} for n in range(number)]
    path.write_text(json.dumps([{"tenant": TENANT, "devices": devices}]))
    return load.read_files([path], rules=CredentialRules(identifiers=Identifiers()), now=CREATED)


def test_devices_are_created_in_a_tenant_into_which_others_are_loaded(url: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 3000)

    async def test(store: PostgresqlStore) -> None:
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute(INSERT_DEVICE, TENANT, "d2999")
            with closing(PasswordHasher(workers=1, queue=1, cost=4)) as hasher:
                loading = asyncio.create_task(load.apply(plan, store, hasher, LOCAL_OPERATOR, lambda: CREATED))
                # Nearly all of them are there, though nobody else sees them yet.
                await somebody_waits(other)
                await create(store)
                await other.execute("ROLLBACK")
                assert (await loading).devices == 3000
        assert await store.read(lambda tx: tx.count_devices(TENANT)) == 3001

    with_store(url, test, StoreSettings(statement_timeout=60.0))


def test_a_device_that_was_created_while_others_were_loaded_is_a_problem(url: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 600)

    async def test(store: PostgresqlStore) -> None:
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute(INSERT_DEVICE, TENANT, "d599")
            with closing(PasswordHasher(workers=1, queue=1, cost=4)) as hasher:
                loading = asyncio.create_task(load.apply(plan, store, hasher, LOCAL_OPERATOR, lambda: CREATED))
                await somebody_waits(other)
                await other.execute("COMMIT")
                with pytest.raises(load.LoadErrors) as caught:
                    await loading
        assert [(one.entry, one.message) for one in caught.value.problems] == [
            (f"[0].devices[599] device d599 of tenant {TENANT}", "exists already")
        ]
        assert not await has(store, "d0")

    with_store(url, test, StoreSettings(statement_timeout=60.0))


def test_a_serialisation_failure_is_tried_again(server: PostgresqlServer, url: str) -> None:
    name = url.rpartition("/")[2]
    server.run_sql(
        """
        CREATE SEQUENCE failures;
        GRANT USAGE ON SEQUENCE failures TO kamado;
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('failures') <= 2 THEN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER fail BEFORE INSERT ON devices FOR EACH ROW EXECUTE FUNCTION fail();
        """,
        name,
    )

    async def test(store: PostgresqlStore) -> None:
        assert await has(store, await create(store))

    with_store(url, test)


def test_credentials_that_were_waited_for_are_those_of_the_version_that_was_found(url: str) -> None:
    """Store, `to_change`: what somebody else has changed meanwhile is seen whole."""

    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        before = stored_credentials(TENANT, device_id, [credential("psk", "before")])
        await store.write(lambda tx: tx.replace_credentials(before))
        after = stored_credentials(TENANT, device_id, [credential("psk", "after")])
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute(
                "UPDATE credential_sets SET version = $1 WHERE device_id = $2", after.version, device_id
            )
            await other.execute(
                "UPDATE credentials SET document = replace(document, 'before', 'after'), auth_id = 'after' "
                "WHERE device_id = $1",
                device_id,
            )
            finding = asyncio.create_task(
                store.write(lambda tx: tx.find_credentials(TENANT, device_id, to_change=True))
            )
            await somebody_waits(other)
            await other.execute("COMMIT")
        found = await finding
        assert found is not None
        assert (found.version, [one.auth_id for one in found.credentials]) == (after.version, ["after"])

    with_store(url, test, StoreSettings())


def test_credentials_whose_device_was_created_meanwhile_are_not_deleted_as_left_over(url: str) -> None:
    """With lenient referential integrity (management 8.1) a set may be there before its device."""

    async def test(store: PostgresqlStore) -> None:
        device_id = new_id("d")
        first = stored_credentials(TENANT, device_id, [credential("psk", "first")])
        await store.write(lambda tx: tx.replace_credentials(first))
        async with client(url) as other:
            await other.execute("BEGIN")
            await other.execute("UPDATE credential_sets SET version = 'new' WHERE device_id = $1", device_id)
            await other.execute(
                "INSERT INTO devices (tenant_id, device_id, version, created, document) VALUES ($1, $2, 'v', 0, '{}')",
                TENANT,
                device_id,
            )
            deleting = asyncio.create_task(store.write(lambda tx: tx.delete_credential_sets(TENANT, "", 10)))
            await somebody_waits(other)
            await other.execute("COMMIT")
        assert await deleting == (0, None)
        found = await store.read(lambda tx: tx.find_credentials(TENANT, device_id))
        assert found is not None
        assert len(found.credentials) == 1

    with_store(url, test, StoreSettings())


@asynccontextmanager
async def beside(url: str) -> AsyncIterator[PostgresqlStore]:
    """The store of another process."""
    store = await open_store(url, SETTINGS)
    assert isinstance(store, PostgresqlStore)
    try:
        yield store
    finally:
        await store.close()


def act_once(
    monkeypatch: pytest.MonkeyPatch, statement: str, act: Callable[[], Coroutine[object, object, None]], *, after: bool
) -> None:
    """Have somebody else do something right before, or after, a statement is run for the first time."""
    execute = Executor.execute
    is_done = False

    async def do(executor: Executor, asked: str, rows: Sequence[Sequence[Value]]) -> Sequence[Sequence[Row]]:
        nonlocal is_done
        is_now = asked == statement and not is_done
        is_done |= is_now
        if is_now and not after:
            await act()
        found = await execute(executor, asked, rows)
        if is_now and after:
            await act()
        return found

    monkeypatch.setattr(Executor, "execute", do)


def test_a_name_that_its_last_user_gives_up_is_not_said_to_belong_to_another_group(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Management 4.7: two tenants of a trust anchor group may have the same subject DN."""
    tenant = tenant_with_names("CN=ca", group="g")

    async def test(store: PostgresqlStore) -> None:
        async with beside(url) as other:
            await other.write(lambda tx: tx.insert_tenant(stored_tenant("first", tenant)))

            async def give_up() -> None:
                await other.write(lambda tx: tx.delete_tenant("first"))

            act_once(monkeypatch, sql.FIND_NAME_OWNER, give_up, after=False)
            await store.write(lambda tx: tx.insert_tenant(stored_tenant("second", tenant)))
        dn = tenant.trust_anchors[0].subject
        found = await store.lookups.find_tenants_by_anchor(dn.canonical_key, dn.text)
        assert [row.tenant_id for row in found] == ["second"]

    with_store(url, test)


def test_credentials_that_are_set_while_their_device_is_created_keep_their_version(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Management 8.1, lenient: who has been told an ETag may rely on it until somebody changes the credentials."""

    async def test(store: PostgresqlStore) -> None:
        with closing(PasswordHasher(workers=1, queue=1, cost=4)) as hasher:
            identifiers, settings = Identifiers(), ManagementSettings(is_lenient=True)
            rules = CredentialRules(identifiers=identifiers)
            management = Management(store, hasher, identifiers, rules, settings, lambda: CREATED)
            async with beside(url) as other:
                theirs = stored_credentials(TENANT, "d", [credential("psk", "a")])

                async def put() -> None:
                    await other.write(lambda tx: tx.replace_credentials(theirs))

                act_once(monkeypatch, sql.INSERT_DEVICE, put, after=True)
                await management.create_device(LOCAL_OPERATOR, TENANT, "d")
        found = await store.read(lambda tx: tx.find_credentials(TENANT, "d"))
        assert found == theirs

    with_store(url, test)


def test_what_is_kept_of_connections_is_looked_through_without_a_lock(
    server: PostgresqlServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is written to the row: of many that are to stay, each process would write all, again and again."""
    now = CREATED
    settings = DeviceConnectionSettings(gateway_lifetime=10.0, refresh_interval=0.0)
    locked = "SELECT device_id FROM device_connections WHERE xmax <> 0"

    async def test() -> None:
        nonlocal now
        kept, other = await open_connections(url, SETTINGS), await open_connections(url, SETTINGS)
        try:
            service, others = (DeviceConnectionService(one, settings, lambda: now) for one in (kept, other))
            for number in range(20):
                await service.set_last_gateway(LOCAL_OPERATOR, TENANT, f"d{number}", "gw")
            assert await service.remove_expired() == 0
            assert await asyncio.to_thread(server.run_sql, locked, url.rpartition("/")[2]) == ""
            now += timedelta(seconds=11)
            await service.set_last_gateway(LOCAL_OPERATOR, TENANT, "d0", "gw")

            async def refresh() -> None:
                await others.set_last_gateway(LOCAL_OPERATOR, TENANT, "d1", "gw")

            act_once(monkeypatch, connections.LIST_CONNECTIONS, refresh, after=True)
            assert await service.remove_expired() == 18
            for device_id, is_kept in (("d0", True), ("d1", True), ("d2", False)):
                assert (await kept.find_connection(TENANT, device_id) is not None) == is_kept
        finally:
            await kept.close()
            await other.close()

    asyncio.run(test())


# Limits


def test_a_full_disk_is_told_and_look_ups_go_on(server: PostgresqlServer, url: str) -> None:
    name = url.rpartition("/")[2]
    server.run_sql(
        """
        CREATE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;
        """,
        name,
    )

    async def test(store: PostgresqlStore) -> None:
        device_id = await create(store)
        server.run_sql(
            "CREATE TRIGGER full_disk BEFORE INSERT ON devices FOR EACH ROW EXECUTE FUNCTION disk_full()", name
        )
        outcomes = await outcomes_of(*(create(store) for _ in range(5)))
        assert {(type(one), str(one)) for one in outcomes} == {
            (Unavailable, "the database cannot grow: the disk is full")
        }
        assert await has(store, device_id)
        server.run_sql("DROP TRIGGER full_disk ON devices", name)
        await create(store)

    with_store(url, test)
    assert_consistent(server, url)


def test_with_fewer_connections_than_it_would_like_it_serves_all_the_same(template: str, url: str) -> None:
    with PostgresqlServer(settings={"max_connections": "8", "superuser_reserved_connections": "1"}) as small:
        url = small.create_database()

        async def test(store: PostgresqlStore) -> None:
            await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))
            async with client(url), client(url), client(url), client(url):
                created = await asyncio.gather(*(create(store) for _ in range(100)))
                found = await asyncio.gather(
                    *(has(store, one) for one in created),
                    *(store.read(lambda tx: tx.count_devices(TENANT)) for _ in range(10)),
                )
                assert found == [True] * 100 + [100] * 10

        with_store(url, test)


def test_what_the_url_says_of_connections_is_done(url: str, tmp_path: Path) -> None:
    parts = urlsplit(url)
    (tmp_path / "pgpass").write_text(f"*:*:*:*:{parts.password}\n")
    (tmp_path / "pgpass").chmod(0o600)
    without_password = url.replace(f":{parts.password}@", "@")
    assert without_password != url
    said = f"{without_password}?passfile={tmp_path}/pgpass&application_name=plant%207&options=-c%20work_mem%3D3MB"
    said += "&connect_timeout=30&sslmode=disable&gssencmode=disable&extra_float_digits=2"

    async def test(store: PostgresqlStore) -> None:
        async with store._database.connection() as connection:
            shown = [
                await connection.fetchval(f"SHOW {name}")
                for name in ("application_name", "work_mem", "extra_float_digits", "enable_seqscan")
            ]
        assert shown == ["plant 7", "3MB", "2", "off"]

    with_store(said, test)

    async def name_by_default(store: PostgresqlStore) -> None:
        async with store._database.connection() as connection:
            assert await connection.fetchval("SHOW application_name") == "kamado"

    with_store(url, name_by_default)


def test_settings_of_the_role_or_the_database_do_not_change_what_kamado_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL, "The server's settings"; from the first statement on, which here takes longer than the role may."""
    monkeypatch.setattr("kamado.storage.postgresql_database._FIND_RUN", "pg_sleep(0.6)::text")
    with PostgresqlServer(version=18) as newest:
        url = newest.create_database()
        newest.run_sql(
            f"""
            ALTER ROLE kamado SET statement_timeout = '300ms';
            ALTER ROLE kamado SET transaction_timeout = '500ms';
            ALTER DATABASE {urlsplit(url).path[1:]} SET lock_timeout = '1ms';
            ALTER ROLE kamado SET idle_session_timeout = '300ms';
            ALTER ROLE kamado SET enable_seqscan = on;
            """
        )

        async def test(store: PostgresqlStore) -> None:
            async with store._database.connection() as connection:
                shown = [
                    await connection.fetchval(f"SHOW {name}_timeout")
                    for name in ("statement", "lock", "transaction", "idle_session")
                ]
                assert await connection.fetchval("SHOW enable_seqscan") == "off"
            assert shown == ["20s", "10s", "0", "0"]
            await store.write(lambda tx: tx.insert_tenant(stored_tenant(TENANT)))

        with_store(url, test)


def test_a_database_that_is_away_is_tried_until_the_time_is_over(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:
        proxy.refuse()
        began = time.monotonic()
        with pytest.raises(StorageError, match="cannot be"):
            asyncio.run(open_store(proxy.through(url), StoreSettings(open_timeout=2.5)))
        assert time.monotonic() - began >= 2.5


def test_a_bound_for_connecting_that_the_url_sets_is_kept(server: PostgresqlServer, url: str) -> None:
    with Proxy(server.port) as proxy:
        proxy.swallow()
        began = time.monotonic()
        with pytest.raises(StorageError, match="no answer"):
            asyncio.run(open_store(f"{proxy.through(url)}?connect_timeout=1", StoreSettings(acquire_timeout=120.0)))
        assert time.monotonic() - began < 60


def test_whoever_may_not_make_the_schema_is_told_who_does(server: PostgresqlServer, url: str) -> None:
    settings = StoreSettings(auto_migrate=False)
    empty = server.create_database()
    with pytest.raises(OlderSchema, match="has no tables yet; make them by kamado migrate, or by kamado serve"):
        asyncio.run(open_store(empty, settings))
    server.drop_database(empty)
    latest = load_migrations("postgresql")
    later = replace(latest[-1], number=latest[-1].number + 1, name="later", works_with=None)
    with pytest.raises(
        OlderSchema, match=f"schema {latest[-1].number} .* needs {later.number}; bring it up to date by"
    ):
        asyncio.run(open_postgresql(url, settings, (*latest, later)))


def test_a_database_without_a_connection_to_spare_is_waited_for_at_the_start() -> None:
    with PostgresqlServer(settings={"max_connections": "5", "superuser_reserved_connections": "1"}) as small:
        url = small.create_database()

        async def test() -> None:
            others: list[Any] = []

            async def is_taken() -> bool:
                # What made the database may still be about to leave.
                with suppress(asyncpg.TooManyConnectionsError):
                    others.append(await asyncpg.connect(url))
                return len(others) == 4

            await eventually(is_taken)
            with pytest.raises(StorageError, match="connection"):
                await open_store(url, StoreSettings(open_timeout=1))
            opening = asyncio.create_task(open_store(url, StoreSettings(open_timeout=60)))
            await asyncio.sleep(0.5)
            for other in others:
                other.terminate()
            await (await opening).close()

        asyncio.run(test())


# A standby


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[PostgresqlServer, PostgresqlServer]]:
    """A primary, and a standby that follows it."""
    with PostgresqlServer() as primary, PostgresqlServer(primary=primary) as standby:
        yield primary, standby


async def replay(url: str, standby: PostgresqlServer, sql: str) -> None:
    """Wait until a statement has rows in the standby, too; the database may be yet to come."""
    async with asyncio.timeout(60):
        while True:
            with suppress(AssertionError):
                if await asyncio.to_thread(standby.run_sql, sql, url.rpartition("/")[2]):
                    return
            await asyncio.sleep(0.01)


@contextmanager
def standing_still(standby: PostgresqlServer) -> Iterator[None]:
    """Have a standby stay as it is."""
    standby.run_sql("SELECT pg_wal_replay_pause()")
    try:
        # That is a request, which is granted before the next record.
        poll(lambda: standby.run_sql("SELECT pg_get_wal_replay_pause_state()") == "paused", what="the pause")
        yield
    finally:
        standby.run_sql("SELECT pg_wal_replay_resume()")


async def assert_not_read_from(standby: PostgresqlServer, url: str, store: PostgresqlStore, device_id: str) -> None:
    """What is deleted is not found, over whatever connection, although the standby still has it."""
    with standing_still(standby):
        async with client(url) as other:
            await other.execute("DELETE FROM devices WHERE device_id = $1", device_id)
        for _ in range(20):
            assert not any(await asyncio.gather(has(store, device_id), store.ping(), has(store, device_id)))


def test_an_address_that_leads_to_a_standby_for_a_moment(pair: tuple[PostgresqlServer, PostgresqlServer]) -> None:
    """A name or an address that follows the primary may do so late."""
    primary, standby = pair
    url = fill(primary.create_database())
    with Proxy(primary.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            device_id = await create(store)
            await replay(url, standby, "SELECT 1 FROM devices")
            proxy.target = standby.port
            proxy.cut()
            for _ in range(4):
                outcomes = await outcomes_of(create(store), has(store, device_id), store.ping())
                assert all(isinstance(outcome, Unavailable) for outcome in outcomes), outcomes
            proxy.target = primary.port

            async def works() -> bool:
                await create(store)
                return await has(store, device_id)

            assert await eventually(works) < RECOVERY
            await asyncio.gather(*(create(store) for _ in range(50)))
            await assert_not_read_from(standby, url, store, device_id)

        with_store(proxy.through(url), test)


def test_a_standby_that_the_url_allows_is_left_by_the_first_write(
    pair: tuple[PostgresqlServer, PostgresqlServer],
) -> None:
    primary, standby = pair
    url = fill(primary.create_database())
    with Proxy(primary.port) as proxy:

        async def test(store: PostgresqlStore) -> None:
            device_id = await create(store)
            await replay(url, standby, "SELECT 1 FROM devices")
            proxy.target = standby.port
            proxy.cut()
            assert await has(store, device_id)
            with pytest.raises(Unavailable, match="the database is read only"):
                await create(store)
            proxy.target = primary.port
            await create(store)
            await assert_not_read_from(standby, url, store, device_id)

        with_store(proxy.through(url) + "?target_session_attrs=any", test)


def test_a_standby_is_not_started_on(pair: tuple[PostgresqlServer, PostgresqlServer]) -> None:
    primary, standby = pair
    url = fill(primary.create_database())
    asyncio.run(replay(url, standby, "SELECT 1 FROM tenants"))
    with pytest.raises(StorageError, match="leads to no server that takes writes"):
        asyncio.run(open_store(url.replace(f":{primary.port}/", f":{standby.port}/")))


def test_what_a_replica_has_in_part_is_looked_up_in_the_primary(
    pair: tuple[PostgresqlServer, PostgresqlServer],
) -> None:
    """What was created is never seen late: all gateways of a group, all tenants that trust a CA."""
    primary, standby = pair
    url = fill(primary.create_database())

    async def trust(store: PostgresqlStore, tenant_id: str) -> None:
        tenant = stored_tenant(tenant_id, tenant_with_names("CN=ca", group="group"))
        await store.write(lambda tx: tx.insert_tenant(tenant))

    async def test(store: PostgresqlStore) -> None:
        await trust(store, "t1")
        await create(store, "gateway-1", memberOf=["group"])
        await replay(url, standby, "SELECT 1 FROM devices")
        assert await store.lookups.find_group_members(TENANT, ["group"]) == ["gateway-1"]
        with standing_still(standby):
            await trust(store, "t2")
            await create(store, "gateway-2", memberOf=["group"])
            assert await store.lookups.find_group_members(TENANT, ["group"]) == ["gateway-1", "gateway-2"]
            found = await store.lookups.find_tenants_by_anchor("cn=ca", "CN=ca")
            assert [row.tenant_id for row in found] == ["t1", "t2"]

    read_url = url.replace(f":{primary.port}/", f":{standby.port}/")
    with_store(url, test, replace(SETTINGS, read_url=read_url))
