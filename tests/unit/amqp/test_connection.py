"""One connection from header to close: amqp-apis 1.2, 2.1 to 2.4, and AMQP 2.4."""

import pytest
from tests.unit.amqp.peer import Peer, message

from kamado.amqp import codec
from kamado.amqp.connection import (
    AMQP_HEADER,
    Closed,
    LinkDetached,
    Opened,
)

HEARTBEAT = bytes.fromhex("0000000802000000")


def closing(peer: Peer) -> codec.Error | None:
    """Read the close that the server has written last."""
    frames = peer.read()
    performative = frames[-1][1]
    assert isinstance(performative, codec.Close)
    assert peer.connection.is_closed
    assert peer.connection.next_deadline() is None
    return performative.error


def test_open_is_answered_as_specified() -> None:
    # amqp-apis 2.1
    peer = Peer()
    peer.write(AMQP_HEADER)
    assert peer.connection.data_to_send() == AMQP_HEADER
    events = peer.send(codec.Open(container_id="adapter", hostname="any", properties={codec.Symbol("product"): "p"}))
    assert events == [Opened("adapter", "any", {"product": "p"})]
    answer = peer.read_only(codec.Open)
    assert answer.container_id == "server"
    assert answer.hostname is None
    assert answer.max_frame_size == 32768
    assert answer.idle_time_out == 10000
    assert answer.offered_capabilities == ()
    assert answer.properties is not None
    assert {(type(key), key, type(value)) for key, value in answer.properties.items()} == {
        (codec.Symbol, "product", str),
        (codec.Symbol, "version", str),
    }


def test_header_and_open_may_come_byte_by_byte() -> None:
    peer = Peer()
    data = AMQP_HEADER + codec.encode_frame(0, codec.Open(container_id="c"))
    for position in range(len(data)):
        events = peer.write(data[position : position + 1])
        assert events == ([Opened("c", None, {})] if position == len(data) - 1 else [])


def test_unknown_fields_and_capabilities_are_ignored() -> None:
    # amqp-apis 2.1: desired-capabilities unknown here; and a later version may add fields to any list.
    peer = Peer()
    peer.write(AMQP_HEADER)
    fields = [b"\xa1\x01c", *[b"\x40"] * 7, b"\xe0\x04\x01\xa3\x01x", b"\x40", b"\xa1\x03new", b"\x00\x53\x99\x45"]
    body = b"\0\x53\x10\xc0" + bytes((1 + sum(map(len, fields)), len(fields))) + b"".join(fields)
    assert peer.write((8 + len(body)).to_bytes(4, "big") + b"\2\0\0\0" + body) == [Opened("c", None, {})]


@pytest.mark.parametrize("header", [b"AMQP\3\1\0\0", b"AMQP\0\0\x09\1", b"GET / HTTP/1.1", b"X"])
def test_another_header_is_answered_with_ours_and_the_end(header: bytes) -> None:
    peer = Peer()
    events = peer.write(header)
    assert peer.connection.data_to_send() == AMQP_HEADER
    assert events == [Closed("amqp:framing-error", "the protocol header is not that of AMQP 1.0")]
    assert peer.connection.is_closed


def test_an_unusable_principal_gets_open_and_close() -> None:
    # amqp-apis 2.1: token expired between SASL and open.
    peer = Peer()
    peer.write(AMQP_HEADER)
    peer.connection.close("amqp:unauthorized-access", "access token expired", now=peer.now)
    (_, first, _), (_, second, _) = peer.read()
    assert isinstance(first, codec.Open)
    assert isinstance(second, codec.Close)
    assert second.error == codec.Error("amqp:unauthorized-access", "access token expired")


# --- Time -------------------------------------------------------------------------------------------------------------


def test_heartbeats_at_half_of_what_the_peer_asks_for() -> None:
    # amqp-apis 2.2: 8000 ms advertised, a frame every 4 s
    peer = Peer().open(idle_time_out=8000)
    assert peer.connection.next_deadline() == 4.0
    peer.tick(3.9)
    assert peer.connection.data_to_send() == b""
    peer.tick(4.0)
    assert peer.connection.data_to_send() == HEARTBEAT
    assert peer.connection.next_deadline() == 8.0


def test_too_many_heartbeats_are_refused() -> None:
    # AMQP 2.4.5: a peer that cannot support the proposed idle-time-out should close
    peer = Peer()
    peer.write(AMQP_HEADER)
    peer.send(codec.Open(container_id="c", idle_time_out=99))
    error = closing(peer)
    assert error == codec.Error("amqp:resource-limit-exceeded", "idle-time-out is too short")
    assert Peer().open(idle_time_out=100).connection.next_deadline() == 0.05


def test_any_frame_is_as_good_as_a_heartbeat() -> None:
    peer = Peer().open(idle_time_out=8000)
    peer.now = 3.0
    peer.begin()
    peer.tick(4.0)
    assert peer.connection.data_to_send() == b""
    assert peer.connection.next_deadline() == 7.0


def test_no_heartbeats_for_a_peer_that_wants_none() -> None:
    # amqp-apis 2.2
    peer = Peer().open()
    assert peer.connection.next_deadline() == 20.0
    peer.tick(19.9)
    assert peer.connection.data_to_send() == b""


def test_silence_of_twenty_seconds_ends_the_connection() -> None:
    # amqp-apis 2.2
    peer = Peer().open().begin()
    link = peer.attach_sender()
    peer.now = 5.0
    assert peer.write(HEARTBEAT) == []
    assert peer.tick(24.9) == []
    assert peer.tick(25.0) == [
        LinkDetached(link),
        Closed("amqp:resource-limit-exceeded", "local-idle-timeout expired"),
    ]
    assert closing(peer) == codec.Error("amqp:resource-limit-exceeded", "local-idle-timeout expired")


def test_no_idle_time_out_if_it_is_switched_off() -> None:
    peer = Peer(idle_timeout=0.0)
    peer.write(AMQP_HEADER)
    peer.send(codec.Open(container_id="c"))
    assert peer.read_only(codec.Open).idle_time_out is None
    assert peer.connection.next_deadline() is None
    assert peer.tick(1e9) == []


@pytest.mark.parametrize("sent", [b"", AMQP_HEADER])
def test_open_must_come_in_time(sent: bytes) -> None:
    # amqp-apis 1.2
    peer = Peer()
    peer.write(sent)
    assert peer.connection.next_deadline() == 10.0
    assert peer.tick(9.9) == []
    assert peer.tick(10.0) == [Closed("amqp:resource-limit-exceeded", "open took too long")]
    assert peer.connection.is_closed


# --- The end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, codec.Error("amqp:internal-error", "out of coffee")])
def test_close_of_the_peer_is_answered(error: codec.Error | None) -> None:
    # amqp-apis 2.4 row 1
    peer = Peer().open().begin()
    link = peer.attach_receiver()
    events = peer.send(codec.Close(error=error))
    closed = Closed(error.condition, error.description) if error else Closed()
    assert events == [LinkDetached(link), closed]
    assert closing(peer) is None
    link.send(b"late")
    assert peer.connection.data_to_send() == b""
    assert peer.send(codec.Close()) == []
    assert peer.connection.lost() == []


def test_a_lost_socket_cleans_up_the_same() -> None:
    # amqp-apis 2.4 row 2
    peer = Peer().open().begin()
    links = [peer.attach_receiver(), peer.attach_sender()]
    assert peer.connection.lost() == [LinkDetached(links[0]), LinkDetached(links[1]), Closed()]
    assert peer.connection.lost() == []
    assert peer.connection.is_closed


def test_our_close_waits_for_the_answer() -> None:
    # amqp-apis 2.4: orderly shutdown
    peer = Peer().open().begin()
    link = peer.attach_sender()
    peer.connection.close("amqp:connection:forced", "shutdown", now=peer.now)
    assert peer.read_only(codec.Close).error == codec.Error("amqp:connection:forced", "shutdown")
    # What the peer sent before it saw the close does not count, malformed or not.
    assert peer.transfer(0, message()) == [LinkDetached(link)]
    assert peer.send(codec.Detach(handle=77)) == []
    assert peer.connection.next_deadline() is not None
    assert peer.send(codec.Close()) == [Closed()]
    assert peer.connection.is_closed
    assert peer.connection.data_to_send() == b""


def test_our_close_does_not_wait_for_ever() -> None:
    peer = Peer().open()
    # However long ago the peer was heard of, it has time to answer.
    peer.now = 7.0
    peer.connection.close(now=peer.now)
    peer.read_only(codec.Close)
    assert peer.connection.next_deadline() == 9.0
    assert peer.tick(8.9) == []
    assert peer.tick(9.0) == [Closed()]
    peer.connection.close(now=peer.now)
    assert peer.connection.data_to_send() == b""


def test_close_before_anything_came() -> None:
    peer = Peer()
    peer.connection.close("amqp:connection:forced", "shutdown", now=peer.now)
    frames = peer.read()
    assert [type(performative) for _channel, performative, _payload in frames] == [codec.Open, codec.Close]
    assert peer.connection.lost() == [Closed("amqp:connection:forced", "shutdown")]


# --- Errors -----------------------------------------------------------------------------------------------------------


def frame(body: bytes, *, size: int | None = None, offset: int = 2, frame_type: int = 0, channel: int = 0) -> bytes:
    size = 8 + len(body) if size is None else size
    return size.to_bytes(4, "big") + bytes((offset, frame_type)) + channel.to_bytes(2, "big") + body


@pytest.mark.parametrize(
    "data",
    [
        frame(b"", size=7),
        frame(b"", size=0),
        frame(b"", size=32769),
        frame(b"", size=0xFFFFFFFF),
        frame(b"\0\x53\x18\x45", offset=1),
        frame(b"\0\x53\x18\x45", offset=4),
        frame(b"\0\x53\x18\x45", frame_type=1),
        frame(b"\0\x53\x44\xc0\x03\x01\x50\x00"),  # sasl-outcome in an AMQP frame
        codec.encode_frame(256, codec.Begin(next_outgoing_id=0, incoming_window=1, outgoing_window=1)),
    ],
    ids=bytes.hex,
)
def test_framing_errors_close_the_connection(data: bytes) -> None:
    # amqp-apis 2.4
    peer = Peer().open().begin()
    link = peer.attach_receiver()
    events = peer.write(data)
    assert events[0] == LinkDetached(link)
    error = closing(peer)
    assert error is not None
    assert events[1:] == [Closed("amqp:framing-error", error.description)]
    assert error.condition == "amqp:framing-error"
    assert peer.write(data) == []
    assert peer.connection.data_to_send() == b""


@pytest.mark.parametrize(
    "body",
    [
        b"\0",
        b"\0\x53",
        b"\0\x53\x18",
        b"\x45",
        b"\0\x53\x99\x45",  # no such performative
        b"\0\xa1\x01x\x45",  # a descriptor that is a string
        b"\0\x53\x13\x43",  # flow that is no list
        b"\0\x53\x13\x45",  # flow without its mandatory fields
        b"\0\x53\x13\xc0\x05\x04\x40\x43\x43\x41",  # outgoing-window is a boolean
        b"\0\x53\x12\xc0\x06\x03\xa1\x01x\x43\x50",  # attach cut off
        b"\0\x53\x12\xc0\x07\x03\xa1\x01x\x43\xa1\x00",  # role is a string
        b"\0\x53\x12\xc0\x0d\x06\xa1\x01x\x43\x41\x40\x40\x00\x53\x29\x43",  # a source that is no list
        b"\0\x53\x16\xc0\x0a\x03\x43\x41\x00\x53\x1d\xc0\x02\x01\x40",  # an error without condition
        b"\0\x53\x17\xc0\x04\x01\xa1\x01\xff",  # not UTF-8
        b"\0\x53\x14\xc0\x03\x02\x43\x41",  # delivery-id is a boolean
    ],
    ids=bytes.hex,
)
def test_undecodable_frames_close_the_connection(body: bytes) -> None:
    # amqp-apis 2.4
    peer = Peer().open().begin()
    events = peer.write(frame(body))
    error = closing(peer)
    assert error is not None
    assert error.condition == "amqp:decode-error"
    assert events == [Closed("amqp:decode-error", error.description)]


def test_an_extended_frame_header_is_stepped_over() -> None:
    peer = Peer().open()
    body = codec.encode_performative(codec.Begin(next_outgoing_id=0, incoming_window=1, outgoing_window=1))
    peer.write(frame(b"more" + body, offset=3))
    peer.read_only(codec.Begin)


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (codec.encode_frame(0, codec.Open(container_id="again")), "amqp:illegal-state"),
        (codec.encode_frame(5, codec.End()), "amqp:not-allowed"),
        (codec.encode_frame(5, codec.Detach(handle=0)), "amqp:not-allowed"),
        (
            codec.encode_frame(0, codec.Begin(next_outgoing_id=0, incoming_window=1, outgoing_window=1)),
            "amqp:not-allowed",
        ),
        (
            codec.encode_frame(
                3, codec.Begin(remote_channel=0, next_outgoing_id=0, incoming_window=1, outgoing_window=1)
            ),
            "amqp:not-allowed",
        ),
    ],
)
def test_frames_out_of_place_close_the_connection(data: bytes, condition: str) -> None:
    peer = Peer().open().begin()
    peer.write(data)
    error = closing(peer)
    assert error is not None
    assert error.condition == condition


def test_anything_before_open_closes_the_connection_with_open_first() -> None:
    peer = Peer()
    peer.write(AMQP_HEADER)
    peer.send(codec.Begin(next_outgoing_id=0, incoming_window=1, outgoing_window=1))
    frames = peer.read()
    assert [type(performative) for _channel, performative, _payload in frames] == [codec.Open, codec.Close]


def test_close_is_an_answer_even_before_open() -> None:
    peer = Peer()
    peer.write(AMQP_HEADER + codec.encode_frame(0, codec.Close()))
    frames = peer.read()
    assert [type(performative) for _channel, performative, _payload in frames] == [codec.Open, codec.Close]


# --- Sessions ---------------------------------------------------------------------------------------------------------


def test_begin_and_end_are_answered() -> None:
    # amqp-apis 2.3
    peer = Peer().open()
    peer.send(codec.Begin(next_outgoing_id=7, incoming_window=10, outgoing_window=10), channel=9)
    ((channel, answer, _),) = peer.read()
    assert channel == 0
    assert answer == codec.Begin(
        remote_channel=9, next_outgoing_id=0, incoming_window=2147483647, outgoing_window=2147483647
    )
    peer.send(peer.receiver(), channel=9)
    link = peer.links["r0"]
    peer.read()
    assert peer.send(codec.End(), channel=9) == [LinkDetached(link)]
    ((channel, answer, _),) = peer.read()
    assert (channel, answer) == (0, codec.End())
    # Both sides may use their channels again.
    peer.begin(channel=9)


def test_several_sessions_keep_their_handles_apart() -> None:
    peer = Peer().open().begin(channel=0).begin(channel=1)
    peer.send(peer.sender(0, "tenant"), channel=0)
    peer.send(peer.sender(0, "registration/t"), channel=1)
    channels = [channel for channel, performative, _ in peer.read() if isinstance(performative, codec.Attach)]
    assert channels == [0, 1]
    transfer = codec.Transfer(handle=0, delivery_id=0, delivery_tag=b"", message_format=0)
    peer.send(transfer, message(subject="a"), channel=1)
    peer.send(transfer, message(subject="b"), channel=0)
    assert [request.subject for request in peer.requests] == ["a", "b"]
    detached = peer.send(codec.End(), channel=1)
    assert [event.link.address for event in detached if isinstance(event, LinkDetached)] == ["registration/t"]
    assert peer.send(transfer, message(subject="c"), channel=0)


def test_no_more_sessions_than_the_peer_can_take() -> None:
    peer = Peer().open(channel_max=0).begin(channel=0)
    peer.send(codec.Begin(next_outgoing_id=0, incoming_window=1, outgoing_window=1), channel=1)
    error = closing(peer)
    assert error is not None
    assert error.condition == "amqp:not-allowed"


def test_a_session_ended_by_us_ignores_what_was_on_its_way() -> None:
    peer = Peer().open().begin()
    link = peer.attach_sender()
    assert peer.send(codec.Detach(handle=5)) == [LinkDetached(link)]
    end = peer.read_only(codec.End)
    assert end.error is not None
    assert end.error.condition == "amqp:session:unattached-handle"
    assert peer.transfer(0, message()) == []
    assert peer.send(peer.sender(8)) == []
    assert peer.read() == []
    peer.send(codec.End())
    assert peer.read() == []
    peer.begin()
    assert not peer.connection.is_closed


def test_performatives_may_be_named_by_symbol() -> None:
    peer = Peer().open()
    body = codec.encode_performative(codec.Begin(next_outgoing_id=0, incoming_window=1, outgoing_window=1))
    peer.write(frame(b"\0" + codec.encode(codec.Symbol("amqp:begin:list")) + body[3:]))
    peer.read_only(codec.Begin)
