"""Credentials: management 6; rows are those of management 13.4, vectors those of 12.1."""

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.integration.certificates import Authority
from tests.unit.test_document import JSON
from tests.unit.test_tenants import CA_CERT, SPKI

from kamado.credentials import (
    Credential,
    CredentialRules,
    CredentialUpdate,
    CustomSecret,
    PasswordSecret,
    PlainPassword,
    PlainPasswordSecret,
    PskSecret,
    RpkSecret,
    Secret,
    SecretReference,
    SecretUpdate,
    X509Secret,
    credential_document,
    merge,
    parse_credential,
    parse_credentials,
    plain_passwords,
    stored_credential,
    stored_document,
    with_hashes,
    without_references,
)
from kamado.document import Identifiers, JsonObject, decode, encode, encode_base64
from kamado.errors import BadRequest, Reason
from kamado.tenants import parse_tenant
from kamado.x509 import TrustAnchor

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RULES = CredentialRules(identifiers=Identifiers())
DEV_SPKI = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEBwrgvCZ+MZsO90qvdu/CJQDf87kpMW8fNQaewsUoF6JczOfHkzy8lPoac6Zb9shk8qu2NvduPRiu+ORQ"
    "9vxBAg=="
)
DEV_CERT = (
    "MIIBYDCCAQigAwIBAgIBCDAKBggqhkjOPQQDAjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8GA1UEAwwIcGxhbnQt"
    "Y2EwHhcNMjQwNjAxMDAwMDAwWhcNMzQwNjAxMDAwMDAwWjA6MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzEQMA4GA1UEAwwH"
    "cHVtcC0xNzBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABAcK4LwmfjGbDvdKr3bvwiUA3/O5KTFvHzUGnsLFKBeiXMznx5M8vJT6GnOmW/bIZPKrtjb3"
    "bj0YrvjkUPb8QQIwCgYIKoZIzj0EAwIDRgAwQwIgd4yimDc+369js8cKg3FUblp4WK1yXNkhkBAprvr81tACH3hdf6pHZaViCY6vxu4hkGfjdleKsbnq"
    "3KOSRggACoQ="
)
DEV_DN = "CN=pump-17,OU=Line 7,O=Example GmbH"
SHA_256 = "+YXIZlZWeHJtZf8mXlWWHpumuJiKF1jn9shbUSMQmZQ="
BCRYPT_10 = "$2a$10$abcdefghijklmnopqrstuuuK3UBi2GuyTLlnf1JZO4mwdsdVG7At2"
KEY = "dGVhLXBvdC00Mg=="


def parse(
    *credentials: object, rules: CredentialRules = RULES, anchors: Sequence[TrustAnchor] = ()
) -> tuple[CredentialUpdate, ...]:
    return parse_credentials(list(credentials), rules=rules, trust_anchors=anchors, now=NOW)


def hashed(updates: Sequence[CredentialUpdate]) -> tuple[CredentialUpdate, ...]:
    """As if each password had been hashed."""
    return with_hashes(updates, {plain: f"hash of {plain.text}" for plain in plain_passwords(updates)})


def put(existing: Sequence[Credential], *credentials: object) -> tuple[Credential, ...]:
    """What is stored after a `PUT`."""
    return merge(existing, hashed(parse(*credentials)))


def get(credentials: Sequence[Credential], *, reveal_psk: bool = True) -> list[JsonObject]:
    return [credential_document(credential, reveal_psk=reveal_psk) for credential in credentials]


def password(*secrets: Mapping[str, object], auth_id: str = "s1", **members: object) -> JsonObject:
    return {"type": "hashed-password", "auth-id": auth_id, "secrets": list(secrets), **members}


def of_type(type_: str, *secrets: Mapping[str, object], **members: object) -> JsonObject:
    return {"type": type_, "auth-id": "s1", "secrets": list(secrets), **members}


def ids(credentials: Sequence[Credential]) -> list[str]:
    return [secret.id for credential in credentials for secret in credential.secrets]


# --- The request as a whole ---


@pytest.mark.row("management-api 13.4", 73)
def test_a_single_object_counts_as_an_array() -> None:
    """Management 3.5 (D9)."""
    (update,) = parse_credentials(
        password({"pwd-plain": "x"}) | {"device-id": "d1"}, rules=RULES, trust_anchors=(), now=NOW
    )
    assert (update.type, update.auth_id) == ("hashed-password", "s1")
    assert parse() == ()


@pytest.mark.parametrize("document", [None, "x", 1, True])
def test_the_body_is_an_array(document: object) -> None:
    with pytest.raises(BadRequest, match="must be a JSON array"):
        parse_credentials(document, rules=RULES, trust_anchors=(), now=NOW)


@pytest.mark.parametrize(
    ("credential", "member"),
    [
        # Row 108
        (1, ""),
        (None, ""),
        ([], ""),
        (of_type("My Token", {"a": 1}), ".type"),
        (password({"pwd-plain": "x"}, issuer="me"), ".issuer"),
        # Row 76
        (password(), ".secrets"),
        ({"type": "hashed-password", "auth-id": "s1"}, ".secrets"),
        ({"type": "hashed-password", "auth-id": "s1", "secrets": None}, ".secrets"),
        ({"auth-id": "s1", "secrets": [{"pwd-plain": "x"}]}, ".type"),
        ({"type": "hashed-password", "secrets": [{"pwd-plain": "x"}]}, ".auth-id"),
        (password({"pwd-plain": "x"}, auth_id="s 1"), ".auth-id"),
        # Management 6.2
        (of_type("", {"key": KEY}), ".type"),
        (of_type("x" * 257, {"key": KEY}), ".type"),
        (of_type("psk", {"key": KEY}) | {"auth-id": ""}, ".auth-id"),
        (of_type("psk", {"key": KEY}) | {"auth-id": "a" * 257}, ".auth-id"),
        (of_type("x509-cert", {}) | {"auth-id": "a" * 1025}, ".auth-id"),
        (of_type("psk", {"key": KEY}, ext=[]), ".ext"),
        (of_type("psk", {"key": KEY}, enabled="yes"), ".enabled"),
        (of_type("psk", {"key": KEY}, comment={}), ".comment"),
        (of_type("psk", {"key": KEY}, cert=DEV_CERT), ".cert"),
        (of_type("psk", 1), ".secrets[0]"),  # type: ignore[arg-type]
        (of_type("psk") | {"secrets": {"key": KEY}}, ".secrets"),
        (of_type("psk", {"key": KEY}, {"key": KEY, "id": []}), ".secrets[1].id"),
        (of_type("psk", {"key": KEY, "enabled": 1.0}), ".secrets[0].enabled"),
        (of_type("psk", {"key": KEY, "comment": []}), ".secrets[0].comment"),
        (of_type("psk", {"key": KEY, "colour": "blue"}), ".secrets[0].colour"),
        (of_type("psk", {"key": KEY, "id": "a"}, {"id": "a"}), ".secrets[1].id"),
        # Rows 84, 86
        (
            password({"pwd-plain": "x", "not-before": "2025-01-02T00:00:00Z", "not-after": "2025-01-01T00:00:00Z"}),
            ".secrets[0].not-before",
        ),
        (
            password({"pwd-plain": "x", "not-before": "2025-01-01T00:00:00.2Z", "not-after": "2025-01-01T00:00:00.1Z"}),
            ".secrets[0].not-before",
        ),
        (password({"pwd-plain": "x", "not-after": "31.03.2028"}), ".secrets[0].not-after"),
        # Rows 78, 81; management 6.3
        (password({}), ".secrets[0].pwd-plain"),
        (password({"pwd-plain": ""}), ".secrets[0].pwd-plain"),
        (password({"salt": "ChssPQ=="}), ".secrets[0].pwd-plain"),
        (password({"pwd-hash": SHA_256, "salt": "ChssPQ=="}), ".secrets[0].hash-function"),
        (password({"id": "A", "pwd-hash": SHA_256}), ".secrets[0].hash-function"),
        (password({"hash-function": "sha-256"}), ".secrets[0].pwd-hash"),
        (password({"hash-function": "sha-256", "pwd-hash": ""}), ".secrets[0].pwd-hash"),
        (password({"pwd-plain": "ä" * 36 + "x"}), ".secrets[0].pwd-plain"),
        (password({"pwd-plain": []}), ".secrets[0].pwd-plain"),
        (password({"pwd-plain": "x", "key": KEY}), ".secrets[0].key"),
        *(
            (password({"hash-function": "bcrypt", "pwd-hash": hash_}), ".secrets[0].pwd-hash")
            for hash_ in (
                BCRYPT_10.replace("$2a$", "$2b$"),
                BCRYPT_10.replace("$2a$", "$2y$"),
                BCRYPT_10.replace("$2a$", "$2x$"),
                BCRYPT_10.replace("$2a$", "$2$"),
                BCRYPT_10.replace("$10$", "$13$"),
                BCRYPT_10.replace("$10$", "$03$"),
                BCRYPT_10.replace("$10$", "$1$"),
                BCRYPT_10 + "\n",
                BCRYPT_10[:-1],
                BCRYPT_10[:-1] + "=",
                "tea-pot-42",
            )
        ),
        # Row 97
        (of_type("psk", {}), ".secrets[0].key"),
        (of_type("psk", {"key": ""}), ".secrets[0].key"),
        (of_type("psk", {"key": "***"}), ".secrets[0].key"),
        # Rows 100, 103
        (of_type("x509-cert", {}, {}), ".secrets"),
        (of_type("x509-cert"), ".secrets"),
        (of_type("x509-cert", {"key": KEY}), ".secrets[0].key"),
        ({"type": "x509-cert", "cert": "AAAA"}, ".cert"),
        ({"type": "x509-cert", "cert": ""}, ".cert"),
        ({"type": "x509-cert", "cert": "***"}, ".cert"),
        ({"type": "x509-cert", "cert": DEV_CERT, "issuer": "me"}, ".issuer"),
        # Row 105; management 6.6
        (of_type("rpk", {"key": DEV_SPKI}), ".secrets[0].key"),
        (of_type("rpk", {"key": "AAAA", "algorithm": "EC"}), ".secrets[0].key"),
        (of_type("rpk", {"key": DEV_SPKI, "algorithm": "DSA"}), ".secrets[0].algorithm"),
        (of_type("rpk", {"algorithm": "EC"}), ".secrets[0].key"),
        (of_type("rpk", {"cert": "AAAA"}), ".secrets[0].cert"),
    ],
)
def test_errors_name_the_member(credential: object, member: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(of_type("psk", {"key": KEY}) | {"auth-id": "other"}, credential)
    assert str(caught.value).startswith(f"credentials[1]{member}: ")


def test_a_type_and_auth_id_occur_once() -> None:
    """Row 93; management 6.8: the resulting auth-id counts."""
    with pytest.raises(BadRequest, match=r"^credentials\[1\]\.auth-id: "):
        parse(password({"pwd-plain": "x"}), password({"pwd-plain": "y"}))
    with pytest.raises(BadRequest, match=r"^credentials\[1\]\.auth-id: "):
        parse(
            {"type": "x509-cert", "cert": DEV_CERT},
            of_type("x509-cert", {}) | {"auth-id": "cn=pump-17, ou=Line 7,o=Example GmbH"},
        )
    assert len(parse(password({"pwd-plain": "x"}), of_type("psk", {"key": KEY}))) == 2


def test_what_is_named_by_path_only_is_read_alone() -> None:
    with pytest.raises(BadRequest, match=r"^secrets\[0\]\.key: "):
        parse_credential(of_type("psk", {}), "", rules=RULES, trust_anchors=(), now=NOW)


def test_members_of_the_object_come_back() -> None:
    """Management 6.2, 6.10 (D5)."""
    stored = put((), of_type("psk", {"key": KEY}, enabled="false", comment="c", ext={"client-id": None}))
    (shown,) = get(stored)
    assert {name: shown[name] for name in shown if name != "secrets"} == {
        "type": "psk",
        "auth-id": "s1",
        "enabled": False,
        "comment": "c",
        "ext": {"client-id": None},
    }
    (shown,) = get(put((), of_type("psk", {"key": KEY}, enabled=None, comment=None, ext={}, **{"device-id": 5})))
    assert list(shown) == ["type", "auth-id", "enabled", "secrets"]
    assert shown["enabled"] is True


@pytest.mark.row("management-api 13.4", 85)
def test_members_of_secrets_come_back_if_they_were_given() -> None:
    """Management 6.10."""
    given: JsonObject = {
        "enabled": 0,
        "not-before": "2025-01-01T01:00:00+01:00",
        "not-after": "2028-04-01T00:00:00.5+02:00",
    }
    stored = put((), of_type("psk", {"key": KEY, "comment": "c"} | given, {"key": KEY}))
    (shown,) = get(stored)
    first, second = stored[0].secrets
    assert shown["secrets"] == [
        {
            "id": first.id,
            "enabled": False,
            "not-before": "2025-01-01T00:00:00Z",
            "not-after": "2028-03-31T22:00:00Z",
            "comment": "c",
            "key": KEY,
        },
        {"id": second.id, "key": KEY},
    ]
    assert str(UUID(first.id)) == first.id


def test_equal_ends_of_a_period_are_fine() -> None:
    """Management 6.2."""
    same: JsonObject = {"not-before": "2025-01-01T00:00:00Z", "not-after": "2025-01-01T01:00:00+01:00"}
    assert parse(password({"pwd-plain": "x"} | same))


# --- hashed-password ---


def test_a_plain_password_waits_for_its_hash() -> None:
    """Rows 71, 72, 83: whatever else is given about a hash does not count."""
    updates = parse(password({"pwd-plain": "tea-pot-42", "pwd-hash": ["y"], "hash-function": {}, "salt": 5}))
    (plain,) = plain_passwords(updates)
    assert plain.text == "tea-pot-42"
    assert "tea-pot-42" not in repr(updates)
    stored = merge((), with_hashes(updates, {plain: BCRYPT_10}))
    (secret,) = stored[0].secrets
    assert secret == PasswordSecret(id=secret.id, hash_function="bcrypt", pwd_hash=BCRYPT_10)
    assert get(stored) == [
        {"type": "hashed-password", "auth-id": "s1", "enabled": True, "secrets": [{"id": secret.id}]}
    ]
    assert BCRYPT_10 not in repr(stored)


def test_a_password_that_is_not_hashed_cannot_be_stored() -> None:
    with pytest.raises(AssertionError):
        merge((), parse(password({"pwd-plain": "x"})))


def test_equal_passwords_are_hashed_apart() -> None:
    updates = parse(password({"pwd-plain": "x"}, {"pwd-plain": "x"}))
    first, second = plain_passwords(updates)
    assert first != second
    stored = merge((), with_hashes(updates, {first: "1", second: "2"}))
    assert [secret.pwd_hash for secret in stored[0].secrets if isinstance(secret, PasswordSecret)] == ["1", "2"]


def test_a_password_has_at_most_72_bytes() -> None:
    """Management 6.3 (D27)."""
    (plain,) = plain_passwords(parse(password({"pwd-plain": "ä" * 36})))
    assert len(plain.text.encode()) == 72


def test_a_hash_is_kept_as_it_was_given() -> None:
    """Rows 79, 80; management 3.13: not decoded."""
    given: JsonObject = {"hash-function": "sha-256", "pwd-hash": SHA_256, "salt": "ChssPQ=="}
    stored = put((), password(given, {"hash-function": "scrypt", "pwd-hash": "no Base64", "salt": ""}))
    first, second = stored[0].secrets
    assert stored_document(stored[0])["secrets"] == [
        {"id": first.id} | given,
        {"id": second.id, "hash-function": "scrypt", "pwd-hash": "no Base64"},
    ]
    assert get(stored)[0]["secrets"] == [{"id": first.id}, {"id": second.id}]
    for text in (SHA_256, "ChssPQ=="):
        assert text not in repr(stored)


def test_bcrypt_has_its_salt_in_the_hash() -> None:
    """Row 80; amqp-apis 11.4: no `salt`."""
    stored = put((), password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_10, "salt": "ChssPQ=="}))
    (secret,) = stored[0].secrets
    assert secret == PasswordSecret(id=secret.id, hash_function="bcrypt", pwd_hash=BCRYPT_10)


@pytest.mark.parametrize(
    ("cost", "maximum", "is_good"), [("04", 4, True), ("10", 9, False), ("12", 12, True), ("31", 31, True)]
)
def test_the_cost_of_bcrypt_has_a_limit(cost: str, maximum: int, is_good: bool) -> None:
    """Row 81; the default maximum of hashes that are sent is settled as 12."""
    document = password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_10.replace("$10$", f"${cost}$")})
    rules = replace(RULES, bcrypt_max_cost=maximum)
    if is_good:
        assert parse(document, rules=rules)
    else:
        with pytest.raises(BadRequest, match="cost from 4 to 9"):
            parse(document, rules=rules)
    assert RULES.bcrypt_max_cost == 12


def test_the_allow_list_is_for_hashes_that_are_sent() -> None:
    """Row 82 (D28); case-sensitive."""
    rules = replace(RULES, allowed_hash_functions=frozenset({"bcrypt"}))
    for function in ("sha-512", "Bcrypt"):
        with pytest.raises(BadRequest, match=r"hash-function: must be one of bcrypt"):
            parse(password({"hash-function": function, "pwd-hash": BCRYPT_10}), rules=rules)
    assert parse(password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_10}), rules=rules)
    assert parse(password({"pwd-plain": "x", "hash-function": "sha-512"}), rules=rules)


def test_an_empty_text_counts_as_left_out() -> None:
    """Management 6.3: no (or empty) pwd-plain."""
    (update,) = parse(password({"pwd-plain": "", "hash-function": "sha-256", "pwd-hash": SHA_256}))
    assert isinstance(update.secrets[0].secret, PasswordSecret)
    empty: JsonObject = {"pwd-plain": "", "hash-function": "", "pwd-hash": "", "salt": "x"}
    (update,) = parse(password({"id": "A"} | empty))
    assert update.secrets[0].secret == SecretReference(id="A")
    (update,) = parse(password({"id": "", "pwd-plain": "x"}))
    assert not update.secrets[0].has_given_id


def test_patterns_of_auth_ids_can_be_widened() -> None:
    """Management 3.2."""
    import re

    rules = CredentialRules(identifiers=Identifiers(auth_id_pattern=re.compile(".+")))
    assert parse(password({"pwd-plain": "x"}, auth_id="s 1"), rules=rules)


# --- psk ---


def test_keys_are_hidden_on_request() -> None:
    """Rows 77, 96 (D7)."""
    stored = put((), of_type("psk", {"key": KEY.rstrip("=")}) | {"auth-id": "s 1"})
    (identifier,) = ids(stored)
    assert get(stored)[0]["secrets"] == [{"id": identifier, "key": KEY}]
    assert get(stored, reveal_psk=False)[0]["secrets"] == [{"id": identifier}]
    assert "tea-pot-42" not in repr(stored)


# --- x509-cert ---


def test_a_subject_is_stored_in_its_one_form() -> None:
    """Row 99; what is no DN stays as it is."""
    stored = put((), of_type("x509-cert", {}) | {"auth-id": "cn=pump-17, ou=Line 7, o=Example GmbH"})
    assert stored[0].auth_id == DEV_DN
    assert get(stored)[0]["secrets"] == [{"id": ids(stored)[0]}]
    assert put((), of_type("x509-cert", {}) | {"auth-id": "pump-17@Line 7"})[0].auth_id == "pump-17@Line 7"


def test_a_certificate_tells_auth_id_and_validity() -> None:
    """Row 101: auth-id and secrets beside it do not count."""
    stored = put(
        (), {"type": "x509-cert", "cert": DEV_CERT, "auth-id": 5, "secrets": "x", "enabled": False, "comment": "c"}
    )
    assert get(stored) == [
        {
            "type": "x509-cert",
            "auth-id": DEV_DN,
            "enabled": False,
            "comment": "c",
            "secrets": [
                {"id": ids(stored)[0], "not-before": "2024-06-01T00:00:00Z", "not-after": "2034-06-01T00:00:00Z"}
            ],
        }
    ]


def anchors_with(*anchors: JsonObject) -> tuple[TrustAnchor, ...]:
    return parse_tenant({"trusted-ca": list(anchors)}).trust_anchors


def test_the_template_of_the_issuer_makes_the_auth_id() -> None:
    """Row 102 (D25): in the certificate form only, by a CA that is valid now and has a template."""
    template: JsonObject = {"cert": CA_CERT, "auth-id-template": "{{subject-cn}}@{{subject-ou}}"}
    certified: JsonObject = {"type": "x509-cert", "cert": DEV_CERT}
    named = of_type("x509-cert", {}) | {"auth-id": DEV_DN}
    assert parse(certified, anchors=anchors_with(template))[0].auth_id == "pump-17@Line 7"
    assert parse(certified, anchors=anchors_with({"cert": CA_CERT}, template))[0].auth_id == "pump-17@Line 7"
    assert parse(certified, anchors=anchors_with({"cert": CA_CERT}))[0].auth_id == DEV_DN
    assert parse(named, anchors=anchors_with(template))[0].auth_id == DEV_DN
    described: JsonObject = {
        "subject-dn": "CN=plant-ca,OU=Line 7,O=Example GmbH",
        "public-key": SPKI,
        "algorithm": "EC",
        "not-before": "2020-01-01T00:00:00Z",
        "auth-id-template": "{{subject-cn}}",
    }
    for other in (
        {"not-after": "2021-01-01T00:00:00Z"},
        {"not-after": "2040-01-01T00:00:00Z", "subject-dn": "CN=other"},
    ):
        assert parse(certified, anchors=anchors_with(described | other))[0].auth_id == DEV_DN


def test_a_template_that_cannot_be_filled() -> None:
    """Management 4.6."""
    authority = Authority.create("CN=ca")
    issued = authority.issue("CN=no unit")
    anchors = anchors_with({"cert": authority.base64, "auth-id-template": "{{subject-ou}}"})
    with pytest.raises(BadRequest, match=r"^credentials\[0\]\.cert: ") as caught:
        parse(
            {"type": "x509-cert", "cert": issued.base64},
            anchors=[replace(anchors[0], not_before=datetime.min.replace(tzinfo=UTC))],
        )
    assert caught.value.reason is Reason.TEMPLATE_NOT_FILLED


def test_a_certificate_without_subject_names_nobody() -> None:
    from cryptography.x509 import Name

    issued = Authority.create("CN=ca").issue(Name([]))
    with pytest.raises(BadRequest, match=r"^credentials\[0\]\.cert: the certificate has no subject"):
        parse({"type": "x509-cert", "cert": issued.base64})


# --- rpk ---


def test_a_raw_public_key_comes_back() -> None:
    """Row 104."""
    stored = put((), of_type("rpk", {"key": DEV_SPKI, "algorithm": "EC"}))
    assert get(stored, reveal_psk=False)[0]["secrets"] == [{"id": ids(stored)[0], "key": DEV_SPKI, "algorithm": "EC"}]


def test_a_raw_public_key_is_rsa_by_default() -> None:
    """Management 6.6 (D26)."""
    key = encode_base64(Authority.create(algorithm="RSA").public_key)
    stored = put((), of_type("rpk", {"key": key}))
    assert get(stored)[0]["secrets"] == [{"id": ids(stored)[0], "key": key, "algorithm": "RSA"}]


def test_a_certificate_tells_the_raw_public_key() -> None:
    """Row 106: it overrides what else is in the secret."""
    other: JsonObject = {"key": 5, "algorithm": {}, "not-before": "2001-01-01T00:00:00Z", "comment": "c"}
    stored = put((), of_type("rpk", {"cert": DEV_CERT} | other))
    assert get(stored)[0]["secrets"] == [
        {
            "id": ids(stored)[0],
            "not-before": "2024-06-01T00:00:00Z",
            "not-after": "2034-06-01T00:00:00Z",
            "comment": "c",
            "key": DEV_SPKI,
            "algorithm": "EC",
        }
    ]


def test_a_certificate_of_another_algorithm_gives_no_raw_public_key() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = Authority.create()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(authority.certificate.subject)
        .issuer_name(authority.certificate.subject)
        .public_key(ed25519.Ed25519PrivateKey.generate().public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW)
        .sign(authority.key, hashes.SHA256())
    )
    with pytest.raises(BadRequest, match=r"secrets\[0\]\.cert: must have an RSA or EC key"):
        parse(of_type("rpk", {"cert": encode_base64(certificate.public_bytes(Encoding.DER))}))


# --- Custom types ---


def test_custom_types_keep_their_members() -> None:
    """Row 107 (D35); `null` in free-form places is kept."""
    given: JsonObject = {"type": "my-token", "auth-id": "t1", "issuer": "me", "cert": None, "tenant-id": 1}
    secret: JsonObject = {"token": "abc", "n": [1, 1.5, None], "pwd-plain": None}
    stored = put((), given | {"secrets": [secret, {}], "device-id": "d"})
    first, second = ids(stored)
    (shown,) = get(stored, reveal_psk=False)
    assert shown == given | {"enabled": True, "secrets": [{"id": first} | secret, {"id": second}]}
    assert stored_document(stored[0]) == shown
    assert "abc" not in repr(stored)


# --- Update (management 6.9) ---

A_HASH, B_HASH = "hash of a", "hash of b"


@pytest.fixture
def stored() -> tuple[Credential, ...]:
    """One object with the secrets A and B, which both have a validity and a comment."""
    return (
        Credential(
            type="hashed-password",
            auth_id="s1",
            comment="before",
            ext={"before": True},
            secrets=(
                PasswordSecret(id="A", hash_function="bcrypt", pwd_hash=A_HASH, not_after=NOW, comment="a"),
                PasswordSecret(id="B", hash_function="sha-256", pwd_hash=B_HASH, salt="c2FsdA==", enabled=False),
            ),
        ),
    )


def secrets_of(credentials: Sequence[Credential]) -> list[JsonObject]:
    (document,) = [stored_document(credential)["secrets"] for credential in credentials]
    assert isinstance(document, list)
    return document


KEPT_A: JsonObject = {"id": "A", "hash-function": "bcrypt", "pwd-hash": A_HASH}
KEPT_B: JsonObject = {"id": "B", "hash-function": "sha-256", "pwd-hash": B_HASH, "salt": "c2FsdA=="}
NEW: JsonObject = {"hash-function": "bcrypt", "pwd-hash": "hash of n"}


@pytest.mark.parametrize(
    ("secrets", "outcome"),
    [
        ([{"id": "A"}], [KEPT_A]),
        (
            [{"id": "A", "not-after": "2030-01-01T00:00:00Z"}, {"id": "B"}],
            [KEPT_A | {"not-after": "2030-01-01T00:00:00Z"}, KEPT_B],
        ),
        ([{"id": "A", "pwd-plain": "n"}], [NEW | {"id": "A"}]),
        ([{"id": "A"}, {"pwd-plain": "n"}], [KEPT_A, NEW]),
        ([{"pwd-plain": "n"}], [NEW]),
        ([{"id": "X"}], None),
        ([{"id": "X", "pwd-plain": "n"}], None),
        ([{"id": "A"}, {"id": "A"}], None),
        ([{"id": "A", "pwd-hash": SHA_256}], None),
        # A reference ignores a salt; a hash given anew does not inherit one.
        ([{"id": "B", "salt": "x"}], [KEPT_B]),
        (
            [{"id": "B", "hash-function": "sha-256", "pwd-hash": "p"}],
            [{"id": "B", "hash-function": "sha-256", "pwd-hash": "p"}],
        ),
        ([{"id": "B", "enabled": True}, {"id": "A"}], [KEPT_B | {"enabled": True}, KEPT_A]),
    ],
)
def test_outcomes_of_an_update(
    stored: tuple[Credential, ...], secrets: list[JsonObject], outcome: list[JsonObject] | None
) -> None:
    """The outcome table of management 6.9; rows 87 to 90."""
    if outcome is None:
        with pytest.raises(BadRequest, match=r"^credentials\[0\]\.secrets\[[01]\]\."):
            put(stored, password(*secrets))
        return
    result = secrets_of(put(stored, password(*secrets)))
    assert len(result) == len(outcome)
    for made, expected in zip(result, outcome, strict=True):
        if "id" not in expected:
            assert str(UUID(str(made["id"]))) == made["id"]
        assert made == {"id": made["id"]} | expected


@pytest.mark.row("management-api 13.4", 74)
def test_what_the_update_leaves_out_is_gone(stored: tuple[Credential, ...]) -> None:
    """Management 6.9, steps 5 and 6."""
    (kept,) = put(stored, password({"id": "A"}, enabled=False))
    assert (kept.comment, kept.ext, kept.enabled) == (None, {}, False)
    assert put(stored) == ()
    (other,) = put(stored, of_type("psk", {"key": KEY}))
    assert other.type == "psk"


@pytest.mark.row("management-api 13.4", 90)
def test_an_empty_set_knows_no_ids() -> None:
    """Management 6.9, step 2."""
    for secret in ({"id": "nope", "pwd-plain": "x"}, {"id": "nope"}):
        with pytest.raises(BadRequest, match=r"^credentials\[0\]\.secrets\[0\]\.id: "):
            put((), password(secret))
    with pytest.raises(BadRequest):
        put((), of_type("x509-cert", {"id": "nope"}))


def test_an_object_without_counterpart_may_bring_ids(stored: tuple[Credential, ...]) -> None:
    """Management 6.9, step 4, last case; rows 91, 92."""
    psk = put((), of_type("psk", {"key": KEY}))
    (made,) = put(psk, password({"id": "k1", "pwd-plain": "x"}, auth_id="s9"))
    assert ids([made]) == ["k1"]
    for reference in (
        password({"id": "k1"}, auth_id="s9"),
        of_type("psk", {"id": "k1"}) | {"auth-id": "s9"},
        of_type("rpk", {"id": "k1", "algorithm": "EC"}),
        of_type("my-token", {"id": "k1"}),
    ):
        with pytest.raises(BadRequest, match=r"^credentials\[0\]\.secrets\[0\]\.id: "):
            put(psk, reference)
    assert ids(put(psk, of_type("x509-cert", {"id": "k1"}))) == ["k1"]
    assert ids(put(psk, of_type("my-token", {"id": "k1", "token": "t"}))) == ["k1"]
    # The id of a secret of another object is not known here.
    with pytest.raises(BadRequest):
        put(stored, password({"id": "A"}, auth_id="s2"))


@pytest.mark.row("management-api 13.4", 98)
def test_references_of_every_type() -> None:
    """Management 6.9, confidential data per type; 6.7: custom members are inherited all or not at all."""
    before = put(
        (),
        of_type("psk", {"key": KEY}),
        of_type("rpk", {"key": DEV_SPKI, "algorithm": "EC"}),
        of_type("x509-cert", {"comment": "old"}),
        of_type("my-token", {"token": "t", "n": 1}, {"token": "u", "n": 2}),
    )
    psk, rpk, x509, one, two = ids(before)
    after = put(
        before,
        of_type("psk", {"id": psk, "comment": "c"}),
        of_type("rpk", {"id": rpk}),
        of_type("x509-cert", {"id": x509, "not-after": "2030-01-01T00:00:00Z"}),
        of_type("my-token", {"id": two}, {"id": one, "n": 3}),
    )
    assert [secrets_of([credential]) for credential in after] == [
        [{"id": psk, "comment": "c", "key": KEY}],
        [{"id": rpk, "key": DEV_SPKI, "algorithm": "EC"}],
        [{"id": x509, "not-after": "2030-01-01T00:00:00Z"}],
        [{"id": two, "token": "u", "n": 2}, {"id": one, "n": 3}],
    ]


def test_the_auth_id_that_results_finds_its_counterpart() -> None:
    """Management 6.9, step 3."""
    before = put((), of_type("x509-cert", {}) | {"auth-id": DEV_DN})
    again = of_type("x509-cert", {"id": ids(before)[0]}) | {"auth-id": "cn=pump-17,ou=Line 7,o=Example GmbH"}
    assert put(before, again) == before


def test_files_bring_ids_but_no_references() -> None:
    (update,) = parse(of_type("psk", {"id": "k1", "key": KEY}, {"key": KEY}))
    made = without_references(update)
    assert made.secrets[0] == PskSecret(id="k1", key=b"tea-pot-42")
    (update,) = parse(of_type("psk", {"key": KEY}, {"id": "k1"}))
    with pytest.raises(BadRequest, match=r"^secrets\[1\]\.id: "):
        without_references(update)


# --- Properties ---

FREE: st.SearchStrategy[dict[str, Any]] = st.dictionaries(st.text(max_size=6), JSON, max_size=3)
SECRET_MEMBERS = {"id", "enabled", "not-before", "not-after", "comment"}
OBJECT_MEMBERS = {"type", "auth-id", "enabled", "comment", "ext", "secrets", "device-id", "cert"}
INSTANTS = st.none() | st.integers(0, 10**9).map(
    lambda seconds: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
)
IDS = st.sampled_from("ABCDE")
AUTH_IDS = st.sampled_from(["s1", "s2"])


@st.composite
def secrets(draw: st.DrawFn, type_: str) -> Secret:
    common: dict[str, Any] = {
        "id": draw(IDS),
        "enabled": draw(st.none() | st.booleans()),
        "not_before": draw(INSTANTS),
        "comment": draw(st.none() | st.text(max_size=4)),
    }
    match type_:
        case "hashed-password":
            texts = st.text(min_size=1, max_size=6)
            return PasswordSecret(
                **common,
                hash_function=draw(texts.filter(lambda text: text != "bcrypt")),
                pwd_hash=draw(texts),
                salt=draw(st.none() | texts),
            )
        case "psk":
            return PskSecret(**common, key=draw(st.binary(min_size=1, max_size=6)))
        case "x509-cert":
            return X509Secret(**common)
        case "rpk":
            return RpkSecret(**common, key=base64.b64decode(draw(st.sampled_from([SPKI, DEV_SPKI]))), algorithm="EC")
        case _:
            members = draw(FREE)
            return CustomSecret(**common, members={k: v for k, v in members.items() if k not in SECRET_MEMBERS})


@st.composite
def credentials(draw: st.DrawFn) -> Credential:
    type_ = draw(st.sampled_from(["hashed-password", "psk", "x509-cert", "rpk", "my-token"]))
    members: JsonObject = {}
    if type_ == "my-token":
        members = {k: v for k, v in draw(FREE).items() if k not in OBJECT_MEMBERS}
    return Credential(
        type=type_,
        auth_id=draw(AUTH_IDS),
        enabled=draw(st.booleans()),
        comment=draw(st.none() | st.text(max_size=4)),
        ext=draw(FREE),
        secrets=tuple(
            draw(
                st.lists(
                    secrets(type_),
                    min_size=1,
                    max_size=1 if type_ == "x509-cert" else 3,
                    unique_by=lambda secret: secret.id,
                )
            )
        ),
        members=members,
    )


SETS = st.lists(credentials(), max_size=3, unique_by=lambda one: (one.type, one.auth_id)).map(tuple)


@given(SETS)
def test_what_is_written_is_read_back(existing: tuple[Credential, ...]) -> None:
    for credential in existing:
        document = stored_document(credential)
        assert stored_credential(document) == credential
        text = decode(encode(document))
        assert isinstance(text, dict)
        assert stored_credential(text) == credential


@given(SETS)
def test_what_get_shows_can_be_put_back(existing: tuple[Credential, ...]) -> None:
    """Management 6.1: a client keeps confidential values by sending the secret's id; with or without PSK keys."""
    for reveal_psk in (True, False):
        shown = decode(encode(get(existing, reveal_psk=reveal_psk)))
        assert isinstance(shown, list)
        assert put(existing, *shown) == existing


@st.composite
def secret_updates(draw: st.DrawFn, type_: str) -> SecretUpdate:
    kind = draw(st.sampled_from(["new", "given", "reference"]))
    secret: Secret | SecretReference = draw(secrets(type_))
    if kind == "reference" and not isinstance(secret, X509Secret):
        secret = SecretReference(id=secret.id, enabled=secret.enabled, comment=secret.comment)
    elif kind == "new":
        secret = replace(secret, id=f"new-{draw(st.integers(0, 10**9))}")
    return SecretUpdate(secret=secret, has_given_id=kind != "new")


@st.composite
def updates(draw: st.DrawFn) -> CredentialUpdate:
    base = draw(credentials())
    maximum = 1 if base.type == "x509-cert" else 3
    return CredentialUpdate(
        type=base.type,
        auth_id=base.auth_id,
        enabled=base.enabled,
        comment=base.comment,
        ext=base.ext,
        members=base.members,
        secrets=tuple(
            draw(st.lists(secret_updates(base.type), min_size=1, max_size=maximum, unique_by=lambda one: one.secret.id))
        ),
    )


def confidential(secret: Secret) -> Secret:
    """A secret with nothing but what is confidential."""
    return replace(secret, id="", enabled=None, not_before=None, not_after=None, comment=None)


@given(SETS, st.lists(updates(), max_size=3, unique_by=lambda one: (one.type, one.auth_id)))
def test_an_update_keeps_what_it_names_and_nothing_else(
    existing: tuple[Credential, ...], update: list[CredentialUpdate]
) -> None:
    """Management 6.9 as invariants."""
    before = repr(existing)
    known = {
        (credential.type, credential.auth_id): {secret.id: secret for secret in credential.secrets}
        for credential in existing
    }
    refused = False
    for one in update:
        there = known.get((one.type, one.auth_id))
        for secret in one.secrets:
            if secret.has_given_id and (
                not existing
                or (there is not None and secret.secret.id not in there)
                or (there is None and isinstance(secret.secret, SecretReference))
            ):
                refused = True
    try:
        result = merge(existing, update)
    except BadRequest:
        assert refused
        assert repr(existing) == before
        return
    assert not refused
    assert [(made.type, made.auth_id) for made in result] == [(one.type, one.auth_id) for one in update]
    for made, one in zip(result, update, strict=True):
        assert (made.enabled, made.comment, made.ext, made.members) == (one.enabled, one.comment, one.ext, one.members)
        assert len(made.secrets) == len(one.secrets)
        for stored_secret, said in zip(made.secrets, one.secrets, strict=True):
            assert stored_secret.id == said.secret.id
            for name in ("enabled", "not_before", "not_after", "comment"):
                assert getattr(stored_secret, name) == getattr(said.secret, name)
            if isinstance(said.secret, SecretReference):
                there_before = known[made.type, made.auth_id][stored_secret.id]
                assert confidential(stored_secret) == confidential(there_before)
            else:
                assert stored_secret == said.secret
    assert repr(existing) == before


SECRET_LIKE = st.dictionaries(
    st.sampled_from(
        [
            "id",
            "enabled",
            "not-before",
            "not-after",
            "pwd-plain",
            "hash-function",
            "pwd-hash",
            "salt",
            "key",
            "algorithm",
            "cert",
            "x",
        ]
    ),
    JSON | st.sampled_from(["A", "x", KEY, SPKI, DEV_CERT, "EC", "bcrypt", BCRYPT_10, "2030-01-01T00:00:00Z"]),
    max_size=5,
)
CREDENTIAL_LIKE = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["hashed-password", "psk", "x509-cert", "rpk", "my-token"]) | JSON,
        "auth-id": st.sampled_from(["s1", "s2", "cn=a,ou=b"]) | JSON,
        "secrets": st.lists(SECRET_LIKE | JSON, max_size=3) | JSON,
    },
    optional={"enabled": JSON, "ext": JSON, "comment": JSON, "cert": JSON | st.just(DEV_CERT), "x": JSON},
)


@given(SETS, JSON | st.lists(CREDENTIAL_LIKE | JSON, max_size=3) | CREDENTIAL_LIKE)
def test_any_value_is_an_update_or_a_bad_request(existing: tuple[Credential, ...], document: object) -> None:
    with suppress(BadRequest):
        updates = parse_credentials(document, rules=RULES, trust_anchors=(), now=NOW)
        result = merge(existing, hashed(updates))
        json.loads(encode(get(result)))
        assert tuple(stored_credential(stored_document(credential)) for credential in result) == result


def test_nothing_confidential_is_in_an_error() -> None:
    for secret in (
        {"pwd-plain": "tea-pot-42" * 10},
        {"hash-function": "bcrypt", "pwd-hash": "tea-pot-42"},
        {"pwd-hash": "tea-pot-42"},
    ):
        with pytest.raises(BadRequest) as caught:
            parse(password(secret))
        assert "tea-pot-42" not in str(caught.value)
    assert "tea" not in repr(PlainPasswordSecret(id="a", password=PlainPassword("tea")))
