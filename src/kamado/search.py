"""Searching tenants and devices: what a query may say, what it matches, in which order (management 7). Pure.

Three things live here because they must agree: how parameters become a `Query`; the rules of 7.2 and 7.3, told once in
Python (`matches`, `order_key`); and what of a document goes into the index that storage answers most filters from
(`index_entries`), with the keys that a filter looks for in it (`value_key`, `key_pattern`).

Knows neither SQL nor what a tenant or device is: documents are read representations without `id` and `status`.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

from kamado.document import JsonObject, Members, decode
from kamado.errors import BadRequest

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "MAX_FILTERS",
    "MAX_PAGE_OFFSET",
    "MAX_PAGE_SIZE",
    "MAX_POINTER_LENGTH",
    "MAX_SORTS",
    "Filter",
    "IndexEntry",
    "KeyRange",
    "Pointer",
    "Query",
    "Scalar",
    "Sort",
    "index_entries",
    "is_index",
    "is_match",
    "key_pattern",
    "matches",
    "member_key",
    "order_key",
    "parse_query",
    "split_pattern",
    "text_range",
    "value_key",
]

Scalar = str | int | float | bool
Pointer = tuple[str, ...]
"""The tokens of a JSON pointer (RFC 6901), unescaped."""

DEFAULT_PAGE_SIZE: Final = 30
MAX_PAGE_SIZE: Final = 200
MAX_PAGE_OFFSET: Final = 2**53
MAX_FILTERS: Final = 16
MAX_SORTS: Final = 8
MAX_POINTER_LENGTH: Final = 1024
_MAX_PATTERN_LENGTH: Final = 1024
"""Comparing takes up to pattern times text; a text may have 64 KiB."""

_WILDCARD: Final = re.compile(r"[*?]")
_WHOLE: Final = re.compile(r"[0-9]{1,20}", re.ASCII)
_INDEX: Final = re.compile(r"0|[1-9][0-9]*", re.ASCII)


# Queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One condition (management 7.2)."""

    pointer: Pointer
    value: Scalar

    @property
    def is_pattern(self) -> bool:
        """Whether the value has wildcards: `*` for any characters, `?` for exactly one."""
        return isinstance(self.value, str) and _WILDCARD.search(self.value) is not None

    @property
    def is_selective(self) -> bool:
        """Whether an index may find what matches, without a look at everything else."""
        has_prefix = not isinstance(self.value, str) or not self.value.startswith(("*", "?"))
        return has_prefix and self.pointer[:1] != ("status",)

    @property
    def has_index(self) -> bool:
        """Whether a token may be an array index (or a member named like one)."""
        return any(map(is_index, self.pointer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sort:
    """One sort key (management 7.3)."""

    pointer: Pointer
    descending: bool = False

    @property
    def has_index(self) -> bool:
        """As of a filter."""
        return any(map(is_index, self.pointer))


class _Operator(StrEnum):
    EQUAL = "eq"


class _Direction(StrEnum):
    ASCENDING = "asc"
    DESCENDING = "desc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What to search for, and which page of it."""

    filters: tuple[Filter, ...] = ()
    sorts: tuple[Sort, ...] = ()
    """The first is the primary key; ties are in the order of ids."""
    is_gateway: bool | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    page_offset: int = 0
    """Items to skip."""
    after: str | None = None
    """Only ids greater than this: pages that do not shift when something is created or deleted in between."""

    @property
    def is_heavy(self) -> bool:
        """Whether it looks at everything that there is, or sorts all that matches."""
        is_sorted = any(sort.pointer != ("id",) for sort in self.sorts)
        return is_sorted or (bool(self.filters) and not any(each.is_selective for each in self.filters))


def is_index(token: str) -> bool:
    """Tell whether a token of a pointer can be an array index (RFC 6901, 4)."""
    return _INDEX.fullmatch(token) is not None


def parse_query(parameters: Mapping[str, Sequence[str]], *, for_devices: bool, offset_in_pages: bool = False) -> Query:
    """Read the parameters of a search (management 7.1).

    Args:
        parameters: Name -> values in their order, percent-decoded. Unknown names are ignored, as everywhere in HTTP.
        for_devices: Whether `isGateway` counts.
        offset_in_pages: `pageOffset` is a page's number (Hono 2.7 with MongoDB), not a number of items.

    Raises:
        BadRequest: A value breaks its rule; the text names the parameter.
    """
    size = _whole(parameters, "pageSize", DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    offset = _whole(parameters, "pageOffset", 0, MAX_PAGE_OFFSET)
    filters = tuple(_parse_filter(text) for text in _some(parameters, "filterJson", MAX_FILTERS))
    sorts = tuple(_parse_sort(text) for text in _some(parameters, "sortJson", MAX_SORTS))
    after = _first(parameters, "after")
    if after is not None and (sorts or offset):
        raise BadRequest("after: goes neither with sortJson nor with a pageOffset")
    return Query(
        filters=filters,
        sorts=sorts,
        is_gateway=_parse_is_gateway(_first(parameters, "isGateway")) if for_devices else None,
        page_size=size,
        page_offset=offset * size if offset_in_pages else offset,
        after=after,
    )


def _first(parameters: Mapping[str, Sequence[str]], name: str) -> str | None:
    values = parameters.get(name)
    return values[0] if values else None


def _some(parameters: Mapping[str, Sequence[str]], name: str, maximum: int) -> Sequence[str]:
    values = parameters.get(name, ())
    if len(values) > maximum:
        raise BadRequest(f"{name}: may be given {maximum} times at most")
    return values


def _whole(parameters: Mapping[str, Sequence[str]], name: str, default: int, maximum: int) -> int:
    text = _first(parameters, name)
    if text is None:
        return default
    if not _WHOLE.fullmatch(text) or int(text) > maximum:
        raise BadRequest(f"{name}: must be a whole number from 0 to {maximum}")
    return int(text)


def _parse_is_gateway(text: str | None) -> bool | None:
    # Any other text than "true" is false, as in Hono 2.7.
    return text.lower() == "true" if text else None


def _parse_filter(text: str) -> Filter:
    members = _members(text, "filterJson")
    pointer = _parse_pointer(members.value("field"), "filterJson.field")
    value = members.value("value")
    members.constant("op", _Operator)
    members.finish()
    if not isinstance(value, str | int | float):
        raise BadRequest("filterJson.value: must be given, as a string, a number or a boolean")
    condition = Filter(pointer=pointer, value=value)
    if isinstance(value, str) and condition.is_pattern and len(value) > _MAX_PATTERN_LENGTH:
        raise BadRequest(f"filterJson.value: must not be longer than {_MAX_PATTERN_LENGTH} characters with wildcards")
    return condition


def _parse_sort(text: str) -> Sort:
    members = _members(text, "sortJson")
    pointer = _parse_pointer(members.value("field"), "sortJson.field")
    direction = members.constant("direction", _Direction)
    members.finish()
    return Sort(pointer=pointer, descending=direction is _Direction.DESCENDING)


def _members(text: str, parameter: str) -> Members:
    try:
        document = decode(text.encode())
    except BadRequest as error:
        raise BadRequest(f"{parameter}: {error}") from None
    if not isinstance(document, dict):
        raise BadRequest(f"{parameter}: must be a JSON object")
    return Members(document, parameter)


def _parse_pointer(text: object, parameter: str) -> Pointer:
    """Read a JSON pointer (RFC 6901)."""
    if not isinstance(text, str):
        raise BadRequest(f"{parameter}: must be given, as a string")
    if not text:
        return ()
    if text[0] != "/":
        raise BadRequest(f"{parameter}: must be a JSON pointer, empty or beginning with /")
    if len(text) > MAX_POINTER_LENGTH:
        raise BadRequest(f"{parameter}: must not be longer than {MAX_POINTER_LENGTH} characters")
    if re.search("~(?![01])", text):
        raise BadRequest(f"{parameter}: must be a JSON pointer, in which ~ is written ~0 and / is written ~1")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in text[1:].split("/"))


# The rules, told once


def matches(condition: Filter, document: object) -> bool:
    """Tell whether a document meets a condition (management 7.2)."""
    return any(_is_equal(condition.value, value) for value in _resolve(condition.pointer, document))


def _resolve(pointer: Pointer, value: object) -> Iterator[object]:
    """Find the values a pointer leads to: several where it passes an array without saying which element."""
    if isinstance(value, list) and not (pointer and is_index(pointer[0])):
        for element in value:
            yield from _resolve(pointer, element)
    elif not pointer:
        yield value
    elif isinstance(value, list):
        index = int(pointer[0][:10])
        if index < len(value):
            yield from _resolve(pointer[1:], value[index])
    elif isinstance(value, dict) and pointer[0] in value:
        yield from _resolve(pointer[1:], value[pointer[0]])


def _is_equal(wanted: Scalar, value: object) -> bool:
    if isinstance(wanted, str):
        return isinstance(value, str) and is_match(wanted, value)
    if isinstance(wanted, bool) or isinstance(value, bool):
        return wanted is value
    return isinstance(value, int | float) and wanted == value


def is_match(pattern: str, text: str) -> bool:
    """Compare a whole text with a pattern, in time that grows with their product and no faster.

    Each piece between two `*` is taken where it occurs first; what a later place could do, the first can do, too.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return len(first) == len(text) and _find(first, text, 0) == 0
    *middle, last = rest
    if len(text) < len(first) + len(last) or _find(first, text[: len(first)], 0) != 0:
        return False
    position, end = len(first), len(text) - len(last)
    for piece in middle:
        found = _find(piece, text[:end], position)
        if found < 0:
            return False
        position = found + len(piece)
    return position <= end and _find(last, text[end:], 0) == 0


def _find(piece: str, text: str, start: int) -> int:
    """Return where a piece, in which `?` is any character, occurs first; -1 if nowhere."""
    if "?" not in piece:
        return text.find(piece, start)
    expression = "".join("." if character == "?" else re.escape(character) for character in piece)
    found = re.compile(expression, re.DOTALL).search(text, start)
    return -1 if found is None else found.start()


def order_key(sort: Sort, document: object) -> tuple[int, float | int | str]:
    """Return the place of a document in an order: missing < numbers < strings < objects < arrays < false < true.

    A pointer passes arrays by index only. `null` counts as missing.
    """
    value = document
    for token in sort.pointer:
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and is_index(token) and int(token[:10]) < len(value):
            value = value[int(token[:10])]
        else:
            return 0, 0
    match value:
        case None:
            return 0, 0
        case bool():
            return 5, int(value)
        case int() | float():
            return 1, value
        case str():
            return 2, value
        case dict():
            return 3, 0
        case _:
            return 4, 0


# The index

_MAX_KEY_LENGTH: Final = 260
"""Characters. Identifiers are shorter, so these are never cut."""
_MAX_MEMBER_LENGTH: Final = 200
"""Characters. An index entry of PostgreSQL holds some 2,700 bytes: this, a key, and two identifiers."""


class IndexEntry(NamedTuple):
    """A value in a document: a string, number or boolean, wherever it stands."""

    member: str
    """The pointer without array indexes (`member_key`)."""
    key: str
    """The value (`value_key`)."""
    long_text: str | None
    """The whole key, if it is too long for an index and `key` holds its beginning and a digest."""


def index_entries(document: JsonObject) -> set[IndexEntry]:
    """Return what the index holds of a document.

    Everything but `enabled` being true, which is so nearly everywhere: whoever has no entry for it is enabled.
    """
    entries: set[IndexEntry] = set()
    for name, value in document.items():
        if name != "enabled":
            _add_entries("/" + _escape(name), value, entries)
        elif value is False:
            entries.add(IndexEntry("/enabled", "b0", None))
    return entries


def _add_entries(member: str, value: object, entries: set[IndexEntry]) -> None:
    if isinstance(value, str | int | float):
        key = _key(value)
        short = _shorten(key, _MAX_KEY_LENGTH)
        entries.add(IndexEntry(_shorten(member, _MAX_MEMBER_LENGTH), short, None if short is key else key))
    elif isinstance(value, dict):
        for name, inner in value.items():
            _add_entries(f"{member}/{_escape(name)}", inner, entries)
    elif isinstance(value, list):
        for element in value:
            _add_entries(member, element, entries)


# Devices of one kind have the same members.
@lru_cache(maxsize=4096)
def _escape(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")


def member_key(pointer: Pointer) -> str:
    """Write a pointer as the index has it."""
    return _shorten("".join("/" + _escape(token) for token in pointer), _MAX_MEMBER_LENGTH)


def value_key(value: Scalar) -> str:
    """Write a value as the index has it: equal keys are equal values."""
    return _shorten(_key(value), _MAX_KEY_LENGTH)


def _key(value: Scalar) -> str:
    if isinstance(value, str):
        return "s" + value
    if isinstance(value, bool):
        return "b1" if value else "b0"
    if isinstance(value, float):
        # A whole number has the same key, however it is written.
        return f"n{int(value)}" if value.is_integer() else f"n{value!r}"
    return f"n{value}"


def _shorten(key: str, length: int) -> str:
    if len(key) <= length:
        return key
    return f"{key[:length]}\uffff{hashlib.sha256(key.encode()).hexdigest()}"


class KeyRange(NamedTuple):
    """Texts from `low` on and before `high`; an empty `high` is no bound."""

    low: str
    high: str


def text_range(prefix: str) -> KeyRange:
    """Return the range of all texts that begin like this."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return KeyRange(prefix, "")
    following = ord(stem[-1]) + 1
    return KeyRange(prefix, stem[:-1] + chr(0xE000 if following == 0xD800 else following))


def split_pattern(pattern: str) -> tuple[str, str]:
    """Split a pattern at its first wildcard: what all its matches begin with, and the rest."""
    found = _WILDCARD.search(pattern)
    return (pattern, "") if found is None else (pattern[: found.start()], pattern[found.start() :])


def key_pattern(pattern: str) -> tuple[KeyRange, str]:
    """Return where the keys of a pattern's matches lie, and the pattern for keys (or whole keys that were cut)."""
    prefix, _ = split_pattern(pattern)
    key = "s" + prefix
    return text_range(key[:_MAX_KEY_LENGTH]), "s" + pattern
