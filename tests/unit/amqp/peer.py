"""The other end of a `Connection` in memory: writes frames, reads what the server writes."""

import struct
from collections.abc import Iterable
from typing import TypeVar

from kamado.amqp import codec
from kamado.amqp.connection import (
    AMQP_HEADER,
    Connection,
    ConnectionSettings,
    Event,
    Link,
    LinkAttached,
    Request,
    RequestsReceived,
)

__all__ = ["Frame", "Peer", "message", "parse_frames"]

Frame = tuple[int, codec.Performative | None, bytes]
"""Channel, performative (none in a heartbeat), payload."""

P = TypeVar("P")

ACCEPTED = codec.Described(codec.ULong(0x24), [])
WINDOW = 0x7FFFFFFF


def parse_frames(data: bytes) -> list[Frame]:
    """Read frames without a header; whatever is left over is a failure."""
    frames: list[Frame] = []
    while data:
        size, offset, frame_type, channel = struct.unpack_from(">IBBH", data)
        assert 8 <= size <= len(data), "a frame is not complete"
        assert (offset, frame_type) == (2, 0)
        body, data = data[8:size], data[size:]
        if not body:
            frames.append((channel, None, b""))
            continue
        performative, pos = codec.decode_performative(body)
        frames.append((channel, performative, body[pos:]))
    return frames


def message(
    *,
    message_id: object = "m1",
    correlation_id: object = None,
    subject: str | None = "assert",
    reply_to: str | None = "registration/acme/r",
    application_properties: dict[str, object] | None = None,
    body: bytes | None = None,
) -> bytes:
    """Encode a request as an adapter sends it."""
    properties = codec.Properties(
        message_id=message_id, subject=subject, reply_to=reply_to, correlation_id=correlation_id
    )
    return codec.encode_message(properties, application_properties, body)


class Peer:
    """A client with one session on channel 0, unless the test writes its own frames.

    Attributes:
        accepts: Whether it accepts each attach with `credit` on the server's side; else the test does.
        links: The server's links, by name.
        requests: What the server has received, in order.
        events: All events so far.
    """

    def __init__(self, *, accepts: bool = True, credit: int = 100, **settings: object) -> None:
        self.connection = Connection(
            ConnectionSettings(container_id="server", **settings),  # type: ignore[arg-type]
            now=0.0,
        )
        self.accepts = accepts
        self.credit = credit
        self.now = 0.0
        self.links: dict[str, Link] = {}
        self.requests: list[Request] = []
        self.events: list[Event] = []
        self.max_frame_written = 0

    def write(self, data: bytes) -> list[Event]:
        """Give bytes to the server and do what its application does with the events."""
        return self.handle(self.connection.receive(data, self.now))

    def handle(self, events: Iterable[Event]) -> list[Event]:
        events = list(events)
        self.events += events
        for event in events:
            if isinstance(event, LinkAttached):
                self.links[event.link.name] = event.link
                if self.accepts:
                    event.link.accept(self.credit)
            elif isinstance(event, RequestsReceived):
                self.requests += event.requests
        return events

    def send(self, performative: codec.Performative, payload: bytes = b"", *, channel: int = 0) -> list[Event]:
        return self.write(codec.encode_frame(channel, performative, payload))

    def read(self) -> list[Frame]:
        """Read all frames that the server has to send."""
        data = self.connection.data_to_send()
        return parse_frames(data.removeprefix(AMQP_HEADER))

    def read_only(self, kind: type[P]) -> P:
        """Read one frame, the only one, of this kind."""
        frames = self.read()
        assert [type(performative) for _channel, performative, _payload in frames] == [kind]
        performative = frames[0][1]
        assert isinstance(performative, kind)
        return performative

    def open(self, **fields: object) -> "Peer":
        """Exchange headers and open."""
        self.write(AMQP_HEADER)
        self.send(codec.Open(container_id="client", **fields))  # type: ignore[arg-type]
        self.read_only(codec.Open)
        return self

    def begin(self, *, channel: int = 0, incoming_window: int = WINDOW) -> "Peer":
        begin = codec.Begin(next_outgoing_id=0, incoming_window=incoming_window, outgoing_window=WINDOW)
        self.send(begin, channel=channel)
        answer = self.read_only(codec.Begin)
        assert answer.remote_channel == channel
        return self

    def attach_sender(self, handle: int = 1, address: str | None = "registration/acme", **fields: object) -> Link:
        """Attach a request link; its answer is read away."""
        self.send(self.sender(handle, address, **fields))
        self.read()
        return self.links[f"s{handle}"]

    def attach_receiver(self, handle: int = 0, address: str | None = "registration/acme/r", **fields: object) -> Link:
        """Attach a reply link; its answer is read away."""
        self.send(self.receiver(handle, address, **fields))
        self.read()
        return self.links[f"r{handle}"]

    @staticmethod
    def sender(handle: int = 1, address: str | None = "registration/acme", **fields: object) -> codec.Attach:
        return codec.Attach(
            name=f"s{handle}",
            handle=handle,
            role=False,
            source=codec.Terminus.source(None),
            target=codec.Terminus.target(address),
            initial_delivery_count=0,
            **fields,  # type: ignore[arg-type]
        )

    @staticmethod
    def receiver(handle: int = 0, address: str | None = "registration/acme/r", **fields: object) -> codec.Attach:
        return codec.Attach(
            name=f"r{handle}",
            handle=handle,
            role=True,
            source=codec.Terminus.source(address),
            target=codec.Terminus.target(None),
            **fields,  # type: ignore[arg-type]
        )

    def flow(
        self,
        handle: int | None = 0,
        credit: int | None = 100,
        *,
        delivery_count: int | None = 0,
        next_incoming_id: int | None = 0,
        incoming_window: int = WINDOW,
        drain: bool = False,
        echo: bool = False,
    ) -> list[Event]:
        flow = codec.Flow(
            next_incoming_id=next_incoming_id,
            incoming_window=incoming_window,
            next_outgoing_id=0,
            outgoing_window=WINDOW,
            handle=handle,
            delivery_count=delivery_count if handle is not None else None,
            link_credit=credit if handle is not None else None,
            drain=drain,
            echo=echo,
        )
        return self.send(flow)

    def transfer(self, delivery_id: int | None, payload: bytes, *, handle: int = 1, **fields: object) -> list[Event]:
        transfer = codec.Transfer(
            handle=handle,
            delivery_id=delivery_id,
            delivery_tag=delivery_id.to_bytes(4, "big") if delivery_id is not None else None,
            message_format=0 if delivery_id is not None else None,
            **fields,  # type: ignore[arg-type]
        )
        return self.send(transfer, payload)

    def tick(self, now: float) -> list[Event]:
        self.now = now
        return self.handle(self.connection.tick(now))
