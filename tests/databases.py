"""Databases for the tests, of each kind that the registry runs on.

A test that asks for the fixture `databases`, or for one that needs it, such as `registry`, is run once on each. One
about the files of SQLite is run on those alone, and says why: `@pytest.mark.sqlite_only("the log is a file")`.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest
from tests.postgresql import PostgresqlServer

from kamado.storage import migrate

__all__ = [
    "KINDS",
    "Databases",
    "Postgresql",
    "Sqlite",
    "check_marks",
    "kind_of",
    "kinds_for",
    "make_databases",
    "query",
]


class Databases(Protocol):
    """Makes databases."""

    def create(self, directory: Path, *, is_empty: bool = False) -> str:
        """Make a database that nobody else uses and return its URL, for `storage.url`.

        Args:
            directory: Where its file goes, if it has one.
            is_empty: Without the tables; otherwise they may be there.
        """

    def drop(self, url: str) -> None:
        """Remove a database that nobody uses any more."""


class Sqlite:
    """Files; whoever opens one makes the tables."""

    def create(self, directory: Path, *, is_empty: bool = False) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{directory / 'kamado.db'}"

    def drop(self, url: str) -> None:
        """Leave the file to pytest, which removes the directory."""


class Postgresql:
    """Databases of one server, copies of one that has the tables."""

    def __init__(self, server: PostgresqlServer) -> None:
        self._server = server
        self._template = server.create_database()
        asyncio.run(migrate(self._template))

    def create(self, directory: Path, *, is_empty: bool = False) -> str:
        return self._server.create_database() if is_empty else self._server.create_database(self._template)

    def drop(self, url: str) -> None:
        self._server.drop_database(url)


def query(url: str, sql: str) -> Sequence[tuple[Any, ...]]:
    """Run a statement past the registry; return the rows."""
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            return connection.execute(sql).fetchall()

    async def ask() -> Sequence[tuple[Any, ...]]:
        connection = await asyncpg.connect(url)
        try:
            return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    return asyncio.run(ask())


KINDS = ("sqlite", "postgresql")
"""Also the ids of the tests' cases."""


def make_databases(kind: str, postgresql: Callable[[], PostgresqlServer]) -> Databases:
    """Make databases of a kind; the server is asked for only if they need it."""
    return Sqlite() if kind == "sqlite" else Postgresql(postgresql())


def kinds_for(definition: pytest.Item) -> Sequence[str]:
    """Tell on which databases a test is to be run."""
    return KINDS if definition.get_closest_marker("sqlite_only") is None else ("sqlite",)


def kind_of(item: pytest.Item) -> str | None:
    """Tell on which database a case is run; `None` for one that uses none of these."""
    call = getattr(item, "callspec", None)
    kind = None if call is None else call.params.get("databases")
    assert kind is None or isinstance(kind, str)
    return kind


def check_marks(items: Sequence[pytest.Item]) -> None:
    """Refuse tests that leave out a database without a reason."""
    for item in items:
        for mark in item.iter_markers("sqlite_only"):
            if len(mark.args) != 1 or not isinstance(mark.args[0], str):
                raise pytest.UsageError(f"{item.nodeid}: sqlite_only takes the reason")
