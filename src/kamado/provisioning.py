"""First contact: a device that nobody has registered comes with a certificate of a CA that its tenant trusts, or
through a gateway that may bring it along.

The decisions of provisioning 3.2 and 4.1, in their order. What needs time and no database (reading the certificate,
checking its signature) is done before the transaction; everything that may have changed since is checked again inside
it. Device and credential appear together or not at all, and of several first contacts at once one creates and the
others find.

Where an external system has a say, it is asked after all checks and before the transaction (provisioning 9).

Knows nothing of AMQP, nor of how the external system is asked, nor of who is told about the new device.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Final, Protocol

from kamado.auth import Principal
from kamado.credentials import Credential, X509Secret
from kamado.devices import Device, parse_device, stored_device
from kamado.document import Identifiers, JsonObject, Members, decode, decode_base64, format_timestamp, new_id
from kamado.errors import BadRequest, Conflict, Forbidden, NotFound, Reason, RegistryError, Unavailable
from kamado.store import (
    Change,
    ChangeKind,
    DamagedRow,
    DeviceLimitReached,
    Store,
    StoredCredentials,
    StoredDevice,
    StoredTenant,
    Transaction,
)
from kamado.tenants import Tenant, find_max_credentials_per_device, find_max_devices
from kamado.x509 import Certificate, DistinguishedName, VerifiedCertificate, parse_certificate, verify

__all__ = [
    "FirstContact",
    "HookFailed",
    "HookQuestion",
    "HookReply",
    "ProvisionedCredential",
    "ProvisioningHook",
    "ProvisioningService",
    "ProvisioningSettings",
]

_log = logging.getLogger(__name__)

_X509: Final = "x509-cert"
_GATEWAY_AUTHORITY: Final = "auto-provisioning-enabled"
# As in a look-up that finds nothing: which check it was is not for the adapter.
_NO_CREDENTIALS: Final = "no matching credentials"
_NO_DEVICE: Final = "no such device"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisioningSettings:
    """What holds for all tenants."""

    verify_signature: bool = True
    """Check the certificate's signature with the CA's key (provisioning 3.2, row 10)."""
    max_devices_per_tenant: int = -1
    """-1 for no limit; the smaller of this and the tenant's own limit holds."""
    max_credentials_per_device: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionedCredential:
    """Whose the credential is, once there is one."""

    device_id: str
    credential: Credential | None
    """What was created; `None` if somebody else was faster."""
    as_gateway: bool = False
    """Whether what was created is a gateway."""

    @property
    def status(self) -> int:
        """201 for a new device, 200 for one that is there already (provisioning 3.7)."""
        return 200 if self.credential is None else 201


class FirstContact(StrEnum):
    """How a device comes. The values are part of what the external system is asked."""

    CERTIFICATE = "first-contact.certificate"
    GATEWAY = "first-contact.gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookQuestion:
    """What an external system is asked: whether this device is wanted (provisioning 9)."""

    kind: FirstContact
    tenant_id: str
    device_id: str
    """As it will be created, unless the answer names another."""
    auth_id: str | None = None
    issuer_dn: str | None = None
    certificate: bytes | None = field(default=None, repr=False)
    """DER. The three are those of a device that comes by certificate."""
    gateway_id: str | None = None
    """Of a device that comes through a gateway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookReply:
    """What an external system has answered."""

    is_wanted: bool
    body: object = None
    """The JSON value; `None` if there is none."""


class HookFailed(Exception):
    """There is no answer that could be used. The text says why, for the log."""


class ProvisioningHook(Protocol):
    """An external system that has a say in which devices are created."""

    async def ask(self, question: HookQuestion) -> HookReply:
        """Ask whether a device is wanted. Waits, but not for ever; cancelled, it leaves nothing behind.

        Called before anything has waited, so the caller may not be in a task yet (decision 8).

        Raises:
            HookFailed: It does not answer, or not in its form.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wishes:
    """What an external system wants of a device that it wants."""

    device_id: str | None = None
    """`None` for the one that it was asked about."""
    defaults: JsonObject = field(default_factory=dict)
    ext: JsonObject = field(default_factory=dict)

    def apply(self, device: Device) -> Device:
        """Add them to a device that is to be created."""
        return replace(device, defaults=device.defaults | self.defaults, ext=device.ext | self.ext)


_NO_WISHES: Final = _Wishes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the checks up to row 12 came to, and for which version of the tenant that is so."""

    tenant_version: str
    device_id: str
    as_gateway: bool
    issuer_dn: str


class ProvisioningService:
    """Creates devices on first contact.

    Args:
        store: The database.
        settings: Limits, and whether signatures are checked.
        identifiers: The rule for device ids, which one made from a template must keep.
        clock: The time now, aware UTC.
        hook: An external system that has a say.
        observe: Takes what became of each first contact: `device` or `gateway`, and `created`, `found` or the reason.
    """

    def __init__(
        self,
        store: Store,
        settings: ProvisioningSettings,
        identifiers: Identifiers,
        clock: Callable[[], datetime],
        *,
        hook: ProvisioningHook | None = None,
        observe: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._identifiers = identifiers
        self._clock = clock
        self._hook = hook
        self._observe = observe

    async def provision(
        self, principal: Principal, tenant_id: str, auth_id: str, client_certificate: object
    ) -> ProvisionedCredential:
        """Create the device of a certificate together with its credential (provisioning 3.2 and 3.5).

        The caller has found no credential of type x509-cert with this auth-id. Cancelled, it leaves both or neither;
        a retry is safe and tells which.

        Args:
            principal: The adapter that asks; the device is recorded under its name.
            tenant_id: The tenant.
            auth_id: As the adapter asked for it.
            client_certificate: As it stood in the request; not null.

        Raises:
            NotFound: The tenant is unknown or disabled, trusts no such CA, the certificate is not valid, or an external
                system does not want the device.
            BadRequest: The certificate is unreadable, is not for this auth-id, or makes no valid device id.
            Forbidden: A limit is reached.
            Conflict: The device id belongs to a device with other credentials.
            Unavailable: The database cannot be written now, or the external system has given no answer.
        """
        try:
            provisioned = await self._provision(principal, tenant_id, auth_id, client_certificate)
        except RegistryError as error:
            self._observe("device", error.reason or type(error).__name__.lower())
            raise
        kind = "gateway" if provisioned.as_gateway else "device"
        self._observe(kind, "found" if provisioned.credential is None else "created")
        return provisioned

    async def _provision(
        self, principal: Principal, tenant_id: str, auth_id: str, client_certificate: object
    ) -> ProvisionedCredential:
        async def look(transaction: Transaction) -> tuple[StoredTenant, int]:
            stored = await transaction.find_tenant(tenant_id)
            if stored is None:
                raise NotFound(_NO_CREDENTIALS, reason=Reason.TENANT_UNKNOWN)
            return stored, await transaction.count_devices(tenant_id)

        seen, devices = await self._store.read(look)
        certificate = _read_certificate(client_certificate)
        now = self._clock()
        plan = self._decide(seen.version, seen.tenant, certificate, auth_id, now)
        wishes = _NO_WISHES
        if self._hook is not None:
            self._check_limits(seen.tenant, devices)
            wishes = await self._ask(
                self._hook,
                HookQuestion(
                    kind=FirstContact.CERTIFICATE,
                    tenant_id=tenant_id,
                    device_id=plan.device_id,
                    auth_id=auth_id,
                    issuer_dn=plan.issuer_dn,
                    certificate=certificate.der,
                ),
                _NO_CREDENTIALS,
            )
            # The id that the external system has been told, or has given: it may have made a note of it.
            plan = replace(plan, device_id=wishes.device_id or plan.device_id)

        async def create(transaction: Transaction) -> ProvisionedCredential:
            # What an operator has changed meanwhile must count, so the checks are made once more if there is anything.
            stored = await transaction.find_tenant(tenant_id)
            if stored is None:
                raise NotFound(_NO_CREDENTIALS, reason=Reason.TENANT_UNKNOWN)
            found = await transaction.find_credential(tenant_id, _X509, auth_id)
            if found is not None:
                return ProvisionedCredential(device_id=found[0], credential=None)
            decided = plan
            if stored.version != plan.tenant_version:
                decided = self._decide(stored.version, stored.tenant, certificate, auth_id, now)
                if self._hook is not None:
                    decided = replace(decided, device_id=plan.device_id)
            self._check_limits(stored.tenant, await transaction.count_devices(tenant_id))
            return await _insert_with_credential(
                transaction,
                principal,
                tenant_id,
                auth_id,
                plan=decided,
                wishes=wishes,
                max_devices=self._find_max_devices(stored.tenant),
                now=now,
            )

        try:
            return await self._store.write(create, device=(tenant_id, plan.device_id))
        except Conflict as conflict:
            # Provisioning 3.7: a clash on the credential means that another first contact was faster.
            winner = await self._store.lookups.find_credential(tenant_id, _X509, auth_id)
            if winner is None:
                raise Conflict(
                    f"device {plan.device_id} exists, with other credentials", reason=Reason.DEVICE_ID_TAKEN
                ) from conflict
        return ProvisionedCredential(device_id=winner.device_id, credential=None)

    async def provision_edge_device(
        self, principal: Principal, tenant_id: str, device_id: str, gateway_id: str
    ) -> Device | None:
        """Create a device behind the gateway that asks for it (provisioning 4).

        The caller has found no device of this id. Cancelled, it leaves the device or nothing; a retry is safe.

        Args:
            principal: The adapter that asks; the device is recorded under its name.
            tenant_id: The tenant.
            device_id: The edge device.
            gateway_id: Who brings it along.

        Returns:
            What was created; `None` if there is such a device by now, whoever made it and for whichever gateway.

        Raises:
            NotFound: The tenant is unknown, the gateway may not provision devices, or the external system does not want
                the device.
            BadRequest: The device id breaks the rule for device ids.
            Forbidden: The tenant has as many devices as it may.
            Unavailable: The database cannot be written now, or the external system has given no answer.
        """
        # Most unknown devices are just unknown, and their gateway has no right to change that: no transaction for them.
        row = await self._store.lookups.find_registration(tenant_id, gateway_id)
        if row is None:
            tenant = await self._store.lookups.find_tenant(tenant_id)
            # An alias names a tenant in the Tenant API only.
            if tenant is None or tenant.tenant_id != tenant_id:
                raise NotFound(_NO_DEVICE, reason=Reason.TENANT_UNKNOWN)
        _check_may_provision(None if row is None else _read_gateway(tenant_id, gateway_id, row.document))
        try:
            created = await self._provision_edge_device(principal, tenant_id, device_id, gateway_id)
        except RegistryError as error:
            self._observe("edge", error.reason or type(error).__name__.lower())
            raise
        self._observe("edge", "found" if created is None else "created")
        return created

    async def _provision_edge_device(
        self, principal: Principal, tenant_id: str, device_id: str, gateway_id: str
    ) -> Device | None:
        try:
            self._identifiers.check_device_id(device_id)
        except BadRequest as error:
            raise BadRequest(str(error), reason=Reason.EDGE_DEVICE_ID_INVALID) from None
        now = self._clock()

        async def check(transaction: Transaction) -> tuple[Device, int] | None:
            stored = await transaction.find_tenant(tenant_id)
            if stored is None:
                raise NotFound(_NO_DEVICE, reason=Reason.TENANT_UNKNOWN)
            if await transaction.find_device(tenant_id, device_id) is not None:
                return None
            gateway = await transaction.find_device(tenant_id, gateway_id)
            groups = _check_may_provision(None if gateway is None else gateway.device).member_of
            self._check_device_limit(stored.tenant, await transaction.count_devices(tenant_id))
            return Device(via=(gateway_id,), via_groups=groups), self._find_max_devices(stored.tenant)

        wishes = _NO_WISHES
        if self._hook is not None:
            if await self._store.read(check) is None:
                return None
            question = HookQuestion(
                kind=FirstContact.GATEWAY, tenant_id=tenant_id, device_id=device_id, gateway_id=gateway_id
            )
            wishes = await self._ask(self._hook, question, _NO_DEVICE)

        async def create(transaction: Transaction) -> Device | None:
            checked = await check(transaction)
            if checked is None:
                return None
            device = wishes.apply(checked[0])
            await _insert(transaction, principal, tenant_id, device_id, device=device, max_devices=checked[1], now=now)
            return device

        try:
            return await self._store.write(create, device=(tenant_id, device_id))
        except Conflict:
            # Somebody else was faster (provisioning 4.3, step 1).
            return None

    async def _ask(self, hook: ProvisioningHook, question: HookQuestion, refusal: str) -> _Wishes:
        """Ask the external system (provisioning 9).

        Args:
            hook: The external system.
            question: What is asked.
            refusal: What the adapter reads if the device is not wanted.
        """
        try:
            reply = await hook.ask(question)
            if not reply.is_wanted:
                raise NotFound(refusal, reason=Reason.HOOK_REFUSED)
            return _NO_WISHES if reply.body is None else self._read_wishes(reply.body, question)
        except HookFailed as error:
            _log.warning(
                "provisioning hook failed",
                extra={"tenant_id": question.tenant_id, "device_id": question.device_id, "error": str(error)},
            )
            raise Unavailable("provisioning is not possible now", reason=Reason.HOOK_FAILED) from error

    def _read_wishes(self, body: object, question: HookQuestion) -> _Wishes:
        """Read the body of an answer, by the rules of devices (management 5)."""
        try:
            members = Members(body)
            device_id, defaults, ext = members.value("device-id"), members.value("defaults"), members.value("ext")
            members.finish()
            device = parse_device({"defaults": defaults, "ext": ext})
            if device_id is None:
                return _Wishes(defaults=device.defaults, ext=device.ext)
            if not isinstance(device_id, str):
                raise BadRequest("device-id: must be a string")
            self._identifiers.check_device_id(device_id)
            if question.kind is FirstContact.GATEWAY and device_id != question.device_id:
                raise BadRequest("device-id: a device that comes through a gateway has its id already")
        except BadRequest as error:
            raise HookFailed(f"the answer cannot be used: {error}") from error
        return _Wishes(device_id=device_id, defaults=device.defaults, ext=device.ext)

    def _decide(
        self, tenant_version: str, tenant: Tenant, certificate: Certificate, auth_id: str, now: datetime
    ) -> _Plan:
        """Make the checks of rows 7 to 12."""
        if not tenant.enabled:
            raise NotFound(_NO_CREDENTIALS, reason=Reason.TENANT_DISABLED)
        try:
            verified = verify(certificate, tenant.trust_anchors, now, check_signature=self._settings.verify_signature)
        except NotFound as error:
            raise NotFound(_NO_CREDENTIALS, reason=error.reason) from error
        _check_auth_id(auth_id, verified)
        return _Plan(
            tenant_version=tenant_version,
            device_id=self._make_device_id(verified),
            as_gateway=verified.anchor.auto_provision_as_gateway,
            issuer_dn=certificate.issuer.text,
        )

    def _make_device_id(self, verified: VerifiedCertificate) -> str:
        """Make the device's id (provisioning 3.4)."""
        template = verified.anchor.device_id_template
        if template is None:
            return new_id()
        try:
            return self._identifiers.check_device_id(template.fill(verified.certificate.subject))
        except BadRequest as error:
            # A template that cannot be filled has said so already.
            raise BadRequest(
                f"device id from template: {error}", reason=error.reason or Reason.DEVICE_ID_INVALID
            ) from None

    def _check_limits(self, tenant: Tenant, devices: int) -> None:
        """Check that one more device with one credential is within the limits (row 13)."""
        self._check_device_limit(tenant, devices)
        if find_max_credentials_per_device(tenant, self._settings.max_credentials_per_device) == 0:
            raise Forbidden(
                "max-credentials-per-device: the tenant allows none", reason=Reason.CREDENTIALS_LIMIT_REACHED
            )

    def _check_device_limit(self, tenant: Tenant, devices: int) -> None:
        limit = self._find_max_devices(tenant)
        if 0 <= limit <= devices:
            raise DeviceLimitReached(limit)

    def _find_max_devices(self, tenant: Tenant) -> int:
        return find_max_devices(tenant, self._settings.max_devices_per_tenant)


def _read_certificate(client_certificate: object) -> Certificate:
    """Read the request's certificate (row 6): Base64 of either alphabet, with or without padding."""
    if not isinstance(client_certificate, str):
        raise BadRequest("client-certificate: must be a string", reason=Reason.CERTIFICATE_UNREADABLE)
    try:
        encoded = decode_base64(client_certificate, "client-certificate", url_safe=True)
    except BadRequest as error:
        raise BadRequest(str(error), reason=Reason.CERTIFICATE_UNREADABLE) from None
    try:
        return parse_certificate(encoded)
    except BadRequest as error:
        raise BadRequest(f"client-certificate: {error}", reason=Reason.CERTIFICATE_UNREADABLE) from None


def _check_auth_id(auth_id: str, verified: VerifiedCertificate) -> None:
    """Check that the certificate is the one of this auth-id (row 11).

    With a template the plain subject is good, too: an adapter that knows no templates asks with it.
    """
    subject, template = verified.certificate.subject, verified.anchor.auth_id_template
    if auth_id == subject.text:
        return
    if template is not None and (auth_id == template.adapter_fill(subject) or auth_id == template.fill(subject)):
        return
    try:
        is_same_name = DistinguishedName.from_text(auth_id).equals(subject)
    except BadRequest:
        is_same_name = False
    raise BadRequest(
        "auth-id: must be the subject DN of the client-certificate, or what the CA's auth-id-template makes of it",
        reason=Reason.SUBJECT_SPELLED_OTHERWISE if is_same_name else Reason.SUBJECT_DIFFERS,
    )


def _read_gateway(tenant_id: str, gateway_id: str, text: str) -> Device:
    try:
        document = decode(text.encode())
    except BadRequest as error:
        raise DamagedRow(f"devices: {tenant_id}, {gateway_id}: {error}") from error
    if not isinstance(document, dict):
        raise DamagedRow(f"devices: {tenant_id}, {gateway_id}: not a JSON object")
    return stored_device(document)


def _check_may_provision(gateway: Device | None) -> Device:
    """Check that a gateway may bring devices along (provisioning 4.1): if not, they are as unknown as any other."""
    if gateway is None:
        raise NotFound(_NO_DEVICE, reason=Reason.DEVICE_AND_GATEWAY_UNKNOWN)
    if not gateway.enabled:
        raise NotFound(_NO_DEVICE, reason=Reason.DEVICE_UNKNOWN_GATEWAY_DISABLED)
    if _GATEWAY_AUTHORITY not in gateway.authorities:
        raise NotFound(_NO_DEVICE, reason=Reason.GATEWAY_MAY_NOT_PROVISION)
    return gateway


async def _insert_with_credential(
    transaction: Transaction,
    principal: Principal,
    tenant_id: str,
    auth_id: str,
    *,
    plan: _Plan,
    wishes: _Wishes,
    max_devices: int,
    now: datetime,
) -> ProvisionedCredential:
    """Store what provisioning 3.5 describes."""
    comment = f"Auto-provisioned at {format_timestamp(now)}"
    # No validity: a renewed certificate of the same subject must go on working.
    credential = Credential(type=_X509, auth_id=auth_id, comment=comment, secrets=(X509Secret(id=new_id()),))
    device = wishes.apply(
        Device(ext={"comment": comment}, authorities=(_GATEWAY_AUTHORITY,) if plan.as_gateway else ())
    )
    await _insert(
        transaction,
        principal,
        tenant_id,
        plan.device_id,
        device=device,
        credentials=(credential,),
        max_devices=max_devices,
        now=now,
    )
    return ProvisionedCredential(device_id=plan.device_id, credential=credential, as_gateway=plan.as_gateway)


async def _insert(
    transaction: Transaction,
    principal: Principal,
    tenant_id: str,
    device_id: str,
    *,
    device: Device,
    credentials: tuple[Credential, ...] = (),
    max_devices: int,
    now: datetime,
) -> None:
    stored = StoredDevice(
        tenant_id=tenant_id,
        device_id=device_id,
        version=new_id(),
        created=now,
        auto_provisioned=True,
        device=device,
    )
    credentials_set = StoredCredentials(
        tenant_id=tenant_id, device_id=device_id, version=new_id(), credentials=credentials
    )
    await transaction.insert_device(stored, credentials_set, max_devices=max_devices)
    for kind, version in ((ChangeKind.DEVICE, stored.version), (ChangeKind.CREDENTIALS, credentials_set.version)):
        await transaction.record(
            Change(
                principal=principal.name,
                kind=kind,
                tenant_id=tenant_id,
                resource_id=device_id,
                before=None,
                after=version,
            )
        )
