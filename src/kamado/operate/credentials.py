"""The command `kamado credentials`: a device's list of credentials as a whole, or one of them."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from kamado.document import JsonObject, encode_base64
from kamado.edits import add_credential, remove_credential, set_credential, show_value
from kamado.operate.connection import Connect, registry, with_connection
from kamado.operate.documents import (
    DeviceArgument,
    IfMatchOption,
    JsonOption,
    LinesOption,
    TenantArgument,
    change_resource,
    check_id,
    print_line,
    print_object,
    read_certificate,
    read_json,
)
from kamado.operate.searches import Form, chosen_form
from kamado.terminal import (
    WRONG_DATA,
    RowPrinter,
    ask_secret,
    fail,
    json_text,
    print_lines,
    printable,
    read_first_line,
    say,
    with_options,
)

if TYPE_CHECKING:
    from kamado.http.client import Answer


__all__ = ["credentials_app"]

_SECRETS = "Secrets are read from files or asked for, never taken from the command line: that is visible to others."

credentials_app = typer.Typer(
    no_args_is_help=True,
    help="Manage the credentials of a device over the management API. "
    "They belong to one device each and are listed by it: there is no search for them. " + _SECRETS,
)

TypeArgument = Annotated[
    str, typer.Argument(metavar="TYPE", help="hashed-password, psk, x509-cert, rpk or your own.", callback=check_id)
]
AuthIdArgument = Annotated[str, typer.Argument(metavar="AUTH_ID", callback=check_id)]
ListFileOption = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="JSON, as `get` prints it; one object is enough. - is standard input."),
]


class KeyFormat(StrEnum):
    """How a pre-shared key is written."""

    BASE64 = "base64"
    HEX = "hex"
    TEXT = "text"


def _credential(
    *,
    password: Annotated[
        str | None,
        typer.Option(
            "--password",
            metavar="AUTH_ID",
            help="A password for this auth-id; it comes from --secret-file or is asked for.",
        ),
    ] = None,
    psk: Annotated[
        str | None,
        typer.Option(
            "--psk", metavar="AUTH_ID", help="A pre-shared key for this identity; from --key-file or asked for."
        ),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option("--cert", metavar="FILE", help="Let in whoever has the subject of this certificate (PEM or DER)."),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option("--secret-file", metavar="FILE", help="The device's password (first line); - is standard input."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="FILE", help="The device's key (first line); - is standard input."),
    ] = None,
    key_format: Annotated[KeyFormat, typer.Option("--key-format", help="How the key is written.")] = KeyFormat.BASE64,
    not_before: Annotated[
        str | None,
        typer.Option("--not-before", metavar="TIME", help="The secret counts from then on: 2031-01-01T00:00:00Z."),
    ] = None,
    not_after: Annotated[
        str | None, typer.Option("--not-after", metavar="TIME", help="The secret counts until then.")
    ] = None,
) -> JsonObject | None:
    """Make credentials of the options; `None` if there are none."""
    if sum(one is not None for one in (password, psk, cert)) > 1:
        raise typer.BadParameter("use only one of --password, --psk and --cert")
    if secret_file is not None and password is None:
        raise typer.BadParameter("--secret-file goes with --password")
    if key_file is not None and psk is None:
        raise typer.BadParameter("--key-file goes with --psk")
    times: JsonObject = {
        name: value for name, value in (("not-before", not_before), ("not-after", not_after)) if value is not None
    }
    if times and password is None and psk is None:
        raise typer.BadParameter("--not-before and --not-after go with --password and --psk")
    if password is not None:
        if secret_file is None:
            secret = ask_secret("--secret-file", what=f"password of {password}", confirm=True)
        else:
            secret = read_first_line(secret_file)
        if not secret:
            fail("the password is empty", WRONG_DATA)
        return {"type": "hashed-password", "auth-id": password, "secrets": [{"pwd-plain": secret, **times}]}
    if psk is not None:
        text = ask_secret("--key-file", what=f"key of {psk}") if key_file is None else read_first_line(key_file)
        return {"type": "psk", "auth-id": psk, "secrets": [{"key": _key(text, key_format), **times}]}
    if cert is not None:
        encoded, subject = read_certificate(cert)
        # The registry makes the auth-id of the certificate; this one says which credentials are meant.
        return {"type": "x509-cert", "auth-id": subject, "cert": encoded}
    return None


def _key(text: str, form: KeyFormat) -> str:
    """Return a key in Base64."""
    key = text.strip() if form is not KeyFormat.TEXT else text
    if not key:
        fail("the key is empty", WRONG_DATA)
    match form:
        case KeyFormat.TEXT:
            return encode_base64(key.encode())
        case KeyFormat.HEX:
            try:
                return encode_base64(bytes.fromhex(key))
            except ValueError:
                fail("the key is not hexadecimal", WRONG_DATA)
        case KeyFormat.BASE64:
            return key


CredentialOf = Callable[[], JsonObject | None]
with_credential = with_options(_credential, "credential_of")


def _read_credentials(path: Path) -> list[JsonObject]:
    """Read credentials as `get` prints them, or one object of them."""
    value = read_json(path)
    if isinstance(value, dict):
        value = value["credentials"] if "credentials" in value and "type" not in value else [value]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        fail(f"{path}: must be an array of credentials, or one object of them", WRONG_DATA)
    return cast(list[JsonObject], value)


def _change_credentials(
    connect: Connect,
    path: tuple[str, ...],
    change: Callable[[list[JsonObject]], list[JsonObject]],
    if_match: str | None,
) -> tuple[str | None, int, int]:
    """Change a device's credentials.

    Returns:
        The new version; how many credentials there were, and how many there are.
    """
    before = after = 0

    def apply(answer: "Answer") -> object:
        nonlocal before, after
        changed = change(answer.array)
        before, after = len(answer.array), len(changed)
        return changed

    with registry(connect) as client:
        version = change_resource(client, path, apply, if_match)
    return version, before, after


def _say_changed(version: str | None, device_id: str, before: int, after: int, *, as_json: bool) -> None:
    """Say what became of a device's credentials: what was kept must be clear."""
    if as_json:
        print_line({"id": device_id, "version": version})
    else:
        say(f"Device {device_id} has {after} credentials now (before: {before}).")


@credentials_app.command("get")
@with_connection
def credentials_get(
    *, tenant_id: TenantArgument, device_id: DeviceArgument, as_json: JsonOption = False, connect: Connect
) -> None:
    """Print the credentials of a device as JSON, with their version; passwords and hashes are never shown."""
    with registry(connect) as client:
        answer = client.get("credentials", tenant_id, device_id)
        value = {"version": answer.version, "credentials": answer.array}
    print_object(value, as_json=as_json)


@credentials_app.command("list")
@with_connection
def credentials_list(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    as_json: LinesOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print types and auth-ids only.")] = False,
    connect: Connect,
) -> None:
    """List the credentials of a device, a row for each secret; the secrets themselves are not shown."""
    form = chosen_form(as_json=as_json, quiet=quiet)
    with registry(connect) as client:
        credentials = client.get("credentials", tenant_id, device_id).array
    if form is Form.LINES:
        print_lines([json_text(one) for one in credentials])
    elif form is Form.IDS:
        print_lines(
            [f"{show_value(one.get('type'))} {printable(show_value(one.get('auth-id')))}" for one in credentials]
        )
    elif credentials:
        table = RowPrinter(("type", "auth-id", "enabled", "secret", "not before", "not after"))
        table.print([row for one in credentials for row in _credential_rows(one)])


def _credential_rows(credential: JsonObject) -> Iterator[tuple[str, ...]]:
    secrets = credential.get("secrets")
    for secret in cast(list[JsonObject], secrets) if isinstance(secrets, list) else []:
        enabled = credential.get("enabled") is not False and secret.get("enabled") is not False
        values = (
            credential.get("type"),
            credential.get("auth-id"),
            enabled,
            *(secret.get(name) for name in ("id", "not-before", "not-after")),
        )
        yield tuple(printable(show_value(value)) for value in values)


@credentials_app.command("set")
@with_credential
@with_connection
def credentials_set(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    file: ListFileOption = None,
    if_match: IfMatchOption = None,
    as_json: JsonOption = False,
    credential_of: CredentialOf,
    connect: Connect,
) -> None:
    """Replace all credentials of a device by those of --file, or the secrets of one of them by the one given.

    With --password, --psk or --cert every other type and auth-id is left as it is. A further secret for the same
    auth-id, beside the old one, is what `kamado credentials add` is for.
    """
    credential = credential_of()
    if (file is None) == (credential is None):
        raise typer.BadParameter("use one of --file, --password, --psk and --cert")
    path = ("credentials", tenant_id, device_id)
    if credential is not None:
        version, before, after = _change_credentials(
            connect, path, lambda credentials: set_credential(credentials, credential), if_match
        )
    else:
        assert file is not None
        document = _read_credentials(file)
        with registry(connect) as client:
            before = len(client.get(*path).array)
            version = client.write("PUT", *path, document=document, if_match=if_match).version
        after = len(document)
    _say_changed(version, device_id, before, after, as_json=as_json)


@credentials_app.command("add")
@with_credential
@with_connection
def credentials_add(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    file: ListFileOption = None,
    if_match: IfMatchOption = None,
    as_json: JsonOption = False,
    credential_of: CredentialOf,
    connect: Connect,
) -> None:
    """Give a device further credentials, or a further secret for an auth-id that it has; all others stay.

    Until the old secret is removed both count, so that a device can be told its new password in peace.
    """
    credential = credential_of()
    if (file is None) == (credential is None):
        raise typer.BadParameter("use one of --file, --password, --psk and --cert")
    more = [credential] if credential is not None else _read_credentials(cast(Path, file))

    def add(credentials: list[JsonObject]) -> list[JsonObject]:
        for one in more:
            credentials = add_credential(credentials, one)
        return credentials

    changed = _change_credentials(connect, ("credentials", tenant_id, device_id), add, if_match)
    _say_changed(changed[0], device_id, *changed[1:], as_json=as_json)


@credentials_app.command("remove")
@with_connection
def credentials_remove(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    type_: TypeArgument,
    auth_id: AuthIdArgument,
    secret_id: Annotated[
        str | None, typer.Option("--secret", metavar="ID", help="Only this secret, as `list` shows its id.")
    ] = None,
    if_match: IfMatchOption = None,
    as_json: JsonOption = False,
    connect: Connect,
) -> None:
    """Take one of its credentials from a device, or one secret of it; all others stay."""
    version, before, after = _change_credentials(
        connect,
        ("credentials", tenant_id, device_id),
        lambda credentials: remove_credential(credentials, type_, auth_id, secret_id),
        if_match,
    )
    _say_changed(version, device_id, before, after, as_json=as_json)


@credentials_app.command("delete")
@with_connection
def credentials_delete(
    *, tenant_id: TenantArgument, device_id: DeviceArgument, if_match: IfMatchOption = None, connect: Connect
) -> None:
    """Take all credentials from a device; the device stays."""
    version, before, after = _change_credentials(connect, ("credentials", tenant_id, device_id), lambda _: [], if_match)
    _say_changed(version, device_id, before, after, as_json=False)
