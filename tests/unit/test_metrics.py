"""Metrics: configuration and operations 4."""

import asyncio
import json
import threading
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kamado.amqp.api import Traffic
from kamado.amqp.server import Connections
from kamado.metrics import CONTENT_TYPE, Metrics
from kamado.passwords import PasswordHasher

BUCKETS = ["0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.2", "0.5", "1.0", "2.5", "+Inf"]
"""4.2: 1, 2.5, 5, 10, 25, 50, 100, 200, 500 ms, 1, 2.5 s."""


def new_metrics(labels: Mapping[str, str] | None = None) -> Metrics:
    return Metrics(version="1.2.3", labels=labels or {})


def values(metrics: Metrics, name: str, *, is_ready: bool = True) -> dict[tuple[str, ...], float]:
    """The samples of a name: values of the labels, in the order of their names -> value."""
    text = metrics.render(is_ready=is_ready).decode()
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_page() -> None:
    assert CONTENT_TYPE == b"text/plain; version=0.0.4; charset=utf-8"
    metrics = new_metrics()
    assert values(metrics, "kamado_ready") == {(): 1}
    assert values(metrics, "kamado_ready", is_ready=False) == {(): 0}
    [(_, version)] = values(metrics, "kamado_build_info")
    assert version == "1.2.3"
    names = [
        line.split()[2] for line in metrics.render(is_ready=True).decode().splitlines() if line.startswith("# TYPE")
    ]
    assert len(names) == len(set(names))
    assert {"process_open_fds", "python_gc_collections_total"} <= set(names)


def test_tenants_and_devices_once_they_are_counted() -> None:
    """4.2: never -1."""
    metrics = new_metrics()
    assert "hono_tenants" not in metrics.render(is_ready=True).decode()
    metrics.set_inventory(3, 7)
    assert values(metrics, "hono_tenants_total") == {(): 3}
    assert values(metrics, "kamado_devices") == {(): 7}


def test_common_labels_are_on_every_series() -> None:
    """4.1."""
    common = {"host": "h", "component_type": "service", "component_name": "hono-registry"}
    metrics = new_metrics(common)
    metrics.observe_search("devices", 1, 0.1, False)
    text = metrics.render(is_ready=True).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert len(samples) > 20
    assert all(common.items() <= sample.labels.items() for sample in samples)


def test_http() -> None:
    metrics = new_metrics()
    for status, seconds in ((201, 0.004), (201, 0.3), (409, 9.0)):
        metrics.observe_http("/v1/tenants/{tenant}", "POST", status, seconds)
    # Methods that nobody needs are one series, whatever they are called.
    metrics.observe_http("unknown", "PROPFIND", 405, 0.1)
    metrics.observe_http("unknown", "MKCOL", 405, 0.1)
    assert values(metrics, "kamado_http_requests_total") == {
        ("POST", "/v1/tenants/{tenant}", "201"): 2,
        ("POST", "/v1/tenants/{tenant}", "409"): 1,
        ("other", "unknown", "405"): 2,
    }
    reached = values(metrics, "kamado_http_request_duration_seconds_bucket")
    of_route = {le: number for (le, _, route), number in reached.items() if route != "unknown"}
    assert list(of_route) == BUCKETS
    assert (of_route["0.0025"], of_route["0.005"], of_route["0.5"], of_route["2.5"], of_route["+Inf"]) == (
        (0, 1, 2, 2, 3)
    )


def test_search() -> None:
    """What a search has cost, by kind."""
    metrics = new_metrics()
    metrics.observe_search("devices", 200, 0.002, False)
    metrics.observe_search("devices", 100_000, 0.7, True)
    metrics.observe_search("tenants", 0, 0.0001, False)
    metrics.observe_unanswered_search("devices")
    assert values(metrics, "kamado_search_unanswered_total") == {("devices",): 1}
    assert values(metrics, "kamado_search_rows_scanned_total") == {("devices",): 100_200, ("tenants",): 0}
    assert values(metrics, "kamado_search_expensive_total") == {("devices",): 1, ("tenants",): 0}
    assert values(metrics, "kamado_search_duration_seconds_count") == {("devices",): 2, ("tenants",): 1}
    assert values(metrics, "kamado_search_duration_seconds_sum")["devices",] == pytest.approx(0.702)


def test_commits() -> None:
    metrics = new_metrics()
    metrics.observe_commit("registry", committed=3, refused=1, failed=0, seconds=0.01)
    metrics.observe_commit("registry", committed=0, refused=0, failed=5, seconds=0.2)
    assert values(metrics, "kamado_db_writes_total") == {
        ("registry", "committed"): 3,
        ("registry", "refused"): 1,
        ("registry", "failed"): 5,
    }
    assert values(metrics, "kamado_db_group_size_sum") == {("registry",): 9}
    assert values(metrics, "kamado_db_commit_duration_seconds_count") == {
        ("registry", "committed"): 1,
        ("registry", "failed"): 1,
    }


def test_first_contacts_logins_lag_and_certificates() -> None:
    metrics = new_metrics()
    metrics.observe_provisioning("gateway", "created")
    metrics.observe_login("PLAIN", "auth", 0.06)
    metrics.observe_lag(0.02)
    metrics.set_certificate_expiry("amqp", "client_ca", 1_900_000_000.0)
    assert values(metrics, "kamado_provisioning_total") == {("gateway", "created"): 1}
    assert values(metrics, "kamado_sasl_attempts_total") == {("PLAIN", "auth"): 1}
    assert values(metrics, "kamado_sasl_duration_seconds_sum") == {("PLAIN",): 0.06}
    assert values(metrics, "kamado_event_loop_lag_seconds_sum") == {(): 0.02}
    assert values(metrics, "kamado_tls_certificate_expiry_timestamp_seconds") == {("amqp", "client_ca"): 1.9e9}


def test_what_is_counted_elsewhere_is_read_when_somebody_asks() -> None:
    metrics = new_metrics()
    traffic, connections = Traffic("registration", "assert"), Connections()
    metrics.watch_adapters([traffic], connections)
    assert values(metrics, "kamado_amqp_requests_total") == {}
    assert values(metrics, "kamado_amqp_links") == {("registration", "receiver"): 0, ("registration", "sender"): 0}
    traffic.answered["assert"][200] += 3
    traffic.count_error("assert", 404)
    traffic.count_error("no such subject", 400)
    traffic.rejected["malformed"] += 1
    traffic.denied["link"] += 1
    traffic.links["sender"] += 1
    traffic.durations.add(0.0005, 3)
    traffic.durations.add(0.2, 1)
    traffic.durations.add(9.0, 1)
    connections.begin("secure")
    connections.begin("secure")
    connections.end("secure", "idle")
    assert values(metrics, "kamado_amqp_requests_total") == {
        ("registration", "assert", "200"): 3,
        ("registration", "assert", "404"): 1,
        ("registration", "unknown", "400"): 1,
    }
    reached = {le: n for (_, le), n in values(metrics, "kamado_amqp_request_duration_seconds_bucket").items()}
    assert list(reached) == BUCKETS
    # An upper bound belongs to its bucket.
    assert (reached["0.001"], reached["0.1"], reached["0.2"], reached["2.5"], reached["+Inf"]) == (3, 3, 4, 4, 5)
    assert values(metrics, "kamado_amqp_request_duration_seconds_count") == {("registration",): 5}
    assert values(metrics, "kamado_amqp_request_duration_seconds_sum")["registration",] == pytest.approx(9.2015)
    assert values(metrics, "kamado_amqp_rejected_total")["registration", "malformed"] == 1
    assert values(metrics, "kamado_authz_denied_total")["registration", "link"] == 1
    assert values(metrics, "kamado_amqp_links")["registration", "sender"] == 1
    assert values(metrics, "kamado_amqp_connections") == {("secure",): 1, ("insecure",): 0}
    assert values(metrics, "kamado_amqp_connections_opened_total") == {("secure",): 2, ("insecure",): 0}
    assert values(metrics, "kamado_amqp_connections_closed_total") == {("secure", "idle"): 1}


def test_queues_of_several_pools_are_one_metric() -> None:
    metrics = new_metrics()
    lengths = {"management": 2, "logins": 0}
    metrics.watch_queue("management", lambda: lengths["management"])
    metrics.watch_queue("logins", lambda: lengths["logins"])
    metrics.watch_writes("registry", lambda: 7)
    assert values(metrics, "kamado_hash_queue_depth") == {("management",): 2, ("logins",): 0}
    lengths["logins"] = 5
    assert values(metrics, "kamado_hash_queue_depth")["logins",] == 5
    assert values(metrics, "kamado_db_writes_waiting") == {("registry",): 7}


def test_passwords_that_wait_are_counted() -> None:
    """Configuration 4.2, `kamado_hash_queue_depth`: what runs does not wait."""
    may_go_on = threading.Event()
    seconds: list[float] = []

    def observe(taken: float) -> None:
        seconds.append(taken)
        may_go_on.wait(60)

    async def main() -> None:
        hasher = PasswordHasher(workers=1, queue=5, cost=4, observe=observe)
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(hasher.hash("x"))
            await asyncio.sleep(0)
            assert hasher.waiting == 2
            may_go_on.set()
        assert hasher.waiting == 0
        assert len(seconds) == 3
        assert all(0 < taken < 5 for taken in seconds)
        hasher.close()

    asyncio.run(main())


def test_series_of_workers_are_told_apart() -> None:
    """What workers count has the label `worker`, what is the same for all is not told by them."""
    common = {"component_name": "hono-registry"}
    whole, worker = new_metrics(common), new_metrics(common)
    worker.observe_search("devices", 7, 0.004, False)
    worker.render(is_ready=True)
    whole.watch_workers(lambda: {"ready": 1, "down": 1}, lambda: 3)
    exported = json.loads(json.dumps(worker.export()))
    text = whole.render(is_ready=True, workers={1: exported, 2: exported}).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    labels = {"component_name": "hono-registry", "kind": "devices"}
    rows = [(sample.labels, sample.value) for sample in samples if sample.name == "kamado_search_rows_scanned_total"]
    assert rows == [(labels | {"worker": number}, 7) for number in ("1", "2")]
    for name in ("kamado_ready", "kamado_build_info", "python_info"):
        assert len([sample for sample in samples if sample.name == name]) == 1, name
    assert [(s.labels["state"], s.value) for s in samples if s.name == "kamado_workers"] == [("ready", 1), ("down", 1)]
    assert [sample.value for sample in samples if sample.name == "kamado_worker_restarts_total"] == [3]
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert not [sample for sample in samples if sample.name.endswith("_created")]
