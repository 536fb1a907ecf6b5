"""Imports point down: docs/architecture.md, "Imports point down"."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "kamado"

ROWS = [
    {"errors"},
    {"document"},
    {"x509"},
    {"tenants", "devices", "credentials", "search"},
    {"store", "passwords", "listeners"},
    {"auth"},
    {"provisioning", "operators"},
    {"lookup", "connections", "management", "load", "transfer"},
    {"http", "amqp", "storage"},
    {"config", "log", "metrics", "terminal", "profiles", "edits", "processes"},
    {"explain"},
    {"app"},
    {"worker"},
    {"supervisor"},
    {"operate", "commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
PACKAGES = {"http", "amqp", "storage"}
# Libraries that only one room may know.
ROOMS = {
    "sqlite3": {"storage"},
    "asyncpg": {"storage"},
    "uvicorn": {"http"},
    "httptools": {"http"},
    "typer": {"cli", "commands", "operate", "terminal"},
    "rich": {"terminal"},
    "cryptography": {"x509", "http", "app"},
    "bcrypt": {"passwords"},
    "prometheus_client": {"metrics"},
    "proton": set(),
    "httpx": {"http"},
}


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    assert room in RANK, f"{room} has no row in docs/architecture.md"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "kamado" and len(parts) > 1 and parts[1] != "__version__":
            if parts[1] == room and room in PACKAGES | {"commands", "operate"}:
                continue
            assert RANK[parts[1]] < RANK[room], f"{room} must not import {name}"
            if room not in {"app", "worker", "supervisor", "cli", "commands", "operate", "__main__"}:
                assert parts[1] not in PACKAGES | {"config", "log", "metrics", "terminal"}, (
                    f"{room} must not import {name}"
                )
        elif parts[0] in ROOMS:
            assert room in ROOMS[parts[0]], f"{room} must not import {name}"


def test_every_file_has_its_line_in_the_architecture() -> None:
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    tree = text[text.index("## The tree") : text.index("## Imports point down")]
    for path in FILES:
        assert path.name in tree, f"{path.relative_to(SOURCE)} is not in docs/architecture.md"
