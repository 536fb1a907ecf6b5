"""AMQP 1.0 part 1: types and their encodings."""

import struct
import uuid
from collections.abc import Callable
from typing import Any

import proton
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.amqp import strategies

from kamado.amqp import values
from kamado.amqp.values import Array, DecodeError, Described, EncodeError, Map, Symbol, decode, encode, skip

# AMQP 1.6: each type, each encoding.
EXAMPLES: list[tuple[bytes, object]] = [
    (b"\x40", None),
    (b"\x41", True),
    (b"\x42", False),
    (b"\x56\x01", True),
    (b"\x56\x00", False),
    (b"\x50\xff", values.UByte(255)),
    (b"\x60\xff\xff", values.UShort(65535)),
    (b"\x70\xff\xff\xff\xff", values.UInt(2**32 - 1)),
    (b"\x52\xff", values.UInt(255)),
    (b"\x43", values.UInt(0)),
    (b"\x80" + b"\xff" * 8, values.ULong(2**64 - 1)),
    (b"\x53\x07", values.ULong(7)),
    (b"\x44", values.ULong(0)),
    (b"\x51\x80", values.Byte(-128)),
    (b"\x61\x80\x00", values.Short(-32768)),
    (b"\x71\x00\x00\x00\xc8", values.Int(200)),
    (b"\x54\xff", values.Int(-1)),
    (b"\x81" + b"\xff" * 7 + b"\x00", -256),
    (b"\x55\xff", -1),
    (b"\x72\x3f\x80\x00\x00", values.Float(1)),
    (b"\x82\x3f\xf0" + bytes(6), 1.0),
    (b"\x74\x01\x02\x03\x04", values.Decimal32(b"\1\2\3\4")),
    (b"\x84" + bytes(range(8)), values.Decimal64(bytes(range(8)))),
    (b"\x94" + bytes(range(16)), values.Decimal128(bytes(range(16)))),
    (b"\x73\x00\x01\xf6\x00", values.Char("\U0001f600")),
    (b"\x83" + b"\xff" * 8, values.Timestamp(-1)),
    (b"\x98" + bytes(range(16)), uuid.UUID(bytes=bytes(range(16)))),
    (b"\xa0\x02\x00\xff", b"\x00\xff"),
    (b"\xb0\x00\x00\x00\x02\x00\xff", b"\x00\xff"),
    (b"\xa1\x03\xe2\x82\xac", "€"),
    (b"\xb1\x00\x00\x00\x03\xe2\x82\xac", "€"),
    (b"\xa3\x02ab", Symbol("ab")),
    (b"\xb3\x00\x00\x00\x02ab", Symbol("ab")),
    (b"\x45", []),
    (b"\xc0\x01\x00", []),
    (b"\xc0\x04\x02\x43\x52\x05", [values.UInt(0), values.UInt(5)]),
    (b"\xd0\x00\x00\x00\x07\x00\x00\x00\x02\x43\x52\x05", [values.UInt(0), values.UInt(5)]),
    (b"\xc1\x05\x02\xa1\x01a\x41", {"a": True}),
    (b"\xd1\x00\x00\x00\x08\x00\x00\x00\x02\xa1\x01a\x41", {"a": True}),
    (b"\xe0\x08\x02\xa3\x01a\x03bcd", Array.of_symbols(["a", "bcd"])),
    (b"\xf0\x00\x00\x00\x0b\x00\x00\x00\x02\xa3\x01a\x03bcd", Array.of_symbols(["a", "bcd"])),
    (b"\xe0\x02\x00\x40", Array((), 0x40)),
    # An array of described strings (AMQP 1.2, figure of a described format code in an array).
    (
        b"\xe0\x0a\x02\x00\xa1\x01u\xa1\x01a\x01b",
        Array(("a", "b"), 0xA1, ("u",)),
    ),
    (b"\x00\x53\x24\x45", Described(values.ULong(0x24), [])),
    (b"\x00\xa3\x01x\x00\xa3\x01y\x40", Described(Symbol("x"), Described(Symbol("y"), None))),
]


@pytest.mark.parametrize(("data", "value"), EXAMPLES, ids=lambda item: item.hex() if isinstance(item, bytes) else None)
def test_every_encoding_of_every_type_is_read(data: bytes, value: object) -> None:
    read, end = decode(b"?" + data + b"!", 1)
    assert (read, type(read), end) == (value, type(value), 1 + len(data))
    assert skip(b"?" + data + b"!", 1) == 1 + len(data)
    # The shortest form of a value is no longer than any other, and says the same.
    assert len(encode(value)) <= len(data)
    assert decode(encode(value))[0] == value


@pytest.mark.parametrize(("data", "value"), EXAMPLES, ids=lambda item: item.hex() if isinstance(item, bytes) else None)
def test_a_value_cut_off_anywhere_is_an_error(data: bytes, value: object) -> None:
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            decode(data[:length])


@settings(max_examples=300)
@given(strategies.anything)
def test_what_is_written_is_read_back_with_its_types(value: object) -> None:
    data = encode(value)
    read, end = decode(data)
    assert end == len(data) == skip(data, 0)
    # Equal bytes say more than equal values: 1 == True == 1.0 in Python.
    assert encode(read) == data


_TO_PROTON: dict[type, Callable[[Any], object]] = {
    values.UByte: proton.ubyte,
    values.UShort: proton.ushort,
    values.UInt: proton.uint,
    values.ULong: proton.ulong,
    values.Byte: proton.byte,
    values.Short: proton.short,
    values.Int: proton.int32,
    values.Timestamp: proton.timestamp,
    values.Float: proton.float32,
    values.Char: proton.char,
    values.Symbol: proton.symbol,
    values.Decimal32: lambda data: proton.decimal32(int.from_bytes(data, "big")),
    values.Decimal64: lambda data: proton.decimal64(int.from_bytes(data, "big")),
    values.Decimal128: proton.decimal128,
}
_PROTON_CODES = {
    0x40: proton.Data.NULL,
    0x43: proton.Data.UINT,
    0x70: proton.Data.UINT,
    0x50: proton.Data.UBYTE,
    0x52: proton.Data.UINT,
    0x56: proton.Data.BOOL,
    0x60: proton.Data.USHORT,
    0x71: proton.Data.INT,
    0x72: proton.Data.FLOAT,
    0x80: proton.Data.ULONG,
    0x81: proton.Data.LONG,
    0x83: proton.Data.TIMESTAMP,
    0x98: proton.Data.UUID,
    0xA0: proton.Data.BINARY,
    0xB0: proton.Data.BINARY,
    0xA3: proton.Data.SYMBOL,
    0xB3: proton.Data.SYMBOL,
    0xA1: proton.Data.STRING,
    0xB1: proton.Data.STRING,
}


def to_proton(value: object) -> Any:
    """Return what Proton's Python classes call this value."""
    if isinstance(value, Described):
        return proton.Described(to_proton(value.descriptor), to_proton(value.value))
    if isinstance(value, Array):
        items = map(to_proton, value.items)
        undescribed: Any = proton.UNDESCRIBED
        return proton.Array(undescribed, _PROTON_CODES[value.code], *items)
    if isinstance(value, list):
        return [to_proton(item) for item in value]
    if isinstance(value, dict):
        return {to_proton(key): to_proton(item) for key, item in value.items()}
    convert = _TO_PROTON.get(type(value))
    return convert(value) if convert is not None else value


def _proton_can(value: object, inside_described: bool = False) -> bool:
    """Proton's Python classes fail on binary keys of a map, and what follows nested described values is lost."""
    if isinstance(value, Described):
        return not inside_described and _proton_can(value.value, True)
    if isinstance(value, dict):
        return all(type(key) is not bytes and _proton_can(item, inside_described) for key, item in value.items())
    return not isinstance(value, list) or all(_proton_can(item, inside_described) for item in value)


proton_values = strategies.anything.filter(_proton_can)


def _typed(value: object) -> object:
    """Make types visible to `==`."""
    if isinstance(value, proton.Described):
        return ("described", _typed(value.descriptor), _typed(value.value))
    if isinstance(value, proton.Array):
        return ("array", value.type, [_typed(item) for item in value.elements])
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, dict):
        return [(_typed(key), _typed(item)) for key, item in value.items()]
    if isinstance(value, memoryview):
        value = bytes(value)
    return (type(value).__name__, value)


@settings(max_examples=300, deadline=None)
@given(proton_values)
def test_proton_reads_what_we_write(value: object) -> None:
    data = proton.Data()
    encoded = encode(value)
    assert data.decode(encoded) == len(encoded)
    data.rewind()
    assert data.next() is not None
    assert _typed(data.get_object()) == _typed(to_proton(value))


@settings(max_examples=300, deadline=None)
@given(proton_values)
def test_we_read_what_proton_writes(value: object) -> None:
    data = proton.Data()
    data.put_object(to_proton(value))
    encoded = bytes(data.encode())
    read, end = decode(encoded)
    assert end == len(encoded)
    assert _typed(to_proton(read)) == _typed(to_proton(value))


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error(data: bytes) -> None:
    try:
        value, end = decode(data)
    except DecodeError:
        return
    assert end <= len(data)
    encode(value)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x57\x00", "unknown constructor"),
        (b"\x46", "unknown constructor of no width"),
        (b"\x56\x02", "a boolean is 0 or 1"),
        (b"\xa1\x01\xff", "a string is UTF-8"),
        (b"\xa1\x03\xed\xa0\x80", "a surrogate is no character"),
        (b"\xa3\x01\xc3", "a symbol is ASCII"),
        (b"\x73\x00\x11\x00\x00", "a char is a code point"),
        (b"\x73\x00\x00\xd8\x00", "a char is no surrogate"),
        (b"\xc0\x02\x02\x40", "a list with fewer items than it says"),
        (b"\xc0\x03\x01\x40\x40", "a list with more bytes than items"),
        (b"\xc0\x00\x00", "a list shorter than its count"),
        (b"\xc1\x02\x01\x40", "a map has pairs"),
        (b"\xe0\x03\x02\x50\x00", "an array with fewer items than it says"),
        (b"\xe0\x04\x01\x50\x00\x00", "an array with more bytes than items"),
        (b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40", "four billion nulls in ten bytes"),
        (b"\xd0\x00\x00\x00\x05\xff\xff\xff\xff\x40", "four billion items in one byte"),
        (b"\xc0\x03\x01" * 60 + b"\x40", "nested too deep"),
        (b"\x00\x40" * 60, "descriptors nested too deep"),
        (b"\xe0\xfe\x01" + b"\x00\x40" * 60 + b"\x40", "array descriptors nested too deep"),
    ],
)
def test_malformed_values_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(DecodeError):
        decode(data)


def test_a_map_keeps_keys_that_a_dict_cannot_hold() -> None:
    for pairs in (
        [(values.UInt(1), "a"), (values.Int(1), "b")],
        [([1], "a"), ([1], "b")],
        [("a", 1), (Symbol("a"), 2)],
    ):
        data = encode(Map(pairs))
        read, _ = decode(data)
        assert isinstance(read, Map)
        assert read == pairs
        assert encode(read) == data


@pytest.mark.parametrize(
    "value",
    [
        values.UByte(256),
        values.UInt(-1),
        2**63,
        values.Int(2**31),
        Symbol("é"),
        values.Char("ab"),
        "\ud800",
        object(),
        (1, 2),
        Array((1,), 0xA1),
        Array((1,), 0x99),
        Array((b"x" * 256,), 0xA0),
    ],
)
def test_what_has_no_form_in_amqp_is_not_written(value: object) -> None:
    with pytest.raises(EncodeError):
        encode(value)


def test_lengths_around_the_short_forms() -> None:
    for length in range(240, 270):
        for value in (
            "x" * length,
            b"x" * length,
            Symbol("x" * length),
            [None] * length,
            ["x" * length],
            {"k": "x" * length},
        ):
            data = encode(value)
            assert decode(data) == (value, len(data))
    assert encode("x" * 255)[0] == 0xA1
    assert encode("x" * 256)[0] == 0xB1
    assert encode([None] * 254)[0] == 0xC0
    assert encode([None] * 255)[0] == 0xD0


def test_the_fixed_widths_are_those_of_the_standard() -> None:
    # AMQP 1.2, table of the upper half of a constructor; skip must step over constructors of later versions too.
    for upper, width in ((4, 0), (5, 1), (6, 2), (7, 4), (8, 8), (9, 16)):
        assert skip(bytes([upper << 4 | 0xE]) + bytes(width), 0) == 1 + width
    for upper in (0xA, 0xC, 0xE):
        assert skip(bytes([upper << 4 | 0xE, 3]) + bytes(3), 0) == 5
        assert skip(bytes([(upper + 1) << 4 | 0xE]) + struct.pack(">I", 3) + bytes(3), 0) == 8
    with pytest.raises(DecodeError):
        skip(b"\x10\x00", 0)
