"""The examples of provisioning 7.4-7.6 through the real process: names go in and come out over HTTP and AMQP."""

import base64
import json
from collections.abc import Iterator

import pytest
from tests.databases import Databases
from tests.distinguished_names import CA_SPKI, EQUALITY, FROM_DER, FROM_TEXT, REFUSED, certificate_of
from tests.integration.adapter import Adapter
from tests.integration.registry import Registry, new_id

from kamado.x509 import DistinguishedName


@pytest.fixture(scope="module")
def names(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry of this file's own, since no other tenant may have the CAs of the examples."""
    directory = tmp_path_factory.mktemp("names")
    with Registry(directory, url=databases.create(directory / "data")) as running:
        yield running


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def auth_id_after(registry: Registry, credential: dict[str, object]) -> object:
    """Set a credential and return the auth-id that it is read back with."""
    tenant = registry.create_tenant()
    device = registry.create_device(tenant)
    registry.set_credentials(tenant, device, [{"type": "x509-cert", **credential}])
    read = registry.request("GET", f"/v1/credentials/{tenant}/{device}").json()
    assert isinstance(read, list)
    return read[0]["auth-id"]


@pytest.mark.parametrize(("given", "expected"), FROM_TEXT, ids=[f"7.5 from text: {row[0]}" for row in FROM_TEXT])
def test_a_subject_given_as_text_is_stored_in_javas_form(names: Registry, given: str, expected: str) -> None:
    assert auth_id_after(names, {"auth-id": given, "secrets": [{}]}) == expected


@pytest.mark.parametrize(
    ("subject", "expected"), [row[1:] for row in FROM_DER], ids=[f"7.5 from DER: {row[0]}" for row in FROM_DER]
)
def test_a_subject_of_a_certificate_is_stored_in_javas_form(names: Registry, subject: bytes, expected: str) -> None:
    assert auth_id_after(names, {"cert": encode(certificate_of(subject=subject))}) == expected


def anchor(subject: str | bytes) -> dict[str, object]:
    """A trust anchor: by its members if the name is a text, else by a certificate."""
    if isinstance(subject, bytes):
        return {"cert": encode(certificate_of(subject=subject))}
    return {
        "subject-dn": subject,
        "public-key": encode(CA_SPKI),
        "algorithm": "EC",
        "not-before": "2024-01-01T00:00:00Z",
        "not-after": "2044-01-01T00:00:00Z",
    }


@pytest.mark.parametrize("given", REFUSED)
def test_a_trust_anchor_needs_a_name_that_can_be_read(names: Registry, given: str) -> None:
    """7.4, second paragraph."""
    response = names.request("POST", "/v1/tenants", {"trusted-ca": [anchor(given)]})
    assert response.status == 400, response.body


def text_of(name: str | bytes) -> str:
    """What an adapter asks with: the text it makes of a certificate's issuer."""
    return name if isinstance(name, str) else DistinguishedName.from_der(name).text


PAIRS = [pair for first, second, equal in EQUALITY for pair in ((first, second, equal), (second, first, equal))]


@pytest.mark.parametrize(
    ("stored", "asked", "equal"), PAIRS, ids=[f"7.6 {text_of(row[0])} ~ {text_of(row[1])}" for row in PAIRS]
)
def test_a_tenant_is_found_by_an_equal_name(
    names: Registry, stored: str | bytes, asked: str | bytes, equal: bool
) -> None:
    """Whichever of the two names is stored and whichever is asked for."""
    tenant = new_id()
    response = names.request("POST", f"/v1/tenants/{tenant}", {"trusted-ca": [anchor(stored)]})
    assert response.status == 201, response.body
    try:
        with Adapter(names.amqp_port, names.username, names.password) as adapter:
            reply = adapter.request("tenant", "get", body=json.dumps({"subject-dn": text_of(asked)}))
            assert reply.status == (200 if equal else 404)
            if equal:
                assert reply.tenant_id == tenant
                # What is compared is the canonical form, what is handed out the exact one.
                assert [ca["subject-dn"] for ca in reply.json()["trusted-ca"]] == [
                    DistinguishedName.from_text(text_of(stored)).text
                ]
    finally:
        assert names.request("DELETE", f"/v1/tenants/{tenant}").status == 204


@pytest.mark.parametrize("given", ["nonsense", "E=x", "CN=a,", "/O=x/CN=y"])
def test_a_tenant_is_not_looked_for_by_what_is_no_name(names: Registry, given: str) -> None:
    """amqp-apis 9.3, row 4."""
    with Adapter(names.amqp_port, names.username, names.password) as adapter:
        assert adapter.request("tenant", "get", body=json.dumps({"subject-dn": given})).status == 400
