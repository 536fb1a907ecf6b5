"""Who may connect: authentication 6 (rows of PLAIN, EXTERNAL, rights, permissions file) against the real process."""

import json
import signal
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture, permissions
from tests.integration.adapter import HOST, TIMEOUT, Adapter, AuthenticationFailed, ClientTls, LinkRefused, tls_socket
from tests.integration.certificates import Authority
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, poll
from tests.rows import Section

ROWS = Section("authentication 6")


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    external = {"mechanism": "EXTERNAL", "authorities": ["protocol-adapter"]}
    yield from acme_fixture(
        databases,
        tmp_path_factory.mktemp("authentication"),
        users={
            "coap-adapter": external,
            "OU=Adapters,O=X": external,
            "comma, adapter": external,
            "hashed": {
                "mechanism": "PLAIN",
                # bcrypt of "hashed-secret", cost 4
                "pwd-hash": "$2b$04$sLSVkw1vaaZYnZo5FtUPbOXCyHFlrFFOlUr6XcerruoxbEEUy0wZ2",
                "authorities": ["protocol-adapter"],
            },
        },
    )


# SASL by hand


def symbol(text: str) -> bytes:
    return b"\xa3" + bytes([len(text)]) + text.encode()


def binary(data: bytes) -> bytes:
    return b"\xa0" + bytes([len(data)]) + data


def frame(code: int, *fields: bytes) -> bytes:
    content = b"".join(fields)
    body = b"\x00\x53" + bytes([code]) + b"\xc0" + bytes([len(content) + 1, len(fields)]) + content
    return struct.pack(">IBBH", len(body) + 8, 2, 1, 0) + body


def init(mechanism: str, response: bytes | None) -> bytes:
    return frame(0x41, symbol(mechanism), b"\x40" if response is None else binary(response))


class RawSasl:
    """A client that says what it likes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.sendall(b"AMQP\x03\x01\x00\x00")
        assert self._exactly(8) == b"AMQP\x03\x01\x00\x00"
        self.offered = self.read()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.connection.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def read(self) -> bytes:
        """Read one frame and return what follows its header."""
        (size,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(size - 4)[4:]

    def outcome(self) -> int:
        """Read the outcome; after any but 0 the server closes the socket."""
        body = self.read()
        assert body[:3] == b"\x00\x53\x44", body
        position = body.index(b"\x50")
        code = body[position + 1]
        if code:
            with pytest.raises((EOFError, ConnectionResetError)):
                self.read()
        return code


@pytest.fixture
def plain(acme: Acme) -> Iterator[RawSasl]:
    with socket.create_connection((HOST, acme.registry.amqp_port), timeout=TIMEOUT) as connection:
        yield RawSasl(connection)


def log_in(plain: RawSasl, response: bytes, mechanism: str = "PLAIN") -> int:
    plain.connection.sendall(init(mechanism, response))
    return plain.outcome()


# PLAIN


@ROWS.row(1)
def test_row1_plain(acme: Acme, plain: RawSasl) -> None:
    assert log_in(plain, b"\0protocol-adapter\0adapter-secret") == 0
    with acme.adapter() as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


@ROWS.row(1)
def test_row1_plain_with_a_hashed_password(acme: Acme) -> None:
    with Adapter(acme.registry.amqp_port, "hashed", "hashed-secret") as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


@pytest.mark.parametrize("name", ["protocol-adapter", "hashed", "nobody-knows", "Protocol-Adapter"])
@ROWS.row(2)
def test_row2_wrong_password_and_unknown_user(acme: Acme, name: str) -> None:
    with pytest.raises(AuthenticationFailed) as refused:
        Adapter(acme.registry.amqp_port, name, "wrong")
    assert refused.value.outcome == 1


@ROWS.row(2)
def test_row2_is_indistinguishable(acme: Acme) -> None:
    """The same bytes, whether the user is known or not."""
    answers = set()
    for name in (b"protocol-adapter", b"nobody-knows", b"coap-adapter"):
        with socket.create_connection((HOST, acme.registry.amqp_port), timeout=TIMEOUT) as connection:
            client = RawSasl(connection)
            connection.sendall(init("PLAIN", b"\0" + name + b"\0wrong"))
            answers.add(client.read())
    assert len(answers) == 1


@pytest.mark.parametrize(
    "response",
    [
        ROWS.case("3-two-fields", b"a\0b"),
        ROWS.case("3-four-fields", b"\0protocol-adapter\0adapter-secret\0x"),
        ROWS.case("3-empty", b""),
        pytest.param(b"\0\0adapter-secret", id="no-user"),
        pytest.param(b"\0protocol-adapter\0", id="no-password"),
        pytest.param(b"\0protocol-adapter\0\xff", id="no-utf8"),
    ],
)
def test_row3_malformed_responses(plain: RawSasl, response: bytes) -> None:
    assert log_in(plain, response) == 1


@ROWS.row(4)
def test_row4_plain_for_a_user_of_external(plain: RawSasl) -> None:
    assert log_in(plain, b"\0coap-adapter\0adapter-secret") == 1


@ROWS.row(8)
def test_row8_challenge_and_response(plain: RawSasl) -> None:
    plain.connection.sendall(init("PLAIN", None))
    assert plain.read() == bytes.fromhex("005342c00301a000")
    plain.connection.sendall(frame(0x43, binary(b"\0protocol-adapter\0adapter-secret")))
    assert plain.outcome() == 0


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "ANONYMOUS", "EXTERNAL", "plain", ""])
@ROWS.row(9)
def test_row9_mechanism_not_offered(plain: RawSasl, mechanism: str) -> None:
    assert log_in(plain, b"\0protocol-adapter\0adapter-secret", mechanism) == 1


def test_authorization_id_is_ignored(plain: RawSasl) -> None:
    """4.4: impersonation is off."""
    assert log_in(plain, b"everything\0nothing\0adapter-secret") == 0


def test_offered_mechanisms_on_a_plain_listener(plain: RawSasl) -> None:
    """amqp-apis 1.3."""
    assert symbol("PLAIN")[1:] in plain.offered
    assert b"EXTERNAL" not in plain.offered
    assert b"ANONYMOUS" not in plain.offered


# EXTERNAL


def client_tls(acme: Acme, directory: Path, subject: str) -> ClientTls:
    assert acme.registry.tls is not None
    cert_file, key_file = acme.registry.tls.client(directory, "client", subject)
    return acme.client_tls(cert_file=cert_file, key_file=key_file)


@pytest.mark.parametrize(
    "subject",
    [
        ROWS.case("5", "CN=coap-adapter,O=X"),
        ROWS.case("5-cn-alone", "CN=coap-adapter"),
        pytest.param("OU=Adapters,O=X", id="4.3-complete-dn"),
        pytest.param(r"CN=comma\, adapter,O=X", id="4.3-unescaped"),
    ],
)
def test_row5_external(acme: Acme, tmp_path: Path, subject: str) -> None:
    with Adapter(acme.registry.amqps_port, tls=client_tls(acme, tmp_path, subject)) as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


@pytest.mark.parametrize(
    "subject",
    [
        ROWS.case("6", "O=X,CN=coap-adapter"),
        pytest.param("CN=nobody-knows,O=X", id="unknown"),
        ROWS.case("4-external-for-a-user-of-plain", "CN=protocol-adapter,O=X"),
    ],
)
def test_row6_external_refused(acme: Acme, tmp_path: Path, subject: str) -> None:
    with pytest.raises(AuthenticationFailed) as refused:
        Adapter(acme.registry.amqps_port, tls=client_tls(acme, tmp_path, subject))
    assert refused.value.outcome == 1


@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "tls"])
@ROWS.row(7)
def test_row7_external_without_a_certificate(acme: Acme, over_tls: bool) -> None:
    if over_tls:
        connection: socket.socket = tls_socket(acme.registry.amqps_port, acme.client_tls())
    else:
        connection = socket.create_connection((HOST, acme.registry.amqp_port), timeout=TIMEOUT)
    with connection:
        assert log_in(RawSasl(connection), b"", "EXTERNAL") == 1


def test_certificate_of_a_stranger_ends_the_handshake(acme: Acme, tmp_path: Path) -> None:
    """4.3, step 1: the TLS layer verifies the chain."""
    cert_file, key_file = Authority.create("CN=Stranger").issue("CN=coap-adapter,O=X").write(tmp_path, "stranger")
    with pytest.raises(Exception) as refused:
        Adapter(acme.registry.amqps_port, tls=acme.client_tls(cert_file=cert_file, key_file=key_file))
    assert not isinstance(refused.value, AssertionError)


def test_external_comes_first_for_a_client_with_a_certificate(acme: Acme, tmp_path: Path) -> None:
    """amqp-apis 1.3: EXTERNAL, PLAIN, in this order; and PLAIN works with a certificate as well."""
    tls = client_tls(acme, tmp_path, "CN=coap-adapter,O=X")
    with tls_socket(acme.registry.amqps_port, tls) as connection:
        client = RawSasl(connection)
        assert 0 < client.offered.index(b"EXTERNAL") < client.offered.index(b"PLAIN")
    with Adapter(acme.registry.amqps_port, "protocol-adapter", "adapter-secret", tls=tls) as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_a_resumed_session_does_not_outlive_its_ca(
    new_registry: NewRegistry, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """4.3, step 1: the chain is verified against the CAs that are configured now, read again on a signal."""
    users = {"coap-adapter": {"mechanism": "EXTERNAL", "authorities": ["protocol-adapter"]}}
    registry = permissions_registry(new_registry, tmp_path, permissions(users), tls=True)
    assert registry.tls is not None
    context = ssl.create_default_context(cafile=str(registry.tls.ca_file))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(*registry.tls.client(tmp_path, "client", "CN=coap-adapter,O=X"))

    def connect(session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
        plain = socket.create_connection((HOST, registry.amqps_port), timeout=TIMEOUT)
        with context.wrap_socket(plain, server_hostname="localhost", session=session) as connection:
            assert log_in(RawSasl(connection), b"", "EXTERNAL") == 0
            return connection.session

    def reload(count: int) -> None:
        assert registry.process is not None
        registry.process.send_signal(signal.SIGHUP)
        # Two listeners.
        poll(lambda: registry.log.read_text().count("key material reloaded") == 2 * count, what="the new CA in use")

    session = connect()
    old = registry.tls.client_ca_file.read_bytes()
    next_ca = Authority.create("CN=Next CA")
    registry.tls.client_ca_file.write_bytes(next_ca.pem)
    reload(1)
    for attempt in (session, None):
        with pytest.raises((ssl.SSLError, EOFError, ConnectionError)):
            connect(attempt)
    poll(lambda: "certificate verify failed" in registry.log.read_text(), what="the reason in the log")
    # Who is trusted still gets in, whatever session it would resume.
    registry.tls.client_ca_file.write_bytes(old + next_ca.pem)
    reload(2)
    connect(session)


# Rights


def condition_of(adapter: Adapter, address: str) -> str | None:
    with pytest.raises(LinkRefused) as refused:
        adapter.attach_sender(address)
    return refused.value.condition


def ask(adapter: Adapter, tenant_id: str) -> int | None:
    return adapter.request(f"registration/{tenant_id}", "assert", properties={"device_id": "d1"}).status


@ROWS.row(15)
def test_row15_only_reading(acme: Acme) -> None:
    with acme.adapter("reads-registration") as adapter:
        assert condition_of(adapter, "registration/acme") == "amqp:unauthorized-access"
        adapter.attach_receiver("registration/acme/row15")


@ROWS.row(16)
def test_row16_search_goes_on(acme: Acme) -> None:
    with acme.adapter("search-goes-on") as adapter:
        assert adapter.attach_sender("registration/acme").credit == 100


@ROWS.row(17)
def test_row17_another_tenants_operation(acme: Acme) -> None:
    with acme.adapter("asserts-acme") as adapter:
        assert ask(adapter, "acme") == 200
        assert ask(adapter, "other") == 403


@ROWS.row(18)
def test_row18_everything(acme: Acme) -> None:
    with acme.adapter("everything") as adapter:
        assert ask(adapter, "acme") == 200
        assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


@ROWS.row(19)
def test_row19_no_operation_for_tenants(acme: Acme) -> None:
    with acme.adapter("links-only") as adapter:
        reply = adapter.request("tenant", "get", body='{"tenant-id":"acme"}')
        assert reply.status == 403
        assert reply.body is None
        # The look-up is done: what is not there is told.
        assert adapter.request("tenant", "get", body='{"tenant-id":"nope"}').status == 404


@ROWS.row(22)
def test_row22_login_ends(new_registry: NewRegistry) -> None:
    """Row 22: `close` amqp:unauthorized-access; reconnecting works."""
    registry = new_registry({"auth.lifetime": "5s"})
    with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
        closed = adapter.wait_for_close()
        assert closed.condition == "amqp:unauthorized-access"
        assert closed.description == "access token expired"
    with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"nope"}').status == 404


# Permissions file


def permissions_registry(new_registry: NewRegistry, tmp_path: Path, document: object, **options: Any) -> Registry:
    file = tmp_path / "permissions.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return new_registry({"auth.permissions_file": str(file)}, **options)


@ROWS.row(23)
def test_row23_unknown_role_is_a_warning(new_registry: NewRegistry, tmp_path: Path) -> None:
    user = {"mechanism": "PLAIN", "password": "x", "authorities": ["hono-component", "nope", "protocol-adapter"]}
    registry = permissions_registry(new_registry, tmp_path, permissions({"odd": user}))
    assert "users.odd.authorities: there is no role nope" in registry.log.read_text()
    with Adapter(registry.amqp_port, "odd", "x") as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"nope"}').status == 404
    # With a permissions file there is no generated identity.
    assert not registry.credentials_file.exists()


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ROWS.case("24", {"roles": {"r": [{"activities": ["READ"]}]}}, "roles.r[0]"),
        pytest.param({"roles": {"r": [{"resource": "x", "activities": ["LOOK"]}]}}, "LOOK", id="4.1-activity"),
        pytest.param("{", "JSON", id="4.1-broken"),
    ],
)
def test_row24_wrong_entry_stops_the_start(
    new_registry: NewRegistry, tmp_path: Path, document: object, named: str
) -> None:
    registry = permissions_registry(new_registry, tmp_path, document, start=False)
    for command in ("serve", "check-config"):
        result = registry.run(command, expect_status=78)
        assert named in result.stdout + result.stderr


def test_reload_on_a_signal(new_registry: NewRegistry, tmp_path: Path) -> None:
    """4.1: atomically; on error the old content stays."""
    registry = permissions_registry(new_registry, tmp_path, permissions())
    file = tmp_path / "permissions.json"
    added = {"mechanism": "PLAIN", "password": "x", "authorities": ["protocol-adapter"]}

    def may_log_in() -> bool:
        try:
            Adapter(registry.amqp_port, "added", "x").close()
        except AuthenticationFailed:
            return False
        return True

    assert not may_log_in()
    assert registry.process is not None
    file.write_text("{")
    registry.process.send_signal(signal.SIGHUP)
    poll(lambda: "permissions file not reloaded" in registry.log.read_text(), what="the error in the log")
    assert not may_log_in()
    Adapter(registry.amqp_port, "protocol-adapter", "adapter-secret").close()
    file.write_text(json.dumps(permissions({"added": added})))
    registry.process.send_signal(signal.SIGHUP)
    poll(may_log_in, what="the new user")


# Identities of the database


def test_identities_of_the_database_count_at_once(new_registry: NewRegistry) -> None:
    """README of the specification, "who may use AMQP"; issue: `kamado identity` works beside a running server."""
    registry = new_registry()
    Adapter(registry.amqp_port, registry.username, registry.password).close()
    password_file = registry.directory / "password"
    password_file.write_text("my-secret\n")
    registry.run("identity", "add", "mine", "--password-file", str(password_file))
    with Adapter(registry.amqp_port, "mine", "my-secret") as adapter:
        assert adapter.request("tenant", "get", body='{"tenant-id":"nope"}').status == 404
    registry.run("identity", "remove", "mine")
    with pytest.raises(AuthenticationFailed):
        Adapter(registry.amqp_port, "mine", "my-secret")


def test_passwords_are_not_in_the_log(acme: Acme, new_registry: NewRegistry) -> None:
    """4.2: never log passwords or SASL responses."""
    registry = new_registry({"log.level": "debug"})
    Adapter(registry.amqp_port, registry.username, registry.password).close()
    with pytest.raises(AuthenticationFailed):
        Adapter(registry.amqp_port, registry.username, "open-sesame")
    text = registry.log.read_text()
    assert "login refused" in text
    assert "open-sesame" not in text
    assert registry.password not in text
