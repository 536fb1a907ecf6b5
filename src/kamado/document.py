"""JSON documents: text to values and back, and the rules that members of a request object keep.

Hides the JSON library and what Hono accepts in place of the documented type (management 3.6): a number where a text is
wanted, a text where a boolean is wanted, `null` for left out. Every error is a `BadRequest` that names the member by
its path and says the rule; it never repeats a value, which may be a secret.

Knows no tenant, device or credential.
"""

import binascii
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, TypeVar, cast

import msgspec

from kamado.errors import BadRequest

__all__ = [
    "INT32_MAX",
    "INT64_MAX",
    "MAX_DEPTH",
    "MAX_IDENTIFIER_LENGTH",
    "Identifiers",
    "JsonObject",
    "Members",
    "decode",
    "decode_base64",
    "encode",
    "encode_base64",
    "format_timestamp",
    "new_id",
    "parse_timestamp",
]

JsonObject = dict[str, object]

# --- Text ---

MAX_DEPTH: Final = 128
"""Arrays and objects inside each other; no document of Hono comes near, and it is far from the interpreter's limit."""

_decode = msgspec.json.Decoder(object).decode
_encode = msgspec.json.Encoder().encode


def decode(data: bytes) -> object:
    """Turn JSON text into values (management 3.5).

    Of members of one name the last counts. Integers keep all their digits and stay apart from fractions.

    Raises:
        BadRequest: Not UTF-8, not exactly one JSON value, half a surrogate pair, a fraction beyond the range of
            a double, an integer of thousands of digits, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value: object = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"not valid JSON: {_text_of(error, data)}") from None
    except RecursionError:
        raise _too_deep() from None
    # To count is quicker than to walk, and documents with so many brackets are rare.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _text_of(error: Exception, data: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    text = str(error).removeprefix("JSON is malformed: ")
    if text == _TRUNCATED and data.rstrip().endswith((b'"', b"]", b"}")) and _HALF_A_PAIR.search(data):
        # What the library says where the second half of a pair should be.
        return "half a surrogate pair"
    return text


_TRUNCATED: Final = "Input data was truncated"
_HALF_A_PAIR: Final = re.compile(rb"\\u[dD][89abAB]")


def _too_deep() -> BadRequest:
    return BadRequest(f"not acceptable JSON: nested deeper than {MAX_DEPTH} levels")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def encode(value: object) -> bytes:
    """Turn JSON values into compact UTF-8 text."""
    return _encode(value)


# --- Scalars with a form ---

_TIMESTAMP: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?"
    r"(?:[Zz]|([+-])(\d\d)(?::?(\d\d)|:(\d\d):(\d\d))?)",
    re.ASCII,
)
# As java.time.ZoneOffset, which is what adapters read with.
_MAX_OFFSET: Final = timedelta(hours=18)


def parse_timestamp(text: object, member: str) -> datetime:
    """Read an instant (management 3.12), as exactly as a `datetime` can hold it.

    Raises:
        BadRequest: Not of the form, no such date or time, an offset beyond 18 hours, or outside the years 1 to 9999
            of UTC.
    """
    matched = _TIMESTAMP.fullmatch(text) if isinstance(text, str) else None
    if matched is None:
        raise BadRequest(f"{member}: must be a date and time with an offset, like 2031-12-31T23:59:59Z")
    year, month, day, hour, minute, second, fraction, sign, hours, plain_minutes, minutes, seconds = matched.groups()
    try:
        local = datetime(
            int(year),
            int(month),
            int(day),
            int(hour),
            int(minute),
            int(second or 0),
            int((fraction or "").ljust(6, "0")[:6]),
            tzinfo=UTC,
        )
        if sign is None:
            return local
        minutes_east = int(plain_minutes or minutes or 0)
        seconds_east = int(seconds or 0)
        east = timedelta(hours=int(hours), minutes=minutes_east, seconds=seconds_east)
        if minutes_east > 59 or seconds_east > 59 or east > _MAX_OFFSET:
            raise BadRequest(f"{member}: the offset is out of range")
        return local - east if sign == "+" else local + east
    except (ValueError, OverflowError):
        raise BadRequest(f"{member}: there is no such date or time") from None


def format_timestamp(instant: datetime) -> str:
    """Write an instant: UTC, whole seconds (cut off, not rounded), `Z`."""
    return f"{instant.astimezone(UTC).replace(tzinfo=None, microsecond=0).isoformat()}Z"


_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)
_FROM_URL_SAFE: Final = str.maketrans("-_", "+/")


def decode_base64(text: object, member: str, *, url_safe: bool = False) -> bytes:
    """Read a binary value (management 3.13): standard Base64, padded or not.

    Args:
        text: The value of the member.
        member: Its path, for the error.
        url_safe: Take the URL-safe alphabet as well.

    Raises:
        BadRequest: No string, another character, or a length that no encoding has.
    """
    if isinstance(text, str):
        given = text.translate(_FROM_URL_SAFE) if url_safe else text
        if _BASE64.fullmatch(given):
            bare = given.rstrip("=")
            # Padding is all there or not there at all.
            if len(bare) % 4 != 1 and (len(bare) == len(given) or len(given) % 4 == 0):
                return binascii.a2b_base64(bare + "=" * (-len(bare) % 4))
    raise BadRequest(f"{member}: must be Base64" if url_safe else f"{member}: must be standard Base64")


def encode_base64(data: bytes) -> str:
    """Write a binary value: standard alphabet, padded."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


# --- Identifiers ---

MAX_IDENTIFIER_LENGTH: Final = 256
"""Characters (management 3.2)."""


def new_id() -> str:
    """Make an id or version: a random UUID in lower case (management 3.2)."""
    return str(uuid.uuid4())


@dataclass(frozen=True, slots=True, kw_only=True)
class Identifiers:
    """What identifiers look like; the defaults are those of management 3.2."""

    tenant_pattern: re.Pattern[str] = field(default=re.compile(r"[a-zA-Z0-9_.-]+", re.ASCII))
    device_pattern: re.Pattern[str] = field(default=re.compile(r"[a-zA-Z0-9_.:=-]+", re.ASCII))
    auth_id_pattern: re.Pattern[str] = field(default=re.compile(r"[a-zA-Z0-9_=.-]+", re.ASCII))
    """Of credentials of type hashed-password; other types take any text."""

    def check_tenant_id(self, text: str) -> str:
        """Return the id.

        Raises:
            BadRequest: Against the pattern or longer than 256 characters.
        """
        return _check_identifier(text, self.tenant_pattern, "tenant-id")

    def check_device_id(self, text: str) -> str:
        """Return the id.

        Raises:
            BadRequest: Against the pattern or longer than 256 characters.
        """
        return _check_identifier(text, self.device_pattern, "device-id")

    def check_auth_id(self, text: str, member: str = "auth-id") -> str:
        """Return the auth-id of a hashed-password.

        Raises:
            BadRequest: Against the pattern or longer than 256 characters.
        """
        return _check_identifier(text, self.auth_id_pattern, member)


def _check_identifier(text: str, pattern: re.Pattern[str], member: str) -> str:
    if not 1 <= len(text) <= MAX_IDENTIFIER_LENGTH:
        raise BadRequest(f"{member}: must have 1 to {MAX_IDENTIFIER_LENGTH} characters")
    if not pattern.fullmatch(text):
        raise BadRequest(f"{member}: must match {pattern.pattern}")
    return text


# --- Members ---

INT32_MAX: Final = 2**31 - 1
INT64_MAX: Final = 2**63 - 1

_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,40}", re.ASCII)
_MAX_SHOWN: Final = 64

T = TypeVar("T")
Constant = TypeVar("Constant", bound=StrEnum)


class Members:
    """Reads the members of one JSON object by the rules of management 3.6.

    Each method reads one member and returns `None` where it is left out or `null`. `finish` rejects what nobody has
    asked for; `rest` returns it instead.

    Args:
        value: What should be an object.
        path: How errors name it, like `trusted-ca[0]`; empty for the whole body.

    Raises:
        BadRequest: It is none.
    """

    __slots__ = ("_path", "_read", "_values")

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"{path}: must be an object" if path else "must be a JSON object")
        self._values = cast(JsonObject, value)
        self._path = path
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """How errors name a member."""
        return f"{self._path}.{name}" if self._path else name

    def drop(self, *names: str) -> None:
        """Let members pass unread, whatever their value."""
        self._read.update(names)

    def value(self, name: str) -> object:
        """Read a member of any type."""
        self._read.add(name)
        return self._values.get(name)

    def boolean(self, name: str) -> bool | None:
        """Read a boolean, also as text or as integer."""
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value != 0
        if isinstance(value, str) and value in _BOOLEANS:
            return _BOOLEANS[value]
        raise BadRequest(f"{self.path(name)}: must be true or false")

    def integer(self, name: str, *, minimum: int, maximum: int) -> int | None:
        """Read an integer, also as decimal text; a fraction is cut off."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, str) and _INTEGER.fullmatch(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRequest(f"{self.path(name)}: must be an integer")
        number = int(value)
        if not minimum <= number <= maximum:
            raise BadRequest(f"{self.path(name)}: must be an integer from {minimum} to {maximum}")
        return number

    def string(self, name: str) -> str | None:
        """Read a text; a number or boolean becomes its JSON text."""
        value = self.value(name)
        return None if value is None else _string(value, self.path(name))

    def required_string(self, name: str) -> str:
        """Read a text that must be there and not be empty."""
        text = self.string(name)
        if not text:
            raise BadRequest(f"{self.path(name)}: must be given and not be empty")
        return text

    def constant(self, name: str, kind: type[Constant]) -> Constant | None:
        """Read a constant of a closed set, in any case."""
        value = self.value(name)
        return None if value is None else _constant(value, kind, self.path(name))

    def constants(self, name: str, kind: type[Constant]) -> dict[str, Constant]:
        """Read an object whose values are constants of a closed set."""
        inner = self.path(name)
        return {key: _constant(value, kind, f"{inner}.{_shown(key)}") for key, value in self.object(name).items()}

    def strings(self, name: str, *, or_single: bool = False) -> tuple[str, ...]:
        """Read an array of texts; empty where it is left out.

        Args:
            name: The member.
            or_single: Take one text in place of an array.
        """
        value = self.value(name)
        if value is None:
            return ()
        if or_single and isinstance(value, str | int | float):
            value = [value]
        if not isinstance(value, list):
            raise BadRequest(f"{self.path(name)}: must be an array of strings")
        return tuple(_string(one, f"{self.path(name)}[{index}]") for index, one in enumerate(value))

    def string_map(self, name: str) -> dict[str, str]:
        """Read an object whose values are texts."""
        inner = self.path(name)
        return {key: _string(value, f"{inner}.{_shown(key)}") for key, value in self.object(name).items()}

    def object(self, name: str) -> JsonObject:
        """Read a free-form object; empty where it is left out."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise BadRequest(f"{self.path(name)}: must be an object")
        return cast(JsonObject, value)

    def members(self, name: str) -> "Members | None":
        """Read an object with members of its own."""
        value = self.value(name)
        return None if value is None else Members(value, self.path(name))

    def elements(self, name: str) -> "list[Members] | None":
        """Read an array of objects with members of their own."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise BadRequest(f"{self.path(name)}: must be an array of objects")
        return [Members(one, f"{self.path(name)}[{index}]") for index, one in enumerate(value)]

    def instant(self, name: str) -> datetime | None:
        """Read an instant, fractions of the second included."""
        value = self.value(name)
        return None if value is None else parse_timestamp(value, self.path(name))

    def timestamp(self, name: str) -> datetime | None:
        """Read an instant, cut off to the whole second that will be written."""
        instant = self.instant(name)
        return None if instant is None else instant.replace(microsecond=0)

    def base64(self, name: str) -> bytes | None:
        """Read a binary value."""
        value = self.value(name)
        return None if value is None else decode_base64(value, self.path(name))

    def checked(self, name: str, check: Callable[[str], T]) -> T | None:
        """Read a text that something else parses; its `BadRequest` gets the member's name."""
        text = self.string(name)
        if text is None:
            return None
        try:
            return check(text)
        except BadRequest as error:
            raise BadRequest(f"{self.path(name)}: {error}") from None

    def rest(self) -> JsonObject:
        """Read all members that nobody has asked for."""
        rest = {name: value for name, value in self._values.items() if name not in self._read}
        self._read.update(rest)
        return rest

    def finish(self) -> None:
        """Reject the object if it has members that nobody has asked for."""
        for name in self._values:
            if name not in self._read:
                raise BadRequest(f"{self.path(_shown(name))}: unknown member")


def _shown(name: str) -> str:
    return name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…"


def _string(value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return encode(value).decode()
    raise BadRequest(f"{path}: must be a string")


def _constant(value: object, kind: type[Constant], path: str) -> Constant:
    if isinstance(value, str):
        for constant in kind:
            if constant.value == value.lower():
                return constant
    raise BadRequest(f"{path}: must be one of {', '.join(kind)}")
