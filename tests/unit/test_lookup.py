"""What adapters ask, on a real SQLite store. Rows `T`, `R`, `C` are those of amqp-apis 14."""

import asyncio
import base64
import json
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.certificates import Authority
from tests.unit.sample_store import ADAPTER, Clock, SampleStore

from kamado.credentials import stored_credential, stored_document
from kamado.document import Identifiers, encode
from kamado.errors import BadRequest, Forbidden, NotFound, NotSupported, Reason, RegistryError
from kamado.lookup import Answer, LookupService, LookupSettings, _json_equal
from kamado.provisioning import ProvisioningService, ProvisioningSettings
from kamado.store import CredentialRow, DamagedRow, TenantRow

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
HASH = {"hash-function": "sha-256", "pwd-hash": "t3njm9sDi5Kokp1zOn2YGsC7KYGk21S+CHGEkhvM5O4=", "salt": "ABEiM0RVZnc="}
CA = Authority.create(
    "CN=Device CA,OU=Plant 7,O=Acme", not_before=NOON - timedelta(days=1), not_after=NOON + timedelta(days=365)
)
SHARED = Authority.create("CN=Shared,O=Acme", not_before=NOON - timedelta(days=1), not_after=NOON + timedelta(days=365))


def password(auth_id: str, *secrets: dict[str, object], **members: object) -> dict[str, object]:
    """A stored hashed-password credential."""
    given = secrets or ({},)
    return {
        "type": "hashed-password",
        "auth-id": auth_id,
        "secrets": [{"id": f"s{number}"} | HASH | secret for number, secret in enumerate(given)],
    } | members


def fill(sample: SampleStore) -> None:
    """The fixture of amqp-apis 14."""
    sample.put_tenant(
        "acme", {"alias": "plant7", "trusted-ca": [CA.trust_anchor(auto_provisioning_enabled=True, id="ca-1")]}
    )
    sample.put_tenant("off", {"enabled": False})
    for tenant_id in ("s1", "s2"):
        sample.put_tenant(
            tenant_id, {"trust-anchor-group": "g", "trusted-ca": [SHARED.trust_anchor(auto_provisioning_enabled=True)]}
        )
    sample.put_device(
        "acme",
        "d1",
        {},
        [
            password("sensor1"),
            {"type": "psk", "auth-id": "psk1", "secrets": [{"id": "p", "key": "c2VjcmV0"}]},
            {"type": "x509-cert", "auth-id": "CN=dev 1,O=Acme", "secrets": [{"id": "x"}]},
            password("old", {"not-after": "2026-02-28T12:00:00Z"}),
            password("mix", {"enabled": False}, {"not-after": "2026-02-28T12:00:00Z"}, {}),
            password("dis", enabled=False),
            password("ctx", ext={"client-id": "a"}),
        ],
    )
    sample.put_device("acme", "d2", {"via": ["gw1"]})
    sample.put_device("acme", "d3", {"viaGroups": ["hall"]})
    sample.put_device("acme", "d4", {"enabled": False})
    sample.put_device("acme", "d5", {"via": ["gw3"]})
    sample.put_device("acme", "gw1")
    sample.put_device("acme", "gw2", {"memberOf": ["hall"]})
    sample.put_device("acme", "gw3", {"enabled": False})
    sample.put_device("acme", "gw4", {"memberOf": ["hall"], "authorities": ["auto-provisioning-enabled"]})
    sample.put_device("off", "d1", {}, [password("sensor1")])


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@pytest.fixture
def sample(tmp_path: Path, clock: Clock) -> Iterator[SampleStore]:
    one = SampleStore(tmp_path, clock)
    yield one
    one.close()


def make_service(sample: SampleStore, lookup_settings: LookupSettings | None = None) -> LookupService:
    provisioning = ProvisioningService(sample.store, ProvisioningSettings(), Identifiers(), sample.clock)
    return LookupService(sample.store.lookups, provisioning, lookup_settings or LookupSettings(), sample.clock)


class Acme:
    """The fixture, ready to be asked."""

    def __init__(self, sample: SampleStore) -> None:
        self.sample = sample
        self.service = make_service(sample)

    def tenant(self, body: object) -> Answer:
        return self.ask(self.service.get_tenant_by_body(ADAPTER, to_bytes(body)))

    def assertion(self, device_id: str, gateway_id: str | None = None, tenant_id: str = "acme") -> Answer:
        return self.ask(self.service.assert_registration(ADAPTER, tenant_id, device_id, gateway_id))

    def credentials(self, body: object, tenant_id: str = "acme") -> Answer:
        return self.ask(self.service.get_credentials(ADAPTER, tenant_id, to_bytes(body)))

    def get(self, type_: str, auth_id: str, tenant_id: str = "acme", **context: object) -> Answer:
        members = {name.replace("_", "-"): value for name, value in context.items()}
        return self.credentials({"type": type_, "auth-id": auth_id} | members, tenant_id)

    def ask(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return self.sample.run(work)


def to_bytes(body: object) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()


def payload(answer: Answer) -> dict[str, Any]:
    value = json.loads(answer.payload)
    assert isinstance(value, dict)
    return value


@pytest.fixture
def acme(sample: SampleStore) -> Acme:
    fill(sample)
    return Acme(sample)


class TestTenant:
    @pytest.mark.parametrize(
        ("body", "tenant_id", "asked"),
        [
            pytest.param({"tenant-id": "acme"}, "acme", "acme", id="T1"),
            pytest.param({"tenant-id": "plant7"}, "acme", "plant7", id="T2"),
            pytest.param({"tenant-id": "off"}, "off", "off", id="T3"),
            pytest.param({"subject-dn": "CN=Device CA,OU=Plant 7,O=Acme"}, "acme", "acme", id="T7"),
            pytest.param({"subject-dn": "cn=device ca, ou=plant 7, o=ACME"}, "acme", "acme", id="T8"),
            pytest.param({"tenant-id": "acme", "subject-dn": "CN=Shared,O=Acme"}, "acme", "acme", id="T12"),
            pytest.param({"tenant-id": 5, "subject-dn": "CN=Device CA,OU=Plant 7,O=Acme"}, "acme", "acme", id="9.1"),
        ],
    )
    def test_found(self, acme: Acme, body: object, tenant_id: str, asked: str) -> None:
        answer = acme.tenant(body)
        assert (answer.status, answer.cache_control, answer.tenant_id) == (200, "max-age = 180", asked)
        assert payload(answer)["tenant-id"] == tenant_id
        assert payload(answer)["enabled"] is (tenant_id != "off")

    @pytest.mark.parametrize(
        ("body", "error", "reason"),
        [
            pytest.param({"tenant-id": "nope"}, NotFound, Reason.TENANT_UNKNOWN, id="T4"),
            pytest.param({"subject-dn": "O=Acme,OU=Plant 7,CN=Device CA"}, NotFound, Reason.ISSUER_UNKNOWN, id="T9"),
            pytest.param({"subject-dn": "not a dn"}, BadRequest, Reason.MALFORMED_REQUEST, id="T10"),
            pytest.param({"subject-dn": "CN=Shared,O=Acme"}, NotFound, Reason.ISSUER_AMBIGUOUS, id="T11"),
            pytest.param({}, BadRequest, Reason.MALFORMED_REQUEST, id="T13"),
            pytest.param({"subject-dn": ""}, BadRequest, Reason.MALFORMED_REQUEST, id="9.3.2-empty"),
            pytest.param(None, BadRequest, Reason.MALFORMED_REQUEST, id="T14"),
            pytest.param(b"", BadRequest, Reason.MALFORMED_REQUEST, id="T14-empty"),
            pytest.param(b'{"tenant-id":', BadRequest, Reason.MALFORMED_REQUEST, id="T15"),
            pytest.param(["acme"], BadRequest, Reason.MALFORMED_REQUEST, id="T16"),
            pytest.param({"tenant-id": 5}, BadRequest, Reason.MALFORMED_REQUEST, id="T17"),
            pytest.param(
                {"subject-dn": "x" * 2000}, BadRequest, Reason.MALFORMED_REQUEST, id="long-text-that-is-no-dn"
            ),
        ],
    )
    def test_refused(self, acme: Acme, body: object, error: type[RegistryError], reason: Reason) -> None:
        with pytest.raises(error) as refusal:
            acme.tenant(body)
        assert refusal.value.reason is reason

    def test_payload_has_only_what_adapters_may_see(self, acme: Acme) -> None:
        """amqp-apis 9.4."""
        acme.sample.put_tenant(
            "full",
            {
                "alias": "f",
                "trust-anchor-group": "g2",
                "registration-limits": {"max-devices": 3},
                "defaults": {"ttl": 3600},
                "ext": {"messaging-type": "amqp"},
                "trusted-ca": [
                    CA.trust_anchor(
                        id="ca", auto_provision_as_gateway=True, auto_provisioning_device_id_template="{{subject-cn}}"
                    )
                    | {"cert": SHARED_2.base64}
                ],
            },
        )
        assert payload(acme.tenant({"tenant-id": "full"})) == {
            "tenant-id": "full",
            "enabled": True,
            "defaults": {"ttl": 3600},
            "ext": {"messaging-type": "amqp"},
            "trusted-ca": [
                {
                    "id": "ca",
                    "subject-dn": "CN=Own,O=Full",
                    "subject-dn-bytes": base64.b64encode(SHARED_2.certificate.subject.public_bytes()).decode(),
                    "public-key": base64.b64encode(SHARED_2.public_key).decode(),
                    "algorithm": "EC",
                    "auto-provisioning-enabled": False,
                }
            ],
        }

    def test_an_update_shows_at_once(self, acme: Acme) -> None:
        assert payload(acme.tenant({"tenant-id": "off"})) == {"tenant-id": "off", "enabled": False}
        acme.sample.put_tenant("off", {"enabled": True, "ext": {"a": 1}})
        assert payload(acme.tenant({"tenant-id": "off"})) == {"tenant-id": "off", "enabled": True, "ext": {"a": 1}}
        acme.sample.delete_tenant("off")
        with pytest.raises(NotFound):
            acme.tenant({"tenant-id": "off"})

    @pytest.mark.parametrize(
        ("offset", "listed"),
        [
            (timedelta(days=-1, microseconds=-1), False),
            (timedelta(days=-1), True),
            (timedelta(days=365), True),
            (timedelta(days=365, microseconds=1), False),
        ],
    )
    def test_a_ca_is_listed_exactly_while_it_is_valid(
        self, acme: Acme, clock: Clock, offset: timedelta, listed: bool
    ) -> None:
        """amqp-apis 9.3 row 4, whatever was asked, and kept, before; provisioning 1."""
        for before in (NOON, NOON + offset, NOON + timedelta(days=400), NOON - timedelta(days=2)):
            clock.now = before
            acme.tenant({"tenant-id": "acme"})
            clock.now = NOON + offset
            answer = acme.tenant({"subject-dn": "CN=Device CA,OU=Plant 7,O=Acme"})
            assert answer.tenant_id == "acme"
            assert ("trusted-ca" in payload(answer)) is listed

    def test_many_large_tenants_do_not_fill_the_memory(self, acme: Acme, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kamado.lookup._MAX_CACHED_BYTES", 10_000)
        for number in range(20):
            acme.sample.put_tenant(f"t{number}", {"ext": {"text": "x" * 2000}})
            acme.tenant({"tenant-id": f"t{number}"})
            acme.tenant({"tenant-id": "acme"})
            assert len(acme.service._tenants._entries) <= 4
        assert payload(acme.tenant({"tenant-id": "t0"}))["ext"] == {"text": "x" * 2000}


SHARED_2 = Authority.create("CN=Own,O=Full", not_before=NOON - timedelta(days=1), not_after=NOON + timedelta(days=365))


class TestRegistration:
    @pytest.mark.parametrize(
        ("device_id", "gateway_id", "expected"),
        [
            pytest.param("d1", None, {"device-id": "d1"}, id="R1"),
            pytest.param("d2", None, {"device-id": "d2", "via": ["gw1"]}, id="R2"),
            pytest.param("d3", None, {"device-id": "d3", "via": ["gw2", "gw4"]}, id="R3"),
            pytest.param("d2", "gw1", {"device-id": "d2", "via": ["gw1"]}, id="R4"),
            pytest.param("d3", "gw2", {"device-id": "d3", "via": ["gw2", "gw4"]}, id="R6"),
        ],
    )
    def test_asserted(self, acme: Acme, device_id: str, gateway_id: str | None, expected: object) -> None:
        answer = acme.assertion(device_id, gateway_id)
        assert (answer.status, answer.cache_control, answer.tenant_id) == (200, "max-age = 300", "acme")
        assert payload(answer) == expected

    @pytest.mark.parametrize(
        ("device_id", "gateway_id", "error", "reason"),
        [
            pytest.param("d2", "gw2", Forbidden, Reason.GATEWAY_NOT_AUTHORIZED, id="R5"),
            pytest.param("d1", "gw1", Forbidden, Reason.GATEWAY_NOT_AUTHORIZED, id="R7"),
            pytest.param("d4", None, NotFound, Reason.DEVICE_DISABLED, id="R8"),
            pytest.param("d4", "gw1", NotFound, Reason.DEVICE_DISABLED, id="R9"),
            pytest.param("d5", "gw3", Forbidden, Reason.GATEWAY_DISABLED, id="R10"),
            pytest.param("d2", "nope", Forbidden, Reason.GATEWAY_UNKNOWN, id="R11"),
            pytest.param("nope", None, NotFound, Reason.DEVICE_UNKNOWN, id="R12"),
            pytest.param("nope", "gw1", NotFound, Reason.GATEWAY_MAY_NOT_PROVISION, id="R13"),
            pytest.param("nope", "gw3", NotFound, Reason.DEVICE_UNKNOWN_GATEWAY_DISABLED, id="10.2-disabled-gateway"),
            pytest.param("gw1", "gw1", Forbidden, Reason.GATEWAY_NOT_AUTHORIZED, id="10.2-itself"),
            pytest.param("nope", "nope", NotFound, Reason.DEVICE_AND_GATEWAY_UNKNOWN, id="10.2-device-first"),
            pytest.param("d1", "gw4", Forbidden, Reason.GATEWAY_NOT_AUTHORIZED, id="10.2-only-unknown-devices"),
            pytest.param("d4", "gw4", NotFound, Reason.DEVICE_DISABLED, id="10.2-disabled-is-not-unknown"),
        ],
    )
    def test_refused(
        self, acme: Acme, device_id: str, gateway_id: str | None, error: type[RegistryError], reason: Reason
    ) -> None:
        with pytest.raises(error) as refusal:
            acme.assertion(device_id, gateway_id)
        assert refusal.value.reason is reason

    @pytest.mark.parametrize("tenant_id", ["nope", "plant7"])
    def test_tenant_unknown(self, acme: Acme, tenant_id: str) -> None:
        """R16; an alias names a tenant in the Tenant API only (amqp-apis 9.1)."""
        for gateway_id in (None, "gw4"):
            with pytest.raises(NotFound) as refusal:
                acme.assertion("d1", gateway_id, tenant_id=tenant_id)
            assert refusal.value.reason is Reason.TENANT_UNKNOWN

    def test_tenant_may_be_disabled(self, acme: Acme) -> None:
        """amqp-apis 10.2 step 2."""
        assert payload(acme.assertion("d1", tenant_id="off")) == {"device-id": "d1"}

    def test_left_over_of_a_deleted_tenant(self, acme: Acme) -> None:
        """Management 8.3."""
        acme.sample.delete_tenant("off")
        with pytest.raises(NotFound) as refusal:
            acme.assertion("d1", tenant_id="off")
        assert refusal.value.reason is Reason.TENANT_UNKNOWN

    def test_unknown_and_disabled_look_alike(self, acme: Acme) -> None:
        texts = set()
        for device_id, via in (("d4", None), ("nope", None), ("nope", "gw1"), ("nope", "gw3"), ("nope", "nope")):
            with pytest.raises(NotFound) as refusal:
                acme.assertion(device_id, via)
            texts.add(str(refusal.value))
        assert len(texts) == 1
        texts = set()
        for device_id, gateway_id in (("d2", "gw2"), ("d5", "gw3"), ("d2", "nope")):
            with pytest.raises(Forbidden) as forbidden:
                acme.assertion(device_id, gateway_id)
            texts.add(str(forbidden.value))
        assert len(texts) == 1

    def test_payload_has_only_what_adapters_may_see(self, acme: Acme) -> None:
        """amqp-apis 10.3: the mappers, defaults and the command endpoint as stored; nothing else."""
        passed_on: dict[str, object] = {
            "defaults": {"ttl": 45, "Größe": [1.50, None, {}]},
            "downstream-message-mapper": "down",
            "upstream-message-mapper": "up",
            "command-endpoint": {
                "uri": "http://x.example/{{deviceId}}",
                "headers": {"a": "b"},
                "payload-properties": {"n": "1"},
            },
        }
        acme.sample.put_device(
            "acme", "full", {"ext": {"secret": True}, "authorities": ["auto-provisioning-enabled"]} | passed_on
        )
        assert payload(acme.assertion("full")) == {"device-id": "full"} | passed_on

    def test_payload_properties_are_texts_for_adapters(self, acme: Acme) -> None:
        """amqp-apis 10.3: an object of strings, while management 5.3 lets an operator store any JSON."""
        acme.sample.put_device(
            "acme",
            "typed",
            {
                "command-endpoint": {
                    "uri": "u",
                    "payload-properties": {"s": "x", "n": 1, "f": 1.5, "b": True, "o": {"a": []}, "z": None},
                }
            },
        )
        assert payload(acme.assertion("typed")) == {
            "device-id": "typed",
            "command-endpoint": {
                "uri": "u",
                "payload-properties": {"s": "x", "n": "1", "f": "1.5", "b": "true", "o": '{"a":[]}'},
            },
        }

    def test_via_lists_the_ids_then_the_members_of_the_groups_without_repeats(self, acme: Acme) -> None:
        """amqp-apis 10.3."""
        acme.sample.put_device("acme", "gw0", {"memberOf": ["hall", "yard"]})
        acme.sample.put_device(
            "acme", "many", {"via": ["gw4", "unknown", "gw4"], "viaGroups": ["yard", "hall", "nobody"]}
        )
        assert payload(acme.assertion("many"))["via"] == ["gw4", "unknown", "gw0", "gw2"]
        acme.sample.put_device("acme", "twice", {"via": ["gw1", "gw1"]})
        assert payload(acme.assertion("twice"))["via"] == ["gw1"]

    def test_groups_without_members(self, acme: Acme) -> None:
        acme.sample.put_device("acme", "alone", {"viaGroups": ["nobody"]})
        assert payload(acme.assertion("alone")) == {"device-id": "alone"}

    def test_edge_device(self, acme: Acme) -> None:
        """R14, R15: the gateway brings it along, then it is a device as any other (10.2, step 5)."""
        answer = acme.assertion("new1", "gw4")
        assert (answer.status, answer.cache_control, answer.tenant_id) == (200, "max-age = 300", "acme")
        assert payload(answer) == {"device-id": "new1", "via": ["gw4", "gw2"]}
        for gateway_id in (None, "gw4", "gw2"):  # gw2 is of the same group
            assert payload(acme.assertion("new1", gateway_id)) == payload(answer)
        with pytest.raises(Forbidden) as refusal:
            acme.assertion("new1", "gw1")
        assert refusal.value.reason is Reason.GATEWAY_NOT_AUTHORIZED
        assert acme.sample.count_devices("acme") == 10

    def test_edge_device_in_a_disabled_tenant(self, acme: Acme) -> None:
        """10.2 step 2: not a reason."""
        acme.sample.put_device("off", "gw", {"authorities": ["auto-provisioning-enabled"]})
        assert payload(acme.assertion("new", "gw", tenant_id="off")) == {"device-id": "new", "via": ["gw"]}

    def test_edge_device_that_is_gone_again(self, acme: Acme) -> None:
        """Somebody else made it and an operator deleted it, before it could be read: as unknown as it was."""

        async def provision(*_: object) -> None: ...

        acme.service._provisioning.provision_edge_device = provision  # type: ignore[assignment]
        with pytest.raises(NotFound) as refusal:
            acme.assertion("new1", "gw4")
        assert refusal.value.reason is Reason.DEVICE_UNKNOWN


class TestCredentials:
    @pytest.mark.parametrize(
        ("body", "directive", "expected"),
        [
            pytest.param(
                {"type": "hashed-password", "auth-id": "sensor1"}, "max-age = 180", [{"id": "s0"} | HASH], id="C1"
            ),
            pytest.param({"type": "psk", "auth-id": "psk1"}, "no-cache", [{"id": "p", "key": "c2VjcmV0"}], id="C2"),
            pytest.param({"type": "x509-cert", "auth-id": "CN=dev 1,O=Acme"}, "max-age = 180", [{}], id="C3"),
            pytest.param(
                {"type": "hashed-password", "auth-id": "mix"}, "max-age = 180", [{"id": "s2"} | HASH], id="C9"
            ),
            pytest.param(
                {"type": "hashed-password", "auth-id": "ctx", "client-id": "a"},
                "max-age = 180",
                [{"id": "s0"} | HASH],
                id="C10",
            ),
            pytest.param(
                {"type": "hashed-password", "auth-id": "ctx", "other": "x"},
                "max-age = 180",
                [{"id": "s0"} | HASH],
                id="C12",
            ),
        ],
    )
    def test_found(self, acme: Acme, body: dict[str, object], directive: str, expected: object) -> None:
        answer = acme.credentials(body)
        assert (answer.status, answer.cache_control, answer.tenant_id) == (200, directive, "acme")
        document = payload(answer)
        assert document.pop("ext", None) == ({"client-id": "a"} if body["auth-id"] == "ctx" else None)
        assert document == {
            "device-id": "d1",
            "type": body["type"],
            "auth-id": body["auth-id"],
            "enabled": True,
            "secrets": expected,
        }

    @pytest.mark.parametrize(
        ("body", "error", "reason"),
        [
            pytest.param(
                {"type": "x509-cert", "auth-id": "CN=dev 1, O=Acme"},
                NotFound,
                Reason.SUBJECT_SPELLED_OTHERWISE,
                id="C4",
            ),
            pytest.param({"type": "x509-cert", "auth-id": "nope"}, NotFound, Reason.NO_CERTIFICATE, id="not-a-name"),
            pytest.param(
                {"type": "x509-cert", "auth-id": "CN=nope, O=x"}, NotFound, Reason.NO_CERTIFICATE, id="another-name"
            ),
            pytest.param({"type": "psk", "auth-id": "sensor1"}, NotFound, Reason.CREDENTIAL_UNKNOWN, id="C5"),
            pytest.param(
                {"type": "hashed-password", "auth-id": "Sensor1"}, NotFound, Reason.CREDENTIAL_UNKNOWN, id="C6"
            ),
            pytest.param({"type": "hashed-password", "auth-id": "dis"}, NotFound, Reason.CREDENTIAL_DISABLED, id="C7"),
            pytest.param({"type": "hashed-password", "auth-id": "old"}, NotFound, Reason.SECRETS_EXPIRED, id="C8"),
            pytest.param(
                {"type": "hashed-password", "auth-id": "ctx", "client-id": "b"},
                NotFound,
                Reason.CONTEXT_MISMATCH,
                id="C11",
            ),
            pytest.param({"auth-id": "sensor1"}, BadRequest, Reason.MALFORMED_REQUEST, id="C13"),
            pytest.param({"type": "psk", "device-id": "d1"}, NotSupported, Reason.SEARCH_BY_DEVICE_ID, id="C14"),
            pytest.param(
                {"type": "psk", "auth-id": "psk1", "device-id": "d1"}, BadRequest, Reason.MALFORMED_REQUEST, id="C15"
            ),
            pytest.param(None, BadRequest, Reason.MALFORMED_REQUEST, id="C16"),
            pytest.param(b'{"type":"psk","auth-id"', BadRequest, Reason.MALFORMED_REQUEST, id="C17"),
            pytest.param({"type": "psk"}, BadRequest, Reason.MALFORMED_REQUEST, id="11.2.3-neither"),
            pytest.param({"type": 1, "auth-id": "a"}, BadRequest, Reason.MALFORMED_REQUEST, id="11.2.2"),
            pytest.param({"type": "psk", "auth-id": 1}, BadRequest, Reason.MALFORMED_REQUEST, id="11.2.3-number"),
            pytest.param(
                {"type": "psk", "auth-id": 1, "device-id": "d1"},
                NotSupported,
                Reason.SEARCH_BY_DEVICE_ID,
                id="11.2.3-device-id-with-absent-auth-id",
            ),
            pytest.param([], BadRequest, Reason.MALFORMED_REQUEST, id="11.2.1"),
            pytest.param(b"\xef\xbb\xbf{}", BadRequest, Reason.MALFORMED_REQUEST, id="6-byte-order-mark"),
            pytest.param(b'{"type":"psk","auth-id":"\xff"}', BadRequest, Reason.MALFORMED_REQUEST, id="17-utf-8"),
            pytest.param(
                b'{"type":"psk","auth-id":"\\ud800"}', BadRequest, Reason.MALFORMED_REQUEST, id="17-surrogate"
            ),
            pytest.param(b'{"type":"psk","x":NaN}', BadRequest, Reason.MALFORMED_REQUEST, id="17-nan"),
            pytest.param(b'{"x":' + b"[" * 50_000, BadRequest, Reason.MALFORMED_REQUEST, id="17-deep"),
            pytest.param(
                {"type": "psk", "auth-id": "new", "client-certificate": "AAAA"},
                NotFound,
                Reason.TYPE_NOT_PROVISIONED,
                id="type-not-provisioned",
                marks=pytest.mark.row("provisioning 3.2", 4),
            ),
        ],
    )
    def test_refused(self, acme: Acme, body: object, error: type[RegistryError], reason: Reason) -> None:
        with pytest.raises(error) as refusal:
            acme.credentials(body)
        assert refusal.value.reason is reason

    @pytest.mark.parametrize("body", [{"type": "psk", "auth-id": "psk1", "device-id": absent} for absent in (None, 5)])
    def test_device_id_of_another_type_is_absent(self, acme: Acme, body: object) -> None:
        """amqp-apis 6."""
        assert payload(acme.credentials(body))["device-id"] == "d1"

    @pytest.mark.parametrize("tenant_id", ["nope", "plant7"])
    @pytest.mark.parametrize("type_", ["hashed-password", "x509-cert"])
    def test_tenant_unknown(self, acme: Acme, tenant_id: str, type_: str) -> None:
        """C19."""
        with pytest.raises(NotFound) as refusal:
            acme.get(type_, "sensor1", tenant_id)
        assert refusal.value.reason is Reason.TENANT_UNKNOWN

    def test_tenant_may_be_disabled(self, acme: Acme) -> None:
        """C20."""
        assert acme.get("hashed-password", "sensor1", "off").status == 200

    def test_whatever_is_wrong_looks_alike(self, acme: Acme) -> None:
        texts = set()
        for auth_id, tenant_id in (("dis", "acme"), ("old", "acme"), ("nope", "acme"), ("sensor1", "nope")):
            with pytest.raises(NotFound) as refusal:
                acme.get("hashed-password", auth_id, tenant_id)
            texts.add(str(refusal.value))
        assert len(texts) == 1

    def test_own_type_is_passed_on_as_it_is(self, acme: Acme) -> None:
        """amqp-apis 11.4, last row of the types; never cached (8)."""
        credential: dict[str, object] = {
            "type": "my-token",
            "auth-id": 'a "quoted" ü',
            "comment": "c",
            "ext": {"n": 1.50},
            "issuer": {"a": [1, None]},
            "secrets": [{"id": "1", "token": "abc", "comment": "d"}, {"id": "2", "enabled": False, "token": "x"}],
        }
        acme.sample.put_device("acme", "own", {}, [credential])
        answer = acme.get("my-token", 'a "quoted" ü')
        secrets = [{"id": "1", "token": "abc", "comment": "d"}]
        assert payload(answer) == credential | {"device-id": "own", "enabled": True, "secrets": secrets}
        assert answer.cache_control == "no-cache"

    def test_x509_secret_keeps_its_validity_and_loses_its_id(self, acme: Acme) -> None:
        """amqp-apis 11.4: `[{}]` is normal; validity members if they restrict the certificate's own period."""
        validity = {"not-before": "2026-01-01T00:00:00Z", "not-after": "2027-01-01T00:00:00Z"}
        credential: dict[str, object] = {"type": "x509-cert", "auth-id": "CN=v", "secrets": [{"id": "1"} | validity]}
        acme.sample.put_device("acme", "v", {}, [credential])
        assert payload(acme.get("x509-cert", "CN=v"))["secrets"] == [validity]

    @pytest.mark.parametrize(
        ("secrets", "reason"),
        [
            ([{"enabled": False}], Reason.SECRETS_DISABLED),
            ([{"enabled": False, "not-after": "2025-01-01T00:00:00Z"}], Reason.SECRETS_DISABLED),
            ([{"enabled": False}, {"not-after": "2025-01-01T00:00:00Z"}], Reason.SECRETS_EXPIRED),
            ([{"not-before": "2027-01-01T00:00:00Z"}], Reason.SECRETS_NOT_YET_VALID),
            (
                [{"not-after": "2025-01-01T00:00:00Z"}, {"not-before": "2027-01-01T00:00:00Z"}],
                Reason.SECRETS_NOT_YET_VALID,
            ),
        ],
    )
    def test_no_usable_secret(self, acme: Acme, secrets: list[dict[str, object]], reason: Reason) -> None:
        """amqp-apis 11.2 step 6c."""
        acme.sample.put_device("acme", "n", {}, [password("none", *secrets)])
        with pytest.raises(NotFound) as refusal:
            acme.get("hashed-password", "none")
        assert refusal.value.reason is reason

    @pytest.mark.parametrize(
        ("now", "usable"),
        [
            ("2026-01-01T00:00:00", "before"),
            ("2026-01-01T11:59:59.999999", "before"),
            ("2026-01-01T12:00:00", "both"),
            ("2026-01-01T12:00:00.000001", "both"),
            ("2026-01-01T13:00:00", "both"),
            ("2026-01-01T13:00:00.000001", "after"),
            ("2026-01-01T13:00:01", "after"),
        ],
    )
    def test_ends_of_a_period_belong_to_it(self, acme: Acme, clock: Clock, now: str, usable: str) -> None:
        """amqp-apis 11.2 step 6c: `not-after` is past, `not-before` is in the future."""
        acme.sample.put_device(
            "acme",
            "ends",
            {},
            [password("ends", {"not-after": "2026-01-01T13:00:00Z"}, {"not-before": "2026-01-01T12:00:00Z"})],
        )
        clock.now = datetime.fromisoformat(now).replace(tzinfo=UTC)
        expected = {"before": ["s0"], "both": ["s0", "s1"], "after": ["s1"]}[usable]
        # Asked twice, since the text of the present second is kept.
        for _ in range(2):
            found = payload(acme.get("hashed-password", "ends"))["secrets"]
            assert [secret["id"] for secret in found] == expected

    @pytest.mark.parametrize(
        ("ext", "context", "matches"),
        [
            ({}, {"client-id": "b"}, True),
            ({"client-id": "a"}, {}, True),
            ({"client-id": "a"}, {"client-id": None}, True),
            ({"client-id": "a"}, {"client-id": "a", "x": "y"}, True),
            ({"client-id": "a", "x": 1}, {"client-id": "a", "x": 2}, False),
            ({"n": 1}, {"n": 1.0}, True),
            ({"n": 1}, {"n": True}, False),
            ({"n": None}, {"n": 0}, False),
            ({"l": [1, {"a": "b"}]}, {"l": [1, {"a": "b"}]}, True),
            ({"l": [1, {"a": False}]}, {"l": [1, {"a": 0}]}, False),
            ({"client-certificate": "x"}, {"client-certificate": "y"}, False),
            ({"type": "x", "auth-id": "y"}, {"other": 1}, True),
        ],
    )
    def test_client_context(
        self, acme: Acme, ext: dict[str, object], context: dict[str, object], matches: bool
    ) -> None:
        """amqp-apis 11.3; what is found and unusable provisions nothing."""
        acme.sample.put_device("acme", "c", {}, [password("c", **({"ext": ext} if ext else {}))])
        body = {"type": "hashed-password", "auth-id": "c"} | context
        if matches:
            assert acme.credentials(body).status == 200
        else:
            with pytest.raises(NotFound) as refusal:
                acme.credentials(body)
            assert refusal.value.reason is Reason.CONTEXT_MISMATCH


class TestProvisioning:
    """Rows C21 to C26; the rest of provisioning is in test_provisioning.py."""

    def certificate(self, subject: str, authority: Authority = CA) -> str:
        return authority.issue(subject, not_before=NOON - timedelta(hours=1), not_after=NOON + timedelta(days=1)).base64

    def test_created_then_found(self, acme: Acme) -> None:
        """C21, C22."""
        auth_id = "CN=pump-9,OU=Plant 7,O=Acme"
        certificate = self.certificate(auth_id)
        created = acme.get("x509-cert", auth_id, client_certificate=certificate)
        assert (created.status, created.cache_control, created.tenant_id) == (201, "no-cache", "acme")
        document = payload(created)
        device_id = document["device-id"]
        comment = "Auto-provisioned at 2026-03-01T12:00:00Z"
        assert document == {
            "device-id": device_id,
            "type": "x509-cert",
            "auth-id": auth_id,
            "enabled": True,
            "comment": comment,
            "secrets": [{}],
        }
        found = acme.get("x509-cert", auth_id, client_certificate=certificate)
        assert (found.status, found.cache_control) == (200, "max-age = 180")
        assert payload(found) == document
        assert payload(acme.assertion(device_id)) == {"device-id": device_id}

    def test_many_at_once(self, acme: Acme) -> None:
        """Provisioning 3.7: the losers read again, and get what any look-up would."""
        auth_id = "CN=p,O=Acme"
        certificate = self.certificate(auth_id)
        body = to_bytes({"type": "x509-cert", "auth-id": auth_id, "client-certificate": certificate})

        async def all_at_once() -> list[Answer]:
            asked = [acme.service.get_credentials(ADAPTER, "acme", body) for _ in range(20)]
            return await asyncio.gather(*asked)

        answers = acme.sample.run(all_at_once())
        assert sorted((answer.status, answer.cache_control) for answer in answers) == [
            *[(200, "max-age = 180")] * 19,
            (201, "no-cache"),
        ]
        assert len({answer.payload for answer in answers}) == 1

    def test_refused(self, acme: Acme) -> None:
        """C23, C24, C25, C26."""
        stranger = Authority.create("CN=Stranger,O=Acme")
        auth_id = "CN=p,O=Acme"
        with pytest.raises(NotFound) as refusal:
            acme.get("x509-cert", auth_id, client_certificate=self.certificate(auth_id, stranger))
        assert refusal.value.reason is Reason.ISSUER_UNKNOWN
        with pytest.raises(BadRequest) as malformed:
            acme.get("x509-cert", auth_id, client_certificate="!!!")
        assert malformed.value.reason is Reason.CERTIFICATE_UNREADABLE
        with pytest.raises(BadRequest) as other:
            acme.get("x509-cert", auth_id, client_certificate=self.certificate("CN=q,O=Acme"))
        assert other.value.reason is Reason.SUBJECT_DIFFERS
        acme.sample.put_tenant("acme", {"trusted-ca": [CA.trust_anchor()]})
        with pytest.raises(NotFound) as off:
            acme.get("x509-cert", auth_id, client_certificate=self.certificate(auth_id))
        assert off.value.reason is Reason.ISSUER_DOES_NOT_PROVISION
        assert str(off.value) == str(refusal.value)

    @pytest.mark.row("provisioning 3.2", 5)
    def test_no_certificate(self, acme: Acme) -> None:
        body = {"type": "x509-cert", "auth-id": "CN=p,O=Acme"}
        for context in ({}, {"client-certificate": None}):
            with pytest.raises(NotFound) as refusal:
                acme.credentials(body | context)
            assert refusal.value.reason is Reason.NO_CERTIFICATE


class TestSettings:
    def test_max_age_is_configurable(self, sample: SampleStore) -> None:
        """amqp-apis 8: zero or less is `no-cache`."""
        fill(sample)
        service = make_service(sample, LookupSettings(tenant_max_age=0, assertion_max_age=-1, credentials_max_age=7))
        assert sample.run(service.get_tenant(ADAPTER, "acme")).cache_control == "no-cache"
        assert sample.run(service.assert_registration(ADAPTER, "acme", "d1", None)).cache_control == "no-cache"
        body = b'{"type":"hashed-password","auth-id":"sensor1"}'
        assert sample.run(service.get_credentials(ADAPTER, "acme", body)).cache_control == "max-age = 7"
        body = b'{"type":"psk","auth-id":"psk1"}'
        assert sample.run(service.get_credentials(ADAPTER, "acme", body)).cache_control == "no-cache"


def test_a_damaged_document_is_not_the_adapters_fault(acme: Acme) -> None:
    """amqp-apis 5: what is not part of the domain becomes status 500."""

    async def find_damaged(tenant_id: str) -> TenantRow:
        return TenantRow(tenant_id, "v", '{"enabled":')

    service = make_service(acme.sample)
    service._find_tenant = find_damaged
    with pytest.raises(DamagedRow, match="tenants: acme"):
        acme.sample.run(service.get_tenant(ADAPTER, "acme"))


def test_a_look_up_never_suspends_on_sqlite(acme: Acme) -> None:
    service = acme.service

    async def ask() -> list[int]:
        statuses = []
        for work in (
            service.get_tenant(ADAPTER, "acme"),
            service.find_tenant_by_subject_dn(ADAPTER, "CN=Device CA,OU=Plant 7,O=Acme"),
            service.get_tenant_by_body(ADAPTER, b'{"tenant-id":"nope"}'),
            service.assert_registration(ADAPTER, "acme", "d3", "gw2"),
            service.assert_registration(ADAPTER, "acme", "nope", None),
            service.assert_registration(ADAPTER, "acme", "nope", "gw1"),
            service.get_credentials(ADAPTER, "acme", b'{"type":"hashed-password","auth-id":"mix"}'),
            service.get_credentials(ADAPTER, "acme", b'{"type":"psk","auth-id":"nope"}'),
        ):
            try:
                work.send(None)
            except StopIteration as done:
                statuses.append(done.value.status)
            except RegistryError as error:
                statuses.append(error.status)
            else:
                raise AssertionError("suspended")
        return statuses

    assert acme.sample.run(ask()) == [200, 200, 404, 200, 404, 404, 200, 404]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_json_equality(one: object, other: object) -> None:
    """Equal values have equal text once numbers are written alike."""

    def normal(value: object) -> str:
        return json.dumps(_with_floats(value), sort_keys=True)

    assert _json_equal(one, one)
    assert _json_equal(one, other) is (normal(one) == normal(other))


def _with_floats(value: object) -> object:
    if isinstance(value, dict):
        return {name: _with_floats(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_floats(one) for one in value]
    # Adding zero makes one of the two zeros.
    return float(value) + 0.0 if isinstance(value, int | float) and not isinstance(value, bool) else value


class Rows:
    """`Lookups` that know one credential."""

    def __init__(self, document: dict[str, object] | None = None) -> None:
        self.row = None
        if document is not None:
            self.row = CredentialRow('d "1"', encode(stored_document(stored_credential(document))).decode())

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def find_tenant(self, tenant_id: str) -> None:
        return None

    async def find_tenants_by_anchor(self, canonical_key: str, subject_dn: str) -> list[TenantRow]:
        return []

    async def find_registration(self, tenant_id: str, device_id: str) -> None:
        return None

    async def find_group_members(self, tenant_id: str, groups: Sequence[str]) -> list[str]:
        return []

    async def find_credential(self, tenant_id: str, type_: str, auth_id: str) -> CredentialRow | None:
        return self.row

    def service(self) -> LookupService:
        return LookupService(self, None, LookupSettings(), Clock(NOON))  # type: ignore[arg-type]  # never asked


instants = st.sampled_from(
    [
        "2026-02-28T12:00:00Z",
        "2026-03-01T11:59:59Z",
        "2026-03-01T12:00:00Z",
        "2026-03-01T12:00:01Z",
        "9999-12-31T23:59:59Z",
    ]
)
json_objects = st.dictionaries(st.text(max_size=3), json_values, min_size=1, max_size=3)


@st.composite
def stored_credentials(draw: st.DrawFn) -> dict[str, object]:
    type_ = draw(st.sampled_from(["hashed-password", "psk", "x509-cert", "rpk", "my-own"]))
    confidential_members: dict[str, dict[str, object]] = {
        "hashed-password": dict(HASH),
        "psk": {"key": "c2VjcmV0"},
        "x509-cert": {},
        "rpk": {"key": "c2VjcmV0", "algorithm": "EC"},
        "my-own": {"token": draw(json_values)},
    }
    confidential = confidential_members[type_]
    common = st.fixed_dictionaries(
        {},
        optional={
            "enabled": st.booleans(),
            "not-before": instants,
            "not-after": instants,
            "comment": st.text(max_size=5),
        },
    )
    secrets = [
        {"id": f"s{number}"} | confidential | secret
        for number, secret in enumerate(draw(st.lists(common, min_size=1, max_size=3)))
    ]
    optional: dict[str, st.SearchStrategy[object]] = {"comment": st.text(max_size=5), "ext": json_objects}
    if type_ == "my-own":
        optional["issuer"] = json_values
    members = draw(st.fixed_dictionaries({"enabled": st.booleans()}, optional=optional))
    return {"type": type_, "auth-id": draw(st.text(min_size=1, max_size=5))} | members | {"secrets": secrets}


@settings(max_examples=300)
@given(stored_credentials())
def test_any_stored_credential(document: dict[str, Any]) -> None:
    """amqp-apis 11.2 step 6 and 11.4, by another way: the whole document in Python's own values."""

    def is_usable(secret: dict[str, Any]) -> bool:
        return (
            secret.get("enabled") is not False
            and ("not-before" not in secret or datetime.fromisoformat(secret["not-before"]) <= NOON)
            and ("not-after" not in secret or datetime.fromisoformat(secret["not-after"]) >= NOON)
        )

    usable = [secret for secret in document["secrets"] if is_usable(secret)]
    body = json.dumps({"type": document["type"], "auth-id": document["auth-id"]}).encode()
    asked = Rows(document).service().get_credentials(ADAPTER, "acme", body)
    if not document["enabled"] or not usable:
        with pytest.raises(NotFound) as refusal:
            asyncio.run(asked)
        assert refusal.value.reason in {
            Reason.CREDENTIAL_DISABLED,
            Reason.SECRETS_DISABLED,
            Reason.SECRETS_EXPIRED,
            Reason.SECRETS_NOT_YET_VALID,
        }
        return
    answered = payload(asyncio.run(asked))
    if document["type"] == "x509-cert":
        # Its id stays in the registry, and `enabled` may be left out where it is true.
        for secret in (*usable, *answered["secrets"]):
            secret.pop("id", None)
            secret.pop("enabled", None)
    assert answered == document | {"device-id": 'd "1"', "secrets": usable}


@settings(max_examples=200)
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_answered_or_refused(body: bytes) -> None:
    service = Rows().service()
    for work in (service.get_tenant_by_body(ADAPTER, body), service.get_credentials(ADAPTER, "acme", body)):
        with pytest.raises(RegistryError) as refusal:
            asyncio.run(work)
        assert refusal.value.status in {400, 404, 501}
        assert refusal.value.reason is not None
