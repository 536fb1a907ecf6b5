"""The command `kamado`: parse, call the core, print.

Results go to standard output, everything else to standard error. What a subcommand needs is imported when it runs, so
that `kamado --help` and `kamado serve` start quickly.

Exit statuses (docs/command-line.md): 0 success; 1 nothing found or refused; 2 wrong usage; 3 not allowed; 4 the request
was wrong; 65 wrong data; 69 a server or the database cannot be reached; 70 an internal error; 74 the output cannot be
written; 77 the login was refused; 78 wrong configuration.
"""

import os
import sys
from typing import Annotated

import typer

from kamado import __version__, log
from kamado.commands.ask import ask_app
from kamado.commands.data import copy, load
from kamado.commands.explain import explain_app
from kamado.commands.logins import identity_app, operator_app
from kamado.commands.serving import check_config, migrate, serve
from kamado.errors import BadRequest, RegistryError, Unavailable
from kamado.operate import credentials_app, device_app, tenant_app
from kamado.terminal import INTERNAL, REFUSED, UNAVAILABLE, WRONG_DATA, say

__all__ = ["app", "main"]

app = typer.Typer(
    name="kamado",
    help="A device registry that speaks the interfaces of Eclipse Hono.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they would print local variables, secrets among them
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command("check-config")(check_config)
app.command()(migrate)
app.command()(load)
app.command()(copy)
app.add_typer(tenant_app, name="tenant")
app.add_typer(device_app, name="device")
app.add_typer(credentials_app, name="credentials")
app.add_typer(identity_app, name="identity")
app.add_typer(operator_app, name="operator")
app.add_typer(ask_app, name="ask")
app.add_typer(explain_app, name="explain")


def main() -> None:
    """Run the command line; here, and only here, an error becomes a line and an exit status."""
    # Either may have been closed by whoever started us (`>&-`).
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    # What the parts below have to say on the way, such as a database's own words; `serve` has a log of its own.
    log.configure("text", "warning", {}, sys.stderr)
    try:
        app()
    except RegistryError as error:
        say(str(error))
        sys.exit(_error_status(error))
    except Exception:
        # What nobody foresaw.
        import traceback

        traceback.print_exc()
        sys.exit(INTERNAL)


def _error_status(error: RegistryError) -> int:
    match error:
        case Unavailable():
            return UNAVAILABLE
        case BadRequest():
            return WRONG_DATA
        case _:
            return REFUSED


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kamado {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A device registry that speaks the interfaces of Eclipse Hono."""
