"""Every setting, command and option is documented, and the documentation names nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.core
import typer.main

from kamado.cli import app
from kamado.config import settings
from kamado.errors import Reason
from kamado.explain import SENTENCES

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"


def commands(command: object, name: str = "kamado") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    if isinstance(command, typer.core.TyperGroup):
        for child, sub in command.commands.items():
            yield from commands(sub, f"{name} {child}")
    else:
        assert isinstance(command, typer.core.TyperCommand)
        yield name, command


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_every_setting_stands_with_its_default_and_line_in_the_documentation() -> None:
    text = (DOCS / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*) \|$", text, re.MULTILINE))
    assert list(rows) == list(settings())
    for key, setting in settings().items():
        default, doc = rows[key].split(" | ", 1)
        assert doc == setting.doc, key
        if default == "–":
            assert setting.default is None, key
        elif default == "empty":
            assert not setting.default, key
        elif default != "see there":
            assert default.strip("`") == setting.kind.show(setting.default).strip('"'), key


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_in_the_documentation(name: str) -> None:
    text = (DOCS / "command-line.md").read_text()
    assert re.search(rf"{name}\b", text)
    for parameter in COMMANDS[name].params:
        for option in parameter.opts:
            assert not option.startswith("--") or option in text, f"{name} {option}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, typer.core.TyperOption):
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_settings_and_commands_named_in_the_documentation_exist(page: Path) -> None:
    text = page.read_text()
    known = set(settings())
    sections = {key.rpartition(".")[0] for key in known}
    for name in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
        if name.split(".")[0] in {section.split(".")[0] for section in sections} and not name.endswith(
            (".json", ".md", ".py")
        ):
            assert name in known | sections, f"{page.name}: {name}"
    groups_with_commands = "identity|operator|ask|explain|tenant|device|credentials"
    for words in re.findall(rf"\bkamado ((?:{groups_with_commands}) [a-z]+|[a-z-]+)", text):
        groups = {command.split()[1] for command in COMMANDS}
        if words.split()[0] in groups:
            assert any(command.startswith(f"kamado {words}") for command in COMMANDS), f"{page.name}: kamado {words}"


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_reason_has_a_sentence() -> None:
    assert set(SENTENCES) == set(Reason)
