"""Credentials: parse, check, merge on update, serialise. A `Credential` that exists keeps the rules of management 6.

An update comes in as `CredentialUpdate`s: everything that can be told from the request alone is checked then. Plain
passwords in it are hashed elsewhere (that is slow), before `merge` combines it with what is stored.

Pure: knows neither storage nor time nor bcrypt. Confidential members never appear in a `repr` or in an error.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, TypeVar, assert_never, cast

from kamado.document import (
    MAX_IDENTIFIER_LENGTH,
    Identifiers,
    JsonObject,
    Members,
    decode_base64,
    encode_base64,
    format_timestamp,
    new_id,
    parse_timestamp,
)
from kamado.errors import BadRequest
from kamado.x509 import Certificate, DistinguishedName, TrustAnchor, check_public_key, parse_certificate

__all__ = [
    "MAX_DN_LENGTH",
    "MAX_PASSWORD_SIZE",
    "Credential",
    "CredentialRules",
    "CredentialUpdate",
    "CustomSecret",
    "PasswordSecret",
    "PlainPassword",
    "PlainPasswordSecret",
    "PskSecret",
    "RpkSecret",
    "Secret",
    "SecretReference",
    "SecretUpdate",
    "X509Secret",
    "credential_document",
    "merge",
    "parse_credential",
    "parse_credentials",
    "plain_passwords",
    "stored_credential",
    "stored_document",
    "with_hashes",
    "without_references",
]

_HASHED: Final = "hashed-password"
_PSK: Final = "psk"
_X509: Final = "x509-cert"
_RPK: Final = "rpk"

MAX_PASSWORD_SIZE: Final = 72
"""Bytes of UTF-8 (management 6.3): bcrypt ignores what follows."""
MAX_DN_LENGTH: Final = 1024
"""Characters of an auth-id of type x509-cert. Subject DNs may well be longer than other identifiers."""

_CUSTOM_TYPE: Final = re.compile(r"[a-z0-9-]+", re.ASCII)
_BCRYPT: Final = "bcrypt"
_BCRYPT_HASH: Final = re.compile(r"\$2a\$([0-9]{2})\$[./A-Za-z0-9]{53}", re.ASCII)
_BCRYPT_MIN_COST: Final = 4
_RPK_ALGORITHMS: Final = ("RSA", "EC")


# --- What is stored ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    """What all secrets have (management 6.2); `None` where the client has not said it."""

    id: str
    enabled: bool | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    comment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordSecret(_Common):
    """A hash of a password (management 6.3)."""

    hash_function: str
    pwd_hash: str = field(repr=False)
    salt: str | None = field(default=None, repr=False)
    """Base64, as it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PskSecret(_Common):
    """A pre-shared key (management 6.4)."""

    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class X509Secret(_Common):
    """Nothing: the proof is the device's certificate (management 6.5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RpkSecret(_Common):
    """A raw public key (management 6.6)."""

    key: bytes = field(repr=False)
    """DER SubjectPublicKeyInfo."""
    algorithm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSecret(_Common):
    """A secret of a type that only devices and adapters understand (management 6.7)."""

    members: JsonObject = field(default_factory=dict, repr=False)


Secret = PasswordSecret | PskSecret | X509Secret | RpkSecret | CustomSecret


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """One credentials object of a device (management 6.2)."""

    type: str
    auth_id: str
    enabled: bool = True
    comment: str | None = None
    ext: JsonObject = field(default_factory=dict)
    secrets: tuple[Secret, ...]
    """At least one; all of the class that belongs to `type`."""
    members: JsonObject = field(default_factory=dict)
    """What else a custom type has."""


# --- What an update says ---


@dataclass(frozen=True, slots=True, eq=False)
class PlainPassword:
    """A clear text password on its way to the hasher; equal to nothing but itself, so that each gets its own salt."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPasswordSecret(_Common):
    """A password that has to be hashed."""

    password: PlainPassword


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretReference(_Common):
    """Names a stored secret whose confidential data stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretUpdate:
    """One secret of an update."""

    secret: Secret | PlainPasswordSecret | SecretReference
    has_given_id: bool
    """Whether the client named the id; otherwise it is fresh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialUpdate:
    """One credentials object of an update."""

    type: str
    auth_id: str
    enabled: bool = True
    comment: str | None = None
    ext: JsonObject = field(default_factory=dict)
    secrets: tuple[SecretUpdate, ...]
    members: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRules:
    """What a deployment allows."""

    identifiers: Identifiers
    bcrypt_max_cost: int = 12
    """Of bcrypt hashes that operators send."""
    allowed_hash_functions: frozenset[str] = frozenset()
    """Of hashes that operators send; empty for all."""


# --- Reading a request ---


def parse_credentials(
    document: object, *, rules: CredentialRules, trust_anchors: Sequence[TrustAnchor], now: datetime
) -> tuple[CredentialUpdate, ...]:
    """Read an update from the JSON value of a request (management 6.2 to 6.8): all that needs the request only.

    One object counts as an array of one (management 3.5).

    Args:
        document: The JSON value.
        rules: What the deployment allows.
        trust_anchors: Of the tenant, for their `auth-id-template`s.
        now: Which of them are valid.

    Raises:
        BadRequest: A member is unknown, missing or against its rule, or two credentials have one type and auth-id.
    """
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise BadRequest("must be a JSON array of credentials")
    updates: dict[tuple[str, str], CredentialUpdate] = {}
    for index, element in enumerate(document):
        path = f"credentials[{index}]"
        update = parse_credential(element, path, rules=rules, trust_anchors=trust_anchors, now=now)
        key = (update.type, update.auth_id)
        if key in updates:
            raise BadRequest(f"{path}.auth-id: the same type and auth-id occur twice")
        updates[key] = update
    return tuple(updates.values())


def parse_credential(
    document: object, path: str, *, rules: CredentialRules, trust_anchors: Sequence[TrustAnchor], now: datetime
) -> CredentialUpdate:
    """Read one credentials object of an update; see `parse_credentials`.

    Raises:
        BadRequest: A member, whose name is given below `path`, is unknown, missing or against its rule.
    """
    members = Members(document, path)
    members.drop("device-id")
    type_ = members.required_string("type")
    enabled = members.boolean("enabled")
    comment = members.string("comment")
    ext = members.object("ext")
    certificate = members.base64("cert") if type_ == _X509 else None
    secrets: list[SecretUpdate]
    if certificate is not None:
        members.drop("auth-id", "secrets")
        auth_id, secret = _certified(certificate, members.path("cert"), trust_anchors, now)
        secrets = [SecretUpdate(secret=secret, has_given_id=False)]
    else:
        auth_id = _parse_auth_id(members, type_, rules)
        secrets = _parse_secrets(members, type_, rules)
    rest: JsonObject = {}
    if type_ in _STANDARD_TYPES:
        members.finish()
    else:
        if not _CUSTOM_TYPE.fullmatch(type_) or len(type_) > MAX_IDENTIFIER_LENGTH:
            raise BadRequest(
                f"{members.path('type')}: must match {_CUSTOM_TYPE.pattern}"
                f" and have at most {MAX_IDENTIFIER_LENGTH} characters"
            )
        rest = members.rest()
    return CredentialUpdate(
        type=type_,
        auth_id=auth_id,
        enabled=True if enabled is None else enabled,
        comment=comment,
        ext=ext,
        secrets=tuple(secrets),
        members=rest,
    )


def _parse_auth_id(members: Members, type_: str, rules: CredentialRules) -> str:
    auth_id = members.required_string("auth-id")
    path = members.path("auth-id")
    if type_ == _HASHED:
        return rules.identifiers.check_auth_id(auth_id, path)
    if type_ == _X509:
        # What is no DN is somebody's own scheme, as a template would make it.
        with suppress(BadRequest):
            auth_id = DistinguishedName.from_text(auth_id).text
    return _check_length(auth_id, type_, path)


def _check_length(auth_id: str, type_: str, path: str) -> str:
    maximum = MAX_DN_LENGTH if type_ == _X509 else MAX_IDENTIFIER_LENGTH
    if len(auth_id) > maximum:
        raise BadRequest(f"{path}: must have at most {maximum} characters")
    return auth_id


def _certified(data: bytes, path: str, trust_anchors: Sequence[TrustAnchor], now: datetime) -> tuple[str, X509Secret]:
    """Make auth-id and secret of a certificate (management 6.5)."""
    certificate = _parse_certificate(data, path)
    secret = X509Secret(
        id=new_id(),
        not_before=certificate.not_before.replace(microsecond=0),
        not_after=certificate.not_after.replace(microsecond=0),
    )
    auth_id = certificate.subject.text
    for anchor in trust_anchors:
        if (
            anchor.auth_id_template is not None
            and anchor.is_valid_at(now)
            and anchor.subject.equals(certificate.issuer)
        ):
            try:
                auth_id = anchor.auth_id_template.fill(certificate.subject)
            except BadRequest as error:
                raise BadRequest(f"{path}: {error}", reason=error.reason) from None
            break
    if not auth_id:
        raise BadRequest(f"{path}: the certificate has no subject")
    return _check_length(auth_id, _X509, path), secret


def _parse_certificate(data: bytes, path: str) -> Certificate:
    try:
        return parse_certificate(data)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None


def _parse_secrets(members: Members, type_: str, rules: CredentialRules) -> list[SecretUpdate]:
    elements = members.elements("secrets")
    path = members.path("secrets")
    if not elements:
        raise BadRequest(f"{path}: must be given and have at least one element")
    if type_ == _X509 and len(elements) > 1:
        raise BadRequest(f"{path}: must have exactly one element")
    ids: set[str] = set()
    updates: list[SecretUpdate] = []
    for element in elements:
        given_id = element.string("id") or None
        if given_id in ids:
            raise BadRequest(f"{element.path('id')}: occurs twice")
        if given_id is not None:
            ids.add(given_id)
        updates.append(_parse_secret(element, type_, given_id, rules))
    return updates


def _parse_secret(members: Members, type_: str, given_id: str | None, rules: CredentialRules) -> SecretUpdate:
    common = _parse_common(members, given_id)
    secret: Secret | PlainPasswordSecret | SecretReference | None
    match type_:
        case "hashed-password":
            secret = _parse_password(members, common, rules)
        case "psk":
            secret = _parse_psk(members, common)
        case "x509-cert":
            secret = _with_common(X509Secret, common)
        case "rpk":
            secret = _parse_rpk(members, common)
        case _:
            rest = members.rest()
            # Without a member a new one is complete (the type may need none), a named one is a reference.
            secret = None if given_id is not None and not rest else _with_common(CustomSecret, common, members=rest)
    members.finish()
    if secret is None:
        if given_id is None:
            raise BadRequest(f"{members.path(_NEEDED[type_])}: must be given, since there is no id of a stored secret")
        secret = _with_common(SecretReference, common)
    return SecretUpdate(secret=secret, has_given_id=given_id is not None)


_NEEDED: Final = {_HASHED: "pwd-plain", _PSK: "key", _RPK: "key"}
_STANDARD_TYPES: Final = frozenset((_HASHED, _PSK, _X509, _RPK))

Made = TypeVar("Made", bound=_Common)


def _with_common(kind: type[Made], common: _Common, **members: Any) -> Made:
    """Make a secret of a kind out of what all have and what only this kind has."""
    return kind(
        id=common.id,
        enabled=common.enabled,
        not_before=common.not_before,
        not_after=common.not_after,
        comment=common.comment,
        **members,
    )


def _parse_common(members: Members, given_id: str | None) -> _Common:
    not_before = members.instant("not-before")
    not_after = members.instant("not-after")
    if not_before is not None and not_after is not None and not_before > not_after:
        raise BadRequest(f"{members.path('not-before')}: must not be later than not-after")
    return _Common(
        id=given_id or new_id(),
        enabled=members.boolean("enabled"),
        not_before=None if not_before is None else not_before.replace(microsecond=0),
        not_after=None if not_after is None else not_after.replace(microsecond=0),
        comment=members.string("comment"),
    )


def _parse_password(
    members: Members, common: _Common, rules: CredentialRules
) -> PasswordSecret | PlainPasswordSecret | None:
    """Read one of the three forms of management 6.3; `None` for a reference. An empty text counts as left out."""
    plain = members.string("pwd-plain")
    if plain:
        members.drop("hash-function", "pwd-hash", "salt")
        if len(plain.encode()) > MAX_PASSWORD_SIZE:
            raise BadRequest(f"{members.path('pwd-plain')}: must not have more than {MAX_PASSWORD_SIZE} bytes in UTF-8")
        return _with_common(PlainPasswordSecret, common, password=PlainPassword(plain))
    function, hashed = members.string("hash-function"), members.string("pwd-hash")
    salt = members.string("salt")
    if not function and not hashed:
        return None
    if not function or not hashed:
        missing = members.path("pwd-hash" if function else "hash-function")
        raise BadRequest(f"{missing}: must be given, pwd-hash and hash-function together")
    if rules.allowed_hash_functions and function not in rules.allowed_hash_functions:
        raise BadRequest(
            f"{members.path('hash-function')}: must be one of {', '.join(sorted(rules.allowed_hash_functions))}"
        )
    if function == _BCRYPT:
        _check_bcrypt(hashed, rules, members.path("pwd-hash"))
        # The hash contains it, and adapters get none (amqp-apis 11.4).
        salt = None
    return _with_common(PasswordSecret, common, hash_function=function, pwd_hash=hashed, salt=salt or None)


def _check_bcrypt(hashed: str, rules: CredentialRules, path: str) -> None:
    matched = _BCRYPT_HASH.fullmatch(hashed)
    if matched is None:
        raise BadRequest(f"{path}: must be a bcrypt hash with prefix $2a$")
    if not _BCRYPT_MIN_COST <= int(matched[1]) <= rules.bcrypt_max_cost:
        raise BadRequest(f"{path}: must have a cost from {_BCRYPT_MIN_COST} to {rules.bcrypt_max_cost}")


def _parse_psk(members: Members, common: _Common) -> PskSecret | None:
    key = members.base64("key")
    return _with_common(PskSecret, common, key=key) if key else None


def _parse_rpk(members: Members, common: _Common) -> RpkSecret | None:
    """Read a raw public key (management 6.6); `None` for a reference."""
    data = members.base64("cert")
    if data is not None:
        members.drop("key", "algorithm")
        path = members.path("cert")
        certificate = _parse_certificate(data, path)
        if certificate.algorithm not in _RPK_ALGORITHMS:
            raise BadRequest(f"{path}: must have an {' or '.join(_RPK_ALGORITHMS)} key")
        return RpkSecret(
            id=common.id,
            enabled=common.enabled,
            not_before=certificate.not_before.replace(microsecond=0),
            not_after=certificate.not_after.replace(microsecond=0),
            comment=common.comment,
            key=certificate.public_key,
            algorithm=certificate.algorithm,
        )
    algorithm = members.string("algorithm") or _RPK_ALGORITHMS[0]
    if algorithm not in _RPK_ALGORITHMS:
        raise BadRequest(f"{members.path('algorithm')}: must be one of {', '.join(_RPK_ALGORITHMS)}")
    key = members.base64("key")
    if not key:
        return None
    check_public_key(key, algorithm, members.path("key"))
    return _with_common(RpkSecret, common, key=key, algorithm=algorithm)


# --- Hashing ---


def plain_passwords(updates: Sequence[CredentialUpdate]) -> list[PlainPassword]:
    """Return the passwords that have to be hashed before `merge`."""
    return [
        update.secret.password
        for credential in updates
        for update in credential.secrets
        if isinstance(update.secret, PlainPasswordSecret)
    ]


def with_hashes(
    updates: Sequence[CredentialUpdate], hashes: Mapping[PlainPassword, str]
) -> tuple[CredentialUpdate, ...]:
    """Put bcrypt hashes in the place of all plain passwords."""
    return tuple(
        replace(credential, secrets=tuple(_with_hash(update, hashes) for update in credential.secrets))
        for credential in updates
    )


def _with_hash(update: SecretUpdate, hashes: Mapping[PlainPassword, str]) -> SecretUpdate:
    if not isinstance(update.secret, PlainPasswordSecret):
        return update
    hashed = hashes[update.secret.password]
    secret = _with_common(PasswordSecret, update.secret, hash_function=_BCRYPT, pwd_hash=hashed)
    return replace(update, secret=secret)


# --- Update ---


def merge(existing: Sequence[Credential], updates: Sequence[CredentialUpdate]) -> tuple[Credential, ...]:
    """Combine an update with what is stored (management 6.9, steps 2 to 6).

    The result is what `updates` says; from `existing` come only the confidential data of secrets that are referred to
    by id.

    Raises:
        BadRequest: A secret id is not known.
    """
    stored = {(credential.type, credential.auth_id): credential for credential in existing}
    return tuple(
        _credential(
            update,
            _merge_secrets(
                stored.get((update.type, update.auth_id)), update, f"credentials[{index}].", is_first=not stored
            ),
        )
        for index, update in enumerate(updates)
    )


def without_references(update: CredentialUpdate) -> Credential:
    """Turn an update into a credential as it stands; ids of secrets are kept (files of another registry bring them).

    Raises:
        BadRequest: A secret has no confidential data of its own.
    """
    secrets = _merge_secrets(None, update, "", is_first=False)
    return _credential(update, secrets)


def _credential(update: CredentialUpdate, secrets: tuple[Secret, ...]) -> Credential:
    return Credential(
        type=update.type,
        auth_id=update.auth_id,
        enabled=update.enabled,
        comment=update.comment,
        ext=update.ext,
        secrets=secrets,
        members=update.members,
    )


def _merge_secrets(
    stored: Credential | None, update: CredentialUpdate, path: str, *, is_first: bool
) -> tuple[Secret, ...]:
    known = {} if stored is None else {secret.id: secret for secret in stored.secrets}
    secrets: list[Secret] = []
    for index, one in enumerate(update.secrets):
        secret = one.secret
        assert not isinstance(secret, PlainPasswordSecret), "passwords are hashed before they are merged"
        # Step 2; and step 4: an id that is not found in what it must refer to. Without a counterpart, a secret that
        # is complete may bring its id along.
        must_be_known = is_first or stored is not None or isinstance(secret, SecretReference)
        if one.has_given_id and must_be_known and secret.id not in known:
            raise BadRequest(f"{path}secrets[{index}].id: there is no such secret")
        if isinstance(secret, SecretReference):
            secrets.append(_referred(known[secret.id], secret))
        else:
            secrets.append(secret)
    return tuple(secrets)


def _referred(stored: Secret, reference: SecretReference) -> Secret:
    return replace(
        stored,
        enabled=reference.enabled,
        not_before=reference.not_before,
        not_after=reference.not_after,
        comment=reference.comment,
    )


# --- Writing and reading back ---


def credential_document(credential: Credential, *, reveal_psk: bool) -> JsonObject:
    """Write a credential as `GET` shows it (management 6.10).

    Args:
        credential: The credential.
        reveal_psk: Whether the reader may see the keys of type psk.
    """
    return _document(credential, [_shown_members(secret, reveal_psk) for secret in credential.secrets])


def stored_document(credential: Credential) -> JsonObject:
    """Write a credential with everything that is confidential, as it is stored and as adapters get it."""
    return _document(credential, [_all_members(secret) for secret in credential.secrets])


def _document(credential: Credential, confidential: Sequence[JsonObject]) -> JsonObject:
    document: JsonObject = {
        "type": credential.type,
        "auth-id": credential.auth_id,
        "enabled": credential.enabled,
    }
    if credential.comment is not None:
        document["comment"] = credential.comment
    if credential.ext:
        document["ext"] = credential.ext
    document["secrets"] = [
        _common_members(secret) | members for secret, members in zip(credential.secrets, confidential, strict=True)
    ]
    return document | credential.members


def _common_members(secret: Secret) -> JsonObject:
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


def _shown_members(secret: Secret, reveal_psk: bool) -> JsonObject:
    if isinstance(secret, PasswordSecret) or (isinstance(secret, PskSecret) and not reveal_psk):
        return {}
    return _all_members(secret)


def _all_members(secret: Secret) -> JsonObject:
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
        case X509Secret():
            return {}
        case _:
            assert_never(secret)


def stored_credential(document: JsonObject) -> Credential:
    """Read a credential back from `stored_document`; checks nothing."""
    members = cast(dict[str, Any], document)
    own = {"type", "auth-id", "enabled", "comment", "ext", "secrets"}
    return Credential(
        type=members["type"],
        auth_id=members["auth-id"],
        enabled=members.get("enabled", True),
        comment=members.get("comment"),
        ext=members.get("ext", {}),
        secrets=tuple(_stored_secret(members["type"], secret) for secret in members["secrets"]),
        members={name: value for name, value in members.items() if name not in own},
    )


def _stored_secret(type_: str, document: dict[str, Any]) -> Secret:
    not_before, not_after = document.get("not-before"), document.get("not-after")
    common = _Common(
        id=document["id"],
        enabled=document.get("enabled"),
        not_before=None if not_before is None else parse_timestamp(not_before, "not-before"),
        not_after=None if not_after is None else parse_timestamp(not_after, "not-after"),
        comment=document.get("comment"),
    )
    match type_:
        case "hashed-password":
            return _with_common(
                PasswordSecret,
                common,
                hash_function=document["hash-function"],
                pwd_hash=document["pwd-hash"],
                salt=document.get("salt"),
            )
        case "psk":
            return _with_common(PskSecret, common, key=decode_base64(document["key"], "key"))
        case "x509-cert":
            return _with_common(X509Secret, common)
        case "rpk":
            key = decode_base64(document["key"], "key")
            return _with_common(RpkSecret, common, key=key, algorithm=document["algorithm"])
        case _:
            own = {"id", "enabled", "not-before", "not-after", "comment"}
            rest = {name: value for name, value in document.items() if name not in own}
            return _with_common(CustomSecret, common, members=rest)
