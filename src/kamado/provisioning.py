"""First contact: a device comes with a certificate of a CA that its tenant trusts, and nobody has registered it.

The decision of provisioning 3.2, in its order. What needs time and no database (reading the certificate, checking its
signature) is done before the transaction; everything that may have changed since is checked again inside it. Device
and credential appear together or not at all, and of several first contacts at once one creates and the others find.

Knows nothing of AMQP, nor of who is told about the new device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from kamado.auth import Principal
from kamado.credentials import Credential, X509Secret
from kamado.devices import Device
from kamado.document import Identifiers, decode_base64, format_timestamp, new_id
from kamado.errors import BadRequest, Conflict, Forbidden, NotFound, Reason, RegistryError
from kamado.store import Change, ChangeKind, Store, StoredCredentials, StoredDevice, Transaction
from kamado.tenants import Tenant, find_max_credentials_per_device, find_max_devices
from kamado.x509 import Certificate, DistinguishedName, VerifiedCertificate, parse_certificate, verify

__all__ = ["ProvisionedCredential", "ProvisioningService", "ProvisioningSettings"]

_X509: Final = "x509-cert"
_GATEWAY_AUTHORITY: Final = "auto-provisioning-enabled"
# As in a look-up that finds nothing: which check it was is not for the adapter.
_NO_CREDENTIALS: Final = "no matching credentials"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the checks up to row 12 came to, and for which version of the tenant that is so."""

    tenant_version: str
    device_id: str
    as_gateway: bool


class ProvisioningService:
    """Creates devices on first contact.

    Args:
        store: The database.
        settings: Limits, and whether signatures are checked.
        identifiers: The rule for device ids, which one made from a template must keep.
        clock: The time now, aware UTC.
        observe: Takes what became of each first contact: `device` or `gateway`, and `created`, `found` or the reason.
    """

    def __init__(
        self,
        store: Store,
        settings: ProvisioningSettings,
        identifiers: Identifiers,
        clock: Callable[[], datetime],
        *,
        observe: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._identifiers = identifiers
        self._clock = clock
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
            NotFound: The tenant is unknown or disabled, trusts no such CA, or the certificate is not valid.
            BadRequest: The certificate is unreadable, is not for this auth-id, or makes no valid device id.
            Forbidden: A limit is reached.
            Conflict: The device id belongs to a device with other credentials.
            Unavailable: The database cannot be written now.
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
        seen = await self._store.read(lambda transaction: transaction.find_tenant(tenant_id))
        if seen is None:
            raise NotFound(_NO_CREDENTIALS, reason=Reason.TENANT_UNKNOWN)
        certificate = _read_certificate(client_certificate)
        now = self._clock()
        plan = self._decide(seen.version, seen.tenant, certificate, auth_id, now)

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
            self._check_limits(stored.tenant, await transaction.count_devices(tenant_id))
            return await _insert(transaction, principal, tenant_id, auth_id, plan=decided, now=now)

        try:
            return await self._store.write(create)
        except Conflict as conflict:
            # Provisioning 3.7: a clash on the credential means that another first contact was faster.
            winner = await self._store.lookups.find_credential(tenant_id, _X509, auth_id)
            if winner is None:
                raise Conflict(
                    f"device {plan.device_id} exists, with other credentials", reason=Reason.DEVICE_ID_TAKEN
                ) from conflict
        return ProvisionedCredential(device_id=winner.device_id, credential=None)

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
        limit = find_max_devices(tenant, self._settings.max_devices_per_tenant)
        if 0 <= limit <= devices:
            raise Forbidden("max-devices: the tenant has as many as it may", reason=Reason.DEVICE_LIMIT_REACHED)
        if find_max_credentials_per_device(tenant, self._settings.max_credentials_per_device) == 0:
            raise Forbidden(
                "max-credentials-per-device: the tenant allows none", reason=Reason.CREDENTIALS_LIMIT_REACHED
            )


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


async def _insert(
    transaction: Transaction, principal: Principal, tenant_id: str, auth_id: str, *, plan: _Plan, now: datetime
) -> ProvisionedCredential:
    """Store what provisioning 3.5 describes."""
    comment = f"Auto-provisioned at {format_timestamp(now)}"
    # No validity: a renewed certificate of the same subject must go on working.
    credential = Credential(type=_X509, auth_id=auth_id, comment=comment, secrets=(X509Secret(id=new_id()),))
    device = StoredDevice(
        tenant_id=tenant_id,
        device_id=plan.device_id,
        version=new_id(),
        created=now,
        auto_provisioned=True,
        device=Device(ext={"comment": comment}, authorities=(_GATEWAY_AUTHORITY,) if plan.as_gateway else ()),
    )
    credentials = StoredCredentials(
        tenant_id=tenant_id, device_id=plan.device_id, version=new_id(), credentials=(credential,)
    )
    await transaction.insert_device(device, credentials)
    for kind, version in ((ChangeKind.DEVICE, device.version), (ChangeKind.CREDENTIALS, credentials.version)):
        await transaction.record(
            Change(
                principal=principal.name,
                kind=kind,
                tenant_id=tenant_id,
                resource_id=plan.device_id,
                before=None,
                after=version,
            )
        )
    return ProvisionedCredential(device_id=plan.device_id, credential=credential, as_gateway=plan.as_gateway)
