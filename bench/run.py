"""Measure the real server over sockets; the figures belong into docs/performance.md.

`kamado serve` runs in a process of its own, on SQLite or (`--url`) on a PostgreSQL of this machine, with everything
durable. The load comes from two small clients in C (`amqp_load.c`, `http_load.c`), since one in Python would be what is
measured. The devices are registered through the HTTP API like any operator's, which is one of the measurements.

    make bench                                  everything
    make bench BENCH="--only assert --seconds 3"
    make bench BENCH="--data /tmp/bench"        keep the filled database, and use it again the next time
"""

import asyncio
import base64
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import asyncpg
import typer
from bench import large
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "build" / "bench"

TENANT = "bench"
TENANT_COUNT = 100
"""Tenants beside the one that holds the devices; each has a trust anchor."""
HTTP_CONNECTIONS = 32
SHAPES = [(1, 1), (1, 10), (1, 100), (50, 10)]
"""Connections, and requests in flight on each."""
QUIET = 0.1
"""Cores that others may use without disturbing."""
DEVICE = json.dumps({"defaults": {"content-type": "application/json"}, "ext": {"serial": "4711"}})
# A ready-made hash: hashing is not what is measured.
BCRYPT = "$2a$10$abcdefghijklmnopqrstuuuK3UBi2GuyTLlnf1JZO4mwdsdVG7At2"

console = Console(stderr=True, highlight=False)


# --- The server ---


class Server:
    """One `kamado serve` on a directory."""

    def __init__(
        self, directory: Path, url: str, *, python: str, profile: Path | None, settings: Sequence[str]
    ) -> None:
        self.directory = directory
        self.database = Postmaster(url) if url.startswith("postgresql:") else None
        ready = directory / "ready.json"
        ready.unlink(missing_ok=True)
        config = directory / "kamado.toml"
        config.touch()
        command = [python]
        if profile is not None:
            command += ["-m", "cProfile", "-o", str(profile)]
        command += ["-m", "kamado", "serve", "--config", str(config), "--ready-file", str(ready)]
        for setting in (
            f"storage.url={url}",
            f"auth.first_login_dir={directory}",
            *("http.insecure.port=0", "amqp.insecure.port=0", "health.port=0", "shutdown.drain_delay=0s"),
            *settings,
        ):
            command += ["--set", setting]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KAMADO_")}
        with (directory / "kamado.log").open("ab") as log:
            started = time.perf_counter()
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=directory)
        while not ready.exists():
            if self.process.poll() is not None or time.perf_counter() - started > 60:
                sys.exit(f"kamado serve did not start:\n{(directory / 'kamado.log').read_text()[-2000:]}")
            time.sleep(0.002)
        self.seconds_to_ready = time.perf_counter() - started
        addresses: dict[str, str] = json.loads(ready.read_text())
        self.http_port = urlsplit(addresses["http"]).port or 0
        self.amqp_port = urlsplit(addresses["amqp"]).port or 0
        login = dict(
            line.split("=", 1) for line in (directory / "adapter.credentials").read_text().splitlines() if "=" in line
        )
        self.username, self.password = login["username"], login["password"]

    def processor_seconds(self) -> float:
        """Processor time used so far, of all threads, by the system's accounting."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def database_seconds(self) -> float:
        """The same of the database's processes; 0 if there are none."""
        return 0.0 if self.database is None else self.database.processor_seconds()

    def memory_mib(self, name: str) -> float:
        """VmRSS (resident now) or VmHWM (the most so far)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
        raise KeyError(name)

    def written_bytes(self) -> int:
        """Bytes that the process made the system write to disks, now or later; what is changed twice counts once."""
        fields = dict(line.split(": ") for line in Path(f"/proc/{self.process.pid}/io").read_text().splitlines())
        return int(fields["write_bytes"]) - int(fields["cancelled_write_bytes"])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Postmaster:
    """The processes of a PostgreSQL server on this machine."""

    def __init__(self, url: str) -> None:
        async def connect() -> "asyncpg.Connection[asyncpg.Record]":
            return await asyncpg.connect(url)

        with asyncio.Runner() as runner:
            connection = runner.run(connect())
            backend = Path(f"/proc/{connection.get_server_pid()}/stat")
            self._pid = int(backend.read_text().rpartition(")")[2].split()[1])
            runner.run(connection.close())

    def processor_seconds(self) -> float:
        """Processor time of all processes, also of those that have ended."""
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(path.parent.name) == self._pid:
                    total += sum(map(int, fields[11:15]))
                elif int(fields[1]) == self._pid:
                    total += sum(map(int, fields[11:13]))
        return total / os.sysconf("SC_CLK_TCK")


# --- Results ---


@dataclass
class Result:
    """One line of the table."""

    name: str
    shape: str
    per_second: float
    p50_ms: float
    p99_ms: float
    server_us: float
    database_us: float
    client_us: float
    requests: int
    statuses: dict[str, int]
    fairness: float
    """Requests of the slowest connection, as a share of those of the fastest."""
    others: float
    """Cores that other processes used meanwhile; with more than a few hundredths the rates say little."""
    goal: str = ""
    met: bool | None = None


@dataclass
class Report:
    """Everything that was measured."""

    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    command: str = field(default_factory=lambda: " ".join(["bench/run.py", *sys.argv[1:]]))
    machine: str = ""
    database: str = "SQLite"
    devices: int = 0
    results: list[Result] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def busy_seconds() -> float:
    """Processor time that the whole machine has used so far."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def other_load(seconds: float = 0.3) -> float:
    """Cores that are in use while nothing is measured."""
    before = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - before) / seconds


def await_quiet(patience: float) -> None:
    """Wait until nobody else uses the machine, but not for ever."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and other_load() > QUIET:
        pass


def measure(server: Server, name: str, shape: str, command: Sequence[str], expect: str) -> Result:
    """Run a load client and read the server's processor time around what it counts."""
    console.print(f"  {name} ({shape}) ...", style="dim")
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    if client.stdout.readline().strip() != "start":
        sys.exit(f"{command[0]} failed; the server's log: {server.directory / 'kamado.log'}")
    before, database, busy = server.processor_seconds(), server.database_seconds(), busy_seconds()
    line = client.stdout.readline()
    used, busy = server.processor_seconds() - before, busy_seconds() - busy
    database = server.database_seconds() - database
    if client.wait() or not line:
        sys.exit(f"{command[0]} failed; the server's log: {server.directory / 'kamado.log'}")
    counted = json.loads(line)
    requests: int = counted["requests"]
    others = (busy - used - database - counted["client_cpu_seconds"]) / counted["seconds"]
    if set(counted["statuses"]) != {expect}:
        console.print(f"  unexpected statuses: {counted['statuses']}", style="bold red")
    return Result(
        name=name,
        shape=shape,
        per_second=requests / counted["seconds"],
        p50_ms=counted["p50_us"] / 1000,
        p99_ms=counted["p99_us"] / 1000,
        server_us=used / requests * 1e6,
        database_us=database / requests * 1e6,
        client_us=counted["client_cpu_seconds"] / requests * 1e6,
        requests=requests,
        statuses=counted["statuses"],
        fairness=counted["least_per_connection"] / max(1, counted["most_per_connection"]),
        others=max(0.0, others),
    )


class Bench:
    """The measurements, on one server."""

    def __init__(
        self,
        server: Server,
        directory: Path,
        storage: str,
        devices: int,
        seconds: float,
        patience: float,
        report: Report,
        large: int = 0,
    ) -> None:
        self.large = large
        self.server = server
        self.directory = directory
        self.storage = storage
        self.devices = devices
        self.seconds = seconds
        self.patience = patience
        self.report = report

    def add(self, result: Result, *, goal: str = "", met: bool | None = None) -> None:
        result.goal, result.met = goal, met
        self.report.results.append(result)

    def file(self, name: str, lines: Iterator[str] | Sequence[str]) -> str:
        path = self.directory / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def http(self, name: str, lines: Sequence[str], expect: str, connections: int = HTTP_CONNECTIONS) -> Result:
        """Send each request once."""
        path = self.file("http.lines", lines)
        command = [
            str(CLIENTS / "http_load"),
            "127.0.0.1",
            str(self.server.http_port),
            path,
            str(connections),
            "0",
            "0",
        ]
        await_quiet(self.patience)
        return measure(self.server, name, f"{connections} connections", command, expect)

    def amqp(
        self,
        name: str,
        target: str,
        kind: str,
        lines: Sequence[str],
        shape: tuple[int, int],
        expect: str = "200",
        *,
        once: bool = False,
        offered: int | None = None,
    ) -> Result:
        path = self.file("amqp.lines", lines)
        connections, in_flight = shape
        server = self.server
        command = [
            *(str(CLIENTS / "amqp_load"), "127.0.0.1", str(server.amqp_port), server.username, server.password),
            *(target, kind, path, str(connections), str(in_flight)),
            *(("0", "0") if once else ("0.5", str(self.seconds))),
            *(() if offered is None else (str(offered),)),
        ]
        shape_text = f"{connections} × {in_flight} in flight" if offered is None else f"{offered:,}/s offered"
        deadline = time.monotonic() + self.patience
        await_quiet(self.patience)
        result = measure(server, name, shape_text, command, expect)
        while not once and result.others > QUIET and time.monotonic() < deadline:
            await_quiet(deadline - time.monotonic())
            again = measure(server, name, shape_text, command, expect)
            result = min(result, again, key=lambda one: one.others)
        return result

    # Filling

    def device_ids(self) -> list[str]:
        return [f"device-{number:06}" for number in range(self.devices)]

    def fill(self) -> None:
        """Register tenants, devices and credentials through the HTTP API; a measurement in itself."""
        tenants = [f"POST /v1/tenants/{TENANT}\t{{}}"]
        for number in range(TENANT_COUNT):
            anchor = {
                "cert": base64.b64encode(authority(f"CA {number}").der).decode(),
                "auto-provisioning-enabled": True,
            }
            tenant = {
                "adapters": [{"type": "hono-mqtt", "enabled": True}, {"type": "hono-http", "enabled": True}],
                "defaults": {"ttl": 3600},
                "trusted-ca": [anchor],
            }
            tenants.append(f"POST /v1/tenants/tenant-{number:03}\t{json.dumps(tenant)}")
        self.http("create tenants", tenants, "201", 1)
        created = self.http(
            "HTTP: create device", [f"POST /v1/devices/{TENANT}/{id_}\t{DEVICE}" for id_ in self.device_ids()], "201"
        )
        self.add(created, goal="≥ 4,000/s", met=created.per_second >= 4000)
        lines = []
        for id_ in self.device_ids():
            secret = {"hash-function": "bcrypt", "pwd-hash": BCRYPT}
            credentials = [{"type": "hashed-password", "auth-id": f"sensor-{id_}", "secrets": [secret]}]
            lines.append(f"PUT /v1/credentials/{TENANT}/{id_}\t{json.dumps(credentials)}")
        self.add(self.http("HTTP: set credentials, ready hash", lines, "204"))

    # Measurements

    def look_ups(
        self, name: str, target: str, kind: str, lines: Sequence[str], *, rate_goal: int | None = 60_000
    ) -> None:
        for shape in SHAPES:
            result = self.amqp(name, target, kind, lines, shape)
            if rate_goal is None:
                self.add(result)
            elif shape == (1, 1):
                self.add(result, goal="≥ 8,000/s", met=result.per_second >= 8000)
            elif shape == (1, 100):
                met = result.per_second >= rate_goal and result.server_us <= 15 and result.p99_ms < 4
                self.add(result, goal="≥ 60,000/s, ≤ 15 µs, p99 < 4 ms", met=met)
            elif shape == (50, 10):
                met = result.per_second >= rate_goal and result.fairness > 0.5
                self.add(result, goal="≥ 60,000/s, none starved", met=met)
            else:
                self.add(result)

    def shuffled(self, lines: list[str]) -> list[str]:
        random.Random(1).shuffle(lines)
        return lines

    def tenant(self) -> None:
        lines = [json.dumps({"tenant-id": f"tenant-{number:03}"}) for number in range(TENANT_COUNT)]
        self.look_ups("tenant get, by id", "tenant", "body", lines)

    def tenant_dn(self) -> None:
        lines = [json.dumps({"subject-dn": f"CN=CA {number},O=Bench"}) for number in range(TENANT_COUNT)]
        self.look_ups("tenant get, by subject DN", "tenant", "body", lines)

    def assertion(self) -> None:
        self.look_ups("assert", f"registration/{TENANT}", "device", self.shuffled(self.device_ids()))

    def credentials(self) -> None:
        lines = [json.dumps({"type": "hashed-password", "auth-id": f"sensor-{id_}"}) for id_ in self.device_ids()]
        self.look_ups("credentials get", f"credentials/{TENANT}", "body", self.shuffled(lines))

    def offered(self) -> None:
        """Look-ups as they come from a fleet: so many a second, whether or not the last one was answered."""
        lines = self.shuffled(self.device_ids())
        for rate in (100, 1000, 5000):
            result = self.amqp("assert", f"registration/{TENANT}", "device", lines, (10, 1000), offered=rate)
            goal = rate == 1000
            self.add(result, goal="p99 < 10 ms" if goal else "", met=result.p99_ms < 10 if goal else None)

    def unknown(self) -> None:
        """Look-ups that find nothing, as an attacker or a misconfigured fleet sends them."""
        lines = [json.dumps({"type": "hashed-password", "auth-id": f"nobody-{number}"}) for number in range(10_000)]
        self.add(self.amqp("credentials get, unknown", f"credentials/{TENANT}", "body", lines, (1, 100), "404"))

    def create(self, count: int = 20_000) -> None:
        """Devices created beside all that are there: in a tenant of their own, and in the full one."""
        tenant = f"more-{int(time.time())}"
        self.http("create tenant", [f"POST /v1/tenants/{tenant}\t{{}}"], "201", 1)
        for name, target in (("new tenant", tenant), ("full tenant", TENANT)):
            lines = [f"POST /v1/devices/{target}/{tenant}-{number:06}\t{DEVICE}" for number in range(count)]
            result = self.http(f"HTTP: create device, {name}", lines, "201")
            self.add(result, goal="≥ 4,000/s", met=result.per_second >= 4000)
        lines = [f"GET /v1/devices/{tenant}/{tenant}-{number:06}\t" for number in range(count)]
        self.add(self.http("HTTP: read device", lines, "200"))

    def provisioning(self, count: int = 5000) -> None:
        """First contacts with certificates made beforehand, keys EC P-256; each is durable before it is answered."""
        tenant = f"fleet-{int(time.time())}"
        ca = authority(f"Fleet CA {tenant}")
        document = {"trusted-ca": [{"cert": base64.b64encode(ca.der).decode(), "auto-provisioning-enabled": True}]}
        self.http("create tenant", [f"POST /v1/tenants/{tenant}\t{json.dumps(document)}"], "201", 1)
        console.print(f"  making {count} device certificates ...", style="dim")
        lines = []
        for number in range(count):
            name = f"CN=meter-{number:06},OU=Plant 7,O=Bench"
            certificate = base64.b64encode(ca.issue(f"meter-{number:06}")).decode()
            lines.append(json.dumps({"type": "x509-cert", "auth-id": name, "client-certificate": certificate}))
        target = f"credentials/{tenant}"
        result = self.amqp("first contact by certificate", target, "body", lines, (1, 100), "201", once=True)
        self.add(result, goal="≥ 1,500/s", met=result.per_second >= 1500)
        again = self.amqp("the same, known by then", target, "body", lines, (1, 100), "200", once=True)
        self.add(again)

    def connections(self) -> None:
        """What adapters of Hono 1.2 keep here: gateways told for the first time, again, and changing each time."""
        target, devices = f"device_con/{TENANT}", self.shuffled(self.device_ids())
        gateways = [f"gateway-{number:03}" for number in range(100)]

        def via(shift: int) -> list[str]:
            return [f"{id_}\t{gateways[(index + shift) % 100]}" for index, id_ in enumerate(devices)]

        def update(name: str, lines: list[str], *, once: bool = False, goal: bool = True) -> None:
            before = self.server.written_bytes()
            result = self.amqp(name, target, "set-last-gw", lines, (1, 100), "204", once=once)
            written = (self.server.written_bytes() - before) / result.requests
            self.report.figures[f"bytes written to disk for each request, {name}"] = written
            self.add(result, goal="≥ 10,000/s" if goal else "", met=result.per_second >= 10_000 if goal else None)

        update("set-last-gw, first time", via(0), once=True)
        update("set-last-gw, same gateway", via(0))
        # A device has another gateway each time it comes round.
        update("set-last-gw, another gateway", via(1) + via(2))
        self.add(self.amqp("get-last-gw", target, "get-last-gw", devices, (1, 100)))
        instances = [f"{gateway}\tadapter-{gateway}" for gateway in gateways]
        self.amqp("instances", target, "set-cmd-handling-adapter-instance", instances, (1, 1), "204", once=True)
        lines = [
            f"{id_}\t{json.dumps({'gateway-ids': [gateways[(index + one) % 100] for one in range(4)]})}"
            for index, id_ in enumerate(devices)
        ]
        subject = "get-cmd-handling-adapter-instances"
        self.add(self.amqp(subject, target, subject, lines, (1, 100)))

    def large_look_ups(self) -> None:
        """Look-ups of a tenant with very many devices (`--large`), all over it."""
        tenant = self.fill_large()
        ids = large.some_device_ids(self.large, 100_000)
        credentials = [json.dumps({"type": "psk", "auth-id": id_}) for id_ in ids]
        for in_flight in (1, 100):
            name = f"{self.large:,} devices"
            self.add(self.amqp(f"assert, {name}", f"registration/{tenant}", "device", ids, (1, in_flight)))
            self.add(self.amqp(f"credentials, {name}", f"credentials/{tenant}", "body", credentials, (1, in_flight)))

    def fill_large(self) -> str:
        tenant = f"large-{self.large}"
        large.fill(self.storage, tenant, self.large, with_credentials=True, console=console)
        return tenant

    def search(self) -> None:
        """Searches of a tenant with very many devices (`--large`)."""
        tenant = self.fill_large()
        for name, lines, goal in large.searches(tenant, self.large):
            for connections in (1, 8) if goal is not None else (1,):
                result = self.http(f"search: {name}", lines, "200", connections)
                met = None if goal is None or connections > 1 else result.p99_ms < goal
                self.add(result, goal="" if met is None else f"p99 < {goal:g} ms", met=met)

    def delete_all(self, count: int = 100_000) -> None:
        """Delete all devices of a tenant while adapters go on asking about those of another."""
        tenant = f"doomed-{int(time.time())}"
        large.fill(self.storage, tenant, count, with_credentials=True, console=console)
        target, lines = f"registration/{TENANT}", self.shuffled(self.device_ids())
        self.add(self.amqp("assert, before the next", target, "device", lines, (1, 10)))
        with ThreadPoolExecutor(1) as pool:
            deletion = pool.submit(large.delete_all, self.server.http_port, tenant)
            result = self.amqp("assert while 100,000 devices are deleted", target, "device", lines, (1, 10))
            took = deletion.result()
        self.add(result, goal="p99 < 50 ms", met=result.p99_ms < 50)
        self.report.figures[f"seconds to delete all {count:,} devices of a tenant, goal < 20"] = took


# --- Certificates ---


@dataclass
class Authority:
    """A CA that exists for the time of a run."""

    key: ec.EllipticCurvePrivateKey
    name: x509.Name
    der: bytes

    def issue(self, common_name: str) -> bytes:
        """Make a device's certificate, DER; all share one key pair, which nobody looks at."""
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Bench"),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Plant 7"),
                x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            ]
        )
        return certificate(subject, self.name, DEVICE_KEY, self.key)


DEVICE_KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> bytes:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=365))
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.DER)


def authority(common_name: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Bench"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )
    return Authority(key, name, certificate(name, name, key, key))


# --- The command ---

MEASUREMENTS = {
    "tenant": Bench.tenant,
    "tenant-dn": Bench.tenant_dn,
    "assert": Bench.assertion,
    "credentials": Bench.credentials,
    "offered": Bench.offered,
    "unknown": Bench.unknown,
    "provisioning": Bench.provisioning,
    "create": Bench.create,
    "connections": Bench.connections,
    "large": Bench.large_look_ups,
    "search": Bench.search,
    "delete-all": Bench.delete_all,
}


def machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{os.cpu_count()} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}; "
        "server and load client share the cores; SQLite " + sqlite3.sqlite_version
    )


@contextmanager
def working_directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
    else:
        # Beside the project rather than in /tmp, which may be memory: durable is to mean durable.
        path = Path(tempfile.mkdtemp(prefix="bench-", dir=CLIENTS))
        try:
            yield path
        finally:
            shutil.rmtree(path)


def print_report(report: Report) -> None:
    table = Table(title=f"Kamado, {report.devices:,} devices on {report.database}", title_justify="left")
    for column in ("", "load"):
        table.add_column(column)
    for column in ("per second", "p50 ms", "p99 ms", "server µs", "database µs", "client µs", "fairness", "others"):
        table.add_column(column, justify="right")
    table.add_column("goal")
    for result in report.results:
        mark = {None: "", True: " [green]met[/]", False: " [red]missed[/]"}[result.met]
        table.add_row(
            result.name,
            result.shape,
            f"{result.per_second:,.0f}",
            f"{result.p50_ms:.2f}",
            f"{result.p99_ms:.2f}",
            f"{result.server_us:.1f}",
            f"{result.database_us:.1f}",
            f"{result.client_us:.1f}",
            f"{result.fairness:.2f}",
            f"{result.others:.2f}",
            result.goal + mark,
        )
    output = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    output.print(table)
    for name, value in report.figures.items():
        output.print(f"{name}: {value:,.2f}")
    output.print(f"{report.date}; {report.machine}")
    output.print(report.command)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run this measurement alone (repeatable): {', '.join(MEASUREMENTS)}.")
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices to register before measuring.")] = 100_000,
    large: Annotated[int, typer.Option(help="Devices of the tenant that searches are measured with.")] = 1_000_000,
    seconds: Annotated[float, typer.Option(help="Seconds for each look-up measurement, after 0.5 s of warm-up.")] = 4.0,
    data: Annotated[
        Path | None, typer.Option(help="Directory of the database; kept, and not filled again if it holds one.")
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            help="Seconds to wait, at each measurement, until nobody else uses the machine; a look-up measurement that "
            "was disturbed is repeated within that time, and the least disturbed one counts."
        ),
    ] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Run the server under cProfile and write this file; the figures are then slower."),
    ] = None,
    python: Annotated[str, typer.Option(help="Interpreter that runs the server.")] = sys.executable,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Further settings of the server.")] = None,
    url: Annotated[
        str | None, typer.Option(help="A PostgreSQL database of this machine, for nothing else; default: SQLite.")
    ] = None,
) -> None:
    """Measure Kamado: look-ups over AMQP, first contacts, HTTP, start and memory."""
    chosen = only or list(MEASUREMENTS)
    if unknown := set(chosen) - set(MEASUREMENTS):
        raise typer.BadParameter(f"unknown measurement: {', '.join(sorted(unknown))}")
    for client in ("amqp_load", "http_load"):
        if not (CLIENTS / client).exists():
            sys.exit("The load clients are not built; run this through make bench.")
    report = Report(machine=machine(), devices=devices, database="SQLite" if url is None else "PostgreSQL")
    if (busy := other_load()) > QUIET:
        console.print(f"The machine is busy: others use {busy:.1f} cores. Rates will be too low.", style="bold red")
    with working_directory(data) as directory:
        storage = url or f"sqlite:///{directory / 'kamado.db'}"
        filled = directory / f"filled-{devices}"
        if not filled.exists():
            console.print(f"Filling {directory} with {devices:,} devices through the HTTP API ...")
            server = Server(directory, storage, python=python, profile=None, settings=settings or [])
            try:
                report.figures["ready in s, empty database"] = server.seconds_to_ready
                Bench(server, directory, storage, devices, seconds, patience, report).fill()
                report.figures["MiB resident after filling"] = server.memory_mib("VmRSS")
                report.figures["MiB resident at most while filling"] = server.memory_mib("VmHWM")
            finally:
                server.stop()
            filled.touch()
        console.print("Measuring ...")
        server = Server(directory, storage, python=python, profile=profile, settings=settings or [])
        try:
            report.figures[f"ready in s, {devices:,} devices"] = server.seconds_to_ready
            report.figures["MiB resident when ready"] = server.memory_mib("VmRSS")
            bench = Bench(server, directory, storage, devices, seconds, patience, report, large)
            for name in chosen:
                MEASUREMENTS[name](bench)
            report.figures["MiB resident after the load"] = server.memory_mib("VmRSS")
            report.figures["MiB resident at most"] = server.memory_mib("VmHWM")
        finally:
            server.stop()
    print_report(report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
