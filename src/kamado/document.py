"""JSON as the management API and the stored documents use it: text, member rules, timestamps, Base64, identifiers.

A `Members` reads one JSON object by the rules of management 3.6 and knows the path of each member, so that every error
names the member and the rule. What a tenant or a credential is, is not known here.
"""

import base64
import binascii
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, TypeVar

import msgspec

from kamado.errors import BadRequest

__all__ = [
    "MAX_DEPTH",
    "MAX_ID_LENGTH",
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
    "parse_word",
]

JsonObject = dict[str, object]
E = TypeVar("E", bound=StrEnum)

MAX_DEPTH: Final = 64
"""Levels of arrays and objects in one JSON text; no document of people or machines comes near it."""

MAX_ID_LENGTH: Final = 256
"""Characters of a tenant or device id (management 3.2)."""


# JSON text

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def decode(data: bytes) -> object:
    """Read a JSON text (management 3.5): UTF-8 without BOM, one value, no `NaN`; of equal names the last counts.

    Raises:
        BadRequest: It is none, a number is beyond what can be represented, or it is nested deeper than `MAX_DEPTH`.
    """
    try:
        value: object = _decode(data)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise BadRequest("not valid JSON: not UTF-8") from None
    except RecursionError:
        raise BadRequest(f"not valid JSON: nested deeper than {MAX_DEPTH} levels") from None
    # Counting brackets is cheap, and a text with few of them cannot be deep.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise BadRequest(f"not valid JSON: nested deeper than {MAX_DEPTH} levels")
    return value


def encode(value: object) -> bytes:
    """Write a JSON text: compact, UTF-8."""
    return _encode(value)


def _is_deeper(value: object, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        layer = [child for one in layer for child in _children(one)]
        if not layer:
            return False
    return True


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


# Timestamps

_TIMESTAMP: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?"
    r"(?:([Zz])|([+-])(\d\d)(?::?(\d\d)(?::(\d\d))?)?)",
    re.ASCII,
)


def parse_timestamp(text: object, member: str) -> datetime:
    """Read an instant (management 3.12): ISO 8601 date and time with an offset.

    Returns:
        In UTC; digits beyond microseconds are cut off.

    Raises:
        BadRequest: Another form, or no such date, time or offset.
    """
    matched = _TIMESTAMP.fullmatch(text) if isinstance(text, str) else None
    if matched is None:
        raise BadRequest(f"{member}: must be a timestamp such as 2024-05-01T08:00:00Z, with an offset")
    year, month, day, hour, minute, second = (int(group or 0) for group in matched.groups()[:6])
    microsecond = int((matched[7] or "")[:6].ljust(6, "0"))
    offset = timedelta()
    if matched[9]:
        hours, minutes, seconds = (int(matched[group] or 0) for group in (10, 11, 12))
        # ISO 8601 as Java reads it: up to 18 hours.
        if minutes > 59 or seconds > 59 or (hours, minutes, seconds) > (18, 0, 0):
            raise BadRequest(f"{member}: no such offset from UTC")
        offset = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    try:
        instant = datetime(year, month, day, hour, minute, second, microsecond, tzinfo=UTC)
        return instant + offset if matched[9] == "-" else instant - offset
    except (ValueError, OverflowError):
        raise BadRequest(f"{member}: no such date or time") from None


def format_timestamp(instant: datetime) -> str:
    """Write an instant as the registry always does: UTC, whole seconds (cut off, not rounded), `Z`."""
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


# Base64

_URL_SAFE: Final = str.maketrans("-_", "+/")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)


def decode_base64(text: object, member: str, *, url_safe: bool = False) -> bytes:
    """Read Base64 (management 3.13): the standard alphabet, with or without padding, nothing else.

    Args:
        text: The JSON value.
        member: Its path, for errors.
        url_safe: Take the URL-safe alphabet, too (amqp-apis 11.4).

    Raises:
        BadRequest: No string, or not Base64.
    """
    if not isinstance(text, str):
        raise BadRequest(f"{member}: must be a string (Base64)")
    if url_safe:
        text = text.translate(_URL_SAFE)
    content = text.rstrip("=")
    padding = len(text) - len(content)
    if not _BASE64.fullmatch(text) or (padding and len(text) % 4):
        raise BadRequest(f"{member}: must be Base64 (standard alphabet)")
    try:
        return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)
    except binascii.Error:
        raise BadRequest(f"{member}: must be Base64 (standard alphabet)") from None


def encode_base64(data: bytes) -> str:
    """Write Base64: standard alphabet, with padding."""
    return base64.b64encode(data).decode("ascii")


# Identifiers


def new_id() -> str:
    """Make a random id or version: a UUID, lower case, with hyphens (management 3.2)."""
    return str(uuid.uuid4())


@dataclass(frozen=True, slots=True, kw_only=True)
class Identifiers:
    """The patterns that identifiers must match as a whole (management 3.2)."""

    tenant_pattern: re.Pattern[str] = re.compile(r"[a-zA-Z0-9_.-]+", re.ASCII)
    device_pattern: re.Pattern[str] = re.compile(r"[a-zA-Z0-9_.:=-]+", re.ASCII)
    auth_id_pattern: re.Pattern[str] = re.compile(r"[a-zA-Z0-9_=.-]+", re.ASCII)
    """For auth-ids of type hashed-password."""

    def check_tenant_id(self, text: str) -> str:
        """Return the id if it is one.

        Raises:
            BadRequest: It is empty, too long, or does not match the pattern.
        """
        return _check_id(text, self.tenant_pattern, "tenant-id")

    def check_device_id(self, text: str) -> str:
        """Return the id if it is one.

        Raises:
            BadRequest: It is empty, too long, or does not match the pattern.
        """
        return _check_id(text, self.device_pattern, "device-id")

    def check_auth_id(self, text: str, member: str = "auth-id") -> str:
        """Return the auth-id of a password if it is one.

        Raises:
            BadRequest: It is empty or does not match the pattern.
        """
        if not text or not self.auth_id_pattern.fullmatch(text):
            raise BadRequest(f"{member}: must match {self.auth_id_pattern.pattern}")
        return text


def _check_id(text: str, pattern: re.Pattern[str], member: str) -> str:
    if not 1 <= len(text) <= MAX_ID_LENGTH:
        raise BadRequest(f"{member}: must have 1 to {MAX_ID_LENGTH} characters")
    if not pattern.fullmatch(text):
        raise BadRequest(f"{member}: must match {pattern.pattern}")
    return text


# Members

_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"[+-]?\d{1,20}", re.ASCII)


class Members:
    """One JSON object of a request, read member by member by the rules of management 3.6.

    A member that is `null` counts as left out, unless it is required. Scalars of another type are converted where Hono
    does. What nobody asked for is an error when `finish` is called.

    Args:
        value: The JSON value, which must be an object.
        path: Where it stands in the request, for errors; empty for the body itself.
        kind: What it is, for errors about the body itself.

    Raises:
        BadRequest: It is no object.
    """

    __slots__ = ("_path", "_rest")

    def __init__(self, value: object, path: str = "", kind: str = "body") -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"{path or kind}: must be a JSON object")
        self._path = path
        self._rest: JsonObject = value.copy()

    def path(self, name: str) -> str:
        """Return the path of a member, for errors."""
        return f"{self._path}.{name}" if self._path else name

    def drop(self, *names: str) -> None:
        """Take members away, whatever they are (management 3.6: legacy identifiers)."""
        for name in names:
            self._rest.pop(name, None)

    def has(self, name: str) -> bool:
        """Tell whether a member is there, not yet taken, and not `null`."""
        return self._rest.get(name) is not None

    def take(self, name: str) -> object:
        """Take a member as it is; `None` if it is absent or `null`."""
        return self._rest.pop(name, None)

    def require(self, name: str) -> object:
        """Take a member as it is.

        Raises:
            BadRequest: It is absent or `null`.
        """
        value = self._rest.pop(name, None)
        if value is None:
            raise BadRequest(f"{self.path(name)}: is required")
        return value

    def boolean(self, name: str) -> bool | None:
        """Take a boolean: also `"true"`, `"False"` ... and whole numbers (0 is false)."""
        value = self._rest.pop(name, None)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value != 0
        if isinstance(value, str) and value in _BOOLEANS:
            return _BOOLEANS[value]
        raise BadRequest(f"{self.path(name)}: must be a boolean")

    def integer(self, name: str, *, minimum: int, bits: int = 32) -> int | None:
        """Take an integer: also a decimal string, or a number with a fraction, which is cut off.

        Args:
            name: The member.
            minimum: The least allowed value.
            bits: Size of the signed integer that adapters read it into.
        """
        value = self._rest.pop(name, None)
        if value is None:
            return None
        if isinstance(value, float) or (isinstance(value, str) and _INTEGER.fullmatch(value)):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRequest(f"{self.path(name)}: must be an integer")
        limit = 1 << (bits - 1)
        if not -limit <= value < limit:
            raise BadRequest(f"{self.path(name)}: must fit into {bits} bits")
        if value < minimum:
            raise BadRequest(f"{self.path(name)}: must not be less than {minimum}")
        return value

    def string(self, name: str) -> str | None:
        """Take a string: also a number or boolean, as its JSON text."""
        value = self._rest.pop(name, None)
        return None if value is None else _string(value, self.path(name))

    def required_string(self, name: str) -> str:
        """Take a string that must be there and not be empty."""
        text = _string(self.require(name), self.path(name))
        if not text:
            raise BadRequest(f"{self.path(name)}: must not be empty")
        return text

    def strings(self, name: str, *, single: bool = False) -> tuple[str, ...]:
        """Take an array of strings; empty if absent.

        Args:
            name: The member.
            single: Take one string for an array of one (management 3.6).
        """
        value = self._rest.pop(name, None)
        if value is None:
            return ()
        if single and isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            raise BadRequest(f"{self.path(name)}: must be an array of strings")
        return tuple(_string(one, f"{self.path(name)}[{index}]") for index, one in enumerate(value))

    def enumeration(self, name: str, kind: type[E]) -> E | None:
        """Take one of a closed set of words, in any case."""
        value = self._rest.pop(name, None)
        return None if value is None else parse_word(value, kind, self.path(name))

    def free(self, name: str) -> JsonObject:
        """Take a free-form object, kept as it is; empty if absent."""
        value = self._rest.pop(name, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise BadRequest(f"{self.path(name)}: must be a JSON object")
        return value

    def nested(self, name: str) -> "Members | None":
        """Take an object whose members have rules."""
        value = self._rest.pop(name, None)
        return None if value is None else Members(value, self.path(name))

    def array(self, name: str) -> list[object] | None:
        """Take an array as it is."""
        value = self._rest.pop(name, None)
        if value is not None and not isinstance(value, list):
            raise BadRequest(f"{self.path(name)}: must be an array")
        return value

    def objects(self, name: str) -> "list[Members] | None":
        """Take an array of objects whose members have rules."""
        value = self.array(name)
        if value is None:
            return None
        return [Members(one, f"{self.path(name)}[{index}]") for index, one in enumerate(value)]

    def timestamp(self, name: str) -> datetime | None:
        """Take an instant; the registry keeps whole seconds (management 3.12)."""
        value = self._rest.pop(name, None)
        return None if value is None else parse_timestamp(value, self.path(name)).replace(microsecond=0)

    def base64(self, name: str) -> bytes | None:
        """Take binary data."""
        value = self._rest.pop(name, None)
        return None if value is None else decode_base64(value, self.path(name))

    def names(self) -> tuple[str, ...]:
        """Return the names of what is left."""
        return tuple(self._rest)

    def rest(self) -> JsonObject:
        """Take all that is left, as it is."""
        rest, self._rest = self._rest, {}
        return rest

    def finish(self) -> None:
        """Make sure that nothing is left.

        Raises:
            BadRequest: There is a member that the object does not have.
        """
        for name in self._rest:
            raise BadRequest(f"{self.path(name)}: unknown member")


def parse_word(value: object, kind: type[E], member: str) -> E:
    """Read one of a closed set of words, in any case.

    Raises:
        BadRequest: It is none of them.
    """
    if isinstance(value, str):
        for word in kind:
            if word.value == value.lower():
                return word
    raise BadRequest(f"{member}: must be one of {', '.join(kind)}")


def _string(value: object, member: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return _encode(value).decode("ascii")
    raise BadRequest(f"{member}: must be a string")
