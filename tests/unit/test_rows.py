"""The tables of the specification as tests see them (`tests/rows.py`)."""

import pytest
from tests.rows import SECTIONS, Section, check_rows, read_rows


def test_rows_of_a_section() -> None:
    rows = read_rows("management-api 13.1")
    assert list(rows) == [*map(str, range(1, 12)), "11a", *map(str, range(12, 16))]
    assert rows["9"] == "`PUT /v1/tenants/A`, J, empty body"


def test_sections_have_all_their_rows() -> None:
    counts = {section: len(read_rows(section)) for section in SECTIONS}
    letters = {"L": 13, "M": 13, "T": 20, "R": 20, "C": 26, "D": 10, "X": 7}
    assert list(read_rows("amqp-apis 14")) == [f"{one}{n + 1}" for one, count in letters.items() for n in range(count)]
    assert sum(counts[f"management-api 13.{n}"] for n in range(1, 6)) == 135 + 1  # and 11a
    assert (counts["authentication 6"], counts["provisioning 3.8"], counts["provisioning 3.2"]) == (25, 20, 16)


def test_tests_of_a_row_are_found(request: pytest.FixtureRequest) -> None:
    node = request.node
    node.add_marker(pytest.mark.row("management-api 13.1", 1, "11a"))
    node.add_marker(Section("amqp-apis 14").row("T1"))
    assert check_rows([node]) == {
        "management-api 13.1": {"1": [node], "11a": [node]},
        "amqp-apis 14": {"T1": [node]},
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("management-api 13.1", 999), "no row 999"),
        (("management-api 99", 1), "no section"),
        (("management-api 13.1",), "no row is named"),
    ],
)
def test_rows_that_there_are_not_are_refused(
    request: pytest.FixtureRequest, arguments: tuple[object, ...], says: str
) -> None:
    request.node.add_marker(pytest.mark.row(*arguments))
    with pytest.raises(pytest.UsageError, match=says):
        check_rows([request.node])
