"""A real SQLite store that a test fills with the JSON documents it wants to ask about."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from kamado.auth import LOCAL_OPERATOR, Principal
from kamado.credentials import stored_credential
from kamado.devices import stored_device
from kamado.document import JsonObject, new_id
from kamado.storage import open_store
from kamado.store import Store, StoredCredentials, StoredDevice, StoredTenant, Transaction
from kamado.tenants import parse_tenant

__all__ = ["ADAPTER", "Clock", "SampleStore"]

T = TypeVar("T")

ADAPTER: Principal = LOCAL_OPERATOR


class Clock:
    """A clock that a test turns."""

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class SampleStore:
    """A store and the event loop it lives on.

    Args:
        directory: Where its file goes.
        clock: Stamps what is stored.
    """

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self._runner = asyncio.Runner()
        self.store: Store = self.run(open_store(f"sqlite:///{directory / 'sample.db'}"))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self._runner.run(work)

    def close(self) -> None:
        """Close store and loop."""
        self.run(self.store.close())
        self._runner.close()

    def put_tenant(self, tenant_id: str, document: Mapping[str, object] | None = None) -> None:
        """Insert a tenant, or replace it, from the JSON of a management request."""
        self.run(self.putting_tenant(tenant_id, document))

    async def putting_tenant(self, tenant_id: str, document: Mapping[str, object] | None = None) -> None:
        """Do the same inside a coroutine."""

        async def put(transaction: Transaction) -> None:
            before = await transaction.find_tenant(tenant_id)
            stored = StoredTenant(
                tenant_id=tenant_id,
                version=new_id(),
                created=self.clock(),
                tenant=parse_tenant(dict(document or {})),
            )
            if before is None:
                await transaction.insert_tenant(stored)
            else:
                await transaction.update_tenant(stored)

        await self.store.write(put)

    def delete_tenant(self, tenant_id: str) -> None:
        """Delete a tenant; what it had stays behind."""
        self.run(self.deleting_tenant(tenant_id))

    async def deleting_tenant(self, tenant_id: str) -> None:
        """Do the same inside a coroutine."""

        async def delete(transaction: Transaction) -> None:
            await transaction.delete_tenant(tenant_id)

        await self.store.write(delete)

    def put_device(
        self,
        tenant_id: str,
        device_id: str,
        document: JsonObject | None = None,
        credentials: Sequence[JsonObject] = (),
    ) -> None:
        """Insert a device and its credentials from the JSON that is stored."""

        async def put(transaction: Transaction) -> None:
            await transaction.insert_device(
                StoredDevice(
                    tenant_id=tenant_id,
                    device_id=device_id,
                    version=new_id(),
                    created=self.clock(),
                    device=stored_device({"enabled": True} | (document or {})),
                ),
                StoredCredentials(
                    tenant_id=tenant_id,
                    device_id=device_id,
                    version=new_id(),
                    credentials=tuple(stored_credential({"enabled": True} | one) for one in credentials),
                ),
            )

        self.run(self.store.write(put))

    def delete_device(self, tenant_id: str, device_id: str) -> None:
        """Delete a device and its credentials."""

        async def delete(transaction: Transaction) -> None:
            await transaction.delete_device(tenant_id, device_id)

        self.run(self.store.write(delete))

    def find_device(self, tenant_id: str, device_id: str) -> StoredDevice | None:
        """Find a device."""

        async def find(transaction: Transaction) -> StoredDevice | None:
            return await transaction.find_device(tenant_id, device_id)

        return self.run(self.store.read(find))

    def find_credentials(self, tenant_id: str, device_id: str) -> StoredCredentials | None:
        """Find a device's credentials set."""

        async def find(transaction: Transaction) -> StoredCredentials | None:
            return await transaction.find_credentials(tenant_id, device_id)

        return self.run(self.store.read(find))

    def count_devices(self, tenant_id: str) -> int:
        """Count the devices of a tenant."""

        async def count(transaction: Transaction) -> int:
            return await transaction.count_devices(tenant_id)

        return self.run(self.store.read(count))
