"""The connection of a command: its options, the client, and how errors of requests end it."""

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn
from urllib.parse import urlsplit

import typer

from kamado import profiles
from kamado.edits import show_value
from kamado.errors import Conflict, NotFound
from kamado.profiles import ProfileError, WrongOption
from kamado.terminal import (
    LOGIN_REFUSED,
    NOT_ALLOWED,
    REFUSED,
    UNAVAILABLE,
    WRONG_CONFIGURATION,
    WRONG_REQUEST,
    ask_secret,
    fail,
    printable,
    read_first_line,
    say,
    with_options,
)

if TYPE_CHECKING:
    from kamado.http.client import RegistryClient, RequestFailed

__all__ = ["Connect", "Connection", "registry", "with_connection"]


@dataclass(frozen=True, slots=True)
class Connection:
    """A registry, and a login with its password."""

    target: profiles.Target
    password: str | None = field(repr=False)
    timeout: float


Connect = Callable[[], Connection]


def _complete_profile(incomplete: str) -> list[str]:
    try:
        names = list(profiles.read_profiles(profiles.profiles_file(os.environ)))
    except ProfileError:
        return []
    return [name for name in names if name.startswith(incomplete)]


_CONNECTION = "Connection"


def _connection(
    *,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            rich_help_panel=_CONNECTION,
            help=f"The registry. Default: $KAMADO_URL, the profile, {profiles.DEFAULT_URL}.",
        ),
    ] = None,
    username: Annotated[
        str | None,
        typer.Option(
            "--username",
            metavar="NAME",
            rich_help_panel=_CONNECTION,
            help="Log in as NAME. Default: $KAMADO_USERNAME, the profile, no login.",
        ),
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(
            "--password-file",
            metavar="FILE",
            rich_help_panel=_CONNECTION,
            help="The password of the login (first line). Default: $KAMADO_PASSWORD, the profile, asked for.",
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            "--ca-file",
            metavar="FILE",
            rich_help_panel=_CONNECTION,
            help="CA of the registry's certificate (PEM). Default: the profile, the system's CAs.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="NAME",
            rich_help_panel=_CONNECTION,
            autocompletion=_complete_profile,
            help="A table of the profile file. Default: $KAMADO_PROFILE, the profile `default`.",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", min=0.1, metavar="SECONDS", rich_help_panel=_CONNECTION, help="Time for each request."
        ),
    ] = 60.0,
) -> Connection:
    """Work out which registry is meant and as whom."""
    try:
        target = profiles.resolve(
            os.environ, url=url, username=username, password_file=password_file, ca_file=ca_file, profile=profile
        )
    except WrongOption as error:
        raise typer.BadParameter(str(error)) from None
    except ProfileError as error:
        fail(str(error), WRONG_CONFIGURATION)
    password = target.password
    if target.username is not None:
        if ":" in target.username:
            fail("a name with a colon cannot log in over HTTP", WRONG_CONFIGURATION)
        if target.password_file is not None:
            password = read_first_line(target.password_file)
        elif password is None:
            password = ask_secret("--password-file or KAMADO_PASSWORD", what=f"password of {target.username}")
    return Connection(target, password, timeout)


with_connection = with_options(_connection, "connect")


@contextmanager
def registry(connect: Connect) -> Iterator["RegistryClient"]:
    """Open a connection for a while; what goes wrong with a request ends the command with a line and a status."""
    from kamado.http.client import ClientSettings, RegistryClient, RequestFailed, is_loopback

    connection = connect()
    target = connection.target
    context = None
    if urlsplit(target.url).scheme == "https":
        try:
            context = ssl.create_default_context(cafile=target.ca_file)
        except ssl.SSLError:
            fail(f"{target.ca_file} holds no PEM certificates", WRONG_CONFIGURATION)
        except OSError as error:
            fail(f"{target.ca_file} cannot be read: {error.strerror}", WRONG_CONFIGURATION)
    elif target.username is not None and not is_loopback(target.url):
        say(f"warning: the password of {target.username} goes to {target.url} unencrypted")
    settings = ClientSettings(
        url=target.url,
        username=target.username,
        password=connection.password,
        ssl_context=context,
        timeout=connection.timeout,
    )
    try:
        with RegistryClient(settings) as client:
            yield client
    except RequestFailed as error:
        _fail_request(error, target)
    except (NotFound, Conflict) as error:
        fail(str(error), REFUSED)
    except UnicodeEncodeError:
        raise typer.BadParameter("what is not UTF-8 text cannot be sent") from None


def _fail_request(error: "RequestFailed", target: profiles.Target) -> NoReturn:
    from kamado.http.client import CertificateRefused, ErrorAnswer

    text = printable(str(error))
    if isinstance(error, ErrorAnswer):
        details = "".join(f" ({name}: {printable(show_value(value))})" for name, value in error.details.items())
        if error.status == 401:
            hint = "" if target.username else "; log in with --username, KAMADO_USERNAME or a profile"
            fail(f"The login was refused: {text}{hint}", LOGIN_REFUSED)
        fail(f"{text}{details}", _exit_status(error.status))
    say(f"No answer from the registry at {target.url} ({target.origin}): {text}.")
    if isinstance(error, CertificateRefused):
        fail("Name the CA of its certificate with --ca-file, or in a profile.", UNAVAILABLE)
    if target.origin == "the default":
        say("`kamado serve` starts one there.")
    file = profiles.profiles_file(os.environ)
    fail(f"Name another one with --url URL, the variable KAMADO_URL, or a profile in {file}.", UNAVAILABLE)


def _exit_status(status: int) -> int:
    if status in {404, 409, 412}:
        return REFUSED
    if status == 403:
        return NOT_ALLOWED
    return WRONG_REQUEST if status < 500 else UNAVAILABLE
