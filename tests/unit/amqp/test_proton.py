"""A stranger at the other end: Proton's protocol engine, pumped against ours in memory."""

import uuid
from typing import Any

import proton
import pytest

from kamado.amqp import codec, values
from kamado.amqp.connection import (
    Connection,
    ConnectionSettings,
    Event,
    Link,
    LinkAttached,
    LinkDetached,
    RequestsReceived,
)
from kamado.amqp.sasl import ExternalAttempt, Outcome, PlainAttempt, SaslAttempt, SaslServer


class Pair:
    """Proton as the client, and our server with an application that answers every request with its body."""

    def __init__(
        self,
        *,
        mechanisms: tuple[str, ...] = ("EXTERNAL", "PLAIN"),
        outcome: Outcome = Outcome.OK,
        refuse: str | None = None,
        max_frame_size: int = 0,
        idle_timeout: float = 0,
        password: str | None = "secret",
        credit: int = 100,
    ) -> None:
        self.outcome = outcome
        self.refuse = refuse
        self.credit = credit
        self.attempts: list[SaslAttempt] = []
        self.events: list[Event] = []
        self.links: dict[str, Link] = {}
        self.reply_links: dict[str | None, Link] = {}
        self.sasl = SaslServer(mechanisms, now=0.0)
        self.server = Connection(ConnectionSettings(container_id="kamado", max_frame_size=4096), now=0.0)
        self.now = 0.0

        self.transport: Any = proton.Transport()
        self.transport.sasl().allowed_mechs("PLAIN" if password else "EXTERNAL")
        self.transport.sasl().allow_insecure_mechs = True
        if max_frame_size:
            self.transport.max_frame_size = max_frame_size
        self.transport.idle_timeout = idle_timeout
        self.client: Any = proton.Connection()
        self.client.container = "adapter"
        if password:
            self.client.user, self.client.password = "adapter@HONO", password
        self.transport.bind(self.client)
        self.client.open()
        self.session: Any = self.client.session()
        self.session.open()

    def pump(self) -> None:
        """Carry bytes to and fro until neither side has any."""
        while True:
            size = self.transport.pending()
            data = b""
            if size > 0:
                data = bytes(self.transport.peek(size))
                self.transport.pop(size)
            answer = self._receive(data)
            while answer:
                room = self.transport.capacity()
                assert room > 0, self.transport.condition
                self.transport.push(answer[:room])
                answer = answer[room:]
            if not data and not self.transport.pending() > 0:
                return

    def _receive(self, data: bytes) -> bytes:
        answer = b""
        if not self.sasl.succeeded:
            for attempt in self.sasl.receive(data, self.now):
                self.attempts.append(attempt)
                self.sasl.finish(self.outcome)
            answer = self.sasl.data_to_send()
            data = self.sasl.remaining() if self.sasl.succeeded else b""
        if data:
            self._handle(self.server.receive(data, self.now))
        return answer + self.server.data_to_send()

    def _handle(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            match event:
                case LinkAttached(link):
                    self.links[link.name] = link
                    if self.refuse is not None:
                        link.refuse(self.refuse, "for a reason")
                    else:
                        link.accept(self.credit)
                        if link.is_sender:
                            self.reply_links[link.address] = link
                case RequestsReceived(link, requests):
                    for request in requests:
                        assert request.correlation_id is not None
                        assert isinstance(request.body, bytes | None)
                        link.accept_delivery(request)
                        self.reply_links[request.reply_to].send(
                            codec.encode_reply("registration", request.correlation_id, 200, request.body)
                        )
                        link.give_credit()
                case _:
                    pass

    def receiver(self, address: str = "registration/acme/r", credit: int = 200) -> Any:
        receiver = self.session.receiver(f"receiver-{address}")
        receiver.source.address = address
        receiver.open()
        receiver.flow(credit)
        return receiver

    def sender(self, address: str = "registration/acme") -> Any:
        sender = self.session.sender(f"sender-{address}")
        sender.target.address = address
        sender.open()
        return sender


def request(**fields: Any) -> proton.Message:
    fields = {"id": "m1", "subject": "assert", "reply_to": "registration/acme/r", "inferred": True, **fields}
    return proton.Message(**fields)


def replies(receiver: Any) -> list[Any]:
    result = []
    while (delivery := receiver.current) is not None and delivery.readable and not delivery.partial:
        message: Any = proton.Message()
        message.decode(receiver.recv(delivery.pending))
        receiver.advance()
        delivery.update(proton.Delivery.ACCEPTED)
        delivery.settle()
        result.append(message)
    return result


@pytest.mark.parametrize("body", [None, b"x" * 10, b"x" * 1000, b"x" * 30_000])
@pytest.mark.parametrize("max_frame_size", [512, 5000, 65536])
def test_request_and_reply(body: bytes | None, max_frame_size: int) -> None:
    pair = Pair(max_frame_size=max_frame_size)
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    assert pair.attempts == [PlainAttempt("", "adapter@HONO", "secret")]
    assert sender.credit == 100
    deliveries = [sender.send(request(id=f"m{number}", body=body)) for number in range(20)]
    pair.pump()
    assert all(delivery.remote_state == proton.Delivery.ACCEPTED and delivery.settled for delivery in deliveries)
    received = replies(receiver)
    assert [message.correlation_id for message in received] == [f"m{number}" for number in range(20)]
    assert all(message.properties == {"status": 200} for message in received)
    assert all((bytes(message.body) if message.body else None) == body for message in received)
    for delivery in deliveries:
        delivery.settle()
    assert sender.credit == 100
    pair.client.close()
    pair.pump()
    assert pair.client.state & proton.Endpoint.REMOTE_CLOSED
    assert pair.server.is_closed
    assert pair.client.remote_condition is None


def test_external() -> None:
    pair = Pair(password=None)
    pair.pump()
    assert pair.attempts == [ExternalAttempt("")]
    assert pair.client.state & proton.Endpoint.REMOTE_ACTIVE


@pytest.mark.parametrize("outcome", [Outcome.AUTH, Outcome.SYS_TEMP])
def test_a_failed_login(outcome: Outcome) -> None:
    pair = Pair(outcome=outcome)
    pair.pump()
    assert pair.transport.sasl().outcome == outcome
    assert pair.transport.condition.name == "amqp:unauthorized-access"


def test_a_refused_link() -> None:
    # amqp-apis 4.3
    pair = Pair(refuse="amqp:unauthorized-access")
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    for link, terminus in ((receiver, receiver.remote_source), (sender, sender.remote_target)):
        assert link.state & proton.Endpoint.REMOTE_CLOSED
        assert link.remote_condition.name == "amqp:unauthorized-access"
        assert link.remote_condition.description == "for a reason"
        assert terminus.type == proton.Terminus.UNSPECIFIED
        link.close()
    pair.pump()
    assert pair.transport.condition is None


def test_an_accepted_link_shows_its_addresses() -> None:
    # amqp-apis 4.2
    pair = Pair()
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    assert receiver.remote_source.address == "registration/acme/r"
    assert sender.remote_target.address == "registration/acme"
    assert receiver.remote_snd_settle_mode == proton.Link.SND_UNSETTLED
    assert receiver.remote_rcv_settle_mode == proton.Link.RCV_FIRST


def test_rejected_and_released_requests() -> None:
    # amqp-apis 5.2
    pair = Pair()
    sender = pair.sender()
    pair.pump()
    link = pair.links[sender.name]
    for name, state in (("reject", proton.Delivery.REJECTED), ("release", proton.Delivery.RELEASED)):
        pair.reply_links.clear()
        transfer = sender.delivery(name)
        sender.stream(b"\0\x53\x73\xc0\x01\x00" if name == "release" else b"junk")
        sender.advance()
        if name == "release":
            data = bytes(pair.transport.peek(pair.transport.pending()))
            pair.transport.pop(len(data))
            (event,) = pair.server.receive(data, 0.0)
            assert isinstance(event, RequestsReceived)
            link.release_delivery(event.requests[0])
            pair.transport.push(pair.server.data_to_send())
        pair.pump()
        assert transfer.remote_state == state
        if name == "reject":
            assert transfer.remote.condition.name == "amqp:decode-error"


def test_drain() -> None:
    pair = Pair()
    receiver = pair.receiver(credit=5)
    pair.pump()
    assert receiver.credit == 5
    receiver.drain(10)
    pair.pump()
    assert receiver.credit == 0
    assert not receiver.draining()
    receiver.drain_mode = False
    receiver.flow(1)
    sender = pair.sender()
    pair.pump()
    sender.send(request())
    sender.send(request(id="m2"))
    pair.pump()
    assert [message.correlation_id for message in replies(receiver)] == ["m1"]
    receiver.flow(1)
    pair.pump()
    assert [message.correlation_id for message in replies(receiver)] == ["m2"]


def test_ids_of_all_types_come_back() -> None:
    # amqp-apis 14 M6 to M8
    pair = Pair()
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    ids: list[Any] = [proton.ulong(7), uuid.UUID(int=9), b"\1\2", "text"]
    for identifier in ids:
        message = request()
        message.correlation_id = identifier
        sender.send(message)
    pair.pump()
    messages = replies(receiver)  # its memoryviews live as long as the messages
    received = [message.correlation_id for message in messages]
    assert [bytes(item) if isinstance(item, memoryview) else item for item in received] == ids


def test_an_aborted_request() -> None:
    pair = Pair()
    sender = pair.sender()
    pair.pump()
    delivery = sender.delivery("d")
    sender.stream(b"x" * 10_000)
    pair.pump()
    delivery.abort()
    pair.pump()
    assert not [event for event in pair.events if isinstance(event, RequestsReceived)]
    assert sender.credit == 100


def test_a_pre_settled_request_is_processed() -> None:
    pair = Pair()
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    sender.send(request()).settle()
    pair.pump()
    assert len(replies(receiver)) == 1


def test_detach_and_end_by_the_client() -> None:
    pair = Pair()
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    sender.detach()
    receiver.close()
    pair.pump()
    assert sender.state & proton.Endpoint.REMOTE_CLOSED
    assert receiver.state & proton.Endpoint.REMOTE_CLOSED
    detached = {event.link.name for event in pair.events if isinstance(event, LinkDetached)}
    assert detached == {sender.name, receiver.name}
    again = pair.session.receiver("again")
    again.source.address = "registration/acme/r"
    again.open()
    pair.pump()
    assert again.remote_source.address == "registration/acme/r"
    pair.session.close()
    pair.pump()
    assert pair.session.state & proton.Endpoint.REMOTE_CLOSED
    assert pair.transport.condition is None


def test_close_by_the_server() -> None:
    # amqp-apis 2.4
    pair = Pair()
    pair.receiver()
    pair.pump()
    pair.server.close("amqp:unauthorized-access", "access token expired", now=pair.now)
    pair.pump()
    assert pair.client.remote_condition.name == "amqp:unauthorized-access"
    assert pair.client.remote_condition.description == "access token expired"
    pair.client.close()
    pair.pump()
    assert pair.server.is_closed


def test_heartbeats_keep_proton_content() -> None:
    # amqp-apis 2.2
    pair = Pair(idle_timeout=8.0)
    pair.transport.tick(1.0)
    pair.pump()
    # Proton advertises half of what it is told.
    assert pair.server.next_deadline() == 2.0
    for step in range(1, 40):
        pair.now = float(step)
        pair._handle(pair.server.tick(pair.now))
        pair.transport.tick(1.0 + step)
        pair.pump()
    assert not pair.server.is_closed
    assert pair.transport.condition is None
    assert pair.client.state & proton.Endpoint.REMOTE_ACTIVE


def test_many_sessions_and_links() -> None:
    pair = Pair()
    pair.pump()
    for number in range(5):
        pair.session = pair.client.session()
        pair.session.open()
        links = [pair.receiver(f"registration/{number}/{link}") for link in range(50)]
        pair.pump()
        assert all(link.state & proton.Endpoint.REMOTE_ACTIVE for link in links)
        if number % 2:
            pair.session.close()
            pair.pump()
    assert pair.transport.condition is None


def test_annotated_requests() -> None:
    # amqp-apis 6: x-opt-trace-context
    pair = Pair()
    receiver, sender = pair.receiver(), pair.sender()
    pair.pump()
    message = request(durable=False, properties={"device_id": "d1", "n": 5})
    message.annotations = {values.Symbol("x-opt-trace-context"): {"uber-trace-id": "1:2"}}
    message.instructions = {values.Symbol("x"): "y"}
    sender.send(message)
    pair.pump()
    assert len(replies(receiver)) == 1
