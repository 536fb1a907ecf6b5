"""A small request/response client on our own codec, for `kamado ask`: one connection, one request, one reply."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "AskError",
    "AuthenticationFailed",
    "ClientSettings",
    "ConnectionFailed",
    "LinkRefused",
    "Reply",
    "RequestRejected",
    "TimedOut",
    "ask",
]


class AskError(Exception):
    """The request got no reply. The text says why, for people."""

    def __init__(self, text: str, *, condition: str | None = None) -> None:
        super().__init__(text)
        self.condition = condition
        """AMQP error condition, if the server gave one."""


class ConnectionFailed(AskError):
    """Nobody listens there, TLS failed, or the connection was lost or closed by the server."""


class AuthenticationFailed(AskError):
    """SASL outcome other than ok, or no mechanism in common."""


class LinkRefused(AskError):
    """The server refused to attach a link."""


class RequestRejected(AskError):
    """The server rejected or released the request message."""


class TimedOut(AskError):
    """No answer in `ClientSettings.timeout`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where to ask and as whom."""

    host: str
    port: int
    username: str | None = None
    """PLAIN if given; otherwise EXTERNAL, with the client certificate of `ssl_context`."""
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = None
    timeout: float = 5.0
    """Seconds for everything together."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the adapter would see."""

    status: int | None
    """`None` if the reply has no application property `status` of type int: adapters release such a reply."""
    payload: bytes | None
    content_type: str | None
    cache_control: str | None
    application_properties: Mapping[str, object]


async def ask(
    settings: ClientSettings,
    address: str,
    *,
    subject: str,
    reply_to: str | None = None,
    application_properties: Mapping[str, object] | None = None,
    body: bytes | None = None,
) -> Reply:
    """Log in, attach both links, send one request, await its reply, close.

    Args:
        address: Target of the request link: `tenant`, `registration/T`, `credentials/T`.
        reply_to: Reply address; a fresh one below `address` if not given.

    Raises:
        AskError: One of its kinds above.
    """
    raise NotImplementedError
