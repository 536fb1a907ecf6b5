"""Every query on device connections, written once; rows to `DeviceConnection` and back.

Knows no driver, as `sql.py`, whose conventions for statements hold here too.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from kamado.connections import DeviceConnection, Key
from kamado.storage.sql import Row, Session, microseconds, optional_instant, optional_microseconds

__all__ = ["MARKER", "SqlConnectionLookups", "SqlConnectionTransaction"]

MARKER: Final = "device_connections"
"""The table by which a file of its own is known."""

FIND_CONNECTION = """
SELECT gateway_id, gateway_updated, adapter_instance_id, adapter_instance_expires
FROM device_connections WHERE tenant_id = ?1 AND device_id = ?2"""
FIND_CONNECTION_TO_CHANGE = f"{FIND_CONNECTION} FOR UPDATE"
FIND_ADAPTER_INSTANCES = """
SELECT device_id, adapter_instance_id
FROM device_connections
WHERE tenant_id = ?1 AND device_id = ANY(?2) AND adapter_instance_id IS NOT NULL
  AND (adapter_instance_expires IS NULL OR adapter_instance_expires > ?3)"""
UPDATE_GATEWAY = """
UPDATE device_connections SET gateway_id = ?1, gateway_updated = ?2 WHERE tenant_id = ?3 AND device_id = ?4"""
UPDATE_ADAPTER_INSTANCE = """
UPDATE device_connections SET adapter_instance_id = ?1, adapter_instance_expires = ?2
WHERE tenant_id = ?3 AND device_id = ?4"""
INSERT_CONNECTION = """
INSERT INTO device_connections
  (tenant_id, device_id, gateway_id, gateway_updated, adapter_instance_id, adapter_instance_expires)
VALUES (?1, ?2, ?3, ?4, ?5, ?6)"""
DELETE_CONNECTION = "DELETE FROM device_connections WHERE tenant_id = ?1 AND device_id = ?2 RETURNING 1"
LIST_CONNECTIONS = """
SELECT tenant_id, device_id, gateway_id, gateway_updated, adapter_instance_id, adapter_instance_expires
FROM device_connections WHERE (tenant_id, device_id) > (?1, ?2)
ORDER BY tenant_id, device_id LIMIT ?3"""
COUNT_CONNECTIONS = "SELECT devices FROM connection_usage WHERE tenant_id = ?1"
CHANGE_COUNT = """
INSERT INTO connection_usage (tenant_id, devices) VALUES (?1, ?2)
ON CONFLICT (tenant_id) DO UPDATE SET devices = connection_usage.devices + excluded.devices"""
FORGET_COUNT = "DELETE FROM connection_usage WHERE tenant_id = ?1 AND devices <= 0"


def _connection(row: Row) -> DeviceConnection:
    gateway_id, updated, adapter_instance_id, expires = row
    return DeviceConnection(gateway_id, optional_instant(updated), adapter_instance_id, optional_instant(expires))


class SqlConnectionTransaction:
    """`connections.ConnectionTransaction` over a session; see there."""

    def __init__(self, session: Session) -> None:
        self._one = session.one
        self._all = session.all
        self._run = session.run
        self._each = session.each
        self._combine = session.combine

    async def find_connection(self, tenant_id: str, device_id: str) -> DeviceConnection | None:
        row = await self._one(FIND_CONNECTION_TO_CHANGE, tenant_id, device_id)
        return None if row is None else _connection(row)

    async def find_connections(self, keys: Sequence[Key]) -> list[DeviceConnection | None]:
        rows = await self._each(FIND_CONNECTION_TO_CHANGE, keys)
        return [None if row is None else _connection(row) for row in rows]

    async def update_gateway(self, tenant_id: str, device_id: str, gateway_id: str, now: datetime) -> bool:
        return await self._run(UPDATE_GATEWAY, gateway_id, microseconds(now), tenant_id, device_id) > 0

    async def update_adapter_instance(
        self, tenant_id: str, device_id: str, adapter_instance_id: str | None, expires: datetime | None
    ) -> bool:
        until = optional_microseconds(expires)
        return await self._run(UPDATE_ADAPTER_INSTANCE, adapter_instance_id, until, tenant_id, device_id) > 0

    async def insert_connection(self, tenant_id: str, device_id: str, connection: DeviceConnection) -> None:
        gateway_id, updated, adapter_instance_id, expires = connection
        times = optional_microseconds(updated), optional_microseconds(expires)
        await self._run(INSERT_CONNECTION, tenant_id, device_id, gateway_id, times[0], adapter_instance_id, times[1])
        await self._combine(_count, (tenant_id, 1))

    async def delete_connections(self, keys: Sequence[Key]) -> None:
        rows = await self._each(DELETE_CONNECTION, keys)
        deleted = Counter(tenant_id for (tenant_id, _), row in zip(keys, rows, strict=True) if row is not None)
        for tenant_id, number in sorted(deleted.items()):
            await self._combine(_count, (tenant_id, -number))
            await self._run(FORGET_COUNT, tenant_id)

    async def count_connections(self, tenant_id: str) -> int:
        row = await self._one(COUNT_CONNECTIONS, tenant_id)
        return 0 if row is None else int(row[0])

    async def list_connections(self, after: Key, limit: int) -> list[tuple[Key, DeviceConnection]]:
        rows = await self._all(LIST_CONNECTIONS, *after, limit)
        return [((row[0], row[1]), _connection(row[2:])) for row in rows]


async def _count(session: Session, counted: Sequence[tuple[str, int]]) -> list[None]:
    """Count entries that have come or gone."""
    changes: Counter[str] = Counter()
    for tenant_id, change in counted:
        changes[tenant_id] += change
    await session.many(CHANGE_COUNT, sorted(changes.items()))
    return [None] * len(counted)


class SqlConnectionLookups:
    """The reads of `connections.Connections` over a session; see there."""

    def __init__(self, session: Session) -> None:
        self._one = session.one
        self._all = session.all
        self._array = session.array
        self.batch = session.batch

    async def find_connection(self, tenant_id: str, device_id: str) -> DeviceConnection | None:
        row = await self._one(FIND_CONNECTION, tenant_id, device_id)
        return None if row is None else _connection(row)

    async def find_adapter_instances(
        self, tenant_id: str, device_ids: Sequence[str], now: datetime
    ) -> list[tuple[str, str]]:
        rows = await self._all(FIND_ADAPTER_INSTANCES, tenant_id, self._array(device_ids), microseconds(now))
        return [(row[0], row[1]) for row in rows]
