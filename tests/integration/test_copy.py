"""`kamado copy`: a registry with everything in it from one database to another, there and back."""

import asyncio
import os
import pty
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import asyncpg
import pytest
from tests.contract.records import (
    CREATED,
    UPDATED,
    credential,
    stored_credentials,
    stored_device,
    stored_tenant,
    tenant_with_names,
)
from tests.databases import Databases, make_databases, query
from tests.integration.registry import Registry, kamado, poll
from tests.postgresql import PostgresqlServer

from kamado import transfer
from kamado.errors import Conflict, Unavailable
from kamado.search import Filter, Query, Sort
from kamado.storage import StoreSettings, UnfinishedCopy, open_store
from kamado.storage.migrations import load_migrations
from kamado.storage.sqlite import migrate_sqlite
from kamado.store import (
    CopyNote,
    Identity,
    Operator,
    Record,
    RecordKind,
    Searches,
    Store,
    StoredCredentials,
    StoredDevice,
    Transaction,
)

T = TypeVar("T")

WAYS = [
    ("sqlite", "postgresql", "sqlite"),
    ("sqlite", "sqlite", "sqlite"),
    ("postgresql", "postgresql", "postgresql"),
]
LONG = "x" * 5000
# What PostgreSQL's text cannot hold, what sorts differently by code points and by UTF-16, what JSON numbers may be.
ODD_DOCUMENT = {
    "ext": {
        "nul\0name": "a\0b\x01\x02",
        "numbers": [0, -0.0, 0.1, 1e22, 2**53 + 1, 2**70, -1.5e-300],
        "texts": ["", "\uffff", "\U0001f600", "é", 'q"\\/', LONG],
        "nested": {"a~/b": [[{"c": None}], True, False]},
    },
    "defaults": {"ttl": 30, "n": None},
}
PSK = credential("psk", "x", comment="c\0")
# Beyond what the API takes, too: what is stored is copied.
AUTH_IDS = ["plain", "\uffff", "\U0001f600", "nul\0", f"{LONG}1", f"{LONG}2", "CN=a,O=b"]


def run(work: Awaitable[T]) -> T:
    async def awaited() -> T:
        return await work

    return asyncio.run(awaited())


async def with_store(url: str, work: Callable[[Store], Awaitable[T]], settings: StoreSettings | None = None) -> T:
    store = await open_store(url, settings)
    try:
        return await work(store)
    finally:
        await store.close()


class Places:
    """Databases of any kind."""

    def __init__(self, directory: Path, make: Callable[[str], Databases]) -> None:
        self._directory = directory
        self._make = make
        self._made: list[tuple[Databases, str]] = []

    def new(self, kind: str) -> str:
        databases = self._make(kind)
        url = databases.create(self._directory / str(len(self._made)), is_empty=True)
        self._made.append((databases, url))
        return url

    def close(self) -> None:
        for databases, url in self._made:
            databases.drop(url)


@pytest.fixture(scope="module")
def make_kind(request: pytest.FixtureRequest) -> Callable[[str], Databases]:
    made: dict[str, Databases] = {}

    def make(kind: str) -> Databases:
        if kind not in made:
            made[kind] = make_databases(kind, partial(request.getfixturevalue, "postgresql"))
        return made[kind]

    return make


@pytest.fixture
def places(tmp_path: Path, make_kind: Callable[[str], Databases]) -> Iterator[Places]:
    with closing(Places(tmp_path, make_kind)) as places:
        yield places


async def fill(store: Store) -> None:
    """Put one of everything into a registry."""

    async def work(transaction: Transaction) -> None:
        await transaction.insert_tenant(stored_tenant("plain"))
        await transaction.insert_tenant(
            replace(
                stored_tenant("odd", {"alias": "al-1", "ext": ODD_DOCUMENT["ext"], "enabled": False}),
                updated=UPDATED,
            )
        )
        long_name = "CN=" + "n" * 1000
        await transaction.insert_tenant(stored_tenant("a", tenant_with_names("CN=CA", long_name, group="g")))
        await transaction.insert_tenant(stored_tenant("b", tenant_with_names("cn=ca", group="g")))
        await transaction.insert_tenant(stored_tenant("gone", {"alias": "free"}))
        for tenant_id in ("odd", "a", "gone"):
            await transaction.insert_device(
                replace(
                    stored_device(tenant_id, "odd", ODD_DOCUMENT),
                    updated=UPDATED,
                    auto_provisioned=True,
                    notification_sent=True,
                ),
                stored_credentials(tenant_id, "odd", [replace(PSK, auth_id=auth_id) for auth_id in reversed(AUTH_IDS)]),
            )
            await transaction.insert_device(
                stored_device(tenant_id, "gateway", {"memberOf": ["g1", "g2", "g1"]}),
                stored_credentials(tenant_id, "gateway"),
            )
            await transaction.insert_device(
                stored_device(tenant_id, "behind", {"via": ["odd"], "enabled": False, "ext": {"n": 7}}),
                stored_credentials(tenant_id, "behind", [credential("custom", "plain", ext={"k": [1.0, "\0"]})]),
            )
            # Lenient referential integrity: a set that is there before its device.
            await transaction.replace_credentials(
                stored_credentials(tenant_id, "not-yet", [credential("psk", "not-yet")])
            )
        await transaction.delete_tenant("gone")
        for name, mechanism, password_hash in (
            ("p", "PLAIN", "$2a$10$x"),
            ("e", "EXTERNAL", None),
            ("no", "PLAIN", ""),
        ):
            await transaction.put_identity(
                Identity(
                    name=name,
                    mechanism=mechanism,
                    password_hash=password_hash,
                    authorities={"r:*": "W"},
                    created=CREATED,
                )
            )
        await transaction.delete_identity("no")
        await transaction.put_operator(
            Operator(name="alice", password_hash="$2a$10$y", may_reveal_secrets=True, created=CREATED)
        )

    await store.write(work)


async def fill_devices(store: Store, number: int, tenant_id: str = "many") -> None:
    await store.write(lambda transaction: transaction.insert_tenant(stored_tenant(tenant_id)))
    made = credential("psk", "x")
    for start in range(0, number, 1000):
        devices = [
            (
                stored_device(tenant_id, f"d{n:06}", {"ext": {"n": n % 7, "serial": f"s{n}"}}),
                stored_credentials(tenant_id, f"d{n:06}", [replace(made, auth_id=f"d{n:06}")]),
            )
            for n in range(start, min(start + 1000, number))
        ]
        await store.write(partial(_insert_devices, devices=devices))


async def _insert_devices(transaction: Transaction, devices: Sequence[tuple[StoredDevice, StoredCredentials]]) -> None:
    await transaction.insert_devices(devices)


QUERIES = [
    Query(),
    Query(is_gateway=True),
    Query(filters=(Filter(pointer=("ext", "n"), value=7),)),
    Query(filters=(Filter(pointer=("ext", "nul\0name"), value="a\0*"),)),
    Query(sorts=(Sort(pointer=("ext", "n"), descending=True),)),
    Query(page_offset=1, page_size=1),
]


async def observe(store: Store) -> object:
    """All that callers can find out, in whatever database."""
    lookups = store.lookups
    found: list[object] = []

    async def read(transaction: Transaction) -> None:
        for tenant_id in ("plain", "odd", "a", "b", "gone"):
            found.append(await transaction.find_tenant(tenant_id))
            found.append(await transaction.count_devices(tenant_id))
            for device_id in ("odd", "gateway", "behind", "not-yet"):
                found.append(await transaction.find_device(tenant_id, device_id))
                found.append(await transaction.find_credentials(tenant_id, device_id))
        found.append(await transaction.list_identities())
        found.append(await transaction.has_had_identities())
        found.append(await transaction.list_operators())

    await store.read(read)
    found += [await lookups.find_tenant(name) for name in ("plain", "odd", "al-1", "gone", "free")]
    found += [await lookups.find_tenants_by_anchor("", name) for name in ("CN=CA", "cn=ca", "CN=" + "n" * 1000)]
    for tenant_id in ("odd", "a", "gone"):
        found.append(await lookups.find_group_members(tenant_id, ["g1", "g2"]))
        found += [await lookups.find_registration(tenant_id, name) for name in ("odd", "gateway", "not-yet")]
        found += [await lookups.find_credential(tenant_id, "psk", auth_id) for auth_id in AUTH_IDS]
    found.append(await lookups.find_operator("alice"))
    return found


async def search(store: Store) -> object:
    async def work(searches: Searches) -> object:
        found: list[object] = [await searches.count(), await searches.find_tenants(Query())]
        for tenant_id in ("odd", "a", "gone"):
            found += [await searches.find_devices(tenant_id, query) for query in QUERIES]
        return found

    return await store.search(work)


async def records(store: Store) -> dict[RecordKind, list[Record]]:
    async def work(transaction: Transaction) -> dict[RecordKind, list[Record]]:
        return {kind: await transaction.list_records(kind, (), 10**6) for kind in RecordKind}

    return await store.read(work)


TABLES = (
    *("tenants", "tenant_aliases", "trust_anchor_names", "trust_anchors", "tenant_usage", "tenant_members", "devices"),
    *("device_groups", "device_members", "credential_sets", "credentials", "identities", "operators", "milestones"),
    "unfinished_copies",
)


def tables(url: str) -> dict[str, Sequence[tuple[object, ...]]]:
    """Every row that there is, but for the ranges of ids, which may be cut otherwise."""
    found: dict[str, Sequence[tuple[object, ...]]] = {
        table: sorted(query(url, f"SELECT * FROM {table}"), key=repr) for table in TABLES
    }
    ranges = "SELECT tenant_id, sum(devices), min(first_id) FROM device_ranges GROUP BY tenant_id ORDER BY tenant_id"
    return found | {"device_ranges": query(url, ranges)}


def copy(source: str, target: str, *options: str, expect_status: int = 0) -> subprocess.CompletedProcess[str]:
    return kamado("copy", "--from", source, "--to", target, *options, expect_status=expect_status)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_registry_is_the_same_after_the_way_there_and_back(places: Places, way: tuple[str, str, str]) -> None:
    first, second, third = (places.new(kind) for kind in way)
    run(with_store(first, fill))
    before = tables(first)
    assert "Both databases are equal" in copy(first, second).stdout
    copy(second, third)
    assert tables(first) == before
    assert tables(third) == before
    seen = run(with_store(first, observe))
    assert run(with_store(second, observe)) == seen
    assert run(with_store(third, observe)) == seen
    assert run(with_store(second, records)) == run(with_store(first, records))
    found = run(with_store(first, search))
    assert run(with_store(second, search)) == found
    assert run(with_store(third, search)) == found


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_many_devices_are_the_same_after_the_way_there_and_back(places: Places, way: tuple[str, str, str]) -> None:
    first, second, third = (places.new(kind) for kind in way)
    run(with_store(first, partial(fill_devices, number=4500)))
    copy(first, second)
    copy(second, third)
    assert tables(third) == tables(first)
    assert run(with_store(second, records)) == run(with_store(first, records))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_devices_at_once_are_like_one_after_the_other(places: Places, kind: str) -> None:
    devices = [
        (
            stored_device("t", f"d{n}", {"ext": {"n": n}, "memberOf": ["g"]} if n % 2 else {}),
            stored_credentials(
                "t", f"d{n}", [replace(PSK, auth_id=f"{LONG}{n}"), credential("custom", f"d{n}")][: n % 3]
            ),
        )
        for n in range(20)
    ]

    async def one_by_one(transaction: Transaction) -> None:
        for device, credentials in devices:
            await transaction.insert_device(device, credentials)

    at_once, slowly = places.new(kind), places.new(kind)
    run(with_store(at_once, lambda store: store.write(lambda tx: tx.insert_devices(devices))))
    run(with_store(slowly, lambda store: store.write(one_by_one)))
    assert tables(at_once) == tables(slowly)


# Interrupted

UNFINISHED = StoreSettings(may_be_unfinished=True, statement_timeout=60.0)


async def copy_pages(source: str, target: str, pages: int) -> None:
    """Copy until so many pages are there, then stop."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > pages

    async def work(ours: Store) -> None:
        async def go(theirs: Store) -> None:
            note = await transfer.begin(ours, theirs)
            with suppress(transfer.Stopped):
                await transfer.copy(ours, theirs, note, progress=lambda *_: None, should_stop=should_stop)

        await with_store(target, go, UNFINISHED)

    await with_store(source, work)


def state_of(url: str) -> str | None:
    """What the target says of the copy; `None` before and after."""
    if url.startswith("sqlite:") and not Path(url.removeprefix("sqlite:///")).exists():
        return None
    try:
        rows = query(url, "SELECT state FROM unfinished_copies")
    except (sqlite3.OperationalError, asyncpg.UndefinedTableError):  # which is not there yet
        return None
    return cast(str, rows[0][0]) if rows else None


@contextmanager
def copying(source: str, target: str) -> Iterator[subprocess.Popen[str]]:
    """Start a copy and suspend it when the target has some of the devices; it comes no further while this looks."""
    command = [sys.executable, "-m", "kamado", "copy", "--from", source, "--to", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:

        def is_under_way() -> bool:
            process.send_signal(signal.SIGSTOP)
            if '"devices"' in (state_of(target) or ""):
                return True
            process.send_signal(signal.SIGCONT)
            return False

        try:
            poll(is_under_way, what="a first page of devices")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("target_kind", "sign"),
    [
        ("sqlite", signal.SIGKILL),
        ("postgresql", signal.SIGKILL),
        ("sqlite", signal.SIGTERM),
        ("postgresql", signal.SIGINT),
    ],
)
def test_a_copy_that_was_ended_goes_on(places: Places, target_kind: str, sign: signal.Signals) -> None:
    source, target = places.new("sqlite"), places.new(target_kind)
    run(with_store(source, fill))
    run(with_store(source, partial(fill_devices, number=10_000)))
    with copying(source, target) as process:
        process.send_signal(sign)
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=120)
    if sign is signal.SIGKILL:
        assert process.returncode == -sign
    else:
        assert process.returncode == 128 + sign
        assert "The same command goes on" in errors
    assert output == ""
    (before,) = query(target, "SELECT count(*) FROM devices")
    assert 0 < cast(int, before[0]) < 10_009
    refused = kamado("serve", "--set", f"storage.url={target}", expect_status=69)
    assert "unfinished copy" in refused.stdout + refused.stderr
    result = copy(source, target)
    assert "Going on after" in result.stderr
    assert "Both databases are equal" in result.stdout
    assert run(with_store(target, records)) == run(with_store(source, records))


def test_a_copy_whose_target_is_lost_goes_on(places: Places) -> None:
    source = places.new("sqlite")
    run(with_store(source, partial(fill_devices, number=10_000)))
    with PostgresqlServer() as server:
        target = server.create_database()
        with copying(source, target) as process:
            server.kill()
            process.send_signal(signal.SIGCONT)
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 69
        assert "The same command goes on where it stopped" in errors
        assert output == ""
        server.start()
        assert "Going on after" in copy(source, target).stderr
        assert run(with_store(target, records)) == run(with_store(source, records))


def test_an_unfinished_copy_is_not_used(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, fill))
    run(copy_pages(source, target, 1))
    with pytest.raises(UnfinishedCopy):
        run(with_store(target, observe))
    settings = ("--set", f"storage.url={target}")
    for command in (("identity", "add", "new"), ("operator", "list"), ("explain", "tenant", "plain")):
        assert "unfinished copy" in kamado(*command, *settings, expect_status=69).stderr
    # Nor is it a source.
    assert "unfinished copy" in copy(target, places.new("sqlite"), expect_status=69).stderr
    assert "is only in the source" in copy(source, target, "--check", expect_status=1).stderr
    copy(source, target)
    run(with_store(target, observe))


def test_a_copy_of_another_source_does_not_go_on(places: Places) -> None:
    source, other, target = (places.new("sqlite") for _ in range(3))
    run(with_store(source, fill))
    run(with_store(other, fill))
    run(copy_pages(source, target, 2))
    before = tables(target)
    assert "another database" in copy(other, target, expect_status=1).stderr
    assert tables(target) == before


@pytest.mark.parametrize("kind", RecordKind)
def test_a_target_that_holds_anything_is_refused(places: Places, kind: RecordKind) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, fill))
    some = run(with_store(source, records))[kind][:1]

    async def work(transaction: Transaction) -> None:
        if kind is RecordKind.CREDENTIAL:
            tenant_id, _, _, device_id = cast(tuple[str, ...], some[0][:4])
            await transaction.insert_records(RecordKind.CREDENTIALS, [(tenant_id, device_id, "v")])
        await transaction.insert_records(kind, some)

    run(with_store(target, lambda store: store.write(work)))
    before = tables(target)
    assert "must be empty" in copy(source, target, expect_status=1).stderr
    assert tables(target) == before


def test_two_copies_into_one_target_do_not_mix(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, fill))
    run(copy_pages(source, target, 0))

    async def work(ours: Store) -> None:
        async def go(theirs: Store) -> None:
            note = await transfer.begin(ours, theirs)
            further = replace(note, kind=RecordKind.DEVICE)
            await theirs.write(lambda transaction: transaction.put_copy(further))
            with pytest.raises(Conflict):
                await transfer.copy(ours, theirs, note, progress=lambda *_: None, should_stop=lambda: False)
            assert await theirs.read(lambda transaction: transaction.find_copy()) == further

        await with_store(target, go, UNFINISHED)

    run(with_store(source, work))
    assert query(target, "SELECT count(*) FROM tenants") == [(0,)]


def test_progress_is_told_of_all_records(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, partial(fill_devices, number=2500)))
    run(copy_pages(source, target, 3))
    told: list[tuple[int, int]] = []

    async def work(ours: Store) -> CopyNote:
        async def go(theirs: Store) -> CopyNote:
            note = await transfer.begin(ours, theirs)
            return await transfer.copy(
                ours, theirs, note, progress=lambda *now: told.append(now), should_stop=lambda: False
            )

        return await with_store(target, go, UNFINISHED)

    note = run(with_store(source, work))
    assert note.kind is None
    assert told[0] == (2001, 7501)  # a tenant and two pages of devices; each device has a set and a credential
    assert told[-1] == (7501, 7501)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


# Somebody who has had the target open since before the copy began


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_nobody_else_writes_to_a_target_that_was_open_before(places: Places, kind: str) -> None:
    source, target = places.new("sqlite"), places.new(kind)
    run(with_store(source, fill))

    async def work(others: Store) -> None:
        await others.ping()
        await copy_pages(source, target, 2)
        before = await others.read(lambda transaction: transaction.list_records(RecordKind.TENANT, (), 100))
        for _ in range(2):
            with pytest.raises(Unavailable, match="unfinished copy"):
                await others.write(lambda transaction: transaction.insert_tenant(stored_tenant("new")))
        with pytest.raises(Unavailable, match="unfinished copy"):
            await others.write(
                lambda tx: tx.insert_device(stored_device("a", "new"), stored_credentials("a", "new")),
                device=("a", "new"),
            )
        with pytest.raises(Unavailable, match="unfinished copy"):
            await others.ping()
        assert before == await others.read(lambda transaction: transaction.list_records(RecordKind.TENANT, (), 100))
        result = await asyncio.to_thread(copy, source, target)
        assert "Both databases are equal" in result.stdout
        await others.ping()
        await others.write(lambda transaction: transaction.insert_tenant(stored_tenant("new")))

    run(with_store(target, work))


def test_a_copy_does_not_begin_beside_what_is_being_written(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("postgresql")
    run(with_store(source, fill))

    async def work(others: Store) -> None:
        blocker = await asyncpg.connect(target)
        begun = blocker.transaction()
        await begun.start()
        await blocker.execute("LOCK TABLE tenants IN SHARE MODE")
        writing = asyncio.create_task(others.write(lambda tx: tx.insert_tenant(stored_tenant("new"))))

        async def wait_for_lock(kind: str) -> None:
            waiting = f"SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = '{kind}'"
            await asyncio.to_thread(poll, lambda: query(target, waiting), timeout=60, what="a wait for the lock")

        await wait_for_lock("relation")
        copying = asyncio.create_task(copy_pages(source, target, 1))
        await wait_for_lock("advisory")
        await begun.rollback()
        await writing
        with pytest.raises(Conflict, match="must be empty, and holds tenants"):
            await copying
        await blocker.close()
        await others.write(lambda transaction: transaction.insert_tenant(stored_tenant("another")))

    run(with_store(target, work, StoreSettings(statement_timeout=60.0)))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_registry_that_runs_on_the_target_is_not_ready_until_the_copy_is_complete(
    places: Places, tmp_path: Path, kind: str
) -> None:
    source, target = places.new("sqlite"), places.new(kind)
    run(with_store(source, fill))
    (tmp_path / "permissions.json").write_text('{"roles": {}, "users": {}}')
    settings = {"auth.permissions_file": str(tmp_path / "permissions.json")}
    with Registry(tmp_path / "registry", settings, url=target) as registry:
        assert registry.health("/readiness").status == 200
        run(copy_pages(source, target, 2))
        refused = registry.request("POST", "/v1/tenants/new")
        assert refused.status == 503
        assert "unfinished copy" in refused.body.decode()
        poll(lambda: registry.health("/readiness").status == 503, timeout=30, what="not ready")
        assert "Both databases are equal" in copy(source, target).stdout
        poll(lambda: registry.health("/readiness").status == 200, timeout=30, what="ready")


# Comparing


@pytest.mark.parametrize("target_kind", ["sqlite", "postgresql"])
def test_the_comparison_lists_the_first_differences(places: Places, target_kind: str) -> None:
    source, target = places.new("sqlite"), places.new(target_kind)
    run(with_store(source, partial(fill_devices, number=3000)))
    copy(source, target)

    async def change(transaction: Transaction) -> None:
        for number in (0, 5, 999, 1000, 2999):
            await transaction.delete_device("many", f"d{number:06}")
        await transaction.insert_device(
            stored_device("many", "d000000x"), stored_credentials("many", "d000000x", [credential("psk", "d000000x")])
        )
        await transaction.update_device(stored_device("many", "d000007"))

    run(with_store(target, lambda store: store.write(change)))
    result = copy(source, target, "--check", expect_status=1)
    assert "devices: many / d000000 is only in the source" in result.stderr
    assert "devices: many / d000000x is only in the target" in result.stderr
    assert "devices: many / d000007 is different" in result.stderr
    assert "and 9 more" in result.stderr  # of 7 devices, 6 sets and 6 credentials
    assert "19 records are not the same" in result.stderr
    assert "copy again" not in result.stderr
    assert result.stdout.split()[:4] == ["1", "tenants", "3,000", "devices"]


def test_a_source_that_was_changed_meanwhile_is_noticed(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, partial(fill_devices, number=2500)))
    run(copy_pages(source, target, 3))
    run(with_store(source, lambda store: store.write(lambda tx: tx.delete_device("many", "d000001"))))
    result = copy(source, target, expect_status=1)
    assert "devices: many / d000001 is only in the target" in result.stderr
    assert "The source was changed meanwhile" in result.stderr
    with pytest.raises(UnfinishedCopy):
        run(with_store(target, observe))


# Databases that are not as they should be


def test_an_older_schema_is_not_touched(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "old" / "kamado.db"
    migrations = load_migrations("sqlite")
    asyncio.run(migrate_sqlite(str(path), StoreSettings(), migrations[:-1]))
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    result = copy(f"sqlite:///{path}", places.new("sqlite"), expect_status=69)
    assert "older schema" in result.stderr
    assert "kamado migrate" in result.stderr
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("options", [(), ("--check",)], ids=str)
def test_a_later_schema_may_have_more_than_can_be_copied(places: Places, options: tuple[str, ...]) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    for url in (source, target):
        run(with_store(url, observe))
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute(
            "INSERT INTO schema_version (version, name, applied, works_with) VALUES (99, 'later', '', 3)"
        )
    assert "the source has schema 99" in copy(source, target, *options, expect_status=1).stderr


def test_a_source_that_is_not_there_is_not_made(places: Places, tmp_path: Path) -> None:
    assert "does not exist" in copy(f"sqlite:///{tmp_path}/no/k.db", places.new("sqlite"), expect_status=69).stderr
    assert not (tmp_path / "no").exists()


def test_a_standby_is_copied_and_compared(places: Places) -> None:
    with PostgresqlServer() as primary, PostgresqlServer(primary=primary) as standby:
        url = primary.create_database()
        run(with_store(url, fill))
        source, target = url.replace(f":{primary.port}/", f":{standby.port}/"), places.new("sqlite")
        lsn = primary.run_sql("SELECT pg_current_wal_lsn()")
        poll(lambda: standby.run_sql(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'") == "t", what="replay")
        copy(source, target)
        copy(target, source, "--check")


def test_a_target_that_cannot_be_reached_is_told_without_its_password(places: Places) -> None:
    source = places.new("sqlite")
    run(with_store(source, fill))
    result = copy(source, "postgresql://kamado:geheim@127.0.0.1:1/kamado", expect_status=69)
    assert "--to: postgresql://kamado:***@127.0.0.1:1/kamado" in result.stderr
    assert "geheim" not in result.stderr


def test_a_document_that_cannot_be_read_is_told(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    damaged = ("t", "d", "v", 0, None, 0, 0, "{")

    async def work(store: Store) -> None:
        await store.write(lambda transaction: transaction.insert_tenant(stored_tenant("t")))

    run(with_store(source, work))
    with closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("INSERT INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?)", damaged)
    assert "the document in devices of 't', 'd' cannot be read" in copy(source, target, expect_status=65).stderr


def test_a_clash_with_what_is_there_inserts_nothing(places: Places) -> None:
    url = places.new("sqlite")

    async def work(store: Store) -> None:
        devices = [(stored_device("t", "d"), stored_credentials("t", "d"))]
        await store.write(lambda transaction: transaction.insert_devices(devices))
        more = [(stored_device("t", "a"), stored_credentials("t", "a")), *devices]
        with pytest.raises(Unavailable):
            await store.write(lambda transaction: transaction.insert_devices(more))
        assert await store.read(lambda transaction: transaction.count_devices("t")) == 1

    run(with_store(url, work))


# The command line


def test_urls_come_from_files_and_variables_too(places: Places, tmp_path: Path) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, fill))
    (tmp_path / "from").write_text(f"{source}\n")
    kamado("copy", "--from", f"@{tmp_path / 'from'}", environment={"KAMADO_COPY_TO": target})
    variables = {"KAMADO_COPY_FROM": f"@{tmp_path / 'from'}", "KAMADO_COPY_TO": target}
    kamado("copy", "--check", environment=variables)
    # These are no settings.
    kamado("check-config", "--set", f"storage.url={source}", environment=variables)


def test_wrong_usage(places: Places, tmp_path: Path) -> None:
    url = places.new("sqlite")
    assert "are the same" in copy(url, url, expect_status=2).stderr
    (tmp_path / "empty").write_text("\n")
    assert "there is no URL" in copy(f"@{tmp_path / 'empty'}", url, expect_status=2).stderr
    for wrong in ("mysql://x/y", "postgresql://u:pa/ssw0rd@h/d", "postgresql://h:x/d", "postgresql://[::1/d", "x"):
        result = copy(url, wrong, expect_status=2)
        assert "--to: " in result.stderr
        assert not any(word in result.stderr for word in ("Traceback", "pa/ss", "ssw0rd"))
    kamado("copy", "--from", url, expect_status=2)


def test_a_terminal_sees_a_bar(places: Places) -> None:
    source, target = places.new("sqlite"), places.new("sqlite")
    run(with_store(source, partial(fill_devices, number=2000)))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kamado", "copy", "--from", source, "--to", target],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # the terminal is gone
        while some := os.read(ours, 65536):
            seen += some
    os.close(ours)
    assert process.wait(60) == 0
    for text in (b"Copying", b"Comparing", b"6,001 records"):
        assert text in seen
