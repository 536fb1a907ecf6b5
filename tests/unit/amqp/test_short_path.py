"""The short path of look-ups and the complete path tell the same, whatever the bytes: `session.py`."""

import struct
import uuid
from collections.abc import Callable
from unittest import mock

import proton
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.amqp import strategies
from tests.unit.amqp.peer import Peer, message

from kamado.amqp import codec, session, values
from kamado.amqp.codec import UNUSABLE, Request
from kamado.amqp.connection import Connection, Event, RequestsReceived


def server() -> Peer:
    peer = Peer(credit=1000).open().begin()
    peer.attach_receiver(0)
    peer.attach_sender(1)
    return peer


def take_nothing(_session: session.Session, _data: bytes, pos: int, _stop: int, _events: list[Event]) -> int:
    """A short path that leaves everything to the complete one."""
    return pos


def frame(performative: bytes, payload: bytes) -> bytes:
    return struct.pack(">IBBH", 8 + len(performative) + len(payload), 2, 0, 0) + performative + payload


def transfer(payload: bytes, delivery_id: int = 0) -> bytes:
    performative = codec.Transfer(
        handle=1, delivery_id=delivery_id, delivery_tag=b"t", message_format=0, settled=False, more=False
    )
    return codec.encode_frame(0, performative, payload)


def told(events: list[Event]) -> list[object]:
    """What the events say, in a form that shows the types of values."""
    result: list[object] = []
    for event in events:
        if isinstance(event, RequestsReceived):
            result += [shown(request) for request in event.requests]
        else:
            result.append(type(event))
    return result


def shown(request: Request) -> tuple[object, ...]:
    properties = [(key, values.encode(value)) for key, value in request.application_properties.items()]
    return (
        request.delivery_id,
        request.settled,
        request.subject,
        request.reply_to,
        request.correlation_id,
        properties,
        request.body,
    )


def agree(data: bytes) -> list[object]:
    """Feed both paths; compare all that they do. Return what they told."""
    short, complete = server(), server()
    result = told(short.write(data))
    with mock.patch.object(session.Session, "take_usual", take_nothing):
        assert result == told(complete.write(data))
    assert short.connection.data_to_send() == complete.connection.data_to_send()
    # Counters too: the next flow and a reply tell of them.
    for peer in (short, complete):
        peer.links["s1"].give_credit()
        peer.links["r0"].send(b"reply")
    assert short.connection.data_to_send() == complete.connection.data_to_send()
    return result


# --- Bytes of messages, well-formed in every way that a client may choose, and some that none should ------------------


def _list(wide: bool, items: list[bytes]) -> bytes:
    content = b"".join(items)
    if wide or len(content) > 254 or len(items) > 255:
        return b"\xd0" + struct.pack(">II", len(content) + 4, len(items)) + content
    return b"\xc0" + bytes((len(content) + 1, len(items))) + content


def _map(wide: bool, items: list[bytes]) -> bytes:
    data = _list(wide, items)
    return bytes((data[0] + 1,)) + data[1:]


def _wide_string(text: str) -> bytes:
    return b"\xb1" + struct.pack(">I", len(text.encode())) + text.encode()


strings = strategies.text.map(values.encode) | strategies.text.map(_wide_string)
ids = st.one_of(
    strings,
    strategies.ulongs.map(values.encode),
    strategies.ulongs.map(lambda number: b"\x80" + struct.pack(">Q", number)),
    strategies.uuids.map(values.encode),
    st.binary(max_size=20).map(values.encode),
    st.just(b"\x40"),
    strategies.symbols.map(values.encode),  # of no type for ids
)
null = st.just(b"\x40")
any_value = strategies.anything.map(values.encode)


@st.composite
def properties(draw: st.DrawFn) -> bytes:
    fields = [
        draw(ids),
        draw(null | st.binary(max_size=9).map(values.encode)),
        draw(null | strings),
        draw(null | strings | strings | strings | any_value),
        draw(null | strings | strings | strings | any_value),
        draw(null | null | ids),
        draw(null | strategies.symbols.map(values.encode)),
        *draw(st.lists(any_value, max_size=8)),
    ]
    count = draw(st.integers(0, len(fields)))
    if not count:
        return draw(st.sampled_from([b"\x45", _list(False, []), _list(True, [])]))
    return _list(draw(st.booleans()), fields[:count])


@st.composite
def application_properties(draw: st.DrawFn) -> bytes:
    keys = strings | strings | strings | any_value
    items = draw(st.lists(st.tuples(keys, strings | any_value), max_size=5))
    return _map(draw(st.booleans()), [part for pair in items for part in pair])


bodies = st.one_of(
    st.just(b""),
    st.binary(max_size=300).map(lambda data: b"\0\x53\x75" + values.encode(data)),
    st.binary(max_size=30).map(lambda data: b"\0\x53\x75\xb0" + struct.pack(">I", len(data)) + data),
    st.lists(st.binary(max_size=9).map(lambda data: b"\0\x53\x75" + values.encode(data)), max_size=3).map(b"".join),
    any_value.map(lambda data: b"\0\x53\x77" + data),
    st.just(b"\0\x53\x77\x40"),
    st.just(b"\0\x53\x76\x45"),
    any_value.map(lambda data: b"\0\x53\x75" + data),
)


@st.composite
def sections(draw: st.DrawFn) -> list[bytes]:
    result = []
    if draw(st.booleans()):
        header = st.sampled_from([b"\x45", b"\xc0\x02\x01\x42", b"\xd0\x00\x00\x00\x05\x00\x00\x00\x01\x42"])
        result.append(b"\0\x53\x70" + draw(header | any_value))
    if draw(st.integers(0, 4)) == 0:
        result.append(b"\0\x53\x71" + _map(False, []))
    if draw(st.integers(0, 2)) == 0:
        annotations = [values.encode(values.Symbol("x-opt-trace-context")), values.encode({"traceparent": "00-a-b-01"})]
        result.append(b"\0\x53\x72" + _map(draw(st.booleans()), annotations))
    if draw(st.integers(0, 9)):
        result.append(
            draw(st.sampled_from([b"\0\x53\x73"] * 8 + [b"\0\xa3\x14amqp:properties:list"])) + draw(properties())
        )
    if draw(st.booleans()):
        result.append(b"\0\x53\x74" + draw(application_properties()))
    result.append(draw(bodies))
    if draw(st.integers(0, 9)) == 0:
        result.append(b"\0\x53\x78" + _map(False, []))
    return result


uint_forms: list[Callable[[int], bytes]] = [
    lambda number: values.encode(values.UInt(number)),
    lambda number: b"\x70" + struct.pack(">I", number),
]


@st.composite
def transfers(draw: st.DrawFn) -> bytes:
    fields = [
        draw(st.sampled_from(uint_forms))(draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 0, 2]))),
        draw(st.sampled_from(uint_forms))(draw(st.sampled_from([0, 1, 255, 256, 2**32 - 1]))),
        draw(st.binary(max_size=40).map(values.encode) | null),
        draw(st.sampled_from([b"\x43", b"\x43", b"\x40", b"\x52\x00", b"\x70\0\0\0\0", b"\x52\x01"])),
        draw(st.sampled_from([b"\x42", b"\x42", b"\x41", b"\x40", b"\x56\x00", b"\x56\x01", b"\x43"])),
        draw(st.sampled_from([b"\x42", b"\x42", b"\x42", b"\x40", b"\x41"])),
        draw(st.sampled_from([b"\x40", b"\x40", b"\x50\x00", b"\x50\x01"])),
        draw(st.sampled_from([b"\x40", b"\x40", b"\x00\x53\x24\x45"])),
        draw(st.sampled_from([b"\x40", b"\x42"])),
        draw(st.sampled_from([b"\x40", b"\x42", b"\x42", b"\x41"])),
        draw(st.sampled_from([b"\x40", b"\x42", b"\x41"])),
        draw(any_value),
    ]
    count = draw(st.integers(3, 12))
    return b"\0\x53\x14" + _list(draw(st.integers(0, 9)) == 0, fields[:count])


usual_transfer = codec.encode_performative(
    codec.Transfer(handle=1, delivery_id=5, delivery_tag=b"\0\1", message_format=0, settled=False)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(sections().map(b"".join), min_size=1, max_size=3))
def test_random_messages(payloads: list[bytes]) -> None:
    agree(b"".join(frame(usual_transfer, payload) for payload in payloads))


@settings(max_examples=200, deadline=None)
@given(transfers(), sections().map(b"".join))
def test_random_transfers(performative: bytes, payload: bytes) -> None:
    agree(frame(performative, payload) + transfer(message(), 9))


@settings(max_examples=200, deadline=None)
@given(sections().flatmap(st.permutations).map(b"".join))
def test_sections_in_any_order(payload: bytes) -> None:
    agree(frame(usual_transfer, payload))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_bytes(data: st.DataObject) -> None:
    payload = message(
        application_properties={"device_id": "d1", "gateway_id": "gw1"}, body=b'{"type":"psk"}', correlation_id="c"
    )
    damaged = bytearray(transfer(payload) + transfer(payload, 1))
    for _ in range(data.draw(st.integers(1, 4))):
        # The sizes of the frames stay, so that what follows is a frame again.
        position = data.draw(st.integers(4, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    agree(bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_after_the_same_link_has_learnt_the_whole_ones(data: st.DataObject) -> None:
    # What is remembered of one request must not speak for another.
    payload = message(application_properties={"device_id": "d1"})
    whole = transfer(payload)
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    agree(whole + bytes(damaged))


uints = st.integers(0, 2**32 - 1) | st.integers(0, 300)
booleans = st.sampled_from([b"\x40", b"\x41", b"\x42"])
encoded_uints = st.builds(lambda form, number: form(number), st.sampled_from(uint_forms), uints)
wide_accepted = b"\0\x53\x24\xd0\0\0\0\x04\0\0\0\0"
outcomes = st.sampled_from(
    [wide_accepted, b"\x40", b"\0\x53\x24\x45", b"\0\x53\x26\xc0\x01\x00", b"\0\x53\x23\x45", b"\x41"]
)


@st.composite
def dispositions(draw: st.DrawFn) -> bytes:
    fields = [
        draw(booleans),
        draw(encoded_uints),
        draw(encoded_uints | null),
        draw(booleans),
        draw(outcomes | any_value),
        draw(booleans | any_value),
        draw(any_value),
    ]
    return b"\0\x53\x15" + _list(draw(st.booleans()), fields[: draw(st.sampled_from([1, 2, 3, 4, 5, 5, 5, 6, 7]))])


@st.composite
def flows(draw: st.DrawFn) -> bytes:
    handle = st.sampled_from([b"\x40", b"\x43", b"\x43", b"\x52\x01", b"\x52\x05"])
    fields = [
        draw(encoded_uints | null),
        *(draw(encoded_uints | encoded_uints | encoded_uints | null) for _ in range(3)),
        draw(handle),
        *(draw(encoded_uints | null | st.just(b"\x43")) for _ in range(3)),
        draw(booleans),
        draw(booleans),
        draw(any_value),
    ]
    if draw(st.integers(0, 5)) == 0:
        fields[draw(st.integers(0, 10))] = draw(any_value)
    return b"\0\x53\x13" + _list(draw(st.booleans()), fields[: draw(st.integers(3, 11))])


@settings(max_examples=400, deadline=None)
@given(st.lists(dispositions() | flows(), min_size=1, max_size=4), st.data())
def test_dispositions_and_flows(performatives: list[bytes], data: st.DataObject) -> None:
    stream = bytearray(b"".join(frame(performative, b"") for performative in performatives))
    if data.draw(st.integers(0, 2)) == 0:
        stream[data.draw(st.integers(4, len(stream) - 1))] = data.draw(st.integers(0, 255))
    agree(bytes(stream) + transfer(message()))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_reads_may_end_anywhere(data: st.DataObject) -> None:
    stream = b"".join(transfer(message(message_id=f"m{number}"), number) for number in range(5))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    peer = server()
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        peer.write(stream[start:stop])
    assert [request.correlation_id for request in peer.requests] == [b"\xa1\x02m%d" % number for number in range(5)]


# --- The usual requests do take the short path ------------------------------------------------------------------------


@pytest.fixture
def no_complete_path(monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A server with its links, that fails where a frame takes the complete path from now on."""
    peer = server()

    def fail(*_arguments: object) -> None:
        pytest.fail("the complete path was taken")

    monkeypatch.setattr(Connection, "_take_frame", fail)
    return peer


def proton_message(**fields: object) -> bytes:
    return bytes(proton.Message(**fields).encode())  # type: ignore[arg-type]


REPLY_TO = "registration/acme/7c1e"
USUAL = {
    "assert": message(message_id=f"reg-client-{uuid.UUID(int=1)}", application_properties={"device_id": "d1"}),
    "assert by Proton": proton_message(
        id="m1",
        subject="assert",
        reply_to=REPLY_TO,
        address="registration/acme",
        properties={"device_id": "d1", "gateway_id": "gw1"},
    ),
    "credentials by Proton": proton_message(
        id="m1",
        subject="get",
        reply_to=REPLY_TO,
        content_type="application/json",
        inferred=True,
        body=b'{"type":"hashed-password","auth-id":"sensor1"}',
    ),
    "credentials with a certificate": message(body=b"x" * 2000),
    "with a header and a trace": (
        b"\0\x53\x70\xc0\x02\x01\x42\0\x53\x72"
        + values.encode({values.Symbol("x-opt-trace-context"): {"uber-trace-id": "1:2:3"}})
        + message(application_properties={"traceparent": "00-1-2-01", "device_id": "d1"})
    ),
    "correlation-id of ulong": message(message_id=None, correlation_id=values.ULong(7)),
    "message-id of ulong": message(message_id=values.ULong(7)),
    "message-id of ulong 0": message(message_id=values.ULong(0)),
    "message-id of ulong 2**40": message(message_id=values.ULong(2**40)),
    "message-id of uuid": message(message_id=uuid.UUID(int=5)),
    "other types of arguments": message(application_properties={"lifespan": values.Int(-1), "send_event": True}),
}


@pytest.mark.parametrize("payload", USUAL.values(), ids=list(USUAL))
def test_usual_requests_take_the_short_path(no_complete_path: Peer, payload: bytes) -> None:
    peer = no_complete_path
    peer.write(transfer(payload) + transfer(payload, 1) + transfer(payload, 300))
    assert len(peer.requests) == 3


def test_a_batch_of_the_whole_credit_takes_the_short_path(no_complete_path: Peer) -> None:
    peer = no_complete_path
    peer.write(b"".join(transfer(message(message_id=f"m{number}"), number) for number in range(1000)))
    assert len(peer.requests) == 1000


def test_correlation_ids_that_never_repeat_do_not_fill_the_memory(no_complete_path: Peer) -> None:
    peer = no_complete_path
    link = peer.links["s1"]
    for number in range(200):
        peer.write(transfer(message(correlation_id=f"c{number}"), number))
    assert [request.correlation_id for request in peer.requests] == [
        values.encode(f"c{number}") for number in range(200)
    ]
    assert len(link._tails) <= 64


def test_what_stock_clients_send_beside_requests_takes_the_short_path(no_complete_path: Peer) -> None:
    # One disposition for each reply, and flows that top up credit (amqp-apis 4.1).
    peer = no_complete_path
    accepted = codec.Described(codec.ULong(0x24), [])
    for number in (0, 255, 256, 2**32 - 1):
        for last in (None, number):
            peer.send(codec.Disposition(role=True, first=number, last=last, settled=True, state=accepted))
            peer.send(codec.Disposition(role=True, first=number, last=last, settled=True))
    for state in (0x25, 0x26, 0x27):
        rejected = codec.Described(codec.ULong(state), [])
        peer.send(codec.Disposition(role=True, first=1, settled=True, state=rejected, batchable=True))
    peer.flow(credit=200)
    peer.flow(credit=200, delivery_count=100_000)
    peer.flow(handle=None)
    peer.flow(handle=1, credit=None)


def test_stock_clients_write_their_lists_wide(no_complete_path: Peer) -> None:
    # Proton-J, the library of the stock adapters: list32 whatever the size.
    peer = no_complete_path
    first = b"\x70\0\0\1\0"
    for state in (b"\0\x53\x24\x45", wide_accepted):
        peer.write(frame(b"\0\x53\x15" + _list(True, [b"\x41", first, first, b"\x41", state]), b""))
    window = b"\x70\x7f\xff\xff\xff"
    fields = [b"\x43", window, b"\x43", window, b"\x43", b"\x43", b"\x52\x02", b"\x40", b"\x42", b"\x42"]
    peer.write(frame(b"\0\x53\x13" + _list(True, fields), b""))
    for _ in range(3):
        peer.links["r0"].send(b"reply")
    assert peer.connection.pending_output > 0
    assert [payload for _channel, _performative, payload in peer.read()] == [b"reply", b"reply"]


@pytest.mark.parametrize("payload", USUAL.values(), ids=list(USUAL))
def test_usual_requests_are_read_the_same_by_both(payload: bytes) -> None:
    (request,) = agree(transfer(payload))
    assert request == shown(codec.decode_request(payload, 0, False))


def test_credit_is_counted_by_both() -> None:
    for limit in (2, 3):
        peer = Peer(credit=limit).open().begin()
        peer.attach_sender(1)
        peer.write(b"".join(transfer(message(), number) for number in range(3)))
        assert len(peer.requests) == limit
        assert peer.links["s1"].is_open == (limit == 3)


def test_what_is_odd_between_what_is_usual() -> None:
    odd = b"\0\x53\x73" + values.encode(["m"]) + b"\0\x53\x77" + values.encode([1])
    payloads = [message(message_id=f"m{number}") for number in range(3)]
    requests = agree(
        transfer(payloads[0])
        + transfer(odd, 1)
        + transfer(payloads[1], 2)
        + transfer(payloads[1][:7], 3)
        + transfer(payloads[2], 4)
    )
    assert [request[0] for request in requests if isinstance(request, tuple)] == [0, 1, 2, 4]
    assert requests[1] == (1, False, None, None, b"\xa1\x01m", [], UNUSABLE)
