"""What adapters keep here for a while: each device's last known gateway, and who handles its commands.

The Device Connection API of Hono 1.2 (amqp-apis 12). The data is volatile: an adapter tells it again with the next
message, so no answer waits for a disk, and an update that changes nothing writes nothing (docs/decisions). Neither
tenants nor devices are looked up: whoever has the right may keep something for any of them.

Knows nothing of AMQP or SQL: arguments are already strings, numbers or the bytes of a body, answers are bytes. What it
asks of storage is the port `Connections`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, NamedTuple, NoReturn, Protocol, TypeVar

from kamado.auth import Principal
from kamado.document import MAX_IDENTIFIER_LENGTH, decode, encode, format_timestamp
from kamado.errors import BadRequest, Forbidden, NotFound, PreconditionFailed, Reason, Unavailable

__all__ = [
    "ConnectionTransaction",
    "Connections",
    "DeviceConnection",
    "DeviceConnectionService",
    "DeviceConnectionSettings",
    "Key",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, str]
"""Tenant id and device id."""

_MAX_INSTANCE_ID_LENGTH: Final = 1024
"""Characters; adapters make them of the name of a pod (253 at most), a random part and a number."""
_GATEWAYS_AT_ONCE: Final = 500
"""Gateways that are looked up in one go; with more of them others get their turn in between."""
_FIRST_REMOVAL: Final = 60.0
"""Seconds from the start of a process until it first removes what has expired."""
_SLICE: Final = 500
"""Entries that one transaction of the removal looks at: about a millisecond."""
_PAUSE: Final = 0.1
"""Seconds between two such transactions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConnectionSettings:
    """Limits and times, in seconds."""

    max_devices_per_tenant: int = 1_000_000
    """Devices that something is kept for; -1: any number."""
    refresh_interval: float = 60.0
    """An update that names the known gateway writes only if the last one that did is this long ago."""
    gateway_lifetime: float = 28 * 86400.0
    """How long a gateway is remembered that nobody names again."""
    removal_interval: float = 3600.0
    """From one removal of what has expired to the next."""


class DeviceConnection(NamedTuple):
    """What is kept for one device; either half may be missing, and may be expired and still be here."""

    gateway_id: str | None = None
    gateway_updated: datetime | None = None
    """When the gateway was last written, which is set where `gateway_id` is."""
    adapter_instance_id: str | None = None
    adapter_instance_expires: datetime | None = None
    """`None`: never."""


class ConnectionTransaction(Protocol):
    """One transaction on what is kept; see `store.Transaction` for what a use case may do."""

    async def find_connection(self, tenant_id: str, device_id: str) -> DeviceConnection | None:
        """Find a device's entry, which nobody else changes until the transaction ends."""

    async def find_connections(self, keys: Sequence[Key]) -> list[DeviceConnection | None]:
        """Find entries as `find_connection` does.

        Args:
            keys: In their order everywhere, so that no two transactions wait for each other.
        """

    async def update_gateway(self, tenant_id: str, device_id: str, gateway_id: str, now: datetime) -> bool:
        """Replace the gateway of an entry; return whether there is one."""

    async def update_adapter_instance(
        self, tenant_id: str, device_id: str, adapter_instance_id: str | None, expires: datetime | None
    ) -> bool:
        """Replace the adapter instance of an entry, or take it away; return whether there is one."""

    async def insert_connection(self, tenant_id: str, device_id: str, connection: DeviceConnection) -> None:
        """Insert the entry of a device that has none."""

    async def delete_connections(self, keys: Sequence[Key]) -> None:
        """Delete entries, as far as they are there."""

    async def count_connections(self, tenant_id: str) -> int:
        """Count the entries of a tenant, at a cost that does not grow with them."""

    async def list_connections(self, after: Key, limit: int) -> list[tuple[Key, DeviceConnection]]:
        """Return entries of any tenant in the order of their keys, from the first one after `after` on.

        They are not kept from changing: before something is done about one, it is to be found again.
        """


Work = Callable[[ConnectionTransaction], Awaitable[T]]


class Connections(Protocol):
    """Where entries are kept, for all processes of one database; they survive a restart, but perhaps no power cut."""

    def batch(self) -> AbstractContextManager[None]:
        """Read from one snapshot; see `store.Lookups.batch`."""

    async def find_connection(self, tenant_id: str, device_id: str) -> DeviceConnection | None:
        """Find a device's entry.

        Raises:
            Unavailable: It cannot be read now.
        """

    async def find_adapter_instances(
        self, tenant_id: str, device_ids: Sequence[str], now: datetime
    ) -> list[tuple[str, str]]:
        """Return device id and adapter instance id of those that have an instance now, in any order.

        Raises:
            Unavailable: They cannot be read now.
        """

    async def write(self, work: Work[T], *, device: Key | None = None) -> T:
        """Run a use case in one transaction, together with what else is waiting; see `store.Store.write`.

        Args:
            work: The use case.
            device: The one device whose entry is changed, if there is only one.

        Returns:
            What `work` returned, once every other process sees the change. It need not be on disk.

        Raises:
            Unavailable: It cannot be written now; nothing was changed.
        """

    async def close(self) -> None:
        """Finish what was accepted, then release files and threads."""


class DeviceConnectionService:
    """The five operations.

    Args:
        connections: Where entries are kept.
        settings: See there.
        clock: The time now, aware UTC.
    """

    def __init__(
        self, connections: Connections, settings: DeviceConnectionSettings, clock: Callable[[], datetime]
    ) -> None:
        self._connections = connections
        self._settings = settings
        self._clock = clock
        self._refresh_interval = timedelta(seconds=settings.refresh_interval)
        # Nothing is forgotten early because a refresh was left out.
        self._gateway_lifetime = timedelta(seconds=settings.gateway_lifetime) + self._refresh_interval
        self._turns: dict[Key, deque[asyncio.Future[None]]] = {}
        """Entries that are being changed, each with those that wait to change it next."""

    def batch(self) -> AbstractContextManager[None]:
        """Answer what is asked inside from one snapshot, at less cost; see `Connections.batch`."""
        return self._connections.batch()

    # The last known gateway

    async def set_last_gateway(self, principal: Principal, tenant_id: str, device_id: str, gateway_id: str) -> None:
        """Note through which gateway a device was last heard of; a device that connects itself is its own gateway.

        Cancelled, the entry is written or not; a retry is safe.

        Raises:
            BadRequest: An id cannot be one.
            Forbidden: The tenant has as many entries as it may, and none for this device.
            Unavailable: It cannot be read or written now.
        """
        _check_identifier(device_id, "device_id")
        _check_identifier(gateway_id, "gateway_id")
        key, now = (tenant_id, device_id), self._clock()

        async def put(transaction: ConnectionTransaction) -> None:
            if not await transaction.update_gateway(tenant_id, device_id, gateway_id, now):
                await self._insert(transaction, key, DeviceConnection(gateway_id, now))

        await self._take_turn(key)
        try:
            found = await self._connections.find_connection(tenant_id, device_id)
            if found is not None and found.gateway_id == gateway_id:
                assert found.gateway_updated is not None
                if timedelta(0) <= now - found.gateway_updated < self._refresh_interval:
                    return
            await self._connections.write(put, device=key)
        finally:
            self._end_turn(key)

    async def get_last_gateway(self, principal: Principal, tenant_id: str, device_id: str) -> bytes:
        """Tell through which gateway a device was last heard of.

        Returns:
            JSON text: `gateway-id`, and `last-updated` to within `DeviceConnectionSettings.refresh_interval`.

        Raises:
            BadRequest: The id cannot be one.
            NotFound: It is not known, or not any more.
            Unavailable: It cannot be read now.
        """
        _check_identifier(device_id, "device_id")
        found = await self._connections.find_connection(tenant_id, device_id)
        if found is None or not self._has_gateway(found, self._clock()):
            raise NotFound("no gateway is known")
        assert found.gateway_updated is not None
        return encode({"gateway-id": found.gateway_id, "last-updated": format_timestamp(found.gateway_updated)})

    def _has_gateway(self, connection: DeviceConnection, now: datetime) -> bool:
        updated = connection.gateway_updated
        return updated is not None and now - updated < self._gateway_lifetime

    # The adapter instance that handles commands

    async def set_adapter_instance(
        self, principal: Principal, tenant_id: str, device_id: str, adapter_instance_id: str, lifespan: int | None
    ) -> None:
        """Note which adapter instance handles a device's commands, in place of whichever did.

        Cancelled, the entry is written or not; a retry is safe.

        Args:
            principal: The adapter.
            tenant_id: The tenant.
            device_id: A device, or a gateway that takes commands for others.
            adapter_instance_id: Opaque.
            lifespan: Seconds; none or a negative number of them never end, and 0 have ended already.

        Raises:
            BadRequest: An id cannot be one.
            Forbidden: The tenant has as many entries as it may, and none for this device.
            Unavailable: It cannot be read or written now.
        """
        _check_identifier(device_id, "device_id")
        _check_identifier(adapter_instance_id, "adapter_instance_id", _MAX_INSTANCE_ID_LENGTH)
        key, now = (tenant_id, device_id), self._clock()
        expires = None if lifespan is None or lifespan < 0 else now + timedelta(seconds=lifespan)

        async def put(transaction: ConnectionTransaction) -> None:
            if not await transaction.update_adapter_instance(tenant_id, device_id, adapter_instance_id, expires):
                await self._insert(transaction, key, DeviceConnection(None, None, adapter_instance_id, expires))

        async def take(transaction: ConnectionTransaction) -> None:
            await self._take_instance(transaction, key, now)

        await self._take_turn(key)
        try:
            known = await self._connections.find_connection(tenant_id, device_id) or DeviceConnection()
            if lifespan == 0:
                if known.adapter_instance_id is not None:
                    await self._connections.write(take, device=key)
            # A life span that ends has begun anew with each call, so there is always something to write.
            elif expires is not None or known[2:] != (adapter_instance_id, None):
                await self._connections.write(put, device=key)
        finally:
            self._end_turn(key)

    async def remove_adapter_instance(
        self, principal: Principal, tenant_id: str, device_id: str, adapter_instance_id: str
    ) -> None:
        """Note that an adapter instance no longer handles a device's commands.

        Cancelled, the entry is gone or not; a retry then says that there is none.

        Raises:
            BadRequest: An id cannot be one.
            NotFound: No instance handles them.
            PreconditionFailed: Another one does.
            Unavailable: It cannot be read or written now.
        """
        _check_identifier(device_id, "device_id")
        _check_identifier(adapter_instance_id, "adapter_instance_id", _MAX_INSTANCE_ID_LENGTH)
        key, now = (tenant_id, device_id), self._clock()

        async def remove(transaction: ConnectionTransaction) -> None:
            _check_instance(await transaction.find_connection(tenant_id, device_id), adapter_instance_id, now)
            await self._take_instance(transaction, key, now)

        await self._take_turn(key)
        try:
            _check_instance(await self._connections.find_connection(tenant_id, device_id), adapter_instance_id, now)
            await self._connections.write(remove, device=key)
        finally:
            self._end_turn(key)

    async def get_adapter_instances(
        self, principal: Principal, tenant_id: str, device_id: str, body: bytes | None
    ) -> bytes:
        """Tell which adapter instances handle commands for a device, itself or through a gateway (amqp-apis 12).

        The first that yields something: the device's own instance; that of its last known gateway, if it may act for
        the device; those of all gateways that may. Waits only between lots of many gateways.

        Args:
            principal: Who wants to send a command.
            tenant_id: The tenant.
            device_id: The device.
            body: A JSON object with `gateway-ids`, the gateways that may act for the device.

        Returns:
            JSON text: `adapter-instances`, at least one.

        Raises:
            BadRequest: The id cannot be one, or the body is missing or malformed.
            NotFound: There is none.
            Unavailable: They cannot be read now.
        """
        _check_identifier(device_id, "device_id")
        gateway_ids = _parse_gateway_ids(body)
        now = self._clock()
        device = await self._connections.find_connection(tenant_id, device_id)
        if device is not None:
            if device.adapter_instance_id is not None and _has_instance(device, now):
                return _encode_instances([(device_id, device.adapter_instance_id)])
            last = device.gateway_id
            if last is not None and last in gateway_ids and self._has_gateway(device, now):
                found = await self._connections.find_adapter_instances(tenant_id, [last], now)
                if found:
                    return _encode_instances(found)
        instances: dict[str, str] = {}
        for start in range(0, len(gateway_ids), _GATEWAYS_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            lot = gateway_ids[start : start + _GATEWAYS_AT_ONCE]
            instances.update(await self._connections.find_adapter_instances(tenant_id, lot, now))
        if not instances:
            raise NotFound("no adapter instance handles commands for the device")
        return _encode_instances(
            [(gateway_id, instances[gateway_id]) for gateway_id in gateway_ids if gateway_id in instances]
        )

    # Removal of what has expired

    async def keep_clean(self) -> NoReturn:
        """Remove what has expired, now and then, until cancelled."""
        # Soon for the first time, for processes that do not live as long as the interval.
        delay = min(self._settings.removal_interval, _FIRST_REMOVAL)
        while True:
            await asyncio.sleep(delay)
            delay = self._settings.removal_interval
            try:
                removed = await self.remove_expired()
            except Unavailable as error:
                _log.warning("expired device connections not removed", extra={"error": str(error)})
            except Exception:  # a row that is damaged, say, which may be gone the next time
                _log.exception("expired device connections not removed")
            else:
                _log.debug("expired device connections removed", extra={"count": removed})

    async def remove_expired(self) -> int:
        """Walk through all entries, a few at a time, and remove those of which nothing is left.

        Returns:
            How many it were.

        Raises:
            Unavailable: Entries cannot be written now.
        """
        removed = 0
        after: Key = "", ""
        while True:
            looked_at, dead, after = await self._connections.write(partial(self._remove_slice, after))
            removed += dead
            if looked_at < _SLICE:
                return removed
            await asyncio.sleep(_PAUSE)

    async def _remove_slice(self, after: Key, transaction: ConnectionTransaction) -> tuple[int, int, Key]:
        now = self._clock()
        entries = await transaction.list_connections(after, _SLICE)
        dead = [key for key, entry in entries if self._is_dead(entry, now)]
        if dead:
            found = zip(dead, await transaction.find_connections(dead), strict=True)
            dead = [key for key, entry in found if entry is not None and self._is_dead(entry, now)]
            await transaction.delete_connections(dead)
        return len(entries), len(dead), entries[-1][0] if entries else after

    def _is_dead(self, entry: DeviceConnection, now: datetime) -> bool:
        return not self._has_gateway(entry, now) and not _has_instance(entry, now)

    # Writing

    async def _take_turn(self, key: Key) -> None:
        """Wait until all changes of this entry have been made that were asked for before this one: what is sent without
        waiting for the answer before it is still done in its order.
        """
        turns = self._turns.get(key)
        if turns is None:
            self._turns[key] = deque()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end_turn(key)
            raise

    def _end_turn(self, key: Key) -> None:
        turns = self._turns[key]
        while turns:
            turn = turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._turns[key]

    async def _insert(self, transaction: ConnectionTransaction, key: Key, connection: DeviceConnection) -> None:
        limit = self._settings.max_devices_per_tenant
        if limit >= 0 and await transaction.count_connections(key[0]) >= limit:
            raise Forbidden("the tenant has as many device connections as it may")
        await transaction.insert_connection(*key, connection)

    async def _take_instance(self, transaction: ConnectionTransaction, key: Key, now: datetime) -> None:
        found = await transaction.find_connection(*key)
        if found is None:
            return
        if self._has_gateway(found, now):
            await transaction.update_adapter_instance(*key, None, None)
        else:
            await transaction.delete_connections([key])


def _check_identifier(text: str, name: str, limit: int = MAX_IDENTIFIER_LENGTH) -> None:
    # No more than that: which ids there are is the registry's business, and nothing is asked of it here.
    if not 1 <= len(text) <= limit or "\0" in text:
        raise BadRequest(
            f"{name}: must have 1 to {limit} characters, none of them NUL", reason=Reason.MALFORMED_REQUEST
        )


def _parse_gateway_ids(body: bytes | None) -> list[str]:
    """Return the gateways in a request's body, each once."""
    if not body:
        raise BadRequest("the body must be a JSON object, there is none", reason=Reason.MALFORMED_REQUEST)
    request = decode(body)
    gateway_ids = request.get("gateway-ids") if isinstance(request, dict) else None
    if not isinstance(gateway_ids, list) or not all(isinstance(one, str) for one in gateway_ids):
        raise BadRequest("gateway-ids: must be given, as an array of strings", reason=Reason.MALFORMED_REQUEST)
    return list(dict.fromkeys(gateway_ids))


def _has_instance(connection: DeviceConnection, now: datetime) -> bool:
    expires = connection.adapter_instance_expires
    return connection.adapter_instance_id is not None and (expires is None or now < expires)


def _check_instance(connection: DeviceConnection | None, adapter_instance_id: str, now: datetime) -> None:
    if connection is None or not _has_instance(connection, now):
        raise NotFound("no adapter instance handles the device's commands")
    if connection.adapter_instance_id != adapter_instance_id:
        raise PreconditionFailed("another adapter instance handles the device's commands")


def _encode_instances(instances: Sequence[tuple[str, str]]) -> bytes:
    entries = [{"adapter-instance-id": instance, "device-id": device_id} for device_id, instance in instances]
    return encode({"adapter-instances": entries})
