"""Every query of the registry, written once; rows to dataclasses and back.

Hides the tables. Knows no driver: a dialect hands in a `Session`, which runs a statement and turns the driver's
errors into `Unavailable`. Statements are constant texts in the SQL that the dialects share, with numbered parameters
(`?1`); a dialect translates each once. What may be missing is written `= ANY(?2)` for "is in the array ?2". A row that
is going to be changed is read with `FOR UPDATE` at the end, one that must stay with `FOR KEY SHARE`: a dialect whose
transactions run one after the other leaves that out, as any does in a transaction that only reads.

A clash is found by `ON CONFLICT DO NOTHING` and the number of rows, never by reading the text of a driver's error: it
holds against whatever runs side by side, and the transaction is still good for asking what was in the way.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast

from kamado.credentials import Credential, stored_credential, stored_document
from kamado.devices import device_document, stored_device
from kamado.document import JsonObject, decode, encode
from kamado.errors import Conflict, Unavailable
from kamado.search import IndexEntry, index_entries
from kamado.store import (
    Change,
    CredentialRow,
    DamagedRow,
    DeviceLimitReached,
    Identity,
    Operator,
    OperatorRow,
    RegistrationRow,
    Slice,
    StoredCredentials,
    StoredDevice,
    StoredTenant,
    TenantRow,
)
from kamado.tenants import Tenant, stored_tenant, tenant_document

__all__ = [
    "NOT_FOR_REPLICAS",
    "Combined",
    "Counted",
    "NewerSchema",
    "OlderSchema",
    "Row",
    "Session",
    "SqlLookups",
    "SqlTransaction",
    "StorageError",
    "StoreSettings",
    "UnfinishedCopy",
    "UnusableFile",
    "Value",
    "count_changes",
    "document_of",
    "instant_of",
    "key_of",
    "microseconds",
    "optional_instant",
    "optional_microseconds",
    "text_of",
]


class StorageError(Unavailable):
    """The database cannot be opened. The text is for the operator: it names the database and what to do."""


class NewerSchema(StorageError):
    """A later version of Kamado has migrated the database; this one must not touch it."""


class UnusableFile(StorageError):
    """The file is damaged, or holds something else."""


class OlderSchema(StorageError):
    """The database needs a migration, and whoever opens it is not to make it.

    Args:
        database: What to call it.
        found: The version of its schema; 0 for none, `None` for a database that is not there.
        needed: The version that is needed.
    """

    def __init__(self, database: str, found: int | None, needed: int) -> None:
        what = f"has schema {found} and this version of Kamado needs {needed}; bring it up to date"
        if found is None:
            what = "does not exist; create it"
        elif found == 0:
            what = "has no tables yet; make them"
        super().__init__(
            f"{database} {what} by kamado migrate, or by kamado serve unless storage.auto_migrate is off there"
        )


class UnfinishedCopy(StorageError):
    """The database is being made a copy of another one, and not complete.

    Args:
        database: What to call it.
    """

    def __init__(self, database: str) -> None:
        super().__init__(
            f"{database} is an unfinished copy of another database: finish it by the same kamado copy, or begin with "
            "an empty one"
        )


ObserveCommit = Callable[[int, int, int, float], None]
"""Takes what became of the writes that shared a transaction: how many were committed, refused by themselves, and lost
with it, and the seconds from its begin to the end of its commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How a store behaves, whatever the engine."""

    auto_migrate: bool = True
    """Create or upgrade the schema when the store is opened."""
    busy_timeout: float = 5.0
    """Seconds to wait for another process that is writing."""
    max_waiting_writes: int = 4096
    """Writes that may wait or run; one more is refused."""
    max_group_size: int = 512
    """Writes that may share one commit."""
    max_group_time: float = 0.05
    """Seconds after which a group takes no further write before its commit."""
    observe: ObserveCommit = lambda *_: None
    """Called from a thread of the store's own on SQLite, from the event loop on PostgreSQL."""
    search_workers: int = 2
    """Searches that run side by side."""
    max_waiting_searches: int = 64
    """Searches that may wait or run; one more is refused."""
    search_timeout: float = 10.0
    """Seconds after which a search is given up."""
    is_bulk: bool = False
    """Very much is going to be written, and can be written again: a power cut may undo the last transactions."""
    may_be_unfinished: bool = False
    """Open a database, too, that is an unfinished copy of another one."""
    # What follows concerns PostgreSQL only.
    only_reads: bool = False
    """Nothing is going to be written, so a standby will do."""
    must_write: bool = False
    """Refuse a database in whose tables the role may not do whatever is done there."""
    read_url: str | None = None
    """A replica for look-ups; `None` for none."""
    pool_min: int = 3
    """Connections that are kept open."""
    pool_max: int = 15
    """Connections at most."""
    acquire_timeout: float = 2.0
    """Seconds for getting a connection."""
    statement_timeout: float = 1.0
    """Seconds for one statement that is no search."""
    max_waiting_lookups: int = 16384
    """Look-ups that may wait; one more is refused."""
    open_timeout: float = 0.0
    """Seconds for which a database that cannot be reached is tried again when it is opened."""


T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")
Value = str | int | bytes | None
Row = Sequence[Any]


class Session(Protocol):
    """One connection, used by one transaction at a time."""

    async def one(self, statement: str, *parameters: Value) -> Row | None:
        """Return the first row.

        Raises:
            Unavailable: The driver failed; the cause is logged.
        """

    async def all(self, statement: str, *parameters: Value) -> list[Row]:
        """Return all rows.

        Raises:
            Unavailable: The driver failed; the cause is logged.
        """

    async def run(self, statement: str, *parameters: Value) -> int:
        """Run a statement that changes rows; return how many.

        Raises:
            Unavailable: The driver failed; the cause is logged.
        """

    async def many(self, statement: str, rows: Sequence[Sequence[Value]]) -> None:
        """Run a statement that changes rows once for each set of parameters.

        Raises:
            Unavailable: The driver failed; the cause is logged.
        """

    async def each(self, statement: str, rows: Sequence[Sequence[Value]]) -> list[Row | None]:
        """Run a statement once for each set of parameters; return the first row of each.

        Raises:
            Unavailable: The driver failed; the cause is logged.
        """

    async def combine(self, function: "Combined[A, R]", argument: A) -> R:
        """Call a function with an argument; where transactions go side by side, once for the arguments of all."""

    async def lock(self, name: str) -> None:
        """Keep others that lock this name waiting until the transaction ends, unless it only reads."""

    def array(self, values: Sequence[str]) -> Value:
        """Return the parameter for `= ANY(?n)`."""

    def batch(self) -> AbstractContextManager[None]:
        """Read from one snapshot; see `store.Lookups.batch`."""


Combined = Callable[[Session, Sequence[A]], Awaitable[Sequence[R]]]
"""What does something for several arguments at once; a result for each, in their order."""

# Tenants

FIND_TENANT = "SELECT version, created, updated, document FROM tenants WHERE tenant_id = ?1 FOR KEY SHARE"
FIND_TENANT_TO_CHANGE = "SELECT version, created, updated, document FROM tenants WHERE tenant_id = ?1 FOR UPDATE"
HAS_TENANTS = "SELECT 1 FROM tenants LIMIT 1"
INSERT_TENANT = """
INSERT INTO tenants (tenant_id, version, created, updated, document) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT DO NOTHING"""
UPDATE_TENANT = "UPDATE tenants SET version = ?1, created = ?2, updated = ?3, document = ?4 WHERE tenant_id = ?5"
DELETE_TENANT = "DELETE FROM tenants WHERE tenant_id = ?1"
# Children first: each refers to what follows it.
PURGE_TENANT = (
    "DELETE FROM credentials WHERE tenant_id = ?1",
    "DELETE FROM credential_sets WHERE tenant_id = ?1",
    "DELETE FROM device_groups WHERE tenant_id = ?1",
    "DELETE FROM device_members WHERE tenant_id = ?1",
    "DELETE FROM device_ranges WHERE tenant_id = ?1",
    "DELETE FROM devices WHERE tenant_id = ?1",
    "DELETE FROM tenant_usage WHERE tenant_id = ?1",
)

INSERT_ALIAS = "INSERT INTO tenant_aliases (alias, tenant_id) VALUES (?1, ?2) ON CONFLICT DO NOTHING"
DELETE_ALIAS = "DELETE FROM tenant_aliases WHERE tenant_id = ?1"

LIST_ANCHOR_NAMES = "SELECT name, owner FROM trust_anchors WHERE tenant_id = ?1"
DELETE_ANCHORS = "DELETE FROM trust_anchors WHERE tenant_id = ?1"
INSERT_ANCHOR = "INSERT INTO trust_anchors (tenant_id, name, owner) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING"
CLAIM_NAME = "INSERT INTO trust_anchor_names (name, owner) VALUES (?1, ?2) ON CONFLICT DO NOTHING"
FIND_NAME_OWNER = "SELECT owner FROM trust_anchor_names WHERE name = ?1"
RELEASE_NAME = """
DELETE FROM trust_anchor_names
WHERE name = ?1 AND NOT EXISTS (SELECT 1 FROM trust_anchors WHERE trust_anchors.name = trust_anchor_names.name)"""
FIND_OTHER_USER = "SELECT 1 FROM trust_anchors WHERE name = ?1 AND owner <> ?2 AND tenant_id <> ?3 LIMIT 1"

# Devices

COUNT_DEVICES = "SELECT devices FROM tenant_usage WHERE tenant_id = ?1"
CHANGE_COUNT = """
INSERT INTO tenant_usage (tenant_id, devices) VALUES (?1, ?2)
ON CONFLICT (tenant_id) DO UPDATE SET devices = tenant_usage.devices + excluded.devices RETURNING devices"""
FIND_DEVICE = """
SELECT version, created, updated, auto_provisioned, notification_sent, document
FROM devices WHERE tenant_id = ?1 AND device_id = ?2"""
FIND_DEVICE_TO_CHANGE = f"{FIND_DEVICE} FOR UPDATE"
INSERT_DEVICE = """
INSERT INTO devices
  (tenant_id, device_id, version, created, updated, auto_provisioned, notification_sent, document)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
ON CONFLICT (tenant_id, device_id) DO NOTHING"""
UPDATE_DEVICE = """
UPDATE devices
SET version = ?1, created = ?2, updated = ?3, auto_provisioned = ?4, notification_sent = ?5, document = ?6
WHERE tenant_id = ?7 AND device_id = ?8"""
DELETE_DEVICE = "DELETE FROM devices WHERE tenant_id = ?1 AND device_id = ?2"
FIND_DEVICE_DOCUMENT = "SELECT document FROM devices WHERE tenant_id = ?1 AND device_id = ?2 FOR UPDATE"
LIST_GROUPS = "SELECT group_id FROM device_groups WHERE tenant_id = ?1 AND device_id = ?2"
INSERT_GROUP = "INSERT INTO device_groups (tenant_id, group_id, device_id) VALUES (?1, ?2, ?3)"
DELETE_GROUPS = "DELETE FROM device_groups WHERE tenant_id = ?1 AND device_id = ?2"

# Many devices at once

LIST_NEXT_DEVICES = """
SELECT device_id, created FROM devices WHERE tenant_id = ?1 AND device_id > ?2 ORDER BY device_id LIMIT ?3
FOR UPDATE"""
LIST_DOCUMENTS = "SELECT device_id, document FROM devices WHERE tenant_id = ?1 AND device_id = ANY(?2)"
DELETE_SOME_CREDENTIALS = "DELETE FROM credentials WHERE tenant_id = ?1 AND device_id = ANY(?2)"
DELETE_SOME_SETS = "DELETE FROM credential_sets WHERE tenant_id = ?1 AND device_id = ANY(?2)"
DELETE_SOME_GROUPS = "DELETE FROM device_groups WHERE tenant_id = ?1 AND device_id = ANY(?2)"
DELETE_SOME_DEVICES = "DELETE FROM devices WHERE tenant_id = ?1 AND device_id = ANY(?2)"
LIST_NEXT_SETS = """
SELECT device_id FROM credential_sets WHERE tenant_id = ?1 AND device_id > ?2 ORDER BY device_id LIMIT ?3 FOR UPDATE"""
LIST_PRESENT = "SELECT device_id FROM devices WHERE tenant_id = ?1 AND device_id = ANY(?2)"

# What searches go by: the values of documents, and how many devices there are in each range of ids

INSERT_DEVICE_MEMBER = """
INSERT INTO device_members (tenant_id, member, value, device_id, long_text) VALUES (?1, ?2, ?3, ?4, ?5)"""
DELETE_DEVICE_MEMBER = """
DELETE FROM device_members WHERE tenant_id = ?1 AND member = ?2 AND value = ?3 AND device_id = ?4"""
INSERT_TENANT_MEMBER = "INSERT INTO tenant_members (member, value, tenant_id, long_text) VALUES (?1, ?2, ?3, ?4)"
DELETE_TENANT_MEMBER = "DELETE FROM tenant_members WHERE member = ?1 AND value = ?2 AND tenant_id = ?3"
FIND_TENANT_DOCUMENT = "SELECT document FROM tenants WHERE tenant_id = ?1"

INSERT_RANGE = "INSERT INTO device_ranges (tenant_id, first_id, devices) VALUES (?1, ?2, ?3)"
SET_RANGE = "UPDATE device_ranges SET devices = ?3 WHERE tenant_id = ?1 AND first_id = ?2"
FIND_MIDDLE = """
SELECT device_id FROM devices WHERE tenant_id = ?1 AND device_id >= ?2 ORDER BY device_id LIMIT 1 OFFSET ?3"""
FIND_RANGE = """
SELECT first_id FROM device_ranges WHERE tenant_id = ?1 AND first_id <= ?2 ORDER BY first_id DESC LIMIT 1"""
CHANGE_RANGE = """
UPDATE device_ranges SET devices = devices + ?3 WHERE tenant_id = ?1 AND first_id = ?2 RETURNING devices"""
LIST_RANGES = "SELECT first_id FROM device_ranges WHERE tenant_id = ?1"
DELETE_RANGE = "DELETE FROM device_ranges WHERE tenant_id = ?1 AND first_id = ?2"

# Credentials

FIND_CREDENTIALS = """
SELECT s.version, c.document,
  EXISTS (SELECT 1 FROM devices d WHERE d.tenant_id = s.tenant_id AND d.device_id = s.device_id)
FROM credential_sets s
LEFT JOIN credentials c ON c.tenant_id = s.tenant_id AND c.device_id = s.device_id
WHERE s.tenant_id = ?1 AND s.device_id = ?2
ORDER BY c.position"""
LOCK_CREDENTIALS = "SELECT 1 FROM credential_sets WHERE tenant_id = ?1 AND device_id = ?2 FOR UPDATE"
FIND_CREDENTIAL = "SELECT device_id, document FROM credentials WHERE tenant_id = ?1 AND type = ?2 AND auth_id = ?3"
PUT_CREDENTIAL_SET = """
INSERT INTO credential_sets (tenant_id, device_id, version) VALUES (?1, ?2, ?3)
ON CONFLICT (tenant_id, device_id) DO UPDATE SET version = excluded.version"""
# Changed to what it is, and so locked: nobody takes it for one without a device.
KEEP_CREDENTIAL_SET = """
INSERT INTO credential_sets (tenant_id, device_id, version) VALUES (?1, ?2, ?3)
ON CONFLICT (tenant_id, device_id) DO UPDATE SET version = credential_sets.version RETURNING version"""
DELETE_CREDENTIAL_SET = "DELETE FROM credential_sets WHERE tenant_id = ?1 AND device_id = ?2"
INSERT_CREDENTIAL = """
INSERT INTO credentials (tenant_id, type, auth_id, device_id, position, document) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
ON CONFLICT (tenant_id, type, auth_id) DO NOTHING RETURNING 1"""
DELETE_CREDENTIALS = "DELETE FROM credentials WHERE tenant_id = ?1 AND device_id = ?2"

# Identities

FIND_IDENTITY = "SELECT name, mechanism, password_hash, authorities, created FROM identities WHERE name = ?1"
LIST_IDENTITIES = "SELECT name, mechanism, password_hash, authorities, created FROM identities ORDER BY name"
PUT_IDENTITY = """
INSERT INTO identities (name, mechanism, password_hash, authorities, created) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT (name) DO UPDATE SET mechanism = excluded.mechanism, password_hash = excluded.password_hash,
  authorities = excluded.authorities, created = excluded.created"""
HAS_MILESTONE = "SELECT 1 FROM milestones WHERE name = ?1"
REACH_MILESTONE = "INSERT INTO milestones (name) VALUES (?1) ON CONFLICT DO NOTHING"
DELETE_IDENTITY = "DELETE FROM identities WHERE name = ?1"

# Operators

FIND_OPERATOR = "SELECT name, password_hash, may_reveal_secrets, created FROM operators WHERE name = ?1"
LIST_OPERATORS = "SELECT name, password_hash, may_reveal_secrets, created FROM operators ORDER BY name"
PUT_OPERATOR = """
INSERT INTO operators (name, password_hash, may_reveal_secrets, created) VALUES (?1, ?2, ?3, ?4)
ON CONFLICT (name) DO UPDATE SET password_hash = excluded.password_hash,
  may_reveal_secrets = excluded.may_reveal_secrets, created = excluded.created"""
DELETE_OPERATOR = "DELETE FROM operators WHERE name = ?1"
LOOK_UP_OPERATOR = "SELECT password_hash, may_reveal_secrets FROM operators WHERE name = ?1"
HAS_OPERATORS = "SELECT 1 FROM operators LIMIT 1"

# Look-ups: each joins the tenant, which hides what a deleted one left behind.

LOOK_UP_TENANT = """
SELECT tenant_id, version, document FROM tenants
WHERE tenant_id = coalesce((SELECT tenant_id FROM tenants WHERE tenant_id = ?1),
                           (SELECT tenant_id FROM tenant_aliases WHERE alias = ?1))"""
# This one does not: an anchor is gone before its tenant. What is joined may be passed over as a whole, where statistics
# are those of a registry that had few tenants.
LOOK_UP_ANCHOR = """
SELECT a.tenant_id,
  (SELECT version FROM tenants WHERE tenant_id = a.tenant_id),
  (SELECT document FROM tenants WHERE tenant_id = a.tenant_id)
FROM (SELECT tenant_id FROM trust_anchors WHERE name = ?1
      UNION SELECT tenant_id FROM trust_anchors WHERE name = ?2 ORDER BY tenant_id LIMIT 2) a
ORDER BY a.tenant_id"""
LOOK_UP_REGISTRATION = """
SELECT d.device_id, d.document
FROM devices d JOIN tenants t ON t.tenant_id = d.tenant_id
WHERE d.tenant_id = ?1 AND d.device_id = ?2"""
LOOK_UP_GROUP_MEMBERS = """
SELECT DISTINCT g.device_id
FROM device_groups g JOIN tenants t ON t.tenant_id = g.tenant_id
WHERE g.tenant_id = ?1 AND g.group_id = ANY(?2)
ORDER BY g.device_id"""
LOOK_UP_CREDENTIAL = """
SELECT c.device_id, c.document
FROM credentials c JOIN tenants t ON t.tenant_id = c.tenant_id
WHERE c.tenant_id = ?1 AND c.type = ?2 AND c.auth_id = ?3"""

NOT_FOR_REPLICAS = frozenset((LOOK_UP_OPERATOR, HAS_OPERATORS, LOOK_UP_ANCHOR, LOOK_UP_GROUP_MEMBERS))
"""Look-ups that must not be answered from what was true a moment ago: who may do what, and those of several rows, of
which some may be yet to come."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST_DOCUMENTS: Final = 1
_MAX_ENTRIES: Final = 10_000
"""Index entries of the devices that are deleted in one transaction, some 0.1 s, unless one alone has more."""
_TEXT_OF_AN_ENTRY: Final = 256
"""Characters of a document that take as long as an entry."""
_MANY: Final = 1000
"""Devices that are counted at once, from which on it is quicker to read all ranges than one for each."""
_MAX_RANGE: Final = 2000
"""Devices of a range that is split in two when there is one more."""
# A parsed tenant takes some 15 times the space of its text, and there is a cache for each connection.
_MAX_CACHED_TEXT = 1024 * 1024
_ENTRY_OVERHEAD = 1024


def microseconds(instant: datetime) -> int:
    """Write an instant."""
    return (instant - _EPOCH) // _MICROSECOND


def optional_microseconds(instant: datetime | None) -> int | None:
    """Write an instant, if there is one."""
    return None if instant is None else microseconds(instant)


def instant_of(microseconds: int) -> datetime:
    """Read an instant."""
    return _EPOCH + timedelta(microseconds=microseconds)


def optional_instant(microseconds: int | None) -> datetime | None:
    """Read an instant, if there is one."""
    return None if microseconds is None else instant_of(microseconds)


def text_of(document: JsonObject) -> str:
    """Write a document."""
    return encode(document).decode()


def document_of(text: str, table: str, *key: str) -> JsonObject:
    """Read the document of the row of `table` with this key.

    Raises:
        DamagedRow: It cannot be read.
    """
    return _parse(lambda document: document, text, table, *key)


def _parse(parse: Callable[[JsonObject], T], text: str, table: str, *key: str) -> T:
    """Read the document of the row of `table` with this key, as something.

    Raises:
        DamagedRow: It is none of this kind.
    """
    try:
        document = decode(text.encode())
        if not isinstance(document, dict):
            raise TypeError("not a JSON object")
        return parse(document)
    except Exception as error:  # whatever parsers of what was once valid come across
        raise DamagedRow(f"the document in {table} of {', '.join(map(repr, key))} cannot be read: {error}") from error


# Index entries have a limit in PostgreSQL (some 2,700 bytes), distinguished names have none.
_MAX_NAME_LENGTH: Final = 400


def _anchor_name(kind: str, text: str) -> str:
    if len(text) > _MAX_NAME_LENGTH:
        return f"{kind}#{hashlib.sha256(text.encode()).hexdigest()}"
    return f"{kind}:{text}"


def key_of(name: str) -> str:
    """Return what stands for a name in a key, one that may be long; the document has it whole."""
    if len(name) > _MAX_NAME_LENGTH:
        return f"{name[:_MAX_NAME_LENGTH]}#{hashlib.sha256(name.encode()).hexdigest()}"
    return name


def _anchor_names(tenant: Tenant) -> dict[str, str]:
    """Return the names that a tenant's trust anchors take, each with the subject DN that needs it."""
    names: dict[str, str] = {}
    for anchor in tenant.trust_anchors:
        text = anchor.subject.text
        names.setdefault(_anchor_name("s", text), text)
        names.setdefault(_anchor_name("k", anchor.subject.canonical_key), text)
    return names


def _anchor_owner(tenant_id: str, tenant: Tenant) -> str:
    if tenant.trust_anchor_group is None:
        return f"tenant:{tenant_id}"
    return f"group:{key_of(tenant.trust_anchor_group)}"


def _anchor_conflict(subject_dn: str) -> Conflict:
    return Conflict(
        f"trusted-ca: subject DN {subject_dn} belongs to another tenant outside of this tenant's trust-anchor-group",
        details={"subject-dn": subject_dn},
    )


class _ParsedTenants:
    """Tenants that were read lately: one is read in most use cases and costs more to parse than to read.

    An entry is good only for exactly the text that it was parsed from, so nothing has to tell this cache of changes.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, Tenant]] = {}
        self._size = 0

    def get(self, tenant_id: str, text: str) -> Tenant:
        entry = self._entries.get(tenant_id)
        if entry is not None:
            if entry[0] == text:
                return entry[1]
            self._drop(tenant_id)
        tenant = _parse(stored_tenant, text, "tenants", tenant_id)
        size = len(text) + _ENTRY_OVERHEAD
        if size <= _MAX_CACHED_TEXT // 4:  # one that is larger would push out too many others
            while self._size + size > _MAX_CACHED_TEXT:
                self._drop(next(iter(self._entries)))
            self._entries[tenant_id] = text, tenant
            self._size += size
        return tenant

    def _drop(self, tenant_id: str) -> None:
        text, _ = self._entries.pop(tenant_id)
        self._size -= len(text) + _ENTRY_OVERHEAD


class SqlTransaction:
    """`store.Transaction` over a session; see there. Keeps no state of a transaction, so one serves a connection."""

    def __init__(self, session: Session) -> None:
        self._one = session.one
        self._all = session.all
        self._run = session.run
        self._many = session.many
        self._each = session.each
        self._combine = session.combine
        self._lock = session.lock
        self._array = session.array
        self._tenants = _ParsedTenants()

    async def find_tenant(self, tenant_id: str, *, to_change: bool = False) -> StoredTenant | None:
        row = await self._one(FIND_TENANT_TO_CHANGE if to_change else FIND_TENANT, tenant_id)
        if row is None:
            return None
        version, created, updated, text = row
        return StoredTenant(
            tenant_id=tenant_id,
            version=version,
            created=instant_of(created),
            updated=optional_instant(updated),
            tenant=self._tenants.get(tenant_id, text),
        )

    async def has_tenants(self) -> bool:
        return await self._one(HAS_TENANTS) is not None

    async def find_trust_anchor_clash(self, tenant_id: str, tenant: Tenant) -> str | None:
        owner = _anchor_owner(tenant_id, tenant)
        for name, subject_dn in _anchor_names(tenant).items():
            if await self._one(FIND_OTHER_USER, name, owner, tenant_id) is not None:
                return subject_dn
        return None

    async def insert_tenant(self, stored: StoredTenant, *, purge: bool = True) -> None:
        document = tenant_document(stored.tenant)
        inserted = await self._run(
            INSERT_TENANT,
            stored.tenant_id,
            stored.version,
            microseconds(stored.created),
            optional_microseconds(stored.updated),
            text_of(document),
        )
        if not inserted:
            raise Conflict(f"tenant {stored.tenant_id} exists already")
        if purge:
            for statement in PURGE_TENANT:
                await self._run(statement, stored.tenant_id)
        await self._index_tenant(stored.tenant_id, set(), index_entries(document))
        await self._put_alias(stored.tenant_id, stored.tenant.alias)
        await self._put_anchors(stored.tenant_id, stored.tenant)

    async def update_tenant(self, stored: StoredTenant) -> None:
        document = tenant_document(stored.tenant)
        before = await self._find_tenant_entries(stored.tenant_id)
        updated = await self._run(
            UPDATE_TENANT,
            stored.version,
            microseconds(stored.created),
            optional_microseconds(stored.updated),
            text_of(document),
            stored.tenant_id,
        )
        assert updated, "there is no such tenant"
        await self._index_tenant(stored.tenant_id, before, index_entries(document))
        await self._run(DELETE_ALIAS, stored.tenant_id)
        await self._put_alias(stored.tenant_id, stored.tenant.alias)
        await self._put_anchors(stored.tenant_id, stored.tenant)

    async def delete_tenant(self, tenant_id: str) -> None:
        await self._release_anchors(tenant_id, await self._all(LIST_ANCHOR_NAMES, tenant_id))
        await self._run(DELETE_ALIAS, tenant_id)
        await self._index_tenant(tenant_id, await self._find_tenant_entries(tenant_id), set())
        await self._run(DELETE_TENANT, tenant_id)

    async def _find_tenant_entries(self, tenant_id: str) -> set[IndexEntry]:
        row = await self._one(FIND_TENANT_DOCUMENT, tenant_id)
        return set() if row is None else index_entries(document_of(row[0], "tenants", tenant_id))

    async def _index_tenant(self, tenant_id: str, before: set[IndexEntry], after: set[IndexEntry]) -> None:
        await self._many(DELETE_TENANT_MEMBER, [(member, key, tenant_id) for member, key, _ in before - after])
        await self._many(INSERT_TENANT_MEMBER, [(member, key, tenant_id, text) for member, key, text in after - before])

    async def _put_alias(self, tenant_id: str, alias: str | None) -> None:
        if alias is not None and not await self._run(INSERT_ALIAS, alias, tenant_id):
            raise Conflict(f"alias: {alias} is the alias of another tenant")

    async def _put_anchors(self, tenant_id: str, tenant: Tenant) -> None:
        owner = _anchor_owner(tenant_id, tenant)
        names = _anchor_names(tenant)
        present = await self._all(LIST_ANCHOR_NAMES, tenant_id)
        if {(name, owner) for name in names} == {tuple(row) for row in present}:
            return
        # All go before any comes: a tenant that is alone with a name may change the group it holds it for.
        await self._release_anchors(tenant_id, present)
        # In one order everywhere, so that no two wait for each other.
        for name, subject_dn in sorted(names.items()):
            await self._run(CLAIM_NAME, name, owner)
            row = await self._one(FIND_NAME_OWNER, name)
            # Without a row, the last user of the name has just gone, and the insertion fails: it is tried again.
            if row is not None and row[0] != owner:
                raise _anchor_conflict(subject_dn)
            await self._run(INSERT_ANCHOR, tenant_id, name, owner)

    async def _release_anchors(self, tenant_id: str, present: Sequence[Row]) -> None:
        if present:
            await self._run(DELETE_ANCHORS, tenant_id)
            for name in sorted(row[0] for row in present):
                await self._run(RELEASE_NAME, name)

    async def count_devices(self, tenant_id: str) -> int:
        row = await self._one(COUNT_DEVICES, tenant_id)
        return 0 if row is None else int(row[0])

    async def find_device(self, tenant_id: str, device_id: str, *, to_change: bool = False) -> StoredDevice | None:
        row = await self._one(FIND_DEVICE_TO_CHANGE if to_change else FIND_DEVICE, tenant_id, device_id)
        if row is None:
            return None
        version, created, updated, auto_provisioned, notification_sent, text = row
        return StoredDevice(
            tenant_id=tenant_id,
            device_id=device_id,
            version=version,
            created=instant_of(created),
            updated=optional_instant(updated),
            auto_provisioned=bool(auto_provisioned),
            notification_sent=bool(notification_sent),
            device=_parse(stored_device, text, "devices", tenant_id, device_id),
        )

    async def insert_device(
        self, stored: StoredDevice, credentials: StoredCredentials, *, max_devices: int = -1
    ) -> bool:
        # First, because nothing has to be undone if it is found here.
        await self._check_auth_ids(credentials)
        document = device_document(stored.device)
        inserted = await self._run(
            INSERT_DEVICE,
            stored.tenant_id,
            stored.device_id,
            stored.version,
            microseconds(stored.created),
            optional_microseconds(stored.updated),
            int(stored.auto_provisioned),
            int(stored.notification_sent),
            text_of(document),
        )
        if not inserted:
            raise Conflict(f"device {stored.device_id} exists already")
        await self._index_device(stored.tenant_id, stored.device_id, set(), index_entries(document))
        await self._insert_groups(stored)
        version = await self._put_first_set(credentials)
        await self._insert_credentials(credentials)
        devices = await self._combine(count_changes, Counted(stored.tenant_id, (stored.device_id,), 1))
        if 0 <= max_devices < devices:
            raise DeviceLimitReached(max_devices)
        return version == credentials.version

    async def _put_first_set(self, credentials: StoredCredentials) -> str:
        """Put the set of a new device, unless there is one that nothing is added to; return the version."""
        row = credentials.tenant_id, credentials.device_id, credentials.version
        if credentials.credentials:
            await self._run(PUT_CREDENTIAL_SET, *row)
            return credentials.version
        kept = await self._one(KEEP_CREDENTIAL_SET, *row)
        assert kept is not None, "it is there or was put"
        return str(kept[0])

    async def _index_device(
        self, tenant_id: str, device_id: str, before: set[IndexEntry], after: set[IndexEntry]
    ) -> None:
        gone, new = before - after, after - before
        if gone:
            await self._many(DELETE_DEVICE_MEMBER, [(tenant_id, member, key, device_id) for member, key, _ in gone])
        if new:
            await self._many(
                INSERT_DEVICE_MEMBER, [(tenant_id, member, key, device_id, text) for member, key, text in new]
            )

    async def update_device(self, stored: StoredDevice) -> None:
        document = device_document(stored.device)
        before = await self._one(FIND_DEVICE_DOCUMENT, stored.tenant_id, stored.device_id)
        assert before is not None, "there is no such device"
        updated = await self._run(
            UPDATE_DEVICE,
            stored.version,
            microseconds(stored.created),
            optional_microseconds(stored.updated),
            int(stored.auto_provisioned),
            int(stored.notification_sent),
            text_of(document),
            stored.tenant_id,
            stored.device_id,
        )
        assert updated, "there is no such device"
        entries = index_entries(document_of(before[0], "devices", stored.tenant_id, stored.device_id))
        await self._index_device(stored.tenant_id, stored.device_id, entries, index_entries(document))
        present = {group for (group,) in await self._all(LIST_GROUPS, stored.tenant_id, stored.device_id)}
        if present != set(map(key_of, stored.device.member_of)):
            await self._run(DELETE_GROUPS, stored.tenant_id, stored.device_id)
            await self._insert_groups(stored)

    async def delete_device(self, tenant_id: str, device_id: str) -> None:
        row = await self._one(FIND_DEVICE_DOCUMENT, tenant_id, device_id)
        if row is None:
            return
        await self._run(DELETE_CREDENTIALS, tenant_id, device_id)
        await self._run(DELETE_CREDENTIAL_SET, tenant_id, device_id)
        await self._run(DELETE_GROUPS, tenant_id, device_id)
        await self._run(DELETE_DEVICE, tenant_id, device_id)
        entries = index_entries(document_of(row[0], "devices", tenant_id, device_id))
        await self._index_device(tenant_id, device_id, entries, set())
        await self._combine(count_changes, Counted(tenant_id, (device_id,), -1))

    async def delete_devices(self, tenant_id: str, after: str, limit: int, created_until: datetime) -> Slice:
        rows = await self._all(LIST_NEXT_DEVICES, tenant_id, after, limit)
        until = microseconds(created_until)
        doomed = [device_id for device_id, created in rows if created <= until]
        entries = await self._list_entries(tenant_id, doomed)
        ids = list(entries)
        if ids:
            some = self._array(ids)
            for statement in (DELETE_SOME_CREDENTIALS, DELETE_SOME_SETS, DELETE_SOME_GROUPS, DELETE_SOME_DEVICES):
                await self._run(statement, tenant_id, some)
            await self._many(
                DELETE_DEVICE_MEMBER,
                [
                    (tenant_id, member, key, device_id)
                    for device_id, some_entries in entries.items()
                    for member, key, _ in some_entries
                ],
            )
            await self._combine(count_changes, Counted(tenant_id, ids, -1))
        if len(ids) < len(doomed):
            return Slice(len(ids), ids[-1])
        return Slice(len(ids), rows[-1][0] if len(rows) == limit else None)

    async def _list_entries(self, tenant_id: str, device_ids: Sequence[str]) -> dict[str, set[IndexEntry]]:
        """Return what the index holds of devices, in their order; only of the first few if their documents are large.

        Not of all at once: others have their turn between two statements.
        """
        found: dict[str, set[IndexEntry]] = {}
        number, size = _FIRST_DOCUMENTS, 0
        while number and len(found) < len(device_ids):
            some = device_ids[len(found) : len(found) + number]
            rows = await self._all(LIST_DOCUMENTS, tenant_id, self._array(some))
            for device_id, text in sorted(rows, key=lambda row: str(row[0])):
                if size >= _MAX_ENTRIES:  # large ones come after small ones
                    break
                entries = found[device_id] = index_entries(document_of(text, "devices", tenant_id, device_id))
                size += 1 + len(entries) + len(text) // _TEXT_OF_AN_ENTRY
            number = min(2 * number, max(0, _MAX_ENTRIES - size) * len(found) // size)
        return found

    async def delete_credential_sets(self, tenant_id: str, after: str, limit: int) -> Slice:
        rows = await self._all(LIST_NEXT_SETS, tenant_id, after, limit)
        # A statement of its own: one that has waited sees nothing but what it has locked as it is now.
        present = set()
        if rows:
            present = {
                row[0] for row in await self._all(LIST_PRESENT, tenant_id, self._array([row[0] for row in rows]))
            }
        ids = [device_id for (device_id,) in rows if device_id not in present]
        if ids:
            some = self._array(ids)
            await self._run(DELETE_SOME_CREDENTIALS, tenant_id, some)
            await self._run(DELETE_SOME_SETS, tenant_id, some)
        return Slice(len(ids), rows[-1][0] if len(rows) == limit else None)

    async def _insert_groups(self, stored: StoredDevice) -> None:
        groups = dict.fromkeys(stored.device.member_of)
        if groups:
            await self._many(INSERT_GROUP, [(stored.tenant_id, key_of(group), stored.device_id) for group in groups])

    async def find_credentials(
        self, tenant_id: str, device_id: str, *, to_change: bool = False
    ) -> StoredCredentials | None:
        if to_change:
            # A statement of its own: one that has waited sees the row that it has locked as it is now, and everything
            # else as it was when it began.
            await self._one(LOCK_CREDENTIALS, tenant_id, device_id)
        rows = await self._all(FIND_CREDENTIALS, tenant_id, device_id)
        if not rows:
            return None
        return StoredCredentials(
            tenant_id=tenant_id,
            device_id=device_id,
            version=rows[0][0],
            credentials=tuple(
                _parse(stored_credential, text, "credentials", tenant_id, device_id)
                for _, text, _ in rows
                if text is not None
            ),
            has_device=bool(rows[0][2]),
        )

    async def find_credential(self, tenant_id: str, type_: str, auth_id: str) -> tuple[str, Credential] | None:
        row = await self._one(FIND_CREDENTIAL, tenant_id, type_, key_of(auth_id))
        if row is None:
            return None
        device_id, text = row
        return device_id, _parse(stored_credential, text, "credentials", tenant_id, device_id)

    async def replace_credentials(self, stored: StoredCredentials) -> None:
        await self._check_auth_ids(stored)
        await self._run(PUT_CREDENTIAL_SET, stored.tenant_id, stored.device_id, stored.version)
        await self._run(DELETE_CREDENTIALS, stored.tenant_id, stored.device_id)
        await self._insert_credentials(stored)

    async def _check_auth_ids(self, stored: StoredCredentials) -> None:
        """Find a pair of type and auth-id that another device has."""
        if not stored.credentials:
            return
        keys = [(stored.tenant_id, one.type, key_of(one.auth_id)) for one in stored.credentials]
        found = await self._each(FIND_CREDENTIAL, keys)
        for credential, row in zip(stored.credentials, found, strict=True):
            if row is not None and row[0] != stored.device_id:
                raise _auth_id_conflict(credential)

    async def _insert_credentials(self, stored: StoredCredentials) -> None:
        rows = [
            (
                stored.tenant_id,
                credential.type,
                key_of(credential.auth_id),
                stored.device_id,
                position,
                text_of(stored_document(credential)),
            )
            for position, credential in enumerate(stored.credentials)
        ]
        inserted = await self._each(INSERT_CREDENTIAL, rows)
        for credential, row in zip(stored.credentials, inserted, strict=True):
            if row is None:
                raise _auth_id_conflict(credential)

    async def find_identity(self, name: str) -> Identity | None:
        await self._lock(_LOGINS)
        row = await self._one(FIND_IDENTITY, name)
        return None if row is None else _identity(row)

    async def list_identities(self) -> list[Identity]:
        return [_identity(row) for row in await self._all(LIST_IDENTITIES)]

    async def has_had_identities(self) -> bool:
        await self._lock(_LOGINS)
        return await self._one(HAS_MILESTONE, _IDENTITIES) is not None

    async def put_identity(self, identity: Identity) -> None:
        await self._lock(_LOGINS)
        await self._run(REACH_MILESTONE, _IDENTITIES)
        await self._run(
            PUT_IDENTITY,
            identity.name,
            identity.mechanism,
            identity.password_hash,
            text_of(dict(identity.authorities)),
            microseconds(identity.created),
        )

    async def delete_identity(self, name: str) -> None:
        await self._lock(_LOGINS)
        await self._run(DELETE_IDENTITY, name)

    async def find_operator(self, name: str) -> Operator | None:
        await self._lock(_LOGINS)
        row = await self._one(FIND_OPERATOR, name)
        return None if row is None else _operator(row)

    async def list_operators(self) -> list[Operator]:
        return [_operator(row) for row in await self._all(LIST_OPERATORS)]

    async def put_operator(self, operator: Operator) -> None:
        await self._lock(_LOGINS)
        await self._run(
            PUT_OPERATOR,
            operator.name,
            operator.password_hash,
            int(operator.may_reveal_secrets),
            microseconds(operator.created),
        )

    async def delete_operator(self, name: str) -> None:
        await self._lock(_LOGINS)
        await self._run(DELETE_OPERATOR, name)

    async def record(self, change: Change) -> None:
        # Nothing listens yet. Whatever will (audit, notifications) reads what is proven here.
        assert change.before != change.after, "a change leads to another version"


_IDENTITIES = "identities"
_LOGINS = "logins"
"""What is done to logins is done by one after the other: it is rare, and what was found must still be so."""


def _auth_id_conflict(credential: Credential) -> Conflict:
    return Conflict(f"auth-id {credential.auth_id} of type {credential.type} belongs to another device")


# Counting devices: last in a transaction, because every other one of the tenant waits from here on for its end


class Counted(NamedTuple):
    """Devices of a tenant that have come (1) or gone (-1)."""

    tenant_id: str
    device_ids: Sequence[str]
    change: int


async def count_changes(session: Session, counted: Sequence[Counted]) -> list[int]:
    """Count devices in `tenant_usage` and `device_ranges`.

    The row of the tenant comes first: whoever has it locked is alone with the tenant's ranges, so that nobody splits
    one that somebody else is counting in.

    Returns:
        For each, how many devices the tenant had after it.
    """
    changes: dict[str, list[int]] = {}
    for one in counted:
        changes.setdefault(one.tenant_id, []).append(one.change * len(one.device_ids))
    tenants = sorted(changes)
    rows = await session.each(CHANGE_COUNT, [(tenant_id, sum(changes[tenant_id])) for tenant_id in tenants])
    after = {
        tenant_id: accumulate(changes[tenant_id], initial=row[0] - sum(changes[tenant_id]))
        for tenant_id, row in zip(tenants, rows, strict=True)
        if row is not None
    }
    for begin in after.values():
        next(begin)
    await _count_in_ranges(session, counted)
    return [next(after[one.tenant_id]) for one in counted]


async def _count_in_ranges(session: Session, counted: Sequence[Counted]) -> None:
    devices = [
        (one.tenant_id, device_id, one.change)
        for one in counted
        if len(one.device_ids) <= _MANY
        for device_id in one.device_ids
    ]
    found = await session.each(FIND_RANGE, [(tenant_id, device_id) for tenant_id, device_id, _ in devices])
    firsts = [
        (tenant_id, None if row is None else row[0], change)
        for (tenant_id, _, change), row in zip(devices, found, strict=True)
    ]
    for one in counted:
        if len(one.device_ids) > _MANY:
            there = sorted(row[0] for row in await session.all(LIST_RANGES, one.tenant_id))
            for device_id in one.device_ids:
                place = bisect_right(there, device_id)
                firsts.append((one.tenant_id, there[place - 1] if place else None, one.change))
    present: dict[tuple[str, str], int] = {}
    new: dict[tuple[str, str], int] = {}
    for tenant_id, first_id, change in firsts:
        # The range of all ids that come before those of every other range: there always is one.
        ranges, key = (new, (tenant_id, "")) if first_id is None else (present, (tenant_id, first_id))
        ranges[key] = ranges.get(key, 0) + change
    keys = sorted(present)
    if new:
        await session.many(INSERT_RANGE, [(*key, number) for key, number in new.items()])
    rows = await session.each(CHANGE_RANGE, [(*key, present[key]) for key in keys]) if keys else []
    numbers = new | {key: row[0] for key, row in zip(keys, rows, strict=True) if row is not None}
    for (tenant_id, first_id), number in numbers.items():
        if number > _MAX_RANGE:
            await _split_range(session, tenant_id, first_id, number)
        elif number == 0 and first_id:
            await session.run(DELETE_RANGE, tenant_id, first_id)


async def _split_range(session: Session, tenant_id: str, first_id: str, devices: int) -> None:
    """Split a range into equal parts that are half as large as a range may be, or a bit more."""
    parts = devices // (_MAX_RANGE - _MAX_RANGE // 2)
    size = devices // parts
    await session.run(SET_RANGE, tenant_id, first_id, size)
    new: list[tuple[str, str, int]] = []
    for number in range(1, parts):
        middle = await session.one(FIND_MIDDLE, tenant_id, first_id, size)
        assert middle is not None, "a range counts more devices than there are"
        (first_id,) = middle
        new.append((tenant_id, first_id, size if number < parts - 1 else devices - size * number))
    await session.many(INSERT_RANGE, new)


def _identity(row: Row) -> Identity:
    name, mechanism, password_hash, authorities, created = row
    return Identity(
        name=name,
        mechanism=mechanism,
        password_hash=password_hash,
        authorities=_parse(lambda document: cast(dict[str, str], document), authorities, "identities", name),
        created=instant_of(created),
    )


def _operator(row: Row) -> Operator:
    name, password_hash, may_reveal_secrets, created = row
    return Operator(
        name=name,
        password_hash=password_hash,
        may_reveal_secrets=bool(may_reveal_secrets),
        created=instant_of(created),
    )


class SqlLookups:
    """`store.Lookups` over a session; see there."""

    def __init__(self, session: Session) -> None:
        self._one = session.one
        self._all = session.all
        self._array = session.array
        self.batch = session.batch

    async def find_tenant(self, tenant_id: str) -> TenantRow | None:
        row = await self._one(LOOK_UP_TENANT, tenant_id)
        return None if row is None else TenantRow(*row)

    async def find_tenants_by_anchor(self, canonical_key: str, subject_dn: str) -> Sequence[TenantRow]:
        names = _anchor_name("k", canonical_key), _anchor_name("s", subject_dn)
        return [TenantRow(*row) for row in await self._all(LOOK_UP_ANCHOR, *names)]

    async def find_registration(self, tenant_id: str, device_id: str) -> RegistrationRow | None:
        row = await self._one(LOOK_UP_REGISTRATION, tenant_id, device_id)
        return None if row is None else RegistrationRow(*row)

    async def find_group_members(self, tenant_id: str, groups: Sequence[str]) -> list[str]:
        rows = await self._all(LOOK_UP_GROUP_MEMBERS, tenant_id, self._array([key_of(group) for group in groups]))
        return [row[0] for row in rows]

    async def find_credential(self, tenant_id: str, type_: str, auth_id: str) -> CredentialRow | None:
        row = await self._one(LOOK_UP_CREDENTIAL, tenant_id, type_, key_of(auth_id))
        return None if row is None else CredentialRow(*row)

    async def find_operator(self, name: str) -> OperatorRow | None:
        row = await self._one(LOOK_UP_OPERATOR, name)
        return None if row is None else OperatorRow(row[0], bool(row[1]))

    async def has_operators(self) -> bool:
        return await self._one(HAS_OPERATORS) is not None
