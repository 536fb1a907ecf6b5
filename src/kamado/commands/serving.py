"""`kamado serve`, `check-config` and `migrate`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kamado.commands.configured import ConfigOption, SetOption, load_configuration, own_command, own_options, with_store
from kamado.errors import Unavailable
from kamado.terminal import WRONG_CONFIGURATION, fail, say

if TYPE_CHECKING:
    from kamado.config import Config

__all__ = ["check_config", "migrate", "serve"]


def serve(
    *,
    config: ConfigOption = None,
    assignments: SetOption = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the addresses to this file (JSON) once everything listens."),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Serve with so many processes, or auto: one for each processor; the setting serve.workers.",
        ),
    ] = None,
) -> None:
    """Run the registry until SIGTERM or Ctrl-C."""
    chosen = [] if workers is None else [f"serve.workers={workers}"]
    loaded = load_configuration(config, [*(assignments or ()), *chosen])
    if loaded.config.serve.effective_workers > 1:
        from kamado.supervisor import run
    else:
        from kamado.app import run

    raise typer.Exit(
        run(loaded, ready_file=ready_file, command=own_command(), options=own_options(config, assignments))
    )


def check_config(
    *,
    config: ConfigOption = None,
    assignments: SetOption = None,
    print_settings: Annotated[
        bool, typer.Option("--print", help="Print all settings in effect as TOML, each with where it comes from.")
    ] = False,
) -> None:
    """Check the configuration and its files without starting anything."""
    loaded = load_configuration(config, assignments)
    _check_permissions(loaded.config)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    access = _check_access(loaded.config)
    if print_settings:
        for setting, shown, origin in loaded.effective():
            # What is unset has no TOML form.
            typer.echo(f"{setting.key} = {shown}  # {origin}" if shown else f"# {setting.key} is not set")
    else:
        typer.echo(f"The configuration is fine.\nManagement API: {access}.")


def _check_permissions(config: "Config") -> None:
    if config.auth.permissions_file is None:
        return
    from kamado.auth import PermissionsError, load_permissions

    try:
        permissions = load_permissions(config.auth.permissions_file)
    except PermissionsError as error:
        fail(f"auth.permissions_file: {error}", WRONG_CONFIGURATION)
    for warning in permissions.warnings:
        say(f"warning: auth.permissions_file: {warning}")


def _check_access(config: "Config") -> str:
    """Say who may use the management API; exit if `serve` would not start for that."""
    from kamado.app import StartFailed, check_access

    file = config.storage.file
    try:
        # What is not there yet has no account; nothing is made here.
        has_operators = (file is None or file.exists()) and asyncio.run(
            with_store(config, lambda store: store.lookups.has_operators(), may_create=False)
        )
    except Unavailable as error:
        return f"whether operators have to log in cannot be told: {error}"
    try:
        return check_access(config.http, has_operators=has_operators)
    except StartFailed as error:
        fail(str(error), error.status)


def migrate(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Create the database's schema, or bring it up to date."""
    loaded = load_configuration(config, assignments)
    from kamado.storage import migrate as migrate_store

    before, after = asyncio.run(migrate_store(loaded.config.storage.url))
    typer.echo(f"schema {after}: nothing to do" if before == after else f"schema {before} -> {after}")
