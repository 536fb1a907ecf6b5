"""Conformance of the management API: tenants (management 13.2), and 4 where it has no row."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.databases import Databases
from tests.integration.certificates import Authority
from tests.integration.registry import JsonObject, Registry, Response, new_id
from tests.integration.vectors import CA_CERT, CA_SPKI, CA_SUBJECT, CA_SUBJECT_BYTES
from tests.rows import Section

ROWS = Section("management-api 13.2")

JSON = {"Content-Type": "application/json"}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def registry(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry of this file's own: the CA of the vectors belongs to one tenant at a time."""
    directory = tmp_path_factory.mktemp("tenants")
    with Registry(directory, url=databases.create(directory / "data")) as running:
        yield running


def tenant_path(tenant: str) -> str:
    return f"/v1/tenants/{tenant}"


def get(registry: Registry, tenant: str) -> JsonObject:
    response = registry.request("GET", tenant_path(tenant))
    assert response.status == 200, response.body
    return response.object


def get_anchor(registry: Registry, tenant: str) -> JsonObject:
    """Return the only trust anchor of a tenant."""
    anchors = get(registry, tenant)["trusted-ca"]
    assert isinstance(anchors, list)
    (anchor,) = anchors
    assert isinstance(anchor, dict)
    return anchor


def round_trip(registry: Registry, document: object) -> JsonObject:
    """Create a tenant and return what a read gives back."""
    return get(registry, registry.create_tenant(None, document))


def post(registry: Registry, document: object, tenant: str | None = None) -> Response:
    return registry.request("POST", tenant_path(tenant or new_id()), document)


def put(registry: Registry, tenant: str, document: object, **headers: str) -> Response:
    return registry.request("PUT", tenant_path(tenant), document, {k.replace("_", "-"): v for k, v in headers.items()})


def assert_error(response: Response, status: int) -> None:
    assert response.status == status, (response.status, response.body)
    assert isinstance(response.object["error"], str)


@ROWS.row(16, 17)
def test_rows_16_and_17_create_and_read(registry: Registry) -> None:
    tenant = new_id()
    response = registry.request("POST", tenant_path(tenant))
    assert response.status == 201
    assert response.json() == {"id": tenant}
    assert response.headers["Location"] == tenant_path(tenant)
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert response.headers["Content-Length"] == str(len(response.body))
    assert UUID.fullmatch(response.etag)
    read = registry.request("GET", tenant_path(tenant))
    assert read.status == 200
    assert read.json() == {"enabled": True}
    assert read.headers["Content-Type"] == "application/json; charset=utf-8"
    assert read.etag == response.etag


@ROWS.row(18)
def test_row_18_generated_id(registry: Registry) -> None:
    response = registry.request("POST", "/v1/tenants/")
    assert response.status == 201
    tenant = str(response.object["id"])
    assert UUID.fullmatch(tenant)
    assert response.headers["Location"] == tenant_path(tenant)
    assert get(registry, tenant) == {"enabled": True}


@ROWS.row(19)
def test_row_19_the_path_decides_the_id(registry: Registry) -> None:
    response = registry.request("POST", "/v1/tenants", {"tenant-id": "zzz"})
    assert response.status == 201
    assert UUID.fullmatch(str(response.object["id"]))
    assert registry.request("GET", tenant_path("zzz")).status == 404


@ROWS.row(20)
def test_row_20_id_that_exists(registry: Registry) -> None:
    tenant = registry.create_tenant(None, {"ext": {"a": 1}})
    before = registry.request("GET", tenant_path(tenant))
    assert_error(registry.request("POST", tenant_path(tenant)), 409)
    after = registry.request("GET", tenant_path(tenant))
    assert (after.body, after.etag) == (before.body, before.etag)


@ROWS.row(21)
def test_row_21_unknown(registry: Registry) -> None:
    assert_error(registry.request("GET", tenant_path(new_id())), 404)


@ROWS.row(22, 23, 24)
def test_rows_22_to_24_update_replaces_everything(registry: Registry) -> None:
    tenant = registry.create_tenant()
    old = registry.request("GET", tenant_path(tenant)).etag
    response = put(registry, tenant, {"adapters": [{"type": "hono-mqtt", "enabled": True}]})
    assert response.status == 204
    assert response.body == b""
    assert response.headers["Content-Type"] is None
    assert UUID.fullmatch(response.etag)
    assert response.etag != old
    read = registry.request("GET", tenant_path(tenant))
    assert read.etag == response.etag
    assert read.json() == {
        "enabled": True,
        "adapters": [{"type": "hono-mqtt", "enabled": True, "device-authentication-required": True}],
    }
    assert put(registry, tenant, {"enabled": False}).status == 204
    assert get(registry, tenant) == {"enabled": False}


@ROWS.row(25)
def test_row_25_update_of_an_old_version(registry: Registry) -> None:
    tenant = registry.create_tenant()
    old = registry.request("GET", tenant_path(tenant)).etag
    current = put(registry, tenant, {"enabled": False}).etag
    assert_error(put(registry, tenant, {}, If_Match=old), 412)
    read = registry.request("GET", tenant_path(tenant))
    assert (read.etag, read.json()) == (current, {"enabled": False})


@pytest.mark.parametrize(
    "form",
    [
        ROWS.case("26-bare", "{}"),
        ROWS.case("27-quoted", '"{}"'),
        pytest.param('W/"{}"', id="weak"),
        pytest.param('x, "{}"', id="list-quoted"),
        pytest.param('"x",{},y', id="list-bare"),
        pytest.param("*", id="any"),
        pytest.param("", id="empty"),
        pytest.param(" {} ", id="blanks"),
    ],
)
def test_update_of_the_expected_version(registry: Registry, form: str) -> None:
    """Management 3.9: a new version each time, though nothing changes."""
    tenant = registry.create_tenant()
    current = registry.request("GET", tenant_path(tenant)).etag
    response = put(registry, tenant, {}, If_Match=form.format(current))
    assert response.status == 204
    assert response.etag != current


@pytest.mark.parametrize("form", ['"{}', '{}"', "w/{}", "{}x", '"*"', ",", '""', "W/"])
def test_update_of_what_is_no_version(registry: Registry, form: str) -> None:
    """Management 3.9: anything else is 412."""
    tenant = registry.create_tenant()
    current = registry.request("GET", tenant_path(tenant)).etag
    assert_error(put(registry, tenant, {}, If_Match=form.format(current)), 412)


def test_preconditions_that_are_ignored(registry: Registry) -> None:
    """Management 3.9: If-Match with GET and POST, If-None-Match and dates always."""
    ignored = {"If-None-Match": "*", "If-Unmodified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}
    tenant = new_id()
    assert registry.request("POST", tenant_path(tenant), {}, {"If-Match": "x"} | ignored).status == 201
    assert registry.request("GET", tenant_path(tenant), headers={"If-Match": "x"} | ignored).status == 200
    assert registry.request("PUT", tenant_path(tenant), {}, ignored).status == 204


@pytest.mark.parametrize("version", [ROWS.case("28", "x"), pytest.param("*", id="any")])
def test_update_of_what_is_not_there(registry: Registry, version: str) -> None:
    assert_error(put(registry, new_id(), {}, If_Match=version), 404)


@ROWS.row(29, 30)
def test_rows_29_and_30_delete(registry: Registry) -> None:
    tenant = registry.create_tenant()
    assert_error(registry.request("DELETE", tenant_path(tenant), headers={"If-Match": "wrong"}), 412)
    response = registry.request("DELETE", tenant_path(tenant))
    assert response.status == 204
    assert response.body == b""
    assert response.headers["ETag"] is None
    assert_error(registry.request("DELETE", tenant_path(tenant)), 404)


REFUSED: list[Any] = [
    ROWS.case("31-empty", {"adapters": []}),
    ROWS.case("31-twice", {"adapters": [{"type": "a"}, {"type": "a"}]}),
    ROWS.case("31-no-type", {"adapters": [{"enabled": True}]}),
    ROWS.case("34-size", {"minimum-message-size": -1}),
    ROWS.case("34-boolean", {"enabled": "yes"}),
    ROWS.case("34-unknown", {"colour": "blue"}),
    ROWS.case("34-alias", {"alias": "Line_7"}),
    ROWS.case("34-sampling-mode", {"tracing": {"sampling-mode": "some"}}),
    ROWS.case("34-connections", {"resource-limits": {"max-connections": -2}}),
    ROWS.case("34-no-since", {"resource-limits": {"data-volume": {"max-bytes": 1}}}),
    ROWS.case(
        "34-period",
        {
            "resource-limits": {
                "connection-duration": {"effective-since": "2024-01-01T00:00:00Z", "period": {"mode": "weekly"}}
            }
        },
    ),
    ROWS.case("48-base64", {"trusted-ca": [{"cert": "not base64!"}]}),
    ROWS.case("48-no-placeholder", {"trusted-ca": [{"cert": CA_CERT, "auth-id-template": "dev"}]}),
    ROWS.case("48-placeholder", {"trusted-ca": [{"cert": CA_CERT, "auth-id-template": "{{subject-cn}}-{{serial}}"}]}),
]


@pytest.mark.parametrize("document", REFUSED)
def test_document_that_breaks_a_rule(registry: Registry, document: object) -> None:
    tenant = new_id()
    assert_error(post(registry, document, tenant), 400)
    assert registry.request("GET", tenant_path(tenant)).status == 404
    registry.create_tenant(tenant)
    assert_error(put(registry, tenant, document), 400)
    assert get(registry, tenant) == {"enabled": True}


@ROWS.row(32)
def test_row_32_null_is_absent(registry: Registry) -> None:
    assert round_trip(registry, {"adapters": None, "ext": None}) == {"enabled": True}


@ROWS.row(33)
def test_row_33_further_members_of_an_adapter(registry: Registry) -> None:
    document = round_trip(registry, {"adapters": [{"type": "hono-lora", "slots": 4}]})
    assert document["adapters"] == [
        {"type": "hono-lora", "enabled": False, "device-authentication-required": True, "slots": 4}
    ]


@ROWS.row(35)
def test_row_35_defaults_are_not_emitted(registry: Registry) -> None:
    assert round_trip(registry, {"minimum-message-size": 0, "ext": {}}) == {"enabled": True}


@ROWS.row(36)
def test_row_36_scalars_are_converted(registry: Registry) -> None:
    document = round_trip(registry, {"enabled": "false", "minimum-message-size": "10"})
    assert document == {"enabled": False, "minimum-message-size": 10}


@ROWS.row(37)
def test_row_37_resource_limits(registry: Registry) -> None:
    volume = {"effective-since": "2024-01-01T01:00:00+01:00", "max-bytes": 5000}
    document = round_trip(registry, {"resource-limits": {"max-ttl": 30, "data-volume": volume}})
    assert document["resource-limits"] == {
        "max-ttl": 30,
        "data-volume": {
            "effective-since": "2024-01-01T00:00:00Z",
            "max-bytes": 5000,
            "period": {"mode": "monthly"},
        },
    }


@ROWS.row(38)
def test_row_38_registration_limits(registry: Registry) -> None:
    document = round_trip(registry, {"registration-limits": {"max-devices": 2}})
    assert document["registration-limits"] == {"max-devices": 2, "max-credentials-per-device": -1}


@ROWS.row(39)
def test_row_39_words_in_any_case(registry: Registry) -> None:
    assert round_trip(registry, {"tracing": {"sampling-mode": "ALL"}})["tracing"] == {"sampling-mode": "all"}


@ROWS.row(40)
def test_row_40_alias_is_unique(registry: Registry) -> None:
    alias = new_id("line")
    first = registry.create_tenant(None, {"alias": alias})
    second = new_id()
    assert_error(post(registry, {"alias": alias}, second), 409)
    assert registry.request("GET", tenant_path(second)).status == 404
    # Management 4.7: on update, too; a tenant may keep its own; deleting frees it; an alias is no id.
    registry.create_tenant(second)
    assert_error(put(registry, second, {"alias": alias}), 409)
    assert put(registry, first, {"alias": alias, "enabled": False}).status == 204
    assert registry.request("GET", tenant_path(alias)).status == 404
    assert registry.request("DELETE", tenant_path(first)).status == 204
    assert put(registry, second, {"alias": alias}).status == 204


@pytest.fixture
def trusting(registry: Registry) -> Iterator[str]:
    """A tenant that trusts the CA of the vectors; it is gone at the end, since the CA may have one tenant only."""
    tenant = registry.create_tenant(None, {"trusted-ca": [{"cert": CA_CERT}]})
    yield tenant
    assert registry.request("DELETE", tenant_path(tenant)).status == 204


@ROWS.row(41)
def test_row_41_trust_anchor_from_a_certificate(registry: Registry, trusting: str) -> None:
    anchor = get_anchor(registry, trusting)
    assert UUID.fullmatch(str(anchor.pop("id")))
    assert anchor == {
        "subject-dn": CA_SUBJECT,
        "subject-dn-bytes": CA_SUBJECT_BYTES,
        "public-key": CA_SPKI,
        "algorithm": "EC",
        "not-before": "2024-01-01T00:00:00Z",
        "not-after": "2044-01-01T00:00:00Z",
        "auto-provisioning-enabled": False,
        "auto-provision-as-gateway": False,
    }


@pytest.mark.parametrize("group", [ROWS.case("42", {}), ROWS.case("43", {"trust-anchor-group": "g"})])
def test_trust_anchor_of_another_tenant(registry: Registry, trusting: str, group: JsonObject) -> None:
    response = post(registry, {"trusted-ca": [{"cert": CA_CERT}], **group})
    assert_error(response, 409)
    assert response.object["subject-dn"] == CA_SUBJECT


@ROWS.row(44)
def test_row_44_trust_anchor_of_a_group(registry: Registry, trusting: str) -> None:
    document = {"trusted-ca": [{"cert": CA_CERT}], "trust-anchor-group": "g"}
    other = new_id()
    assert put(registry, trusting, document).status == 204
    assert post(registry, document, other).status == 201
    # Management 3.15: 404, then 409 for the CA, then 412, then 409 for the alias.
    alias = new_id("a")
    registry.create_tenant(None, {"alias": alias})
    clash = {"trusted-ca": [{"cert": CA_CERT}], "alias": alias}
    assert put(registry, new_id(), clash).status == 404
    assert_error(put(registry, other, clash, If_Match="x"), 409)
    assert_error(put(registry, other, document | {"alias": alias}, If_Match="x"), 412)
    assert_error(put(registry, other, document | {"alias": alias}), 409)
    assert registry.request("DELETE", tenant_path(other)).status == 204


@ROWS.row(45)
def test_row_45_two_anchors_of_one_name(registry: Registry, trusting: str) -> None:
    different = [{"cert": CA_CERT, "id": "a"}, {"cert": CA_CERT, "id": "b"}]
    assert put(registry, trusting, {"trusted-ca": different}).status == 204
    equal = [{"cert": CA_CERT, "id": "a"}, {"cert": CA_CERT, "id": "a"}]
    assert_error(put(registry, trusting, {"trusted-ca": equal}), 400)


BY_MEMBERS: JsonObject = {
    "subject-dn": "cn=plant-ca, ou=Line 7, o=Other",
    "public-key": CA_SPKI,
    "algorithm": "EC",
    "not-before": "2024-01-01T00:00:00Z",
    "not-after": "2030-01-01T00:00:00Z",
}


@ROWS.row(46)
def test_row_46_trust_anchor_from_members(registry: Registry) -> None:
    tenant = registry.create_tenant(None, {"trusted-ca": [BY_MEMBERS]})
    anchor = get_anchor(registry, tenant)
    assert anchor["subject-dn"] == "CN=plant-ca,OU=Line 7,O=Other"
    assert "subject-dn-bytes" not in anchor
    assert registry.request("DELETE", tenant_path(tenant)).status == 204


@pytest.mark.parametrize(
    "changes",
    [{"algorithm": None}, {"not-after": None}, {"subject-dn": "nonsense"}, {"ocsp-revocation-enabled": True}],
)
@ROWS.row(47)
def test_trust_anchor_from_wrong_members(registry: Registry, changes: JsonObject) -> None:
    members = {name: value for name, value in (BY_MEMBERS | changes).items() if value is not None}
    assert_error(post(registry, {"trusted-ca": [members]}), 400)


@ROWS.row(49)
def test_row_49_ocsp_with_the_cas_own_certificate(registry: Registry, trusting: str) -> None:
    document = {"trusted-ca": [{"cert": CA_CERT, "ocsp-revocation-enabled": True}]}
    assert put(registry, trusting, document).status == 204
    anchor = get_anchor(registry, trusting)
    assert anchor["ocsp-responder-cert"] == CA_CERT
    assert anchor["ocsp-revocation-enabled"] is True
    assert "cert" not in anchor


def test_a_tenant_can_be_sent_back_as_it_was_read(registry: Registry) -> None:
    ca = Authority.create(f"CN={new_id('ca')},O=Kamado Tests")
    everything = {
        "enabled": False,
        "alias": new_id("a"),
        "ext": {"messaging-type": "kafka", "n": [1, 1.5, None, {"x": "ä"}]},
        "defaults": {"ttl": 45},
        "adapters": [{"type": "hono-http", "enabled": True, "ext": {"max": 1}}],
        "minimum-message-size": 512,
        "resource-limits": {"max-connections": 5, "ext": {"a": 1}},
        "registration-limits": {"max-devices": 10, "max-credentials-per-device": 2},
        "tracing": {"sampling-mode": "none", "sampling-mode-per-auth-id": {"s1": "all"}},
        "trust-anchor-group": "g",
        "trusted-ca": [
            {
                "cert": ca.base64,
                "auto-provisioning-enabled": True,
                "auto-provision-as-gateway": True,
                "auto-provisioning-device-id-template": "dev-{{subject-cn}}",
                "auth-id-template": "{{subject-cn}}",
            }
        ],
    }
    tenant = registry.create_tenant(None, everything)
    read = get(registry, tenant)
    assert {**read, "trusted-ca": None, "adapters": None} == {**everything, "trusted-ca": None, "adapters": None}
    assert put(registry, tenant, read).status == 204
    assert get(registry, tenant) == read


def test_re_created_tenant_starts_empty(registry: Registry) -> None:
    """Management 8.3."""
    tenant = registry.create_tenant()
    device = registry.create_device(tenant)
    registry.set_credentials(tenant, device, [{"type": "psk", "auth-id": "s1", "secrets": [{"key": "AAAA"}]}])
    assert registry.request("DELETE", tenant_path(tenant)).status == 204
    registry.create_tenant(tenant)
    assert registry.request("GET", f"/v1/devices/{tenant}/{device}").status == 404
    other = registry.create_device(tenant)
    registry.set_credentials(tenant, other, [{"type": "psk", "auth-id": "s1", "secrets": [{"key": "AAAA"}]}])
