"""Resources as documents: their options and files, and making, reading, replacing and changing one."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from kamado.document import JsonObject, decode, encode_base64
from kamado.edits import parse_assignment, parse_member, set_member, unset_member
from kamado.errors import BadRequest
from kamado.operate.connection import Connect, registry
from kamado.terminal import WRONG_DATA, fail, json_text, print_json, print_lines, say, with_options

if TYPE_CHECKING:
    from kamado.http.client import Answer, RegistryClient

__all__ = [
    "CHANGE_ATTEMPTS",
    "DeviceArgument",
    "Edit",
    "EditOf",
    "FileOption",
    "IfMatchOption",
    "JsonOption",
    "LinesOption",
    "NewIdArgument",
    "QuietOption",
    "TenantArgument",
    "YesOption",
    "change_resource",
    "check_id",
    "check_optional_id",
    "create_resource",
    "get_resource",
    "print_line",
    "print_object",
    "read_certificate",
    "read_json",
    "set_resource",
    "with_device_edit",
    "with_tenant_edit",
]

CHANGE_ATTEMPTS: Final = 8
"""Times that a change is tried while others change the same resource."""

FileOption = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="JSON, as `get` prints it; - is standard input."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="MEMBER=VALUE",
        help="Set a member, such as ext.brand=ACME or /ext/brand=ACME; a VALUE that is JSON is that. Repeatable.",
    ),
]
UnsetOption = Annotated[
    list[str] | None, typer.Option("--unset", metavar="MEMBER", help="Leave a member out. Repeatable.")
]
EnabledOption = Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether adapters let it in.")]
IfMatchOption = Annotated[
    str | None, typer.Option("--if-match", metavar="VERSION", help="Only if this is the version, as `get` prints it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on one line, for scripts.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print no more than ids.")]
LinesOption = Annotated[bool, typer.Option("--json", help="Print a JSON object on each line (JSON Lines).")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

AliasOption = Annotated[str | None, typer.Option("--alias", metavar="NAME", help="Another name for adapters to use.")]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="TYPE", help="The adapters that may be used, such as hono-mqtt. Repeatable."),
]
TrustedCaOption = Annotated[
    list[Path] | None,
    typer.Option("--trusted-ca", metavar="FILE", help="The certificates of trusted CAs (PEM or DER). Repeatable."),
]
ViaOption = Annotated[
    list[str] | None,
    typer.Option("--via", metavar="GATEWAY", help="The gateways that may act for the device. Repeatable."),
]
ViaGroupOption = Annotated[
    list[str] | None,
    typer.Option("--via-group", metavar="GROUP", help="The groups of gateways that may act for it. Repeatable."),
]
MemberOfOption = Annotated[
    list[str] | None,
    typer.Option("--member-of", metavar="GROUP", help="The groups of gateways it belongs to. Repeatable."),
]


def check_id(text: str) -> str:
    """Make sure that a variable of a script was not empty."""
    if not text:
        raise typer.BadParameter("the id is empty")
    return text


TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", callback=check_id)]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", callback=check_id)]


def check_optional_id(text: str | None) -> str | None:
    """Do the same for an id that may be left out."""
    return None if text is None else check_id(text)


NewIdArgument = Annotated[
    str | None,
    typer.Argument(metavar="ID", callback=check_optional_id, help="Without one the registry makes one."),
]


def read_json(path: Path) -> object:
    """Read a file, or standard input if it is called `-`; what is no JSON ends the command."""
    try:
        text = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", WRONG_DATA)
    try:
        return decode(text)
    except BadRequest as error:
        fail(f"{path}: {error}", WRONG_DATA)


def read_object(path: Path, own_id: str | None) -> JsonObject:
    """Read a resource as `get` or `list` prints it.

    Args:
        path: The file.
        own_id: What an id in it must be, if it is to be checked.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        fail(f"{path}: must be a JSON object", WRONG_DATA)
    document = cast(JsonObject, value)
    found = document.pop("id", None)
    document.pop("version", None)
    if own_id is not None and found not in {None, own_id}:
        fail(f"{path}: is of {found!r}, not of {own_id!r}", WRONG_DATA)
    return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What the options say about the members of a document."""

    members: JsonObject
    """Of options of their own; those that are not given are `None`."""
    assignments: Sequence[str]
    unset: Sequence[str]

    @property
    def is_empty(self) -> bool:
        """Whether they say nothing."""
        return not self.assignments and not self.unset and all(one is None for one in self.members.values())

    def apply(self, document: JsonObject) -> JsonObject:
        """Return the document with what the options say: the general ones last.

        Raises:
            typer.BadParameter: An option is of another form, or does not fit the document.
        """
        changed = {**document, **{name: value for name, value in self.members.items() if value is not None}}
        try:
            for text in self.assignments:
                changed = set_member(changed, parse_assignment(text))
            for text in self.unset:
                changed = unset_member(changed, parse_member(text))
        except BadRequest as error:
            raise typer.BadParameter(str(error)) from None
        return changed


def _tenant_edit(
    *,
    enabled: EnabledOption = None,
    alias: AliasOption = None,
    adapter: AdapterOption = None,
    trusted_ca: TrustedCaOption = None,
    assignments: SetOption = None,
    unset: UnsetOption = None,
) -> Edit:
    members: JsonObject = {
        "enabled": enabled,
        "alias": alias,
        "adapters": [{"type": one, "enabled": True} for one in adapter] if adapter else None,
        "trusted-ca": [{"cert": read_certificate(path)[0]} for path in trusted_ca] if trusted_ca else None,
    }
    return Edit(members=members, assignments=assignments or (), unset=unset or ())


def _names(option: str, values: list[str] | None) -> list[str] | None:
    if values and "" in values:
        # Of a variable of a script that is not set, most likely.
        raise typer.BadParameter(f"{option} must not be empty")
    return values or None


def _device_edit(
    *,
    enabled: EnabledOption = None,
    via: ViaOption = None,
    via_group: ViaGroupOption = None,
    member_of: MemberOfOption = None,
    assignments: SetOption = None,
    unset: UnsetOption = None,
) -> Edit:
    members: JsonObject = {
        "enabled": enabled,
        "via": _names("--via", via),
        "viaGroups": _names("--via-group", via_group),
        "memberOf": _names("--member-of", member_of),
    }
    return Edit(members=members, assignments=assignments or (), unset=unset or ())


EditOf = Callable[[], Edit]
with_tenant_edit = with_options(_tenant_edit, "edit_of")
with_device_edit = with_options(_device_edit, "edit_of")


def read_certificate(path: Path) -> tuple[str, str]:
    """Return a certificate as Base64, and its subject."""
    from kamado.x509 import parse_certificate

    try:
        parsed = parse_certificate(path.read_bytes())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", WRONG_DATA)
    except BadRequest as error:
        fail(f"{path} is no X.509 certificate: {error}", WRONG_DATA)
    return encode_base64(parsed.der), parsed.subject.text


def create_resource(connect: Connect, path: tuple[str, ...], file: Path | None, edit: Edit, *, as_json: bool) -> None:
    """Create a resource from a file and options, and print its id."""
    document = edit.apply({} if file is None else read_object(file, None))
    with registry(connect) as client:
        answer = client.write("POST", *path, document=document)
        identifier = cast(str, answer.object.get("id"))
    if as_json:
        print_line({"id": identifier, "version": answer.version})
    else:
        print_lines([identifier])


def get_resource(connect: Connect, path: tuple[str, ...], *, as_json: bool) -> None:
    """Print a resource with its id and version."""
    with registry(connect) as client:
        answer = client.get(*path)
        value = {"id": path[-1], "version": answer.version, **answer.object}
    print_object(value, as_json=as_json)


def set_resource(
    connect: Connect, path: tuple[str, ...], file: Path | None, edit: Edit, if_match: str | None, *, as_json: bool
) -> None:
    """Replace a resource by a file, or change what options name."""
    if (file is None) == edit.is_empty:
        raise typer.BadParameter("say either with --file what it shall be, or with other options what shall change")
    document = None if file is None else read_object(file, path[-1])
    kind = "Tenant" if path[0] == "tenants" else "Device"
    with registry(connect) as client:
        if document is not None:
            version = client.write("PUT", *path, document=document, if_match=if_match).version
        else:
            version = change_resource(client, path, lambda answer: edit.apply(answer.object), if_match)
    if as_json:
        print_line({"id": path[-1], "version": version})
    else:
        say(f"{kind} {path[-1]} was changed.")


def change_resource(
    client: "RegistryClient", path: tuple[str, ...], change: Callable[["Answer"], object], if_match: str | None
) -> str | None:
    """Read, change and write a resource, again if somebody else has written it meanwhile.

    Returns:
        The new version.
    """
    from kamado.http.client import ErrorAnswer

    for attempt in range(CHANGE_ATTEMPTS):
        answer = client.get(*path)
        document = change(answer)
        try:
            return client.write("PUT", *path, document=document, if_match=if_match or answer.version).version
        except ErrorAnswer as error:
            if error.status != 412 or if_match is not None or attempt == CHANGE_ATTEMPTS - 1:
                raise
    raise AssertionError


def print_line(value: object) -> None:
    """Print JSON on one line."""
    print_lines([json_text(value)])


def print_object(value: object, *, as_json: bool) -> None:
    """Print a resource, for scripts or for people."""
    if as_json:
        print_line(value)
    else:
        print_json(value)
