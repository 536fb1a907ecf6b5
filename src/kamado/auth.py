"""Callers of the registry: who they are and what they may do.

A `Principal` is what a login results in: a name, a set of authorities and an end. Identities come from the permissions
file (the JSON form of Hono's Auth Server, authentication 4) or from the registry's own database; both have the same
model, and the file wins where both know a name. What SASL looks like on the wire is not known here.
"""

import asyncio
import errno
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from kamado.errors import BadRequest, Conflict, NotFound
from kamado.passwords import BCRYPT_HASH, PasswordHasher
from kamado.store import Change, ChangeKind, Identity, Store, Transaction
from kamado.x509 import parse_certificate

__all__ = [
    "ADAPTER_AUTHORITIES",
    "LOCAL_OPERATOR",
    "ROLES",
    "Authenticator",
    "Authorities",
    "Mechanism",
    "Permissions",
    "PermissionsError",
    "Principal",
    "User",
    "add_identity",
    "change_identity_password",
    "ensure_first_identity",
    "load_permissions",
    "remove_identity",
]

_log = logging.getLogger(__name__)


# Rights


class Authorities:
    """What a caller may do, in the form of a token's claims (authentication 2.5).

    `r:<address>` holds letters out of `R`, `W`, `E`, `o:<address>:<operation>` holds `E`; `*` stands for all letters.
    A check is a list of exact look-ups (authentication 3.1): nothing is globbed, no key is ever taken apart.
    """

    __slots__ = ("_claims",)

    def __init__(self, claims: Mapping[str, str] | None = None) -> None:
        self._claims = dict(claims or {})

    @classmethod
    def from_claims(cls, claims: Mapping[str, object]) -> Self:
        """Take the authorities out of claims; others, and values that are not strings, are left alone."""
        return cls(
            {key: value for key, value in claims.items() if key.startswith(("r:", "o:")) and isinstance(value, str)}
        )

    @property
    def claims(self) -> Mapping[str, str]:
        """The claims they were made from."""
        return MappingProxyType(self._claims)

    def united(self, other: "Authorities") -> "Authorities":
        """Return what either of the two allows; letters of the same key are joined (authentication 4.1)."""
        claims = dict(self._claims)
        for key, value in other._claims.items():
            letters = claims.get(key, "") + value
            claims[key] = "*" if "*" in letters else "".join(dict.fromkeys(letters))
        return Authorities(claims)

    def may_read(self, address: str) -> bool:
        """Tell whether the caller may receive from an address."""
        return self._grants(address, "R")

    def may_write(self, address: str) -> bool:
        """Tell whether the caller may send to an address."""
        return self._grants(address, "W")

    def may_execute(self, address: str, operation: str) -> bool:
        """Tell whether a request of the caller, sent to an address with that subject, is processed."""
        claims = self._claims
        for one in _addresses(address):
            for key in (f"o:{one}:{operation}", f"o:{one}:*"):
                value = claims.get(key)
                if value is not None and ("E" in value or value == "*"):
                    return True
        return False

    def _grants(self, address: str, letter: str) -> bool:
        for one in _addresses(address):
            # A key that exists without the letter does not decide: the search goes on.
            value = self._claims.get(f"r:{one}")
            if value is not None and (letter in value or value == "*"):
                return True
        return False

    def __eq__(self, other: object) -> bool:
        return self._claims == other._claims if isinstance(other, Authorities) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._claims.items()))

    def __repr__(self) -> str:
        return f"Authorities({self._claims!r})"


def _addresses(address: str) -> list[str]:
    """Return the keys under which a right on an address may stand, the most specific first (authentication 3.1)."""
    endpoint, _, rest = address.partition("/")
    tenant, _, more = rest.partition("/")
    if not tenant:
        return [endpoint, "*"]
    keys = [f"{endpoint}/{tenant}", f"{endpoint}/*", endpoint, "*"]
    return [address, *keys] if more else keys


ADAPTER_AUTHORITIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "r:tenant": "RW",
        "o:tenant/*:*": "E",
        "r:registration/*": "RW",
        "o:registration/*:assert": "E",
        "r:credentials/*": "RW",
        "o:credentials/*:get": "E",
        "r:device_con/*": "RW",
        "o:device_con/*:*": "E",
    }
)
"""What a stock protocol adapter needs of the registry (authentication 3.3)."""

ROLES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "protocol-adapter": ADAPTER_AUTHORITIES,
        "command-router": MappingProxyType(
            {
                "r:tenant": "RW",
                "o:tenant/*:*": "E",
                "r:registration/*": "RW",
                "o:registration/*:*": "E",
            }
        ),
    }
)
"""Authorities of the roles that `kamado identity add --role` knows (authentication 3.3)."""


class Mechanism(StrEnum):
    """How an identity proves itself; it is found for its own mechanism only (authentication 4.1)."""

    PLAIN = "PLAIN"
    EXTERNAL = "EXTERNAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A caller that has proven who it is."""

    name: str
    authorities: Authorities = field(default_factory=Authorities)
    expires: datetime | None = None
    """When its connection ends; `None`: never by itself."""
    may_reveal_secrets: bool = False
    """Whether reading credentials shows it the keys of `psk` secrets."""
    mechanism: Mechanism | None = None
    """How it logged in; `None` if it did not have to."""
    stamp: str = field(default="", repr=False)
    """Changes with whatever the login was decided by; see `Authenticator.is_current`."""

    def is_expired(self, now: datetime) -> bool:
        """Tell whether its time is over."""
        return self.expires is not None and now >= self.expires


LOCAL_OPERATOR: Final = Principal(name="local-operator", may_reveal_secrets=True)
"""Who calls the management API while it listens on loopback only and nobody has to log in, and who runs `kamado`."""


# Permissions file


class PermissionsError(ValueError):
    """The permissions file cannot be used; the text names the entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An identity and what decides over its login."""

    name: str
    mechanism: Mechanism
    password: str | None = field(default=None, repr=False)
    """Clear text, the reference's form."""
    password_hash: str | None = field(default=None, repr=False)
    """bcrypt."""
    authorities: Authorities

    @property
    def stamp(self) -> str:
        """Tell whether this is still what it was, without telling what it is."""
        parts = [self.name, self.mechanism, self.password, self.password_hash, sorted(self.authorities.claims.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """The content of a permissions file (authentication 4.1)."""

    path: Path
    users: Mapping[str, User]
    warnings: tuple[str, ...] = ()
    """What is not as it should be, but does no harm: unknown roles, operations without a colon."""


_MARKER_ROLE = "hono-component"
_LETTERS = {"READ": "R", "WRITE": "W", "EXECUTE": "E"}
_MAX_COST = 14
"""A bcrypt hash of a higher cost takes longer to verify than a login may."""


def load_permissions(path: Path) -> Permissions:
    """Read a permissions file (authentication 4.1, 4.2).

    Args:
        path: Of the file.

    Raises:
        PermissionsError: It cannot be read, or an entry is wrong.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise PermissionsError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PermissionsError(f"{path}: is not a JSON document in UTF-8") from error
    try:
        root = _object(document, "the document")
        warnings: list[str] = []
        roles = {
            name: _role(grants, f"roles.{name}", warnings)
            for name, grants in _object(root.get("roles", {}), "roles").items()
        }
        if "users" not in root:
            # An empty object, half a write perhaps, must not lock everybody out.
            raise PermissionsError("users: is missing")
        users = {
            name: _user(name, entry, f"users.{name}", roles, warnings)
            for name, entry in _object(root["users"], "users").items()
        }
    except PermissionsError as error:
        raise PermissionsError(f"{path}: {error}") from error
    return Permissions(path=path, users=users, warnings=tuple(warnings))


def _object(value: object, entry: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise PermissionsError(f"{entry}: expected a JSON object")
    return value


def _strings(value: object, entry: str, content: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise PermissionsError(f"{entry}: expected an array of {content}")
    return value


def _role(grants: object, entry: str, warnings: list[str]) -> Authorities:
    if not isinstance(grants, list):
        raise PermissionsError(f"{entry}: expected an array of grants")
    role = Authorities()
    for index, grant in enumerate(grants):
        role = role.united(Authorities(_grant(_object(grant, f"{entry}[{index}]"), f"{entry}[{index}]", warnings)))
    return role


def _grant(grant: dict[str, object], entry: str, warnings: list[str]) -> dict[str, str]:
    resource, operation = grant.get("resource"), grant.get("operation")
    letters = ""
    if "activities" in grant or resource is not None:
        for activity in _strings(grant.get("activities"), f"{entry}.activities", "READ, WRITE, EXECUTE"):
            if activity not in _LETTERS:
                raise PermissionsError(f"{entry}.activities: {activity} is none of READ, WRITE, EXECUTE")
            letters += _LETTERS[activity]
    if resource is not None:
        if not isinstance(resource, str):
            raise PermissionsError(f"{entry}.resource: expected a string")
        return {f"r:{resource}": letters}
    if operation is not None:
        if not isinstance(operation, str):
            raise PermissionsError(f"{entry}.operation: expected a string")
        if ":" not in operation:
            warnings.append(f"{entry}.operation: {operation} has no colon and grants nothing")
            return {}
        # Split at the first colon or not at all: the key is the same.
        return {f"o:{operation}": "E"}
    raise PermissionsError(f"{entry}: has neither resource nor operation")


def _user(name: str, value: object, entry: str, roles: Mapping[str, Authorities], warnings: list[str]) -> User:
    user = _object(value, entry)
    try:
        mechanism = Mechanism(str(user.get("mechanism")))
    except ValueError:
        raise PermissionsError(f"{entry}.mechanism: expected PLAIN or EXTERNAL") from None
    password, password_hash = user.get("password"), user.get("pwd-hash")
    if mechanism is Mechanism.EXTERNAL:
        if password is not None or password_hash is not None:
            raise PermissionsError(f"{entry}: a user of mechanism EXTERNAL has no password")
    elif (password is None) == (password_hash is None):
        raise PermissionsError(f"{entry}: a user of mechanism PLAIN has either password or pwd-hash")
    if password is not None and (not isinstance(password, str) or not password):
        raise PermissionsError(f"{entry}.password: expected a string that is not empty")
    if password_hash is not None:
        match = BCRYPT_HASH.fullmatch(password_hash) if isinstance(password_hash, str) else None
        if match is None:
            raise PermissionsError(f"{entry}.pwd-hash: expected a bcrypt hash ($2a$, $2b$ or $2y$)")
        if int(match[1]) > _MAX_COST:
            raise PermissionsError(f"{entry}.pwd-hash: a cost above {_MAX_COST} takes longer than a login may")
    authorities = Authorities()
    for role in _strings(user.get("authorities"), f"{entry}.authorities", "names of roles"):
        if role in roles:
            authorities = authorities.united(roles[role])
        elif role != _MARKER_ROLE:
            warnings.append(f"{entry}.authorities: there is no role {role}")
    return User(
        name=name,
        mechanism=mechanism,
        password=password,
        password_hash=password_hash if isinstance(password_hash, str) else None,
        authorities=authorities,
    )


# Logins


class Authenticator:
    """Decides over logins (authentication 5.1): permissions file first, then the identities of the database.

    Args:
        store: Where the registry's own identities are; they count from the moment they are written.
        passwords: Verifies hashes.
        permissions: The permissions file, if there is one.
        lifetime: After which a login ends; `None`: it does not, but see `is_current`.
    """

    def __init__(
        self,
        store: Store,
        passwords: PasswordHasher,
        permissions: Permissions | None = None,
        lifetime: timedelta | None = timedelta(seconds=600),
    ) -> None:
        self._store = store
        self._passwords = passwords
        self._permissions = permissions
        self._lifetime = lifetime

    @property
    def permissions(self) -> Permissions | None:
        """What the permissions file said when it was last read without error."""
        return self._permissions

    def reload(self) -> bool:
        """Read the permissions file again; whole, or not at all.

        Returns:
            Whether the new content counts now; `False` keeps the old one and logs why.
        """
        if self._permissions is None:
            return True
        try:
            self._permissions = load_permissions(self._permissions.path)
        except PermissionsError as error:
            _log.error("permissions file not reloaded, the old content stays", extra={"error": str(error)})
            return False
        _log.info("permissions file reloaded", extra={"users": len(self._permissions.users)})
        for warning in self._permissions.warnings:
            _log.warning("permissions file", extra={"warning": warning})
        return True

    async def authenticate_plain(self, name: str, password: str, now: datetime) -> Principal | None:
        """Log in by name and password (authentication 4.2).

        Returns:
            `None` for an unknown user and for a wrong password, after the same time.

        Raises:
            Unavailable: The database does not answer, or too many logins wait.
        """
        user = await self._find(Mechanism.PLAIN, name)
        if user is not None and user.password_hash is not None:
            return self._principal(user, now) if await self._passwords.verify(password, user.password_hash) else None
        expected = user.password if user is not None else None
        if user is not None and expected is not None and hmac.compare_digest(_utf8(expected), _utf8(password)):
            return self._principal(user, now)
        # An unknown name, and a wrong password that is kept in clear, take as long as a wrong one that is hashed.
        await self._passwords.pretend(password)
        return None

    async def authenticate_external(self, certificate_der: bytes, now: datetime) -> Principal | None:
        """Log in by the certificate that the TLS layer has verified (authentication 4.3).

        Returns:
            `None` if there is no user of the complete DN or of the CN in the first RDN.

        Raises:
            Unavailable: The database does not answer.
        """
        try:
            subject = parse_certificate(certificate_der).subject
        except BadRequest:
            return None
        for name in (subject.text, subject.first_rdn_common_name):
            user = await self._find(Mechanism.EXTERNAL, name) if name else None
            if user is not None:
                return self._principal(user, now)
        return None

    async def is_current(self, principal: Principal) -> bool:
        """Tell whether a login would still be decided as it was: same identity, password and rights.

        Only needed where logins have no end (authentication 5.1).

        Raises:
            Unavailable: The database does not answer.
        """
        if principal.mechanism is None:
            return True
        user = await self._find(principal.mechanism, principal.name)
        return user is not None and user.stamp == principal.stamp

    async def _find(self, mechanism: Mechanism, name: str) -> User | None:
        permissions = self._permissions
        user = permissions.users.get(name) if permissions is not None else None
        if user is not None and user.mechanism is mechanism:
            return user

        async def find(transaction: Transaction) -> Identity | None:
            return await transaction.find_identity(name)

        identity = await self._store.read(find)
        if identity is None or identity.mechanism != mechanism:
            return None
        return User(
            name=identity.name,
            mechanism=mechanism,
            password_hash=identity.password_hash,
            authorities=Authorities.from_claims(identity.authorities),
        )

    def _principal(self, user: User, now: datetime) -> Principal:
        return Principal(
            name=user.name,
            authorities=user.authorities,
            expires=now + self._lifetime if self._lifetime else None,
            mechanism=user.mechanism,
            stamp=user.stamp,
        )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# Identities of the database

_MAX_NAME_SIZE = 256


async def add_identity(
    store: Store,
    passwords: PasswordHasher,
    *,
    principal: Principal,
    name: str,
    mechanism: Mechanism,
    password: str | None,
    authorities: Mapping[str, str],
    now: datetime,
) -> None:
    """Add an identity to the database; it may log in at once.

    Args:
        name: SASL user name; for EXTERNAL the certificate's CN or its complete DN.
        password: `None` for EXTERNAL, and only then.
        authorities: Claims, such as one of `ROLES`.

    Raises:
        BadRequest: The name or the password cannot be used.
        Conflict: There is an identity of that name.
        Unavailable: The database cannot be written.
    """
    _check_name(name)
    if (password is None) != (mechanism is Mechanism.EXTERNAL):
        raise BadRequest("an identity has a password exactly if its mechanism is PLAIN")
    identity = Identity(
        name=name,
        mechanism=mechanism.value,
        password_hash=None if password is None else await _hash(passwords, password),
        authorities=dict(authorities),
        created=now,
    )

    async def add(transaction: Transaction) -> None:
        if await transaction.find_identity(name) is not None:
            raise Conflict(f"there is an identity {name} already")
        await transaction.put_identity(identity)
        await transaction.record(_change(principal, name, before=None, after=_version(identity)))

    await store.write(add)


async def change_identity_password(
    store: Store, passwords: PasswordHasher, *, principal: Principal, name: str, password: str
) -> None:
    """Give an identity of mechanism PLAIN another password; the old one opens nothing from now on.

    Raises:
        BadRequest: The password cannot be used, or the identity logs in by certificate.
        NotFound: There is no such identity.
        Unavailable: The database cannot be written.
    """
    password_hash = await _hash(passwords, password)

    async def change(transaction: Transaction) -> None:
        old = await transaction.find_identity(name)
        if old is None:
            raise NotFound(f"there is no identity {name}")
        if old.mechanism != Mechanism.PLAIN:
            raise BadRequest(f"{name} logs in by certificate and has no password")
        new = Identity(
            name=name,
            mechanism=old.mechanism,
            password_hash=password_hash,
            authorities=old.authorities,
            created=old.created,
        )
        await transaction.put_identity(new)
        await transaction.record(_change(principal, name, before=_version(old), after=_version(new)))

    await store.write(change)


async def remove_identity(store: Store, *, principal: Principal, name: str) -> None:
    """Remove an identity; its connections end with the lifetime of their logins at the latest.

    Raises:
        NotFound: There is no such identity.
        Unavailable: The database cannot be written.
    """

    async def remove(transaction: Transaction) -> None:
        old = await transaction.find_identity(name)
        if old is None:
            raise NotFound(f"there is no identity {name}")
        await transaction.delete_identity(name)
        await transaction.record(_change(principal, name, before=_version(old), after=None))

    await store.write(remove)


def _check_name(name: str) -> None:
    if not name or "\0" in name or not name.isprintable() or len(name) > _MAX_NAME_SIZE:
        raise BadRequest(f"the name of an identity has 1 to {_MAX_NAME_SIZE} printable characters")


async def _hash(passwords: PasswordHasher, password: str) -> str:
    # SASL PLAIN separates its fields by NUL, so such a password could never be presented (amqp-apis 1.3).
    if not password or "\0" in password:
        raise BadRequest("a password must not be empty nor contain NUL")
    return await passwords.hash(password)


def _version(identity: Identity) -> str:
    """A fingerprint; salts make hashes, and so this, tell nothing about passwords."""
    parts = [identity.name, identity.mechanism, identity.password_hash, sorted(identity.authorities.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _change(principal: Principal, name: str, *, before: str | None, after: str | None) -> Change:
    return Change(
        principal=principal.name,
        kind=ChangeKind.IDENTITY,
        tenant_id=None,
        resource_id=name,
        before=before,
        after=after,
    )


# First start

FIRST_IDENTITY = "adapter"
CREDENTIALS_FILE = "adapter.credentials"


async def ensure_first_identity(store: Store, passwords: PasswordHasher, directory: Path, now: datetime) -> Path | None:
    """Make an identity for adapters where there never was one (authentication 5.1); one that was removed stays removed.

    A file that is there already is never overwritten: its login becomes the identity. So an interrupted start goes on
    where it was, adapters stay logged in when a database is made anew, and a second database in the directory does not
    cost the first its only copy of a password. Starts beside each other take turns.

    Args:
        directory: Where `adapter.credentials` goes, in the form Hono adapters read; it exists.

    Returns:
        The file with user name and password; `None` if there is or was an identity.

    Raises:
        OSError: The file cannot be written, or is there and holds no login.
        Unavailable: The database does not answer.
    """
    turn = os.open(directory, os.O_RDONLY)
    try:
        await asyncio.to_thread(fcntl.flock, turn, fcntl.LOCK_EX)
        if await store.read(lambda transaction: transaction.has_had_identities()):
            return None
        path = directory / CREDENTIALS_FILE
        is_new = not path.exists()
        name, password = await asyncio.to_thread(_read_or_make_login, path)
        try:
            await add_identity(
                store,
                passwords,
                principal=LOCAL_OPERATOR,
                name=name,
                mechanism=Mechanism.PLAIN,
                password=password,
                authorities=ADAPTER_AUTHORITIES,
                now=now,
            )
        except BadRequest as error:
            raise _no_login(path) from error
        except Conflict:
            # A start on another machine was faster: its file has the password.
            if is_new:
                path.unlink()
            return None
        return path
    finally:
        os.close(turn)


def _read_or_make_login(path: Path) -> tuple[str, str]:
    """Return the name and password in a file; make both if there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        name, password = FIRST_IDENTITY, secrets.token_urlsafe(24)
        _write_private(path, f"username={name}\npassword={password}\n")
        return name, password
    except UnicodeDecodeError as error:
        raise _no_login(path) from error
    entries = {key.strip(): value.strip() for key, found, value in (line.partition("=") for line in lines) if found}
    if not entries.get("username") or not entries.get("password"):
        raise _no_login(path)
    return entries["username"], entries["password"]


def _no_login(path: Path) -> OSError:
    return FileExistsError(errno.EEXIST, "there is a file that holds no username and password; move it away", str(path))


def _write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
