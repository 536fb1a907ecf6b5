"""`docs/searching.md`, command by command, against what `make serve` starts."""

import pytest
from tests.integration.pages import PROJECT, Example, Step, assert_shown, read_steps

PAGE = PROJECT / "docs" / "searching.md"


# The steps build on each other: run them in order, in one process (`--dist loadfile` keeps them together).
@pytest.mark.parametrize("step", read_steps(PAGE), ids=lambda step: f"line-{step.line}")
def test_commands_print_what_the_page_shows(example: Example, step: Step) -> None:
    assert_shown(step, example.run(step))
