"""What operators ask: create, get, update, delete and search tenants and devices, get and set a device's credentials.

Each use case is handed its `Principal`, checks in the order of management 3.15 and runs in one transaction of the
store; each success makes a new version. Knows nothing of HTTP: documents are JSON values, errors are `RegistryError`s.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final, Generic, NamedTuple, Self, TypeVar

from kamado.auth import Principal
from kamado.credentials import (
    Credential,
    CredentialRules,
    CredentialUpdate,
    credential_document,
    merge,
    parse_credentials,
    plain_passwords,
    with_hashes,
)
from kamado.devices import Device, device_document, parse_device
from kamado.document import Identifiers, JsonObject, format_timestamp, new_id
from kamado.errors import Conflict, Forbidden, NotFound, PreconditionFailed, Unavailable
from kamado.passwords import PasswordHasher
from kamado.search import Query
from kamado.store import (
    Change,
    ChangeKind,
    DeviceLimitReached,
    Found,
    FoundDevice,
    FoundTenant,
    Searches,
    Slice,
    Store,
    StoredCredentials,
    StoredDevice,
    StoredTenant,
    Transaction,
)
from kamado.tenants import (
    Tenant,
    find_max_credentials_per_device,
    find_max_devices,
    parse_tenant,
    tenant_document,
)

__all__ = ["ANY_VERSION", "Expected", "Management", "ManagementSettings", "Resource", "Versioned"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_X509: Final = "x509-cert"
_SLICE: Final = 500
"""Devices that are deleted in one transaction, if they are small: some 30 ms in which no other write gets its turn."""

_FEW: Final = 10
"""Devices that are deleted together with something else, however large they are."""


class Versioned(NamedTuple, Generic[T]):
    """Something and its version."""

    value: T
    version: str


@dataclass(frozen=True, slots=True)
class Expected:
    """Which versions of a resource the caller is content with (management 3.9).

    Args:
        versions: Any of these; `None` for whichever it has.
    """

    versions: frozenset[str] | None = None

    @classmethod
    def parse(cls, if_match: str | None) -> Self:
        """Read an `If-Match` header: a version, bare or as an entity tag, a list of them, or `*`.

        What is none of these matches no version, so it fails as `PreconditionFailed` where there is a resource.
        """
        text = (if_match or "").strip()
        if text in {"", "*"}:
            # `*` asks for a resource that exists, and all that are given an `Expected` must.
            return cls()
        return cls(frozenset(_bare(element.strip()) for element in text.split(",")))

    def check(self, version: str) -> None:
        """Make sure that a version is among those expected.

        Raises:
            PreconditionFailed: It is not.
        """
        if self.versions is not None and version not in self.versions:
            raise PreconditionFailed("If-Match: the resource has another version")


ANY_VERSION: Final = Expected()


def _bare(tag: str) -> str:
    quoted = tag.removeprefix("W/")
    if len(quoted) >= 2 and quoted[0] == quoted[-1] == '"':
        return quoted[1:-1]
    return tag


class Resource(StrEnum):
    """What may be closed to changes."""

    TENANTS = "tenants"
    DEVICES = "devices"
    CREDENTIALS = "credentials"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagementSettings:
    """What holds for the whole registry."""

    max_devices_per_tenant: int = -1
    """-1 for no limit; a tenant's own limit goes before (management 5.7)."""
    max_credentials_per_device: int = -1
    """As above."""
    is_lenient: bool = False
    """Devices need no tenant, and credentials neither tenant nor device (management 8.1)."""
    read_only: bool = False
    """Nothing may be changed at all."""
    unmodifiable: frozenset[Resource] = frozenset()
    """What may be created, but neither updated nor deleted (`modificationEnabled` of Hono 1.2)."""
    empty_search_is_found: bool = False
    """A search without a match has an empty result; otherwise it is not found, as in Hono 2.7 (management 7.5)."""
    expensive_search: int = 100_000
    """Rows from which on a search that looks at so many is logged and counted as expensive."""


ObserveSearch = Callable[[str, int, float, bool], None]
"""Told of each search: of what (`tenants`, `devices`), rows looked at, seconds, whether it was expensive."""


class Management:
    """The use cases of the management API.

    Args:
        store: The database.
        passwords: Hashes passwords given in the clear.
        identifiers: The rules for ids.
        credential_rules: The rules for credentials.
        settings: See there.
        clock: The time now, aware UTC.
        observe_search: See there.
        observe_unanswered_search: Told of each that took too long or found too many others, and of what it was.
    """

    def __init__(  # noqa: PLR0917 - the parts it is built of
        self,
        store: Store,
        passwords: PasswordHasher,
        identifiers: Identifiers,
        credential_rules: CredentialRules,
        settings: ManagementSettings,
        clock: Callable[[], datetime],
        observe_search: ObserveSearch = lambda *_: None,
        observe_unanswered_search: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._observe_search = observe_search
        self._observe_unanswered_search = observe_unanswered_search
        self._passwords = passwords
        self._identifiers = identifiers
        self._rules = credential_rules
        self._settings = settings
        self._clock = clock

    # Tenants (management 4.9)

    async def create_tenant(
        self, principal: Principal, tenant_id: str | None, document: object | None = None
    ) -> Versioned[str]:
        """Create a tenant.

        Cancelled, it leaves the tenant or nothing; a retry with the same id then says `Conflict`.

        Args:
            principal: The caller.
            tenant_id: `None` for a generated one.
            document: The JSON value of the request; `None` for all defaults.

        Returns:
            The id, and the version.

        Raises:
            BadRequest: The id or a member breaks a rule.
            Forbidden: The registry is read only.
            Conflict: The id, the alias or a trust anchor's subject DN is taken.
        """
        tenant_id = new_id() if tenant_id is None else self._identifiers.check_tenant_id(tenant_id)
        stored = StoredTenant(
            tenant_id=tenant_id,
            version=new_id(),
            created=self._clock(),
            tenant=Tenant() if document is None else parse_tenant(document),
        )

        async def create(transaction: Transaction, *, purge: bool = not self._settings.is_lenient) -> None:
            await _check_trust_anchors(transaction, tenant_id, stored.tenant)
            await transaction.insert_tenant(stored, purge=purge)
            await _record(transaction, principal, ChangeKind.TENANT, tenant_id, tenant_id, after=stored.version)

        async def rehearse(transaction: Transaction) -> None:
            await create(transaction, purge=False)
            raise _Rehearsed

        self._check_may_write()
        if not self._settings.is_lenient and await self._has_many_left_overs(tenant_id):
            # Not all in one transaction, for which everybody else would have to wait; and not before it is certain
            # that the tenant can be created.
            with suppress(_Rehearsed):
                await self._store.write(rehearse, tenant_id=tenant_id)
            await self._delete_left_overs(tenant_id)
        await self._store.write(create, tenant_id=tenant_id)
        return Versioned(tenant_id, stored.version)

    async def _has_many_left_overs(self, tenant_id: str) -> bool:
        return await self._store.read(lambda transaction: transaction.count_devices(tenant_id)) > _FEW

    async def _delete_left_overs(self, tenant_id: str) -> None:
        """Delete most of what a deleted tenant left behind, unless somebody else creates it meanwhile."""
        now, after = self._clock(), ""

        async def delete(transaction: Transaction) -> Slice:
            if await transaction.find_tenant(tenant_id) is not None:
                return Slice(0, None)
            return await transaction.delete_devices(tenant_id, after, _SLICE, now)

        last: str | None = ""
        while last is not None:
            after = last
            _, last = await self._store.write(delete, tenant_id=tenant_id)

    async def get_tenant(self, principal: Principal, tenant_id: str) -> Versioned[JsonObject]:
        """Get a tenant by its id, never by its alias.

        Raises:
            BadRequest: The id breaks its rule.
            NotFound: There is none.
        """
        self._identifiers.check_tenant_id(tenant_id)

        async def get(transaction: Transaction) -> StoredTenant:
            return await _get_tenant(transaction, tenant_id)

        stored = await self._store.read(get)
        return Versioned(tenant_document(stored.tenant), stored.version)

    async def update_tenant(
        self, principal: Principal, tenant_id: str, document: object, expected: Expected = ANY_VERSION
    ) -> str:
        """Replace a tenant.

        Returns:
            The new version.

        Raises:
            BadRequest: The id or a member breaks a rule.
            Forbidden: Tenants may not be modified.
            NotFound: There is none.
            Conflict: The alias or a trust anchor's subject DN is taken.
            PreconditionFailed: It has another version than expected.
        """
        self._identifiers.check_tenant_id(tenant_id)
        tenant = parse_tenant(document)
        self._check_may_write(Resource.TENANTS)
        version, now = new_id(), self._clock()

        async def update(transaction: Transaction) -> None:
            stored = await _get_tenant(transaction, tenant_id, to_change=True)
            await _check_trust_anchors(transaction, tenant_id, tenant)
            expected.check(stored.version)
            await transaction.update_tenant(replace(stored, version=version, updated=now, tenant=tenant))
            await _record(
                transaction, principal, ChangeKind.TENANT, tenant_id, tenant_id, before=stored.version, after=version
            )

        await self._store.write(update, tenant_id=tenant_id)
        return version

    async def delete_tenant(self, principal: Principal, tenant_id: str, expected: Expected = ANY_VERSION) -> None:
        """Delete a tenant; its devices are out of reach from then on (management 8.3).

        Raises:
            BadRequest: The id breaks its rule.
            Forbidden: Tenants may not be modified.
            NotFound: There is none.
            PreconditionFailed: It has another version than expected.
        """
        self._identifiers.check_tenant_id(tenant_id)
        self._check_may_write(Resource.TENANTS)

        async def delete(transaction: Transaction) -> None:
            stored = await _get_tenant(transaction, tenant_id, to_change=True)
            expected.check(stored.version)
            await transaction.delete_tenant(tenant_id)
            await _record(transaction, principal, ChangeKind.TENANT, tenant_id, tenant_id, before=stored.version)

        await self._store.write(delete, tenant_id=tenant_id)

    async def search_tenants(self, principal: Principal, query: Query) -> JsonObject:
        """Search tenants (management 7).

        Returns:
            The result object of management 7.5.

        Raises:
            NotFound: No tenant matches.
            Unavailable: The search took too long, or too many wait.
        """
        started = time.perf_counter()
        found = await self._search("tenants", query, lambda searches: searches.find_tenants(query))
        self._observe("tenants", None, query, found, started)
        return self._result(found, [{"id": tenant.tenant_id, **tenant.document} for tenant in found.results])

    async def _search(self, kind: str, query: Query, work: Callable[[Searches], Awaitable[T]]) -> T:
        try:
            return await self._store.search(work, is_heavy=query.is_heavy)
        except Unavailable:
            self._observe_unanswered_search(kind)
            raise

    def _observe(
        self,
        kind: str,
        tenant_id: str | None,
        query: Query,
        found: Found[FoundTenant] | Found[FoundDevice],
        started: float,
    ) -> None:
        seconds = time.perf_counter() - started
        is_expensive = found.scanned >= self._settings.expensive_search
        self._observe_search(kind, found.scanned, seconds, is_expensive)
        if is_expensive:
            _log.info(
                "expensive search",
                extra={
                    "tenant_id": tenant_id,
                    "filters": ["/" + "/".join(condition.pointer) for condition in query.filters],
                    "sorts": ["/" + "/".join(sort.pointer) for sort in query.sorts],
                    "scanned": found.scanned,
                    "duration": round(seconds, 3),
                },
            )

    def _result(self, found: Found[FoundTenant] | Found[FoundDevice], results: list[JsonObject]) -> JsonObject:
        if not found.total and not self._settings.empty_search_is_found:
            raise NotFound("nothing matches")
        return {"total": found.total, "result": results}

    # Devices (management 5.6)

    async def create_device(
        self, principal: Principal, tenant_id: str, device_id: str | None, document: object | None = None
    ) -> Versioned[str]:
        """Create a device and its credentials set, which is empty.

        Cancelled, it leaves the device or nothing; a retry with the same id then says `Conflict`.

        Args:
            principal: The caller.
            tenant_id: The tenant.
            device_id: `None` for a generated one.
            document: The JSON value of the request; `None` for all defaults.

        Returns:
            The id, and the version.

        Raises:
            BadRequest: An id or a member breaks a rule.
            NotFound: There is no such tenant.
            Forbidden: The tenant has as many devices as it may, or the registry is read only.
            Conflict: The id is taken.
        """
        self._identifiers.check_tenant_id(tenant_id)
        device_id = new_id() if device_id is None else self._identifiers.check_device_id(device_id)
        stored = StoredDevice(
            tenant_id=tenant_id,
            device_id=device_id,
            version=new_id(),
            created=self._clock(),
            device=Device() if document is None else parse_device(document),
        )
        fresh = StoredCredentials(tenant_id=tenant_id, device_id=device_id, version=new_id())
        self._check_may_write()

        async def create(transaction: Transaction) -> None:
            tenant = await self._get_owner(transaction, tenant_id)
            limit = find_max_devices(tenant, self._settings.max_devices_per_tenant)
            if limit >= 0 and await transaction.count_devices(tenant_id) >= limit:
                raise DeviceLimitReached(limit)
            is_new_set = await transaction.insert_device(stored, fresh, max_devices=limit)
            await _record(transaction, principal, ChangeKind.DEVICE, tenant_id, device_id, after=stored.version)
            if is_new_set:
                await _record(transaction, principal, ChangeKind.CREDENTIALS, tenant_id, device_id, after=fresh.version)

        await self._store.write(create, device=(tenant_id, device_id))
        return Versioned(device_id, stored.version)

    async def get_device(self, principal: Principal, tenant_id: str, device_id: str) -> Versioned[JsonObject]:
        """Get a device.

        Raises:
            BadRequest: An id breaks its rule.
            NotFound: There is no such tenant or device.
        """
        self._check_ids(tenant_id, device_id)

        async def get(transaction: Transaction) -> StoredDevice:
            await self._get_owner(transaction, tenant_id)
            return await _get_device(transaction, tenant_id, device_id)

        stored = await self._store.read(get)
        return Versioned(device_document(stored.device) | {"status": _status(stored)}, stored.version)

    async def update_device(
        self,
        principal: Principal,
        tenant_id: str,
        device_id: str,
        document: object,
        expected: Expected = ANY_VERSION,
    ) -> str:
        """Replace all of a device but its status and its credentials.

        Returns:
            The new version.

        Raises:
            BadRequest: An id or a member breaks a rule.
            Forbidden: Devices may not be modified.
            NotFound: There is no such tenant or device.
            PreconditionFailed: It has another version than expected.
        """
        self._check_ids(tenant_id, device_id)
        device = parse_device(document)
        version, now = new_id(), self._clock()
        self._check_may_write(Resource.DEVICES)

        async def update(transaction: Transaction) -> None:
            await self._get_owner(transaction, tenant_id)
            stored = await _get_device(transaction, tenant_id, device_id, to_change=True)
            expected.check(stored.version)
            await transaction.update_device(replace(stored, version=version, updated=now, device=device))
            await _record(
                transaction, principal, ChangeKind.DEVICE, tenant_id, device_id, before=stored.version, after=version
            )

        await self._store.write(update, device=(tenant_id, device_id))
        return version

    async def delete_device(
        self, principal: Principal, tenant_id: str, device_id: str, expected: Expected = ANY_VERSION
    ) -> None:
        """Delete a device and its credentials; the tenant may be gone already (management 8.2).

        Raises:
            BadRequest: An id breaks its rule.
            Forbidden: Devices may not be modified.
            NotFound: There is no such device.
            PreconditionFailed: It has another version than expected.
        """
        self._check_ids(tenant_id, device_id)
        self._check_may_write(Resource.DEVICES)

        async def delete(transaction: Transaction) -> None:
            stored = await _get_device(transaction, tenant_id, device_id, to_change=True)
            expected.check(stored.version)
            credentials = await self._get_credentials(transaction, tenant_id, device_id, to_change=True)
            await transaction.delete_device(tenant_id, device_id)
            await _record(transaction, principal, ChangeKind.DEVICE, tenant_id, device_id, before=stored.version)
            await _record(
                transaction, principal, ChangeKind.CREDENTIALS, tenant_id, device_id, before=credentials.version
            )

        await self._store.write(delete, device=(tenant_id, device_id))

    async def delete_all_devices(self, principal: Principal, tenant_id: str) -> int:
        """Delete all devices that a tenant has now, with their credentials (management 5.6, 8.2, 8.3).

        Done in slices, so that other writes and look-ups go on meanwhile. Cancelled or interrupted, it leaves the
        devices that it has not come to; a retry goes on. What is created meanwhile stays.

        Args:
            principal: The caller.
            tenant_id: The tenant; it may be gone already.

        Returns:
            How many devices there were.

        Raises:
            BadRequest: The id breaks its rule.
            Forbidden: Devices may not be modified.
            Unavailable: The database cannot be written now; some devices may have been deleted.
        """
        self._identifiers.check_tenant_id(tenant_id)
        self._check_may_write(Resource.DEVICES)
        now, after, deleted = self._clock(), "", 0

        async def delete(transaction: Transaction) -> Slice:
            done = await transaction.delete_devices(tenant_id, after, _SLICE, now)
            if done.number:
                await _record(transaction, principal, ChangeKind.ALL_DEVICES, tenant_id, tenant_id, before="*")
            return done

        async def delete_sets(transaction: Transaction) -> Slice:
            return await transaction.delete_credential_sets(tenant_id, after, _SLICE)

        for step in (delete, delete_sets) if self._settings.is_lenient else (delete,):
            last: str | None = ""
            while last is not None:
                after = last
                number, last = await self._store.write(step, tenant_id=tenant_id)
                deleted += number if step is delete else 0
        return deleted

    async def search_devices(self, principal: Principal, tenant_id: str, query: Query) -> JsonObject:
        """Search the devices of a tenant (management 7). Its id has no rule to break (3.2): it is there or it is not.

        Returns:
            The result object of management 7.5.

        Raises:
            NotFound: There is no such tenant, or no device matches.
            Unavailable: The search took too long, or too many wait.
        """
        started = time.perf_counter()
        found = await self._search("devices", query, lambda searches: searches.find_devices(tenant_id, query))
        self._observe("devices", tenant_id, query, found, started)
        if not found.has_tenant and not self._settings.is_lenient:
            raise NotFound(f"there is no tenant {tenant_id}")
        return self._result(
            found, [{"id": device.device_id, **device.document, "status": _status(device)} for device in found.results]
        )

    # Credentials (management 6.11)

    async def get_credentials(
        self, principal: Principal, tenant_id: str, device_id: str
    ) -> Versioned[list[JsonObject]]:
        """Get the credentials of a device; keys of `psk` secrets only for a caller that may see them.

        Raises:
            BadRequest: An id breaks its rule.
            NotFound: There is no such tenant or device.
        """
        self._check_ids(tenant_id, device_id)

        async def get(transaction: Transaction) -> StoredCredentials:
            await self._get_owner(transaction, tenant_id)
            return await self._get_credentials(transaction, tenant_id, device_id)

        stored = await self._store.read(get)
        reveal = principal.may_reveal_secrets
        return Versioned([credential_document(one, reveal_psk=reveal) for one in stored.credentials], stored.version)

    async def set_credentials(
        self,
        principal: Principal,
        tenant_id: str,
        device_id: str,
        document: object,
        expected: Expected = ANY_VERSION,
    ) -> str:
        """Replace the credentials of a device by what `merge` makes of them and of the request (management 6.9).

        Passwords are hashed before the transaction, one after the other, and not before everything else has been
        found to be in order: who asks for what cannot be done costs no processor time. Cancelled, it leaves the
        old set or the new one; a retry is safe.

        Returns:
            The new version.

        Raises:
            BadRequest: An id or a member breaks a rule, or a secret refers to one that is not stored.
            NotFound: There is no such tenant or device.
            Forbidden: The tenant allows fewer credentials per device, or credentials may not be modified.
            PreconditionFailed: The set has another version than expected.
            Conflict: A pair of type and auth-id belongs to another device.
            Unavailable: Too many passwords wait to be hashed.
        """
        self._check_ids(tenant_id, device_id)
        now = self._clock()
        updates = parse_credentials(document, rules=self._rules, trust_anchors=(), now=now)
        has_certificate = _has_certificate(document)
        version = new_id()
        self._check_may_write(Resource.CREDENTIALS)

        async def prepare(
            transaction: Transaction, hashes: Sequence[str]
        ) -> tuple[StoredCredentials | None, Sequence[Credential]]:
            tenant = await self._get_owner(transaction, tenant_id)
            requested: tuple[CredentialUpdate, ...] = updates
            if has_certificate and tenant.trust_anchors:
                # A trust anchor may have a template for the auth-id (management 6.5).
                requested = parse_credentials(document, rules=self._rules, trust_anchors=tenant.trust_anchors, now=now)
            limit = find_max_credentials_per_device(tenant, self._settings.max_credentials_per_device)
            if 0 <= limit < len(requested):
                raise Forbidden(f"max-credentials-per-device: a device may not have more than {limit}")
            stored = await transaction.find_credentials(tenant_id, device_id, to_change=True)
            if not self._settings.is_lenient and (stored is None or not stored.has_device):
                raise NotFound(f"tenant {tenant_id} has no device {device_id}")
            if stored is not None:
                expected.check(stored.version)
            # A request that was read twice has its passwords in the same order.
            by_password = dict(zip(plain_passwords(requested), hashes, strict=True))
            present = () if stored is None else stored.credentials
            return stored, merge(present, with_hashes(requested, by_password))

        async def rehearse(transaction: Transaction) -> None:
            await prepare(transaction, [""] * len(passwords))

        async def update(transaction: Transaction) -> None:
            stored, credentials = await prepare(transaction, hashes)
            await transaction.replace_credentials(
                StoredCredentials(
                    tenant_id=tenant_id, device_id=device_id, version=version, credentials=tuple(credentials)
                )
            )
            await _record(
                transaction,
                principal,
                ChangeKind.CREDENTIALS,
                tenant_id,
                device_id,
                before=None if stored is None else stored.version,
                after=version,
            )

        passwords = plain_passwords(updates)
        if passwords:
            await self._store.read(rehearse)
        hashes = [await self._passwords.hash(password.text) for password in passwords]
        await self._store.write(update, device=(tenant_id, device_id))
        return version

    def _check_ids(self, tenant_id: str, device_id: str) -> None:
        self._identifiers.check_tenant_id(tenant_id)
        self._identifiers.check_device_id(device_id)

    def _check_may_write(self, modified: Resource | None = None) -> None:
        """Check that something may be created or, if it is named, updated or deleted.

        Raises:
            Forbidden: It may not.
        """
        if self._settings.read_only:
            raise Forbidden("the registry is read only (management.read_only)")
        if modified in self._settings.unmodifiable:
            raise Forbidden(f"{modified} cannot be changed or deleted ({modified}.modification_enabled)")

    async def _get_owner(self, transaction: Transaction, tenant_id: str) -> Tenant:
        """Get the tenant that a device belongs to; with lenient integrity one with all defaults if there is none."""
        stored = await transaction.find_tenant(tenant_id)
        if stored is not None:
            return stored.tenant
        if self._settings.is_lenient:
            return Tenant()
        raise NotFound(f"there is no tenant {tenant_id}")

    async def _get_credentials(
        self, transaction: Transaction, tenant_id: str, device_id: str, *, to_change: bool = False
    ) -> StoredCredentials:
        stored = await transaction.find_credentials(tenant_id, device_id, to_change=to_change)
        if stored is None or not (stored.has_device or self._settings.is_lenient):
            raise NotFound(f"tenant {tenant_id} has no device {device_id}")
        return stored


class _Rehearsed(Exception):
    """Undoes a transaction that was made to see whether it can be."""


async def _get_tenant(transaction: Transaction, tenant_id: str, *, to_change: bool = False) -> StoredTenant:
    stored = await transaction.find_tenant(tenant_id, to_change=to_change)
    if stored is None:
        raise NotFound(f"there is no tenant {tenant_id}")
    return stored


async def _get_device(
    transaction: Transaction, tenant_id: str, device_id: str, *, to_change: bool = False
) -> StoredDevice:
    stored = await transaction.find_device(tenant_id, device_id, to_change=to_change)
    if stored is None:
        raise NotFound(f"tenant {tenant_id} has no device {device_id}")
    return stored


async def _check_trust_anchors(transaction: Transaction, tenant_id: str, tenant: Tenant) -> None:
    """Check management 4.7 where 3.15 wants it; that it still holds when it is stored is the database's affair."""
    if not tenant.trust_anchors:
        return
    clash = await transaction.find_trust_anchor_clash(tenant_id, tenant)
    if clash is not None:
        raise Conflict(
            f"trusted-ca: another tenant, not of the same trust-anchor-group, has a CA with subject DN {clash}",
            details={"subject-dn": clash},
        )


async def _record(
    transaction: Transaction,
    principal: Principal,
    kind: ChangeKind,
    tenant_id: str,
    resource_id: str,
    *,
    before: str | None = None,
    after: str | None = None,
) -> None:
    await transaction.record(
        Change(
            principal=principal.name,
            kind=kind,
            tenant_id=tenant_id,
            resource_id=resource_id,
            before=before,
            after=after,
        )
    )


def _status(stored: StoredDevice | FoundDevice) -> JsonObject:
    """Return the `status` of a device (management 5.4)."""
    status: JsonObject = {"created": format_timestamp(stored.created)}
    if stored.updated is not None:
        status["updated"] = format_timestamp(stored.updated)
    if stored.auto_provisioned:
        status["auto-provisioned"] = True
    if stored.notification_sent:
        status["auto-provisioning-notification-sent"] = True
    return status


def _has_certificate(document: object) -> bool:
    """Tell whether a request, which has been parsed, has a credential in the form with `cert` (management 6.5)."""
    entries = document if isinstance(document, list) else [document]
    return any(
        isinstance(entry, dict) and entry.get("type") == _X509 and entry.get("cert") is not None for entry in entries
    )
