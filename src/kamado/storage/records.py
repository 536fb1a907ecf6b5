"""Whole records, page by page, as they are: how a registry moves to another database, and how many devices come in at
once.

A record is a row without what is derived from it; that is made anew from its document, as if it had been written here.
"""

# ruff: noqa: S608 - the parts of a statement are texts of this file

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, NamedTuple, cast

from kamado.credentials import stored_document
from kamado.devices import device_document
from kamado.document import JsonObject
from kamado.search import index_entries
from kamado.storage.sql import (
    INSERT_DEVICE_MEMBER,
    INSERT_GROUP,
    INSERT_TENANT_MEMBER,
    LIST_PRESENT,
    Counted,
    SqlTransaction,
    count_changes,
    document_of,
    key_of,
    microseconds,
    optional_microseconds,
    text_of,
)
from kamado.store import CopyNote, Record, RecordKind, StoredCredentials, StoredDevice
from kamado.tenants import stored_tenant

__all__ = ["COPY_LOCK", "HAS_COPY", "UNFINISHED", "RegistryTransaction"]


class _Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    """Those of the key first."""


_TABLES: Final = {
    RecordKind.TENANT: _Table("tenants", ("tenant_id", "version", "created", "updated", "document")),
    RecordKind.DEVICE: _Table(
        "devices",
        (
            *("tenant_id", "device_id", "version", "created", "updated"),
            *("auto_provisioned", "notification_sent", "document"),
        ),
    ),
    RecordKind.CREDENTIALS: _Table("credential_sets", ("tenant_id", "device_id", "version")),
    RecordKind.CREDENTIAL: _Table("credentials", ("tenant_id", "type", "auth_id", "device_id", "position", "document")),
    RecordKind.IDENTITY: _Table("identities", ("name", "mechanism", "password_hash", "authorities", "created")),
    RecordKind.OPERATOR: _Table("operators", ("name", "password_hash", "may_reveal_secrets", "created")),
    RecordKind.MILESTONE: _Table("milestones", ("name",)),
}


def _numbered(first: int, number: int) -> str:
    return ", ".join(f"?{n}" for n in range(first, first + number))


def _list(kind: RecordKind) -> str:
    table, size = _TABLES[kind], kind.key_size
    key = ", ".join(table.columns[:size])
    return (
        f"SELECT {', '.join(table.columns)} FROM {table.name} "
        f"WHERE ({key}) > ({_numbered(1, size)}) ORDER BY {key} LIMIT ?{size + 1}"
    )


def _insert(kind: RecordKind) -> str:
    # Not ON CONFLICT: what nobody else writes cannot clash, and telling which have come in costs as much again.
    table = _TABLES[kind]
    return f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({_numbered(1, len(table.columns))})"


LIST_RECORDS: Final = {kind: _list(kind) for kind in RecordKind}
INSERT_RECORD: Final = {kind: _insert(kind) for kind in RecordKind}
COUNT_RECORDS: Final = {kind: f"SELECT count(*) FROM {_TABLES[kind].name}" for kind in RecordKind}

FIND_SCHEMA: Final = "SELECT max(version) FROM schema_version"
FIND_COPY: Final = "SELECT source, state FROM unfinished_copies"
PUT_COPY: Final = """
INSERT INTO unfinished_copies (source, state) VALUES (?1, ?2)
ON CONFLICT (source) DO UPDATE SET state = excluded.state"""
LIST_PRESENT_SETS: Final = "SELECT device_id FROM credential_sets WHERE tenant_id = ?1 AND device_id = ANY(?2)"
FIND_OWNER: Final = "SELECT device_id FROM credentials WHERE tenant_id = ?1 AND type = ?2 AND auth_id = ?3"
_AT_ONCE: Final = 500
"""Devices that are looked for, or inserted, by one statement."""

DELETE_COPY: Final = "DELETE FROM unfinished_copies"
HAS_COPY: Final = "SELECT EXISTS (SELECT 1 FROM unfinished_copies)"

COPY_LOCK: Final = "copy"
"""Whoever copies locks this name in each transaction; where transactions go side by side, everybody else that writes
shares it."""
UNFINISHED: Final = "the database is an unfinished copy of another one, and is not changed until the copy is complete"
"""What everybody else is told that wants to write meanwhile."""


class RegistryTransaction(SqlTransaction):
    """`store.Transaction`, whole."""

    async def find_schema(self) -> int:
        row = await self._one(FIND_SCHEMA)
        assert row is not None
        return int(row[0])

    async def list_records(self, kind: RecordKind, after: Record, limit: int) -> list[Record]:
        # No key is empty.
        key = after or ("",) * kind.key_size
        return [tuple(row) for row in await self._all(LIST_RECORDS[kind], *key, limit)]

    async def count_records(self, kind: RecordKind) -> int:
        row = await self._one(COUNT_RECORDS[kind])
        assert row is not None
        return int(row[0])

    async def insert_records(self, kind: RecordKind, records: Sequence[Record]) -> None:
        await self._many(INSERT_RECORD[kind], records)
        if kind is RecordKind.TENANT:
            await self._derive_from_tenants(records)
        elif kind is RecordKind.DEVICE:
            documents = _documents(RecordKind.DEVICE, records)
            await self._derive_from_devices(documents)
            await self._count_devices(key for key, _ in documents)

    async def _derive_from_tenants(self, records: Sequence[Record]) -> None:
        documents = _documents(RecordKind.TENANT, records)
        await self._many(
            INSERT_TENANT_MEMBER,
            [
                (member, key, tenant_id, text)
                for (tenant_id,), document in documents
                for member, key, text in index_entries(document)
            ],
        )
        for (tenant_id,), document in documents:
            if "alias" in document or "trusted-ca" in document:
                tenant = stored_tenant(document)
                await self._put_alias(tenant_id, tenant.alias)
                await self._put_anchors(tenant_id, tenant)

    async def _derive_from_devices(self, documents: Sequence[tuple[tuple[str, ...], JsonObject]]) -> None:
        await self._many(
            INSERT_DEVICE_MEMBER,
            [
                (tenant_id, member, key, device_id, text)
                for (tenant_id, device_id), document in documents
                for member, key, text in index_entries(document)
            ],
        )
        await self._many(
            INSERT_GROUP,
            [
                (tenant_id, key_of(group), device_id)
                for (tenant_id, device_id), document in documents
                for group in dict.fromkeys(cast(list[str], document.get("memberOf", ())))
            ],
        )

    async def _count_devices(self, keys: Iterable[Sequence[str]]) -> None:
        ids: dict[str, list[str]] = {}
        for tenant_id, device_id in keys:
            ids.setdefault(tenant_id, []).append(device_id)
        # In one order everywhere, so that no two wait for each other.
        for tenant_id, device_ids in sorted(ids.items()):
            await self._combine(count_changes, Counted(tenant_id, device_ids, 1))

    async def find_taken(self, tenant_id: str, device_ids: Sequence[str]) -> set[str]:
        taken: set[str] = set()
        for start in range(0, len(device_ids), _AT_ONCE):
            some = self._array(device_ids[start : start + _AT_ONCE])
            for statement in (LIST_PRESENT, LIST_PRESENT_SETS):
                taken.update(row[0] for row in await self._all(statement, tenant_id, some))
        return taken

    async def find_owners(self, tenant_id: str, names: Sequence[tuple[str, str]]) -> list[str | None]:
        rows = await self._each(FIND_OWNER, [(tenant_id, type_, key_of(auth_id)) for type_, auth_id in names])
        return [None if row is None else row[0] for row in rows]

    async def insert_devices(self, devices: Iterable[tuple[StoredDevice, StoredCredentials]]) -> None:
        keys: list[tuple[str, str]] = []
        rest = iter(devices)
        while some := list(islice(rest, _AT_ONCE)):
            await self._insert_devices(some)
            keys += [(stored.tenant_id, stored.device_id) for stored, _ in some]
        await self._count_devices(keys)

    async def _insert_devices(self, devices: Sequence[tuple[StoredDevice, StoredCredentials]]) -> None:
        documents = [((stored.tenant_id, stored.device_id), device_document(stored.device)) for stored, _ in devices]
        await self._many(
            INSERT_RECORD[RecordKind.DEVICE],
            [
                (
                    *(stored.tenant_id, stored.device_id, stored.version),
                    *(microseconds(stored.created), optional_microseconds(stored.updated)),
                    *(int(stored.auto_provisioned), int(stored.notification_sent)),
                    text_of(document),
                )
                for (stored, _), (_, document) in zip(devices, documents, strict=True)
            ],
        )
        await self._derive_from_devices(documents)
        sets = [credentials for _, credentials in devices]
        await self.insert_records(
            RecordKind.CREDENTIALS, [(stored.tenant_id, stored.device_id, stored.version) for stored in sets]
        )
        await self.insert_records(
            RecordKind.CREDENTIAL,
            [
                (
                    *(stored.tenant_id, one.type, key_of(one.auth_id), stored.device_id),
                    *(position, text_of(stored_document(one))),
                )
                for stored in sets
                for position, one in enumerate(stored.credentials)
            ],
        )

    async def find_copy(self) -> CopyNote | None:
        await self._lock(COPY_LOCK)
        row = await self._one(FIND_COPY)
        if row is None:
            return None
        source, text = row
        state = json.loads(text)
        kind = state["kind"]
        return CopyNote(
            source=source,
            kind=None if kind is None else RecordKind(kind),
            last=tuple(state["last"]),
            records=state["records"],
        )

    async def put_copy(self, note: CopyNote) -> None:
        state = {"kind": note.kind, "last": note.last, "records": note.records}
        await self._run(PUT_COPY, note.source, json.dumps(state))

    async def delete_copy(self) -> None:
        await self._run(DELETE_COPY)


def _documents(kind: RecordKind, records: Sequence[Record]) -> list[tuple[tuple[str, ...], JsonObject]]:
    """Return the documents of records, each with its key."""
    table, size = _TABLES[kind], kind.key_size
    column = table.columns.index("document")
    keys = [cast(tuple[str, ...], record[:size]) for record in records]
    return [
        (key, document_of(cast(str, record[column]), table.name, *key))
        for key, record in zip(keys, records, strict=True)
    ]
