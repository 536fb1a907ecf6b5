"""What commands share: exit statuses, lines and tables for people, questions on the terminal.

Results go to standard output, everything else to standard error. Colours and bars appear on a terminal only. Knows
nothing of what the commands are about.
"""

import inspect
import json
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
    "REFUSED",
    "UNAVAILABLE",
    "WRONG_CONFIGURATION",
    "WRONG_DATA",
    "WRONG_REQUEST",
    "ask_secret",
    "fail",
    "print_json",
    "print_table",
    "progress_bar",
    "read_first_line",
    "say",
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
LOGIN_REFUSED = 77
WRONG_CONFIGURATION = 78


def say(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(text, err=True)


def fail(text: str, status: int) -> NoReturn:
    """Print a line to standard error and end with an exit status."""
    say(text)
    raise typer.Exit(status)


def ask_secret(otherwise: str, *, what: str = "Password", confirm: bool = False) -> str:
    """Ask for a secret on the terminal; it is not shown.

    Args:
        otherwise: What to use where there is no terminal, for the error.
        what: Shown before it is typed.
        confirm: Ask twice.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"there is no terminal to ask for the {what.lower()} on; use {otherwise}")
    answer: str = typer.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


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


def print_json(value: object) -> None:
    """Print JSON for people, in colours on a terminal."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print_json(text, ensure_ascii=False)
    else:
        typer.echo(text)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """Show a bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
