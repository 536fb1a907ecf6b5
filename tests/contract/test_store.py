"""What every engine behind `Store` promises. The tests know none of them."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

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
from tests.databases import Databases

from kamado.credentials import Credential, stored_document
from kamado.devices import device_document
from kamado.document import JsonObject, new_id
from kamado.errors import Conflict, NotFound, Unavailable
from kamado.search import Query
from kamado.storage import StoreSettings, open_store, sql
from kamado.store import (
    Change,
    ChangeKind,
    DeviceLimitReached,
    Found,
    FoundDevice,
    Identity,
    Operator,
    OperatorRow,
    Searches,
    Store,
    StoredCredentials,
    StoredDevice,
    StoredTenant,
    Transaction,
)
from kamado.tenants import parse_tenant, tenant_document
from kamado.x509 import DistinguishedName


class Engine:
    """A database of a test's own."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self, settings: StoreSettings | None = None) -> Store:
        """Open it, once more each time; nothing is refused because the machine is busy."""
        patient = replace(settings or StoreSettings(), statement_timeout=20, acquire_timeout=20, busy_timeout=60)
        return await open_store(self._url, patient)


@pytest.fixture
def engine(databases: Databases, tmp_path: Path) -> Iterator[Engine]:
    url = databases.create(tmp_path)
    yield Engine(url)
    databases.drop(url)


def with_store(test: Callable[[Store], Awaitable[None]]) -> Callable[[Engine], None]:
    """Make a coroutine function of an open store a test of each engine."""

    async def opened(engine: Engine) -> None:
        store = await engine.open()
        try:
            await test(store)
        finally:
            await store.close()

    def run(engine: Engine) -> None:
        asyncio.run(opened(engine))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def with_two_stores(test: Callable[[Store, Store], Awaitable[None]]) -> Callable[[Engine], None]:
    """The same for two stores on one database, as two processes have them."""

    async def opened(engine: Engine) -> None:
        first, second = await asyncio.gather(engine.open(), engine.open())
        try:
            await test(first, second)
        finally:
            await first.close()
            await second.close()

    def run(engine: Engine) -> None:
        asyncio.run(opened(engine))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def insert_tenant(store: Store, stored: StoredTenant) -> None:
    await store.write(lambda tx: tx.insert_tenant(stored))


async def update_tenant(store: Store, stored: StoredTenant) -> None:
    await store.write(lambda tx: tx.update_tenant(stored))


async def delete_tenant(store: Store, tenant_id: str) -> None:
    await store.write(lambda tx: tx.delete_tenant(tenant_id))


async def find_tenant(store: Store, tenant_id: str) -> StoredTenant | None:
    return await store.read(lambda tx: tx.find_tenant(tenant_id))


async def find_clash(store: Store, stored: StoredTenant) -> str | None:
    return await store.read(lambda tx: tx.find_trust_anchor_clash(stored.tenant_id, stored.tenant))


async def insert_device(store: Store, stored: StoredDevice, credentials: Sequence[Credential] = ()) -> None:
    set_ = stored_credentials(stored.tenant_id, stored.device_id, credentials)
    await store.write(lambda tx: tx.insert_device(stored, set_))


async def find_device(store: Store, tenant_id: str, device_id: str) -> StoredDevice | None:
    return await store.read(lambda tx: tx.find_device(tenant_id, device_id))


async def count_devices(store: Store, tenant_id: str) -> int:
    return await store.read(lambda tx: tx.count_devices(tenant_id))


async def find_credentials(store: Store, tenant_id: str, device_id: str) -> StoredCredentials | None:
    return await store.read(lambda tx: tx.find_credentials(tenant_id, device_id))


async def names_of_tenants(store: Store, name: str | bytes) -> list[str]:
    """Look tenants up by the name of a trust anchor."""
    dn = DistinguishedName.from_text(name) if isinstance(name, str) else DistinguishedName.from_der(name)
    return [row.tenant_id for row in await store.lookups.find_tenants_by_anchor(dn.canonical_key, dn.text)]


# Tenants


@with_store
async def test_a_tenant_is_found_as_it_was_inserted(store: Store) -> None:
    document = {
        "enabled": False,
        "alias": "plant",
        "ext": {"customer": "Example GmbH", "größe": [1, 2.5, None, "\u0000\U0001f600"]},
        "adapters": [{"type": "hono-mqtt", "enabled": True}],
        "registration-limits": {"max-devices": 7},
    }
    inserted = replace(stored_tenant("plant-7", document), updated=UPDATED)
    await insert_tenant(store, inserted)
    found = await find_tenant(store, "plant-7")
    assert found == inserted
    assert found is not None
    assert (found.created, found.updated) == (CREATED, UPDATED)
    assert await store.write(lambda tx: tx.find_tenant("plant-7")) == inserted
    assert await find_tenant(store, "plant") is None  # the alias does not count
    assert await find_tenant(store, "PLANT-7") is None  # byte by byte: management 3.2


@with_store
async def test_a_tenant_id_is_taken_once(store: Store) -> None:
    first = stored_tenant("acme", {"ext": {"n": 1}})
    await insert_tenant(store, first)
    with pytest.raises(Conflict, match="acme"):
        await insert_tenant(store, stored_tenant("acme"))
    assert await find_tenant(store, "acme") == first


@with_store
async def test_an_updated_tenant_is_replaced(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme", {"alias": "old", "ext": {"n": 1}}))
    second = replace(stored_tenant("acme", {"alias": "new", "enabled": False}), updated=UPDATED)
    await update_tenant(store, second)
    assert await find_tenant(store, "acme") == second
    assert await store.lookups.find_tenant("old") is None
    row = await store.lookups.find_tenant("new")
    assert row is not None
    assert (row.tenant_id, row.version) == ("acme", second.version)
    assert json.loads(row.document) == tenant_document(second.tenant)


@with_store
async def test_a_version_that_comes_back_with_other_content_is_read_anew(store: Store) -> None:
    first = stored_tenant("acme", {"ext": {"n": 1}})
    await insert_tenant(store, first)
    assert await store.write(lambda tx: tx.find_tenant("acme")) == first
    second = replace(first, tenant=parse_tenant({"ext": {"n": 2}}))
    await update_tenant(store, second)
    assert await store.write(lambda tx: tx.find_tenant("acme")) == second


@with_store
async def test_parsed_tenants_are_kept_by_the_size_of_their_text(store: Store) -> None:
    """Parsed, a tenant takes some 15 times the space of its text."""

    async def is_kept(tenant_id: str, before: StoredTenant | None) -> bool:
        found = await find_tenant(store, tenant_id)
        assert found is not None
        assert before == found
        return found.tenant is before.tenant

    async def read(tenant_id: str, size: int) -> StoredTenant | None:
        await insert_tenant(store, stored_tenant(tenant_id, {"ext": {"filling": "x" * size}}))
        return await find_tenant(store, tenant_id)

    small = [(f"small-{number}", await read(f"small-{number}", 10)) for number in range(100)]
    assert all([await is_kept(*one) for one in small])
    large = [(f"large-{number}", await read(f"large-{number}", 100_000)) for number in range(20)]
    assert await is_kept(*large[-1])
    assert sum([await is_kept(*one) for one in reversed(large)]) <= 10
    last = await read("last", 100_000)
    huge = await read("huge", 300_000)
    assert not await is_kept("huge", huge)
    assert await is_kept("last", last), "it is worth no others"


@with_store
async def test_whether_there_are_tenants(store: Store) -> None:
    assert not await store.read(lambda tx: tx.has_tenants())
    await insert_tenant(store, stored_tenant("acme"))
    assert await store.read(lambda tx: tx.has_tenants())
    await delete_tenant(store, "acme")
    assert not await store.read(lambda tx: tx.has_tenants())


@with_store
async def test_an_alias_is_taken_once(store: Store) -> None:
    """Management 4.7, row `alias`: on create and on update; deleting the holder frees it."""
    await insert_tenant(store, stored_tenant("a", {"alias": "shared"}))
    with pytest.raises(Conflict, match=r"alias.*shared"):
        await insert_tenant(store, stored_tenant("b", {"alias": "shared"}))
    assert await find_tenant(store, "b") is None
    b = stored_tenant("b", {"alias": "other"})
    await insert_tenant(store, b)
    with pytest.raises(Conflict, match=r"alias.*shared"):
        await update_tenant(store, stored_tenant("b", {"alias": "shared"}))
    assert await find_tenant(store, "b") == b
    await update_tenant(store, stored_tenant("b", {"alias": "other", "enabled": False}))
    await delete_tenant(store, "a")
    await update_tenant(store, stored_tenant("b", {"alias": "shared"}))
    await insert_tenant(store, stored_tenant("c", {"alias": "other"}))


@with_store
async def test_a_look_up_prefers_the_id_to_the_alias(store: Store) -> None:
    """Management 4.7: an alias may equal the id of another tenant."""
    await insert_tenant(store, stored_tenant("a", {"alias": "b"}))
    row = await store.lookups.find_tenant("b")
    assert row is not None
    assert row.tenant_id == "a"
    await insert_tenant(store, stored_tenant("b"))
    row = await store.lookups.find_tenant("b")
    assert row is not None
    assert row.tenant_id == "b"
    assert await store.lookups.find_tenant("c") is None


# Trust anchors: management 4.7, equality as in provisioning 7.6

DC_IA5 = bytes.fromhex("30133111300f060a0992268993f22c640119160161")
"""DC=a with the string type IA5."""
DC_UTF8 = bytes.fromhex("30133111300f060a0992268993f22c6401190c0161")
"""DC=a with the string type UTF8: another canonical key, the same text."""

LONG = ",".join(f"{keyword}={'x' * 240}" for keyword in ("CN", "OU", "O"))

CLASHES: list[tuple[str, str | bytes, str | None, str | bytes, str | None, bool]] = [
    ("neither has a group", "CN=ca,O=Acme", None, "CN=ca,O=Acme", None, True),
    ("one group", "CN=ca,O=Acme", "g", "CN=ca,O=Acme", "g", False),
    ("two groups", "CN=ca,O=Acme", "g", "CN=ca,O=Acme", "h", True),
    ("only the first has a group", "CN=ca,O=Acme", "g", "CN=ca,O=Acme", None, True),
    ("only the second has a group", "CN=ca,O=Acme", None, "CN=ca,O=Acme", "g", True),
    ("a group named like the tenant", "CN=ca,O=Acme", None, "CN=ca,O=Acme", "first", True),
    ("case and spaces, 7.6 row 1", "CN=ca,O=Acme", None, "cn=CA , o=acme", None, True),
    ("order inside an RDN, 7.6 row 3", "CN=a+OU=b,O=c", None, "OU=b+CN=a,O=c", None, True),
    ("order of RDNs, 7.6 row 4", "CN=a,O=b", None, "O=b,CN=a", None, False),
    ("case in DC, 7.6 row 5", "DC=org", None, "DC=ORG", None, False),
    ("equal text only, 7.6 row 6", DC_IA5, None, DC_UTF8, None, True),
    ("equal text only, one group", DC_IA5, "g", DC_UTF8, "g", False),
    ("case in e-mail, 7.6 row 7", "EMAILADDRESS=A@b.c", None, "EMAILADDRESS=a@b.c", None, False),
    ("long names", LONG, None, LONG.upper(), None, True),
    ("long names that differ at the end", LONG + "1", None, LONG + "2", None, False),
]


@pytest.mark.parametrize(
    ("first", "first_group", "second", "second_group", "clash"),
    [row[1:] for row in CLASHES],
    ids=[row[0] for row in CLASHES],
)
def test_a_subject_dn_is_shared_only_inside_a_group(
    engine: Engine,
    first: str | bytes,
    first_group: str | None,
    second: str | bytes,
    second_group: str | None,
    clash: bool,
) -> None:
    @with_store
    async def test(store: Store) -> None:
        a = stored_tenant("first", tenant_with_names("CN=only first", first, group=first_group))
        b = stored_tenant("second", tenant_with_names(second, "CN=only second", group=second_group))
        subject_dn = b.tenant.trust_anchors[0].subject.text
        await insert_tenant(store, a)
        assert await find_clash(store, b) == (subject_dn if clash else None)
        assert await find_clash(store, a) is None, "a tenant does not clash with itself"
        if not clash:
            await insert_tenant(store, b)
            await update_tenant(store, b)
            return
        with pytest.raises(Conflict) as raised:
            await insert_tenant(store, b)
        assert raised.value.details == {"subject-dn": subject_dn}
        assert subject_dn in str(raised.value)
        assert await find_tenant(store, "second") is None
        plain = stored_tenant("second")
        await insert_tenant(store, plain)
        with pytest.raises(Conflict) as raised:
            await update_tenant(store, b)
        assert raised.value.details == {"subject-dn": subject_dn}
        assert await find_tenant(store, "second") == plain
        # Management 4.7: deleting the first frees its name.
        await delete_tenant(store, "first")
        await update_tenant(store, b)

    test(engine)


@with_store
async def test_anchors_of_one_tenant_may_share_a_subject_dn(store: Store) -> None:
    """Management 4.5 (D40)."""
    await insert_tenant(store, stored_tenant("a", tenant_with_names("CN=ca", "CN=ca", "cn=CA")))
    assert await names_of_tenants(store, "CN=ca") == ["a"]


@with_store
async def test_a_tenant_alone_with_a_name_may_change_its_group(store: Store) -> None:
    await insert_tenant(store, stored_tenant("a", tenant_with_names("CN=ca")))
    for group in ("g", "h", None, "h"):
        moved = stored_tenant("a", tenant_with_names("CN=ca", group=group))
        assert await find_clash(store, moved) is None
        await update_tenant(store, moved)
    with pytest.raises(Conflict):
        await insert_tenant(store, stored_tenant("b", tenant_with_names("CN=ca", group="g")))
    await insert_tenant(store, stored_tenant("b", tenant_with_names("CN=ca", group="h")))


@with_store
async def test_a_tenant_that_shares_a_name_may_not_leave_the_group_with_it(store: Store) -> None:
    await insert_tenant(store, stored_tenant("a", tenant_with_names("CN=ca", group="g")))
    b = stored_tenant("b", tenant_with_names("CN=ca", group="g"))
    await insert_tenant(store, b)
    for group in (None, "h"):
        moved = stored_tenant("b", tenant_with_names("CN=ca", group=group))
        assert await find_clash(store, moved) == "CN=ca"
        with pytest.raises(Conflict):
            await update_tenant(store, moved)
    assert await find_tenant(store, "b") == b
    assert await names_of_tenants(store, "CN=ca") == ["a", "b"]
    # One leaves: the other still holds the name for its group.
    await delete_tenant(store, "a")
    with pytest.raises(Conflict):
        await insert_tenant(store, stored_tenant("c", tenant_with_names("CN=ca")))
    await insert_tenant(store, stored_tenant("c", tenant_with_names("CN=ca", group="g")))
    # All leave: the name is free for anybody.
    await update_tenant(store, stored_tenant("b"))
    await update_tenant(store, stored_tenant("c", tenant_with_names("CN=other")))
    await insert_tenant(store, stored_tenant("d", tenant_with_names("CN=ca")))
    assert await names_of_tenants(store, "CN=ca") == ["d"]


@with_store
async def test_one_of_many_tenants_that_want_a_name_at_once_gets_it(store: Store) -> None:
    tenants = [stored_tenant(f"t{n}", tenant_with_names("CN=ca")) for n in range(10)]
    outcomes = await asyncio.gather(*(insert_tenant(store, each) for each in tenants), return_exceptions=True)
    assert outcomes.count(None) == 1
    assert all(outcome is None or isinstance(outcome, Conflict) for outcome in outcomes)
    assert await names_of_tenants(store, "CN=ca") == [f"t{outcomes.index(None)}"]


@with_store
async def test_tenants_are_looked_up_by_equal_names(store: Store) -> None:
    """Provisioning 7.6, "Use"; at most two, so that the caller knows a name to be ambiguous."""
    await insert_tenant(store, stored_tenant("ia5", tenant_with_names(DC_IA5, "CN=ca,O=Acme")))
    assert await names_of_tenants(store, "cn=CA, o=ACME") == ["ia5"]
    assert await names_of_tenants(store, DC_UTF8) == ["ia5"], "7.6 rule 6"
    assert await names_of_tenants(store, "CN=ca") == []
    for tenant_id in ("b", "a", "c"):
        await insert_tenant(store, stored_tenant(tenant_id, tenant_with_names("CN=shared", group="g")))
    assert await names_of_tenants(store, "CN=shared") == ["a", "b"]
    await delete_tenant(store, "ia5")
    assert await names_of_tenants(store, DC_IA5) == []


# Devices


@with_store
async def test_a_device_is_found_as_it_was_inserted(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    document = {"enabled": False, "ext": {"n": "é"}, "via": ["gw-2", "gw-1"], "viaGroups": ["g"]}
    inserted = replace(
        stored_device("acme", "d:1=x", document), updated=UPDATED, auto_provisioned=True, notification_sent=True
    )
    await insert_device(store, inserted)
    assert await find_device(store, "acme", "d:1=x") == inserted
    assert await store.write(lambda tx: tx.find_device("acme", "d:1=x")) == inserted
    assert await find_device(store, "acme", "D:1=X") is None
    assert await find_device(store, "other", "d:1=x") is None
    row = await store.lookups.find_registration("acme", "d:1=x")
    assert row is not None
    assert row.device_id == "d:1=x"
    assert json.loads(row.document) == device_document(inserted.device)
    assert await store.lookups.find_registration("acme", "d:1=") is None
    assert await store.lookups.find_registration("other", "d:1=x") is None


@with_store
async def test_credentials_that_are_there_before_their_device_stay_as_they_are(store: Store) -> None:
    """Management 8.1, lenient: registration of such a device later keeps its credentials."""
    await insert_tenant(store, stored_tenant("acme"))
    before = stored_credentials("acme", "d", [credential("psk", "one")])
    await store.write(lambda tx: tx.replace_credentials(before))

    async def insert(device_id: str, *credentials: Credential) -> bool:
        device, given = stored_device("acme", device_id), stored_credentials("acme", device_id, credentials)
        return await store.write(lambda tx: tx.insert_device(device, given), device=("acme", device_id))

    kept, new = await asyncio.gather(insert("d"), insert("other"))
    assert not kept
    assert new
    assert await find_credentials(store, "acme", "d") == before
    assert await store.lookups.find_credential("acme", "psk", "one") is not None

    other = stored_credentials("acme", "e", [credential("psk", "two")])
    await store.write(lambda tx: tx.replace_credentials(other))
    assert await insert("e", credential("psk", "three"))
    found = await find_credentials(store, "acme", "e")
    assert found is not None
    assert found.version != other.version
    assert {one.auth_id for one in found.credentials} == {"two", "three"}


@with_store
async def test_a_device_id_is_taken_once_in_a_tenant(store: Store) -> None:
    """Management 5.6: the existing device and its credentials stay untouched."""
    for tenant_id in ("acme", "other"):
        await insert_tenant(store, stored_tenant(tenant_id))
    first, psk = stored_device("acme", "d"), credential("psk", "one")
    await insert_device(store, first, [psk])
    with pytest.raises(Conflict, match="device d"):
        await insert_device(store, stored_device("acme", "d"), [credential("psk", "two")])
    assert await find_device(store, "acme", "d") == first
    credentials = await find_credentials(store, "acme", "d")
    assert credentials is not None
    assert credentials.credentials == (psk,)
    assert await store.lookups.find_credential("acme", "psk", "two") is None
    await insert_device(store, stored_device("other", "d"), [psk])
    assert await count_devices(store, "acme") == 1


@with_store
async def test_one_of_many_creations_at_once_succeeds(store: Store) -> None:
    """Management 8.5."""
    await insert_tenant(store, stored_tenant("acme"))
    devices = [stored_device("acme", "d") for _ in range(20)]
    outcomes = await asyncio.gather(*(insert_device(store, device) for device in devices), return_exceptions=True)
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 19
    assert await find_device(store, "acme", "d") == devices[outcomes.index(None)]
    assert await count_devices(store, "acme") == 1


@with_store
async def test_an_updated_device_is_replaced_and_keeps_its_credentials(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    await insert_device(store, stored_device("acme", "d", {"ext": {"n": 1}}), [credential("psk", "one")])
    before = await find_credentials(store, "acme", "d")
    second = replace(
        stored_device("acme", "d", {"enabled": False}), updated=UPDATED, auto_provisioned=True, notification_sent=True
    )
    await store.write(lambda tx: tx.update_device(second))
    assert await find_device(store, "acme", "d") == second
    assert await find_credentials(store, "acme", "d") == before
    assert await count_devices(store, "acme") == 1


@with_store
async def test_deleting_a_device_frees_all_that_it_held(store: Store) -> None:
    """Management 8.4."""
    await insert_tenant(store, stored_tenant("acme"))
    psk = credential("psk", "one")
    await insert_device(store, stored_device("acme", "d", {"memberOf": ["g"]}), [psk])
    await insert_device(store, stored_device("acme", "e"))
    await store.write(lambda tx: tx.delete_device("acme", "d"))
    assert await find_device(store, "acme", "d") is None
    assert await find_credentials(store, "acme", "d") is None
    assert await store.read(lambda tx: tx.find_credential("acme", "psk", "one")) is None
    assert await store.lookups.find_registration("acme", "d") is None
    assert await store.lookups.find_credential("acme", "psk", "one") is None
    assert await store.lookups.find_group_members("acme", ["g"]) == []
    assert await count_devices(store, "acme") == 1
    await store.write(lambda tx: tx.delete_device("acme", "d"))
    assert await count_devices(store, "acme") == 1, "deleting what is not there counts for nothing"
    again = stored_device("acme", "d")
    await insert_device(store, again)
    credentials = await find_credentials(store, "acme", "d")
    assert credentials is not None
    assert credentials.credentials == ()


@with_store
async def test_devices_are_counted_by_tenant(store: Store) -> None:
    for tenant_id in ("a", "b", "empty"):
        await insert_tenant(store, stored_tenant(tenant_id))
    await asyncio.gather(*(insert_device(store, stored_device("a", f"d{n}")) for n in range(30)))
    await insert_device(store, stored_device("b", "d0"))
    assert [await count_devices(store, tenant_id) for tenant_id in ("a", "b", "empty", "unknown")] == [30, 1, 0, 0]

    async def count_inside(tx: Transaction) -> list[int]:
        counts = [await tx.count_devices("a")]
        await tx.insert_device(stored_device("a", "more"), stored_credentials("a", "more"))
        counts.append(await tx.count_devices("a"))
        await tx.delete_device("a", "d0")
        await tx.delete_device("a", "d1")
        counts.append(await tx.count_devices("a"))
        return counts

    assert await store.write(count_inside) == [30, 31, 29]
    assert await count_devices(store, "a") == 29
    assert await store.search(lambda searches: searches.count()) == (3, 30)
    # What a deleted tenant left behind does not count.
    await store.write(lambda tx: tx.delete_tenant("a"))
    assert await store.search(lambda searches: searches.count()) == (2, 1)


@with_store
async def test_members_of_groups_are_found(store: Store) -> None:
    for tenant_id in ("acme", "other"):
        await insert_tenant(store, stored_tenant(tenant_id))
    groups = {"gw-b": ["g", 'odd ["\\,'], "gw-a": ["g", "h"], "gw-c": ["h"], "gw-d": []}
    for device_id, member_of in groups.items():
        await insert_device(store, stored_device("acme", device_id, {"memberOf": member_of} if member_of else {}))
    await insert_device(store, stored_device("other", "gw-x", {"memberOf": ["g"]}))
    members = store.lookups.find_group_members
    assert await members("acme", ["g"]) == ["gw-a", "gw-b"]
    assert await members("acme", ["h", "g", "g"]) == ["gw-a", "gw-b", "gw-c"]
    assert await members("acme", ['odd ["\\,']) == ["gw-b"]
    assert await members("acme", ["unknown"]) == []
    assert await members("acme", []) == []
    assert await members("unknown", ["g"]) == []
    await store.write(lambda tx: tx.update_device(stored_device("acme", "gw-a", {"memberOf": ["h"]})))
    assert await members("acme", ["g"]) == ["gw-b"]
    await store.write(lambda tx: tx.update_device(stored_device("acme", "gw-a")))
    assert await members("acme", ["h"]) == ["gw-c"]


# Credentials


@with_store
async def test_credentials_are_found_in_the_order_of_the_last_update(store: Store) -> None:
    """Management 6.10."""
    await insert_tenant(store, stored_tenant("acme"))
    await insert_device(store, stored_device("acme", "d"))
    empty = await find_credentials(store, "acme", "d")
    assert empty is not None
    assert empty.credentials == ()
    made = [credential("psk", f"id {n}", ext={"n": n}) for n in (3, 1, 2)] + [credential("custom", "id 1")]
    for order in (made, made[::-1], made[1:3], []):
        replaced = stored_credentials("acme", "d", order)
        await store.write(lambda tx, replaced=replaced: tx.replace_credentials(replaced))  # type: ignore[misc]
        assert await find_credentials(store, "acme", "d") == replaced
    device = await find_device(store, "acme", "d")
    assert device is not None
    assert device.updated is None, "6.11 and 5.4: the device is another resource"


@with_store
async def test_a_device_that_is_not_there_has_no_credentials(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    assert await find_credentials(store, "acme", "d") is None


@with_store
async def test_a_credential_is_found_by_type_and_auth_id(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    psk, custom = credential("psk", "x", comment="ü"), credential("custom", "x")
    await insert_device(store, stored_device("acme", "d"), [psk, custom])
    assert await store.read(lambda tx: tx.find_credential("acme", "psk", "x")) == ("d", psk)
    assert await store.write(lambda tx: tx.find_credential("acme", "custom", "x")) == ("d", custom)
    assert await store.read(lambda tx: tx.find_credential("acme", "psk", "X")) is None
    assert await store.read(lambda tx: tx.find_credential("other", "psk", "x")) is None
    row = await store.lookups.find_credential("acme", "psk", "x")
    assert row is not None
    assert row.device_id == "d"
    assert json.loads(row.document) == stored_document(psk)
    assert await store.lookups.find_credential("acme", "rpk", "x") is None
    assert await store.lookups.find_credential("other", "psk", "x") is None


@with_store
async def test_a_pair_of_type_and_auth_id_is_taken_once_in_a_tenant(store: Store) -> None:
    """Management 6.8."""
    for tenant_id in ("acme", "other"):
        await insert_tenant(store, stored_tenant(tenant_id))
    psk = credential("psk", "x")
    await insert_device(store, stored_device("acme", "d"), [psk])
    with pytest.raises(Conflict, match=r"auth-id x\b.*psk"):
        await insert_device(store, stored_device("acme", "e"), [credential("psk", "y"), psk])
    assert await find_device(store, "acme", "e") is None
    assert await count_devices(store, "acme") == 1
    await insert_device(store, stored_device("acme", "e"), [credential("custom", "x")])
    await insert_device(store, stored_device("other", "e"), [psk])
    before = await find_credentials(store, "acme", "e")
    with pytest.raises(Conflict, match=r"auth-id x\b.*psk"):
        await store.write(lambda tx: tx.replace_credentials(stored_credentials("acme", "e", [psk])))
    assert await find_credentials(store, "acme", "e") == before
    # Once the first device gives it up, the second may have it.
    await store.write(lambda tx: tx.replace_credentials(stored_credentials("acme", "d")))
    await store.write(lambda tx: tx.replace_credentials(stored_credentials("acme", "e", [psk])))
    assert await store.read(lambda tx: tx.find_credential("acme", "psk", "x")) == ("e", psk)


# What a deleted tenant leaves behind: management 8.3


@with_store
async def test_left_overs_are_out_of_reach_and_purged_at_re_creation(store: Store) -> None:
    tenant = tenant_with_names("CN=ca", alias="al")
    await insert_tenant(store, stored_tenant("acme", tenant))
    await insert_device(store, stored_device("acme", "d", {"memberOf": ["g"]}), [credential("psk", "x")])
    await insert_device(store, stored_device("acme", "e"))
    await delete_tenant(store, "acme")
    lookups = store.lookups

    async def look_up_all() -> list[object]:
        return [
            await lookups.find_tenant("acme"),
            await lookups.find_tenant("al"),
            await names_of_tenants(store, "CN=ca") or None,
            await lookups.find_registration("acme", "d"),
            await lookups.find_credential("acme", "psk", "x"),
            await lookups.find_group_members("acme", ["g"]) or None,
        ]

    assert await look_up_all() == [None] * 6
    # Single deletes keep working, so the store still tells whether there is something to delete.
    assert await find_device(store, "acme", "d") is not None
    await store.write(lambda tx: tx.delete_device("acme", "e"))
    assert await find_device(store, "acme", "e") is None
    again = stored_tenant("acme")
    await insert_tenant(store, again)
    row = await lookups.find_tenant("acme")
    assert row is not None
    assert [row.version, *(await look_up_all())[1:]] == [again.version, None, None, None, None, None]
    assert await find_device(store, "acme", "d") is None
    assert await find_credentials(store, "acme", "d") is None
    assert await count_devices(store, "acme") == 0
    await insert_device(store, stored_device("acme", "other"), [credential("psk", "x")])
    assert await count_devices(store, "acme") == 1


@with_store
async def test_purging_one_tenant_leaves_the_others_alone(store: Store) -> None:
    for tenant_id in ("a", "b"):
        await insert_tenant(store, stored_tenant(tenant_id))
        await insert_device(store, stored_device(tenant_id, "d", {"memberOf": ["g"]}), [credential("psk", "x")])
    await delete_tenant(store, "a")
    await insert_tenant(store, stored_tenant("a"))
    assert await store.lookups.find_credential("b", "psk", "x") is not None
    assert await store.lookups.find_group_members("b", ["g"]) == ["d"]
    assert await count_devices(store, "b") == 1


# Identities


@with_store
async def test_identities(store: Store) -> None:
    first = Identity(
        name="http-adapter",
        mechanism="PLAIN",
        password_hash="$2a$10$" + "x" * 53,
        authorities={"r:tenant": "W", "o:tenant:*": "E"},
        created=CREATED,
    )
    second = Identity(name="CN=a", mechanism="EXTERNAL", password_hash=None, authorities={}, created=UPDATED)
    assert not await store.read(lambda tx: tx.has_had_identities())
    for identity in (first, second):
        await store.write(lambda tx, identity=identity: tx.put_identity(identity))  # type: ignore[misc]
    assert await store.read(lambda tx: tx.list_identities()) == [second, first]
    assert await store.read(lambda tx: tx.find_identity("http-adapter")) == first
    assert await store.read(lambda tx: tx.find_identity("HTTP-adapter")) is None
    changed = replace(first, password_hash="$2a$10$" + "y" * 53, authorities={"r:*": "RW"}, created=UPDATED)
    await store.write(lambda tx: tx.put_identity(changed))
    assert await store.read(lambda tx: tx.find_identity("http-adapter")) == changed
    await store.write(lambda tx: tx.delete_identity("http-adapter"))
    await store.write(lambda tx: tx.delete_identity("http-adapter"))
    assert await store.read(lambda tx: tx.list_identities()) == [second]
    await store.write(lambda tx: tx.delete_identity(second.name))
    assert await store.read(lambda tx: tx.list_identities()) == []
    assert await store.read(lambda tx: tx.has_had_identities())


@with_store
async def test_operators(store: Store) -> None:
    first = Operator(name="bob", password_hash="$2a$10$" + "x" * 53, created=CREATED)
    second = Operator(name="Ada", password_hash="$2a$10$" + "z" * 53, may_reveal_secrets=True, created=UPDATED)
    assert not await store.lookups.has_operators()
    for operator in (first, second):
        await store.write(lambda tx, operator=operator: tx.put_operator(operator))  # type: ignore[misc]
    assert await store.lookups.has_operators()
    assert await store.read(lambda tx: tx.list_operators()) == [second, first]
    assert await store.read(lambda tx: tx.find_operator("bob")) == first
    assert await store.lookups.find_operator("bob") == OperatorRow(first.password_hash, may_reveal_secrets=False)
    assert await store.lookups.find_operator("Ada") == OperatorRow(second.password_hash, may_reveal_secrets=True)
    assert await store.read(lambda tx: tx.find_operator("Bob")) is None
    assert await store.lookups.find_operator("Bob") is None
    changed = replace(first, password_hash="$2a$10$" + "y" * 53, may_reveal_secrets=True)
    await store.write(lambda tx: tx.put_operator(changed))
    assert await store.read(lambda tx: tx.find_operator("bob")) == changed
    for name in ("bob", "bob", "Ada"):
        await store.write(lambda tx, name=name: tx.delete_operator(name))  # type: ignore[misc]
    assert await store.read(lambda tx: tx.list_operators()) == []
    assert not await store.lookups.has_operators()


# Transactions


def change(before: str | None, after: str | None) -> Change:
    return Change(
        principal="test", kind=ChangeKind.DEVICE, tenant_id="acme", resource_id="d", before=before, after=after
    )


@with_store
async def test_a_use_case_returns_its_result_and_records_its_change(store: Store) -> None:
    async def create(tx: Transaction) -> str:
        stored = stored_tenant("acme")
        await tx.insert_tenant(stored)
        await tx.record(change(None, stored.version))
        return stored.version

    version = await store.write(create)
    found = await find_tenant(store, "acme")
    assert found is not None
    assert found.version == version


@with_store
async def test_what_a_failing_use_case_did_is_undone(store: Store) -> None:
    class Odd(Exception):
        pass

    for error in (NotFound("no"), Odd()):

        async def fail(tx: Transaction, error: Exception = error) -> None:
            await tx.insert_tenant(stored_tenant("acme", {"alias": "al"}))
            await tx.insert_device(stored_device("acme", "d"), stored_credentials("acme", "d"))
            assert await tx.find_tenant("acme") is not None
            raise error

        with pytest.raises(type(error)) as raised:
            await store.write(fail)
        assert raised.value is error
        with pytest.raises(type(error)):
            await store.read(lambda tx, error=error: raise_(error))  # type: ignore[misc]
    assert await find_tenant(store, "acme") is None
    assert await find_device(store, "acme", "d") is None
    assert await count_devices(store, "acme") == 0
    assert await store.lookups.find_tenant("al") is None


async def raise_(error: Exception) -> None:
    raise error


@with_store
async def test_use_cases_of_one_moment_do_not_share_their_failures(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))

    async def create(tx: Transaction, number: int) -> int:
        device_id = f"d{number}"
        await tx.insert_device(stored_device("acme", device_id), stored_credentials("acme", device_id))
        if number % 3 == 0:
            raise NotFound(device_id)
        return number

    outcomes = await asyncio.gather(
        *(store.write(lambda tx, number=number: create(tx, number)) for number in range(300)),  # type: ignore[misc]
        return_exceptions=True,
    )
    for number, outcome in enumerate(outcomes):
        found = await store.lookups.find_registration("acme", f"d{number}")
        if number % 3 == 0:
            assert isinstance(outcome, NotFound)
            assert str(outcome) == f"d{number}"
            assert found is None
        else:
            assert outcome == number
            assert found is not None
    assert await count_devices(store, "acme") == 200


@with_store
async def test_a_limit_checked_inside_holds_for_writes_of_one_moment(store: Store) -> None:
    """Provisioning 3.7: limits are checked inside the transaction."""
    await insert_tenant(store, stored_tenant("acme"))

    def create(device_id: str, number: int) -> Awaitable[None]:
        async def work(tx: Transaction) -> None:
            device, credentials = stored_device("acme", device_id), stored_credentials("acme", device_id)
            await tx.insert_device(device, credentials, max_devices=10)

        # Some share a transaction, others have one of their own.
        return store.write(work, device=("acme", device_id) if number % 2 else None)

    outcomes = await asyncio.gather(*(create(new_id(), number) for number in range(50)), return_exceptions=True)
    assert outcomes.count(None) == 10
    assert all(outcome is None or isinstance(outcome, DeviceLimitReached) for outcome in outcomes)
    assert await count_devices(store, "acme") == 10


@with_store
async def test_a_read_sees_one_snapshot_and_the_last_write(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    for number in range(20):
        device = stored_device("acme", f"d{number}")
        await insert_device(store, device)

        async def look(tx: Transaction, device: StoredDevice = device) -> tuple[StoredDevice | None, int]:
            return await tx.find_device("acme", device.device_id), await tx.count_devices("acme")

        assert await store.read(look) == (device, number + 1)
        assert await store.lookups.find_registration("acme", device.device_id) is not None


@with_two_stores
async def test_a_batch_of_look_ups_sees_what_was_there_when_it_began(first: Store, second: Store) -> None:
    await insert_tenant(first, stored_tenant("acme", {"alias": "al"}))
    for number in range(20):
        await insert_device(second, stored_device("acme", f"d{number}"), [credential("psk", f"id {number}")])
        with first.lookups.batch():
            assert await first.lookups.find_tenant("al") is not None
            assert await first.lookups.find_registration("acme", f"d{number}") is not None
            assert await first.lookups.find_credential("acme", "psk", f"id {number}") is not None
            assert await first.lookups.find_registration("acme", f"d{number + 1}") is None
            with first.lookups.batch():
                assert await count_devices(first, "acme") == number + 1
            assert await first.lookups.find_group_members("acme", ["g"]) == []
        with first.lookups.batch():
            pass
        assert await first.lookups.find_registration("acme", f"d{number + 1}") is None


@with_store
async def test_a_cancelled_caller_harms_nobody(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    tasks = [asyncio.create_task(insert_device(store, stored_device("acme", f"d{n}"))) for n in range(60)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert outcomes[1::2] == [None] * 30
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    found = [await store.lookups.find_registration("acme", f"d{n}") is not None for n in range(60)]
    assert all(found[1::2])
    assert await count_devices(store, "acme") == sum(found)


def test_writes_beyond_the_bound_are_refused_at_once(engine: Engine) -> None:
    async def test() -> None:
        store = await engine.open(StoreSettings(max_waiting_writes=10))
        try:
            outcomes = await asyncio.gather(
                *(insert_tenant(store, stored_tenant(f"t{n}")) for n in range(25)), return_exceptions=True
            )
            assert outcomes[:10] == [None] * 10
            assert all(isinstance(outcome, Unavailable) for outcome in outcomes[10:])
            assert await find_tenant(store, "t10") is None
            await insert_tenant(store, stored_tenant("t10"))
        finally:
            await store.close()

    asyncio.run(test())


def test_closing_finishes_what_was_accepted(engine: Engine) -> None:
    async def test() -> None:
        store = await engine.open()
        await store.ping()
        tasks = [asyncio.create_task(insert_tenant(store, stored_tenant(f"t{n}"))) for n in range(50)]
        await asyncio.sleep(0)
        await store.close()
        await store.close()
        assert await asyncio.gather(*tasks) == [None] * 50
        refused: list[Callable[[], Awaitable[object]]] = [
            lambda: insert_tenant(store, stored_tenant("late")),
            lambda: find_tenant(store, "t0"),
            lambda: store.lookups.find_tenant("t0"),
            store.ping,
        ]
        for call in refused:
            with pytest.raises(Unavailable):
                await call()
            with store.lookups.batch(), pytest.raises(Unavailable):
                await call()
        store = await engine.open()
        for number in range(50):
            assert await store.lookups.find_tenant(f"t{number}") is not None
        await store.close()

    asyncio.run(test())


# Several processes


def test_stores_that_are_opened_at_once_make_the_schema_together(databases: Databases, tmp_path: Path) -> None:
    url = databases.create(tmp_path, is_empty=True)

    async def test() -> None:
        stores = await asyncio.gather(*(open_store(url) for _ in range(4)))
        try:
            for number, store in enumerate(stores):
                await insert_tenant(store, stored_tenant(f"t{number}"))
            assert await find_tenant(stores[0], "t3") is not None
        finally:
            for store in stores:
                await store.close()

    asyncio.run(test())
    databases.drop(url)


@with_two_stores
async def test_two_stores_see_each_other_at_once(first: Store, second: Store) -> None:
    for number in range(20):
        here, there = (first, second) if number % 2 else (second, first)
        tenant = stored_tenant(f"t{number}", {"alias": f"a{number}"})
        await insert_tenant(here, tenant)
        assert await find_tenant(there, f"t{number}") == tenant
        assert await there.lookups.find_tenant(f"a{number}") is not None
        await insert_device(there, stored_device(f"t{number}", "d"), [credential("psk", "x")])
        assert await here.lookups.find_credential(f"t{number}", "psk", "x") is not None
        await delete_tenant(there, f"t{number}")
        assert await here.lookups.find_tenant(f"t{number}") is None


@with_two_stores
async def test_uniqueness_holds_across_stores(first: Store, second: Store) -> None:
    await insert_tenant(first, stored_tenant("acme"))
    creations = [
        insert_device(store, stored_device("acme", f"d{n}"), [credential("psk", f"{n}")])
        for n in range(100)
        for store in (first, second)
    ]
    outcomes = await asyncio.gather(*creations, return_exceptions=True)
    assert outcomes.count(None) == 100
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 100
    for pair in range(100):
        assert outcomes[2 * pair : 2 * pair + 2].count(None) == 1
    assert await count_devices(first, "acme") == await count_devices(second, "acme") == 100


@with_two_stores
async def test_a_use_case_reads_what_another_process_has_just_written(first: Store, second: Store) -> None:
    """Check and modification are atomic: management 3.9."""
    await insert_tenant(first, stored_tenant("acme", {"ext": {"n": 0}}))

    async def count_up(tx: Transaction) -> None:
        found = await tx.find_tenant("acme", to_change=True)
        assert found is not None
        number = found.tenant.ext["n"]
        assert isinstance(number, int)
        await tx.update_tenant(stored_tenant("acme", {"ext": {"n": number + 1}}))

    await asyncio.gather(*(store.write(count_up) for _ in range(50) for store in (first, second)))
    found = await find_tenant(first, "acme")
    assert found is not None
    assert found.tenant.ext == {"n": 100}


@with_store
async def test_names_of_groups_may_be_long(store: Store) -> None:
    """Nothing limits them; index entries of PostgreSQL hold some 2,700 bytes."""
    groups = ["".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=5000)) for seed in (1, 2)]
    await insert_tenant(store, stored_tenant("acme"))
    for device_id, group in zip(("a", "b"), groups, strict=True):
        await insert_device(store, stored_device("acme", device_id, {"memberOf": [group]}))
    assert await store.lookups.find_group_members("acme", groups[:1]) == ["a"]
    assert await store.lookups.find_group_members("acme", groups) == ["a", "b"]
    moved = replace(stored_device("acme", "a", {"memberOf": [groups[1]]}), updated=UPDATED)
    await store.write(lambda tx: tx.update_device(moved), device=("acme", "a"))
    assert await store.lookups.find_group_members("acme", groups[1:]) == ["a", "b"]


@with_store
async def test_what_is_taken_is_found_for_many_at_once(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    await insert_tenant(store, stored_tenant("other"))
    long = "x" * 5000

    some = [replace(credential("psk", "x"), auth_id=long), credential("c", "a")]

    async def work(tx: Transaction) -> None:
        await tx.insert_device(stored_device("acme", "d"), stored_credentials("acme", "d", some))
        # Lenient referential integrity (management 8.1): a set that is there before its device.
        await tx.replace_credentials(
            stored_credentials("acme", "not-yet", [replace(credential("psk", "x"), auth_id="nul\0")])
        )

    await store.write(work)
    many = [f"no-{number}" for number in range(2000)]
    wanted = [("psk", long), ("psk", f"{long}1"), ("c", "a"), ("psk", "a"), ("psk", "nul\0")]

    async def look(tx: Transaction) -> None:
        assert await tx.find_taken("acme", [*many, "d", "D", "not-yet"]) == {"d", "not-yet"}
        assert await tx.find_taken("other", ["d", "not-yet"]) == set()
        assert await tx.find_taken("acme", []) == set()
        assert await tx.find_owners("acme", wanted) == ["d", None, "d", None, "not-yet"]
        assert await tx.find_owners("other", wanted) == [None] * 5
        assert await tx.find_owners("acme", []) == []

    await store.read(look)
    await store.write(look)


@with_store
async def test_many_devices_are_counted_where_they_are(store: Store) -> None:
    """Management 7.1: the page at an offset begins with the device at that place."""
    await insert_tenant(store, stored_tenant("acme"))
    ids: list[str] = []
    dice = random.Random(2)
    # Into a tenant without devices, among those that there are, and behind them.
    places = dice.sample(range(10**6), 7500)
    for prefix, some_places in (("d", places[:4500]), ("d", places[4500:]), ("e", places[:1500]), ("a", places[:7])):
        some = [f"{prefix}{place:06}" for place in some_places]
        ids += some
        devices = ((stored_device("acme", one), stored_credentials("acme", one)) for one in some)
        await store.write(partial(insert_devices, devices=devices))
        ordered = sorted(ids)
        for offset in (*range(0, len(ids), 499), len(ids) - 1):
            found = await store.search(partial(find_devices, Query(page_offset=offset, page_size=2)))
            assert [one.device_id for one in found.results] == ordered[offset : offset + 2]
            assert found.total == len(ids)
            assert found.scanned <= 2


async def insert_devices(tx: Transaction, *, devices: Iterator[tuple[StoredDevice, StoredCredentials]]) -> None:
    await tx.insert_devices(devices)


def test_ranges_count_what_is_there_whatever_comes_side_by_side(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Management 7.1: the page at an offset begins with the device at that place."""
    monkeypatch.setattr(sql, "_MAX_RANGE", 20)
    with_store(create_and_delete_side_by_side)(engine)


async def find_devices(query: Query, searches: Searches) -> Found[FoundDevice]:
    return await searches.find_devices("acme", query)


async def create_and_delete_side_by_side(store: Store) -> None:
    await insert_tenant(store, stored_tenant("acme"))
    dice = random.Random(1)
    ids = [f"d{number:03}" for number in dice.sample(range(1000), 400)]

    async def create(number: int, device_id: str) -> None:
        # Of different numbers of steps.
        document: JsonObject = {"memberOf": [f"g{number % 5}"]} if number % 2 else {}
        some = [credential("psk", device_id)] if number % 3 else []
        device, credentials = stored_device("acme", device_id, document), stored_credentials("acme", device_id, some)
        await store.write(lambda tx: tx.insert_device(device, credentials), device=("acme", device_id))

    async def delete(device_id: str) -> None:
        await store.write(lambda tx: tx.delete_device("acme", device_id), device=("acme", device_id))

    for start in range(0, 400, 80):
        await asyncio.gather(*(create(number, one) for number, one in enumerate(ids[start : start + 80])))
    gone = ids[::4]
    await asyncio.gather(*(delete(one) for one in gone))
    left = sorted(set(ids) - set(gone))
    for offset in range(0, len(left), 7):
        find = partial(find_devices, Query(page_offset=offset, page_size=3))
        found = await store.search(find)
        assert [one.device_id for one in found.results] == left[offset : offset + 3]
        assert found.total == len(left)
