"""A worker process of `kamado serve --workers N`: `python -m kamado.worker DESCRIPTOR`, started by the supervisor.

It serves the front doors as a single process would, from sockets that it inherits. Database and configuration are in
order when it starts, and there is nothing that it does alone: no migration, no first identity, no health listener, no
ready file. Signals are the supervisor's business, which tells it what to do; when the supervisor is gone, it stops.
"""

import contextlib
import logging
import math
import os
import pickle
import signal
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kamado import log
from kamado.app import EXIT_INTERNAL, Process, Server, build_core, run_to_the_end
from kamado.config import Config
from kamado.listeners import Share, read_counts
from kamado.processes import Channel

__all__ = ["DOORS", "STOP_MARGIN", "Task"]

logger = logging.getLogger(__name__)

DOORS = ("amqp", "http")
"""The front doors over which connections are spread, each for itself."""


STOP_MARGIN = 10.0
"""Seconds beyond `shutdown.grace`: to say goodbye to adapters, and to close the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the supervisor tells a worker in the beginning."""

    config: Config
    number: int
    """Of this worker, from 1."""
    workers: int
    sockets: Mapping[str, Sequence[int]]
    """Scheme of a listener -> its descriptors."""
    counts: int
    """Descriptor of what `listeners.read_counts` reads."""


class Worker(Process):
    """The life of one worker."""

    def __init__(self, task: Task, channel: Channel) -> None:
        super().__init__(task.config, None, "", ())
        self._task = task
        self._channel = channel
        counts = read_counts(task.counts)
        os.close(task.counts)
        self._shares = {
            door: Share(counts[place * task.workers : (place + 1) * task.workers], task.number - 1)
            for place, door in enumerate(DOORS)
        }

    async def main(self) -> int:
        """Start, serve until the supervisor says so or is gone, stop."""
        permissions = self._load_permissions()
        async with contextlib.AsyncExitStack() as stack:
            self._run_beside(stack, self._obey())
            store = await self._open_store(stack, auto_migrate=False)
            core = build_core(self._config, store, metrics=self._metrics, hook=self._build_hook(stack))
            stack.callback(core.passwords.close)
            amqp, http = await self._open_front_doors(stack, store, core, permissions)
            self._channel.tell_ready()
            await self._wait_for_the_end()
            await self._close_front_doors(amqp, http)
        return 0

    async def _obey(self) -> None:
        await self._channel.serve(
            {"stop": self._stop.set, "reload": self._reload}, {"metrics": self._export, "alive": self._confirm}
        )
        logger.warning("the supervisor is gone, stopping")
        # Should the stop take too long there is nobody who would end it; the signal does, as nothing handles it.
        signal.alarm(math.ceil(self._config.shutdown.grace + STOP_MARGIN))
        self._stop.set()

    async def _export(self) -> object:
        return self._metrics.export()

    async def _confirm(self) -> object:
        return True

    def _container_id(self) -> str:
        return f"{super()._container_id()}-{self._task.number}"

    async def _listen_one(
        self, scheme: str, host: str, port: int, context: ssl.SSLContext | None, server: Server
    ) -> None:
        share = self._shares[scheme.removesuffix("s")]
        for descriptor in self._task.sockets[scheme]:
            os.set_inheritable(descriptor, False)
            server.share(socket.socket(fileno=descriptor), share, context)


def main() -> int:
    """Take the task and do it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Whoever ends all processes of a unit at once would have us stop before the time for draining is over.
        signal.signal(number, signal.SIG_IGN)
    try:
        channel = Channel(int(sys.argv[1]))
    except EOFError:
        return EXIT_INTERNAL
    # From the process that started this one, over a socket that nobody else has.
    task = pickle.loads(channel.task)  # noqa: S301
    config = task.config
    log.configure(config.log.format, config.log.level, config.log.levels, fields={"worker": task.number})
    return run_to_the_end(Worker(task, channel).main)


if __name__ == "__main__":
    sys.exit(main())
