"""`kamado serve --workers N`: the process that starts the workers and does what is done once for all of them.

It opens the database (schema, first identity, data of the first start), binds the front doors, starts the workers,
answers probes and Prometheus, and passes on what signals mean. Connections it never sees: workers take them from the
sockets that it has bound (docs/decisions/0023-one-listener-for-all-workers.md).
"""

import asyncio
import contextlib
import logging
import os
import pickle
import socket
from collections.abc import Sequence
from pathlib import Path

from kamado.app import (
    EXIT_INTERNAL,
    EXIT_UNAVAILABLE,
    Process,
    StartFailed,
    begin,
    credential_rules,
    run_to_the_end,
)
from kamado.config import AmqpConfig, Config, HttpConfig, Loaded
from kamado.listeners import ABSENT, bind, open_counts
from kamado.passwords import PasswordHasher
from kamado.processes import WorkerFailed, Workers, WorkersSettings
from kamado.worker import DOORS, STOP_MARGIN, Task

__all__ = ["run"]

logger = logging.getLogger(__name__)

SCRAPE_TIMEOUT = 2.0
"""Seconds for a worker to tell its metrics; Prometheus waits 10 s by default."""


def run(loaded: Loaded, *, ready_file: Path | None = None, command: str = "kamado", options: Sequence[str] = ()) -> int:
    """Run the registry in several processes until a signal ends it; see `app.run`."""
    begin(loaded)
    return run_to_the_end(Supervisor(loaded.config, ready_file, command, options).main)


class Supervisor(Process):
    """One run of `kamado serve` with several workers."""

    def __init__(self, config: Config, ready_file: Path | None, command: str, options: Sequence[str]) -> None:
        super().__init__(config, ready_file, command, options)
        self._number = config.serve.effective_workers
        self._sockets: dict[str, list[socket.socket]] = {}
        """Of each listener of the front doors, by its scheme."""
        self._workers: Workers | None = None

    async def main(self) -> int:
        """Start, see that the workers run until a signal, stop."""
        config = self._config
        self._handle_signals()
        self._check_ready_file()
        permissions = self._load_permissions()
        async with contextlib.AsyncExitStack() as stack:
            health = await self._open_health(stack)
            store = await self._open_store(stack, auto_migrate=config.storage.auto_migrate)
            health.ping = store.ping
            await self._check_access(store)
            rules = credential_rules(config)
            with contextlib.closing(
                PasswordHasher(
                    workers=config.credentials.hash_workers,
                    queue=config.credentials.hash_queue,
                    cost=config.credentials.bcrypt_cost,
                )
            ) as passwords:
                await self._ensure_identity(store, passwords, permissions)
                await self._load_first_data(store, passwords, rules)
            stack.callback(self._close_sockets)
            await self._bind("amqp", config.amqp)
            await self._bind("http", config.http)
            workers = self._workers = self._prepare_workers(stack)
            health.find_problem = lambda: None if workers.ready else "no worker is ready"
            await self._start_workers(workers)
            self._settle(stack)
            health.is_started = True
            await self._announce(store)
            # Last: whoever waited for it finds all of the above done and said.
            self._write_ready_file()
            await self._wait_for_the_end()

            logger.info("draining")
            health.is_draining = True
            await asyncio.sleep(self._drain_delay)
            self._close_sockets()
            await workers.stop(config.shutdown.grace + STOP_MARGIN)
        logger.info("stopped")
        return 0

    # Start

    async def _bind(self, name: str, config: HttpConfig | AmqpConfig) -> None:
        """Bind the plain and the TLS listener of a front door, as configured."""
        for scheme, listener, is_enabled in (
            (name, config.insecure, config.insecure_enabled),
            (f"{name}s", config.secure, config.secure_enabled),
        ):
            if is_enabled:
                with self._explained(scheme, listener.bind, listener.port):
                    bound = self._sockets[scheme] = await bind(listener.bind, listener.port)
                self._note_address(scheme, *bound[0].getsockname()[:2])

    def _prepare_workers(self, stack: contextlib.AsyncExitStack) -> Workers:
        descriptor, counts = open_counts(len(DOORS), self._number)
        stack.callback(os.close, descriptor)
        sockets = {scheme: [one.fileno() for one in bound] for scheme, bound in self._sockets.items()}

        def task(number: int) -> bytes:
            # The configuration as it was read at the start: a worker that is started again is like the others, whatever
            # has become of the file.
            return pickle.dumps(
                Task(config=self._config, number=number, workers=self._number, sockets=sockets, counts=descriptor)
            )

        def gone(number: int) -> None:
            for door in range(len(DOORS)):
                counts[door * self._number + number - 1] = ABSENT

        settings = WorkersSettings(
            number=self._number,
            module="kamado.worker",
            descriptors=(descriptor, *(one for bound in sockets.values() for one in bound)),
        )
        workers = Workers(settings, task, gone)
        workers.failed.add_done_callback(self._note_end)
        stack.push_async_callback(workers.close)
        self._metrics.watch_workers(
            lambda: {"ready": workers.ready, "down": self._number - workers.ready}, lambda: workers.restarts
        )
        return workers

    async def _start_workers(self, workers: Workers) -> None:
        try:
            async with asyncio.timeout(self._config.startup.deadline):
                await workers.start()
        except WorkerFailed as error:
            raise StartFailed(str(error), error.status or EXIT_INTERNAL) from error
        except TimeoutError as error:
            raise StartFailed("the workers were not ready in startup.deadline", EXIT_UNAVAILABLE) from error

    async def _scrape(self, is_ready: bool) -> bytes:
        await self._count()
        exported = {} if self._workers is None else await self._workers.ask("metrics", SCRAPE_TIMEOUT)
        return self._metrics.render(is_ready=is_ready, workers=exported)

    def _reload(self) -> None:
        if self._workers is not None:
            self._workers.tell("reload")

    def _stop_at_once(self) -> None:
        if self._workers is not None:
            self._workers.kill()
        super()._stop_at_once()

    def _close_sockets(self) -> None:
        # What the workers have are descriptors of their own.
        for bound in self._sockets.values():
            for one in bound:
                one.close()
