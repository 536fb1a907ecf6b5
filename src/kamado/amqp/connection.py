"""One AMQP 1.0 connection, server side, without I/O: bytes and the time go in; events, bytes and the next deadline
come out.

How a server drives it (SASL is over, `sasl.py`):

    connection = Connection(settings, now=loop.time())
    for event in connection.receive(data, now): ...     # on each read
    transport.write(connection.data_to_send())          # once after all events of that read, and after each late reply
    loop.call_at(connection.next_deadline(), tick)      # re-armed only when it fires: tick(now), then data_to_send()

Events come in the order of what happened. `LinkAttached` must be answered by `link.accept` or `link.refuse` before the
next call of `receive`. Every accepted link ends in exactly one `LinkDetached`, also when its session ends, the
connection closes or is lost, and before `Closed`. After `Closed` nothing more comes; the server writes what
`data_to_send` still has and closes the socket. Methods of a link that is gone do nothing, so a late reply needs no
check.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

__all__ = [
    "UNUSABLE",
    "Closed",
    "Connection",
    "ConnectionSettings",
    "Event",
    "Link",
    "LinkAttached",
    "LinkDetached",
    "Opened",
    "Request",
    "RequestsReceived",
    "Unusable",
]


class Unusable:
    """The type of `UNUSABLE`."""


UNUSABLE: Final = Unusable()
"""The body of a request whose body sections hold neither data nor one string or binary (amqp-apis 6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """What the server offers each peer. Sizes in bytes, times in seconds."""

    container_id: str
    max_frame_size: int = 32768
    idle_timeout: float = 20.0
    """Silence of the peer after which the connection is closed; half of it is advertised (amqp-apis 2.2)."""
    open_timeout: float = 10.0
    """From the start to the peer's `open` (amqp-apis 1.2)."""
    close_timeout: float = 2.0
    """How long after our `close` the peer's is waited for."""
    max_links: int = 65536
    """Links of one connection; more are refused with amqp:resource-limit-exceeded (amqp-apis 2.3)."""
    max_sessions: int = 64
    max_message_size: int = 262144
    """A larger request detaches its link with amqp:link:message-size-exceeded."""
    max_queued_replies: int = 2048
    """Replies that wait on one link for the peer's credit; one more closes the connection (amqp-apis 17)."""
    product: str = "Kamado"
    version: str = ""


class Request(msgspec.Struct, gc=False):
    """One request message. Its sections are read, nothing is judged: a missing field is `None`."""

    delivery_id: int
    settled: bool
    """Pre-settled by the peer: it gets no disposition."""
    subject: str | None
    reply_to: str | None
    correlation_id: bytes | None
    """Encoded with its type, for `codec.encode_reply`: the correlation-id, or else the message-id."""
    application_properties: dict[str, object]
    """An AMQP string is exactly `str`; a symbol is `codec.Symbol`, a subclass: test with `type(x) is str`."""
    body: bytes | Unusable | None
    """Data sections joined, or string/binary of an amqp-value; `None` if absent, null or empty."""


class Link:
    """One link of the peer.

    Attributes:
        name: As attached.
        is_sender: Whether the server sends on it (a reply link); else it is a request link.
        address: Target address of a request link, source address of a reply link; `None` if there is none.
        dynamic: Whether the peer asked for a dynamic node.
        snd_settle_mode: As attached by the peer: 0 unsettled, 1 settled, 2 mixed.
        context: The application's own.
    """

    __slots__ = ("address", "context", "dynamic", "is_sender", "name", "snd_settle_mode")

    name: str
    is_sender: bool
    address: str | None
    dynamic: bool
    snd_settle_mode: int
    context: object

    @property
    def is_open(self) -> bool:
        """Whether it is accepted and neither side has detached it."""
        raise NotImplementedError

    def accept(self, credit: int = 0) -> None:
        """Answer the attach (amqp-apis 4.2); a request link gets `credit`."""
        raise NotImplementedError

    def refuse(self, condition: str, description: str) -> None:
        """Refuse the attach with the exact pattern of amqp-apis 4.3. No `LinkDetached` follows."""
        raise NotImplementedError

    def accept_delivery(self, request: Request) -> None:
        """Settle as accepted. Neighbours of one batch leave as one disposition."""
        raise NotImplementedError

    def reject_delivery(self, request: Request, condition: str, description: str) -> None:
        """Settle as rejected with an error."""
        raise NotImplementedError

    def release_delivery(self, request: Request) -> None:
        """Settle as released."""
        raise NotImplementedError

    def give_credit(self, count: int = 1) -> None:
        """Give credit back on a request link; it leaves as one flow with the batch."""
        raise NotImplementedError

    def send(self, message: bytes) -> None:
        """Send an encoded message on a reply link; it waits, in order, while there is no credit or window."""
        raise NotImplementedError

    def detach(self, condition: str, description: str) -> None:
        """Detach from our side; `LinkDetached` is not emitted for it."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer's `open` has come and ours is on its way."""

    container_id: str
    hostname: str | None
    properties: Mapping[object, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LinkAttached:
    """The peer attaches a link: call `accept` or `refuse`."""

    link: Link


@dataclass(frozen=True, slots=True)
class RequestsReceived:
    """Requests of one link, in order, as many as came in a row. One the engine could not decode is not among them: it
    is rejected with amqp:decode-error and its credit given back."""

    link: Link
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class LinkDetached:
    """An accepted link is gone, for whatever reason but our own `detach`."""

    link: Link


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over; write what is left and close the socket.

    `condition` is the peer's when it closed with an error, ours when we did; `None` for an orderly end.
    """

    condition: str | None = None
    description: str | None = None


Event = Opened | LinkAttached | RequestsReceived | LinkDetached | Closed


class Connection:
    """See the module."""

    def __init__(self, settings: ConnectionSettings, *, now: float) -> None:
        """Start to wait for the AMQP header. `now` is monotonic, in seconds, as everywhere here."""
        raise NotImplementedError

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take what was read. Never raises, whatever the bytes are."""
        raise NotImplementedError

    def lost(self) -> list[Event]:
        """The socket is gone (end of file, reset): `LinkDetached` for each link, and `Closed` unless it came before."""
        raise NotImplementedError

    def data_to_send(self) -> bytes:
        """Take all that is ready: dispositions joined into ranges, one flow per link, replies, control frames."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When `tick` is wanted at the latest; `None` after the end."""
        raise NotImplementedError

    def tick(self, now: float) -> list[Event]:
        """Send a heartbeat if it is time, end what has waited too long. May be called at any time."""
        raise NotImplementedError

    def close(self, condition: str | None = None, description: str | None = None) -> None:
        """Send `close`. `Closed` follows when the peer answers, after `close_timeout` (`tick`), or by `lost`."""
        raise NotImplementedError

    @property
    def pending_output(self) -> int:
        """Bytes of replies that wait: for the peer's credit, its window, or for `data_to_send`."""
        raise NotImplementedError

    @property
    def is_closed(self) -> bool:
        """Whether `Closed` has been emitted."""
        raise NotImplementedError
