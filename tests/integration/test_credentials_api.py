"""Credentials API: amqp-apis 14, rows C, and section 11."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture, credentials_request, get_credentials
from tests.integration.adapter import Adapter, Reply
from tests.integration.certificates import Authority
from tests.integration.registry import new_id
from tests.rows import Section

ROWS = Section("amqp-apis 14")


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    yield from acme_fixture(databases, tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def adapter(acme: Acme) -> Iterator[Adapter]:
    with acme.adapter() as adapter:
        yield adapter


PASSWORD = "hashed-password"


def get(adapter: Adapter, body: str | bytes | None, tenant_id: str = "acme", subject: str = "get") -> Reply:
    return adapter.request(f"credentials/{tenant_id}", subject, body=body)


@pytest.mark.parametrize(
    ("type_", "auth_id", "context", "cache_control"),
    [
        ROWS.case("C1", PASSWORD, "sensor1", {}, "max-age = 180"),
        ROWS.case("C2", "psk", "psk1", {}, "no-cache"),
        ROWS.case("C3", "x509-cert", "CN=dev 1,O=Acme", {}, "max-age = 180"),
        ROWS.case("C9", PASSWORD, "mix", {}, "max-age = 180"),
        ROWS.case("C10", PASSWORD, "ctx", {"client-id": "a"}, "max-age = 180"),
        ROWS.case("C12", PASSWORD, "ctx", {"other": "x"}, "max-age = 180"),
        pytest.param(PASSWORD, "ctx", {}, "max-age = 180", id="11.3-no-context"),
        pytest.param(PASSWORD, "ctx", {"client-id": None}, "max-age = 180", id="11.3-null"),
        pytest.param(PASSWORD, "sensor1", {"client-id": "b"}, "max-age = 180", id="11.3-without-ext"),
    ],
)
def test_found(adapter: Adapter, type_: str, auth_id: str, context: dict[str, object], cache_control: str) -> None:
    reply = get_credentials(adapter, auth_id, type_, **context)
    assert reply.status == 200
    assert reply.cache_control == cache_control
    assert reply.tenant_id == "acme"
    payload = reply.json()
    assert payload["device-id"] == "d1"
    assert payload["type"] == type_
    assert payload["auth-id"] == auth_id
    assert payload.get("enabled", True) is True
    secrets = payload["secrets"]
    assert len(secrets) == 1
    if type_ == PASSWORD:
        # bcrypt, made by the registry: the complete hash and no salt (section 11.4)
        assert secrets[0]["hash-function"] == "bcrypt"
        assert secrets[0]["pwd-hash"].startswith("$2a$")
        assert "salt" not in secrets[0]
        assert "pwd-plain" not in secrets[0]
    elif type_ == "psk":
        assert secrets[0]["key"] == "c2VjcmV0"
    else:
        assert secrets == [{}]
    if auth_id == "mix":
        assert secrets[0]["comment"] == "good"


@pytest.mark.parametrize(
    ("type_", "auth_id", "context"),
    [
        ROWS.case("C4", "x509-cert", "CN=dev 1, O=Acme", {}),
        ROWS.case("C5", "psk", "sensor1", {}),
        ROWS.case("C6", PASSWORD, "Sensor1", {}),
        ROWS.case("C7", PASSWORD, "dis", {}),
        ROWS.case("C8", PASSWORD, "old", {}),
        ROWS.case("C11", PASSWORD, "ctx", {"client-id": "b"}),
        pytest.param("own-type", "sensor1", {}, id="11.1-own-type"),
    ],
)
def test_not_found(adapter: Adapter, type_: str, auth_id: str, context: dict[str, object]) -> None:
    reply = get_credentials(adapter, auth_id, type_, **context)
    assert reply.status == 404
    assert reply.body is None
    assert reply.cache_control is None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ROWS.case("C13", '{"auth-id":"sensor1"}', 400),
        ROWS.case("C13-other-type", '{"type":5,"auth-id":"sensor1"}', 400),
        ROWS.case("C14", '{"type":"psk","device-id":"d1"}', 501),
        ROWS.case("C15", '{"type":"psk","auth-id":"psk1","device-id":"d1"}', 400),
        pytest.param('{"type":"psk"}', 400, id="11.2-neither"),
        pytest.param('{"type":"psk","auth-id":5}', 400, id="11.2-auth-id-of-another-type"),
        ROWS.case("C16", None, 400),
        ROWS.case("C17", '{"type":', 400),
        ROWS.case("C17-array", '["psk"]', 400),
        ROWS.case("C17-no-utf8", b'{"type":"\xff"}', 400),
        pytest.param("[" * 50_000, 400, id="17-deep"),
    ],
)
def test_malformed(adapter: Adapter, body: str | bytes | None, status: int) -> None:
    reply = get(adapter, body)
    assert reply.status == status
    assert reply.cache_control is None


@pytest.mark.parametrize("subject", ["add", "update", "remove", "fetch"])
@ROWS.row("C18")
def test_c18_unknown_subject(adapter: Adapter, subject: str) -> None:
    assert get(adapter, credentials_request("sensor1", PASSWORD), subject=subject).status == 400


@ROWS.row("C19")
def test_c19_unknown_tenant(adapter: Adapter) -> None:
    assert get(adapter, credentials_request("sensor1", PASSWORD), "nope").status == 404


@ROWS.row("C20")
def test_c20_disabled_tenant(adapter: Adapter) -> None:
    assert get(adapter, credentials_request("sensor1", PASSWORD), "off").status == 200


@ROWS.row("C21", "C22")
def test_c21_c22_first_contact(acme: Acme, adapter: Adapter) -> None:
    name, certificate = acme.new_device()
    first = get_credentials(adapter, name, client_certificate=certificate.base64)
    assert first.status == 201
    assert first.cache_control in {None, "no-cache"}
    assert first.tenant_id == "acme"
    payload = first.json()
    assert payload["type"] == "x509-cert"
    assert payload["auth-id"] == name
    assert payload["secrets"] == [{}]
    # C22: again
    second = get_credentials(adapter, name, client_certificate=certificate.base64)
    assert second.status == 200
    assert second.cache_control == "max-age = 180"
    assert second.json() == payload
    # The device exists, for operators as for adapters.
    device_id = payload["device-id"]
    assert acme.registry.request("GET", f"/v1/devices/acme/{device_id}").status == 200
    assert adapter.request("registration/acme", "assert", properties={"device_id": device_id}).status == 200


def test_first_contacts_at_once_make_one_device(acme: Acme, adapter: Adapter) -> None:
    """README of the specification, first-contact race: the loser reads again and answers 200."""
    name, certificate = acme.new_device()
    sender, receiver = adapter.links("credentials/acme")
    for number in range(20):
        message = adapter.message(
            "get",
            reply_to=receiver.source.address,
            body=credentials_request(name, client_certificate=certificate.base64),
            message_id=f"m{number}",
        )
        sender.delivery(f"{number}")
        sender.stream(message.encode())
        sender.advance()
    replies = [adapter.await_reply(f"m{number}") for number in range(20)]
    assert sorted(reply.status or 0 for reply in replies) == [200] * 19 + [201]
    assert len({reply.json()["device-id"] for reply in replies}) == 1


def lying_certificate(acme: Acme) -> tuple[str, str]:
    """A certificate that names the trusted issuer but was signed by somebody else."""
    name = f"CN={new_id('liar')},O=Acme"
    return name, Authority.create("CN=Device CA,OU=Plant 7,O=Acme").issue(name).base64


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ROWS.case("C23", "unknown issuer", 404),
        ROWS.case("C24", "unreadable", 400),
        ROWS.case("C24-number", "not a string", 400),
        ROWS.case("C25", "other subject", 400),
        ROWS.case("C26", "does not provision", 404),
        pytest.param("wrong signature", 404, id="provisioning-3.2-signature"),
    ],
)
def test_first_contact_refused(acme: Acme, adapter: Adapter, row: str, status: int) -> None:
    name, issued = acme.new_device()
    certificate: Any = issued.base64
    if row == "unknown issuer":
        certificate = Authority.create("CN=Nobody,O=Acme").issue(name).base64
    elif row == "unreadable":
        certificate = "!!!"
    elif row == "not a string":
        certificate = 5
    elif row == "other subject":
        certificate = acme.new_device()[1].base64
    elif row == "does not provision":
        certificate = acme.passive_ca.issue(name).base64
    elif row == "wrong signature":
        name, certificate = lying_certificate(acme)
    reply = get_credentials(adapter, name, client_certificate=certificate)
    assert reply.status == status
    assert reply.cache_control is None
    # Nothing was made.
    assert get_credentials(adapter, name).status == 404


def test_rights(acme: Acme) -> None:
    """Section 11.1: `E` on `credentials/T:get`."""
    with acme.adapter("links-only") as adapter:
        reply = get_credentials(adapter, "sensor1", PASSWORD)
        assert reply.status == 403
        assert reply.body is None


def test_validity_in_payloads_has_an_offset_clients_can_read(acme: Acme, adapter: Adapter) -> None:
    """Section 11.4: UTC with Z; anything else is silently ignored by clients."""
    tenant_id = acme.registry.create_tenant()
    acme.registry.create_device(tenant_id, "d", {})
    acme.registry.set_credentials(
        tenant_id,
        "d",
        [
            {
                "type": PASSWORD,
                "auth-id": "a",
                "secrets": [
                    {
                        "pwd-hash": "t3njm9sDi5Kokp1zOn2YGsC7KYGk21S+CHGEkhvM5O4=",
                        "salt": "ABEiM0RVZnc=",
                        "hash-function": "sha-256",
                        "not-before": "2020-01-01T00:00:00+01:00",
                        "not-after": "2091-01-01T00:00:00+01:00",
                    }
                ],
            }
        ],
    )
    [secret] = get(adapter, json.dumps({"type": PASSWORD, "auth-id": "a"}), tenant_id).json()["secrets"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", secret["not-before"])
    assert secret["not-before"] == "2019-12-31T23:00:00Z"
    assert secret["not-after"] == "2090-12-31T23:00:00Z"
    assert secret["hash-function"] == "sha-256"
    assert secret["salt"] == "ABEiM0RVZnc="
    assert secret["pwd-hash"] == "t3njm9sDi5Kokp1zOn2YGsC7KYGk21S+CHGEkhvM5O4="
