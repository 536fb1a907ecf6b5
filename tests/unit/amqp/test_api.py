"""Links and requests to look-ups: what the rows of amqp-apis 14 cannot show through a socket."""

import asyncio
import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import pytest
from tests.unit.amqp.fake_lookup import Clock, FakeLookup
from tests.unit.amqp.peer import Peer, message

from kamado.amqp import codec
from kamado.amqp.api import Api, ApiSettings, Caller, Pending
from kamado.amqp.connection import Event, LinkAttached, LinkDetached, RequestsReceived
from kamado.auth import ADAPTER_AUTHORITIES, Authorities, Principal
from kamado.lookup import LookupService

DEVICE: dict[str, object] = {"device_id": "d1"}


class Client(Peer):
    """A peer whose links and requests go to a `Caller`."""

    def __init__(self, caller: Caller) -> None:
        super().__init__(accepts=False)
        self.caller = caller

    def handle(self, events: Iterable[Event]) -> list[Event]:
        events = super().handle(events)
        for event in events:
            if isinstance(event, LinkAttached):
                self.caller.attach(event.link)
            elif isinstance(event, LinkDetached):
                self.caller.detached(event.link)
            elif isinstance(event, RequestsReceived):
                self.caller.receive(event.link, event.requests)
        return events

    def connect(self, address: str = "registration/acme", reply_to: str = "registration/acme/r") -> "Client":
        """Open everything that requests need."""
        self.open().begin()
        self.attach_receiver(address=reply_to)
        self.attach_sender(address=address)
        self.flow()
        return self

    def replies(self) -> list[codec.Message]:
        """Read what the server sends; return the replies in it."""
        return [
            codec.decode_message(payload)
            for _, performative, payload in self.read()
            if isinstance(performative, codec.Transfer)
        ]


class Setting:
    """An API with a fake behind it, one principal, and the requests that wait."""

    def __init__(self, authorities: dict[str, str] | None = None, lifetime: float | None = None) -> None:
        self.clock = Clock()
        self.lookup = FakeLookup()
        self.api = Api(cast(LookupService, self.lookup), ApiSettings(), self.clock)
        self.pending: list[Pending] = []
        self.principal = Principal(
            name="adapter",
            authorities=Authorities(ADAPTER_AUTHORITIES if authorities is None else authorities),
            expires=None if lifetime is None else self.clock.now + timedelta(seconds=lifetime),
        )

    def client(self) -> Client:
        return Client(Caller(self.api, self.principal, self.pending.append))


def status(reply: codec.Message) -> object:
    return (reply.application_properties or {})["status"]


def test_a_look_up_that_never_waits_is_answered_at_once() -> None:
    setting = Setting()
    client = setting.client().connect()
    client.transfer(0, message(application_properties=DEVICE))
    frames = client.read()
    # One disposition, the reply, one flow: all in one write.
    assert [type(performative) for _, performative, _ in frames] == [
        codec.Disposition,
        codec.Transfer,
        codec.Flow,
    ]
    assert setting.pending == []
    assert setting.lookup.asked == [("registration", "acme", "d1", "")]


def test_unknown_exception_is_500_with_a_fixed_text(caplog: pytest.LogCaptureFixture) -> None:
    """Section 5: exceptions that are not part of the domain."""

    async def fail() -> None:
        raise ZeroDivisionError("a secret of ours")

    setting = Setting()
    setting.lookup.behave = fail
    client = setting.client().connect()
    client.transfer(0, message(application_properties=DEVICE))
    [reply] = client.replies()
    assert status(reply) == 500
    assert type(status(reply)) is codec.Int
    assert reply.body == b'{"error":"internal error"}'
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert vars(record)["tenant_id"] == "acme"


def test_refusals_are_logged_with_their_reason_and_answered_without(caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting()
    client = setting.client().connect()
    with caplog.at_level(logging.DEBUG, "kamado.amqp.api"):
        client.transfer(0, message(application_properties={"device_id": "nope"}))
    [reply] = client.replies()
    assert (status(reply), reply.body) == (404, None)
    [record] = caplog.records
    fields = vars(record)
    assert (fields["tenant_id"], fields["device_id"], fields["principal"], fields["reason"]) == (
        "acme",
        "nope",
        "adapter",
        "device-unknown",
    )


def test_texts_of_errors_name_the_member() -> None:
    client = Setting().client().connect()
    client.transfer(0, message(application_properties={"device_id": 5}))
    [reply] = client.replies()
    assert status(reply) == 400
    assert isinstance(reply.body, bytes)
    assert b"device_id" in reply.body


# Requests that wait


def test_a_request_that_waits_is_answered_later() -> None:
    async def scenario() -> None:
        event = asyncio.Event()
        setting = Setting()
        setting.lookup.behave = event.wait
        client = setting.client().connect()
        client.transfer(0, message(application_properties=DEVICE))
        client.transfer(1, message(message_id="m2", application_properties=DEVICE))
        # Accepted before the work begins (section 5, step 3); no credit back yet.
        frames = client.read()
        assert {type(performative) for _, performative, _ in frames} == {codec.Disposition}
        tasks = [asyncio.ensure_future(pending.finish(10)) for pending in setting.pending]
        await asyncio.sleep(0)
        event.set()
        await asyncio.gather(*tasks)
        assert [status(reply) for reply in client.replies()] == [200, 200]
        for pending in setting.pending:
            pending.abandon()

    asyncio.run(scenario())


def test_an_error_after_waiting_is_a_reply_too() -> None:
    async def scenario() -> None:
        async def fail() -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError

        setting = Setting()
        setting.lookup.behave = fail
        client = setting.client().connect()
        client.transfer(0, message(application_properties=DEVICE))
        await setting.pending[0].finish(10)
        assert [status(reply) for reply in client.replies()] == [500]

    asyncio.run(scenario())


def test_a_request_that_waits_too_long_is_503() -> None:
    """Section 5, step 6."""

    async def scenario() -> None:
        setting = Setting()
        setting.lookup.behave = asyncio.Event().wait
        client = setting.client().connect()
        client.transfer(0, message(application_properties=DEVICE))
        await setting.pending[0].finish(0.01)
        frames = client.read()
        [payload] = [payload for _, performative, payload in frames if isinstance(performative, codec.Transfer)]
        assert status(codec.decode_message(payload)) == 503
        assert any(isinstance(performative, codec.Flow) for _, performative, _ in frames)
        # What ran was told to stop.
        assert setting.lookup.cancelled == 1

    asyncio.run(scenario())


def test_a_cancelled_request_has_no_reply() -> None:
    async def scenario() -> None:
        setting = Setting()
        setting.lookup.behave = asyncio.Event().wait
        client = setting.client().connect()
        client.transfer(0, message(application_properties=DEVICE))
        task = asyncio.ensure_future(setting.pending[0].finish(10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.replies() == []
        assert setting.lookup.cancelled == 1

    asyncio.run(scenario())


def test_an_abandoned_request_is_cleaned_up() -> None:
    """A task that is cancelled before its first step never enters the request."""

    async def scenario() -> None:
        left = []

        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                left.append(True)

        setting = Setting()
        setting.lookup.behave = wait
        client = setting.client().connect()
        client.transfer(0, message(application_properties=DEVICE))
        setting.pending[0].abandon()
        assert left == [True]

    asyncio.run(scenario())


def test_reply_link_gone_by_then() -> None:
    """M11, section 4.5: dropped, credit back."""

    async def scenario() -> None:
        event = asyncio.Event()
        setting = Setting()
        setting.lookup.behave = event.wait
        client = setting.client().connect()
        client.transfer(0, message(application_properties=DEVICE))
        client.send(codec.Detach(handle=0, closed=True))
        client.read()
        event.set()
        await setting.pending[0].finish(10)
        assert [type(performative) for _, performative, _ in client.read()] == [codec.Flow]

    asyncio.run(scenario())


# Expiry


def test_expired_login_attaches_nothing() -> None:
    """Section 4.3, row 5: the exact end counts."""
    setting = Setting(lifetime=600)
    client = setting.client().open().begin()
    setting.clock.advance(seconds=600)
    client.send(client.sender())
    detach = client.read()[1][1]
    assert isinstance(detach, codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:unauthorized-access"


def test_requests_of_an_expired_login() -> None:
    """Section 5, step 5: 403 once it has ended more than two minutes ago."""
    setting = Setting(lifetime=600)
    client = setting.client().connect()
    setting.clock.advance(seconds=719)
    client.transfer(0, message(application_properties=DEVICE))
    assert [status(reply) for reply in client.replies()] == [200]
    setting.clock.advance(seconds=1)
    client.transfer(1, message(application_properties=DEVICE))
    [reply] = client.replies()
    assert (status(reply), reply.body) == (403, None)
    assert len(setting.lookup.asked) == 1


# Draining


def test_draining_releases_requests() -> None:
    """Section 5.2: the server cannot take the message now (shutdown)."""
    setting = Setting()
    client = setting.client().connect()
    client.caller.is_draining = True
    client.transfer(0, message(application_properties=DEVICE))
    [(_, disposition, _)] = client.read()
    assert isinstance(disposition, codec.Disposition)
    assert disposition.settled
    assert isinstance(disposition.state, codec.Described)
    assert disposition.state.descriptor == 0x26
    assert setting.lookup.asked == []


# Rights


def test_rights_are_decided_once_per_link(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    client = setting.client().connect()
    decided: list[str] = []

    def decide(self: Authorities, address: str, operation: str) -> bool:
        decided.append(address)
        return True

    monkeypatch.setattr(Authorities, "may_execute", decide)
    for number in range(10):
        client.transfer(number, message(application_properties=DEVICE))
    assert len(client.replies()) == 10
    assert decided == []


@pytest.mark.parametrize(
    ("grant", "asked", "expected"),
    [
        ({"o:tenant/*:get": "E"}, "acme", 200),
        ({"o:tenant/*:*": "E"}, "acme", 200),
        ({"o:tenant:get": "E"}, "acme", 200),
        ({"o:*:*": "E"}, "acme", 200),
        ({"o:tenant/acme:get": "E"}, "acme", 200),
        ({"o:tenant/acme:get": "E"}, "other", 403),
        ({}, "acme", 403),
    ],
)
def test_rights_on_tenants(grant: dict[str, str], asked: str, expected: int) -> None:
    """Section 9.2: the body variant is checked after the look-up, the old one before."""
    setting = Setting({"r:tenant": "RW"} | grant)
    client = setting.client().connect("tenant", "tenant/r")
    client.transfer(0, message(subject="get", reply_to="tenant/r", body=asked.encode()))
    assert [status(reply) for reply in client.replies()] == [expected]
    assert len(setting.lookup.asked) == 1
    client.transfer(1, message(subject="get", reply_to="tenant/r", application_properties={"tenant_id": asked}))
    [reply] = client.replies()
    assert status(reply) == expected
    assert len(setting.lookup.asked) == (2 if expected == 200 else 1)


def test_unknown_subject_goes_before_rights() -> None:
    """R19, C18: 400, though no grant covers an operation that does not exist."""
    client = Setting().client().connect()
    client.transfer(0, message(subject="register", application_properties=DEVICE))
    assert [status(reply) for reply in client.replies()] == [400]


def test_only_strings_count() -> None:
    """Section 6: an argument of another AMQP type is absent; a symbol is no string."""
    setting = Setting()
    client = setting.client().connect()
    client.transfer(0, message(application_properties={"device_id": "d1", "gateway_id": codec.Symbol("gw")}))
    assert [status(reply) for reply in client.replies()] == [200]
    assert setting.lookup.asked == [("registration", "acme", "d1", "")]
    client.transfer(1, message(application_properties={"device_id": codec.Symbol("d1")}))
    [reply] = client.replies()
    assert status(reply) == 400
    assert "device_id" not in (reply.application_properties or {})


# Reply addresses


def test_reply_addresses_are_free_when_the_connection_is_lost() -> None:
    """Section 4.4: one table per API for all connections of the process."""
    setting = Setting()
    first = setting.client().connect()
    second = setting.client().open().begin()
    second.send(second.receiver())
    assert isinstance(second.read()[1][1], codec.Detach)
    first.handle(first.connection.lost())
    second.send(second.receiver(handle=1))
    [(_, attach, _)] = second.read()
    assert isinstance(attach, codec.Attach)
    assert attach.source is not None


def test_a_refused_link_takes_no_address() -> None:
    setting = Setting({"r:registration/*": "W"})
    client = setting.client().open().begin()
    client.send(client.receiver())
    client.read()
    assert all(not endpoint.subscribed for endpoint in setting.api.endpoints.values())


@pytest.mark.parametrize("field", ["subject", "reply_to", "message_id"])
def test_formal_check(field: str) -> None:
    """M1 to M3: rejected, one credit back, no reply, nothing run."""
    setting = Setting()
    client = setting.client().connect()
    fields: dict[str, Any] = {field: None}
    client.transfer(0, message(application_properties=DEVICE, **fields))
    (_, disposition, _), (_, flow, _) = client.read()
    assert isinstance(disposition, codec.Disposition)
    assert isinstance(disposition.state, codec.Described)
    assert disposition.state.descriptor == 0x25
    assert isinstance(flow, codec.Flow)
    assert setting.lookup.asked == []
