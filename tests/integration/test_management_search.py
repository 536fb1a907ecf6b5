"""Conformance of the management API: search (management 13.5), deleting all devices, and 7 to 9 beyond the rows."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from tests.integration.conftest import NewRegistry
from tests.integration.registry import JsonObject, Registry, Response
from tests.rows import Section

ROWS = Section("management-api 13.5")

DEVICES: dict[str, JsonObject] = {
    "a1": {"ext": {"brand": "alpha", "n": 1}},
    "a2": {"ext": {"brand": "alps", "n": 2}, "via": ["gw"]},
    "gw": {"enabled": False},
    "m1": {"memberOf": ["g"]},
}


@pytest.fixture(scope="module")
def t1(registry: Registry) -> str:
    """The tenant of 13.5."""
    tenant = registry.create_tenant()
    for device, document in DEVICES.items():
        registry.create_device(tenant, device, document)
    return tenant


def search(registry: Registry, tenant: str, query: str = "") -> Response:
    return registry.request("GET", f"/v1/devices/{tenant}{query and '?' + query}")


def by(field: str, value: object, **more: object) -> str:
    """Write a filter as a parameter."""
    return urlencode({"filterJson": json.dumps({"field": field, "value": value, **more})})


def sort(field: str, direction: str | None = None) -> str:
    return urlencode({"sortJson": json.dumps({"field": field} | ({"direction": direction} if direction else {}))})


def found(response: Response) -> tuple[object, list[Any]]:
    assert response.status == 200, (response.status, response.body)
    result = response.object["result"]
    assert isinstance(result, list)
    return response.object["total"], [element["id"] for element in result]


def assert_error(response: Response, status: int, *words: str) -> None:
    assert response.status == status, (response.status, response.body)
    error = response.object["error"]
    assert isinstance(error, str)
    for word in words:
        assert word in error


@ROWS.row(113)
def test_without_parameters(registry: Registry, t1: str) -> None:
    response = search(registry, t1)
    assert found(response) == (4, ["a1", "a2", "gw", "m1"])
    assert "ETag" not in response.headers
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    result = response.object["result"]
    assert isinstance(result, list)
    for element in result:
        assert set(element) >= {"id", "enabled", "status"}
        read = registry.request("GET", f"/v1/devices/{t1}/{element['id']}").object
        assert element == {"id": element["id"], **read}


@pytest.mark.parametrize(
    ("query", "total", "ids"),
    [
        ROWS.case("114", "pageSize=2&pageOffset=2", 4, ["gw", "m1"]),
        ROWS.case("115", "pageSize=2&pageOffset=10", 4, []),
        ROWS.case("116", "pageSize=0", 4, []),
        ROWS.case("118", by("/ext/brand", "al*"), 2, ["a1", "a2"]),
        ROWS.case("119", by("/ext/brand", "alp?"), 1, ["a2"]),
        ROWS.case("121", by("/enabled", True), 3, ["a1", "a2", "m1"]),
        ROWS.case("122", by("/ext/n", 2.0), 1, ["a2"]),
        ROWS.case("124", by("/ext/brand", "al*") + "&" + by("/ext/n", 1), 1, ["a1"]),
        ROWS.case("125", by("/via", "gw"), 1, ["a2"]),
        ROWS.case("126", by("/id", "?1"), 2, ["a1", "m1"]),
        ROWS.case("129", sort("/ext/n", "desc"), 4, ["a2", "a1", "gw", "m1"]),
        ROWS.case("131", "isGateway=true", 2, ["gw", "m1"]),
        ROWS.case("132", "isGateway=false", 2, ["a1", "a2"]),
    ],
)
def test_found(registry: Registry, t1: str, query: str, total: int, ids: list[str]) -> None:
    assert found(search(registry, t1, query)) == (total, ids)


@pytest.mark.parametrize(
    "query",
    [
        ROWS.case("120", by("/ext/brand", "AL*")),
        ROWS.case("123", by("/ext/n", "2")),
    ],
)
def test_no_match(registry: Registry, t1: str, query: str) -> None:
    assert_error(search(registry, t1, query), 404)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ROWS.case("117-size-too-large", "pageSize=201", "pageSize"),
        ROWS.case("117-size-text", "pageSize=x", "pageSize"),
        ROWS.case("117-offset-negative", "pageOffset=-1", "pageOffset"),
        ROWS.case("127", by("brand", "x"), "filterJson"),
        ROWS.case("128-no-value", urlencode({"filterJson": '{"field":"/ext/brand"}'}), "filterJson"),
        ROWS.case("128-operator", by("/a", 1, op="gt"), "filterJson"),
        ROWS.case("128-bad-json", urlencode({"filterJson": "{"}), "filterJson"),
        ROWS.case("130", sort("/id", "up"), "sortJson"),
    ],
)
def test_wrong_parameters(registry: Registry, t1: str, query: str, parameter: str) -> None:
    assert_error(search(registry, t1, query), 400, parameter)
    # What is visible in the request alone goes before what is not (management 3.15).
    assert_error(search(registry, "none", query), 400, parameter)


@ROWS.row(133)
def test_unknown_tenant(registry: Registry) -> None:
    assert_error(search(registry, "none"), 404)


@pytest.mark.parametrize("tenant", ["a%20b", "%F2%B5%83%91%26", "a%2Fb", "%00", "x" * 300])
def test_a_tenant_id_that_cannot_be_is_just_not_there(registry: Registry, tenant: str) -> None:
    # management-api 3.2: the exception of the pattern
    assert_error(search(registry, tenant), 404)


@ROWS.row(134)
def test_an_empty_registry(new_registry: NewRegistry) -> None:
    registry = new_registry()
    assert_error(registry.request("GET", "/v1/tenants"), 404)


@ROWS.row(135)
def test_tenants(new_registry: NewRegistry) -> None:
    registry = new_registry()
    for tenant, plant in (("a", "north"), ("b", "nord"), ("c", "south")):
        registry.create_tenant(tenant, {"ext": {"plant": plant}})
    response = registry.request("GET", f"/v1/tenants?{by('/ext/plant', 'n*')}&{sort('/id', 'desc')}")
    assert found(response) == (2, ["b", "a"])
    assert response.object["result"] == [
        {"id": "b", "enabled": True, "ext": {"plant": "nord"}},
        {"id": "a", "enabled": True, "ext": {"plant": "north"}},
    ]
    assert found(registry.request("GET", "/v1/tenants?isGateway=true&pageSize=1&pageOffset=1")) == (3, ["b"])


# Beyond the rows (management 7)


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("pageSize=1&pageSize=x", ["a1"]),
        ("isGateway=", ["a1", "a2", "gw", "m1"]),
        ("isGateway=TRUE", ["gw", "m1"]),
        ("isGateway=nonsense", ["a1", "a2"]),
        ("isGateway=true&" + by("/enabled", True), ["m1"]),
        ("isGateway=false&" + by("/ext/brand", "alp*"), ["a1", "a2"]),
        ("unknown=1", ["a1", "a2", "gw", "m1"]),
        (by("/status/created", "20??-*"), ["a1", "a2", "gw", "m1"]),
        (by("/via/0", "gw"), ["a2"]),
        (sort("/enabled", "asc") + "&" + sort("/id", "desc"), ["gw", "m1", "a2", "a1"]),
        (sort("/id", "desc") + "&pageSize=2&pageOffset=1", ["gw", "a2"]),
        # 3.6: constants in any case, null for left out
        (sort("/id", "DESC") + "&" + by("/id", "a*", op="Eq"), ["a2", "a1"]),
        (urlencode({"sortJson": '{"field":"/id","direction":null}'}) + "&pageSize=1", ["a1"]),
        ("after=a2", ["gw", "m1"]),
        ("after=a2&pageSize=1&" + by("/enabled", True), ["m1"]),
        ("after=zz", []),
        ("filterJson=%7B%22field%22:%22/ext/brand%22,+%22value%22:%22alpha%22%7D", ["a1"]),
    ],
)
def test_parameters(registry: Registry, t1: str, query: str, ids: list[str]) -> None:
    assert found(search(registry, t1, query))[1] == ids


@pytest.mark.parametrize("query", ["pageSize=%zz", "filterJson=%ff", "&".join(f"a{n}=1" for n in range(101))])
def test_a_query_that_cannot_be_read(registry: Registry, t1: str, query: str) -> None:
    assert_error(search(registry, t1, query), 400, "query")


def test_head_answers_as_get_without_the_body(registry: Registry, t1: str) -> None:
    response = registry.request("HEAD", f"/v1/devices/{t1}")
    assert (response.status, response.body) == (200, b"")


def test_settings_of_searching(new_registry: NewRegistry) -> None:
    """Management 7.1 and 9: pages instead of items, and an empty result instead of 404."""
    registry = new_registry({"search.page_offset_unit": "pages", "search.empty_result": "200"})
    tenant = registry.create_tenant()
    assert found(search(registry, tenant)) == (0, [])
    for number in range(5):
        registry.create_device(tenant, f"d{number}", {})
    assert found(search(registry, tenant, "pageSize=2&pageOffset=1")) == (5, ["d2", "d3"])
    assert found(search(registry, tenant, by("/id", "x"))) == (0, [])
    assert_error(search(registry, "none"), 404)


# Deleting all devices (management 5.6, 8.2, 8.3)

DEVICE_ROWS = Section("management-api 13.3")


def credentials(registry: Registry, tenant: str, device: str) -> str:
    return f"/v1/credentials/{tenant}/{device}"


@DEVICE_ROWS.row(67)
def test_all_devices_of_a_tenant_are_deleted(registry: Registry) -> None:
    tenant, other = registry.create_tenant(), registry.create_tenant()
    for each in (tenant, other):
        for number in range(3):
            registry.create_device(each, f"d{number}", {})
        secret = [{"type": "psk", "auth-id": "a", "secrets": [{"key": "AAAA"}]}]
        assert registry.request("PUT", credentials(registry, each, "d1"), secret).status == 204
    for path in (tenant, tenant, "never-existed"):
        response = registry.request("DELETE", f"/v1/devices/{path}")
        assert (response.status, response.body) == (204, b"")
    assert_error(registry.request("GET", f"/v1/devices/{tenant}/d1"), 404)
    assert_error(registry.request("GET", credentials(registry, tenant, "d1")), 404)
    assert_error(search(registry, tenant), 404)
    assert found(search(registry, other))[0] == 3
    assert registry.request("GET", credentials(registry, other, "d1")).status == 200
    # The pair of type and auth-id is free again.
    registry.create_device(tenant, "new", {})
    secret = [{"type": "psk", "auth-id": "a", "secrets": [{"key": "AAAA"}]}]
    assert registry.request("PUT", credentials(registry, tenant, "new"), secret).status == 204


def test_left_overs_of_a_deleted_tenant(registry: Registry) -> None:
    """Management 8.3: out of reach at once, deleted one by one or all at once, and never there again."""
    tenant = registry.create_tenant()
    for number in range(3):
        registry.create_device(tenant, f"d{number}", {})
    assert registry.request("DELETE", f"/v1/tenants/{tenant}").status == 204
    for path in (f"/v1/devices/{tenant}", f"/v1/devices/{tenant}/d1", credentials(registry, tenant, "d1")):
        assert_error(registry.request("GET", path), 404)
    assert registry.request("DELETE", f"/v1/devices/{tenant}/d0").status == 204
    assert_error(registry.request("DELETE", f"/v1/devices/{tenant}/d0"), 404)
    registry.create_tenant(tenant)
    assert_error(search(registry, tenant), 404)
    assert_error(registry.request("DELETE", f"/v1/devices/{tenant}/d1"), 404)


def test_many_left_overs_are_gone_when_the_tenant_is_created_again(registry: Registry) -> None:
    tenant = registry.create_tenant()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: registry.create_device(tenant, f"d{number}", {}), range(2500)))
    assert found(search(registry, tenant, "pageSize=1&pageOffset=2499"))[0] == 2500
    assert registry.request("DELETE", f"/v1/tenants/{tenant}").status == 204
    # One that cannot be created changes nothing.
    alias = registry.create_tenant(None, {"alias": "taken-by-another"})
    assert_error(registry.request("POST", f"/v1/tenants/{tenant}", {"alias": "taken-by-another"}), 409)
    assert registry.request("DELETE", f"/v1/devices/{tenant}/d7").status == 204
    assert registry.request("DELETE", f"/v1/tenants/{alias}").status == 204
    registry.create_tenant(tenant)
    assert_error(search(registry, tenant), 404)
    registry.create_device(tenant, "d7", {})
    assert found(search(registry, tenant)) == (1, ["d7"])


def test_delete_all_beside_writes(registry: Registry) -> None:
    """What is created after the request has come stays; other writes go on meanwhile."""
    tenant = registry.create_tenant()
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda number: registry.create_device(tenant, f"d{number:04}", {"ext": {"n": number}}), range(3000)
            )
        )
        deletion = pool.submit(registry.request, "DELETE", f"/v1/devices/{tenant}")
        other = registry.create_tenant()
        while not deletion.done():
            registry.create_device(other, None, {})
        assert deletion.result().status == 204
    assert_error(search(registry, tenant), 404)
    assert found(search(registry, other))[1]


def test_killed_in_the_middle_of_delete_all(new_registry: NewRegistry) -> None:
    """Either done or repeatable: whole devices are left, and the second time they are gone."""
    registry = new_registry()
    tenant = registry.create_tenant()
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda number: registry.create_device(tenant, f"d{number:04}", {"ext": {"n": number % 7}}), range(6000)
            )
        )
        deletion = pool.submit(registry.request, "DELETE", f"/v1/devices/{tenant}")
        while found(search(registry, tenant, "pageSize=0"))[0] == 6000:
            pass
        registry.kill()
        with pytest.raises(OSError):
            deletion.result()
    registry.start()
    total, _ = found(search(registry, tenant, "pageSize=0"))
    assert isinstance(total, int)
    assert 0 < total < 6000
    assert sum(int(str(found(search(registry, tenant, by("/ext/n", n)))[0])) for n in range(7)) == total
    assert registry.request("DELETE", f"/v1/devices/{tenant}").status == 204
    assert_error(search(registry, tenant), 404)


# Referential integrity (management 8.1) and what is closed to changes (management 9)


@DEVICE_ROWS.row(54)
def test_lenient_integrity(new_registry: NewRegistry) -> None:
    secret = [{"type": "psk", "auth-id": "a", "secrets": [{"key": "AAAA"}]}]
    registry = new_registry({"management.referential_integrity": "lenient"})
    # Devices without a tenant.
    assert registry.request("POST", "/v1/devices/none/d").status == 201
    assert registry.request("GET", "/v1/devices/none/d").status == 200
    assert registry.request("PUT", "/v1/devices/none/d", {"enabled": False}).status == 204
    assert found(search(registry, "none")) == (1, ["d"])
    # Credentials without a device, which keep them when it comes.
    path = "/v1/credentials/none/early"
    assert_error(registry.request("GET", path), 404)
    assert registry.request("PUT", path, secret).status == 204
    etag = registry.request("GET", path).etag
    assert_error(registry.request("GET", "/v1/devices/none/early"), 404)
    assert registry.request("POST", "/v1/devices/none/early").status == 201
    kept = registry.request("GET", path)
    assert kept.etag == etag
    entry = json.loads(kept.body)[0]
    assert (entry["type"], entry["auth-id"]) == ("psk", "a")
    # The pair is taken, whether the device exists or not.
    assert_error(registry.request("PUT", "/v1/credentials/none/other", secret), 409)
    # Nothing is purged when a tenant is created again.
    registry.create_tenant("none")
    assert registry.request("DELETE", "/v1/tenants/none").status == 204
    registry.create_tenant("none")
    assert found(search(registry, "none")) == (2, ["d", "early"])
    assert registry.request("PUT", "/v1/credentials/none/late", []).status == 204
    assert registry.request("DELETE", "/v1/devices/none").status == 204
    for device in ("early", "late"):
        assert_error(registry.request("GET", f"/v1/credentials/none/{device}"), 404)


def test_strict_again_after_lenient(new_registry: NewRegistry) -> None:
    """Credentials that came before their device are not there for a strict registry."""
    registry = new_registry({"management.referential_integrity": "lenient"})
    tenant = registry.create_tenant()
    assert registry.request("PUT", f"/v1/credentials/{tenant}/early", []).status == 204
    registry.settings["management.referential_integrity"] = "strict"
    registry.restart()
    assert_error(registry.request("GET", f"/v1/credentials/{tenant}/early"), 404)
    assert_error(registry.request("PUT", f"/v1/credentials/{tenant}/early", []), 404)
    assert_error(registry.request("POST", "/v1/devices/none/d"), 404)


def test_closed_to_modification(new_registry: NewRegistry) -> None:
    """`modificationEnabled` of Hono 1.2: what exists cannot be updated or deleted, but something new created."""
    switches = {f"{resource}.modification_enabled": "false" for resource in ("tenants", "devices", "credentials")}
    registry = new_registry(switches)
    tenant = registry.create_tenant()
    registry.create_device(tenant, "d", {})
    for method, path, body in (
        ("PUT", f"/v1/tenants/{tenant}", {}),
        ("DELETE", f"/v1/tenants/{tenant}", None),
        ("PUT", f"/v1/devices/{tenant}/d", {}),
        ("DELETE", f"/v1/devices/{tenant}/d", None),
        ("DELETE", f"/v1/devices/{tenant}", None),
        ("PUT", f"/v1/credentials/{tenant}/d", []),
    ):
        assert_error(registry.request(method, path, body), 403, "modification_enabled")
        assert_error(registry.request(method, path.replace(tenant, quote("no/id", safe="")), body), 400)
    assert found(search(registry, tenant)) == (1, ["d"])


def test_read_only(new_registry: NewRegistry) -> None:
    registry = new_registry({"management.read_only": "true"})
    assert_error(registry.request("POST", "/v1/tenants/t"), 403, "read_only")
    assert_error(registry.request("POST", "/v1/devices/t/d"), 403, "read_only")
    assert_error(registry.request("DELETE", "/v1/devices/t"), 403, "read_only")
    assert_error(registry.request("GET", "/v1/tenants/t"), 404)
