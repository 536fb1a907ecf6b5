"""The hook for external systems (provisioning 9) through real sockets: the real registry asks a receiver."""

import base64
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.databases import Databases
from tests.integration.adapter import Adapter, Reply
from tests.integration.certificates import Authority, TlsFiles, tls_files
from tests.integration.conftest import NewRegistry
from tests.integration.receiver import (
    Behaviour,
    Question,
    Receiver,
    answer,
    deaf_port,
    drip,
    endless,
    hang,
    raw,
    reset,
    verify,
)
from tests.integration.registry import Registry, kamado, poll

CA = Authority.create("CN=Hook CA,O=Acme")
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
RECEIVER = Path(__file__).parents[2] / "examples" / "hook" / "receiver.py"


def new_tenant(registry: Registry, **members: object) -> str:
    anchor = CA.trust_anchor(auto_provisioning_enabled=True, **members)
    tenant_id = registry.create_tenant(document={"trust-anchor-group": "tests", "trusted-ca": [anchor]})
    registry.create_device(tenant_id, "gw", {"authorities": ["auto-provisioning-enabled"]})
    return tenant_id


def connect(registry: Registry) -> Adapter:
    return Adapter(registry.amqp_port, registry.username, registry.password)


def by_certificate(adapter: Adapter, tenant_id: str, name: str) -> Reply:
    auth_id = f"CN={name},O=Acme"
    body = {"type": "x509-cert", "auth-id": auth_id, "client-certificate": CA.issue(auth_id).base64}
    return adapter.request(f"credentials/{tenant_id}", "get", body=json.dumps(body))


def through_gateway(adapter: Adapter, tenant_id: str, device_id: str) -> Reply:
    properties = {"device_id": device_id, "gateway_id": "gw"}
    return adapter.request(f"registration/{tenant_id}", "assert", properties=properties)


def count_devices(registry: Registry, tenant_id: str) -> int:
    total = registry.request("GET", f"/v1/devices/{tenant_id}").object["total"]
    assert isinstance(total, int)
    return total


def count_connections(registry: Registry, port: int) -> int:
    """Count the registry's sockets that lead to a port of this machine."""
    inodes = set()
    for entry in Path(f"/proc/{registry.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(entry.readlink().name.removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for line in Path(f"/proc/{registry.pid}/net/tcp").read_text().splitlines()[1:]]
    return len([fields for fields in lines if fields[2].endswith(f":{port:04X}") and fields[9] in inodes])


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver(answer(200)) as one:
        yield one


def start_registry(receiver: Receiver, databases: Databases, directory: Path, timeout: str) -> Registry:
    secret = directory / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    settings = {
        "provisioning.hook.url": receiver.url,
        "provisioning.hook.timeout": timeout,
        "provisioning.hook.secret_file": str(secret),
        "provisioning.hook.max_concurrent": "30",
    }
    return Registry(directory, settings, url=databases.create(directory / "data"))


@pytest.fixture(scope="module")
def registry(receiver: Receiver, databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that waits for the receiver, however busy the machine is."""
    with start_registry(receiver, databases, tmp_path_factory.mktemp("hook"), "30s") as one:
        yield one


@pytest.fixture(scope="module")
def hasty_registry(
    receiver: Receiver, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """One that does not wait for long, for receivers that do not answer."""
    with start_registry(receiver, databases, tmp_path_factory.mktemp("hasty"), "1s") as one:
        yield one


@pytest.fixture
def adapter(registry: Registry) -> Iterator[Adapter]:
    with connect(registry) as one:
        yield one


@pytest.fixture(autouse=True)
def polite(receiver: Receiver) -> None:
    receiver.behaviour = answer(200)
    receiver.questions.clear()


def together(number: int, behaviour: Behaviour) -> Behaviour:
    """Answer no question before there are so many."""
    meeting = threading.Barrier(number)

    def behave(connection: socket.socket, question: Question, over: threading.Event) -> bool:
        meeting.wait(5)
        return behaviour(connection, question, over)

    return behave


class TestAnswers:
    def test_wanted(self, registry: Registry, adapter: Adapter, receiver: Receiver) -> None:
        tenant_id = new_tenant(registry)
        created = by_certificate(adapter, tenant_id, "p")
        assert created.status == 201
        asserted = through_gateway(adapter, tenant_id, "edge-1")
        assert asserted.status == 200
        first, second = (question.document for question in receiver.questions)
        for question in receiver.questions:
            verify(question, SECRET)
        assert first["type"] == "first-contact.certificate"
        assert (first["tenant-id"], first["device-id"]) == (tenant_id, created.json()["device-id"])
        assert (first["auth-id"], first["issuer-dn"]) == ("CN=p,O=Acme", "CN=Hook CA,O=Acme")
        assert base64.b64decode(first["certificate"])
        assert second["type"] == "first-contact.gateway"
        assert (second["device-id"], second["gateway-id"]) == ("edge-1", "gw")
        # What is there is not asked for again.
        assert by_certificate(adapter, tenant_id, "p").status == 200
        assert through_gateway(adapter, tenant_id, "edge-1").status == 200
        assert len(receiver.questions) == 2

    def test_what_it_wants_for_a_device(self, registry: Registry, adapter: Adapter, receiver: Receiver) -> None:
        tenant_id = new_tenant(registry)
        receiver.behaviour = answer(200, {"device-id": "erp-7", "defaults": {"ttl": 30}, "ext": {"site": 7}})
        created = by_certificate(adapter, tenant_id, "p")
        assert created.status == 201
        assert created.json()["device-id"] == "erp-7"
        device = registry.request("GET", f"/v1/devices/{tenant_id}/erp-7").object
        ext = device["ext"]
        assert isinstance(ext, dict)
        assert ext.pop("comment").startswith("Auto-provisioned at ")
        assert (ext, device["defaults"]) == ({"site": 7}, {"ttl": 30})
        receiver.behaviour = answer(200, {"defaults": {"ttl": 5}})
        asserted = through_gateway(adapter, tenant_id, "edge-1")
        assert asserted.json() == {"device-id": "edge-1", "via": ["gw"], "defaults": {"ttl": 5}}

    @pytest.mark.parametrize("status", [403, 404])
    def test_not_wanted(self, registry: Registry, adapter: Adapter, receiver: Receiver, status: int) -> None:
        """404, and nothing tells it from a device that nobody knows."""
        tenant_id = new_tenant(registry)
        receiver.behaviour = answer(status, {"error": "scrapped"})
        body = json.dumps({"type": "psk", "auth-id": "nobody"})
        unknown = adapter.request(f"credentials/{tenant_id}", "get", body=body)
        refused = by_certificate(adapter, tenant_id, "p")
        assert (refused.status, refused.body, refused.properties) == (404, unknown.body, unknown.properties)
        assert through_gateway(adapter, tenant_id, "edge-1").status == 404
        assert count_devices(registry, tenant_id) == 1

    def test_its_device_id_belongs_to_another(self, registry: Registry, adapter: Adapter, receiver: Receiver) -> None:
        """As with templates (provisioning 3.7)."""
        tenant_id = new_tenant(registry)
        receiver.behaviour = answer(200, {"device-id": "gw", "ext": {"mine": False}})
        assert by_certificate(adapter, tenant_id, "p").status == 409
        device = registry.request("GET", f"/v1/devices/{tenant_id}/gw").object
        assert "ext" not in device

    def test_two_at_once(self, registry: Registry, receiver: Receiver) -> None:
        """Both are waiting for the receiver: still one device."""
        tenant_id = new_tenant(registry)
        receiver.behaviour = together(6, answer(204))
        body = {"type": "x509-cert", "auth-id": "CN=p", "client-certificate": CA.issue("CN=p").base64}
        with contextlib.ExitStack() as stack:
            waiting = []
            for number in range(6):
                adapter = stack.enter_context(connect(registry))
                sender, link = adapter.links(f"credentials/{tenant_id}")
                text = json.dumps(body)
                message = adapter.message("get", reply_to=link.source.address, body=text, message_id=f"m{number}")
                waiting.append((adapter, sender, message))
            for adapter, sender, message in waiting:
                adapter.send(sender, message)
            replies = [adapter.await_reply(message.id) for adapter, _, message in waiting]
        assert sorted(reply.status or 0 for reply in replies) == [200] * 5 + [201]
        assert len({reply.json()["device-id"] for reply in replies}) == 1
        assert len(receiver.questions) == 6
        assert count_devices(registry, tenant_id) == 2


TROUBLE: dict[str, Behaviour] = {
    "hangs": hang,
    "byte by byte": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0.05),
    "reset": reset,
    "closed": raw(b""),
    "500": answer(500, {}),
    "400": answer(400),
    "redirect": answer(307, headers={"Location": "/elsewhere"}),
    "no HTTP": raw(b"220 mail.example ESMTP\r\n"),
    "no JSON": answer(200, b"OK"),
    "unknown member": answer(200, {"enabled": False}),
    "bad device id": answer(200, {"device-id": "a b"}),
    "another device id": answer(200, {"device-id": 7}),
    "too large": answer(200, b"x" * 70_000),
    "endless": endless(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"x" * 1024 + b"\r\n"),
    "endless head": endless(b"HTTP/1.1 200 X\r\n", b"X: " + b"y" * 1000 + b"\r\n"),
}


class TestTrouble:
    @pytest.fixture
    def registry(self, hasty_registry: Registry) -> Registry:
        return hasty_registry

    @pytest.mark.parametrize("name", TROUBLE)
    def test_503_in_time_and_nothing_is_left(
        self, registry: Registry, adapter: Adapter, receiver: Receiver, name: str
    ) -> None:
        tenant_id = new_tenant(registry)
        receiver.behaviour = TROUBLE[name]
        started = time.monotonic()
        assert by_certificate(adapter, tenant_id, "p").status == 503
        assert through_gateway(adapter, tenant_id, "edge-1").status == 503
        # A receiver that hangs would do so for longer.
        assert time.monotonic() - started < 20
        poll(lambda: len(receiver.questions) == 2, what="the questions, which may be read later than they are given up")
        assert [question.line for question in receiver.questions] == ["POST /devices?from=kamado HTTP/1.1"] * 2
        assert count_devices(registry, tenant_id) == 1
        poll(lambda: count_connections(registry, receiver.port) == 0, what="no connection left")
        # It goes on serving, also those; on a busy machine the receiver may not answer in time at first.
        receiver.behaviour = answer(200)
        poll(lambda: by_certificate(adapter, tenant_id, "p").status == 201, what="the device")
        poll(lambda: through_gateway(adapter, tenant_id, "edge-1").status == 200, what="the edge device")

    def test_many_wait_for_one_that_hangs(
        self, hasty_registry: Registry, receiver: Receiver, databases: Databases, tmp_path: Path
    ) -> None:
        """At most so many are asked at a time; look-ups are answered meanwhile."""
        with start_registry(receiver, databases, tmp_path, "5s") as registry, connect(registry) as adapter:
            self.wait_for_one_that_hangs(registry, adapter, receiver)

    def wait_for_one_that_hangs(self, registry: Registry, adapter: Adapter, receiver: Receiver) -> None:
        tenant_id = new_tenant(registry)
        receiver.behaviour = hang
        sender, link = adapter.links(f"registration/{tenant_id}")
        for number in range(80):
            properties = {"device_id": f"e{number}", "gateway_id": "gw"}
            address = link.source.address
            adapter.send(
                sender, adapter.message("assert", reply_to=address, properties=properties, message_id=f"e{number}")
            )
        with connect(registry) as other:
            for _ in range(5):
                reply = other.request(f"registration/{tenant_id}", "assert", properties={"device_id": "gw"})
                assert reply.status == 200
            assert count_connections(registry, receiver.port) <= 30
            adapter.pump()
            # Those that are asked about have no answer yet; the others were refused.
            assert len(adapter.replies) <= 50
        assert {adapter.await_reply(f"e{number}").status for number in range(80)} == {503}
        assert len(receiver.questions) <= 30
        assert count_devices(registry, tenant_id) == 1
        poll(lambda: count_connections(registry, receiver.port) == 0, what="no connection left")
        # Rate limited: not a line for each.
        assert registry.log.read_text().count("provisioning hook failed") < 40

    def test_down(self, new_registry: NewRegistry) -> None:
        with socket.socket() as deaf:
            # Bound, and never listening: nobody else is given the port.
            deaf.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
            self.ask_who_is_down(new_registry({"provisioning.hook.url": url, "provisioning.hook.timeout": "30s"}))

    def ask_who_is_down(self, registry: Registry) -> None:
        tenant_id = new_tenant(registry)
        with connect(registry) as adapter:
            assert by_certificate(adapter, tenant_id, "p").status == 503
            assert through_gateway(adapter, tenant_id, "edge-1").status == 503
            assert adapter.request(f"registration/{tenant_id}", "assert", properties={"device_id": "gw"}).status == 200
        assert count_devices(registry, tenant_id) == 1
        assert "provisioning hook failed" in registry.log.read_text()

    def test_no_connection_to_be_had(self, new_registry: NewRegistry) -> None:
        with deaf_port() as port:
            registry = new_registry({"provisioning.hook.url": f"http://127.0.0.1:{port}/"})
            tenant_id = new_tenant(registry)
            with connect(registry) as adapter:
                assert by_certificate(adapter, tenant_id, "p").status == 503
            poll(lambda: count_connections(registry, port) == 0, what="no connection left")
        assert count_devices(registry, tenant_id) == 1

    def test_stopped_while_it_waits(self, new_registry: NewRegistry) -> None:
        """The stop does not wait for the receiver, and logs no error (the fixture looks)."""
        with Receiver(hang) as receiver:
            registry = new_registry({"provisioning.hook.url": receiver.url, "provisioning.hook.timeout": "1h"})
            tenant_id = new_tenant(registry)
            adapter = connect(registry)
            sender, link = adapter.links(f"registration/{tenant_id}")
            properties = {"device_id": "e", "gateway_id": "gw"}
            message = adapter.message("assert", reply_to=link.source.address, properties=properties, message_id="e")
            adapter.send(sender, message)
            poll(lambda: receiver.questions, what="a question")
            registry.stop()
            adapter.abort()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return tls_files(tmp_path_factory.mktemp("hook-tls"))


class TestTls:
    def context(self, files: TlsFiles, *, wants_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.cert_file, files.key_file)
        if wants_certificate:
            context.load_verify_locations(files.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def status(self, new_registry: NewRegistry, receiver: Receiver, settings: dict[str, str]) -> int | None:
        timeout = {"provisioning.hook.timeout": "30s"}
        registry = new_registry({"provisioning.hook.url": receiver.url} | timeout | settings)
        tenant_id = new_tenant(registry)
        with connect(registry) as adapter:
            statuses = {through_gateway(adapter, tenant_id, f"e{number}").status for number in range(3)}
        assert len(statuses) == 1
        return statuses.pop()

    def test_own_ca(self, new_registry: NewRegistry, files: TlsFiles) -> None:
        with Receiver(answer(200), tls=self.context(files)) as receiver:
            assert self.status(new_registry, receiver, {"provisioning.hook.ca_file": str(files.ca_file)}) == 200
            assert len(receiver.questions) == 3

    @pytest.mark.parametrize("whose", ["another", "none"])
    def test_a_ca_that_is_not_trusted(self, new_registry: NewRegistry, files: TlsFiles, whose: str) -> None:
        with Receiver(answer(200), tls=self.context(files)) as receiver:
            other = {"provisioning.hook.ca_file": str(files.client_ca_file)} if whose == "another" else {}
            assert self.status(new_registry, receiver, other) == 503
            assert not receiver.questions

    def test_client_certificate(self, new_registry: NewRegistry, files: TlsFiles, tmp_path: Path) -> None:
        trusted = {"provisioning.hook.ca_file": str(files.ca_file)}
        certificate, key = files.client(tmp_path, "registry", "CN=registry")
        own = {
            "provisioning.hook.client_cert_file": str(certificate),
            "provisioning.hook.client_key_file": str(key),
        }
        with Receiver(answer(200), tls=self.context(files, wants_certificate=True)) as receiver:
            assert self.status(new_registry, receiver, trusted | own) == 200
            receiver.questions.clear()
            assert self.status(new_registry, receiver, trusted) == 503
            assert not receiver.questions


def test_explain_asks_nobody(registry: Registry, receiver: Receiver, tmp_path: Path) -> None:
    tenant_id = new_tenant(registry)
    certificate, _ = CA.issue("CN=p").write(tmp_path, "p")
    told = registry.run("explain", "credentials", tenant_id, "x509-cert", "--certificate", str(certificate)).stdout
    assert told.startswith("201 Created")
    assert "would be asked whether the device is wanted; it was not asked now" in told
    told = registry.run("explain", "assert", tenant_id, "edge-1", "--via", "gw").stdout
    assert "would be asked whether the device is wanted; it was not asked now" in told
    assert "asked" not in registry.run("explain", "assert", tenant_id, "gw").stdout
    assert not receiver.questions
    assert count_devices(registry, tenant_id) == 1


def test_plain_http_to_another_host_is_warned_of() -> None:
    shown = kamado("check-config", "--set", "provisioning.hook.url=http://erp.example/devices")
    assert "without TLS" in shown.stderr + shown.stdout


@contextlib.contextmanager
def example(*arguments: str) -> Iterator[str]:
    """Run the receiver of the documentation; yields its address."""
    command = [sys.executable, str(RECEIVER), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_the_receiver_of_the_documentation(new_registry: NewRegistry, tmp_path: Path) -> None:
    secret, other, wanted = tmp_path / "hook.secret", tmp_path / "other.secret", tmp_path / "wanted.txt"
    secret.write_text(SECRET + "\n")
    other.write_text("whsec_" + base64.b64encode(bytes(32)).decode())
    for file in (secret, other):
        file.chmod(0o600)
    wanted.write_text("")
    with example("--secret-file", str(secret), "--wanted", str(wanted)) as url:
        settings = {"provisioning.hook.url": url, "provisioning.hook.timeout": "30s"}
        registry = new_registry(settings | {"provisioning.hook.secret_file": str(secret)})
        tenant_id = new_tenant(registry)
        with connect(registry) as adapter:
            assert by_certificate(adapter, tenant_id, "p").status == 404
            wanted.write_text(f"other *\n{tenant_id} CN=p,O=Acme\tpump-1\n{tenant_id} sensor-*\n")
            created = by_certificate(adapter, tenant_id, "p")
            assert (created.status, created.json()["device-id"]) == (201, "pump-1")
            assert through_gateway(adapter, tenant_id, "sensor-1").status == 200
            assert through_gateway(adapter, tenant_id, "pump-2").status == 404
        stranger = new_registry(settings | {"provisioning.hook.secret_file": str(other)})
        tenant_id = new_tenant(stranger)
        wanted.write_text(f"{tenant_id} *\n")
        with connect(stranger) as adapter:
            assert through_gateway(adapter, tenant_id, "sensor-1").status == 503
        assert "status 401" in stranger.log.read_text()


def test_the_receiver_refuses_what_is_old_or_changed() -> None:
    namespace: dict[str, Any] = {"__name__": "receiver"}
    exec(compile(RECEIVER.read_text(), str(RECEIVER), "exec"), namespace)
    is_signed = namespace["is_signed"]
    # The published example of the Standard Webhooks specification.
    key, now = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), 1614265330
    body = b'{"test": 2432232314}'
    good = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{'A' * 43}= v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert is_signed(key, good, body, now + 299)
    for wrong in (
        {"webhook-id": "msg_other"},
        {"webhook-timestamp": str(now + 1)},
        {"webhook-timestamp": ""},
        {"webhook-signature": "v1,x"},
        {"webhook-signature": ""},
        {"webhook-signature": "v2," + good["webhook-signature"][-44:]},
    ):
        assert not is_signed(key, good | wrong, body, now)
    for moment in (now + 301, now - 301):
        assert not is_signed(key, good, body, moment)
    assert not is_signed(key, good, body + b" ", now)
    assert not is_signed(bytes(24), good, body, now)
