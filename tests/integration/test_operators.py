"""Operators' accounts: who may use the management API, with the real process (management 3.11, 13.1)."""

import base64
import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.databases import Databases
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, kamado, new_id
from tests.rows import Section

ROWS = Section("management-api 13.1")

OK, REFUSED, USAGE, WRONG_DATA, CONFIGURATION = 0, 1, 2, 65, 78
UI = "http://ui.example"
PASSWORD = "tea-pot:42 ✓"
ELSEWHERE = {"http.insecure.bind": "LOCALHOST", "http.insecure.enabled": "true"}
"""In these letters no address that is known to be this machine's only, and yet no other machine gets to see it."""


def basic(name: str, password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def add(registry: Registry, name: str, *options: str, password: str = PASSWORD) -> str:
    """Add an account and return what is said about it."""
    result = registry.run("operator", "add", name, "--password-file", "-", *options, stdin=f"{password}\n")
    assert result.stdout == "", "a password that was given is not printed"
    return result.stderr


def status(registry: Registry, path: str = "/v1/tenants/none", headers: dict[str, str] | None = None) -> int:
    return registry.request("GET", path, headers=headers).status


@pytest.fixture(scope="module")
def guarded(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with the account `ada`, for tests that only ask; pages of `UI` may use it."""
    directory = tmp_path_factory.mktemp("guarded")
    with Registry(directory, {"http.cors_allowed_origins": UI}, url=databases.create(directory / "data")) as running:
        running.create_tenant("A")
        add(running, "ada")
        yield running


# Logging in (management 3.11)


@ROWS.row(14)
def test_without_a_login(guarded: Registry) -> None:
    response = guarded.request("GET", "/v1/tenants/A")
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == 'Basic realm="Hono"'
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert isinstance(response.object["error"], str)


@ROWS.row(15)
def test_with_a_login(guarded: Registry) -> None:
    response = guarded.request("GET", "/v1/tenants/A", headers=basic("ada"))
    assert response.status == 200
    assert response.object["enabled"] is True
    assert response.headers["WWW-Authenticate"] is None
    assert guarded.request("PUT", "/v1/tenants/A", {}, basic("ada")).status == 204


@pytest.mark.parametrize(
    ("name", "password"), [("ada", "wrong"), ("ada", ""), ("Ada", PASSWORD), ("", ""), ("nobody", PASSWORD)]
)
def test_a_wrong_login_is_like_none(guarded: Registry, name: str, password: str) -> None:
    """Management 3.11, configuration 7.6: the same answer whatever is wrong."""
    response = guarded.request("GET", "/v1/tenants/A", headers=basic(name, password))
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == 'Basic realm="Hono"'
    assert response.object == {"error": "wrong name or password"}


@pytest.mark.parametrize("header", ["Basic", "nonsense", "Basic ###", "Basic YWRh", ""])
def test_a_broken_header(guarded: Registry, header: str) -> None:
    """Management 3.11: 400."""
    response = guarded.request("GET", "/v1/tenants/A", headers={"Authorization": header})
    assert response.status == 400
    assert "Authorization" in str(response.object["error"])


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        ("GET", "/v1/nothing", None, {}),
        ("PATCH", "/v1/tenants/A", None, {}),
        ("PUT", "/v1/tenants/A", b"x" * 100_000, {}),
        ("PUT", "/v1/tenants/A", b"{", {}),
        ("POST", "/v1/tenants/a%20b", None, {}),
        ("GET", "/v1/tenants/none", None, {}),
        ("POST", "/v1/tenants/A", {}, {}),
        ("GET", "/v1/tenants/A", None, {"Authorization": "Bearer abc"}),
        ("OPTIONS", "/v1/tenants/A", None, {}),
        ("OPTIONS", "/v1/tenants/A", None, {"Origin": UI}),
    ],
)
def test_401_comes_before_everything_else(
    guarded: Registry, method: str, path: str, body: object, headers: dict[str, str]
) -> None:
    """Management 3.15, step 1."""
    assert guarded.request(method, path, body, headers).status == 401


def test_preflights_need_no_login(guarded: Registry) -> None:
    """Management 3.10."""
    headers = {"Origin": UI, "Access-Control-Request-Method": "PUT"}
    response = guarded.request("OPTIONS", "/v1/tenants/A", headers=headers)
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == UI
    assert "authorization" in str(response.headers["Access-Control-Allow-Headers"])
    # A page is told that it has to log in, too.
    refused = guarded.request("GET", "/v1/tenants/A", headers={"Origin": UI})
    assert refused.status == 401
    assert refused.headers["Access-Control-Allow-Origin"] == UI


def test_pages_of_other_origins_stay_out_with_a_login(guarded: Registry) -> None:
    """Management 3.10, decision 0005."""
    for login in ({}, basic("ada")):
        assert status(guarded, "/v1/tenants/A", {"Origin": "http://evil.example", **login}) == 403


def test_any_name_of_the_registry_will_do_once_a_login_is_required(new_registry: NewRegistry) -> None:
    """Decision 0005: the rule for `Host` is for callers that nobody asks who they are."""
    registry = new_registry()
    host = {"Host": "registry.example:8080"}
    assert status(registry, headers=host) == 403
    add(registry, "ada")
    assert status(registry, headers=host) == 401
    assert status(registry, headers=host | basic("ada")) == 404


def test_realm_is_a_setting(new_registry: NewRegistry) -> None:
    registry = new_registry({"http.auth.realm": "plant 7"})
    add(registry, "ada")
    assert registry.request("GET", "/v1/tenants/A").headers["WWW-Authenticate"] == 'Basic realm="plant 7"'


# What changes counts at once


def test_accounts_come_and_go_on_connections_that_are_open_in_all_processes(
    new_registry: NewRegistry, tmp_path: Path
) -> None:
    """Choice "Who may use HTTP": the first account closes the API at once, whichever process serves it."""
    one = new_registry()
    two = new_registry({"storage.url": one.settings["storage.url"]})
    connections = [http.client.HTTPConnection("127.0.0.1", registry.http_port, timeout=20) for registry in (one, two)]

    def ask(headers: dict[str, str]) -> list[int]:
        found = []
        for connection in connections:
            connection.request("GET", "/v1/tenants/none", headers=headers)
            response = connection.getresponse()
            response.read()
            found.append(response.status)
        return found

    assert ask({}) == [404, 404]
    assert "everybody has to log in" in add(one, "ada")
    assert ask({}) == [401, 401]
    assert ask(basic("ada")) == [404, 404]
    assert "everybody" not in add(two, "bob", password="other")

    one.run("operator", "passwd", "ada", "--password-file", "-", stdin="newer\n")
    assert ask(basic("ada")) == [401, 401]
    assert ask(basic("ada", "newer")) == [404, 404]
    assert ask(basic("bob", "other")) == [404, 404]

    assert "No account" not in two.run("operator", "remove", "ada").stderr
    assert ask(basic("ada", "newer")) == [401, 401]
    assert ask({}) == [401, 401]
    left = one.run("operator", "remove", "bob").stderr
    assert "No account is left: nobody has to log in" in left
    assert ask({}) == [404, 404]
    for connection in connections:
        connection.close()


# Starts (choice "Who may use HTTP")


def test_a_start_that_would_open_the_api_to_others_is_refused(new_registry: NewRegistry) -> None:
    registry = new_registry(ELSEWHERE, start=False)
    result = subprocess.run(
        registry.command, env=registry.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == CONFIGURATION
    assert "no operator account" in result.stdout
    assert "operator add NAME --config" in result.stdout
    assert "http.auth.allow_anonymous=true" in result.stdout
    assert not registry.credentials_file.exists(), "nothing is made by a start that is refused"
    checked = registry.run("check-config", expect_status=CONFIGURATION)
    assert "kamado operator add NAME" in checked.stderr


def test_with_an_account_the_api_may_be_reached_by_others(new_registry: NewRegistry) -> None:
    """The account is added before the first start; removing the last one opens nothing."""
    registry = new_registry(ELSEWHERE, start=False)
    add(registry, "ada")
    assert "operators log in" in registry.run("check-config").stdout
    registry.start()
    assert registry.credentials_file.exists()
    assert "operators log in by name and password" in registry.log.read_text()
    assert status(registry) == 401
    assert status(registry, headers=basic("ada")) == 404
    assert "nobody may use the management API" in registry.run("operator", "remove", "ada").stderr
    assert status(registry) == 401
    assert status(registry, headers=basic("ada")) == 401
    add(registry, "bob")
    assert status(registry, headers=basic("bob")) == 404


def test_an_api_that_is_open_to_all_shows_no_keys_and_closes_with_the_first_account(new_registry: NewRegistry) -> None:
    """`http.auth.allow_anonymous`; management 6.10: only the local caller and accounts with the right see keys."""
    registry = new_registry(ELSEWHERE | {"http.auth.allow_anonymous": "true"})
    assert "whoever reaches it may use it" in registry.log.read_text()
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    registry.set_credentials(tenant_id, device_id, [psk()])
    path = f"/v1/credentials/{tenant_id}/{device_id}"
    assert secret_members(registry, path, {}) == {"id"}
    add(registry, "ada")
    assert status(registry) == 401
    assert "whoever reaches" in registry.run("operator", "remove", "ada").stderr
    assert status(registry) == 404


def test_start_and_check_tell_who_may_use_the_api(new_registry: NewRegistry) -> None:
    registry = new_registry()
    assert "only this machine reaches it and there is no operator account" in registry.log.read_text()
    assert "only this machine reaches it" in registry.run("check-config").stdout
    add(registry, "ada")
    assert "operators log in by name and password" in registry.run("check-config").stdout


# The right to reveal secrets (management 6.10)


def psk() -> dict[str, object]:
    return {"type": "psk", "auth-id": new_id("s"), "secrets": [{"key": "dGVhLXBvdC00Mg=="}]}


def secret_members(registry: Registry, path: str, headers: dict[str, str]) -> set[str]:
    response = registry.request("GET", path, headers=headers)
    assert response.status == 200
    (credential,) = response.array
    secrets = credential["secrets"]
    assert isinstance(secrets, list)
    (secret,) = secrets
    return set(secret)


@pytest.mark.row("management-api 13.4", 96)
def test_keys_are_for_operators_who_may_see_them(new_registry: NewRegistry) -> None:
    """With *hide PSK keys*: the account lacks the right; what it stores unseen stays."""
    registry = new_registry()
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    path = f"/v1/credentials/{tenant_id}/{device_id}"
    add(registry, "ada")
    add(registry, "eve", "--reveal-secrets")
    assert registry.request("PUT", path, [psk()], basic("ada")).status == 204
    assert secret_members(registry, path, basic("ada")) == {"id"}
    assert secret_members(registry, path, basic("eve")) == {"id", "key"}
    # Who does not see the key keeps it by the id of the secret (6.9).
    seen = registry.request("GET", path, headers=basic("ada")).array
    assert registry.request("PUT", path, seen, basic("ada")).status == 204
    assert secret_members(registry, path, basic("eve")) == {"id", "key"}


# The command


def test_accounts_are_listed_and_passwords_printed_once(new_registry: NewRegistry) -> None:
    registry = new_registry()
    made = registry.run("operator", "add", "ada", "--reveal-secrets").stdout.splitlines()
    assert [line.partition("=")[0] for line in made] == ["username", "password"]
    password = made[1].partition("=")[2]
    assert len(password) >= 32
    assert status(registry, headers=basic("ada", password)) == 404
    add(registry, "bob")
    entries = json.loads(registry.run("operator", "list", "--json").stdout)
    assert [(entry["name"], entry["reveal-secrets"]) for entry in entries] == [("ada", True), ("bob", False)]
    assert set(entries[0]) == {"name", "reveal-secrets", "created"}
    table = registry.run("operator", "list").stdout
    assert "ada" in table
    assert "$2a$" not in table
    changed = registry.run("operator", "passwd", "ada").stdout.splitlines()[1].partition("=")[2]
    assert changed != password
    assert status(registry, headers=basic("ada", changed)) == 404
    assert secret_is_absent(registry, password, changed, PASSWORD)


def secret_is_absent(registry: Registry, *secrets: str) -> bool:
    """Configuration 7.8: no password in the log."""
    text = registry.log.read_text()
    return not any(secret in text or basic("ada", secret)["Authorization"] in text for secret in secrets)


def test_what_the_command_refuses(new_registry: NewRegistry) -> None:
    registry = new_registry(start=False)
    add(registry, "ada")
    result = registry.run("operator", "add", "ada", expect_status=REFUSED)
    assert "there is an operator ada already" in result.stderr
    assert result.stdout == ""
    for command in ("remove", "passwd"):
        assert "no operator bob" in registry.run("operator", command, "bob", expect_status=REFUSED).stderr
    assert "colon" in registry.run("operator", "add", "a:b", expect_status=WRONG_DATA).stderr
    for wrong in ("", "\n", "x" * 73, "a\x07b"):
        registry.run("operator", "add", "bob", "--password-file", "-", stdin=wrong, expect_status=WRONG_DATA)
        registry.run("operator", "passwd", "ada", "--password-file", "-", stdin=wrong, expect_status=WRONG_DATA)
    for command in ("add", "passwd"):
        assert "no terminal" in registry.run("operator", command, "bob", "--prompt", expect_status=USAGE).stderr
    assert "Usage:" in kamado("operator", expect_status=USAGE).stdout + kamado("operator", "--help").stdout


# Guessing (configuration 7.7, 7.9)


def test_refused_logins_are_logged_now_and_then(new_registry: NewRegistry) -> None:
    registry = new_registry()
    add(registry, "ada")
    for number in range(3):
        assert status(registry, headers=basic("ada", f"guess-{number}")) == 401
    lines = [line for line in registry.log.read_text().splitlines() if "login of an operator refused" in line]
    assert len(lines) == 1
    assert "ada" in lines[0]
    assert "127.0.0.1" in lines[0]
    assert secret_is_absent(registry, "guess-0", "guess-1", "guess-2")
