"""What a PostgreSQL URL says: its hosts, and the parameters of libpq.

Most of these are the driver's affair. Some are ours, some ask for what is done anyway, and the rest is refused by name:
what an operator has asked for is not silently left out. Any other name is a setting for the server. Knows no driver.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

__all__ = ["PostgresqlUrl", "parse_url", "shown_url"]

_HOST_AND_PORT: Final = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_FORM: Final = (
    "a URL is written postgresql://USER:PASSWORD@HOST:PORT/DATABASE, and in a password / is written %2F, @ %40, : %3A, "
    "? %3F, # %23, [ %5B, % %25"
)
_SECRET: Final = re.compile("(password|secret|_key)$", re.IGNORECASE)
"""How the names of parameters end that nobody is to see."""

_DONE_ANYWAY: Final = {
    "channel_binding": ("disable", "prefer"),
    "client_encoding": ("utf8", "utf-8"),
    "gssencmode": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
    "sslcompression": ("0",),
    "sslsni": ("1",),
}
"""Parameter -> the values that ask for nothing else."""
_SILENCE: Final = "connections on which nothing comes back are given up after storage.statement_timeout"
_REFUSED: Final = {
    **dict.fromkeys(("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"), _SILENCE),
    "tcp_user_timeout": _SILENCE,
    "dbname": "name the database in the path",
    "database": "name the database in the path",
    "fallback_application_name": "say application_name",
    "hostaddr": "name the address in place of the host",
    "requiressl": "say sslmode=require",
    **dict.fromkeys(
        (
            *(
                "gsslib",
                "krbsrvname",
                "max_protocol_version",
                "min_protocol_version",
                "service",
                "oauth_client_id",
                "oauth_client_secret",
            ),
            *("oauth_issuer", "oauth_scope", "replication", "require_auth", "requirepeer", "scram_client_key"),
            *("scram_server_key", "servicefile", "sslcertmode", "sslcrldir", "sslkeylogfile"),
        ),
        "",
    ),
}
"""Parameter -> what to do instead, or why nothing need be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresqlUrl:
    """A URL, taken apart."""

    hosts: tuple[str, ...]
    """A URL for each host, with what is left to the driver."""
    has_target: bool
    """Whether it says which of several servers will do (`target_session_attrs`)."""
    connect_timeout: float | None
    """Seconds for one host; `None` for no bound of its own."""
    application_name: str | None


def _split(url: str) -> SplitResult:
    """Take the large parts of a URL apart.

    Raises:
        ValueError: That cannot be done; the text has nothing of the URL, in which a password may be anywhere then.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(_FORM) from None
    hosts = parts.netloc.rpartition("@")[2].split(",")
    for host in hosts if hosts != [""] else []:  # which is a directory of sockets
        named = _HOST_AND_PORT.fullmatch(host)
        if named is None or int(named[1] or 0) > 65535:
            raise ValueError(_FORM)
    # What may be the rest of a password that ended too early.
    is_cut = "@" in parts.path or any("@" in one and "=" not in one for one in parts.query.split("&"))
    if not parts.path.strip("/") or is_cut or parts.fragment:
        raise ValueError(_FORM)
    return parts


def shown_url(url: str) -> str:
    """Return a URL without the secrets that may be in it."""
    scheme = url.partition("://")[0]
    try:
        parts = _split(url)
    except ValueError:
        return f"{scheme}://***"
    userinfo, at, hosts = parts.netloc.rpartition("@")
    name, colon, _ = userinfo.partition(":")
    query = "&".join(map(_shown_parameter, parts.query.split("&")))
    return f"{scheme}://{name}{':***' if colon else ''}{at}{hosts}{parts.path}{'?' if query else ''}{query}"


def _shown_parameter(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    return f"{name}=***" if equals and _SECRET.search(unquote(name)) else parameter


def parse_url(url: str) -> PostgresqlUrl:
    """Take a URL apart.

    Raises:
        ValueError: It asks for something that cannot be had; the text says what, and has no secret.
    """
    parts = _split(url)
    try:
        # A plus sign is one, as for libpq.
        given = dict(parse_qsl(parts.query.replace("+", "%2B"), strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise ValueError("an option is written NAME=VALUE") from None
    connect_timeout = _seconds(given.pop("connect_timeout", "0"))
    application_name = given.pop("application_name", None)
    for name, value in list(given.items()):
        if name in _REFUSED:
            raise ValueError(f"{name} is not supported" + (f": {_REFUSED[name]}" if _REFUSED[name] else ""))
        if name in _DONE_ANYWAY:
            if value.lower() not in _DONE_ANYWAY[name]:
                raise ValueError(f"{name}={value} is not supported, only {' or '.join(_DONE_ANYWAY[name])}")
            del given[name]
    userinfo, at, names = parts.netloc.rpartition("@")
    if names:
        hosts = [(f"{userinfo}{at}{host}", given) for host in names.split(",")]
    else:
        hosts = [(parts.netloc, given | one) for one in _hosts_of(given)]
    return PostgresqlUrl(
        hosts=tuple(_join(f"{parts.scheme}://{netloc}{parts.path}", query) for netloc, query in hosts),
        has_target="target_session_attrs" in given,
        connect_timeout=connect_timeout,
        application_name=application_name,
    )


def _join(url: str, query: dict[str, str]) -> str:
    # Not by the standard library, which takes a host that is empty for none.
    return "?".join(filter(None, (url, "&".join(f"{name}={quote(value, '')}" for name, value in query.items()))))


def _seconds(text: str) -> float | None:
    try:
        seconds = int(text)
    except ValueError:
        raise ValueError(f"connect_timeout={text} is not a whole number of seconds") from None
    return float(seconds) if seconds > 0 else None


def _hosts_of(given: dict[str, str]) -> list[dict[str, str]]:
    """Return the host and the port of each server that the parameters name."""
    if "host" not in given:
        return [{}]
    hosts, ports = given["host"].split(","), given.get("port", "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ValueError("there are not as many ports as hosts")
    if not all(port.isascii() and port.isdigit() for port in ports if port):
        raise ValueError("a port is a number")
    return [{"host": host} | ({"port": port} if port else {}) for host, port in zip(hosts, ports, strict=True)]
