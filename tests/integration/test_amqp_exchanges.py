"""The worked exchanges of amqp-apis 15: an unmodified Proton client against the real process, plain and over TLS."""

import json
import re
import socket
import ssl
import struct
import uuid
from collections.abc import Iterator

import pytest
from proton import Delivery, Endpoint, Link, Terminus
from tests.databases import Databases
from tests.integration.acme import PASSWORD, Acme, acme_fixture, credentials_request
from tests.integration.adapter import HOST, TIMEOUT, Adapter, LinkRefused, tls_socket
from tests.integration.conftest import NewRegistry
from tests.integration.registry import poll


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    default = {"amqp.idle_timeout": "20s"}
    yield from acme_fixture(databases, tmp_path_factory.mktemp("exchanges"), settings=default)


@pytest.fixture(params=["plain", "tls"])
def over_tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "tls")


@pytest.fixture
def adapter(acme: Acme, over_tls: bool) -> Iterator[Adapter]:
    with acme.adapter(tls=over_tls) as adapter:
        yield adapter


def connect(acme: Acme, over_tls: bool) -> socket.socket:
    """Open a bare connection, for clients that do not behave."""
    if over_tls:
        return tls_socket(acme.registry.amqps_port, acme.client_tls())
    return socket.create_connection((HOST, acme.registry.amqp_port), timeout=TIMEOUT)


def read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        assert part, data
        data += part
    return data


def read_frame(connection: socket.socket) -> bytes:
    head = read_exactly(connection, 4)
    return head + read_exactly(connection, struct.unpack(">I", head)[0] - 4)


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except (ConnectionResetError, ssl.SSLError):
        pass
    return data


SASL_HEADER = b"AMQP\x03\x01\x00\x00"
AMQP_HEADER = b"AMQP\x00\x01\x00\x00"


# 15.1


def test_15_1_connection_set_up(adapter: Adapter) -> None:
    """15.1; section 2.1: what the server's `open` and `begin` say."""
    connection = adapter.connection
    assert re.fullmatch(r"hono-registry-.+", str(connection.remote_container))
    assert connection.remote_hostname in {None, ""}
    transport = adapter._transport
    assert transport.remote_max_frame_size >= 512
    assert transport.remote_idle_timeout == 10.0
    assert not connection.remote_offered_capabilities
    assert not connection.remote_desired_capabilities
    properties = connection.remote_properties
    assert properties is None or {"product", "version"} >= {str(key) for key in properties}
    adapter.wait(lambda: adapter.session.state & Endpoint.REMOTE_ACTIVE, "begin")


def test_15_1_by_the_byte(acme: Acme, over_tls: bool) -> None:
    """15.1 and section 1.2: headers, mechanisms as an array of symbols, outcome, headers again."""
    with connect(acme, over_tls) as connection:
        connection.sendall(SASL_HEADER)
        assert read_exactly(connection, 8) == SASL_HEADER
        mechanisms = read_frame(connection)
        assert mechanisms[4:8] == b"\x02\x01\x00\x00"
        assert mechanisms[8:11] == b"\x00\x53\x40"
        # An array of symbols, with PLAIN in it, and no ANONYMOUS.
        assert b"\xa3\x05PLAIN" in mechanisms
        assert b"\xe0" in mechanisms
        assert b"ANONYMOUS" not in mechanisms
        response = b"\0protocol-adapter\0" + PASSWORD.encode()
        fields = b"\xa3\x05PLAIN" + b"\xa0" + bytes([len(response)]) + response
        body = b"\x00\x53\x41\xc0" + bytes([len(fields) + 1]) + b"\x02" + fields
        connection.sendall(struct.pack(">IBBH", len(body) + 8, 2, 1, 0) + body)
        assert read_frame(connection)[8:] == bytes.fromhex("005344c003015000")
        connection.sendall(AMQP_HEADER)
        assert read_exactly(connection, 8) == AMQP_HEADER


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(AMQP_HEADER, id="AMQP without SASL"),
        pytest.param(b"AMQP\x02\x01\x00\x00", id="in-band TLS"),
        pytest.param(b"AMQP\x03\x00\x09\x01", id="another version"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
    ],
)
def test_other_headers_are_answered_with_the_sasl_header(acme: Acme, over_tls: bool, header: bytes) -> None:
    """Section 1.2."""
    with connect(acme, over_tls) as connection:
        connection.sendall(header)
        assert read_to_end(connection) == SASL_HEADER


def test_heartbeats_at_half_of_the_clients_time_out(acme: Acme, over_tls: bool) -> None:
    """15.1, section 2.2."""
    with acme.adapter(tls=over_tls, idle_timeout=4.0) as adapter:
        adapter.wait(lambda: adapter.session.state & Endpoint.REMOTE_ACTIVE, "begin")
        frames = adapter._transport.frames_input
        # Proton would close the connection itself if nothing came.
        adapter.wait(lambda: adapter._transport.frames_input >= frames + 2, "two heartbeats")


# 15.2


def test_15_2_tenant_by_dn_then_by_id(adapter: Adapter) -> None:
    reply_to = f"tenant/{uuid.uuid4()}"
    receiver = adapter.attach_receiver(reply_to)
    assert receiver.remote_source.address == reply_to
    sender = adapter.attach_sender("tenant")
    assert sender.remote_target.address == "tenant"
    assert sender.credit == 100

    message = adapter.message(
        "get",
        reply_to=reply_to,
        body=json.dumps({"subject-dn": "CN=Device CA,OU=Plant 7,O=Acme"}),
        message_id="tenant-client-4f",
    )
    message.address = "tenant"
    reply = adapter.exchange(sender, message, "tenant-client-4f")
    assert reply.link == receiver
    assert reply.message.address == "tenant/acme"
    assert (reply.status, reply.tenant_id, reply.cache_control) == (200, "acme", "max-age = 180")
    payload = reply.json()
    assert (payload["tenant-id"], payload["enabled"]) == ("acme", True)
    assert payload["trusted-ca"][0]["subject-dn"] == "CN=Device CA,OU=Plant 7,O=Acme"
    adapter.wait(lambda: sender.credit == 100, "credit back")

    # An ambiguous DN, then the first label of the SNI host name, on the same links.
    message.body = json.dumps({"subject-dn": "CN=Shared,O=Acme"}).encode()
    message.id = "tenant-client-50"
    reply = adapter.exchange(sender, message, "tenant-client-50")
    assert (reply.status, reply.body) == (404, None)
    message.body = json.dumps({"tenant-id": "s1"}).encode()
    message.id = "tenant-client-51"
    reply = adapter.exchange(sender, message, "tenant-client-51")
    assert (reply.status, reply.tenant_id) == (200, "s1")


# 15.3


def test_15_3_gateway_not_authorised(adapter: Adapter) -> None:
    properties = {"device_id": "d2", "gateway_id": "gw2"}
    reply = adapter.request("registration/acme", "assert", properties=properties)
    assert reply.message.address == "registration/acme/d2"
    assert (reply.status, reply.tenant_id, reply.device_id) == (403, "acme", "d2")
    assert reply.body is None

    reply = adapter.request("registration/acme", "assert", properties={"device_id": "d2", "gateway_id": "gw1"})
    assert (reply.status, reply.cache_control) == (200, "max-age = 300")
    assert reply.json() == {"device-id": "d2", "via": ["gw1"]}


# 15.4


def test_15_4_first_contact(acme: Acme, adapter: Adapter) -> None:
    name, certificate = acme.new_device()
    body = credentials_request(name, client_certificate=certificate.base64)
    reply = adapter.request("credentials/acme", "get", body=body)
    assert (reply.status, reply.tenant_id) == (201, "acme")
    payload = reply.json()
    assert payload.pop("device-id")
    # Optional, and ignored by clients (section 11.4)
    payload.pop("comment", None)
    assert payload == {"type": "x509-cert", "auth-id": name, "enabled": True, "secrets": [{}]}


# 15.5


def test_15_5_device_connection(adapter: Adapter) -> None:
    sender, receiver = adapter.links("device_con/acme")
    for subject, properties in (
        ("set-cmd-handling-adapter-instance", {"device_id": "gw1", "adapter_instance_id": "mqtt-1"}),
        ("set-last-gw", {"device_id": "d2", "gateway_id": "gw1"}),
    ):
        assert adapter.request("device_con/acme", subject, properties=properties).status == 204
    message = adapter.message(
        "get-cmd-handling-adapter-instances",
        reply_to=receiver.source.address,
        properties={"device_id": "d2"},
        body='{"gateway-ids":["gw1","gw2"]}',
        message_id="devcon-client-31",
    )
    reply = adapter.exchange(sender, message, "devcon-client-31")
    assert reply.properties == {"status": 200, "tenant_id": "acme", "device_id": "d2"}
    assert reply.status == 200
    assert reply.message.address == "device_con/acme/d2"
    assert reply.json() == {"adapter-instances": [{"adapter-instance-id": "mqtt-1", "device-id": "gw1"}]}
    adapter.wait(lambda: sender.credit == 100, "credit back")


# 15.7


def test_15_7_refused_link(acme: Acme, over_tls: bool) -> None:
    """15.7, and the exact pattern of section 4.3; `Adapter` checks that both frames came at once."""
    with acme.adapter("asserts-acme", tls=over_tls) as adapter:
        with pytest.raises(LinkRefused) as refused:
            adapter.attach_receiver("cmd_router/other/aa")
        assert refused.value.condition == "amqp:not-found"
    with acme.adapter("nothing", tls=over_tls) as adapter:
        link = adapter.session.receiver("auto-3")
        link.source.address = "registration/other/aa"
        link.open()
        adapter.wait(lambda: link.state & Endpoint.REMOTE_CLOSED, "detach")
        assert link.remote_source.type == Terminus.UNSPECIFIED
        assert link.remote_target.type == Terminus.UNSPECIFIED
        assert link.remote_condition is not None
        assert link.remote_condition.name == "amqp:unauthorized-access"
        assert link.remote_condition.description == "unauthorized"
        link.close()
        adapter.pump()
        # The handle can be used again.
        again = adapter.session.receiver("auto-4")
        again.source.address = "registration/other/aa"
        again.open()
        adapter.wait(lambda: again.state & Endpoint.REMOTE_CLOSED, "detach")


# 15.8


def test_15_8_rejected_request(adapter: Adapter) -> None:
    sender, receiver = adapter.links("tenant")
    message = adapter.message(None, reply_to=receiver.source.address, message_id="x-1")
    delivery = adapter.send(sender, message)
    assert adapter.await_disposition(delivery) == Delivery.REJECTED
    assert delivery.remote.condition.name == "hono:bad-request"
    assert delivery.remote.condition.description == "malformed request message"
    adapter.wait(lambda: sender.credit == 100, "credit back")
    assert adapter.replies == []


# Section 2.4: the end of connections


def test_client_close_is_answered(acme: Acme, over_tls: bool) -> None:
    adapter = acme.adapter(tls=over_tls)
    adapter.connection.close()
    adapter.wait(lambda: adapter.connection.state & Endpoint.REMOTE_CLOSED, "close")
    assert not adapter.connection.remote_condition
    adapter.close()


@pytest.mark.parametrize(
    ("frame", "condition"),
    [
        pytest.param(b"\x00\x00\x00\x04\x02\x00\x00\x00", b"amqp:framing-error", id="size below the header's"),
        pytest.param(b"\x7f\xff\xff\xff\x02\x00\x00\x00", b"amqp:framing-error", id="larger than agreed"),
        pytest.param(b"\x00\x00\x00\x0c\x02\x00\x00\x00\xff\xff\xff\xff", b"amqp:decode-error", id="no performative"),
    ],
)
def test_malformed_frames_end_one_connection_only(
    acme: Acme, adapter: Adapter, over_tls: bool, frame: bytes, condition: bytes
) -> None:
    """Section 2.4: framing or decoding error."""
    with connect(acme, over_tls) as connection:
        response = b"\0protocol-adapter\0" + PASSWORD.encode()
        fields = b"\xa3\x05PLAIN" + b"\xa0" + bytes([len(response)]) + response
        body = b"\x00\x53\x41\xc0" + bytes([len(fields) + 1]) + b"\x02" + fields
        connection.sendall(SASL_HEADER + struct.pack(">IBBH", len(body) + 8, 2, 1, 0) + body)
        open_ = b"\x00\x53\x10\xc0\x04\x01\xa1\x01x"
        connection.sendall(AMQP_HEADER + struct.pack(">IBBH", len(open_) + 8, 2, 0, 0) + open_)
        connection.sendall(frame)
        assert condition in read_to_end(connection)
    assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


def test_orderly_shutdown(new_registry: NewRegistry, over_tls: bool) -> None:
    """Section 2.4: `close` with amqp:connection:forced."""
    registry = new_registry(tls=True)
    acme = Acme(registry=registry, ca=None, passive_ca=None)  # type: ignore[arg-type]
    tls = acme.client_tls() if over_tls else None
    port = registry.amqps_port if over_tls else registry.amqp_port
    adapter = Adapter(port, registry.username, registry.password, tls=tls)
    assert registry.process is not None
    registry.process.terminate()
    assert adapter.wait_for_close().condition == "amqp:connection:forced"
    adapter.close()
    poll(lambda: registry.process is None or registry.process.poll() is not None, what="the end of the process")


def test_settle_modes_of_replies(adapter: Adapter) -> None:
    """Section 4.2: replies are unsettled, and settled when the client's disposition arrives."""
    adapter.accepts_replies = False
    sender, receiver = adapter.links("tenant")
    message = adapter.message("get", reply_to=receiver.source.address, body='{"tenant-id":"acme"}', message_id="m1")
    delivery = adapter.send(sender, message)
    reply = adapter.await_reply("m1").delivery
    assert not reply.settled
    # Not settled by the client yet, but with an outcome: the server settles.
    reply.update(Delivery.ACCEPTED)
    adapter.wait(lambda: reply.settled, "the server's settlement")
    reply.settle()
    delivery.settle()
    assert receiver.remote_snd_settle_mode == Link.SND_UNSETTLED
