"""The table of `docs/conformance.md` is that of the tests."""

import subprocess
import sys

import pytest
from tests.conformance import ROOT, Problems, make_table


def test_the_page_is_up_to_date_and_every_row_has_a_test_or_a_reason() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.conformance", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_row_without_test_and_reason_is_a_problem() -> None:
    with pytest.raises(Problems) as problems:
        make_table([])
    lines = str(problems.value).splitlines()
    assert "management-api 13.2, row 16: no test, and no reason in tests/conformance.py" in lines
    # These have reasons.
    assert not [line for line in lines if line.startswith("amqp-apis 14, row X")]


def test_a_reason_for_a_row_with_a_test_is_a_problem(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.row("amqp-apis 14", "X7"))
    with pytest.raises(Problems, match="amqp-apis 14, row X7: there is a test, so remove the reason"):
        make_table([request.node])
