"""Worker processes: start them, talk with them, see that they run, start again what has ended, end them.

What a worker does is not known here. Supervisor and worker hold the ends of a socket pair. The first thing in it is the
task of the worker, then both sides write JSON, one message a line. Its end tells either side that the other is gone: a
worker whose supervisor was killed stops by itself, whatever killed it.

A worker is a fresh interpreter (`python -m MODULE DESCRIPTOR`), no fork: the supervisor has threads and an event loop,
of which a fork would be half a copy. It gets the descriptors that are named and no others.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Channel", "WorkerFailed", "Workers", "WorkersSettings"]

_log = logging.getLogger(__name__)

_HEAD: Final = 4
"""Bytes that tell how long the task is."""
_MAX_LINE: Final = 64 * 1024 * 1024
"""Bytes of a message: the metrics of a worker are some hundred KiB."""
_FAILED: Final = 70
"""Status in place of that of a process which could not even be started."""


class WorkerFailed(Exception):
    """A worker cannot start, so that it makes no sense to try again."""

    def __init__(self, number: int, status: int) -> None:
        super().__init__(f"worker {number} ended with status {status}")
        self.number = number
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersSettings:
    """Times in seconds."""

    number: int
    module: str
    """What a worker runs."""
    descriptors: tuple[int, ...] = ()
    """What it inherits."""
    quick: float = 10.0
    """One that ends sooner after its start is started again only after a pause; otherwise at once."""
    first_pause: float = 0.5
    """Doubled each time that it ends so soon again."""
    longest_pause: float = 10.0
    look_interval: float = 5.0
    """How often workers are asked whether they are alive."""
    max_unanswered: int = 6
    """Such questions in a row; then the worker is killed. No time: where the supervisor stood still, too (a container
    that was paused), long silence says nothing."""


class Workers:
    """All workers, as the supervisor sees them.

    Args:
        settings: See there.
        task: Makes the task of a worker, told its number (from 1).
        gone: Told the number of each worker that has ended.
    """

    def __init__(
        self, settings: WorkersSettings, task: Callable[[int], bytes], gone: Callable[[int], None] = lambda _: None
    ) -> None:
        self.restarts = 0
        self._settings = settings
        self._task = task
        self._gone = gone
        self._running: dict[int, _Worker] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        self._look: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._up = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Has an exception when workers can be kept no more."""

    @property
    def ready(self) -> int:
        """How many serve."""
        return sum(worker.is_ready for worker in self._running.values())

    async def start(self) -> None:
        """Start all and wait until each of them is ready. End them with `stop` or `close` in any case.

        Raises:
            WorkerFailed: One has ended by itself before.
        """
        loop = asyncio.get_running_loop()
        self._keepers = {loop.create_task(self._keep(number)) for number in range(1, self._settings.number + 1)}
        self._look = loop.create_task(self._look_after())
        for task in (*self._keepers, self._look):
            task.add_done_callback(self._note_end)
        up = loop.create_task(self._up.wait())
        try:
            await asyncio.wait((up, self.failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self.failed.done():
            self.failed.result()

    def tell(self, what: str) -> None:
        """Tell all that listen; those that are about to start need not know."""
        for worker in self._running.values():
            worker.send({"do": what})

    async def ask(self, what: str, patience: float) -> dict[int, Any]:
        """Ask those that are ready.

        Args:
            what: See `Channel.serve`.
            patience: Seconds; who has not answered by then is left out.

        Returns:
            Number -> answer.
        """
        asked = {number: worker.ask(what) for number, worker in self._running.items() if worker.is_ready}
        if asked:
            await asyncio.wait(set(asked.values()), timeout=patience)
        for answer in asked.values():
            answer.cancel()
        return {
            number: answer.result()
            for number, answer in sorted(asked.items())
            if answer.done() and not answer.cancelled()
        }

    async def stop(self, patience: float) -> None:
        """Have all stop in order, and start none again.

        Args:
            patience: Seconds; who runs longer is killed.
        """
        self._stopping.set()
        for worker in self._running.values():
            if worker.is_ready:
                worker.send({"do": "stop"})
            else:
                worker.kill()
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=patience)
            if late:
                _log.error("workers did not stop in time, they are killed", extra={"workers": sorted(self._running)})
        await self.close()

    def kill(self) -> None:
        """End all at once."""
        self._stopping.set()
        for worker in self._running.values():
            worker.kill()

    async def close(self) -> None:
        """End all at once, and wait until none is left."""
        self.kill()
        if self._look is not None:
            self._look.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)
        # Nobody may have asked.
        if self.failed.done():
            self.failed.exception()

    async def _keep(self, number: int) -> None:
        """Run one worker, again and again."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        pause = 0.0
        while not self._stopping.is_set():
            started = loop.time()
            worker = self._running[number] = _Worker(number, settings, self._note_ready)
            try:
                status = await worker.run(self._task(number))
            finally:
                del self._running[number]
                self._gone(number)
            if self._stopping.is_set():
                if status > 0:
                    _log.error("worker did not stop in order", extra={"worker": number, "status": _describe(status)})
                return
            if not self._up.is_set() and status >= 0:
                raise WorkerFailed(number, status)
            if loop.time() - started >= settings.quick:
                pause = 0.0
            # An error, since equal warnings are held back.
            _log.error(
                "worker ended, it is started again",
                extra={"worker": number, "status": _describe(status), "pause": pause},
            )
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            pause = min(max(2 * pause, settings.first_pause), settings.longest_pause)

    def _note_ready(self) -> None:
        if self.ready == self._settings.number:
            self._up.set()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _look_after(self) -> None:
        """Kill workers that hang: nobody else would, since it is the supervisor that answers to probes."""
        while True:
            await asyncio.sleep(self._settings.look_interval)
            for number, worker in self._running.items():
                if worker.unanswered < self._settings.max_unanswered:
                    worker.unanswered += 1
                    worker.ask("alive")
                else:
                    _log.error("worker does not answer, it is killed", extra={"worker": number})
                    worker.kill()


class _Worker:
    """One worker process, as the supervisor sees it."""

    def __init__(self, number: int, settings: WorkersSettings, note_ready: Callable[[], None]) -> None:
        self.is_ready = False
        self.unanswered = 0
        """How often it was asked whether it is alive since it last said something."""
        self._number = number
        self._settings = settings
        self._note_ready = note_ready
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._next = 0

    async def run(self, task: bytes) -> int:
        """Start the process and talk with it until it has ended.

        Returns:
            Its exit status; that of a signal is negative.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # Without -P whatever lies in the working directory could be imported. A process group of its own: Ctrl-C
            # is for the supervisor, which tells the workers.
            command = [sys.executable, "-P", "-m", self._settings.module, str(theirs.fileno())]
            try:
                process = self._process = subprocess.Popen(  # noqa: S603, ASYNC220 - takes as long as the exec
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *self._settings.descriptors),
                    process_group=0,
                )
            except OSError as error:
                _log.error("worker cannot be started", extra={"worker": self._number, "error": error.strerror})
                return _FAILED
            theirs.close()
            try:
                with contextlib.suppress(ConnectionError):
                    await self._talk(ours, task)
            finally:
                self.is_ready = False
                for answer in self._asked.values():
                    answer.cancel()
                if self._writer is not None:
                    self._writer.close()
                    self._writer = None
            # It has closed its end, so it has ended or is about to.
            return await asyncio.to_thread(process.wait)

    async def _talk(self, ours: socket.socket, task: bytes) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_MAX_LINE)
        self._writer = writer
        writer.write(len(task).to_bytes(_HEAD, "big") + task)
        await writer.drain()
        while line := await reader.readline():
            message = json.loads(line)
            self.unanswered = 0
            if "ready" in message:
                self.is_ready = True
                self._note_ready()
            else:
                answer = self._asked.pop(message["id"], None)
                if answer is not None and not answer.done():
                    answer.set_result(message["answer"])

    def send(self, message: Mapping[str, object]) -> None:
        """Write a message; one that has not begun to listen, or has ended, does not get it."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def ask(self, what: str) -> asyncio.Future[Any]:
        """Send a question; the answer is cancelled if the worker ends."""
        self._next += 1
        answer = self._asked[self._next] = asyncio.get_running_loop().create_future()
        self.send({"ask": what, "id": self._next})
        return answer

    def kill(self) -> None:
        """End it at once; harmless if it has ended."""
        if self._process is not None:
            self._process.kill()


def _describe(status: int) -> str:
    try:
        return str(status) if status >= 0 else signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


class Channel:
    """The supervisor, as a worker sees it.

    Args:
        descriptor: Of this end of the socket pair.

    Raises:
        EOFError: The supervisor is gone already.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self.task = self._read(int.from_bytes(self._read(_HEAD), "big"))
        """What the supervisor wants of this worker."""
        self._writer: asyncio.StreamWriter | None = None

    def _read(self, size: int) -> bytes:
        # Not a byte more: what follows is for `serve`.
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def serve(
        self, orders: Mapping[str, Callable[[], None]], questions: Mapping[str, Callable[[], Awaitable[object]]]
    ) -> None:
        """Do what the supervisor says and answer what it asks, until it is gone.

        Args:
            orders: What is told -> what to do.
            questions: What is asked -> how to find the answer, which is something that JSON has.
        """
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket, limit=_MAX_LINE)
        try:
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    message = json.loads(line)
                    if "do" in message:
                        orders[message["do"]]()
                    else:
                        self._send({"id": message["id"], "answer": await questions[message["ask"]]()})
        finally:
            # The loop does not end while it reads from here, and the supervisor need not wait for what comes no more.
            self._writer.close()

    def tell_ready(self) -> None:
        """Tell the supervisor that this worker serves."""
        self._send({"ready": True})

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")
