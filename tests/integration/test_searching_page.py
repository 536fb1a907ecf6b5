"""`docs/searching.md`, command by command, against what `make serve` starts."""

from collections.abc import Iterator

import pytest
from tests.integration.pages import PROJECT, Example, Step, assert_shown, read_steps

PAGE = PROJECT / "docs" / "searching.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    example = Example(tmp_path_factory.mktemp("searching"))
    example.start()
    try:
        yield example
        example.registry.stop()
    finally:
        example.registry.kill()


@pytest.mark.parametrize("step", read_steps(PAGE), ids=lambda step: f"line-{step.line}")
def test_commands_print_what_the_page_shows(example: Example, step: Step) -> None:
    assert_shown(step, example.run(step))
