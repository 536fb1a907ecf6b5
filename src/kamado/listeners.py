"""Front doors that several processes serve: one listening socket, and who of them takes the next connection.

Adapters hold few connections for a long time. Whoever wakes up first would take nearly all of them (measured in
docs/decisions/0023-one-listener-for-all-workers.md), so the processes tell each other in shared memory how many
connections they have, and one that has more than another lets that one go first. Knows nothing of what is spoken.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import ssl
from collections.abc import Callable
from typing import Final

__all__ = ["ABSENT", "Share", "SharedListener", "bind", "open_counts", "read_counts"]

_log = logging.getLogger(__name__)

BACKLOG: Final = 1024
"""Connections that wait to be taken."""
ABSENT: Final = -1
"""In place of a count: a process that takes no connections now."""
_COURTESY: Final = 0.02
"""Seconds that another process with fewer connections has to take one; it may be busy, or hang."""
_TROUBLE: Final = 1.0
"""Seconds until connections are taken again after the system refused one."""
_NUMBER: Final = 4
"""Bytes of a count. It has one writer, and a wrong one would only spoil the balance for a moment: so no lock."""

Counts = memoryview
"""Of all processes together, in memory that they share."""


async def bind(host: str, port: int) -> list[socket.socket]:
    """Listen on every address that a name stands for, as `asyncio.loop.create_server` does.

    Args:
        host: Address or name.
        port: 0 lets the system choose.

    Raises:
        OSError: One of them cannot be had.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            sockets.append(one)
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
            one.listen(BACKLOG)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


def open_counts(doors: int, processes: int) -> tuple[int, Counts]:
    """Make the memory of the counts; nobody takes connections yet.

    Args:
        doors: How many front doors are counted each for itself.
        processes: How many serve them.

    Returns:
        A descriptor, for `read_counts` in other processes, and the counts: of all processes for the first front door,
        then for the next.
    """
    descriptor = os.memfd_create("kamado-counts")
    os.truncate(descriptor, doors * processes * _NUMBER)
    counts = read_counts(descriptor)
    for place in range(len(counts)):
        counts[place] = ABSENT
    return descriptor, counts


def read_counts(descriptor: int) -> Counts:
    """Map what `open_counts` has made."""
    return memoryview(mmap.mmap(descriptor, 0)).cast("i")


class Share:
    """One process' part of the connections of one front door.

    Args:
        counts: Those of all processes for this front door.
        own: The place of this process.
    """

    def __init__(self, counts: Counts, own: int) -> None:
        self._counts = counts
        self._own = own
        self._number = 0

    def open(self) -> None:
        """Take part from now on."""
        self._counts[self._own] = self._number

    def close(self) -> None:
        """Take no more."""
        self._counts[self._own] = ABSENT

    def begin(self) -> None:
        """Count a connection."""
        self._number += 1
        self._tell()

    def end(self) -> None:
        """Count a connection that is gone."""
        self._number -= 1
        self._tell()

    def _tell(self) -> None:
        if self._counts[self._own] != ABSENT:
            self._counts[self._own] = self._number

    @property
    def is_next(self) -> bool:
        """Whether no other process has fewer."""
        return all(number == ABSENT or number >= self._number for number in self._counts)


class SharedListener:
    """Takes connections from a listening socket beside other processes that do the same.

    Args:
        listening: Listens already; closed in the end.
        share: Of this process. Whoever makes `factory` calls its `end` when a connection is lost.
        factory: Makes the protocol of each connection.
        context: With it connections speak TLS.
        handshake_timeout: For TLS, seconds.
        shutdown_timeout: For TLS, seconds.
    """

    def __init__(
        self,
        listening: socket.socket,
        share: Share,
        factory: Callable[[], asyncio.Protocol],
        *,
        context: ssl.SSLContext | None,
        handshake_timeout: float,
        shutdown_timeout: float,
    ) -> None:
        self._listening = listening
        self._share = share
        self._factory = factory
        self._context = context
        self._handshake_timeout = None if context is None else handshake_timeout
        self._shutdown_timeout = None if context is None else shutdown_timeout
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        listening.setblocking(False)
        share.open()
        self._loop.add_reader(listening, self._take)

    def close(self) -> None:
        """Take no more connections; harmless if that is so already."""
        if self._listening.fileno() < 0:
            return
        self._share.close()
        if self._pause is not None:
            self._pause.cancel()
        # Unknown to the loop if there is a pause; the loop must not know a descriptor that is closed.
        self._loop.remove_reader(self._listening)
        self._listening.close()

    async def wait_closed(self) -> None:
        """Wait until no handshake is under way."""
        for task in self._handshakes:
            task.cancel()
        if self._handshakes:
            await asyncio.wait(self._handshakes)

    def _take(self, *, patient: bool = True) -> None:
        """Take one connection; the loop calls again for the next."""
        if patient and not self._share.is_next:
            self._rest(_COURTESY)
            return
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            # Another process was faster, or the peer has gone.
            return
        except OSError as error:
            # Too many open files, no memory; the connection stays where it is, so the loop would call again at once.
            _log.warning("no connection can be taken now", extra={"error": error.strerror})
            self._rest(_TROUBLE)
            return
        self._share.begin()
        task = self._loop.create_task(self._connect(connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._listening)
        self._pause = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening, self._take)
        self._take(patient=False)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self._factory,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._handshake_timeout,
                ssl_shutdown_timeout=self._shutdown_timeout,
            )
        except BaseException as error:
            self._share.end()
            connection.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            # ssl.SSLError and TimeoutError are among them: the handshake failed, which its context has logged.
            if not isinstance(error, OSError):
                _log.exception("connection not taken")
