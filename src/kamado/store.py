"""What the core asks of storage, and what storage may rely on.

The rules live above this line, the SQL below it. Four doors lead through:

* `Store.write` runs a use case in **one** transaction: durable when it returns, without a trace when it raises.
* `Store.read` runs reads on one consistent snapshot.
* `Store.lookups` are the point reads of the adapters' hot path, each a single statement.
* `Store.search` runs what may have to look at many rows, beside everything else and not for longer than it may take.

A use case is a coroutine function that awaits nothing but methods of the `Transaction` it is handed: an engine that
runs in a thread of its own (SQLite) drives it there without an event loop, and groups what waits at the same moment
into one commit; an engine with an asynchronous driver (PostgreSQL) awaits it. A use case may be run again from its
start (serialisation failure), so it must not change anything outside its transaction.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, NamedTuple, Protocol, TypeVar

from kamado.credentials import Credential
from kamado.devices import Device
from kamado.document import JsonObject
from kamado.errors import Forbidden, Reason
from kamado.search import Query
from kamado.tenants import Tenant

__all__ = [
    "Change",
    "ChangeKind",
    "CopyNote",
    "CredentialRow",
    "DamagedRow",
    "DeviceKey",
    "DeviceLimitReached",
    "Found",
    "FoundDevice",
    "FoundTenant",
    "Identity",
    "Lookups",
    "Operator",
    "OperatorRow",
    "Record",
    "RecordKind",
    "RegistrationRow",
    "Searches",
    "Slice",
    "Store",
    "StoredCredentials",
    "StoredDevice",
    "StoredTenant",
    "TenantRow",
    "Transaction",
    "Work",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTenant:
    """A tenant as the database holds it."""

    tenant_id: str
    version: str
    created: datetime
    updated: datetime | None = None
    tenant: Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDevice:
    """A device registration as the database holds it; `status` on the wire is made of these fields."""

    tenant_id: str
    device_id: str
    version: str
    created: datetime
    updated: datetime | None = None
    auto_provisioned: bool = False
    notification_sent: bool = False
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCredentials:
    """A device's credentials set, in the order of its last update; empty for a device that never got any."""

    tenant_id: str
    device_id: str
    version: str
    credentials: tuple[Credential, ...] = ()
    has_device: bool = True
    """Whether the device exists: with lenient referential integrity (management 8.1) its credentials may be first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who may log in over AMQP: an entry of the registry's own database.

    `authorities` has the form of a token's claims (`r:<address>` -> letters, `o:<address>:<operation>` -> `E`;
    authentication 2.5), `password_hash` is bcrypt and `None` for mechanism EXTERNAL.
    """

    name: str
    mechanism: str
    password_hash: str | None
    authorities: dict[str, str]
    created: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Who may use the management API: an operator's account (management 3.11)."""

    name: str
    password_hash: str = field(repr=False)
    """bcrypt."""
    may_reveal_secrets: bool = False
    """Whether reading credentials shows it the keys of `psk` secrets (management 6.10)."""
    created: datetime


class DamagedRow(Exception):
    """A document in the database cannot be read. No `RegistryError`: whoever asked has done nothing wrong."""


class DeviceLimitReached(Forbidden):
    """The tenant has as many devices as it may (management 5.7)."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"max-devices: the tenant may not have more than {limit}", reason=Reason.DEVICE_LIMIT_REACHED)


class ChangeKind(StrEnum):
    """What a change was made to."""

    TENANT = "tenant"
    DEVICE = "device"
    CREDENTIALS = "credentials"
    ALL_DEVICES = "all-devices"
    """All devices that a tenant had, with their credentials."""
    IDENTITY = "identity"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Who changed what, from which version to which: told to the transaction that makes the change.

    `before is None` means created, `after is None` means deleted.
    """

    principal: str
    kind: ChangeKind
    tenant_id: str | None
    """`None` for identities and operators."""
    resource_id: str
    """Tenant id, device id (also for credentials) or name of the identity or operator."""
    before: str | None
    after: str | None


class RecordKind(StrEnum):
    """What the database keeps records of, in an order in which they can be inserted; the rest is derived from them."""

    TENANT = "tenants"
    DEVICE = "devices"
    CREDENTIALS = "credentials sets"
    CREDENTIAL = "credentials"
    IDENTITY = "identities"
    OPERATOR = "operators"
    MILESTONE = "milestones"
    """What has happened once and for all."""

    @property
    def key_size(self) -> int:
        """How many values of a record are its key."""
        match self:
            case RecordKind.CREDENTIAL:
                return 3
            case RecordKind.DEVICE | RecordKind.CREDENTIALS:
                return 2
            case _:
                return 1


Record = tuple[str | int | None, ...]
"""What the database holds of one thing, as plain values, its key first; the same in every database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyNote:
    """How far a database is that is being made a copy of another one."""

    source: str
    """What tells the other one from all that are not."""
    kind: RecordKind | None = RecordKind.TENANT
    """What is copied now; `None` if everything was, and has only to be compared."""
    last: Record = ()
    """The key of the last record of this kind that was copied; empty if there is none."""
    records: int = 0
    """How many were copied, of all kinds."""


class Slice(NamedTuple):
    """A part of something that is done in several transactions."""

    number: int
    """What was done in this one."""
    last: str | None
    """Where the next one goes on; `None` if there is nothing left."""


class Transaction(Protocol):
    """One transaction. Its methods may be awaited in order only, never side by side.

    After a `Conflict`, `DeviceLimitReached` or `Unavailable` the transaction is lost: let the error pass.

    What is going to be changed is found with `to_change`: until the transaction ends nobody else changes it, so that a
    version that was compared is still the one that is replaced. A tenant that was found is not deleted meanwhile.
    """

    async def find_tenant(self, tenant_id: str, *, to_change: bool = False) -> StoredTenant | None:
        """Find a tenant by its id (the alias does not count)."""

    async def find_trust_anchor_clash(self, tenant_id: str, tenant: Tenant) -> str | None:
        """Return the subject DN of a trust anchor that *another* tenant holds and this one may not have too.

        Management 4.7: a DN may be shared only inside one trust anchor group; equality as in provisioning 7.6.
        """

    async def insert_tenant(self, stored: StoredTenant, *, purge: bool = True) -> None:
        """Insert a tenant.

        Args:
            stored: The tenant.
            purge: Remove what a deleted tenant of the same id left behind (management 8.3).

        Raises:
            Conflict: The id, the alias or a trust anchor's subject DN is taken; the text says which.
        """

    async def update_tenant(self, stored: StoredTenant) -> None:
        """Replace a tenant that exists.

        Raises:
            Conflict: The alias or a trust anchor's subject DN is taken.
        """

    async def delete_tenant(self, tenant_id: str) -> None:
        """Delete a tenant, its alias and its trust anchors; its devices stay, out of reach (management 8.3)."""

    async def count_devices(self, tenant_id: str) -> int:
        """Count the devices of a tenant, at a cost that does not grow with them."""

    async def find_device(self, tenant_id: str, device_id: str, *, to_change: bool = False) -> StoredDevice | None:
        """Find a device, also a left-over of a deleted tenant."""

    async def insert_device(
        self, stored: StoredDevice, credentials: StoredCredentials, *, max_devices: int = -1
    ) -> bool:
        """Insert a device together with its credentials set, which may be empty.

        With lenient referential integrity (management 8.1) there may be a set already; its credentials stay.

        Args:
            stored: The device.
            credentials: Its set, or what is added to the one that is there.
            max_devices: How many devices the tenant may have then, whatever is inserted side by side; -1: any number.

        Returns:
            Whether the set has the version of `credentials` now; `False` if one was there that nothing is added to.

        Raises:
            Conflict: The device id, or a pair of type and auth-id, is taken.
            DeviceLimitReached: The tenant would have more devices than it may.
        """

    async def update_device(self, stored: StoredDevice) -> None:
        """Replace a device that exists; its credentials stay as they are."""

    async def delete_device(self, tenant_id: str, device_id: str) -> None:
        """Delete a device and its credentials."""

    async def delete_devices(self, tenant_id: str, after: str, limit: int, created_until: datetime) -> Slice:
        """Delete the next devices of a tenant, with their credentials, in the order of their ids.

        Args:
            tenant_id: The tenant, which need not exist any more.
            after: Where the last slice ended; empty for the first.
            limit: Devices to look at, at most; fewer if they are large.
            created_until: Devices that were created later stay.
        """

    async def delete_credential_sets(self, tenant_id: str, after: str, limit: int) -> Slice:
        """Delete the next credentials sets of devices that do not exist, as `delete_devices` does devices."""

    async def find_credentials(
        self, tenant_id: str, device_id: str, *, to_change: bool = False
    ) -> StoredCredentials | None:
        """Find the credentials set of a device; `None` if it has none, as one that does not exist.

        With lenient referential integrity (management 8.1) a set may be there before its device.
        """

    async def find_credential(self, tenant_id: str, type_: str, auth_id: str) -> tuple[str, Credential] | None:
        """Find the device id and the credential of a pair of type and auth-id."""

    async def replace_credentials(self, stored: StoredCredentials) -> None:
        """Replace the credentials set of a device that exists.

        Raises:
            Conflict: A pair of type and auth-id belongs to another device of the tenant.
        """

    async def find_identity(self, name: str) -> Identity | None:
        """Find a login by its name."""

    async def list_identities(self) -> list[Identity]:
        """Return all logins, ordered by name."""

    async def has_had_identities(self) -> bool:
        """Tell whether there is or ever was a login."""

    async def put_identity(self, identity: Identity) -> None:
        """Insert a login or replace the one of that name."""

    async def delete_identity(self, name: str) -> None:
        """Delete a login."""

    async def find_operator(self, name: str) -> Operator | None:
        """Find an operator's account by its name."""

    async def list_operators(self) -> list[Operator]:
        """Return all operators' accounts, ordered by name."""

    async def put_operator(self, operator: Operator) -> None:
        """Insert an operator's account or replace the one of that name."""

    async def delete_operator(self, name: str) -> None:
        """Delete an operator's account."""

    async def has_tenants(self) -> bool:
        """Tell whether there is any tenant at all."""

    async def find_schema(self) -> int:
        """Find the version of the database's schema: with another one there may be records of other kinds."""

    async def list_records(self, kind: RecordKind, after: Record, limit: int) -> list[Record]:
        """Return records in the order of their keys, also what a deleted tenant left behind.

        Args:
            kind: Which.
            after: Begin with the one after this key; empty for the first.
            limit: How many at most.
        """

    async def count_records(self, kind: RecordKind) -> int:
        """Count all records of a kind, at a cost that grows with them."""

    async def insert_records(self, kind: RecordKind, records: Sequence[Record]) -> None:
        """Insert records as they are, those of another database, and whatever is derived from them.

        For many at once, into a database that nobody else writes to: none of them may be there, nor anything that they
        clash with, and what they refer to (`RecordKind`) must be there.

        Raises:
            DamagedRow: The document of one cannot be read.
            Conflict: An alias or a trust anchor's subject DN is taken.
        """

    async def find_taken(self, tenant_id: str, device_ids: Sequence[str]) -> set[str]:
        """Find out which of these ids are taken: by a device, or by a credentials set without one."""

    async def find_owners(self, tenant_id: str, names: Sequence[tuple[str, str]]) -> list[str | None]:
        """Return the ids of the devices that have these pairs of type and auth-id; `None` where nobody does."""

    async def insert_devices(self, devices: Iterable[tuple[StoredDevice, StoredCredentials]]) -> None:
        """Insert many devices with their credentials sets, quicker than one by one.

        They are counted when all are there, so others that create devices in the tenant wait for the last part only.

        Args:
            devices: Taken one after the other, as they are inserted. No id may be taken (`find_taken`), nor any pair of
                type and auth-id (`find_owners`): if somebody else takes one meanwhile, the use case is run again.
        """

    async def find_copy(self) -> CopyNote | None:
        """Find out whether this database is an unfinished copy; until the transaction ends nobody changes that."""

    async def put_copy(self, note: CopyNote) -> None:
        """Note how far the copy is."""

    async def delete_copy(self) -> None:
        """Note that the copy is finished."""

    async def record(self, change: Change) -> None:
        """Tell of a change made in this transaction: the one place that audit and outbox entries come from."""


class TenantRow(NamedTuple):
    """A tenant for adapters. `version` proves that something derived from `document` is still true."""

    tenant_id: str
    version: str
    document: str
    """JSON text: the read representation (`tenants.tenant_document`)."""


class RegistrationRow(NamedTuple):
    """A device of an existing tenant, for adapters."""

    device_id: str
    document: str
    """JSON text: the read representation without `status` (`devices.device_document`)."""


class CredentialRow(NamedTuple):
    """A credential of an existing tenant, for adapters."""

    device_id: str
    document: str
    """JSON text: everything stored, confidential members included (`credentials.stored_document`)."""


class OperatorRow(NamedTuple):
    """An operator's account, for its logins."""

    password_hash: str
    """bcrypt."""
    may_reveal_secrets: bool


class Lookups(Protocol):
    """The point reads behind what adapters ask, and behind logins of operators; what a deleted tenant left behind is
    never found.

    Each is one statement. An engine that can answer at once returns without suspending, so that a look-up can be
    answered in the batch it arrived in.
    """

    def batch(self) -> AbstractContextManager[None]:
        """Answer the look-ups made inside from one snapshot, if that is quicker; none is older than the entry.

        Where look-ups are answered at once, half of what a lone one costs is finding out what to read from, so those
        that have arrived together should be made together. Nothing inside may wait for anything: other look-ups would
        see the old snapshot.
        """

    async def find_tenant(self, tenant_id: str) -> TenantRow | None:
        """Find a tenant by id or else by alias."""

    async def find_tenants_by_anchor(self, canonical_key: str, subject_dn: str) -> Sequence[TenantRow]:
        """Find the tenants with a trust anchor of that name: equal canonical key or equal text (provisioning 7.6).

        Returns:
            At most two, enough to know that the name is ambiguous.
        """

    async def find_registration(self, tenant_id: str, device_id: str) -> RegistrationRow | None:
        """Find a device."""

    async def find_group_members(self, tenant_id: str, groups: Sequence[str]) -> list[str]:
        """Return the ids of all devices that are `memberOf` one of the groups, each once, ordered by id."""

    async def find_credential(self, tenant_id: str, type_: str, auth_id: str) -> CredentialRow | None:
        """Find a credential by its type and auth-id."""

    async def find_operator(self, name: str) -> OperatorRow | None:
        """Find an operator's account by its name."""

    async def has_operators(self) -> bool:
        """Tell whether there is any operator's account at all."""


T = TypeVar("T")


class FoundTenant(NamedTuple):
    """A tenant that a search found."""

    tenant_id: str
    document: JsonObject
    """The read representation."""


class FoundDevice(NamedTuple):
    """A device that a search found."""

    device_id: str
    created: datetime
    updated: datetime | None
    auto_provisioned: bool
    notification_sent: bool
    document: JsonObject
    """The read representation without `status`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Generic[T]):
    """A page of a search."""

    total: int
    """All that matches, regardless of the page."""
    results: tuple[T, ...]
    scanned: int
    """Candidates that were looked at one by one: what the search has cost."""
    has_tenant: bool = True
    """Whether the tenant that was searched exists, at the same moment."""


class Searches(Protocol):
    """Searching, on one snapshot (management 7)."""

    async def find_tenants(self, query: Query) -> Found[FoundTenant]:
        """Find tenants."""

    async def find_devices(self, tenant_id: str, query: Query) -> Found[FoundDevice]:
        """Find devices of a tenant, also left-overs of one that was deleted."""

    async def count(self) -> tuple[int, int]:
        """Count all tenants, and the devices of all tenants together."""


Work = Callable[[Transaction], Awaitable[T]]

DeviceKey = tuple[str, str]
"""Tenant id and device id."""


class Store(Protocol):
    """The database of the registry."""

    @property
    def lookups(self) -> Lookups:
        """The adapters' point reads."""

    async def read(self, work: Work[T]) -> T:
        """Run reads on one snapshot.

        Raises:
            Unavailable: The database cannot be read now.
            RegistryError: Whatever `work` raises passes through.
        """

    async def write(self, work: Work[T], *, device: DeviceKey | None = None, tenant_id: str | None = None) -> T:
        """Run a use case in one transaction.

        One that says which device it changes, and changes nothing that belongs to another, may share its transaction
        with others: they run side by side there and may see what the others have done so far. That is right for whoever
        leaves uniqueness and limits to the methods of the transaction, and only then may `device` be given.

        A cancelled caller learns nothing: the transaction may or may not have been committed. A retry is safe as far
        as the use case itself tells "done already" from "done now" (If-Match, unique ids).

        Args:
            work: The use case.
            device: The one device that is created, changed or deleted, with its credentials.
            tenant_id: The one tenant of which something is changed, where no device is named: so that what is locked
                there is in nobody else's way.

        Returns:
            What `work` returned, once the commit is durable.

        Raises:
            Unavailable: The database cannot be written now (busy for too long, full, read only); nothing was changed.
            OutcomeUnknown: The database was lost before it said whether it has committed.
            RegistryError: Whatever `work` raises passes through; nothing was changed.
        """

    @property
    def waiting_writes(self) -> int:
        """How many writes wait or run."""

    async def search(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool = False) -> T:
        """Run searches on one snapshot, beside everything else that goes on. Cancelled, they end soon.

        Args:
            work: What to search; it may be run again from its start.
            is_heavy: It is known to take long. Such searches do not keep the others waiting.

        Raises:
            Unavailable: The database cannot be read now, too many searches wait, or this one has taken too long.
        """

    async def ping(self) -> None:
        """Prove that the database answers (readiness).

        Raises:
            Unavailable: It does not.
        """

    async def close(self) -> None:
        """Finish what was accepted, then release files and threads."""
