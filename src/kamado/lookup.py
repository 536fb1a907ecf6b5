"""What protocol adapters ask: get a tenant, assert a registration, get credentials.

The hot path of the registry. A look-up reads one row (a second one where gateway groups or a refusal need it), checks
it through a small typed view of the stored JSON and passes everything it has no business with on as it lies there.
Where the database answers at once, none of these coroutines suspends.

Knows nothing of AMQP: arguments are already strings or the bytes of a body, answers are a status and bytes. Every
refusal is a `RegistryError` with its `Reason`; its text is the same for all reasons that look alike to a guesser.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import compress
from typing import Final, NamedTuple

import msgspec

from kamado.auth import Principal
from kamado.credentials import stored_document
from kamado.devices import device_document
from kamado.document import JsonObject, decode, encode
from kamado.errors import BadRequest, Forbidden, NotFound, NotSupported, Reason
from kamado.provisioning import ProvisioningService
from kamado.store import CredentialRow, DamagedRow, Lookups, RegistrationRow, TenantRow
from kamado.tenants import stored_tenant, tenant_payload
from kamado.x509 import DistinguishedName

__all__ = ["Answer", "LookupService", "LookupSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupSettings:
    """How long adapters may keep an answer, in seconds; zero or less means not at all (amqp-apis 8)."""

    tenant_max_age: int = 180
    assertion_max_age: int = 300
    credentials_max_age: int = 180


class Answer(NamedTuple):
    """A successful look-up, ready for the wire."""

    status: int
    payload: bytes
    """JSON text."""
    cache_control: str | None
    tenant_id: str | None
    """Of the answer: what was asked for, so an alias comes back as such; of a tenant found by DN, its id."""


# Views: the members of stored documents that decide. msgspec skips the others without building them; `Raw` members
# are passed on as they lie in the document.


class _Registration(msgspec.Struct, gc=False):
    enabled: bool = True
    via: list[str] = []
    via_groups: list[str] = msgspec.field(name="viaGroups", default=[])
    defaults: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    downstream: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="downstream-message-mapper", default=msgspec.UNSET)
    upstream: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="upstream-message-mapper", default=msgspec.UNSET)
    command_endpoint: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="command-endpoint", default=msgspec.UNSET)


class _Gateway(msgspec.Struct, gc=False):
    enabled: bool = True
    member_of: list[str] = msgspec.field(name="memberOf", default=[])


class _Assertion(msgspec.Struct, gc=False, rename="kebab"):
    """The payload of amqp-apis 10.3."""

    device_id: str
    via: list[str] | msgspec.UnsetType
    defaults: msgspec.Raw | msgspec.UnsetType
    downstream_message_mapper: msgspec.Raw | msgspec.UnsetType
    upstream_message_mapper: msgspec.Raw | msgspec.UnsetType
    command_endpoint: msgspec.Raw | msgspec.UnsetType


class _Secret(msgspec.Struct, gc=False, rename="kebab", omit_defaults=True):
    enabled: bool = True
    not_before: str | None = None
    not_after: str | None = None
    comment: str | None = None


class _Credential(msgspec.Struct, gc=False):
    secrets: list[_Secret]
    enabled: bool = True
    ext: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _X509Credential(msgspec.Struct, gc=False, rename="kebab"):
    """A stored x509-cert credential and, with the device's id, its payload (amqp-apis 11.4).

    Its secret has nothing for an adapter but a validity: `[{}]` is normal, the secret's id stays here.
    """

    type: str
    auth_id: str
    secrets: list[_Secret]
    device_id: str = ""
    enabled: bool = True
    comment: str | msgspec.UnsetType = msgspec.UNSET
    ext: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_object = msgspec.json.Decoder(dict[str, object]).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_registration = msgspec.json.Decoder(_Registration).decode
_decode_command_endpoint = msgspec.json.Decoder(JsonObject).decode
_decode_gateway = msgspec.json.Decoder(_Gateway).decode
_decode_credential = msgspec.json.Decoder(_Credential).decode
_decode_x509_credential = msgspec.json.Decoder(_X509Credential).decode
_encode = msgspec.json.encode

_CRITERIA: Final = frozenset(("type", "auth-id", "device-id"))
_X509: Final = "x509-cert"
# The types whose secrets an adapter may keep for a while; a PSK or an own type is asked for each time (amqp-apis 8).
_CACHEABLE_TYPES: Final = frozenset(("hashed-password", _X509))

# One text per operation: which of the reasons it was is not the adapter's to know.
_NO_TENANT: Final = "no such tenant"
_NO_DEVICE: Final = "no such device"
_NO_CREDENTIALS: Final = "no matching credentials"
_NO_GATEWAY: Final = "the gateway may not act for the device"


class LookupService:
    """The three look-ups.

    Args:
        lookups: Point reads.
        provisioning: Asked when a device that nobody registered comes with a certificate, or through a gateway.
        settings: Cache directives.
        clock: The time now, aware UTC.
    """

    def __init__(
        self,
        lookups: Lookups,
        provisioning: ProvisioningService,
        settings: LookupSettings,
        clock: Callable[[], datetime],
    ) -> None:
        self._lookups = lookups
        self._find_tenant = lookups.find_tenant
        self._find_tenants_by_anchor = lookups.find_tenants_by_anchor
        self._find_registration = lookups.find_registration
        self._find_group_members = lookups.find_group_members
        self._find_credential = lookups.find_credential
        self._provisioning = provisioning
        self._clock = clock
        self._tenants = _TenantPayloads(clock)
        self._second = _Second(clock)
        self._tenant_directive = _directive(settings.tenant_max_age)
        self._assertion_directive = _directive(settings.assertion_max_age)
        self._credentials_directive = _directive(settings.credentials_max_age)

    def batch(self) -> AbstractContextManager[None]:
        """Answer what is asked inside from one snapshot, at less cost; see `Lookups.batch`."""
        return self._lookups.batch()

    # --- Tenant API (amqp-apis 9) ---

    async def get_tenant(self, principal: Principal, tenant_id: str) -> Answer:
        """Get a tenant by its id or else by its alias (amqp-apis 9.3).

        The caller's right is checked by the transport, on `Answer.tenant_id` (amqp-apis 9.2).

        Raises:
            NotFound: There is none.
        """
        row = await self._find_tenant(tenant_id)
        if row is None:
            raise NotFound(_NO_TENANT, reason=Reason.TENANT_UNKNOWN)
        return Answer(200, self._tenants.get(row), self._tenant_directive, tenant_id)

    async def find_tenant_by_subject_dn(self, principal: Principal, subject_dn: str) -> Answer:
        """Get the tenant that trusts a CA of that name (amqp-apis 9.3, rows 4 and 5; equality of provisioning 7.6).

        Raises:
            BadRequest: The text is no distinguished name.
            NotFound: No tenant trusts that CA, or several do.
        """
        name = _parse_name(subject_dn) if len(subject_dn) <= _MAX_CACHED_NAME else _read_name(subject_dn)
        rows = await self._find_tenants_by_anchor(*name)
        if not rows:
            raise NotFound(_NO_TENANT, reason=Reason.ISSUER_UNKNOWN)
        if len(rows) > 1:
            raise NotFound(_NO_TENANT, reason=Reason.ISSUER_AMBIGUOUS)
        row = rows[0]
        return Answer(200, self._tenants.get(row), self._tenant_directive, row.tenant_id)

    async def get_tenant_by_body(self, principal: Principal, body: bytes | None) -> Answer:
        """Get a tenant by the criterion in a request's body; `tenant-id` goes before `subject-dn` (amqp-apis 9.1).

        Raises:
            BadRequest: The body is missing, no JSON object, or has no criterion that is a string.
            NotFound: As for the other two.
        """
        request = _read_body(body)
        tenant_id = request.get("tenant-id")
        if isinstance(tenant_id, str):
            return await self.get_tenant(principal, tenant_id)
        subject_dn = request.get("subject-dn")
        # Every CA has a name, so an empty one is no criterion.
        if isinstance(subject_dn, str) and subject_dn:
            return await self.find_tenant_by_subject_dn(principal, subject_dn)
        raise BadRequest("tenant-id or subject-dn: one must be given, as a string", reason=Reason.MALFORMED_REQUEST)

    # --- Device Registration API (amqp-apis 10) ---

    async def assert_registration(
        self, principal: Principal, tenant_id: str, device_id: str, gateway_id: str | None = None
    ) -> Answer:
        """Assert that a device is registered and enabled and, if one is named, that the gateway may act for it.

        The checks have the order of amqp-apis 10.2. Whether the tenant is enabled is the adapter's to check.

        May wait only where a gateway provisions the device. Cancelled there, it leaves the device or nothing; a retry
        then finds it or provisions it.

        Raises:
            NotFound: Tenant or device unknown, or device disabled, whatever the gateway is.
            Forbidden: The gateway is unknown, disabled or not authorised; or as of provisioning.
            BadRequest, Unavailable: As of provisioning.
        """
        row = await self._find_registration(tenant_id, device_id)
        if row is None:
            if gateway_id is None:
                raise await self._without_device(tenant_id)
            row = await self._provision_edge_device(principal, tenant_id, device_id, gateway_id)
        device = _decode_registration(row.document)
        if not device.enabled:
            raise NotFound(_NO_DEVICE, reason=Reason.DEVICE_DISABLED)
        if gateway_id is not None:
            _check_gateway(await self._find_registration(tenant_id, gateway_id), gateway_id, device)
        via: list[str] | msgspec.UnsetType = msgspec.UNSET
        if device.via_groups:
            via = list(dict.fromkeys((*device.via, *await self._find_group_members(tenant_id, device.via_groups))))
        elif device.via:
            via = list(dict.fromkeys(device.via))
        payload = _encode(
            _Assertion(
                device_id,
                via or msgspec.UNSET,
                device.defaults,
                device.downstream,
                device.upstream,
                device.command_endpoint and _command_endpoint(device.command_endpoint),
            )
        )
        return Answer(200, payload, self._assertion_directive, tenant_id)

    async def _provision_edge_device(
        self, principal: Principal, tenant_id: str, device_id: str, gateway_id: str
    ) -> RegistrationRow:
        """Let the gateway provision the device (provisioning 4); what anybody has made meanwhile counts as found."""
        device = await self._provisioning.provision_edge_device(principal, tenant_id, device_id, gateway_id)
        if device is not None:
            return RegistrationRow(device_id, encode(device_document(device)).decode())
        row = await self._find_registration(tenant_id, device_id)
        if row is None:
            raise await self._without_device(tenant_id)
        return row

    async def _without_device(self, tenant_id: str) -> NotFound:
        known = await self._has_tenant(tenant_id)
        return NotFound(_NO_DEVICE, reason=Reason.DEVICE_UNKNOWN if known else Reason.TENANT_UNKNOWN)

    async def _has_tenant(self, tenant_id: str) -> bool:
        row = await self._find_tenant(tenant_id)
        # An alias names a tenant in the Tenant API only.
        return row is not None and row.tenant_id == tenant_id

    # --- Credentials API (amqp-apis 11) ---

    async def get_credentials(self, principal: Principal, tenant_id: str, body: bytes | None) -> Answer:
        """Get a credential by type and auth-id; provision the device if there is none (amqp-apis 11.2).

        May wait for provisioning only. Cancelled there, it leaves a device that exists or does not, never half of
        one; a retry then finds it or provisions it.

        Args:
            principal: The adapter.
            tenant_id: The tenant.
            body: Type, auth-id and client context as a JSON object.

        Raises:
            BadRequest: The body is missing or malformed, a criterion missing; or as of provisioning.
            NotSupported: The body asks by device id.
            NotFound: There is none, or none that is usable now; or as of provisioning.
            Forbidden, Conflict, Unavailable: As of provisioning.
        """
        request = _read_body(body)
        type_ = request.get("type")
        auth_id = request.get("auth-id")
        if not isinstance(type_, str) or not isinstance(auth_id, str) or "device-id" in request:
            type_, auth_id = _check_criteria(request)
        row = await self._find_credential(tenant_id, type_, auth_id)
        if row is not None:
            return Answer(200, self._payload(row, type_, request), self._get_directive(type_), tenant_id)
        certificate = request.get("client-certificate")
        if type_ != _X509 or certificate is None:
            raise await self._without_credential(tenant_id, type_, auth_id, certificate)
        provisioned = await self._provisioning.provision(principal, tenant_id, auth_id, certificate)
        if provisioned.credential is not None:
            row = CredentialRow(provisioned.device_id, encode(stored_document(provisioned.credential)).decode())
            return Answer(201, self._payload(row, type_, request), "no-cache", tenant_id)
        # Somebody else was faster, and what they made counts as found (provisioning 3.7).
        row = await self._find_credential(tenant_id, type_, auth_id)
        if row is None:
            raise NotFound(_NO_CREDENTIALS, reason=Reason.CREDENTIAL_UNKNOWN)
        return Answer(200, self._payload(row, type_, request), self._get_directive(type_), tenant_id)

    def _get_directive(self, type_: str) -> str:
        return self._credentials_directive if type_ in _CACHEABLE_TYPES else "no-cache"

    def _payload(self, row: CredentialRow, type_: str, request: JsonObject) -> bytes:
        """Check that a credential can be used now by this client, and return the payload of amqp-apis 11.4.

        Raises:
            NotFound: It cannot.
        """
        document = row.document
        if type_ == _X509:
            certified = _decode_x509_credential(document)
            usable = self._check(certified, request)
            if usable is not None:
                certified.secrets = list(compress(certified.secrets, usable))
            certified.device_id = row.device_id
            return _encode(certified)
        usable = self._check(_decode_credential(document), request)
        if usable is not None:
            document = _leave_out_secrets(document, usable)
        # The rest of the payload is the stored document as it is.
        return b'{"device-id":%b,%b' % (_encode(row.device_id), document[1:].encode())

    def _check(self, credential: _Credential | _X509Credential, request: JsonObject) -> list[bool] | None:
        """Check a credential in the order of amqp-apis 11.2, step 6.

        Returns:
            Which of its secrets can be used now; `None` if all can.

        Raises:
            NotFound: It cannot be used.
        """
        if not credential.enabled:
            raise NotFound(_NO_CREDENTIALS, reason=Reason.CREDENTIAL_DISABLED)
        if credential.ext is not msgspec.UNSET and len(request) > 2:
            _check_context(request, credential.ext)
        for secret in credential.secrets:
            if not secret.enabled or secret.not_before is not None or secret.not_after is not None:
                return self._find_usable(credential.secrets)
        return None

    def _find_usable(self, secrets: Sequence[_Secret]) -> list[bool] | None:
        # Stored instants are whole seconds of UTC in one form, so their texts have their order (management 3.12). The
        # ends of a period belong to it.
        started, ended = self._second.texts()
        usable = [
            secret.enabled
            and (secret.not_before is None or secret.not_before <= started)
            and (secret.not_after is None or secret.not_after >= ended)
            for secret in secrets
        ]
        if all(usable):
            return None
        if any(usable):
            return usable
        enabled = [secret for secret in secrets if secret.enabled]
        if not enabled:
            reason = Reason.SECRETS_DISABLED
        elif all(secret.not_after is not None and secret.not_after < ended for secret in enabled):
            reason = Reason.SECRETS_EXPIRED
        else:
            reason = Reason.SECRETS_NOT_YET_VALID
        raise NotFound(_NO_CREDENTIALS, reason=reason)

    async def _without_credential(self, tenant_id: str, type_: str, auth_id: str, certificate: object) -> NotFound:
        if not await self._has_tenant(tenant_id):
            reason = Reason.TENANT_UNKNOWN
        elif type_ == _X509:
            usual = _usual_spelling(auth_id)
            is_known = usual != auth_id and await self._find_credential(tenant_id, type_, usual) is not None
            reason = Reason.SUBJECT_SPELLED_OTHERWISE if is_known else Reason.NO_CERTIFICATE
        else:
            reason = Reason.CREDENTIAL_UNKNOWN if certificate is None else Reason.TYPE_NOT_PROVISIONED
        return NotFound(_NO_CREDENTIALS, reason=reason)


def _directive(max_age: int) -> str:
    return f"max-age = {max_age}" if max_age > 0 else "no-cache"


def _read_body(body: bytes | None) -> dict[str, object]:
    if not body:
        raise BadRequest("the request needs a body", reason=Reason.MALFORMED_REQUEST)
    try:
        return _decode_object(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body must be a JSON object", reason=Reason.MALFORMED_REQUEST) from None


def _check_criteria(request: JsonObject) -> tuple[str, str]:
    """Check the criteria in the order of amqp-apis 11.2; a member of another type than string counts as absent."""
    type_, auth_id, device_id = request.get("type"), request.get("auth-id"), request.get("device-id")
    if not isinstance(type_, str):
        raise BadRequest("type: must be given, as a string", reason=Reason.MALFORMED_REQUEST)
    if isinstance(device_id, str):
        if not isinstance(auth_id, str):
            raise NotSupported("credentials cannot be got by device-id", reason=Reason.SEARCH_BY_DEVICE_ID)
        raise BadRequest("auth-id and device-id exclude each other", reason=Reason.MALFORMED_REQUEST)
    if not isinstance(auth_id, str):
        raise BadRequest("auth-id: must be given, as a string", reason=Reason.MALFORMED_REQUEST)
    return type_, auth_id


def _command_endpoint(stored: msgspec.Raw) -> msgspec.Raw:
    """Return a command endpoint whose payload properties are texts: adapters read an object of strings (10.3)."""
    endpoint = _decode_command_endpoint(stored)
    properties = endpoint.get("payload-properties")
    if not isinstance(properties, dict):
        return stored
    endpoint["payload-properties"] = {
        name: value if isinstance(value, str) else encode(value).decode()
        for name, value in properties.items()
        if value is not None
    }
    return msgspec.Raw(encode(endpoint))


def _check_gateway(row: RegistrationRow | None, gateway_id: str, device: _Registration) -> None:
    """Check that a gateway may act for a device (amqp-apis 10.2, steps 4 and 5 with gateway)."""
    if row is None:
        raise Forbidden(_NO_GATEWAY, reason=Reason.GATEWAY_UNKNOWN)
    gateway = _decode_gateway(row.document)
    if not gateway.enabled:
        raise Forbidden(_NO_GATEWAY, reason=Reason.GATEWAY_DISABLED)
    if gateway_id not in device.via and not any(group in device.via_groups for group in gateway.member_of):
        raise Forbidden(_NO_GATEWAY, reason=Reason.GATEWAY_NOT_AUTHORIZED)


def _check_context(request: JsonObject, ext_text: msgspec.Raw) -> None:
    """Compare the client context with the credential's `ext` (amqp-apis 11.3)."""
    ext = _decode_object(ext_text)
    for name, value in request.items():
        if value is not None and name in ext and name not in _CRITERIA and not _json_equal(ext[name], value):
            raise NotFound(_NO_CREDENTIALS, reason=Reason.CONTEXT_MISMATCH)


def _json_equal(one: object, other: object) -> bool:
    """Compare JSON values. Numbers by value; a boolean is no number, which Python sees otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_json_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_json_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _leave_out_secrets(document: str, usable: Sequence[bool]) -> str:
    """Return a stored credential without the secrets that are not usable; everything else stays as it is."""
    members = _decode_members(document)
    secrets = list(compress(_decode_elements(members["secrets"]), usable))
    members["secrets"] = msgspec.Raw(_encode(secrets))
    return _encode(members).decode()


# --- Names ---

_MAX_CACHED_NAME: Final = 1024


def _read_name(subject_dn: str) -> tuple[str, str]:
    """Return canonical key and RFC 2253 text of a name."""
    try:
        name = DistinguishedName.from_text(subject_dn)
    except BadRequest as error:
        raise BadRequest(f"subject-dn: {error}", reason=Reason.MALFORMED_REQUEST) from None
    return name.canonical_key, name.text


def _usual_spelling(auth_id: str) -> str:
    """Return an auth-id in the form of RFC 2253 if it is a name at all."""
    try:
        return DistinguishedName.from_text(auth_id).text
    except BadRequest:
        return auth_id


# Adapters ask for the same few CAs again and again, and reading a name costs more than the rest of the look-up.
_parse_name = lru_cache(maxsize=1024)(_read_name)


# --- Tenants ---

_MAX_CACHED_BYTES: Final = 16 * 1024 * 1024
_ENTRY_OVERHEAD: Final = 512
_END_OF_TIME: Final = datetime.max.replace(tzinfo=UTC)


class _TenantPayload(NamedTuple):
    version: str
    made: datetime
    until: datetime
    payload: bytes


class _TenantPayloads:
    """Payloads of tenants, ready for the wire.

    An entry is used only with the version that has just been read, so nothing has to tell of changes, and only within
    the time in which no CA begins or ends to be valid.
    """

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._entries: dict[str, _TenantPayload] = {}
        self._size = 0

    def get(self, row: TenantRow) -> bytes:
        """Return the payload of amqp-apis 9.4."""
        entry = self._entries.get(row.tenant_id)
        if entry is not None and entry.version == row.version and entry.made <= self._clock() < entry.until:
            return entry.payload
        return self._add(row)

    def _add(self, row: TenantRow) -> bytes:
        now = self._clock()
        try:
            document = decode(row.document.encode())
            assert isinstance(document, dict)
            payload, until = tenant_payload(row.tenant_id, stored_tenant(document), now)
        except BadRequest as error:
            raise DamagedRow(f"tenants: {row.tenant_id}: {error}") from error
        self._drop(row.tenant_id)
        self._entries[row.tenant_id] = _TenantPayload(row.version, now, until or _END_OF_TIME, payload)
        self._size += len(payload) + _ENTRY_OVERHEAD
        while self._size > _MAX_CACHED_BYTES:
            self._drop(next(iter(self._entries)))
        return payload

    def _drop(self, tenant_id: str) -> None:
        entry = self._entries.pop(tenant_id, None)
        if entry is not None:
            self._size -= len(entry.payload) + _ENTRY_OVERHEAD


class _Second:
    """The present second as texts that compare with stored instants; formatting one costs more than reading a row."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._start = self._end = datetime.min.replace(tzinfo=UTC)
        self._texts = ("", "")

    def texts(self) -> tuple[str, str]:
        """Return now, rounded down and rounded up to whole seconds.

        Whole seconds lie before or after now exactly as they lie before the one or after the other.
        """
        now = self._clock()
        if not self._start < now < self._end:
            start = now.replace(microsecond=0)
            end = start if start == now else start + timedelta(seconds=1)
            self._start, self._end = start, end
            self._texts = (f"{start.isoformat()[:19]}Z", f"{end.isoformat()[:19]}Z")
        return self._texts
