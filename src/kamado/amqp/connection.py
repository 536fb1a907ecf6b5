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
read in which it was attached, even if the application then refuses it. After `Closed` nothing more comes. Methods of a link that is gone do nothing, so a late reply needs no check.

Two ways lead through `receive`. Transfers of the usual shape, one frame each, on an open request link take the short
one, `_take_requests`: it reads many of them in one go where they lie in the buffer and builds nothing but `Request`s.
All else takes the complete one, frame by frame through `codec`. Both must give the same `Request`; what the short way
does not recognise it leaves, untouched, to the complete one, never the other way round.
"""

import heapq
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, assert_never

from kamado.amqp import codec
from kamado.amqp.codec import UNUSABLE, DecodeError, Request, Unusable

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
_HEARTBEAT: Final = b"\x00\x00\x00\x08\x02\x00\x00\x00"
# AMQP 2.8.11: no peer may ask for smaller frames.
_MIN_MAX_FRAME_SIZE: Final = 512
# What is advertised for each session; topped up when half of it is used, so it never closes.
_WINDOW: Final = 0x7FFFFFFF
_MASK: Final = 0xFFFFFFFF
# Links over `max_links` are refused; a peer that goes on without reading the refusals is cut off.
_MAX_REFUSED_LINKS: Final = 1024
# Unfinished multi-frame requests of one connection together, as a multiple of `max_message_size`.
_MAX_PARTIAL_MESSAGES: Final = 16
# Different forms of properties, message-id aside, that are remembered for one link.
_MAX_TAILS: Final = 64


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
    version: str = ""


class _LinkState(Enum):
    ATTACHING = auto()
    """The peer's attach waits for `accept` or `refuse`."""
    OPEN = auto()
    DETACHING = auto()
    """Our detach is out, the peer's is awaited; until then its handle is taken and its frames are ignored."""
    GONE = auto()


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

    __slots__ = (
        "_attach",
        "_connection",
        "_credit",
        "_delivery_count",
        "_delivery_id",
        "_drain",
        "_handle",
        "_offset",
        "_partial",
        "_peer_detached",
        "_peer_handle",
        "_queue",
        "_queued_bytes",
        "_returned",
        "_sends_settled",
        "_session",
        "_state",
        "_tails",
        "_transfer_head",
        "_transfer_layout",
        "_transfer_limit",
        "_transfer_tail",
        "_transfer_width",
        "address",
        "context",
        "dynamic",
        "is_sender",
        "name",
        "snd_settle_mode",
    )

    def __init__(self, connection: "Connection", session: "_Session", attach: codec.Attach) -> None:
        terminus = attach.source if attach.role else attach.target
        self.name = attach.name
        self.is_sender = attach.role
        self.address = terminus.address if terminus is not None else None
        self.dynamic = terminus is not None and terminus.dynamic
        self.snd_settle_mode = attach.snd_settle_mode
        self.context: object = None
        self._connection = connection
        self._session = session
        self._state = _LinkState.ATTACHING
        self._attach: codec.Attach | None = attach
        """The peer's attach, until it is answered."""
        self._peer_detached = False
        """The peer detached before its attach was answered."""
        self._handle = -1
        self._peer_handle = attach.handle
        self._credit = 0
        """Deliveries that may still come on a request link, or be sent on a reply link."""
        self._delivery_count = 0 if attach.role else attach.initial_delivery_count or 0
        # Request links.
        self._returned = 0
        """Credit given back that no flow has told the peer yet."""
        self._partial: _Partial | None = None
        self._tails: dict[bytes, tuple[int, str | None, str | None, bytes | None]] = {}
        # Reply links.
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._offset = 0
        """How much of the first message in the queue is sent; more than 0 only between frames of one message."""
        self._delivery_id = 0
        self._drain = False
        self._sends_settled = attach.role and attach.snd_settle_mode == 1

    def __repr__(self) -> str:
        return f"<Link {self.name!r} {'to' if self.is_sender else 'from'} peer, {self.address!r}, {self._state.name}>"

    @property
    def is_open(self) -> bool:
        """Whether it is accepted and neither side has detached it."""
        return self._state is _LinkState.OPEN

    def accept(self, credit: int = 0) -> None:
        """Answer the attach (amqp-apis 4.2); a request link gets `credit`."""
        attach = self._attach
        if self._state is not _LinkState.ATTACHING or attach is None:
            return
        self._attach = None
        self._state = _LinkState.OPEN
        self._write_attach(attach.source, attach.target)
        if self._peer_detached:
            self._session.answer_detach(self)
            return
        if self.is_sender:
            self._prepare_transfers()
            self._pump()
        elif credit:
            self._credit = credit
            self._connection.write(self._session.flow(self))

    def refuse(self, condition: str, description: str) -> None:
        """Refuse the attach with the exact pattern of amqp-apis 4.3. No `LinkDetached` follows."""
        if self._state is not _LinkState.ATTACHING:
            return
        self._attach = None
        self._write_attach(None, None)
        self._write_detach(codec.Error(condition, description))

    def _write_attach(self, source: codec.Terminus | None, target: codec.Terminus | None) -> None:
        self._session.write(
            codec.Attach(
                name=self.name,
                handle=self._handle,
                role=not self.is_sender,
                snd_settle_mode=1 if self._sends_settled else 0,
                source=source,
                target=target,
                initial_delivery_count=0 if self.is_sender else None,
            )
        )

    def _write_detach(self, error: codec.Error) -> None:
        self._session.write(codec.Detach(handle=self._handle, closed=True, error=error))
        if self._peer_detached:
            self._session.forget(self)
        else:
            self._drop(_LinkState.DETACHING)

    def accept_delivery(self, request: Request) -> None:
        """Settle as accepted. Neighbours of one batch leave as one disposition."""
        if request.settled:
            return
        session = self._session
        delivery_id = request.delivery_id
        if session.accepted_end == delivery_id:
            session.accepted_end = delivery_id + 1
        elif not session.ended:
            if session.accepted_end < 0:
                self._connection.note_accepted(session)
            else:
                session.flush_accepted()
            session.accepted_start = delivery_id
            session.accepted_end = delivery_id + 1

    def reject_delivery(self, request: Request, condition: str, description: str) -> None:
        """Settle as rejected with an error."""
        error = codec.Described(codec.ULong(0x1D), [codec.Symbol(condition), description])
        self._settle(request, codec.Described(codec.ULong(0x25), [error]))

    def release_delivery(self, request: Request) -> None:
        """Settle as released."""
        self._settle(request, codec.Described(codec.ULong(0x26), []))

    def _settle(self, request: Request, state: codec.Described) -> None:
        if not request.settled and not self._session.ended:
            self._session.write(codec.Disposition(role=True, first=request.delivery_id, settled=True, state=state))

    def give_credit(self, count: int = 1) -> None:
        """Give credit back on a request link; it leaves as one flow with the batch."""
        if not self._returned:
            if self._state is not _LinkState.OPEN:
                return
            self._connection.note_credit(self)
        self._returned += count

    def send(self, message: bytes) -> None:
        """Send an encoded message on a reply link; it waits, in order, while there is no credit or window."""
        if self._credit > 0 and not self._queue and len(message) <= self._transfer_limit:
            session = self._session
            if session.remote_window > 0:
                self._credit -= 1
                self._delivery_count += 1
                session.remote_window -= 1
                session.next_outgoing_id += 1
                delivery_id = session.next_delivery_id
                session.next_delivery_id = (delivery_id + 1) & _MASK
                self._connection.write_transfer(
                    self._transfer_layout.pack(
                        self._transfer_width + len(message),
                        self._transfer_head,
                        delivery_id,
                        b"\xa0\x04",
                        delivery_id,
                        self._transfer_tail,
                    ),
                    message,
                )
                return
        if self._state is not _LinkState.OPEN or not self.is_sender:
            return
        if len(self._queue) >= self._connection.settings.max_queued_replies:
            self._connection.fail("amqp:resource-limit-exceeded", "too many replies wait for credit")
            return
        self._queue.append(message)
        self._queued_bytes += len(message)
        self._connection.queued_bytes += len(message)
        self._pump()

    def detach(self, condition: str, description: str) -> None:
        """Detach from our side; `LinkDetached` is not emitted for it."""
        if self._state is _LinkState.OPEN:
            self._write_detach(codec.Error(condition, description))

    def _prepare_transfers(self) -> None:
        """Encode what is the same in all single-frame transfers of this link: `send` fills in ids and size."""
        # List of 5 fields: handle, delivery-id, delivery-tag (4 bytes, the id), message-format 0, settled.
        handle = codec.encode(codec.UInt(self._handle))
        settled = b"\x41" if self._sends_settled else b"\x42"
        size = 1 + len(handle) + 5 + 6 + 1 + 1
        self._transfer_head = b"\x02\x00%b\x00\x53\x14\xc0%c\x05%b\x70" % (
            self._session.channel.to_bytes(2, "big"),
            size,
            handle,
        )
        self._transfer_tail = b"\x43" + settled
        self._transfer_layout = struct.Struct(f">I{len(self._transfer_head)}sI2sI2s")
        self._transfer_width = self._transfer_layout.size
        self._transfer_limit = self._connection.peer_max_frame_size - self._transfer_width

    def _pump(self) -> None:
        """Send what waits, as far as credit and window reach."""
        session = self._session
        queue = self._queue
        while queue and (self._credit > 0 or self._offset):
            if session.remote_window <= 0:
                session.blocked[self] = None
                return
            message = queue[0]
            if not self._offset:
                self._credit -= 1
                self._delivery_count += 1
                self._delivery_id = session.next_delivery_id
                session.next_delivery_id = (self._delivery_id + 1) & _MASK
            self._send_frame(message)
            if self._offset >= len(message):
                queue.popleft()
                self._offset = 0
                self._queued_bytes -= len(message)
                self._connection.queued_bytes -= len(message)
        if self._drain:
            self._drain = False
            self._delivery_count += self._credit
            self._credit = 0
            self._connection.write(session.flow(self, drain=True))

    def _send_frame(self, message: bytes) -> None:
        """Send one frame of a message: as much as the peer's max-frame-size allows."""
        session = self._session
        transfer = codec.Transfer(handle=self._handle)
        if not self._offset:
            transfer.delivery_id = self._delivery_id
            transfer.delivery_tag = self._delivery_id.to_bytes(4, "big")
            transfer.message_format = 0
            transfer.settled = self._sends_settled
        # `more` written or not makes the difference of a few bytes only: leave room for it always.
        room = self._connection.peer_max_frame_size - 40
        part = message[self._offset : self._offset + room]
        self._offset += len(part)
        transfer.more = self._offset < len(message)
        session.remote_window -= 1
        session.next_outgoing_id += 1
        session.write(transfer, part)

    def _drop(self, state: _LinkState) -> None:
        """Leave the open state for good, and what was kept for it."""
        self._state = state
        self._attach = None
        self._credit = 0
        self._connection.queued_bytes -= self._queued_bytes
        self._queued_bytes = 0
        self._queue.clear()
        self._session.blocked.pop(self, None)
        self._tails = {}
        if self._partial is not None:
            self._connection.partial_bytes -= self._partial.size
            self._partial = None


class _Partial:
    """A delivery of which more frames are to come."""

    __slots__ = ("delivery_id", "message_format", "parts", "settled", "size")

    def __init__(self, delivery_id: int, message_format: int) -> None:
        self.delivery_id = delivery_id
        self.message_format = message_format
        self.settled = False
        self.parts: list[bytes] = []
        self.size = 0


_ACCEPTED = struct.Struct(">IHH8sI1sI5s")
_FLOW = struct.Struct(">IHH8sI1sI1sI1sI1sI1sI1sI")


class _Session:
    """One session: windows, handles, and ids of deliveries."""

    __slots__ = (
        "accepted_end",
        "accepted_start",
        "blocked",
        "channel",
        "connection",
        "ended",
        "free_handles",
        "handle_max",
        "handles",
        "links",
        "next_delivery_id",
        "next_incoming_id",
        "next_outgoing_id",
        "remote_window",
        "window",
    )

    def __init__(self, connection: "Connection", channel: int, begin: codec.Begin) -> None:
        self.connection = connection
        self.channel = channel
        """Ours; the peer's is the key under which the connection keeps this."""
        self.links: dict[int, Link] = {}
        """By the peer's handle."""
        self.handles = 0
        self.free_handles: list[int] = []
        self.handle_max = begin.handle_max
        self.next_incoming_id = begin.next_outgoing_id
        self.window = _WINDOW
        """Transfers that the peer may still send."""
        self.next_outgoing_id = 0
        """Not wrapped; on the wire it is."""
        self.next_delivery_id = 0
        self.remote_window = begin.incoming_window
        self.blocked: dict[Link, None] = {}
        """Links with credit and messages that wait for the peer's window."""
        self.accepted_start = 0
        self.accepted_end = -1
        """Deliveries accepted and not yet told: the range [start, end); -1 if there are none."""
        self.ended = False
        """We have ended it, or the peer has."""

    def write(self, performative: codec.Performative, payload: bytes = b"") -> None:
        self.connection.write(codec.encode_frame(self.channel, performative, payload))

    def flow(self, link: Link | None = None, *, drain: bool = False) -> bytes:
        """Encode a flow frame, for a link if given."""
        if link is None or link.is_sender:
            flow = codec.Flow(
                next_incoming_id=self.next_incoming_id,
                incoming_window=self.window,
                next_outgoing_id=self.next_outgoing_id & _MASK,
                outgoing_window=_WINDOW,
            )
            if link is not None:
                flow.handle = link._handle
                flow.delivery_count = link._delivery_count & _MASK
                flow.link_credit = link._credit
                flow.available = len(link._queue)
                flow.drain = drain
            return codec.encode_frame(self.channel, flow)
        return _FLOW.pack(
            _FLOW.size,
            0x0200,
            self.channel,
            b"\x00\x53\x13\xc0\x24\x07\x70",
            self.next_incoming_id,
            b"\x70",
            self.window,
            b"\x70",
            self.next_outgoing_id & _MASK,
            b"\x70",
            _WINDOW,
            b"\x70",
            link._handle,
            b"\x70",
            link._delivery_count & _MASK,
            b"\x70",
            link._credit,
        )

    def flush_accepted(self) -> None:
        """Encode the disposition of the deliveries accepted so far."""
        if self.accepted_end >= 0:
            self.connection.dispositions.append(
                _ACCEPTED.pack(
                    _ACCEPTED.size,
                    0x0200,
                    self.channel,
                    # List of 5 fields: role receiver, first, last, settled, state accepted.
                    b"\x00\x53\x15\xc0\x11\x05\x41\x70",
                    self.accepted_start,
                    b"\x70",
                    self.accepted_end - 1,
                    b"\x41\x00\x53\x24\x45",
                )
            )
            self.accepted_end = -1

    def count_transfers(self, count: int) -> None:
        """Note that so many transfer frames have come."""
        self.next_incoming_id = (self.next_incoming_id + count) & _MASK
        self.window -= count
        if self.window < _WINDOW // 2:
            self.window = _WINDOW
            self.connection.write(self.flow())

    def take_handle(self) -> int | None:
        """Take the lowest handle of ours that is free; `None` if the peer's handle-max allows no more."""
        if self.free_handles:
            return heapq.heappop(self.free_handles)
        if self.handles > self.handle_max:
            return None
        self.handles += 1
        return self.handles - 1

    def forget(self, link: Link) -> None:
        """Both sides have detached: its handles are free again."""
        link._drop(_LinkState.GONE)
        if self.links.get(link._peer_handle) is link:
            del self.links[link._peer_handle]
            heapq.heappush(self.free_handles, link._handle)
            self.connection.link_count -= 1

    def answer_detach(self, link: Link) -> None:
        self.write(codec.Detach(handle=link._handle, closed=True))
        self.forget(link)


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


class _State(Enum):
    HEADER = auto()
    """Nothing has come yet."""
    OPENING = auto()
    """The header has come, the peer's open has not."""
    OPEN = auto()
    CLOSING = auto()
    """Our close is out; the peer's is awaited, all else ignored."""
    CLOSED = auto()


class _ProtocolError(Exception):
    """The peer broke a rule for which the connection is closed."""

    def __init__(self, condition: str, description: str) -> None:
        super().__init__(description)
        self.condition = condition


_FRAMING_ERROR: Final = "amqp:framing-error"
# How long a message-id is that is no string: null, ulong, uuid.
_ID_WIDTHS: Final = {0x40: 1, 0x44: 1, 0x53: 2, 0x80: 9, 0x98: 17}
_TRANSFER_START: Final = b"\x00\x53\x14\xc0"
_u32 = struct.Struct(">I").unpack_from


def _usual_ends() -> dict[bytes, int]:
    """The usual ways to write a transfer's fields after the delivery-tag, when it is one whole, fresh delivery.

    Returns:
        For each the count of the list, times two, plus one if the delivery is pre-settled.
    """
    ends: dict[bytes, int] = {}

    def extend(written: bytes, count: int, settled: bool, choices: tuple[tuple[bytes, ...], ...]) -> None:
        ends[written] = 2 * count + settled
        if choices:
            for value in choices[0]:
                is_settled = value in {b"\x41", b"\x56\x01"} if count == 4 else settled
                extend(written + value, count + 1, is_settled, choices[1:])

    null, true, false = b"\x40", b"\x41", b"\x42"
    # message-format, settled, more, rcv-settle-mode, state, resume, aborted, batchable
    formats = (null, b"\x43", b"\x52\x00", b"\x70\x00\x00\x00\x00")
    settled = (null, true, false, b"\x56\x00", b"\x56\x01")
    no = (null, false)
    extend(b"", 3, False, (formats, settled, no, (null, b"\x50\x00"), (null,), no, no, (null, true, false)))
    return ends


_USUAL_ENDS: Final = _usual_ends()


class Connection:
    """See the module."""

    def __init__(self, settings: ConnectionSettings, *, now: float) -> None:
        """Start to wait for the AMQP header. `now` is monotonic, in seconds, as everywhere here."""
        self.settings = settings
        self.peer_max_frame_size = _MIN_MAX_FRAME_SIZE
        self.queued_bytes = 0
        self.partial_bytes = 0
        self.link_count = 0
        self.dispositions: list[bytes] = []
        """Dispositions of accepted deliveries; they go out ahead of all else."""
        self._state = _State.HEADER
        self._input = b""
        self._out: list[bytes] = []
        self.write = self._out.append
        """Put one frame, or part of one, into the output."""
        self._events: list[Event] = []
        """Those that did not come about in `receive` or `tick`."""
        self._sessions: dict[int, _Session] = {}
        """By the peer's channel."""
        self._channels: set[int] = set()
        self._peer_channel_max = 0xFFFF
        self._accepting: list[_Session] = []
        self._crediting: list[Link] = []
        self._header_sent = False
        self._open_sent = False
        self._now = now
        self._last_received = now
        self._last_sent = now
        self._heartbeat_interval: float | None = None
        self._deadline: float | None = now + settings.open_timeout
        """Of the peer's open, later of its close."""
        # The short path takes no message that might be too large.
        self._short_limit = min(settings.max_frame_size, settings.max_message_size)

    # --- In -----------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take what was read. Never raises, whatever the bytes are."""
        self._now = self._last_received = now
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
        except _ProtocolError as error:
            self._fail(error.condition, str(error), events)
        return events

    def _take_frames(self, data: bytes, events: list[Event]) -> int:
        """Take the complete frames of the data; return where they end."""
        pos = 0
        end = len(data)
        if self._state is _State.HEADER:
            if not AMQP_HEADER.startswith(data[:8]):
                self._write_header()
                raise _ProtocolError(_FRAMING_ERROR, "the protocol header is not that of AMQP 1.0")
            if end < 8:
                return 0
            self._write_header()
            self._state = _State.OPENING
            pos = 8
        max_frame_size = self.settings.max_frame_size
        while end - pos >= 8:
            (size,) = _u32(data, pos)
            if not 8 <= size <= max_frame_size:
                raise _ProtocolError(_FRAMING_ERROR, "the size of a frame is out of range")
            stop = pos + size
            if stop > end:
                break
            if data.startswith(_TRANSFER_START, pos + 8) and self._state is _State.OPEN:
                taken = self._take_requests(data, pos, end, events)
                if taken != pos:
                    pos = taken
                    continue
            self._take_frame(data[pos:stop], events)
            pos = stop
            if self._state is _State.CLOSED:
                return end
        return pos

    def _take_requests(self, data: bytes, pos: int, end: int, events: list[Event]) -> int:
        """Take transfers of one request link, as many as follow each other and have the usual shape: the short path.

        Returns:
            Where the first frame begins that is left to the complete path.
        """
        requests: list[Request] = []
        try:
            session = self._sessions[data[pos + 6] << 8 | data[pos + 7]]
            code = data[pos + 14]
            if code == 0x52:
                link, width = session.links[data[pos + 15]], 2
            elif code == 0x43:
                link, width = session.links[0], 1
            else:
                link, width = session.links[_u32(data, pos + 15)[0]], 5
                if code != 0x70:
                    return pos
        except (LookupError, struct.error):
            return pos
        if link._state is not _LinkState.OPEN or link.is_sender or session.ended or link._partial is not None:
            return pos
        # All that must repeat in each frame: header without size, start of the performative; handle.
        head = data[pos + 4 : pos + 12]
        if not head.startswith(b"\x02\x00"):
            return pos
        handle = data[pos + 14 : pos + 14 + width]
        credit = link._credit
        tails = link._tails
        limit = self._short_limit
        read = codec.READ
        try:
            while credit:
                (size,) = _u32(data, pos)
                stop = pos + size
                if stop > end or size > limit or not data.startswith(head, pos + 4):
                    break
                at = pos + 14
                if not data.startswith(handle, at):
                    break
                at += width
                code = data[at]
                if code == 0x52:
                    delivery_id = data[at + 1]
                    at += 2
                elif code == 0x70:
                    (delivery_id,) = _u32(data, at + 1)
                    at += 5
                elif code == 0x43:
                    delivery_id = 0
                    at += 1
                else:
                    break
                if data[at] != 0xA0 or data[at + 1] > 32:
                    break
                section = pos + 13 + data[pos + 12]
                ending = _USUAL_ENDS[data[at + 2 + data[at + 1] : section]]
                if ending >> 1 != data[pos + 13]:
                    break

                # Header and message annotations are stepped over.
                at = section
                if data.startswith(b"\x00\x53\x70", at):
                    code = data[at + 3]
                    if code == 0xC0:
                        at += 5 + data[at + 4]
                    elif code == 0x45:
                        at += 4
                    else:
                        break
                if data.startswith(b"\x00\x53\x72\xc1", at):
                    at += 5 + data[at + 4]

                # Properties: the message-id is copied. All after it mostly repeats from request to request, so it is
                # read once and remembered.
                if not data.startswith(b"\x00\x53\x73\xc0", at):
                    break
                section = at + 5 + data[at + 4]
                count = data[at + 5]
                at += 6
                code = data[at]
                if code == 0xA1:
                    after = at + 2 + data[at + 1]
                else:
                    after = at + _ID_WIDTHS[code]
                if after > section:
                    break
                tail = data[after:section]
                known = tails.get(tail)
                if known is None or known[0] != count:
                    if not count or section > stop:
                        break
                    known = (count, *codec.read_properties_tail(data, after, section, count - 1))
                    if len(tails) < _MAX_TAILS:
                        tails[tail] = known
                _count, subject, reply_to, correlation_id = known
                if correlation_id is None and code != 0x40:
                    correlation_id = data[at:after]
                at = section

                application_properties: dict[str, object] = {}
                if data.startswith(b"\x00\x53\x74\xc1", at):
                    section = at + 5 + data[at + 4]
                    count = data[at + 5]
                    at += 6
                    while at < section:
                        if data[at] != 0xA1:
                            raise DecodeError("left to the complete path")
                        after = at + 2 + data[at + 1]
                        key = data[at + 2 : after].decode()
                        if data[after] == 0xA1:
                            at = after + 2 + data[after + 1]
                            application_properties[key] = data[after + 2 : at].decode()
                        else:
                            value, at = read[data[after]](data, after + 1, 1)
                            application_properties[key] = value
                        count -= 2
                    if count or at != section:
                        break

                body: bytes | None = None
                if at != stop:
                    if data.startswith(b"\x00\x53\x75", at):
                        code = data[at + 3]
                        if code == 0xA0:
                            section = at + 5
                            at = section + data[at + 4]
                        elif code == 0xB0:
                            section = at + 8
                            at = section + _u32(data, at + 4)[0]
                        else:
                            break
                        body = data[section:at] or None
                    elif data.startswith(b"\x00\x53\x77\x40", at):
                        at += 4
                    if at != stop:
                        break
                requests.append(
                    Request(
                        delivery_id,
                        ending & 1 == 1,
                        subject,
                        reply_to,
                        correlation_id,
                        application_properties,
                        body,
                    )
                )
                credit -= 1
                pos = stop
        except (LookupError, ValueError, struct.error, DecodeError):
            # Cut off, unusual or wrong: the complete path tells which.
            pass
        if requests:
            count = len(requests)
            link._credit = credit
            link._delivery_count += count
            session.count_transfers(count)
            self._add_requests(link, requests, events)
        return pos

    @staticmethod
    def _add_requests(link: Link, requests: list[Request], events: list[Event]) -> None:
        last = events[-1] if events else None
        if type(last) is RequestsReceived and last.link is link:
            last.requests.extend(requests)
        else:
            events.append(RequestsReceived(link, requests))

    def _take_frame(self, frame: bytes, events: list[Event]) -> None:
        """Take one frame: the complete path."""
        _size, offset, frame_type, channel = struct.unpack_from(">IBBH", frame)
        if not 8 <= 4 * offset <= len(frame) or frame_type != 0:
            raise _ProtocolError(_FRAMING_ERROR, "the header of a frame is malformed")
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
                raise _ProtocolError("amqp:illegal-state", "the first frame is not open")
            case codec.Begin():
                self._on_begin(channel, performative)
                return
        session = self._sessions.get(channel)
        if session is None:
            raise _ProtocolError("amqp:not-allowed", "a frame came on a channel without a session")
        if isinstance(performative, codec.End):
            self._on_end(channel, session, events)
        elif session.ended:
            pass  # sent before the peer saw our end
        else:
            match performative:
                case codec.Transfer():
                    self._on_transfer(session, performative, body[pos:], events)
                case codec.Flow():
                    self._on_flow(session, performative, events)
                case codec.Disposition():
                    self._on_disposition(session, performative)
                case codec.Attach():
                    self._on_attach(session, performative, events)
                case codec.Detach():
                    self._on_detach(session, performative, events)
                case (
                    codec.SaslMechanisms()
                    | codec.SaslInit()
                    | codec.SaslChallenge()
                    | codec.SaslResponse()
                    | codec.SaslOutcome()
                ):
                    raise _ProtocolError(_FRAMING_ERROR, "SASL is over")
                case _:
                    assert_never(performative)

    # --- Connection and sessions --------------------------------------------------------------------------------------

    def _on_open(self, peer: codec.Open, events: list[Event]) -> None:
        if self._state is not _State.OPENING:
            raise _ProtocolError("amqp:illegal-state", "the connection is open already")
        self._state = _State.OPEN
        self._deadline = None
        self.peer_max_frame_size = max(peer.max_frame_size, _MIN_MAX_FRAME_SIZE)
        self._peer_channel_max = peer.channel_max
        if peer.idle_time_out:
            # Half of what it asks for, so that one late frame does no harm (amqp-apis 2.2).
            self._heartbeat_interval = peer.idle_time_out / 2000
        self._write_open()
        events.append(Opened(peer.container_id, peer.hostname, peer.properties or {}))

    def _write_header(self) -> None:
        if not self._header_sent:
            self._header_sent = True
            self.write(AMQP_HEADER)

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
            properties={
                codec.Symbol("product"): settings.product,
                codec.Symbol("version"): settings.version,
            },
        )
        self.write(codec.encode_frame(0, performative))

    def _on_close(self, error: codec.Error | None, events: list[Event]) -> None:
        self._write_open()
        self.write(codec.encode_frame(0, codec.Close()))
        self._finish(Closed(error.condition, error.description) if error else Closed(), events)

    def fail(self, condition: str, description: str) -> None:
        """Close because of what the peer does wrong, outside `receive`; `Closed` comes with the next call."""
        self._fail(condition, description, self._events)

    def _fail(self, condition: str, description: str, events: list[Event]) -> None:
        if self._state is _State.CLOSED:
            return
        # Bytes that are not even AMQP are answered with our header alone.
        if self._state not in {_State.HEADER, _State.CLOSING}:
            self._write_open()
            self.write(codec.encode_frame(0, codec.Close(error=codec.Error(condition, description))))
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
            self._drop_links(session, events)
        self._sessions = {}

    def _drop_links(self, session: _Session, events: list[Event]) -> None:
        session.ended = True
        session.accepted_end = -1
        for link in session.links.values():
            if link._state is not _LinkState.DETACHING:
                events.append(LinkDetached(link))
            link._drop(_LinkState.GONE)
        self.link_count -= len(session.links)
        session.links = {}

    def _on_begin(self, channel: int, begin: codec.Begin) -> None:
        if begin.remote_channel is not None or channel in self._sessions:
            raise _ProtocolError("amqp:not-allowed", "the session is begun already")
        if channel >= self.settings.max_sessions:
            raise _ProtocolError(_FRAMING_ERROR, "the channel is above channel-max")
        own = next(number for number in range(len(self._channels) + 1) if number not in self._channels)
        if own > self._peer_channel_max:
            raise _ProtocolError("amqp:not-allowed", "there are more sessions than channel-max allows")
        self._channels.add(own)
        session = self._sessions[channel] = _Session(self, own, begin)
        session.write(
            codec.Begin(remote_channel=channel, next_outgoing_id=0, incoming_window=_WINDOW, outgoing_window=_WINDOW)
        )

    def _on_end(self, channel: int, session: _Session, events: list[Event]) -> None:
        if not session.ended:
            session.flush_accepted()
            session.write(codec.End())
        self._drop_links(session, events)
        del self._sessions[channel]
        self._channels.discard(session.channel)

    def _end(self, session: _Session, condition: str, description: str, events: list[Event]) -> None:
        """End a session from our side; the peer's end is awaited."""
        session.flush_accepted()
        session.write(codec.End(error=codec.Error(condition, description)))
        self._drop_links(session, events)

    # --- Links --------------------------------------------------------------------------------------------------------

    def _on_attach(self, session: _Session, attach: codec.Attach, events: list[Event]) -> None:
        if attach.handle in session.links:
            self._end(session, "amqp:session:handle-in-use", "the handle is in use", events)
            return
        if self.link_count >= self.settings.max_links + _MAX_REFUSED_LINKS:
            raise _ProtocolError("amqp:resource-limit-exceeded", "too many links")
        handle = session.take_handle()
        if handle is None:
            self._end(session, "amqp:resource-limit-exceeded", "there are more links than handle-max allows", events)
            return
        link = session.links[attach.handle] = Link(self, session, attach)
        link._handle = handle
        self.link_count += 1
        if self.link_count > self.settings.max_links:
            link.refuse("amqp:resource-limit-exceeded", "too many links")
        elif attach.target is not None and attach.target.is_coordinator and not attach.role:
            link.refuse("amqp:not-implemented", "transactions are not supported")
        else:
            events.append(LinkAttached(link))

    def _find_link(self, session: _Session, handle: int, events: list[Event]) -> Link | None:
        link = session.links.get(handle)
        if link is None:
            self._end(session, "amqp:session:unattached-handle", "the handle is not attached", events)
        return link

    def _on_detach(self, session: _Session, detach: codec.Detach, events: list[Event]) -> None:
        link = self._find_link(session, detach.handle, events)
        if link is None:
            return
        match link._state:
            case _LinkState.ATTACHING:
                # Its attach has to be answered first, which the application does after this call.
                link._peer_detached = True
                events.append(LinkDetached(link))
            case _LinkState.OPEN:
                events.append(LinkDetached(link))
                session.answer_detach(link)
            case _LinkState.DETACHING | _LinkState.GONE:
                session.forget(link)

    def _on_flow(self, session: _Session, flow: codec.Flow, events: list[Event]) -> None:
        link: Link | None = None
        if flow.handle is not None:
            link = self._find_link(session, flow.handle, events)
            if link is None:
                return
        expected = flow.next_incoming_id if flow.next_incoming_id is not None else 0
        in_flight = (session.next_outgoing_id - expected) & _MASK
        session.remote_window = max(flow.incoming_window - in_flight, 0)
        if link is not None and link._state in {_LinkState.ATTACHING, _LinkState.OPEN}:
            if link.is_sender:
                self._on_credit(link, flow)
            elif flow.delivery_count is not None:
                # The peer skipped deliveries that it had credit for.
                skipped = (flow.delivery_count - link._delivery_count) & _MASK
                if 0 < skipped <= link._credit:
                    link._credit -= skipped
                    link._delivery_count += skipped
        if session.blocked and session.remote_window > 0:
            blocked, session.blocked = session.blocked, {}
            for waiting in blocked:
                waiting._pump()
        if flow.echo and self._state is _State.OPEN:
            is_open = link is not None and link._state is _LinkState.OPEN
            self.write(session.flow(link if is_open else None))

    @staticmethod
    def _on_credit(link: Link, flow: codec.Flow) -> None:
        if flow.link_credit is not None:
            count = flow.delivery_count if flow.delivery_count is not None else 0
            credit = (count + flow.link_credit - link._delivery_count) & _MASK
            link._credit = credit if credit <= flow.link_credit else 0
        link._drain = flow.drain
        if link._state is _LinkState.OPEN:
            link._pump()

    def _on_disposition(self, session: _Session, disposition: codec.Disposition) -> None:
        """The peer tells what became of replies, or that it has settled requests, which we had done before it.

        Nothing is remembered of a delivery, since none is ever sent again: only a peer that awaits our settlement
        (rcv-settle-mode second) needs an answer.
        """
        if not disposition.role or disposition.settled or not isinstance(disposition.state, codec.Described):
            return
        if disposition.state.descriptor == 0x23:  # received: not the last word
            return
        session.write(codec.Disposition(role=False, first=disposition.first, last=disposition.last, settled=True))

    def _on_transfer(self, session: _Session, transfer: codec.Transfer, payload: bytes, events: list[Event]) -> None:
        session.count_transfers(1)
        link = self._find_link(session, transfer.handle, events)
        if link is None or link._state in {_LinkState.DETACHING, _LinkState.GONE}:
            return
        if link.is_sender:
            self._detach(link, "amqp:not-allowed", "the peer receives on this link", events)
            return
        partial = link._partial
        if partial is None:
            if transfer.delivery_id is None:
                self._detach(link, "amqp:invalid-field", "a delivery has no delivery-id", events)
                return
            if link._credit <= 0:
                self._detach(link, "amqp:link:transfer-limit-exceeded", "the link has no credit", events)
                return
            link._credit -= 1
            link._delivery_count += 1
            partial = _Partial(transfer.delivery_id, transfer.message_format or 0)
        elif transfer.delivery_id is not None and transfer.delivery_id != partial.delivery_id:
            self._detach(link, "amqp:invalid-field", "a delivery began before the last one was complete", events)
            return
        else:
            self.partial_bytes -= partial.size
            link._partial = None
        if transfer.aborted:
            link.give_credit()
            return
        partial.settled = partial.settled or transfer.settled is True
        partial.size += len(payload)
        if partial.size > self.settings.max_message_size:
            self._detach(link, "amqp:link:message-size-exceeded", "the message is too large", events)
            return
        partial.parts.append(payload)
        if transfer.more:
            link._partial = partial
            self.partial_bytes += partial.size
            if self.partial_bytes > _MAX_PARTIAL_MESSAGES * self.settings.max_message_size:
                raise _ProtocolError("amqp:resource-limit-exceeded", "too many unfinished messages")
            return
        try:
            if partial.message_format:
                raise DecodeError("the message format is not 0")
            request = codec.decode_request(b"".join(partial.parts), partial.delivery_id, partial.settled)
        except DecodeError as error:
            undecodable = Request(partial.delivery_id, partial.settled, None, None, None, {}, None)
            link.reject_delivery(undecodable, "amqp:decode-error", str(error))
            link.give_credit()
            return
        self._add_requests(link, [request], events)

    def _detach(self, link: Link, condition: str, description: str, events: list[Event]) -> None:
        """Detach a link for what the peer did on it."""
        events.append(LinkDetached(link))
        if link._state is _LinkState.ATTACHING:
            # Only a peer that does not wait for our attach comes here.
            link.refuse(condition, description)
        else:
            link.detach(condition, description)

    # --- Out ----------------------------------------------------------------------------------------------------------

    def note_accepted(self, session: _Session) -> None:
        """Remember that a session has accepted deliveries to tell of."""
        self._accepting.append(session)

    def note_credit(self, link: Link) -> None:
        """Remember that a link has credit to tell of."""
        self._crediting.append(link)

    def write_transfer(self, head: bytes, message: bytes) -> None:
        """Put a transfer frame into the output."""
        self._out += head, message

    def data_to_send(self) -> bytes:
        """Take all that is ready: dispositions joined into ranges, one flow per link, replies, control frames."""
        if self._accepting:
            for session in self._accepting:
                session.flush_accepted()
            self._accepting.clear()
        out = self._out
        if self._crediting:
            for link in self._crediting:
                if link._state is _LinkState.OPEN:
                    link._credit += link._returned
                    out.append(link._session.flow(link))
                link._returned = 0
            self._crediting.clear()
        if self.dispositions:
            out[:0] = self.dispositions
            self.dispositions.clear()
        if not out:
            return b""
        self._last_sent = self._now
        data = b"".join(out)
        out.clear()
        return data

    @property
    def pending_output(self) -> int:
        """Bytes of replies that wait: for the peer's credit, its window, or for `data_to_send`."""
        return self.queued_bytes + sum(map(len, self._out))

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
                self.write(_HEARTBEAT)
        return events

    def close(self, condition: str | None = None, description: str | None = None) -> None:
        """Send `close`. `Closed` follows when the peer answers, after `close_timeout` (`tick`), or by `lost`."""
        if self._state in {_State.CLOSING, _State.CLOSED}:
            return
        self._write_open()
        error = codec.Error(condition, description) if condition is not None else None
        self._end_sessions(self._events)
        self.write(codec.encode_frame(0, codec.Close(error=error)))
        if self._state is _State.HEADER:
            # Who has not even sent a header will not answer.
            self._finish(Closed(condition, description), self._events)
            return
        self._state = _State.CLOSING
        self._deadline = self._now + self.settings.close_timeout

    def lost(self) -> list[Event]:
        """The socket is gone (end of file, reset): `LinkDetached` for each link, and `Closed` unless it came before."""
        events, self._events = self._events, []
        if self._state is not _State.CLOSED:
            self._finish(Closed(), events)
        return events
