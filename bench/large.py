"""A tenant with very many devices, for what must not depend on how many there are: searches, and deleting them all."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPConnection
from urllib.parse import urlencode

from rich.console import Console
from rich.progress import Progress

from kamado.credentials import CredentialRules, merge, parse_credentials
from kamado.devices import parse_device
from kamado.document import Identifiers, new_id
from kamado.storage import StoreSettings, open_store
from kamado.store import StoredCredentials, StoredDevice, StoredTenant, Transaction
from kamado.tenants import Tenant

__all__ = ["delete_all", "fill", "searches", "some_device_ids"]

_SLICE = 5000
_MAX_LOOKED_AT = 2_000_000
"""Devices up to which searches that look at all of them are measured."""


def fill(url: str, tenant_id: str, number: int, *, with_credentials: bool, console: Console) -> None:
    """Put devices into the database, in a random order, unless they are there already."""
    asyncio.run(_fill(url, tenant_id, number, with_credentials=with_credentials, console=console))


async def _fill(url: str, tenant_id: str, number: int, *, with_credentials: bool, console: Console) -> None:
    now = datetime.now(UTC)
    rules = CredentialRules(identifiers=Identifiers())
    order = list(range(number))
    random.Random(1).shuffle(order)
    # So many rows take a while.
    store = await open_store(url, StoreSettings(statement_timeout=60.0))
    try:
        if await store.read(lambda transaction: transaction.count_devices(tenant_id)) == number:
            return
        if await store.lookups.find_tenant(tenant_id) is None:
            tenant = StoredTenant(tenant_id=tenant_id, version=new_id(), created=now, tenant=Tenant())
            await store.write(lambda transaction: transaction.insert_tenant(tenant))
        with Progress(console=console, transient=True) as bar:
            for start in bar.track(range(0, number, _SLICE), description=f"Filling {tenant_id}"):
                devices = [
                    _device(tenant_id, index, number, now, rules if with_credentials else None)
                    for index in order[start : start + _SLICE]
                ]
                await store.write(partial(_insert, devices))
    finally:
        await store.close()


async def _insert(devices: list[tuple[StoredDevice, StoredCredentials]], transaction: Transaction) -> None:
    await transaction.insert_devices(devices)


def _device(
    tenant_id: str, index: int, number: int, now: datetime, rules: CredentialRules | None
) -> tuple[StoredDevice, StoredCredentials]:
    """Make a device, with a credential if there are rules for one."""
    device = StoredDevice(
        tenant_id=tenant_id,
        device_id=_device_id(index),
        version=new_id(),
        created=now,
        device=parse_device(_document(index, number)),
    )
    psk = {"type": "psk", "auth-id": _device_id(index), "secrets": [{"key": "AAAA"}]}
    update = () if rules is None else parse_credentials([psk], rules=rules, trust_anchors=(), now=now)
    credentials = StoredCredentials(
        tenant_id=tenant_id,
        device_id=_device_id(index),
        version=new_id(),
        credentials=tuple(merge((), update)),
    )
    return device, credentials


def some_device_ids(number: int, some: int) -> list[str]:
    """Return the ids of some of the devices, in no order."""
    return [_device_id(index) for index in random.Random(3).sample(range(number), some)]


def _device_id(index: int) -> str:
    return f"device-{index:07}"


def _document(index: int, number: int) -> dict[str, object]:
    """One of 20 brands, one of 1,000 sites, a serial number of its own; every second one behind one of 500 gateways."""
    ext = {
        "serial": f"SN-{index * 7919 % number:08}",
        "brand": f"brand-{index % 20:02}",
        "site": f"site-{index % 1000:04}",
        "n": index % 100,
    }
    return {"ext": ext} | ({"via": [_device_id(index % 500)]} if index % 2 else {})


def searches(tenant_id: str, number: int) -> Iterator[tuple[str, list[str], float | None]]:
    """Return what is asked for: a name, the requests, and in how many ms 99 of 100 should be answered."""
    dice = random.Random(2)

    def requests(count: int, **parameters: object) -> list[str]:
        return [_request(tenant_id, parameters, dice, number) for _ in range(count)]

    yield "page of 30 by id, any offset", requests(2000, pageOffset=None), 50
    yield "filter: serial number, 1 match", requests(2000, filterJson=("/ext/serial", "SN-{:08}")), 100
    yield f"filter: site, {number // 1000:,} matches", requests(1000, filterJson=("/ext/site", "site-{:04}")), 100
    yield f"filter: brand, {number // 20:,} matches", requests(300, filterJson=("/ext/brand", "brand-{:02}")), 100
    yield "filter: serial number by prefix, 100 matches", requests(1000, filterJson=("/ext/serial", "SN-{:06}*")), 100
    yield "filter: ids by prefix, 1,000 matches", requests(1000, filterJson=("/id", "device-{:04}*")), 100
    yield f"gateways, {min(500, number):,} matches", requests(300, isGateway="true"), None
    if number > _MAX_LOOKED_AT:
        return  # what follows would take longer than a search may
    yield (
        "filter: end of the serial number, all values looked at",
        requests(8, filterJson=("/ext/serial", "*{:03}")),
        None,
    )
    yield "order: by a number, all devices sorted", requests(4, sortJson="/ext/n"), None


_MODULI = {"/ext/site": 1000, "/ext/brand": 20, "/id": 1000}


def _request(tenant_id: str, parameters: dict[str, object], dice: random.Random, number: int) -> str:
    written: dict[str, object] = {}
    for name, value in parameters.items():
        if name == "pageOffset":
            written[name] = dice.randrange(number)
        elif isinstance(value, tuple):
            field, form = value
            modulus = _MODULI.get(field, number)
            if form.endswith("*"):
                modulus = max(1, number // (1000 if field == "/id" else 100))
            elif form.startswith("*"):
                modulus = 1000
            written[name] = json.dumps({"field": field, "value": form.format(dice.randrange(modulus))})
        elif name == "sortJson":
            written[name] = json.dumps({"field": value})
        else:
            written[name] = value
    return f"GET /v1/devices/{tenant_id}?{urlencode(written)}\t"


def delete_all(port: int, tenant_id: str) -> float:
    """Delete all devices of a tenant; return the seconds it took."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("DELETE", f"/v1/devices/{tenant_id}")
    status = connection.getresponse().status
    connection.close()
    if status != 204:
        raise SystemExit(f"deleting all devices was answered with {status}")
    return time.perf_counter() - started
