"""`kamado serve`: first start, reload, stop, and starts that fail."""

import contextlib
import json
import os
import resource
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.databases import Databases, query
from tests.integration.certificates import Authority
from tests.integration.conftest import NewRegistry
from tests.integration.registry import kamado, new_id, poll

OK, UNAVAILABLE, LOGIN_REFUSED, CONFIGURATION = 0, 69, 77, 78


def test_first_start_makes_one_identity(new_registry: NewRegistry, databases: Databases, tmp_path: Path) -> None:
    """Settled, "Who may use AMQP": mode 0600, two lines, only if there is none."""
    url = databases.create(tmp_path / "data", is_empty=True)
    registry = new_registry({"storage.url": url}, directory=tmp_path)
    lines = registry.credentials_file.read_text().splitlines()
    assert [line.partition("=")[0] for line in lines] == ["username", "password"]
    assert stat.S_IMODE(registry.credentials_file.stat().st_mode) == 0o600
    assert str(registry.credentials_file) in registry.log.read_text()
    assert registry.password not in registry.log.read_text()
    before = registry.credentials_file.read_text()
    registry.restart()
    assert registry.credentials_file.read_text() == before


def test_permissions_file_takes_the_place_of_the_first_identity_and_is_read_again(
    new_registry: NewRegistry, tmp_path: Path
) -> None:
    """Authentication 4.1: reload on a signal; on error the old one stays."""
    file = tmp_path / "permissions.json"
    grants = [
        {"resource": "tenant", "activities": ["READ", "WRITE"]},
        {"operation": "tenant/*:*", "activities": ["EXECUTE"]},
    ]

    def write(password: str) -> None:
        user = {"mechanism": "PLAIN", "password": password, "authorities": ["r"]}
        file.write_text(json.dumps({"roles": {"r": grants}, "users": {"u": user}}))

    write("one")
    registry = new_registry({"auth.permissions_file": str(file)})
    assert not registry.credentials_file.exists()
    tenant_id = registry.create_tenant()

    def login(password: str) -> int:
        variables = {"KAMADO_ASK_PASSWORD": password, "KAMADO_CONFIG": str(registry.config_file)}
        url = registry.addresses["amqp"]
        arguments = ("ask", "tenant", tenant_id, "--url", url, "--username", "u")
        return kamado(*arguments, expect_status=None, environment=variables).returncode

    def reload(message: str) -> None:
        before = registry.log.read_text().count(message)
        os.kill(registry.pid, signal.SIGHUP)
        poll(lambda: registry.log.read_text().count(message) > before, what=message)

    assert login("one") == OK
    write("two")
    reload("permissions file reloaded")
    assert login("one") == LOGIN_REFUSED
    assert login("two") == OK
    file.write_text("{")
    reload("permissions file not reloaded")
    assert login("two") == OK


def test_key_material_is_read_again(new_registry: NewRegistry) -> None:
    registry = new_registry(tls=True)
    assert registry.tls is not None
    arguments = ("ask", "tenant", registry.create_tenant(), "--url", registry.addresses["amqps"])
    registry.run(*arguments, "--ca-file", str(registry.tls.ca_file))
    authority = Authority.create("CN=Next CA")
    ca_file, _ = authority.write(registry.directory, "next-ca")
    authority.issue("CN=localhost", server=True).write(registry.tls.cert_file.parent, "server")
    os.kill(registry.pid, signal.SIGHUP)
    poll(lambda: registry.log.read_text().count("key material reloaded") == 2, what="reload")
    registry.run(*arguments, "--ca-file", str(ca_file))
    registry.run(*arguments, "--ca-file", str(registry.tls.ca_file), expect_status=UNAVAILABLE)
    key = registry.tls.key_file.read_bytes()
    registry.tls.key_file.write_text("nothing")
    os.kill(registry.pid, signal.SIGHUP)
    poll(lambda: registry.log.read_text().count("key material not reloaded") == 2, what="failed reload")
    assert f"{registry.tls.key_file} holds no PEM private key" in registry.log.read_text()
    registry.tls.key_file.write_bytes(key)
    registry.run(*arguments, "--ca-file", str(ca_file))


@pytest.mark.parametrize("listener", ["amqps", "https"])
def test_a_refused_handshake_is_in_the_log(new_registry: NewRegistry, tmp_path: Path, listener: str) -> None:
    """Also after a reload, when another context than the listener's own takes the handshake."""
    # Equal warnings are held back for a while, so each is looked for in a log of its own.
    registry = new_registry(tls=True)
    assert registry.tls is not None
    os.kill(registry.pid, signal.SIGHUP)
    poll(lambda: registry.log.read_text().count("key material reloaded") == 2, what="reload")
    context = ssl.create_default_context(cafile=str(registry.tls.ca_file))
    if listener == "amqps":
        context.load_cert_chain(*Authority.create("CN=Stranger").issue("CN=coap-adapter").write(tmp_path, "stranger"))
        url, reason = registry.addresses["amqps"], "certificate verify failed: unable to get local issuer certificate"
    else:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-SHA256")
        url, reason = registry.https_url, "no shared cipher"
    with (
        socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=10) as plain,
        contextlib.suppress(ssl.SSLError, ConnectionError),
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        # TLS 1.3 has the client believe that all is well until it reads.
        assert connection.recv(1) == b""
    poll(lambda: "TLS handshake refused" in registry.log.read_text(), what="the reason in the log")
    (event,) = [json.loads(line) for line in registry.log.read_text().splitlines() if "TLS handshake" in line]
    assert (event["level"], event["listener"], event["reason"]) == ("warn", listener, reason)


@pytest.mark.sqlite_only("a path with a space")
@pytest.mark.parametrize("where", ["--set", "environment"])
def test_what_to_type_next_works_with_a_port_that_the_system_chose(new_registry: NewRegistry, where: str) -> None:
    settings = {"log.format": "text", "storage.url": "sqlite:///a b.db"}
    environment = {}
    if where == "environment":
        environment["KAMADO_AMQP__INSECURE__PORT"] = "0"
    registry = new_registry(settings, environment=environment, start=False)
    if where == "environment":
        del registry.settings["amqp.insecure.port"]
    registry.start()
    registry.create_tenant("my-tenant")
    (line,) = [line for line in registry.log.read_text().splitlines() if " ask tenant " in line]
    assert "port=0" not in line
    assert line.count("amqp.insecure.port=") == 1
    words = shlex.split(line)
    arguments = words[words.index("ask") :]
    assert kamado(*arguments, cwd=registry.directory).stdout.startswith("200 OK")


def test_what_to_type_next_does_not_tell_the_password_of_the_database(new_registry: NewRegistry) -> None:
    """Configuration 1.3, `storage.url`: the secret part is redacted."""
    registry = new_registry({"log.format": "text"})
    poll(lambda: "Ctrl-C stops it." in registry.log.read_text(), what="the start-up lines")
    assert " ask tenant " in registry.log.read_text()
    password = urlsplit(registry.settings["storage.url"]).password
    assert password is None or password not in registry.log.read_text()


def test_open_files_are_raised_to_what_the_system_allows(new_registry: NewRegistry) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    registry = new_registry({"amqp.max_connections": "10"}, start=False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        registry.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(registry.pid, resource.RLIMIT_NOFILE) in {(hard, hard), (1110, hard)}
    assert "open files" not in registry.log.read_text()


def test_too_few_open_files_are_a_warning(new_registry: NewRegistry) -> None:
    registry = new_registry({"amqp.max_connections": "2000000000"})
    (event,) = [json.loads(line) for line in registry.log.read_text().splitlines() if "too few open files" in line]
    assert (event["level"], event["needed"]) == ("warn", 2_000_001_100)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_in_order(new_registry: NewRegistry, number: int) -> None:
    """Configuration 3.3: exit 0; the database is folded up."""
    registry = new_registry()
    registry.create_tenant()
    process = registry.process
    assert process is not None
    process.send_signal(number)
    assert process.wait(60) == 0
    registry.process = None
    assert "Traceback" not in registry.log.read_text()
    assert not registry.database.with_name("kamado.db-wal").exists()


def test_not_ready_while_draining(new_registry: NewRegistry) -> None:
    """Configuration 3.3, steps 1 and 2; a second signal ends it at once with 1."""
    registry = new_registry({"shutdown.drain_delay": "1h"})
    assert registry.health("/readiness").status == 200
    assert registry.health("/liveness").status in {200, 204}
    process = registry.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    poll(lambda: registry.health("/readiness").status == 503, what="not ready")
    assert registry.health("/liveness").status in {200, 204}
    registry.create_tenant()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    registry.process = None


def test_ctrl_c_does_not_wait_for_load_balancers(new_registry: NewRegistry) -> None:
    registry = new_registry({"shutdown.drain_delay": "1h"})
    process = registry.process
    assert process is not None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    registry.process = None


def test_port_that_is_taken(new_registry: NewRegistry) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key in ("http.insecure.port", "amqp.insecure.port", "health.port"):
            registry = new_registry({key: str(port)}, start=False)
            result = subprocess.run(
                registry.command, env=registry.environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert result.returncode == UNAVAILABLE
            assert str(port) in result.stdout
            assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("where", "words"), [("no/ready.json", "No such file or directory"), ("data", "Is a directory")]
)
def test_ready_file_that_cannot_be_written_is_told_before_anything_is_started(
    new_registry: NewRegistry, where: str, words: str
) -> None:
    registry = new_registry(start=False)
    file = registry.directory / where
    result = subprocess.run(
        [*registry.command, "--ready-file", str(file)],
        env=registry.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == CONFIGURATION
    (line,) = (result.stdout + result.stderr).splitlines()
    assert f"--ready-file: {file} cannot be written: {words}" in line
    assert not registry.database.exists()


def test_data_of_the_first_start(new_registry: NewRegistry, tmp_path: Path) -> None:
    tenant_id = new_id()
    (tmp_path / "t.json").write_text(json.dumps([{"tenant-id": tenant_id}]))
    registry = new_registry({"startup.load": str(tmp_path / "t.json")})
    assert registry.request("DELETE", f"/v1/tenants/{tenant_id}").status == 204
    other = registry.create_tenant()
    registry.restart()
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 404
    assert registry.request("GET", f"/v1/tenants/{other}").status == 200


def test_data_without_a_tenant_is_loaded_once(new_registry: NewRegistry, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[]")
    registry = new_registry({"startup.load": str(tmp_path / "t.json")})
    assert registry.log.read_text().count("data loaded") == 1


def test_wrong_data_stops_the_first_start(new_registry: NewRegistry, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"tenant-id": "a b"}]')
    registry = new_registry({"startup.load": str(tmp_path / "t.json")}, start=False)
    result = subprocess.run(
        registry.command, env=registry.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == CONFIGURATION
    assert "t.json" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_database_of_another_program_is_refused(databases: Databases, tmp_path: Path) -> None:
    url = databases.create(tmp_path, is_empty=True)
    query(url, "CREATE TABLE a (b INTEGER)")
    result = kamado("serve", "--set", f"storage.url={url}", "--set", "health.port=0", expect_status=UNAVAILABLE)
    assert "another program" in result.stdout
    query(url, "CREATE TABLE tenants (b INTEGER)")
    databases.drop(url)


@pytest.mark.sqlite_only("nothing of it concerns the database")
@pytest.mark.parametrize(("workers", "start"), [("1", 1.5), ("2", 3.0)])
def test_ready_file_comes_when_all_has_been_said(new_registry: NewRegistry, workers: str, start: float) -> None:
    """Whoever waited for it reads the start-up lines: none of them is still to come."""
    registry = new_registry({"serve.workers": workers, "log.format": "text", "log.level": "error"}, start=False)
    ready_file = registry.directory / "ready.json"
    read_end, write_end = os.pipe()
    filled = fill(write_end)
    process = subprocess.Popen(
        [*registry.command, "--ready-file", str(ready_file)], stdout=write_end, env=registry.environment
    )
    os.close(write_end)
    with open(read_end, "rb") as output:
        try:
            poll(registry.credentials_file.exists)
            # Seconds until all listens, on an idle machine; then the process waits for a reader of its start-up lines.
            time.sleep(start)
            assert not ready_file.exists()
            assert output.read(filled).strip() == b""
            poll(ready_file.exists)
        finally:
            process.terminate()
            text = output.read().decode()
            process.wait(60)
    assert "is ready" in text.splitlines()[0]
    assert "Ctrl-C stops it." in text


def fill(pipe: int) -> int:
    """Fill a pipe with blanks, so that whoever writes next has to wait; returns how many there are."""
    os.set_blocking(pipe, False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(pipe, b" " * 4096)
    os.set_blocking(pipe, True)
    return filled
