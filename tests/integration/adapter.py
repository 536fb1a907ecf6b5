"""A stock AMQP client, python-qpid-proton, that acts as a protocol adapter does.

    with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
        reply = adapter.request("registration/example", "assert", properties={"device_id": "d1"})
        assert reply.status == 200

Proton's protocol engine is driven by hand over a socket, so that a test decides what is sent when and sees each frame's
effect: refused links, dispositions, credit, replies byte by byte. Nothing here shares code with the registry.
"""

import json
import select
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from proton import (
    SSL,
    Collector,
    Connection,
    Data,
    Delivery,
    Endpoint,
    Event,
    Link,
    Message,
    Receiver,
    Sender,
    SSLDomain,
    Terminus,
    Transport,
    int32,
    symbol,
)

__all__ = [
    "Adapter",
    "AuthenticationFailed",
    "ClientTls",
    "ConnectionClosed",
    "LinkRefused",
    "Reply",
    "read_sections",
]

TIMEOUT = 60.0
"""Seconds until a test fails; generous, since the machine may be busy with other tests."""
HOST = "127.0.0.1"


class ConnectionClosed(Exception):
    """The server closed the connection, or the socket."""

    def __init__(self, condition: str | None, description: str | None) -> None:
        super().__init__(f"{condition}: {description}")
        self.condition = condition
        self.description = description


class AuthenticationFailed(ConnectionClosed):
    """SASL ended with another outcome than ok."""

    def __init__(self, outcome: int) -> None:
        super().__init__(None, f"SASL outcome {outcome}")
        self.outcome = outcome


class LinkRefused(Exception):
    """The server refused a link in the way stock clients expect: attach without termini, then detach with an error."""

    def __init__(self, link: Link) -> None:
        condition = link.remote_condition
        self.condition: str | None = str(condition.name) if condition else None
        self.description: str | None = condition.description if condition else None
        super().__init__(f"{self.condition}: {self.description}")


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """Whom a client trusts, and its own certificate."""

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = "localhost"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply message as Proton decoded it, and its bytes."""

    message: Any
    raw: bytes
    link: Any = field(repr=False)
    delivery: Any = field(repr=False)

    @property
    def status(self) -> int | None:
        """The status as stock clients read it: an AMQP int, anything else is no status (amqp-apis 7)."""
        status = (self.message.properties or {}).get("status")
        return int(status) if type(status) is int32 else None

    @property
    def properties(self) -> dict[str, Any]:
        return dict(self.message.properties or {})

    @property
    def cache_control(self) -> str | None:
        value = self.properties.get("cache_control")
        assert value is None or type(value) is str, type(value)
        return value

    @property
    def tenant_id(self) -> str | None:
        value = self.properties.get("tenant_id")
        assert value is None or type(value) is str, type(value)
        return value

    @property
    def device_id(self) -> str | None:
        value = self.properties.get("device_id")
        assert value is None or type(value) is str, type(value)
        return value

    @property
    def correlation_type(self) -> str:
        """The AMQP type of the correlation-id; Proton's `Message` does not tell it."""
        data = Data()
        data.decode(self.raw)
        data.rewind()
        data.next()
        data.enter()
        data.next()
        data.next()
        data.enter()
        # message-id, user-id, to, subject, reply-to, correlation-id
        for _ in range(6):
            data.next()
        return str(Data.type_names[data.type() or Data.NULL])

    @property
    def body(self) -> bytes | None:
        """The bytes of the data section; `None` if there is none."""
        sections = [content for code, content in read_sections(self.raw) if code in {0x75, 0x76, 0x77}]
        if not sections:
            return None
        assert len(sections) == 1
        assert read_sections(self.raw)[-1][0] == 0x75, "the body of a reply is a data section"
        return sections[0]

    def json(self) -> Any:
        """The payload as stock clients take it: only of a data section with content-type application/json."""
        assert self.message.content_type == "application/json"
        assert type(self.message.content_type) is symbol
        body = self.body
        assert body is not None
        return json.loads(body)


def read_sections(raw: bytes) -> list[tuple[int, bytes]]:
    """Split a message into its sections by Proton's codec: descriptor code and content of each.

    Binary content is given as it is, anything else as it is encoded.
    """
    sections: list[tuple[int, bytes]] = []
    data = Data()
    data.decode(raw)
    rest = raw
    while rest:
        one = Data()
        used = one.decode(rest)
        one.rewind()
        one.next()
        assert one.is_described()
        one.enter()
        one.next()
        code = int(one.get_ulong())
        one.next()
        content = bytes(one.get_binary()) if one.type() == Data.BINARY else rest[3:used]
        sections.append((code, content))
        rest = rest[used:]
    return sections


class Adapter:
    """One connection; logs in and opens it at once.

    Args:
        port: On 127.0.0.1.
        username: PLAIN if given, else EXTERNAL.
        password: For PLAIN.
        tls: Speak TLS.
        timeout: Seconds for everything that is waited for.
        idle_timeout: Seconds that are advertised to the server; 0 for none.
        max_frame_size: Of frames to this client; `None` leaves it to Proton.
    """

    def __init__(
        self,
        port: int,
        username: str | None = None,
        password: str | None = None,
        *,
        tls: ClientTls | None = None,
        timeout: float = TIMEOUT,
        idle_timeout: float = 8.0,
        max_frame_size: int | None = None,
    ) -> None:
        self.timeout = timeout
        self.replies: list[Reply] = []
        """Replies that no request has taken, in the order they came."""
        self.accepts_replies = True
        """Whether replies are accepted and settled as they come, as stock clients do."""
        self.socket = socket.create_connection((HOST, port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._collector = Collector()
        self._transport = Transport()
        self.connection = Connection()
        self.connection.collect(self._collector)
        self.connection.container = f"Hono Test-{uuid.uuid4()}"
        sasl = self._transport.sasl()
        sasl.allow_insecure_mechs = True
        if username is not None:
            self.connection.user = username
            self.connection.password = password or ""
            sasl.allowed_mechs("PLAIN")
        else:
            sasl.allowed_mechs("EXTERNAL")
        self._transport.idle_timeout = idle_timeout
        if max_frame_size is not None:
            self._transport.max_frame_size = max_frame_size
        if tls is not None:
            domain = SSLDomain(SSLDomain.MODE_CLIENT)
            domain.set_trusted_ca_db(str(tls.ca_file))
            domain.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
            if tls.cert_file is not None:
                domain.set_credentials(str(tls.cert_file), str(tls.key_file), None)
            self._ssl = SSL(self._transport, domain)
            self._ssl.peer_hostname = tls.server_name
        self._sasl = sasl
        self._transport.bind(self.connection)
        self.connection.open()
        self.session = self.connection.session()
        self.session.open()
        self._links: dict[str, tuple[Sender, Receiver]] = {}
        self._tags = 0
        self._names = 0
        self._partial: dict[str, bytes] = {}
        self._is_lost = False
        try:
            self.wait(lambda: bool(self.connection.state & Endpoint.REMOTE_ACTIVE), "open")
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection as clients do, and the socket."""
        try:
            if not self._is_lost and not self.connection.state & Endpoint.LOCAL_CLOSED:
                self.connection.close()
                self.wait(lambda: bool(self.connection.state & Endpoint.REMOTE_CLOSED), "close")
        except (ConnectionClosed, OSError):
            pass
        finally:
            self.socket.close()

    def abort(self) -> None:
        """Drop the socket without a word."""
        self.socket.close()

    # Links

    def attach_sender(
        self, address: str | None, *, settle_mode: int = Link.SND_UNSETTLED, await_credit: bool = True
    ) -> Any:
        """Attach a request link.

        Raises:
            LinkRefused: The server refused it.
        """
        self._names += 1
        link = self.session.sender(f"auto-{self._names}")
        link.snd_settle_mode = settle_mode
        link.rcv_settle_mode = Link.RCV_FIRST
        if address is None:
            link.target.type = Terminus.UNSPECIFIED
        else:
            link.target.address = address
        link.open()
        self._await_attach(link)
        if await_credit:
            self.wait(lambda: link.credit > 0, "credit")
        return link

    def attach_receiver(self, address: str | None, *, credit: int = 200, dynamic: bool = False) -> Any:
        """Attach a reply link and give credit.

        Raises:
            LinkRefused: The server refused it.
        """
        self._names += 1
        link = self.session.receiver(f"auto-{self._names}")
        link.snd_settle_mode = Link.SND_UNSETTLED
        link.rcv_settle_mode = Link.RCV_FIRST
        if address is not None:
            link.source.address = address
        elif not dynamic:
            link.source.type = Terminus.UNSPECIFIED
        link.source.dynamic = dynamic
        link.open()
        self._await_attach(link)
        if credit:
            link.flow(credit)
            self.pump()
        return link

    def _await_attach(self, link: Link) -> None:
        self.wait(lambda: not link.state & Endpoint.REMOTE_UNINIT, "attach")
        terminus = link.remote_source if link.is_receiver else link.remote_target
        if terminus.type == Terminus.UNSPECIFIED or link.state & Endpoint.REMOTE_CLOSED:
            # The pattern of a refusal is exact (amqp-apis 4.3): termini null, detach in the same write.
            assert link.state & Endpoint.REMOTE_CLOSED, "attach without terminus, and no detach beside it"
            assert link.remote_source.type == Terminus.UNSPECIFIED
            assert link.remote_target.type == Terminus.UNSPECIFIED
            link.close()
            self.pump()
            raise LinkRefused(link)

    def detach(self, link: Link, *, closed: bool = True) -> None:
        """Detach a link and wait for the server's answer."""
        if closed:
            link.close()
        else:
            link.detach()
        self.wait(lambda: bool(link.state & Endpoint.REMOTE_CLOSED), "detach")

    def links(self, address: str) -> tuple[Any, Any]:
        """The two links of an API and a tenant; attached at the first call, the receiver first (amqp-apis 4.1)."""
        if address not in self._links:
            receiver = self.attach_receiver(f"{address}/{uuid.uuid4()}")
            self._links[address] = self.attach_sender(address), receiver
        return self._links[address]

    # Requests

    def message(
        self,
        subject: str | None = None,
        *,
        reply_to: str | None = None,
        properties: Mapping[str, Any] | None = None,
        body: bytes | str | None = None,
        message_id: Any = None,
        correlation_id: Any = None,
    ) -> Any:
        """Make a request message as stock clients do (amqp-apis 6); bytes or text of a body go in a data section."""
        message: Any = Message()
        message.subject = subject
        message.reply_to = reply_to
        message.id = message_id
        message.correlation_id = correlation_id
        if properties is not None:
            message.properties = dict(properties)
        if body is not None:
            message.body = body.encode() if isinstance(body, str) else body
            message.inferred = True
            message.content_type = "application/json"
        return message

    def send(self, link: Sender, message: Any, *, settled: bool = False) -> Any:
        """Send a message, or ready-made bytes, on a request link; does not wait for its disposition."""
        self._tags += 1
        delivery = link.delivery(f"{self._tags}")
        link.stream(message.encode() if isinstance(message, Message) else bytes(message))
        link.advance()
        if settled:
            delivery.settle()
        self.pump()
        return delivery

    def await_disposition(self, delivery: Delivery) -> Any:
        """Wait until the server has settled a delivery, and return its state (`Delivery.ACCEPTED`, ...)."""
        self.wait(lambda: delivery.settled, "a settled disposition")
        return delivery.remote_state

    def request(
        self,
        address: str,
        subject: str,
        *,
        properties: Mapping[str, Any] | None = None,
        body: bytes | str | None = None,
    ) -> Reply:
        """Send a request and return its reply; the reply link has as much credit as before, as stock clients see to."""
        sender, receiver = self.links(address)
        correlation = f"test-client-{uuid.uuid4()}"
        message = self.message(
            subject,
            reply_to=receiver.source.address,
            properties=properties,
            body=body,
            message_id=correlation,
        )
        reply = self.exchange(sender, message, correlation)
        receiver.flow(1)
        return reply

    def exchange(self, sender: Sender, message: Any, correlation: object) -> Reply:
        """Send a message, see it accepted, and return the reply with that correlation-id."""
        delivery = self.send(sender, message)
        assert self.await_disposition(delivery) == Delivery.ACCEPTED
        delivery.settle()
        return self.await_reply(correlation)

    def await_reply(self, correlation: object) -> Reply:
        """Wait for the reply with a correlation-id; others stay in `replies`."""

        def find() -> Reply | None:
            return next((reply for reply in self.replies if reply.message.correlation_id == correlation), None)

        reply: Reply = self.wait(find, f"a reply to {correlation!r}")
        self.replies.remove(reply)
        return reply

    # The engine

    def wait(self, check: Callable[[], Any], what: str = "it") -> Any:
        """Move bytes until `check` returns something true; return that.

        Raises:
            ConnectionClosed: The connection ended before.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            result = check()
            if result:
                return result
            self._raise_if_over()
            assert time.monotonic() < deadline, f"{what} did not come within {self.timeout} s"
            self.pump(0.05)

    def wait_for_close(self) -> ConnectionClosed:
        """Wait until the server closes the connection, and return why."""
        try:
            self.wait(lambda: False, "the end of the connection")
        except ConnectionClosed as closed:
            return closed
        raise AssertionError

    def pump(self, patience: float = 0.0) -> None:
        """Move bytes both ways once; wait for input for at most `patience` seconds."""
        self._write()
        if self._is_lost:
            return
        readable, _, _ = select.select([self.socket], [], [], patience)
        if readable:
            self._read()
        self._transport.tick(time.time())
        self._process()
        self._write()

    def _write(self) -> None:
        while not self._is_lost and (pending := self._transport.pending()) > 0:
            try:
                sent = self.socket.send(self._transport.peek(pending) or b"")
            except OSError:
                self._lose()
                return
            self._transport.pop(sent)

    def _read(self) -> None:
        capacity = self._transport.capacity()
        try:
            data = self.socket.recv(capacity) if capacity > 0 else b""
        except OSError:
            data = b""
        if data:
            self._transport.push(data)
        else:
            self._process()
            self._lose()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._transport.close_tail()
            self._process()

    def _process(self) -> None:
        while (event := self._collector.peek()) is not None:
            delivery = event.delivery
            if event.type == Event.DELIVERY and delivery is not None and delivery.link.is_receiver:
                self._receive(delivery)
            self._collector.pop()

    def _receive(self, delivery: Delivery) -> None:
        link = delivery.link
        if delivery.aborted or not delivery.readable:
            return
        data = link.recv(delivery.pending)
        raw = self._partial.pop(link.name, b"") + (data or b"")
        if delivery.partial:
            self._partial[link.name] = raw
            return
        message = Message()
        message.decode(raw)
        link.advance()
        self.replies.append(Reply(message=message, raw=raw, link=link, delivery=delivery))
        if self.accepts_replies:
            delivery.update(Delivery.ACCEPTED)
            delivery.settle()

    def _raise_if_over(self) -> None:
        outcome = self._sasl.outcome
        if outcome is not None and outcome != self._sasl.OK:
            raise AuthenticationFailed(int(outcome))
        if self.connection.state & Endpoint.REMOTE_CLOSED:
            condition = self.connection.remote_condition
            raise ConnectionClosed(
                str(condition.name) if condition else None, condition.description if condition else None
            )
        if self._is_lost:
            condition = self._transport.condition
            raise ConnectionClosed(None, condition.description if condition else "socket closed")


def tls_socket(port: int, tls: ClientTls) -> ssl.SSLSocket:
    """Open a bare TLS connection, for tests that speak SASL by hand."""
    context = ssl.create_default_context(cafile=str(tls.ca_file))
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    plain = socket.create_connection((HOST, port), timeout=TIMEOUT)
    return context.wrap_socket(plain, server_hostname=tls.server_name)
