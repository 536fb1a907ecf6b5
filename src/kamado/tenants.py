"""A tenant: what an operator may say of it, checked, and what adapters are told (management 4; amqp-apis 9.4).

Pure: no storage, no clock.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from kamado.document import (
    INT32_MAX,
    INT64_MAX,
    JsonObject,
    Members,
    decode_base64,
    encode,
    encode_base64,
    format_timestamp,
    new_id,
)
from kamado.errors import BadRequest
from kamado.x509 import Certificate, DistinguishedName, IdTemplate, TrustAnchor, check_public_key, parse_certificate

__all__ = [
    "Adapter",
    "ConnectionDuration",
    "DataVolume",
    "Period",
    "PeriodMode",
    "RegistrationLimits",
    "ResourceLimits",
    "SamplingMode",
    "Tenant",
    "Tracing",
    "parse_tenant",
    "stored_tenant",
    "tenant_document",
    "tenant_payload",
]

UNLIMITED: Final = -1
_ALMOST_NEVER: Final = datetime(9999, 12, 31, tzinfo=UTC)
_ALIAS_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Whether and how a tenant's devices may use a protocol adapter (management 4.2)."""

    type: str
    enabled: bool = False
    device_authentication_required: bool = True
    ext: JsonObject = field(default_factory=dict)
    members: JsonObject = field(default_factory=dict)
    """Whatever else was given."""


class PeriodMode(StrEnum):
    """What a usage limit is counted over."""

    DAYS = "days"
    MONTHLY = "monthly"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """The time that a usage limit is counted over (management 4.3)."""

    mode: PeriodMode = PeriodMode.MONTHLY
    no_of_days: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataVolume:
    """How much a tenant's devices may send (management 4.3)."""

    effective_since: datetime
    max_bytes: int = UNLIMITED
    period: Period = Period()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionDuration:
    """How long a tenant's devices may be connected, in sum (management 4.3)."""

    effective_since: datetime
    max_minutes: int = UNLIMITED
    period: Period = Period()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits:
    """Limits that adapters enforce (management 4.3); -1 is unlimited, times in seconds."""

    max_connections: int = UNLIMITED
    max_ttl: int = UNLIMITED
    max_ttl_telemetry_qos0: int = UNLIMITED
    max_ttl_telemetry_qos1: int = UNLIMITED
    max_ttl_command_response: int = UNLIMITED
    data_volume: DataVolume | None = None
    connection_duration: ConnectionDuration | None = None
    ext: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationLimits:
    """Limits that the registry enforces (management 4.3); -1 leaves it to the registry's own."""

    max_devices: int = UNLIMITED
    max_credentials_per_device: int = UNLIMITED


class SamplingMode(StrEnum):
    """Which of a tenant's requests are traced."""

    DEFAULT = "default"
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """How a tenant's requests are traced (management 4.4)."""

    sampling_mode: SamplingMode | None = None
    sampling_mode_per_auth_id: dict[str, SamplingMode] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant (management 4.1)."""

    enabled: bool = True
    alias: str | None = None
    ext: JsonObject = field(default_factory=dict)
    defaults: JsonObject = field(default_factory=dict)
    adapters: tuple[Adapter, ...] | None = None
    """`None`: all adapters may be used."""
    minimum_message_size: int = 0
    """Bytes."""
    resource_limits: ResourceLimits | None = None
    registration_limits: RegistrationLimits | None = None
    tracing: Tracing | None = None
    trust_anchor_group: str | None = None
    trust_anchors: tuple[TrustAnchor, ...] = ()


# Reading


def parse_tenant(document: object) -> Tenant:
    """Read a tenant from the JSON value of a request; trust anchors without an id get one.

    Raises:
        BadRequest: It breaks a rule of management 4; the text names the member.
    """
    members = Members(document)
    members.drop("tenant-id")  # management 3.6: the path decides
    tenant = Tenant(
        enabled=members.boolean("enabled") is not False,
        alias=_parse_alias(members),
        ext=members.object("ext"),
        defaults=members.object("defaults"),
        adapters=_parse_adapters(members),
        minimum_message_size=members.integer("minimum-message-size", minimum=0, maximum=INT32_MAX) or 0,
        resource_limits=_parse_resource_limits(members.members("resource-limits")),
        registration_limits=_parse_registration_limits(members.members("registration-limits")),
        tracing=_parse_tracing(members.members("tracing")),
        trust_anchor_group=members.string("trust-anchor-group"),
        trust_anchors=tuple(_parse_trust_anchor(one) for one in members.elements("trusted-ca") or ()),
    )
    members.finish()
    _check_unique("adapters", "type", (adapter.type for adapter in tenant.adapters or ()))
    _check_unique("trusted-ca", "id", (anchor.id for anchor in tenant.trust_anchors))
    return tenant


def _check_unique(array: str, member: str, values: Iterator[str]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise BadRequest(f"{array}: {member} {value!r} occurs {count} times, it must be unique")


def _parse_alias(members: Members) -> str | None:
    alias = members.string("alias")
    if alias is not None and (not alias or not _ALIAS_CHARACTERS.issuperset(alias)):
        raise BadRequest(f"{members.path('alias')}: must consist of lower case letters, digits and hyphens")
    return alias


def _parse_adapters(members: Members) -> tuple[Adapter, ...] | None:
    entries = members.elements("adapters")
    if entries is None:
        return None
    if not entries:
        raise BadRequest("adapters: must not be empty; leave it out to allow all adapters")
    return tuple(
        Adapter(
            type=entry.required_string("type"),
            enabled=entry.boolean("enabled") or False,
            device_authentication_required=entry.boolean("device-authentication-required") is not False,
            ext=entry.object("ext"),
            members=entry.rest(),
        )
        for entry in entries
    )


def _limit(members: Members, name: str, maximum: int = INT64_MAX) -> int:
    value = members.integer(name, minimum=UNLIMITED, maximum=maximum)
    return UNLIMITED if value is None else value


def _parse_resource_limits(members: Members | None) -> ResourceLimits | None:
    if members is None:
        return None
    volume, duration = members.members("data-volume"), members.members("connection-duration")
    limits = ResourceLimits(
        max_connections=_limit(members, "max-connections", INT32_MAX),
        max_ttl=_limit(members, "max-ttl"),
        max_ttl_telemetry_qos0=_limit(members, "max-ttl-telemetry-qos0"),
        max_ttl_telemetry_qos1=_limit(members, "max-ttl-telemetry-qos1"),
        max_ttl_command_response=_limit(members, "max-ttl-command-response"),
        data_volume=None
        if volume is None
        else DataVolume(
            effective_since=_effective_since(volume),
            max_bytes=_limit(volume, "max-bytes"),
            period=_parse_period(volume),
        ),
        connection_duration=None
        if duration is None
        else ConnectionDuration(
            effective_since=_effective_since(duration),
            max_minutes=_limit(duration, "max-minutes"),
            period=_parse_period(duration),
        ),
        ext=members.object("ext"),
    )
    for one in (members, volume, duration):
        if one is not None:
            one.finish()
    return limits


def _effective_since(members: Members) -> datetime:
    instant = members.timestamp("effective-since")
    if instant is None:
        raise BadRequest(f"{members.path('effective-since')}: is required")
    return instant


def _parse_period(parent: Members) -> Period:
    members = parent.members("period")
    if members is None:
        return Period()
    mode = members.constant("mode", PeriodMode)
    if mode is None:
        raise BadRequest(f"{members.path('mode')}: is required")
    period = Period(mode=mode, no_of_days=members.integer("no-of-days", minimum=0, maximum=INT32_MAX) or 0)
    members.finish()
    return period


def _parse_registration_limits(members: Members | None) -> RegistrationLimits | None:
    if members is None:
        return None
    limits = RegistrationLimits(
        max_devices=_limit(members, "max-devices", INT32_MAX),
        max_credentials_per_device=_limit(members, "max-credentials-per-device", INT32_MAX),
    )
    members.finish()
    return limits


def _parse_tracing(members: Members | None) -> Tracing | None:
    if members is None:
        return None
    tracing = Tracing(
        sampling_mode=members.constant("sampling-mode", SamplingMode),
        sampling_mode_per_auth_id=members.constants("sampling-mode-per-auth-id", SamplingMode),
    )
    members.finish()
    return tracing


def _parse_trust_anchor(members: Members) -> TrustAnchor:
    """Read an entry of `trusted-ca` (management 4.5)."""
    certificate_bytes = members.base64("cert")
    if certificate_bytes is None:
        certificate = None
        subject, subject_dn_bytes = _parse_subject(members)
        algorithm = members.string("algorithm")
        public_key = members.base64("public-key")
        if public_key is None:
            raise BadRequest(f"{members.path('public-key')}: is required without cert")
        check_public_key(public_key, algorithm or "RSA", members.path("public-key"))
        not_before, not_after = members.timestamp("not-before"), members.timestamp("not-after")
        for name, instant in (("not-before", not_before), ("not-after", not_after)):
            if instant is None:
                raise BadRequest(f"{members.path(name)}: is required without cert")
        assert not_before is not None
        assert not_after is not None
    else:
        certificate = _parse_certificate(certificate_bytes, members.path("cert"))
        members.drop("subject-dn", "subject-dn-bytes", "algorithm", "public-key", "not-before", "not-after")
        subject, subject_dn_bytes = certificate.subject, certificate.subject.der
        algorithm, public_key = certificate.algorithm, certificate.public_key
        not_before, not_after = certificate.not_before, certificate.not_after
    ocsp_revocation_enabled = members.boolean("ocsp-revocation-enabled") or False
    ocsp_responder_cert = members.string("ocsp-responder-cert")
    if ocsp_responder_cert is not None:
        decode_base64(ocsp_responder_cert, members.path("ocsp-responder-cert"))
    elif ocsp_revocation_enabled:
        if certificate is None:
            raise BadRequest(f"{members.path('ocsp-responder-cert')}: is required with ocsp-revocation-enabled")
        ocsp_responder_cert = encode_base64(certificate.der)
    anchor = TrustAnchor(
        id=members.string("id") or new_id(),
        subject=subject,
        subject_dn_bytes=subject_dn_bytes,
        public_key=public_key,
        algorithm=algorithm,
        not_before=not_before,
        not_after=not_after,
        auto_provisioning_enabled=members.boolean("auto-provisioning-enabled") or False,
        auto_provision_as_gateway=members.boolean("auto-provision-as-gateway") or False,
        device_id_template=_parse_template(members, "auto-provisioning-device-id-template"),
        auth_id_template=_parse_template(members, "auth-id-template"),
        ocsp_revocation_enabled=ocsp_revocation_enabled,
        ocsp_responder_uri=members.string("ocsp-responder-uri"),
        ocsp_responder_cert=ocsp_responder_cert,
        ocsp_nonce_enabled=members.boolean("ocsp-nonce-enabled") or False,
    )
    members.finish()
    return anchor


def _parse_certificate(data: bytes, member: str) -> Certificate:
    try:
        return parse_certificate(data)
    except BadRequest as error:
        raise BadRequest(f"{member}: {error}") from None


def _parse_subject(members: Members) -> tuple[DistinguishedName, bytes | None]:
    """Read `subject-dn`, and `subject-dn-bytes` if it is given: it keeps what the text cannot tell (string types)."""
    text = members.required_string("subject-dn")
    try:
        subject = DistinguishedName.from_text(text)
    except BadRequest as error:
        raise BadRequest(f"{members.path('subject-dn')}: {error}") from None
    encoded = members.base64("subject-dn-bytes")
    if encoded is None:
        return subject, None
    member = members.path("subject-dn-bytes")
    try:
        name = DistinguishedName.from_der(encoded)
    except BadRequest as error:
        raise BadRequest(f"{member}: {error}") from None
    # Adapters compare the text and build the trust anchor from the bytes: two names would trust one CA and ask for
    # another.
    if name.text not in {text, subject.text}:
        raise BadRequest(f"{member}: encodes {name.text!r}, another name than subject-dn")
    return name, encoded


def _parse_template(members: Members, name: str) -> IdTemplate | None:
    text = members.string(name)
    return None if text is None else IdTemplate.parse(text, members.path(name))


# Writing


def tenant_document(tenant: Tenant) -> JsonObject:
    """Return the read representation (management 4.8); it is also what is stored."""
    document: JsonObject = {"enabled": tenant.enabled}
    if tenant.alias is not None:
        document["alias"] = tenant.alias
    if tenant.ext:
        document["ext"] = tenant.ext
    if tenant.defaults:
        document["defaults"] = tenant.defaults
    if tenant.adapters is not None:
        document["adapters"] = [
            _adapter_document(adapter, adapter.ext) | adapter.members for adapter in tenant.adapters
        ]
    if tenant.minimum_message_size:
        document["minimum-message-size"] = tenant.minimum_message_size
    if tenant.resource_limits is not None:
        document["resource-limits"] = _resource_limits_document(tenant.resource_limits)
    if tenant.registration_limits is not None:
        document["registration-limits"] = {
            "max-devices": tenant.registration_limits.max_devices,
            "max-credentials-per-device": tenant.registration_limits.max_credentials_per_device,
        }
    if tenant.tracing is not None:
        document["tracing"] = _tracing_document(tenant.tracing)
    if tenant.trust_anchor_group is not None:
        document["trust-anchor-group"] = tenant.trust_anchor_group
    if tenant.trust_anchors:
        document["trusted-ca"] = [_trust_anchor_document(anchor) for anchor in tenant.trust_anchors]
    return document


def stored_tenant(document: JsonObject) -> Tenant:
    """Return the tenant that `tenant_document` described."""
    return parse_tenant(document)


def _adapter_document(adapter: Adapter, ext: JsonObject) -> JsonObject:
    document: JsonObject = {
        "type": adapter.type,
        "enabled": adapter.enabled,
        "device-authentication-required": adapter.device_authentication_required,
    }
    if ext:
        document["ext"] = ext
    return document


def _resource_limits_document(limits: ResourceLimits) -> JsonObject:
    document: JsonObject = {
        name: value
        for name, value in (
            ("max-connections", limits.max_connections),
            ("max-ttl", limits.max_ttl),
            ("max-ttl-telemetry-qos0", limits.max_ttl_telemetry_qos0),
            ("max-ttl-telemetry-qos1", limits.max_ttl_telemetry_qos1),
            ("max-ttl-command-response", limits.max_ttl_command_response),
        )
        if value != UNLIMITED
    }
    volume, duration = limits.data_volume, limits.connection_duration
    if volume is not None:
        document["data-volume"] = _usage_document(volume.effective_since, "max-bytes", volume.max_bytes, volume.period)
    if duration is not None:
        document["connection-duration"] = _usage_document(
            duration.effective_since, "max-minutes", duration.max_minutes, duration.period
        )
    if limits.ext:
        document["ext"] = limits.ext
    return document


def _usage_document(effective_since: datetime, name: str, limit: int, period: Period) -> JsonObject:
    document: JsonObject = {"effective-since": format_timestamp(effective_since)}
    if limit != UNLIMITED:
        document[name] = limit
    described: JsonObject = {"mode": period.mode.value}
    if period.no_of_days:
        described["no-of-days"] = period.no_of_days
    document["period"] = described
    return document


def _tracing_document(tracing: Tracing) -> JsonObject:
    document: JsonObject = {}
    if tracing.sampling_mode is not None:
        document["sampling-mode"] = tracing.sampling_mode.value
    if tracing.sampling_mode_per_auth_id:
        document["sampling-mode-per-auth-id"] = {
            auth_id: mode.value for auth_id, mode in tracing.sampling_mode_per_auth_id.items()
        }
    return document


def _trust_anchor_document(anchor: TrustAnchor) -> JsonObject:
    document: JsonObject = {"id": anchor.id, "subject-dn": anchor.subject.text}
    if anchor.subject_dn_bytes is not None:
        document["subject-dn-bytes"] = encode_base64(anchor.subject_dn_bytes)
    document["public-key"] = encode_base64(anchor.public_key)
    if anchor.algorithm is not None:
        document["algorithm"] = anchor.algorithm
    document["not-before"] = format_timestamp(anchor.not_before)
    document["not-after"] = format_timestamp(anchor.not_after)
    document["auto-provisioning-enabled"] = anchor.auto_provisioning_enabled
    document["auto-provision-as-gateway"] = anchor.auto_provision_as_gateway
    if anchor.device_id_template is not None:
        document["auto-provisioning-device-id-template"] = anchor.device_id_template.text
    return document | _auth_and_ocsp_members(anchor)


def _auth_and_ocsp_members(anchor: TrustAnchor) -> JsonObject:
    """Return the optional members that operators and adapters see alike."""
    document: JsonObject = {}
    if anchor.auth_id_template is not None:
        document["auth-id-template"] = anchor.auth_id_template.text
    if anchor.ocsp_revocation_enabled:
        document["ocsp-revocation-enabled"] = True
    if anchor.ocsp_responder_uri is not None:
        document["ocsp-responder-uri"] = anchor.ocsp_responder_uri
    if anchor.ocsp_responder_cert is not None:
        document["ocsp-responder-cert"] = anchor.ocsp_responder_cert
    if anchor.ocsp_nonce_enabled:
        document["ocsp-nonce-enabled"] = True
    return document


# What adapters are told


def tenant_payload(tenant_id: str, tenant: Tenant, now: datetime) -> tuple[bytes, datetime | None]:
    """Write the payload of the Tenant API (amqp-apis 9.4): JSON text, only CAs that are valid now.

    Returns:
        The payload, and the first instant at which it may differ because a CA becomes valid or expires; `None` if time
        changes nothing.
    """
    document: JsonObject = {"tenant-id": tenant_id, "enabled": tenant.enabled}
    if tenant.defaults:
        document["defaults"] = tenant.defaults
    if tenant.minimum_message_size:
        document["minimum-message-size"] = tenant.minimum_message_size
    if tenant.adapters:
        # Clients fail on members they do not know inside an adapter, so what else was given travels in its `ext`.
        document["adapters"] = [_adapter_document(one, one.members | one.ext) for one in tenant.adapters]
    if tenant.resource_limits is not None and (limits := _resource_limits_document(tenant.resource_limits)):
        document["resource-limits"] = limits
    if tenant.tracing is not None and (tracing := _tracing_document(tenant.tracing)):
        document["tracing"] = tracing
    valid = [anchor for anchor in tenant.trust_anchors if anchor.is_valid_at(now)]
    if valid:
        document["trusted-ca"] = [_trust_anchor_payload(anchor) for anchor in valid]
    if tenant.ext:
        document["ext"] = tenant.ext
    return encode(document), min(_boundaries(tenant, now), default=None)


def _boundaries(tenant: Tenant, now: datetime) -> Iterator[datetime]:
    for anchor in tenant.trust_anchors:
        if anchor.not_before > anchor.not_after:
            continue
        if now < anchor.not_before:
            yield anchor.not_before
        elif now <= anchor.not_after:
            # The last instant is still valid (provisioning 1).
            yield min(anchor.not_after, _ALMOST_NEVER) + timedelta(microseconds=1)


def _trust_anchor_payload(anchor: TrustAnchor) -> JsonObject:
    document: JsonObject = {"id": anchor.id, "subject-dn": anchor.subject.text}
    if anchor.subject_dn_bytes is not None:
        document["subject-dn-bytes"] = encode_base64(anchor.subject_dn_bytes)
    document["public-key"] = encode_base64(anchor.public_key)
    document["algorithm"] = anchor.algorithm or "RSA"
    document["auto-provisioning-enabled"] = anchor.auto_provisioning_enabled
    return document | _auth_and_ocsp_members(anchor)
