"""Lists and searches: their options, how what they find is printed, and when that is nothing."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kamado.document import JsonObject
from kamado.edits import find_member, parse_filter, parse_member, parse_sort, show_value
from kamado.errors import BadRequest
from kamado.operate.connection import Connect, registry
from kamado.terminal import OK, REFUSED, RowPrinter, fail, json_text, print_lines, printable, say, with_options

if TYPE_CHECKING:
    from kamado.http.client import Page, RegistryClient

__all__ = [
    "Column",
    "ColumnOption",
    "Form",
    "GatewaysOption",
    "Listing",
    "SearchOf",
    "chosen_columns",
    "chosen_form",
    "list_resources",
    "search_resources",
    "with_search",
]

MAX_PAGE_SIZE: Final = 200
"""Objects (management 7.1)."""

ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="MEMBER", help="Show these members in place of the usual ones. Repeatable."),
]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="FIELD=VALUE",
        help="ext.brand=AC* or /ext/brand=AC*: true, false and numbers are those, all else is text, in which * stands "
        "for any characters and ? for one; text in double quotes is text. All filters must match. Repeatable.",
    ),
]
SortOption = Annotated[
    list[str] | None,
    typer.Option("--sort", metavar="FIELD[:desc]", help="Sort by a field, then by the next. Default: id. Repeatable."),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Show no more than N.")]
OffsetOption = Annotated[int, typer.Option("--offset", min=0, metavar="N", help="Leave out the first N matches.")]
PageSizeOption = Annotated[
    int, typer.Option("--page-size", min=1, max=MAX_PAGE_SIZE, metavar="N", help="Ask for N at a time.")
]
CountOption = Annotated[bool, typer.Option("--count", help="Print how many match, and nothing else.")]
GatewaysOption = Annotated[
    bool | None, typer.Option("--gateways/--no-gateways", help="Only devices that are gateways, or are none.")
]


class Form(StrEnum):
    TABLE = "table"
    LINES = "lines"
    IDS = "ids"


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    value: Callable[[JsonObject], object]

    @classmethod
    def of(cls, title: str, *member: str) -> "Column":
        return cls(title, lambda resource: find_member(resource, member))

    def cell(self, resource: JsonObject) -> str:
        return printable(show_value(self.value(resource)))


class Listing:
    """Prints resources as they come, page by page."""

    def __init__(self, form: Form, columns: Sequence[Column]) -> None:
        self._form = form
        self._columns = columns
        self._table = RowPrinter([column.title for column in columns])
        self.shown = 0

    def print(self, resources: Sequence[JsonObject]) -> None:
        """Print a page."""
        self.shown += len(resources)
        if not resources:
            return
        match self._form:
            case Form.IDS:
                print_lines([printable(str(one["id"])) for one in resources])
            case Form.LINES:
                print_lines([json_text(one) for one in resources])
            case Form.TABLE:
                self._table.print([[column.cell(one) for column in self._columns] for one in resources])


def chosen_columns(usual: Sequence[Column], names: list[str] | None) -> Sequence[Column]:
    """Return the columns that `--column` names, or the usual ones."""
    if not names:
        return usual
    try:
        return [Column.of(name, *parse_member(name)) for name in names]
    except BadRequest as error:
        raise typer.BadParameter(str(error)) from None


def chosen_form(*, as_json: bool, quiet: bool) -> Form:
    """Return the form that `--json` and `--quiet` ask for."""
    if as_json and quiet:
        raise typer.BadParameter("use either --json or --quiet")
    return Form.LINES if as_json else Form.IDS if quiet else Form.TABLE


def list_resources(connect: Connect, path: tuple[str, ...], listing: Listing) -> None:
    """Print everything there is; nothing at all is no fault."""
    with registry(connect) as client:
        for page in _found(client, path, client.search(*path)):
            listing.print(page.result)


def _found(client: "RegistryClient", path: tuple[str, ...], pages: Iterator["Page"]) -> Iterator["Page"]:
    """Let a search without match be one of no pages: 404 says that, or that there is no such tenant (7.5)."""
    from kamado.http.client import ErrorAnswer

    try:
        yield from pages
    except ErrorAnswer as error:
        if error.status != 404:
            raise
        if len(path) > 1:
            client.get("tenants", path[1])
        else:
            client.check_search_is_known(*path, error=error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What the options say about a search."""

    filters: Sequence[JsonObject]
    sort: Sequence[JsonObject]
    limit: int | None
    offset: int
    page_size: int
    count: bool

    def query(self) -> list[tuple[str, str]]:
        """The parameters (management 7.1)."""
        parameters = [("filterJson", one) for one in self.filters] + [("sortJson", one) for one in self.sort]
        return [(name, json.dumps(value, ensure_ascii=False)) for name, value in parameters]


def _search_options(
    *,
    filters: FilterOption = None,
    sort: SortOption = None,
    limit: LimitOption = None,
    offset: OffsetOption = 0,
    page_size: PageSizeOption = MAX_PAGE_SIZE,
    count: CountOption = False,
) -> _Search:
    try:
        return _Search(
            filters=[parse_filter(one) for one in filters or ()],
            sort=[parse_sort(one) for one in sort or ()],
            limit=limit,
            offset=offset,
            page_size=page_size,
            count=count,
        )
    except BadRequest as error:
        raise typer.BadParameter(str(error)) from None


with_search = with_options(_search_options, "search_of")
SearchOf = Callable[[], _Search]


def search_resources(
    connect: Connect,
    path: tuple[str, ...],
    search: _Search,
    listing: Listing,
    *,
    more: Sequence[tuple[str, str]] = (),
    quiet: bool,
) -> None:
    """Print what a search finds, and how much that is; nothing at all is told, with exit status 1.

    Args:
        more: Parameters that only one kind of resource has.
    """
    query = [*search.query(), *more]
    total: int | None = None
    with registry(connect) as client:
        if search.count:
            for page in _found(client, path, client.search(*path, query=query, page_size=1)):
                total = page.total
                break
            print_lines([str(total or 0)])
            raise typer.Exit(OK if total else REFUSED)
        size = search.page_size if search.limit is None else min(search.page_size, search.limit)
        pages = client.search(*path, query=query, page_size=size, offset=search.offset, by_id=not search.sort)
        for page in _found(client, path, pages):
            total = page.total if total is None else total
            rest = len(page.result) if search.limit is None else search.limit - listing.shown
            listing.print(page.result[:rest])
            if listing.shown == search.limit:
                break
    if not total and not listing.shown:
        numbers = [one for one in search.filters if not isinstance(one["value"], str)]
        hint = ""
        if numbers:
            field_name, value = numbers[0]["field"], json.dumps(numbers[0]["value"])
            hint = f" To look for text instead of {value}: --filter '{field_name}=\"{value}\"'."
        fail(f"No match.{hint}", REFUSED)
    if not quiet and total is not None:
        say(f"{listing.shown} of {total} shown.")
