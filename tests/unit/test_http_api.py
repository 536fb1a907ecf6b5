"""The HTTP side without a process: errors nobody can provoke from outside, logins, and the limits of connections.

The ASGI application is called directly where it is the matter; the server listens on 127.0.0.1 where sockets are.
"""

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from kamado.auth import LOCAL_OPERATOR, Principal
from kamado.credentials import CredentialRules
from kamado.document import Identifiers
from kamado.errors import Unauthorized, Unavailable
from kamado.http.api import Api, ApiSettings, respond
from kamado.http.server import Address, Health, HttpServer, HttpServerSettings
from kamado.management import Management, ManagementSettings, Versioned
from kamado.operators import ANONYMOUS_OPERATOR, Login
from kamado.passwords import PasswordHasher
from kamado.storage import open_store

Headers = Sequence[tuple[str, str]]


async def anybody(_: Login | None, __: str) -> Principal:
    return ANONYMOUS_OPERATOR


async def this_machine(_: Login | None, __: str) -> Principal:
    return LOCAL_OPERATOR


class Answer:
    """What an application sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        status = self.messages[0]["status"]
        assert isinstance(status, int)
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


async def call(api: Any, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> Answer:
    """Call an ASGI application as the server would."""
    answer = Answer()

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {
        "type": "http",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("192.0.2.7", 50000),
    }
    await api(scope, receive, answer.send)
    return answer


class FakeManagement:
    """Does the same whatever it is asked."""

    def __init__(self, work: Callable[[], Awaitable[object]]) -> None:
        self.principals: list[Principal] = []
        self._work = work

    async def get_tenant(self, principal: Principal, tenant_id: str) -> Any:
        self.principals.append(principal)
        return await self._work()


def make_api(
    work: Callable[[], Awaitable[object]], access: Any = anybody, **settings: Any
) -> tuple[Api, FakeManagement]:
    management = FakeManagement(work)
    return Api(management, ApiSettings(**settings), access), management  # type: ignore[arg-type]


async def found() -> object:
    return Versioned({"enabled": True}, "v")


def test_unknown_errors_are_logged_and_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Management 3.8: 500 with the same JSON shape."""

    async def work() -> object:
        raise ValueError("secret detail")

    answer = asyncio.run(call(make_api(work)[0], "GET", "/v1/tenants/T1"))
    assert answer.status == 500
    assert json.loads(answer.body) == {"error": "internal error"}
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.__dict__["path"] == "/v1/tenants/T1"


def test_unavailable_says_when_to_try_again() -> None:
    """Configuration 3.2: 503 with Retry-After."""

    async def work() -> object:
        raise Unavailable("the database is busy")

    answer = asyncio.run(call(make_api(work)[0], "GET", "/v1/tenants/T1"))
    assert answer.status == 503
    assert answer.headers["retry-after"] == "2"
    assert json.loads(answer.body) == {"error": "the database is busy"}


def test_a_request_does_not_wait_for_ever() -> None:
    async def work() -> object:
        await asyncio.Event().wait()
        raise AssertionError

    answer = asyncio.run(call(make_api(work, timeout=0.01)[0], "GET", "/v1/tenants/T1"))
    assert answer.status == 503
    assert "may have been done" in json.loads(answer.body)["error"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("LOCALHOST:28080", 200),
        ("registry.localhost:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_no_other_name_for_this_machine_while_nobody_logs_in(host: str, status: int) -> None:
    """Decision 0005: a name that has been made to resolve to this machine gives no page access to the API."""

    async def log_in(_: Login | None, __: str) -> Principal:
        return Principal(name="ada")

    for access, expected in ((this_machine, status), (anybody, 200), (log_in, 200)):
        api, _ = make_api(found, access)
        assert asyncio.run(call(api, "GET", "/v1/tenants/T1", headers=[("Host", host)])).status == expected


async def basic(login: Login | None, source: str) -> Principal:
    """Lets nobody in but one."""
    assert source == "192.0.2.7"
    if login != Login(name="me", password="pässword:1"):
        raise Unauthorized("a login is required")
    return Principal(name=login.name)


def basic_header(text: str | bytes) -> tuple[str, str]:
    return "Authorization", "Basic " + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


ME = basic_header("me:pässword:1")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        # Management 3.11 and 3.15: 401 before everything but a preflight.
        ("GET", "/v1/tenants/T1", [], 401),
        ("GET", "/v1/nothing", [], 401),
        ("PATCH", "/v1/tenants/T1", [], 401),
        ("PUT", "/v1/tenants/T1", [("Content-Length", "100000")], 401),
        ("GET", "/v1/tenants/T1", [ME], 200),
        ("GET", "/v1/tenants/T1", [("Authorization", ME[1].replace("Basic ", "bASIC  "))], 200),
        ("GET", "/v1/nothing", [ME], 404),
        # Another scheme is no login.
        ("GET", "/v1/tenants/T1", [("Authorization", "Bearer abc.def")], 401),
        ("GET", "/v1/tenants/T1", [basic_header("me:other")], 401),
        ("GET", "/v1/tenants/T1", [basic_header(":")], 401),
        # Broken headers, also on paths that do not exist.
        ("GET", "/v1/nothing", [("Authorization", "nonsense")], 400),
        ("GET", "/v1/tenants/T1", [("Authorization", "")], 400),
        ("GET", "/v1/tenants/T1", [("Authorization", "Basic")], 400),
        ("GET", "/v1/tenants/T1", [("Authorization", "Basic !!!")], 400),
        ("GET", "/v1/tenants/T1", [("Authorization", "Basic bWU6cA")], 400),
        ("GET", "/v1/tenants/T1", [basic_header("me")], 400),
        ("GET", "/v1/tenants/T1", [basic_header("me:pässword:1".encode("latin-1"))], 400),
        ("GET", "/v1/tenants/T1", [ME, ME], 400),
        ("GET", "/v1/tenants/T1", [("Authorization", "Basic\u00a0" + ME[1][6:])], 400),
        ("OPTIONS", "/v1/tenants/T1", [("Origin", "http://a"), ("Access-Control-Request-Method", "PUT")], 204),
        ("OPTIONS", "/v1/tenants/T1", [("Origin", "http://a")], 401),
    ],
)
def test_login(method: str, path: str, headers: Headers, status: int) -> None:
    api, management = make_api(found, basic, cors_allowed_origins=frozenset({"http://a"}))
    answer = asyncio.run(call(api, method, path, headers=headers))
    assert answer.status == status
    assert answer.headers.get("www-authenticate") == ('Basic realm="Hono"' if status == 401 else None)
    assert [one.name for one in management.principals] == (["me"] if status == 200 else [])


@pytest.mark.parametrize("header", [("Authorization", "nonsense"), basic_header("who:ever"), ("Authorization", "")])
def test_a_login_that_nobody_asked_for_does_no_harm(header: tuple[str, str]) -> None:
    """Management 3.11: while nobody has to log in, clients that send a login all the same are served."""
    api, management = make_api(found)
    assert asyncio.run(call(api, "GET", "/v1/tenants/T1", headers=[header])).status == 200
    assert management.principals == [ANONYMOUS_OPERATOR]


def test_pages_of_other_origins_are_refused_before_their_login_is_looked_at() -> None:
    """Management 3.10: the rules for origins stay while a login is required."""

    async def access(_: Login | None, __: str) -> Principal:
        raise AssertionError

    api, _ = make_api(found, access)
    assert asyncio.run(call(api, "GET", "/v1/tenants/T1", headers=[("Origin", "http://a"), ME])).status == 403


def test_realm() -> None:
    api, _ = make_api(found, basic, realm="Kamado of plant 7")
    answer = asyncio.run(call(api, "GET", "/v1/tenants/T1"))
    assert answer.headers["www-authenticate"] == 'Basic realm="Kamado of plant 7"'


def test_one_debug_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kamado.http")
    asyncio.run(call(make_api(found)[0], "GET", "/v1/tenants/T1"))
    (record,) = caplog.records
    fields = record.__dict__
    assert record.levelno == logging.DEBUG
    assert (fields["principal"], fields["method"], fields["path"], fields["status"]) == (
        "anonymous",
        "GET",
        "/v1/tenants/T1",
        200,
    )
    assert 0 <= fields["duration"] < 10


def test_a_body_that_breaks_off_changes_nothing() -> None:
    """The peer goes away in the middle of its request."""

    async def main() -> Answer:
        answer = Answer()
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        scope = {
            "type": "http",
            "scheme": "http",
            "method": "PUT",
            "raw_path": b"/v1/tenants/T1",
            "query_string": b"",
            "headers": [],
        }
        await make_api(found)[0](scope, receive, answer.send)
        return answer

    assert asyncio.run(main()).status == 400


# Sockets


class Peer:
    """One connection to a server in this event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: Address) -> "Peer":
        return cls(*await asyncio.open_connection(address.host, address.port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def response(self) -> tuple[int, bytes]:
        """Read one response."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head[9:12]), await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Read until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionResetError:
            return b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):  # the server may be faster
            await self.writer.wait_closed()


async def poll(check: Callable[[], bool]) -> None:
    """Wait until something is so; `serve` sees to it that this has an end."""
    while not check():  # noqa: ASYNC110 - what is looked at tells nobody
        await asyncio.sleep(0.01)


def serve(application: Any, test: Callable[[HttpServer, Address], Awaitable[None]], **settings: Any) -> None:
    """Run a test against a server; the time limits are kept to a twentieth of a second."""

    async def main() -> None:
        server = HttpServer(application, HttpServerSettings(sweep_interval=0.05, **settings))
        address = await server.listen("127.0.0.1", 0)
        try:
            async with asyncio.timeout(60):
                await test(server, address)
        finally:
            await server.stop(0)
        assert not server.state.connections
        assert not server.state.tasks

    asyncio.run(main())


GET = b"GET /v1/tenants/T1 HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD_OF_PUT = b"PUT /v1/tenants/T1 HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"


def test_an_idle_connection_is_closed() -> None:
    async def test(_: HttpServer, address: Address) -> None:
        silent, used = await Peer.connect(address), await Peer.connect(address)
        used.send(GET)
        assert (await used.response())[0] == 200
        assert await silent.rest() == b""
        assert await used.rest() == b""
        await silent.close()
        await used.close()

    serve(make_api(found)[0], test, idle_timeout=0.2)


def test_only_our_own_limits_end_a_connection() -> None:
    """uvicorn's timer of an idle connection (5 s, here 50 ms) must not end one that has a request again."""
    asked = 0

    async def work() -> object:
        nonlocal asked
        asked += 1
        if asked == 2:
            await asyncio.sleep(0.2)
        return Versioned({"enabled": True}, "v")

    async def test(server: HttpServer, address: Address) -> None:
        server._config.timeout_keep_alive = cast(Any, 0.05)
        peer = await Peer.connect(address)
        for _ in range(3):
            peer.send(GET)
            assert (await peer.response())[0] == 200
        connections: set[Any] = set(server.state.connections)
        assert connections
        assert all(one.timeout_keep_alive_task is None for one in connections)
        await peer.close()

    serve(make_api(work)[0], test)


def test_a_body_that_comes_too_slowly_is_the_peers_fault() -> None:
    """Management 3.8: 400, not 503, whichever limit is looked at first."""

    async def test(_: HttpServer, address: Address) -> None:
        peer = await Peer.connect(address)
        peer.send(HEAD_OF_PUT + b"{")
        assert (await peer.response())[0] == 400
        await peer.close()

    serve(make_api(found, timeout=0.05)[0], test, request_timeout=0.2, idle_timeout=60)


@pytest.mark.parametrize("start", [b"GET /v1/ten", GET[:-2], HEAD_OF_PUT + b"{", HEAD_OF_PUT])
def test_a_peer_that_dribbles_does_not_live_for_ever(start: bytes) -> None:
    """One byte now and then keeps no request alive, in its head or in its body."""

    async def test(_: HttpServer, address: Address) -> None:
        peer = await Peer.connect(address)
        peer.send(start)

        async def dribble() -> None:
            while not peer.writer.is_closing():
                peer.send(b"x")
                await asyncio.sleep(0.06)

        async with asyncio.TaskGroup() as group:
            dribbling = group.create_task(dribble())
            received = await peer.rest()
            dribbling.cancel()
        assert received == b"" or received.startswith(b"HTTP/1.1 400 ")
        await peer.close()

    # A body of 10 bytes must not be complete before the time is over.
    serve(make_api(found)[0], test, request_timeout=0.1, idle_timeout=60)


def test_a_peer_that_does_not_read_is_cut_off() -> None:
    large = Versioned({"ext": {"x": "x" * 60000}}, "v")

    async def work() -> object:
        return large

    async def test(server: HttpServer, address: Address) -> None:
        peer = await Peer.connect(address)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(400):
            peer.send(GET)
        await poll(lambda: len(server.state.connections) == 1)
        await poll(lambda: not server.state.connections)
        await peer.close()

    serve(make_api(work)[0], test, request_timeout=0.3)


def test_too_many_connections() -> None:
    async def test(_: HttpServer, address: Address) -> None:
        first = await Peer.connect(address)
        first.send(GET)
        assert (await first.response())[0] == 200
        second = await Peer.connect(address)
        status, body = await second.response()
        assert status == 503
        assert json.loads(body)["error"]
        assert await second.rest() == b""
        first.send(GET)
        assert (await first.response())[0] == 200
        await first.close()
        await second.close()

    serve(make_api(found)[0], test, max_connections=1)


def test_stopping_answers_what_was_asked_and_nothing_else() -> None:
    """Configuration 3.3: running requests end, idle connections close, new ones are refused."""
    asked, release = asyncio.Event(), asyncio.Event()

    async def work() -> object:
        asked.set()
        await release.wait()
        return Versioned({"enabled": True}, "v")

    async def test(server: HttpServer, address: Address) -> None:
        idle, busy = await Peer.connect(address), await Peer.connect(address)
        busy.send(GET + GET)
        await asked.wait()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(server.stop(10))
            assert await idle.rest() == b""
            with pytest.raises(OSError):
                await Peer.connect(address)
            assert not stopping.done()
            release.set()
            assert (await busy.response())[0] == 200
            assert (await busy.response())[0] == 200
            assert await busy.rest() == b""
        await idle.close()
        await busy.close()

    serve(make_api(work)[0], test)


def test_stopping_cuts_off_what_outlasts_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    asked = asyncio.Event()
    outcome: list[str] = []

    async def work() -> object:
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            outcome.append("cancelled")
            raise
        raise AssertionError

    async def test(server: HttpServer, address: Address) -> None:
        peer = await Peer.connect(address)
        peer.send(GET)
        await asked.wait()
        await server.stop(0.05)
        assert outcome == ["cancelled"]
        assert await peer.rest() == b""
        await server.stop(0)
        await peer.close()

    serve(make_api(work)[0], test)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 7\r\n\r\n{} \r\n{}", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{} \r\n\r\n2\r\n{}\r\n0\r\n\r\n"],
)
def test_upgrades_are_ignored_and_bodies_are_not(size: int, body: bytes) -> None:
    """RFC 9110, 7.8: Java's client asks for HTTP/2 with its first request, whatever that is."""
    bodies: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        received, more = b"", True
        while more:
            message = await receive()
            received += message["body"]
            more = message["more_body"]
        bodies.append(received)
        await respond(send, 200, b"{}")

    async def test(_: HttpServer, address: Address) -> None:
        peer = await Peer.connect(address)
        head = b"PUT /v1/tenants/T1 HTTP/1.1\r\nHost: x\r\n"
        data = (head + UPGRADE + body) * 2 + head + body + GET[:-2] + UPGRADE + b"\r\n" + GET
        for start in range(0, len(data), size):
            peer.send(data[start : start + size])
            await asyncio.sleep(0)
        assert [(await peer.response())[0] for number in range(5)] == [200] * 5
        assert bodies == [b"{} \r\n{}"] * 3 + [b"", b""]
        await peer.close()

    serve(application, test)


# Health


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            if await check():
                return
            await asyncio.sleep(0.001)


def test_readiness_depends_on_start_draining_and_database_liveness_does_not() -> None:
    """Configuration 3.1; settled: liveness never depends on the database."""

    async def main() -> None:
        health = Health(ping_timeout=0.05, ping_interval=0)
        watching = asyncio.get_running_loop().create_task(health.watch())

        async def down() -> None:
            raise Unavailable("the database file is gone")

        async def hangs() -> None:
            await asyncio.Event().wait()

        async def up() -> None: ...

        async def statuses() -> dict[str, int]:
            return {path: (await call(health, "GET", path)).status for path in ("/liveness", "/readiness", "/started")}

        async def is_ready() -> bool:
            return (await statuses())["/readiness"] == 200

        async def is_not_ready() -> bool:
            return not await is_ready()

        assert await statuses() == {"/liveness": 200, "/readiness": 503, "/started": 503}
        health.is_started = True
        health.ping = up
        assert await statuses() == {"/liveness": 200, "/readiness": 200, "/started": 200}
        for broken in (down, hangs):
            health.ping = broken
            await eventually(is_not_ready)
            assert await statuses() == {"/liveness": 200, "/readiness": 503, "/started": 200}
            report = json.loads((await call(health, "GET", "/")).body)
            assert (report["status"], report["outcome"]) == ("DOWN", "DOWN")
            assert {check["id"]: check["status"] for check in report["checks"]} == {
                "event-loop": "UP",
                "start": "UP",
                "serving": "UP",
                "database": "DOWN",
            }
            health.ping = up
            await eventually(is_ready)
        health.is_draining = True
        assert await statuses() == {"/liveness": 200, "/readiness": 503, "/started": 200}
        watching.cancel()

    asyncio.run(main())


def test_a_ping_that_fails_for_whatever_reason_makes_it_unready(caplog: pytest.LogCaptureFixture) -> None:
    """Configuration 3.1. The text for whoever asks is fixed, the cause is logged, once; it is asked on and on."""

    async def main() -> None:
        health = Health(ping_interval=0)
        watching = asyncio.get_running_loop().create_task(health.watch())
        health.is_started = True

        async def fails() -> None:
            raise RuntimeError("the handler is closed")

        async def is_unready() -> bool:
            response = await call(health, "GET", "/readiness")
            checks = {check["id"]: check["data"] for check in json.loads(response.body)["checks"]}
            return response.status == 503 and checks["database"] == {"problem": "failed, see the log"}

        async def is_ready() -> bool:
            return (await call(health, "GET", "/readiness")).status == 200

        async def up() -> None: ...

        health.ping = fails
        await eventually(is_unready)
        health.ping = up
        await eventually(is_ready)
        watching.cancel()

    asyncio.run(main())
    (event,) = caplog.records
    assert (event.message, event.exc_info is not None) == ("database not asked whether it answers", True)


def test_three_failed_pings_in_a_row_and_no_fewer_make_it_unready() -> None:
    """Configuration 3.1."""

    async def main() -> None:
        answers = [False, False, True, False, False, False]
        seen: list[int] = []
        health = Health(ping_interval=0)
        done = asyncio.Event()

        async def ping() -> None:
            seen.append((await call(health, "GET", "/readiness")).status)
            if not answers:
                done.set()
            elif not answers.pop(0):
                raise Unavailable("no")

        health.is_started = True
        health.ping = ping
        watching = asyncio.get_running_loop().create_task(health.watch())
        await done.wait()
        watching.cancel()
        assert seen[:7] == [200, 200, 200, 200, 200, 200, 503]

    asyncio.run(main())


def test_probes_cannot_keep_the_database_busy() -> None:
    async def main() -> None:
        health = Health(ping_interval=60)
        pings: list[None] = []

        async def ping() -> None:
            pings.append(None)

        health.is_started = True
        health.ping = ping
        watching = asyncio.get_running_loop().create_task(health.watch())
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(call(health, "GET", "/readiness"))
        watching.cancel()
        assert len(pings) == 1

    asyncio.run(main())


def test_an_open_database_is_read_through_it_all(tmp_path: Path) -> None:
    """The parts together, without a process."""

    async def main() -> None:
        store = await open_store(f"sqlite:///{tmp_path / 'registry.db'}")
        hasher = PasswordHasher(workers=1, queue=1, cost=4)
        identifiers = Identifiers()
        management = Management(
            store,
            hasher,
            identifiers,
            CredentialRules(identifiers=identifiers),
            ManagementSettings(),
            lambda: datetime.now(UTC),
        )
        api = Api(management, ApiSettings(), anybody)
        created = await call(api, "POST", "/v1/tenants/T1")
        assert (created.status, created.body) == (201, b'{"id":"T1"}')
        assert created.headers["location"] == "/v1/tenants/T1"
        read = await call(api, "GET", "/v1/tenants/T1")
        assert (read.status, read.body, read.headers["etag"]) == (200, b'{"enabled":true}', created.headers["etag"])
        hasher.close()
        await store.close()

    asyncio.run(main())
