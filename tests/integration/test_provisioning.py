"""Automatic provisioning through real sockets: the situations of provisioning 3.8, races, limits, templates, switches.

Row 20 of 3.8 (messaging down) is not here: the registry does not send provisioning events yet, so there is nothing
that could be down. It comes with the events of provisioning 3.6.
"""

import base64
import concurrent.futures
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.integration.adapter import Adapter, Reply
from tests.integration.certificates import Authority, Issued
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, new_id
from tests.rows import Section

ROWS = Section("provisioning 3.8")
DECISION = Section("provisioning 3.2")

SUBJECT = "CN=p,O=Acme"

A = Authority.create("CN=CA A,O=Acme")
A_NEXT = Authority.create("CN=CA A,O=Acme")
B = Authority.create("CN=CA B,O=Acme")
X = Authority.create(
    "CN=CA X,O=Acme",
    not_before=datetime.now(UTC) - timedelta(days=3),
    not_after=datetime.now(UTC) - timedelta(days=1),
)


def anchors(*cas: dict[str, object]) -> dict[str, object]:
    # Tenants of a group may share a CA (management 4.7): the tests of this file run against one registry.
    return {"trust-anchor-group": "tests", "trusted-ca": list(cas)}


def on(ca: Authority = A, **members: object) -> dict[str, object]:
    return ca.trust_anchor(auto_provisioning_enabled=True, **members)


ACME = anchors(on(), B.trust_anchor(), on(X))
"""Tenant `acme` of provisioning 3.8."""


@pytest.fixture(scope="module")
def adapter(registry: Registry) -> Iterator[Adapter]:
    with Adapter(registry.amqp_port, registry.username, registry.password) as one:
        yield one


def request_body(auth_id: str, certificate: object = None, type_: str = "x509-cert") -> str:
    body: dict[str, object] = {"type": type_, "auth-id": auth_id}
    if certificate is not None:
        body["client-certificate"] = certificate.base64 if isinstance(certificate, Issued) else certificate
    return json.dumps(body)


def ask(adapter: Adapter, tenant_id: str, auth_id: str, certificate: object = None, **more: str) -> Reply:
    return adapter.request(f"credentials/{tenant_id}", "get", body=request_body(auth_id, certificate, **more))


def count_devices(registry: Registry, tenant_id: str) -> int:
    counts = (f"(SELECT count(*) FROM {table} WHERE tenant_id = '{tenant_id}')" for table in ("devices", "credentials"))
    [(number, credentials)] = registry.query(f"SELECT {', '.join(counts)}")
    assert isinstance(number, int)
    assert isinstance(credentials, int)
    # Of what these tests provision, each device has its one credential; a device without one would be an orphan.
    assert credentials <= number
    return number


def expect(reply: Reply, status: int) -> None:
    assert reply.status == status, reply.body
    if status >= 400:
        assert reply.cache_control is None


class TestSituations:
    """Provisioning 3.8."""

    @ROWS.row(1, 2)
    @DECISION.row(2, 16)
    def test_rows_1_and_2_first_time_and_again(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        before = datetime.now(UTC).replace(microsecond=0)
        created = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT))
        expect(created, 201)
        assert created.cache_control in {None, "no-cache"}
        assert created.tenant_id == tenant_id
        payload = created.json()
        device_id = payload["device-id"]
        assert str(uuid.UUID(device_id)) == device_id
        comment = payload.pop("comment")
        assert payload == {
            "device-id": device_id,
            "type": "x509-cert",
            "auth-id": SUBJECT,
            "enabled": True,
            "secrets": [{}],
        }
        assert comment.startswith("Auto-provisioned at ")
        instant = datetime.fromisoformat(comment.removeprefix("Auto-provisioned at "))
        assert before <= instant <= datetime.now(UTC)
        found = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT))
        expect(found, 200)
        assert found.cache_control == "max-age = 180"
        assert found.json() == payload | {"comment": comment}
        # The adapter goes on with the id (provisioning 3.1), the operator sees what came to be (3.5).
        asserted = adapter.request(f"registration/{tenant_id}", "assert", properties={"device_id": device_id})
        expect(asserted, 200)
        assert asserted.json() == {"device-id": device_id}
        device = registry.request("GET", f"/v1/devices/{tenant_id}/{device_id}").object
        status = device.pop("status")
        assert device == {"enabled": True, "ext": {"comment": comment}}
        assert isinstance(status, dict)
        assert status.pop("created") == comment.removeprefix("Auto-provisioned at ")
        assert status == {"auto-provisioned": True}
        credentials = registry.request("GET", f"/v1/credentials/{tenant_id}/{device_id}").json()
        assert isinstance(credentials, list)
        (credential,) = credentials
        (secret,) = credential.pop("secrets")
        assert credential == {"type": "x509-cert", "auth-id": SUBJECT, "enabled": True, "comment": comment}
        assert secret.keys() == {"id"}
        assert count_devices(registry, tenant_id) == 1

    @pytest.mark.parametrize(
        ("auth_id", "certificate", "status"),
        [
            ROWS.case("3-none", SUBJECT, None, 404, also=[DECISION.row(5)]),
            ROWS.case("4-provisioning-off", SUBJECT, B.issue(SUBJECT), 404, also=[DECISION.row(8)]),
            ROWS.case("5-expired-ca", SUBJECT, X.issue(SUBJECT), 404),
            ROWS.case("6-unknown-ca", SUBJECT, Authority.create("CN=Stranger").issue(SUBJECT), 404),
            ROWS.case("7-other-subject", "CN=q,O=Acme", A.issue(SUBJECT), 400),
            ROWS.case("8-other-spelling", "CN=p, O=Acme", A.issue(SUBJECT), 400),
            ROWS.case("9-no-base64", SUBJECT, "%%%", 400),
            ROWS.case("10-random-bytes", SUBJECT, base64.b64encode(bytes(range(7, 207))).decode(), 400),
            ROWS.case("11-number", SUBJECT, 4711, 400),
        ],
    )
    def test_rows_3_to_11(
        self, registry: Registry, adapter: Adapter, auth_id: str, certificate: object, status: int
    ) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        expect(ask(adapter, tenant_id, auth_id, certificate), status)
        assert count_devices(registry, tenant_id) == 0

    @ROWS.row(12)
    @DECISION.row(4)
    def test_row_12_other_type(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT), type_="hashed-password"), 404)
        assert count_devices(registry, tenant_id) == 0

    @ROWS.row(13)
    @DECISION.row(1)
    def test_row_13_unknown_tenant(self, adapter: Adapter) -> None:
        expect(ask(adapter, new_id(), SUBJECT, A.issue(SUBJECT)), 404)

    @ROWS.row(14)
    @DECISION.row(7)
    def test_row_14_disabled_tenant(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME | {"enabled": False})
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 404)
        assert count_devices(registry, tenant_id) == 0

    @pytest.mark.parametrize(
        "unusable",
        [
            {"enabled": False, "secrets": [{}]},
            {"secrets": [{"enabled": False}]},
            {"secrets": [{"not-after": "2020-01-01T00:00:00Z"}]},
            {"secrets": [{}], "ext": {"client-certificate": "another"}},
        ],
        ids=["disabled", "secret-disabled", "secret-expired", "context"],
    )
    @ROWS.row(15)
    @DECISION.row(3)
    def test_row_15_unusable_credential(
        self, registry: Registry, adapter: Adapter, unusable: dict[str, object]
    ) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        device_id = registry.create_device(tenant_id)
        registry.set_credentials(tenant_id, device_id, [{"type": "x509-cert", "auth-id": SUBJECT} | unusable])
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 404)
        assert count_devices(registry, tenant_id) == 1

    @ROWS.row(16)
    @DECISION.row(13)
    def test_row_16_limit(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME | {"registration-limits": {"max-devices": 1}})
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 201)
        expect(ask(adapter, tenant_id, "CN=q", A.issue("CN=q")), 403)
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 200)
        assert count_devices(registry, tenant_id) == 1

    @ROWS.row(17)
    @DECISION.row(12)
    def test_row_17_template_without_its_attribute(self, registry: Registry, adapter: Adapter) -> None:
        document = anchors(on(auto_provisioning_device_id_template="{{subject-ou}}"))
        tenant_id = registry.create_tenant(document=document)
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 400)
        assert count_devices(registry, tenant_id) == 0

    @ROWS.row(18)
    @DECISION.row(14)
    def test_row_18_device_id_is_taken(self, registry: Registry, adapter: Adapter) -> None:
        document = anchors(on(auto_provisioning_device_id_template="{{subject-cn}}"))
        tenant_id = registry.create_tenant(document=document)
        registry.create_device(tenant_id, "p", {"ext": {"mine": True}})
        other: list[dict[str, object]] = [{"type": "x509-cert", "auth-id": "CN=other", "secrets": [{}]}]
        registry.set_credentials(tenant_id, "p", other)
        path = f"/v1/credentials/{tenant_id}/p"
        before = registry.request("GET", path).json()
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 409)
        assert registry.request("GET", path).json() == before
        device = registry.request("GET", f"/v1/devices/{tenant_id}/p").object
        assert device["ext"] == {"mine": True}
        assert count_devices(registry, tenant_id) == 1


class TestRaces:
    """Provisioning 3.7; row 19 of 3.8."""

    @pytest.fixture
    def adapters(self, registry: Registry) -> Iterator[list[Adapter]]:
        with ExitStack() as stack:
            yield [
                stack.enter_context(Adapter(registry.amqp_port, registry.username, registry.password))
                for _ in range(16)
            ]

    @pytest.mark.parametrize("template", [None, "{{subject-cn}}"])
    @ROWS.row(19)
    def test_row_19_many_at_once(self, registry: Registry, adapters: list[Adapter], template: str | None) -> None:
        members: dict[str, Any] = {} if template is None else {"auto_provisioning_device_id_template": template}
        tenant_id = registry.create_tenant(document=anchors(on(**members)))
        for adapter in adapters:
            adapter.links(f"credentials/{tenant_id}")
        for number in range(10):
            subject = f"CN=p{number}"
            # Each with a certificate of its own: all prove the same subject.
            certificates = [A.issue(subject) for _ in adapters]
            correlations = [
                send(adapter, tenant_id, request_body(subject, certificate))
                for adapter, certificate in zip(adapters, certificates, strict=True)
            ]
            replies = [
                adapter.await_reply(correlation) for adapter, correlation in zip(adapters, correlations, strict=True)
            ]
            assert sorted(reply.status or 0 for reply in replies) == [200] * (len(adapters) - 1) + [201]
            assert len({reply.json()["device-id"] for reply in replies}) == 1
            assert count_devices(registry, tenant_id) == number + 1

    def test_many_at_once_on_one_link(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        body = request_body(SUBJECT, A.issue(SUBJECT))
        correlations = [send(adapter, tenant_id, body) for _ in range(50)]
        statuses = [adapter.await_reply(correlation).status or 0 for correlation in correlations]
        assert sorted(statuses) == [200] * 49 + [201]
        assert count_devices(registry, tenant_id) == 1

    def test_the_limit_holds_for_many_at_once(self, registry: Registry, adapters: list[Adapter]) -> None:
        tenant_id = registry.create_tenant(document=ACME | {"registration-limits": {"max-devices": 5}})
        correlations = [
            send(adapter, tenant_id, request_body(f"CN=p{number}", A.issue(f"CN=p{number}")))
            for number, adapter in enumerate(adapters)
        ]
        statuses = [
            adapter.await_reply(correlation).status or 0
            for adapter, correlation in zip(adapters, correlations, strict=True)
        ]
        assert sorted(statuses) == [201] * 5 + [403] * 11
        assert count_devices(registry, tenant_id) == 5

    def test_an_operator_at_the_same_time(self, registry: Registry, adapter: Adapter) -> None:
        """Whoever is first has the auth-id; there is never a second device with it."""
        tenant_id = registry.create_tenant(document=ACME)
        adapter.links(f"credentials/{tenant_id}")

        def register(number: int) -> int:
            credentials = [{"type": "x509-cert", "auth-id": f"CN=p{number}", "secrets": [{}]}]
            path = f"/v1/credentials/{tenant_id}/by-hand-{number}"
            return registry.request("PUT", path, credentials).status

        for number in range(20):
            registry.create_device(tenant_id, f"by-hand-{number}")
        with concurrent.futures.ThreadPoolExecutor(1) as operator:
            for number in range(20):
                body = request_body(f"CN=p{number}", A.issue(f"CN=p{number}"))
                by_hand = operator.submit(register, number)
                reply = adapter.await_reply(send(adapter, tenant_id, body))
                assert (by_hand.result(), reply.status) in {(204, 200), (409, 201)}
                assert (reply.json()["device-id"] == f"by-hand-{number}") is (reply.status == 200)

    def test_what_was_answered_survives_a_crash(self, new_registry: NewRegistry) -> None:
        registry = new_registry()
        tenant_id = registry.create_tenant(document=ACME)
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            reply = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT))
            expect(reply, 201)
            registry.kill()
        registry.start()
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            again = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT))
            expect(again, 200)
            assert again.json() == reply.json()


def send(adapter: Adapter, tenant_id: str, body: str) -> str:
    """Send a credentials request without waiting for anything; return what its reply will refer to."""
    sender, receiver = adapter.links(f"credentials/{tenant_id}")
    correlation = f"test-{uuid.uuid4()}"
    adapter.send(sender, adapter.message("get", reply_to=receiver.source.address, body=body, message_id=correlation))
    return correlation


class TestAfterwards:
    """Provisioning 3.5 and 3.7: repeats, renewal, deletion, locking out."""

    def test_renewed_certificate(self, registry: Registry, adapter: Adapter) -> None:
        """No validity is taken from the certificate, so one with other dates and another key finds the device."""
        tenant_id = registry.create_tenant(document=ACME)
        soon = datetime.now(UTC) + timedelta(minutes=5)
        created = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT, not_after=soon))
        expect(created, 201)
        found = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT, algorithm="RSA"))
        expect(found, 200)
        assert found.json() == created.json()
        # Once there, the credential is found without any certificate, too.
        expect(ask(adapter, tenant_id, SUBJECT), 200)

    def test_deleted_device_comes_back_as_a_new_one(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        first = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)).json()["device-id"]
        assert registry.request("DELETE", f"/v1/devices/{tenant_id}/{first}").status == 204
        again = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT))
        expect(again, 201)
        assert again.json()["device-id"] != first
        registry.request("DELETE", f"/v1/devices/{tenant_id}/{again.json()['device-id']}")
        assert registry.request("PUT", f"/v1/tenants/{tenant_id}", anchors(A.trust_anchor())).status == 204
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 404)

    def test_locked_out_by_its_credential(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        device_id = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)).json()["device-id"]
        disabled = [{"type": "x509-cert", "auth-id": SUBJECT, "enabled": False, "secrets": [{}]}]
        registry.set_credentials(tenant_id, device_id, disabled)
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 404)
        assert count_devices(registry, tenant_id) == 1

    def test_refusals_tell_nothing(self, registry: Registry, adapter: Adapter) -> None:
        """Provisioning 3.2: the answer of rows 7 to 10 is that of a credential that nobody knows."""
        tenant_id = registry.create_tenant(document=ACME)
        unknown = ask(adapter, tenant_id, "nobody", type_="psk")
        liar = B.issue(SUBJECT, issuer_name="CN=CA A,O=Acme")
        for certificate in (B.issue(SUBJECT), X.issue(SUBJECT), liar):
            reply = ask(adapter, tenant_id, SUBJECT, certificate)
            expect(reply, 404)
            assert (reply.body, reply.properties) == (unknown.body, unknown.properties)


class TestCertificates:
    """Provisioning 3.2, rows 6 to 11."""

    @DECISION.row(6)
    def test_base64_of_either_alphabet(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        forms: list[Callable[[bytes], str]] = [
            lambda der: base64.urlsafe_b64encode(der).decode(),
            lambda der: base64.b64encode(der).decode().rstrip("="),
            lambda der: base64.b64encode(der).decode(),
        ]
        for number, form in enumerate(forms):
            subject = f"CN=f{number}"
            certificate = A.issue(subject)
            while not {"+", "/"} & set(certificate.base64):
                certificate = A.issue(subject)
            expect(ask(adapter, tenant_id, subject, form(certificate.der)), 201)
        pem = A.issue("CN=pem").pem
        expect(ask(adapter, tenant_id, "CN=pem", base64.b64encode(pem).decode()), 201)

    @pytest.mark.parametrize("algorithm", ["EC", "RSA"])
    def test_kinds_of_keys(self, registry: Registry, adapter: Adapter, algorithm: Any) -> None:
        ca = Authority.create(f"CN=CA {algorithm}", algorithm=algorithm)
        tenant_id = registry.create_tenant(document=anchors(on(ca)))
        expect(ask(adapter, tenant_id, SUBJECT, ca.issue(SUBJECT, algorithm=algorithm)), 201)

    @DECISION.row(9)
    def test_certificate_out_of_date(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=ACME)
        now = datetime.now(UTC)
        expired = A.issue(SUBJECT, not_before=now - timedelta(days=2), not_after=now - timedelta(minutes=1))
        expect(ask(adapter, tenant_id, SUBJECT, expired), 404)
        early = A.issue(SUBJECT, not_before=now + timedelta(hours=1))
        expect(ask(adapter, tenant_id, SUBJECT, early), 404)

    @DECISION.row(8)
    def test_key_roll_over(self, registry: Registry, adapter: Adapter) -> None:
        """Two entries of one name, of which the one whose key signed counts."""
        tenant_id = registry.create_tenant(
            document=anchors(
                on(A, id="old", auto_provisioning_device_id_template="old-{{subject-cn}}"),
                on(A_NEXT, id="new", auto_provisioning_device_id_template="new-{{subject-cn}}"),
            )
        )
        for ca, subject, device_id in ((A, "CN=a", "old-a"), (A_NEXT, "CN=b", "new-b")):
            reply = ask(adapter, tenant_id, subject, ca.issue(subject))
            expect(reply, 201)
            assert reply.json()["device-id"] == device_id

    @DECISION.row(10)
    def test_signature(self, registry: Registry, adapter: Adapter) -> None:
        """The default: always checked."""
        tenant_id = registry.create_tenant(document=ACME)
        liar = B.issue(SUBJECT, issuer_name="CN=CA A,O=Acme")
        expect(ask(adapter, tenant_id, SUBJECT, liar), 404)
        assert count_devices(registry, tenant_id) == 0


class TestTemplates:
    """Provisioning 3.3 and 3.4."""

    def test_device_id(self, registry: Registry, adapter: Adapter) -> None:
        """The example of 3.4, whose result is a valid id."""
        document = anchors(on(auto_provisioning_device_id_template="{{subject-o}}-{{subject-cn}}"))
        tenant_id = registry.create_tenant(document=document)
        subject = "CN=pump-9,OU=Plant 7,O=Acme"
        reply = ask(adapter, tenant_id, subject, A.issue(subject))
        expect(reply, 201)
        assert reply.json()["device-id"] == "Acme-pump-9"
        assert registry.request("GET", f"/v1/devices/{tenant_id}/Acme-pump-9").status == 200

    @DECISION.row(12)
    def test_device_id_against_the_pattern(self, registry: Registry, adapter: Adapter) -> None:
        """Most DNs have a comma."""
        document = anchors(on(auto_provisioning_device_id_template="{{subject-dn}}"))
        tenant_id = registry.create_tenant(document=document)
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 400)
        reply = ask(adapter, tenant_id, "CN=alone", A.issue("CN=alone"))
        expect(reply, 201)
        assert reply.json()["device-id"] == "CN=alone"

    @DECISION.row(11)
    def test_auth_id(self, registry: Registry, adapter: Adapter) -> None:
        """The literal result, and what stock adapters make of it (3.3)."""
        template = "{{subject-dn}}@plant"
        tenant_id = registry.create_tenant(document=anchors(on(auth_id_template=template)))
        tenant = adapter.request("tenant", "get", body=json.dumps({"tenant-id": tenant_id})).json()
        assert tenant["trusted-ca"][0]["auth-id-template"] == template
        certificate = A.issue(r"CN=Smith\, John,O=Acme")
        for auth_id in (r"CN=Smith\, John,O=Acme@plant", "CN=Smith, John,O=Acme@plant"):
            reply = ask(adapter, tenant_id, auth_id, certificate)
            expect(reply, 201)
            assert reply.json()["auth-id"] == auth_id
        expect(ask(adapter, tenant_id, "CN=Smith,O=Acme@plant", certificate), 400)


class TestGateways:
    """Provisioning 5."""

    def test_flag(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document=anchors(on(auto_provision_as_gateway=True)))
        device_id = ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)).json()["device-id"]
        path = f"/v1/devices/{tenant_id}/{device_id}"
        assert registry.request("GET", path).object["authorities"] == ["auto-provisioning-enabled"]
        assert registry.request("PUT", f"/v1/tenants/{tenant_id}", anchors(on())).status == 204
        assert registry.request("GET", path).object["authorities"] == ["auto-provisioning-enabled"]
        other = ask(adapter, tenant_id, "CN=q", A.issue("CN=q")).json()["device-id"]
        assert "authorities" not in registry.request("GET", f"/v1/devices/{tenant_id}/{other}").object

    def test_from_the_certificate_to_the_edge_device(self, registry: Registry, adapter: Adapter) -> None:
        """A CA, a gateway by its certificate, an edge device through it, all asserted as an adapter does."""
        ca = on(auto_provision_as_gateway=True, auto_provisioning_device_id_template="{{subject-cn}}")
        tenant_id = registry.create_tenant(document=anchors(ca))
        expect(assert_registration(adapter, tenant_id, "sensor-1", "gw-7"), 404)
        created = ask(adapter, tenant_id, "CN=gw-7", A.issue("CN=gw-7"))
        expect(created, 201)
        gateway_id = created.json()["device-id"]
        expect(assert_registration(adapter, tenant_id, gateway_id), 200)
        asserted = assert_registration(adapter, tenant_id, "sensor-1", gateway_id)
        expect(asserted, 200)
        assert asserted.json() == {"device-id": "sensor-1", "via": ["gw-7"]}
        assert assert_registration(adapter, tenant_id, "sensor-1").json() == asserted.json()
        # Switching the flag off does not touch the gateway.
        assert registry.request("PUT", f"/v1/tenants/{tenant_id}", anchors(on())).status == 204
        expect(assert_registration(adapter, tenant_id, "sensor-2", gateway_id), 200)
        # What an edge device brings along is nobody's.
        expect(assert_registration(adapter, tenant_id, "sensor-3", "sensor-1"), 404)
        assert count_devices(registry, tenant_id) == 3


GATEWAY = {"authorities": ["auto-provisioning-enabled"]}


def assert_registration(adapter: Adapter, tenant_id: str, device_id: str, gateway_id: str | None = None) -> Reply:
    properties = {"device_id": device_id} | ({} if gateway_id is None else {"gateway_id": gateway_id})
    return adapter.request(f"registration/{tenant_id}", "assert", properties=properties)


def send_assert(adapter: Adapter, tenant_id: str, device_id: str, gateway_id: str) -> str:
    """Send an assertion without waiting for anything; return what its reply will refer to."""
    sender, receiver = adapter.links(f"registration/{tenant_id}")
    correlation = f"test-{uuid.uuid4()}"
    properties = {"device_id": device_id, "gateway_id": gateway_id}
    message = adapter.message("assert", reply_to=receiver.source.address, properties=properties, message_id=correlation)
    adapter.send(sender, message)
    return correlation


class TestEdgeDevices:
    """Provisioning 4."""

    @pytest.fixture
    def tenant_id(self, registry: Registry) -> str:
        tenant_id = registry.create_tenant()
        registry.create_device(tenant_id, "gw-a", GATEWAY)
        registry.create_device(tenant_id, "gw-b", GATEWAY)
        return tenant_id

    @pytest.fixture
    def adapters(self, registry: Registry, tenant_id: str) -> Iterator[list[Adapter]]:
        with ExitStack() as stack:
            adapters = [
                stack.enter_context(Adapter(registry.amqp_port, registry.username, registry.password)) for _ in range(8)
            ]
            for adapter in adapters:
                adapter.links(f"registration/{tenant_id}")
            yield adapters

    def test_4_1_device_id(self, registry: Registry, adapter: Adapter, tenant_id: str) -> None:
        for device_id in ("a b", "a/b", "ä", ""):
            expect(assert_registration(adapter, tenant_id, device_id, "gw-a"), 400)
        assert count_devices(registry, tenant_id) == 2

    def test_4_1_gateway_loses_its_right(self, registry: Registry, adapter: Adapter, tenant_id: str) -> None:
        """What it has brought along stays; nothing new comes."""
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 200)
        assert registry.request("PUT", f"/v1/devices/{tenant_id}/gw-a", {}).status == 204
        expect(assert_registration(adapter, tenant_id, "e-2", "gw-a"), 404)
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 200)
        assert registry.request("PUT", f"/v1/devices/{tenant_id}/gw-a", GATEWAY | {"enabled": False}).status == 204
        expect(assert_registration(adapter, tenant_id, "e-2", "gw-a"), 404)
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 403)
        assert count_devices(registry, tenant_id) == 3

    def test_4_3_two_gateways_of_no_common_group(
        self, registry: Registry, adapters: list[Adapter], tenant_id: str
    ) -> None:
        """4.3 row 4: one wins, the other may not act for its device; asked again it is the same."""
        for number in range(10):
            replies = self.at_once(adapters, tenant_id, f"e-{number}", ("gw-a", "gw-b"))
            winners = {gateway_id for gateway_id, reply in replies if reply.status == 200}
            assert len(winners) == 1
            for gateway_id, reply in replies:
                expect(reply, 200 if gateway_id in winners else 403)
            assert count_devices(registry, tenant_id) == 3 + number
            for gateway_id in ("gw-a", "gw-b"):
                expected = 200 if gateway_id in winners else 403
                expect(assert_registration(adapters[0], tenant_id, f"e-{number}", gateway_id), expected)

    def test_4_3_two_gateways_of_a_common_group(self, registry: Registry, adapters: list[Adapter]) -> None:
        tenant_id = registry.create_tenant()
        for gateway_id, groups in (("gw-a", ["x", "hall"]), ("gw-b", ["hall", "y"])):
            registry.create_device(tenant_id, gateway_id, GATEWAY | {"memberOf": groups})
        for number in range(5):
            for _, reply in self.at_once(adapters, tenant_id, f"e-{number}", ("gw-a", "gw-b")):
                expect(reply, 200)
                assert sorted(reply.json()["via"]) == ["gw-a", "gw-b"]
            assert count_devices(registry, tenant_id) == 3 + number

    def test_4_3_one_gateway_many_times(self, registry: Registry, adapters: list[Adapter], tenant_id: str) -> None:
        for number in range(10):
            for _, reply in self.at_once(adapters, tenant_id, f"e-{number}", ("gw-a",)):
                expect(reply, 200)
                assert reply.json() == {"device-id": f"e-{number}", "via": ["gw-a"]}
            assert count_devices(registry, tenant_id) == 3 + number

    def at_once(
        self, adapters: list[Adapter], tenant_id: str, device_id: str, gateways: tuple[str, ...]
    ) -> list[tuple[str, Reply]]:
        asked = [gateways[number % len(gateways)] for number in range(len(adapters))]
        correlations = [
            send_assert(adapter, tenant_id, device_id, gateway_id)
            for adapter, gateway_id in zip(adapters, asked, strict=True)
        ]
        replies = [
            adapter.await_reply(correlation) for adapter, correlation in zip(adapters, correlations, strict=True)
        ]
        return list(zip(asked, replies, strict=True))

    def test_4_1_the_limit_holds_for_many_at_once(self, registry: Registry, adapter: Adapter) -> None:
        tenant_id = registry.create_tenant(document={"registration-limits": {"max-devices": 6}})
        registry.create_device(tenant_id, "gw-a", GATEWAY)
        correlations = [send_assert(adapter, tenant_id, f"e-{number}", "gw-a") for number in range(20)]
        statuses = [adapter.await_reply(correlation).status or 0 for correlation in correlations]
        assert sorted(statuses) == [200] * 5 + [403] * 15
        assert count_devices(registry, tenant_id) == 6

    def test_the_gateway_is_disabled_meanwhile(self, registry: Registry, adapters: list[Adapter]) -> None:
        """Each is answered, and nothing is created once the operator has his 204."""
        tenant_id = registry.create_tenant()
        registry.create_device(tenant_id, "gw-a", GATEWAY)
        with concurrent.futures.ThreadPoolExecutor(1) as operator:
            correlations = [
                (adapter, send_assert(adapter, tenant_id, f"e-{number}-{index}", "gw-a"))
                for number in range(10)
                for index, adapter in enumerate(adapters)
            ]
            change = operator.submit(
                registry.request, "PUT", f"/v1/devices/{tenant_id}/gw-a", GATEWAY | {"enabled": False}
            )
            statuses = [adapter.await_reply(correlation).status or 0 for adapter, correlation in correlations]
            assert change.result().status == 204
        assert set(statuses) <= {200, 403, 404}
        # 403: created, and the gateway disabled before its answer was made up.
        assert count_devices(registry, tenant_id) == 1 + len([status for status in statuses if status != 404])
        expect(assert_registration(adapters[0], tenant_id, "late", "gw-a"), 404)

    def test_deleted_and_asserted_again(self, registry: Registry, adapter: Adapter, tenant_id: str) -> None:
        """As 3.7: it comes back as long as the gateway may; also if that is another one now."""
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 200)
        assert registry.request("DELETE", f"/v1/devices/{tenant_id}/e-1").status == 204
        expect(assert_registration(adapter, tenant_id, "e-1"), 404)
        again = assert_registration(adapter, tenant_id, "e-1", "gw-b")
        expect(again, 200)
        assert again.json() == {"device-id": "e-1", "via": ["gw-b"]}
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 403)

    def test_a_disabled_one_stays_out(self, registry: Registry, adapter: Adapter, tenant_id: str) -> None:
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 200)
        path = f"/v1/devices/{tenant_id}/e-1"
        assert registry.request("PUT", path, {"enabled": False, "via": ["gw-a"]}).status == 204
        expect(assert_registration(adapter, tenant_id, "e-1", "gw-a"), 404)
        assert registry.request("GET", path).object["enabled"] is False


class TestSettings:
    @DECISION.row(10)
    def test_signature_switch_off(self, new_registry: NewRegistry) -> None:
        """What only claims the issuer is taken, as by the reference."""
        registry = new_registry({"provisioning.verify_signature": "false"})
        tenant_id = registry.create_tenant(document=ACME)
        liar = B.issue(SUBJECT, issuer_name="CN=CA A,O=Acme")
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            expect(ask(adapter, tenant_id, SUBJECT, liar), 201)
            # All other rows stand.
            expect(ask(adapter, tenant_id, "CN=q", liar), 400)
            expect(ask(adapter, tenant_id, "CN=q", B.issue("CN=q")), 404)

    def test_the_tenants_own_limit_wins(self, new_registry: NewRegistry) -> None:
        """Provisioning 3.7, management 5.7: the registry's limit counts for tenants without one."""
        registry = new_registry({"devices.max_per_tenant": "2"})
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            for own, allowed in ((-1, 2), (1, 1), (3, 3), (0, 0)):
                limits = {"registration-limits": {"max-devices": own}}
                tenant_id = registry.create_tenant(document=ACME | limits)
                for number in range(3):
                    reply = ask(adapter, tenant_id, f"CN=p{number}", A.issue(f"CN=p{number}"))
                    expect(reply, 201 if number < allowed else 403)

    @DECISION.row(13)
    def test_credentials_limit(self, registry: Registry, adapter: Adapter) -> None:
        limits = {"registration-limits": {"max-credentials-per-device": 0}}
        tenant_id = registry.create_tenant(document=ACME | limits)
        expect(ask(adapter, tenant_id, SUBJECT, A.issue(SUBJECT)), 403)
        assert count_devices(registry, tenant_id) == 0

    def test_device_id_pattern(self, new_registry: NewRegistry) -> None:
        """Provisioning 2: configurable, and then good for ids made from a template."""
        registry = new_registry({"ids.device_pattern": "[a-z0-9,= CNO]+"})
        document = anchors(on(auto_provisioning_device_id_template="{{subject-dn}}"))
        tenant_id = registry.create_tenant(document=document)
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            reply = ask(adapter, tenant_id, "CN=p 1,O=acme", A.issue("CN=p 1,O=acme"))
            expect(reply, 201)
            assert reply.json()["device-id"] == "CN=p 1,O=acme"


class TestCrash:
    def test_edge_devices_are_whole_or_not_there(self, new_registry: NewRegistry) -> None:
        """Provisioning 4.2; what was answered is there."""
        registry = new_registry()
        tenant_id = registry.create_tenant()
        registry.create_device(tenant_id, "gw-a", GATEWAY | {"memberOf": ["hall"]})
        answered: list[str] = []
        for life in range(3):
            with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
                correlations = {
                    send_assert(adapter, tenant_id, f"e-{life}-{number}", "gw-a"): f"e-{life}-{number}"
                    for number in range(60)
                }
                for correlation, device_id in list(correlations.items())[: 15 * life]:
                    expect(adapter.await_reply(correlation), 200)
                    answered.append(device_id)
                registry.kill()
            registry.start()
        rows = registry.query(
            "SELECT d.device_id, d.auto_provisioned, d.document, s.version FROM devices d LEFT JOIN credential_sets"
            f" s ON s.tenant_id = d.tenant_id AND s.device_id = d.device_id WHERE d.tenant_id = '{tenant_id}'",
        )
        assert registry.query(f"SELECT devices FROM tenant_usage WHERE tenant_id = '{tenant_id}'") == [(len(rows),)]
        devices = {device_id: (flag, json.loads(text), version) for device_id, flag, text, version in rows}
        del devices["gw-a"]
        assert set(answered) <= devices.keys()
        for flag, document, version in devices.values():
            assert (flag, document) == (1, {"enabled": True, "via": ["gw-a"], "viaGroups": ["hall"]})
            assert version is not None
        with Adapter(registry.amqp_port, registry.username, registry.password) as adapter:
            for life in range(3):
                for number in range(60):
                    expect(assert_registration(adapter, tenant_id, f"e-{life}-{number}", "gw-a"), 200)
