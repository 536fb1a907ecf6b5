"""Metrics of the real process: configuration and operations 3.1 and 4, scraped over a socket."""

import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture, get_credentials
from tests.integration.adapter import Adapter, AuthenticationFailed, LinkRefused
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, Response, poll, send_request

CHAPTER = Path(__file__).parents[2] / "docs" / "specification" / "configuration-and-operations.md"
COMMON = {"host", "component_type", "component_name"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    yield from acme_fixture(databases, tmp_path_factory.mktemp("metrics"))


def scrape(registry: Registry, path: str = "/metrics") -> Response:
    return send_request(registry.addresses["health"], "GET", path)


def read(registry: Registry) -> Samples:
    """All samples, without the common labels."""
    return {
        (sample.name, frozenset((name, value) for name, value in sample.labels.items() if name not in COMMON)): float(
            sample.value
        )
        for family in text_string_to_metric_families(scrape(registry).body.decode())
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0)


class Difference:
    """What has been counted since; adapters of earlier tests are gone first."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        poll(self._is_quiet, what="the end of earlier connections")
        self._before = read(registry)

    def _is_quiet(self) -> bool:
        samples = read(self._registry)
        return not any(value for (name, _), value in samples.items() if name == "kamado_amqp_connections")

    def __call__(self, name: str, **labels: str) -> float:
        return of(read(self._registry), name, **labels) - of(self._before, name, **labels)


def documented() -> dict[str, tuple[str, set[str], bool]]:
    """Metric -> type, labels, whether it is there today, as the table of 4.2 says."""
    text = CHAPTER.read_text()
    table = text[text.index("### 4.2") : text.index("Buckets for requests")]
    found = {}
    for name, kind, labels, today in re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", table, re.MULTILINE):
        names = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", labels)))
        found[name] = (kind, names, today.startswith("yes"))
    assert len(found) > 40
    return found


@pytest.mark.parametrize("path", ["/metrics", "/prometheus"])
def test_page_on_the_health_listener(registry: Registry, path: str) -> None:
    """3.1: `/prometheus`, and `/metrics` as alias; text exposition, no login."""
    response = scrape(registry, path)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert of(read(registry), "kamado_ready") == 1
    head = send_request(registry.addresses["health"], "HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert send_request(registry.addresses["health"], "POST", path).status == 405
    # Never where operators are.
    assert registry.request("GET", path).status == 404


def test_settings(new_registry: NewRegistry) -> None:
    """1.3, `metrics.path` and `metrics.common_labels`."""
    one = new_registry({"metrics.path": "/internal/metrics", "metrics.common_labels": "false"})
    assert [scrape(one, path).status for path in ("/internal/metrics", "/metrics", "/prometheus")] == [200, 200, 404]
    assert "component_name" not in scrape(one).body.decode()


def test_common_labels(registry: Registry) -> None:
    """4.1: on every series; the registry is `hono-registry`."""
    samples = [
        sample for family in text_string_to_metric_families(scrape(registry).body.decode()) for sample in family.samples
    ]
    assert len(samples) > 50
    for sample in samples:
        assert sample.labels["component_type"] == "service"
        assert sample.labels["component_name"] == "hono-registry"
        assert sample.labels["host"]


def test_names_types_and_labels_are_those_of_the_chapter(acme: Acme) -> None:
    """4.2, both ways: nothing that is not in the table, and everything that the table says is there."""
    name, device = acme.new_device()
    with acme.adapter(tls=True) as adapter:
        assert get_credentials(adapter, name, client_certificate=device.base64).status == 201
    acme.registry.create_tenant()
    table = documented()
    seen = {}
    for family in text_string_to_metric_families(scrape(acme.registry).body.decode()):
        shown = f"{family.name}_total" if family.type == "counter" else family.name
        if not shown.startswith(("process_", "python_")):
            assert shown in table, shown
            kind, labels, _ = table[shown]
            assert family.type == kind, shown
            for sample in family.samples:
                assert set(sample.labels) - COMMON - {"le"} == labels, shown
        seen[shown] = family
    assert {metric for metric, (_, _, today) in table.items() if today} <= set(seen)
    assert "process_resident_memory_bytes" in seen


def test_requests_of_operators(acme: Acme) -> None:
    registry, count = acme.registry, Difference(acme.registry)
    tenant_id = registry.create_tenant()
    registry.create_device(tenant_id, "d")
    assert registry.request("GET", f"/v1/devices/{tenant_id}/d").status == 200
    assert registry.request("GET", f"/v1/devices/{tenant_id}/other").status == 404
    assert registry.request("GET", "/v1/nothing").status == 404
    name, device = "kamado_http_requests_total", "/v1/devices/{tenant}/{device}"
    assert count(name, route="/v1/tenants/{tenant}", method="POST", status="201") == 1
    assert count(name, route=device, method="POST", status="201") == 1
    assert count(name, route=device, method="GET", status="200") == 1
    assert count(name, route=device, method="GET", status="404") == 1
    assert count(name, route="unknown", method="GET", status="404") == 1
    assert count("kamado_http_request_duration_seconds_count", route=device, method="GET") == 2
    # Each is a commit of its own, since one waits for the other.
    assert count("kamado_db_writes_total", database="registry", outcome="committed") == 2
    assert count("kamado_db_group_size_count", database="registry") == 2
    assert registry.request("POST", f"/v1/tenants/{tenant_id}").status == 409
    assert count("kamado_db_writes_total", database="registry", outcome="refused") == 1


def test_requests_of_adapters(acme: Acme) -> None:
    count = Difference(acme.registry)
    with acme.adapter() as adapter:
        for device_id in ("d1", "d1", "d2", "nope"):
            adapter.request("registration/acme", "assert", properties={"device_id": device_id})
        adapter.request("registration/acme", "no such operation", properties={"device_id": "d1"})
        name = "kamado_amqp_requests_total"
        assert count(name, api="registration", operation="assert", status="200") == 3
        assert count(name, api="registration", operation="assert", status="404") == 1
        assert count(name, api="registration", operation="unknown", status="400") == 1
        assert count("kamado_amqp_request_duration_seconds_count", api="registration") == 5
        assert count("kamado_amqp_request_duration_seconds_bucket", api="registration", le="+Inf") == 5
        assert count("kamado_amqp_links", api="registration", role="receiver") == 1
        assert count("kamado_amqp_links", api="registration", role="sender") == 1
        sender, _ = adapter.links("registration/acme")
        adapter.await_disposition(adapter.send(sender, adapter.message("assert", reply_to=None, message_id="m1")))
        adapter.await_disposition(
            adapter.send(sender, adapter.message("assert", reply_to="registration/acme/none", message_id="m1"))
        )
        assert count("kamado_amqp_rejected_total", api="registration", reason="malformed") == 1
        assert count("kamado_amqp_rejected_total", api="registration", reason="no_reply_link") == 1
    for role in ("receiver", "sender"):
        poll(lambda role=role: count("kamado_amqp_links", api="registration", role=role) == 0, what="no link left")  # type: ignore[misc]


def test_requests_that_wait_are_counted_once(acme: Acme) -> None:
    count = Difference(acme.registry)
    name, device = acme.new_device()
    with acme.adapter() as adapter:
        for status in (201, 200):
            assert get_credentials(adapter, name, client_certificate=device.base64).status == status
        unreadable = base64.b64encode(b"nothing").decode()
        assert get_credentials(adapter, "CN=x", client_certificate=unreadable).status == 400
    assert count("kamado_amqp_requests_total", api="credentials", operation="get", status="201") == 1
    assert count("kamado_amqp_requests_total", api="credentials", operation="get", status="200") == 1
    assert count("kamado_amqp_request_duration_seconds_count", api="credentials") == 3
    assert count("kamado_provisioning_total", kind="device", outcome="created") == 1
    assert count("kamado_provisioning_total", kind="device", outcome="certificate-unreadable") == 1


def test_connections_logins_and_rights(acme: Acme) -> None:
    count = Difference(acme.registry)
    with acme.adapter("links-only", tls=True) as adapter:
        assert count("kamado_amqp_connections", port="secure") == 1
        assert adapter.request("tenant", "get", body=json.dumps({"tenant-id": "acme"})).status == 403
    with acme.adapter("nothing") as adapter, pytest.raises(LinkRefused):
        adapter.attach_sender("tenant")
    with pytest.raises(AuthenticationFailed):
        acme.adapter("nobody")
    closed = "kamado_amqp_connections_closed_total"
    poll(lambda: count(closed, port="secure", reason="peer") == 1, what="the end of a connection")
    poll(lambda: count(closed, port="insecure", reason="peer") == 1, what="the end of a connection")
    poll(lambda: count(closed, port="insecure", reason="login") == 1, what="the end of a login")
    for port in ("secure", "insecure"):
        poll(lambda port=port: count("kamado_amqp_connections", port=port) == 0, what="no connection left")  # type: ignore[misc]
    assert count("kamado_amqp_connections_opened_total", port="secure") == 1
    assert count("kamado_amqp_connections_opened_total", port="insecure") == 2
    assert count("kamado_sasl_attempts_total", mechanism="PLAIN", outcome="ok") == 2
    assert count("kamado_sasl_attempts_total", mechanism="PLAIN", outcome="auth") == 1
    assert count("kamado_authz_denied_total", api="tenant", kind="operation") == 1
    assert count("kamado_authz_denied_total", api="tenant", kind="link") == 1


def test_tenants_and_devices(new_registry: NewRegistry) -> None:
    """4.2: the one metric that Hono 2.7 has."""
    registry = new_registry()
    tenant_id = registry.create_tenant()
    registry.create_tenant()
    registry.create_device(tenant_id)
    samples = read(registry)
    assert (of(samples, "hono_tenants_total"), of(samples, "kamado_devices")) == (2, 1)
    # The next count is half a minute away.
    registry.create_tenant()
    assert of(read(registry), "hono_tenants_total") == 2


def test_ends_of_certificates(registry: Registry) -> None:
    samples = read(registry)
    name = "kamado_tls_certificate_expiry_timestamp_seconds"
    for listener, role in (("amqp", "server"), ("amqp", "client_ca"), ("http", "server")):
        assert of(samples, name, listener=listener, role=role) > time.time()


def test_connections_that_the_registry_ends(new_registry: NewRegistry) -> None:
    """4.2, reasons: a login that ended, a peer that says nothing."""
    registry = new_registry({"auth.lifetime": "4s", "amqp.handshake_timeout": "4s"})
    count = Difference(registry)
    closed = "kamado_amqp_connections_closed_total"
    with socket.create_connection(("127.0.0.1", registry.amqp_port), 60) as silent:
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            assert adapter.wait_for_close().condition == "amqp:unauthorized-access"
        assert silent.recv(1) == b""
    poll(lambda: count(closed, port="insecure", reason="token_expired") == 1, what="the end of a login")
    poll(lambda: count(closed, port="insecure", reason="idle") == 1, what="the end of a silent connection")
    poll(lambda: count("kamado_amqp_connections", port="insecure") == 0, what="no connection left")
