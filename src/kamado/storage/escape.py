"""Text for databases whose text cannot hold the character NUL (PostgreSQL).

JSON may have it in any string, so names of members and values have it, too. It is written as two characters, and so are
the next two, which keeps the order of texts and makes no two of them equal. One of these then never comes about, and
separates the elements of an array. Text of JSON documents is not concerned: there such characters are escaped anyway.
"""

import re
from collections.abc import Sequence
from typing import Final

__all__ = ["SEPARATOR", "Joined", "escape", "join", "unescape"]

_SPECIAL: Final = re.compile("[\0-\x02]")
_ESCAPED: Final = re.compile("\x01([\x03-\x05])")

SEPARATOR: Final = "\x02"


def escape(text: str) -> str:
    """Return the text as it is stored."""
    if "\0" in text or "\x01" in text or "\x02" in text:
        return _SPECIAL.sub(lambda found: f"\x01{chr(ord(found[0]) + 3)}", text)
    return text


def unescape(text: str) -> str:
    """Return the text that was stored as this one."""
    if "\x01" in text:
        return _ESCAPED.sub(lambda found: chr(ord(found[1]) - 3), text)
    return text


class Joined(str):
    """Several texts in one, escaped already."""

    __slots__ = ()


def join(texts: Sequence[str]) -> Joined:
    """Return texts, none of them empty, as one, from which `string_to_array(..., E'\\x02')` makes them again."""
    return Joined(SEPARATOR.join(map(escape, texts)))
