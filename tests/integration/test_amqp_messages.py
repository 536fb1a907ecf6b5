"""Messages: amqp-apis 14, rows M, and what sections 5 to 7 say of any request and reply."""

import json
import os
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from proton import Delivery, Endpoint, Message, Sender, symbol, ulong
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture, credentials_request, get_credentials
from tests.integration.adapter import Adapter, Reply, read_sections
from tests.integration.registry import poll
from tests.rows import Section

ROWS = Section("amqp-apis 14")


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    for acme in acme_fixture(databases, tmp_path_factory.mktemp("messages")):
        with acme.adapter() as adapter:
            properties = {"device_id": "d2", "gateway_id": "gw1"}
            assert adapter.request("device_con/acme", "set-last-gw", properties=properties).status == 204
        yield acme


@pytest.fixture
def adapter(acme: Acme) -> Iterator[Adapter]:
    with acme.adapter() as adapter:
        yield adapter


class Question(NamedTuple):
    """A request that is answered with 200."""

    address: str
    subject: str
    properties: dict[str, Any] | None = None
    body: str | None = None


QUESTIONS = [
    pytest.param(Question("tenant", "get", None, '{"tenant-id":"acme"}'), id="tenant"),
    pytest.param(Question("registration/acme", "assert", {"device_id": "d1"}), id="registration"),
    pytest.param(
        Question("credentials/acme", "get", None, credentials_request("sensor1", "hashed-password")), id="credentials"
    ),
    pytest.param(Question("device_con/acme", "get-last-gw", {"device_id": "d2"}), id="device_con"),
]
TYPES = {str: "string", ulong: "ulong", uuid.UUID: "uuid", bytes: "binary"}
any_api = pytest.mark.parametrize("question", QUESTIONS)


def make(adapter: Adapter, question: Question, **fields: Any) -> Any:
    fields = {"reply_to": adapter.links(question.address)[1].source.address, "message_id": "m1"} | fields
    return adapter.message(question.subject, properties=question.properties, body=question.body, **fields)


def assert_rejected(adapter: Adapter, sender: Sender, message: Any) -> None:
    """Section 5, step 2: rejected, settled, one credit back, and no reply message."""
    delivery = adapter.send(sender, message)
    assert adapter.await_disposition(delivery) == Delivery.REJECTED
    condition = delivery.remote.condition
    assert condition.name == "hono:bad-request"
    assert condition.description == "malformed request message"
    adapter.wait(lambda: sender.credit == 100, "credit back")
    assert adapter.replies == []


@any_api
@pytest.mark.parametrize(
    "missing",
    [
        ROWS.case("M1", "subject"),
        ROWS.case("M2", "reply_to"),
        ROWS.case("M3", "id"),
    ],
)
def test_m1_to_m3_formal_check(adapter: Adapter, question: Question, missing: str) -> None:
    sender, _ = adapter.links(question.address)
    message = make(adapter, question)
    setattr(message, missing, None)
    assert_rejected(adapter, sender, message)
    # The link lives on.
    assert adapter.exchange(sender, make(adapter, question), "m1").status == 200


def test_a_message_without_properties_is_rejected(adapter: Adapter) -> None:
    sender, _ = adapter.links("tenant")
    assert_rejected(adapter, sender, Message(body=b"{}", inferred=True))


@any_api
@pytest.mark.parametrize(
    ("message_id", "correlation_id", "expected"),
    [
        ROWS.case("M4", "m1", "c1", "c1"),
        ROWS.case("M5", "m1", None, "m1"),
        ROWS.case("M5-correlation-id-only", None, "c1", "c1"),
        ROWS.case("M6", "m1", ulong(7), ulong(7)),
        ROWS.case("M6-large", None, ulong(2**64 - 1), ulong(2**64 - 1)),
        ROWS.case("M6-message-id", ulong(0), None, ulong(0)),
        ROWS.case("M7", "m1", uuid.UUID(int=7), uuid.UUID(int=7)),
        ROWS.case("M8", "m1", b"\x01\x02", b"\x01\x02"),
        ROWS.case("M4-long", "m1", "ä" * 200, "ä" * 200),
    ],
)
def test_m4_to_m8_correlation(
    adapter: Adapter, question: Question, message_id: Any, correlation_id: Any, expected: Any
) -> None:
    sender, _ = adapter.links(question.address)
    message = make(adapter, question, message_id=message_id, correlation_id=correlation_id)
    reply = adapter.exchange(sender, message, expected)
    assert reply.status == 200
    assert reply.correlation_type == TYPES[type(expected)]


@pytest.mark.parametrize(
    "correlation_id",
    [ROWS.case("M6", ulong(7)), ROWS.case("M7", uuid.UUID(int=7)), ROWS.case("M8", b"\x01\x02")],
)
@pytest.mark.parametrize("subject", ["get", "fetch"], ids=["404", "400"])
def test_errors_keep_the_type_of_the_id(adapter: Adapter, correlation_id: Any, subject: str) -> None:
    """Section 7, note: the type is kept always."""
    sender, receiver = adapter.links("tenant")
    message = adapter.message(
        subject, reply_to=receiver.source.address, body='{"tenant-id":"nope"}', correlation_id=correlation_id
    )
    reply = adapter.exchange(sender, message, correlation_id)
    assert reply.status == (404 if subject == "get" else 400)
    assert reply.correlation_type == TYPES[type(correlation_id)]


def provisioning_message(acme: Acme, adapter: Adapter, reply_to: str) -> tuple[str, Any]:
    """A request that leaves a trace when it is run: the device's first contact."""
    name, certificate = acme.new_device()
    body = credentials_request(name, client_certificate=certificate.base64)
    return name, adapter.message("get", reply_to=reply_to, body=body, message_id="m1")


@ROWS.row("M9")
def test_m9_reply_link_never_attached(acme: Acme, adapter: Adapter) -> None:
    sender, _ = adapter.links("credentials/acme")
    name, message = provisioning_message(acme, adapter, "credentials/acme/never-attached")
    delivery = adapter.send(sender, message)
    assert adapter.await_disposition(delivery) == Delivery.ACCEPTED
    adapter.wait(lambda: sender.credit == 100, "credit back")
    assert adapter.replies == []
    # Not executed: the device is still unknown.
    assert get_credentials(adapter, name).status == 404


@ROWS.row("M10")
def test_m10_reply_link_of_another_connection(acme: Acme, adapter: Adapter) -> None:
    with acme.adapter() as other:
        _, receiver = other.links("credentials/acme")
        sender, _ = adapter.links("credentials/acme")
        name, message = provisioning_message(acme, adapter, receiver.source.address)
        delivery = adapter.send(sender, message)
        assert adapter.await_disposition(delivery) == Delivery.ACCEPTED
        adapter.wait(lambda: sender.credit == 100, "credit back")
        assert get_credentials(other, name).status == 404
        assert adapter.replies == []
        assert other.replies == []


def test_reply_link_of_another_api(adapter: Adapter) -> None:
    """Section 4.4: an address registered for one API is not visible to another."""
    sender, _ = adapter.links("registration/acme")
    _, receiver = adapter.links("tenant")
    message = adapter.message(
        "assert", reply_to=receiver.source.address, properties={"device_id": "d1"}, message_id="m1"
    )
    assert adapter.await_disposition(adapter.send(sender, message)) == Delivery.ACCEPTED
    adapter.wait(lambda: sender.credit == 100, "credit back")
    assert adapter.replies == []


def test_reply_link_of_another_tenant(adapter: Adapter) -> None:
    """Section 4.4: within one connection the tenants need not be equal; a trailing slash does not count."""
    sender, _ = adapter.links("registration/acme")
    _, receiver = adapter.links("registration/other")
    for message_id, reply_to in (("m1", receiver.source.address), ("m2", f"{receiver.source.address}/")):
        message = adapter.message("assert", reply_to=reply_to, properties={"device_id": "d1"}, message_id=message_id)
        assert adapter.exchange(sender, message, message_id).link == receiver


@ROWS.row("M11")
def test_m11_reply_link_detached_while_the_request_runs(acme: Acme, adapter: Adapter) -> None:
    reply_to = f"credentials/acme/{uuid.uuid4()}"
    receiver = adapter.attach_receiver(reply_to)
    sender = adapter.attach_sender("credentials/acme")
    name, message = provisioning_message(acme, adapter, reply_to)
    # Request and detach leave in one write; the request waits for the database when the detach is read.
    delivery = sender.delivery("1")
    sender.stream(message.encode())
    sender.advance()
    receiver.close()
    assert adapter.await_disposition(delivery) == Delivery.ACCEPTED
    adapter.wait(lambda: receiver.state & Endpoint.REMOTE_CLOSED, "detach")
    adapter.wait(lambda: sender.credit == 100, "credit back")
    assert adapter.replies == []
    assert get_credentials(adapter, name).status == 200


@any_api
@ROWS.row("M12")
def test_m12_more_requests_than_credit(adapter: Adapter, question: Question) -> None:
    sender, _ = adapter.links(question.address)
    assert sender.credit == 100
    for number in range(150):
        sender.delivery(f"{number}")
        sender.stream(make(adapter, question, message_id=f"m{number}").encode())
        sender.advance()
    # Proton holds back what there is no credit for.
    assert sender.credit == -50
    adapter.wait(lambda: len(adapter.replies) == 150, "150 replies")
    assert {reply.message.correlation_id for reply in adapter.replies} == {f"m{number}" for number in range(150)}
    assert {reply.status for reply in adapter.replies} == {200}
    adapter.wait(lambda: sender.credit == 100, "all credit back")


@any_api
@ROWS.row("M13")
def test_m13_reply_link_without_credit(adapter: Adapter, question: Question) -> None:
    reply_to = f"{question.address}/{uuid.uuid4()}"
    receiver = adapter.attach_receiver(reply_to, credit=0)
    sender = adapter.attach_sender(question.address)
    for message_id in ("m1", "m2"):
        delivery = adapter.send(sender, make(adapter, question, reply_to=reply_to, message_id=message_id))
        assert adapter.await_disposition(delivery) == Delivery.ACCEPTED
    # An exchange on other links has come and gone, and nothing else with it.
    assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200
    assert adapter.replies == []
    receiver.flow(1)
    adapter.wait(lambda: adapter.replies, "a reply")
    assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200
    assert len(adapter.replies) == 1
    receiver.flow(1)
    # In any order: section 5.
    for message_id in ("m1", "m2"):
        assert adapter.await_reply(message_id).status == 200


# Section 7: the form of replies


def application_properties(reply: Reply) -> bytes:
    return dict(read_sections(reply.raw))[0x74]


@any_api
def test_form_of_a_reply(adapter: Adapter, question: Question) -> None:
    sender, receiver = adapter.links(question.address)
    reply = adapter.exchange(sender, make(adapter, question), "m1")
    assert [code for code, _ in read_sections(reply.raw)] == [0x73, 0x74, 0x75]
    message = reply.message
    assert uuid.UUID(message.id)
    assert type(message.id) is str
    assert message.content_type == "application/json"
    assert type(message.content_type) is symbol
    assert message.address.startswith(question.address)
    assert message.subject is None
    assert message.reply_to is None
    assert message.user_id in {None, b""}
    assert message.creation_time == 0
    # status as an int of four bytes, wherever it stands in the map
    assert b"\xa1\x06status\x71\x00\x00\x00\xc8" in application_properties(reply)
    assert reply.tenant_id == "acme"
    assert reply.device_id == (question.properties or {}).get("device_id")
    assert isinstance(reply.json(), dict)
    assert reply.link == receiver


def test_message_ids_differ(adapter: Adapter) -> None:
    replies = [adapter.request("tenant", "get", body='{"tenant-id":"acme"}') for _ in range(3)]
    assert len({reply.message.id for reply in replies}) == 3


def test_status_alone_is_encoded_exactly(adapter: Adapter) -> None:
    """Section 7 gives the bytes for 200; a 404 without anything else differs in the number only."""
    reply = adapter.request("tenant", "get", body='{"tenant-id":"nope"}')
    assert bytes.fromhex("005374C10E02A10673746174757371000001 94".replace(" ", "")) in reply.raw
    assert reply.body is None


def test_replies_larger_than_the_clients_frames_are_split(acme: Acme) -> None:
    """Section 7."""
    long = "x" * 20_000
    tenant_id = acme.registry.create_tenant(document={"ext": {"long": long}})
    with acme.adapter(max_frame_size=4096) as adapter:
        reply = adapter.request("tenant", "get", body=json.dumps({"tenant-id": tenant_id}))
        assert reply.json()["ext"]["long"] == long


# Section 6: the form of requests


def test_requests_larger_than_the_servers_frames(adapter: Adapter) -> None:
    context = "x" * 100_000
    assert get_credentials(adapter, "sensor1", "hashed-password", context=context).status == 200


@pytest.mark.parametrize("form", ["data", "two data sections", "string", "binary"])
def test_accepted_forms_of_a_body(adapter: Adapter, form: str) -> None:
    """Section 6: data sections, one or more, and an amqp-value of string or binary."""
    sender, receiver = adapter.links("tenant")
    text = b'{"tenant-id":"acme"}'
    message = adapter.message("get", reply_to=receiver.source.address, message_id="m1")
    if form == "string":
        message.body = text.decode()
        raw = message.encode()
    elif form == "binary":
        message.body = text
        raw = message.encode()
    elif form == "data":
        raw = message.encode() + b"\x00\x53\x75\xa0" + bytes([len(text)]) + text
    else:
        raw = message.encode()
        for part in (text[:5], text[5:]):
            raw += b"\x00\x53\x75\xa0" + bytes([len(part)]) + part
    reply = adapter.exchange(sender, raw, "m1")
    assert reply.status == 200


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="none"),
        pytest.param(b"\x00\x53\x75\xa0\x00", id="empty data"),
        pytest.param(b"\x00\x53\x77\x40", id="null"),
        pytest.param(b"\x00\x53\x76\x45", id="amqp-sequence"),
        pytest.param(b"\x00\x53\x77\x54\x05", id="a number"),
        pytest.param(b'\x00\x53\x75\xa0\x17\xef\xbb\xbf{"tenant-id":"acme"}', id="byte order mark"),
    ],
)
def test_bodies_that_are_none(adapter: Adapter, body: bytes) -> None:
    """Section 6: 400 where a body is needed, and as good as any where none is."""
    sender, receiver = adapter.links("tenant")
    message = adapter.message("get", reply_to=receiver.source.address, message_id="m1")
    assert adapter.exchange(sender, message.encode() + body, "m1").status == 400
    sender, receiver = adapter.links("registration/acme")
    message = adapter.message(
        "assert", reply_to=receiver.source.address, properties={"device_id": "d1"}, message_id="m2"
    )
    assert adapter.exchange(sender, message.encode() + body, "m2").status == 200


def test_what_stock_clients_add_does_no_harm(adapter: Adapter) -> None:
    """Section 6: trace context as annotation and as application properties, content-type without a body."""
    sender, receiver = adapter.links("registration/acme")
    message = adapter.message(
        "assert",
        reply_to=receiver.source.address,
        properties={"device_id": "d1", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        message_id="m1",
    )
    message.annotations = {symbol("x-opt-trace-context"): {"traceparent": "x"}}
    message.durable = False
    message.address = "somewhere/else"
    message.content_type = "application/json"
    assert adapter.exchange(sender, message, "m1").status == 200


def test_undecodable_message_is_rejected(adapter: Adapter) -> None:
    """Section 5, step 1; 5.2: `amqp:decode-error`, and the link goes on."""
    sender, receiver = adapter.links("tenant")
    for raw in (b"\xff\xff", b"\x00\x53\x73\xc0\xff\x0d", b"\x00\x53\x73\x45\x00\x53\x74\xd1\xff\xff\xff\xff"):
        delivery = adapter.send(sender, raw)
        assert adapter.await_disposition(delivery) == Delivery.REJECTED
        assert delivery.remote.condition.name == "amqp:decode-error"
    adapter.wait(lambda: sender.credit == 100, "credit back")
    message = adapter.message("get", reply_to=receiver.source.address, body='{"tenant-id":"acme"}', message_id="m1")
    assert adapter.exchange(sender, message, "m1").status == 200


def test_aborted_delivery_is_ignored(adapter: Adapter) -> None:
    """Section 5, step 1."""
    sender, receiver = adapter.links("tenant")
    message = adapter.message("get", reply_to=receiver.source.address, body='{"tenant-id":"acme"}', message_id="m1")
    delivery = sender.delivery("aborted")
    sender.stream(message.encode())
    adapter.pump()
    delivery.abort()
    adapter.pump()
    message.id = "m2"
    assert adapter.exchange(sender, message, "m2").status == 200
    assert adapter.replies == []


def test_many_callers_at_once(acme: Acme) -> None:
    """Section 5.3: pipelined on many connections, all are answered."""
    adapters = [acme.adapter() for _ in range(10)]
    try:
        for adapter in adapters:
            sender, receiver = adapter.links("registration/acme")
            for number in range(50):
                message = adapter.message(
                    "assert",
                    reply_to=receiver.source.address,
                    properties={"device_id": "d1"},
                    message_id=f"m{number}",
                )
                sender.delivery(f"{number}")
                sender.stream(message.encode())
                sender.advance()
            adapter.pump()
        for adapter in adapters:
            replies = adapter.replies
            adapter.wait(lambda replies=replies: len(replies) == 50, "50 replies")  # type: ignore[misc]
            assert {reply.status for reply in adapter.replies} == {200}
    finally:
        for adapter in adapters:
            adapter.close()


def test_registry_survives_a_client_that_vanishes_with_requests_under_way(acme: Acme, adapter: Adapter) -> None:
    """Section 2.4: running requests finish, their replies are thrown away."""
    vanishing = acme.adapter()
    sender, receiver = vanishing.links("credentials/acme")
    name, message = provisioning_message(acme, vanishing, receiver.source.address)
    sender.delivery(os.urandom(4).hex())
    sender.stream(message.encode())
    sender.advance()
    vanishing.pump()
    vanishing.abort()
    poll(lambda: get_credentials(adapter, name).status == 200, what="the device")
