"""Writes the table of `docs/conformance.md`: each row of the specification and the tests that prove it.

    make conformance

The tests are those that pytest collects, their rows those of their marks (`tests/rows.py`). A row without a test needs
a reason here. `tests/unit/test_conformance.py` fails if the page is out of date.
"""

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from tests.databases import kind_of
from tests.rows import SECTIONS, check_rows, read_rows

__all__ = ["Problems", "main", "make_table"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conformance.md"
BEGIN = "<!-- From here on written by `make conformance`. -->\n"

_TOKENS = "the Authentication API and tokens are not built yet"
_EVENTS = "provisioning events are not sent yet"
_SERVER = "an external Authentication Server is not built yet"

WITHOUT_TEST: dict[str, dict[str, str]] = {
    "amqp-apis 14": {
        "X1-X7": "not offered (`amqp-apis` 13): the Command Router of Hono works beside Kamado; its links are refused "
        "with `amqp:not-found`",
    },
    "authentication 6": {"10-14": _TOKENS, "20-21": _SERVER, "25": _TOKENS},
    "provisioning 3.2": {"15": _EVENTS},
    "provisioning 3.8": {"20": _EVENTS},
}
"""Section -> rows, single or from-to -> why no test proves them. Remove what has got its test."""

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
"""What the page calls them; rows whose tests need none have a dash."""

NOTES: dict[str, dict[str, str]] = {
    "authentication 6": {
        "20-21": "what they ask of a slow or failing provider is shown with a fake one in `unit/amqp/test_server.py`",
        "22": "with the end of a login instead of a token's, after 2 s instead of 5",
    },
}
"""Section -> rows -> what else there is to say."""


class Problems(Exception):
    """The table cannot be made; all that is wrong, one on each line."""


Tests = Mapping[str, Mapping[str, Sequence[pytest.Item]]]


class _Collector:
    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def collect() -> list[pytest.Item]:
    """Collect all tests, in a process that runs none."""
    collector, output = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main(["--collect-only", "-q", "-p", "no:xdist", str(ROOT / "tests")], plugins=[collector])
    if status != pytest.ExitCode.OK:
        text = output.getvalue()
        raise Problems(text[max(text.find(" ERRORS "), 0) :])
    return collector.items


def _expand(section: str, table: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return row -> text for the rows of a section in one of the tables above."""
    rows = list(read_rows(section))
    found = {}
    for key, text in table.get(section, {}).items():
        first, _, last = key.partition("-")
        for row in rows[rows.index(first) : rows.index(last or first) + 1]:
            found[row] = text
    return found


def _name(item: pytest.Item) -> tuple[str, str]:
    """Return file and test without the case."""
    path, _, name = item.nodeid.partition("::")
    return path.removeprefix("tests/"), name.partition("[")[0]


def _cases(items: Iterable[pytest.Item]) -> dict[tuple[str, str], list[str]]:
    """Return the ids of each test's cases; a case is one, on however many databases it is run."""
    cases: dict[tuple[str, str], list[str]] = {}
    for item in items:
        case = item.nodeid.partition("[")[2].removesuffix("]").removeprefix(kind_of(item) or "").removeprefix("-")
        known = cases.setdefault(_name(item), [])
        if case not in known:
            known.append(case)
    return cases


def _show(items: Sequence[pytest.Item], all_cases: Mapping[tuple[str, str], Sequence[str]]) -> Iterator[str]:
    """Show tests: with the cases only where others of the same test prove something else."""
    for (path, name), ids in _cases(items).items():
        which = "" if len(ids) == len(all_cases[path, name]) else f" ({', '.join(f'`{case}`' for case in ids)})"
        yield f"`{path}::{name}`{which}"


def _show_databases(items: Sequence[pytest.Item]) -> str:
    """Name the databases that tests are run on."""
    kinds = {kind_of(item) for item in items}
    return ", ".join(name for kind, name in DATABASES.items() if kind in kinds) or "–"


def make_table(items: Sequence[pytest.Item]) -> str:
    """Write the generated part of the page.

    Raises:
        Problems: A row has neither a test nor a reason, or both.
    """
    tests: Tests = check_rows(items)
    all_cases = _cases(items)
    problems, lines = [], []
    for section in SECTIONS:
        reasons, notes = _expand(section, WITHOUT_TEST), _expand(section, NOTES)
        lines += [f"### {section}", "", "| Row | Tests | On |", "| --- | --- | --- |"]
        for row in read_rows(section):
            found = tests.get(section, {}).get(row, ())
            if not found and row not in reasons:
                problems.append(f"{section}, row {row}: no test, and no reason in tests/conformance.py")
            elif found and row in reasons:
                problems.append(f"{section}, row {row}: there is a test, so remove the reason in tests/conformance.py")
            texts = [", ".join(_show(found, all_cases)) if found else f"none: {reasons.get(row)}"]
            if row in notes:
                texts.append(notes[row])
            lines.append(f"| {row} | {'; '.join(texts)} | {_show_databases(found)} |")
        lines.append("")
    if problems:
        raise Problems("\n".join(problems))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with `--check` say whether it is up to date."""
    try:
        table = make_table(collect())
    except Problems as error:
        print(error, file=sys.stderr)
        return 1
    text = PAGE.read_text()
    written = text[: text.index(BEGIN) + len(BEGIN)] + "\n" + table
    if "--check" not in arguments:
        PAGE.write_text(written)
    elif text != written:
        print("docs/conformance.md is out of date: run make conformance", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
