"""`kamado serve --workers 2`: configuration and operations 3 and 4, with several processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.adapter import Adapter, ConnectionClosed
from tests.integration.certificates import Authority
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, Response, kamado, new_id, poll, send_request
from tests.postgresql import is_running

UNAVAILABLE, CONFIGURATION = 69, 78
COMMON = {"host", "component_type", "component_name"}
TWO = ["--workers", "2"]


def workers_of(registry: Registry) -> list[int]:
    """The process ids of the workers that run."""
    return children(registry.pid)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def log_of(registry: Registry) -> list[dict[str, object]]:
    return [json.loads(line) for line in registry.log.read_text().splitlines()]


def read(registry: Registry, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """The samples of a name, by their labels without the common ones."""
    return {
        frozenset((label, value) for label, value in sample.labels.items() if label not in COMMON): float(sample.value)
        for family in text_string_to_metric_families(registry.health("/metrics").body.decode())
        for sample in family.samples
        if sample.name == name
    }


def by_worker(registry: Registry, name: str, **labels: str) -> dict[str, float]:
    """Worker -> value."""
    return {
        dict(found)["worker"]: value
        for found, value in read(registry, name).items()
        if labels.items() <= dict(found).items()
    }


def connections(registry: Registry) -> dict[str, float]:
    return by_worker(registry, "kamado_amqp_connections", port="insecure")


def connect(registry: Registry) -> Adapter:
    return Adapter(registry.amqp_port, registry.username, registry.password)


def connect_evenly(registry: Registry, adapters: contextlib.ExitStack, each: int) -> list[Adapter]:
    """Connect until each of two workers has so many, and let them keep no more.

    One that does not get its turn in time is not waited for (decision 23), so on a busy machine some go astray.
    """
    kept: dict[str, list[Adapter]] = {}
    with contextlib.ExitStack() as astray:
        for _ in range(4 * each + 10):
            adapter = connect(registry)
            own = kept.setdefault(container_of(adapter), [])
            if len(own) < each:
                own.append(adapters.enter_context(adapter))
            else:
                astray.enter_context(adapter)
            if sum(map(len, kept.values())) == 2 * each:
                return [adapter for own in kept.values() for adapter in own]
    raise AssertionError("one worker takes nearly all")


def container_of(adapter: Adapter) -> str:
    name = adapter.connection.remote_container
    assert name is not None
    return name


def asks(adapter: Adapter, tenant_id: str) -> int | None:
    return adapter.request("tenant", "get", body=json.dumps({"tenant-id": tenant_id})).status


def count_workers(registry: Registry) -> dict[str, float]:
    return {dict(labels)["state"]: value for labels, value in read(registry, "kamado_workers").items()}


def restarts(registry: Registry) -> float:
    return read(registry, "kamado_worker_restarts_total")[frozenset()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Two workers that nobody kills."""
    with Registry(tmp_path_factory.mktemp("workers"), tls=True, arguments=TWO) as registry:
        yield registry


@pytest.fixture
def adapters() -> Iterator[contextlib.ExitStack]:
    """Closes adapters in the end."""
    with contextlib.ExitStack() as stack:
        yield stack


# What is served by whom


def test_connections_are_spread_and_all_are_served(shared: Registry, adapters: contextlib.ExitStack) -> None:
    """Adapters hold few connections for long, so half of them go to each."""
    tenant_id = shared.create_tenant()
    opened = connect_evenly(shared, adapters, 5)
    poll(lambda: set(connections(shared).values()) == {5}, what="the same in the metrics")
    spread = connections(shared)
    before = by_worker(shared, "kamado_amqp_requests_total", api="tenant", status="200")
    assert [asks(adapter, tenant_id) for adapter in opened] == [200] * 10
    after = by_worker(shared, "kamado_amqp_requests_total", api="tenant", status="200")
    assert {worker: value - before.get(worker, 0) for worker, value in after.items()} == spread


def test_connections_go_where_there_are_fewer(shared: Registry, adapters: contextlib.ExitStack) -> None:
    opened = connect_evenly(shared, adapters, 20)
    left = container_of(opened[0])
    for adapter in opened:
        if container_of(adapter) == left:
            adapter.close()
    poll(lambda: sorted(connections(shared).values()) == [0, 20], what="connections that are gone")
    again = [container_of(adapters.enter_context(connect(shared))) for _ in range(27)]
    # Whoever does not count would take every other one; on a busy machine not all go where they should.
    assert again.count(left) >= 19


def test_each_worker_has_a_container_id(shared: Registry, adapters: contextlib.ExitStack) -> None:
    """Amqp-apis 2.1: unique per process."""
    ids = {container_of(adapter) for adapter in connect_evenly(shared, adapters, 1)}
    assert {name[-2:] for name in ids} == {"-1", "-2"}


def test_management_api_is_served_by_all_and_each_sees_what_another_wrote(shared: Registry) -> None:
    with contextlib.ExitStack() as idle:
        for _ in range(2):
            # Each holds a worker's place, so that the next requests are not all for the same.
            idle.enter_context(socket.create_connection(("127.0.0.1", shared.http_port), 10))
        for _ in range(20):
            tenant_id = shared.create_tenant()
            assert shared.request("GET", f"/v1/tenants/{tenant_id}").status == 200
    served = by_worker(shared, "kamado_http_requests_total", route="/v1/tenants/{tenant}", method="POST", status="201")
    assert set(served) <= {"1", "2"}
    assert sum(served.values()) >= 20


def test_tls(shared: Registry) -> None:
    assert shared.tls is not None
    tenant_id = shared.create_tenant()
    arguments = ("ask", "tenant", tenant_id, "--url", shared.addresses["amqps"], "--ca-file", str(shared.tls.ca_file))
    for _ in range(3):
        assert shared.run(*arguments).stdout.startswith("200 OK")
    assert sum(by_worker(shared, "kamado_amqp_connections_opened_total", port="secure").values()) >= 3
    poll(
        lambda: not any(by_worker(shared, "kamado_amqp_connections", port="secure").values()),
        what="connections that are gone",
    )


# What is told


def test_ready_file_and_start_up_lines_come_once(shared: Registry) -> None:
    ready = [event for event in log_of(shared) if event["msg"] == "ready"]
    assert len(ready) == 1
    assert "worker" not in ready[0]
    assert set(shared.addresses) == {"health", "amqp", "amqps", "http", "https"}
    assert not [event for event in log_of(shared) if event["level"] == "error"]


def test_health(shared: Registry) -> None:
    for path in ("/", "/started", "/liveness", "/readiness"):
        assert shared.health(path).status == 200


def test_metrics_of_all(shared: Registry) -> None:
    """What is the same for all comes once; what each counts has the label `worker`."""
    shared.create_tenant()
    text = shared.health("/metrics").body.decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    for name in ("kamado_ready", "hono_tenants_total", "kamado_devices"):
        assert list(read(shared, name)) == [frozenset()], name
    assert read(shared, "kamado_ready")[frozenset()] == 1
    assert [set(dict(labels)) for labels in read(shared, "kamado_build_info")] == [{"version", "python"}]
    assert count_workers(shared) == {"ready": 2, "down": 0}
    assert restarts(shared) == 0
    memory = read(shared, "process_resident_memory_bytes")
    assert {dict(labels).get("worker") for labels in memory} == {None, "1", "2"}
    assert set(
        by_worker(shared, "kamado_tls_certificate_expiry_timestamp_seconds", listener="amqp", role="server")
    ) == {
        "1",
        "2",
    }


def test_one_worker_is_one_process(new_registry: NewRegistry) -> None:
    registry = new_registry(arguments=["--workers", "1"])
    assert workers_of(registry) == []
    assert "kamado_workers" not in registry.health("/metrics").body.decode()


def test_as_many_as_processors(new_registry: NewRegistry) -> None:
    registry = new_registry(start=False)
    shown = registry.run("check-config", "--print", "--set", "serve.workers=auto").stdout
    assert 'serve.workers = "auto"' in shown


@pytest.mark.parametrize("number", ["0", "65", "many"])
def test_numbers_that_make_no_sense(number: str) -> None:
    assert "serve.workers" in kamado("serve", "--workers", number, expect_status=CONFIGURATION).stderr


def test_descriptors_of_workers(shared: Registry) -> None:
    """Each has the front doors and its own channel; not the health listener, nor anything of its fellow."""

    def sockets_of(pid: int) -> set[str]:
        links = set()
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        return {link for link in links if link.startswith("socket:")}

    def inode_of(port: int) -> str:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                return f"socket:[{fields[9]}]"
        raise AssertionError(port)

    first, second = (sockets_of(pid) for pid in workers_of(shared))
    doors = {inode_of(port) for port in (shared.amqp_port, shared.amqps_port, shared.http_port)}
    doors.add(inode_of(shared._port("https")))
    assert first & second == doors
    health = inode_of(shared._port("health"))
    assert health in sockets_of(shared.pid)
    assert health not in first | second


# What ends, and what begins again


def test_a_killed_worker_comes_back_and_its_fellow_is_not_disturbed(
    new_registry: NewRegistry, adapters: contextlib.ExitStack
) -> None:
    registry = new_registry(arguments=TWO)
    tenant_id = registry.create_tenant()
    opened = connect_evenly(registry, adapters, 3)
    victim = workers_of(registry)[0]
    os.kill(victim, signal.SIGKILL)
    served = []
    for adapter in opened:
        with contextlib.suppress(ConnectionClosed, ConnectionError):
            assert asks(adapter, tenant_id) == 200
            served.append(adapter)
    # While one is away, nobody is turned away, and the registry is ready.
    with connect(registry) as newcomer:
        assert asks(newcomer, tenant_id) == 200
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 200
    assert registry.health("/readiness").status == 200
    poll(lambda: count_workers(registry) == {"ready": 2, "down": 0} and restarts(registry) == 1, what="a new worker")
    assert victim not in workers_of(registry)
    assert len(workers_of(registry)) == 2
    (event,) = [event for event in log_of(registry) if event["msg"] == "worker ended, it is started again"]
    assert (event["status"], event["pause"]) == ("SIGKILL", 0)
    ending = f"-{event['worker']}"
    fellows = [adapter for adapter in opened if not container_of(adapter).endswith(ending)]
    assert len(fellows) == 3
    assert served == fellows
    more = connect_evenly(registry, adapters, 1)
    assert [asks(adapter, tenant_id) for adapter in more] == [200] * 2
    assert [container_of(adapter).endswith(ending) for adapter in more].count(True) == 1


def test_nothing_is_lost_while_no_worker_runs(new_registry: NewRegistry) -> None:
    """Connections wait in the socket, which the supervisor keeps open."""
    registry = new_registry(arguments=TWO)
    tenant_id = registry.create_tenant()

    def find_refusal() -> Response | None:
        response = registry.health("/readiness")
        if response.status == 503:
            return response
        # Also those that have been started again before anybody looked.
        for pid in workers_of(registry):
            os.kill(pid, signal.SIGKILL)
        return None

    checks = poll(find_refusal, what="not ready").object["checks"]
    assert isinstance(checks, list)
    assert {"problem": "no worker is ready"} in [check["data"] for check in checks]
    assert registry.health("/liveness").status == 200
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 200
    with connect(registry) as adapter:
        assert asks(adapter, tenant_id) == 200
    # A worker serves before the supervisor has heard of it.
    poll(lambda: registry.health("/readiness").status == 200, what="ready")


def test_stop_in_order(new_registry: NewRegistry, adapters: contextlib.ExitStack) -> None:
    """3.3: not ready at once; adapters are told when `shutdown.drain_delay` is over; exit 0."""
    registry = new_registry({"shutdown.drain_delay": "1s"}, arguments=TWO)
    opened = connect_evenly(registry, adapters, 2)
    workers, process = workers_of(registry), registry.process
    assert process is not None
    # As systemd does: to all processes at once.
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGTERM)
    for adapter in opened:
        assert adapter.wait_for_close().condition == "amqp:connection:forced"
    assert process.wait(60) == 0
    registry.process = None
    assert not [pid for pid in workers if is_running(pid)]
    assert "Traceback" not in registry.log.read_text()
    assert not [event for event in log_of(registry) if event["level"] == "error"]
    assert not registry.database.with_name("kamado.db-wal").exists()


def test_all_serve_while_draining_and_a_second_signal_ends_them_at_once(
    new_registry: NewRegistry, adapters: contextlib.ExitStack
) -> None:
    """3.3: serving until `shutdown.drain_delay` is over."""
    registry = new_registry({"shutdown.drain_delay": "1h"}, arguments=TWO)
    tenant_id = registry.create_tenant()
    opened = connect_evenly(registry, adapters, 2)
    workers, process = workers_of(registry), registry.process
    assert process is not None
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGTERM)
    poll(lambda: registry.health("/readiness").status == 503, what="not ready")
    assert registry.health("/liveness").status == 200
    assert [asks(adapter, tenant_id) for adapter in opened] == [200] * 4
    with connect(registry) as late:
        assert asks(late, tenant_id) == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    registry.process = None
    poll(lambda: not [pid for pid in workers if is_running(pid)], what="the end of the workers")


def test_workers_do_not_outlive_the_supervisor(new_registry: NewRegistry, adapters: contextlib.ExitStack) -> None:
    registry = new_registry(arguments=TWO)
    adapter = adapters.enter_context(connect(registry))
    workers, port = workers_of(registry), registry.amqp_port
    registry.kill()
    assert adapter.wait_for_close().condition == "amqp:connection:forced"
    poll(lambda: not [pid for pid in workers if is_running(pid)], what="the end of the workers")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 10)
    assert "Traceback" not in registry.log.read_text()


def test_a_hanging_worker_is_killed_when_the_stop_takes_too_long(new_registry: NewRegistry) -> None:
    registry = new_registry({"shutdown.grace": "0s"}, arguments=TWO)
    workers, process = workers_of(registry), registry.process
    assert process is not None
    os.kill(workers[0], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    registry.process = None
    assert not [pid for pid in workers if is_running(pid)]
    assert "workers did not stop in time, they are killed" in registry.log.read_text()


def test_metrics_do_not_wait_for_a_hanging_worker(new_registry: NewRegistry) -> None:
    registry = new_registry(arguments=TWO)
    hanging = workers_of(registry)[0]
    os.kill(hanging, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert len(connections(registry)) == 1
        # Before it is killed because it hangs (`WorkersSettings.max_unanswered`).
        assert time.monotonic() - started < 25
        # Whoever hangs takes no connections either.
        for _ in range(4):
            registry.create_tenant()
    finally:
        os.kill(hanging, signal.SIGCONT)
    poll(lambda: len(connections(registry)) == 2, what="the metrics of both")


# What is wrong at the start, and what changes later


def test_a_port_that_is_taken_is_told_once(new_registry: NewRegistry) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key in ("http.insecure.port", "amqp.insecure.port", "health.port"):
            registry = new_registry({key: str(port)}, arguments=TWO, start=False)
            result = subprocess.run(
                registry.command, env=registry.environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert result.returncode == UNAVAILABLE
            (message,) = [line for line in result.stdout.splitlines() if '"error"' in line]
            assert f"{port} cannot be had: Address already in use" in message
            assert result.stderr == ""


def test_first_data_is_loaded_once(new_registry: NewRegistry, tmp_path: Path) -> None:
    tenant_id = new_id()
    (tmp_path / "t.json").write_text(json.dumps([{"tenant-id": tenant_id}]))
    registry = new_registry({"startup.load": str(tmp_path / "t.json")}, arguments=TWO)
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 200
    assert registry.log.read_text().count('"data loaded"') == 1


def test_reload_reaches_all(new_registry: NewRegistry) -> None:
    registry = new_registry(tls=True, arguments=TWO)
    assert registry.tls is not None
    authority = Authority.create("CN=Next CA")
    ca_file, _ = authority.write(registry.directory, "next-ca")
    authority.issue("CN=localhost", server=True).write(registry.tls.cert_file.parent, "server")
    os.kill(registry.pid, signal.SIGHUP)

    def reloaded() -> list[tuple[object, object]]:
        events = [event for event in log_of(registry) if event["msg"] == "key material reloaded"]
        return sorted((str(event["worker"]), str(event["listener"])) for event in events)

    expected = [("1", "amqp"), ("1", "http"), ("2", "amqp"), ("2", "http")]
    poll(lambda: reloaded() == expected, what="a reload in each worker")
    arguments = ("ask", "tenant", registry.create_tenant(), "--url", registry.addresses["amqps"])
    for _ in range(4):
        registry.run(*arguments, "--ca-file", str(ca_file))


def test_a_worker_that_comes_back_has_the_configuration_of_the_start(new_registry: NewRegistry) -> None:
    """The file may have changed, or be wrong, since."""
    registry = new_registry(arguments=TWO)
    registry.config_file.write_text("nonsense")
    for pid in workers_of(registry):
        os.kill(pid, signal.SIGKILL)
    tenant_id = registry.create_tenant()
    assert send_request(registry.http_url, "GET", f"/v1/tenants/{tenant_id}").status == 200
