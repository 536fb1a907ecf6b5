"""Conformance of the management API: credentials (management 13.4), and 6 where it has no row.

What a read does not show, the hash of a password above all, is seen as an adapter sees it: over AMQP.
"""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import bcrypt
import pytest
from tests.databases import Databases
from tests.integration.adapter import Adapter
from tests.integration.conftest import NewRegistry
from tests.integration.registry import JsonObject, Registry, Response, new_id
from tests.integration.vectors import (
    BCRYPT_10,
    BCRYPT_11,
    CA_CERT,
    DEV_CERT,
    DEV_SPKI,
    DEV_SUBJECT,
    PASSWORD,
    PSK_KEY,
    SALT,
    SHA_256_SALTED,
    SHA_512_SALTED,
)
from tests.rows import Section

ROWS = Section("management-api 13.4")

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def registry(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry of this file's own: the CA of the vectors belongs to one tenant at a time."""
    directory = tmp_path_factory.mktemp("credentials")
    with Registry(
        directory, {"credentials.bcrypt_max_cost": "10"}, url=databases.create(directory / "data")
    ) as running:
        yield running


class Device(NamedTuple):
    """A device whose credentials a test sets."""

    registry: Registry
    tenant: str
    device: str

    @property
    def path(self) -> str:
        return f"/v1/credentials/{self.tenant}/{self.device}"

    def put(self, body: object, **headers: str) -> Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.registry.request("PUT", self.path, body, sent)

    def set(self, *credentials: object) -> str:
        """Set credentials and return the new version."""
        response = self.put(list(credentials))
        assert response.status == 204, response.body
        assert response.body == b""
        return response.etag

    def read(self) -> Response:
        response = self.registry.request("GET", self.path)
        assert response.status == 200, response.body
        return response

    def get(self) -> list[JsonObject]:
        return self.read().array

    def secrets(self) -> list[Any]:
        """The secrets of the only credential."""
        (credential,) = self.get()
        secrets = credential["secrets"]
        assert isinstance(secrets, list)
        return secrets

    def secret(self) -> Any:
        """The only secret of the only credential."""
        (secret,) = self.secrets()
        return secret

    def ask(self, type_: str, auth_id: str) -> Any:
        """Return the credential as an adapter gets it."""
        with Adapter(self.registry.amqp_port, self.registry.username, self.registry.password) as adapter:
            body = json.dumps({"type": type_, "auth-id": auth_id})
            reply = adapter.request(f"credentials/{self.tenant}", "get", body=body)
            assert reply.status == 200
            return reply.json()

    def assert_refused(self, body: object, status: int, **headers: str) -> None:
        """Check that an update is refused and changes nothing."""
        before = self.read()
        response = self.put(body, **headers)
        assert response.status == status, (response.status, response.body)
        assert isinstance(response.object["error"], str)
        assert response.headers["ETag"] is None
        after = self.read()
        assert (after.body, after.etag) == (before.body, before.etag)


@pytest.fixture
def d1(registry: Registry) -> Device:
    tenant = registry.create_tenant()
    return Device(registry, tenant, registry.create_device(tenant, "d1"))


@pytest.fixture
def d2(registry: Registry, d1: Device) -> Device:
    return d1._replace(device=registry.create_device(d1.tenant, "d2"))


def password(*secrets: object, auth_id: str = "s1", **members: object) -> JsonObject:
    return {"type": "hashed-password", "auth-id": auth_id, "secrets": list(secrets), **members}


def psk(*secrets: object, auth_id: str = "s1") -> JsonObject:
    return {"type": "psk", "auth-id": auth_id, "secrets": list(secrets)}


def rpk(*secrets: object) -> JsonObject:
    return {"type": "rpk", "auth-id": "s1", "secrets": list(secrets)}


def x509(*secrets: object, auth_id: str = DEV_SUBJECT) -> JsonObject:
    return {"type": "x509-cert", "auth-id": auth_id, "secrets": list(secrets)}


PLAIN = password({"pwd-plain": PASSWORD})


def matches(text: str, secret: JsonObject) -> bool:
    hashed = str(secret["pwd-hash"])
    assert hashed.startswith("$2a$")
    assert secret["hash-function"] == "bcrypt"
    assert "salt" not in secret
    return bcrypt.checkpw(text.encode(), hashed.encode())


@ROWS.row(69)
def test_row_69_a_new_device_has_none(d1: Device) -> None:
    response = d1.read()
    assert response.json() == []
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    device = d1.registry.request("GET", f"/v1/devices/{d1.tenant}/{d1.device}")
    assert response.etag != device.etag


@ROWS.row(70)
def test_row_70_unknown_device(d1: Device) -> None:
    for path in (f"/v1/credentials/{d1.tenant}/none", f"/v1/credentials/{new_id()}/none"):
        response = d1.registry.request("GET", path)
        assert response.status == 404
        assert response.object["error"]


@ROWS.row(71, 72)
def test_rows_71_and_72_password(d1: Device) -> None:
    empty = d1.read().etag
    version = d1.set(PLAIN)
    assert version != empty
    response = d1.read()
    assert response.etag == version
    (credential,) = response.array
    secret = d1.secret()
    assert UUID.fullmatch(secret["id"])
    assert credential == {
        "type": "hashed-password",
        "auth-id": "s1",
        "enabled": True,
        "secrets": [{"id": secret["id"]}],
    }
    (stored,) = d1.ask("hashed-password", "s1")["secrets"]
    assert matches(PASSWORD, stored)
    # Management 5.4: the device itself has not been updated.
    device = d1.registry.request("GET", f"/v1/devices/{d1.tenant}/{d1.device}").object
    assert set(device["status"]) == {"created"}  # type: ignore[call-overload]


@ROWS.row(73)
def test_row_73_one_credential_without_array(d1: Device) -> None:
    assert d1.put({**PLAIN, "device-id": "d1"}).status == 204
    (credential,) = d1.get()
    assert "device-id" not in credential


@ROWS.row(74)
def test_row_74_remove_all(d1: Device) -> None:
    d1.set(PLAIN)
    version = d1.set()
    response = d1.read()
    assert (response.json(), response.etag) == ([], version)


@ROWS.row(75)
def test_row_75_set_for_an_unknown_device(d1: Device) -> None:
    for tenant, device in ((d1.tenant, "none"), (new_id(), "d1")):
        unknown = Device(d1.registry, tenant, device)
        for body in ([], [PLAIN], [password({"id": "x"})]):
            assert unknown.put(body).status == 404


REFUSED: list[Any] = [
    ROWS.case("76-no-secret", [password()]),
    ROWS.case("76-no-secrets", [{"type": "hashed-password", "auth-id": "s1"}]),
    ROWS.case("76-no-type", [{"auth-id": "s1", "secrets": [{"pwd-plain": "x"}]}]),
    ROWS.case("76-no-auth-id", [{"type": "hashed-password", "secrets": [{"pwd-plain": "x"}]}]),
    ROWS.case("76-auth-id", [password({"pwd-plain": "x"}, auth_id="s 1")]),
    ROWS.case("78", [password({"pwd-hash": SHA_256_SALTED, "salt": SALT})]),
    ROWS.case("81-cost", [password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_11})]),
    ROWS.case("81-2b", [password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_10.replace("2a", "2b")})]),
    ROWS.case("81-2y", [password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_10.replace("2a", "2y")})]),
    ROWS.case(
        "84",
        [password({"pwd-plain": "x", "not-before": "2025-01-02T00:00:00Z", "not-after": "2025-01-01T00:00:00Z"})],
    ),
    ROWS.case("86", [password({"pwd-plain": "x", "not-after": "31.03.2028"})]),
    ROWS.case("93", [PLAIN, PLAIN]),
    ROWS.case("97-nothing", [psk({})]),
    ROWS.case("97-empty", [psk({"key": ""})]),
    ROWS.case("97-base64", [psk({"key": "***"})]),
    ROWS.case("100", [x509({}, {})]),
    ROWS.case("103", [{"type": "x509-cert", "cert": "AAAA"}]),
    ROWS.case("105", [rpk({"key": DEV_SPKI})]),
    ROWS.case("108-type", [{"type": "My Token", "auth-id": "t1", "secrets": [{}]}]),
    ROWS.case("108-member", [password({"pwd-plain": "x"}, issuer="me")]),
    ROWS.case("108-element", [1]),
    pytest.param([password({"pwd-plain": "ä" * 37})], id="long-password"),
    pytest.param([password(1)], id="element-of-secrets"),
    pytest.param("text", id="text"),
]


@pytest.mark.parametrize("body", REFUSED)
def test_body_that_breaks_a_rule(d1: Device, body: object) -> None:
    d1.set(psk({"key": PSK_KEY}, auth_id="other"))
    d1.assert_refused(json.dumps(body), 400)


@ROWS.row(77)
def test_row_77_auth_id_of_other_types_is_any_text(d1: Device) -> None:
    d1.set(psk({"key": PSK_KEY}, auth_id="s 1"))
    assert d1.get()[0]["auth-id"] == "s 1"


@pytest.mark.parametrize(
    "secret",
    [
        ROWS.case("79", {"hash-function": "sha-256", "pwd-hash": SHA_256_SALTED, "salt": SALT}),
        ROWS.case("80", {"hash-function": "bcrypt", "pwd-hash": BCRYPT_10}),
    ],
)
def test_password_that_is_hashed_already(d1: Device, secret: JsonObject) -> None:
    d1.set(password(secret))
    assert set(d1.secret()) == {"id"}
    (stored,) = d1.ask("hashed-password", "s1")["secrets"]
    assert {name: stored[name] for name in secret} == secret


@ROWS.row(82)
def test_row_82_allowed_hash_functions(new_registry: NewRegistry) -> None:
    registry = new_registry({"credentials.allowed_hash_functions": "bcrypt"})
    tenant = registry.create_tenant()
    d1 = Device(registry, tenant, registry.create_device(tenant))
    hashed = {"hash-function": "sha-512", "pwd-hash": SHA_512_SALTED, "salt": SALT}
    d1.assert_refused([password(hashed)], 400)
    d1.set(PLAIN)


@ROWS.row(83)
def test_row_83_a_plain_password_goes_before_a_hash(d1: Device) -> None:
    d1.set(password({"pwd-plain": "x", "pwd-hash": "y", "hash-function": "sha-256"}))
    (stored,) = d1.ask("hashed-password", "s1")["secrets"]
    assert matches("x", stored)


@ROWS.row(85)
def test_row_85_timestamps_are_shown_in_utc(d1: Device) -> None:
    d1.set(password({"pwd-plain": "x", "not-after": "2028-04-01T00:00:00.5+02:00"}))
    assert d1.secret()["not-after"] == "2028-03-31T22:00:00Z"


@ROWS.row(87, 88)
def test_rows_87_and_88_a_secret_is_kept_by_its_id(d1: Device) -> None:
    d1.set(PLAIN)
    secret = d1.secret()["id"]
    d1.set(password({"id": secret, "not-after": "2030-01-01T00:00:00Z"}))
    assert d1.secret() == {"id": secret, "not-after": "2030-01-01T00:00:00Z"}
    (stored,) = d1.ask("hashed-password", "s1")["secrets"]
    assert matches(PASSWORD, stored)
    d1.set(password({"id": secret}))
    assert d1.secret() == {"id": secret}
    (stored,) = d1.ask("hashed-password", "s1")["secrets"]
    assert matches(PASSWORD, stored)


@ROWS.row(89)
def test_row_89_a_secret_is_added(d1: Device) -> None:
    d1.set(PLAIN)
    secret = d1.secret()["id"]
    d1.set(password({"id": secret}, {"pwd-plain": "new"}))
    kept, added = d1.secrets()
    assert kept == {"id": secret}
    assert UUID.fullmatch(added["id"])
    assert added["id"] != secret
    first, second = d1.ask("hashed-password", "s1")["secrets"]
    assert matches(PASSWORD, first)
    assert matches("new", second)


@ROWS.row(90)
def test_row_90_secret_ids_that_refer_to_nothing(d1: Device) -> None:
    unknown = [password({"id": "nope", "pwd-plain": "x"})]
    d1.assert_refused(unknown, 400)
    d1.set(PLAIN)
    secret = d1.secret()["id"]
    d1.assert_refused(unknown, 400)
    d1.assert_refused([password({"id": secret}, {"id": secret})], 400)


def test_table_of_6_9(d1: Device) -> None:
    """The outcome table of management 6.9, with secrets A and B."""

    def stored() -> list[JsonObject]:
        found: list[JsonObject] = d1.ask("hashed-password", "s1")["secrets"]
        return found

    def start() -> tuple[str, str]:
        d1.set(password({"pwd-plain": "a", "comment": "c", "not-before": "2020-01-01T00:00:00Z"}, {"pwd-plain": "b"}))
        first, second = (one["id"] for one in d1.secrets())
        return first, second

    a, b = start()
    d1.set(password({"id": a}))
    assert d1.secrets() == [{"id": a}]
    assert matches("a", stored()[0])
    a, b = start()
    d1.set(password({"id": a, "not-after": "2040-01-01T00:00:00Z"}, {"id": b}))
    assert d1.secrets() == [{"id": a, "not-after": "2040-01-01T00:00:00Z"}, {"id": b}]
    assert [matches(text, one) for text, one in zip("ab", stored(), strict=True)] == [True, True]
    a, b = start()
    d1.set(password({"id": a, "pwd-plain": "n"}))
    assert d1.secrets() == [{"id": a}]
    assert matches("n", stored()[0])
    a, b = start()
    d1.set(password({"pwd-plain": "n"}))
    assert d1.secret()["id"] not in {a, b}
    a, b = start()
    d1.assert_refused([password({"id": "X"})], 400)
    d1.assert_refused([password({"id": a, "pwd-hash": "y"})], 400)


@ROWS.row(91)
def test_row_91_an_id_of_the_clients_own(d1: Device) -> None:
    d1.set(psk({"key": PSK_KEY}))
    d1.set(psk({"id": d1.secret()["id"]}), password({"id": "k1", "pwd-plain": "x"}, auth_id="s9"))
    assert d1.get()[1]["secrets"] == [{"id": "k1"}]


@ROWS.row(92)
def test_row_92_an_id_without_anything_behind_it(d1: Device) -> None:
    d1.set(psk({"key": PSK_KEY}))
    d1.assert_refused([password({"id": "k1"}, auth_id="s9")], 400)


@ROWS.row(94)
def test_row_94_auth_id_of_another_device(d1: Device, d2: Device) -> None:
    d1.set({**PLAIN, "enabled": False})
    d2.assert_refused([psk({"key": PSK_KEY}), PLAIN], 409)
    other = d1.registry.create_tenant()
    Device(d1.registry, other, d1.registry.create_device(other)).set(PLAIN)


@ROWS.row(95)
def test_row_95_same_auth_id_of_another_type(d1: Device, d2: Device) -> None:
    d1.set(PLAIN)
    d2.set(psk({"key": PSK_KEY}))


@ROWS.row(96, 98)
def test_rows_96_and_98_psk(d1: Device) -> None:
    d1.set(psk({"key": PSK_KEY}))
    secret = d1.secret()
    assert secret == {"id": secret["id"], "key": PSK_KEY}
    d1.set(psk({"id": secret["id"], "comment": "c"}))
    assert d1.secret() == {"id": secret["id"], "comment": "c", "key": PSK_KEY}


@ROWS.row(99)
def test_row_99_subject_in_any_spelling(d1: Device) -> None:
    d1.set(x509({}, auth_id="cn=pump-17, ou=Line 7, o=Example GmbH"))
    (credential,) = d1.get()
    assert credential["auth-id"] == DEV_SUBJECT
    assert set(d1.secret()) == {"id"}


@ROWS.row(101)
def test_row_101_certificate(d1: Device) -> None:
    d1.set({"type": "x509-cert", "cert": DEV_CERT, "auth-id": "ignored", "secrets": "ignored"})
    (credential,) = d1.get()
    assert credential == {
        "type": "x509-cert",
        "auth-id": DEV_SUBJECT,
        "enabled": True,
        "secrets": [
            {
                "id": d1.secret()["id"],
                "not-before": "2024-06-01T00:00:00Z",
                "not-after": "2034-06-01T00:00:00Z",
            }
        ],
    }


@ROWS.row(102)
def test_row_102_certificate_with_a_template(registry: Registry) -> None:
    template = "{{subject-cn}}@{{subject-ou}}"
    tenant = registry.create_tenant(None, {"trusted-ca": [{"cert": CA_CERT, "auth-id-template": template}]})
    d1, d2 = (Device(registry, tenant, registry.create_device(tenant)) for _ in range(2))
    d1.set({"type": "x509-cert", "cert": DEV_CERT}, PLAIN)
    assert [one["auth-id"] for one in d1.get()] == ["pump-17@Line 7", "s1"]
    # Uniqueness is that of the resulting auth-id; the DN form is never rewritten.
    d2.assert_refused([{"type": "x509-cert", "cert": DEV_CERT}], 409)
    d2.assert_refused([{"type": "x509-cert", "cert": DEV_CERT}, x509({}, auth_id="pump-17@Line 7")], 400)
    d2.set(x509({}))
    assert d2.get()[0]["auth-id"] == DEV_SUBJECT
    assert registry.request("DELETE", f"/v1/tenants/{tenant}").status == 204


@ROWS.row(104)
def test_row_104_raw_public_key(d1: Device) -> None:
    d1.set(rpk({"key": DEV_SPKI, "algorithm": "EC"}))
    secret = d1.secret()
    assert secret == {"id": secret["id"], "key": DEV_SPKI, "algorithm": "EC"}
    # Management 6.9: kept by its id.
    d1.set(rpk({"id": secret["id"]}))
    assert d1.secret() == secret


@ROWS.row(106)
def test_row_106_raw_public_key_from_a_certificate(d1: Device) -> None:
    d1.set(rpk({"cert": DEV_CERT}))
    secret = d1.secret()
    assert secret == {
        "id": secret["id"],
        "key": DEV_SPKI,
        "algorithm": "EC",
        "not-before": "2024-06-01T00:00:00Z",
        "not-after": "2034-06-01T00:00:00Z",
    }


@ROWS.row(107)
def test_row_107_type_of_the_operators_own(d1: Device) -> None:
    d1.set({"type": "my-token", "auth-id": "t1", "issuer": "me", "secrets": [{"token": "abc"}]})
    (credential,) = d1.get()
    assert credential["issuer"] == "me"
    secret = d1.secret()
    assert secret["token"] == "abc"
    d1.set({"type": "my-token", "auth-id": "t1", "secrets": [{"id": secret["id"]}]})
    assert d1.secret() == secret
    assert "issuer" not in d1.get()[0]


@ROWS.row(109, 110)
def test_rows_109_and_110_versions_of_their_own(d1: Device) -> None:
    device = d1.registry.request("GET", f"/v1/devices/{d1.tenant}/{d1.device}").etag
    d1.assert_refused([], 412, If_Match=device)
    d1.assert_refused([PLAIN], 412, If_Match=device)
    assert d1.put([], If_Match=d1.read().etag).status == 204
    assert d1.registry.request("GET", f"/v1/devices/{d1.tenant}/{d1.device}").etag == device


@ROWS.row(111)
def test_row_111_limit(registry: Registry) -> None:
    tenant = registry.create_tenant(None, {"registration-limits": {"max-credentials-per-device": 1}})
    d1 = Device(registry, tenant, registry.create_device(tenant))
    two = [PLAIN, psk({"key": PSK_KEY})]
    d1.assert_refused(two, 403)
    # Management 3.15: before the device, and its version, are looked at.
    assert Device(registry, tenant, "none").put(two).status == 403
    d1.assert_refused(two, 403, If_Match="x")
    d1.set(password(*({"pwd-plain": text} for text in "abc")))


def test_limit_of_the_registry(new_registry: NewRegistry) -> None:
    """Configuration 1.3: a tenant's own limit wins; management 4.3: 0 allows the empty set only."""
    registry = new_registry({"credentials.max_per_device": "1"})
    for limits, allowed in (({}, 1), ({"max-credentials-per-device": 2}, 2), ({"max-credentials-per-device": 0}, 0)):
        tenant = registry.create_tenant(None, {"registration-limits": limits})
        d1 = Device(registry, tenant, registry.create_device(tenant))
        credentials = [psk({"key": PSK_KEY}, auth_id=f"s{number}") for number in range(allowed + 1)]
        d1.assert_refused(credentials, 403)
        d1.set(*credentials[:allowed])


@ROWS.row(112)
def test_row_112_a_deleted_device_frees_its_auth_ids(d1: Device, d2: Device) -> None:
    d1.set(PLAIN)
    assert d1.registry.request("DELETE", f"/v1/devices/{d1.tenant}/{d1.device}").status == 204
    d2.set(PLAIN)


def test_order_and_members_are_kept(d1: Device) -> None:
    """Management 6.9 and 6.10: the order of the last update; enabled, comment and ext are the request's."""
    d1.set(PLAIN, psk({"key": PSK_KEY}), x509({}))
    assert [one["type"] for one in d1.get()] == ["hashed-password", "psk", "x509-cert"]
    d1.set(x509({"enabled": False, "comment": "s"}), {**psk({"key": PSK_KEY}), "comment": "c", "ext": {"client-id": 1}})
    certified, shared = d1.get()
    assert certified["type"] == "x509-cert"
    assert certified["secrets"][0] | {"id": ""} == {"id": "", "enabled": False, "comment": "s"}  # type: ignore[index]
    assert (shared["comment"], shared["ext"], shared["enabled"]) == ("c", {"client-id": 1}, True)


def run_all(works: list[Callable[[], int]]) -> list[int]:
    with ThreadPoolExecutor(len(works)) as pool:
        return [one.result() for one in [pool.submit(work) for work in works]]


def test_concurrent_claims_of_one_auth_id(d1: Device, d2: Device) -> None:
    """Management 8.5."""
    for number in range(5):
        body = [psk({"key": PSK_KEY}, auth_id=f"c{number}")]
        statuses = run_all([lambda device=device, body=body: device.put(body).status for device in (d1, d2)])  # type: ignore[misc]
        assert sorted(statuses) == [204, 409]
        d1.set()
        d2.set()


def test_concurrent_updates_of_one_version(d1: Device) -> None:
    """Management 3.9: while a password is being hashed, the set may change; the check is made once more."""
    version = d1.read().etag
    assert sorted(run_all([lambda: d1.put([PLAIN], If_Match=version).status] * 4)) == [204, 412, 412, 412]
