"""The real `kamado serve` in a process of its own, on ports that the system chooses.

    with Registry(tmp_path, {"credentials.bcrypt_cost": "4"}) as registry:
        assert registry.request("POST", "/v1/tenants/example").status == 201

The fixtures `registry` (shared; use tenant ids of your own, `new_id()`) and `new_registry` (a factory) are in
`conftest.py`.
"""

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tests.databases import query
from tests.integration.certificates import TlsFiles, tls_files

__all__ = ["PATIENCE", "Registry", "Response", "kamado", "new_id", "poll", "send_request"]

T = TypeVar("T")
JsonObject = dict[str, object]

START_DEADLINE = 120.0
"""Seconds; generous, since the machine may be busy with other tests."""
STOP_DEADLINE = 60.0
COMMAND_DEADLINE = 120.0
PATIENCE = {"storage.acquire_timeout": "20s", "storage.statement_timeout": "20s"}
"""With PostgreSQL; what is so slow that it is refused is the business of a few tests, which set both."""


def new_id(prefix: str = "t") -> str:
    """Return an identifier that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def poll(check: Callable[[], T | None], *, timeout: float = 60.0, what: str = "the expected state") -> T:
    """Call `check` until it returns something true, and return that.

    Args:
        check: What to ask.
        timeout: Seconds until the test fails.
        what: Named in the failure.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what} did not come about within {timeout} s"
        time.sleep(0.01)


@dataclass(frozen=True)
class Response:
    """An HTTP response, read to its end."""

    status: int
    headers: Message
    """Names are matched without regard to case; `get_all` for repeated ones."""
    body: bytes

    def json(self) -> object:
        return json.loads(self.body)

    @property
    def object(self) -> JsonObject:
        """The body as a JSON object."""
        value = self.json()
        assert isinstance(value, dict), value
        return value

    @property
    def array(self) -> list[JsonObject]:
        """The body as a JSON array of objects."""
        value = self.json()
        assert isinstance(value, list), value
        return value

    @property
    def etag(self) -> str:
        value = self.headers["ETag"]
        assert isinstance(value, str)
        return value


def send_request(
    url: str,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    *,
    context: ssl.SSLContext | None = None,
    timeout: float = 60.0,
) -> Response:
    """Send one HTTP request on a connection of its own; the path goes out exactly as given.

    Args:
        url: Scheme, host and port.
        method: HTTP method.
        path: Path and query.
        body: `bytes` and `str` are sent as they are, anything else but `None` as JSON.
        headers: Added to, or in place of, `Content-Type: application/json` (which is sent if there is a body).
        context: For https.
        timeout: Seconds for each step.
    """
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port
    assert host is not None
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    data: bytes | None
    if body is None or isinstance(body, bytes):
        data = body
    elif isinstance(body, str):
        data = body.encode()
    else:
        data = json.dumps(body).encode()
    sent = {} if data is None else {"Content-Type": "application/json"}
    for name, value in (headers or {}).items():
        sent = {key: old for key, old in sent.items() if key.lower() != name.lower()} | {name: value}
    try:
        connection.request(method, path, body=data, headers=sent)
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read())
    finally:
        connection.close()


def kamado(
    *arguments: str,
    expect_status: int | None = 0,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a `kamado` command on nothing but its arguments; `KAMADO_*` of the test's own environment is removed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("KAMADO_")}
    result = subprocess.run(
        [sys.executable, "-m", "kamado", *arguments],
        env=own | (environment or {}),
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE,
        check=False,
    )
    assert expect_status is None or result.returncode == expect_status, (
        f"{arguments} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    return result


class Registry:
    """One `kamado serve` with its own directory and log, and a database of its own if no other is named.

    Args:
        directory: Where its files go; keep it to start another process on the same data.
        settings: Keys and values for `--set`, on top of ports chosen by the system and a cheap bcrypt cost.
        tls: Also listen with TLS for AMQP and HTTP, and accept client certificates for SASL EXTERNAL; the files
            are in `self.tls`.
        arguments: More arguments of `kamado serve`.
        environment: Variables on top of the test's own, from which `KAMADO_*` is removed.
        only_settings: Nothing but `settings` is set: for a configuration file that says where the database is.
        url: The database; a file in its directory if omitted.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, str] | None = None,
        *,
        tls: bool = False,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        only_settings: bool = False,
        url: str | None = None,
    ) -> None:
        self.data_dir = directory / "data"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.database = self.data_dir / "kamado.db"
        self.log = directory / "kamado.log"
        self.config_file = directory / "kamado.toml"
        self.config_file.touch()
        self.tls: TlsFiles | None = None
        self.settings: dict[str, str] = {
            "storage.url": url or f"sqlite:///{self.database}",
            "http.insecure.port": "0",
            "amqp.insecure.port": "0",
            "health.port": "0",
            "credentials.bcrypt_cost": "4",
            "shutdown.drain_delay": "0s",
            # Clients may be left alone for long while a test waits for something else on a busy machine.
            "amqp.idle_timeout": "10m",
            "http.idle_timeout": "10m",
        }
        if tls:
            files = self.tls = tls_files(directory / "tls")
            for listener in ("http", "amqp"):
                self.settings |= {
                    f"{listener}.insecure.enabled": "true",
                    f"{listener}.secure.port": "0",
                    f"{listener}.tls.cert_file": str(files.cert_file),
                    f"{listener}.tls.key_file": str(files.key_file),
                }
            self.settings["amqp.tls.client_ca_file"] = str(files.client_ca_file)
        if url is not None and not url.startswith("sqlite:"):
            self.settings |= {"auth.first_login_dir": str(self.data_dir)} | PATIENCE
        self.settings = dict(settings or {}) if only_settings else self.settings | dict(settings or {})
        self.arguments = list(arguments)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("KAMADO_")}
        self.environment |= dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.addresses: dict[str, str] = {}
        self.allowed_tracebacks = False
        """Set by a test that provokes an internal error on purpose."""

    # Life

    @property
    def command(self) -> list[str]:
        """The command line of the server."""
        command = [sys.executable, "-m", "kamado", "serve", "--config", str(self.config_file)]
        for key, value in self.settings.items():
            command += ["--set", f"{key}={value}"]
        return command + self.arguments

    def start(self) -> "Registry":
        """Start the process and wait until it is ready."""
        assert self.process is None
        ready_file = self.directory / "ready.json"
        ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--ready-file", str(ready_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.directory,
            )
        deadline = time.monotonic() + START_DEADLINE
        while not ready_file.exists():
            status = self.process.poll()
            assert status is None, f"kamado serve ended with {status}:\n{self.log.read_text(errors='replace')}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"kamado serve was not ready in time:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.01)
        self.addresses = json.loads(ready_file.read_text())
        return self

    def stop(self, *, expect_status: int | None = 0) -> None:
        """Send SIGTERM, wait, and check that nothing went wrong inside while it ran."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(
                f"kamado serve did not stop in time:\n{self.log.read_text(errors='replace')}"
            ) from None
        text = self.log.read_text(errors="replace")
        assert expect_status is None or status == expect_status, f"kamado serve ended with {status}:\n{text}"
        assert self.allowed_tracebacks or "Traceback" not in text, f"an error was logged:\n{text}"

    def kill(self) -> None:
        """End the process as a power cut would: SIGKILL."""
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.wait()

    def restart(self) -> None:
        """Stop and start again; the ports are new ones."""
        self.stop()
        self.start()

    def __enter__(self) -> "Registry":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    # Where it is

    def _port(self, name: str) -> int:
        port = urlsplit(self.addresses[name]).port
        assert port is not None
        return port

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def http_url(self) -> str:
        return self.addresses["http"]

    @property
    def http_port(self) -> int:
        return self._port("http")

    @property
    def https_url(self) -> str:
        return self.addresses["https"]

    @property
    def amqp_port(self) -> int:
        return self._port("amqp")

    @property
    def amqps_port(self) -> int:
        return self._port("amqps")

    @property
    def health_url(self) -> str:
        return self.addresses["health"]

    # Logging in

    @property
    def credentials_file(self) -> Path:
        """The first identity's file, written by the first start."""
        return self.data_dir / "adapter.credentials"

    def _credentials(self) -> dict[str, str]:
        lines = self.credentials_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    @property
    def username(self) -> str:
        return self._credentials()["username"]

    @property
    def password(self) -> str:
        return self._credentials()["password"]

    # Asking

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a request to the management API; see `send_request`."""
        return send_request(self.http_url, method, path, body, headers)

    def health(self, path: str) -> Response:
        """Send a GET request to the health listener."""
        return send_request(self.health_url, "GET", path)

    def run(
        self, *arguments: str, stdin: str = "", expect_status: int | None = 0, timeout: float = COMMAND_DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        """Run another `kamado` command on the same configuration.

        Args:
            arguments: The command and its arguments; `--config` and `--set` are added.
            stdin: Its standard input.
            expect_status: Exit status that the test expects; `None` for any.
            timeout: Seconds.
        """
        command = [sys.executable, "-m", "kamado", *arguments, "--config", str(self.config_file)]
        for key, value in self.settings.items():
            command += ["--set", f"{key}={value}"]
        result = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=self.environment, timeout=timeout, check=False
        )
        assert expect_status is None or result.returncode == expect_status, (
            f"{arguments} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
        return result

    def query(self, sql: str) -> Sequence[tuple[Any, ...]]:
        """Run a statement on the database itself; return the rows."""
        return query(self.settings["storage.url"], sql)

    # Shorthands of the management API

    def create_tenant(self, tenant_id: str | None = None, document: object = None) -> str:
        """Create a tenant and return its id."""
        tenant_id = tenant_id or new_id()
        response = self.request("POST", f"/v1/tenants/{tenant_id}", document)
        assert response.status == 201, response.body
        return tenant_id

    def create_device(self, tenant_id: str, device_id: str | None = None, document: object = None) -> str:
        """Create a device and return its id."""
        device_id = device_id or new_id("d")
        response = self.request("POST", f"/v1/devices/{tenant_id}/{device_id}", document)
        assert response.status == 201, response.body
        return device_id

    def set_credentials(self, tenant_id: str, device_id: str, credentials: object) -> None:
        """Replace the credentials of a device."""
        response = self.request("PUT", f"/v1/credentials/{tenant_id}/{device_id}", credentials)
        assert response.status == 204, response.body
