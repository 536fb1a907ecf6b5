"""Callers: rights (authentication 3), permissions file (4), logins (4.2, 4.3, 5.1) and the first identity."""

import asyncio
import json
import logging
import stat
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.integration.certificates import Authority

from kamado.auth import (
    ADAPTER_AUTHORITIES,
    LOCAL_OPERATOR,
    ROLES,
    Authenticator,
    Authorities,
    Mechanism,
    PermissionsError,
    Principal,
    add_identity,
    change_identity_password,
    ensure_first_identity,
    load_permissions,
    remove_identity,
)
from kamado.errors import BadRequest, Conflict, NotFound
from kamado.passwords import PasswordHasher
from kamado.storage import open_store
from kamado.store import Identity, Store, Transaction

NOW = datetime(2026, 1, 31, 8, 15, 30, tzinfo=UTC)


# Rights: authentication 3.1


def may(claims: dict[str, str], activity: str, address: str) -> bool:
    authorities = Authorities(claims)
    return authorities.may_read(address) if activity == "R" else authorities.may_write(address)


@pytest.mark.parametrize(
    ("claims", "address", "granted"),
    [
        # The table "consequences that are easy to miss"
        ({"r:tenant": "W"}, "tenant", True),
        ({"r:tenant": "W"}, "tenant/x", True),
        ({"r:registration/*": "W"}, "registration/acme", True),
        ({"r:registration/*": "W"}, "registration/acme/x", True),
        ({"r:registration/*": "W"}, "registration", False),
        ({"r:registration/acme": "W"}, "registration/acme", True),
        ({"r:registration/acme": "W"}, "registration/acme/x", True),
        ({"r:registration/acme": "W"}, "registration/other", False),
        ({"r:registration/acme": "W"}, "registration/acme2", False),
        ({"r:regis*": "W"}, "registration/acme", False),
        ({"r:*/acme": "W"}, "registration/acme", False),
        # The five steps
        ({"r:registration/acme/x/y": "W"}, "registration/acme/x/y", True),
        ({"r:registration/acme/x/y": "W"}, "registration/acme/x", False),
        ({"r:registration/acme/x": "W"}, "registration/acme/x/y", False),
        ({"r:registration": "W"}, "registration/acme/x", True),
        ({"r:*": "W"}, "anything", True),
        ({"r:*": "W"}, "anything/at/all", True),
        ({}, "tenant", False),
        # An empty segment is no tenant (amqp-apis 3)
        ({"r:registration/*": "W"}, "registration//x", False),
        ({"r:registration/": "W"}, "registration//x", False),
        # Keys are never taken apart: colons in a tenant do no harm (authentication 2.5)
        ({"r:registration/a:b": "W"}, "registration/a:b", True),
        # Values
        ({"r:tenant": "*"}, "tenant", True),
        ({"r:tenant": "RWE"}, "tenant", True),
        ({"r:tenant": "EW"}, "tenant", True),
        ({"r:tenant": "R"}, "tenant", False),
        ({"r:tenant": ""}, "tenant", False),
        # Another kind of key grants nothing
        ({"o:tenant": "W"}, "tenant", False),
    ],
)
def test_rights_on_addresses(claims: dict[str, str], address: str, granted: bool) -> None:
    assert may(claims, "W", address) is granted
    reading = {key: value.translate(str.maketrans("RW", "WR")) for key, value in claims.items()}
    assert may(reading, "R", address) is granted


@pytest.mark.row("authentication 6", 15, 16)
def test_search_goes_on_behind_a_key_without_the_letter() -> None:
    """authentication 6, rows 15 and 16."""
    assert not may({"r:registration/*": "R"}, "W", "registration/acme")
    assert may({"r:registration/acme": "R", "r:registration/*": "W"}, "W", "registration/acme")


@pytest.mark.parametrize(
    ("claims", "address", "operation", "granted"),
    [
        ({"o:registration/*:assert": "E"}, "registration/acme", "assert", True),
        ({"o:registration/*:assert": "E"}, "registration/acme", "get", False),
        ({"o:registration/*:assert": "E"}, "registration/acme/x", "assert", True),
        ({"o:registration/*:assert": "E"}, "registration", "assert", False),
        ({"o:registration/acme:assert": "E"}, "registration/other", "assert", False),
        ({"o:registration/acme:*": "E"}, "registration/acme", "assert", True),
        ({"o:registration:assert": "E"}, "registration/acme", "assert", True),
        ({"o:registration:*": "E"}, "registration/acme", "assert", True),
        ({"o:registration/acme/x:assert": "E"}, "registration/acme/x", "assert", True),
        ({"o:*:assert": "E"}, "registration/acme", "assert", True),
        ({"o:*:assert": "E"}, "registration/acme", "get", False),
        ({"o:*:*": "E"}, "registration/acme", "assert", True),
        ({"o:*:*": "E"}, "tenant", "get", True),
        ({"o:*:*": "*"}, "tenant", "get", True),
        ({"o:*:*": "RW"}, "tenant", "get", False),
        ({"o:tenant:get": "RW", "o:tenant:*": "E"}, "tenant", "get", True),
        ({"r:*": "*"}, "tenant", "get", False),
        ({}, "tenant", "get", False),
    ],
)
@pytest.mark.row("authentication 6", 17, 18)
def test_rights_on_operations(claims: dict[str, str], address: str, operation: str, granted: bool) -> None:
    """authentication 3.1; 6, rows 17 and 18."""
    assert Authorities(claims).may_execute(address, operation) is granted


def test_claims_that_are_no_authorities_are_ignored() -> None:
    """authentication 2.5."""
    authorities = Authorities.from_claims({"sub": "x", "r:tenant": "R", "r:a": 1, "o:b:c": ["E"], "o:x:y": "E"})
    assert authorities.claims == {"r:tenant": "R", "o:x:y": "E"}
    assert "r:tenant" in repr(authorities)
    assert authorities == Authorities({"o:x:y": "E", "r:tenant": "R"}) != object()
    assert hash(authorities) == hash(Authorities({"o:x:y": "E", "r:tenant": "R"}))


def test_authorities_unite() -> None:
    """authentication 4.1: letters are united, never replaced."""
    united = Authorities({"r:a": "R", "r:b": "W"}).united(Authorities({"r:a": "WR", "r:b": "*", "r:c": "E"}))
    assert united.claims == {"r:a": "RW", "r:b": "*", "r:c": "E"}


def test_stock_roles() -> None:
    """authentication 3.3."""
    adapter = Authorities(ADAPTER_AUTHORITIES)
    for address in ("tenant", "registration/acme", "credentials/acme", "device_con/acme"):
        assert adapter.may_write(address)
        assert adapter.may_read(f"{address}/reply")
    assert adapter.may_execute("tenant/acme", "get")
    assert adapter.may_execute("registration/acme", "assert")
    assert not adapter.may_execute("registration/acme", "register")
    assert adapter.may_execute("credentials/acme", "get")
    assert adapter.may_execute("device_con/acme", "set-last-gw")
    router = Authorities(ROLES["command-router"])
    assert router.may_write("registration/acme")
    assert not router.may_write("credentials/acme")


def test_principal_expires() -> None:
    principal = Principal(name="a", expires=NOW)
    assert not principal.is_expired(NOW - timedelta(microseconds=1))
    assert principal.is_expired(NOW)
    assert not Principal(name="a").is_expired(NOW)
    assert LOCAL_OPERATOR.may_reveal_secrets
    assert not principal.may_reveal_secrets


# Permissions file: authentication 4.1

HASH = "$2b$12$C6UzMDM.H6dfI/f/IKcEeO7jfrXL0nIYH0f0nS2v1q1v4J2r0b3eG"
EXAMPLE: dict[str, Any] = {
    "roles": {
        "protocol-adapter": [
            {"resource": "tenant", "activities": ["READ", "WRITE"]},
            {"operation": "tenant/*:*", "activities": ["EXECUTE"]},
            {"resource": "registration/*", "activities": ["READ", "WRITE"]},
            {"operation": "registration/*:assert", "activities": ["EXECUTE"]},
        ],
    },
    "users": {
        "http-adapter@HONO": {
            "mechanism": "PLAIN",
            "password": "http-secret",
            "authorities": ["hono-component", "protocol-adapter"],
        },
        "mqtt-adapter@HONO": {"mechanism": "PLAIN", "pwd-hash": HASH, "authorities": ["protocol-adapter"]},
        "coap-adapter": {"mechanism": "EXTERNAL", "authorities": ["protocol-adapter"]},
    },
}


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def with_grants(*grants: object) -> dict[str, object]:
    return {
        "roles": {"role": list(grants)},
        "users": {"u": {"mechanism": "EXTERNAL", "authorities": ["role"]}},
    }


def with_user(**members: object) -> dict[str, object]:
    return {"users": {"u": {name.replace("_", "-"): value for name, value in members.items()}}}


def test_example_of_the_specification(tmp_path: Path) -> None:
    permissions = load_permissions(write(tmp_path / "p.json", EXAMPLE))
    assert permissions.warnings == ()
    assert set(permissions.users) == {"http-adapter@HONO", "mqtt-adapter@HONO", "coap-adapter"}
    user = permissions.users["http-adapter@HONO"]
    assert user.mechanism is Mechanism.PLAIN
    assert user.authorities == Authorities(
        {"r:tenant": "RW", "o:tenant/*:*": "E", "r:registration/*": "RW", "o:registration/*:assert": "E"}
    )
    assert "http-secret" not in repr(permissions)
    assert HASH not in repr(permissions)


def test_roles_unite_per_key(tmp_path: Path) -> None:
    """authentication 4.1, merging: two roles, and two grants of one role, with the same key."""
    document = {
        "roles": {
            "a": [{"resource": "x", "activities": ["READ"]}, {"resource": "x", "activities": ["EXECUTE"]}],
            "b": [{"resource": "x", "activities": ["WRITE"]}],
        },
        "users": {"u": {"mechanism": "EXTERNAL", "authorities": ["a", "b"]}},
    }
    user = load_permissions(write(tmp_path / "p.json", document)).users["u"]
    assert sorted(user.authorities.claims["r:x"]) == ["E", "R", "W"]


def test_operations_always_grant_execute(tmp_path: Path) -> None:
    document = with_grants(
        {"operation": "a:b", "activities": ["READ"]},
        {"operation": "c:d"},
        {"operation": "registration/a:b:assert", "activities": []},
    )
    authorities = load_permissions(write(tmp_path / "p.json", document)).users["u"].authorities
    assert authorities.claims == {"o:a:b": "E", "o:c:d": "E", "o:registration/a:b:assert": "E"}


def test_operation_without_colon_is_skipped_with_a_warning(tmp_path: Path) -> None:
    permissions = load_permissions(write(tmp_path / "p.json", with_grants({"operation": "tenant"})))
    assert permissions.users["u"].authorities.claims == {}
    assert any("roles.role[0].operation" in warning for warning in permissions.warnings)


@pytest.mark.row("authentication 6", 23)
def test_unknown_role_is_a_warning(tmp_path: Path) -> None:
    """authentication 6, row 23; the marker role need not be defined."""
    document = with_user(mechanism="EXTERNAL", authorities=["hono-component", "nope"])
    permissions = load_permissions(write(tmp_path / "p.json", document))
    assert permissions.warnings == ("users.u.authorities: there is no role nope",)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ("{", "is not a JSON document"),
        ("[]", "the document"),
        ('{"roles": []}', "roles"),
        ('{"users": []}', "users"),
        ("{}", "users: is missing"),
        ({"roles": {"r": {}}}, "roles.r"),
        ({"roles": {"r": ["x"]}}, r"roles.r\[0\]"),
        (with_grants({"resource": "tenant", "activities": ["READ"]}, {"activities": ["READ"]}), r"roles.role\[1\]"),
        (with_grants({"resource": "tenant", "activities": ["LOOK"]}), r"roles.role\[0\].activities: LOOK"),
        (with_grants({"operation": "a:b", "activities": ["LOOK"]}), r"roles.role\[0\].activities: LOOK"),
        (with_grants({"resource": "tenant"}), r"roles.role\[0\].activities"),
        (with_grants({"resource": 5, "activities": ["READ"]}), r"roles.role\[0\].resource"),
        (with_grants({"operation": 5}), r"roles.role\[0\].operation"),
        ({"users": {"u": []}}, "users.u"),
        (with_user(authorities=[]), "users.u.mechanism"),
        (with_user(mechanism="SCRAM-SHA-256", authorities=[]), "users.u.mechanism"),
        (with_user(mechanism="PLAIN", authorities=[]), "users.u: .*either"),
        (with_user(mechanism="PLAIN", password="x", pwd_hash=HASH, authorities=[]), "users.u: .*either"),
        (with_user(mechanism="EXTERNAL", password="x", authorities=[]), "users.u: .*EXTERNAL"),
        (with_user(mechanism="PLAIN", password="", authorities=[]), "users.u.password"),
        (with_user(mechanism="PLAIN", password=5, authorities=[]), "users.u.password"),
        (with_user(mechanism="PLAIN", pwd_hash="secret", authorities=[]), "users.u.pwd-hash"),
        (with_user(mechanism="PLAIN", pwd_hash=5, authorities=[]), "users.u.pwd-hash"),
        (with_user(mechanism="PLAIN", pwd_hash=HASH.replace("$12$", "$15$"), authorities=[]), "users.u.pwd-hash"),
        (with_user(mechanism="EXTERNAL"), "users.u.authorities"),
        (with_user(mechanism="EXTERNAL", authorities=[5]), "users.u.authorities"),
    ],
)
@pytest.mark.row("authentication 6", 24)
def test_wrong_entries_are_named(tmp_path: Path, document: object, named: str) -> None:
    """authentication 4.1; 6, row 24."""
    with pytest.raises(PermissionsError, match=named) as caught:
        load_permissions(write(tmp_path / "p.json", document))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermissionsError, match=r"nope\.json: cannot be read"):
        load_permissions(tmp_path / "nope.json")


def test_no_password_is_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(PermissionsError) as caught:
        load_permissions(write(tmp_path / "p.json", with_user(mechanism="PLAIN", pwd_hash="sesame", authorities=[])))
    assert "sesame" not in str(caught.value)


# Logins

Scenario = Callable[[Store, PasswordHasher], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a scenario on a database of its own."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            passwords = PasswordHasher(workers=2, queue=10, cost=4)
            store = await open_store(f"sqlite:///{tmp_path}/kamado.db")
            try:
                await scenario(store, passwords)
            finally:
                await store.close()
                passwords.close()

        asyncio.run(main())

    return run


async def add(store: Store, passwords: PasswordHasher, name: str, password: str | None = "secret") -> None:
    await add_identity(
        store,
        passwords,
        principal=LOCAL_OPERATOR,
        name=name,
        mechanism=Mechanism.EXTERNAL if password is None else Mechanism.PLAIN,
        password=password,
        authorities=ADAPTER_AUTHORITIES,
        now=NOW,
    )


async def list_identities(store: Store) -> list[Identity]:
    async def read(transaction: Transaction) -> list[Identity]:
        return await transaction.list_identities()

    return await store.read(read)


@pytest.mark.row("authentication 6", 1, 2)
def test_plain_with_an_identity_of_the_database(run: Callable[[Scenario], None]) -> None:
    """authentication 5.1; 6, rows 1 and 2. Identities count from the moment they are written."""

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        logins = Authenticator(store, passwords)
        assert await logins.authenticate_plain("adapter", "secret", NOW) is None
        await add(store, passwords, "adapter")
        principal = await logins.authenticate_plain("adapter", "secret", NOW)
        assert principal is not None
        assert principal.name == "adapter"
        assert principal.authorities == Authorities(ADAPTER_AUTHORITIES)
        assert principal.expires == NOW + timedelta(seconds=600)
        assert not principal.may_reveal_secrets
        assert await logins.authenticate_plain("adapter", "Secret", NOW) is None
        assert await logins.authenticate_plain("Adapter", "secret", NOW) is None

        assert await logins.is_current(principal)
        await change_identity_password(store, passwords, principal=LOCAL_OPERATOR, name="adapter", password="other")
        assert not await logins.is_current(principal)
        assert await logins.authenticate_plain("adapter", "secret", NOW) is None
        changed = await logins.authenticate_plain("adapter", "other", NOW)
        assert changed is not None
        await remove_identity(store, principal=LOCAL_OPERATOR, name="adapter")
        assert not await logins.is_current(changed)
        assert await logins.authenticate_plain("adapter", "other", NOW) is None
        assert await logins.is_current(LOCAL_OPERATOR)

    run(scenario)


def test_logins_without_end(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        await add(store, passwords, "adapter")
        principal = await Authenticator(store, passwords, lifetime=None).authenticate_plain("adapter", "secret", NOW)
        assert principal is not None
        assert principal.expires is None

    run(scenario)


@pytest.mark.row("authentication 6", 4)
def test_an_identity_is_found_for_its_own_mechanism_only(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    """authentication 4.1; 6, row 4."""
    certificate = Authority.create().issue("CN=plain-user,O=X").der

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        document = {
            "users": {
                "coap-adapter": {"mechanism": "EXTERNAL", "authorities": []},
                "plain-user": {"mechanism": "PLAIN", "password": "x", "authorities": []},
            }
        }
        logins = Authenticator(store, passwords, load_permissions(write(tmp_path / "p.json", document)))
        assert await logins.authenticate_plain("coap-adapter", "x", NOW) is None
        assert await logins.authenticate_external(certificate, NOW) is None
        await add(store, passwords, "external", None)
        assert await logins.authenticate_plain("external", "x", NOW) is None

    run(scenario)


def test_plain_with_the_permissions_file(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    """authentication 4.2: clear text and hash; the file wins over the database."""

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        hashed = await passwords.hash("hashed-secret")
        document = {
            "users": {
                "clear": {"mechanism": "PLAIN", "password": "pässword", "authorities": []},
                "hashed": {"mechanism": "PLAIN", "pwd-hash": hashed.replace("$2a$", "$2y$"), "authorities": []},
            }
        }
        logins = Authenticator(store, passwords, load_permissions(write(tmp_path / "p.json", document)))
        assert await logins.authenticate_plain("clear", "pässword", NOW)
        assert await logins.authenticate_plain("clear", "passwort", NOW) is None
        assert await logins.authenticate_plain("hashed", "hashed-secret", NOW)
        assert await logins.authenticate_plain("hashed", "secret", NOW) is None
        await add(store, passwords, "clear", "of-the-database")
        await add(store, passwords, "only-database")
        assert await logins.authenticate_plain("clear", "of-the-database", NOW) is None
        assert await logins.authenticate_plain("only-database", "secret", NOW)

    run(scenario)


def test_refused_logins_take_the_same_road(
    run: Callable[[Scenario], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """authentication 4.2: one bcrypt comparison for whoever is refused, known or not."""

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        compared: list[str] = []
        document = {"users": {"clear": {"mechanism": "PLAIN", "password": "x", "authorities": []}}}
        logins = Authenticator(store, passwords, load_permissions(write(tmp_path / "p.json", document)))
        await add(store, passwords, "hashed")

        def compare(_: bytes, hashed: bytes) -> bool:
            compared.append(hashed.decode()[:7])
            return False

        monkeypatch.setattr("kamado.passwords.bcrypt.checkpw", compare)
        for name in ("unknown", "clear", "hashed"):
            assert await logins.authenticate_plain(name, "wrong", NOW) is None
        assert compared == ["$2a$04$"] * 3

    run(scenario)


@pytest.mark.parametrize(
    ("subject", "found"),
    [
        ("CN=coap-adapter,OU=Hono,O=Eclipse", True),
        ("CN=coap-adapter,O=X", True),
        ("CN=coap-adapter", True),
        ("O=X,CN=coap-adapter", False),
        ("OU=x,CN=coap-adapter", False),
        ("CN=other", False),
        ("O=X", False),
        ("OU=Plant 7,O=Acme", True),
        (r"CN=comma\,name,O=X", True),
    ],
)
@pytest.mark.row("authentication 6", 5, 6)
def test_external(run: Callable[[Scenario], None], tmp_path: Path, subject: str, found: bool) -> None:
    """authentication 4.3; 6, rows 5 and 6: the unescaped CN of the first RDN, or the complete DN."""
    certificate = Authority.create().issue(subject).der
    names = ["coap-adapter", "OU=Plant 7,O=Acme", "comma,name"]
    document = {"users": {name: {"mechanism": "EXTERNAL", "authorities": []} for name in names}}

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        logins = Authenticator(store, passwords, load_permissions(write(tmp_path / "p.json", document)))
        principal = await logins.authenticate_external(certificate, NOW)
        assert (principal is not None) is found
        if principal is not None:
            assert principal.name in names
            assert await logins.is_current(principal)

    run(scenario)


def test_external_with_an_identity_of_the_database(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        logins = Authenticator(store, passwords)
        await add(store, passwords, "coap-adapter", None)
        assert await logins.authenticate_external(Authority.create().issue("CN=coap-adapter,O=X").der, NOW)
        assert await logins.authenticate_external(b"no certificate", NOW) is None

    run(scenario)


def test_reload_is_whole_or_not_at_all(
    run: Callable[[Scenario], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """authentication 4.1: parse fully, then swap; on error keep the old one and log."""
    path = tmp_path / "p.json"

    def users(*names: str) -> dict[str, object]:
        return {"users": {n: {"mechanism": "PLAIN", "password": n, "authorities": ["nope"]} for n in names}}

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        logins = Authenticator(store, passwords, load_permissions(write(path, users("a"))))
        principal = await logins.authenticate_plain("a", "a", NOW)
        assert principal is not None
        write(path, users("b"))
        assert await logins.authenticate_plain("a", "a", NOW)
        assert logins.reload()
        assert await logins.authenticate_plain("a", "a", NOW) is None
        assert await logins.authenticate_plain("b", "b", NOW)
        assert not await logins.is_current(principal)
        write(path, "{")
        assert not logins.reload()
        assert await logins.authenticate_plain("b", "b", NOW)
        assert Authenticator(store, passwords).reload()
        assert logins.permissions is not None

    with caplog.at_level(logging.INFO, "kamado.auth"):
        run(scenario)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "ERROR"]


# Identities of the database


def test_identities_are_checked(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        await add(store, passwords, "adapter")
        with pytest.raises(Conflict):
            await add(store, passwords, "adapter")
        for name in ("", "a\0b", "a\nb", "x" * 257):
            with pytest.raises(BadRequest):
                await add(store, passwords, name)
        for password in ("", "a\0b", "x" * 73):
            with pytest.raises(BadRequest):
                await add(store, passwords, "other", password)
        with pytest.raises(BadRequest, match="exactly if"):
            await add_identity(
                store,
                passwords,
                principal=LOCAL_OPERATOR,
                name="other",
                mechanism=Mechanism.EXTERNAL,
                password="x",
                authorities={},
                now=NOW,
            )
        await add(store, passwords, "external", None)
        with pytest.raises(BadRequest, match="certificate"):
            await change_identity_password(store, passwords, principal=LOCAL_OPERATOR, name="external", password="x")
        with pytest.raises(NotFound):
            await change_identity_password(store, passwords, principal=LOCAL_OPERATOR, name="nope", password="x")
        with pytest.raises(NotFound):
            await remove_identity(store, principal=LOCAL_OPERATOR, name="nope")
        assert [identity.name for identity in await list_identities(store)] == ["adapter", "external"]

    run(scenario)


# The first identity


def read_credentials(path: Path) -> tuple[str, str]:
    first, second = path.read_text().splitlines()
    return first.removeprefix("username="), second.removeprefix("password=")


def test_first_identity(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    """README of the specification, "who may use AMQP": random password, hash stored, file of mode 0600."""

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        path = await ensure_first_identity(store, passwords, tmp_path, NOW)
        assert path == tmp_path / "adapter.credentials"
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        name, password = read_credentials(path)
        assert len(password) >= 32
        principal = await Authenticator(store, passwords).authenticate_plain(name, password, NOW)
        assert principal is not None
        assert principal.authorities == Authorities(ADAPTER_AUTHORITIES)
        [identity] = await list_identities(store)
        assert identity.password_hash is not None
        assert identity.password_hash.startswith("$2a$")
        # Not a second time
        assert await ensure_first_identity(store, passwords, tmp_path, NOW) is None
        assert read_credentials(path) == (name, password)

    run(scenario)
    # Nothing else is left in the directory
    assert [file.name for file in tmp_path.iterdir() if "credentials" in file.name] == ["adapter.credentials"]


def test_first_identity_only_where_there_is_none(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        await add(store, passwords, "mine")
        assert await ensure_first_identity(store, passwords, tmp_path, NOW) is None
        assert not (tmp_path / "adapter.credentials").exists()

    run(scenario)


def test_a_login_that_was_written_before_counts_for_this_database_too(
    run: Callable[[Scenario], None], tmp_path: Path
) -> None:
    """After an interrupted first start, for a second database in the directory, for one that was made anew: whoever
    has the file can log in, and nothing is overwritten."""

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        path = tmp_path / "adapter.credentials"
        path.write_text("# of the first database\n username = http-adapter@HONO \npassword=old=secret\n")
        before = path.read_bytes()
        assert await ensure_first_identity(store, passwords, tmp_path, NOW) == path
        assert path.read_bytes() == before
        principal = await Authenticator(store, passwords).authenticate_plain("http-adapter@HONO", "old=secret", NOW)
        assert principal is not None
        assert principal.authorities == Authorities(ADAPTER_AUTHORITIES)

    run(scenario)


@pytest.mark.parametrize(
    "text", ["", "username=a\n", "password=b\n", "username=\npassword=b\n", "username=a\npassword=" + "x" * 73, "{}"]
)
def test_a_file_of_another_kind_is_not_overwritten(run: Callable[[Scenario], None], tmp_path: Path, text: str) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        path = tmp_path / "adapter.credentials"
        path.write_text(text)
        with pytest.raises(OSError, match="move it away"):
            await ensure_first_identity(store, passwords, tmp_path, NOW)
        assert path.read_text() == text
        assert await list_identities(store) == []

    run(scenario)


def test_a_login_that_was_removed_stays_removed(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    """authentication 5.1: a removed identity is out, also after the next start."""

    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        path = await ensure_first_identity(store, passwords, tmp_path, NOW)
        assert path is not None
        name, password = read_credentials(path)
        await remove_identity(store, principal=LOCAL_OPERATOR, name=name)
        assert await ensure_first_identity(store, passwords, tmp_path, NOW) is None
        assert await list_identities(store) == []
        assert await Authenticator(store, passwords).authenticate_plain(name, password, NOW) is None

    run(scenario)


def test_starts_beside_each_other_agree(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        made = await asyncio.gather(*(ensure_first_identity(store, passwords, tmp_path, NOW) for _ in range(4)))
        assert sum(path is not None for path in made) == 1
        name, password = read_credentials(tmp_path / "adapter.credentials")
        assert await Authenticator(store, passwords).authenticate_plain(name, password, NOW)

    run(scenario)


def test_a_directory_that_cannot_be_written(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store, passwords: PasswordHasher) -> None:
        (tmp_path / "adapter.credentials").mkdir()
        with pytest.raises(OSError):
            await ensure_first_identity(store, passwords, tmp_path, NOW)
        assert await list_identities(store) == []

    run(scenario)
    assert not list(tmp_path.glob(".adapter.credentials*"))
