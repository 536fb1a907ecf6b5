"""A TCP proxy in front of a database, for networks that fail: connections that are cut, packets that are swallowed.

with Proxy(server.port) as proxy:
    url = proxy.through(server.create_database())
    proxy.cut()
"""

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

__all__ = ["Proxy"]

T = TypeVar("T")


class _Link:
    """One client and the connection to the server that it was given."""

    def __init__(self, proxy: "Proxy", client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._writers = client, server
        self._is_deaf = False
        """What the server answers goes nowhere."""

    def cut(self) -> None:
        """Reset both connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def forward(self, reader: asyncio.StreamReader, *, to_server: bool) -> None:
        writer = self._writers[to_server]
        while data := await reader.read(65536):
            await self._proxy.is_open.wait()
            if to_server:
                before, after = self._proxy.cut_before, self._proxy.cut_after
                if before is not None and before in data:
                    self._proxy.cut_before = None
                    self._proxy.is_refusing = self._proxy.is_refusing or self._proxy.refuses_then
                    break
                if after is not None and after in data:
                    self._is_deaf = True
            elif self._is_deaf:
                self._proxy.cut_after = None
                self._proxy.is_refusing = self._proxy.is_refusing or self._proxy.refuses_then
                break
            elif self._proxy.replace is not None:
                data = data.replace(*self._proxy.replace)
            if self._proxy.delay:
                await asyncio.sleep(self._proxy.delay)
            writer.write(data)
            await writer.drain()


class Proxy:
    """Listens on 127.0.0.1 and forwards to a port there.

    Args:
        target: The port.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        """Seconds for which each packet is on its way."""
        self.cut_before: bytes | None = None
        """A connection whose client sends this is cut before the server has it; once."""
        self.cut_after: bytes | None = None
        """A connection whose client sends this is cut when the server has answered, of which nothing arrives; once."""
        self.refuses_then = False
        """Whether `cut_before` and `cut_after` are followed by `refuse`."""
        self.is_refusing = False
        self.refused = 0
        """Connections that were."""
        self.replace: tuple[bytes, bytes] | None = None
        """What servers say, and what clients hear instead."""
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self.is_open = asyncio.Event()
        self.is_open.set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self.is_refusing:
            self.refused += 1
            client.transport.abort()
            return
        try:
            server_reader, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            client.transport.abort()
            return
        link = _Link(self, client, server)
        served = asyncio.current_task()
        assert served is not None
        self._links[link] = served
        ways = [
            asyncio.ensure_future(link.forward(client_reader, to_server=True)),
            asyncio.ensure_future(link.forward(server_reader, to_server=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._links[link]
            link.cut()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _cut(self) -> None:
        for link in list(self._links):
            link.cut()

    async def _close(self) -> None:
        assert self._server is not None
        self.is_open.set()
        self._server.close()
        await self._cut()
        await asyncio.gather(*self._links.values())

    def through(self, url: str) -> str:
        """Return the URL of a database of the server, by way of the proxy."""
        port = urlsplit(url).port
        assert port == self.target
        return url.replace(f":{port}/", f":{self.port}/")

    @property
    def will_cut(self) -> bool:
        """Whether `cut_before` or `cut_after` is still to come."""
        return self.cut_before is not None or self.cut_after is not None

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        self._run(self._cut())

    def refuse(self) -> None:
        """Reset all connections, and new ones at once."""
        self.is_refusing = True
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self.is_refusing = False

    def swallow(self) -> None:
        """Let nothing through from now on, and close nothing."""
        self._loop.call_soon_threadsafe(self.is_open.clear)

    def let_through(self) -> None:
        """Forward again, also what has been held back."""
        self._loop.call_soon_threadsafe(self.is_open.set)
