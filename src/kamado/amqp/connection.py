"""One AMQP 1.0 connection, server side, without I/O: bytes and the time go in; events, bytes and the next deadline
come out.

How a server drives it (SASL is over, `sasl.py`):

    connection = Connection(settings, now=loop.time())
    for event in connection.receive(data, now): ...     # on each read
    transport.write(connection.data_to_send())          # once after all events of that read, and after each late reply
    if connection.is_closed: close the socket, then the events of connection.lost()
    loop.call_at(connection.next_deadline(), tick)      # re-armed when it fires: tick(now), then data_to_send()

Events come in the order of what happened. `LinkAttached` must be answered by `link.accept` or `link.refuse` before the
next call of `receive`. Every accepted link that does not end by our own `detach` ends in exactly one `LinkDetached`,
also when its session ends, the connection closes or is lost, and before `Closed`; so does a link that ends in the very
read in which it was attached, even if the application then refuses it. After `Closed` nothing more comes. Methods
of a link that is gone do nothing, so a late reply needs no check.
"""

import struct
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, assert_never

from kamado import __version__
from kamado.amqp import codec
from kamado.amqp.codec import UNUSABLE, DecodeError, Request, Unusable
from kamado.amqp.session import (
    FRAMING_ERROR,
    MIN_MAX_FRAME_SIZE,
    WINDOW,
    Closed,
    Event,
    Link,
    LinkAttached,
    LinkDetached,
    Opened,
    ProtocolError,
    RequestsReceived,
    Session,
    Shared,
)
from kamado.amqp.values import u32

__all__ = [
    "AMQP_HEADER",
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

AMQP_HEADER: Final = b"AMQP\x00\x01\x00\x00"
# Milliseconds. Heartbeats for a shorter one would be an attack on the processor (AMQP 2.4.5 lets us close).
_MIN_IDLE_TIME_OUT: Final = 100
_HEARTBEAT: Final = b"\x00\x00\x00\x08\x02\x00\x00\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """What the server offers each peer. Sizes in bytes, times in seconds."""

    container_id: str
    max_frame_size: int = 32768
    idle_timeout: float = 20.0
    """Silence of the peer after which the connection is closed; half of it is advertised (amqp-apis 2.2). 0: never."""
    open_timeout: float = 10.0
    """From the start to the peer's `open` (amqp-apis 1.2)."""
    close_timeout: float = 2.0
    """How long after our `close` the peer's is waited for."""
    max_links: int = 65536
    """Links of one connection; more are refused with amqp:resource-limit-exceeded (amqp-apis 2.3)."""
    max_sessions: int = 256
    max_message_size: int = 262144
    """A larger request detaches its link with amqp:link:message-size-exceeded."""
    max_queued_replies: int = 2048
    """Replies that wait on one link for the peer's credit; one more closes the connection (amqp-apis 17)."""
    product: str = "Kamado"
    version: str = __version__


class _State(Enum):
    HEADER = auto()
    """Nothing has come yet."""
    OPENING = auto()
    """The header has come, the peer's open has not."""
    OPEN = auto()
    CLOSING = auto()
    """Our close is out; the peer's is awaited, all else ignored."""
    CLOSED = auto()


class Connection:
    """See the module."""

    def __init__(self, settings: ConnectionSettings, *, now: float) -> None:
        """Start to wait for the AMQP header. `now` is monotonic, in seconds, as everywhere here."""
        self.settings = settings
        self._shared = Shared(
            max_links=settings.max_links,
            max_message_size=settings.max_message_size,
            max_queued_replies=settings.max_queued_replies,
            max_frame_size=settings.max_frame_size,
            fail=self._fail_later,
        )
        self._write = self._shared.write
        self._state = _State.HEADER
        self._input = b""
        self._events: list[Event] = []
        """Those that did not come about in `receive` or `tick`."""
        self._sessions: dict[int, Session] = {}
        """By the peer's channel."""
        self._channels: set[int] = set()
        self._peer_channel_max = 0xFFFF
        self._header_sent = False
        self._open_sent = False
        self._now = now
        self._last_received = now
        self._last_sent = now
        self._heartbeat_interval: float | None = None
        self._deadline: float | None = now + settings.open_timeout
        """Of the peer's open, later of its close."""

    # --- In -----------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes | bytearray, now: float) -> list[Event]:
        """Take what was read. Never raises, whatever the bytes are."""
        self._now = self._last_received = now
        data = bytes(data)  # no copy if it is that already; pieces of it serve as keys
        events, self._events = self._events, []
        if self._state is _State.CLOSED:
            return events
        if self._input:
            data = self._input + data
        try:
            pos = self._take_frames(data, events)
            self._input = data[pos:]
        except DecodeError as error:
            self._fail("amqp:decode-error", str(error), events)
        except ProtocolError as error:
            self._fail(error.condition, str(error), events)
        return events

    def _take_frames(self, data: bytes, events: list[Event]) -> int:
        """Take the complete frames of the data; return where they end."""
        pos = 0
        end = len(data)
        if self._state is _State.HEADER:
            if not AMQP_HEADER.startswith(data[:8]):
                self._write_header()
                raise ProtocolError(FRAMING_ERROR, "the protocol header is not that of AMQP 1.0")
            if end < 8:
                return 0
            self._write_header()
            self._state = _State.OPENING
            pos = 8
        max_frame_size = self.settings.max_frame_size
        while end - pos >= 8:
            (size,) = u32(data, pos)
            if not 8 <= size <= max_frame_size:
                raise ProtocolError(FRAMING_ERROR, "the size of a frame is out of range")
            stop = pos + size
            if stop > end:
                break
            if size > 13 and self._state is _State.OPEN and data.startswith(b"\x02\x00", pos + 4):
                session = self._sessions.get(data[pos + 6] << 8 | data[pos + 7])
                if session is not None:
                    taken = session.take_usual(data, pos, stop, events)
                    if taken != pos:
                        pos = taken
                        continue
            self._take_frame(data[pos:stop], events)
            pos = stop
            if self._state is _State.CLOSED:
                return end
        return pos

    def _take_frame(self, frame: bytes, events: list[Event]) -> None:
        """Take one frame: the complete path."""
        _size, offset, frame_type, channel = struct.unpack_from(">IBBH", frame)
        if not 8 <= 4 * offset <= len(frame) or frame_type != 0:
            raise ProtocolError(FRAMING_ERROR, "the header of a frame is malformed")
        body = frame[4 * offset :]
        if not body:
            return  # a heartbeat
        if self._state is _State.CLOSING:
            # The peer may still send what it sent before it saw our close; nothing of it counts.
            if body.startswith(b"\x00\x53\x18"):
                self._finish(Closed(), events)
            return
        performative, pos = codec.decode_performative(body)
        match performative:
            case codec.Open():
                self._on_open(performative, events)
                return
            case codec.Close(error=error):
                self._on_close(error, events)
                return
            case _ if self._state is not _State.OPEN:
                raise ProtocolError("amqp:illegal-state", "the first frame is not open")
            case codec.Begin():
                self._on_begin(channel, performative)
                return
        session = self._sessions.get(channel)
        if session is None:
            raise ProtocolError("amqp:not-allowed", "a frame came on a channel without a session")
        if isinstance(performative, codec.End):
            self._on_end(channel, session, events)
        elif session.ended:
            pass  # sent before the peer saw our end
        else:
            match performative:
                case codec.Transfer():
                    session.on_transfer(performative, body[pos:], events)
                case codec.Flow():
                    session.on_flow(performative, events)
                case codec.Disposition():
                    session.on_disposition(performative)
                case codec.Attach():
                    session.on_attach(performative, events)
                case codec.Detach():
                    session.on_detach(performative, events)
                case (
                    codec.SaslMechanisms()
                    | codec.SaslInit()
                    | codec.SaslChallenge()
                    | codec.SaslResponse()
                    | codec.SaslOutcome()
                ):
                    raise ProtocolError(FRAMING_ERROR, "SASL is over")
                case _:
                    assert_never(performative)

    # --- Connection and sessions --------------------------------------------------------------------------------------

    def _on_open(self, peer: codec.Open, events: list[Event]) -> None:
        if self._state is not _State.OPENING:
            raise ProtocolError("amqp:illegal-state", "the connection is open already")
        self._state = _State.OPEN
        self._deadline = None
        self._shared.peer_max_frame_size = max(peer.max_frame_size, MIN_MAX_FRAME_SIZE)
        self._peer_channel_max = peer.channel_max
        if peer.idle_time_out:
            if peer.idle_time_out < _MIN_IDLE_TIME_OUT:
                raise ProtocolError("amqp:resource-limit-exceeded", "idle-time-out is too short")
            # Half of what it asks for, so that one late frame does no harm (amqp-apis 2.2).
            self._heartbeat_interval = peer.idle_time_out / 2000
        self._write_open()
        events.append(Opened(peer.container_id, peer.hostname, peer.properties or {}))

    def _write_header(self) -> None:
        if not self._header_sent:
            self._header_sent = True
            self._write(AMQP_HEADER)

    def _write_open(self) -> None:
        if self._open_sent:
            return
        self._open_sent = True
        self._write_header()
        settings = self.settings
        performative = codec.Open(
            container_id=settings.container_id,
            max_frame_size=settings.max_frame_size,
            channel_max=settings.max_sessions - 1,
            idle_time_out=int(settings.idle_timeout * 500) or None,
            properties={codec.Symbol("product"): settings.product, codec.Symbol("version"): settings.version},
        )
        self._write(codec.encode_frame(0, performative))

    def _on_close(self, error: codec.Error | None, events: list[Event]) -> None:
        self._write_open()
        self._write(codec.encode_frame(0, codec.Close()))
        self._finish(Closed(error.condition, error.description) if error else Closed(), events)

    def _fail_later(self, condition: str, description: str) -> None:
        """Close because of what a session cannot bear; `Closed` comes with the next call."""
        self._fail(condition, description, self._events)

    def _fail(self, condition: str, description: str, events: list[Event]) -> None:
        if self._state is _State.CLOSED:
            return
        # Bytes that are not even AMQP are answered with our header alone.
        if self._state not in {_State.HEADER, _State.CLOSING}:
            self._write_open()
            self._write(codec.encode_frame(0, codec.Close(error=codec.Error(condition, description))))
        self._finish(Closed(condition, description), events)

    def _finish(self, closed: Closed, events: list[Event]) -> None:
        self._state = _State.CLOSED
        self._deadline = None
        self._input = b""
        self._end_sessions(events)
        events.append(closed)

    def _end_sessions(self, events: list[Event]) -> None:
        """Drop all sessions because the connection ends; what was accepted is told before the close."""
        for session in self._sessions.values():
            session.flush_accepted()
            session.drop_links(events)
        self._sessions = {}

    def _on_begin(self, channel: int, begin: codec.Begin) -> None:
        if begin.remote_channel is not None or channel in self._sessions:
            raise ProtocolError("amqp:not-allowed", "the session is begun already")
        if channel >= self.settings.max_sessions:
            raise ProtocolError(FRAMING_ERROR, "the channel is above channel-max")
        own = next(number for number in range(len(self._channels) + 1) if number not in self._channels)
        if own > self._peer_channel_max:
            raise ProtocolError("amqp:not-allowed", "there are more sessions than channel-max allows")
        self._channels.add(own)
        session = self._sessions[channel] = Session(self._shared, own, begin)
        session.write(
            codec.Begin(remote_channel=channel, next_outgoing_id=0, incoming_window=WINDOW, outgoing_window=WINDOW)
        )

    def _on_end(self, channel: int, session: Session, events: list[Event]) -> None:
        if not session.ended:
            session.flush_accepted()
            session.write(codec.End())
        session.drop_links(events)
        del self._sessions[channel]
        self._channels.discard(session.channel)

    # --- Out ----------------------------------------------------------------------------------------------------------

    def data_to_send(self) -> bytes:
        """Take all that is ready: dispositions joined into ranges, one flow per link, replies, control frames."""
        output = self._shared.take_output()
        if output:
            self._last_sent = self._now
        return output

    @property
    def pending_output(self) -> int:
        """Bytes of replies that wait: for the peer's credit, its window, or for `data_to_send`."""
        return self._shared.queued_bytes + sum(map(len, self._shared.frames))

    @property
    def is_closed(self) -> bool:
        """Whether all is over: write `data_to_send`, close the socket, and take the last events from `lost`."""
        return self._state is _State.CLOSED

    # --- Time and end -------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` is wanted at the latest; `None` after the end."""
        if self._state is _State.CLOSED:
            return None
        deadlines = []
        if self._deadline is not None:
            deadlines.append(self._deadline)
        if self.settings.idle_timeout > 0 and self._state is not _State.CLOSING:
            deadlines.append(self._last_received + self.settings.idle_timeout)
        if self._heartbeat_interval is not None and self._state is _State.OPEN:
            deadlines.append(self._last_sent + self._heartbeat_interval)
        return min(deadlines, default=None)

    def tick(self, now: float) -> list[Event]:
        """Send a heartbeat if it is time, end what has waited too long. May be called at any time."""
        self._now = now
        events, self._events = self._events, []
        if self._state is _State.CLOSED:
            return events
        if self._deadline is not None and now >= self._deadline:
            if self._state is _State.CLOSING:
                self._finish(Closed(), events)
            else:
                self._fail("amqp:resource-limit-exceeded", "open took too long", events)
        elif self._state is not _State.CLOSING:
            idle_timeout = self.settings.idle_timeout
            if 0 < idle_timeout <= now - self._last_received:
                self._fail("amqp:resource-limit-exceeded", "local-idle-timeout expired", events)
            elif self._heartbeat_interval is not None and now - self._last_sent >= self._heartbeat_interval:
                self._write(_HEARTBEAT)
        return events

    def close(self, condition: str | None = None, description: str | None = None, *, now: float) -> None:
        """Send `close`. `Closed` follows when the peer answers, after `close_timeout` (`tick`), or by `lost`."""
        if self._state in {_State.CLOSING, _State.CLOSED}:
            return
        self._write_open()
        error = codec.Error(condition, description) if condition is not None else None
        self._end_sessions(self._events)
        self._write(codec.encode_frame(0, codec.Close(error=error)))
        if self._state is _State.HEADER:
            # Who has not even sent a header will not answer.
            self._finish(Closed(condition, description), self._events)
            return
        self._state = _State.CLOSING
        self._deadline = now + self.settings.close_timeout

    def lost(self) -> list[Event]:
        """The socket is gone (end of file, reset): `LinkDetached` for each link, and `Closed` unless it came before."""
        events, self._events = self._events, []
        if self._state is not _State.CLOSED:
            self._finish(Closed(), events)
        return events
