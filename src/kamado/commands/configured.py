"""What commands that go by the configuration share: its options, the database, passwords."""

import dataclasses
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kamado.terminal import WRONG_CONFIGURATION, say

if TYPE_CHECKING:
    from kamado.config import Config, Loaded
    from kamado.passwords import PasswordHasher
    from kamado.store import Store

__all__ = [
    "ConfigOption",
    "JsonOption",
    "SetOption",
    "load_configuration",
    "own_command",
    "own_options",
    "with_passwords",
    "with_store",
]

T = TypeVar("T")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Configuration file (TOML). Default: $KAMADO_CONFIG, else /etc/kamado/config.toml.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as http.insecure.port=8081; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def load_configuration(config: Path | None, assignments: list[str] | None) -> "Loaded":
    """Read the configuration, or list its problems and exit."""
    from kamado.config import ConfigError, load

    try:
        return load(config_file=config, assignments=assignments or ())
    except ConfigError as error:
        count = len(error.problems)
        say(f"The configuration has {count} problem{'' if count == 1 else 's'}:")
        for problem in error.problems:
            say(f"  {problem}")
        raise typer.Exit(WRONG_CONFIGURATION) from error


def own_command() -> str:
    """How this command was called, to be shown in "what to type next"."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{Path(sys.executable).name} -m kamado"
    directories = os.environ.get("PATH", "").split(os.pathsep)
    if str(program.parent) in directories:
        return program.name
    relative = os.path.relpath(program)
    return str(program) if relative.startswith("..") else relative


def own_options(config: Path | None, assignments: list[str] | None) -> list[str]:
    """The options of this run, to be shown; a password in a URL is left out."""
    from kamado.storage import shown_url

    words = [] if config is None else ["--config", str(config)]
    for assignment in assignments or ():
        key, _, value = assignment.partition("=")
        if key.strip() in {"storage.url", "storage.read_url"}:
            assignment = f"{key}={shown_url(value)}"
        words += ["--set", assignment]
    return words


async def with_store(config: "Config", work: Callable[["Store"], Awaitable[T]], *, may_create: bool) -> T:
    """Open the database beside whoever uses it, do something, close it."""
    from kamado.app import store_settings
    from kamado.storage import open_store

    settings = store_settings(config)
    # A command does one thing after the other.
    settings = dataclasses.replace(settings, auto_migrate=may_create and settings.auto_migrate, pool_min=1)
    store = await open_store(config.storage.url, settings)
    try:
        return await work(store)
    finally:
        await store.close()


async def with_passwords(
    config: "Config", work: Callable[["Store", "PasswordHasher"], Awaitable[T]], *, may_create: bool
) -> T:
    from kamado.passwords import PasswordHasher

    passwords = PasswordHasher(
        workers=config.credentials.hash_workers,
        queue=config.credentials.hash_queue,
        cost=config.credentials.bcrypt_cost,
    )
    try:
        return await with_store(config, lambda store: work(store, passwords), may_create=may_create)
    finally:
        passwords.close()
