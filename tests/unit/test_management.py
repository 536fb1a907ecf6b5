"""The use cases of the management API on a real store: what HTTP does not show (management 3.15, 5.4, 6.9)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kamado.auth import LOCAL_OPERATOR, Principal
from kamado.credentials import CredentialRules
from kamado.devices import Device
from kamado.document import Identifiers
from kamado.errors import BadRequest, Conflict, Forbidden, NotFound, PreconditionFailed, RegistryError
from kamado.management import Expected, Management, ManagementSettings
from kamado.passwords import PasswordHasher
from kamado.storage import open_store
from kamado.storage.sql import SqlTransaction
from kamado.store import Change, ChangeKind, DeviceKey, Slice, Store, StoredDevice, Transaction, Work

T = TypeVar("T")

START = datetime(2026, 3, 1, 12, 0, 0, 999_999, tzinfo=UTC)
BLIND = Principal(name="blind", may_reveal_secrets=False)
PSK = {"type": "psk", "auth-id": "s1", "secrets": [{"key": "AAAA"}]}


class CountingHasher(PasswordHasher):
    """The real hasher, which also tells what it hashed, and lets a test do something meanwhile."""

    def __init__(self) -> None:
        super().__init__(workers=1, queue=4, cost=4)
        self.hashed: list[str] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    async def hash(self, password: str) -> str:
        self.hashed.append(password)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        return await super().hash(password)


class _Listening:
    """A transaction whose changes are noted."""

    def __init__(self, transaction: Transaction, changes: list[Change]) -> None:
        self._transaction = transaction
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction, name)

    async def record(self, change: Change) -> None:
        await self._transaction.record(change)
        self._changes.append(change)


class ListeningStore:
    """The real store, which also tells what changes were recorded in transactions that were committed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.changes: list[Change] = []
        self.read = store.read

    async def write(self, work: Work[T], *, device: DeviceKey | None = None, tenant_id: str | None = None) -> T:
        changes: list[Change] = []
        result = await self._store.write(lambda transaction: work(_Listening(transaction, changes)))
        self.changes += changes
        return result


@dataclass
class Bench:
    """A management and what it stands on."""

    store: Store
    listening: ListeningStore
    management: Management
    hasher: CountingHasher
    now: datetime = field(default=START)

    def take_changes(self) -> list[Change]:
        changes, self.listening.changes = self.listening.changes, []
        return changes


@asynccontextmanager
async def bench(directory: Path, **limits: Any) -> AsyncIterator[Bench]:
    store = await open_store(f"sqlite:///{directory / 'registry.db'}")
    hasher = CountingHasher()
    listening = ListeningStore(store)
    identifiers = Identifiers()
    made: list[Bench] = []
    management = Management(
        listening,  # type: ignore[arg-type]
        hasher,
        identifiers,
        CredentialRules(identifiers=identifiers),
        ManagementSettings(**limits),
        lambda: made[0].now,
    )
    made.append(Bench(store, listening, management, hasher))
    try:
        yield made[0]
    finally:
        hasher.close()
        await store.close()


Test = Callable[[Bench], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Test], None]:
    def run_test(test: Test) -> None:
        async def main() -> None:
            async with bench(tmp_path) as one:
                await one.management.create_tenant(LOCAL_OPERATOR, "t")
                await one.management.create_device(LOCAL_OPERATOR, "t", "d")
                one.take_changes()
                await test(one)

        asyncio.run(main())

    return run_test


async def fails(work: Awaitable[object], kind: type[RegistryError]) -> RegistryError:
    with pytest.raises(kind) as caught:
        await work
    return caught.value


@pytest.mark.parametrize(
    ("header", "versions"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("*", None),
        (" * ", None),
        ("v", {"v"}),
        ('"v"', {"v"}),
        ('W/"v"', {"v"}),
        ('a, "b",W/"c"', {"a", "b", "c"}),
        ("W/v", {"W/v"}),
        ('"v', {'"v'}),
        ('"', {'"'}),
        ('"*"', {"*"}),
        ("*, v", {"*", "v"}),
        (",", {""}),
    ],
)
def test_if_match(header: str | None, versions: set[str] | None) -> None:
    """Management 3.9."""
    assert Expected.parse(header) == Expected(None if versions is None else frozenset(versions))


def test_each_change_is_recorded_with_versions_and_principal(run: Callable[[Test], None]) -> None:
    async def test(one: Bench) -> None:
        manage = one.management
        tenant = await manage.create_tenant(LOCAL_OPERATOR, "new")
        tenant_2 = await manage.update_tenant(BLIND, "new", {})
        device = await manage.create_device(LOCAL_OPERATOR, "new", None)
        device_2 = await manage.update_device(LOCAL_OPERATOR, "new", device.value, {})
        set_1 = (await manage.get_credentials(LOCAL_OPERATOR, "new", device.value)).version
        set_2 = await manage.set_credentials(LOCAL_OPERATOR, "new", device.value, [PSK])
        await manage.delete_device(LOCAL_OPERATOR, "new", device.value)
        await manage.delete_tenant(LOCAL_OPERATOR, "new")
        assert len({tenant.version, tenant_2, device.version, device_2, set_1, set_2}) == 6

        def change(
            kind: ChangeKind, before: str | None, after: str | None, principal: str = "local-operator"
        ) -> Change:
            name = "new" if kind is ChangeKind.TENANT else device.value
            return Change(principal=principal, kind=kind, tenant_id="new", resource_id=name, before=before, after=after)

        assert one.take_changes() == [
            change(ChangeKind.TENANT, None, tenant.version),
            change(ChangeKind.TENANT, tenant.version, tenant_2, "blind"),
            change(ChangeKind.DEVICE, None, device.version),
            change(ChangeKind.CREDENTIALS, None, set_1),
            change(ChangeKind.DEVICE, device.version, device_2),
            change(ChangeKind.CREDENTIALS, set_1, set_2),
            change(ChangeKind.DEVICE, device_2, None),
            change(ChangeKind.CREDENTIALS, set_2, None),
            change(ChangeKind.TENANT, tenant_2, None),
        ]

    run(test)


def test_a_refused_change_is_not_recorded(run: Callable[[Test], None]) -> None:
    async def test(one: Bench) -> None:
        manage, stale = one.management, Expected(frozenset({"stale"}))
        await fails(manage.create_tenant(LOCAL_OPERATOR, "t"), Conflict)
        await fails(manage.update_tenant(LOCAL_OPERATOR, "t", {}, stale), PreconditionFailed)
        await fails(manage.delete_tenant(LOCAL_OPERATOR, "t", stale), PreconditionFailed)
        await fails(manage.create_device(LOCAL_OPERATOR, "t", "d"), Conflict)
        await fails(manage.update_device(LOCAL_OPERATOR, "t", "d", {}, stale), PreconditionFailed)
        await fails(manage.delete_device(LOCAL_OPERATOR, "t", "d", stale), PreconditionFailed)
        await fails(manage.set_credentials(LOCAL_OPERATOR, "t", "d", [], stale), PreconditionFailed)
        assert one.take_changes() == []

    run(test)


def test_psk_keys_are_for_those_who_may_see_secrets(run: Callable[[Test], None]) -> None:
    """Management 6.10: the key is left out, the secret's id stays."""

    async def test(one: Bench) -> None:
        await one.management.set_credentials(BLIND, "t", "d", [PSK])
        (seen,) = (await one.management.get_credentials(LOCAL_OPERATOR, "t", "d")).value
        (blind,) = (await one.management.get_credentials(BLIND, "t", "d")).value
        secrets = seen["secrets"]
        assert isinstance(secrets, list)
        (secret,) = secrets
        assert secret["key"] == "AAAA"
        assert blind == seen | {"secrets": [{"id": secret["id"]}]}

    run(test)


PASSWORD = {"type": "hashed-password", "auth-id": "p1", "secrets": [{"pwd-plain": "x"}]}


@pytest.mark.parametrize(
    ("tenant_id", "device_id", "document", "version", "kind"),
    [
        ("t t", "d", [PASSWORD], None, BadRequest),
        ("t", "d d", [PASSWORD], None, BadRequest),
        ("t", "d", [PASSWORD, {}], None, BadRequest),
        ("none", "d", [PASSWORD], None, NotFound),
        ("t", "none", [PASSWORD], None, NotFound),
        ("t", "d", [PASSWORD], "stale", PreconditionFailed),
        ("t", "d", [PASSWORD | {"secrets": [{"id": "i", "pwd-plain": "x"}]}], None, BadRequest),
        ("limited", "none", [PASSWORD], None, Forbidden),
    ],
)
def test_what_is_refused_costs_no_hashing(
    run: Callable[[Test], None],
    tenant_id: str,
    device_id: str,
    document: object,
    version: str | None,
    kind: type[RegistryError],
) -> None:
    """Management 3.15; bcrypt is slow, and whoever asks for nothing sensible shall not use it up."""

    async def test(one: Bench) -> None:
        limits = {"registration-limits": {"max-credentials-per-device": 0}}
        await one.management.create_tenant(LOCAL_OPERATOR, "limited", limits)
        expected = Expected.parse(version)
        await fails(one.management.set_credentials(LOCAL_OPERATOR, tenant_id, device_id, document, expected), kind)
        assert one.hasher.hashed == []

    run(test)


def test_what_changes_while_a_password_is_hashed_counts(run: Callable[[Test], None]) -> None:
    async def test(one: Bench) -> None:
        manage = one.management
        version = (await manage.get_credentials(LOCAL_OPERATOR, "t", "d")).version
        one.hasher.meanwhile = lambda: manage.set_credentials(LOCAL_OPERATOR, "t", "d", [PSK])
        expected = Expected(frozenset({version}))
        await fails(manage.set_credentials(LOCAL_OPERATOR, "t", "d", [PASSWORD], expected), PreconditionFailed)
        assert one.hasher.hashed == ["x"]
        one.hasher.meanwhile = lambda: manage.delete_device(LOCAL_OPERATOR, "t", "d")
        await fails(manage.set_credentials(LOCAL_OPERATOR, "t", "d", [PASSWORD]), NotFound)

    run(test)


def test_each_password_has_its_own_salt(run: Callable[[Test], None]) -> None:
    async def test(one: Bench) -> None:
        secrets = [{"pwd-plain": "x"}, {"pwd-plain": "x"}]
        await one.management.set_credentials(LOCAL_OPERATOR, "t", "d", [PASSWORD | {"secrets": secrets}])

        async def read(transaction: Transaction) -> Any:
            return await transaction.find_credentials("t", "d")

        stored = await one.store.read(read)
        first, second = stored.credentials[0].secrets
        assert first.pwd_hash != second.pwd_hash

    run(test)


def test_an_update_keeps_what_provisioning_noted(run: Callable[[Test], None]) -> None:
    """Management 5.4 and D33; timestamps are cut to seconds."""

    async def test(one: Bench) -> None:
        async def mark(transaction: Transaction) -> None:
            stored = await transaction.find_device("t", "d")
            assert isinstance(stored, StoredDevice)
            marked = replace(stored, auto_provisioned=True, notification_sent=True, device=Device(enabled=False))
            await transaction.update_device(marked)

        await one.store.write(mark)
        one.now += timedelta(hours=1)
        await one.management.update_device(LOCAL_OPERATOR, "t", "d", {"ext": {"a": 1}})
        read = await one.management.get_device(LOCAL_OPERATOR, "t", "d")
        assert read.value == {
            "enabled": True,
            "ext": {"a": 1},
            "status": {
                "created": "2026-03-01T12:00:00Z",
                "updated": "2026-03-01T13:00:00Z",
                "auto-provisioned": True,
                "auto-provisioning-notification-sent": True,
            },
        }

    run(test)


@pytest.mark.parametrize(
    ("own", "common", "allowed"),
    [(None, -1, None), (None, 2, 2), (None, 0, None), (-1, 2, 2), (1, 2, 1), (3, 2, 3), (0, -1, 0), (0, 2, 0)],
)
def test_device_limits(tmp_path: Path, own: int | None, common: int, allowed: int | None) -> None:
    """Management 5.7: the tenant's if it has one, else the registry's if it is above 0, else none."""

    async def main() -> None:
        async with bench(tmp_path, max_devices_per_tenant=common) as one:
            document = {} if own is None else {"registration-limits": {"max-devices": own}}
            await one.management.create_tenant(LOCAL_OPERATOR, "t", document)
            for number in range(4 if allowed is None else allowed):
                await one.management.create_device(LOCAL_OPERATOR, "t", f"d{number}")
            if allowed is not None:
                await fails(one.management.create_device(LOCAL_OPERATOR, "t", None), Forbidden)

    asyncio.run(main())


@pytest.mark.parametrize("call", ["get_device", "get_credentials", "delete_device"])
@pytest.mark.parametrize(
    ("tenant_id", "device_id"), [("", "d"), ("t/", "d"), ("t", ""), ("t", "d d"), ("t", "x" * 257)]
)
def test_ids_are_checked_everywhere(run: Callable[[Test], None], call: str, tenant_id: str, device_id: str) -> None:
    """Management 3.2."""

    async def test(one: Bench) -> None:
        await fails(getattr(one.management, call)(LOCAL_OPERATOR, tenant_id, device_id), BadRequest)

    run(test)


def test_trust_anchor_clash_names_the_subject(run: Callable[[Test], None]) -> None:
    """Management 3.8 and 4.7: an equal name in another spelling clashes, too (provisioning 7.6)."""

    async def test(one: Bench) -> None:
        def anchor(subject: str) -> object:
            return {
                "trusted-ca": [
                    {
                        "subject-dn": subject,
                        "public-key": SPKI,
                        "algorithm": "EC",
                        "not-before": "2024-01-01T00:00:00Z",
                        "not-after": "2030-01-01T00:00:00Z",
                    }
                ]
            }

        await one.management.update_tenant(LOCAL_OPERATOR, "t", anchor("CN=plant-ca,O=ACME"))
        error = await fails(one.management.create_tenant(LOCAL_OPERATOR, "u", anchor("cn=Plant-CA, o=acme")), Conflict)
        assert error.details == {"subject-dn": "CN=Plant-CA,O=acme"}

    run(test)


SPKI = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeqP/YOvBk2Wl8VO9yMpIGIqRLSqTe6uYdEhwYundVsznOBK6x0rZcfPd1XT8ouVejj/p8CEI"
    "gkz7kzCSwYrW4w=="
)


def test_left_overs_are_deleted_in_transactions_of_their_own(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few dozen devices may have more values in the index than one statement deletes in its time."""
    deleted: list[int] = []
    delete_devices = SqlTransaction.delete_devices

    async def note(self: SqlTransaction, *arguments: Any) -> Slice:
        done = await delete_devices(self, *arguments)
        deleted.append(done.number)
        return done

    monkeypatch.setattr(SqlTransaction, "delete_devices", note)

    async def test(one: Bench) -> None:
        for number in range(30):
            await one.management.create_device(LOCAL_OPERATOR, "t", f"d{number}")
        await one.management.delete_tenant(LOCAL_OPERATOR, "t")
        await one.management.create_tenant(LOCAL_OPERATOR, "t")
        assert sum(deleted) == 31
        assert await one.store.read(lambda transaction: transaction.count_devices("t")) == 0

    run(test)
