"""The rows of the specification's tables, and how a test says which of them it proves.

    @pytest.mark.row("management-api 13.5", 113, 114)

    ROWS = Section("management-api 13.5")
    @ROWS.row(113, 114)
    @pytest.mark.parametrize("query", [ROWS.case("117-text", "pageSize=x"), ROWS.case("117-size", "pageSize=201")])

A row that the specification does not have is an error before any test runs (`tests/conftest.py`).
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest

__all__ = ["SECTIONS", "Section", "check_rows", "read_rows"]

SPECIFICATION = Path(__file__).parents[1] / "docs" / "specification"

SECTIONS = (
    "amqp-apis 4.3",
    "amqp-apis 14",
    "authentication 6",
    "management-api 13.1",
    "management-api 13.2",
    "management-api 13.3",
    "management-api 13.4",
    "management-api 13.5",
    "provisioning 3.2",
    "provisioning 3.8",
)
"""Those whose tables number what is to be tested: the page, and the number of its section."""


@cache
def read_rows(section: str) -> dict[str, str]:
    """Read the table of a section.

    Returns:
        The number of each row, and what its second column says, in their order.
    """
    page, number = section.split()
    lines = (SPECIFICATION / f"{page}.md").read_text().splitlines()
    begin = next(index for index, line in enumerate(lines) if re.match(rf"#+ {re.escape(number)}\.? ", line))
    rows: dict[str, str] = {}
    is_table = False
    for line in lines[begin + 1 :]:
        if line.startswith("#"):
            break
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            is_table = False
        elif cells[0] == "#":
            is_table = True
        elif is_table and not set(cells[0]) <= {"-", ":"}:
            assert cells[0] not in rows, f"{section} has two rows {cells[0]}"
            rows[cells[0]] = cells[1]
    assert rows, f"{section} has no table of rows"
    return rows


class Section:
    """A section of the specification, for tests of its rows.

    Args:
        name: Page and number, such as `amqp-apis 14`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def row(self, *rows: int | str) -> pytest.MarkDecorator:
        """Mark a test, a class or a case with the rows that it proves."""
        return pytest.mark.row(self.name, *rows)

    def case(self, identifier: str, *values: object, also: Sequence[pytest.MarkDecorator] = ()) -> object:
        """Make a case for `parametrize`.

        Args:
            identifier: Of the case: the row that it proves and, after a dash, which case of that row it is.
            values: As for `pytest.param`.
            also: Further marks.
        """
        return pytest.param(*values, id=identifier, marks=[self.row(identifier.partition("-")[0]), *also])


def check_rows(items: Iterable[pytest.Item]) -> dict[str, dict[str, list[pytest.Item]]]:
    """Find the tests of each row.

    Returns:
        Section -> row -> tests, in the order of the tests; nothing for rows without.

    Raises:
        UsageError: A test names a section or a row that there is not.
    """
    tests: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        for mark in item.iter_markers("row"):
            section, *rows = map(str, mark.args)
            if section not in SECTIONS or not rows:
                raise pytest.UsageError(f"{item.nodeid}: {section} is no section with rows, or no row is named")
            for row in rows:
                if row not in read_rows(section):
                    raise pytest.UsageError(f"{item.nodeid}: {section} has no row {row}")
                found = tests.setdefault(section, {}).setdefault(row, [])
                if item not in found:
                    found.append(item)
    return tests
