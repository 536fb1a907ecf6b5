"""AMQP over sockets: listeners, TLS, logins, timers, tasks for requests that wait, draining.

A thin layer that moves bytes. Who speaks what is decided below: `sasl.py` until the login, then `connection.py`, whose
links and requests go to `api.py`. Each socket is one `_Peer`. All that arrives in one read is answered by one write; a
peer that sends much is served in slices, so that the others get their turns, and one that does not read what it asked
for is not read from either.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from kamado.amqp.api import Api, Caller, Pending
from kamado.amqp.connection import (
    Closed,
    Connection,
    ConnectionSettings,
    Event,
    LinkAttached,
    LinkDetached,
    Opened,
    RequestsReceived,
)
from kamado.amqp.sasl import Outcome, PlainAttempt, SaslAttempt, SaslServer
from kamado.auth import Authenticator, Principal
from kamado.errors import BadRequest, Unavailable
from kamado.listeners import Share, SharedListener
from kamado.x509 import parse_certificate

__all__ = ["Address", "AmqpServer", "AmqpServerSettings", "Connections", "ObserveLogin"]

_log = logging.getLogger(__name__)

_SLICE: Final = 32768
"""Bytes of one peer that are worked on before the others get their turn: about a hundred requests."""
_WRITE_HIGH_WATER: Final = 1024 * 1024
"""Bytes a socket has not taken yet, above which its peer is not read from."""
_BACKLOG: Final = 512

ObserveLogin = Callable[[str, str, float], None]
"""Takes each login: mechanism, outcome in words, seconds to decide over it."""

_OUTCOMES: Final = {
    Outcome.OK: "ok",
    Outcome.AUTH: "auth",
    Outcome.SYS: "sys",
    Outcome.SYS_PERM: "sys-perm",
    Outcome.SYS_TEMP: "sys-temp",
}
_ENDINGS: Final = {"amqp:unauthorized-access": "token_expired", "amqp:connection:forced": "drain"}
"""Why the registry itself closes a connection, by condition; anything else is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AmqpServerSettings:
    """Limits of all connections. Times in seconds, sizes in bytes."""

    connection: ConnectionSettings
    mechanisms: tuple[str, ...] = ("EXTERNAL", "PLAIN")
    """In the order they are offered; EXTERNAL only to clients with a certificate (amqp-apis 1.3)."""
    handshake_timeout: float = 10.0
    """For TLS, and for SASL; the time from there to `open` is `connection.open_timeout` (amqp-apis 1.2)."""
    authentication_timeout: float = 3.0
    """For deciding over a login; then the outcome is 4 (amqp-apis 1.3)."""
    refusal_delay: float = 0.5
    """From the attempt to outcome 1 at least, so that guessing is slow and how long the decision took, which depends on
    the cost of a stored hash, does not tell who exists; clients wait 5 s for everything together."""
    max_connections: int = 2000
    max_pending_output: int = 16 * 1024 * 1024
    """Replies of one connection that wait for the peer's credit; above that the connection is closed."""
    login_check_interval: float = 10.0
    """How often it is checked, where logins do not end by themselves, that their identities are what they were."""


class Address(NamedTuple):
    """Where a listener is bound."""

    host: str
    port: int


class Connections:
    """How many there are and were, by port: `secure` or `insecure` (configuration 4.2)."""

    def __init__(self) -> None:
        self.open = {"secure": 0, "insecure": 0}
        self.opened = {"secure": 0, "insecure": 0}
        self.closed: dict[tuple[str, str], int] = {}
        """Port and reason -> how many."""

    def begin(self, port: str) -> None:
        """Count one more."""
        self.open[port] += 1
        self.opened[port] += 1

    def end(self, port: str, reason: str) -> None:
        """Count one less."""
        self.open[port] -= 1
        self.closed[port, reason] = self.closed.get((port, reason), 0) + 1


class AmqpServer:
    """The listeners and their connections.

    Args:
        api: Who answers.
        authenticator: Who decides over logins.
        settings: See there.
        clock: The time now, aware UTC.
        observe_login: See there.
    """

    def __init__(
        self,
        api: Api,
        authenticator: Authenticator,
        settings: AmqpServerSettings,
        clock: Callable[[], datetime],
        *,
        observe_login: ObserveLogin = lambda *_: None,
    ) -> None:
        self.api = api
        self.authenticator = authenticator
        self.settings = settings
        self.clock = clock
        self.observe_login = observe_login
        self.connections = Connections()
        self.peers: set[_Peer] = set()
        self.is_stopping = False
        self._listeners: list[asyncio.Server | SharedListener] = []
        self._share: Share | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._all_gone = asyncio.Event()

    async def listen(self, host: str, port: int, context: ssl.SSLContext | None = None) -> Address:
        """Open a listener.

        Args:
            host: Address to bind.
            port: 0 lets the system choose.
            context: With it the listener speaks TLS from the first byte; whether clients are asked for a certificate
                is its business.

        Returns:
            Where it listens.

        Raises:
            OSError: The address cannot be had.
        """
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: _Peer(self),
            host,
            port,
            ssl=context,
            backlog=_BACKLOG,
            ssl_handshake_timeout=None if context is None else self.settings.handshake_timeout,
            ssl_shutdown_timeout=None if context is None else self.settings.connection.close_timeout,
        )
        self._add(listener)
        name = listener.sockets[0].getsockname()
        return Address(name[0], name[1])

    def share(self, listening: socket.socket, share: Share, context: ssl.SSLContext | None = None) -> None:
        """Take connections from a socket that other processes take them from, too.

        Args:
            listening: Listens already.
            share: Of this process; the same for all sockets of this server.
            context: As for `listen`.
        """
        self._share = share
        self._add(
            SharedListener(
                listening,
                share,
                lambda: _Peer(self),
                context=context,
                handshake_timeout=self.settings.handshake_timeout,
                shutdown_timeout=self.settings.connection.close_timeout,
            )
        )

    def _add(self, listener: asyncio.Server | SharedListener) -> None:
        self._listeners.append(listener)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._watch_logins())

    async def stop(self, grace: float) -> None:
        """Stop in order: no new connections, no new requests, let running ones end, say goodbye (amqp-apis 2.4).

        Args:
            grace: Seconds for running requests; what runs longer is cancelled.
        """
        self.is_stopping = True
        if self._watch is not None:
            self._watch.cancel()
        for listener in self._listeners:
            listener.close()
        for peer in list(self.peers):
            peer.drain()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in list(self._tasks):
            task.cancel()
        for peer in list(self.peers):
            peer.close("amqp:connection:forced", "the registry is stopping")
        try:
            async with asyncio.timeout(2 * self.settings.connection.close_timeout):
                while self.peers:
                    self._all_gone.clear()
                    await self._all_gone.wait()
        except TimeoutError:
            for peer in list(self.peers):
                peer.abort()
        for listener in self._listeners:
            await listener.wait_closed()

    def forget(self, peer: "_Peer") -> None:
        """Drop a connection that is gone."""
        if peer in self.peers:
            self.peers.discard(peer)
            self.connections.end(peer.port, peer.ending or "peer")
        if self._share is not None:
            self._share.end()
        self._all_gone.set()

    def spawn(self, work: Coroutine[Any, Any, None], done: Callable[[asyncio.Task[None]], None]) -> asyncio.Task[None]:
        """Run something that waits; it ends with the server at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        return task

    async def _watch_logins(self) -> None:
        """Close the connections of identities that were changed or removed, where logins have no end of their own."""
        while True:
            await asyncio.sleep(self.settings.login_check_interval)
            endless = {p.principal for p in self.peers if p.principal is not None and p.principal.expires is None}
            for principal in endless:
                try:
                    async with asyncio.timeout(self.settings.authentication_timeout):
                        if await self.authenticator.is_current(principal):
                            continue
                except (Unavailable, TimeoutError):
                    continue
                except Exception:  # a row that is damaged, say; the others are to be looked at all the same
                    _log.exception("identity not read, its connections stay", extra={"principal": principal.name})
                    continue
                _log.info("identity changed, its connections are closed", extra={"principal": principal.name})
                for peer in list(self.peers):
                    if peer.principal == principal:
                        peer.close("amqp:unauthorized-access", "access token expired")


class _Peer(asyncio.Protocol):
    """One socket."""

    def __init__(self, server: AmqpServer) -> None:
        self.principal: Principal | None = None
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._certificate: bytes | None = None
        self._name = ""
        self._sasl: SaslServer | None = None
        self._connection: Connection | None = None
        self._caller: Caller | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._expiry: asyncio.TimerHandle | None = None
        self._login: asyncio.Task[None] | None = None
        self._backlog = memoryview(b"")
        """What was read and is not worked on yet."""
        self._work_scheduled = False
        self._flush_scheduled = False
        self._is_writable = True
        self._is_reading = True
        self._is_closing = False
        """Our `close` is out, the peer's is awaited."""
        self._is_ending = False
        """The socket is being closed."""
        self.port = "insecure"
        self.ending: str | None = None
        """Why the connection ends, if not because the peer wants it to."""

    # The socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        settings = self._server.settings
        name = transport.get_extra_info("peername")
        self._name = f"{name[0]}:{name[1]}" if name else ""
        if self._server.is_stopping or len(self._server.peers) >= settings.max_connections:
            if not self._server.is_stopping:
                _log.warning("too many connections, one is refused", extra={"limit": settings.max_connections})
            self._is_ending = True
            self._transport.abort()
            return
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self.port = "secure"
            self._certificate = tls.getpeercert(binary_form=True)
        self._server.peers.add(self)
        self._server.connections.begin(self.port)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)
        # Without a certificate EXTERNAL cannot work; where it is all there is, the peer learns so by its outcome.
        offered = [name for name in settings.mechanisms if name != "EXTERNAL" or self._certificate is not None]
        self._sasl = SaslServer(
            offered or settings.mechanisms, now=self._loop.time(), timeout=settings.handshake_timeout
        )
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        if self._backlog:
            # Some transports hand over what they had read before they were paused.
            self._backlog = memoryview(bytes(self._backlog) + data)
        elif len(data) <= _SLICE and self._is_writable:
            self._take(data)
        else:
            self._backlog = memoryview(data)
            self._work()

    def pause_writing(self) -> None:
        self._is_writable = False
        self._regulate()

    def resume_writing(self) -> None:
        self._is_writable = True
        self._regulate()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_ending = True
        self._backlog = memoryview(b"")
        for timer in (self._timer, self._expiry):
            if timer is not None:
                timer.cancel()
        if self._login is not None:
            self._login.cancel()
        if self._connection is not None:
            self._handle(self._connection.lost())
            _log.debug("connection closed", extra=self._fields())
        self._server.forget(self)

    def _work(self) -> None:
        """Work on one slice of the backlog."""
        self._work_scheduled = False
        if self._is_writable and self._backlog:
            data = bytes(self._backlog[:_SLICE])
            self._backlog = self._backlog[_SLICE:]
            self._take(data)
        self._regulate()

    def _regulate(self) -> None:
        """Read on, work on, or do neither."""
        if self._is_ending:
            return
        if self._is_writable and self._backlog and not self._work_scheduled:
            self._work_scheduled = True
            self._loop.call_soon(self._work)
        reads = self._is_writable and not self._backlog
        if reads != self._is_reading:
            self._is_reading = reads
            if reads:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _take(self, data: bytes) -> None:
        if self._connection is not None:
            self._handle(self._connection.receive(data, self._loop.time()))
            self._flush()
        elif self._sasl is not None:
            for attempt in self._sasl.receive(data, self._loop.time()):
                self._login = self._server.spawn(self._log_in(attempt), self._login_done)
            self._flush_sasl()

    def _flush(self) -> None:
        """Write what is ready, once for all that was answered."""
        self._flush_scheduled = False
        connection = self._connection
        if connection is None or self._is_ending:
            return
        data = connection.data_to_send()
        if data:
            self._transport.write(data)
        if connection.is_closed:
            self._end()
        elif connection.pending_output > self._server.settings.max_pending_output and not self._is_closing:
            _log.warning("too many replies wait for credit, the connection is closed", extra=self._fields())
            self.close("amqp:resource-limit-exceeded", "too many replies wait for credit")

    def _flush_soon(self) -> None:
        """Write at the end of this turn of the loop: replies that come one by one leave together."""
        if not self._flush_scheduled and not self._is_ending:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush_sasl(self) -> None:
        if self._sasl is None or self._is_ending:
            return
        data = self._sasl.data_to_send()
        if data:
            self._transport.write(data)
        if self._sasl.is_over:
            self.ending = self.ending or "login"
            self._end()

    def _end(self) -> None:
        """Close the socket once it has taken what is written, but do not wait for ever for that."""
        if self._is_ending:
            return
        self._is_ending = True
        self._backlog = memoryview(b"")
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._server.settings.connection.close_timeout, self._transport.abort)
        self._transport.close()

    # Login

    async def _log_in(self, attempt: SaslAttempt) -> None:
        settings = self._server.settings
        started = self._loop.time()
        principal: Principal | None = None
        mechanism = "PLAIN" if isinstance(attempt, PlainAttempt) else "EXTERNAL"
        username = attempt.username if isinstance(attempt, PlainAttempt) else None
        fields = {"mechanism": mechanism, "principal": username, "peer": self._name}
        try:
            async with asyncio.timeout(settings.authentication_timeout):
                principal = await self._authenticate(attempt)
        except (Unavailable, TimeoutError) as error:
            _log.warning("login not decided", extra=fields | {"error": str(error) or "time limit"})
            outcome = Outcome.SYS_TEMP
        except Exception:
            _log.exception("login failed", extra=fields)
            outcome = Outcome.SYS
        else:
            outcome = Outcome.OK if principal is not None else Outcome.AUTH
        self._server.observe_login(mechanism, _OUTCOMES[outcome], self._loop.time() - started)
        if outcome is Outcome.AUTH:
            _log.warning("login refused", extra=fields | self._describe_certificate(mechanism))
            await asyncio.sleep(max(0.0, started + settings.refusal_delay - self._loop.time()))
        assert self._sasl is not None
        self._sasl.finish(outcome)
        self._flush_sasl()
        if principal is not None and self._sasl.succeeded and not self._is_ending:
            self._start(principal, self._sasl.remaining())

    async def _authenticate(self, attempt: SaslAttempt) -> Principal | None:
        authenticator, now = self._server.authenticator, self._server.clock()
        if isinstance(attempt, PlainAttempt):
            return await authenticator.authenticate_plain(attempt.username, attempt.password, now)
        if self._certificate is None:
            return None
        return await authenticator.authenticate_external(self._certificate, now)

    def _describe_certificate(self, mechanism: str) -> dict[str, object]:
        """Tell who tried EXTERNAL: the name that an identity would have to have."""
        if mechanism != "EXTERNAL" or self._certificate is None:
            return {}
        try:
            return {"subject": parse_certificate(self._certificate).subject.text}
        except BadRequest as error:
            return {"error": str(error)}

    def _login_done(self, task: asyncio.Task[None]) -> None:
        self._login = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("login failed", exc_info=error, extra={"peer": self._name})
            self.abort()

    # AMQP

    def _start(self, principal: Principal, data: bytes) -> None:
        self.principal = principal
        self._sasl = None
        self._caller = Caller(self._server.api, principal, self._defer)
        self._caller.is_draining = self._server.is_stopping
        self._connection = Connection(self._server.settings.connection, now=self._loop.time())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if data:
            self._backlog = memoryview(data + bytes(self._backlog))
            self._work()
        self._arm()

    def _handle(self, events: list[Event]) -> None:
        caller = self._caller
        assert caller is not None
        for event in events:
            if isinstance(event, RequestsReceived):
                caller.receive(event.link, event.requests)
            elif isinstance(event, LinkAttached):
                caller.attach(event.link)
            elif isinstance(event, LinkDetached):
                caller.detached(event.link)
            else:
                if isinstance(event, Opened):
                    self._opened(event)
                elif event.condition is not None:
                    self.ending = self.ending or "error"
                    _log.debug(
                        "connection ends",
                        extra=self._fields() | {"condition": event.condition, "error": event.description},
                    )
                self._arm()

    def _opened(self, event: Opened) -> None:
        assert self.principal is not None
        _log.debug("connection open", extra=self._fields() | {"container_id": event.container_id})
        if self._server.is_stopping:
            self.close("amqp:connection:forced", "the registry is stopping")
        elif self.principal.expires is not None:
            left = (self.principal.expires - self._server.clock()).total_seconds()
            if left > 0:
                self._expiry = self._loop.call_later(left, self._expire)
            else:
                self._expire()

    def _expire(self) -> None:
        self.close("amqp:unauthorized-access", "access token expired")

    def _defer(self, pending: Pending) -> None:
        def done(task: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first step never gets to its own clean-up.
            pending.abandon()
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("request failed", exc_info=error, extra=self._fields())
                self.close("amqp:internal-error", "internal error")
            self._flush_soon()

        self._server.spawn(pending.finish(self._server.api.settings.operation_timeout), done)

    def drain(self) -> None:
        """Take no more requests."""
        if self._caller is not None:
            self._caller.is_draining = True

    def close(self, condition: str, description: str) -> None:
        """Close the connection and say why; without ceremony if nobody has logged in yet."""
        if self._connection is None:
            self._end()
            return
        self._is_closing = True
        self.ending = self.ending or _ENDINGS.get(condition, "error")
        self._connection.close(condition, description, now=self._loop.time())
        self._flush_soon()
        self._arm()

    def abort(self) -> None:
        """Drop the socket."""
        self._transport.abort()

    # Timers

    def _arm(self) -> None:
        """See that `_tick` is called in time: one timer per socket, moved only to come earlier."""
        if self._is_ending:
            return
        source = self._connection or self._sasl
        deadline = source.next_deadline() if source is not None else None
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self._connection is not None:
            events = self._connection.tick(now)
            if any(isinstance(event, Closed) and event.condition is not None for event in events):
                self.ending = self.ending or "idle"
            self._handle(events)
            self._flush()
        elif self._sasl is not None:
            self._sasl.tick(now)
            if self._sasl.is_over:
                self.ending = "idle"
            self._flush_sasl()
        self._arm()

    def _fields(self) -> dict[str, object]:
        return {"principal": self.principal.name if self.principal is not None else None, "peer": self._name}
