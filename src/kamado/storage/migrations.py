"""Brings a database to the schema of this version: numbered files, each applied once, in one transaction.

`schema/NNNN_name.sql` is for every dialect; `schema/NNNN_name.DIALECT.sql`, where the dialects must differ, takes its
place. A released file is never edited. A file that says "Works with schema N" leaves the database usable for versions
of Kamado that know no schema after N: they go on, and start, beside those that have applied it. What SQL alone cannot
say follows the statements as a step in Python. Knows no driver: a dialect hands in a `SchemaSession`.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Protocol

from kamado.storage.search import fill_search_tables
from kamado.storage.sql import NewerSchema, Session, UnusableFile

__all__ = ["Migration", "SchemaSession", "apply_migrations", "find_version", "load_migrations"]

_FILE = re.compile(r"(?P<number>\d{4})_(?P<name>[a-z0-9_]+)(?:\.(?P<dialect>[a-z]+))?\.sql")
_STATEMENT_END = re.compile(r";[ \t]*$", re.MULTILINE)
_WORKS_WITH = re.compile(r"^-- Works with schema (\d+)", re.MULTILINE)
_TABLE = re.compile(r"CREATE (?:UNLOGGED )?TABLE (\w+)")
_COMMENT = re.compile(r"^[ \t]*--.*$", re.MULTILINE)

CREATE_VERSIONS = """
CREATE TABLE schema_version (
    version INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    applied TEXT NOT NULL
)"""
FIND_VERSION = "SELECT max(version) FROM schema_version"
FIND_OLDEST = "SELECT max(coalesce(works_with, version)) FROM schema_version WHERE version > ?1"
SET_OLDEST = "UPDATE schema_version SET works_with = ?2 WHERE version = ?1"
_FIRST_WITH_OLDEST = 4
"""The step that adds the column."""
INSERT_VERSION = "INSERT INTO schema_version (version, name, applied) VALUES (?1, ?2, ?3)"


class SchemaSession(Session, Protocol):
    """A session that may change the schema."""

    async def begin(self) -> None:
        """Begin a transaction that only one process at a time can have."""

    async def commit(self) -> None:
        """Make it durable."""

    async def rollback(self) -> None:
        """Undo it."""

    async def list_tables(self) -> Sequence[str]:
        """Return the names of all tables there are."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema."""

    number: int
    name: str
    statements: tuple[str, ...]
    step: Callable[[Session], Awaitable[None]] | None = None
    """What follows the statements, in the same transaction."""
    works_with: int | None = None
    """The oldest schema that a process may know and still use the database; `None`: this one."""

    @property
    def tables(self) -> Sequence[str]:
        """The tables that it makes."""
        return [found[1] for statement in self.statements if (found := _TABLE.match(statement))]


_STEPS: dict[str, Callable[[Session], Awaitable[None]]] = {"search": fill_search_tables}
"""By the name of the migration."""


def load_migrations(dialect: str, directory: Traversable | None = None) -> tuple[Migration, ...]:
    """Read the migrations for a dialect, in order; those of the package, if no directory is given."""
    found: dict[int, tuple[str, bool, str]] = {}
    for file in (directory or resources.files("kamado.storage").joinpath("schema")).iterdir():
        match = _FILE.fullmatch(file.name)
        if match is None or match["dialect"] not in {None, dialect}:
            continue
        number, special = int(match["number"]), match["dialect"] is not None
        if number not in found or special:
            found[number] = match["name"], special, file.read_text(encoding="utf-8")
    migrations = tuple(
        Migration(number, name, _split(text), _STEPS.get(name), _works_with(text))
        for number, (name, _, text) in sorted(found.items())
    )
    assert [migration.number for migration in migrations] == list(range(1, len(migrations) + 1)), "a number is missing"
    return migrations


def _works_with(text: str) -> int | None:
    said = _WORKS_WITH.search(text)
    return None if said is None else int(said[1])


def _split(text: str) -> tuple[str, ...]:
    statements = (part.strip() for part in _STATEMENT_END.split(_COMMENT.sub("", text)))
    return tuple(statement for statement in statements if statement)


async def find_version(
    session: SchemaSession, database: str, migrations: Sequence[Migration], marker: str = "tenants"
) -> int:
    """Find the schema's version; 0 for an empty database.

    It may be later than all `migrations`, if it works with them.

    Args:
        session: The database.
        database: What to call it in an error.
        migrations: All that this version of Kamado knows.
        marker: A table that tells what kind of database it is.

    Raises:
        NewerSchema: The database is too far ahead of `migrations`.
        UnusableFile: The database belongs to another program.
    """
    tables = await session.list_tables()
    if not tables:
        return 0
    if "schema_version" not in tables or marker not in tables:
        raise UnusableFile(f"{database} holds tables of another program; name a database of its own for Kamado")
    row = await session.one(FIND_VERSION)
    version = 0 if row is None or row[0] is None else int(row[0])
    if version > migrations[-1].number and not await _works_with_older(session, version, migrations[-1].number):
        raise NewerSchema(
            f"{database} has schema {version}, made by a later version of Kamado; this version knows schemas up to "
            f"{migrations[-1].number} and leaves it untouched. Use the later version, or restore a backup"
        )
    return version


async def _works_with_older(session: Session, version: int, known: int) -> bool:
    if version < _FIRST_WITH_OLDEST or known < _FIRST_WITH_OLDEST - 1:
        return False
    row = await session.one(FIND_OLDEST, known)
    return row is not None and row[0] is not None and int(row[0]) <= known


async def apply_migrations(
    session: SchemaSession,
    database: str,
    migrations: Sequence[Migration],
    now: datetime,
    marker: str = "tenants",
) -> tuple[Migration, ...]:
    """Apply what is missing; safe while other processes do the same.

    Returns:
        What this call applied.

    Raises:
        NewerSchema: The database is ahead of `migrations`.
        UnusableFile: The database belongs to another program.
        Unavailable: The driver failed; what was not committed is undone.
    """
    applied = []
    for migration in migrations:
        await session.begin()
        try:
            # Read again under the lock: another process may have been here.
            version = await find_version(session, database, migrations, marker)
            if version < migration.number:
                assert version == migration.number - 1, "a migration was left out"
                if version == 0:
                    await session.run(CREATE_VERSIONS)
                for statement in migration.statements:
                    await session.run(statement)
                if migration.step is not None:
                    await migration.step(session)
                await session.run(INSERT_VERSION, migration.number, migration.name, now.isoformat())
                if migration.works_with is not None and migration.number >= _FIRST_WITH_OLDEST:
                    await session.run(SET_OLDEST, migration.number, migration.works_with)
                applied.append(migration)
            await session.commit()
        except BaseException:
            await session.rollback()
            raise
    return tuple(applied)
