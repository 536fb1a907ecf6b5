"""The types of AMQP 1.0 <-> bytes ("AMQP" below: OASIS AMQP 1.0, part and section).

Knows nothing of performatives and messages, which are made of these (`codec.py`). Whatever the bytes are, `decode` ends
in a value or in `DecodeError`.

Values: `None`, `bool`, `str` (string), `bytes` (binary), `uuid.UUID`, `float` (double), `int` (long), `list` and `dict`
(map) are themselves. The other AMQP types have a class of their own, a subclass of the Python type that they behave
like, so that a value keeps its type from peer to peer: `Symbol`, `UInt`, `Timestamp` and so on.
"""

import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

__all__ = [
    "READ",
    "U32",
    "Array",
    "Byte",
    "Char",
    "Decimal32",
    "Decimal64",
    "Decimal128",
    "DecodeError",
    "Described",
    "EncodeError",
    "Float",
    "Int",
    "Map",
    "Short",
    "Symbol",
    "Timestamp",
    "UByte",
    "UInt",
    "ULong",
    "UShort",
    "bounds",
    "compound",
    "decode",
    "encode",
    "skip",
    "u32",
]


class DecodeError(Exception):
    """The bytes are not AMQP 1.0, or not what stands in this place."""


class EncodeError(ValueError):
    """The value has no form in AMQP 1.0."""


class UByte(int):
    __slots__ = ()


class UShort(int):
    __slots__ = ()


class UInt(int):
    __slots__ = ()


class ULong(int):
    __slots__ = ()


class Byte(int):
    __slots__ = ()


class Short(int):
    __slots__ = ()


class Int(int):
    """AMQP int, 32 bit signed: the type of `status` in replies. A plain `int` is a long."""

    __slots__ = ()


class Timestamp(int):
    """Milliseconds since 1970."""

    __slots__ = ()


class Float(float):
    """32 bit. A plain `float` is a double."""

    __slots__ = ()


class Char(str):
    """One code point."""

    __slots__ = ()


class Symbol(str):
    """ASCII. A plain `str` is an AMQP string."""

    __slots__ = ()


class Decimal32(bytes):
    """IEEE 754 decimal, kept as its bytes, like its two brothers: nothing here computes with it."""

    __slots__ = ()


class Decimal64(bytes):
    __slots__ = ()


class Decimal128(bytes):
    __slots__ = ()


class Described(NamedTuple):
    """A value with a descriptor (AMQP 1.2): `ULong` or `Symbol` by the standard, anything on the wire."""

    descriptor: object
    value: object


class Map(list[tuple[object, object]]):
    """A map that a `dict` cannot hold: keys that are lists, or equal in Python though of different AMQP types."""


@dataclass(frozen=True, slots=True)
class Array:
    """An AMQP array: all items have one constructor, `descriptors` (mostly none) and `code` (AMQP 1.6.24)."""

    items: Sequence[object]
    code: int
    descriptors: tuple[object, ...] = ()

    @classmethod
    def of_symbols(cls, symbols: Iterable[str]) -> "Array":
        return cls(tuple(map(Symbol, symbols)), 0xA3)


# --- Bytes -> values --------------------------------------------------------------------------------------------------

U32 = struct.Struct(">I")
u32 = U32.unpack_from

# Deeper nesting than this is an attack on the stack, not a message.
_MAX_DEPTH: Final = 32
# Items of no width cost the sender nothing: four bytes could ask for 4 G of them.
_MAX_EMPTY_ITEMS: Final = 4096

_Reader = Callable[[bytes, int, int], tuple[object, int]]


def _fixed(format_: str, convert: Callable[[Any], object] | None = None) -> _Reader:
    layout = struct.Struct(">" + format_)
    unpack, size = layout.unpack_from, layout.size

    def read(data: bytes, pos: int, _depth: int) -> tuple[object, int]:
        (value,) = unpack(data, pos)
        return (value if convert is None else convert(value)), pos + size

    return read


def _constant(value: object) -> _Reader:
    def read(_data: bytes, pos: int, _depth: int) -> tuple[object, int]:
        return value, pos

    return read


def _variable(wide: bool, convert: Callable[[bytes], object] | None = None) -> _Reader:
    def read(data: bytes, pos: int, _depth: int) -> tuple[object, int]:
        if wide:
            start = pos + 4
            end = start + u32(data, pos)[0]
        else:
            start = pos + 1
            end = start + data[pos]
        if end > len(data):
            raise DecodeError("a value is longer than what holds it")
        value = data[start:end]
        return (value if convert is None else convert(value)), end

    return read


def _read_bool(data: bytes, pos: int, _depth: int) -> tuple[object, int]:
    if data[pos] > 1:
        raise DecodeError("a boolean is neither 0 nor 1")
    return data[pos] == 1, pos + 1


def _to_char(number: int) -> Char:
    if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
        raise DecodeError("a char is not a code point")
    return Char(chr(number))


def bounds(data: bytes, pos: int, wide: bool, depth: int) -> tuple[int, int, int]:
    """Read size and count of a compound value: (start of its items, its end, count)."""
    if depth >= _MAX_DEPTH:
        raise DecodeError("values are nested too deep")
    if wide:
        end, count, start = pos + 4 + u32(data, pos)[0], u32(data, pos + 4)[0], pos + 8
    else:
        end, count, start = pos + 1 + data[pos], data[pos + 1], pos + 2
    if end > len(data) or start > end:
        raise DecodeError("a value is longer than what holds it")
    return start, end, count


def _read_items(data: bytes, pos: int, end: int, count: int, depth: int) -> list[object]:
    if count > end - pos:  # each item has at least its constructor
        raise DecodeError("a list or map has fewer items than it says")
    items: list[object] = []
    for _ in range(count):
        value, pos = READ[data[pos]](data, pos + 1, depth + 1)
        items.append(value)
    if pos != end:
        raise DecodeError("the items of a list or map do not fill it")
    return items


def _list(wide: bool) -> _Reader:
    def read(data: bytes, pos: int, depth: int) -> tuple[object, int]:
        start, end, count = bounds(data, pos, wide, depth)
        return _read_items(data, start, end, count, depth), end

    return read


def _map(wide: bool) -> _Reader:
    def read(data: bytes, pos: int, depth: int) -> tuple[object, int]:
        start, end, count = bounds(data, pos, wide, depth)
        if count % 2:
            raise DecodeError("a map has a key without a value")
        items = _read_items(data, start, end, count, depth)
        pairs = list(zip(items[::2], items[1::2], strict=True))
        try:
            result = dict(pairs)
        except TypeError:  # a key that cannot be hashed
            return Map(pairs), end
        return (result if len(result) == len(pairs) else Map(pairs)), end

    return read


def _array(wide: bool) -> _Reader:
    def read(data: bytes, pos: int, depth: int) -> tuple[object, int]:
        start, end, count = bounds(data, pos, wide, depth)
        descriptors: list[object] = []
        code, pos = data[start], start + 1
        while code == 0:
            if len(descriptors) >= _MAX_DEPTH:
                raise DecodeError("values are nested too deep")
            descriptor, pos = READ[data[pos]](data, pos + 1, depth + 1)
            descriptors.append(descriptor)
            code, pos = data[pos], pos + 1
        if count > max(end - pos, _MAX_EMPTY_ITEMS):
            raise DecodeError("an array has fewer items than it says")
        reader = READ[code]
        items = []
        for _ in range(count):
            value, pos = reader(data, pos, depth + 1)
            items.append(value)
        if pos != end:
            raise DecodeError("the items of an array do not fill it")
        return Array(tuple(items), code, tuple(descriptors)), end

    return read


def _read_described(data: bytes, pos: int, depth: int) -> tuple[object, int]:
    if depth >= _MAX_DEPTH:
        raise DecodeError("values are nested too deep")
    descriptor, pos = READ[data[pos]](data, pos + 1, depth + 1)
    value, pos = READ[data[pos]](data, pos + 1, depth + 1)
    return Described(descriptor, value), pos


def _read_unknown(_data: bytes, _pos: int, _depth: int) -> tuple[object, int]:
    raise DecodeError("a constructor is none of AMQP 1.0")


def _text(data: bytes) -> str:
    return data.decode()


def _symbol(data: bytes) -> Symbol:
    return Symbol(data.decode("ascii"))


READ: Final[list[_Reader]] = [_read_unknown] * 256
"""For each constructor code, how to read the value after it: (data, position, depth) -> (value, its end). These raise
IndexError, struct.error and UnicodeDecodeError too, where the data is cut off or no text."""
for _code, _reader in {
    0x00: _read_described,
    0x40: _constant(None),
    0x41: _constant(True),
    0x42: _constant(False),
    0x43: _constant(UInt(0)),
    0x44: _constant(ULong(0)),
    0x50: _fixed("B", UByte),
    0x51: _fixed("b", Byte),
    0x52: _fixed("B", UInt),
    0x53: _fixed("B", ULong),
    0x54: _fixed("b", Int),
    0x55: _fixed("b"),
    0x56: _read_bool,
    0x60: _fixed("H", UShort),
    0x61: _fixed("h", Short),
    0x70: _fixed("I", UInt),
    0x71: _fixed("i", Int),
    0x72: _fixed("f", Float),
    0x73: _fixed("I", _to_char),
    0x74: _fixed("4s", Decimal32),
    0x80: _fixed("Q", ULong),
    0x81: _fixed("q"),
    0x82: _fixed("d"),
    0x83: _fixed("q", Timestamp),
    0x84: _fixed("8s", Decimal64),
    0x94: _fixed("16s", Decimal128),
    0x98: _fixed("16s", lambda data: uuid.UUID(bytes=data)),
    0xA0: _variable(False),
    0xA1: _variable(False, _text),
    0xA3: _variable(False, _symbol),
    0xB0: _variable(True),
    0xB1: _variable(True, _text),
    0xB3: _variable(True, _symbol),
    0xC0: _list(False),
    0xC1: _map(False),
    0xD0: _list(True),
    0xD1: _map(True),
    0xE0: _array(False),
    0xF0: _array(True),
}.items():
    READ[_code] = _reader
READ[0x45] = lambda _data, pos, _depth: ([], pos)


def decode(data: bytes, pos: int = 0) -> tuple[object, int]:
    """Read one value with its constructor at `pos`; return it and where it ends.

    Raises:
        DecodeError: There is no complete, correct value.
    """
    try:
        return READ[data[pos]](data, pos + 1, 0)
    except (IndexError, struct.error):
        raise DecodeError("a value is cut off") from None
    except UnicodeDecodeError:
        raise DecodeError("a string is not UTF-8, or a symbol not ASCII") from None


def skip(data: bytes, pos: int) -> int:
    """Return where the value at `pos` ends, without looking into it.

    Raises:
        DecodeError, IndexError, struct.error: It does not end within the data.
    """
    code = data[pos]
    for _ in range(_MAX_DEPTH):
        if code:
            break
        pos = _skip_plain(data, pos + 1)  # the descriptor
        code = data[pos]
    return _skip_plain(data, pos)


# Width of the value after its constructor, by the upper half of the code (AMQP 1.2); negative: of its size field.
_WIDTHS: Final = (None, None, None, None, 0, 1, 2, 4, 8, 16, -1, -4, -1, -4, -1, -4)


def _skip_plain(data: bytes, pos: int) -> int:
    width = _WIDTHS[data[pos] >> 4]
    if width is None:
        raise DecodeError("a constructor is none of AMQP 1.0")
    if width >= 0:
        end = pos + 1 + width
    elif width == -1:
        end = pos + 2 + data[pos + 1]
    else:
        end = pos + 5 + u32(data, pos + 1)[0]
    if end > len(data):
        raise DecodeError("a value is longer than what holds it")
    return end


# --- Values -> bytes --------------------------------------------------------------------------------------------------


def _put_sized(wide: bool) -> Callable[[Any], bytes]:
    if wide:
        return lambda data: U32.pack(len(data)) + data
    return lambda data: bytes((len(data),)) + data


def compound(content: bytes, count: int, wide: bool) -> bytes:
    """Put size and count before the encoded items of a list, map or array."""
    if wide:
        return struct.pack(">II", len(content) + 4, count) + content
    return bytes((len(content) + 1, count)) + content


def _flatten(value: Any) -> list[object]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return [item for pair in pairs for item in pair]


def _put_array(value: Any, wide: bool) -> bytes:
    head = b"".join(b"\0" + encode(descriptor) for descriptor in value.descriptors) + bytes((value.code,))
    put = _PUT[value.code]
    return compound(head + b"".join(map(put, value.items)), len(value.items), wide)


def _pack(format_: str) -> Callable[[Any], bytes]:
    return struct.Struct(">" + format_).pack


# How the data of each code is written, without its constructor, as the items of an array are.
_PUT: Final[dict[int, Callable[[Any], bytes]]] = {
    **dict.fromkeys((0x40, 0x41, 0x42, 0x43, 0x44, 0x45), lambda _value: b""),
    **dict.fromkeys((0x50, 0x52, 0x53, 0x56), _pack("B")),
    **dict.fromkeys((0x51, 0x54, 0x55), _pack("b")),
    0x60: _pack("H"),
    0x61: _pack("h"),
    0x70: _pack("I"),
    0x71: _pack("i"),
    0x72: _pack("f"),
    0x73: lambda value: U32.pack(ord(value)),
    0x80: _pack("Q"),
    **dict.fromkeys((0x81, 0x83), _pack("q")),
    0x82: _pack("d"),
    0x74: _pack("4s"),
    0x84: _pack("8s"),
    0x94: _pack("16s"),
    0x98: lambda value: bytes(value.bytes),
    0xA0: _put_sized(False),
    0xA1: lambda value: _put_sized(False)(value.encode()),
    0xA3: lambda value: _put_sized(False)(value.encode("ascii")),
    0xB0: _put_sized(True),
    0xB1: lambda value: _put_sized(True)(value.encode()),
    0xB3: lambda value: _put_sized(True)(value.encode("ascii")),
    0xC0: lambda value: compound(b"".join(map(encode, value)), len(value), False),
    0xC1: lambda value: compound(b"".join(map(encode, _flatten(value))), 2 * len(value), False),
    0xD0: lambda value: compound(b"".join(map(encode, value)), len(value), True),
    0xD1: lambda value: compound(b"".join(map(encode, _flatten(value))), 2 * len(value), True),
    0xE0: lambda value: _put_array(value, False),
    0xF0: lambda value: _put_array(value, True),
}


def _short_or(short: int, wide: int) -> Callable[[Any], bytes]:
    """Write variable or compound data in its one-byte form where it fits."""

    def write(value: Any) -> bytes:
        data = _PUT[wide](value)
        if wide < 0xC0:
            if len(data) - 4 <= 255:
                return bytes((short, len(data) - 4)) + data[4:]
        elif len(data) - 8 <= 254 and data[4:7] == b"\0\0\0":
            return bytes((short, len(data) - 7, data[7])) + data[8:]
        return bytes((wide,)) + data

    return write


_write_list = _short_or(0xC0, 0xD0)


def _constructed(code: int) -> Callable[[Any], bytes]:
    prefix, put = bytes((code,)), _PUT[code]
    return lambda value: prefix + put(value)


def _write_uint(value: int) -> bytes:
    if value == 0:
        return b"\x43"
    return b"\x52" + _PUT[0x52](value) if 0 < value < 256 else b"\x70" + _PUT[0x70](value)


_SMALL_SIGNED = range(-128, 128)
_WRITE: Final[dict[type, Callable[[Any], bytes]]] = {
    type(None): lambda _value: b"\x40",
    bool: lambda value: b"\x41" if value else b"\x42",
    UByte: _constructed(0x50),
    UShort: _constructed(0x60),
    UInt: _write_uint,
    ULong: lambda value: (
        b"\x44" if value == 0 else b"\x53" + _PUT[0x53](value) if 0 < value < 256 else b"\x80" + _PUT[0x80](value)
    ),
    Byte: _constructed(0x51),
    Short: _constructed(0x61),
    Int: lambda value: b"\x54" + _PUT[0x54](value) if value in _SMALL_SIGNED else b"\x71" + _PUT[0x71](value),
    int: lambda value: b"\x55" + _PUT[0x55](value) if value in _SMALL_SIGNED else b"\x81" + _PUT[0x81](value),
    Float: _constructed(0x72),
    float: _constructed(0x82),
    Decimal32: _constructed(0x74),
    Decimal64: _constructed(0x84),
    Decimal128: _constructed(0x94),
    Char: _constructed(0x73),
    Timestamp: _constructed(0x83),
    uuid.UUID: _constructed(0x98),
    bytes: _short_or(0xA0, 0xB0),
    str: _short_or(0xA1, 0xB1),
    Symbol: _short_or(0xA3, 0xB3),
    list: lambda value: _write_list(value) if value else b"\x45",
    dict: _short_or(0xC1, 0xD1),
    Map: _short_or(0xC1, 0xD1),
    Array: _short_or(0xE0, 0xF0),
    Described: lambda value: b"\0" + encode(value.descriptor) + encode(value.value),
}


def encode(value: object) -> bytes:
    """Encode a value with its constructor, in the shortest form of its type.

    Raises:
        EncodeError: Not one of the types of this module, or out of the range of its type.
    """
    write = _WRITE.get(type(value))
    if write is None:
        raise EncodeError(f"{type(value).__name__} is no AMQP type")
    try:
        return write(value)
    except (struct.error, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise EncodeError(f"a value does not fit its AMQP type: {error}") from None
