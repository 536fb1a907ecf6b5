"""Any bytes at the AMQP front door: they end in events or in the documented close, never in an exception.

The short form is part of the tests; with `KAMADO_FUZZ_SECONDS` set each test goes on for so many seconds (`make fuzz`).
"""

import os
import random
import struct
import time
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.amqp import strategies
from tests.unit.amqp.peer import message
from tests.unit.amqp.test_codec import performatives

from kamado.amqp import codec
from kamado.amqp.connection import (
    AMQP_HEADER,
    Closed,
    Connection,
    ConnectionSettings,
    Event,
    Link,
    LinkAttached,
    LinkDetached,
    Opened,
    RequestsReceived,
)
from kamado.amqp.sasl import SASL_HEADER, Outcome, SaslServer

SECONDS = float(os.environ.get("KAMADO_FUZZ_SECONDS", "0"))
fuzzed = settings(
    max_examples=2000 if SECONDS else 200,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
CONDITIONS = {
    "amqp:decode-error",
    "amqp:framing-error",
    "amqp:illegal-state",
    "amqp:not-allowed",
    "amqp:resource-limit-exceeded",
}
MAX_FRAME_SIZE = 512


def keep_on(check: Callable[[], None]) -> None:
    """Run a Hypothesis check once, or for as long as was asked for."""
    deadline = time.monotonic() + SECONDS
    while True:
        check()
        if time.monotonic() >= deadline:
            return


# --- What a client may send: the right frames in a strange order, strange frames, and noise ---------------------------

small = st.sampled_from([0, 1, 2, 3, 255, 256, 65535, 2**31, 2**32 - 1])
handles = st.sampled_from([0, 1, 1, 1, 2, 2**32 - 1])
windows = st.sampled_from([0, 1, 2, 100, 2**31 - 1, 2**32 - 1])
addresses = st.sampled_from(["registration/acme", "registration/acme/r", "tenant", "tenant/r", "", None])
likely: st.SearchStrategy[codec.Performative] = st.one_of(
    st.builds(
        codec.Open,
        container_id=st.just("c"),
        max_frame_size=st.sampled_from([0, 512, 65536]),
        channel_max=st.sampled_from([0, 1, 65535]),
        idle_time_out=st.sampled_from([None, 0, 1, 8000]),
    ),
    st.builds(codec.Begin, next_outgoing_id=small, incoming_window=windows, outgoing_window=windows, handle_max=small),
    st.builds(
        codec.Attach,
        name=st.sampled_from(["a", "b"]),
        handle=handles,
        role=st.booleans(),
        snd_settle_mode=st.integers(0, 3),
        source=addresses.map(codec.Terminus.source) | st.none(),
        target=addresses.map(codec.Terminus.target) | st.none(),
        initial_delivery_count=small | st.none(),
    ),
    st.builds(
        codec.Flow,
        next_incoming_id=small | st.none(),
        incoming_window=windows,
        next_outgoing_id=small,
        outgoing_window=windows,
        handle=handles | st.none(),
        delivery_count=small | st.none(),
        link_credit=windows | st.none(),
        drain=st.booleans(),
        echo=st.booleans(),
    ),
    st.builds(
        codec.Disposition,
        role=st.booleans(),
        first=small,
        last=small | st.none(),
        settled=st.booleans(),
        state=st.sampled_from([None, codec.Described(codec.ULong(0x24), []), codec.Described(codec.ULong(0x25), [])]),
    ),
    st.builds(codec.Detach, handle=handles, closed=st.booleans()),
    st.builds(codec.End),
    st.builds(codec.Close),
)
transfers = st.builds(
    codec.Transfer,
    handle=handles,
    delivery_id=small | st.none(),
    delivery_tag=st.binary(max_size=5),
    message_format=st.sampled_from([0, 0, 0, None, 1]),
    settled=st.sampled_from([None, False, True]),
    more=st.sampled_from([False, False, False, True]),
    aborted=st.sampled_from([False, False, False, True]),
)
messages = st.builds(
    message,
    message_id=st.sampled_from(["m1", None, codec.ULong(5)]),
    reply_to=st.sampled_from(["registration/acme/r", None]),
    body=st.none() | st.binary(max_size=20),
)
payloads = (
    messages | st.binary(max_size=60) | st.tuples(messages, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
)
channels = st.sampled_from([0, 0, 0, 0, 1, 300])
frames = st.one_of(
    st.builds(codec.encode_frame, channels, likely),
    st.builds(codec.encode_frame, channels, transfers, payloads),
    st.builds(codec.encode_frame, channels, performatives),
    st.just(bytes.fromhex("0000000802000000")),
    st.binary(max_size=40),
    st.binary(max_size=40).map(lambda body: struct.pack(">IBBH", 8 + len(body), 2, 0, 0) + b"\0\x53" + body),
    strategies.anything.map(codec.encode).map(lambda body: struct.pack(">IBBH", 8 + len(body), 2, 0, 0) + body),
)
START = (
    AMQP_HEADER
    + codec.encode_frame(0, codec.Open(container_id="c", max_frame_size=512, idle_time_out=8000))
    + codec.encode_frame(0, codec.Begin(next_outgoing_id=0, incoming_window=5, outgoing_window=5))
    + codec.encode_frame(
        0, codec.Attach(name="r", handle=0, role=True, source=codec.Terminus.source("registration/acme/r"))
    )
    + codec.encode_frame(
        0, codec.Attach(name="s", handle=1, role=False, target=codec.Terminus.target("registration/acme"))
    )
)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """A stream of a client, damaged or not, in pieces."""
    stream = bytearray(draw(st.sampled_from([START, START, START, START, AMQP_HEADER, b""])))
    for frame in draw(st.lists(frames, max_size=12)):
        stream += frame
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        if stream:
            stream[draw(st.integers(0, len(stream) - 1))] = draw(st.integers(0, 255))
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return [bytes(stream[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


class Application:
    """Does to a connection what a server does, and checks what the connection promises."""

    def __init__(self, choices: Callable[[int], int]) -> None:
        self.choose = choices
        self.connection = Connection(
            ConnectionSettings(
                container_id="s",
                max_frame_size=4096,
                max_message_size=2000,
                max_links=3,
                max_sessions=2,
                max_queued_replies=3,
            ),
            now=0.0,
        )
        self.open_links: set[Link] = set()
        self.reply_link: Link | None = None
        self.opened = 0
        self.closed: Closed | None = None
        self.output = bytearray()

    def handle(self, events: list[Event]) -> None:
        for event in events:
            assert self.closed is None, "an event after Closed"
            match event:
                case Opened():
                    self.opened += 1
                case LinkAttached(link):
                    if self.choose(4) == 0:
                        link.refuse("amqp:not-found", "no")
                        self.open_links.discard(link)
                    else:
                        link.accept(self.choose(4))
                        self.open_links.add(link)
                        if link.is_sender:
                            self.reply_link = link
                case LinkDetached(link):
                    assert not link.is_open
                    self.open_links.discard(link)
                case RequestsReceived(link, requests):
                    assert link in self.open_links
                    assert requests
                    for request in requests:
                        self.answer(link, request)
                case Closed():
                    self.closed = event
                    assert not self.open_links
        self.take_output()

    def answer(self, link: Link, request: codec.Request) -> None:
        match self.choose(6):
            case 0:
                link.reject_delivery(request, "hono:bad-request", "malformed request message")
            case 1:
                link.release_delivery(request)
            case _:
                link.accept_delivery(request)
        if self.reply_link is not None:
            size = (0, 10, 1000)[self.choose(3)]
            self.reply_link.send(
                codec.encode_reply("registration", request.correlation_id or b"\x40", 200, b"x" * size)
            )
        if self.choose(8) == 0 and link.is_open:
            link.detach("amqp:resource-deleted", "gone")
            self.open_links.discard(link)
        link.give_credit()

    def take_output(self) -> None:
        data = self.connection.data_to_send()
        assert self.connection.pending_output >= 0
        self.output += data

    def finish(self) -> None:
        self.handle(self.connection.tick(3.0))
        self.handle(self.connection.lost())
        assert self.closed is not None
        assert self.connection.is_closed
        assert self.connection.next_deadline() is None
        assert self.connection.pending_output == 0
        shared = self.connection._shared
        assert (shared.link_count, shared.queued_bytes, shared.partial_bytes) == (0, 0, 0)
        self.check_output()

    def check_output(self) -> None:
        """All that was written is well-formed, within the peer's frame size, and nothing follows a close."""
        data = bytes(self.output)
        if not data:
            return
        assert data.startswith(AMQP_HEADER)
        data = data[8:]
        kinds: list[type] = []
        while data:
            size, offset, frame_type, _channel = struct.unpack_from(">IBBH", data)
            assert 8 <= size <= len(data)
            assert (offset, frame_type) == (2, 0)
            if size > 8:
                performative, _ = codec.decode_performative(data[8:size])
                kinds.append(type(performative))
                assert size <= MAX_FRAME_SIZE or not isinstance(performative, codec.Transfer)
                if isinstance(performative, codec.Close) and performative.error is not None:
                    assert performative.error.condition in CONDITIONS
            data = data[size:]
        if kinds:
            assert kinds[0] is codec.Open
            assert kinds.count(codec.Open) == 1
            assert codec.Close not in kinds[:-1]


def feed(application: Application, pieces: list[bytes]) -> None:
    now = 0.0
    for piece in pieces:
        application.handle(application.connection.receive(piece, now))
        if application.choose(4) == 0:
            now += 2.0
            application.handle(application.connection.tick(now))
        if application.choose(30) == 0:
            application.connection.close("amqp:resource-limit-exceeded", "enough", now=now)
            application.take_output()
    application.finish()


@fuzzed
@given(streams(), st.randoms(use_true_random=False))
def check_streams(pieces: list[bytes], choices: random.Random) -> None:
    feed(Application(choices.randrange), pieces)


def test_streams_of_frames() -> None:
    keep_on(check_streams)


@fuzzed
@given(st.lists(st.binary(max_size=200), max_size=5))
def check_noise(pieces: list[bytes]) -> None:
    for start in (b"", AMQP_HEADER, START):
        feed(Application(lambda _count: 1), [start, *pieces])


def test_any_bytes() -> None:
    keep_on(check_noise)


sasl_frames = st.one_of(
    st.sampled_from(
        [
            codec.encode_frame(0, codec.SaslInit(mechanism="PLAIN", initial_response=b"\0u\0p"), frame_type=1),
            codec.encode_frame(0, codec.SaslInit(mechanism="PLAIN"), frame_type=1),
            codec.encode_frame(0, codec.SaslResponse(response=b"\0u\0p"), frame_type=1),
            START,
        ]
    ),
    performatives.map(lambda performative: codec.encode_frame(0, performative, frame_type=1)),
    st.binary(max_size=100),
)


@fuzzed
@given(st.sampled_from([SASL_HEADER, b""]), st.lists(sasl_frames, max_size=5), st.data())
def check_sasl(start: bytes, rest: list[bytes], data: st.DataObject) -> None:
    stream = bytearray(start + b"".join(rest))
    if stream and data.draw(st.booleans()):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(stream)))
    server = SaslServer(["EXTERNAL", "PLAIN"], now=0.0)
    attempts = 0
    for piece in (bytes(stream[:cut]), bytes(stream[cut:])):
        for _attempt in server.receive(piece, 0.0):
            attempts += 1
            server.finish(Outcome.OK)
    assert attempts <= 1
    assert server.succeeded == (attempts == 1)
    assert not (server.succeeded and server.is_over)
    server.data_to_send()
    if server.succeeded:
        feed(Application(lambda _count: 1), [server.remaining()])


def test_any_bytes_before_the_login() -> None:
    keep_on(check_sasl)
