"""Files in the forms of Hono 1.2: configuration 2.2."""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.contract.records import credential
from tests.unit.sample_store import ADAPTER, Clock, SampleStore
from tests.unit.test_credentials import BCRYPT_10, DEV_CERT, KEY, SHA_256
from tests.unit.test_tenants import CA_CERT, CA_DN, CERTIFIED, DESCRIBED

from kamado.credentials import CredentialRules, PasswordSecret, credential_document, stored_document
from kamado.document import Identifiers, JsonObject
from kamado.errors import Unavailable
from kamado.load import LoadCounts, LoadErrors, LoadPlan, LoadProblem, apply, read_files
from kamado.passwords import PasswordHasher
from kamado.store import Change, StoredCredentials, StoredDevice, StoredTenant, Transaction
from kamado.tenants import tenant_document

RULES = CredentialRules(identifiers=Identifiers())
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
HASHED: JsonObject = {"hash-function": "sha-256", "pwd-hash": SHA_256}


class Files:
    """Files of a test, long finished."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: list[Path] = []

    def write(self, content: object) -> Path:
        """Write a file: bytes as they are, anything else as JSON."""
        path = self._directory / f"{len(self._written)}.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        os.utime(path, (NOW.timestamp() - 3600,) * 2)
        self._written.append(path)
        return path

    def read(self, *contents: object, rules: CredentialRules = RULES) -> LoadPlan:
        return read_files([self.write(content) for content in contents], rules=rules, now=NOW)

    def problems(self, *contents: object) -> list[tuple[str, str]]:
        """Entry and message of what is wrong."""
        return [(problem.entry, problem.message) for problem in self.read(*contents).problems]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def devices(*entries: object, tenant: str = "acme") -> JsonObject:
    return {"tenant": tenant, "devices": list(entries)}


def credentials(*entries: object, tenant: str = "acme") -> JsonObject:
    return {"tenant": tenant, "credentials": list(entries)}


def psk(device_id: str = "press-1", auth_id: str = "p1", **members: object) -> JsonObject:
    return {"device-id": device_id, "type": "psk", "auth-id": auth_id, "secrets": [{"key": KEY}]} | members


def password(*secrets: JsonObject, device_id: str = "press-1", auth_id: str = "s1") -> JsonObject:
    return {"device-id": device_id, "type": "hashed-password", "auth-id": auth_id, "secrets": list(secrets)}


# --- Reading ---


def test_the_three_forms(files: Files) -> None:
    """The examples of configuration 2.2, in whatever file and order."""
    plan = files.read(
        [
            credentials(
                psk(secrets=[{"id": "5f1c", "not-before": "2024-01-01T01:00:00+01:00", "key": KEY}]),
                {
                    "device-id": "gw-hall-2",
                    "type": "x509-cert",
                    "auth-id": "CN=gw-hall-2,O=Acme",
                    "secrets": [{"comment": "may be empty"}],
                },
            ),
        ],
        [
            devices(
                {"device-id": "press-1", "data": {"enabled": True, "via": "gw-hall-2"}},
                {"device-id": "gw-hall-2", "comment": "not part of the data", "data": {"memberOf": ["hall"]}},
            ),
            {
                "tenant-id": "acme",
                "enabled": True,
                "defaults": {"ttl": 30},
                "adapters": [{"type": "hono-mqtt", "enabled": True}],
                "trusted-ca": [DESCRIBED],
            },
        ],
    )
    assert [(one.tenant_id, one.tenant.defaults) for one in plan.tenants] == [("acme", {"ttl": 30})]
    assert [(one.device_id, one.device.via, one.device.member_of) for one in plan.devices] == [
        ("press-1", ("gw-hall-2",), ()),
        ("gw-hall-2", (), ("hall",)),
    ]
    assert [(one.device_id, one.update.type, one.update.auth_id) for one in plan.credentials] == [
        ("press-1", "psk", "p1"),
        ("gw-hall-2", "x509-cert", "CN=gw-hall-2,O=Acme"),
    ]
    assert plan.warnings == ()
    assert "tea-pot" not in repr(plan)


@pytest.mark.parametrize("content", [b"", b" \n", b"[]", b"// nothing yet\n", b"/* nothing */ []"])
def test_an_empty_file_is_an_empty_array(files: Files, content: bytes) -> None:
    assert files.read(content) == LoadPlan()


def test_comments_are_taken(files: Files) -> None:
    plan = files.read(
        b"""[ // one
        /* "a": { */ { "tenant-id": "acme", "ext": { "url": "http://x/*y*/", "quote": "\\" // no" } /**/ } // two
        ]"""
    )
    assert plan.tenants[0].tenant.ext == {"url": "http://x/*y*/", "quote": '" // no'}


def test_positions_stay_true_behind_comments(files: Files) -> None:
    ((_, plain),) = files.problems(b"[          }")
    ((_, commented),) = files.problems(b"[/* {{{ */ }")
    assert "byte 11" in plain
    assert plain == commented


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[{]", "not valid JSON"),
        (b'["\xff"]', "not valid JSON: not UTF-8"),
        (b'["open', "not valid JSON"),
        (b"/* open", "not valid JSON"),
        (b'[1] // x\n "', "not valid JSON"),
        (b"{}", "must hold a JSON array"),
        (b"null", "must hold a JSON array"),
        (b"[" * 200 + b"]" * 200, "not acceptable JSON: nested deeper"),
    ],
)
def test_a_file_that_is_broken_is_a_problem(files: Files, content: bytes, message: str) -> None:
    ((entry, text),) = files.problems(content)
    assert entry == ""
    assert text.startswith(message)


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (problem,) = read_files([tmp_path / "missing.json"], rules=RULES, now=NOW).problems
    assert str(problem) == f"{tmp_path}/missing.json: cannot be read: No such file or directory"


def test_a_file_just_written_is_warned_of(files: Files) -> None:
    """Hono 1.2 writes in place."""
    path = files.write([])
    for age, count in ((0, 1), (4.9, 1), (5, 0), (-60, 0)):
        os.utime(path, (NOW.timestamp() - age,) * 2)
        assert len(read_files([path], rules=RULES, now=NOW).warnings) == count


@pytest.mark.parametrize(
    ("element", "entry", "message"),
    [
        (1, "[0]", "must be a JSON object"),
        ({}, "[0]", "is neither a tenant"),
        ({"tenant": "acme"}, "[0]", "is neither a tenant"),
        ({"tenant-id": None, "enabled": True}, "[0]", "is neither a tenant"),
        ({"tenant-id": "a b"}, "[0]", "tenant-id: must match"),
        ({"tenant-id": {}}, "[0]", "tenant-id: must be a string"),
        ({"tenant-id": "acme", "colour": 1}, "[0] tenant acme", "colour: unknown member"),
        ({"tenant-id": "acme", "trusted-ca": [{}]}, "[0] tenant acme", "trusted-ca[0].subject-dn: must be given"),
        ({"devices": []}, "[0]", "tenant: must be given"),
        (devices() | {"colour": 1}, "[0]", "colour: unknown member"),
        ({"tenant": "acme", "devices": {}}, "[0]", "devices: must be an array"),
        (devices(5), "[0].devices[0]", "must be a JSON object"),
        (devices({}), "[0].devices[0]", "device-id: must be given"),
        (devices({"device-id": "a/b"}), "[0].devices[0]", "device-id: must match"),
        (devices({"device-id": "d", "colour": 1}), "[0].devices[0]", "colour: unknown member"),
        (devices({"device-id": "d", "data": []}), "[0].devices[0]", "data: must be an object"),
        (
            devices({"device-id": "c"}, {"device-id": "d", "data": {"colour": 1}}),
            "[0].devices[1] device d of tenant acme",
            "data.colour: unknown member",
        ),
        (credentials([]), "[0].credentials[0]", "must be a JSON object"),
        (credentials({"type": "psk"}), "[0].credentials[0]", "device-id: must be given"),
        (
            credentials(psk(), psk(auth_id="p2", secrets=[{"key": "***"}])),
            "[0].credentials[1] credentials of device press-1 of tenant acme",
            "secrets[0].key: must be standard Base64",
        ),
        (
            credentials(psk(secrets=[{"id": "k"}])),
            "[0].credentials[0] credentials of device press-1 of tenant acme",
            "secrets[0].id: there is no such secret",
        ),
        (
            credentials({"device-id": "d", "type": "hashed-password", "auth-id": "s1", "secrets": 5}),
            "[0].credentials[0] credentials of device d of tenant acme",
            "secrets: must be an array",
        ),
    ],
)
def test_an_entry_against_a_rule_is_a_problem(files: Files, element: object, entry: str, message: str) -> None:
    ((where, what),) = files.problems([element])
    assert where == entry
    assert what.startswith(message)


def test_all_problems_are_reported_at_once(files: Files) -> None:
    plan = files.read(
        b"[", [{"tenant-id": ""}, devices({}, {"device-id": "d"}, {"device-id": "d"})], [credentials(psk(type=""))]
    )
    assert [(Path(problem.file).name, problem.entry) for problem in plan.problems] == [
        ("0.json", ""),
        ("1.json", "[0]"),
        ("1.json", "[1].devices[0]"),
        ("1.json", "[1].devices[2] device d of tenant acme"),
        ("2.json", "[0].credentials[0] credentials of device press-1 of tenant acme"),
    ]
    assert str(LoadErrors(plan.problems)).endswith("(and 4 more)")


def test_what_stands_twice_is_a_problem(files: Files) -> None:
    """The same type and auth-id for two devices; tenants and devices that occur again."""
    problems = files.problems(
        [{"tenant-id": "acme"}, devices({"device-id": "d"}), credentials(psk("d"), psk("e"), psk("e", type="my-psk"))],
        [{"tenant-id": "acme"}, devices({"device-id": "d"}), devices({"device-id": "d"}, tenant="other")],
    )
    assert problems == [
        ("[0] tenant acme", "tenant-id: stands in [0] tenant acme already"),
        (
            "[1].devices[0] device d of tenant acme",
            "device-id: stands in [1].devices[0] device d of tenant acme already",
        ),
        (
            "[2].credentials[1] credentials of device e of tenant acme",
            "auth-id: psk p1 stands in [2].credentials[0] already",
        ),
    ]


def test_placeholders_are_problems(files: Files) -> None:
    """Files of the Hono source tree; the error names the member."""
    problems = files.problems(
        [
            {"tenant-id": "acme", "ext": {"a": ["x", "${first.one}"]}, "alias": "${second}"},
            devices({"device-id": "d", "data": {"ext": {"price": "$5 {ok}"}}}),
            "${third}",
        ]
    )
    assert problems == [
        ("[0]", "ext.a[1]: holds the placeholder ${first.one}"),
        ("[0]", "alias: holds the placeholder ${second}"),
        ("[2]", "holds the placeholder ${third}"),
    ]


def test_quirks_of_tenants(files: Files) -> None:
    """A single trust anchor; `cert` in files written by hand."""
    plan = files.read([{"tenant-id": "one", "trusted-ca": DESCRIBED}, {"tenant-id": "two", "trusted-ca": [CERTIFIED]}])
    assert [len(one.tenant.trust_anchors) for one in plan.tenants] == [1, 1]
    assert plan.tenants[1].tenant.trust_anchors[0].subject.text == CA_DN


def test_quirks_of_devices(files: Files) -> None:
    """`comment` beside and in `data`; `via` as text; no `data`; an id that is a number."""
    plan = files.read(
        [
            devices(
                {"device-id": "a", "comment": 5, "data": {"comment": "x", "via": "gw"}},
                {"device-id": "b"},
                {"device-id": 4711, "data": None},
            )
        ]
    )
    assert [(one.device_id, one.device.via) for one in plan.devices] == [("a", ("gw",)), ("b", ()), ("4711", ())]


def test_quirks_of_credentials(files: Files) -> None:
    """Secrets without id; `null` for what is not there; plain passwords."""
    nulls: JsonObject = {"hash-function": None, "pwd-hash": None, "salt": None}
    plan = files.read(
        [
            credentials(
                password({"pwd-plain": "tea-pot-42"} | nulls, auth_id="a") | {"enabled": None, "ext": {}},
                password(HASHED | {"salt": None, "pwd-plain": None}, auth_id="b"),
            )
        ]
    )
    assert [one.update.enabled for one in plan.credentials] == [True, True]
    assert plan.warnings == ()


def test_a_secret_that_lost_its_hash_is_disabled_and_listed(files: Files) -> None:
    """Hono 1.2 loses the hash of a secret that is updated by its id."""
    lost: JsonObject = {"id": "A", "hash-function": None, "pwd-hash": None, "salt": None, "pwd-plain": None}
    plan = files.read([credentials(password(HASHED, lost))])
    first, second = (one.secret for one in plan.credentials[0].update.secrets)
    assert isinstance(first, PasswordSecret)
    assert isinstance(second, PasswordSecret)
    assert (first.enabled, second.enabled, second.id) == (None, False, "A")
    assert second.pwd_hash not in {"", SHA_256}
    (warning,) = plan.warnings
    assert warning.entry == "[0].credentials[0] credentials of device press-1 of tenant acme"
    assert warning.message.startswith("secrets[1]: has no password")
    ((_, message),) = files.problems(
        [credentials({"device-id": "d", "type": "hashed-password", "auth-id": "a", "secrets": [5]})]
    )
    assert message.startswith("secrets[0]: must be an object")


def test_the_template_of_a_tenant_in_the_files_counts(files: Files) -> None:
    """Management 6.5."""
    tenant = {"tenant-id": "acme", "trusted-ca": [{"cert": CA_CERT, "auth-id-template": "{{subject-cn}}"}]}
    certified = {"device-id": "press-1", "type": "x509-cert", "cert": DEV_CERT}
    plan = files.read([credentials(certified), credentials(certified, tenant="other"), tenant])
    assert [one.update.auth_id for one in plan.credentials] == ["pump-17", "CN=pump-17,OU=Line 7,O=Example GmbH"]


def test_the_rules_of_the_deployment_count(files: Files) -> None:
    rules = replace(RULES, bcrypt_max_cost=9)
    entry = [credentials(password({"hash-function": "bcrypt", "pwd-hash": BCRYPT_10}))]
    assert files.read(entry).credentials
    (problem,) = files.read(entry, rules=rules).problems
    assert "cost from 4 to 9" in problem.message


def test_limits_are_warned_of(files: Files) -> None:
    """The per tenant limit is not applied while loading."""
    some = devices({"device-id": "a"}, {"device-id": "b"})
    for limit, warned in ((1, True), (2, False), (-1, False)):
        tenant = {"tenant-id": "acme", "registration-limits": {"max-devices": limit}}
        plan = files.read([tenant, {"tenant-id": "other"}, some])
        assert [warning.message for warning in plan.warnings] == (
            ["has 2 devices, more than its max-devices of 1"] if warned else []
        )


def test_problems_are_lines() -> None:
    assert str(LoadProblem(file="a.json", entry="[0]", message="is odd")) == "a.json: [0]: is odd"
    assert str(LoadProblem(file="a.json", entry="", message="is odd")) == "a.json: is odd"


# --- Writing ---


@pytest.fixture
def sample(tmp_path: Path) -> Iterator[SampleStore]:
    one = SampleStore(tmp_path, Clock(NOW))
    yield one
    one.close()


@pytest.fixture
def hasher() -> Iterator[PasswordHasher]:
    one = PasswordHasher(workers=2, queue=16, cost=4)
    yield one
    one.close()


class Loading:
    """Loads files into a store."""

    def __init__(self, files: Files, sample: SampleStore, hasher: PasswordHasher) -> None:
        self.files = files
        self.sample = sample
        self.hasher = hasher
        self.progress: list[tuple[int, int]] = []

    def load(self, *contents: object, replace: bool = False) -> LoadCounts:
        plan = self.files.read(*contents)
        self.progress.clear()
        return self.sample.run(
            apply(
                plan,
                self.sample.store,
                self.hasher,
                ADAPTER,
                self.sample.clock,
                replace=replace,
                progress=lambda done, total: self.progress.append((done, total)),
            )
        )

    def problems(self, *contents: object, replace: bool = False) -> list[tuple[str, str]]:
        with pytest.raises(LoadErrors) as caught:
            self.load(*contents, replace=replace)
        return [(problem.entry, problem.message) for problem in caught.value.problems]

    def find_tenant(self, tenant_id: str) -> StoredTenant | None:
        async def find(transaction: Transaction) -> StoredTenant | None:
            return await transaction.find_tenant(tenant_id)

        return self.sample.run(self.sample.store.read(find))

    def tenant(self, tenant_id: str) -> StoredTenant:
        found = self.find_tenant(tenant_id)
        assert found is not None
        return found

    def device(self, device_id: str, tenant_id: str = "acme") -> StoredDevice:
        found = self.sample.find_device(tenant_id, device_id)
        assert found is not None
        return found

    def credentials(self, device_id: str, tenant_id: str = "acme") -> StoredCredentials:
        found = self.sample.find_credentials(tenant_id, device_id)
        assert found is not None
        return found

    def auth_ids(self, device_id: str, tenant_id: str = "acme") -> list[str]:
        return [credential.auth_id for credential in self.credentials(device_id, tenant_id).credentials]


@pytest.fixture
def loading(files: Files, sample: SampleStore, hasher: PasswordHasher) -> Loading:
    return Loading(files, sample, hasher)


ACME: JsonObject = {"tenant-id": "acme", "enabled": False, "alias": "a"}


def test_everything_is_written(loading: Loading) -> None:
    counts = loading.load(
        [ACME],
        [devices({"device-id": "press-1", "data": {"via": "gw"}}, {"device-id": "gw"})],
        [credentials(psk(), password({"pwd-plain": "tea-pot-42", "id": "A"}), psk("gw", "p2"))],
    )
    assert counts == LoadCounts(tenants=1, devices=2, credentials=3)
    tenant = loading.tenant("acme")
    assert tenant_document(tenant.tenant) == {"enabled": False, "alias": "a"}
    assert (tenant.created, tenant.updated) == (NOW, None)
    device = loading.device("press-1")
    assert device.device.via == ("gw",)
    assert (device.created, device.updated, device.auto_provisioned) == (NOW, None, False)
    stored = loading.credentials("press-1")
    assert stored.version not in {device.version, tenant.version}
    assert [credential_document(one, reveal_psk=True)["type"] for one in stored.credentials] == [
        "psk",
        "hashed-password",
    ]
    (secret,) = stored.credentials[1].secrets
    assert isinstance(secret, PasswordSecret)
    assert secret.id == "A"
    assert loading.sample.run(loading.hasher.verify("tea-pot-42", secret.pwd_hash))
    assert loading.auth_ids("gw") == ["p2"]
    assert loading.sample.count_devices("acme") == 2
    assert loading.progress[-1] == (4, 4)


def test_nothing_is_nothing(loading: Loading) -> None:
    assert loading.load([]) == LoadCounts()
    assert loading.load([], replace=True) == LoadCounts()


def test_what_is_there_may_be_added_to(loading: Loading) -> None:
    loading.load([ACME], [devices({"device-id": "press-1"})])
    before = loading.tenant("acme"), loading.device("press-1")
    counts = loading.load([devices({"device-id": "new"}), credentials(psk(), psk("new", "p2"))])
    assert counts == LoadCounts(devices=1, credentials=2)
    assert (loading.tenant("acme"), loading.device("press-1")) == before
    assert (loading.auth_ids("press-1"), loading.auth_ids("new")) == (["p1"], ["p2"])


def test_what_exists_is_a_problem(loading: Loading) -> None:
    loading.load([ACME, devices({"device-id": "press-1"}), credentials(psk())])
    before = loading.tenant("acme"), loading.device("press-1"), loading.credentials("press-1")
    problems = loading.problems(
        [ACME, {"tenant-id": "other"}, devices({"device-id": "new"}, {"device-id": "press-1"}), credentials(psk())]
    )
    assert problems == [
        ("[0] tenant acme", "exists already"),
        ("[2].devices[1] device press-1 of tenant acme", "exists already"),
    ]
    assert loading.problems([credentials(psk(auth_id="p2"), psk(auth_id="p3"))]) == [
        ("[0].credentials[0] credentials of device press-1 of tenant acme", "has credentials already")
    ]
    assert (loading.tenant("acme"), loading.device("press-1"), loading.credentials("press-1")) == before
    assert loading.find_tenant("other") is None
    assert loading.sample.find_device("acme", "new") is None


def test_what_belongs_to_nothing_is_a_problem(loading: Loading) -> None:
    assert loading.problems([devices({"device-id": "d"}), credentials(psk("d"), psk("e", "p2"))]) == [
        ("[0].devices[0] device d of tenant acme", "there is no such tenant"),
        ("[1].credentials[0] credentials of device d of tenant acme", "there is no such tenant"),
        ("[1].credentials[1] credentials of device e of tenant acme", "there is no such tenant"),
    ]
    missing = [("[1].credentials[0] credentials of device press-1 of tenant acme", "there is no such device")]
    assert loading.problems([ACME, credentials(psk())]) == missing
    loading.load([ACME])
    assert loading.problems([devices({"device-id": "d"}), credentials(psk())]) == missing


def test_what_is_wrong_in_itself_and_what_belongs_to_nothing_are_listed_together(loading: Loading) -> None:
    """An entry with a problem counts as being there; nothing is blamed for lacking it."""
    problems = loading.problems(
        [
            {"tenant-id": "acme", "colour": 1},
            {"tenant-id": "held", "alias": "${alias}"},
            devices({"device-id": "a"}, {"device-id": "b", "data": {"colour": 1}}),
            devices({"device-id": "c"}, tenant="held"),
            devices({"device-id": "d"}, tenant="nobody"),
            credentials(psk("a", "p1"), psk("b", "p2"), psk("c", "p3")),
            credentials(psk("c", "p1"), tenant="held"),
        ]
    )
    assert problems == [
        ("[0] tenant acme", "colour: unknown member"),
        ("[1]", "alias: holds the placeholder ${alias}"),
        ("[2].devices[1] device b of tenant acme", "data.colour: unknown member"),
        ("[4].devices[0] device d of tenant nobody", "there is no such tenant"),
        ("[5].credentials[2] credentials of device c of tenant acme", "there is no such device"),
    ]
    assert loading.sample.find_device("acme", "a") is None
    loading.load([ACME, devices({"device-id": "a"})])
    problems = loading.problems(
        [{"tenant-id": "acme", "colour": 1}, devices({"device-id": "a"}), credentials(psk("c"), psk("a", "p2"))]
    )
    assert problems == [
        ("[0] tenant acme", "colour: unknown member"),
        ("[1].devices[0] device a of tenant acme", "exists already"),
        ("[2].credentials[0] credentials of device c of tenant acme", "there is no such device"),
    ]


def test_what_stands_twice_is_a_problem_also_if_the_first_is_broken(files: Files) -> None:
    problems = files.problems(
        [{"tenant-id": "acme", "colour": 1}, {"tenant-id": "acme"}],
        [devices({"device-id": "d", "data": {"colour": 1}}, {"device-id": "d"})],
        [credentials(psk("d", colour=1), psk("d"))],
    )
    assert [message for _, message in problems] == [
        "colour: unknown member",
        "tenant-id: stands in [0] tenant acme already",
        "data.colour: unknown member",
        "device-id: stands in [0].devices[0] device d of tenant acme already",
        "colour: unknown member",
        "auth-id: psk p1 stands in [0].credentials[0] already",
    ]


def test_nothing_is_missing_while_a_file_cannot_be_read(loading: Loading) -> None:
    """What is missing may stand in there."""
    problems = loading.problems(b"[", [devices({"device-id": "d"}), credentials(psk("d"), psk("e", "p2"))])
    assert len(problems) == 1
    assert problems[0][1].startswith("not valid JSON")
    loading.load([ACME, devices({"device-id": "d"})])
    problems = loading.problems(b"[", [devices({"device-id": "d"}), credentials(psk("e"))])
    assert problems[1:] == [("[0].devices[0] device d of tenant acme", "exists already")]


def test_an_auth_id_of_another_device_is_a_problem(loading: Loading) -> None:
    loading.load([ACME, devices({"device-id": "press-1"}), credentials(psk())])
    for replace_ in (False, True):
        assert loading.problems(
            [devices({"device-id": "new"}), credentials(psk("new", "p0"), psk("new"))], replace=replace_
        ) == [
            (
                "[1].credentials[1] credentials of device new of tenant acme",
                "auth-id: belongs to device press-1 already",
            )
        ]


def test_names_of_other_tenants_are_problems(loading: Loading) -> None:
    """Management 4.7."""
    loading.load([ACME | {"trusted-ca": [DESCRIBED]}])
    assert loading.problems([{"tenant-id": "x"}, {"tenant-id": "b", "alias": "a"}]) == [
        ("[1] tenant b", "alias: a is the alias of another tenant")
    ]
    ((entry, message),) = loading.problems([{"tenant-id": "b", "trusted-ca": [DESCRIBED]}])
    assert entry == "[0] tenant b"
    assert "CN=plant-ca,OU=Line 7,O=Other" in message
    assert loading.find_tenant("x") is None


def test_what_exists_may_be_replaced(loading: Loading) -> None:
    loading.load(
        [ACME, devices({"device-id": "press-1"}, {"device-id": "gw"}, {"device-id": "left"})],
        [credentials(psk(), psk("gw", "p2"), psk("left", "p3"))],
    )
    old = {
        device_id: (loading.device(device_id), loading.credentials(device_id))
        for device_id in ("press-1", "gw", "left")
    }
    tenant = loading.tenant("acme")
    loading.sample.clock.now = later = NOW + timedelta(days=1)
    # The auth-ids p1 and p2 change places; gw is not named as a device, press-1 is.
    counts = loading.load(
        [{"tenant-id": "acme"}, {"tenant-id": "new"}],
        [devices({"device-id": "press-1", "data": {"enabled": False}}, {"device-id": "left"})],
        [credentials(psk("press-1", "p2"), psk("gw", "p1"))],
        replace=True,
    )
    assert counts == LoadCounts(tenants=2, devices=2, credentials=2, replaced=3)
    replaced = loading.tenant("acme")
    assert (replaced.created, replaced.updated, replaced.tenant.alias) == (NOW, later, None)
    assert replaced.version != tenant.version
    press = loading.device("press-1")
    assert (press.created, press.updated, press.device.enabled) == (NOW, later, False)
    assert press.version != old["press-1"][0].version
    assert loading.device("gw") == old["gw"][0]
    assert (loading.auth_ids("press-1"), loading.auth_ids("gw")) == (["p2"], ["p1"])
    assert loading.credentials("left") == old["left"][1]
    assert loading.device("left").version != old["left"][0].version
    assert loading.sample.count_devices("acme") == 3


def test_what_the_registry_itself_knows_stays(loading: Loading) -> None:
    """Management 5.4 (D33)."""
    loading.load([ACME])

    async def insert(transaction: Transaction) -> None:
        from kamado.devices import Device

        await transaction.insert_device(
            StoredDevice(
                tenant_id="acme",
                device_id="d",
                version="1",
                created=NOW - timedelta(days=9),
                auto_provisioned=True,
                notification_sent=True,
                device=Device(),
            ),
            StoredCredentials(tenant_id="acme", device_id="d", version="2"),
        )

    loading.sample.run(loading.sample.store.write(insert))
    loading.load([devices({"device-id": "d"})], replace=True)
    found = loading.device("d")
    assert (found.auto_provisioned, found.notification_sent) == (True, True)
    assert found.created == NOW - timedelta(days=9)


def test_what_a_deleted_tenant_left_behind_is_not_in_the_way(loading: Loading) -> None:
    """Management 8.3."""
    loading.load([ACME, devices({"device-id": "press-1"}, {"device-id": "old"}), credentials(psk())])
    loading.sample.delete_tenant("acme")
    assert loading.problems([devices({"device-id": "new"})]) == [
        ("[0].devices[0] device new of tenant acme", "there is no such tenant")
    ]
    loading.load([ACME, devices({"device-id": "press-1"}), credentials(psk(auth_id="p2"))])
    assert loading.auth_ids("press-1") == ["p2"]
    assert loading.sample.find_device("acme", "old") is None


def test_a_set_that_was_there_before_its_device_is_replaced_if_there_is_another_one(loading: Loading) -> None:
    """Management 8.1, lenient referential integrity: registration of such a device keeps its credentials."""
    loading.load([ACME])

    async def insert(transaction: Transaction) -> None:
        for device_id in ("d", "e"):
            await transaction.replace_credentials(
                StoredCredentials(
                    tenant_id="acme",
                    device_id=device_id,
                    version="1",
                    credentials=(credential("psk", device_id),),
                )
            )

    loading.sample.run(loading.sample.store.write(insert))
    counts = loading.load([devices({"device-id": "d"}, {"device-id": "e"}, {"device-id": "f"}), credentials(psk("d"))])
    assert counts == LoadCounts(devices=3, credentials=1)
    assert loading.auth_ids("d") == ["p1"]
    assert loading.auth_ids("e") == ["e"]
    assert loading.credentials("d").has_device
    assert loading.credentials("e").has_device
    assert (loading.credentials("d").version == "1", loading.credentials("e").version == "1") == (False, True)
    assert loading.sample.count_devices("acme") == 3


def test_every_change_is_recorded(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    from kamado.storage.sql import SqlTransaction

    changes: list[Change] = []

    async def record(self: SqlTransaction, change: Change) -> None:
        changes.append(change)

    monkeypatch.setattr(SqlTransaction, "record", record)

    def seen() -> list[tuple[str, str, bool, bool]]:
        made = [(one.kind.value, one.resource_id, one.before is None, one.after is None) for one in changes]
        assert {(one.principal, one.tenant_id) for one in changes} == {(ADAPTER.name, "acme")}
        changes.clear()
        return made

    loading.load([ACME, devices({"device-id": "press-1"}), credentials(psk())])
    assert seen() == [
        ("tenant", "acme", True, False),
        ("device", "press-1", True, False),
        ("credentials", "press-1", True, False),
    ]
    loading.load([ACME, devices({"device-id": "press-1"}), credentials(psk())], replace=True)
    assert seen() == [
        ("tenant", "acme", False, False),
        ("device", "press-1", False, False),
        ("credentials", "press-1", False, False),
    ]


def test_many_passwords_do_not_overrun_the_hasher(loading: Loading) -> None:
    many = [password({"pwd-plain": f"p{number}"}, auth_id=f"s{number}") for number in range(50)]
    loading.load([ACME, devices({"device-id": "press-1"}), credentials(*many)])
    hashes = {str(stored_document(one)["secrets"]) for one in loading.credentials("press-1").credentials}
    assert len(hashes) == 50
    assert loading.progress[:4] == [(16, 52), (32, 52), (48, 52), (50, 52)]
    assert loading.progress[-1] == (52, 52)


def test_progress_is_told_now_and_then(loading: Loading) -> None:
    loading.load([ACME, devices(*({"device-id": f"d{number}"} for number in range(2500)))])
    assert loading.progress == [(1000, 2501), (2000, 2501), (2501, 2501)]


def test_nobody_has_to_listen(loading: Loading) -> None:
    plan = loading.files.read([ACME])
    counts = loading.sample.run(apply(plan, loading.sample.store, loading.hasher, ADAPTER, loading.sample.clock))
    assert counts == LoadCounts(tenants=1)


def test_a_hasher_that_stops_leaves_nothing_behind(loading: Loading) -> None:
    loading.hasher.close()
    with pytest.raises(Unavailable):
        loading.load([ACME, devices({"device-id": "press-1"}), credentials(password({"pwd-plain": "x"}))])
    assert loading.find_tenant("acme") is None


def test_loading_may_be_cancelled(loading: Loading) -> None:
    """Before the transaction nothing is left behind."""
    plan = loading.files.read([ACME, devices({"device-id": "press-1"}), credentials(password({"pwd-plain": "x"}))])

    async def cancelled() -> None:
        task = asyncio.ensure_future(apply(plan, loading.sample.store, loading.hasher, ADAPTER, loading.sample.clock))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loading.sample.run(cancelled())
    assert loading.find_tenant("acme") is None
