"""The client behind `kamado ask`, against our own server's engine over a socket."""

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kamado.amqp import codec
from kamado.amqp.client import (
    AuthenticationFailed,
    ClientSettings,
    ConnectionFailed,
    LinkRefused,
    Reply,
    RequestRejected,
    TimedOut,
    ask,
)
from kamado.amqp.connection import Connection, ConnectionSettings, Link, LinkAttached, Request, RequestsReceived
from kamado.amqp.sasl import SASL_HEADER, Outcome, PlainAttempt, SaslServer


class Server:
    """An AMQP server of one connection, whose answers the test chooses."""

    def __init__(
        self,
        *,
        outcome: Outcome = Outcome.OK,
        mechanisms: tuple[str, ...] = ("PLAIN",),
        refuse: str | None = None,
        credit: int = 100,
        answer: Callable[[Link, Link, Request], None] | None = None,
        max_frame_size: int = 32768,
    ) -> None:
        self.outcome = outcome
        self.mechanisms = mechanisms
        self.refuse = refuse
        self.credit = credit
        self.answer = answer
        self.max_frame_size = max_frame_size
        self.attempts: list[object] = []
        self.requests: list[Request] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sasl = SaslServer(self.mechanisms, now=0.0)
        while not sasl.succeeded and not sasl.is_over:
            data = await reader.read(65536)
            if not data:
                return
            for attempt in sasl.receive(data, 0.0):
                self.attempts.append(attempt)
                sasl.finish(self.outcome)
            writer.write(sasl.data_to_send())
        if sasl.is_over:
            return
        settings = ConnectionSettings(container_id="server", max_frame_size=self.max_frame_size)
        connection = Connection(settings, now=0.0)
        data = sasl.remaining() or await reader.read(65536)
        reply_link: Link | None = None
        while data:
            for event in connection.receive(data, 0.0):
                if isinstance(event, LinkAttached):
                    if self.refuse == event.link.address:
                        event.link.refuse("amqp:unauthorized-access", "unauthorized")
                        continue
                    event.link.accept(self.credit)
                    if event.link.is_sender:
                        reply_link = event.link
                elif isinstance(event, RequestsReceived):
                    self.requests += event.requests
                    assert reply_link is not None
                    if self.answer is not None:
                        self.answer(event.link, reply_link, event.requests[0])
            writer.write(connection.data_to_send())
            if connection.is_closed:
                return
            data = await reader.read(65536)


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


def exchange(serve: Serve, *, timeout: float = 60.0, **arguments: Any) -> Reply:
    """Run a server and ask it."""

    async def run() -> Reply:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            settings = ClientSettings(
                host="127.0.0.1",
                port=server.sockets[0].getsockname()[1],
                username="user",
                password="secret",
                timeout=timeout,
            )
            return await ask(
                settings, "registration/acme", **{"subject": "assert", "reply_to": "registration/acme/r", **arguments}
            )

    return asyncio.run(run())


def reply_with(**fields: Any) -> Callable[[Link, Link, Request], None]:
    def answer(link: Link, reply_link: Link, request: Request) -> None:
        link.accept_delivery(request)
        assert request.correlation_id is not None
        reply_link.send(codec.encode_reply("registration", request.correlation_id, **fields))
        link.give_credit()

    return answer


def test_a_request_and_its_reply() -> None:
    answer = reply_with(status=200, payload=b'{"device-id":"d1"}', cache_control="max-age = 300", tenant_id="acme")
    server = Server(answer=answer)
    reply = exchange(server.serve, application_properties={"device_id": "d1"}, body=b"{}")
    assert server.attempts == [PlainAttempt("", "user", "secret")]
    (request,) = server.requests
    assert (request.subject, request.reply_to) == ("assert", "registration/acme/r")
    assert request.application_properties == {"device_id": "d1"}
    assert request.body == b"{}"
    assert reply == Reply(
        200,
        b'{"device-id":"d1"}',
        "application/json",
        "max-age = 300",
        {"status": 200, "tenant_id": "acme", "cache_control": "max-age = 300"},
    )


def test_a_reply_without_a_body() -> None:
    reply = exchange(Server(answer=reply_with(status=404)).serve)
    assert (reply.status, reply.payload, reply.content_type, reply.cache_control) == (404, None, None, None)


def test_large_requests_and_replies() -> None:
    server = Server(answer=reply_with(status=200, payload=b"y" * 200_000), max_frame_size=600)
    reply = exchange(server.serve, body=b"x" * 100_000)
    assert server.requests[0].body == b"x" * 100_000
    assert reply.payload == b"y" * 200_000


def test_a_reply_address_is_made_up() -> None:
    server = Server(answer=reply_with(status=200))
    exchange(server.serve, reply_to=None)
    reply_to = server.requests[0].reply_to
    assert reply_to is not None
    assert reply_to.startswith("registration/acme/")
    assert len(reply_to) == len("registration/acme/") + 36


def test_a_status_of_another_type_is_no_status() -> None:
    # amqp-apis 7: clients read an int and nothing else
    def answer(link: Link, reply_link: Link, request: Request) -> None:
        assert request.correlation_id is not None
        message_id, _ = codec.decode(request.correlation_id)
        reply_link.send(codec.encode_message(codec.Properties(correlation_id=message_id), {"status": 200}))

    assert exchange(Server(answer=answer).serve).status is None


@pytest.mark.parametrize(
    ("server", "text"),
    [
        (Server(outcome=Outcome.AUTH), "the server does not accept these credentials"),
        (Server(outcome=Outcome.SYS_TEMP), "the server cannot check credentials now; try again later"),
        (Server(outcome=Outcome.SYS_PERM), "the server refuses the login (SASL outcome 3)"),
        (Server(mechanisms=("EXTERNAL",)), "the server offers EXTERNAL, not PLAIN"),
    ],
)
def test_failed_logins(server: Server, text: str) -> None:
    with pytest.raises(AuthenticationFailed, match="^" + text.replace("(", r"\(").replace(")", r"\)")):
        exchange(server.serve)


@pytest.mark.parametrize("address", ["registration/acme", "registration/acme/r"])
def test_refused_links(address: str) -> None:
    with pytest.raises(LinkRefused) as raised:
        exchange(Server(refuse=address).serve)
    assert raised.value.condition == "amqp:unauthorized-access"
    assert str(raised.value) == f"the server refuses a link to {address}: amqp:unauthorized-access, unauthorized"


def test_rejected_and_released_requests() -> None:
    def reject(link: Link, _reply_link: Link, request: Request) -> None:
        link.reject_delivery(request, "hono:bad-request", "malformed request message")

    with pytest.raises(RequestRejected) as raised:
        exchange(Server(answer=reject).serve)
    assert raised.value.condition == "hono:bad-request"
    assert str(raised.value) == "the server rejects the request: hono:bad-request, malformed request message"

    def release(link: Link, _reply_link: Link, request: Request) -> None:
        link.release_delivery(request)

    with pytest.raises(RequestRejected, match="the server does not take the request now"):
        exchange(Server(answer=release).serve)


def test_what_did_not_come_in_time() -> None:
    def accept(link: Link, _reply_link: Link, request: Request) -> None:
        link.accept_delivery(request)

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    cases: list[tuple[Serve, str]] = [
        (silence, "no answer to the login within 1 s"),
        (Server(credit=0).serve, "no credit for the request within 1 s"),
        (Server().serve, "no answer to the request within 1 s"),
        (Server(answer=accept).serve, "the request was accepted, but no reply came within 1 s"),
    ]
    for serve, text in cases:
        with pytest.raises(TimedOut, match=text):
            exchange(serve, timeout=1.0)


def test_the_server_ends_the_connection() -> None:
    def detach(link: Link, _reply_link: Link, _request: Request) -> None:
        link.detach("amqp:resource-deleted", "tenant gone")

    with pytest.raises(ConnectionFailed) as raised:
        exchange(Server(answer=detach).serve)
    assert raised.value.condition == "amqp:resource-deleted"
    assert str(raised.value) == "the server detached registration/acme: amqp:resource-deleted, tenant gone"

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.close()

    with pytest.raises(ConnectionFailed, match="the server closed the connection"):
        exchange(hang_up)


def test_a_reply_to_somebody_else() -> None:
    def answer(_link: Link, reply_link: Link, _request: Request) -> None:
        reply_link.send(codec.encode_reply("registration", codec.encode("other"), 200))

    with pytest.raises(ConnectionFailed, match="the server sent a reply to another request"):
        exchange(Server(answer=answer).serve)


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", SASL_HEADER + bytes(100), SASL_HEADER + b"\xff" * 100]
)
def test_a_server_of_something_else(data: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(data)
        await reader.read()
        writer.close()

    with pytest.raises(ConnectionFailed, match=r"the server does not speak AMQP 1\.0"):
        exchange(serve)


def test_nobody_listens() -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        await ask(ClientSettings(host="127.0.0.1", port=port, username="u", password="p"), "tenant", subject="get")

    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:\d+: "):
        asyncio.run(run())


def test_tls_with_a_server_that_has_none() -> None:
    async def run() -> None:
        server = await asyncio.start_server(Server().serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            context = ssl.create_default_context()
            await ask(ClientSettings(host="127.0.0.1", port=port, ssl_context=context, timeout=60), "t", subject="get")

    with pytest.raises(ConnectionFailed):
        asyncio.run(run())


def test_settings_do_not_show_the_password() -> None:
    assert "secret" not in repr(ClientSettings(host="h", port=1, username="u", password="secret"))
