"""Runs the commands of a page of the documentation, and compares what they print with what the page shows.

A fenced block `sh` holds commands, the block `text` that follows what they print. Of the output a page shows the lines
that matter, in order and whole; ids, times, hashes and long Base64 may differ.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.integration.registry import PATIENCE, Registry

__all__ = ["PROJECT", "Example", "Step", "assert_shown", "read_steps"]

PROJECT = Path(__file__).parents[2]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VARIABLE = [
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<id>"),
    # Expiries that a page chooses are far away; everything else is about now.
    (re.compile(r"20[23]\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "<time>"),
    (re.compile(r"\$2a\$\d\d\$[./A-Za-z0-9]{53}"), "<hash>"),
    (re.compile(r"[A-Za-z0-9+/]{60,}={0,2}"), "<base64>"),
]


@dataclass(frozen=True)
class Step:
    """Commands of a page and what they print."""

    line: int
    commands: str
    shown: str | None


def read_steps(page: Path) -> list[Step]:
    """Read the steps of a page, in order."""
    text = page.read_text()
    blocks = [(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in _BLOCK.finditer(text)]
    steps = []
    for index, (language, content, line) in enumerate(blocks):
        if language == "sh":
            following = blocks[index + 1] if index + 1 < len(blocks) else ("", "", 0)
            steps.append(Step(line, content, following[1] if following[0] == "text" else None))
    return steps


def assert_shown(step: Step, output: str) -> None:
    """Check that the output has the lines that the page shows, in the same order."""
    assert step.shown, f"line {step.line}: the page does not show what is printed:\n{output}"
    lines = iter(_normalise(output).splitlines())
    for line in _normalise(step.shown).splitlines():
        assert any(line == printed for printed in lines), f"line {step.line}: {line!r} is not printed:\n{output}"


def _normalise(text: str) -> str:
    for pattern, name in _VARIABLE:
        text = pattern.sub(name, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


class Example:
    """What `make serve` starts, in a directory of its own and on ports that the system chooses.

    Args:
        directory: Stands for the project's directory.
        url: The database, if it is not the file that the example's configuration names.
    """

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("KAMADO_")}
        self.database = str(directory / "var" / "guide" / "kamado.db")
        """As the start-up lines show it."""
        if not url.startswith("sqlite:"):
            password = urlsplit(url).password
            assert password
            self.database = url.replace(password, "***")
            self._environment |= {
                f"KAMADO_{name.upper().replace('.', '__')}": value for name, value in PATIENCE.items()
            }
            self._environment |= {"KAMADO_STORAGE__URL": url, "KAMADO_AUTH__FIRST_LOGIN_DIR": f"{directory}/var/guide"}
        shutil.copytree(PROJECT / "examples", directory / "examples")
        self._exports = ""
        serve = self._make_serve_lines()
        assert serve[1].endswith("serve --config examples/guide/kamado.toml"), serve
        self.prepare = self._own(serve[0])
        self.registry = Registry(
            directory / "process",
            {"http.insecure.port": "0", "amqp.insecure.port": "0", "health.port": "0"},
            only_settings=True,
            environment=self._environment,
        )
        self.registry.config_file = directory / "examples" / "guide" / "kamado.toml"
        self.registry.data_dir = directory / "var" / "guide"

    @staticmethod
    def _make_serve_lines() -> list[str]:
        """What the Makefile runs for `make serve`, after the installation."""
        text = (PROJECT / "Makefile").read_text()
        recipe = text[text.index("\nserve:") :].split("\n\n", 1)[0]
        return [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[2:]]

    def start(self) -> None:
        """Do what `make serve` does."""
        subprocess.run(["/bin/sh", "-c", self.prepare], cwd=self.directory, check=True, timeout=60)
        self.registry.start()

    def _own(self, commands: str) -> str:
        """Put this interpreter and this registry's addresses in place of those on the page."""
        programs = {"kamado": f"{sys.executable} -m kamado", "python": sys.executable}
        commands = re.sub(r"(?<!\S)\.venv/bin/(\w+)", lambda match: programs[match[1]], commands)
        if "http://localhost:28080" in commands:
            commands = commands.replace("http://localhost:28080", self.registry.http_url)
        return commands

    def run(self, step: Step) -> str:
        """Run the commands of a step in a shell and return what they print; variables live on."""
        script = self._own(self._exports + step.commands)
        self._exports += "".join(f"{line}\n" for line in step.commands.splitlines() if line.startswith("export "))
        environment = dict(self._environment)
        if self.registry.addresses:
            environment["KAMADO_ASK_URL"] = self.registry.addresses["amqp"]
        result = subprocess.run(
            ["/bin/sh", "-c", script],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            # As on a terminal, but for the progress of curl.
            stderr=subprocess.PIPE if "curl " in step.commands else subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        output = f"{result.stdout}{result.stderr or ''}"
        assert "Traceback" not in output, output
        assert result.returncode in {0, 1}, f"line {step.line} ended with {result.returncode}: {output}"
        return result.stdout.replace(self.registry.http_url, "http://localhost:28080")

    def get(self, path: str) -> dict[str, object]:
        """Read a resource over HTTP."""
        value = json.loads(self.registry.request("GET", path).body)
        assert isinstance(value, dict)
        return value
