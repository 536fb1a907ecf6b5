"""HTTP listeners and their connections: sockets, TLS, time limits, draining; and the health checks.

uvicorn's protocol class (on httptools) turns bytes into ASGI calls and back. This module listens, and sees to what that
class leaves open: errors in the registry's JSON form, peers that send too slowly or never read, heads that do not end,
and a stop that loses no answer. It does not know what is asked: that is the ASGI application's business.
"""

import asyncio
import logging
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, NamedTuple, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from kamado.document import JsonObject, encode
from kamado.errors import Unavailable
from kamado.http.api import CONTENT_TYPE, Receive, Send, encode_error, respond
from kamado.listeners import Share, SharedListener

__all__ = ["Address", "Application", "Health", "HttpServer", "HttpServerSettings"]

_log = logging.getLogger(__name__)

Application = Callable[[Any, Receive, Send], Awaitable[None]]
"""What answers requests: an ASGI application without lifespan or WebSocket."""

_MAX_HEAD_SIZE: Final = 64 * 1024
"""Bytes of request line and headers that may come without the head being complete."""
_MAX_PIPELINED: Final = 1000
"""Requests that may wait for their turn on one connection."""
_MAX_OVERHEAD: Final = 1024 * 1024
"""Bytes of a request that are no body: head, chunk sizes, trailers. The smallest chunks take five for one."""
_MAX_FAILED_PINGS: Final = 3
"""Times in a row that the database has not answered when the registry is no longer ready (configuration 3.1)."""
_UNFORESEEN: Final = "failed, see the log"
"""What probes are told of a database that cannot be asked because of something that nobody has foreseen."""
_CLOSE_TIMEOUT: Final = 5.0
"""Seconds for a peer to take what is written before a connection is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpServerSettings:
    """Limits of all connections; times in seconds, kept to within `sweep_interval`."""

    idle_timeout: float = 60.0
    """For a connection without a request; 0: no limit."""
    request_timeout: float = 30.0
    """From the first byte of a request to its last, and for a peer that does not read its answer."""
    handshake_timeout: float = 10.0
    """For TLS."""
    max_connections: int = 1000
    """Further ones are answered with 503."""
    sweep_interval: float = 1.0
    """How often connections are looked at."""


class Address(NamedTuple):
    """Where a listener is bound."""

    host: str
    port: int


class HttpServer:
    """Listeners in front of one application.

    Args:
        application: Who answers.
        settings: See there.
    """

    def __init__(self, application: Application, settings: HttpServerSettings | None = None) -> None:
        self.settings = settings or HttpServerSettings()
        self.is_stopping = False
        self.state = ServerState()
        self._gone = asyncio.Event()
        self._listeners: list[asyncio.Server | SharedListener] = []
        self._share: Share | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        # Of uvicorn's configuration only what its protocol class reads: no loop, no signals, no access log.
        self._config = Config(
            cast(Any, application),
            http=_Connection,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        self._config.load()

    async def listen(self, host: str, port: int, context: ssl.SSLContext | None = None) -> Address:
        """Open a listener.

        Args:
            host: Address to bind.
            port: 0 lets the system choose.
            context: With it the listener speaks TLS.

        Returns:
            Where it listens.

        Raises:
            OSError: It cannot be bound.
        """
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: _Connection(self, self._config),
            host,
            port,
            ssl=context,
            ssl_handshake_timeout=self.settings.handshake_timeout if context else None,
            ssl_shutdown_timeout=_CLOSE_TIMEOUT if context else None,
            backlog=1024,
        )
        self._add(listener)
        name = listener.sockets[0].getsockname()
        return Address(name[0], name[1])

    def share(self, listening: socket.socket, share: Share, context: ssl.SSLContext | None = None) -> None:
        """Take connections from a socket that other processes take them from, too.

        Args:
            listening: Listens already.
            share: Of this process; the same for all sockets of this server.
            context: With it the listener speaks TLS.
        """
        self._share = share
        self._add(
            SharedListener(
                listening,
                share,
                lambda: _Connection(self, self._config),
                context=context,
                handshake_timeout=self.settings.handshake_timeout,
                shutdown_timeout=_CLOSE_TIMEOUT,
            )
        )

    def _add(self, listener: asyncio.Server | SharedListener) -> None:
        self._listeners.append(listener)
        if self._sweeper is None:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(self.settings.sweep_interval, self._sweep)

    async def stop(self, grace: float) -> None:
        """Stop in order: no new connections, answer what has been asked, close.

        Args:
            grace: Seconds for running requests; what runs longer is cut off.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        self.is_stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.state.connections):
            connection.shutdown()
        await self._wait_until_gone(grace)
        for connection in list(self.state.connections):
            connection.transport.abort()
        await self._wait_until_gone(_CLOSE_TIMEOUT)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        tasks = set(self.state.tasks)
        if tasks:
            # Answers that nobody waits for any more; what runs past the grace is cancelled.
            await asyncio.wait(tasks, timeout=max(0.0, deadline - loop.time()))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _wait_until_gone(self, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                while self.state.connections:
                    self._gone.clear()
                    await self._gone.wait()
        except TimeoutError:
            return

    def forget(self) -> None:
        """Take note that a connection is gone."""
        if self._share is not None:
            self._share.end()
        self._gone.set()

    def _sweep(self) -> None:
        """Look after all connections: cheaper than a timer for each request."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.state.connections):
            cast(_Connection, connection).check_time(now)
        self._sweeper = loop.call_later(self.settings.sweep_interval, self._sweep)


class _Connection(HttpToolsProtocol):
    """One connection.

    What is used of the base class beyond asyncio's protocol methods: the parser's callbacks (`on_message_begin` ...),
    `cycle` and `pipeline` (the newest request, and those that wait for their turn), `flow`, `on_response_complete`,
    `shutdown` and `send_400_response`.
    """

    def __init__(self, server: HttpServer, config: Config) -> None:
        super().__init__(config, server.state, {})
        self._owner = server
        self._is_refused = False
        """A request was malformed; nothing that follows is read."""
        self._is_upgrade = False
        """The request that is being parsed asks for another protocol."""
        self._overhead = 0
        self._is_in_head = True
        self._idle_since = 0.0
        self._receiving_since: float | None = None
        self._blocked_since: float | None = None
        """The peer does not read."""
        self._closing_since: float | None = None

    # Sockets

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.flow = _Flow(self.transport, self.pipeline)
        self._idle_since = self.loop.time()
        if self._owner.is_stopping:
            self._is_refused = True
            self.transport.close()
        elif len(self.connections) > self._owner.settings.max_connections:
            _log.warning("too many connections, one is refused", extra={"limit": self._owner.settings.max_connections})
            self._is_refused = True
            self.transport.write(_bare_response(503, "too many connections; try again later", retry=True))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        self._owner.forget()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._overhead += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            is_crowded = len(self.pipeline) >= _MAX_PIPELINED
            self._refuse(400, "too many requests at once" if is_crowded else "malformed HTTP request")
            return
        if self._overhead > (_MAX_HEAD_SIZE if self._is_in_head else _MAX_OVERHEAD):
            self._refuse(400, "the head of the request, or what is around the chunks of its body, is too large")

    def _feed(self, data: bytes) -> None:
        """Parse bytes; requests to upgrade are taken as if they had not asked (RFC 9110, 7.8).

        Some clients, Java's above all, ask for HTTP/2 in this way with any request. The parser then takes the body for
        something that is no HTTP, so it gets the head once more, without that header.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._is_upgrade:
                    # CONNECT: what follows would be a tunnel, which there is not; with the answer the connection ends.
                    self._is_refused = True
                    self.cycle.keep_alive = False
                    return
                self._is_upgrade = False
                lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
                lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                data = b"\r\n".join((*lines, b"", b"")) + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            else:
                return

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio allows it, uvicorn narrows it
        """Answer what has been asked, though the peer sends no more; TLS knows no half-closed connections.

        Returns:
            Whether to leave the connection open until then.
        """
        if self._receiving_since is not None and not self._is_refused:
            self._refuse(400, "the request ended too early")
        self._is_refused = True
        if self.cycle is None or self.cycle.response_complete:
            return False
        # The newest request: with its answer the connection ends.
        self.cycle.keep_alive = False
        return self.scheme == "http"

    def pause_writing(self) -> None:
        self._blocked_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._blocked_since = None
        super().resume_writing()

    # Parser

    def on_message_begin(self) -> None:
        self._receiving_since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._is_upgrade = True
            return
        self._is_in_head = False
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise OverflowError("too many requests wait; the parser stops here")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        self._receiving_since = None
        self._overhead = 0
        self._is_in_head = True
        super().on_message_complete()

    # Answers

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        # Idle connections are ended by `check_time`. uvicorn's own timer would go on when the next request has come.
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, text: str) -> None:
        """Answer, in its turn, what is no request; then close."""
        self._is_refused = True
        cycle = self.cycle
        if cycle is None or cycle.response_complete or (cycle.more_body and not self.pipeline):
            # Nothing is being answered, or it is that request itself whose body has come out wrong.
            if cycle is None or cycle.response_complete or not cycle.response_started:
                self.transport.write(_bare_response(status, text))
            self.transport.close()
            return
        answer = _BareAnswer(status, text)
        if cycle.more_body:
            self.pipeline.popleft()
            self.pipeline.appendleft((cycle, answer))
            return
        last = RequestResponseCycle(
            scope=cast(Any, {"type": "http", "method": "GET", "http_version": "1.1"}),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self.cycle = last
        self.pipeline.appendleft((last, answer))

    def check_time(self, now: float) -> None:
        """Close the connection if the peer has taken too long over what it does now."""
        settings = self._owner.settings
        if self._closing_since is not None:
            if now - self._closing_since >= _CLOSE_TIMEOUT:
                self.transport.abort()
        elif self.transport.is_closing():
            self._closing_since = now
        elif self._blocked_since is not None and now - self._blocked_since >= settings.request_timeout:
            self.transport.abort()
        elif self._receiving_since is not None and not self._is_refused:
            if now - self._receiving_since >= settings.request_timeout and not self.flow.read_paused:
                self._refuse(400, "the request took too long to arrive")
        elif (
            settings.idle_timeout
            and now - self._idle_since >= settings.idle_timeout
            and (self.cycle is None or self.cycle.response_complete)
        ):
            self.transport.close()


class _Flow(FlowControl):
    """Reads nothing while requests wait for their turn: uvicorn would read on after each answer, and before each body,
    so that a peer that asks faster than it is answered could fill the memory.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: deque[Any]) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


class _BareAnswer:
    """An application that gives the same error to everything."""

    def __init__(self, status: int, text: str) -> None:
        self._status = status
        self._body = encode_error(text)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await respond(send, self._status, self._body, ((b"connection", b"close"),))


def _bare_response(status: int, text: str, *, retry: bool = False) -> bytes:
    """Write an error without an application (management 3.8)."""
    body = encode_error(text)
    return b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n%s" % (
        status,
        HTTPStatus(status).phrase.encode(),
        CONTENT_TYPE,
        len(body),
        b"retry-after: 2\r\n" if retry else b"",
        body,
    )


# Health


class Health:
    """The health checks (configuration 3.1), an application for a listener of its own.

    `/started` is up once `is_started` is set, `/readiness` while it is also not draining, `find_problem` finds none and
    the database has not failed to answer three times in a row, `/liveness` as long as the event loop turns; `/` is all
    of them.

    Metrics are served beside them, if there are any.

    Args:
        ping_timeout: Seconds for the database to answer.
        ping_interval: Seconds from one question to the next.
        metrics: Makes the page of metrics, told whether the registry is ready.
        metrics_type: Content type of that page.
        metrics_paths: Where it is.
    """

    def __init__(
        self,
        *,
        ping_timeout: float = 1.0,
        ping_interval: float = 2.0,
        metrics: Callable[[bool], Awaitable[bytes]] | None = None,
        metrics_type: bytes = b"text/plain",
        metrics_paths: frozenset[str] = frozenset(),
    ) -> None:
        self.is_started = False
        self.is_draining = False
        self.ping: Callable[[], Awaitable[None]] | None = None
        """How to ask the database; set once there is one."""
        self.find_problem: Callable[[], str | None] = lambda: None
        """What else keeps it from serving."""
        self._metrics = metrics
        self._metrics_type = metrics_type
        self._metrics_paths = frozenset[str]() if metrics is None else metrics_paths
        self._ping_timeout = ping_timeout
        self._ping_interval = ping_interval
        self._failed_pings = 0
        self._database_problem: str | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a probe."""
        path = scope["path"]
        if path not in {"/", "/started", "/liveness", "/readiness", *self._metrics_paths}:
            await respond(send, 404, encode_error("no such check; there are /started, /liveness and /readiness"))
        elif scope["method"] not in {"GET", "HEAD"}:
            await respond(send, 405, encode_error("only GET is supported"), ((b"allow", b"GET, HEAD"),))
        elif self._metrics is not None and path in self._metrics_paths:
            is_ready = self.is_started and self._find_problem() is None and self._find_database_problem() is None
            await respond(send, 200, await self._metrics(is_ready), content_type=self._metrics_type)
        else:
            checks: list[JsonObject] = []
            if path in {"/", "/liveness"}:
                checks.append(_check("event-loop", None))
            if path != "/liveness":
                checks.append(_check("start", None if self.is_started else "not started yet"))
            if path in {"/", "/readiness"}:
                checks.append(_check("serving", self._find_problem()))
                checks.append(_check("database", self._find_database_problem()))
            status = "UP" if all(check["status"] == "UP" for check in checks) else "DOWN"
            body = encode({"status": status, "outcome": status, "checks": checks})
            await respond(send, 200 if status == "UP" else 503, body)

    def _find_problem(self) -> str | None:
        return "draining" if self.is_draining else self.find_problem()

    def _find_database_problem(self) -> str | None:
        if self.ping is None:
            return "not open"
        return self._database_problem if self._failed_pings >= _MAX_FAILED_PINGS else None

    async def watch(self) -> None:
        """Ask the database again and again, so that probes need not."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._ping_interval
            if self.ping is not None:
                self._database_problem = await self._ping(self.ping)
                self._failed_pings = 0 if self._database_problem is None else self._failed_pings + 1
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _ping(self, ping: Callable[[], Awaitable[None]]) -> str | None:
        try:
            async with asyncio.timeout(self._ping_timeout):
                await ping()
        except TimeoutError:
            return "no answer in time"
        except Unavailable as error:
            return str(error)
        except Exception:  # whatever it was, the database has not answered
            if self._database_problem != _UNFORESEEN:
                _log.exception("database not asked whether it answers")
            return _UNFORESEEN
        return None


def _check(name: str, problem: str | None) -> JsonObject:
    """Describe a check in the forms of Hono 1.2 (`id`) and 2.x (`name`, `data`) at once."""
    return {
        "id": name,
        "name": name,
        "status": "DOWN" if problem else "UP",
        "data": {"problem": problem} if problem else {},
    }
