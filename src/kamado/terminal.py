"""What commands share: exit statuses, lines and tables for people, questions on the terminal.

Results go to standard output, everything else to standard error. Colours and bars appear on a terminal only. Knows
nothing of what the commands are about.
"""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import typer

__all__ = [
    "INTERNAL",
    "LOGIN_REFUSED",
    "NOT_ALLOWED",
    "OK",
    "OUTPUT_FAILED",
    "REFUSED",
    "UNAVAILABLE",
    "WRONG_CONFIGURATION",
    "WRONG_DATA",
    "WRONG_REQUEST",
    "RowPrinter",
    "ask_secret",
    "confirm",
    "fail",
    "json_text",
    "print_json",
    "print_lines",
    "print_table",
    "printable",
    "progress_bar",
    "read_first_line",
    "say",
    "waiting",
    "with_options",
]

# Exit statuses (docs/command-line.md); 2 is typer's own.
OK = 0
REFUSED = 1
NOT_ALLOWED = 3
WRONG_REQUEST = 4
WRONG_DATA = 65
UNAVAILABLE = 69
INTERNAL = 70
OUTPUT_FAILED = 74
LOGIN_REFUSED = 77
WRONG_CONFIGURATION = 78
READER_GONE = 141
"""What a shell makes of SIGPIPE."""


def say(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(text, err=True)


def fail(text: str, status: int) -> NoReturn:
    """Print a line to standard error and end with an exit status."""
    say(text)
    raise typer.Exit(status)


def ask_secret(otherwise: str, *, what: str = "password", confirm: bool = False) -> str:
    """Ask for a secret on the terminal; it is not shown.

    Args:
        otherwise: What to use where there is no terminal, for the error.
        what: Shown, with a capital, before it is typed.
        confirm: Ask twice.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"there is no terminal to ask for the {what} on; use {otherwise}")
    answer: str = typer.prompt(what[:1].upper() + what[1:], hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def confirm(question: str) -> bool:
    """Ask a question on the terminal; anything but yes is no."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on whether that is meant; say so with --yes")
    return typer.confirm(question, err=True)


def read_first_line(path: Path) -> str:
    """Read the first line of a file, or of standard input if it is called `-`; what cannot be read ends the command."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", WRONG_DATA)
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text", WRONG_DATA)
    return text.partition("\n")[0].removesuffix("\r")


def print_table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table whose rows are all there."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width; nothing is cut for it.
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False).print(table)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Write JSON as people read it, with what would steer a terminal as escapes (C0 is anyway)."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_STEERING = re.compile("[\x7f-\x9f]")


def print_json(value: object) -> None:
    """Print JSON for people, in colours on a terminal."""
    text = json_text(value, indent=2)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print_json(text, ensure_ascii=False)
    else:
        print_lines([text])


class RowPrinter:
    """Prints a table whose rows come bit by bit; the first of them decide how wide the columns are.

    Plain text, also on a terminal: nothing is cut, so that what is shown can be copied.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles = titles
        self._widths: list[int] = []

    def print(self, rows: Sequence[Sequence[str]]) -> None:
        """Print some rows, and the titles before the first."""
        from rich.cells import cell_len

        def line(cells: Sequence[str]) -> str:
            padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, self._widths, strict=True)]
            return "  ".join(padded).rstrip()

        lines = []
        if not self._widths:
            self._widths = [max(map(cell_len, cells)) for cells in zip(self._titles, *rows, strict=True)]
            titles = line(self._titles)
            lines.append(f"\x1b[1m{titles}\x1b[0m" if sys.stdout.isatty() else titles)
        print_lines([*lines, *map(line, rows)])


def print_lines(lines: Sequence[str]) -> None:
    """Print lines at once; if nobody reads them any more, the command ends without a word."""
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        _discard_output()
        raise typer.Exit(READER_GONE) from None
    except OSError as error:
        _discard_output()
        fail(f"the output cannot be written: {error.strerror}", OUTPUT_FAILED)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Return a text with what would steer a terminal, or end a line, written as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show on standard error, if that is a terminal, that something is going on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield


@contextmanager
def progress_bar(title: str, unit: str | None = None) -> Iterator[Callable[[int, int | None], None] | None]:
    """Show a bar on standard error, if that is a terminal.

    Args:
        title: What is going on.
        unit: What is counted, for a bar that also shows how many of them are done, and how many each second.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate = "" if task.speed is None else f", {task.speed:,.0f}/s"
            return Text(f"{task.completed:,.0f} {unit}{rate}")

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    if unit is not None:
        columns.append(Rate())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        is_first = True

        def show(done: int, total: int | None) -> None:
            nonlocal is_first
            if is_first:
                # What was done before has taken no time.
                bar.reset(task, completed=done, total=total)
                is_first = False
            bar.update(task, completed=done, total=total)

        yield show


def with_options(source: Callable[..., Any], name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `source`, and as argument `name` what calls `source` with what was given for them.

    It is called when it is needed: what is wrong with the command's own arguments is told first.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = inspect.signature(source).parameters
        own = [parameter for key, parameter in inspect.signature(command).parameters.items() if key != name]
        parameters = [*own, *options.values()]

        @wraps(command)
        def run(**values: Any) -> None:
            given = {key: values.pop(key) for key in options}
            command(**values, **{name: partial(source, **given)})

        # From these Typer makes the command line.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
