"""Performatives, message sections and replies: AMQP 2.7, 3.2; amqp-apis 6, 7."""

import contextlib
import uuid
from dataclasses import fields
from typing import Any

import proton
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.amqp import strategies

from kamado.amqp import codec, values
from kamado.amqp.codec import UNUSABLE, DecodeError, decode_request

uints = st.integers(0, 2**32 - 1)
plain_symbols = st.lists(strategies.symbols.map(str), max_size=3).map(tuple)
errors = st.builds(codec.Error, strategies.symbols.map(str), st.none() | strategies.text)
maps = st.dictionaries(strategies.symbols, strategies.scalars, max_size=3)
described = st.builds(codec.Described, strategies.ulongs, st.lists(strategies.scalars, max_size=3))
sources = st.none() | strategies.text.map(codec.Terminus.source)
targets = st.none() | strategies.text.map(codec.Terminus.target)
optional_uints = st.none() | uints

performatives: st.SearchStrategy[codec.Performative] = st.one_of(
    st.builds(
        codec.Open,
        container_id=strategies.text,
        hostname=st.none() | strategies.text,
        max_frame_size=uints,
        channel_max=st.integers(0, 65535),
        idle_time_out=optional_uints,
        outgoing_locales=plain_symbols,
        offered_capabilities=plain_symbols,
        properties=st.none() | maps,
    ),
    st.builds(
        codec.Begin,
        remote_channel=st.none() | st.integers(0, 65535),
        next_outgoing_id=uints,
        incoming_window=uints,
        outgoing_window=uints,
        handle_max=uints,
    ),
    st.builds(
        codec.Attach,
        name=strategies.text,
        handle=uints,
        role=st.booleans(),
        snd_settle_mode=st.integers(0, 2),
        rcv_settle_mode=st.integers(0, 1),
        source=sources,
        target=targets,
        initial_delivery_count=optional_uints,
        max_message_size=st.none() | st.integers(0, 2**64 - 1),
    ),
    st.builds(
        codec.Flow,
        next_incoming_id=optional_uints,
        incoming_window=uints,
        next_outgoing_id=uints,
        outgoing_window=uints,
        handle=optional_uints,
        delivery_count=optional_uints,
        link_credit=optional_uints,
        available=optional_uints,
        drain=st.booleans(),
        echo=st.booleans(),
    ),
    st.builds(
        codec.Transfer,
        handle=uints,
        delivery_id=optional_uints,
        delivery_tag=st.none() | st.binary(max_size=32),
        message_format=optional_uints,
        settled=st.none() | st.booleans(),
        more=st.booleans(),
        state=st.none() | described,
        aborted=st.booleans(),
    ),
    st.builds(
        codec.Disposition,
        role=st.booleans(),
        first=uints,
        last=optional_uints,
        settled=st.booleans(),
        state=st.none() | described,
    ),
    st.builds(codec.Detach, handle=uints, closed=st.booleans(), error=st.none() | errors),
    st.builds(codec.End, error=st.none() | errors),
    st.builds(codec.Close, error=st.none() | errors),
    st.builds(codec.SaslMechanisms, sasl_server_mechanisms=plain_symbols),
    st.builds(
        codec.SaslInit,
        mechanism=strategies.symbols.map(str),
        initial_response=st.none() | st.binary(max_size=300),
        hostname=st.none() | strategies.text,
    ),
    st.builds(codec.SaslChallenge, challenge=st.binary()),
    st.builds(codec.SaslResponse, response=st.binary()),
    st.builds(codec.SaslOutcome, outcome=st.integers(0, 255)),
)


@settings(max_examples=300)
@given(performatives, st.binary(max_size=9))
def test_performatives_are_read_back(performative: codec.Performative, payload: bytes) -> None:
    data = codec.encode_performative(performative)
    assert codec.decode_performative(data + payload) == (performative, len(data))
    frame = codec.encode_frame(513, performative, payload, frame_type=1)
    assert frame == len(frame).to_bytes(4, "big") + b"\2\1\2\1" + data + payload


@settings(max_examples=100, deadline=None)
@given(performatives)
def test_proton_reads_performatives(performative: codec.Performative) -> None:
    encoded = codec.encode_performative(performative)
    data = proton.Data()
    assert data.decode(encoded) == len(encoded)
    data.rewind()
    data.next()
    assert data.is_described()
    data.enter()
    data.next()
    assert data.get_object() == performative.code
    data.next()
    assert data.type() == proton.Data.LIST


@settings(max_examples=300)
@given(st.binary(max_size=60).map(lambda data: b"\0\x53" + data))
def test_any_bytes_are_a_performative_or_an_error(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        codec.decode_performative(data)


@pytest.mark.parametrize("name", sorted(codec._SYMBOLIC))
def test_names_of_descriptors_are_those_of_the_standard(name: str) -> None:
    code = codec._SYMBOLIC[name]
    cls = codec._PERFORMATIVES.get(code)
    if cls is not None:
        assert name.removeprefix("amqp:").removesuffix(":list").replace("-", "") == cls.__name__.lower()


def test_each_field_of_a_performative_has_its_kind() -> None:
    cls: Any
    for cls in (*codec._PERFORMATIVES.values(), codec.Properties):
        assert len(fields(cls)) == len(cls.kinds)


def test_error_info_and_unknown_fields_are_ignored() -> None:
    error = codec.Described(codec.ULong(0x1D), [codec.Symbol("amqp:x"), "text", {codec.Symbol("k"): 1}, "new"])
    assert codec.Error.read(error) == codec.Error("amqp:x", "text")
    named = codec.Described(codec.Symbol("amqp:error:list"), [codec.Symbol("amqp:x")])
    assert codec.Error.read(named) == codec.Error("amqp:x")


@pytest.mark.parametrize("value", [None, [], codec.Described(codec.ULong(0x1D), []), codec.Described(7, ["x"])])
def test_malformed_errors(value: object) -> None:
    with pytest.raises(DecodeError):
        codec.Error.read(value)


# --- Requests ---------------------------------------------------------------------------------------------------------


def section(code: int, value: object) -> bytes:
    return b"\0\x53" + bytes((code,)) + values.encode(value)


PROPERTIES = section(0x73, ["m", None, None, "get", "tenant/x"])
APPLICATION_PROPERTIES = section(0x74, {"a": "b"})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # amqp-apis 6, below the table
        (b"", None),
        (section(0x75, b""), None),
        (section(0x75, b"{}"), b"{}"),
        (section(0x75, b"{") + section(0x75, b"") + section(0x75, b"}"), b"{}"),
        (section(0x77, None), None),
        (section(0x77, "{}"), b"{}"),
        (section(0x77, b"{}"), b"{}"),
        (section(0x77, "x" * 300), b"x" * 300),
        (section(0x77, ""), None),
        (section(0x77, codec.Symbol("{}")), UNUSABLE),
        (section(0x77, 5), UNUSABLE),
        (section(0x77, {"a": 1}), UNUSABLE),
        (section(0x76, []), UNUSABLE),
        (section(0x76, [b"{}"]) + section(0x76, []), UNUSABLE),
        (section(0x75, b"{}") + section(0x78, {}), b"{}"),
    ],
)
def test_bodies(body: bytes, expected: object) -> None:
    for before in (b"", APPLICATION_PROPERTIES):
        request = decode_request(PROPERTIES + before + body, 3, True)
        assert request.body == expected
        assert (request.delivery_id, request.settled) == (3, True)
        assert (request.subject, request.reply_to) == ("get", "tenant/x")
        assert request.application_properties == ({"a": "b"} if before else {})


@pytest.mark.parametrize(
    ("message_id", "correlation_id"),
    [
        # amqp-apis 14 M4 to M8
        ("m1", "c1"),
        ("m1", None),
        (None, codec.ULong(7)),
        (None, codec.ULong(0)),
        (None, uuid.UUID(int=1)),
        (None, b"\1\2"),
        (b"\1\2" * 200, None),
        ("m" * 300, None),
        (None, None),
    ],
)
def test_the_correlation_id_keeps_its_type(message_id: object, correlation_id: object) -> None:
    payload = section(0x73, [message_id, None, None, None, None, correlation_id])
    expected = message_id if correlation_id is None else correlation_id
    request = decode_request(payload, 0, False)
    assert request.correlation_id == (None if expected is None else values.encode(expected))


@pytest.mark.parametrize("properties", [b"\x45", b"\xc0\x01\x00", b"\xd0\x00\x00\x00\x04\x00\x00\x00\x00"])
def test_empty_properties(properties: bytes) -> None:
    request = decode_request(b"\0\x53\x73" + properties, 0, False)
    assert (request.subject, request.reply_to, request.correlation_id) == (None, None, None)
    assert decode_request(b"", 0, False) == request


@pytest.mark.parametrize(
    "payload",
    [
        b"\x45",
        b"\0",
        b"\0\x53\x79\x45",
        b"\0\x53\x6f\x45",
        section(0x73, {}),
        section(0x73, [5]),
        section(0x73, ["m", None, None, 5]),
        section(0x73, ["m", None, None, None, codec.Symbol("x")]),
        section(0x73, ["m", None, None, None, None, codec.Symbol("x")]),
        b"\0\x53\x73\xc0\x02\x02\x40",
        b"\0\x53\x73\xc0\x03\x01\x40\x40",
        b"\0\x53\x73\xc0\x02\x00\x40",
        section(0x74, []),
        section(0x74, {codec.Symbol("a"): "b"}),
        section(0x74, {5: "b"}),
        b"\0\x53\x74\xc1\x05\x02\xa1\x01\xff\x40",
        section(0x75, "text"),
        PROPERTIES + PROPERTIES,
        APPLICATION_PROPERTIES + PROPERTIES,
        section(0x75, b"a") + section(0x77, b"a"),
        section(0x75, b"a") + section(0x76, []),
        section(0x77, b"a") + section(0x77, b"a"),
        section(0x76, []) + section(0x77, b"a"),
        section(0x78, {}) + section(0x75, b"a"),
        section(0x75, b"abc")[:-1],
    ],
    ids=bytes.hex,
)
def test_malformed_messages(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_request(payload, 0, False)


def test_application_properties_with_a_key_twice() -> None:
    payload = b"\0\x53\x74" + values.encode(values.Map([("a", "1"), ("a", "2")]))
    assert decode_request(payload, 0, False).application_properties == {"a": "2"}


@settings(max_examples=300)
@given(st.binary(max_size=100).map(lambda data: b"\0\x53" + data))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    try:
        decode_request(data, 0, False)
    except DecodeError:
        with pytest.raises(DecodeError):
            codec.decode_message(data)


# Proton's accessors end a string at its first NUL.
c_text = strategies.text.filter(lambda text: "\0" not in text)


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        codec.Properties,
        message_id=st.none() | c_text | strategies.ulongs | strategies.uuids,
        to=st.none() | c_text,
        subject=st.none() | c_text,
        reply_to=st.none() | c_text,
        correlation_id=st.none() | c_text | strategies.ulongs | strategies.uuids,
        content_type=st.none() | strategies.symbols.map(str).filter(lambda text: "\0" not in text),
    ),
    st.dictionaries(strategies.text, strategies.scalars, max_size=4),
    st.none() | st.binary(min_size=1, max_size=400),
)
def test_messages_are_read_back_by_us_and_by_proton(
    properties: codec.Properties, application_properties: dict[str, object], body: bytes | None
) -> None:
    data = codec.encode_message(properties, application_properties, body)
    read = codec.decode_message(data)
    assert (read.properties, read.body) == (properties, body)
    assert values.encode(dict(read.application_properties)) == values.encode(application_properties)
    stranger: Any = proton.Message()
    stranger.decode(data)
    assert stranger.address == properties.to
    assert stranger.subject == properties.subject
    assert stranger.reply_to == properties.reply_to
    assert stranger.id == properties.message_id
    assert stranger.correlation_id == properties.correlation_id
    # Proton reads an absent content-type as the symbol "None".
    assert stranger.content_type == ("None" if properties.content_type is None else properties.content_type)
    assert (None if stranger.body is None else bytes(stranger.body)) == body
    assert set(stranger.properties or {}) == set(application_properties)


# --- Replies ----------------------------------------------------------------------------------------------------------


def test_the_status_section_byte_by_byte() -> None:
    # amqp-apis 7
    reply = codec.encode_reply("tenant", values.encode("c"), 200)
    assert reply.endswith(bytes.fromhex("005374C10E02A106737461747573710000 00C8"))


def test_a_reply_with_everything() -> None:
    # amqp-apis 7
    reply = codec.encode_reply(
        "registration",
        values.encode("c1"),
        200,
        b'{"device-id":"d2"}',
        cache_control="max-age = 300",
        tenant_id="acme",
        device_id="d2",
    )
    message = codec.decode_message(reply)
    assert isinstance(message.properties.message_id, str)
    assert str(uuid.UUID(message.properties.message_id)) == message.properties.message_id
    message.properties.message_id = None
    assert message.properties == codec.Properties(
        to="registration/acme/d2", correlation_id="c1", content_type="application/json"
    )
    assert message.application_properties == {
        "status": 200,
        "tenant_id": "acme",
        "device_id": "d2",
        "cache_control": "max-age = 300",
    }
    assert type(message.application_properties["status"]) is codec.Int
    assert type(message.application_properties["tenant_id"]) is str
    assert message.body == b'{"device-id":"d2"}'


def test_a_reply_without_anything() -> None:
    # amqp-apis 14 T4: no body, and then no content-type
    message = codec.decode_message(codec.encode_reply("tenant", values.encode(codec.ULong(7)), 404))
    assert message.properties.to == "tenant"
    assert message.properties.correlation_id == 7
    assert type(message.properties.correlation_id) is codec.ULong
    assert message.properties.content_type is None
    assert message.application_properties == {"status": 404}
    assert message.body is None


def test_message_ids_of_replies_differ() -> None:
    ids = {codec.decode_message(codec.encode_reply("tenant", b"\x44", 404)).properties.message_id for _ in range(1000)}
    assert len(ids) == 1000


@settings(max_examples=200, deadline=None)
@given(
    correlation_id=st.one_of(strategies.text, strategies.ulongs, strategies.uuids, st.binary(max_size=300)),
    status=st.integers(200, 599),
    payload=st.none() | st.binary(max_size=400),
    cache_control=st.none() | st.sampled_from(["no-cache", "max-age = 180"]),
    tenant_id=st.none() | strategies.text,
    device_id=st.none() | strategies.text,
    content_type=st.sampled_from(["application/json", "text/plain"]),
)
def test_replies_are_read_back_by_us_and_by_proton(
    correlation_id: object,
    status: int,
    payload: bytes | None,
    cache_control: str | None,
    tenant_id: str | None,
    device_id: str | None,
    content_type: str,
) -> None:
    data = codec.encode_reply(
        "credentials",
        values.encode(correlation_id),
        status,
        payload,
        cache_control=cache_control,
        tenant_id=tenant_id,
        device_id=device_id,
        content_type=content_type,
    )
    expected = {
        "status": status,
        "cache_control": cache_control,
        "tenant_id": tenant_id,
        "device_id": device_id,
    }
    expected = {key: value for key, value in expected.items() if value is not None}
    message = codec.decode_message(data)
    assert message.properties.correlation_id == correlation_id
    assert message.application_properties == expected
    assert message.body == (payload or None)
    stranger: Any = proton.Message()
    stranger.decode(data)
    assert (bytes(stranger.correlation_id) if isinstance(correlation_id, bytes) else stranger.correlation_id) == (
        correlation_id
    )
    assert stranger.properties == expected
    assert isinstance(stranger.properties["status"], proton.int32)
    assert stranger.content_type == ("None" if payload is None else content_type)
    assert (None if stranger.body is None else bytes(stranger.body)) == payload
