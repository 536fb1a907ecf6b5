"""AMQP 1.0 performatives and message sections <-> bytes ("AMQP" below: OASIS AMQP 1.0, part and section).

Hides how anything is laid out on the wire; the types that all of it is made of are in `values.py` and can be had from
here too. Knows nothing of connections, sessions and time, so every function here is pure. Whatever the bytes are,
reading them ends in a value or in `DecodeError`.
"""

import functools
import itertools
import os
import re
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import msgspec

from kamado.amqp.values import (
    READ,
    U32,
    Array,
    Byte,
    Char,
    Decimal32,
    Decimal64,
    Decimal128,
    DecodeError,
    Described,
    EncodeError,
    Float,
    Int,
    Map,
    Short,
    Symbol,
    Timestamp,
    UByte,
    UInt,
    ULong,
    UShort,
    bounds,
    compound,
    decode,
    encode,
    skip,
    u32,
)

__all__ = [
    "READ",
    "UNUSABLE",
    "Array",
    "Attach",
    "Begin",
    "Byte",
    "Char",
    "Close",
    "Decimal32",
    "Decimal64",
    "Decimal128",
    "DecodeError",
    "Described",
    "Detach",
    "Disposition",
    "EncodeError",
    "End",
    "Error",
    "Float",
    "Flow",
    "Int",
    "Map",
    "Message",
    "Open",
    "Performative",
    "Properties",
    "Request",
    "SaslChallenge",
    "SaslInit",
    "SaslMechanisms",
    "SaslOutcome",
    "SaslResponse",
    "Short",
    "Symbol",
    "Terminus",
    "Timestamp",
    "Transfer",
    "UByte",
    "UInt",
    "ULong",
    "UShort",
    "Unusable",
    "decode",
    "decode_message",
    "decode_performative",
    "decode_request",
    "encode",
    "encode_frame",
    "encode_message",
    "encode_performative",
    "encode_reply",
    "is_settlement",
    "read_properties_tail",
    "read_usual_flow",
    "skip",
]


# --- Composite types: lists whose fields have names and types (AMQP 1.4) ----------------------------------------------


class _Kind(NamedTuple):
    """What may stand in a field. `read` gets the decoded value, never null, and its bytes."""

    read: Callable[[Any, bytes], Any]
    write: Callable[[Any], bytes] = encode


def _exactly(type_: type, plain: Callable[[Any], Any] | None = None) -> _Kind:
    """Only this AMQP type; in Python the `plain` type, where the class only tells what is on the wire."""

    def read(value: Any, _raw: bytes) -> Any:
        if type(value) is not type_:
            raise DecodeError(f"a field is not of type {type_.__name__.lower()}")
        return plain(value) if plain is not None else value

    return _Kind(read, (lambda value: encode(type_(value))) if plain is not None else encode)


_STRING = _exactly(str)
_SYMBOL = _exactly(Symbol, str)
_BINARY = _exactly(bytes)
_BOOLEAN = _exactly(bool)
_UBYTE = _exactly(UByte, int)
_USHORT = _exactly(UShort, int)
_UINT = _exactly(UInt, int)
_ULONG = _exactly(ULong, int)
_ANY = _Kind(lambda value, _raw: value)


def _read_map(value: Any, _raw: bytes) -> Any:
    if isinstance(value, dict):
        return value
    if isinstance(value, Map):  # nothing here needs the keys that made it one
        return {key: item for key, item in value if isinstance(key, str)}
    raise DecodeError("a field is not a map")


_MAP = _Kind(_read_map)


def _read_symbols(value: Any, _raw: bytes) -> tuple[str, ...]:
    """A field with multiple="true": null, one value or an array of them."""
    if type(value) is Symbol:
        return (str(value),)
    if type(value) is Array and all(type(item) is Symbol for item in value.items):
        return tuple(map(str, value.items))
    raise DecodeError("a field holds no symbols")


_SYMBOLS = _Kind(_read_symbols, lambda value: encode(Array.of_symbols(value)))


def _descriptor_code(descriptor: object) -> int | None:
    if type(descriptor) is ULong:
        return int(descriptor)
    if type(descriptor) is Symbol:
        return _SYMBOLIC.get(descriptor)
    return None


# Composite types may be announced by name instead of number (AMQP 1.2: descriptors).
_SYMBOLIC: Final = {
    "amqp:open:list": 0x10,
    "amqp:begin:list": 0x11,
    "amqp:attach:list": 0x12,
    "amqp:flow:list": 0x13,
    "amqp:transfer:list": 0x14,
    "amqp:disposition:list": 0x15,
    "amqp:detach:list": 0x16,
    "amqp:end:list": 0x17,
    "amqp:close:list": 0x18,
    "amqp:error:list": 0x1D,
    "amqp:received:list": 0x23,
    "amqp:accepted:list": 0x24,
    "amqp:rejected:list": 0x25,
    "amqp:released:list": 0x26,
    "amqp:modified:list": 0x27,
    "amqp:source:list": 0x28,
    "amqp:target:list": 0x29,
    "amqp:coordinator:list": 0x30,
    "amqp:sasl-mechanisms:list": 0x40,
    "amqp:sasl-init:list": 0x41,
    "amqp:sasl-challenge:list": 0x42,
    "amqp:sasl-response:list": 0x43,
    "amqp:sasl-outcome:list": 0x44,
    "amqp:header:list": 0x70,
    "amqp:delivery-annotations:map": 0x71,
    "amqp:message-annotations:map": 0x72,
    "amqp:properties:list": 0x73,
    "amqp:application-properties:map": 0x74,
    "amqp:data:binary": 0x75,
    "amqp:amqp-sequence:list": 0x76,
    "amqp:amqp-value:*": 0x77,
    "amqp:footer:map": 0x78,
}


@dataclass(frozen=True, slots=True)
class Error:
    """AMQP 2.8.14. `info` is neither read nor written."""

    condition: str
    description: str | None = None

    @classmethod
    def read(cls, value: Any, _raw: bytes = b"") -> "Error":
        items = value.value if isinstance(value, Described) and _descriptor_code(value.descriptor) == 0x1D else None
        if not isinstance(items, list) or not items or type(items[0]) is not Symbol:
            raise DecodeError("an error is malformed")
        description = items[1] if len(items) > 1 and type(items[1]) is str else None
        return cls(str(items[0]), description)

    def encode(self) -> bytes:
        return encode(Described(ULong(0x1D), [Symbol(self.condition), self.description]))


@dataclass(frozen=True, slots=True)
class Terminus:
    """Source or target of a link. `raw` is how the peer wrote it, since an answer repeats it unchanged."""

    raw: bytes
    address: str | None = None
    dynamic: bool = False
    is_coordinator: bool = False

    @classmethod
    def source(cls, address: str | None) -> "Terminus":
        return cls(encode(Described(ULong(0x28), [address] if address is not None else [])), address)

    @classmethod
    def target(cls, address: str | None) -> "Terminus":
        return cls(encode(Described(ULong(0x29), [address] if address is not None else [])), address)

    @classmethod
    def read(cls, value: Any, raw: bytes) -> "Terminus":
        code = _descriptor_code(value.descriptor) if isinstance(value, Described) else None
        if code not in {0x28, 0x29, 0x30} or not isinstance(value.value, list):
            raise DecodeError("a source or target is malformed")
        if code == 0x30:
            return cls(raw, is_coordinator=True)
        items = value.value
        address = items[0] if items and type(items[0]) is str else None
        return cls(raw, address, dynamic=len(items) > 4 and items[4] is True)


_ERROR = _Kind(Error.read, Error.encode)
_TERMINUS = _Kind(Terminus.read, lambda terminus: terminus.raw)


@dataclass(slots=True, kw_only=True)
class _Composite:
    code: ClassVar[int]
    kinds: ClassVar[tuple[_Kind, ...]]


_C = TypeVar("_C", bound=_Composite)


class _Layout(NamedTuple):
    cls: type[Any]
    head: bytes
    names: tuple[str, ...]
    kinds: tuple[_Kind, ...]
    defaults: tuple[object, ...]


_LAYOUTS: Final[dict[type[Any], _Layout]] = {}


def _laid_out(cls: type[_C]) -> type[_C]:
    """Note the fields of a composite type once, for both directions."""
    members = fields(cls)
    _LAYOUTS[cls] = _Layout(
        cls,
        b"\0\x53" + bytes((cls.code,)),
        tuple(member.name for member in members),
        cls.kinds,
        tuple(member.default for member in members),
    )
    return cls


def _read_composite(cls: type[_C], data: bytes, pos: int) -> tuple[_C, int]:
    """Read the list at `pos` as the fields of `cls`; fields beyond those that we know are skipped."""
    layout = _LAYOUTS[cls]
    code = data[pos]
    if code == 0x45:
        pos, end, count = pos + 1, pos + 1, 0
    elif code in {0xC0, 0xD0}:
        pos, end, count = bounds(data, pos + 1, code == 0xD0, 0)
    else:
        raise DecodeError("a performative is not a list")
    values: dict[str, object] = {}
    for index in range(count):
        if pos >= end:
            raise DecodeError("a list has fewer items than it says")
        if index >= len(layout.kinds):
            pos = skip(data, pos)
            continue
        value, stop = READ[data[pos]](data, pos + 1, 1)
        if value is not None:
            values[layout.names[index]] = layout.kinds[index].read(value, data[pos:stop])
        pos = stop
    if pos != end:
        raise DecodeError("the items of a list do not fill it")
    for name, default in zip(layout.names, layout.defaults, strict=True):
        if default is MISSING and name not in values:
            raise DecodeError(f"the mandatory field {name.replace('_', '-')} is missing")
    return cls(**values), end


def encode_performative(performative: _Composite) -> bytes:
    """Encode a performative, a SASL frame's body or properties, as short as it can be."""
    layout = _LAYOUTS[type(performative)]
    items: list[bytes] = []
    count = 0
    for name, kind, default in zip(layout.names, layout.kinds, layout.defaults, strict=True):
        value = getattr(performative, name)
        if value is None or (default is not MISSING and value == default):
            items.append(b"\x40")
        else:
            items.append(kind.write(value))
            count = len(items)
    if not count:
        return layout.head + b"\x45"
    content = b"".join(items[:count])
    wide = len(content) > 254
    return layout.head + (b"\xd0" if wide else b"\xc0") + compound(content, count, wide)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Open(_Composite):
    code = 0x10
    container_id: str
    hostname: str | None = None
    max_frame_size: int = 0xFFFFFFFF
    channel_max: int = 0xFFFF
    idle_time_out: int | None = None
    outgoing_locales: tuple[str, ...] = ()
    incoming_locales: tuple[str, ...] = ()
    offered_capabilities: tuple[str, ...] = ()
    desired_capabilities: tuple[str, ...] = ()
    properties: Mapping[object, object] | None = None
    kinds = (_STRING, _STRING, _UINT, _USHORT, _UINT, _SYMBOLS, _SYMBOLS, _SYMBOLS, _SYMBOLS, _MAP)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Begin(_Composite):
    code = 0x11
    remote_channel: int | None = None
    next_outgoing_id: int
    incoming_window: int
    outgoing_window: int
    handle_max: int = 0xFFFFFFFF
    kinds = (_USHORT, _UINT, _UINT, _UINT, _UINT)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Attach(_Composite):
    code = 0x12
    name: str
    handle: int
    role: bool
    """True: the side that writes this receives."""
    snd_settle_mode: int = 2
    rcv_settle_mode: int = 0
    source: Terminus | None = None
    target: Terminus | None = None
    unsettled: object = None
    incomplete_unsettled: bool = False
    initial_delivery_count: int | None = None
    max_message_size: int | None = None
    kinds = (
        _STRING,
        _UINT,
        _BOOLEAN,
        _UBYTE,
        _UBYTE,
        _TERMINUS,
        _TERMINUS,
        _ANY,
        _BOOLEAN,
        _UINT,
        _ULONG,
    )


@_laid_out
@dataclass(slots=True, kw_only=True)
class Flow(_Composite):
    code = 0x13
    next_incoming_id: int | None = None
    incoming_window: int
    next_outgoing_id: int
    outgoing_window: int
    handle: int | None = None
    delivery_count: int | None = None
    link_credit: int | None = None
    available: int | None = None
    drain: bool = False
    echo: bool = False
    kinds = (_UINT, _UINT, _UINT, _UINT, _UINT, _UINT, _UINT, _UINT, _BOOLEAN, _BOOLEAN)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Transfer(_Composite):
    code = 0x14
    handle: int
    delivery_id: int | None = None
    delivery_tag: bytes | None = None
    message_format: int | None = None
    settled: bool | None = None
    more: bool = False
    rcv_settle_mode: int | None = None
    state: object = None
    resume: bool = False
    aborted: bool = False
    batchable: bool = False
    kinds = (_UINT, _UINT, _BINARY, _UINT, _BOOLEAN, _BOOLEAN, _UBYTE, _ANY, _BOOLEAN, _BOOLEAN, _BOOLEAN)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Disposition(_Composite):
    code = 0x15
    role: bool
    first: int
    last: int | None = None
    settled: bool = False
    state: object = None
    batchable: bool = False
    kinds = (_BOOLEAN, _UINT, _UINT, _BOOLEAN, _ANY, _BOOLEAN)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Detach(_Composite):
    code = 0x16
    handle: int
    closed: bool = False
    error: Error | None = None
    kinds = (_UINT, _BOOLEAN, _ERROR)


@_laid_out
@dataclass(slots=True, kw_only=True)
class End(_Composite):
    code = 0x17
    error: Error | None = None
    kinds = (_ERROR,)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Close(_Composite):
    code = 0x18
    error: Error | None = None
    kinds = (_ERROR,)


@_laid_out
@dataclass(slots=True, kw_only=True)
class SaslMechanisms(_Composite):
    code = 0x40
    sasl_server_mechanisms: tuple[str, ...]
    kinds = (_SYMBOLS,)


@_laid_out
@dataclass(slots=True, kw_only=True)
class SaslInit(_Composite):
    code = 0x41
    mechanism: str
    initial_response: bytes | None = None
    hostname: str | None = None
    kinds = (_SYMBOL, _BINARY, _STRING)


@_laid_out
@dataclass(slots=True, kw_only=True)
class SaslChallenge(_Composite):
    code = 0x42
    challenge: bytes
    kinds = (_BINARY,)


@_laid_out
@dataclass(slots=True, kw_only=True)
class SaslResponse(_Composite):
    code = 0x43
    response: bytes
    kinds = (_BINARY,)


@_laid_out
@dataclass(slots=True, kw_only=True)
class SaslOutcome(_Composite):
    # Not named `code` like the field on the wire: that is the descriptor's name here.
    code = 0x44
    outcome: int
    kinds = (_UBYTE,)


@_laid_out
@dataclass(slots=True, kw_only=True)
class Properties(_Composite):
    """The properties section (AMQP 3.2.4), from message-id to content-encoding."""

    code = 0x73
    message_id: object = None
    user_id: bytes | None = None
    to: str | None = None
    subject: str | None = None
    reply_to: str | None = None
    correlation_id: object = None
    content_type: str | None = None
    content_encoding: str | None = None
    kinds = (_ANY, _BINARY, _STRING, _STRING, _STRING, _ANY, _SYMBOL, _SYMBOL)


Performative = (
    Open
    | Begin
    | Attach
    | Flow
    | Transfer
    | Disposition
    | Detach
    | End
    | Close
    | SaslMechanisms
    | SaslInit
    | SaslChallenge
    | SaslResponse
    | SaslOutcome
)

_PERFORMATIVES: Final[dict[int, type[Any]]] = {
    cls.code: cls
    for cls in (
        Open,
        Begin,
        Attach,
        Flow,
        Transfer,
        Disposition,
        Detach,
        End,
        Close,
        SaslMechanisms,
        SaslInit,
        SaslChallenge,
        SaslResponse,
        SaslOutcome,
    )
}


def decode_performative(data: bytes, pos: int = 0) -> tuple[Performative, int]:
    """Read the performative of a frame's body; what comes after it is the payload.

    Raises:
        DecodeError: It is malformed, none of AMQP 1.0, lacks a mandatory field or has one of another type.
    """
    try:
        code, pos = _read_descriptor(data, pos)
        cls = _PERFORMATIVES.get(code)
        if cls is None:
            raise DecodeError("a frame holds no performative of AMQP 1.0")
        return _read_composite(cls, data, pos)
    except (IndexError, struct.error):
        raise DecodeError("a performative is cut off") from None
    except UnicodeDecodeError:
        raise DecodeError("a string is not UTF-8, or a symbol not ASCII") from None


def _read_descriptor(data: bytes, pos: int) -> tuple[int, int]:
    if data[pos] != 0:
        raise DecodeError("a section or performative has no descriptor")
    descriptor, pos = READ[data[pos + 1]](data, pos + 2, 1)
    code = _descriptor_code(descriptor)
    if code is None:
        raise DecodeError("a descriptor is none of AMQP 1.0")
    return code, pos


def encode_frame(channel: int, performative: Performative, payload: bytes = b"", *, frame_type: int = 0) -> bytes:
    """Encode a whole frame (AMQP 2.3); `frame_type` 1 is SASL."""
    body = encode_performative(performative)
    return struct.pack(">IBBH", 8 + len(body) + len(payload), 2, frame_type, channel) + body + payload


# --- Frames that come as often as requests do -------------------------------------------------------------------------

# A receiver's disposition that settles: it asks for nothing. Clients send one for each reply, so it is told from the
# others without being decoded: role true, first, last, settled true; state, if any, an outcome without fields.
_SETTLED: Final = rb"\x41(?:\x43|\x52.|\x70....)(?:[\x40\x43]|\x52.|\x70....)\x41"
_OUTCOME: Final = rb"(?:\x40|\x00\x53[\x24-\x27](?:\x45|\xc0\x01\x00|\xd0\x00{3}\x04\x00{4}))"
_SETTLEMENT: Final = re.compile(
    rb"\x00\x53\x15(?:\xc0.|\xd0....\x00\x00\x00)(?:\x04%b|\x05%b%b|\x06%b%b[\x40-\x42])"
    % (_SETTLED, _SETTLED, _OUTCOME, _SETTLED, _OUTCOME),
    re.DOTALL,
)


def is_settlement(data: bytes, pos: int, stop: int) -> bool:
    """Tell whether the body of a frame, from `pos` to `stop`, is a disposition that needs no answer."""
    match = _SETTLEMENT.match(data, pos, stop)
    if match is None or match.end() != stop:
        return False
    if data[pos + 3] == 0xC0:
        return data[pos + 4] == stop - pos - 5
    size: int = u32(data, pos + 4)[0]  # Proton-J, the library of the stock adapters, writes its lists wide
    return size == stop - pos - 8


def read_usual_flow(data: bytes, pos: int, stop: int) -> "Flow | None":
    """Read a flow of the usual shape from the body of a frame; `None` if it is for `decode_performative`."""
    numbers: list[Any] = []
    try:
        # Descriptor and list, which ends where the frame does; properties are not usual.
        code = data[pos + 3]
        if code == 0xD0:
            size, at = u32(data, pos + 4)[0] + 8, pos + 12
            wanted = u32(data, pos + 8)[0]
        elif code == 0xC0:
            size, at = data[pos + 4] + 5, pos + 6
            wanted = data[pos + 5]
        else:
            return None
        if size != stop - pos or wanted > 10:
            return None
        while at < stop:
            code = data[at]
            if code == 0x40 or (code == 0x42 and len(numbers) > 7):
                # The two booleans come last, drain and echo; where one is true, the complete path takes over.
                numbers.append(None)
                at += 1
            elif len(numbers) > 7:
                return None
            elif code == 0x43:
                numbers.append(0)
                at += 1
            elif code == 0x52:
                numbers.append(data[at + 1])
                at += 2
            elif code == 0x70:
                numbers.append(u32(data, at + 1)[0])
                at += 5
            else:
                return None
    except (IndexError, struct.error):
        return None
    count = len(numbers)
    if at != stop or count != wanted or count < 4 or None in numbers[1:4]:
        return None
    numbers += [None] * (8 - count)
    return Flow(
        next_incoming_id=numbers[0],
        incoming_window=numbers[1],
        next_outgoing_id=numbers[2],
        outgoing_window=numbers[3],
        handle=numbers[4],
        delivery_count=numbers[5],
        link_credit=numbers[6],
        available=numbers[7],
    )


# --- Message sections (AMQP 3.2) --------------------------------------------------------------------------------------


class Unusable:
    """The type of `UNUSABLE`."""


UNUSABLE: Final = Unusable()
"""The body of a request whose body sections hold neither data nor one string or binary (amqp-apis 6)."""


class Request(msgspec.Struct, gc=False):
    """One request message. Its sections are read, nothing is judged: a missing field is `None`."""

    delivery_id: int
    settled: bool
    """Pre-settled by the peer: it gets no disposition."""
    subject: str | None
    reply_to: str | None
    correlation_id: bytes | None
    """Encoded with its type, for `encode_reply`: the correlation-id, or else the message-id."""
    application_properties: dict[str, object]
    """An AMQP string is exactly `str`; a symbol is `Symbol`, a subclass: test with `type(x) is str`."""
    body: bytes | Unusable | None
    """Data sections joined, or string/binary of an amqp-value; `None` if absent, null or empty."""


_ID_CODES: Final = frozenset({0x44, 0x53, 0x80, 0x98, 0xA0, 0xB0, 0xA1, 0xB1})
"""Constructors of ulong, uuid, binary and string: what an id may be (AMQP 3.2.11 to 3.2.14)."""


def _read_id(data: bytes, pos: int) -> tuple[bytes | None, int]:
    """Copy an id as it is encoded, since it is only ever echoed."""
    end = skip(data, pos)
    if data[pos] == 0x40:
        return None, end
    if data[pos] not in _ID_CODES:
        raise DecodeError("a message-id or correlation-id is of no type for ids")
    return data[pos:end], end


def read_properties_tail(data: bytes, pos: int, end: int, count: int) -> tuple[str | None, str | None, bytes | None]:
    """Read `count` fields of a properties section from user-id on: subject, reply-to and encoded correlation-id.

    Raises:
        DecodeError, IndexError, struct.error, UnicodeDecodeError: They are malformed or do not end at `end`.
    """
    subject = reply_to = correlation_id = None
    for index in range(1, count + 1):
        if index == 5:
            correlation_id, pos = _read_id(data, pos)
        elif index in {3, 4}:
            value, pos = READ[data[pos]](data, pos + 1, 1)
            if value is not None and type(value) is not str:
                raise DecodeError("subject or reply-to is not a string")
            if index == 3:
                subject = value
            else:
                reply_to = value
        else:
            pos = skip(data, pos)
    if pos != end:
        raise DecodeError("the fields of the properties do not fill them")
    return subject, reply_to, correlation_id


def _sections(payload: bytes) -> Iterator[tuple[int, int, int]]:
    """Give (code, start, end) of each section's value; check that the sections come in order."""
    pos = 0
    last = 0x6F
    while pos < len(payload):
        code, pos = _read_descriptor(payload, pos)
        if not 0x70 <= code <= 0x78:
            raise DecodeError("a section is none of AMQP 1.0")
        if code < last or (code == last and code not in {0x75, 0x76}):
            raise DecodeError("the sections of a message are out of order")
        if code > 0x75 and 0x75 <= last <= 0x77 and code not in {last, 0x78}:
            raise DecodeError("a message has a body of two kinds")
        last = code
        end = skip(payload, pos)
        yield code, pos, end
        pos = end


def _read_application_properties(payload: bytes, pos: int) -> dict[str, object]:
    value, _end = READ[payload[pos]](payload, pos + 1, 0)
    if not isinstance(value, dict | Map):
        raise DecodeError("the application properties are not a map")
    pairs = value.items() if isinstance(value, dict) else value
    result: dict[str, object] = {}
    for key, item in pairs:
        if type(key) is not str:
            raise DecodeError("the key of an application property is not a string")
        result[key] = item
    return result


def _read_body(payload: bytes, code: int, pos: int, end: int) -> bytes | Unusable | None:
    constructor = payload[pos]
    if code == 0x75 and constructor not in {0xA0, 0xB0}:
        raise DecodeError("a data section is not binary")
    if code == 0x76 or (code == 0x77 and constructor not in {0x40, 0xA0, 0xB0, 0xA1, 0xB1}):
        return UNUSABLE
    if constructor == 0x40:
        return None
    return payload[pos + (2 if constructor < 0xB0 else 5) : end]


def decode_request(payload: bytes, delivery_id: int, settled: bool) -> Request:
    """Read a request message whole: the complete path, which the short one in `connection.py` must agree with.

    Sections and fields that no operation needs are stepped over, not read.

    Raises:
        DecodeError: It is not a message.
    """
    message_id = correlation_id = subject = reply_to = None
    application_properties: dict[str, object] = {}
    body: bytes | Unusable | None = None
    try:
        for code, pos, end in _sections(payload):
            if code == 0x73:
                message_id, subject, reply_to, correlation_id = _read_properties(payload, pos)
            elif code == 0x74:
                application_properties = _read_application_properties(payload, pos)
            elif 0x75 <= code <= 0x77:
                part = _read_body(payload, code, pos, end)
                body = body + part if isinstance(body, bytes) and isinstance(part, bytes) else part
    except (IndexError, struct.error):
        raise DecodeError("a message is cut off") from None
    except UnicodeDecodeError:
        raise DecodeError("a string is not UTF-8, or a symbol not ASCII") from None
    return Request(
        delivery_id,
        settled,
        subject,
        reply_to,
        message_id if correlation_id is None else correlation_id,
        application_properties,
        None if body == b"" else body,
    )


def _read_properties(payload: bytes, pos: int) -> tuple[bytes | None, str | None, str | None, bytes | None]:
    code = payload[pos]
    if code == 0x45:
        return None, None, None, None
    if code not in {0xC0, 0xD0}:
        raise DecodeError("the properties are not a list")
    pos, end, count = bounds(payload, pos + 1, code == 0xD0, 0)
    if not count:
        if pos != end:
            raise DecodeError("the fields of the properties do not fill them")
        return None, None, None, None
    message_id, pos = _read_id(payload, pos)
    subject, reply_to, correlation_id = read_properties_tail(payload, pos, end, count - 1)
    return message_id, subject, reply_to, correlation_id


@dataclass(frozen=True, slots=True)
class Message:
    """A message as a client reads it."""

    properties: Properties
    application_properties: Mapping[str, object]
    body: bytes | Unusable | None


def decode_message(payload: bytes) -> Message:
    """Read a message with all its properties.

    Raises:
        DecodeError: It is not a message.
    """
    request = decode_request(payload, 0, False)
    properties = Properties()
    try:
        for code, pos, _end in _sections(payload):
            if code == 0x73:
                properties, _ = _read_composite(Properties, payload, pos)
    except (IndexError, struct.error, UnicodeDecodeError):
        raise DecodeError("the properties are malformed") from None
    return Message(properties, request.application_properties, request.body)


def encode_message(
    properties: Properties, application_properties: Mapping[str, object] | None = None, body: bytes | None = None
) -> bytes:
    """Encode a message with a data section as its body, if any."""
    parts = [encode_performative(properties)]
    if application_properties:
        parts.append(b"\0\x53\x74" + encode(dict(application_properties)))
    if body is not None:
        parts.append(b"\0\x53\x75" + encode(body))
    return b"".join(parts)


# --- Replies ----------------------------------------------------------------------------------------------------------

# A reply's message-id only has to differ from others: a random head of this process and a counter do that without the
# system call and the formatting of a fresh UUID, which would cost more than the rest of the reply.
_MESSAGE_ID_HEAD: Final = b"\xa1\x24" + str(uuid.UUID(bytes=os.urandom(16), version=4)).encode()[:24]
_numbers = itertools.count(int.from_bytes(os.urandom(5), "big"))


class _ReplyParts(NamedTuple):
    """What repeats from reply to reply, encoded: the start of `to`, the content-type, application properties."""

    to: bytes
    content_type: bytes
    items: bytes
    item_count: int


@functools.lru_cache(maxsize=4096)
def _reply_parts(
    endpoint: str, status: int, cache_control: str | None, tenant_id: str | None, content_type: str | None
) -> _ReplyParts:
    items = [encode("status"), encode(Int(status))]
    if tenant_id is not None:
        items += encode("tenant_id"), encode(tenant_id)
    if cache_control is not None:
        items += encode("cache_control"), encode(cache_control)
    return _ReplyParts(
        endpoint.encode() if tenant_id is None else f"{endpoint}/{tenant_id}".encode(),
        encode(None if content_type is None else Symbol(content_type)),
        b"".join(items),
        len(items),
    )


def encode_reply(
    endpoint: str,
    correlation_id: bytes,
    status: int,
    payload: bytes | None = None,
    *,
    cache_control: str | None = None,
    tenant_id: str | None = None,
    device_id: str | None = None,
    content_type: str = "application/json",
) -> bytes:
    """Encode a reply message (amqp-apis 7), ready for `Link.send`.

    Args:
        endpoint: First segment of the property `to`, which is endpoint/tenant/device as far as known.
        correlation_id: `Request.correlation_id`, encoded with its type.
        payload: Body, sent as one data section; none if `None`. `content_type` is set only with a body.
    """
    to, encoded_type, items, count = _reply_parts(
        endpoint, status, cache_control, tenant_id, None if payload is None else content_type
    )
    to_size = len(to)
    if device_id is not None:
        device = device_id.encode()
        size = len(device)
        to_size += size + 1
        to = b"%b/%b" % (to, device)
        items = b"%b\xa1\x09device_id%b%b" % (items, b"\xa1%c" % size if size < 256 else _wide_string(size), device)
        count += 2
    if payload is None:
        body = b""
    else:
        size = len(payload)
        body = b"\0\x53\x75\xa0%c" % size if size < 256 else b"\0\x53\x75\xb0" + U32.pack(size)
    # Fields of the properties: message-id, user-id, to, subject, reply-to, correlation-id, content-type.
    size = 44 + to_size + len(correlation_id) + len(encoded_type)
    items_size = 1 + len(items)
    if size < 256 and items_size < 256:
        return b"\0\x53\x73\xc0%c\x07%b%012x\x40\xa1%c%b\x40\x40%b%b\0\x53\x74\xc1%c%c%b%b%b" % (
            size,
            _MESSAGE_ID_HEAD,
            next(_numbers) & 0xFFFFFFFFFFFF,
            to_size,
            to,
            correlation_id,
            encoded_type,
            items_size,
            count,
            items,
            body,
            payload or b"",
        )
    properties = b"%b%012x\x40%b%b\x40\x40%b%b" % (
        _MESSAGE_ID_HEAD,
        next(_numbers) & 0xFFFFFFFFFFFF,
        _wide_string(to_size),
        to,
        correlation_id,
        encoded_type,
    )
    head = b"\0\x53\x73\xd0" + compound(properties, 7, True)
    return head + b"\0\x53\x74\xd1" + compound(items, count, True) + body + (payload or b"")


def _wide_string(size: int) -> bytes:
    """Constructor and size of a string in its long form."""
    return b"\xb1" + U32.pack(size)
