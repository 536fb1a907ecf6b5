"""`kamado load` and `kamado copy`: much data at once, straight into the database."""

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kamado.commands.configured import ConfigOption, SetOption, load_configuration, with_passwords
from kamado.errors import Unavailable
from kamado.terminal import OK, REFUSED, UNAVAILABLE, WRONG_DATA, fail, printable, progress_bar, read_first_line, say

if TYPE_CHECKING:
    from kamado.config import Config
    from kamado.passwords import PasswordHasher
    from kamado.store import Store
    from kamado.transfer import Comparison

__all__ = ["copy", "load"]

_COPY_CONNECT_TIMEOUT = 10.0
_COPY_STATEMENT_TIMEOUT = 300.0


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

    settings = load_configuration(config, assignments).config
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
        return await with_passwords(config, apply, may_create=True)
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
