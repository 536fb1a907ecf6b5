"""AMQP over sockets: logins, limits, timers, fairness and the end, with fakes behind the front door."""

import asyncio
import logging
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from tests.integration.certificates import tls_files
from tests.unit.amqp.fake_lookup import Clock, FakeLookup
from tests.unit.amqp.peer import message

from kamado.amqp import codec
from kamado.amqp.api import Api, ApiSettings
from kamado.amqp.client import AuthenticationFailed, ClientSettings, ConnectionFailed, ask
from kamado.amqp.connection import AMQP_HEADER, ConnectionSettings
from kamado.amqp.sasl import SaslClient
from kamado.amqp.server import Address, AmqpServer, AmqpServerSettings
from kamado.auth import ADAPTER_AUTHORITIES, Authenticator, Authorities, Mechanism, Principal
from kamado.config import AmqpTlsConfig, tls_context
from kamado.errors import Unavailable
from kamado.lookup import LookupService
from kamado.store import DamagedRow

DEADLINE = 60.0
DEVICE: dict[str, object] = {"device_id": "d1"}


class FakeAuthenticator:
    """Knows one user; `behave` runs before the decision."""

    def __init__(self, clock: Clock, lifetime: timedelta | None) -> None:
        self.clock = clock
        self.lifetime = lifetime
        self.behave: Callable[[], Awaitable[Any]] | None = None
        self.current = True
        self.unreadable: dict[str, int] = {}
        """Principal whose identity is damaged -> how often it was looked at."""

    async def authenticate_plain(self, name: str, password: str, now: datetime) -> Principal | None:
        if self.behave is not None:
            await self.behave()
        if password != "secret":
            return None
        return Principal(
            name=name,
            authorities=Authorities(ADAPTER_AUTHORITIES),
            expires=None if self.lifetime is None else now + self.lifetime,
            mechanism=Mechanism.PLAIN,
        )

    async def authenticate_external(self, certificate: bytes, now: datetime) -> Principal | None:
        return None

    async def is_current(self, principal: Principal) -> bool:
        if principal.name in self.unreadable:
            self.unreadable[principal.name] += 1
            raise DamagedRow(f"the document in identities of '{principal.name}' cannot be read")
        return self.current


class Setting:
    """A server and what is behind it."""

    def __init__(self, *, lifetime: timedelta | None = None, connection: dict[str, Any] | None = None, **settings: Any):
        self.clock = Clock()
        self.lookup = FakeLookup()
        self.authenticator = FakeAuthenticator(self.clock, lifetime)
        api = Api(cast(LookupService, self.lookup), ApiSettings(operation_timeout=DEADLINE), self.clock)
        self.server = AmqpServer(
            api,
            cast(Authenticator, self.authenticator),
            AmqpServerSettings(
                connection=ConnectionSettings(container_id="server", close_timeout=0.2, **(connection or {})),
                **({"refusal_delay": 0.0} | settings),
            ),
            self.clock,
        )
        self.address = Address("", 0)

    @asynccontextmanager
    async def running(self, context: ssl.SSLContext | None = None) -> AsyncIterator["Setting"]:
        self.address = await self.server.listen("127.0.0.1", 0, context)
        try:
            yield self
        finally:
            await self.server.stop(0)
            assert not self.server.peers

    async def ask(self, password: str = "secret", device_id: str = "d1") -> Any:
        settings = ClientSettings(
            host=self.address.host,
            port=self.address.port,
            username="adapter",
            password=password,
            timeout=DEADLINE,
        )
        reply = await ask(
            settings, "registration/acme", subject="assert", application_properties={"device_id": device_id}
        )
        return reply.status

    async def connect(self) -> "Client":
        return Client(*await asyncio.open_connection(self.address.host, self.address.port, limit=2**24))


class Client:
    """The other end, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.delivery_id = 0

    def write(self, performative: codec.Performative, payload: bytes = b"") -> None:
        self.writer.write(codec.encode_frame(0, performative, payload))

    async def log_in(self, username: str = "adapter") -> "Client":
        sasl = SaslClient(username, "secret")
        self.writer.write(sasl.data_to_send())
        while sasl.outcome is None:
            sasl.receive(await self.reader.read(4096))
            self.writer.write(sasl.data_to_send())
        assert sasl.outcome == 0
        return self

    async def open(self) -> "Client":
        self.writer.write(AMQP_HEADER)
        self.write(codec.Open(container_id="client"))
        assert await self.reader.readexactly(8) == AMQP_HEADER
        await self.read_until(codec.Open)
        return self

    async def attach(self, credit: int = 10_000) -> "Client":
        self.write(codec.Begin(next_outgoing_id=0, incoming_window=2**31 - 1, outgoing_window=2**31 - 1))
        reply_to = f"registration/acme/{id(self)}"
        source, target = codec.Terminus.source(reply_to), codec.Terminus.target(None)
        self.write(codec.Attach(name="r", handle=0, role=True, source=source, target=target))
        self.write(
            codec.Attach(
                name="s",
                handle=1,
                role=False,
                source=codec.Terminus.source(None),
                target=codec.Terminus.target("registration/acme"),
                initial_delivery_count=0,
            )
        )
        self.write(
            codec.Flow(
                next_incoming_id=0,
                incoming_window=2**31 - 1,
                next_outgoing_id=0,
                outgoing_window=2**31 - 1,
                handle=0,
                delivery_count=0,
                link_credit=credit,
            )
        )
        await self.read_until(codec.Flow)
        return self

    def request(self, count: int = 1, **fields: Any) -> None:
        """Write requests, all at once."""
        data = b""
        for _ in range(count):
            transfer = codec.Transfer(
                handle=1,
                delivery_id=self.delivery_id,
                delivery_tag=self.delivery_id.to_bytes(4, "big"),
                message_format=0,
            )
            self.delivery_id += 1
            payload = message(reply_to=f"registration/acme/{id(self)}", application_properties=DEVICE, **fields)
            data += codec.encode_frame(0, transfer, payload)
        self.writer.write(data)

    async def read(self) -> codec.Performative | None:
        head = await asyncio.wait_for(self.reader.readexactly(8), DEADLINE)
        size, offset, _, _ = struct.unpack(">IBBH", head)
        assert offset == 2
        body = await asyncio.wait_for(self.reader.readexactly(size - 8), DEADLINE)
        return codec.decode_performative(body)[0] if body else None

    async def read_until(self, kind: type[Any]) -> Any:
        while True:
            performative = await self.read()
            if isinstance(performative, kind):
                return performative

    async def replies(self, count: int) -> None:
        for _ in range(count):
            await self.read_until(codec.Transfer)

    async def close_reason(self) -> str | None:
        close = await self.read_until(codec.Close)
        return str(close.error.condition) if close.error is not None else None

    async def at_end(self) -> bool:
        """Wait for the end of the socket."""
        try:
            while await asyncio.wait_for(self.reader.read(65536), DEADLINE):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.writer.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario as the process would; errors that the loop swallowed fail it."""
    errors: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with asyncio.timeout(6 * DEADLINE):
            await scenario()

    uvloop.run(main())
    assert errors == []


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not check():  # noqa: ASYNC110 - what is asked cannot tell
            await asyncio.sleep(0.005)


# Logins (amqp-apis 1.3)


def test_login_and_request() -> None:
    async def scenario() -> None:
        async with Setting().running() as setting:
            assert await setting.ask() == 200
            assert await setting.ask(device_id="nope") == 404
            with pytest.raises(AuthenticationFailed, match="does not accept"):
                await setting.ask(password="wrong")

    run(scenario)


def test_outcome_1_is_delayed_and_logged_without_the_password(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with Setting(refusal_delay=0.1).running() as setting:
            loop = asyncio.get_running_loop()
            start = loop.time()
            with pytest.raises(AuthenticationFailed):
                await setting.ask(password="sesame")
            # The loop's clock has a resolution of a millisecond.
            assert loop.time() - start >= 0.098

    run(scenario)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "login refused"
    assert "sesame" not in str(vars(record))


def test_a_refused_login_by_certificate_names_its_subject(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """authentication 4.3: the operator sees under which name the identity was looked for."""
    files = tls_files(tmp_path)
    tls = AmqpTlsConfig(cert_file=files.cert_file, key_file=files.key_file, client_ca_file=files.client_ca_file)
    client = ssl.create_default_context(cafile=str(files.ca_file))
    client.load_cert_chain(*files.client(tmp_path, "client", "CN=adapter 7,O=X"))

    async def scenario() -> None:
        async with Setting().running(tls_context(tls)) as setting:
            reader, writer = await asyncio.open_connection(
                setting.address.host, setting.address.port, ssl=client, server_hostname="localhost"
            )
            init = codec.SaslInit(mechanism="EXTERNAL", initial_response=b"")
            writer.write(b"AMQP\x03\x01\x00\x00" + codec.encode_frame(0, init, frame_type=1))
            assert await reader.read(-1)
            writer.close()

    run(scenario)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (record.getMessage(), vars(record)["subject"]) == ("login refused", "CN=adapter 7,O=X")


def test_the_time_of_a_refusal_does_not_tell_how_long_the_decision_took() -> None:
    """authentication 4.2: a hash of another cost takes another time, so the delay counts from the start."""

    async def scenario() -> None:
        async with Setting(refusal_delay=2.0).running() as setting:
            loop = asyncio.get_running_loop()
            setting.authenticator.behave = lambda: asyncio.sleep(1.9)
            start = loop.time()
            with pytest.raises(AuthenticationFailed):
                await setting.ask(password="sesame")
            assert 1.998 <= loop.time() - start < 3.8

    run(scenario)


async def _never() -> None:
    await asyncio.Event().wait()


async def _unavailable() -> None:
    raise Unavailable("the database does not answer")


async def _broken() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("behave", "outcome"),
    [
        pytest.param(_never, "cannot check", id="too slow: 4"),
        pytest.param(_unavailable, "cannot check", id="not reachable: 4"),
        pytest.param(_broken, "outcome 2", id="internal failure: 2"),
    ],
)
def test_outcomes_of_failures(behave: Callable[[], Awaitable[Any]], outcome: str) -> None:
    async def scenario() -> None:
        async with Setting(authentication_timeout=0.05).running() as setting:
            setting.authenticator.behave = behave
            with pytest.raises(AuthenticationFailed, match=outcome):
                await setting.ask()
            # Other clients are not concerned.
            setting.authenticator.behave = None
            assert await setting.ask() == 200

    run(scenario)


def test_client_gone_while_its_login_is_decided() -> None:
    async def scenario() -> None:
        async with Setting().running() as setting:
            setting.authenticator.behave = _never
            client = await setting.connect()
            sasl = SaslClient("adapter", "secret")
            client.writer.write(sasl.data_to_send())
            sasl.receive(await client.reader.read(4096))
            client.writer.write(sasl.data_to_send())
            await until(lambda: len(setting.server._tasks) == 1)
            client.close()
            await until(lambda: not setting.server.peers and not setting.server._tasks)

    run(scenario)


def test_what_is_sent_ahead_of_the_outcome_is_not_lost() -> None:
    """A client may pipeline its header and open behind sasl-init."""

    async def scenario() -> None:
        async with Setting().running() as setting:
            client = await setting.connect()
            sasl = SaslClient("adapter", "secret")
            client.writer.write(sasl.data_to_send())
            sasl.receive(await client.reader.read(4096))
            open_ = codec.encode_frame(0, codec.Open(container_id="client"))
            client.writer.write(sasl.data_to_send() + AMQP_HEADER + open_)
            while sasl.outcome is None:
                sasl.receive(await client.reader.read(4096))
            rest = sasl.remaining()
            while b"server" not in rest:
                rest += await client.reader.read(4096)
            assert rest.startswith(AMQP_HEADER)
            client.close()

    run(scenario)


# Limits and timers


@pytest.mark.parametrize("first", [b"", b"AMQP\x03\x01\x00\x00"], ids=["silent", "header only"])
def test_handshake_has_a_limit(first: bytes) -> None:
    """amqp-apis 1.2: from accept to the end of the SASL exchange."""

    async def scenario() -> None:
        async with Setting(handshake_timeout=0.1).running() as setting:
            client = await setting.connect()
            client.writer.write(first)
            assert await client.at_end()
            client.close()

    run(scenario)


def test_open_has_a_limit() -> None:
    """amqp-apis 1.2: and again from there to `open`."""

    async def scenario() -> None:
        async with Setting(connection={"open_timeout": 0.1}).running() as setting:
            client = await (await setting.connect()).log_in()
            assert await client.at_end()
            client.close()

    run(scenario)


def test_silence_has_a_limit() -> None:
    """amqp-apis 2.2: twice the advertised time; the client sends no heartbeats."""

    async def scenario() -> None:
        async with Setting(connection={"idle_timeout": 0.5}).running() as setting:
            client = await (await (await setting.connect()).log_in()).open()
            assert await client.close_reason() == "amqp:resource-limit-exceeded"
            assert await client.at_end()
            client.close()

    run(scenario)


def test_too_many_connections() -> None:
    async def scenario() -> None:
        async with Setting(max_connections=1).running() as setting:
            first = await (await setting.connect()).log_in()
            second = await setting.connect()
            assert await second.at_end()
            second.close()
            first.close()
            await until(lambda: not setting.server.peers)
            assert await setting.ask() == 200

    run(scenario)


def test_login_ends() -> None:
    """amqp-apis 2.4: amqp:unauthorized-access at the end of the login."""

    async def scenario() -> None:
        async with Setting(lifetime=timedelta(milliseconds=100)).running() as setting:
            client = await (await (await setting.connect()).log_in()).open()
            assert await client.close_reason() == "amqp:unauthorized-access"
            assert await client.at_end()
            client.close()

    run(scenario)


def test_login_over_before_open() -> None:
    """amqp-apis 2.1: `open` followed by `close`."""

    async def scenario() -> None:
        async with Setting(lifetime=timedelta(seconds=60)).running() as setting:
            client = await (await setting.connect()).log_in()
            setting.clock.advance(seconds=60)
            await client.open()
            assert await client.close_reason() == "amqp:unauthorized-access"
            client.close()

    run(scenario)


def test_logins_without_end_are_watched() -> None:
    """authentication 5.1: close a connection when its identity is removed or changed."""

    async def scenario() -> None:
        async with Setting(login_check_interval=0.05).running() as setting:
            client = await (await (await setting.connect()).log_in()).open()
            setting.authenticator.current = False
            assert await client.close_reason() == "amqp:unauthorized-access"
            client.close()

    run(scenario)


def test_an_identity_that_cannot_be_read_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    """Whether it was changed is not known, so its connections stay; those of others are closed as ever."""

    async def scenario() -> None:
        async with Setting(login_check_interval=0.01).running() as setting:
            setting.authenticator.unreadable = {"damaged": 0}
            damaged = await (await (await setting.connect()).log_in("damaged")).open()
            await until(lambda: setting.authenticator.unreadable["damaged"] >= 2)
            client = await (await (await setting.connect()).log_in()).open()
            setting.authenticator.current = False
            assert await client.close_reason() == "amqp:unauthorized-access"
            client.close()
            await until(lambda: [peer.principal.name for peer in setting.server.peers if peer.principal] == ["damaged"])
            damaged.close()

    run(scenario)
    assert {(record.message, vars(record)["principal"]) for record in caplog.records if record.exc_info} == {
        ("identity not read, its connections stay", "damaged")
    }


# Flow


def test_all_that_came_at_once_is_answered() -> None:
    """More than one slice of input, on one connection."""

    async def scenario() -> None:
        async with Setting(connection={"idle_timeout": 60.0}).running() as setting:
            client = await (await (await (await setting.connect()).log_in()).open()).attach()
            for _ in range(20):
                client.request(100, message_id="x" * 1000)
                await client.replies(100)
            client.close()
            assert len(setting.lookup.asked) == 2000

    run(scenario)


def test_a_busy_connection_does_not_starve_the_others() -> None:
    """Requests of a connection that has sent megabytes wait for those of one that has sent a few."""

    async def scenario() -> None:
        async with Setting().running() as setting:
            busy = await (await (await (await setting.connect()).log_in()).open()).attach()
            quiet = await (await (await (await setting.connect()).log_in()).open()).attach()
            await until(lambda: len(setting.server.peers) == 2)
            # Heartbeats cost as much attention as anything and are not limited by credit.
            busy.writer.write(b"\x00\x00\x00\x08\x02\x00\x00\x00" * 500_000)
            for _ in range(10):
                quiet.request()
                await quiet.replies(1)
            busy.request()
            await busy.replies(1)
            busy.close()
            quiet.close()

    run(scenario)


def test_a_client_that_does_not_read_is_not_read_from() -> None:
    async def scenario() -> None:
        async with Setting().running() as setting:
            client = await (await (await (await setting.connect()).log_in()).open()).attach(credit=2**31 - 1)
            setting.lookup.assertion = b'{"x":"' + b"x" * 200_000 + b'"}'
            [peer] = setting.server.peers
            # Nothing is read by the client until the server has stopped reading, too.
            cast(asyncio.ReadTransport, client.writer.transport).pause_reading()
            client.request(100)
            await until(lambda: not peer._is_writable)
            assert not peer._is_reading
            cast(asyncio.ReadTransport, client.writer.transport).resume_reading()
            await client.replies(100)
            await until(lambda: peer._is_reading)
            client.request(1)
            await client.replies(1)
            client.close()

    run(scenario)


def test_replies_that_nobody_gives_credit_for_have_a_bound() -> None:
    """amqp-apis 17: over the bound, amqp:resource-limit-exceeded."""

    async def scenario() -> None:
        async with Setting(max_pending_output=10_000).running() as setting:
            client = await (await (await (await setting.connect()).log_in()).open()).attach(credit=0)
            client.request(100)
            assert await client.close_reason() == "amqp:resource-limit-exceeded"
            assert await client.at_end()
            client.close()

    run(scenario)


# Requests that wait


def test_replies_of_requests_that_waited_leave_together() -> None:
    async def scenario() -> None:
        async with Setting().running() as setting:
            event = asyncio.Event()
            setting.lookup.behave = event.wait
            client = await (await (await (await setting.connect()).log_in()).open()).attach()
            client.request(50)
            await until(lambda: len(setting.lookup.asked) == 50)
            event.set()
            await client.replies(50)
            client.close()

    run(scenario)


def test_client_gone_while_its_request_runs() -> None:
    """amqp-apis 2.4: running requests finish, their replies are thrown away."""

    async def scenario() -> None:
        async with Setting().running() as setting:
            event = asyncio.Event()
            ended = []

            async def behave() -> None:
                await event.wait()
                ended.append(True)

            setting.lookup.behave = behave
            client = await (await (await (await setting.connect()).log_in()).open()).attach()
            client.request()
            await until(lambda: len(setting.lookup.asked) == 1)
            client.close()
            await until(lambda: not setting.server.peers)
            event.set()
            await until(lambda: ended == [True])

    run(scenario)


# The end


def test_stop_lets_running_requests_end_and_says_goodbye() -> None:
    """amqp-apis 2.4, orderly shutdown."""

    async def scenario() -> None:
        setting = Setting()
        setting.address = await setting.server.listen("127.0.0.1", 0)
        event = asyncio.Event()
        setting.lookup.behave = event.wait
        client = await (await (await (await setting.connect()).log_in()).open()).attach()
        client.request()
        await until(lambda: len(setting.lookup.asked) == 1)
        stopping = asyncio.ensure_future(setting.server.stop(DEADLINE))
        await until(lambda: setting.server.is_stopping)
        with pytest.raises(ConnectionFailed):
            await setting.ask()
        # A new request is sent back; the one that runs is answered.
        client.request()
        while not isinstance(state := (await client.read_until(codec.Disposition)).state, codec.Described):
            pass
        while state.descriptor != 0x26:
            state = (await client.read_until(codec.Disposition)).state
        event.set()
        await client.replies(1)
        assert await client.close_reason() == "amqp:connection:forced"
        client.write(codec.Close())
        assert await client.at_end()
        await stopping
        client.close()
        assert len(setting.lookup.asked) == 1

    run(scenario)


def test_stop_waits_for_nobody_for_ever() -> None:
    async def scenario() -> None:
        setting = Setting()
        setting.address = await setting.server.listen("127.0.0.1", 0)
        setting.lookup.behave = asyncio.Event().wait
        running = await (await (await (await setting.connect()).log_in()).open()).attach()
        running.request()
        silent = await setting.connect()
        await until(lambda: len(setting.lookup.asked) == 1 and len(setting.server.peers) == 2)
        await asyncio.wait_for(setting.server.stop(0.1), DEADLINE)
        assert setting.lookup.cancelled == 1
        assert not setting.server.peers
        running.close()
        silent.close()

    run(scenario)
