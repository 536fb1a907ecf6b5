"""Tenants: parse, check, serialise, and what of a tenant adapters get to see.

A `Tenant` that exists keeps the rules of management 4; its trust anchors are read here and understood in `x509`.
Pure: knows neither storage nor time. What concerns several tenants (alias and subject DN held by one only) is the
database's business.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, cast

from kamado.document import (
    INT32_MAX,
    INT64_MAX,
    MAX_IDENTIFIER_LENGTH,
    JsonObject,
    Members,
    decode_base64,
    encode,
    encode_base64,
    format_timestamp,
    new_id,
    parse_timestamp,
)
from kamado.errors import BadRequest
from kamado.x509 import DistinguishedName, IdTemplate, TrustAnchor, check_public_key, parse_certificate

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
    "find_max_credentials_per_device",
    "find_max_devices",
    "parse_tenant",
    "stored_tenant",
    "tenant_document",
    "tenant_payload",
]

_ALIAS: Final = re.compile(r"[a-z0-9-]+", re.ASCII)
_DEFAULT_ALGORITHM: Final = "RSA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a tenant allows to one type of protocol adapter (management 4.2)."""

    type: str
    enabled: bool = False
    device_authentication_required: bool = True
    ext: JsonObject = field(default_factory=dict)
    members: JsonObject = field(default_factory=dict)
    """What else the operator has sent."""


class PeriodMode(StrEnum):
    """How accounting periods follow each other."""

    DAYS = "days"
    MONTHLY = "monthly"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """The accounting period of a limit."""

    mode: PeriodMode = PeriodMode.MONTHLY
    no_of_days: int = 0
    """Counts with mode `days` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataVolume:
    """How much a tenant's devices may transfer."""

    effective_since: datetime
    max_bytes: int = -1
    period: Period = Period()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionDuration:
    """How long a tenant's devices may be connected."""

    effective_since: datetime
    max_minutes: int = -1
    period: Period = Period()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits:
    """Limits that adapters enforce (management 4.3); -1 is no limit, durations are seconds."""

    max_connections: int = -1
    max_ttl: int = -1
    max_ttl_telemetry_qos0: int = -1
    max_ttl_telemetry_qos1: int = -1
    max_ttl_command_response: int = -1
    data_volume: DataVolume | None = None
    connection_duration: ConnectionDuration | None = None
    ext: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationLimits:
    """Limits that the registry enforces (management 4.3); -1 is no limit."""

    max_devices: int = -1
    max_credentials_per_device: int = -1


class SamplingMode(StrEnum):
    """What adapters trace."""

    DEFAULT = "default"
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """What adapters trace of a tenant's messages (management 4.4)."""

    sampling_mode: SamplingMode | None = None
    sampling_mode_per_auth_id: dict[str, SamplingMode] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant (management 4.1). Its id is not part of it."""

    enabled: bool = True
    alias: str | None = None
    """Another name under which adapters find it."""
    ext: JsonObject = field(default_factory=dict)
    defaults: JsonObject = field(default_factory=dict)
    adapters: tuple[Adapter, ...] | None = None
    """Never empty; `None` means that all adapters may be used."""
    minimum_message_size: int = 0
    """Bytes."""
    resource_limits: ResourceLimits | None = None
    registration_limits: RegistrationLimits | None = None
    tracing: Tracing | None = None
    trust_anchor_group: str | None = None
    """Tenants of one group may trust the same CA (management 4.7)."""
    trust_anchors: tuple[TrustAnchor, ...] = ()


# --- Reading a request ---


def find_max_devices(tenant: Tenant, common: int) -> int:
    """Return how many devices a tenant may have, -1 for any number (management 5.7).

    Args:
        tenant: Its own limit wins; 0 allows none.
        common: The registry's limit for every tenant; it is none unless it is above 0.
    """
    own = tenant.registration_limits
    return _first_limit(own.max_devices if own else -1, common)


def find_max_credentials_per_device(tenant: Tenant, common: int) -> int:
    """Return how many credentials a device may have, -1 for any number; as for `find_max_devices`."""
    own = tenant.registration_limits
    return _first_limit(own.max_credentials_per_device if own else -1, common)


def _first_limit(own: int, common: int) -> int:
    if own >= 0:
        return own
    return common if common > 0 else -1


def parse_tenant(document: object) -> Tenant:
    """Read a tenant from the JSON value of a request (management 4.1 to 4.6).

    Trust anchors without an id get one.

    Raises:
        BadRequest: A member is unknown, missing or against its rule.
    """
    members = Members(document)
    members.drop("tenant-id")
    enabled = members.boolean("enabled")
    tenant = Tenant(
        enabled=True if enabled is None else enabled,
        alias=members.checked("alias", _check_alias),
        ext=members.object("ext"),
        defaults=members.object("defaults"),
        adapters=_parse_adapters(members),
        minimum_message_size=members.integer("minimum-message-size", minimum=0, maximum=INT32_MAX) or 0,
        resource_limits=_parse_resource_limits(members.members("resource-limits")),
        registration_limits=_parse_registration_limits(members.members("registration-limits")),
        tracing=_parse_tracing(members.members("tracing")),
        trust_anchor_group=members.string("trust-anchor-group"),
        trust_anchors=_parse_trust_anchors(members),
    )
    members.finish()
    return tenant


def _check_alias(alias: str) -> str:
    if not _ALIAS.fullmatch(alias) or len(alias) > MAX_IDENTIFIER_LENGTH:
        raise BadRequest(f"must match {_ALIAS.pattern} and have at most {MAX_IDENTIFIER_LENGTH} characters")
    return alias


def _parse_adapters(members: Members) -> tuple[Adapter, ...] | None:
    elements = members.elements("adapters")
    if elements is None:
        return None
    if not elements:
        raise BadRequest("adapters: must not be empty; leave it out to let all adapters be used")
    adapters: dict[str, Adapter] = {}
    for element in elements:
        type_ = element.required_string("type")
        if type_ in adapters:
            raise BadRequest(f"{element.path('type')}: occurs twice")
        enabled = element.boolean("enabled")
        required = element.boolean("device-authentication-required")
        adapters[type_] = Adapter(
            type=type_,
            enabled=False if enabled is None else enabled,
            device_authentication_required=True if required is None else required,
            ext=element.object("ext"),
            members=element.rest(),
        )
    return tuple(adapters.values())


def _limit(members: Members, name: str, maximum: int) -> int:
    limit = members.integer(name, minimum=-1, maximum=maximum)
    return -1 if limit is None else limit


def _parse_resource_limits(members: Members | None) -> ResourceLimits | None:
    if members is None:
        return None
    limits = ResourceLimits(
        max_connections=_limit(members, "max-connections", INT32_MAX),
        max_ttl=_limit(members, "max-ttl", INT64_MAX),
        max_ttl_telemetry_qos0=_limit(members, "max-ttl-telemetry-qos0", INT64_MAX),
        max_ttl_telemetry_qos1=_limit(members, "max-ttl-telemetry-qos1", INT64_MAX),
        max_ttl_command_response=_limit(members, "max-ttl-command-response", INT64_MAX),
        data_volume=_parse_data_volume(members.members("data-volume")),
        connection_duration=_parse_connection_duration(members.members("connection-duration")),
        ext=members.object("ext"),
    )
    members.finish()
    return limits


def _parse_data_volume(members: Members | None) -> DataVolume | None:
    if members is None:
        return None
    volume = DataVolume(
        effective_since=_required_timestamp(members, "effective-since"),
        max_bytes=_limit(members, "max-bytes", INT64_MAX),
        period=_parse_period(members.members("period")),
    )
    members.finish()
    return volume


def _parse_connection_duration(members: Members | None) -> ConnectionDuration | None:
    if members is None:
        return None
    duration = ConnectionDuration(
        effective_since=_required_timestamp(members, "effective-since"),
        max_minutes=_limit(members, "max-minutes", INT64_MAX),
        period=_parse_period(members.members("period")),
    )
    members.finish()
    return duration


def _parse_period(members: Members | None) -> Period:
    if members is None:
        return Period()
    mode = members.constant("mode", PeriodMode)
    if mode is None:
        raise BadRequest(f"{members.path('mode')}: must be given")
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


def _required_timestamp(members: Members, name: str) -> datetime:
    instant = members.timestamp(name)
    if instant is None:
        raise BadRequest(f"{members.path(name)}: must be given")
    return instant


# --- Trust anchors ---


def _parse_trust_anchors(members: Members) -> tuple[TrustAnchor, ...]:
    anchors: dict[str, TrustAnchor] = {}
    for element in members.elements("trusted-ca") or ():
        anchor = _parse_trust_anchor(element)
        if anchor.id in anchors:
            raise BadRequest(f"{element.path('id')}: occurs twice")
        anchors[anchor.id] = anchor
    return tuple(anchors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Authority:
    """What an entry of `trusted-ca` says about the CA itself, in either of its two forms."""

    subject: DistinguishedName
    subject_dn_bytes: bytes | None
    public_key: bytes
    algorithm: str | None
    not_before: datetime
    not_after: datetime
    certificate: bytes | None


def _parse_trust_anchor(members: Members) -> TrustAnchor:
    """Read an entry of `trusted-ca` (management 4.5)."""
    certificate = members.base64("cert")
    authority = _described_authority(members) if certificate is None else _certified_authority(members, certificate)
    revocation_enabled = members.boolean("ocsp-revocation-enabled") or False
    responder_certificate = members.base64("ocsp-responder-cert") or None
    if revocation_enabled and responder_certificate is None:
        responder_certificate = authority.certificate
        if responder_certificate is None:
            raise BadRequest(f"{members.path('ocsp-revocation-enabled')}: needs cert or ocsp-responder-cert")
    anchor = TrustAnchor(
        id=members.string("id") or new_id(),
        subject=authority.subject,
        subject_dn_bytes=authority.subject_dn_bytes,
        public_key=authority.public_key,
        algorithm=authority.algorithm,
        not_before=authority.not_before,
        not_after=authority.not_after,
        auto_provisioning_enabled=members.boolean("auto-provisioning-enabled") or False,
        auto_provision_as_gateway=members.boolean("auto-provision-as-gateway") or False,
        device_id_template=_parse_template(members, "auto-provisioning-device-id-template"),
        auth_id_template=_parse_template(members, "auth-id-template"),
        ocsp_revocation_enabled=revocation_enabled,
        ocsp_responder_uri=members.string("ocsp-responder-uri"),
        ocsp_responder_cert=None if responder_certificate is None else encode_base64(responder_certificate),
        ocsp_nonce_enabled=members.boolean("ocsp-nonce-enabled") or False,
    )
    members.finish()
    return anchor


def _parse_template(members: Members, name: str) -> IdTemplate | None:
    text = members.string(name)
    return None if text is None else IdTemplate.parse(text, members.path(name))


def _certified_authority(members: Members, data: bytes) -> _Authority:
    """Take everything from the certificate; what is said beside it does not count."""
    members.drop("subject-dn", "subject-dn-bytes", "public-key", "algorithm", "not-before", "not-after")
    path = members.path("cert")
    try:
        certificate = parse_certificate(data)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None
    # An adapter that meets a key it cannot build drops the tenant, not just the CA.
    check_public_key(certificate.public_key, certificate.algorithm, path)
    return _Authority(
        subject=certificate.subject,
        subject_dn_bytes=certificate.subject.der,
        public_key=certificate.public_key,
        algorithm=certificate.algorithm,
        not_before=certificate.not_before.replace(microsecond=0),
        not_after=certificate.not_after.replace(microsecond=0),
        certificate=certificate.der,
    )


def _described_authority(members: Members) -> _Authority:
    subject = members.checked("subject-dn", _parse_subject)
    public_key = members.base64("public-key")
    if subject is None or public_key is None:
        missing = members.path("subject-dn" if subject is None else "public-key")
        raise BadRequest(f"{missing}: must be given, unless there is a cert")
    algorithm = members.string("algorithm")
    check_public_key(public_key, _DEFAULT_ALGORITHM if algorithm is None else algorithm, members.path("public-key"))
    encoded = members.base64("subject-dn-bytes") or None
    if encoded is not None:
        subject = _encoded_subject(subject, encoded, members.path("subject-dn-bytes"))
    return _Authority(
        subject=subject,
        subject_dn_bytes=encoded,
        public_key=public_key,
        algorithm=algorithm,
        not_before=_required_timestamp(members, "not-before"),
        not_after=_required_timestamp(members, "not-after"),
        certificate=None,
    )


def _parse_subject(text: str) -> DistinguishedName:
    if not text:
        raise BadRequest("must not be empty")
    return DistinguishedName.from_text(text)


def _encoded_subject(subject: DistinguishedName, encoded: bytes, path: str) -> DistinguishedName:
    """Check that the bytes spell the subject; they are what adapters build their trust anchor from."""
    try:
        name = DistinguishedName.from_der(encoded)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None
    if not name.equals(subject):
        raise BadRequest(f"{path}: is another name than subject-dn")
    # They tell string types, which the text does not.
    return name if name.text == subject.text else subject


# --- Writing and reading back ---


def tenant_document(tenant: Tenant) -> JsonObject:
    """Write a tenant as `GET` shows it (management 4.8). This is what is stored, too."""
    document: JsonObject = {"enabled": tenant.enabled}
    if tenant.alias is not None:
        document["alias"] = tenant.alias
    _put_unless_empty(document, "ext", tenant.ext)
    _put_unless_empty(document, "defaults", tenant.defaults)
    if tenant.adapters is not None:
        document["adapters"] = [_adapter_document(adapter) for adapter in tenant.adapters]
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
    _put_unless_empty(document, "trusted-ca", [_anchor_document(anchor) for anchor in tenant.trust_anchors])
    return document


def _put_unless_empty(document: JsonObject, name: str, value: JsonObject | Sequence[object]) -> None:
    if value:
        document[name] = value


def _adapter_document(adapter: Adapter) -> JsonObject:
    document: JsonObject = {
        "type": adapter.type,
        "enabled": adapter.enabled,
        "device-authentication-required": adapter.device_authentication_required,
    }
    _put_unless_empty(document, "ext", adapter.ext)
    return document | adapter.members


_NUMERIC_LIMITS: Final = {
    "max-connections": "max_connections",
    "max-ttl": "max_ttl",
    "max-ttl-telemetry-qos0": "max_ttl_telemetry_qos0",
    "max-ttl-telemetry-qos1": "max_ttl_telemetry_qos1",
    "max-ttl-command-response": "max_ttl_command_response",
}


def _resource_limits_document(limits: ResourceLimits) -> JsonObject:
    document: JsonObject = {}
    for name, attribute in _NUMERIC_LIMITS.items():
        limit = getattr(limits, attribute)
        if limit != -1:
            document[name] = limit
    if limits.data_volume is not None:
        document["data-volume"] = _effective_limit_document(
            limits.data_volume, "max-bytes", limits.data_volume.max_bytes
        )
    if limits.connection_duration is not None:
        document["connection-duration"] = _effective_limit_document(
            limits.connection_duration, "max-minutes", limits.connection_duration.max_minutes
        )
    _put_unless_empty(document, "ext", limits.ext)
    return document


def _effective_limit_document(limit: DataVolume | ConnectionDuration, name: str, maximum: int) -> JsonObject:
    document: JsonObject = {"effective-since": format_timestamp(limit.effective_since)}
    if maximum != -1:
        document[name] = maximum
    period: JsonObject = {"mode": limit.period.mode.value}
    if limit.period.no_of_days:
        period["no-of-days"] = limit.period.no_of_days
    document["period"] = period
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


def _anchor_document(anchor: TrustAnchor) -> JsonObject:
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
    return document | _anchor_options(anchor)


def _anchor_options(anchor: TrustAnchor) -> JsonObject:
    """What both an operator and an adapter see of an anchor, if it is set."""
    options: JsonObject = {}
    if anchor.auth_id_template is not None:
        options["auth-id-template"] = anchor.auth_id_template.text
    if anchor.ocsp_revocation_enabled:
        options["ocsp-revocation-enabled"] = True
    if anchor.ocsp_responder_uri is not None:
        options["ocsp-responder-uri"] = anchor.ocsp_responder_uri
    if anchor.ocsp_responder_cert is not None:
        options["ocsp-responder-cert"] = anchor.ocsp_responder_cert
    if anchor.ocsp_nonce_enabled:
        options["ocsp-nonce-enabled"] = True
    return options


def stored_tenant(document: JsonObject) -> Tenant:
    """Read a tenant back from `tenant_document`; checks nothing."""
    members = cast(dict[str, Any], document)
    adapters = members.get("adapters")
    registration_limits = members.get("registration-limits")
    tracing = members.get("tracing")
    return Tenant(
        enabled=members.get("enabled", True),
        alias=members.get("alias"),
        ext=members.get("ext", {}),
        defaults=members.get("defaults", {}),
        adapters=None if adapters is None else tuple(_stored_adapter(adapter) for adapter in adapters),
        minimum_message_size=members.get("minimum-message-size", 0),
        resource_limits=_stored_resource_limits(members.get("resource-limits")),
        registration_limits=None
        if registration_limits is None
        else RegistrationLimits(
            max_devices=registration_limits["max-devices"],
            max_credentials_per_device=registration_limits["max-credentials-per-device"],
        ),
        tracing=None if tracing is None else _stored_tracing(tracing),
        trust_anchor_group=members.get("trust-anchor-group"),
        trust_anchors=tuple(_stored_anchor(anchor) for anchor in members.get("trusted-ca", ())),
    )


def _stored_adapter(document: dict[str, Any]) -> Adapter:
    own = {"type", "enabled", "device-authentication-required", "ext"}
    return Adapter(
        type=document["type"],
        enabled=document["enabled"],
        device_authentication_required=document["device-authentication-required"],
        ext=document.get("ext", {}),
        members={name: value for name, value in document.items() if name not in own},
    )


def _stored_resource_limits(document: dict[str, Any] | None) -> ResourceLimits | None:
    if document is None:
        return None
    volume, duration = document.get("data-volume"), document.get("connection-duration")
    return ResourceLimits(
        **{attribute: document.get(name, -1) for name, attribute in _NUMERIC_LIMITS.items()},
        data_volume=None
        if volume is None
        else DataVolume(
            effective_since=_stored_instant(volume, "effective-since"),
            max_bytes=volume.get("max-bytes", -1),
            period=_stored_period(volume["period"]),
        ),
        connection_duration=None
        if duration is None
        else ConnectionDuration(
            effective_since=_stored_instant(duration, "effective-since"),
            max_minutes=duration.get("max-minutes", -1),
            period=_stored_period(duration["period"]),
        ),
        ext=document.get("ext", {}),
    )


def _stored_period(document: dict[str, Any]) -> Period:
    return Period(mode=PeriodMode(document["mode"]), no_of_days=document.get("no-of-days", 0))


def _stored_tracing(document: dict[str, Any]) -> Tracing:
    mode = document.get("sampling-mode")
    return Tracing(
        sampling_mode=None if mode is None else SamplingMode(mode),
        sampling_mode_per_auth_id={
            auth_id: SamplingMode(one) for auth_id, one in document.get("sampling-mode-per-auth-id", {}).items()
        },
    )


def _stored_anchor(document: dict[str, Any]) -> TrustAnchor:
    encoded = document.get("subject-dn-bytes")
    subject_dn_bytes = None if encoded is None else decode_base64(encoded, "subject-dn-bytes")
    return TrustAnchor(
        id=document["id"],
        subject=_stored_subject(document["subject-dn"], subject_dn_bytes),
        subject_dn_bytes=subject_dn_bytes,
        public_key=decode_base64(document["public-key"], "public-key"),
        algorithm=document.get("algorithm"),
        not_before=_stored_instant(document, "not-before"),
        not_after=_stored_instant(document, "not-after"),
        auto_provisioning_enabled=document["auto-provisioning-enabled"],
        auto_provision_as_gateway=document["auto-provision-as-gateway"],
        device_id_template=_stored_template(document.get("auto-provisioning-device-id-template")),
        auth_id_template=_stored_template(document.get("auth-id-template")),
        ocsp_revocation_enabled=document.get("ocsp-revocation-enabled", False),
        ocsp_responder_uri=document.get("ocsp-responder-uri"),
        ocsp_responder_cert=document.get("ocsp-responder-cert"),
        ocsp_nonce_enabled=document.get("ocsp-nonce-enabled", False),
    )


def _stored_subject(text: str, encoded: bytes | None) -> DistinguishedName:
    if encoded is not None:
        name = DistinguishedName.from_der(encoded)
        if name.text == text:
            return name
    return DistinguishedName.from_text(text)


def _stored_template(text: str | None) -> IdTemplate | None:
    return None if text is None else IdTemplate(text)


def _stored_instant(document: dict[str, Any], name: str) -> datetime:
    return parse_timestamp(document[name], name)


# --- What adapters see ---


def tenant_payload(tenant_id: str, tenant: Tenant, now: datetime) -> tuple[bytes, datetime | None]:
    """Write a tenant as protocol adapters get it (amqp-apis 9.4).

    Returns:
        The JSON text, and the first instant at which it is no longer true because a CA begins or ceases to be valid;
        `None` if that never happens.
    """
    document: JsonObject = {"tenant-id": tenant_id, "enabled": tenant.enabled}
    _put_unless_empty(document, "defaults", tenant.defaults)
    if tenant.minimum_message_size:
        document["minimum-message-size"] = tenant.minimum_message_size
    if tenant.adapters is not None:
        document["adapters"] = [_adapter_payload(adapter) for adapter in tenant.adapters]
    if tenant.resource_limits is not None:
        _put_unless_empty(document, "resource-limits", _resource_limits_document(tenant.resource_limits))
    if tenant.tracing is not None:
        _put_unless_empty(document, "tracing", _tracing_document(tenant.tracing))
    anchors = [_anchor_payload(anchor) for anchor in tenant.trust_anchors if anchor.is_valid_at(now)]
    _put_unless_empty(document, "trusted-ca", anchors)
    _put_unless_empty(document, "ext", tenant.ext)
    return encode(document), _next_change(tenant.trust_anchors, now)


def _adapter_payload(adapter: Adapter) -> JsonObject:
    # Adapters fail on members they do not know, but for those of `ext`.
    return _adapter_document(replace(adapter, ext=adapter.members | adapter.ext, members={}))


def _anchor_payload(anchor: TrustAnchor) -> JsonObject:
    document: JsonObject = {"id": anchor.id, "subject-dn": anchor.subject.text}
    if anchor.subject_dn_bytes is not None:
        document["subject-dn-bytes"] = encode_base64(anchor.subject_dn_bytes)
    document["public-key"] = encode_base64(anchor.public_key)
    document["algorithm"] = _DEFAULT_ALGORITHM if anchor.algorithm is None else anchor.algorithm
    document["auto-provisioning-enabled"] = anchor.auto_provisioning_enabled
    return document | _anchor_options(anchor)


def _next_change(anchors: Sequence[TrustAnchor], now: datetime) -> datetime | None:
    changes: list[datetime] = []
    for anchor in anchors:
        if now < anchor.not_before:
            # One that ends before it begins never counts.
            if anchor.not_before <= anchor.not_after:
                changes.append(anchor.not_before)
        elif now <= anchor.not_after:
            # The last second belongs to the period: what follows it is the first instant without the CA.
            changes.append(anchor.not_after + timedelta(microseconds=1))
    return min(changes, default=None)
