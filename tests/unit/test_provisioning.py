"""First contact, on a real SQLite store. Rows are those of provisioning 3.2 unless another section is named."""

import asyncio
import base64
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import AsyncMock

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from tests.integration.certificates import Authority, Issued
from tests.rows import Section
from tests.unit.sample_store import ADAPTER, Clock, SampleStore

from kamado.devices import Device
from kamado.document import Identifiers
from kamado.errors import BadRequest, Forbidden, NotFound, Reason, RegistryError
from kamado.provisioning import (
    FirstContact,
    HookFailed,
    HookQuestion,
    HookReply,
    ProvisionedCredential,
    ProvisioningService,
    ProvisioningSettings,
)
from kamado.store import (
    Change,
    ChangeKind,
    DamagedRow,
    DeviceKey,
    Lookups,
    RegistrationRow,
    Searches,
    Store,
    Transaction,
    Work,
)
from kamado.tenants import parse_tenant

ROWS = Section("provisioning 3.2")
SITUATIONS = Section("provisioning 3.8")

T = TypeVar("T")

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)


def authority(name: str, *, days: int = 365) -> Authority:
    return Authority.create(name, not_before=NOON - 2 * DAY, not_after=NOON + days * DAY)


A = authority("CN=CA A,O=Acme")
A_NEW = authority("CN=CA A,O=Acme")
B = authority("CN=CA B,O=Acme")
X = authority("CN=CA X,O=Acme", days=-1)


def issue(subject: str | x509.Name, ca: Authority = A, **arguments: Any) -> Issued:
    period: dict[str, Any] = {"not_before": NOON - DAY, "not_after": NOON + DAY}
    return ca.issue(subject, **(period | arguments))


def on(ca: Authority, **members: object) -> dict[str, object]:
    return ca.trust_anchor(auto_provisioning_enabled=True, **members)


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@pytest.fixture
def sample(tmp_path: Path, clock: Clock) -> Iterator[SampleStore]:
    """Tenant `acme` of provisioning 3.8."""
    one = SampleStore(tmp_path, clock)
    one.put_tenant("acme", {"trusted-ca": [on(A), B.trust_anchor(), on(X)]})
    yield one
    one.close()


class Contact:
    """What a first contact comes to."""

    def __init__(self, sample: SampleStore, store: Store | None = None, **settings: Any) -> None:
        self.sample = sample
        self.service = ProvisioningService(
            store or sample.store, ProvisioningSettings(**settings), Identifiers(), sample.clock
        )

    def __call__(self, auth_id: str, certificate: object, tenant_id: str = "acme") -> ProvisionedCredential:
        given = certificate.base64 if isinstance(certificate, Issued) else certificate
        return self.sample.run(self.service.provision(ADAPTER, tenant_id, auth_id, given))

    def refused(self, auth_id: str, certificate: object, tenant_id: str = "acme") -> tuple[int, Reason | None]:
        before = self.sample.count_devices(tenant_id)
        with pytest.raises(RegistryError) as refusal:
            self(auth_id, certificate, tenant_id)
        assert self.sample.count_devices(tenant_id) == before
        return refusal.value.status, refusal.value.reason


@pytest.fixture
def contact(sample: SampleStore) -> Contact:
    return Contact(sample)


SUBJECT = "CN=p,O=Acme"


class TestCreated:
    """Provisioning 3.5."""

    def test_device_and_credential(self, sample: SampleStore, contact: Contact) -> None:
        created = contact(SUBJECT, issue(SUBJECT))
        assert created.status == 201
        assert str(uuid.UUID(created.device_id)) == created.device_id
        assert uuid.UUID(created.device_id).version == 4
        stored = sample.find_device("acme", created.device_id)
        assert stored is not None
        comment = "Auto-provisioned at 2026-03-01T12:00:00Z"
        assert (stored.auto_provisioned, stored.notification_sent, stored.created) == (True, False, NOON)
        assert stored.updated is None
        assert stored.device.enabled
        assert stored.device.ext == {"comment": comment}
        assert not stored.device.via
        assert not stored.device.defaults
        assert not stored.device.authorities
        credentials = sample.find_credentials("acme", created.device_id)
        assert credentials is not None
        assert credentials.credentials == (created.credential,)
        (credential,) = credentials.credentials
        assert (credential.type, credential.auth_id, credential.enabled) == ("x509-cert", SUBJECT, True)
        assert credential.comment == comment
        (secret,) = credential.secrets
        assert secret.enabled is None
        assert secret.not_before is None
        assert secret.not_after is None
        assert credentials.version != stored.version

    def test_as_gateway(self, sample: SampleStore, contact: Contact) -> None:
        """Provisioning 5."""
        sample.put_tenant("acme", {"trusted-ca": [on(A, auto_provision_as_gateway=True)]})
        stored = sample.find_device("acme", contact(SUBJECT, issue(SUBJECT)).device_id)
        assert stored is not None
        assert list(stored.device.authorities) == ["auto-provisioning-enabled"]

    def test_is_recorded_under_the_adapters_name(self, sample: SampleStore) -> None:
        store = StoreThat(sample.store)
        created = Contact(sample, store)(SUBJECT, issue(SUBJECT))
        assert [(change.kind, change.principal, change.before) for change in store.changes] == [
            (ChangeKind.DEVICE, ADAPTER.name, None),
            (ChangeKind.CREDENTIALS, ADAPTER.name, None),
        ]
        assert {change.resource_id for change in store.changes} == {created.device_id}

    def test_again_after_the_device_was_deleted(self, sample: SampleStore, contact: Contact) -> None:
        """Provisioning 3.7: anew, with a new id."""
        first = contact(SUBJECT, issue(SUBJECT))
        sample.delete_device("acme", first.device_id)
        second = contact(SUBJECT, issue(SUBJECT))
        assert second.status == 201
        assert second.device_id != first.device_id

    def test_a_renewed_certificate_finds_the_device(self, contact: Contact) -> None:
        """Provisioning 3.5."""
        first = contact(SUBJECT, issue(SUBJECT))
        assert contact(SUBJECT, issue(SUBJECT)) == ProvisionedCredential(device_id=first.device_id, credential=None)


class TestDecision:
    """Provisioning 3.2."""

    @ROWS.row(1)
    def test_row_1_tenant_exists(self, sample: SampleStore, contact: Contact) -> None:
        assert contact.refused(SUBJECT, issue(SUBJECT), "nope") == (404, Reason.TENANT_UNKNOWN)
        sample.put_tenant("acme", {"alias": "plant", "trusted-ca": [on(A)]})
        assert contact.refused(SUBJECT, issue(SUBJECT), "plant") == (404, Reason.TENANT_UNKNOWN)
        assert contact.refused(SUBJECT, "%%%", "nope") == (404, Reason.TENANT_UNKNOWN)

    @pytest.mark.parametrize(
        "certificate",
        [
            SITUATIONS.case("9", "%%%"),
            SITUATIONS.case("10", base64.b64encode(bytes(range(256))).decode()),
            SITUATIONS.case("11", 7),
            pytest.param("", id="empty"),
            pytest.param({}, id="object"),
            pytest.param(True, id="boolean"),
            pytest.param(issue(SUBJECT).base64[:-40], id="cut"),
        ],
    )
    @ROWS.row(6)
    def test_row_6_certificate_is_readable(self, contact: Contact, certificate: object) -> None:
        assert contact.refused(SUBJECT, certificate) == (400, Reason.CERTIFICATE_UNREADABLE)
        with pytest.raises(BadRequest, match=r"^client-certificate: (?!client-certificate)"):
            contact(SUBJECT, certificate)

    @pytest.mark.parametrize("form", ["url-safe", "unpadded", "pem"])
    @ROWS.row(6)
    def test_row_6_forms_of_base64(self, contact: Contact, form: str) -> None:
        # A certificate whose Base64 needs padding and has a character that the alphabets write differently.
        certificate = issue(SUBJECT)
        while not (certificate.base64.endswith("=") and {"+", "/"} & set(certificate.base64)):
            certificate = issue(SUBJECT)
        text = {
            "url-safe": base64.urlsafe_b64encode(certificate.der).decode(),
            "unpadded": certificate.base64.rstrip("="),
            "pem": base64.b64encode(certificate.pem).decode(),
        }[form]
        assert contact(SUBJECT, text).status == 201

    @ROWS.row(7)
    def test_row_7_tenant_is_enabled(self, sample: SampleStore, contact: Contact) -> None:
        sample.put_tenant("acme", {"enabled": False, "trusted-ca": [on(A)]})
        assert contact.refused(SUBJECT, issue(SUBJECT)) == (404, Reason.TENANT_DISABLED)
        assert contact.refused(SUBJECT, "%%%") == (400, Reason.CERTIFICATE_UNREADABLE)  # row 6 comes before

    @ROWS.row(8)
    def test_row_8_issuer(self, contact: Contact) -> None:
        assert contact.refused(SUBJECT, issue(SUBJECT, B)) == (404, Reason.ISSUER_DOES_NOT_PROVISION)
        assert contact.refused(SUBJECT, issue(SUBJECT, X)) == (404, Reason.ISSUER_EXPIRED)
        stranger = authority("CN=Stranger,O=Acme")
        assert contact.refused(SUBJECT, issue(SUBJECT, stranger)) == (404, Reason.ISSUER_UNKNOWN)

    @ROWS.row(8)
    def test_row_8_issuer_is_equal_by_its_canonical_form(self, contact: Contact) -> None:
        """Provisioning 7.6."""
        assert contact(SUBJECT, issue(SUBJECT, issuer_name="CN=ca  a,O=ACME")).status == 201

    @pytest.mark.parametrize(
        ("period", "reason"),
        [
            ({"not_after": NOON - timedelta(seconds=1)}, Reason.CERTIFICATE_EXPIRED),
            ({"not_before": NOON + timedelta(seconds=1)}, Reason.CERTIFICATE_NOT_YET_VALID),
            ({"not_before": NOON}, None),
            ({"not_after": NOON}, None),
        ],
    )
    @ROWS.row(9)
    def test_row_9_period(self, contact: Contact, period: dict[str, Any], reason: Reason | None) -> None:
        certificate = issue(SUBJECT, **period)
        if reason is None:
            assert contact(SUBJECT, certificate).status == 201
        else:
            assert contact.refused(SUBJECT, certificate) == (404, reason)

    @ROWS.row(10)
    def test_row_10_signature(self, sample: SampleStore, contact: Contact) -> None:
        liar = issue(SUBJECT, B, issuer_name="CN=CA A,O=Acme")
        assert contact.refused(SUBJECT, liar) == (404, Reason.SIGNATURE_INVALID)
        assert Contact(sample, verify_signature=False)(SUBJECT, liar).status == 201

    @ROWS.row(10)
    def test_row_10_key_roll_over(self, sample: SampleStore, contact: Contact) -> None:
        """Of two entries with one name, the one whose key made the signature counts, with its own members."""
        sample.put_tenant(
            "acme",
            {
                "trusted-ca": [
                    on(A, id="old"),
                    on(A_NEW, id="new", auto_provisioning_device_id_template="{{subject-cn}}"),
                    B.trust_anchor(),
                ]
            },
        )
        assert contact("CN=new,O=Acme", issue("CN=new,O=Acme", A_NEW)).device_id == "new"
        assert contact("CN=old,O=Acme", issue("CN=old,O=Acme", A)).device_id != "old"
        sample.put_tenant("acme", {"trusted-ca": [A.trust_anchor(id="old"), on(A_NEW, id="new")]})
        assert contact("CN=n2,O=Acme", issue("CN=n2,O=Acme", A_NEW)).status == 201
        assert contact.refused("CN=o2,O=Acme", issue("CN=o2,O=Acme", A)) == (404, Reason.SIGNATURE_INVALID)

    @pytest.mark.parametrize(
        ("auth_id", "reason"),
        [
            ("CN=q,O=Acme", Reason.SUBJECT_DIFFERS),
            ("O=Acme,CN=p", Reason.SUBJECT_DIFFERS),
            ("p", Reason.SUBJECT_DIFFERS),
            ("CN=p, O=Acme", Reason.SUBJECT_SPELLED_OTHERWISE),
            ("cn=P,O=ACME", Reason.SUBJECT_SPELLED_OTHERWISE),
        ],
    )
    @ROWS.row(11)
    def test_row_11_auth_id(self, contact: Contact, auth_id: str, reason: Reason) -> None:
        """Also rows 7 and 8 of provisioning 3.8."""
        assert contact.refused(auth_id, issue(SUBJECT)) == (400, reason)

    @pytest.mark.parametrize(
        "auth_id",
        [
            pytest.param("Smith, John@Acme", id="literal"),
            pytest.param(r"CN=Smith\, John,O=Acme", id="subject of an adapter without templates"),
        ],
    )
    @ROWS.row(11)
    def test_row_11_template(self, sample: SampleStore, contact: Contact, auth_id: str) -> None:
        sample.put_tenant("acme", {"trusted-ca": [on(A, auth_id_template="{{subject-cn}}@{{subject-o}}")]})
        assert contact(auth_id, issue(r"CN=Smith\, John,O=Acme")).status == 201

    @ROWS.row(11)
    def test_row_11_template_as_adapters_fill_it(self, sample: SampleStore, contact: Contact) -> None:
        """Provisioning 3.3: a backslash swallows itself."""
        sample.put_tenant("acme", {"trusted-ca": [on(A, auth_id_template="dn:{{subject-dn}}")]})
        certificate = issue(r"CN=Smith\, John,O=Acme")
        assert contact("dn:CN=Smith, John,O=Acme", certificate).status == 201
        assert contact(r"dn:CN=Smith\, John,O=Acme", certificate).status == 201
        assert contact.refused("dn:CN=Smith,O=Acme", certificate) == (400, Reason.SUBJECT_DIFFERS)

    @ROWS.row(11)
    def test_row_11_template_that_cannot_be_filled(self, sample: SampleStore, contact: Contact) -> None:
        sample.put_tenant("acme", {"trusted-ca": [on(A, auth_id_template="{{subject-ou}}")]})
        assert contact.refused("anything", issue(SUBJECT)) == (400, Reason.TEMPLATE_NOT_FILLED)

    @pytest.mark.parametrize(
        ("template", "subject", "device_id"),
        [
            ("{{subject-o}}-{{subject-cn}}", "CN=pump-9,OU=Plant-7,O=Acme", "Acme-pump-9"),
            ("{{subject-ou}}", "CN=a,OU=x,OU=y,O=z", "y"),
            ("{{subject-dn}}", "CN=alone", "CN=alone"),
            ("dev:{{subject-cn}}.{{subject-cn}}", "CN=a", "dev:a.a"),
        ],
    )
    @ROWS.row(12)
    def test_row_12_device_id(
        self, sample: SampleStore, contact: Contact, template: str, subject: str, device_id: str
    ) -> None:
        """Provisioning 3.4."""
        sample.put_tenant("acme", {"trusted-ca": [on(A, auto_provisioning_device_id_template=template)]})
        assert contact(subject, issue(subject)).device_id == device_id

    @ROWS.row(12)
    def test_row_12_values_are_not_filled_again(self, sample: SampleStore, contact: Contact) -> None:
        """Provisioning 3.4: in one pass. The braces then break the rule for device ids."""
        sample.put_tenant("acme", {"trusted-ca": [on(A, auto_provisioning_device_id_template="{{subject-cn}}")]})
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "{{subject-o}}")])
        assert contact.refused("CN={{subject-o}}", issue(name)) == (400, Reason.DEVICE_ID_INVALID)

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            pytest.param("{{subject-ou}}", Reason.TEMPLATE_NOT_FILLED, marks=SITUATIONS.row(17)),
            ("{{subject-dn}}", Reason.DEVICE_ID_INVALID),
            ("{{subject-cn}}/x", Reason.DEVICE_ID_INVALID),
            ("{{subject-cn}}" + "x" * 256, Reason.DEVICE_ID_INVALID),
        ],
    )
    @ROWS.row(12)
    def test_row_12_no_device_id(self, sample: SampleStore, contact: Contact, template: str, reason: Reason) -> None:
        sample.put_tenant("acme", {"trusted-ca": [on(A, auto_provisioning_device_id_template=template)]})
        assert contact.refused(SUBJECT, issue(SUBJECT)) == (400, reason)

    @pytest.mark.parametrize(
        ("own", "general", "allowed"),
        [(1, -1, 1), (-1, 1, 1), (1, 5, 1), (2, 1, 2), (0, -1, 0), (0, 1, 0), (-1, 0, 3), (None, 1, 1), (None, -1, 3)],
    )
    @ROWS.row(13)
    def test_row_13_devices(self, sample: SampleStore, own: int | None, general: int, allowed: int) -> None:
        """Provisioning 3.7, management 5.7: a limit of the tenant's own wins."""
        limits: dict[str, object] = {} if own is None else {"registration-limits": {"max-devices": own}}
        sample.put_tenant("acme", {"trusted-ca": [on(A)]} | limits)
        contact = Contact(sample, max_devices_per_tenant=general)
        for number in range(allowed):
            assert contact(f"CN=p{number}", issue(f"CN=p{number}")).status == 201
        if allowed < 3:
            assert contact.refused(SUBJECT, issue(SUBJECT)) == (403, Reason.DEVICE_LIMIT_REACHED)
        if allowed:
            assert contact("CN=p0", issue("CN=p0")).status == 200

    @pytest.mark.parametrize(
        ("own", "general", "refused"), [(0, -1, True), (0, 1, True), (-1, 0, False), (1, 1, False)]
    )
    @ROWS.row(13)
    def test_row_13_credentials(self, sample: SampleStore, own: int, general: int, refused: bool) -> None:
        sample.put_tenant("acme", {"trusted-ca": [on(A)], "registration-limits": {"max-credentials-per-device": own}})
        contact = Contact(sample, max_credentials_per_device=general)
        if refused:
            assert contact.refused(SUBJECT, issue(SUBJECT)) == (403, Reason.CREDENTIALS_LIMIT_REACHED)
        else:
            assert contact(SUBJECT, issue(SUBJECT)).status == 201

    @ROWS.row(14)
    @SITUATIONS.row(18)
    def test_row_14_device_id_is_taken(self, sample: SampleStore, contact: Contact) -> None:
        sample.put_tenant("acme", {"trusted-ca": [on(A, auto_provisioning_device_id_template="{{subject-cn}}")]})
        sample.put_device("acme", "p", {"ext": {"mine": True}})
        assert contact.refused(SUBJECT, issue(SUBJECT)) == (409, Reason.DEVICE_ID_TAKEN)
        stored, credentials = sample.find_device("acme", "p"), sample.find_credentials("acme", "p")
        assert stored is not None
        assert credentials is not None
        assert stored.device.ext == {"mine": True}
        assert not credentials.credentials

    def test_what_the_adapter_reads_does_not_tell_the_reason(self, sample: SampleStore, contact: Contact) -> None:
        """Provisioning 3.2: why 404 for rows 7 to 10."""
        texts = set()
        for certificate in (issue(SUBJECT, B), issue(SUBJECT, X), issue(SUBJECT, B, issuer_name="CN=CA A,O=Acme")):
            with pytest.raises(NotFound) as refusal:
                contact(SUBJECT, certificate)
            texts.add(str(refusal.value))
        sample.put_tenant("acme", {"enabled": False, "trusted-ca": [on(A)]})
        with pytest.raises(NotFound) as disabled:
            contact(SUBJECT, issue(SUBJECT))
        assert texts == {str(disabled.value)}


class EdgeContact:
    """What an assertion of an unknown device through a gateway comes to."""

    def __init__(self, sample: SampleStore, store: Store | None = None, **settings: Any) -> None:
        self.sample = sample
        self.seen: list[tuple[str, str]] = []
        self.service = ProvisioningService(
            store or sample.store,
            ProvisioningSettings(**settings),
            Identifiers(),
            sample.clock,
            observe=lambda *pair: self.seen.append(pair),
        )

    def __call__(self, device_id: str, gateway_id: str = "gw", tenant_id: str = "acme") -> Device | None:
        return self.sample.run(self.service.provision_edge_device(ADAPTER, tenant_id, device_id, gateway_id))

    def refused(self, device_id: str, gateway_id: str = "gw", tenant_id: str = "acme") -> tuple[int, Reason | None]:
        before = self.sample.count_devices(tenant_id)
        with pytest.raises(RegistryError) as refusal:
            self(device_id, gateway_id, tenant_id)
        assert self.sample.count_devices(tenant_id) == before
        return refusal.value.status, refusal.value.reason


GATEWAY: dict[str, Any] = {"authorities": ["auto-provisioning-enabled"]}


@pytest.fixture
def gateway(sample: SampleStore) -> str:
    """A gateway that may provision, of a tenant that trusts no CA: its CAs play no role (provisioning 4.1)."""
    sample.put_tenant("acme")
    sample.put_device("acme", "gw", GATEWAY | {"memberOf": ["hall", "yard"]})
    return "gw"


@pytest.mark.usefixtures("gateway")
class TestEdgeDevice:
    """Provisioning 4."""

    def test_4_2_what_is_created(self, sample: SampleStore) -> None:
        contact = EdgeContact(sample)
        created = contact("edge-1")
        stored, credentials = sample.find_device("acme", "edge-1"), sample.find_credentials("acme", "edge-1")
        assert stored is not None
        assert credentials is not None
        assert stored.device == created == Device(via=("gw",), via_groups=("hall", "yard"))
        assert stored.device.enabled
        assert (stored.auto_provisioned, stored.notification_sent, stored.created) == (True, False, NOON)
        assert not credentials.credentials
        assert credentials.version != stored.version
        assert contact.seen == [("edge", "created")]

    def test_4_2_of_a_gateway_without_groups(self, sample: SampleStore) -> None:
        sample.put_device("acme", "alone", GATEWAY)
        assert EdgeContact(sample)("edge-1", "alone") == Device(via=("alone",))

    def test_an_edge_device_may_not_bring_others_along(self, sample: SampleStore) -> None:
        """Provisioning 5: a right of gateways, not handed on."""
        contact = EdgeContact(sample)
        contact("edge-1")
        assert contact.refused("edge-2", "edge-1") == (404, Reason.GATEWAY_MAY_NOT_PROVISION)

    def test_is_recorded_under_the_adapters_name(self, sample: SampleStore) -> None:
        store = StoreThat(sample.store)
        EdgeContact(sample, store)("edge-1")
        assert [(change.kind, change.principal, change.resource_id, change.before) for change in store.changes] == [
            (ChangeKind.DEVICE, ADAPTER.name, "edge-1", None),
            (ChangeKind.CREDENTIALS, ADAPTER.name, "edge-1", None),
        ]

    @pytest.mark.parametrize(
        ("gateway", "reason"),
        [
            (None, Reason.DEVICE_AND_GATEWAY_UNKNOWN),
            (GATEWAY | {"enabled": False}, Reason.DEVICE_UNKNOWN_GATEWAY_DISABLED),
            ({}, Reason.GATEWAY_MAY_NOT_PROVISION),
            ({"authorities": ["auto-provisioning", "x"]}, Reason.GATEWAY_MAY_NOT_PROVISION),
        ],
    )
    def test_4_1_what_the_gateway_lacks(
        self, sample: SampleStore, gateway: dict[str, Any] | None, reason: Reason
    ) -> None:
        contact = EdgeContact(sample)
        if gateway is not None:
            sample.put_device("acme", "other", gateway)
        for device_id in ("edge-1", "not an id"):
            assert contact.refused(device_id, "other") == (404, reason)
        # They are unknown devices as any other, and no first contacts.
        assert not contact.seen

    def test_4_1_tenant_is_known(self, sample: SampleStore) -> None:
        contact = EdgeContact(sample)
        assert contact.refused("edge-1", tenant_id="nope") == (404, Reason.TENANT_UNKNOWN)
        sample.put_tenant("acme", {"alias": "plant"})
        assert contact.refused("edge-1", tenant_id="plant") == (404, Reason.TENANT_UNKNOWN)
        sample.delete_tenant("acme")
        assert contact.refused("edge-1") == (404, Reason.TENANT_UNKNOWN)

    @pytest.mark.parametrize("device_id", ["", "a b", "a/b", "ä", "a\n", "x" * 257])
    def test_4_1_device_id(self, sample: SampleStore, device_id: str) -> None:
        contact = EdgeContact(sample)
        assert contact.refused(device_id) == (400, Reason.EDGE_DEVICE_ID_INVALID)
        assert contact.seen == [("edge", "edge-device-id-invalid")]

    @pytest.mark.parametrize(
        ("own", "general", "allowed"), [(2, -1, 1), (-1, 2, 1), (1, 5, 0), (3, 2, 2), (0, -1, 0), (None, -1, 3)]
    )
    def test_4_1_limit(self, sample: SampleStore, own: int | None, general: int, allowed: int) -> None:
        """The gateway is one of them; a limit of the tenant's own wins (management 5.7)."""
        sample.put_tenant("acme", {} if own is None else {"registration-limits": {"max-devices": own}})
        contact = EdgeContact(sample, max_devices_per_tenant=general)
        for number in range(allowed):
            assert contact(f"edge-{number}") is not None
        if allowed < 3:
            assert contact.refused("one-more") == (403, Reason.DEVICE_LIMIT_REACHED)

    def test_the_limit_of_credentials_does_not_count(self, sample: SampleStore) -> None:
        """Provisioning 4.2: an edge device has none."""
        sample.put_tenant("acme", {"registration-limits": {"max-credentials-per-device": 0}})
        assert EdgeContact(sample)("edge-1") is not None

    @pytest.mark.parametrize("blind", [False, True])
    def test_4_3_somebody_else_was_faster(self, sample: SampleStore, blind: bool) -> None:
        """Whether it is seen in the transaction or run into: found, and left as it is."""

        async def other() -> None:
            service = ProvisioningService(sample.store, ProvisioningSettings(), Identifiers(), sample.clock)
            assert await service.provision_edge_device(ADAPTER, "acme", "edge-1", "faster") is not None

        sample.put_device("acme", "faster", GATEWAY)
        contact = EdgeContact(sample, StoreThat(sample.store, before_write=other, blind=blind))
        assert contact("edge-1") is None
        assert contact.seen == [("edge", "found")]
        stored = sample.find_device("acme", "edge-1")
        assert stored is not None
        assert stored.device.via == ("faster",)
        assert sample.count_devices("acme") == 3

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("gateway deleted", (404, Reason.DEVICE_AND_GATEWAY_UNKNOWN)),
            ({"enabled": False}, (404, Reason.DEVICE_UNKNOWN_GATEWAY_DISABLED)),
            ({"authorities": ()}, (404, Reason.GATEWAY_MAY_NOT_PROVISION)),
            ("tenant deleted", (404, Reason.TENANT_UNKNOWN)),
            ("limit reached", (403, Reason.DEVICE_LIMIT_REACHED)),
        ],
        ids=str,
    )
    def test_an_operator_changes_something_meanwhile(
        self, sample: SampleStore, change: str | dict[str, Any], expected: tuple[int, Reason]
    ) -> None:
        async def apply(transaction: Transaction) -> None:
            if change == "gateway deleted":
                await transaction.delete_device("acme", "gw")
            elif change == "tenant deleted":
                await transaction.delete_tenant("acme")
            elif change == "limit reached":
                stored = await transaction.find_tenant("acme")
                assert stored is not None
                limited = parse_tenant({"registration-limits": {"max-devices": 1}})
                await transaction.update_tenant(replace(stored, version="new", tenant=limited))
            else:
                assert isinstance(change, dict)
                gateway = await transaction.find_device("acme", "gw")
                assert gateway is not None
                await transaction.update_device(replace(gateway, device=replace(gateway.device, **change)))

        async def other() -> None:
            await sample.store.write(apply)

        contact = EdgeContact(sample, StoreThat(sample.store, before_write=other))
        with pytest.raises(RegistryError) as refusal:
            contact("edge-1")
        assert (refusal.value.status, refusal.value.reason) == expected
        assert contact.seen == [("edge", expected[1].value)]
        assert sample.find_device("acme", "edge-1") is None

    def test_groups_are_those_that_the_gateway_has_when_the_device_is_made(self, sample: SampleStore) -> None:
        async def apply(transaction: Transaction) -> None:
            gateway = await transaction.find_device("acme", "gw")
            assert gateway is not None
            await transaction.update_device(replace(gateway, device=replace(gateway.device, member_of=("new",))))

        async def other() -> None:
            await sample.store.write(apply)

        contact = EdgeContact(sample, StoreThat(sample.store, before_write=other))
        assert contact("edge-1") == Device(via=("gw",), via_groups=("new",))

    def test_many_at_once(self, sample: SampleStore) -> None:
        """4.3 row 4, and several asserts by one gateway: one creates, the others find."""
        sample.put_device("acme", "gw2", GATEWAY)
        contact = EdgeContact(sample)

        async def all_at_once() -> list[Device | None]:
            return await asyncio.gather(
                *(
                    contact.service.provision_edge_device(ADAPTER, "acme", "edge-1", gateway_id)
                    for gateway_id in ("gw", "gw2") * 25
                )
            )

        results = sample.run(all_at_once())
        assert len([device for device in results if device is not None]) == 1
        assert sample.count_devices("acme") == 3

    def test_a_damaged_gateway_is_an_internal_error(self, sample: SampleStore) -> None:
        """amqp-apis 5: what is not part of the domain becomes status 500; the log names the row."""

        store = StoreThat(sample.store)
        contact = EdgeContact(sample, store)
        for text in ('{"enabled":', "[]"):
            find_damaged = AsyncMock(return_value=RegistrationRow("gw", text))
            store.lookups_instead = SimpleNamespace(find_registration=find_damaged)
            with pytest.raises(DamagedRow, match="devices: acme, gw"):
                contact("edge-1")


class FakeHook:
    """An external system whose answer a test decides.

    Args:
        reply: What it answers; an error is raised.
        meanwhile: What happens while it is asked.
    """

    def __init__(
        self, reply: HookReply | HookFailed | object = None, meanwhile: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        is_ready = isinstance(reply, HookReply | HookFailed)
        self.reply = reply if is_ready else HookReply(is_wanted=True, body=reply)
        self.meanwhile = meanwhile
        self.questions: list[HookQuestion] = []

    async def ask(self, question: HookQuestion) -> HookReply:
        self.questions.append(question)
        await asyncio.sleep(0)
        if self.meanwhile is not None:
            await self.meanwhile()
        if isinstance(self.reply, HookFailed):
            raise self.reply
        assert isinstance(self.reply, HookReply)
        return self.reply


REFUSED = HookReply(is_wanted=False)
WRONG_WISHES: list[object] = [
    [],
    "device-id",
    {"device-id": 5},
    {"device-id": ""},
    {"device-id": "a b"},
    {"device-id": "x" * 257},
    {"defaults": []},
    {"defaults": "x"},
    {"ext": 1},
    {"enabled": True},
    {"via": ["gw"]},
    {"ext": {}, "more": None},
]


class TestHookByCertificate:
    """Provisioning 9, between rows 13 and 14 of 3.2."""

    def contact(self, sample: SampleStore, hook: FakeHook, **settings: Any) -> Contact:
        contact = Contact(sample, **settings)
        contact.service._hook = hook
        return contact

    def test_what_is_asked(self, sample: SampleStore) -> None:
        hook = FakeHook()
        certificate = issue(SUBJECT)
        created = self.contact(sample, hook)(SUBJECT, certificate)
        assert created.status == 201
        assert hook.questions == [
            HookQuestion(
                kind=FirstContact.CERTIFICATE,
                tenant_id="acme",
                device_id=created.device_id,
                auth_id=SUBJECT,
                issuer_dn="CN=CA A,O=Acme",
                certificate=certificate.der,
            )
        ]
        stored = sample.find_device("acme", created.device_id)
        assert stored is not None
        assert stored.device.ext == {"comment": "Auto-provisioned at 2026-03-01T12:00:00Z"}

    def test_what_it_wants_for_the_device(self, sample: SampleStore) -> None:
        hook = FakeHook({"device-id": "erp-7", "defaults": {"ttl": 30}, "ext": {"site": 7, "comment": "theirs"}})
        assert self.contact(sample, hook)(SUBJECT, issue(SUBJECT)).device_id == "erp-7"
        stored, credentials = sample.find_device("acme", "erp-7"), sample.find_credentials("acme", "erp-7")
        assert stored is not None
        assert credentials is not None
        assert stored.device == Device(defaults={"ttl": 30}, ext={"site": 7, "comment": "theirs"})
        assert credentials.credentials[0].auth_id == SUBJECT

    @pytest.mark.parametrize("body", [{}, {"device-id": None, "defaults": None, "ext": None}])
    def test_nothing_in_particular(self, sample: SampleStore, body: object) -> None:
        assert self.contact(sample, FakeHook(body))(SUBJECT, issue(SUBJECT)).status == 201

    def test_refused(self, sample: SampleStore, contact: Contact) -> None:
        """404, with the text of every other refusal."""
        refusing = self.contact(sample, FakeHook(REFUSED))
        assert refusing.refused(SUBJECT, issue(SUBJECT)) == (404, Reason.HOOK_REFUSED)
        texts = set()
        for one, certificate in ((refusing, issue(SUBJECT)), (contact, issue(SUBJECT, B))):
            with pytest.raises(NotFound) as refusal:
                one(SUBJECT, certificate)
            texts.add(str(refusal.value))
        assert len(texts) == 1

    def test_failed(self, sample: SampleStore, caplog: pytest.LogCaptureFixture) -> None:
        hook = FakeHook(HookFailed("no answer in time"))
        assert self.contact(sample, hook).refused(SUBJECT, issue(SUBJECT)) == (503, Reason.HOOK_FAILED)
        (record,) = caplog.records
        assert (record.levelname, record.getMessage()) == ("WARNING", "provisioning hook failed")
        assert record.__dict__["error"] == "no answer in time"
        assert record.__dict__["tenant_id"] == "acme"

    @pytest.mark.parametrize("body", WRONG_WISHES, ids=str)
    def test_rubbish(self, sample: SampleStore, body: object) -> None:
        assert self.contact(sample, FakeHook(body)).refused(SUBJECT, issue(SUBJECT)) == (503, Reason.HOOK_FAILED)

    @pytest.mark.parametrize(
        ("document", "auth_id", "ca"),
        [
            ({"trusted-ca": [on(A)]}, SUBJECT, B),
            ({"trusted-ca": [on(A)]}, "CN=q", A),
            ({"enabled": False, "trusted-ca": [on(A)]}, SUBJECT, A),
            ({"trusted-ca": [on(A)], "registration-limits": {"max-devices": 0}}, SUBJECT, A),
            ({"trusted-ca": [on(A)], "registration-limits": {"max-credentials-per-device": 0}}, SUBJECT, A),
            ({"trusted-ca": [on(A, auto_provisioning_device_id_template="{{subject-ou}}")]}, SUBJECT, A),
        ],
    )
    def test_asked_after_all_checks(
        self, sample: SampleStore, document: dict[str, object], auth_id: str, ca: Authority
    ) -> None:
        """Who would be refused anyhow is not told to anybody."""
        sample.put_tenant("acme", document)
        hook = FakeHook()
        with pytest.raises(RegistryError):
            self.contact(sample, hook)(auth_id, issue(SUBJECT, ca))
        assert not hook.questions

    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            ({"enabled": False, "trusted-ca": [on(A)]}, (404, Reason.TENANT_DISABLED)),
            ({"trusted-ca": [A.trust_anchor()]}, (404, Reason.ISSUER_DOES_NOT_PROVISION)),
            ({"trusted-ca": [on(A)], "registration-limits": {"max-devices": 0}}, (403, Reason.DEVICE_LIMIT_REACHED)),
        ],
    )
    def test_checked_again_afterwards(
        self, sample: SampleStore, document: dict[str, object], expected: tuple[int, Reason]
    ) -> None:
        hook = FakeHook({"device-id": "x"}, lambda: sample.putting_tenant("acme", document))
        assert self.contact(sample, hook).refused(SUBJECT, issue(SUBJECT)) == expected

    def test_the_id_that_it_was_told_is_kept(self, sample: SampleStore) -> None:
        """Also if the tenant has changed and everything was decided anew."""
        document = {"trusted-ca": [on(A, auto_provision_as_gateway=True)]}
        hook = FakeHook(meanwhile=lambda: sample.putting_tenant("acme", document))
        created = self.contact(sample, hook)(SUBJECT, issue(SUBJECT))
        assert created.device_id == hook.questions[0].device_id
        assert created.as_gateway

    def test_its_device_id_belongs_to_another(self, sample: SampleStore) -> None:
        """409, as with templates (3.7)."""
        sample.put_device("acme", "taken", {"ext": {"mine": True}})
        contact = self.contact(sample, FakeHook({"device-id": "taken", "ext": {"mine": False}}))
        assert contact.refused(SUBJECT, issue(SUBJECT)) == (409, Reason.DEVICE_ID_TAKEN)
        stored = sample.find_device("acme", "taken")
        assert stored is not None
        assert stored.device.ext == {"mine": True}

    def test_many_at_once(self, sample: SampleStore) -> None:
        hook = FakeHook(meanwhile=lambda: asyncio.sleep(0.01))
        contact = self.contact(sample, hook)
        certificate = issue(SUBJECT).base64

        async def all_at_once() -> list[ProvisionedCredential]:
            return await asyncio.gather(
                *(contact.service.provision(ADAPTER, "acme", SUBJECT, certificate) for _ in range(20))
            )

        results = sample.run(all_at_once())
        assert sorted(result.status for result in results) == [200] * 19 + [201]
        assert sample.count_devices("acme") == 1
        assert len(hook.questions) == 20


@pytest.mark.usefixtures("gateway")
class TestHookThroughGateway:
    """Provisioning 9, before 4.3 row 1."""

    def contact(self, sample: SampleStore, hook: FakeHook) -> EdgeContact:
        contact = EdgeContact(sample)
        contact.service._hook = hook
        return contact

    def test_asked_and_wanted(self, sample: SampleStore) -> None:
        hook = FakeHook({"device-id": "edge-1", "defaults": {"ttl": 30}, "ext": {"site": 7}})
        created = self.contact(sample, hook)("edge-1")
        assert hook.questions == [
            HookQuestion(kind=FirstContact.GATEWAY, tenant_id="acme", device_id="edge-1", gateway_id="gw")
        ]
        stored = sample.find_device("acme", "edge-1")
        assert stored is not None
        expected = Device(via=("gw",), via_groups=("hall", "yard"), defaults={"ttl": 30}, ext={"site": 7})
        assert stored.device == created == expected

    def test_refused_and_failed(self, sample: SampleStore) -> None:
        contact = self.contact(sample, FakeHook(REFUSED))
        assert contact.refused("edge-1") == (404, Reason.HOOK_REFUSED)
        assert self.contact(sample, FakeHook(HookFailed("x"))).refused("edge-1") == (503, Reason.HOOK_FAILED)
        assert contact.seen == [("edge", "hook-refused")]

    @pytest.mark.parametrize("body", [*WRONG_WISHES, {"device-id": "edge-2"}], ids=str)
    def test_rubbish(self, sample: SampleStore, body: object) -> None:
        assert self.contact(sample, FakeHook(body)).refused("edge-1") == (503, Reason.HOOK_FAILED)

    def test_asked_after_all_checks(self, sample: SampleStore) -> None:
        hook = FakeHook()
        contact = self.contact(sample, hook)
        sample.put_device("acme", "plain")
        sample.put_device("acme", "edge-1", {"via": ["other"]})
        assert contact("edge-1") is None
        contact.refused("edge-2", "plain")
        contact.refused("a b")
        sample.put_tenant("acme", {"registration-limits": {"max-devices": 1}})
        contact.refused("edge-2")
        assert not hook.questions

    def test_checked_again_afterwards(self, sample: SampleStore) -> None:
        document = {"registration-limits": {"max-devices": 1}}
        hook = FakeHook(meanwhile=lambda: sample.putting_tenant("acme", document))
        assert self.contact(sample, hook).refused("edge-1") == (403, Reason.DEVICE_LIMIT_REACHED)

    def test_many_at_once(self, sample: SampleStore) -> None:
        contact = self.contact(sample, FakeHook(meanwhile=lambda: asyncio.sleep(0.01)))

        async def all_at_once() -> list[Device | None]:
            return await asyncio.gather(
                *(contact.service.provision_edge_device(ADAPTER, "acme", "edge-1", "gw") for _ in range(20))
            )

        assert len([device for device in sample.run(all_at_once()) if device is not None]) == 1
        assert sample.count_devices("acme") == 2


class StoreThat:
    """The real store; something happens before a write, or what the transaction sees is older than what is there."""

    def __init__(
        self, store: Store, *, before_write: Callable[[], Awaitable[None]] | None = None, blind: bool = False
    ) -> None:
        self._store = store
        self._before_write = before_write
        self._blind = blind
        self.changes: list[Change] = []
        self.lookups_instead: Any = None

    @property
    def lookups(self) -> Lookups:
        return self.lookups_instead or self._store.lookups

    async def read(self, work: Work[T]) -> T:
        return await self._store.read(work)

    async def write(self, work: Work[T], *, device: DeviceKey | None = None, tenant_id: str | None = None) -> T:
        if self._before_write is not None:
            await self._before_write()
        return await self._store.write(lambda transaction: work(_TransactionThat(transaction, self)))  # type: ignore[arg-type]

    @property
    def waiting_writes(self) -> int:
        return self._store.waiting_writes

    async def search(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool = False) -> T:
        return await self._store.search(work, is_heavy=is_heavy)

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


class _TransactionThat:
    def __init__(self, transaction: Transaction, store: StoreThat) -> None:
        self._transaction = transaction
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._transaction, name)

    async def find_credential(self, tenant_id: str, type_: str, auth_id: str) -> object:
        if self._store._blind:
            return None
        return await self._transaction.find_credential(tenant_id, type_, auth_id)

    async def find_device(self, tenant_id: str, device_id: str) -> object:
        if self._store._blind and device_id == "edge-1":
            return None
        return await self._transaction.find_device(tenant_id, device_id)

    async def record(self, change: Change) -> None:
        self._store.changes.append(change)
        await self._transaction.record(change)


class TestRaces:
    """Provisioning 3.7, and whatever an operator may do between the checks and the transaction."""

    def meanwhile(self, sample: SampleStore, other: Callable[[SampleStore], Awaitable[None]], **flags: bool) -> Contact:
        async def before_write() -> None:
            await other(sample)

        return Contact(sample, StoreThat(sample.store, before_write=before_write, **flags))

    @pytest.mark.parametrize("blind", [False, True])
    def test_somebody_else_was_faster(self, sample: SampleStore, blind: bool) -> None:
        """The loser reads again and answers 200, whether it sees the winner at once or runs into it."""
        winner: list[ProvisionedCredential] = []

        async def other(sample: SampleStore) -> None:
            service = ProvisioningService(sample.store, ProvisioningSettings(), Identifiers(), sample.clock)
            winner.append(await service.provision(ADAPTER, "acme", SUBJECT, issue(SUBJECT).base64))

        loser = self.meanwhile(sample, other, blind=blind)(SUBJECT, issue(SUBJECT))
        assert winner[0].status == 201
        assert (loser.status, loser.device_id, loser.credential) == (200, winner[0].device_id, None)
        assert sample.count_devices("acme") == 1

    def test_the_template_gives_both_the_same_device_id(self, sample: SampleStore) -> None:
        """Conflict on the device id, but the credential is there by now: 200."""
        sample.put_tenant("acme", {"trusted-ca": [on(A, auto_provisioning_device_id_template="{{subject-cn}}")]})

        async def other(sample: SampleStore) -> None:
            service = ProvisioningService(sample.store, ProvisioningSettings(), Identifiers(), sample.clock)
            await service.provision(ADAPTER, "acme", SUBJECT, issue(SUBJECT).base64)

        loser = self.meanwhile(sample, other, blind=True)(SUBJECT, issue(SUBJECT))
        assert (loser.status, loser.device_id) == (200, "p")

    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            ({"enabled": False, "trusted-ca": [on(A)]}, (404, Reason.TENANT_DISABLED)),
            ({}, (404, Reason.ISSUER_UNKNOWN)),
            ({"trusted-ca": [A.trust_anchor()]}, (404, Reason.ISSUER_DOES_NOT_PROVISION)),
            ({"trusted-ca": [on(A_NEW)]}, (404, Reason.SIGNATURE_INVALID)),
            (
                {"trusted-ca": [on(A, auto_provisioning_device_id_template="{{subject-ou}}")]},
                (400, Reason.TEMPLATE_NOT_FILLED),
            ),
            ({"trusted-ca": [on(A)], "registration-limits": {"max-devices": 0}}, (403, Reason.DEVICE_LIMIT_REACHED)),
            (None, (404, Reason.TENANT_UNKNOWN)),
        ],
    )
    def test_the_tenant_changes_meanwhile(
        self, sample: SampleStore, document: dict[str, object] | None, expected: tuple[int, Reason]
    ) -> None:
        async def other(sample: SampleStore) -> None:
            if document is None:
                await sample.deleting_tenant("acme")
            else:
                await sample.putting_tenant("acme", document)

        assert self.meanwhile(sample, other).refused(SUBJECT, issue(SUBJECT)) == expected

    def test_the_tenant_changes_to_no_effect(self, sample: SampleStore) -> None:
        async def other(sample: SampleStore) -> None:
            await sample.putting_tenant("acme", {"trusted-ca": [on(A, auto_provision_as_gateway=True)]})

        created = self.meanwhile(sample, other)(SUBJECT, issue(SUBJECT))
        stored = sample.find_device("acme", created.device_id)
        assert created.status == 201
        assert stored is not None
        assert list(stored.device.authorities) == ["auto-provisioning-enabled"]

    @SITUATIONS.row(19)
    def test_many_at_once(self, sample: SampleStore, contact: Contact) -> None:
        """One 201, the others 200, one device."""
        certificate = issue(SUBJECT).base64

        async def all_at_once() -> list[ProvisionedCredential]:
            return await asyncio.gather(
                *(contact.service.provision(ADAPTER, "acme", SUBJECT, certificate) for _ in range(50))
            )

        results = sample.run(all_at_once())
        assert sorted(result.status for result in results) == [200] * 49 + [201]
        assert len({result.device_id for result in results}) == 1
        assert sample.count_devices("acme") == 1

    def test_the_limit_holds_for_many_at_once(self, sample: SampleStore) -> None:
        sample.put_tenant("acme", {"trusted-ca": [on(A)], "registration-limits": {"max-devices": 5}})
        contact = Contact(sample)
        certificates = {f"CN=d{number}": issue(f"CN=d{number}").base64 for number in range(20)}

        async def all_at_once() -> list[ProvisionedCredential | BaseException]:
            return await asyncio.gather(
                *(contact.service.provision(ADAPTER, "acme", *pair) for pair in certificates.items()),
                return_exceptions=True,
            )

        results = sample.run(all_at_once())
        created = [result for result in results if isinstance(result, ProvisionedCredential)]
        refused = [result for result in results if isinstance(result, Forbidden)]
        assert (len(created), len(refused), sample.count_devices("acme")) == (5, 15, 5)
