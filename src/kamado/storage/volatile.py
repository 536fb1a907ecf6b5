"""Device connections in a SQLite file of their own, which may be lost.

They are written all the time and must cost neither a wait for the disk nor a place in the queue of registrations, so
they have a file, a log and a lock of their own (docs/decisions). Nothing of that file is waited for: a power cut may
damage it. Whatever is wrong with it, the registry goes on: a file that cannot be used is set aside and made anew, one
that was taken away is made anew, and where that is not possible either, requests are answered with `Unavailable` until
it is. Every process that has the file open notices by itself.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Final, TypeVar

from kamado.connections import ConnectionTransaction, DeviceConnection, Key
from kamado.errors import Unavailable
from kamado.storage.connections import MARKER, SqlConnectionLookups, SqlConnectionTransaction
from kamado.storage.migrations import load_migrations
from kamado.storage.sql import NewerSchema, ObserveCommit, StoreSettings, UnusableFile
from kamado.storage.sqlite import Content, SqliteEngine

__all__ = ["SqliteConnections", "connections_path", "open_sqlite_connections"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_APPLICATION_ID: Final = 0x4B41_4D43  # "KAMC"
_BUSY_TIMEOUT: Final = 2.0
"""Seconds to wait for another process that is writing; adapters have given up by then."""
_LOOK_INTERVAL: Final = 1.0
"""Seconds after which it is noticed that the file was taken away."""


def connections_path(database: str) -> str:
    """Return where the file lies: beside the database, under a name made of its name."""
    path = Path(os.path.realpath(database))  # a process that knows the database by another name finds the same
    return str(path.with_name(f"{path.stem}.connections{path.suffix}"))


class _Engine(SqliteEngine[SqlConnectionTransaction]):
    async def open(self) -> None:
        await super().open()
        self.lookups = SqlConnectionLookups(self._reader)


class SqliteConnections:
    """`connections.Connections` over one SQLite file; see there. Made by `open_sqlite_connections`."""

    def __init__(self, path: str, observe: ObserveCommit) -> None:
        self._path = path
        self._settings = StoreSettings(busy_timeout=_BUSY_TIMEOUT, observe=observe)
        directory = resources.files("kamado.storage").joinpath("schema", "connections")
        self._content = Content(
            transaction=SqlConnectionTransaction,
            migrations=load_migrations("sqlite", directory),
            marker=MARKER,
            application_id=_APPLICATION_ID,
            durable=False,
        )
        self._engine: _Engine | None = None
        self._trouble = ""
        """Why there is no engine, as it was logged."""
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the file, if that is possible now, and from now on see that it is open."""
        await self._open()
        self._watch = asyncio.get_running_loop().create_task(self._keep_open())

    def batch(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._engine is None else self._engine.lookups.batch()

    async def find_connection(self, tenant_id: str, device_id: str) -> DeviceConnection | None:
        return await self._opened.lookups.find_connection(tenant_id, device_id)

    async def find_adapter_instances(
        self, tenant_id: str, device_ids: Sequence[str], now: datetime
    ) -> list[tuple[str, str]]:
        return await self._opened.lookups.find_adapter_instances(tenant_id, device_ids, now)

    async def write(self, work: Callable[[ConnectionTransaction], Awaitable[T]], *, device: Key | None = None) -> T:
        return await self._opened.write(work)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._engine is not None:
            await self._engine.close()

    @property
    def _opened(self) -> _Engine:
        if self._engine is None:
            raise Unavailable("device connections cannot be kept now")
        return self._engine

    async def _keep_open(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_INTERVAL)
            try:
                await self._look()
            except Exception as error:  # it is tried again, as ever
                self._say(f"{type(error).__name__}: {error}", with_traceback=True)

    async def _look(self) -> None:
        engine = self._engine
        if engine is not None and engine.is_lost:
            self._engine = None
            was_damaged = engine.is_damaged
            await engine.close()
            if was_damaged:
                self._set_aside(_identify(self._path), "the file is damaged")
            else:
                _log.warning("the file of device connections was taken away", extra={"file": self._path})
        if self._engine is None:
            await self._open()

    async def _open(self) -> None:
        for _ in range(2):
            before = _identify(self._path)
            engine = _Engine(self._path, self._settings, self._content)
            try:
                await engine.open()
            except (UnusableFile, NewerSchema) as error:
                self._set_aside(before, str(error.__cause__ or error))
            except (Unavailable, OSError) as error:
                return self._say(str(error))
            else:
                self._engine, self._trouble = engine, ""
                return None
        return None

    def _set_aside(self, which: tuple[int, int] | None, cause: str) -> None:
        """Move a file out of the way, unless another process has done so."""
        if which is None or _identify(self._path) != which:
            return
        aside = f"{self._path}.damaged"
        try:
            # First, or it would be applied to the new file.
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path + suffix)
            os.replace(self._path, aside)
        except OSError as error:
            self._say(f"{self._path} cannot be used ({cause}) nor moved: {error.strerror}")
        else:
            _log.warning(
                "device connections are lost, their file was set aside: adapters will tell them again",
                extra={"file": aside, "error": cause},
            )

    def _say(self, trouble: str, *, with_traceback: bool = False) -> None:
        # It is tried again all the time.
        if trouble != self._trouble:
            self._trouble = trouble
            _log.error("device connections cannot be kept", extra={"error": trouble}, exc_info=with_traceback)


def _identify(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


async def open_sqlite_connections(database: str, observe: ObserveCommit) -> SqliteConnections:
    """Open what belongs to the database at that path. Never fails: what is wrong is logged, and tried again."""
    connections = SqliteConnections(connections_path(database), observe)
    await connections.open()
    return connections
