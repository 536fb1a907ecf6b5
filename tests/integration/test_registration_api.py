"""Device Registration API: amqp-apis 14, rows R, and section 10."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from proton import int32, symbol
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture
from tests.integration.adapter import Adapter, Reply
from tests.rows import Section

ROWS = Section("amqp-apis 14")


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    yield from acme_fixture(databases, tmp_path_factory.mktemp("registrations"))


@pytest.fixture(scope="module")
def adapter(acme: Acme) -> Iterator[Adapter]:
    with acme.adapter() as adapter:
        yield adapter


def ask(adapter: Adapter, device_id: object = None, gateway_id: object = None, tenant_id: str = "acme") -> Reply:
    given = {"device_id": device_id, "gateway_id": gateway_id}
    properties: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return adapter.request(f"registration/{tenant_id}", "assert", properties=properties)


@pytest.mark.parametrize(
    ("device_id", "gateway_id", "payload"),
    [
        ROWS.case("R1", "d1", None, {"device-id": "d1"}),
        ROWS.case("R2", "d2", None, {"device-id": "d2", "via": ["gw1"]}),
        ROWS.case("R3", "d3", None, {"device-id": "d3", "via": ["gw2", "gw4"]}),
        ROWS.case("R4", "d2", "gw1", {"device-id": "d2", "via": ["gw1"]}),
        ROWS.case("R6", "d3", "gw2", {"device-id": "d3", "via": ["gw2", "gw4"]}),
        pytest.param("d1", int32(5), {"device-id": "d1"}, id="6-gateway-of-another-type"),
    ],
)
def test_asserted(adapter: Adapter, device_id: str, gateway_id: object, payload: object) -> None:
    reply = ask(adapter, device_id, gateway_id)
    assert reply.status == 200
    assert reply.json() == payload
    assert reply.cache_control == "max-age = 300"
    assert (reply.tenant_id, reply.device_id) == ("acme", device_id)


@pytest.mark.parametrize(
    ("device_id", "gateway_id", "status"),
    [
        ROWS.case("R5", "d2", "gw2", 403),
        ROWS.case("R7", "d1", "gw1", 403),
        ROWS.case("R8", "d4", None, 404),
        ROWS.case("R9", "d4", "gw1", 404),
        ROWS.case("R10", "d5", "gw3", 403),
        ROWS.case("R11", "d2", "nope", 403),
        ROWS.case("R12", "nope", None, 404),
        ROWS.case("R13", "nope", "gw1", 404),
        pytest.param("gw1", "gw1", 403, id="10.2-gateway-via-itself"),
        pytest.param("d4", "nope", 404, id="10.2-device-before-gateway"),
        pytest.param("nope", "nope", 404, id="10.2-both-unknown"),
        pytest.param("nope", "gw3", 404, id="10.2-device-before-disabled-gateway"),
        pytest.param("d4", "gw4", 404, id="10.2-disabled-is-not-unknown"),
        pytest.param("d1", "gw4", 403, id="10.2-only-unknown-devices-are-provisioned"),
        pytest.param("D1", None, 404, id="3-case"),
    ],
)
def test_refused(adapter: Adapter, device_id: str, gateway_id: str | None, status: int) -> None:
    reply = ask(adapter, device_id, gateway_id)
    assert reply.status == status
    assert reply.body is None
    assert reply.cache_control is None
    assert (reply.tenant_id, reply.device_id) == ("acme", device_id)


@pytest.mark.row("amqp-apis 14", "R14", "R15")
def test_r14_r15_edge_device_through_its_gateway(acme: Acme, adapter: Adapter) -> None:
    """Also provisioning 4.2: what the operator sees of it."""
    before = datetime.now(UTC).replace(microsecond=0)
    reply = ask(adapter, "new1", "gw4")
    assert reply.status == 200
    assert reply.json() == {"device-id": "new1", "via": ["gw4", "gw2"]}
    assert reply.cache_control == "max-age = 300"
    assert (reply.tenant_id, reply.device_id) == ("acme", "new1")
    device = acme.registry.request("GET", "/v1/devices/acme/new1").object
    status = device.pop("status")
    assert device == {"enabled": True, "via": ["gw4"], "viaGroups": ["hall"]}
    assert isinstance(status, dict)
    assert before <= datetime.fromisoformat(str(status.pop("created"))) <= datetime.now(UTC)
    assert status == {"auto-provisioned": True}
    assert acme.registry.request("GET", "/v1/credentials/acme/new1").json() == []
    refused = ask(adapter, "new1", "gw1")
    assert refused.status == 403
    assert refused.body is None
    # It is a device as any other now: also for a gateway of a common group, and on its own (10.2).
    for gateway_id in ("gw4", "gw2", None):
        assert ask(adapter, "new1", gateway_id).json() == reply.json()


@ROWS.row("R16")
def test_r16_unknown_tenant(adapter: Adapter) -> None:
    reply = ask(adapter, "d1", tenant_id="nope")
    assert reply.status == 404
    assert reply.body is None


def test_alias_is_no_tenant_here(adapter: Adapter) -> None:
    """Sections 3 and 9.3: an alias is for the Tenant API."""
    assert ask(adapter, "d1", tenant_id="plant7").status == 404


def test_disabled_tenant_is_not_a_reason(adapter: Adapter) -> None:
    """Section 10.2, step 2."""
    assert ask(adapter, "d1", tenant_id="off").status == 200


@pytest.mark.parametrize(
    "device_id",
    [
        ROWS.case("R17", None),
        ROWS.case("R18", int32(5)),
        ROWS.case("R18-symbol", symbol("d1")),
        ROWS.case("R18-binary", b"d1"),
    ],
)
def test_r17_r18_device_id_missing(adapter: Adapter, device_id: object) -> None:
    reply = ask(adapter, device_id)
    assert reply.status == 400
    assert reply.cache_control is None


@pytest.mark.parametrize("subject", ["register", "get", "Assert"])
@ROWS.row("R19")
def test_r19_unknown_subject(adapter: Adapter, subject: str) -> None:
    reply = adapter.request("registration/acme", subject, properties={"device_id": "d1"})
    assert reply.status == 400


@ROWS.row("R20")
def test_r20_no_right_to_execute(acme: Acme) -> None:
    with acme.adapter("links-only") as adapter:
        reply = ask(adapter, "d1")
        assert reply.status == 403
        assert reply.body is None
        # Unknown devices look the same.
        assert ask(adapter, "nope").status == 403


def test_payload(acme: Acme, adapter: Adapter) -> None:
    """Section 10.3: what is in it, what never is."""
    tenant_id = acme.registry.create_tenant(document={"defaults": {"ttl": 1}})
    acme.registry.create_device(tenant_id, "gw-a", {"memberOf": ["g1", "g2"]})
    acme.registry.create_device(tenant_id, "gw-b", {"memberOf": ["g2"]})
    acme.registry.create_device(
        tenant_id,
        "d",
        {
            "via": ["gw-z", "gw-a"],
            "viaGroups": ["g2", "g1"],
            "defaults": {"content-type": "text/plain"},
            "ext": {"secret": "of the operator"},
            "downstream-message-mapper": "down",
            "upstream-message-mapper": "up",
            "command-endpoint": {"uri": "http://127.0.0.1/", "headers": {"a": "b"}, "payload-properties": {"c": "d"}},
        },
    )
    assert ask(adapter, "d", tenant_id=tenant_id).json() == {
        "device-id": "d",
        "via": ["gw-z", "gw-a", "gw-b"],
        "defaults": {"content-type": "text/plain"},
        "downstream-message-mapper": "down",
        "upstream-message-mapper": "up",
        "command-endpoint": {"uri": "http://127.0.0.1/", "headers": {"a": "b"}, "payload-properties": {"c": "d"}},
    }


def test_changes_are_seen_at_once(acme: Acme, adapter: Adapter) -> None:
    """Section 8: a device that was unknown and has been created is visible at once; so is any other change."""
    tenant_id = acme.registry.create_tenant()
    assert ask(adapter, "d", tenant_id=tenant_id).status == 404
    acme.registry.create_device(tenant_id, "d", {})
    assert ask(adapter, "d", tenant_id=tenant_id).status == 200
    assert acme.registry.request("PUT", f"/v1/devices/{tenant_id}/d", {"enabled": False}).status == 204
    assert ask(adapter, "d", tenant_id=tenant_id).status == 404
    assert acme.registry.request("PUT", f"/v1/devices/{tenant_id}/d", {}).status == 204
    assert ask(adapter, "d", tenant_id=tenant_id).status == 200
    assert acme.registry.request("DELETE", f"/v1/devices/{tenant_id}/d").status == 204
    assert ask(adapter, "d", tenant_id=tenant_id).status == 404
