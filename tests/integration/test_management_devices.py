"""Conformance of the management API: devices (management 13.3), and 5 and 8 where they have no row."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.integration.conftest import NewRegistry
from tests.integration.registry import JsonObject, Registry, Response, new_id
from tests.rows import Section

ROWS = Section("management-api 13.3")

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SECOND = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def device_path(tenant: str, device: str) -> str:
    return f"/v1/devices/{tenant}/{device}"


@pytest.fixture
def tenant(registry: Registry) -> str:
    return registry.create_tenant()


def get(registry: Registry, tenant: str, device: str) -> JsonObject:
    response = registry.request("GET", device_path(tenant, device))
    assert response.status == 200, response.body
    return response.object


def get_status(document: JsonObject) -> JsonObject:
    status = document["status"]
    assert isinstance(status, dict)
    return status


def round_trip(registry: Registry, tenant: str, document: object) -> JsonObject:
    """Create a device and return what a read gives back, without `status`."""
    read = get(registry, tenant, registry.create_device(tenant, None, document))
    del read["status"]
    return read


def assert_error(response: Response, status: int) -> None:
    assert response.status == status, (response.status, response.body)
    assert isinstance(response.object["error"], str)


@ROWS.row(50, 51)
def test_rows_50_and_51_create_and_read(registry: Registry, tenant: str) -> None:
    response = registry.request("POST", device_path(tenant, "p17"), {"ext": {"serial": "A-17"}})
    assert response.status == 201
    assert response.json() == {"id": "p17"}
    assert response.headers["Location"] == device_path(tenant, "p17")
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert UUID.fullmatch(response.etag)
    read = registry.request("GET", device_path(tenant, "p17"))
    assert read.status == 200
    assert read.etag == response.etag
    document = read.object
    created = str(get_status(document)["created"])
    assert document == {"enabled": True, "ext": {"serial": "A-17"}, "status": {"created": created}}
    assert SECOND.fullmatch(created)
    assert abs(datetime.fromisoformat(created) - datetime.now(UTC)) < timedelta(minutes=1)


@ROWS.row(52)
def test_row_52_generated_id(registry: Registry, tenant: str) -> None:
    response = registry.request("POST", f"/v1/devices/{tenant}")
    assert response.status == 201
    device = str(response.object["id"])
    assert UUID.fullmatch(device)
    assert response.headers["Location"] == device_path(tenant, device)
    assert get(registry, tenant, device)["enabled"] is True


@ROWS.row(53)
def test_row_53_id_that_exists(registry: Registry, tenant: str) -> None:
    device = registry.create_device(tenant, None, {"ext": {"serial": "A-17"}})
    registry.set_credentials(tenant, device, [{"type": "psk", "auth-id": "s1", "secrets": [{"key": "AAAA"}]}])
    paths = device_path(tenant, device), f"/v1/credentials/{tenant}/{device}"
    before = [registry.request("GET", path) for path in paths]
    assert_error(registry.request("POST", paths[0], {}), 409)
    after = [registry.request("GET", path) for path in paths]
    assert [(one.body, one.etag) for one in after] == [(one.body, one.etag) for one in before]


@ROWS.row(54)
def test_row_54_unknown_tenant(registry: Registry) -> None:
    assert_error(registry.request("POST", device_path(new_id(), "d")), 404)


@pytest.mark.parametrize(("method", "body"), [("GET", None), ("PUT", {})], ids=["get", "put"])
@ROWS.row(55)
def test_unknown_device(registry: Registry, tenant: str, method: str, body: object) -> None:
    assert_error(registry.request(method, device_path(tenant, "none"), body), 404)
    assert_error(registry.request(method, device_path(new_id(), "none"), body), 404)


@ROWS.row(56)
def test_row_56_update_keeps_the_status(registry: Registry, tenant: str) -> None:
    created = registry.request("POST", device_path(tenant, "p17"), {"ext": {"serial": "A"}, "defaults": {"ttl": 1}})
    before = get(registry, tenant, "p17")
    body = {"ext": {"serial": "B"}, "status": {"created": "1999-01-01T00:00:00Z"}, "device-id": "p17"}
    response = registry.request("PUT", device_path(tenant, "p17"), body)
    assert response.status == 204
    assert response.body == b""
    assert response.headers["Content-Type"] is None
    assert response.etag != created.etag
    read = registry.request("GET", device_path(tenant, "p17"))
    assert read.etag == response.etag
    status = get_status(read.object)
    assert set(status) == {"created", "updated"}
    assert status["created"] == get_status(before)["created"]
    assert SECOND.fullmatch(str(status["updated"]))
    assert read.object == {"enabled": True, "ext": {"serial": "B"}, "status": status}


@pytest.mark.parametrize(("method", "body"), [("PUT", {}), ("DELETE", None)], ids=["put", "delete"])
@ROWS.row(57)
def test_change_of_an_old_version(registry: Registry, tenant: str, method: str, body: object) -> None:
    device = registry.create_device(tenant)
    before = registry.request("GET", device_path(tenant, device))
    assert_error(registry.request(method, device_path(tenant, device), body, {"If-Match": "stale"}), 412)
    after = registry.request("GET", device_path(tenant, device))
    assert (after.body, after.etag) == (before.body, before.etag)


@ROWS.row(58)
def test_row_58_delete(registry: Registry, tenant: str) -> None:
    device = registry.create_device(tenant)
    version = registry.request("GET", device_path(tenant, device)).etag
    response = registry.request("DELETE", device_path(tenant, device), headers={"If-Match": version})
    assert (response.status, response.body, response.headers["ETag"]) == (204, b"", None)
    assert_error(registry.request("GET", device_path(tenant, device)), 404)
    assert_error(registry.request("GET", f"/v1/credentials/{tenant}/{device}"), 404)
    assert_error(registry.request("DELETE", device_path(tenant, device), headers={"If-Match": "x"}), 404)


@ROWS.row(59)
def test_row_59_one_gateway_as_a_string(registry: Registry, tenant: str) -> None:
    assert round_trip(registry, tenant, {"via": "gw-1"}) == {"enabled": True, "via": ["gw-1"]}


@pytest.mark.parametrize(
    "document",
    [
        {"via": ["a"], "memberOf": ["g"]},
        {"viaGroups": ["a"], "memberOf": "g"},
        {"via": {"a": 1}},
        {"mapper": "m"},
        {"command-endpoint": {"headers": {"a": "b"}}},
        {"unknown": 1},
    ],
)
@ROWS.row(60)
def test_document_that_breaks_a_rule(registry: Registry, tenant: str, document: object) -> None:
    assert_error(registry.request("POST", device_path(tenant, "d1"), document), 400)
    assert registry.request("GET", device_path(tenant, "d1")).status == 404
    registry.create_device(tenant, "d1")
    assert_error(registry.request("PUT", device_path(tenant, "d1"), document), 400)


ROUND_TRIPS: list[Any] = [
    ROWS.case("61", {"via": ["a"], "viaGroups": ["g"]}, {"via": ["a"], "viaGroups": ["g"]}),
    ROWS.case("62", {"memberOf": ["g"], "via": []}, {"memberOf": ["g"]}),
    ROWS.case(
        "63",
        {"downstream-message-mapper": "m", "authorities": ["auto-provisioning-enabled"]},
        {"downstream-message-mapper": "m", "authorities": ["auto-provisioning-enabled"]},
    ),
    ROWS.case(
        "64",
        {"ext": {"n": 1, "f": 1.5, "z": None, "l": [True]}},
        {"ext": {"n": 1, "f": 1.5, "z": None, "l": [True]}},
    ),
    pytest.param(
        {"command-endpoint": {"uri": "http://{{deviceId}}", "headers": {"n": 1}, "payload-properties": {}}},
        {"command-endpoint": {"uri": "http://{{deviceId}}", "headers": {"n": "1"}}},
        id="command-endpoint",
    ),
]


@pytest.mark.parametrize(("document", "expected"), ROUND_TRIPS)
def test_read_gives_back(registry: Registry, tenant: str, document: object, expected: JsonObject) -> None:
    # As text: 1, 1.0 and true are equal to Python.
    read = json.dumps(round_trip(registry, tenant, document), sort_keys=True)
    assert read == json.dumps({"enabled": True} | expected, sort_keys=True)


@ROWS.row(65)
def test_row_65_device_limit(registry: Registry) -> None:
    tenant = registry.create_tenant(None, {"registration-limits": {"max-devices": 1}})
    registry.create_device(tenant, "d1")
    assert_error(registry.request("POST", device_path(tenant, "d2")), 403)
    # Management 5.7: before the check for an id that exists.
    assert_error(registry.request("POST", device_path(tenant, "d1")), 403)
    assert registry.request("DELETE", device_path(tenant, "d1")).status == 204
    registry.create_device(tenant, "d2")


def test_no_device_at_all(registry: Registry) -> None:
    """Management 4.3: 0 allows none."""
    tenant = registry.create_tenant(None, {"registration-limits": {"max-devices": 0}})
    assert_error(registry.request("POST", device_path(tenant, "d1")), 403)


def test_device_limit_of_the_registry(new_registry: NewRegistry) -> None:
    """Management 5.7: the tenant's own limit goes before the registry's."""
    registry = new_registry({"devices.max_per_tenant": "1"})
    plain = registry.create_tenant(None, {"registration-limits": {"max-credentials-per-device": 1}})
    own = registry.create_tenant(None, {"registration-limits": {"max-devices": 2}})
    for tenant, limit in ((plain, 1), (own, 2)):
        for _ in range(limit):
            registry.create_device(tenant)
        assert_error(registry.request("POST", f"/v1/devices/{tenant}"), 403)


@ROWS.row(66)
def test_row_66_location_is_not_escaped_needlessly(registry: Registry, tenant: str) -> None:
    response = registry.request("POST", device_path(tenant, "urn:dev=1"))
    assert response.status == 201
    assert response.headers["Location"] == device_path(tenant, "urn:dev=1")
    assert registry.request("GET", response.headers["Location"]).status == 200


def test_location_of_ids_with_reserved_characters(new_registry: NewRegistry) -> None:
    """Management 3.7."""
    registry = new_registry({"ids.device_pattern": r"[^\n]+"})
    tenant = registry.create_tenant()
    response = registry.request("POST", device_path(tenant, "a%2Fb%3F%C3%A4%25"))
    assert response.status == 201
    assert response.json() == {"id": "a/b?ä%"}
    assert response.headers["Location"] == device_path(tenant, "a%2Fb%3F%C3%A4%25")
    assert registry.request("GET", response.headers["Location"]).status == 200


@ROWS.row(68)
def test_row_68_what_a_deleted_tenant_leaves_behind(registry: Registry, tenant: str) -> None:
    device = registry.create_device(tenant)
    path = device_path(tenant, device)
    assert registry.request("DELETE", f"/v1/tenants/{tenant}").status == 204
    assert_error(registry.request("GET", path), 404)
    assert_error(registry.request("PUT", path, {}), 404)
    assert_error(registry.request("GET", f"/v1/credentials/{tenant}/{device}"), 404)
    assert_error(registry.request("PUT", f"/v1/credentials/{tenant}/{device}", []), 404)
    assert_error(registry.request("DELETE", path, headers={"If-Match": "x"}), 412)
    assert registry.request("DELETE", path).status == 204
    assert_error(registry.request("DELETE", path), 404)


def test_re_created_device_starts_anew(registry: Registry, tenant: str) -> None:
    """Management 8.4."""
    device = registry.create_device(tenant)
    registry.set_credentials(tenant, device, [{"type": "psk", "auth-id": "s1", "secrets": [{"key": "AAAA"}]}])
    paths = device_path(tenant, device), f"/v1/credentials/{tenant}/{device}"
    before = {registry.request("GET", path).etag for path in paths}
    assert registry.request("DELETE", paths[0]).status == 204
    registry.create_device(tenant, device)
    assert registry.request("GET", paths[1]).json() == []
    assert not before & {registry.request("GET", path).etag for path in paths}


def test_concurrent_creates_of_one_id(registry: Registry, tenant: str) -> None:
    """Management 8.5: one 201, the others 409."""
    with ThreadPoolExecutor(8) as pool:
        for device in ("d1", "d2", "d3"):
            path = device_path(tenant, device)
            statuses = list(pool.map(lambda path: registry.request("POST", path, {}).status, [path] * 8))
            assert sorted(statuses) == [201] + [409] * 7


def test_concurrent_updates_of_one_version(registry: Registry, tenant: str) -> None:
    """Management 3.9: check and modification are atomic."""
    device = registry.create_device(tenant)
    headers = {"If-Match": registry.request("GET", device_path(tenant, device)).etag}

    def update(_: int) -> Any:
        return registry.request("PUT", device_path(tenant, device), {}, headers).status

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(update, range(8))) == [204] + [412] * 7
