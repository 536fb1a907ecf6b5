"""JSON text and the rules of members: management 3.2, 3.5, 3.6, 3.12, 3.13."""

import json
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamado.document import (
    MAX_DEPTH,
    Identifiers,
    Members,
    decode,
    decode_base64,
    encode,
    encode_base64,
    format_timestamp,
    new_id,
    parse_timestamp,
)
from kamado.errors import BadRequest

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


# --- Text ---


@given(JSON)
def test_what_is_encoded_is_decoded_again(value: object) -> None:
    text = encode(value)
    assert repr(decode(text)) == repr(value)
    assert repr(json.loads(text)) == repr(value)


@given(JSON)
def test_what_another_encoder_writes_is_decoded(value: object) -> None:
    assert repr(decode(json.dumps(value).encode())) == repr(value)
    assert repr(decode(json.dumps(value, indent=2, ensure_ascii=False).encode())) == repr(value)


@given(st.binary(max_size=64) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u ', max_size=40).map(str.encode))
def test_any_bytes_are_a_value_or_a_bad_request(data: bytes) -> None:
    try:
        value = decode(data)
    except BadRequest:
        return
    assert repr(decode(encode(value))) == repr(value)


def test_half_a_surrogate_pair_is_told_as_such() -> None:
    for text in (b'{"a":"\\ud800"}', b'["\\uD9AB"]', b'"\\udbff"'):
        with pytest.raises(BadRequest, match="half a surrogate pair"):
            decode(text)
    for text in (b'"\\ud800', b'{"a":', b'["'):
        with pytest.raises(BadRequest, match="truncated"):
            decode(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b'{"enabled":',
        b"NaN",
        b"Infinity",
        b"[-Infinity]",
        b"1e400",
        b"{} x",
        b"{}{}",
        b"null\0",
        b"// comment\n{}",
        b"[1,]",
        b"{'a':1}",
        b"{1:2}",
        b"01",
        b"1.",
        b'"\x01"',
        b'"\\x41"',
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'"\\ud800\\ud800"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"\xc0\x80"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b"1" * 5000,
    ],
)
def test_what_is_not_json_is_a_bad_request(text: bytes) -> None:
    """Management 3.5: not valid JSON, trailing garbage, comments, NaN; not UTF-8."""
    with pytest.raises(BadRequest, match=r"^not valid JSON"):
        decode(text)


def test_the_last_of_equal_names_wins() -> None:
    """Management 3.5."""
    assert decode(b'{"a":1,"b":0,"a":2}') == {"a": 2, "b": 0}


@pytest.mark.parametrize("number", ["1", "1.5", "1.0", "-0.0", "18446744073709551616", "-9" + "0" * 300, "9" * 4000])
def test_numbers_keep_their_kind_and_digits(number: str) -> None:
    """Management 3.6, last row."""
    assert encode(decode(number.encode())) == number.encode()


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_depth_has_a_limit(start: str, end: str) -> None:
    for inside in ("", "1") if start == "[" else ("{}", "1"):
        depth = MAX_DEPTH - (inside == "{}")
        assert decode((start * depth + inside + end * depth).encode()) is not None
        depth += 1
        with pytest.raises(BadRequest, match="deeper than 128"):
            decode((start * depth + inside + end * depth).encode())


@pytest.mark.parametrize("depth", [600, 5000, 200_000])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_great_depth_is_a_bad_request(depth: int, start: str, end: str) -> None:
    for text in (start * depth, start * depth + "1" + end * depth):
        with pytest.raises(BadRequest):
            decode(text.encode())


def test_brackets_that_nest_nothing_are_fine() -> None:
    flat: list[object] = [*([[]] * 200), "[" * 300]
    assert decode(encode(flat)) == flat
    assert decode(encode("{[" * 300)) == "{[" * 300


# --- Timestamps ---


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("2019-10-03T13:45:16+02:00", "2019-10-03T11:45:16Z"),
        ("2019-10-03T13:45:16.999Z", "2019-10-03T13:45:16Z"),
        ("2028-04-01T00:00:00.5+02:00", "2028-03-31T22:00:00Z"),
        ("2024-01-01T01:00Z", "2024-01-01T01:00:00Z"),
        ("2024-01-01t01:00:00z", "2024-01-01T01:00:00Z"),
        ("2024-01-01T01:00:00.123456789Z", "2024-01-01T01:00:00Z"),
        ("2024-01-01T01:00:00+0130", "2023-12-31T23:30:00Z"),
        ("2024-01-01T01:00:00-01", "2024-01-01T02:00:00Z"),
        ("2024-01-01T01:00:00+01:02:03", "2023-12-31T23:57:57Z"),
        ("2024-01-01T01:00-18:00", "2024-01-01T19:00:00Z"),
        ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ("9999-12-31T23:59:59.9Z", "9999-12-31T23:59:59Z"),
    ],
)
def test_timestamps_are_written_in_utc(text: str, written: str) -> None:
    """Management 3.12."""
    assert format_timestamp(parse_timestamp(text, "not-after")) == written


@pytest.mark.parametrize(
    "text",
    [
        None,
        5,
        True,
        "",
        "2024-01-01",
        "2024-01-01T01:00:00",
        "2024-01-01 01:00:00Z",
        "2024-01-01T01Z",
        "2024-01-01T01:00.5Z",
        "2024-01-01T01:00:00.Z",
        "2024-01-01T01:00:00.1234567890Z",
        "2024-01-01T01:00:00,5Z",
        "2024-01-01T24:00:00Z",
        "2024-01-01T23:60:00Z",
        "2024-01-01T23:59:60Z",
        "2024-02-30T00:00:00Z",
        "2023-02-29T00:00:00Z",
        "2024-13-01T00:00:00Z",
        "2024-00-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "24-01-01T00:00:00Z",
        "-2024-01-01T00:00:00Z",
        "2024-01-01T00:00:00+1",
        "2024-01-01T00:00:00+01:0",
        "2024-01-01T00:00:00+010203",
        "2024-01-01T00:00:00+01:60",
        "2024-01-01T00:00:00+01:00:60",
        "2024-01-01T00:00:00+18:01",
        "2024-01-01T00:00:00-99:00",
        "2024-01-01T00:00:00Z+01:00",
        "2024-01-01T00:00:00Z\n",
        " 2024-01-01T00:00:00Z",
        "２０24-01-01T00:00:00Z",
        "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01",
        "31.03.2028",
        "2024-W01-1T00:00:00Z",
    ],
)
@pytest.mark.row("management-api 13.4", 86)
def test_what_is_no_timestamp_is_a_bad_request(text: object) -> None:
    """Management 3.12."""
    with pytest.raises(BadRequest, match=r"^secrets\[0\]\.not-after: "):
        parse_timestamp(text, "secrets[0].not-after")


@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)),  # noqa: DTZ001
    st.integers(-18 * 60, 18 * 60),
)
def test_timestamps_with_any_offset_are_the_same_instant(local: datetime, minutes: int) -> None:
    instant = local.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert parse_timestamp(instant.isoformat(), "x") == instant
    assert parse_timestamp(format_timestamp(instant), "x") == instant.replace(microsecond=0)


@given(st.text(alphabet="0123456789-+:.TZtz ", max_size=30) | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?Z"))
def test_any_text_is_an_instant_or_a_bad_request(text: str) -> None:
    try:
        instant = parse_timestamp(text, "x")
    except BadRequest:
        return
    assert instant.utcoffset() == timedelta(0)
    assert parse_timestamp(format_timestamp(instant), "x") == instant.replace(microsecond=0)


# --- Base64 ---


@given(st.binary(max_size=40))
def test_base64_with_and_without_padding(data: bytes) -> None:
    """Management 3.13."""
    text = encode_base64(data)
    assert len(text) % 4 == 0
    assert decode_base64(text, "key") == data
    assert decode_base64(text.rstrip("="), "key") == data
    assert decode_base64(text.replace("+", "-").replace("/", "_"), "key", url_safe=True) == data


@pytest.mark.parametrize(
    "text",
    [
        None,
        5,
        "***",
        "not base64!",
        "AA AA",
        "AAAA\n",
        "-_-_",
        "A",
        "AAAAA",
        "AA=",
        "AAA==",
        "=",
        "==",
        "AA==AA",
        "ÄÄÄÄ",
    ],
)
def test_what_is_not_base64_is_a_bad_request(text: object) -> None:
    """Management 3.13: any other character, blanks and line breaks included."""
    with pytest.raises(BadRequest, match=r"^key: must be standard Base64"):
        decode_base64(text, "key")


@given(st.text(alphabet="AQg+/=-_ \n", max_size=12) | st.text(max_size=6), st.booleans())
def test_any_text_is_binary_or_a_bad_request(text: str, url_safe: bool) -> None:
    try:
        data = decode_base64(text, "x", url_safe=url_safe)
    except BadRequest:
        return
    assert decode_base64(encode_base64(data), "x") == data


# --- Identifiers ---


def test_identifiers_have_their_patterns() -> None:
    """Management 3.2."""
    identifiers = Identifiers()
    assert identifiers.check_tenant_id("Plant_7.a-b") == "Plant_7.a-b"
    assert identifiers.check_device_id("urn:dev=1_.-") == "urn:dev=1_.-"
    assert identifiers.check_auth_id("sensor=1_.-") == "sensor=1_.-"
    for tenant_id in ("", " ", "a b", "x/y", "a:b", "a=b", "ä", "a\n", "a" * 257, "١"):
        with pytest.raises(BadRequest, match=r"^tenant-id: "):
            identifiers.check_tenant_id(tenant_id)
    for device_id in ("", "x/y", "d\n", "d" * 257):
        with pytest.raises(BadRequest, match=r"^device-id: "):
            identifiers.check_device_id(device_id)
    for auth_id in ("", "s 1", "a:b", "s" * 257):
        with pytest.raises(BadRequest, match=r"^auth-id: "):
            identifiers.check_auth_id(auth_id)
    assert identifiers.check_tenant_id("a" * 256)


def test_patterns_can_be_widened() -> None:
    """Management 3.2, History: ids of a 1.2 registry."""
    wide = Identifiers(tenant_pattern=re.compile(".+"))
    assert wide.check_tenant_id("a b") == "a b"
    with pytest.raises(BadRequest):
        wide.check_tenant_id("a" * 257)


def test_new_ids_are_random_uuids() -> None:
    made = new_id()
    assert str(uuid.UUID(made)) == made
    assert uuid.UUID(made).version == 4
    assert made != new_id()


# --- Members ---


class Colour(StrEnum):
    RED = "red"
    LIGHT_BLUE = "light-blue"


def test_only_an_object_has_members() -> None:
    values: tuple[object, ...] = (None, [], "x", 1, True)
    for value in values:
        with pytest.raises(BadRequest, match=r"^must be a JSON object"):
            Members(value)
        with pytest.raises(BadRequest, match=r"^trusted-ca\[0\]: must be an object"):
            Members(value, "trusted-ca[0]")


def test_left_out_and_null_are_the_same() -> None:
    """Management 3.6: explicit null for an optional property."""
    documents: list[dict[str, object]] = [{}, {"x": None}]
    for document in documents:
        members = Members(document)
        assert members.boolean("x") is None
        assert members.integer("x", minimum=0, maximum=9) is None
        assert members.string("x") is None
        assert members.constant("x", Colour) is None
        assert members.constants("x", Colour) == {}
        assert members.strings("x") == ()
        assert members.strings("x", or_single=True) == ()
        assert members.string_map("x") == {}
        assert members.object("x") == {}
        assert members.members("x") is None
        assert members.elements("x") is None
        assert members.instant("x") is None
        assert members.timestamp("x") is None
        assert members.base64("x") is None
        assert members.checked("x", str) is None
        with pytest.raises(BadRequest, match=r"^x: must be given"):
            members.required_string("x")
        members.finish()


@pytest.mark.parametrize(
    ("value", "meant"),
    [(True, True), (False, False), (0, False), (1, True), (-7, True), (2**80, True)]
    + [(text, True) for text in ("true", "True", "TRUE")]
    + [(text, False) for text in ("false", "False", "FALSE")],
)
def test_booleans(value: object, meant: bool) -> None:
    """Management 3.6, boolean property (D22)."""
    assert Members({"x": value}).boolean("x") is meant


@pytest.mark.parametrize("value", ["yes", "tRUE", "", "1", 1.0, 0.0, [], {}, [True]])
def test_what_is_no_boolean(value: object) -> None:
    with pytest.raises(BadRequest, match=r"^a\.x: must be true or false"):
        Members({"x": value}, "a").boolean("x")


@pytest.mark.parametrize(
    ("value", "meant"),
    [(5, 5), ("5", 5), ("-1", -1), ("+7", 7), ("007", 7), (1.9, 1), (-1.9, -1), (0.0, 0), (2147483647, 2147483647)],
)
def test_integers(value: object, meant: int) -> None:
    """Management 3.6, integer property (D22)."""
    assert Members({"x": value}).integer("x", minimum=-1, maximum=2**31 - 1) == meant


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        "1.5",
        "",
        "ten",
        "0x10",
        "1_000",
        "١",
        " 1",
        "1\n",
        -2,
        "-2",
        2**31,
        1e300,
        "9" * 30,
        "9" * 60,
        [],
        {},
    ],
)
def test_what_is_no_integer(value: object) -> None:
    with pytest.raises(BadRequest, match=r"^x: must be an integer"):
        Members({"x": value}).integer("x", minimum=-1, maximum=2**31 - 1)


@pytest.mark.parametrize(
    ("value", "meant"), [("a", "a"), ("", ""), (5, "5"), (1.5, "1.5"), (1.0, "1.0"), (True, "true"), (False, "false")]
)
def test_strings(value: object, meant: str) -> None:
    """Management 3.6, plain string property (D22): `5` becomes `"5"`."""
    assert Members({"x": value}).string("x") == meant
    assert Members({"x": [value]}).strings("x") == (meant,)
    assert Members({"x": {"k": value}}).string_map("x") == {"k": meant}
    assert Members({"x": value}).strings("x", or_single=True) == (meant,)
    with pytest.raises(BadRequest, match=r"^x: must be an array of strings"):
        Members({"x": value}).strings("x")


@pytest.mark.parametrize("value", [[], {}, [1]])
def test_what_is_no_string(value: object) -> None:
    with pytest.raises(BadRequest, match=r"^x: must be a string"):
        Members({"x": value}).string("x")
    with pytest.raises(BadRequest, match=r"^x\[1\]: must be a string"):
        Members({"x": ["a", value]}).strings("x")
    with pytest.raises(BadRequest, match=r"^x\.k: must be a string"):
        Members({"x": {"k": value}}).string_map("x")


def test_elements_are_not_null() -> None:
    for read in ("strings", "elements"):
        with pytest.raises(BadRequest, match=r"^x\[0\]: "):
            getattr(Members({"x": [None]}), read)("x")
    with pytest.raises(BadRequest, match=r"^x\.k: "):
        Members({"x": {"k": None}}).string_map("x")


@pytest.mark.parametrize("text", ["light-blue", "LIGHT-BLUE", "Light-Blue"])
def test_constants_in_any_case(text: str) -> None:
    """Management 3.6, enumerations."""
    assert Members({"x": text}).constant("x", Colour) is Colour.LIGHT_BLUE
    assert Members({"x": {"a": text}}).constants("x", Colour) == {"a": Colour.LIGHT_BLUE}


@pytest.mark.parametrize("value", ["blue", "", 1, True, [], {}])
def test_unknown_constants(value: object) -> None:
    with pytest.raises(BadRequest, match=r"^x: must be one of red, light-blue"):
        Members({"x": value}).constant("x", Colour)
    with pytest.raises(BadRequest, match=r"^x\.a: must be one of red, light-blue"):
        Members({"x": {"a": value}}).constants("x", Colour)


def test_objects_and_arrays_of_objects() -> None:
    members = Members({"free": {"n": None, "a": [1, 1.5]}, "one": {"b": "yes"}, "some": [{}, {"b": "no"}]}, "t")
    assert members.object("free") == {"n": None, "a": [1, 1.5]}
    one = members.members("one")
    assert one is not None
    with pytest.raises(BadRequest, match=r"^t\.one\.b: must be true or false"):
        one.boolean("b")
    some = members.elements("some")
    assert some is not None
    with pytest.raises(BadRequest, match=r"^t\.some\[1\]\.b: must be true or false"):
        some[1].boolean("b")


@pytest.mark.parametrize("value", ["x", 1, True, [], [{}]])
def test_what_is_no_object(value: object) -> None:
    for read in ("object", "members", "string_map"):
        with pytest.raises(BadRequest, match=r"^x: must be an object"):
            getattr(Members({"x": value}), read)("x")


@pytest.mark.parametrize("value", ["x", 1, True, {}])
def test_what_is_no_array(value: object) -> None:
    with pytest.raises(BadRequest, match=r"^x: must be an array of objects"):
        Members({"x": value}).elements("x")
    if not isinstance(value, str | int):
        with pytest.raises(BadRequest, match=r"^x: must be an array of strings"):
            Members({"x": value}).strings("x", or_single=True)


def test_timestamps_lose_their_fraction_and_instants_keep_it() -> None:
    members = Members({"x": "2024-01-01T00:00:00.75Z"})
    assert members.timestamp("x") == datetime(2024, 1, 1, tzinfo=UTC)
    assert members.instant("x") == datetime(2024, 1, 1, 0, 0, 0, 750000, tzinfo=UTC)


def test_scalars_are_not_converted_for_timestamps_and_binary_values() -> None:
    """Management 3.6: not for timestamps and Base64 values."""
    with pytest.raises(BadRequest, match=r"^x: must be a date and time"):
        Members({"x": 2024}).timestamp("x")
    with pytest.raises(BadRequest, match=r"^x: must be standard Base64"):
        Members({"x": 2024}).base64("x")


def test_another_parsers_error_gets_the_name_of_the_member() -> None:
    def refuse(text: str) -> int:
        raise BadRequest("is odd")

    assert Members({"x": "5"}).checked("x", int) == 5
    with pytest.raises(BadRequest, match=r"^a\.x: is odd"):
        Members({"x": "5"}, "a").checked("x", refuse)


def test_unknown_members_are_rejected_whatever_their_value() -> None:
    """Management 3.6 (D3)."""
    members = Members({"a": 1, "b": None, "c": 2}, "t")
    members.drop("a")
    members.value("b")
    with pytest.raises(BadRequest, match=r"^t\.c: unknown member"):
        members.finish()
    with pytest.raises(BadRequest, match=r"^b: unknown member"):
        Members({"b": None}).finish()
    with pytest.raises(BadRequest, match=rf"^{'n' * 64}…: unknown member"):
        Members({"n" * 1000: 1}).finish()


def test_the_rest_is_what_nobody_asked_for() -> None:
    members = Members({"a": 1, "b": None, "c": [2]})
    members.value("a")
    assert members.rest() == {"b": None, "c": [2]}
    members.finish()
    assert members.rest() == {}


@given(st.dictionaries(st.sampled_from("ab"), JSON), st.booleans())
def test_any_member_is_read_or_a_bad_request(document: dict[str, object], or_single: bool) -> None:
    reads: tuple[Callable[[Members], object], ...] = (
        lambda m: m.boolean("a"),
        lambda m: m.integer("a", minimum=-1, maximum=2**63 - 1),
        lambda m: m.string("a"),
        lambda m: m.required_string("a"),
        lambda m: m.constant("a", Colour),
        lambda m: m.constants("a", Colour),
        lambda m: m.strings("a", or_single=or_single),
        lambda m: m.string_map("a"),
        lambda m: m.object("a"),
        lambda m: m.members("a"),
        lambda m: m.elements("a"),
        lambda m: m.timestamp("a"),
        lambda m: m.base64("a"),
        lambda m: m.finish(),
    )
    for read in reads:
        with suppress(BadRequest):
            read(Members(document))
