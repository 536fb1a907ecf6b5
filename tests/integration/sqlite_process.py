"""Processes of their own that use a SQLite registry, for tests of storage: `python sqlite_process.py TASK PATH`."""

import asyncio
import json
import os
import resource
import sys
from contextlib import suppress
from datetime import UTC, datetime

from kamado.connections import Connections, ConnectionTransaction, DeviceConnection
from kamado.devices import parse_device
from kamado.document import new_id
from kamado.errors import Conflict, Unavailable
from kamado.storage import StoreSettings, open_connections
from kamado.storage.migrations import load_migrations
from kamado.storage.sqlite import open_sqlite
from kamado.storage.volatile import SqliteConnections, connections_path
from kamado.store import Store, StoredCredentials, StoredDevice, StoredTenant
from kamado.tenants import parse_tenant

TENANT = "acme"
NOBODY = 65534
PATIENT = StoreSettings(busy_timeout=60.0)
"""For processes that must not end by themselves, however busy the machine is."""


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def ensure_tenant(store: Store) -> None:
    tenant = StoredTenant(tenant_id=TENANT, version=new_id(), created=datetime.now(UTC), tenant=parse_tenant({}))
    with suppress(Conflict):  # another process was faster
        await store.write(lambda tx: tx.insert_tenant(tenant))


async def create_device(store: Store, size: int = 0) -> str:
    device_id = new_id()
    document = {"ext": {"filling": "x" * size}} if size else {}
    device = StoredDevice(
        tenant_id=TENANT,
        device_id=device_id,
        version=new_id(),
        created=datetime.now(UTC),
        device=parse_device(document),
    )
    credentials = StoredCredentials(tenant_id=TENANT, device_id=device_id, version=new_id())
    await store.write(lambda tx: tx.insert_device(device, credentials))
    return device_id


async def write_for_ever(path: str) -> None:
    """Create devices, several at a time, and print the id of each that is acknowledged."""
    store = await open_sqlite(path, PATIENT)
    await ensure_tenant(store)

    async def write() -> None:
        while True:
            say(await create_device(store))

    await asyncio.gather(*(write() for _ in range(8)))


async def write_without_pause(path: str) -> None:
    """Create devices, so many at a time that some are always waiting; print a line when it has begun."""
    store = await open_sqlite(path, PATIENT)
    await ensure_tenant(store)
    await create_device(store)
    say("begun")

    async def write() -> None:
        while True:
            await create_device(store)

    await asyncio.gather(*(write() for _ in range(200)))


async def write_some(path: str) -> None:
    """Create devices, several at a time, and end without closing anything."""
    store = await open_sqlite(path, PATIENT)
    await ensure_tenant(store)

    async def write() -> None:
        for _ in range(25):
            say(await create_device(store))

    await asyncio.gather(*(write() for _ in range(8)))


async def run_out_of_space(path: str) -> None:
    """Write until no file may grow any more, look whether all else works, then go on with more space."""
    store = await open_sqlite(path, PATIENT)
    await ensure_tenant(store)
    acknowledged = []
    errors: set[str] = set()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    for _ in range(1000):
        outcomes = await asyncio.gather(*(create_device(store, 2000) for _ in range(10)), return_exceptions=True)
        acknowledged += [outcome for outcome in outcomes if isinstance(outcome, str)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert all(isinstance(failure, Unavailable) for failure in failures), failures
        errors |= set(map(str, failures))
        if failures:
            break
    counted = await store.read(lambda tx: tx.count_devices(TENANT))
    readable = [await store.lookups.find_registration(TENANT, each) is not None for each in acknowledged]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    afterwards = await create_device(store, 2000)
    await store.close()
    say(
        json.dumps(
            {
                "acknowledged": [*acknowledged, afterwards],
                "errors": sorted(errors),
                "counted": counted,
                "readable": all(readable),
            }
        )
    )


async def open_without_rights(path: str) -> None:
    """Open the database as somebody to whom file modes apply, and print what is said."""
    migrations = load_migrations("sqlite")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        store = await open_sqlite(path, StoreSettings(busy_timeout=0.2), migrations)
    except Unavailable as error:
        say(f"{type(error).__name__}: {error}")
    else:
        await store.close()
        say("opened")


async def connect(connections: Connections, device_id: str) -> None:
    """Keep a device's gateway."""

    async def put(transaction: ConnectionTransaction) -> None:
        entry = DeviceConnection("gateway" * 30, datetime.now(UTC))
        await transaction.insert_connection(TENANT, device_id, entry)

    await connections.write(put)


async def connect_for_ever(path: str) -> None:
    """Keep gateways, several at a time, and print the id of each device that is acknowledged."""
    connections = await open_connections(f"sqlite:///{path}")

    async def write() -> None:
        while True:
            device_id = new_id()
            with suppress(Unavailable):  # the other process had the lock for too long
                await connect(connections, device_id)
                say(device_id)

    await asyncio.gather(*(write() for _ in range(8)))


async def connect_without_space(path: str) -> None:
    """Keep gateways until no file may grow any more, look whether all else works, then go on with more space."""
    connections = await open_connections(f"sqlite:///{path}")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    kept: list[str] = []
    errors: set[str] = set()
    while not errors:
        ids = [new_id() for _ in range(100)]
        outcomes = await asyncio.gather(*(connect(connections, each) for each in ids), return_exceptions=True)
        kept += [each for each, outcome in zip(ids, outcomes, strict=True) if outcome is None]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert all(isinstance(failure, Unavailable) for failure in failures), failures
        errors |= set(map(str, failures))
    readable = [await connections.find_connection(TENANT, each) is not None for each in kept]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await connect(connections, "afterwards")
    afterwards = await connections.find_connection(TENANT, "afterwards") is not None
    await connections.close()
    say(json.dumps({"errors": sorted(errors), "readable": all(readable), "afterwards": afterwards}))


async def connect_without_rights(path: str) -> None:
    """Open device connections as somebody to whom file modes apply, and print what comes of a use."""
    connections = SqliteConnections(connections_path(path), lambda *_: None)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    await connections.open()
    try:
        await connections.find_connection(TENANT, "d")
    except Unavailable as error:
        say(f"{type(error).__name__}: {error}")
    else:
        say("opened")
    await connections.close()


TASKS = {
    task.__name__: task
    for task in (
        write_for_ever,
        write_without_pause,
        write_some,
        run_out_of_space,
        open_without_rights,
        connect_for_ever,
        connect_without_space,
        connect_without_rights,
    )
}

if __name__ == "__main__":
    asyncio.run(TASKS[sys.argv[1]](sys.argv[2]))
