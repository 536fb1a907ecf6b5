"""What operators ask: create, get, update and delete tenants and devices, get and set a device's credentials.

Each use case is handed its `Principal`, checks in the order of management 3.15 and runs in one transaction of the
store; each success makes a new version. Knows nothing of HTTP: documents are JSON values, errors are `RegistryError`s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
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
from kamado.errors import Conflict, Forbidden, NotFound, PreconditionFailed
from kamado.passwords import PasswordHasher
from kamado.store import (
    Change,
    ChangeKind,
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

__all__ = ["ANY_VERSION", "Expected", "Management", "ManagementSettings", "Versioned"]

T = TypeVar("T")

_X509: Final = "x509-cert"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagementSettings:
    """Limits of the whole registry; a tenant's own limit goes before (management 5.7). -1 for none."""

    max_devices_per_tenant: int = -1
    max_credentials_per_device: int = -1


class Management:
    """The use cases of the management API.

    Args:
        store: The database.
        passwords: Hashes passwords given in the clear.
        identifiers: The rules for ids.
        credential_rules: The rules for credentials.
        settings: Limits.
        clock: The time now, aware UTC.
    """

    def __init__(  # noqa: PLR0917 - the parts it is built of
        self,
        store: Store,
        passwords: PasswordHasher,
        identifiers: Identifiers,
        credential_rules: CredentialRules,
        settings: ManagementSettings,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
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
            Conflict: The id, the alias or a trust anchor's subject DN is taken.
        """
        tenant_id = new_id() if tenant_id is None else self._identifiers.check_tenant_id(tenant_id)
        stored = StoredTenant(
            tenant_id=tenant_id,
            version=new_id(),
            created=self._clock(),
            tenant=Tenant() if document is None else parse_tenant(document),
        )

        async def create(transaction: Transaction) -> None:
            await _check_trust_anchors(transaction, tenant_id, stored.tenant)
            await transaction.insert_tenant(stored)
            await _record(transaction, principal, ChangeKind.TENANT, tenant_id, tenant_id, after=stored.version)

        await self._store.write(create)
        return Versioned(tenant_id, stored.version)

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
            NotFound: There is none.
            Conflict: The alias or a trust anchor's subject DN is taken.
            PreconditionFailed: It has another version than expected.
        """
        self._identifiers.check_tenant_id(tenant_id)
        tenant = parse_tenant(document)
        version, now = new_id(), self._clock()

        async def update(transaction: Transaction) -> None:
            stored = await _get_tenant(transaction, tenant_id)
            await _check_trust_anchors(transaction, tenant_id, tenant)
            expected.check(stored.version)
            await transaction.update_tenant(replace(stored, version=version, updated=now, tenant=tenant))
            await _record(
                transaction, principal, ChangeKind.TENANT, tenant_id, tenant_id, before=stored.version, after=version
            )

        await self._store.write(update)
        return version

    async def delete_tenant(self, principal: Principal, tenant_id: str, expected: Expected = ANY_VERSION) -> None:
        """Delete a tenant; its devices are out of reach from then on (management 8.3).

        Raises:
            BadRequest: The id breaks its rule.
            NotFound: There is none.
            PreconditionFailed: It has another version than expected.
        """
        self._identifiers.check_tenant_id(tenant_id)

        async def delete(transaction: Transaction) -> None:
            stored = await _get_tenant(transaction, tenant_id)
            expected.check(stored.version)
            await transaction.delete_tenant(tenant_id)
            await _record(transaction, principal, ChangeKind.TENANT, tenant_id, tenant_id, before=stored.version)

        await self._store.write(delete)

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
            Forbidden: The tenant has as many devices as it may.
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
        credentials = StoredCredentials(tenant_id=tenant_id, device_id=device_id, version=new_id())

        async def create(transaction: Transaction) -> None:
            tenant = (await _get_tenant(transaction, tenant_id)).tenant
            limit = find_max_devices(tenant, self._settings.max_devices_per_tenant)
            if limit >= 0 and await transaction.count_devices(tenant_id) >= limit:
                raise Forbidden(f"max-devices: the tenant may not have more than {limit}")
            await transaction.insert_device(stored, credentials)
            await _record(transaction, principal, ChangeKind.DEVICE, tenant_id, device_id, after=stored.version)
            await _record(
                transaction, principal, ChangeKind.CREDENTIALS, tenant_id, device_id, after=credentials.version
            )

        await self._store.write(create)
        return Versioned(device_id, stored.version)

    async def get_device(self, principal: Principal, tenant_id: str, device_id: str) -> Versioned[JsonObject]:
        """Get a device.

        Raises:
            BadRequest: An id breaks its rule.
            NotFound: There is no such tenant or device.
        """
        self._check_ids(tenant_id, device_id)

        async def get(transaction: Transaction) -> StoredDevice:
            await _get_tenant(transaction, tenant_id)
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
            NotFound: There is no such tenant or device.
            PreconditionFailed: It has another version than expected.
        """
        self._check_ids(tenant_id, device_id)
        device = parse_device(document)
        version, now = new_id(), self._clock()

        async def update(transaction: Transaction) -> None:
            await _get_tenant(transaction, tenant_id)
            stored = await _get_device(transaction, tenant_id, device_id)
            expected.check(stored.version)
            await transaction.update_device(replace(stored, version=version, updated=now, device=device))
            await _record(
                transaction, principal, ChangeKind.DEVICE, tenant_id, device_id, before=stored.version, after=version
            )

        await self._store.write(update)
        return version

    async def delete_device(
        self, principal: Principal, tenant_id: str, device_id: str, expected: Expected = ANY_VERSION
    ) -> None:
        """Delete a device and its credentials; the tenant may be gone already (management 8.2).

        Raises:
            BadRequest: An id breaks its rule.
            NotFound: There is no such device.
            PreconditionFailed: It has another version than expected.
        """
        self._check_ids(tenant_id, device_id)

        async def delete(transaction: Transaction) -> None:
            stored = await _get_device(transaction, tenant_id, device_id)
            expected.check(stored.version)
            credentials = await _get_credentials(transaction, tenant_id, device_id)
            await transaction.delete_device(tenant_id, device_id)
            await _record(transaction, principal, ChangeKind.DEVICE, tenant_id, device_id, before=stored.version)
            await _record(
                transaction, principal, ChangeKind.CREDENTIALS, tenant_id, device_id, before=credentials.version
            )

        await self._store.write(delete)

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
            await _get_tenant(transaction, tenant_id)
            return await _get_credentials(transaction, tenant_id, device_id)

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
            Forbidden: The tenant allows fewer credentials per device.
            PreconditionFailed: The set has another version than expected.
            Conflict: A pair of type and auth-id belongs to another device.
            Unavailable: Too many passwords wait to be hashed.
        """
        self._check_ids(tenant_id, device_id)
        now = self._clock()
        updates = parse_credentials(document, rules=self._rules, trust_anchors=(), now=now)
        has_certificate = _has_certificate(document)
        version = new_id()

        async def prepare(
            transaction: Transaction, hashes: Sequence[str]
        ) -> tuple[StoredCredentials, Sequence[Credential]]:
            tenant = (await _get_tenant(transaction, tenant_id)).tenant
            requested: tuple[CredentialUpdate, ...] = updates
            if has_certificate and tenant.trust_anchors:
                # A trust anchor may have a template for the auth-id (management 6.5).
                requested = parse_credentials(document, rules=self._rules, trust_anchors=tenant.trust_anchors, now=now)
            limit = find_max_credentials_per_device(tenant, self._settings.max_credentials_per_device)
            if 0 <= limit < len(requested):
                raise Forbidden(f"max-credentials-per-device: a device may not have more than {limit}")
            stored = await _get_credentials(transaction, tenant_id, device_id)
            expected.check(stored.version)
            # A request that was read twice has its passwords in the same order.
            by_password = dict(zip(plain_passwords(requested), hashes, strict=True))
            return stored, merge(stored.credentials, with_hashes(requested, by_password))

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
                before=stored.version,
                after=version,
            )

        passwords = plain_passwords(updates)
        if passwords:
            await self._store.read(rehearse)
        hashes = [await self._passwords.hash(password.text) for password in passwords]
        await self._store.write(update)
        return version

    def _check_ids(self, tenant_id: str, device_id: str) -> None:
        self._identifiers.check_tenant_id(tenant_id)
        self._identifiers.check_device_id(device_id)


async def _get_tenant(transaction: Transaction, tenant_id: str) -> StoredTenant:
    stored = await transaction.find_tenant(tenant_id)
    if stored is None:
        raise NotFound(f"there is no tenant {tenant_id}")
    return stored


async def _get_device(transaction: Transaction, tenant_id: str, device_id: str) -> StoredDevice:
    stored = await transaction.find_device(tenant_id, device_id)
    if stored is None:
        raise NotFound(f"tenant {tenant_id} has no device {device_id}")
    return stored


async def _get_credentials(transaction: Transaction, tenant_id: str, device_id: str) -> StoredCredentials:
    stored = await transaction.find_credentials(tenant_id, device_id)
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


def _status(stored: StoredDevice) -> JsonObject:
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
