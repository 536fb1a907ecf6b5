"""Settings: TOML files, environment and `--set` become one frozen `Config`, checked once and whole.

Each setting is a field with its default, its kind (which forms are accepted) and a line of documentation; everything
else here walks over those fields. All problems are collected and told together, each with key, origin, offending value
and expected form (configuration 1.2). Nothing reads the environment later.
"""

# ruff: noqa: RUF009 - `_setting` returns a dataclass field, which the rule cannot see

import base64
import dataclasses
import difflib
import ipaddress
import json
import logging
import math
import os
import re
import ssl
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import platformdirs

__all__ = [
    "DATABASE_URLS",
    "AmqpConfig",
    "AmqpTlsConfig",
    "Config",
    "ConfigError",
    "HttpConfig",
    "ListenerContext",
    "Loaded",
    "Problem",
    "ProvisioningHookConfig",
    "Setting",
    "TlsConfig",
    "TlsError",
    "database_url",
    "default_config_file",
    "hook_tls_context",
    "is_loopback",
    "load",
    "load_key_pair",
    "read_hook_secret",
    "settings",
    "tls_context",
    "usable_processors",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")
Auto = Literal["auto"]

PREFIX = "KAMADO_"
CONFIG_VARIABLE = "KAMADO_CONFIG"
OTHER_VARIABLES = frozenset(
    {CONFIG_VARIABLE}
    | {f"KAMADO_ASK_{name}" for name in ("URL", "USERNAME", "PASSWORD")}
    | {f"KAMADO_COPY_{name}" for name in ("FROM", "TO")}
    | {f"KAMADO_{name}" for name in ("URL", "USERNAME", "PASSWORD", "PROFILE", "PROFILES")}
)
"""Variables of the command itself, which are no settings."""


# Kinds: what a value may look like


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[T]):
    """The accepted forms of a setting.

    Args:
        expected: The forms in words, for problems and documentation.
        parse: From a TOML value, or from the text of a variable or `--set`; raises `ValueError`. The directory is
            what a relative path starts from.
        show: The TOML text of a value, for `check-config --print`.
    """

    expected: str
    parse: Callable[[object, Path], T]
    show: Callable[[T], str] = lambda value: json.dumps(value, ensure_ascii=False)


_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|m|h)?")
_ISO_DURATION = re.compile(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?")
_SIZE = re.compile(r"(\d+) ?(B|KiB|MiB)?")


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    raise ValueError


def _whole(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError


def _seconds(value: object) -> float:
    """Read `500ms`, `30s`, `5m`, `1h`, `PT5M` or a number of seconds (configuration 1.3)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    if isinstance(value, str):
        if match := _DURATION.fullmatch(value):
            return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2] or "s"]
        if (match := _ISO_DURATION.fullmatch(value)) and any(match.groups()):
            return float(match[1] or 0) * 3600 + float(match[2] or 0) * 60 + float(match[3] or 0)
    raise ValueError


def _bytes(value: object) -> int:
    """Read `64KiB`, `1MiB` or a number of bytes (configuration 1.3)."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(match[1]) * {"B": 1, "KiB": 1024, "MiB": 1024 * 1024}[match[2] or "B"]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError


def _text(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable():
        return value
    raise ValueError


def _texts(value: object) -> tuple[str, ...]:
    """Read a list: a TOML array, or text that is a JSON array or comma separated."""
    if isinstance(value, str):
        value = json.loads(value) if value.startswith("[") else [part.strip() for part in value.split(",") if part]
    if isinstance(value, list):
        return tuple(_text(entry) for entry in value)
    raise ValueError


def _ranged(number: T, check: Callable[[T], bool]) -> T:
    if not check(number):
        raise ValueError
    return number


def _show_seconds(value: float) -> str:
    return json.dumps(f"{value:.12g}s" if value >= 1 or value == 0 else f"{value * 1000:.12g}ms")


def _show_size(value: int) -> str:
    for unit, size in (("MiB", 1024 * 1024), ("KiB", 1024)):
        if value and value % size == 0:
            return json.dumps(f"{value // size}{unit}")
    return str(value)


def _boolean_kind() -> Kind[bool]:
    return Kind(expected="true or false", parse=lambda value, _: _boolean(value))


def _switch_kind() -> Kind[bool | Auto]:
    return Kind(
        expected='true, false or "auto"',
        parse=lambda value, _: "auto" if value == "auto" else _boolean(value),
    )


def _whole_kind(minimum: int, maximum: int | None = None, *, unless: int | None = None) -> Kind[int]:
    """Whole numbers of a range; `unless` is one that is refused all the same."""
    expected = f"a whole number of at least {minimum}" if maximum is None else f"a whole number, {minimum} to {maximum}"
    if unless is not None:
        expected += f", not {unless}"

    def check(value: int) -> bool:
        return minimum <= value and (maximum is None or value <= maximum) and value != unless

    return Kind(expected=expected, parse=lambda value, _: _ranged(_whole(value), check))


def _workers_kind() -> Kind[int | Auto]:
    return Kind(
        expected='a whole number, 1 to 64, or "auto"',
        parse=lambda value, _: "auto" if value == "auto" else _ranged(_whole(value), lambda number: 1 <= number <= 64),
    )


def _duration_kind(minimum: float = 0) -> Kind[float]:
    expected = "a duration such as 500ms, 30s, 5m or PT5M; a bare number is seconds"
    if minimum:
        expected += f"; at least {minimum:g}s"
    return Kind(
        expected=expected,
        parse=lambda value, _: _ranged(_seconds(value), lambda seconds: seconds >= minimum),
        show=_show_seconds,
    )


def _size_kind(minimum: int, maximum: int = 2**31 - 1) -> Kind[int]:
    return Kind(
        expected=f"a size such as 512, 64KiB or 1MiB; at least {minimum} bytes",
        parse=lambda value, _: _ranged(_bytes(value), lambda size: minimum <= size <= maximum),
        show=_show_size,
    )


def _text_kind(expected: str = "text") -> Kind[str]:
    return Kind(expected=expected, parse=lambda value, _: _text(value))


def _realm_kind() -> Kind[str]:
    return Kind(
        expected="printable ASCII characters, neither quotes nor backslashes",
        parse=lambda value, _: _ranged(_text(value), lambda text: text.isascii() and not set(text) & set('"\\')),
    )


def _choice_kind(*choices: str) -> Kind[str]:
    return Kind(
        expected=" or ".join(f'"{choice}"' for choice in choices),
        parse=lambda value, _: _ranged(_text(value), lambda text: text in choices),
    )


def _maybe_choice_kind(*choices: str) -> Kind[str | None]:
    return Kind(
        expected=" or ".join(f'"{choice}"' for choice in choices),
        parse=lambda value, _: _ranged(_text(value), lambda text: text in choices),
    )


def _list_kind(expected: str, check: Callable[[tuple[str, ...]], bool] = lambda _: True) -> Kind[tuple[str, ...]]:
    return Kind(
        expected=expected + "; as a list, or comma separated",
        parse=lambda value, _: _ranged(_texts(value), check),
    )


def _path(value: object, directory: Path) -> Path:
    text = _text(value)
    # Hono's settings name files by URI, too (authentication 4.1).
    path = unquote(urlsplit(text).path) if text.startswith("file:") else text
    # normpath, not resolve: secrets mounted by Kubernetes are symbolic links that are replaced while we run.
    return Path(os.path.normpath(directory / Path(path).expanduser()))


def _file_kind() -> Kind[Path | None]:
    return Kind(expected="the path of a file that can be read", parse=_path, show=lambda path: json.dumps(str(path)))


def _directory_kind() -> Kind[Path | None]:
    return Kind(expected="the path of a directory", parse=_path, show=lambda path: json.dumps(str(path)))


def _files_kind() -> Kind[tuple[Path, ...]]:
    return Kind(
        expected="paths of files that can be read; as a list, or comma separated",
        parse=lambda value, directory: tuple(_path(text, directory) for text in _texts(value)),
        show=lambda paths: json.dumps([str(path) for path in paths]),
    )


def _pattern(value: object) -> re.Pattern[str]:
    try:
        return re.compile(_text(value), re.ASCII)
    except re.error as error:
        raise ValueError(str(error)) from error


def _pattern_kind() -> Kind[re.Pattern[str]]:
    return Kind(
        expected="a regular expression, matched against the whole identifier",
        parse=lambda value, _: _pattern(value),
        show=lambda pattern: json.dumps(pattern.pattern),
    )


def _host(value: object) -> str:
    text = _text(value)
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", text) or re.fullmatch(r"[\d.]+", text):
            raise
    return text


def _web_url(value: object) -> str:
    text = _text(value)
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None or "#" in text:
        raise ValueError
    _host(parts.hostname)
    if " " in text or not text.isascii() or parts.port == 0:
        raise ValueError
    return text


def _web_url_kind() -> Kind[str | None]:
    return Kind(
        expected="http:// or https://, a host and a path, without user and password; such as https://erp.example/devices",
        parse=lambda value, _: _web_url(value),
    )


def _host_kind() -> Kind[str]:
    return Kind(expected="an IP address or a host name", parse=lambda value, _: _host(value))


def _page(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", text) or text in {"/started", "/liveness", "/readiness"}:
        raise ValueError
    return text


def _levels(value: object) -> dict[str, str]:
    if isinstance(value, str):
        value = dict(part.split("=", 1) for part in _texts(value))
    if isinstance(value, dict) and all(level in LEVELS for level in value.values()):
        return {_text(name): str(level) for name, level in value.items()}
    raise ValueError


_POSTGRESQL = ("postgresql://", "postgres://")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
DATABASE_URLS = (
    "sqlite:/// and the path of a file, such as sqlite:////var/lib/kamado/kamado.db, or "
    "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
)


def database_url(value: object, directory: Path) -> str:
    """Check the URL of a database, and make the path in it absolute.

    Args:
        value: `sqlite:////var/lib/x.db` is absolute, `sqlite:///x.db` relative.
        directory: What a relative path starts from.

    Raises:
        ValueError: It is none of `DATABASE_URLS`.
    """
    text = _text(value)
    if text.startswith(_POSTGRESQL):
        return _postgresql_url(text)
    name = text.removeprefix("sqlite:///")
    if name == text or not name or name.endswith("/") or name == ":memory:" or re.search("[?#]", name):
        raise ValueError
    return f"sqlite:///{_path(name, directory)}"


def _postgresql_url(value: object) -> str:
    text = _text(value)
    parts = urlsplit(text)
    # Several hosts, each perhaps with a port, are more than the standard library reads.
    hosts = parts.netloc.rpartition("@")[2].split(",")
    if not text.startswith(_POSTGRESQL) or not parts.path.strip("/") or "@" in parts.path or parts.fragment:
        raise ValueError
    # A directory of sockets is no host: postgresql:///registry?host=/run/postgresql.
    if hosts == [""] and "host=" in parts.query:
        return text
    for host in hosts:
        named = _HOST_AND_PORT.fullmatch(host)
        if named is None or int(named[2] or 0) > 65535:
            raise ValueError
    return text


LEVELS = ("debug", "info", "warning", "error")


# Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting, as documentation and tools see it."""

    key: str
    kind: Kind[Any]
    doc: str
    secret: bool
    default: object

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.key.upper().replace(".", "__")


def _setting(default: T, kind: Kind[T], doc: str, *, secret: bool = False) -> T:
    return field(default=default, metadata={"kind": kind, "doc": doc, "secret": secret})


def _dynamic(factory: Callable[[], T], kind: Kind[T], doc: str, *, secret: bool = False) -> T:
    return field(default_factory=factory, metadata={"kind": kind, "doc": doc, "secret": secret})


@dataclass(frozen=True, slots=True, kw_only=True)
class InsecureConfig:
    """A plain listener."""

    enabled: bool | Auto = _setting(
        "auto", _switch_kind(), "Listen without TLS. auto: on a loopback address while no key material is set."
    )
    bind: str = _setting("127.0.0.1", _host_kind(), "Address of the plain listener.")
    port: int = _setting(0, _whole_kind(0, 65535), "Port of the plain listener; 0 lets the system choose.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureConfig:
    """A TLS listener."""

    enabled: bool | Auto = _setting("auto", _switch_kind(), "Listen with TLS. auto: on when key material is set.")
    bind: str = _setting("127.0.0.1", _host_kind(), "Address of the TLS listener.")
    port: int = _setting(0, _whole_kind(0, 65535), "Port of the TLS listener; 0 lets the system choose.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Key material of a TLS listener."""

    cert_file: Path | None = _setting(None, _file_kind(), "Certificate, then the chain up to the CA (PEM).")
    key_file: Path | None = _setting(None, _file_kind(), "Private key of the certificate (PEM, without a pass phrase).")
    min_version: str = _setting("1.2", _choice_kind("1.2", "1.3"), "Lowest version of TLS.")
    ciphers: tuple[str, ...] = _setting(
        (),
        _list_kind("OpenSSL names of ciphers for TLS 1.2"),
        "Ciphers for TLS 1.2; empty: forward secret AEAD ciphers.",
    )

    @property
    def has_key_material(self) -> bool:
        """Whether there is anything that a TLS listener could use."""
        return self.cert_file is not None or self.key_file is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class AmqpTlsConfig(TlsConfig):
    """Key material of the AMQP listener, and whose client certificates count for SASL EXTERNAL."""

    client_ca_file: Path | None = _setting(
        None, _file_kind(), "CAs whose client certificates are accepted for SASL EXTERNAL (PEM)."
    )
    client_auth: str | None = _setting(
        None,
        _maybe_choice_kind("none", "optional", "required"),
        "Whether clients present a certificate. Unset: optional with a client CA, else none.",
    )

    @property
    def effective_client_auth(self) -> str:
        """Whether clients present a certificate, worked out."""
        return self.client_auth or ("optional" if self.client_ca_file else "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenersConfig:
    """A plain listener and one with TLS; which of them are on."""

    insecure: InsecureConfig
    secure: SecureConfig
    tls: TlsConfig

    @property
    def secure_enabled(self) -> bool:
        """Whether the TLS listener is on."""
        return self.secure.enabled is True or (self.secure.enabled == "auto" and self.tls.has_key_material)

    @property
    def insecure_enabled(self) -> bool:
        """Whether the plain listener is on."""
        if self.insecure.enabled == "auto":
            return not self.tls.has_key_material and is_loopback(self.insecure.bind)
        return self.insecure.enabled


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAuthConfig:
    """Who may use the management API."""

    allow_anonymous: bool = _setting(
        False,
        _boolean_kind(),
        "While there is no operator account, let everybody in who can reach the API, on any address.",
    )
    realm: str = _setting(
        "Hono", _realm_kind(), "What a client is told it logs in to (`WWW-Authenticate: Basic realm`)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig(ListenersConfig):
    """The management API for operators."""

    insecure: InsecureConfig = field(default_factory=lambda: InsecureConfig(port=8080))
    secure: SecureConfig = field(default_factory=lambda: SecureConfig(port=8443))
    tls: TlsConfig = field(default_factory=TlsConfig)
    auth: HttpAuthConfig = field(default_factory=HttpAuthConfig)
    max_body_size: int = _setting(
        64 * 1024, _size_kind(129), "Longest request body; a longer one is answered with 413."
    )
    idle_timeout: float = _setting(
        60.0, _duration_kind(), "A connection without a request is closed after this time; 0: never."
    )
    cors_allowed_origins: tuple[str, ...] = _setting(
        (), _list_kind("origins such as https://ui.example.com, or *"), "Web origins whose pages may use the API."
    )

    @property
    def is_local(self) -> bool:
        """Whether the API can be reached from this machine only."""
        return not (self.insecure_enabled and not is_loopback(self.insecure.bind)) and not (
            self.secure_enabled and not is_loopback(self.secure.bind)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AmqpConfig(ListenersConfig):
    """The APIs for protocol adapters."""

    insecure: InsecureConfig = field(default_factory=lambda: InsecureConfig(port=5672))
    secure: SecureConfig = field(default_factory=lambda: SecureConfig(port=5671))
    tls: AmqpTlsConfig = field(default_factory=AmqpTlsConfig)
    link_credit: int = _setting(100, _whole_kind(1, 100_000), "Requests that a client may have under way on one link.")
    max_frame_size: int = _setting(32 * 1024, _size_kind(512, 2**24), "Largest frame that is accepted.")
    max_message_size: int = _setting(256 * 1024, _size_kind(512, 2**26), "Largest request message that is accepted.")
    idle_timeout: float = _setting(
        20.0, _duration_kind(1), "A silent connection is closed after this time; half of it is advertised."
    )
    handshake_timeout: float = _setting(
        10.0, _duration_kind(0.1), "Time for TLS and SASL, and again from there to the open frame."
    )
    max_connections: int = _setting(2000, _whole_kind(1), "Connections at a time; further ones are closed at once.")
    max_links_per_connection: int = _setting(
        65536, _whole_kind(1), "Links of one connection; Hono 1.2 adapters open two for each tenant and API."
    )
    sasl_mechanisms: tuple[str, ...] = _setting(
        ("EXTERNAL", "PLAIN"),
        _list_kind(
            "EXTERNAL and PLAIN, or one of them",
            lambda names: bool(names) and set(names) <= {"EXTERNAL", "PLAIN"} and len(set(names)) == len(names),
        ),
        "SASL mechanisms in the order they are offered; EXTERNAL only to clients with a certificate.",
    )
    container_name: str = _setting("hono-registry", _text_kind(), "Beginning of the container id.")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdsConfig:
    """What identifiers look like."""

    tenant_pattern: re.Pattern[str] = _setting(re.compile(r"[a-zA-Z0-9_.-]+", re.ASCII), _pattern_kind(), "Tenant ids.")
    device_pattern: re.Pattern[str] = _setting(
        re.compile(r"[a-zA-Z0-9_.:=-]+", re.ASCII), _pattern_kind(), "Device ids."
    )
    username_pattern: re.Pattern[str] = _setting(
        re.compile(r"[a-zA-Z0-9_=.-]+", re.ASCII), _pattern_kind(), "Auth-ids of hashed-password credentials."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantsConfig:
    """Tenants."""

    cache_max_age: int = _setting(
        180, _whole_kind(0), "Seconds that adapters may keep a tenant; 0: they may not (no-cache)."
    )
    modification_enabled: bool = _setting(
        True, _boolean_kind(), "Let tenants be changed and deleted; false: only created (403 otherwise)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicesConfig:
    """Devices."""

    cache_max_age: int = _setting(
        300, _whole_kind(0), "Seconds that adapters may keep a registration assertion; 0: they may not (no-cache)."
    )
    max_per_tenant: int = _setting(
        -1,
        _whole_kind(-1, unless=0),
        "Devices that a tenant may have unless it has a limit of its own; -1: any number.",
    )
    modification_enabled: bool = _setting(
        True, _boolean_kind(), "Let devices be changed and deleted; false: only created (403 otherwise)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialsConfig:
    """Credentials."""

    cache_max_age: int = _setting(
        180,
        _whole_kind(0),
        "Seconds that adapters may keep password and X.509 credentials; 0: they may not (no-cache).",
    )
    max_per_device: int = _setting(
        -1,
        _whole_kind(-1, unless=0),
        "Credentials that a device may have unless its tenant has a limit; -1: any number.",
    )
    bcrypt_cost: int = _setting(10, _whole_kind(4, 31), "Cost of the bcrypt hashes that are made from plain passwords.")
    bcrypt_max_cost: int = _setting(12, _whole_kind(4, 31), "Highest cost of bcrypt hashes that operators may send.")
    allowed_hash_functions: tuple[str, ...] = _setting(
        (),
        _list_kind("some of bcrypt, sha-256 and sha-512", lambda names: set(names) <= {"bcrypt", "sha-256", "sha-512"}),
        "Hash functions of hashes that operators may send; empty: each of them.",
    )
    hash_workers: int = _dynamic(
        lambda: min(os.cpu_count() or 1, 4),
        _whole_kind(1, 64),
        "Threads that hash passwords. Default: one per processor, at most 4.",
    )
    hash_queue: int = _setting(
        256, _whole_kind(1), "Passwords that may wait to be hashed or verified; beyond that the answer is 503."
    )
    modification_enabled: bool = _setting(
        True, _boolean_kind(), "Let the credentials of devices be set; false: they stay as they are (403)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagementConfig:
    """What holds for the whole management API."""

    read_only: bool = _setting(
        False, _boolean_kind(), "Answer every change with 403, creations included; first contacts go on."
    )
    referential_integrity: str = _setting(
        "strict",
        _choice_kind("strict", "lenient"),
        "strict: devices need a tenant, credentials a device, as in Hono 2.7. lenient: neither, as in Hono 1.2.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Searching tenants and devices."""

    page_offset_unit: str = _setting(
        "items", _choice_kind("items", "pages"), "What `pageOffset` counts; pages: as in Hono 2.7 with MongoDB."
    )
    empty_result: str = _setting(
        "404",
        _choice_kind("404", "200"),
        "Status of a search without a match: 404 as in Hono 2.7, or 200 with an empty result.",
    )
    timeout: float = _setting(
        10.0, _duration_kind(0.1), "A search that takes longer is given up and answered with 503."
    )
    workers: int = _setting(2, _whole_kind(1, 64), "Searches that run side by side; up to 64 may wait or run.")
    expensive_rows: int = _setting(
        100_000, _whole_kind(1), "A search that looks at so many rows one by one is logged and counted as expensive."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may use the adapters' APIs."""

    permissions_file: Path | None = _setting(
        None, _file_kind(), "Identities and roles in the JSON form of Hono's Auth Server; read again on SIGHUP."
    )
    first_login_dir: Path | None = _setting(
        None,
        _directory_kind(),
        "Where the first start writes `adapter.credentials`. Unset: beside the SQLite file; with PostgreSQL the user's "
        "data directory.",
    )
    lifetime: float = _setting(
        600.0, _duration_kind(), "A login ends after this time and the adapter logs in again; 0: never."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisioningHookConfig:
    """An HTTP service that is asked before a device is created at its first contact."""

    url: str | None = _setting(None, _web_url_kind(), "Where to ask by `POST`. Unset: nobody is asked.")
    timeout: float = _setting(
        0.1,
        _duration_kind(0.001),
        "Time for an answer, the connection included; then the adapter gets 503. Adapters wait 200 ms by default.",
    )
    secret_file: Path | None = _setting(
        None, _file_kind(), "Shared secret of the signature: `whsec_` and 24 to 64 bytes in Base64. Unset: not signed."
    )
    ca_file: Path | None = _setting(
        None, _file_kind(), "CAs that may vouch for the service (PEM). Unset: those that this machine trusts."
    )
    client_cert_file: Path | None = _setting(
        None, _file_kind(), "Certificate that the registry shows to the service, then its chain (PEM)."
    )
    client_key_file: Path | None = _setting(
        None, _file_kind(), "Private key of that certificate (PEM, without a pass phrase)."
    )
    max_concurrent: int = _setting(100, _whole_kind(1, 1000), "Questions at a time; beyond that the adapter gets 503.")

    @property
    def is_https(self) -> bool:
        """Whether the service is asked over TLS."""
        return self.url is not None and urlsplit(self.url).scheme == "https"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisioningConfig:
    """Automatic provisioning of devices by certificate and through gateways."""

    verify_signature: bool = _setting(
        True,
        _boolean_kind(),
        "Check the signature of a device's certificate. false: trust the adapters to have done it, as Hono does.",
    )
    hook: ProvisioningHookConfig = field(default_factory=ProvisioningHookConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConnectionConfig:
    """The Device Connection API, for adapters of Hono 1.2."""

    enabled: bool = _setting(True, _boolean_kind(), "Offer the Device Connection API to adapters.")
    max_devices_per_tenant: int = _setting(
        1_000_000, _whole_kind(-1, unless=0), "Devices of a tenant that something is kept for; -1: any number."
    )
    refresh_interval: float = _setting(
        60.0,
        _duration_kind(),
        "A last known gateway that did not change is written again only after this time; 0: each time it is told.",
    )
    gateway_lifetime: float = _setting(
        672 * 3600.0,
        _duration_kind(1),
        "A last known gateway that nobody tells again is forgotten after this time (28 days).",
    )


def usable_processors(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Count the processors that this process may use: by its affinity, and by the limit of its control groups (v2).

    Args:
        groups: Where the control groups are mounted.
        own: The file that names those of this process.
    """
    count = len(os.sched_getaffinity(0))
    try:
        name = next(line[4:] for line in own.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return count
    while True:
        try:
            quota, period = (groups / name / "cpu.max").read_text().split()
            if quota != "max":
                count = min(count, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            # The uppermost group has no limit, and what this process sees of the others may be nothing.
            pass
        if not name:
            return max(1, count)
        name = name.rpartition("/")[0]


def _data_directory() -> Path:
    return platformdirs.user_data_path("kamado", appauthor=False)


def _default_database() -> str:
    return f"sqlite:///{_data_directory() / 'kamado.db'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """The database."""

    url: str = _dynamic(
        _default_database,
        Kind(expected=DATABASE_URLS, parse=database_url),
        "The database: a SQLite file, or PostgreSQL. Default: `kamado.db` in the user's data directory; the path is in "
        "the start-up lines.",
        secret=True,
    )
    read_url: str | None = _setting(
        None,
        Kind(
            expected="postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
            parse=lambda value, _: None if value in {None, ""} else _postgresql_url(value),
        ),
        "PostgreSQL only: a replica for the look-ups of adapters. Unset: they go to `storage.url`.",
        secret=True,
    )
    pool_min: int = _setting(3, _whole_kind(1, 1000), "PostgreSQL only: connections that a process keeps open.")
    pool_max: int = _setting(15, _whole_kind(11, 1000), "PostgreSQL only: connections of a process at most.")
    acquire_timeout: float = _setting(2.0, _duration_kind(0.1), "PostgreSQL only: time for getting a connection.")
    statement_timeout: float = _setting(
        1.0, _duration_kind(0.1), "PostgreSQL only: time for one statement that is no search."
    )
    auto_migrate: bool = _setting(
        True,
        _boolean_kind(),
        "Let `serve` create the schema or bring it up to date; false: leave that to `kamado migrate`.",
    )

    @property
    def file(self) -> Path | None:
        """The SQLite file; `None` for PostgreSQL."""
        return None if self.url.startswith(_POSTGRESQL) else Path(self.url.removeprefix("sqlite:///"))


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """The listener of the health checks (plain HTTP)."""

    bind: str = _setting("127.0.0.1", _host_kind(), "Address of the health listener.")
    port: int = _setting(8088, _whole_kind(0, 65535), "Port of the health listener; 0 lets the system choose.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Metrics for Prometheus, on the health listener."""

    path: str = _setting(
        "/prometheus",
        Kind(expected="a path such as /prometheus, none of the health checks'", parse=lambda value, _: _page(value)),
        "Where the metrics are on the health listener, beside `/metrics`.",
    )
    common_labels: bool = _setting(
        True, _boolean_kind(), "Put `host`, `component_type` and `component_name` on every series, as Hono does."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """The log, on standard output."""

    format: str = _setting(
        "auto", _choice_kind("auto", "text", "json"), "One event per line. auto: text on a terminal, else JSON."
    )
    level: str = _setting("info", _choice_kind(*LEVELS), "Lowest level that is logged.")
    levels: dict[str, str] = _dynamic(
        dict,
        Kind(
            expected=f"a table of logger names to levels ({', '.join(LEVELS)}); as text: name=level, comma separated",
            parse=lambda value, _: _levels(value),
            show=lambda table: (
                "{ " + ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items()) + " }"
                if table
                else "{}"
            ),
        ),
        "Levels of single loggers, such as `kamado.amqp`.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The processes."""

    workers: int | Auto = _setting(
        1,
        _workers_kind(),
        "Processes that serve. 1: no more than this one. auto: one for each processor that may be used.",
    )

    @property
    def effective_workers(self) -> int:
        """How many processes serve, worked out."""
        return usable_processors() if self.workers == "auto" else self.workers


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupConfig:
    """The start."""

    deadline: float = _setting(
        60.0, _duration_kind(1), "The start is given up when the database cannot be opened for this time."
    )
    load: tuple[Path, ...] = _setting(
        (), _files_kind(), "Data files (see `kamado load`) that are loaded while the database holds no tenant."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownConfig:
    """The stop."""

    drain_delay: float = _setting(
        5.0, _duration_kind(), "After SIGTERM, go on serving for this time while /readiness says 503."
    )
    grace: float = _setting(15.0, _duration_kind(), "Time for running requests to end.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings."""

    http: HttpConfig = field(default_factory=HttpConfig)
    amqp: AmqpConfig = field(default_factory=AmqpConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    ids: IdsConfig = field(default_factory=IdsConfig)
    tenants: TenantsConfig = field(default_factory=TenantsConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    credentials: CredentialsConfig = field(default_factory=CredentialsConfig)
    management: ManagementConfig = field(default_factory=ManagementConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    provisioning: ProvisioningConfig = field(default_factory=ProvisioningConfig)
    device_connection: DeviceConnectionConfig = field(default_factory=DeviceConnectionConfig)
    log: LogConfig = field(default_factory=LogConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    startup: StartupConfig = field(default_factory=StartupConfig)
    shutdown: ShutdownConfig = field(default_factory=ShutdownConfig)

    @property
    def login_dir(self) -> Path:
        """Where the login that the first start makes is written."""
        if self.auth.first_login_dir is not None:
            return self.auth.first_login_dir
        return _data_directory() if self.storage.file is None else self.storage.file.parent


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[Setting, object]]:
    for one in dataclasses.fields(section):
        value = getattr(section, one.name)
        if "kind" in one.metadata:
            yield (
                Setting(
                    key=prefix + one.name,
                    kind=one.metadata["kind"],
                    doc=one.metadata["doc"],
                    secret=one.metadata["secret"],
                    default=value,
                ),
                value,
            )
        else:
            yield from _walk(value, f"{prefix}{one.name}.")


def settings() -> dict[str, Setting]:
    """Return all settings by key, in the order of the documentation."""
    return {setting.key: setting for setting, _ in _walk(Config())}


# Problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with the configuration."""

    key: str
    origin: str
    expected: str
    """What would be right, or what is wrong."""
    value: str | None = None
    """The offending value; `None` for secrets and where there is none."""

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {self.value}"
        return f"{self.key}{shown} ({self.origin}): {self.expected}"


class ConfigError(Exception):
    """The configuration cannot be used; all problems that were found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, where each value came from, and what deserves a warning."""

    config: Config
    origins: dict[str, str]
    """Key -> origin, for every setting that is not at its default."""
    warnings: tuple[str, ...] = ()

    def effective(self) -> Iterator[tuple[Setting, str, str]]:
        """Yield each setting with the TOML text of its value (secrets as `***`) and its origin."""
        for setting, value in _walk(self.config):
            origin = self.origins.get(setting.key, "default")
            if value is None:
                shown = ""
            elif setting.secret and not _is_harmless(str(value)):
                shown = '"***"'
            else:
                shown = setting.kind.show(value)
            yield setting, shown, origin


def _is_harmless(url: str) -> bool:
    return url.startswith("sqlite:")


# Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    value: object
    origin: str
    directory: Path


def default_config_file(environment: Mapping[str, str]) -> Path | None:
    """Return the file that is read when `--config` is not given (configuration 1.2, source 4)."""
    if named := environment.get(CONFIG_VARIABLE):
        return Path(named)
    usual = Path("/etc/kamado/config.toml")
    return usual if usual.exists() else None


def _guess(name: str, names: Sequence[str]) -> str:
    """Suggest what is near; that all variables begin with the same word makes none of them near."""
    by_rest = {known.removeprefix(PREFIX): known for known in names}
    levels = re.split(r"\.|__", name.removeprefix(PREFIX))
    for rest, known in by_rest.items():
        # A level was left out: http.port for http.insecure.port.
        known_levels = re.split(r"\.|__", rest)
        if len(known_levels) > len(levels) == 2 and levels == [known_levels[0], known_levels[-1]]:
            return f"; did you mean {known}?"
    close = difflib.get_close_matches(name.removeprefix(PREFIX), by_rest, n=1, cutoff=0.7)
    return f"; did you mean {by_rest[close[0]]}?" if close else ""


class _Sources:
    """Collects what the sources give, weakest first, so that a stronger one replaces what was there."""

    def __init__(self) -> None:
        self.known = settings()
        self.given: dict[str, _Given] = {}
        self.problems: list[Problem] = []

    def put(self, key: str, value: object, origin: str, directory: Path) -> None:
        if key in self.known:
            self.given[key] = _Given(value=value, origin=origin, directory=directory)
        else:
            self.problems.append(
                Problem(key=key, origin=origin, expected="there is no such setting" + _guess(key, list(self.known)))
            )

    def read_file(self, path: Path) -> None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            self.problems.append(Problem(key="--config", origin=str(path), expected=problem))
        except UnicodeDecodeError:
            self.problems.append(Problem(key="--config", origin=str(path), expected="is not UTF-8 text"))
        except tomllib.TOMLDecodeError as error:
            self.problems.append(Problem(key="--config", origin=str(path), expected=f"is not TOML: {error}"))
        else:
            self.read_table(document, "", path)

    def read_table(self, table: dict[str, Any], prefix: str, path: Path) -> None:
        for name, value in table.items():
            key = prefix + name
            if isinstance(value, dict) and any(known.startswith(f"{key}.") for known in self.known):
                self.read_table(value, f"{key}.", path)
            else:
                self.put(key, value, str(path), path.parent.absolute())

    def read_environment(self, environment: Mapping[str, str], directory: Path) -> None:
        variables = {setting.variable: setting for setting in self.known.values()}
        files = {f"{setting.variable}_FILE": setting for setting in self.known.values() if setting.secret}
        for name, value in sorted(environment.items()):
            if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
                continue
            if name in variables:
                self.put(variables[name].key, value, name, directory)
            elif name in files:
                if files[name].variable in environment:
                    expected = f"{files[name].variable} is given too; only one of them may be"
                    self.problems.append(Problem(key=files[name].key, origin=name, expected=expected))
                try:
                    text = Path(value).read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    expected = f"the file cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
                    self.problems.append(Problem(key=files[name].key, origin=name, value=value, expected=expected))
                else:
                    self.put(files[name].key, text.removesuffix("\n"), name, directory)
            else:
                expected = "there is no such setting" + _guess(name, [*variables, *files, *sorted(OTHER_VARIABLES)])
                self.problems.append(Problem(key=name, origin="environment", expected=expected))

    def read_assignments(self, assignments: Sequence[str], directory: Path) -> None:
        for assignment in assignments:
            key, _, value = assignment.partition("=")
            if key.strip() and key != assignment:
                self.put(key.strip(), value, "--set", directory)
            else:
                self.problems.append(Problem(key=assignment, origin="--set", expected="has the form key=value"))

    def build(self) -> tuple[Config, dict[str, str]]:
        values: dict[str, object] = {}
        for key, given in self.given.items():
            setting = self.known[key]
            try:
                values[key] = setting.kind.parse(given.value, given.directory)
            except (ValueError, OverflowError):
                # The text of the error is about Python; the expected form says more.
                shown = None if setting.secret else json.dumps(given.value, default=str, ensure_ascii=False)
                problem = f"expected {setting.kind.expected}"
                self.problems.append(Problem(key=key, origin=given.origin, value=shown, expected=problem))

        def fill(section: Any, prefix: str) -> Any:
            changes: dict[str, object] = {}
            for one in dataclasses.fields(section):
                key = prefix + one.name
                if "kind" not in one.metadata:
                    changes[one.name] = fill(getattr(section, one.name), f"{key}.")
                elif key in values:
                    changes[one.name] = values[key]
            return dataclasses.replace(section, **changes)

        return fill(Config(), ""), {key: self.given[key].origin for key in values}


def load(
    *,
    config_file: Path | None = None,
    assignments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Loaded:
    """Read all sources and check everything that can be checked without network and database.

    Args:
        config_file: The file named by `--config`; `None` looks where configuration 1.2 says.
        assignments: The `key=value` of each `--set`.
        environment: Variables; only those that start with `KAMADO_` are looked at.
        directory: What relative paths in variables and `--set` start from; the working directory if `None`. Relative
            paths in a file start from the file's directory.

    Raises:
        ConfigError: With every problem that was found.
    """
    environment = os.environ if environment is None else environment
    directory = directory or Path.cwd()
    sources = _Sources()
    path = config_file or default_config_file(environment)
    if path is not None:
        sources.read_file(path)
        for extra in sorted((path.parent / "conf.d").glob("*.toml")):
            sources.read_file(extra)
    sources.read_environment(environment, directory)
    sources.read_assignments(assignments, directory)
    config, origins = sources.build()
    problems, warnings = sources.problems, list[str]()
    _check(config, origins, problems, warnings)
    if problems:
        raise ConfigError(problems)
    return Loaded(config=config, origins=origins, warnings=tuple(warnings))


# Rules across settings


def is_loopback(host: str) -> bool:
    """Tell whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(config: Config, origins: Mapping[str, str], problems: list[Problem], warnings: list[str]) -> None:
    def problem(key: str, expected: str) -> None:
        problems.append(Problem(key=key, origin=origins.get(key, "default"), expected=expected))

    for name in ("http", "amqp"):
        _check_listeners(getattr(config, name), name, problem, warnings)
    # Without that setting, it depends on the database whether the start is refused; see `app.check_access`.
    if config.http.auth.allow_anonymous and not config.http.is_local:
        warnings.append(
            "http.auth.allow_anonymous: while there is no operator account, everybody who reaches the management API "
            "may use it"
        )
    _check_ports(config, problem)
    if config.credentials.bcrypt_cost > config.credentials.bcrypt_max_cost:
        problem("credentials.bcrypt_cost", "is higher than credentials.bcrypt_max_cost")
    storage = config.storage
    if storage.file is not None and storage.file.is_dir():
        problem("storage.url", f"{storage.file} is a directory; name a file in it")
    if storage.file is not None and storage.read_url is not None:
        problem("storage.read_url", "needs PostgreSQL in storage.url")
    if storage.pool_min > storage.pool_max:
        problem("storage.pool_min", "is higher than storage.pool_max")
    if storage.file is None and 2 * config.search.workers + 9 > storage.pool_max:
        warnings.append(
            f"search.workers: with storage.pool_max={storage.pool_max} only {(storage.pool_max - 9) // 2} searches run "
            "side by side"
        )
    for path in config.startup.load:
        _check_readable("startup.load", path, problem)
    if config.auth.permissions_file is not None:
        _check_readable("auth.permissions_file", config.auth.permissions_file, problem)
    _check_hook(config.provisioning.hook, problem, warnings)
    for origin in config.http.cors_allowed_origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
            problem("http.cors_allowed_origins", f"{origin} is no origin: expected scheme://host[:port], or *")


ProblemSink = Callable[[str, str], None]


def _check_readable(key: str, path: Path, problem: ProblemSink) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        problem(key, f"{path} cannot be read: {error.strerror}")
        return False


def _check_listeners(section: ListenersConfig, name: str, problem: ProblemSink, warnings: list[str]) -> None:
    tls, insecure = section.tls, section.insecure
    if section.secure.enabled is True and not tls.has_key_material:
        problem(f"{name}.secure.enabled", f"TLS needs {name}.tls.cert_file and {name}.tls.key_file")
    if not is_loopback(insecure.bind) and (section.insecure_enabled or not tls.has_key_material):
        if insecure.enabled == "auto":
            problem(
                f"{name}.insecure.bind",
                f"a plain listener on another address than loopback needs {name}.insecure.enabled=true",
            )
        elif insecure.enabled:
            warnings.append(f"{name}.insecure.bind: {insecure.bind} is served without TLS")
    if insecure.enabled is False and not section.secure_enabled:
        problem(f"{name}.insecure.enabled", "neither the plain nor the TLS listener is on")
    if (tls.cert_file is None) != (tls.key_file is None):
        missing = "cert_file" if tls.cert_file is None else "key_file"
        problem(f"{name}.tls.{missing}", "is needed too: certificate and key come as a pair")
    if isinstance(tls, AmqpTlsConfig) and tls.effective_client_auth != "none" and tls.client_ca_file is None:
        problem(f"{name}.tls.client_ca_file", f"is needed for {name}.tls.client_auth={tls.client_auth}")
    if tls.cert_file is not None and tls.key_file is not None:
        _check_key_material(tls, tls.key_file, name, problem, warnings)
    elif tls.ciphers:
        try:
            _set_ciphers(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls.ciphers)
        except TlsError as error:
            problem(f"{name}.tls.{error.key}", str(error))


def _check_key_material(tls: TlsConfig, key_file: Path, name: str, problem: ProblemSink, warnings: list[str]) -> None:
    readable = [
        _check_readable(f"{name}.tls.{key}", path, problem)
        for key in ("cert_file", "key_file", "client_ca_file")
        if (path := getattr(tls, key, None)) is not None
    ]
    if not all(readable):
        return
    if key_file.stat().st_mode & 0o007:
        warnings.append(f"{name}.tls.key_file: {key_file} can be read by everybody on this machine")
    try:
        tls_context(tls)
    except TlsError as error:
        problem(f"{name}.tls.{error.key}", str(error))


def _check_hook(hook: ProvisioningHookConfig, problem: ProblemSink, warnings: list[str]) -> None:
    prefix = "provisioning.hook."
    if (hook.client_cert_file is None) != (hook.client_key_file is None):
        missing = "client_cert_file" if hook.client_cert_file is None else "client_key_file"
        problem(f"{prefix}{missing}", "is needed too: certificate and key come as a pair")
    readable = [
        _check_readable(f"{prefix}{key}", path, problem)
        for key in ("secret_file", "ca_file", "client_cert_file", "client_key_file")
        if (path := getattr(hook, key)) is not None
    ]
    if not all(readable):
        return
    try:
        if hook.secret_file is not None:
            read_hook_secret(hook.secret_file)
            if hook.secret_file.stat().st_mode & 0o007:
                warnings.append(f"{prefix}secret_file: {hook.secret_file} can be read by everybody on this machine")
        if hook.is_https or hook.ca_file is not None or hook.client_cert_file is not None:
            hook_tls_context(hook)
    except TlsError as error:
        problem(f"{prefix}{error.key}", str(error))
    if hook.url is not None and not hook.is_https and not is_loopback(urlsplit(hook.url).hostname or ""):
        warnings.append(f"{prefix}url: devices and their certificates are told to {hook.url} without TLS")


def _check_ports(config: Config, problem: ProblemSink) -> None:
    taken: list[tuple[str, str, int]] = [("health", config.health.bind, config.health.port)]
    for name, section in (("http", config.http), ("amqp", config.amqp)):
        if section.insecure_enabled:
            taken.append((f"{name}.insecure", section.insecure.bind, section.insecure.port))
        if section.secure_enabled:
            taken.append((f"{name}.secure", section.secure.bind, section.secure.port))
    everywhere = {"0.0.0.0", "::"}  # noqa: S104 - compared with, not bound to
    for index, (key, host, port) in enumerate(taken):
        for other, other_host, other_port in taken[:index]:
            if port and port == other_port and (host == other_host or everywhere & {host, other_host}):
                problem(f"{key}.port", f"{port} is the port of {other} too")


# Key material


class TlsError(Exception):
    """Key material cannot be used; `key` is the setting, below `tls`, that is to blame."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class _Handshake(ssl.SSLObject):
    """Tells the log why a client was not let in, which event loops do not."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            reason = (error.reason or type(error).__name__).replace("_", " ").lower()
            if isinstance(error, ssl.SSLCertVerificationError):
                reason = f"{reason}: {error.verify_message}"
            context = self.context
            listener = context.listener if isinstance(context, ListenerContext) else None
            _log.warning("TLS handshake refused", extra={"listener": listener, "reason": reason})
            raise


class ListenerContext(ssl.SSLContext):
    """A TLS context of a listener.

    Attributes:
        listener: Its name, for the log.
        successor: Takes all new connections in place of this one, which the listener goes on using.
    """

    sslobject_class = _Handshake
    listener: str = ""
    successor: "ListenerContext | None" = None

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Begin a connection: what event loops call for each."""
        if self.successor is not None:
            return self.successor.wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def tls_context(tls: TlsConfig) -> ListenerContext:
    """Build the TLS context of a listener from its files.

    Raises:
        TlsError: A file cannot be read or parsed, or certificate and key do not belong together.
    """
    assert tls.cert_file is not None
    assert tls.key_file is not None
    context = ListenerContext(ssl.PROTOCOL_TLS_SERVER)
    context.listener = "amqps" if isinstance(tls, AmqpTlsConfig) else "https"
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # A resumed session skips the check of the client's certificate, so it would outlive a CA that was taken away.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    _set_ciphers(context, tls.ciphers)
    load_key_pair(context, tls.cert_file, tls.key_file)
    if isinstance(tls, AmqpTlsConfig) and tls.client_ca_file is not None and tls.effective_client_auth != "none":
        try:
            context.load_verify_locations(tls.client_ca_file)
        except ssl.SSLError as error:
            raise TlsError("client_ca_file", f"{tls.client_ca_file} holds no PEM certificates") from error
        except OSError as error:
            raise TlsError("client_ca_file", f"{tls.client_ca_file} cannot be read: {error.strerror}") from error
        required = tls.effective_client_auth == "required"
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context


def read_hook_secret(path: Path) -> bytes:
    """Read the shared secret of the provisioning hook, in the form of the Standard Webhooks specification.

    Raises:
        TlsError: It cannot be read, or has another form.
    """
    try:
        text = path.read_bytes().strip().removeprefix(b"whsec_")
        secret = base64.b64decode(text, validate=True)
    except OSError as error:
        raise TlsError("secret_file", f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        secret = b""
    if not 24 <= len(secret) <= 64:
        raise TlsError("secret_file", f"{path} must hold whsec_ and 24 to 64 bytes in Base64")
    return secret


def hook_tls_context(hook: ProvisioningHookConfig) -> ssl.SSLContext:
    """Build the TLS context for asking the provisioning hook.

    Raises:
        TlsError: A file cannot be read or parsed, or certificate and key do not belong together.
    """
    try:
        context = ssl.create_default_context(cafile=hook.ca_file)
    except ssl.SSLError as error:
        raise TlsError("ca_file", f"{hook.ca_file} holds no PEM certificates") from error
    except OSError as error:
        raise TlsError("ca_file", f"{hook.ca_file} cannot be read: {error.strerror}") from error
    if hook.client_cert_file is not None and hook.client_key_file is not None:
        try:
            load_key_pair(context, hook.client_cert_file, hook.client_key_file)
        except TlsError as error:
            raise TlsError(f"client_{error.key}", str(error)) from error
    return context


def _set_ciphers(context: ssl.SSLContext, ciphers: tuple[str, ...]) -> None:
    for name in re.split("[:, ]+", ":".join(ciphers)):
        # What only takes away or orders selects nothing by itself.
        if name and name[0] not in "!-+@":
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(name)
            except ssl.SSLError as error:
                raise TlsError("ciphers", f"OpenSSL has no cipher {name} for TLS 1.2") from error
    try:
        # Configuration 7.1: for TLS 1.2 only forward secret key exchange with AEAD ciphers.
        context.set_ciphers(":".join(ciphers) or "ECDHE+AESGCM:ECDHE+CHACHA20")
    except ssl.SSLError as error:
        raise TlsError("ciphers", "these leave no cipher for TLS 1.2") from error


_PEM_CERTIFICATE = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----")
_PEM_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")
_ENCRYPTED_KEY = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|Proc-Type: 4,ENCRYPTED")


def load_key_pair(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    """Let a TLS context use a certificate and its key. OpenSSL does not say what is wrong with which, so look first.

    Raises:
        TlsError: A file cannot be read or parsed, or certificate and key do not belong together.
    """
    certificate, key = _read_pem("cert_file", cert_file), _read_pem("key_file", key_file)
    if not _PEM_CERTIFICATE.search(certificate):
        if _PEM_KEY.search(certificate) and not _PEM_KEY.search(key) and _PEM_CERTIFICATE.search(key):
            message = f"{cert_file} is a key and {key_file} a certificate: the two are swapped"
            raise TlsError("cert_file", message)
        raise TlsError("cert_file", f"{cert_file} holds no PEM certificate")
    if not _PEM_KEY.search(key):
        raise TlsError("key_file", f"{key_file} holds no PEM private key")
    if _ENCRYPTED_KEY.search(key):
        raise TlsError(
            "key_file",
            f"the key in {key_file} is encrypted and has to be without a pass phrase; this writes one: "
            f"openssl pkey -in {key_file} -out NEW",
        )
    try:
        # A pass phrase is never asked for on the terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError("key_file", f"{key_file} is not the key of the certificate in {cert_file}") from error
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert_file)
        except ssl.SSLError:
            raise TlsError("cert_file", f"the certificate in {cert_file} cannot be decoded") from error
        if error.reason is not None and "TOO_" in error.reason:
            # Not damaged, but against OpenSSL's rules: EE_KEY_TOO_SMALL, CA_MD_TOO_WEAK.
            raise TlsError("cert_file", f"OpenSSL refuses the certificate in {cert_file}: {error.reason}") from error
        raise TlsError("key_file", f"the key in {key_file} cannot be decoded") from error
    except OSError as error:
        raise TlsError("cert_file", f"{cert_file} or {key_file} cannot be read: {error.strerror}") from error


def _read_pem(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(key, f"{path} cannot be read: {error.strerror}") from error
