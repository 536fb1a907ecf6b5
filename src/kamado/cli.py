"""The command `kamado`: parse, call the core, print.

Results go to standard output, everything else to standard error. What a subcommand needs is imported when it runs, so
that `kamado --help` and `kamado serve` start quickly.

Exit statuses (docs/command-line.md): 0 success; 1 nothing found or refused; 2 wrong usage; 3 not allowed; 4 the request
was wrong; 65 wrong data; 69 a server or the database cannot be reached; 70 an internal error; 74 the output cannot be
written; 77 the login was refused; 78 wrong configuration.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar
from urllib.parse import urlsplit

import typer

from kamado import __version__, log
from kamado.errors import BadRequest, RegistryError, Unavailable
from kamado.operate import credentials_app, device_app, tenant_app
from kamado.terminal import (
    INTERNAL,
    LOGIN_REFUSED,
    NOT_ALLOWED,
    OK,
    REFUSED,
    UNAVAILABLE,
    WRONG_CONFIGURATION,
    WRONG_DATA,
    WRONG_REQUEST,
    ask_secret,
    fail,
    print_json,
    print_table,
    printable,
    progress_bar,
    read_first_line,
    say,
    with_options,
)

if TYPE_CHECKING:
    from kamado.amqp.client import AskError, ClientSettings, Reply
    from kamado.config import Config, HttpConfig, Loaded
    from kamado.explain import Explainer, Explanation
    from kamado.passwords import PasswordHasher
    from kamado.store import Store
    from kamado.transfer import Comparison

__all__ = ["app", "main"]

T = TypeVar("T")

_COPY_CONNECT_TIMEOUT = 10.0
_COPY_STATEMENT_TIMEOUT = 300.0
CONDITIONS = {
    "amqp:unauthorized-access": 403,
    "amqp:resource-limit-exceeded": 403,
    "amqp:internal-error": 500,
    "hono:bad-request": 400,
}
"""What adapters make of AMQP error conditions; of a refused link with another one 404 (amqp-apis 4.3)."""

app = typer.Typer(
    name="kamado",
    help="A device registry that speaks the interfaces of Eclipse Hono.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they would print local variables, secrets among them
    context_settings={"help_option_names": ["-h", "--help"]},
)
identity_app = typer.Typer(no_args_is_help=True, help="Who may log in over AMQP: add, list, remove, change a password.")
operator_app = typer.Typer(
    no_args_is_help=True, help="Who may use the management API: add, list, remove, change a password."
)
ask_app = typer.Typer(no_args_is_help=True, help="Ask a running registry over AMQP, exactly as an adapter would.")
explain_app = typer.Typer(
    no_args_is_help=True, help="Say why a look-up is refused, straight from the database; nothing is changed."
)
app.add_typer(tenant_app, name="tenant")
app.add_typer(device_app, name="device")
app.add_typer(credentials_app, name="credentials")
app.add_typer(identity_app, name="identity")
app.add_typer(operator_app, name="operator")
app.add_typer(ask_app, name="ask")
connection_app = typer.Typer(
    no_args_is_help=True,
    help="Read and write what adapters keep of device connections: last known gateways, and who handles commands.",
)
ask_app.add_typer(connection_app, name="connection")
app.add_typer(explain_app, name="explain")

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


def _load(config: Path | None, assignments: list[str] | None) -> "Loaded":
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


# serve, check-config, migrate, load


@app.command()
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
    loaded = _load(config, [*(assignments or ()), *chosen])
    if loaded.config.serve.effective_workers > 1:
        from kamado.supervisor import run
    else:
        from kamado.app import run

    raise typer.Exit(
        run(loaded, ready_file=ready_file, command=_own_command(), options=_own_options(config, assignments))
    )


def _own_command() -> str:
    """How this command was called, to be shown in "what to type next"."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{Path(sys.executable).name} -m kamado"
    directories = os.environ.get("PATH", "").split(os.pathsep)
    if str(program.parent) in directories:
        return program.name
    relative = os.path.relpath(program)
    return str(program) if relative.startswith("..") else relative


def _own_options(config: Path | None, assignments: list[str] | None) -> list[str]:
    """The options of this run, to be shown; a password in a URL is left out."""
    from kamado.storage import shown_url

    words = [] if config is None else ["--config", str(config)]
    for assignment in assignments or ():
        key, _, value = assignment.partition("=")
        if key.strip() in {"storage.url", "storage.read_url"}:
            assignment = f"{key}={shown_url(value)}"
        words += ["--set", assignment]
    return words


@app.command("check-config")
def check_config(
    *,
    config: ConfigOption = None,
    assignments: SetOption = None,
    print_settings: Annotated[
        bool, typer.Option("--print", help="Print all settings in effect as TOML, each with where it comes from.")
    ] = False,
) -> None:
    """Check the configuration and its files without starting anything."""
    loaded = _load(config, assignments)
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
            _with_store(config, lambda store: store.lookups.has_operators(), may_create=False)
        )
    except Unavailable as error:
        return f"whether operators have to log in cannot be told: {error}"
    try:
        return check_access(config.http, has_operators=has_operators)
    except StartFailed as error:
        fail(str(error), error.status)


@app.command()
def migrate(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Create the database's schema, or bring it up to date."""
    loaded = _load(config, assignments)
    from kamado.storage import migrate as migrate_store

    before, after = asyncio.run(migrate_store(loaded.config.storage.url))
    typer.echo(f"schema {after}: nothing to do" if before == after else f"schema {before} -> {after}")


@app.command()
def load(
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="In any order; the content tells the form.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Let entries take the place of what is there under the same id.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Load tenants, devices and credentials from files in the JSON forms of Hono 1.2, all or nothing."""
    import gc

    from kamado.load import LoadErrors

    settings = _load(config, assignments).config
    # Everything that is read stays until the end; looking through it again and again for cycles takes long.
    gc.disable()
    try:
        counts = asyncio.run(_load_files(settings, files, replace=replace))
    except LoadErrors as error:
        for problem in error.problems:
            say(str(problem))
        count = len(error.problems)
        fail(f"Nothing was loaded: {count} problem{'' if count == 1 else 's'}.", WRONG_DATA)
    typer.echo(counts)


async def _load_files(config: "Config", files: list[Path], *, replace: bool) -> str:
    from kamado import load as loading
    from kamado.app import credential_rules, now_utc
    from kamado.auth import LOCAL_OPERATOR

    plan = loading.read_files(files, rules=credential_rules(config), now=now_utc())
    for warning in plan.warnings:
        say(f"warning: {warning}")
    if plan.problems and plan.is_empty:
        raise loading.LoadErrors(plan.problems)

    async def apply(store: "Store", passwords: "PasswordHasher") -> str:
        with progress_bar("Loading") as progress:
            counts = await loading.apply(
                plan, store, passwords, LOCAL_OPERATOR, now_utc, replace=replace, progress=progress
            )
        shown = [
            f"{number} {word}" if number == 1 or word == "credentials" else f"{number} {word}s"
            for number, word in (
                (counts.tenants, "tenant"),
                (counts.devices, "device"),
                (counts.credentials, "credentials"),
            )
        ]
        replaced = f", {counts.replaced} of them replaced" if counts.replaced else ""
        return f"Loaded {', '.join(shown)}{replaced}."

    try:
        return await _with_passwords(config, apply, may_create=True)
    except Unavailable as error:
        if not plan.problems:
            raise
        say(f"warning: the entries were not compared with the database: {error}")
        raise loading.LoadErrors(plan.problems) from error


def _read_url(value: str, option: str) -> str:
    """Return a URL, which may stand in a file: it may hold a password, and command lines are visible to others."""
    from kamado.config import DATABASE_URLS, database_url

    url = read_first_line(Path(value[1:])).strip() if value.startswith("@") else value
    if not url:
        raise typer.BadParameter(f"{option}: there is no URL")
    try:
        return database_url(url, Path.cwd())
    except ValueError:
        # Not shown: there may be a password anywhere in it.
        raise typer.BadParameter(f"{option}: expected {DATABASE_URLS}; / in a password is written %2F") from None


@app.command("copy")
def copy(
    *,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="URL",
            envvar="KAMADO_COPY_FROM",
            help="The database to copy, as for storage.url; @FILE reads it from a file.",
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URL",
            envvar="KAMADO_COPY_TO",
            help="An empty database, or one that this has begun to fill.",
        ),
    ],
    check: Annotated[bool, typer.Option("--check", help="Copy nothing, only compare the two.")] = False,
) -> None:
    """Copy a whole registry into another database, and compare the two; what was interrupted goes on."""
    from kamado.store import DamagedRow

    urls = _read_url(source, "--from"), _read_url(target, "--to")
    if urls[0] == urls[1]:
        raise typer.BadParameter("--from and --to are the same")
    try:
        raise typer.Exit(asyncio.run(_copy(*urls, only_check=check)))
    except DamagedRow as error:
        fail(str(error), WRONG_DATA)


async def _copy(source_url: str, target_url: str, *, only_check: bool) -> int:
    """Open both databases, copy, compare; return the exit status."""
    from kamado import transfer

    stopped = _Stop()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(stopped)
        source = await _open_copied(stack, "--from", source_url, may_change=False, may_be_unfinished=False)
        target = await _open_copied(stack, "--to", target_url, may_change=not only_check, may_be_unfinished=True)
        note = None
        try:
            if not only_check:
                note = await transfer.begin(source, target)
                if note.records:
                    say(f"Going on after {note.records:,} records.")
                with progress_bar("Copying", "records") as progress:
                    note = await transfer.copy(
                        source, target, note, progress=progress or _no_progress, should_stop=stopped.is_set
                    )
            with progress_bar("Comparing", "records") as progress:
                comparison = await transfer.compare(
                    source, target, progress=progress or _no_progress, should_stop=stopped.is_set
                )
            if note is not None and not comparison.differences:
                await transfer.finish(target)
        except transfer.Stopped:
            say("Stopped." + ("" if only_check else " The same command goes on from here."))
            return stopped.status
        except Unavailable as error:
            say(str(error))
            if note is not None:
                say("The copy is not finished. The same command goes on where it stopped.")
            return UNAVAILABLE
    return _tell_comparison(comparison, only_check=only_check)


def _tell_comparison(comparison: "Comparison", *, only_check: bool) -> int:
    for kind, number in comparison.counts.items():
        typer.echo(f"{number:>12,} {kind}")
    if not comparison.differences:
        typer.echo("Both databases are equal." if only_check else "Copied. Both databases are equal.")
        return OK
    for difference in comparison.first:
        say(printable(str(difference)))
    if comparison.differences > len(comparison.first):
        say(f"... and {comparison.differences - len(comparison.first):,} more")
    say(f"{comparison.differences:,} record{' is' if comparison.differences == 1 else 's are'} not the same.")
    if not only_check:
        say("The source was changed meanwhile. Stop whatever uses it, and copy again into an empty database.")
    return REFUSED


def _no_progress(done: int, total: int) -> None:
    """Show nothing."""


async def _open_copied(
    stack: contextlib.AsyncExitStack, option: str, url: str, *, may_change: bool, may_be_unfinished: bool
) -> "Store":
    from kamado.storage import OlderSchema, StorageError, StoreSettings, open_store, shown_url

    settings = StoreSettings(
        auto_migrate=may_change,
        is_bulk=may_change,
        may_be_unfinished=may_be_unfinished,
        only_reads=not may_change,
        pool_min=1,
        acquire_timeout=_COPY_CONNECT_TIMEOUT,
        # A page of a thousand, or a count of all.
        statement_timeout=_COPY_STATEMENT_TIMEOUT,
    )
    try:
        store = await open_store(url, settings)
    except OlderSchema as error:
        raise StorageError(
            f"{option}: {shown_url(url)} does not exist, or has an older schema. It is not changed here: bring it up "
            "to date first, by kamado migrate"
        ) from error
    except StorageError as error:
        raise StorageError(f"{option}: {str(error).removeprefix('storage.url: ')}") from error
    stack.push_async_callback(store.close)
    return store


class _Stop:
    """Takes note of Ctrl-C and SIGTERM while it is entered; a second one ends the process as usual."""

    def __init__(self) -> None:
        self._signal: int | None = None

    @property
    def status(self) -> int:
        """What a shell makes of that signal."""
        assert self._signal is not None
        return 128 + self._signal

    def is_set(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._take, number)

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _take(self, number: int) -> None:
        self._signal = number
        self.__exit__()


async def _with_store(config: "Config", work: Callable[["Store"], Awaitable[T]], *, may_create: bool) -> T:
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


# identity

PasswordFileOption = Annotated[
    Path | None,
    typer.Option(
        "--password-file", metavar="FILE", help="Read the password from this file (first line); - is standard input."
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
PromptOption = Annotated[bool, typer.Option("--prompt", help="Ask for the password on the terminal.")]


class Mechanism(StrEnum):
    """SASL mechanisms."""

    PLAIN = "PLAIN"
    EXTERNAL = "EXTERNAL"


@identity_app.command("add")
def identity_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="User name; with EXTERNAL the CN of the certificate.")],
    role: Annotated[
        list[str], typer.Option("--role", metavar="ROLE", help="protocol-adapter or command-router; repeatable.")
    ] = ["protocol-adapter"],  # noqa: B006 - typer copies it
    mechanism: Annotated[Mechanism, typer.Option("--mechanism", help="How it logs in.")] = Mechanism.PLAIN,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Let somebody log in. A password that is not given is made and printed once."""
    settings = _load(config, assignments).config
    authorities = _authorities(role)
    password = None
    if mechanism is Mechanism.PLAIN:
        password, made = _choose_password(password_file, prompt=prompt)
    elif password_file is not None or prompt:
        raise typer.BadParameter("EXTERNAL has no password")
    from kamado import auth

    async def add(store: "Store", passwords: "PasswordHasher") -> None:
        await auth.add_identity(
            store,
            passwords,
            principal=auth.LOCAL_OPERATOR,
            name=name,
            mechanism=auth.Mechanism(mechanism),
            password=password,
            authorities=authorities,
            now=datetime.now(UTC),
        )

    asyncio.run(_with_passwords(settings, add, may_create=True))
    say(f"{name} may log in now.")
    if password is not None and made:
        typer.echo(f"username={name}\npassword={password}")


@identity_app.command("list")
def identity_list(*, as_json: JsonOption = False, config: ConfigOption = None, assignments: SetOption = None) -> None:
    """List who may log in, and what for."""
    settings = _load(config, assignments).config
    identities = asyncio.run(
        _with_store(
            settings, lambda store: store.read(lambda transaction: transaction.list_identities()), may_create=False
        )
    )
    from kamado.document import format_timestamp

    if as_json:
        entries = [
            {
                "name": identity.name,
                "mechanism": identity.mechanism,
                "roles": _roles(identity.authorities),
                "created": format_timestamp(identity.created),
            }
            for identity in identities
        ]
        typer.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    rows = [
        (identity.name, identity.mechanism, ", ".join(_roles(identity.authorities)), format_timestamp(identity.created))
        for identity in identities
    ]
    print_table(("name", "mechanism", "roles", "created"), rows)


@identity_app.command("remove")
def identity_remove(
    *,
    name: NameArgument,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Let somebody log in no more. Connections that are open end within auth.lifetime."""
    settings = _load(config, assignments).config
    from kamado import auth

    def remove(store: "Store") -> Awaitable[None]:
        return auth.remove_identity(store, principal=auth.LOCAL_OPERATOR, name=name)

    asyncio.run(_with_store(settings, remove, may_create=False))
    say(f"{name} may not log in any more.")


@identity_app.command("passwd")
def identity_passwd(
    *,
    name: NameArgument,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Change a password. A password that is not given is made and printed once."""
    settings = _load(config, assignments).config
    password, made = _choose_password(password_file, prompt=prompt)
    from kamado import auth

    def change(store: "Store", passwords: "PasswordHasher") -> Awaitable[None]:
        return auth.change_identity_password(
            store, passwords, principal=auth.LOCAL_OPERATOR, name=name, password=password
        )

    asyncio.run(_with_passwords(settings, change, may_create=False))
    say(f"{name} has a new password.")
    if made:
        typer.echo(f"username={name}\npassword={password}")


# operator


@operator_app.command("add")
def operator_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="User name of HTTP Basic.")],
    reveal_secrets: Annotated[
        bool, typer.Option("--reveal-secrets", help="Show this operator the pre-shared keys of devices.")
    ] = False,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Add an account for the management API. A password that is not given is made and printed once."""
    settings = _load(config, assignments).config
    password, made = _choose_password(password_file, prompt=prompt)
    from kamado import auth, operators

    async def add(store: "Store", passwords: "PasswordHasher") -> bool:
        is_first = not await store.lookups.has_operators()
        await operators.add_operator(
            store,
            passwords,
            principal=auth.LOCAL_OPERATOR,
            name=name,
            password=password,
            may_reveal_secrets=reveal_secrets,
            now=datetime.now(UTC),
        )
        return is_first

    is_first = asyncio.run(_with_passwords(settings, add, may_create=True))
    say(f"{name} may use the management API now." + (" From now on everybody has to log in." if is_first else ""))
    if made:
        typer.echo(f"username={name}\npassword={password}")


@operator_app.command("list")
def operator_list(*, as_json: JsonOption = False, config: ConfigOption = None, assignments: SetOption = None) -> None:
    """List who may use the management API."""
    settings = _load(config, assignments).config
    found = asyncio.run(
        _with_store(
            settings, lambda store: store.read(lambda transaction: transaction.list_operators()), may_create=False
        )
    )
    from kamado.document import format_timestamp

    if as_json:
        entries = [
            {
                "name": operator.name,
                "reveal-secrets": operator.may_reveal_secrets,
                "created": format_timestamp(operator.created),
            }
            for operator in found
        ]
        typer.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    rows = [
        (operator.name, "yes" if operator.may_reveal_secrets else "no", format_timestamp(operator.created))
        for operator in found
    ]
    print_table(("name", "reveals secrets", "created"), rows)


@operator_app.command("remove")
def operator_remove(*, name: NameArgument, config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Remove an account; its next request is refused."""
    settings = _load(config, assignments).config
    from kamado import auth, operators

    def remove(store: "Store") -> Awaitable[bool]:
        return operators.remove_operator(store, principal=auth.LOCAL_OPERATOR, name=name)

    is_any_left = asyncio.run(_with_store(settings, remove, may_create=False))
    say(f"{name} may not use the management API any more.")
    if not is_any_left:
        say(f"No account is left: {_consequence(settings.http)}.")


def _consequence(config: "HttpConfig") -> str:
    """Say who may use the management API, now that there is no account."""
    if config.is_local:
        return "nobody has to log in, since only this machine reaches the management API"
    if config.auth.allow_anonymous:
        return "whoever reaches the management API may use it (http.auth.allow_anonymous)"
    return "nobody may use the management API until there is one, and kamado serve does not start"


@operator_app.command("passwd")
def operator_passwd(
    *,
    name: NameArgument,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Change a password. A password that is not given is made and printed once."""
    settings = _load(config, assignments).config
    password, made = _choose_password(password_file, prompt=prompt)
    from kamado import auth, operators

    def change(store: "Store", passwords: "PasswordHasher") -> Awaitable[None]:
        return operators.change_operator_password(
            store, passwords, principal=auth.LOCAL_OPERATOR, name=name, password=password
        )

    asyncio.run(_with_passwords(settings, change, may_create=False))
    say(f"{name} has a new password.")
    if made:
        typer.echo(f"username={name}\npassword={password}")


# Passwords that are given, or made


def _choose_password(password_file: Path | None, *, prompt: bool) -> tuple[str, bool]:
    """Return the password, and whether it was made here."""
    if password_file is not None and prompt:
        raise typer.BadParameter("use either --password-file or --prompt")
    if prompt:
        return ask_secret("--password-file", confirm=True), False
    if password_file is None:
        import secrets

        return secrets.token_urlsafe(24), True
    password = read_first_line(password_file)
    if not password:
        fail("the password is empty", WRONG_DATA)
    return password, False


def _authorities(roles: list[str]) -> Mapping[str, str]:
    from kamado.auth import ROLES, Authorities

    united = Authorities()
    for role in roles:
        if role not in ROLES:
            raise typer.BadParameter(f"there is no role {role}; the roles are: {', '.join(ROLES)}")
        united = united.united(Authorities(ROLES[role]))
    return united.claims


def _roles(authorities: Mapping[str, str]) -> list[str]:
    """Name the roles whose rights are all there."""
    from kamado.auth import ROLES

    def covers(role: Mapping[str, str]) -> bool:
        return all(set(letters) <= set(authorities.get(key, "")) for key, letters in role.items())

    return [name for name, role in ROLES.items() if covers(role)]


async def _with_passwords(
    config: "Config", work: Callable[["Store", "PasswordHasher"], Awaitable[T]], *, may_create: bool
) -> T:
    from kamado.passwords import PasswordHasher

    passwords = PasswordHasher(
        workers=config.credentials.hash_workers,
        queue=config.credentials.hash_queue,
        cost=config.credentials.bcrypt_cost,
    )
    try:
        return await _with_store(config, lambda store: work(store, passwords), may_create=may_create)
    finally:
        passwords.close()


# What is asked, of a registry (ask) or of its database (explain)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE")]
TenantCriterion = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Id or alias.")]
SubjectDnOption = Annotated[
    str | None, typer.Option("--subject-dn", metavar="DN", help="Find by the name of a trusted CA (RFC 2253).")
]
ViaOption = Annotated[
    str | None, typer.Option("--via", metavar="GATEWAY", help="The gateway that acts for the device.")
]
TypeArgument = Annotated[str, typer.Argument(metavar="TYPE", help="hashed-password, psk, x509-cert, rpk or your own.")]
AuthIdArgument = Annotated[
    str | None, typer.Argument(metavar="[AUTH_ID]", help="With --certificate it may be left out: the subject.")
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate", metavar="FILE", help="The device's certificate (PEM or DER), as the adapter sends it along."
    ),
]


def _tenant_criterion(tenant_id: str | None, subject_dn: str | None) -> bytes:
    if (tenant_id is None) == (subject_dn is None):
        raise typer.BadParameter("name either a TENANT or a --subject-dn")
    return json.dumps({"tenant-id": tenant_id} if subject_dn is None else {"subject-dn": subject_dn}).encode()


def _credentials_criterion(type_: str, auth_id: str | None, certificate: Path | None) -> bytes:
    criterion = {"type": type_}
    if certificate is not None:
        der, subject = _read_certificate(certificate)
        auth_id = subject if auth_id is None else auth_id
        from kamado.document import encode_base64

        criterion["client-certificate"] = encode_base64(der)
    if auth_id is None:
        raise typer.BadParameter("name an AUTH_ID, or a --certificate whose subject it is")
    criterion["auth-id"] = auth_id
    return json.dumps(criterion).encode()


def _read_certificate(path: Path) -> tuple[bytes, str]:
    from kamado.x509 import parse_certificate

    try:
        parsed = parse_certificate(path.read_bytes())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", WRONG_DATA)
    except BadRequest as error:
        fail(f"{path} is no X.509 certificate: {error}", WRONG_DATA)
    return parsed.der, parsed.subject.text


# ask

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar="KAMADO_ASK_URL",
        help="amqp://HOST:PORT or amqps://HOST:PORT. Default: the listener of the configuration.",
    ),
]
UsernameOption = Annotated[
    str | None,
    typer.Option(
        "--username",
        metavar="NAME",
        envvar="KAMADO_ASK_USERNAME",
        help="Log in as NAME; the password comes from $KAMADO_ASK_PASSWORD or is asked for.",
    ),
]
CredentialsFileOption = Annotated[
    Path | None,
    typer.Option(
        "--credentials-file",
        metavar="FILE",
        help="Lines username= and password=. Default: adapter.credentials beside the database.",
    ),
]
CaFileOption = Annotated[
    Path | None, typer.Option("--ca-file", metavar="FILE", help="CA of the registry's certificate (PEM), for amqps.")
]
CertFileOption = Annotated[
    Path | None, typer.Option("--cert-file", metavar="FILE", help="Client certificate (PEM): log in by SASL EXTERNAL.")
]
KeyFileOption = Annotated[Path | None, typer.Option("--key-file", metavar="FILE", help="Key of --cert-file (PEM).")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Time for everything together.")
]


def _client_settings(
    *,
    url: UrlOption = None,
    username: UsernameOption = None,
    credentials_file: CredentialsFileOption = None,
    ca_file: CaFileOption = None,
    cert_file: CertFileOption = None,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = 5.0,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> "ClientSettings":
    """Work out where to ask and as whom; what is not said comes from the configuration."""
    import ssl

    from kamado.amqp.client import ClientSettings
    from kamado.config import TlsError, load_key_pair

    _check_key_pair(cert_file, key_file)
    settings = _load(config, assignments).config
    own_certificate: Path | None = None
    if url is None:
        secure = settings.amqp.secure_enabled
        listener = settings.amqp.secure if secure else settings.amqp.insecure
        host, port = listener.bind, listener.port
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what is bound to, not what we bind
        own_certificate = settings.amqp.tls.cert_file
    else:
        parts = urlsplit(url)
        try:
            usual = {"amqp": 5672, "amqps": 5671}[parts.scheme]
            port = usual if parts.port is None else parts.port
        except (KeyError, ValueError) as error:
            raise typer.BadParameter("a URL has the form amqp://HOST:PORT or amqps://HOST:PORT") from error
        host, secure = parts.hostname or "127.0.0.1", parts.scheme == "amqps"
    context = None
    if secure:
        # Without --ca-file: the registry of the configuration is known by its very certificate.
        trusted = ca_file or own_certificate
        try:
            context = ssl.create_default_context(cafile=trusted)
        except ssl.SSLError:
            fail(f"{trusted} holds no PEM certificates", WRONG_CONFIGURATION)
        except OSError as error:
            fail(f"{trusted} cannot be read: {error.strerror}", WRONG_CONFIGURATION)
        if ca_file is None and own_certificate is not None:
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.check_hostname = False
        if cert_file is not None:
            try:
                load_key_pair(context, cert_file, key_file or cert_file)
            except TlsError as error:
                fail(str(error), WRONG_CONFIGURATION)
    elif cert_file is not None:
        raise typer.BadParameter("--cert-file needs TLS: --url amqps://HOST:PORT")
    password = None
    if cert_file is None:
        options = "".join(f" {shlex.quote(word)}" for word in _own_options(config, assignments))
        username, password = _login(username, credentials_file, settings, options)
    return ClientSettings(
        host=host, port=port, username=username, password=password, ssl_context=context, timeout=timeout
    )


Login = Callable[[], "ClientSettings"]


@ask_app.command("tenant")
@with_options(_client_settings, "login")
def ask_tenant(
    *,
    tenant_id: TenantCriterion = None,
    subject_dn: SubjectDnOption = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Get a tenant, by id or by the name of a CA that it trusts."""
    body = _tenant_criterion(tenant_id, subject_dn)
    _ask(login(), "tenant", "get", as_json=as_json, body=body)


@ask_app.command("assert")
@with_options(_client_settings, "login")
def ask_assert(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_id: ViaOption = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Ask whether a device is registered and enabled, and whether a gateway may act for it."""
    properties = {"device_id": device_id} | ({} if gateway_id is None else {"gateway_id": gateway_id})
    _ask(login(), f"registration/{tenant_id}", "assert", as_json=as_json, properties=properties)


@ask_app.command("credentials")
@with_options(_client_settings, "login")
def ask_credentials(
    *,
    tenant_id: TenantArgument,
    type_: TypeArgument,
    auth_id: AuthIdArgument = None,
    certificate: CertificateOption = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Get a device's credentials; with --certificate an unknown device may be provisioned."""
    body = _credentials_criterion(type_, auth_id, certificate)
    _ask(login(), f"credentials/{tenant_id}", "get", as_json=as_json, body=body)


GatewayArgument = Annotated[str, typer.Argument(metavar="GATEWAY")]
InstanceArgument = Annotated[
    str, typer.Argument(metavar="INSTANCE", help="Adapter instance id, as the adapter's log shows it.")
]


def _ask_connection(
    settings: "ClientSettings",
    tenant_id: str,
    device_id: str,
    subject: str,
    *,
    as_json: bool,
    body: bytes | None = None,
    **properties: object,
) -> NoReturn:
    _ask(
        settings,
        f"device_con/{tenant_id}",
        subject,
        as_json=as_json,
        body=body,
        properties={"device_id": device_id, **properties},
    )


@connection_app.command("set-gateway")
@with_options(_client_settings, "login")
def ask_connection_set_gateway(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_id: GatewayArgument,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Say through which gateway a device was last heard of."""
    _ask_connection(login(), tenant_id, device_id, "set-last-gw", as_json=as_json, gateway_id=gateway_id)


@connection_app.command("get-gateway")
@with_options(_client_settings, "login")
def ask_connection_get_gateway(
    *, tenant_id: TenantArgument, device_id: DeviceArgument, as_json: JsonOption = False, login: Login
) -> None:
    """Get the gateway through which a device was last heard of."""
    _ask_connection(login(), tenant_id, device_id, "get-last-gw", as_json=as_json)


@connection_app.command("set-instance")
@with_options(_client_settings, "login")
def ask_connection_set_instance(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    instance_id: InstanceArgument,
    lifespan: Annotated[
        int,
        typer.Option(
            "--lifespan", metavar="SECONDS", min=-1, max=2**31 - 1, help="End it after this time; -1 is never."
        ),
    ] = -1,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Say which adapter instance handles a device's commands."""
    from kamado.amqp.codec import Int

    _ask_connection(
        login(),
        tenant_id,
        device_id,
        "set-cmd-handling-adapter-instance",
        as_json=as_json,
        adapter_instance_id=instance_id,
        lifespan=Int(lifespan),
    )


@connection_app.command("remove-instance")
@with_options(_client_settings, "login")
def ask_connection_remove_instance(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    instance_id: InstanceArgument,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Say that an adapter instance no longer handles a device's commands."""
    subject = "remove-cmd-handling-adapter-instance"
    _ask_connection(login(), tenant_id, device_id, subject, as_json=as_json, adapter_instance_id=instance_id)


@connection_app.command("get-instances")
@with_options(_client_settings, "login")
def ask_connection_get_instances(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="GATEWAY...", help="Gateways that may act for the device, as `via` lists them."),
    ] = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Get the adapter instances that handle a device's commands, itself or through a gateway."""
    subject, body = "get-cmd-handling-adapter-instances", json.dumps({"gateway-ids": gateway_ids or []}).encode()
    _ask_connection(login(), tenant_id, device_id, subject, as_json=as_json, body=body)


def _check_key_pair(cert_file: Path | None, key_file: Path | None) -> None:
    if key_file is not None and cert_file is None:
        raise typer.BadParameter("--cert-file is missing: certificate and key come as a pair")
    if cert_file is None or key_file is not None:
        return
    try:
        has_key = b"PRIVATE KEY" in cert_file.read_bytes()
    except OSError as error:
        fail(f"{cert_file} cannot be read: {error.strerror}", WRONG_CONFIGURATION)
    if not has_key:
        raise typer.BadParameter(f"--key-file is missing: {cert_file} holds no key")


def _login(username: str | None, credentials_file: Path | None, config: "Config", options: str) -> tuple[str, str]:
    """Return name and password; `options` are for a hint what to do about a login that was lost."""
    if username is not None:
        password = os.environ.get("KAMADO_ASK_PASSWORD")
        return username, ask_secret("the variable KAMADO_ASK_PASSWORD") if password is None else password
    path = credentials_file or config.login_dir / "adapter.credentials"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}."
        if credentials_file is None and isinstance(error, FileNotFoundError):
            again = f"{_own_command()} identity passwd adapter{options} > {shlex.quote(str(path))}"
            text += f" The first `kamado serve` writes it. If it was lost, make a new password: (umask 077; {again})."
        fail(f"{text} Or name another file with --credentials-file, or log in with --username", WRONG_CONFIGURATION)
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    if not {"username", "password"} <= found.keys():
        fail(f"{path} has no lines username= and password=", WRONG_CONFIGURATION)
    return found["username"], found["password"]


def _ask(
    settings: "ClientSettings",
    address: str,
    subject: str,
    *,
    as_json: bool,
    body: bytes | None = None,
    properties: dict[str, object] | dict[str, str] | None = None,
) -> NoReturn:
    from kamado.amqp.client import AskError, ask

    try:
        reply = asyncio.run(ask(settings, address, subject=subject, application_properties=properties, body=body))
    except AskError as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error), "condition": error.condition}, ensure_ascii=False))
        else:
            say(str(error))
        raise typer.Exit(_failure_status(error)) from error
    _print_reply(reply, as_json=as_json)
    raise typer.Exit(_exit_status(reply.status))


def _failure_status(error: "AskError") -> int:
    """What a request without a reply comes to; where an adapter makes a status of it, the same one (amqp-apis 4.3)."""
    from kamado.amqp.client import AuthenticationFailed, LinkRefused, RequestRejected, RequestReleased

    match error:
        case AuthenticationFailed():
            return LOGIN_REFUSED
        case RequestReleased():
            return _exit_status(503)
        case LinkRefused() | RequestRejected():
            usual = 404 if isinstance(error, LinkRefused) else 400
            return _exit_status(CONDITIONS.get(error.condition or "", usual))
        case _:
            return UNAVAILABLE


def _exit_status(status: int | None) -> int:
    match status:
        case 200 | 201 | 204:
            return OK
        case 404:
            return REFUSED
        case 403:
            return NOT_ALLOWED
        case None:
            return INTERNAL
        case _:
            return WRONG_REQUEST if status < 500 else UNAVAILABLE


def _print_reply(reply: "Reply", *, as_json: bool) -> None:
    payload: object = None
    if reply.payload:
        try:
            payload = json.loads(reply.payload)
        except ValueError:
            payload = reply.payload.decode(errors="replace")
    properties = {name: value for name, value in reply.application_properties.items() if isinstance(value, str | int)}
    if as_json:
        answer = {
            "status": reply.status,
            "cache-control": reply.cache_control,
            "application-properties": properties,
            "payload": payload,
        }
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    from http import HTTPStatus

    try:
        phrase = HTTPStatus(reply.status or 0).phrase
    except ValueError:
        phrase = "no status: an adapter would not accept this reply"
    typer.echo(f"{reply.status} {phrase}")
    if reply.cache_control is not None:
        typer.echo(f"cache_control: {reply.cache_control}")
    for name, value in properties.items():
        if name not in {"status", "cache_control"}:
            typer.echo(f"{name}: {value}")
    if payload is not None:
        print_json(payload)


# explain


def _explain(
    config: Path | None,
    assignments: list[str] | None,
    question: Callable[["Explainer"], Awaitable["Explanation"]],
    *,
    as_json: bool,
) -> NoReturn:
    """Ask the database itself, undo what that wrote, say what came of it."""
    from kamado.app import build_core
    from kamado.explain import DryRunHook, DryRunStore, Explainer

    settings = _load(config, assignments).config

    async def explain(store: "Store") -> "Explanation":
        hook = None if settings.provisioning.hook.url is None else DryRunHook()
        core = build_core(settings, DryRunStore(store), hook=hook)
        try:
            return await question(Explainer(core.lookup, hook))
        finally:
            core.passwords.close()

    explanation = asyncio.run(_with_store(settings, explain, may_create=False))
    if as_json:
        typer.echo(json.dumps(explanation.as_json(), ensure_ascii=False))
    else:
        typer.echo(explanation.headline)
        typer.echo(explanation.text)
    raise typer.Exit(_exit_status(explanation.status))


@explain_app.command("tenant")
def explain_tenant(
    *,
    tenant_id: TenantCriterion = None,
    subject_dn: SubjectDnOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Why a tenant is not found."""
    body = _tenant_criterion(tenant_id, subject_dn)
    _explain(config, assignments, lambda explainer: explainer.explain_tenant(body), as_json=as_json)


@explain_app.command("assert")
def explain_assert(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_id: ViaOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Why a device is not asserted."""
    _explain(
        config,
        assignments,
        lambda explainer: explainer.explain_assert(tenant_id, device_id, gateway_id),
        as_json=as_json,
    )


@explain_app.command("credentials")
def explain_credentials(
    *,
    tenant_id: TenantArgument,
    type_: TypeArgument,
    auth_id: AuthIdArgument = None,
    certificate: CertificateOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Why credentials are not found, or a device is not provisioned."""
    body = _credentials_criterion(type_, auth_id, certificate)
    _explain(
        config,
        assignments,
        lambda explainer: explainer.explain_credentials(tenant_id, body),
        as_json=as_json,
    )
