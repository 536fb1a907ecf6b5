"""Credentials of a device: parsed, checked, merged on update, and shown without what is confidential (management 6).

A request is read into `CredentialUpdate`s, which may hold passwords still to be hashed and references to secrets that
exist; `merge` turns them and the stored set into `Credential`s. Pure: no storage, no clock, no hashing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, TypedDict, assert_never

from kamado.document import (
    Identifiers,
    JsonObject,
    Members,
    decode_base64,
    encode_base64,
    format_timestamp,
    new_id,
)
from kamado.errors import BadRequest
from kamado.x509 import DistinguishedName, TrustAnchor, check_public_key, parse_certificate

__all__ = [
    "Credential",
    "CredentialRules",
    "CredentialUpdate",
    "CustomSecret",
    "PasswordSecret",
    "PlainPassword",
    "PskSecret",
    "RpkSecret",
    "Secret",
    "SecretUpdate",
    "X509Secret",
    "credential_document",
    "merge",
    "parse_credentials",
    "plain_passwords",
    "stored_credential",
    "stored_document",
    "with_hashes",
]

HASHED_PASSWORD: Final = "hashed-password"  # noqa: S105 - a type, not a secret
PSK: Final = "psk"
X509_CERT: Final = "x509-cert"
RPK: Final = "rpk"

MAX_PASSWORD_SIZE: Final = 72
"""Bytes of UTF-8: bcrypt ignores what follows (management 6.3, D27)."""
BCRYPT_MIN_COST: Final = 4
_BCRYPT: Final = re.compile(r"\$2a\$(\d\d)\$[./A-Za-z0-9]{53}", re.ASCII)
_TYPE: Final = re.compile(r"[a-z0-9-]+", re.ASCII)
_RPK_ALGORITHMS: Final = ("RSA", "EC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """What is common to all secrets (management 6.2)."""

    id: str
    enabled: bool | None = None
    """`None`: not said, which counts as true."""
    not_before: datetime | None = None
    not_after: datetime | None = None
    comment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordSecret(Secret):
    """A hashed password (management 6.3)."""

    hash_function: str = field(repr=False)
    pwd_hash: str = field(repr=False)
    salt: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PskSecret(Secret):
    """A pre-shared key (management 6.4)."""

    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class X509Secret(Secret):
    """The validity of a subject (management 6.5); nothing is confidential."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RpkSecret(Secret):
    """A raw public key (management 6.6)."""

    key: bytes
    """DER SubjectPublicKeyInfo."""
    algorithm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSecret(Secret):
    """A secret of a type of the operator's own (management 6.7)."""

    members: JsonObject = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """One credential (management 6.2)."""

    type: str
    auth_id: str
    enabled: bool = True
    comment: str | None = None
    ext: JsonObject = field(default_factory=dict)
    secrets: tuple[Secret, ...]
    members: JsonObject = field(default_factory=dict)
    """Further members of a custom type."""


# What a request asks for


@dataclass(frozen=True, slots=True)
class PlainPassword:
    """A password as it was typed; it lives until it is hashed and is never stored."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordHash:
    """Confidential data of a password."""

    hash_function: str
    pwd_hash: str = field(repr=False)
    salt: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawKey:
    """Confidential data of a raw public key."""

    key: bytes
    algorithm: str


Confidential = PlainPassword | PasswordHash | RawKey | bytes | JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretUpdate:
    """A secret of a request; without confidential data it refers to one that is stored (management 6.9)."""

    id: str | None = None
    enabled: bool | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    comment: str | None = None
    confidential: Confidential | None = field(default=None, repr=False)
    path: str = ""
    """Of the member `id` in the request, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialUpdate:
    """A credential of a request."""

    type: str
    auth_id: str
    enabled: bool = True
    comment: str | None = None
    ext: JsonObject = field(default_factory=dict)
    secrets: tuple[SecretUpdate, ...]
    members: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRules:
    """What the configuration says about credentials."""

    identifiers: Identifiers
    bcrypt_max_cost: int = 12
    """Highest cost accepted in a hash that comes ready-made."""
    allowed_hash_functions: frozenset[str] = frozenset()
    """For hashes that come ready-made; empty allows all."""


# Reads what is particular to a type of secret.
_Parser = Callable[[Members, SecretUpdate, CredentialRules], SecretUpdate]


def parse_credentials(
    document: object, *, rules: CredentialRules, trust_anchors: Sequence[TrustAnchor], now: datetime
) -> tuple[CredentialUpdate, ...]:
    """Read a credentials set from the JSON value of a request: all checks that need only the request.

    Args:
        document: An array of credentials, or one credential (management 3.5, D9).
        rules: What the configuration says.
        trust_anchors: The tenant's; one may have a template for the auth-id of a certificate (management 6.5).
        now: Which trust anchors are valid.

    Raises:
        BadRequest: It breaks a rule of management 6.2 to 6.8; the text names the member.
    """
    entries = document if isinstance(document, list) else [document]
    updates = []
    seen = set()
    for index, entry in enumerate(entries):
        path = f"[{index}]" if isinstance(document, list) else ""
        update = _parse_credential(Members(entry, path), rules, trust_anchors, now)
        if (update.type, update.auth_id) in seen:
            raise BadRequest(f"{path}: type {update.type!r} with auth-id {update.auth_id!r} occurs twice")
        seen.add((update.type, update.auth_id))
        updates.append(update)
    return tuple(updates)


def _parse_credential(
    members: Members, rules: CredentialRules, trust_anchors: Sequence[TrustAnchor], now: datetime
) -> CredentialUpdate:
    members.drop("device-id")  # the path decides; the guide of Hono 1.2 sends it
    type_ = members.required_string("type")
    if not _TYPE.fullmatch(type_):
        raise BadRequest(f"{members.path('type')}: must consist of lower case letters, digits and hyphens")
    if type_ == X509_CERT and members.value("cert") is not None:
        auth_id, secrets = _parse_certificate_form(members, trust_anchors, now)
    else:
        auth_id = members.required_string("auth-id")
        secrets = _parse_secrets(members, type_, rules)
        if type_ == HASHED_PASSWORD:
            rules.identifiers.check_auth_id(auth_id, members.path("auth-id"))
        elif type_ == X509_CERT:
            auth_id = _normal_name(auth_id)
            members.drop("cert")
    enabled, comment, ext = members.boolean("enabled"), members.string("comment"), members.object("ext")
    further: JsonObject = {}
    if type_ in _PARSERS:
        members.finish()
    else:
        further = members.rest()
    return CredentialUpdate(
        type=type_,
        auth_id=auth_id,
        enabled=enabled is not False,
        comment=comment,
        ext=ext,
        secrets=secrets,
        members=further,
    )


def _normal_name(auth_id: str) -> str:
    """Return the RFC 2253 form if it is a name; else it may be the product of a template (provisioning 2)."""
    try:
        return DistinguishedName.from_text(auth_id).text or auth_id
    except BadRequest:
        return auth_id


def _parse_certificate_form(
    members: Members, trust_anchors: Sequence[TrustAnchor], now: datetime
) -> tuple[str, tuple[SecretUpdate, ...]]:
    """Read the form with `cert` (management 6.5): auth-id and secrets of the request do not count."""
    path = members.path("cert")
    try:
        certificate = parse_certificate(decode_base64(members.value("cert"), path))
    except BadRequest as error:
        raise BadRequest(str(error) if str(error).startswith(path) else f"{path}: {error}") from None
    members.drop("auth-id", "secrets")
    auth_id = certificate.subject.text
    for anchor in trust_anchors:
        if anchor.is_valid_at(now) and anchor.subject.equals(certificate.issuer):
            if anchor.auth_id_template is not None:
                auth_id = anchor.auth_id_template.fill(certificate.subject)
            break
    if not auth_id:
        raise BadRequest(f"{path}: has an empty subject")
    secret = SecretUpdate(
        not_before=certificate.not_before.replace(microsecond=0),
        not_after=certificate.not_after.replace(microsecond=0),
    )
    return auth_id, (secret,)


def _parse_secrets(members: Members, type_: str, rules: CredentialRules) -> tuple[SecretUpdate, ...]:
    entries = members.elements("secrets")
    if not entries:
        raise BadRequest(f"{members.path('secrets')}: needs at least one secret")
    if type_ == X509_CERT and len(entries) > 1:
        raise BadRequest(f"{members.path('secrets')}: must be exactly one for {X509_CERT}")
    parse = _PARSERS.get(type_, _parse_custom)
    secrets = tuple(_parse_secret(entry, parse, rules) for entry in entries)
    ids = [secret.id for secret in secrets if secret.id is not None]
    if len(ids) != len(set(ids)):
        raise BadRequest(f"{members.path('secrets')}: an id occurs twice")
    return secrets


def _parse_secret(members: Members, parse: _Parser, rules: CredentialRules) -> SecretUpdate:
    common = SecretUpdate(
        id=members.string("id"),
        enabled=members.boolean("enabled"),
        not_before=members.timestamp("not-before"),
        not_after=members.timestamp("not-after"),
        comment=members.string("comment"),
        path=members.path("id"),
    )
    if common.id == "":
        raise BadRequest(f"{members.path('id')}: must not be empty")
    secret = parse(members, common, rules)
    members.finish()
    if secret.not_before is not None and secret.not_after is not None and secret.not_before > secret.not_after:
        raise BadRequest(f"{members.path('not-before')}: must not be later than not-after")
    return secret


def _parse_password(members: Members, common: SecretUpdate, rules: CredentialRules) -> SecretUpdate:
    """Read one of the three forms of management 6.3."""
    plain, function = members.string("pwd-plain"), members.string("hash-function")
    pwd_hash, salt = members.string("pwd-hash"), members.string("salt")
    if plain:
        if len(plain.encode()) > MAX_PASSWORD_SIZE:
            raise BadRequest(f"{members.path('pwd-plain')}: must not have more than {MAX_PASSWORD_SIZE} bytes in UTF-8")
        return replace(common, confidential=PlainPassword(plain))
    if function and pwd_hash:
        _check_hash(members, function, pwd_hash, rules)
        return replace(common, confidential=PasswordHash(hash_function=function, pwd_hash=pwd_hash, salt=salt or None))
    if function or pwd_hash:
        missing, given = ("hash-function", "pwd-hash") if pwd_hash else ("pwd-hash", "hash-function")
        raise BadRequest(f"{members.path(missing)}: is required with {given}")
    _check_reference(members, common, "pwd-plain, or hash-function and pwd-hash")
    return common


def _check_reference(members: Members, common: SecretUpdate, needed: str) -> None:
    if common.id is None:
        raise BadRequest(f"{members.path('id')}: is required, or else {needed}")


def _check_hash(members: Members, function: str, pwd_hash: str, rules: CredentialRules) -> None:
    if rules.allowed_hash_functions and function not in rules.allowed_hash_functions:
        allowed = ", ".join(sorted(rules.allowed_hash_functions))
        raise BadRequest(f"{members.path('hash-function')}: must be one of {allowed}")
    if function != "bcrypt":
        return
    matched = _BCRYPT.fullmatch(pwd_hash)
    if matched is None:
        raise BadRequest(f"{members.path('pwd-hash')}: must be a bcrypt hash with prefix $2a$")
    if not BCRYPT_MIN_COST <= int(matched[1]) <= rules.bcrypt_max_cost:
        raise BadRequest(
            f"{members.path('pwd-hash')}: bcrypt cost must be {BCRYPT_MIN_COST} to {rules.bcrypt_max_cost}"
        )


def _parse_psk(members: Members, common: SecretUpdate, rules: CredentialRules) -> SecretUpdate:
    key = members.base64("key")
    if not key:
        _check_reference(members, common, "a key of at least one byte")
        return common
    return replace(common, confidential=key)


def _parse_x509(members: Members, common: SecretUpdate, rules: CredentialRules) -> SecretUpdate:
    return common


def _parse_rpk(members: Members, common: SecretUpdate, rules: CredentialRules) -> SecretUpdate:
    """Read a raw public key (management 6.6)."""
    encoded = members.base64("cert")
    if encoded is not None:
        path = members.path("cert")
        try:
            certificate = parse_certificate(encoded)
            if certificate.algorithm not in _RPK_ALGORITHMS:
                raise BadRequest(f"its key must be of {' or '.join(_RPK_ALGORITHMS)}")
        except BadRequest as error:
            raise BadRequest(f"{path}: {error}") from None
        members.drop("key", "algorithm")
        return replace(
            common,
            not_before=certificate.not_before.replace(microsecond=0),
            not_after=certificate.not_after.replace(microsecond=0),
            confidential=RawKey(key=certificate.public_key, algorithm=certificate.algorithm),
        )
    key, algorithm = members.base64("key"), members.string("algorithm") or "RSA"
    if not key:
        _check_reference(members, common, "a key or a cert")
        return common
    if algorithm not in _RPK_ALGORITHMS:
        raise BadRequest(f"{members.path('algorithm')}: must be {' or '.join(_RPK_ALGORITHMS)}")
    check_public_key(key, algorithm, members.path("key"))
    return replace(common, confidential=RawKey(key=key, algorithm=algorithm))


def _parse_custom(members: Members, common: SecretUpdate, rules: CredentialRules) -> SecretUpdate:
    further = members.rest()
    # Without an id there is nothing to refer to: a secret without further members is complete.
    return replace(common, confidential=further if further or common.id is None else None)


_PARSERS: Final[dict[str, _Parser]] = {
    HASHED_PASSWORD: _parse_password,
    PSK: _parse_psk,
    X509_CERT: _parse_x509,
    RPK: _parse_rpk,
}


# Hashing happens outside


def plain_passwords(updates: Sequence[CredentialUpdate]) -> list[PlainPassword]:
    """Return the passwords that wait to be hashed, each once."""
    found = (secret.confidential for update in updates for secret in update.secrets)
    return list(dict.fromkeys(one for one in found if isinstance(one, PlainPassword)))


def with_hashes(
    updates: Sequence[CredentialUpdate], hashes: Mapping[PlainPassword, str]
) -> tuple[CredentialUpdate, ...]:
    """Put bcrypt hashes in the place of passwords."""

    def hashed(secret: SecretUpdate) -> SecretUpdate:
        if not isinstance(secret.confidential, PlainPassword):
            return secret
        return replace(secret, confidential=PasswordHash(hash_function="bcrypt", pwd_hash=hashes[secret.confidential]))

    return tuple(replace(update, secrets=tuple(map(hashed, update.secrets))) for update in updates)


# Merging


class _Common(TypedDict):
    id: str
    enabled: bool | None
    not_before: datetime | None
    not_after: datetime | None
    comment: str | None


def merge(existing: Sequence[Credential], updates: Sequence[CredentialUpdate]) -> tuple[Credential, ...]:
    """Return the set that results from an update (management 6.9, steps 2 to 6).

    Args:
        existing: What is stored.
        updates: What the request asks for, passwords hashed.

    Raises:
        BadRequest: A secret refers to one that is not stored.
    """
    stored = {(one.type, one.auth_id): {secret.id: secret for secret in one.secrets} for one in existing}
    return tuple(
        Credential(
            type=update.type,
            auth_id=update.auth_id,
            enabled=update.enabled,
            comment=update.comment,
            ext=update.ext,
            members=update.members,
            secrets=tuple(
                _merge_secret(secret, update.type, stored.get((update.type, update.auth_id)), bool(existing))
                for secret in update.secrets
            ),
        )
        for update in updates
    )


def _merge_secret(secret: SecretUpdate, type_: str, stored: dict[str, Secret] | None, any_stored: bool) -> Secret:
    """Make the secret that a secret of the request asks for.

    Args:
        secret: From the request.
        type_: Of its credential.
        stored: The stored secrets of the same credential; `None` if there is no such credential.
        any_stored: Whether the device has any credential.
    """
    confidential = secret.confidential
    if secret.id is not None:
        # An id given to a new credential is kept, but not by a device that has none at all (steps 2 and 4).
        if not any_stored or (stored is not None and secret.id not in stored):
            raise BadRequest(f"{secret.path}: no secret with id {secret.id!r} is stored")
        if confidential is None:
            if stored is not None:
                return _inherit(secret, stored[secret.id])
            if type_ != X509_CERT:
                raise BadRequest(f"{secret.path}: no secret with id {secret.id!r} is stored")
    common = _Common(
        id=secret.id or new_id(),
        enabled=secret.enabled,
        not_before=secret.not_before,
        not_after=secret.not_after,
        comment=secret.comment,
    )
    match confidential:
        case PasswordHash():
            return PasswordSecret(
                **common,
                hash_function=confidential.hash_function,
                pwd_hash=confidential.pwd_hash,
                salt=confidential.salt,
            )
        case RawKey():
            return RpkSecret(**common, key=confidential.key, algorithm=confidential.algorithm)
        case bytes():
            return PskSecret(**common, key=confidential)
        case dict():
            return CustomSecret(**common, members=confidential)
        case None:
            return X509Secret(**common)
        case PlainPassword():
            raise AssertionError("passwords are hashed before they are merged")
        case _:
            assert_never(confidential)


def _inherit(secret: SecretUpdate, stored: Secret) -> Secret:
    """Keep what is confidential; everything else comes from the request alone."""
    return replace(
        stored,
        enabled=secret.enabled,
        not_before=secret.not_before,
        not_after=secret.not_after,
        comment=secret.comment,
    )


# Writing


def credential_document(credential: Credential, *, reveal_psk: bool) -> JsonObject:
    """Return the read representation (management 6.10): never a hash, a pre-shared key only if it may be revealed."""
    return _document(credential, lambda secret: _shown(secret, reveal_psk=reveal_psk))


def stored_document(credential: Credential) -> JsonObject:
    """Return all there is, confidential members included: what is stored."""
    return _document(credential, _kept)


def _document(credential: Credential, particular: Callable[[Secret], JsonObject]) -> JsonObject:
    document: JsonObject = {"type": credential.type, "auth-id": credential.auth_id, "enabled": credential.enabled}
    if credential.comment is not None:
        document["comment"] = credential.comment
    if credential.ext:
        document["ext"] = credential.ext
    document["secrets"] = [_secret_document(secret) | particular(secret) for secret in credential.secrets]
    return document | credential.members


def _secret_document(secret: Secret) -> JsonObject:
    document: JsonObject = {"id": secret.id}
    if secret.enabled is not None:
        document["enabled"] = secret.enabled
    if secret.not_before is not None:
        document["not-before"] = format_timestamp(secret.not_before)
    if secret.not_after is not None:
        document["not-after"] = format_timestamp(secret.not_after)
    if secret.comment is not None:
        document["comment"] = secret.comment
    return document


def _shown(secret: Secret, *, reveal_psk: bool) -> JsonObject:
    if isinstance(secret, PasswordSecret) or (isinstance(secret, PskSecret) and not reveal_psk):
        return {}
    return _kept(secret)


def _kept(secret: Secret) -> JsonObject:
    match secret:
        case PasswordSecret():
            document: JsonObject = {"hash-function": secret.hash_function, "pwd-hash": secret.pwd_hash}
            if secret.salt is not None:
                document["salt"] = secret.salt
            return document
        case PskSecret():
            return {"key": encode_base64(secret.key)}
        case RpkSecret():
            return {"key": encode_base64(secret.key), "algorithm": secret.algorithm}
        case CustomSecret():
            return secret.members
        case _:
            return {}


def stored_credential(document: JsonObject) -> Credential:
    """Return the credential that `stored_document` described; it was checked when it was stored."""
    members = Members(document)
    type_ = members.required_string("type")
    return Credential(
        type=type_,
        auth_id=members.required_string("auth-id"),
        enabled=members.boolean("enabled") is not False,
        comment=members.string("comment"),
        ext=members.object("ext"),
        secrets=tuple(_stored_secret(entry, type_) for entry in members.elements("secrets") or ()),
        members=members.rest(),
    )


def _stored_secret(members: Members, type_: str) -> Secret:
    common = _Common(
        id=members.string("id") or new_id(),
        enabled=members.boolean("enabled"),
        not_before=members.timestamp("not-before"),
        not_after=members.timestamp("not-after"),
        comment=members.string("comment"),
    )
    match type_:
        case "hashed-password":
            return PasswordSecret(
                **common,
                hash_function=members.required_string("hash-function"),
                pwd_hash=members.required_string("pwd-hash"),
                salt=members.string("salt"),
            )
        case "psk":
            return PskSecret(**common, key=members.base64("key") or b"")
        case "x509-cert":
            return X509Secret(**common)
        case "rpk":
            return RpkSecret(**common, key=members.base64("key") or b"", algorithm=members.required_string("algorithm"))
        case _:
            return CustomSecret(**common, members=members.rest())
