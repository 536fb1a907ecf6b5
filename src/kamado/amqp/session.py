"""Sessions and links of one connection: windows, credit, deliveries. Without I/O; frames in, events and frames out.

`Link` is what the application works with; `Session` is for `connection.py` alone. What the sessions of a connection
have in common, its output, limits and counts, is `Shared`.

Two ways lead from a transfer to a `Request`. Those of the usual shape, one frame each, on an open request link take the
short one, `Session.take_usual`: it reads many of them in one go where they lie in the buffer and builds nothing but
the requests. All else takes the complete one, frame by frame, through `codec` and `Session.on_transfer`. Both must give
the same `Request`; what the short way does not recognise it leaves, untouched, to the complete one.
"""

import heapq
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from kamado.amqp import codec
from kamado.amqp.codec import DecodeError, Request
from kamado.amqp.values import READ, u32

__all__ = [
    "FRAMING_ERROR",
    "MIN_MAX_FRAME_SIZE",
    "WINDOW",
    "Closed",
    "Event",
    "Link",
    "LinkAttached",
    "LinkDetached",
    "Opened",
    "ProtocolError",
    "RequestsReceived",
    "Session",
    "Shared",
]

# What is advertised for each session; topped up when half of it is used, so it never closes.
WINDOW: Final = 0x7FFFFFFF
# AMQP 2.8.11: no peer may ask for smaller frames.
MIN_MAX_FRAME_SIZE: Final = 512
FRAMING_ERROR: Final = "amqp:framing-error"
_MASK: Final = 0xFFFFFFFF
# Links over `max_links` are refused; a peer that goes on without reading the refusals is cut off.
_MAX_REFUSED_LINKS: Final = 1024
# A link's name and address are kept as long as the link: bytes, far more than stock clients need.
_MAX_NAME_SIZE: Final = 1024
# Unfinished multi-frame requests of one connection together, as a multiple of `max_message_size`.
_MAX_PARTIAL_MESSAGES: Final = 16
# Different forms of properties, message-id aside, that are remembered for one link.
_MAX_TAILS: Final = 64


class ProtocolError(Exception):
    """The peer broke a rule for which the connection is closed."""

    def __init__(self, condition: str, description: str) -> None:
        super().__init__(description)
        self.condition = condition


class Shared:
    """What the sessions of one connection share.

    Args:
        fail: Closes the connection with a condition and a description.
    """

    def __init__(
        self,
        *,
        max_links: int,
        max_message_size: int,
        max_queued_replies: int,
        max_frame_size: int,
        fail: Callable[[str, str], None],
    ) -> None:
        self.max_links = max_links
        self.max_message_size = max_message_size
        self.max_queued_replies = max_queued_replies
        # The short path takes no message that might be too large.
        self.short_limit = min(max_frame_size, max_message_size)
        self.fail = fail
        self.peer_max_frame_size = MIN_MAX_FRAME_SIZE
        self.link_count = 0
        self.queued_bytes = 0
        """Of replies that wait for credit or window."""
        self.partial_bytes = 0
        """Of requests whose last frame has not come."""
        self.frames: list[bytes] = []
        """What is to be written: whole frames, or heads and messages of transfers in turn."""
        self.write = self.frames.append
        self.dispositions: list[bytes] = []
        """Dispositions of accepted deliveries; they go out ahead of all else."""
        self.accepting: list[Session] = []
        """Sessions with accepted deliveries to tell of."""
        self.crediting: list[Link] = []
        """Links with credit to tell of."""

    def take_output(self) -> bytes:
        """Take all that is ready: dispositions joined into ranges, one flow per link, replies, control frames."""
        if self.accepting:
            for session in self.accepting:
                session.flush_accepted()
            self.accepting.clear()
        frames = self.frames
        if self.crediting:
            for link in self.crediting:
                link.flush_credit()
            self.crediting.clear()
        if self.dispositions:
            frames[:0] = self.dispositions
            self.dispositions.clear()
        output = b"".join(frames)
        frames.clear()
        return output


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer's `open` has come and ours is on its way."""

    container_id: str
    hostname: str | None
    properties: Mapping[object, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LinkAttached:
    """The peer attaches a link: call `accept` or `refuse`."""

    link: "Link"


@dataclass(frozen=True, slots=True)
class RequestsReceived:
    """Requests of one link, in order, as many as came in a row. One the engine could not decode is not among them: it
    is rejected with amqp:decode-error and its credit given back."""

    link: "Link"
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class LinkDetached:
    """An accepted link is gone, for whatever reason but our own `detach`."""

    link: "Link"


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over; write what is left and close the socket.

    `condition` is the peer's when it closed with an error, ours when we did; `None` for an orderly end.
    """

    condition: str | None = None
    description: str | None = None


Event = Opened | LinkAttached | RequestsReceived | LinkDetached | Closed


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
        "_shared",
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

    def __init__(self, session: "Session", attach: codec.Attach) -> None:
        terminus = attach.source if attach.role else attach.target
        self.name = attach.name
        self.is_sender = attach.role
        self.address = terminus.address if terminus is not None else None
        self.dynamic = terminus is not None and terminus.dynamic
        self.snd_settle_mode = attach.snd_settle_mode
        self.context: object = None
        self._session = session
        self._shared = session.shared
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
            self._shared.write(self._session.flow(self))

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
                self._shared.accepting.append(session)
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
            self._shared.crediting.append(self)
        self._returned += count

    def flush_credit(self) -> None:
        """Write the flow that tells of the credit given back; only for `Shared`."""
        if self._state is _LinkState.OPEN:
            self._credit += self._returned
            self._shared.write(self._session.flow(self))
        self._returned = 0

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
                self._shared.frames += (
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
        if len(self._queue) >= self._shared.max_queued_replies:
            self._shared.fail("amqp:resource-limit-exceeded", "too many replies wait for credit")
            return
        self._queue.append(message)
        self._queued_bytes += len(message)
        self._shared.queued_bytes += len(message)
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
        self._transfer_limit = self._shared.peer_max_frame_size - self._transfer_width

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
                self._shared.queued_bytes -= len(message)
        if self._drain:
            self._drain = False
            self._delivery_count += self._credit
            self._credit = 0
            self._shared.write(session.flow(self, drain=True))

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
        room = self._shared.peer_max_frame_size - 40
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
        self._shared.queued_bytes -= self._queued_bytes
        self._queued_bytes = 0
        self._queue.clear()
        self._session.blocked.pop(self, None)
        self._tails = {}
        if self._partial is not None:
            self._shared.partial_bytes -= self._partial.size
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


# How long a message-id is that is no string: null, ulong, uuid.
_ID_WIDTHS: Final = {0x40: 1, 0x44: 1, 0x53: 2, 0x80: 9, 0x98: 17}


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


def _add_requests(link: Link, requests: list[Request], events: list[Event]) -> None:
    last = events[-1] if events else None
    if type(last) is RequestsReceived and last.link is link:
        last.requests.extend(requests)
    else:
        events.append(RequestsReceived(link, requests))


_ACCEPTED = struct.Struct(">IHH8sI1sI5s")
_FLOW = struct.Struct(">IHH7sI1sI1sI1sI1sI1sI1sI")


class Session:
    """One session: windows, handles, and ids of deliveries."""

    __slots__ = (
        "accepted_end",
        "accepted_start",
        "blocked",
        "channel",
        "ended",
        "free_handles",
        "handle_max",
        "handles",
        "links",
        "next_delivery_id",
        "next_incoming_id",
        "next_outgoing_id",
        "remote_window",
        "shared",
        "unanswered",
        "window",
    )

    def __init__(self, shared: Shared, channel: int, begin: codec.Begin) -> None:
        self.shared = shared
        self.channel = channel
        """Ours; the peer's is the key under which the connection keeps this."""
        self.links: dict[int, Link] = {}
        """By the peer's handle."""
        self.unanswered: dict[Link, None] = {}
        """Links that the peer has detached, so that its handle is free again, before their attach was answered."""
        self.handles = 0
        self.free_handles: list[int] = []
        self.handle_max = begin.handle_max
        self.next_incoming_id = begin.next_outgoing_id
        self.window = WINDOW
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
        self.shared.write(codec.encode_frame(self.channel, performative, payload))

    def flow(self, link: Link | None = None, *, drain: bool = False) -> bytes:
        """Encode a flow frame, for a link if given."""
        if link is None or link.is_sender:
            flow = codec.Flow(
                next_incoming_id=self.next_incoming_id,
                incoming_window=self.window,
                next_outgoing_id=self.next_outgoing_id & _MASK,
                outgoing_window=WINDOW,
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
            WINDOW,
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
            self.shared.dispositions.append(
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
        if self.window < WINDOW // 2:
            self.window = WINDOW
            self.shared.write(self.flow())

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
        if link in self.unanswered:
            del self.unanswered[link]
        elif self.links.get(link._peer_handle) is link:
            del self.links[link._peer_handle]
        else:
            return
        heapq.heappush(self.free_handles, link._handle)
        self.shared.link_count -= 1

    def answer_detach(self, link: Link) -> None:
        self.write(codec.Detach(handle=link._handle, closed=True))
        self.forget(link)

    def take_usual(self, data: bytes, pos: int, stop: int, events: list[Event]) -> int:
        """Take a frame that comes once for each look-up or so, and needs no full decoding: the short path.

        A run of requests may be taken with the first of them.

        Args:
            data: What has been read.
            pos: Where the frame begins; its header is the usual one.
            stop: Where it ends.
            events: Where events are added.

        Returns:
            Where the first frame begins that is not taken: `pos` if none is.
        """
        if self.ended or data[pos + 8] or data[pos + 9] != 0x53:
            return pos
        code = data[pos + 10]
        if code == 0x14:
            return self._take_requests(data, pos, events)
        if code == 0x15 and codec.is_settlement(data, pos + 8, stop):
            return stop
        if code == 0x13:
            flow = codec.read_usual_flow(data, pos + 8, stop)
            if flow is not None:
                self.on_flow(flow, events)
                return stop
        return pos

    def _take_requests(self, data: bytes, pos: int, events: list[Event]) -> int:
        """Take transfers of one request link, as many as follow each other and have the usual shape: the short path.

        Returns:
            Where the first frame begins that is left to the complete path.
        """
        requests: list[Request] = []
        try:
            code = data[pos + 14]
            if code == 0x52:
                link, width = self.links[data[pos + 15]], 2
            elif code == 0x43:
                link, width = self.links[0], 1
            else:
                link, width = self.links[u32(data, pos + 15)[0]], 5
                if code != 0x70:
                    return pos
        except (LookupError, struct.error):
            return pos
        if link._state is not _LinkState.OPEN or link.is_sender or link._partial is not None or data[pos + 11] != 0xC0:
            return pos
        end = len(data)
        # All that must repeat in each frame: header without size, start of the performative; handle.
        head = data[pos + 4 : pos + 12]
        handle = data[pos + 14 : pos + 14 + width]
        credit = link._credit
        tails = link._tails
        limit = self.shared.short_limit
        read = READ
        try:
            while credit:
                (size,) = u32(data, pos)
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
                    (delivery_id,) = u32(data, at + 1)
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
                if data.startswith(b"\x00\x53\x73\xd0", at):
                    # Proton-J, the library of the stock adapters, writes this section wide whatever its size.
                    section = at + 8 + u32(data, at + 4)[0]
                    (count,) = u32(data, at + 8)
                    at += 12
                elif data.startswith(b"\x00\x53\x73\xc0", at):
                    section = at + 5 + data[at + 4]
                    count = data[at + 5]
                    at += 6
                else:
                    break
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
                if data.startswith(b"\x00\x53\x74", at):
                    code = data[at + 3]
                    if code == 0xC1:
                        section = at + 5 + data[at + 4]
                        count = data[at + 5]
                        at += 6
                    elif code == 0xD1:  # as Proton-C writes it
                        section = at + 8 + u32(data, at + 4)[0]
                        (count,) = u32(data, at + 8)
                        at += 12
                    else:
                        break
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
                            at = section + u32(data, at + 4)[0]
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
            self.count_transfers(count)
            _add_requests(link, requests, events)
        return pos

    def end(self, condition: str, description: str, events: list[Event]) -> None:
        """End a session from our side; the peer's end is awaited."""
        self.flush_accepted()
        self.write(codec.End(error=codec.Error(condition, description)))
        self.drop_links(events)

    def drop_links(self, events: list[Event]) -> None:
        self.ended = True
        self.accepted_end = -1
        for link in self.links.values():
            if link._state is not _LinkState.DETACHING:
                events.append(LinkDetached(link))
            link._drop(_LinkState.GONE)
        for link in self.unanswered:
            link._drop(_LinkState.GONE)
        self.shared.link_count -= len(self.links) + len(self.unanswered)
        self.links, self.unanswered = {}, {}

    def on_attach(self, attach: codec.Attach, events: list[Event]) -> None:
        if attach.handle in self.links:
            self.end("amqp:session:handle-in-use", "the handle is in use", events)
            return
        if self.shared.link_count >= self.shared.max_links + _MAX_REFUSED_LINKS:
            raise ProtocolError("amqp:resource-limit-exceeded", "too many links")
        handle = self.take_handle()
        if handle is None:
            self.end("amqp:resource-limit-exceeded", "there are more links than handle-max allows", events)
            return
        link = self.links[attach.handle] = Link(self, attach)
        link._handle = handle
        self.shared.link_count += 1
        address = link.address or ""
        if max(len(attach.name.encode()), len(address.encode())) > _MAX_NAME_SIZE:
            link.refuse("amqp:invalid-field", f"names and addresses have at most {_MAX_NAME_SIZE} bytes")
            # It is there until the peer detaches, too, which it may never do.
            link.name, link.address = "", None
        elif self.shared.link_count > self.shared.max_links:
            link.refuse("amqp:resource-limit-exceeded", "too many links")
        elif attach.target is not None and attach.target.is_coordinator and not attach.role:
            link.refuse("amqp:not-implemented", "transactions are not supported")
        else:
            events.append(LinkAttached(link))

    def _find_link(self, handle: int, events: list[Event]) -> Link | None:
        link = self.links.get(handle)
        if link is None:
            self.end("amqp:session:unattached-handle", "the handle is not attached", events)
        return link

    def on_detach(self, detach: codec.Detach, events: list[Event]) -> None:
        link = self._find_link(detach.handle, events)
        if link is None:
            return
        match link._state:
            case _LinkState.ATTACHING:
                # Its attach has to be answered first, which the application does after this call. The peer may use
                # its handle anew at once.
                link._peer_detached = True
                del self.links[detach.handle]
                self.unanswered[link] = None
                events.append(LinkDetached(link))
            case _LinkState.OPEN:
                events.append(LinkDetached(link))
                self.answer_detach(link)
            case _LinkState.DETACHING | _LinkState.GONE:
                self.forget(link)

    def on_flow(self, flow: codec.Flow, events: list[Event]) -> None:
        link: Link | None = None
        if flow.handle is not None:
            link = self._find_link(flow.handle, events)
            if link is None:
                return
        expected = flow.next_incoming_id if flow.next_incoming_id is not None else 0
        in_flight = (self.next_outgoing_id - expected) & _MASK
        self.remote_window = max(flow.incoming_window - in_flight, 0)
        if link is not None and link._state in {_LinkState.ATTACHING, _LinkState.OPEN}:
            if link.is_sender:
                self._on_credit(link, flow)
            elif flow.delivery_count is not None:
                # The peer skipped deliveries that it had credit for: they count as finished.
                skipped = (flow.delivery_count - link._delivery_count) & _MASK
                if 0 < skipped <= link._credit:
                    link._credit -= skipped
                    link._delivery_count += skipped
                    link.give_credit(skipped)
        if self.blocked and self.remote_window > 0:
            blocked, self.blocked = self.blocked, {}
            for waiting in blocked:
                waiting._pump()
        if flow.echo and not self.ended:
            is_open = link is not None and link._state is _LinkState.OPEN
            self.shared.write(self.flow(link if is_open else None))

    @staticmethod
    def _on_credit(link: Link, flow: codec.Flow) -> None:
        if flow.link_credit is not None:
            count = flow.delivery_count if flow.delivery_count is not None else 0
            credit = (count + flow.link_credit - link._delivery_count) & _MASK
            link._credit = credit if credit <= flow.link_credit else 0
        link._drain = flow.drain
        if link._state is _LinkState.OPEN:
            link._pump()

    def on_disposition(self, disposition: codec.Disposition) -> None:
        """The peer tells what became of replies, or that it has settled requests, which we had done before it.

        Nothing is remembered of a delivery, since none is ever sent again: only a peer that awaits our settlement
        (rcv-settle-mode second) needs an answer.
        """
        if not disposition.role or disposition.settled or not isinstance(disposition.state, codec.Described):
            return
        if disposition.state.descriptor == 0x23:  # received: not the last word
            return
        self.write(codec.Disposition(role=False, first=disposition.first, last=disposition.last, settled=True))

    def on_transfer(self, transfer: codec.Transfer, payload: bytes, events: list[Event]) -> None:
        self.count_transfers(1)
        link = self._find_link(transfer.handle, events)
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
            self.shared.partial_bytes -= partial.size
            link._partial = None
        if transfer.aborted:
            link.give_credit()
            return
        partial.settled = partial.settled or transfer.settled is True
        partial.size += len(payload)
        if partial.size > self.shared.max_message_size:
            self._detach(link, "amqp:link:message-size-exceeded", "the message is too large", events)
            return
        if payload:
            # A frame without any costs its sender nothing, so there may be millions.
            partial.parts.append(payload)
        if transfer.more:
            link._partial = partial
            self.shared.partial_bytes += partial.size
            if self.shared.partial_bytes > _MAX_PARTIAL_MESSAGES * self.shared.max_message_size:
                raise ProtocolError("amqp:resource-limit-exceeded", "too many unfinished messages")
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
        _add_requests(link, [request], events)

    def _detach(self, link: Link, condition: str, description: str, events: list[Event]) -> None:
        """Detach a link for what the peer did on it."""
        events.append(LinkDetached(link))
        if link._state is _LinkState.ATTACHING:
            # Only a peer that does not wait for our attach comes here.
            link.refuse(condition, description)
        else:
            link.detach(condition, description)
