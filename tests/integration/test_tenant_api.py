"""Tenant API: amqp-apis 14, rows T, and section 9."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture
from tests.integration.adapter import Adapter, Reply
from tests.integration.certificates import Authority
from tests.integration.registry import new_id
from tests.rows import Section

ROWS = Section("amqp-apis 14")


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    yield from acme_fixture(databases, tmp_path_factory.mktemp("tenants"))


@pytest.fixture(scope="module")
def adapter(acme: Acme) -> Iterator[Adapter]:
    with acme.adapter() as adapter:
        yield adapter


def get(adapter: Adapter, body: str | None = None, *, subject: str = "get", **properties: Any) -> Reply:
    return adapter.request("tenant", subject, body=body, properties=properties or None)


def by(**members: object) -> str:
    return json.dumps({name.replace("_", "-"): value for name, value in members.items()})


DN = "CN=Device CA,OU=Plant 7,O=Acme"


@pytest.mark.parametrize(
    ("body", "properties", "tenant_id", "reply_tenant_id"),
    [
        ROWS.case("T1", by(tenant_id="acme"), {}, "acme", "acme"),
        ROWS.case("T2", by(tenant_id="plant7"), {}, "acme", "plant7"),
        ROWS.case("T3", by(tenant_id="off"), {}, "off", "off"),
        ROWS.case("T5", None, {"tenant_id": "acme"}, "acme", "acme"),
        ROWS.case("T5-alias", None, {"tenant_id": "plant7"}, "acme", "plant7"),
        ROWS.case("T6", by(tenant_id="nope"), {"tenant_id": "acme"}, "acme", "acme"),
        ROWS.case("T6-broken-body", '{"tenant-id":', {"tenant_id": "acme"}, "acme", "acme"),
        ROWS.case("T7", by(subject_dn=DN), {}, "acme", "acme"),
        ROWS.case("T8", by(subject_dn="cn=device ca, ou=plant 7, o=ACME"), {}, "acme", "acme"),
        ROWS.case("T12", by(tenant_id="acme", subject_dn="CN=Shared,O=Acme"), {}, "acme", "acme"),
        pytest.param(by(tenant_id=5, subject_dn=DN), {}, "acme", "acme", id="9.1-tenant-id-of-another-type"),
        pytest.param(by(tenant_id="acme"), {"tenant_id": 5}, "acme", "acme", id="6-property-of-another-type"),
        pytest.param(by(tenant_id="acme", unknown=[1]), {}, "acme", "acme", id="9.1-unknown-member"),
    ],
)
def test_found(
    adapter: Adapter, body: str | None, properties: dict[str, Any], tenant_id: str, reply_tenant_id: str
) -> None:
    reply = get(adapter, body, **properties)
    assert reply.status == 200
    assert reply.cache_control == "max-age = 180"
    assert reply.tenant_id == reply_tenant_id
    payload = reply.json()
    assert payload["tenant-id"] == tenant_id
    assert payload["enabled"] is (tenant_id != "off")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ROWS.case("T4", by(tenant_id="nope"), 404),
        pytest.param(by(tenant_id="Acme"), 404, id="9.3-case"),
        ROWS.case("T9", by(subject_dn="O=Acme,OU=Plant 7,CN=Device CA"), 404),
        ROWS.case("T10", by(subject_dn="not a dn"), 400),
        ROWS.case("T11", by(subject_dn="CN=Shared,O=Acme"), 404),
        ROWS.case("T13", "{}", 400),
        ROWS.case("T14", None, 400),
        ROWS.case("T15", '{"tenant-id":', 400),
        ROWS.case("T16", '["acme"]', 400),
        ROWS.case("T17", '{"tenant-id":5}', 400),
        ROWS.case("T17-null", '{"tenant-id":null}', 400),
        pytest.param('{"tenant-id":NaN}', 400, id="17-NaN"),
        pytest.param('{"tenant-id":"acme"} x', 400, id="17-trailing"),
        pytest.param("[" * 50_000, 400, id="17-deep"),
        pytest.param('{"x":' * 20_000, 400, id="17-deep-objects"),
    ],
)
def test_not_found(adapter: Adapter, body: str | None, status: int) -> None:
    reply = get(adapter, body)
    assert reply.status == status
    assert reply.cache_control is None
    if status == 404:
        assert reply.body is None
    assert reply.tenant_id is None or "subject-dn" not in str(body)


@pytest.mark.parametrize("subject", ["fetch", "GET", "add"])
@ROWS.row("T18")
def test_t18_unknown_subject(adapter: Adapter, subject: str) -> None:
    assert get(adapter, by(tenant_id="acme"), subject=subject).status == 400


@ROWS.row("T19")
def test_t19_caller_may_see_another_tenant_only(acme: Acme) -> None:
    with acme.adapter("other-tenant") as adapter:
        for reply in (
            get(adapter, by(tenant_id="acme")),
            get(adapter, by(subject_dn=DN)),
            get(adapter, tenant_id="acme"),
            # The right is checked on the id that was asked for, which is the alias (section 9.2).
            get(adapter, by(tenant_id="plant7")),
        ):
            assert reply.status == 403
            assert reply.body is None
            assert reply.cache_control is None
        assert get(adapter, by(tenant_id="other")).status == 200
        assert get(adapter, tenant_id="other").status == 200


@ROWS.row("T20")
def test_t20_unknown_tenant_is_told_without_a_check(acme: Acme) -> None:
    with acme.adapter("other-tenant") as adapter:
        assert get(adapter, by(tenant_id="nope")).status == 404
        # The old variant: the right is checked before the look-up (section 9.2).
        assert get(adapter, tenant_id="nope").status == 403


@pytest.mark.parametrize("user", ["everything", "all-tenants-bare"])
def test_grants_that_cover_every_tenant(acme: Acme, user: str) -> None:
    """Section 9.2."""
    with acme.adapter(user) as adapter:
        assert get(adapter, by(tenant_id="acme")).status == 200
        assert get(adapter, tenant_id="off").status == 200


def test_payload(acme: Acme, adapter: Adapter) -> None:
    """Section 9.4: what is in it, what never is."""
    authority = Authority.create(f"CN={uuid.uuid4()},O=Payload")
    tenant_id = new_id()
    acme.registry.create_tenant(
        tenant_id,
        {
            "alias": new_id("alias"),
            "trust-anchor-group": "payload",
            "defaults": {"ttl": 3600},
            "minimum-message-size": 4096,
            "adapters": [{"type": "hono-mqtt", "enabled": True, "ext": {"max-ttd": 60}}],
            "resource-limits": {"max-connections": 5000},
            "registration-limits": {"max-devices": 10},
            "tracing": {"sampling-mode": "all"},
            "trusted-ca": [authority.trust_anchor(id="ca-1", auto_provision_as_gateway=True)],
            "ext": {"messaging-type": "amqp"},
        },
    )
    payload = get(adapter, by(tenant_id=tenant_id)).json()
    anchors = payload.pop("trusted-ca")
    assert payload == {
        "tenant-id": tenant_id,
        "enabled": True,
        "defaults": {"ttl": 3600},
        "minimum-message-size": 4096,
        "adapters": [
            {
                "type": "hono-mqtt",
                "enabled": True,
                "device-authentication-required": True,
                "ext": {"max-ttd": 60},
            }
        ],
        "resource-limits": {"max-connections": 5000},
        "tracing": {"sampling-mode": "all"},
        "ext": {"messaging-type": "amqp"},
    }
    [anchor] = anchors
    assert anchor["id"] == "ca-1"
    assert anchor["subject-dn"] == authority.certificate.subject.rfc4514_string()
    assert anchor["algorithm"] == "EC"
    assert anchor["auto-provisioning-enabled"] is False
    assert set(anchor) == {
        "id",
        "subject-dn",
        "subject-dn-bytes",
        "public-key",
        "algorithm",
        "auto-provisioning-enabled",
    }


def test_changes_are_seen_at_once(acme: Acme, adapter: Adapter) -> None:
    tenant_id = acme.registry.create_tenant()
    assert get(adapter, by(tenant_id=tenant_id)).json()["enabled"] is True
    assert acme.registry.request("PUT", f"/v1/tenants/{tenant_id}", {"enabled": False}).status == 204
    assert get(adapter, by(tenant_id=tenant_id)).json()["enabled"] is False
    assert acme.registry.request("DELETE", f"/v1/tenants/{tenant_id}").status == 204
    assert get(adapter, by(tenant_id=tenant_id)).status == 404
