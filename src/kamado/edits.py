"""What options of the operator's commands make of a document: members set and left out, filters, credentials.

Pure. Knows the form of a document only as far as an option names a part of it; the rules are the registry's.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final, TypeGuard, cast

from kamado.document import JsonObject, decode, encode
from kamado.errors import BadRequest, Conflict, NotFound

__all__ = [
    "Assignment",
    "Member",
    "add_credential",
    "find_member",
    "parse_assignment",
    "parse_filter",
    "parse_member",
    "parse_sort",
    "remove_credential",
    "set_credential",
    "set_member",
    "show_value",
    "unset_member",
]

Member = tuple[str, ...]
"""The way to a member through the objects and arrays around it."""

_STRUCTURED: Final = ("{", "[", '"')


@dataclass(frozen=True, slots=True)
class Assignment:
    """A member and what it gets."""

    member: Member
    value: object


def parse_member(text: str) -> Member:
    """Read the name of a member: `ext.brand`, or a JSON pointer (RFC 6901), `/ext/brand`, for names with dots.

    Raises:
        BadRequest: A part of it is empty, or an escape is none.
    """
    if text.startswith("/"):
        parts = text[1:].split("/")
        if any("~" in part.replace("~0", "").replace("~1", "") for part in parts):
            raise BadRequest(f"{text}: in a JSON pointer ~ is written ~0")
        parts = [part.replace("~1", "/").replace("~0", "~") for part in parts]
    else:
        parts = text.split(".")
    if "" in parts:
        raise BadRequest(f"{text!r}: a member is named like ext.brand or /ext/brand")
    return tuple(parts)


def _pointer(member: Member) -> str:
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in member)


def parse_assignment(text: str) -> Assignment:
    """Read MEMBER=VALUE; a value that is JSON is that, any other is text.

    Raises:
        BadRequest: Of another form, or a value that begins like JSON and is none.
    """
    name, sign, value = text.partition("=")
    if not sign:
        raise BadRequest(f"{text!r} has not the form MEMBER=VALUE")
    return Assignment(parse_member(name), _value(name, value))


def _value(name: str, text: str) -> object:
    data = _bytes(name, text)
    try:
        return decode(data)
    except BadRequest as error:
        # `{{subject-cn}}` is how ID templates begin (provisioning 3.4), and nothing that JSON can.
        if text.lstrip().startswith(_STRUCTURED) and not text.lstrip().startswith("{{"):
            raise BadRequest(f"{name}: the value is {error}") from None
        return text


def parse_filter(text: str) -> JsonObject:
    """Read FIELD=VALUE into a filter (management 7.2): true, false and numbers are those, all else is text.

    Text that looks like one of them is written in quotes.

    Raises:
        BadRequest: Of another form.
    """
    name, sign, value = text.partition("=")
    if not sign:
        raise BadRequest(f"{text!r} has not the form FIELD=VALUE")
    return {"field": _pointer(parse_member(name)), "value": _scalar(_bytes(name, value), value)}


def _bytes(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name}: the value is not UTF-8") from None


def _scalar(data: bytes, text: str) -> object:
    try:
        value = decode(data)
    except BadRequest:
        return text
    return value if isinstance(value, str | int | float) else text


def parse_sort(text: str) -> JsonObject:
    """Read FIELD, FIELD:asc or FIELD:desc into a sort key (management 7.3).

    Raises:
        BadRequest: The field has no name, or the direction is none.
    """
    name, sign, direction = text.rpartition(":")
    if not sign or (text.startswith("/") and direction not in {"asc", "desc"}):
        name, direction = text, "asc"
    elif direction not in {"asc", "desc"}:
        raise BadRequest(f"{text}: the direction is asc or desc; a name with a colon is written as a pointer, /ext/a:b")
    return {"field": _pointer(parse_member(name)), "direction": direction}


# Members


def find_member(document: object, member: Member) -> object:
    """Return the value of a member, `None` if there is none.

    In an array that is not asked for by index, it is what the elements have, as in a search (management 7.2).
    """
    for index, part in enumerate(member):
        if isinstance(document, dict):
            document = document.get(part)
        elif isinstance(document, list) and part.isdecimal():
            document = document[int(part)] if int(part) < len(document) else None
        elif isinstance(document, list):
            values = [find_member(one, member[index:]) for one in document]
            return [value for value in values if value is not None]
        else:
            return None
    return document


def set_member(document: JsonObject, assignment: Assignment) -> JsonObject:
    """Return the document with a member set; objects on the way to it are made.

    Raises:
        BadRequest: Something on the way is neither an object nor an element that is there.
    """
    changed = deepcopy(document)
    *way, last = assignment.member
    inner: object = changed
    for part in way:
        if isinstance(inner, dict):
            inner = inner.setdefault(part, {})
        else:
            inner = _elements(inner, part, assignment.member)[int(part)]
    if isinstance(inner, dict):
        inner[last] = assignment.value
    else:
        _elements(inner, last, assignment.member)[int(last)] = assignment.value
    return changed


def unset_member(document: JsonObject, member: Member) -> JsonObject:
    """Return the document without a member; one that is not there is nothing to complain about."""
    changed = deepcopy(document)
    *way, last = member
    inner: object = changed
    for part in way:
        if isinstance(inner, dict):
            inner = inner.get(part)
        else:
            inner = inner[int(part)] if _has_element(inner, part) else None
    if isinstance(inner, dict):
        inner.pop(last, None)
    elif _has_element(inner, last):
        del inner[int(last)]
    return changed


def _has_element(value: object, part: str) -> TypeGuard[list[object]]:
    return isinstance(value, list) and part.isdecimal() and int(part) < len(value)


def _elements(value: object, part: str, member: Member) -> list[object]:
    if _has_element(value, part):
        return value
    kind = f"has no element {part}" if isinstance(value, list) else "is no object"
    raise BadRequest(f"{'.'.join(member)}: what holds {part!r} {kind}")


# Credentials (management 6)

Credentials = Sequence[JsonObject]


def _is_same(one: JsonObject, other: JsonObject) -> bool:
    return one.get("type") == other.get("type") and one.get("auth-id") == other.get("auth-id")


def _name(credential: JsonObject) -> str:
    return f"{credential.get('type')} credentials of {credential.get('auth-id')}"


def set_credential(credentials: Credentials, credential: JsonObject) -> list[JsonObject]:
    """Return the credentials with the secrets of one of them replaced, or with a new one at the end.

    What else is known of it (`enabled`, `ext`, `comment`) stays, and so do all others.
    """
    if not any(_is_same(one, credential) for one in credentials):
        return [*credentials, credential]
    return [_merged(one, credential) if _is_same(one, credential) else one for one in credentials]


def _merged(old: JsonObject, new: JsonObject) -> JsonObject:
    return {**{key: value for key, value in old.items() if key != "secrets"}, **new}


def add_credential(credentials: Credentials, credential: JsonObject) -> list[JsonObject]:
    """Return the credentials with one more, or with one more secret for one that is there.

    Raises:
        Conflict: A certificate's credentials are there already, and they have one secret only (management 6.5).
    """
    for index, one in enumerate(credentials):
        if _is_same(one, credential):
            if one.get("type") == "x509-cert":
                raise Conflict(f"the device has {_name(one)} already")
            secrets = [*_secrets(one), *_secrets(credential)]
            return [*credentials[:index], {**one, "secrets": secrets}, *credentials[index + 1 :]]
    return [*credentials, credential]


def _secrets(credential: JsonObject) -> list[JsonObject]:
    value = credential.get("secrets")
    return cast(list[JsonObject], value) if isinstance(value, list) else []


def remove_credential(
    credentials: Credentials, type_: str, auth_id: str, secret_id: str | None = None
) -> list[JsonObject]:
    """Return the credentials without one of them, or without one of its secrets.

    Raises:
        NotFound: There is none such.
        Conflict: It is its only secret, and credentials without one cannot be.
    """
    wanted: JsonObject = {"type": type_, "auth-id": auth_id}
    for index, one in enumerate(credentials):
        if _is_same(one, wanted):
            others = [*credentials[:index], *credentials[index + 1 :]]
            if secret_id is None:
                return others
            rest = [secret for secret in _secrets(one) if secret.get("id") != secret_id]
            if len(rest) == len(_secrets(one)):
                raise NotFound(f"the {_name(wanted)} have no secret {secret_id}")
            if not rest:
                raise Conflict(f"it is the only secret of the {_name(wanted)}; remove them as a whole")
            return [*credentials[:index], {**one, "secrets": rest}, *credentials[index + 1 :]]
    raise NotFound(f"the device has no {_name(wanted)}")


def show_value(value: object) -> str:
    """Write a value as it is shown in a table: text as it is, anything else as JSON, nothing as a dash."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else encode(value).decode()
