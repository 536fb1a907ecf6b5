"""Tenants: management 4 and amqp-apis 9.4; rows are those of management 13.2, vectors those of 12.1."""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.distinguished_names import CA_SPKI
from tests.unit.test_document import JSON

from kamado.document import JsonObject, decode, encode, encode_base64
from kamado.errors import BadRequest
from kamado.tenants import (
    Adapter,
    ConnectionDuration,
    DataVolume,
    Period,
    PeriodMode,
    RegistrationLimits,
    ResourceLimits,
    SamplingMode,
    Tenant,
    Tracing,
    parse_tenant,
    stored_tenant,
    tenant_document,
    tenant_payload,
)
from kamado.x509 import DistinguishedName, IdTemplate, TrustAnchor

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
SPKI = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeqP/YOvBk2Wl8VO9yMpIGIqRLSqTe6uYdEhwYundVsznOBK6x0rZcfPd1XT8ouVejj/p8CEIgkz7kzCS"
    "wYrW4w=="
)
CA_CERT = (
    "MIIBYzCCAQmgAwIBAgIBBzAKBggqhkjOPQQDAjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8GA1UEAwwIcGxhbnQt"
    "Y2EwHhcNMjQwMTAxMDAwMDAwWhcNNDQwMTAxMDAwMDAwWjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8GA1UEAwwI"
    "cGxhbnQtY2EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAR6o/9g68GTZaXxU73IykgYipEtKpN7q5h0SHBi6d1WzOc4ErrHStlx893VdPyi5V6OP+nw"
    "IQiCTPuTMJLBitbjMAoGCCqGSM49BAMCA0gAMEUCIGDjczYmqu/5jmZta50rCn3l2zKMh4YnFk71KzIRJi2bAiEA8l46uGG/bnUvf5PIzFj7CWGCTXza"
    "XS2HngaA3kaTbLU="
)
CA_DN = "CN=plant-ca,OU=Line 7,O=Example GmbH"
CA_DN_BYTES = "MDsxFTATBgNVBAoMDEV4YW1wbGUgR21iSDEPMA0GA1UECwwGTGluZSA3MREwDwYDVQQDDAhwbGFudC1jYQ=="
DESCRIBED: JsonObject = {
    "subject-dn": "cn=plant-ca, ou=Line 7, o=Other",
    "public-key": SPKI,
    "algorithm": "EC",
    "not-before": "2024-01-01T00:00:00Z",
    "not-after": "2030-01-01T00:00:00Z",
}
CERTIFIED: JsonObject = {"cert": CA_CERT}


def rewritten(document: JsonObject) -> JsonObject:
    """What `GET` shows after a `POST` of the document."""
    return tenant_document(parse_tenant(document))


def entry(anchor: JsonObject) -> dict[str, Any]:
    """What `GET` shows of a trust anchor."""
    written: Any = tenant_document(parse_tenant({"trusted-ca": [anchor]}))["trusted-ca"]
    assert len(written) == 1
    assert isinstance(written[0], dict)
    return written[0]


def without(document: Mapping[str, object], *names: str) -> JsonObject:
    return {name: value for name, value in document.items() if name not in names}


# --- Members ---


def test_an_empty_tenant_is_enabled_and_has_nothing_else() -> None:
    """Rows 16, 17."""
    assert parse_tenant({}) == Tenant()
    assert tenant_document(Tenant()) == {"enabled": True}


def test_every_member_comes_back() -> None:
    """Management 4.8."""
    document: JsonObject = {
        "enabled": False,
        "alias": "line-7",
        "ext": {"messaging-type": ["odd"], "n": 1, "none": None},
        "defaults": {"ttl": 30},
        "adapters": [
            {"type": "hono-mqtt", "enabled": True, "device-authentication-required": False, "ext": {"max-ttd": 60}},
            {"type": "hono-lora", "enabled": False, "device-authentication-required": True, "slots": 4, "x": None},
        ],
        "minimum-message-size": 4096,
        "resource-limits": {
            "max-connections": 0,
            "max-ttl": 30,
            "max-ttl-telemetry-qos0": 1,
            "max-ttl-telemetry-qos1": 2,
            "max-ttl-command-response": 3,
            "data-volume": {
                "effective-since": "2024-01-01T00:00:00Z",
                "max-bytes": 2**62,
                "period": {"mode": "days", "no-of-days": 30},
            },
            "connection-duration": {
                "effective-since": "2024-01-01T00:00:00Z",
                "max-minutes": 5,
                "period": {"mode": "unknown"},
            },
            "ext": {"a": 1.5},
        },
        "registration-limits": {"max-devices": 0, "max-credentials-per-device": 3},
        "tracing": {"sampling-mode": "none", "sampling-mode-per-auth-id": {"s1": "all", "s2": "default"}},
        "trust-anchor-group": "g",
    }
    assert rewritten(document) == document
    assert stored_tenant(document) == parse_tenant(document)


@pytest.mark.row("management-api 13.2", 32)
def test_null_is_the_same_as_left_out() -> None:
    """Management 3.6 (D23)."""
    names = tuple(rewritten_names())
    assert parse_tenant(dict.fromkeys(names)) == Tenant()
    limits = dict.fromkeys(("max-connections", "max-ttl", "data-volume", "connection-duration", "ext"))
    assert parse_tenant({"resource-limits": limits}) == Tenant(resource_limits=ResourceLimits())
    anchor = dict.fromkeys(
        (
            "id",
            "auto-provisioning-enabled",
            "auto-provision-as-gateway",
            "auto-provisioning-device-id-template",
            "auth-id-template",
            "ocsp-revocation-enabled",
            "ocsp-responder-uri",
            "ocsp-responder-cert",
            "ocsp-nonce-enabled",
            "cert",
            "subject-dn-bytes",
        )
    )
    assert without(entry(anchor | DESCRIBED), "id") == without(entry(DESCRIBED), "id")


def rewritten_names() -> list[str]:
    return [
        "enabled",
        "alias",
        "ext",
        "defaults",
        "adapters",
        "minimum-message-size",
        "resource-limits",
        "registration-limits",
        "tracing",
        "trust-anchor-group",
        "trusted-ca",
    ]


@pytest.mark.row("management-api 13.2", 19)
def test_the_tenant_id_is_dropped() -> None:
    """Management 3.6 (D41)."""
    assert parse_tenant({"tenant-id": {"any": "value"}}) == Tenant()


@pytest.mark.row("management-api 13.2", 35)
def test_what_is_empty_or_default_is_not_written() -> None:
    """Management 4.8."""
    assert rewritten({"minimum-message-size": 0, "ext": {}, "defaults": {}, "trusted-ca": []}) == {"enabled": True}
    assert rewritten({"resource-limits": {"max-ttl": -1, "ext": {}}}) == {"enabled": True, "resource-limits": {}}
    assert rewritten({"tracing": {"sampling-mode-per-auth-id": {}}}) == {"enabled": True, "tracing": {}}


def test_scalars_are_converted() -> None:
    """Row 36."""
    assert rewritten({"enabled": "false", "minimum-message-size": "10"}) == {
        "enabled": False,
        "minimum-message-size": 10,
    }


def test_adapters_have_defaults_and_keep_other_members() -> None:
    """Rows 23, 33 (D12, D37)."""
    assert rewritten({"adapters": [{"type": "hono-lora", "slots": 4, "ext": {}}]})["adapters"] == [
        {"type": "hono-lora", "enabled": False, "device-authentication-required": True, "slots": 4}
    ]


@pytest.mark.row("management-api 13.2", 37)
def test_a_missing_period_is_monthly() -> None:
    """Management 4.3 (D24)."""
    limits: JsonObject = {
        "max-ttl": 30,
        "data-volume": {"effective-since": "2024-01-01T01:00:00+01:00", "max-bytes": 5000},
        "connection-duration": {"effective-since": "2024-01-01T00:00:00.9Z", "period": None},
    }
    assert rewritten({"resource-limits": limits})["resource-limits"] == {
        "max-ttl": 30,
        "data-volume": {
            "effective-since": "2024-01-01T00:00:00Z",
            "max-bytes": 5000,
            "period": {"mode": "monthly"},
        },
        "connection-duration": {"effective-since": "2024-01-01T00:00:00Z", "period": {"mode": "monthly"}},
    }


def test_registration_limits_are_written_whole() -> None:
    """Row 38."""
    assert rewritten({"registration-limits": {"max-devices": 2}})["registration-limits"] == {
        "max-devices": 2,
        "max-credentials-per-device": -1,
    }


def test_constants_are_written_in_lower_case() -> None:
    """Row 39."""
    tracing = {"sampling-mode": "ALL", "sampling-mode-per-auth-id": {"A": "None"}}
    assert rewritten({"tracing": tracing})["tracing"] == {
        "sampling-mode": "all",
        "sampling-mode-per-auth-id": {"A": "none"},
    }


VOLUME: JsonObject = {"effective-since": "2024-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("document", "member"),
    [
        # Row 31
        ({"adapters": []}, "adapters"),
        ({"adapters": [{"type": "a"}, {"type": "a"}]}, "adapters[1].type"),
        ({"adapters": [{"enabled": True}]}, "adapters[0].type"),
        # Row 34
        ({"minimum-message-size": -1}, "minimum-message-size"),
        ({"enabled": "yes"}, "enabled"),
        ({"colour": "blue"}, "colour"),
        ({"alias": "Line_7"}, "alias"),
        ({"tracing": {"sampling-mode": "some"}}, "tracing.sampling-mode"),
        ({"resource-limits": {"max-connections": -2}}, "resource-limits.max-connections"),
        ({"resource-limits": {"data-volume": {"max-bytes": 1}}}, "resource-limits.data-volume.effective-since"),
        (
            {"resource-limits": {"connection-duration": VOLUME | {"period": {"mode": "weekly"}}}},
            "resource-limits.connection-duration.period.mode",
        ),
        # Management 4.1 to 4.4
        ({"alias": ""}, "alias"),
        ({"alias": "a" * 257}, "alias"),
        ({"ext": []}, "ext"),
        ({"defaults": 1}, "defaults"),
        ({"adapters": {}}, "adapters"),
        ({"adapters": ["hono-mqtt"]}, "adapters[0]"),
        ({"adapters": [{"type": ""}]}, "adapters[0].type"),
        ({"adapters": [{"type": "a", "ext": "x"}]}, "adapters[0].ext"),
        ({"minimum-message-size": 2**31}, "minimum-message-size"),
        ({"resource-limits": []}, "resource-limits"),
        ({"resource-limits": {"max-connections": 2**31}}, "resource-limits.max-connections"),
        ({"resource-limits": {"max-ttl": 2**63}}, "resource-limits.max-ttl"),
        ({"resource-limits": {"colour": 1}}, "resource-limits.colour"),
        ({"resource-limits": {"ext": 1}}, "resource-limits.ext"),
        ({"resource-limits": {"data-volume": VOLUME | {"max-bytes": -2}}}, "resource-limits.data-volume.max-bytes"),
        ({"resource-limits": {"data-volume": VOLUME | {"max-minutes": 1}}}, "resource-limits.data-volume.max-minutes"),
        (
            {"resource-limits": {"connection-duration": VOLUME | {"max-bytes": 1}}},
            "resource-limits.connection-duration.max-bytes",
        ),
        (
            {"resource-limits": {"connection-duration": {"effective-since": None}}},
            "resource-limits.connection-duration.effective-since",
        ),
        ({"resource-limits": {"data-volume": VOLUME | {"period": {}}}}, "resource-limits.data-volume.period.mode"),
        (
            {"resource-limits": {"data-volume": VOLUME | {"period": {"mode": "days", "no-of-days": -1}}}},
            "resource-limits.data-volume.period.no-of-days",
        ),
        (
            {"resource-limits": {"data-volume": VOLUME | {"period": {"mode": "days", "x": 1}}}},
            "resource-limits.data-volume.period.x",
        ),
        ({"registration-limits": {"max-devices": -2}}, "registration-limits.max-devices"),
        (
            {"registration-limits": {"max-credentials-per-device": "x"}},
            "registration-limits.max-credentials-per-device",
        ),
        ({"registration-limits": {"max-tenants": 1}}, "registration-limits.max-tenants"),
        ({"tracing": {"colour": 1}}, "tracing.colour"),
        ({"tracing": {"sampling-mode-per-auth-id": {"a": "some"}}}, "tracing.sampling-mode-per-auth-id.a"),
        ({"trust-anchor-group": []}, "trust-anchor-group"),
        # Rows 47, 48; management 4.5, 4.6
        ({"trusted-ca": CERTIFIED}, "trusted-ca"),
        ({"trusted-ca": [None]}, "trusted-ca[0]"),
        ({"trusted-ca": [{}]}, "trusted-ca[0].subject-dn"),
        ({"trusted-ca": [without(DESCRIBED, "subject-dn")]}, "trusted-ca[0].subject-dn"),
        ({"trusted-ca": [without(DESCRIBED, "public-key")]}, "trusted-ca[0].public-key"),
        ({"trusted-ca": [without(DESCRIBED, "algorithm")]}, "trusted-ca[0].public-key"),
        ({"trusted-ca": [without(DESCRIBED, "not-before")]}, "trusted-ca[0].not-before"),
        ({"trusted-ca": [without(DESCRIBED, "not-after")]}, "trusted-ca[0].not-after"),
        ({"trusted-ca": [DESCRIBED | {"subject-dn": "nonsense"}]}, "trusted-ca[0].subject-dn"),
        ({"trusted-ca": [DESCRIBED | {"subject-dn": ""}]}, "trusted-ca[0].subject-dn"),
        ({"trusted-ca": [DESCRIBED | {"subject-dn": None}]}, "trusted-ca[0].subject-dn"),
        ({"trusted-ca": [DESCRIBED | {"public-key": "AAAA"}]}, "trusted-ca[0].public-key"),
        ({"trusted-ca": [DESCRIBED | {"algorithm": "Rot13"}]}, "trusted-ca[0].public-key"),
        ({"trusted-ca": [DESCRIBED | {"subject-dn-bytes": "AAAA"}]}, "trusted-ca[0].subject-dn-bytes"),
        ({"trusted-ca": [DESCRIBED | {"subject-dn-bytes": CA_DN_BYTES}]}, "trusted-ca[0].subject-dn-bytes"),
        ({"trusted-ca": [DESCRIBED | {"ocsp-revocation-enabled": True}]}, "trusted-ca[0].ocsp-revocation-enabled"),
        ({"trusted-ca": [DESCRIBED | {"ocsp-responder-cert": "***"}]}, "trusted-ca[0].ocsp-responder-cert"),
        ({"trusted-ca": [DESCRIBED | {"colour": 1}]}, "trusted-ca[0].colour"),
        ({"trusted-ca": [CERTIFIED | {"colour": 1}]}, "trusted-ca[0].colour"),
        ({"trusted-ca": [{"cert": "not base64!"}]}, "trusted-ca[0].cert"),
        ({"trusted-ca": [{"cert": "AAAA"}]}, "trusted-ca[0].cert"),
        ({"trusted-ca": [{"cert": ""}]}, "trusted-ca[0].cert"),
        ({"trusted-ca": [CERTIFIED | {"auth-id-template": "dev"}]}, "trusted-ca[0].auth-id-template"),
        ({"trusted-ca": [CERTIFIED | {"auth-id-template": ""}]}, "trusted-ca[0].auth-id-template"),
        (
            {"trusted-ca": [CERTIFIED | {"auth-id-template": "{{subject-cn}}-{{serial}}"}]},
            "trusted-ca[0].auth-id-template",
        ),
        (
            {"trusted-ca": [CERTIFIED | {"auto-provisioning-device-id-template": "{{ subject-cn }}"}]},
            "trusted-ca[0].auto-provisioning-device-id-template",
        ),
        # Row 45
        ({"trusted-ca": [CERTIFIED | {"id": "a"}, CERTIFIED | {"id": "a"}]}, "trusted-ca[1].id"),
    ],
)
def test_errors_name_the_member(document: JsonObject, member: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_tenant(document)
    assert str(caught.value).startswith(f"{member}: ")


@pytest.mark.parametrize("document", [None, [], "x", 1, True])
def test_a_tenant_is_an_object(document: object) -> None:
    """Row 7."""
    with pytest.raises(BadRequest, match="must be a JSON object"):
        parse_tenant(document)


# --- Trust anchors ---


def test_a_certificate_tells_everything() -> None:
    """Row 41; the example of management 4.8."""
    written = entry(CERTIFIED)
    assert str(UUID(written.pop("id"))) != ""
    assert written == {
        "subject-dn": CA_DN,
        "subject-dn-bytes": CA_DN_BYTES,
        "public-key": SPKI,
        "algorithm": "EC",
        "not-before": "2024-01-01T00:00:00Z",
        "not-after": "2044-01-01T00:00:00Z",
        "auto-provisioning-enabled": False,
        "auto-provision-as-gateway": False,
    }


def test_what_stands_beside_a_certificate_does_not_count() -> None:
    """Management 4.5: ignored with `cert`."""
    ignored = {name: {"any": "value"} for name in (*DESCRIBED, "subject-dn-bytes")}
    assert without(entry(CERTIFIED | ignored), "id") == without(entry(CERTIFIED), "id")


def test_a_certificate_may_be_pem() -> None:
    """Management 3.13."""
    pem = f"-----BEGIN CERTIFICATE-----\n{CA_CERT}\n-----END CERTIFICATE-----\n"
    written = entry({"cert": base64.b64encode(pem.encode()).decode(), "ocsp-revocation-enabled": True})
    assert written["subject-dn"] == CA_DN
    assert written["ocsp-responder-cert"] == CA_CERT


def test_a_described_anchor_is_written_as_it_is_meant() -> None:
    """Row 46."""
    written = entry(DESCRIBED | {"id": "ca-1", "public-key": SPKI.rstrip("=")})
    assert written == {
        "id": "ca-1",
        "subject-dn": "CN=plant-ca,OU=Line 7,O=Other",
        "public-key": SPKI,
        "algorithm": "EC",
        "not-before": "2024-01-01T00:00:00Z",
        "not-after": "2030-01-01T00:00:00Z",
        "auto-provisioning-enabled": False,
        "auto-provision-as-gateway": False,
    }


def test_an_algorithm_that_was_not_given_is_not_written() -> None:
    """Management 4.5: RSA by default, on output only if given."""
    anchor = TrustAnchor(
        id="a", subject=DistinguishedName.from_text("CN=x"), public_key=CA_SPKI, not_before=NOW, not_after=NOW
    )
    document = tenant_document(Tenant(trust_anchors=(anchor,)))
    assert "algorithm" not in str(document)
    assert stored_tenant(document).trust_anchors == (anchor,)


def test_every_option_of_an_anchor_comes_back() -> None:
    """Management 4.5."""
    options: JsonObject = {
        "id": "ca-1",
        "subject-dn-bytes": CA_DN_BYTES,
        "auto-provisioning-enabled": True,
        "auto-provision-as-gateway": True,
        "auto-provisioning-device-id-template": "dev-{{subject-cn}}",
        "auth-id-template": "{{subject-cn}}@{{subject-ou}}",
        "ocsp-revocation-enabled": True,
        "ocsp-responder-uri": "no uri at all",
        "ocsp-responder-cert": "AAAA",
        "ocsp-nonce-enabled": True,
    }
    assert entry(DESCRIBED | {"subject-dn": CA_DN} | options) == DESCRIBED | {"subject-dn": CA_DN} | options


def test_an_order_or_period_in_the_past_is_accepted() -> None:
    """Management 4.5."""
    past = DESCRIBED | {"not-before": "2020-01-01T00:00:00Z", "not-after": "2019-01-01T00:00:00Z"}
    assert entry(past)["not-after"] == "2019-01-01T00:00:00Z"


def test_the_certificate_answers_for_revocation() -> None:
    """Row 49; what was given for it goes first."""
    assert entry(CERTIFIED | {"ocsp-revocation-enabled": True})["ocsp-responder-cert"] == CA_CERT
    assert (
        entry(CERTIFIED | {"ocsp-revocation-enabled": True, "ocsp-responder-cert": "AA"})["ocsp-responder-cert"]
        == "AA=="
    )
    assert "ocsp-responder-cert" not in entry(CERTIFIED)


@pytest.mark.row("management-api 13.2", 45)
def test_ids_of_anchors() -> None:
    """Management 4.5; D40: one name may occur several times."""
    given = parse_tenant({"trusted-ca": [CERTIFIED | {"id": "a"}, CERTIFIED | {"id": "b"}]})
    assert [anchor.id for anchor in given.trust_anchors] == ["a", "b"]
    made = parse_tenant({"trusted-ca": [CERTIFIED, CERTIFIED, CERTIFIED | {"id": ""}]})
    assert len({anchor.id for anchor in made.trust_anchors}) == 3
    again = parse_tenant({"trusted-ca": [CERTIFIED]})
    assert again.trust_anchors[0].id not in {anchor.id for anchor in made.trust_anchors}


def test_the_encoded_name_tells_string_types() -> None:
    """Management 4.5: `subject-dn-bytes` of another spelling is kept, and the name's text stays what was given."""
    encoded = DistinguishedName.from_der(base64.b64decode(CA_DN_BYTES))
    same = parse_tenant({"trusted-ca": [DESCRIBED | {"subject-dn": CA_DN, "subject-dn-bytes": CA_DN_BYTES}]})
    assert same.trust_anchors[0].subject.der == encoded.der
    upper = parse_tenant({"trusted-ca": [DESCRIBED | {"subject-dn": CA_DN.upper(), "subject-dn-bytes": CA_DN_BYTES}]})
    assert upper.trust_anchors[0].subject.text == CA_DN.upper()
    assert upper.trust_anchors[0].subject_dn_bytes == encoded.der
    assert stored_tenant(tenant_document(upper)) == upper


def test_a_certificate_of_a_key_that_cannot_sign_is_refused() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import x25519
    from cryptography.hazmat.primitives.serialization import Encoding
    from tests.integration.certificates import Authority

    authority = Authority.create()
    key = x25519.X25519PrivateKey.generate().public_key()
    from cryptography.hazmat.primitives import hashes

    certificate = (
        x509.CertificateBuilder()
        .subject_name(authority.certificate.subject)
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW)
        .sign(authority.key, hashes.SHA256())
    )
    with pytest.raises(BadRequest, match=r"^trusted-ca\[0\]\.cert: "):
        parse_tenant({"trusted-ca": [{"cert": encode_base64(certificate.public_bytes(Encoding.DER))}]})


# --- Properties ---

FREE = st.dictionaries(st.text(max_size=6), JSON, max_size=3)
INSTANTS = st.datetimes(
    datetime(1, 1, 1),  # noqa: DTZ001
    datetime(9999, 12, 31, 23, 59, 59),  # noqa: DTZ001
    timezones=st.just(UTC),
).map(lambda instant: instant.replace(microsecond=0))
LIMIT = st.integers(-1, 2**31 - 1)
PERIODS = st.builds(Period, mode=st.sampled_from(PeriodMode), no_of_days=st.integers(0, 400))
OWN_MEMBERS = {"type", "enabled", "device-authentication-required", "ext"}
ADAPTERS = st.builds(
    Adapter,
    type=st.text(min_size=1, max_size=6),
    enabled=st.booleans(),
    device_authentication_required=st.booleans(),
    ext=FREE,
    members=FREE.map(lambda members: without(members, *OWN_MEMBERS)),
)
TEMPLATES = st.none() | st.sampled_from(["{{subject-cn}}", "a-{{subject-dn}}"]).map(IdTemplate)
SUBJECTS = st.sampled_from(["CN=x", "CN=y+O=z,C=DE", "1.2.3=#0c0161", "DC=org,O=ä\\, b"]).map(
    DistinguishedName.from_text
)


@st.composite
def trust_anchors(draw: st.DrawFn) -> TrustAnchor:
    subject = draw(SUBJECTS)
    return TrustAnchor(
        id=draw(st.text(min_size=1, max_size=6)),
        subject=subject,
        subject_dn_bytes=draw(st.sampled_from([None, subject.der])),
        public_key=base64.b64decode(SPKI),
        algorithm="EC",
        not_before=draw(INSTANTS),
        not_after=draw(INSTANTS),
        auto_provisioning_enabled=draw(st.booleans()),
        auto_provision_as_gateway=draw(st.booleans()),
        device_id_template=draw(TEMPLATES),
        auth_id_template=draw(TEMPLATES),
        ocsp_revocation_enabled=draw(st.booleans()),
        ocsp_responder_uri=draw(st.none() | st.text(max_size=6)),
        ocsp_responder_cert="AAAA",
        ocsp_nonce_enabled=draw(st.booleans()),
    )


TENANTS = st.builds(
    Tenant,
    enabled=st.booleans(),
    alias=st.none() | st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True),
    ext=FREE,
    defaults=FREE,
    adapters=st.none() | st.lists(ADAPTERS, min_size=1, max_size=3, unique_by=lambda adapter: adapter.type).map(tuple),
    minimum_message_size=st.integers(0, 2**31 - 1),
    resource_limits=st.none()
    | st.builds(
        ResourceLimits,
        max_connections=LIMIT,
        max_ttl=LIMIT,
        max_ttl_telemetry_qos0=LIMIT,
        max_ttl_telemetry_qos1=LIMIT,
        max_ttl_command_response=LIMIT,
        data_volume=st.none() | st.builds(DataVolume, effective_since=INSTANTS, max_bytes=LIMIT, period=PERIODS),
        connection_duration=st.none()
        | st.builds(ConnectionDuration, effective_since=INSTANTS, max_minutes=LIMIT, period=PERIODS),
        ext=FREE,
    ),
    registration_limits=st.none() | st.builds(RegistrationLimits, max_devices=LIMIT, max_credentials_per_device=LIMIT),
    tracing=st.none()
    | st.builds(
        Tracing,
        sampling_mode=st.none() | st.sampled_from(SamplingMode),
        sampling_mode_per_auth_id=st.dictionaries(st.text(max_size=4), st.sampled_from(SamplingMode), max_size=2),
    ),
    trust_anchor_group=st.none() | st.text(max_size=6),
    trust_anchors=st.lists(trust_anchors(), max_size=3, unique_by=lambda anchor: anchor.id).map(tuple),
)


@given(TENANTS)
def test_what_is_written_is_read_back(tenant: Tenant) -> None:
    document = tenant_document(tenant)
    assert stored_tenant(document) == tenant
    assert parse_tenant(document) == tenant
    text = decode(encode(document))
    assert isinstance(text, dict)
    assert stored_tenant(text) == tenant


ANY_ANCHOR = st.dictionaries(
    st.sampled_from([*DESCRIBED, "cert", "id", "subject-dn-bytes", "auth-id-template", "ocsp-revocation-enabled"]),
    JSON | st.sampled_from([*DESCRIBED.values(), CA_CERT, CA_DN_BYTES]),
)


@given(
    JSON
    | st.dictionaries(
        st.sampled_from(rewritten_names()),
        JSON
        | st.lists(ANY_ANCHOR, max_size=2)
        | st.dictionaries(st.sampled_from(["max-ttl", "data-volume", "sampling-mode", "period", "mode"]), JSON),
    )
)
def test_any_value_is_a_tenant_or_a_bad_request(document: object) -> None:
    with suppress(BadRequest):
        tenant = parse_tenant(document)
        assert parse_tenant(tenant_document(tenant)) == tenant


# --- What adapters see (amqp-apis 9.4) ---


def payload(document: JsonObject, now: datetime = NOW) -> dict[str, Any]:
    text, _ = tenant_payload("acme", parse_tenant(document), now)
    made = json.loads(text)
    assert isinstance(made, dict)
    return made


def test_the_least_payload() -> None:
    assert payload({}) == {"tenant-id": "acme", "enabled": True}
    assert payload({"enabled": False, "resource-limits": {}, "tracing": {}}) == {"tenant-id": "acme", "enabled": False}


def test_the_example_of_the_chapter() -> None:
    limits: JsonObject = {
        "max-connections": 5000,
        "data-volume": {
            "effective-since": "2024-01-01T00:00:00Z",
            "max-bytes": 1073741824,
            "period": {"mode": "monthly"},
        },
    }
    common: JsonObject = {
        "enabled": True,
        "defaults": {"ttl": 3600},
        "minimum-message-size": 4,
        "adapters": [
            {"type": "hono-mqtt", "enabled": True, "device-authentication-required": True, "ext": {"max-ttd": 60}},
            {"type": "hono-http", "enabled": True, "device-authentication-required": True},
        ],
        "resource-limits": limits,
        "tracing": {"sampling-mode": "all", "sampling-mode-per-auth-id": {"s1": "none"}},
        "ext": {"messaging-type": "amqp"},
    }
    hidden: JsonObject = {"alias": "a", "trust-anchor-group": "g", "registration-limits": {"max-devices": 1}}
    anchor = CERTIFIED | {
        "id": "ca-2024",
        "auto-provisioning-enabled": True,
        "auto-provision-as-gateway": True,
        "auto-provisioning-device-id-template": "{{subject-cn}}",
    }
    assert payload(common | hidden | {"trusted-ca": [anchor]}) == common | {
        "tenant-id": "acme",
        "trusted-ca": [
            {
                "id": "ca-2024",
                "subject-dn": CA_DN,
                "subject-dn-bytes": CA_DN_BYTES,
                "public-key": SPKI,
                "algorithm": "EC",
                "auto-provisioning-enabled": True,
            }
        ],
    }


def test_other_members_of_adapters_move_into_their_ext() -> None:
    adapters: list[JsonObject] = [{"type": "a", "slots": 4, "both": 1, "ext": {"both": 2}}, {"type": "b"}]
    assert payload({"adapters": adapters})["adapters"] == [
        {
            "type": "a",
            "enabled": False,
            "device-authentication-required": True,
            "ext": {"slots": 4, "both": 2},
        },
        {"type": "b", "enabled": False, "device-authentication-required": True},
    ]


def test_limits_that_are_not_set_are_left_out() -> None:
    limits: JsonObject = {"max-connections": -1, "max-ttl": 5, "data-volume": VOLUME | {"max-bytes": -1}}
    assert payload({"resource-limits": limits})["resource-limits"] == {
        "max-ttl": 5,
        "data-volume": VOLUME | {"period": {"mode": "monthly"}},
    }


def test_the_algorithm_is_always_sent() -> None:
    anchor = TrustAnchor(
        id="a", subject=DistinguishedName.from_text("CN=x"), public_key=b"key", not_before=NOW, not_after=NOW
    )
    text, _ = tenant_payload("acme", Tenant(trust_anchors=(anchor,)), NOW)
    (sent,) = json.loads(text)["trusted-ca"]
    assert sent == {
        "id": "a",
        "subject-dn": "CN=x",
        "public-key": "a2V5",
        "algorithm": "RSA",
        "auto-provisioning-enabled": False,
    }


def test_options_of_anchors_are_sent_if_set() -> None:
    options: JsonObject = {
        "auth-id-template": "{{subject-cn}}",
        "ocsp-revocation-enabled": True,
        "ocsp-responder-uri": "http://ocsp.example",
        "ocsp-responder-cert": "AAAA",
        "ocsp-nonce-enabled": True,
    }
    (sent,) = payload({"trusted-ca": [CERTIFIED | options]})["trusted-ca"]
    assert sent.items() >= options.items()
    assert not {"not-before", "not-after", "cert", "auto-provision-as-gateway"} & set(sent)


def test_a_payload_holds_until_a_ca_begins_or_ceases_to_be_valid() -> None:
    def anchor(id_: str, not_before: str, not_after: str) -> JsonObject:
        return DESCRIBED | {"id": id_, "not-before": f"{not_before}T00:00:00Z", "not-after": f"{not_after}T00:00:00Z"}

    tenant = parse_tenant(
        {
            "trusted-ca": [
                anchor("a", "2020-01-01", "2021-01-01"),
                anchor("b", "2020-06-01", "2022-01-01"),
                anchor("never", "2023-01-01", "2022-01-01"),
            ]
        }
    )

    def at(now: datetime) -> tuple[list[str], datetime | None]:
        text, until = tenant_payload("acme", tenant, now)
        return [sent["id"] for sent in json.loads(text).get("trusted-ca", [])], until

    instant = timedelta(microseconds=1)
    starts, ends = (
        [datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 6, 1, tzinfo=UTC)],
        [datetime(2021, 1, 1, tzinfo=UTC) + instant, datetime(2022, 1, 1, tzinfo=UTC) + instant],
    )
    assert at(starts[0] - instant) == ([], starts[0])
    assert at(starts[0]) == (["a"], starts[1])
    assert at(starts[1]) == (["a", "b"], ends[0])
    assert at(ends[0] - instant) == (["a", "b"], ends[0])
    assert at(ends[0]) == (["b"], ends[1])
    assert at(ends[1]) == ([], None)


def test_a_payload_without_trust_anchors_holds_for_ever() -> None:
    assert tenant_payload("acme", Tenant(), NOW)[1] is None


def test_a_ca_may_be_valid_to_the_end_of_time() -> None:
    tenant = parse_tenant({"trusted-ca": [DESCRIBED | {"not-after": "9999-12-31T23:59:59Z"}]})
    _, until = tenant_payload("acme", tenant, NOW)
    assert until == datetime(9999, 12, 31, 23, 59, 59, 1, tzinfo=UTC)


@given(TENANTS, INSTANTS)
def test_payloads_do_not_change_before_they_say_so(tenant: Tenant, now: datetime) -> None:
    text, until = tenant_payload("acme", tenant, now)
    assert until is None or until > now
    last = datetime.max.replace(tzinfo=UTC) if until is None else until - timedelta(microseconds=1)
    assert tenant_payload("acme", tenant, last)[0] == text
    assert until is None or tenant_payload("acme", tenant, until)[0] != text
