"""`kamado tenant`, `kamado device` and `kamado credentials` against a running registry (docs/command-line.md)."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.integration.certificates import Authority
from tests.integration.conftest import NewRegistry
from tests.integration.fake_registry import FakeRegistry
from tests.integration.registry import Registry, kamado, new_id, poll
from typer.testing import CliRunner

from kamado.cli import app

OK, REFUSED, USAGE, NOT_ALLOWED, WRONG_REQUEST = 0, 1, 2, 3, 4
WRONG_DATA, UNAVAILABLE, LOGIN_REFUSED, CONFIGURATION, INTERRUPTED, READER_GONE = 65, 69, 77, 78, 130, 141
KAMADO = Path(sys.executable).parent / "kamado"

Operate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment without profiles."""
    return {"KAMADO_PROFILES": str(tmp_path / "no-profiles.toml")}


@pytest.fixture
def at(registry: Registry, nowhere: dict[str, str]) -> dict[str, str]:
    """An environment that names the shared registry."""
    return nowhere | {"KAMADO_URL": registry.http_url}


@pytest.fixture
def operate(at: dict[str, str]) -> Operate:
    """Run a command on the shared registry; not in a process of its own, since there are many."""

    def run(*arguments: str, expect_status: int = OK, stdin: str = "") -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(app, arguments, env=at, input=stdin)
        assert result.exit_code == expect_status, f"{arguments} ended with {result.exit_code}\n{result.output}"
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


def lines(result: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    """Read JSON Lines."""
    return [json.loads(line) for line in result.stdout.splitlines()]


class Terminal:
    """A command on a terminal of its own, which sees what it prints and types answers."""

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("KAMADO_")}
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kamado", *arguments],
            env=own | environment | {"TERM": "xterm", "COLUMNS": "200"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""

    def _read(self) -> bool:
        """Read some more; `False` at the end."""
        ready, _, _ = select.select([self._master], [], [], 120)
        assert ready, f"nothing more is printed:\n{self.output}"
        try:
            data = os.read(self._master, 65536)
        except OSError:
            return False
        self.output += data.decode()
        return bool(data)

    def answer(self, question: str, text: str) -> None:
        """Wait for a question and type a line."""
        while question not in self.output:
            assert self._read(), self.output
        self.output = self.output.partition(question)[2]
        os.write(self._master, f"{text}\n".encode())

    def end(self, expect_status: int) -> str:
        """Wait for the end; returns the rest of what is printed."""
        while self._read():
            pass
        os.close(self._master)
        assert self.process.wait(120) == expect_status, self.output
        return self.output


# Tenants


def test_life_of_a_tenant_in_processes(registry: Registry, at: dict[str, str]) -> None:
    tenant_id = new_id()
    assert kamado("tenant", "create", tenant_id, environment=at).stdout == f"{tenant_id}\n"
    result = kamado("tenant", "set", tenant_id, "--file", "-", stdin='{"ext": {"x": "ü"}}', environment=at)
    assert (result.stdout, result.stderr) == ("", f"Tenant {tenant_id} was changed.\n")
    shown = json.loads(kamado("tenant", "get", tenant_id, "--json", environment=at).stdout)
    assert shown["ext"] == {"x": "ü"}
    assert shown["version"] == registry.request("GET", f"/v1/tenants/{tenant_id}").etag
    kamado("tenant", "create", tenant_id, environment=at, expect_status=REFUSED)
    kamado("tenant", "delete", tenant_id, "--yes", environment=at)
    kamado("tenant", "get", tenant_id, environment=at, expect_status=REFUSED)


def test_life_of_a_tenant(operate: Operate, registry: Registry) -> None:
    tenant_id = new_id()
    arguments = ("--adapter", "hono-mqtt", "--set", "ext.customer=ACME", "--set", "minimum-message-size=10")
    assert operate("tenant", "create", tenant_id, *arguments).stdout == f"{tenant_id}\n"
    answer = registry.request("GET", f"/v1/tenants/{tenant_id}")
    assert answer.object["ext"] == {"customer": "ACME"}
    assert answer.object["minimum-message-size"] == 10
    shown = json.loads(operate("tenant", "get", tenant_id).stdout)
    assert shown == {"id": tenant_id, "version": answer.etag, **answer.object}
    assert operate("tenant", "get", tenant_id, "--json").stdout.count("\n") == 1

    result = operate(
        "tenant", "set", tenant_id, "--disabled", "--set", "ext.plan=gold", "--unset", "adapters", "--json"
    )
    answer = registry.request("GET", f"/v1/tenants/{tenant_id}")
    assert json.loads(result.stdout) == {"id": tenant_id, "version": answer.etag}
    assert answer.object == {
        "enabled": False,
        "ext": {"customer": "ACME", "plan": "gold"},
        "minimum-message-size": 10,
    }
    assert "exists already" in operate("tenant", "create", tenant_id, expect_status=REFUSED).stderr
    assert operate("tenant", "delete", tenant_id, "--yes").stdout == ""
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 404
    for command in (("get",), ("set", "--enabled"), ("delete", "--yes")):
        result = operate("tenant", command[0], tenant_id, *command[1:], expect_status=REFUSED)
        assert result.stderr == f"there is no tenant {tenant_id}\n"
        assert result.stdout == ""


def test_tenant_without_an_id(operate: Operate, registry: Registry) -> None:
    tenant_id = operate("tenant", "create").stdout.strip()
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").object == {"enabled": True}
    made = json.loads(operate("tenant", "create", "--json").stdout)
    assert registry.request("GET", f"/v1/tenants/{made['id']}").etag == made["version"]


def test_tenant_from_a_file_and_from_standard_input(operate: Operate, registry: Registry, tmp_path: Path) -> None:
    """What `get` prints can be given back, changed or not."""
    tenant_id, other_id = new_id(), new_id()
    authority, _ = Authority.create(f"CN={new_id()}").write(tmp_path, "ca")
    operate("tenant", "create", tenant_id, "--alias", new_id("a"), "--trusted-ca", str(authority))
    before = registry.request("GET", f"/v1/tenants/{tenant_id}")
    file = tmp_path / "tenant.json"
    file.write_text(operate("tenant", "get", tenant_id).stdout)
    operate("tenant", "set", tenant_id, "--file", str(file))
    after = registry.request("GET", f"/v1/tenants/{tenant_id}")
    assert after.object == before.object
    assert after.etag != before.etag
    result = operate("tenant", "set", other_id, "--file", str(file), expect_status=WRONG_DATA)
    assert f"is of '{tenant_id}'" in result.stderr
    operate("tenant", "set", tenant_id, "--file", "-", stdin='{"ext": {"x": 1}}')
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").object == {"enabled": True, "ext": {"x": 1}}
    # A copy has an id of its own.
    text = operate("tenant", "get", tenant_id, "--json").stdout
    operate("tenant", "create", other_id, "--file", "-", "--set", "ext.y=2", stdin=text)
    assert registry.request("GET", f"/v1/tenants/{other_id}").object == {"enabled": True, "ext": {"x": 1, "y": 2}}


def test_change_needs_a_file_or_options_and_not_both(operate: Operate, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text("{}")
    for arguments in ((), ("--file", str(file), "--disabled")):
        assert "either with --file" in operate("tenant", "set", "t", *arguments, expect_status=USAGE).stderr


def test_changes_at_the_same_time_are_all_kept(registry: Registry, at: dict[str, str]) -> None:
    """Management 3.9: each is written only if nobody else has written since it was read."""
    tenant_id = registry.create_tenant()
    with ThreadPoolExecutor(5) as pool:
        set_tenant = ("tenant", "set", tenant_id, "--set")
        list(pool.map(lambda n: kamado(*set_tenant, f"ext.n{n}={n}", environment=at), range(5)))
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").object["ext"] == {f"n{n}": n for n in range(5)}


@pytest.mark.row("management-api 13.2", 25, 26, 29)
def test_only_if_the_version_is_the_expected_one(operate: Operate, registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    version = json.loads(operate("tenant", "get", tenant_id, "--json").stdout)["version"]
    for arguments in (("set", tenant_id, "--disabled"), ("delete", tenant_id, "--yes")):
        result = operate("tenant", *arguments, "--if-match", "other", expect_status=REFUSED)
        assert "If-Match" in result.stderr
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").etag == version
    operate("tenant", "set", tenant_id, "--disabled", "--if-match", version)
    device_id = registry.create_device(tenant_id)
    operate("device", "set", tenant_id, device_id, "--disabled", "--if-match", "other", expect_status=REFUSED)
    operate("device", "delete", tenant_id, device_id, "--if-match", "other", expect_status=REFUSED)
    operate("credentials", "delete", tenant_id, device_id, "--if-match", "other", expect_status=REFUSED)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("tenant", "create", "a b"), WRONG_REQUEST, "tenant-id"),
        (("tenant", "create", "x", "--set", "colour=red"), WRONG_REQUEST, "colour: unknown member"),
        (("tenant", "create", "x", "--set", "colour"), USAGE, "MEMBER=VALUE"),
        (("tenant", "create", "x", "--set", "ext={"), USAGE, "ext"),
        (("tenant", "create", ""), USAGE, "the id is empty"),
        (("device", "get", "", "d"), USAGE, "the id is empty"),
        (("device", "delete", "t", ""), USAGE, "the id is empty"),
        (("device", "delete", "t"), USAGE, "--all"),
        (("device", "delete", "t", "d", "--all"), USAGE, "--all"),
        (("device", "delete", "t", "--all", "--if-match", "x"), USAGE, "--if-match"),
        (("device", "create", "no-such-tenant", "d"), REFUSED, "no-such-tenant"),
        (("tenant", "get", "x", "--url", "localhost"), USAGE, "http://HOST:PORT"),
        (("tenant", "get", "x", "--url", "http://a b"), UNAVAILABLE, "No answer from the registry at http://a b"),
        (("tenant", "get", "\udcff"), USAGE, "not UTF-8"),
        (("tenant", "create", "x", "--alias", "\udcff"), USAGE, "not UTF-8"),
        (("tenant", "create", "x", "--set", "alias=\udcff"), USAGE, "not UTF-8"),
        (("tenant", "set", "x", "--enabled", "--if-match", "\udcff"), REFUSED, "there is no tenant"),
        (("tenant", "delete", "x", "--yes", "--if-match", "\udcff"), USAGE, "not UTF-8"),
        (("tenant", "delete", "x", "--yes", "--if-match", "ü"), REFUSED, "there is no tenant"),
        (("tenant", "get", "x", "--profile", "none"), CONFIGURATION, "has no profile none"),
        (("tenant", "get", "x", "--password-file", "p"), USAGE, "--username"),
        (("tenant", "create", "x", "--trusted-ca", "/no/file"), WRONG_DATA, "cannot be read"),
        (("tenant", "create", "x", "--file", "/no/file"), WRONG_DATA, "cannot be read"),
        (("tenant", "create", "x", "--file", "-"), WRONG_DATA, "not valid JSON"),
        (("tenant", "list", "--json", "-q"), USAGE, "either --json or --quiet"),
        (("tenant", "list", "--column", "a..b"), USAGE, "a..b"),
        (("tenant", "search", "--filter", "x"), USAGE, "FIELD=VALUE"),
        (("tenant", "search", "--page-size", "201"), USAGE, "--page-size"),
        (("credentials", "set", "t", "d"), USAGE, "--password"),
        (("credentials", "add", "t", "d"), USAGE, "--password"),
        (("credentials", "set", "t", "d", "--password", "a", "--psk", "b"), USAGE, "only one"),
        (("credentials", "set", "t", "d", "--password", "a"), USAGE, "use --secret-file"),
        (("credentials", "set", "t", "d", "--psk", "a"), USAGE, "use --key-file"),
        (("credentials", "set", "t", "d", "--password", "a", "--secret-file", "-"), WRONG_DATA, "is empty"),
        (("credentials", "set", "t", "d", "--psk", "a", "--key-file", "-"), WRONG_DATA, "is empty"),
        (("credentials", "set", "t", "d", "--psk", "a", "--secret-file", "-"), USAGE, "goes with --password"),
        (("credentials", "set", "t", "d", "--password", "a", "--key-file", "-"), USAGE, "goes with --psk"),
        (("credentials", "set", "t", "d", "--cert", "x", "--not-after", "y"), USAGE, "go with"),
        (("credentials", "set", "t", "d", "--cert", "/no/file"), WRONG_DATA, "cannot be read"),
        (("credentials", "get", "no-such-tenant", "d"), REFUSED, "no-such-tenant"),
    ],
)
def test_what_is_wrong_is_told_with_its_exit_status(
    operate: Operate, arguments: tuple[str, ...], status: int, words: str
) -> None:
    result = operate(*arguments, expect_status=status)
    assert words in " ".join(result.stderr.replace("│", "").split())
    assert result.stdout == ""


def test_details_of_an_error_are_shown(operate: Operate, registry: Registry, tmp_path: Path) -> None:
    """Management 4.7: a clash of trust anchors names the CA."""
    name = f"CN={new_id()}"
    authority = Authority.create(name)
    registry.create_tenant(document={"trusted-ca": [authority.trust_anchor()]})
    file, _ = authority.write(tmp_path, "ca")
    result = operate("tenant", "create", new_id(), "--trusted-ca", str(file), expect_status=REFUSED)
    assert f"(subject-dn: {name})" in result.stderr


def test_limit_that_is_reached(operate: Operate) -> None:
    """Management 5.7: 403."""
    tenant_id = new_id()
    operate("tenant", "create", tenant_id, "--set", "registration-limits.max-devices=0")
    operate("device", "create", tenant_id, expect_status=NOT_ALLOWED)


# Devices


def test_life_of_a_device(operate: Operate, registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    arguments = ("--via", "gw-1", "--via", "gw-2", "--via-group", "g", "--set", 'ext.serial="0815"')
    assert operate("device", "create", tenant_id, "d", *arguments).stdout == "d\n"
    answer = registry.request("GET", f"/v1/devices/{tenant_id}/d")
    assert answer.object["via"] == ["gw-1", "gw-2"]
    assert answer.object["viaGroups"] == ["g"]
    assert answer.object["ext"] == {"serial": "0815"}
    assert json.loads(operate("device", "get", tenant_id, "d").stdout) == {
        "id": "d",
        "version": answer.etag,
        **answer.object,
    }
    operate("device", "set", tenant_id, "d", "--disabled", "--via", "gw-3")
    changed = registry.request("GET", f"/v1/devices/{tenant_id}/d").object
    assert (changed["enabled"], changed["via"], changed["viaGroups"]) == (False, ["gw-3"], ["g"])
    operate("device", "set", tenant_id, "d", "--file", "-", stdin='{"memberOf": ["g"]}')
    assert "via" not in registry.request("GET", f"/v1/devices/{tenant_id}/d").object
    operate("device", "delete", tenant_id, "d")
    operate("device", "get", tenant_id, "d", expect_status=REFUSED)
    operate("device", "delete", tenant_id, "d", expect_status=REFUSED)
    made = operate("device", "create", tenant_id, "--member-of", "g").stdout.strip()
    assert registry.request("GET", f"/v1/devices/{tenant_id}/{made}").object["memberOf"] == ["g"]


@pytest.mark.parametrize("device_id", ["..", "urn:dev=1", "-x"])
def test_ids_that_paths_and_options_could_misread(operate: Operate, registry: Registry, device_id: str) -> None:
    tenant_id = registry.create_tenant()
    assert operate("device", "create", tenant_id, "--", device_id).stdout == f"{device_id}\n"
    assert json.loads(operate("device", "get", tenant_id, "--", device_id).stdout)["id"] == device_id
    operate("device", "delete", tenant_id, "--", device_id)


# Credentials


def credentials(registry: Registry, tenant_id: str, device_id: str) -> list[dict[str, object]]:
    return registry.request("GET", f"/v1/credentials/{tenant_id}/{device_id}").array


def test_password_is_set_added_and_removed(operate: Operate, registry: Registry, tmp_path: Path) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    registry.set_credentials(
        tenant_id,
        device_id,
        [
            {"type": "psk", "auth-id": "a", "secrets": [{"key": "AAEC"}]},
            {"type": "hashed-password", "auth-id": "a", "comment": "c", "secrets": [{"pwd-plain": "old"}]},
        ],
    )
    (psk, old) = credentials(registry, tenant_id, device_id)
    password = tmp_path / "password"
    password.write_text("new\n")
    given = ("--password", "a", "--secret-file", str(password))

    result = operate("credentials", "add", tenant_id, device_id, *given, "--not-after", "2040-01-01T00:00:00Z")
    assert "has 2 credentials now (before: 2)" in result.stderr
    kept, both = credentials(registry, tenant_id, device_id)
    assert kept == psk
    secrets = both["secrets"]
    assert isinstance(secrets, list)
    assert [secrets[0]] == old["secrets"]
    assert secrets[1]["not-after"] == "2040-01-01T00:00:00Z"
    assert both["comment"] == "c"

    first = str(secrets[0]["id"])
    remove = ("credentials", "remove", tenant_id, device_id, "hashed-password", "a")
    operate(*remove, "--secret", first)
    assert credentials(registry, tenant_id, device_id)[1]["secrets"] == [secrets[1]]
    operate(
        "credentials", "remove", tenant_id, device_id, "hashed-password", "a", "--secret", first, expect_status=REFUSED
    )

    operate("credentials", "set", tenant_id, device_id, *given)
    kept, new = credentials(registry, tenant_id, device_id)
    assert kept == psk
    assert new["comment"] == "c"
    assert isinstance(new["secrets"], list)
    assert len(new["secrets"]) == 1
    assert new["secrets"][0]["id"] != secrets[1]["id"]

    operate(*remove)
    assert credentials(registry, tenant_id, device_id) == [psk]
    operate("credentials", "delete", tenant_id, device_id)
    assert credentials(registry, tenant_id, device_id) == []


@pytest.mark.parametrize(
    ("text", "form"), [("AAEC", "base64"), ("000102", "hex"), ("\x00\x01\x02", "text")], ids=["base64", "hex", "text"]
)
def test_key_is_what_an_adapter_gets(operate: Operate, registry: Registry, text: str, form: str) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    given = ("--psk", "line 7", "--key-file", "-", "--key-format", form)
    operate("credentials", "set", tenant_id, device_id, *given, stdin=text)
    answer = registry.run(
        "ask", "credentials", tenant_id, "psk", "line 7", "--url", registry.addresses["amqp"], "--json"
    )
    assert json.loads(answer.stdout)["payload"]["secrets"][0]["key"] == "AAEC"


def test_key_that_is_none(operate: Operate, registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    given = ("credentials", "set", tenant_id, device_id, "--psk", "a", "--key-file", "-")
    operate(*given, "--key-format", "hex", stdin="xyz", expect_status=WRONG_DATA)
    result = operate(*given, stdin="***", expect_status=WRONG_REQUEST)
    assert "Base64" in result.stderr


def test_certificate_of_a_device(operate: Operate, registry: Registry, tmp_path: Path) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    file, _ = Authority.create("CN=ca").issue("CN=press-7,O=Example").write(tmp_path, "device")
    operate("credentials", "set", tenant_id, device_id, "--cert", str(file))
    (one,) = credentials(registry, tenant_id, device_id)
    assert (one["type"], one["auth-id"]) == ("x509-cert", "CN=press-7,O=Example")
    operate("credentials", "set", tenant_id, device_id, "--cert", str(file))
    assert len(credentials(registry, tenant_id, device_id)) == 1
    result = operate("credentials", "add", tenant_id, device_id, "--cert", str(file), expect_status=REFUSED)
    assert "has x509-cert credentials of CN=press-7,O=Example already" in result.stderr


def test_empty_names_of_gateways(operate: Operate, registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    for option in ("--via", "--via-group", "--member-of"):
        result = operate("device", "set", tenant_id, device_id, option, "", expect_status=2)
        assert f"{option} must not be empty" in result.stderr


def test_all_devices_of_a_tenant_that_is_not_there(operate: Operate) -> None:
    result = operate("device", "delete", new_id(), "--all", "--yes")
    assert "if there were any" in result.stderr


@pytest.mark.parametrize("arguments", [("device", "list", "{}", "-q"), ("device", "get", "{}", "d")])
def test_output_that_cannot_be_written(registry: Registry, arguments: tuple[str, ...]) -> None:
    tenant_id = registry.create_tenant()
    registry.create_device(tenant_id, "d")
    command = [
        sys.executable,
        "-m",
        "kamado",
        *(one.format(tenant_id) for one in arguments),
        "--url",
        registry.http_url,
    ]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert result.returncode == 74
    assert result.stderr == "the output cannot be written: No space left on device\n"


def test_credentials_from_a_file(operate: Operate, registry: Registry, tmp_path: Path) -> None:
    """`set --file` replaces all, `add --file` none; what `get` prints can be given back."""
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    file = tmp_path / "credentials.json"
    one: dict[str, object] = {"type": "psk", "auth-id": "a", "secrets": [{"key": "AAEC"}]}
    file.write_text(json.dumps(one))
    operate("credentials", "set", tenant_id, device_id, "--file", str(file))
    file.write_text(json.dumps([one | {"auth-id": "b"}]))
    operate("credentials", "add", tenant_id, device_id, "--file", str(file))
    before = credentials(registry, tenant_id, device_id)
    assert [entry["auth-id"] for entry in before] == ["a", "b"]
    for as_json in ((), ("--json",)):
        text = operate("credentials", "get", tenant_id, device_id, *as_json).stdout
        assert json.loads(text)["credentials"] == before
        result = operate("credentials", "set", tenant_id, device_id, "--file", "-", "--json", stdin=text)
        version = registry.request("GET", f"/v1/credentials/{tenant_id}/{device_id}").etag
        assert json.loads(result.stdout) == {"id": device_id, "version": version}
        assert credentials(registry, tenant_id, device_id) == before
    for wrong in ("1", "[1]", '{"credentials": 1}'):
        operate("credentials", "set", tenant_id, device_id, "--file", "-", stdin=wrong, expect_status=WRONG_DATA)
    file.write_text(json.dumps([one | {"auth-id": "b"}]))
    operate("credentials", "set", tenant_id, device_id, "--file", str(file))
    assert len(credentials(registry, tenant_id, device_id)) == 1


def test_list_of_credentials_shows_no_secret(operate: Operate, registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    assert operate("credentials", "list", tenant_id, device_id).stdout == ""
    secret = {"key": "AAEC", "not-after": "2040-01-01T00:00:00Z"}
    registry.set_credentials(
        tenant_id,
        device_id,
        [
            {"type": "psk", "auth-id": "a", "secrets": [secret, {"key": "AwQF", "enabled": False}]},
            {"type": "x509-cert", "auth-id": "CN=x", "enabled": False, "secrets": [{}]},
        ],
    )
    titles, *rows = operate("credentials", "list", tenant_id, device_id).stdout.splitlines()
    assert titles.split() == ["type", "auth-id", "enabled", "secret", "not", "before", "not", "after"]
    assert [row.split()[:3] for row in rows] == [["psk", "a", "yes"], ["psk", "a", "no"], ["x509-cert", "CN=x", "no"]]
    assert rows[0].endswith("-           2040-01-01T00:00:00Z")
    assert "AAEC" not in "".join(rows)
    assert operate("credentials", "list", tenant_id, device_id, "-q").stdout == "psk a\nx509-cert CN=x\n"
    assert lines(operate("credentials", "list", tenant_id, device_id, "--json")) == credentials(
        registry, tenant_id, device_id
    )


# Questions on the terminal


def test_tenant_is_deleted_only_after_a_yes(registry: Registry, operate: Operate, at: dict[str, str]) -> None:
    tenant_id = registry.create_tenant()
    registry.create_device(tenant_id)
    assert "--yes" in operate("tenant", "delete", tenant_id, expect_status=USAGE).stderr
    for answer, status, after in (("n", REFUSED, 200), ("", REFUSED, 200), ("y", OK, 404)):
        terminal = Terminal("tenant", "delete", tenant_id, environment=at)
        terminal.answer(f"Delete tenant {tenant_id} with 1 device and their credentials? [y/N]", answer)
        terminal.end(status)
        assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == after


def test_password_of_a_device_is_asked_for_twice_and_not_shown(registry: Registry, at: dict[str, str]) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    arguments = ("credentials", "set", tenant_id, device_id, "--password", "a")
    terminal = Terminal(*arguments, environment=at)
    terminal.answer("Password of a: ", "c4nary")
    terminal.answer("confirmation: ", "c4nary")
    assert "c4nary" not in terminal.end(OK)
    assert len(credentials(registry, tenant_id, device_id)) == 1


# Connections


@pytest.fixture
def locked() -> Iterator[FakeRegistry]:
    with FakeRegistry(login="alice:geheim") as fake:
        yield fake


def test_login_by_options_variables_and_terminal(locked: FakeRegistry, nowhere: dict[str, str], tmp_path: Path) -> None:
    """Management 3.11."""
    get = ("tenant", "get", "T")
    at = nowhere | {"KAMADO_URL": locked.url}
    password = tmp_path / "password"
    password.write_text("geheim\n")
    kamado(*get, "--username", "alice", "--password-file", str(password), environment=at)
    kamado(*get, "--username", "alice", "--password-file", "-", environment=at, stdin="geheim\n")
    kamado(*get, environment=at | {"KAMADO_USERNAME": "alice", "KAMADO_PASSWORD": "geheim"})
    terminal = Terminal(*get, "--username", "alice", environment=at)
    terminal.answer("Password of alice: ", "geheim")
    assert "geheim" not in terminal.end(OK)
    assert "log in with --username" in kamado(*get, environment=at, expect_status=LOGIN_REFUSED).stderr
    wrong = at | {"KAMADO_USERNAME": "alice", "KAMADO_PASSWORD": "wrong"}
    result = kamado(*get, environment=wrong, expect_status=LOGIN_REFUSED)
    assert result.stderr == "The login was refused: no such login\n"
    result = kamado(*get, "--username", "alice", environment=at, expect_status=USAGE)
    assert "KAMADO_PASSWORD" in result.stderr


def test_accounts_of_operators(new_registry: NewRegistry, operate: Operate, tmp_path: Path) -> None:
    """Management 3.11; 6.9 and 6.10: who may not see a key does not lose it by changing something else."""
    registry = new_registry()
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    key = {"type": "psk", "auth-id": "a", "secrets": [{"key": "AAEC"}]}
    registry.set_credentials(tenant_id, device_id, [key])
    (tmp_path / "password").write_text("tea-pot-42\n")
    password_file = ("--password-file", str(tmp_path / "password"))
    registry.run("operator", "add", "alice", *password_file)
    url = ("--url", registry.http_url)
    assert "log in with --username" in operate("tenant", "list", *url, expect_status=LOGIN_REFUSED).stderr
    login = (*url, "--username", "alice", *password_file)
    assert operate("tenant", "list", "-q", *login).stdout == f"{tenant_id}\n"
    operate("tenant", "list", *url, "--username", "bob", *password_file, expect_status=LOGIN_REFUSED)
    shown = json.loads(operate("credentials", "get", tenant_id, device_id, *login).stdout)
    assert "key" not in shown["credentials"][0]["secrets"][0]
    given = ("--password", "a", "--secret-file", "-")
    operate("credentials", "add", tenant_id, device_id, *given, *login, stdin="x\n")
    answer = registry.run("ask", "credentials", tenant_id, "psk", "a", "--url", registry.addresses["amqp"], "--json")
    assert json.loads(answer.stdout)["payload"]["secrets"][0]["key"] == "AAEC"


def test_proxy_that_cannot_be_used(nowhere: dict[str, str]) -> None:
    for proxy in ("socks5://127.0.0.1:1", "nonsense://x"):
        arguments = ("tenant", "list", "--url", "http://registry.invalid")
        environment = nowhere | {"HTTP_PROXY": proxy, "ALL_PROXY": proxy}
        result = kamado(*arguments, environment=environment, expect_status=UNAVAILABLE)
        assert "Traceback" not in result.stderr


def test_login_by_profile(locked: FakeRegistry, tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(f'[plant]\nurl = "{locked.url}"\nusername = "alice"\npassword_file = "secret"\n')
    (tmp_path / "secret").write_text("geheim\n")
    at = {"KAMADO_PROFILES": str(file)}
    get = ("tenant", "get", "T")
    kamado(*get, "--profile", "plant", environment=at)
    kamado(*get, environment=at | {"KAMADO_PROFILE": "plant"})
    file.write_text(f'[default]\nurl = "{locked.url}"\nusername = "alice"\npassword = "geheim"\n')
    file.chmod(0o644)
    assert "chmod 600" in kamado(*get, environment=at, expect_status=CONFIGURATION).stderr
    file.chmod(0o600)
    kamado(*get, environment=at)
    # In the directory of the platform.
    directory = tmp_path / "kamado"
    directory.mkdir()
    file.rename(directory / "profiles.toml")
    kamado(*get, environment={"XDG_CONFIG_HOME": str(tmp_path)})


def test_tls_with_a_ca_of_our_own(registry: Registry, nowhere: dict[str, str], tmp_path: Path) -> None:
    assert registry.tls is not None
    tenant_id = registry.create_tenant()
    get = ("tenant", "get", tenant_id, "--url", registry.https_url)
    kamado(*get, "--ca-file", str(registry.tls.ca_file), environment=nowhere)
    other, _ = Authority.create("CN=Somebody").write(tmp_path, "other")
    for ca_file in (("--ca-file", str(other)), ()):
        result = kamado(*get, *ca_file, environment=nowhere, expect_status=UNAVAILABLE)
        assert "its certificate is not trusted" in result.stderr
        assert "--ca-file" in result.stderr
    for name in ("/no/file", __file__):
        kamado(*get, "--ca-file", name, environment=nowhere, expect_status=CONFIGURATION)


def test_where_nobody_listens(nowhere: dict[str, str]) -> None:
    """What was tried, why it failed, and how to name another registry."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = kamado("tenant", "list", environment=nowhere | {"KAMADO_URL": url}, expect_status=UNAVAILABLE)
    assert result.stdout == ""
    assert f"No answer from the registry at {url} (KAMADO_URL): Connection refused." in result.stderr
    for word in ("--url", "KAMADO_URL", "no-profiles.toml"):
        assert word in result.stderr


def test_what_is_no_registry(registry: Registry, nowhere: dict[str, str]) -> None:
    for name in ("health", "amqp"):
        url = registry.addresses[name].replace("amqp:", "http:")
        result = kamado("tenant", "list", "--url", url, environment=nowhere, expect_status=UNAVAILABLE)
        assert "Traceback" not in result.stderr


def test_timeout(nowhere: dict[str, str]) -> None:
    with FakeRegistry(delay=20.0) as fake:
        arguments = ("tenant", "get", "T", "--url", fake.url, "--timeout", "1")
        assert "no answer within 1 s" in kamado(*arguments, environment=nowhere, expect_status=UNAVAILABLE).stderr


def test_ctrl_c(nowhere: dict[str, str]) -> None:
    with FakeRegistry(delay=30.0) as fake:
        environment = {**os.environ, **nowhere, "KAMADO_URL": fake.url}
        process = subprocess.Popen(
            [sys.executable, "-m", "kamado", "tenant", "get", "T"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        poll(lambda: fake.requests, what="the request")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED
    assert output == ""
    assert "Traceback" not in errors


# Lists


MANY = [f"d{number:04}" for number in range(3000)]


@pytest.fixture(scope="module")
def plant(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tenant with some thousand devices; `d0000` is a gateway."""
    tenant_id = registry.create_tenant()
    devices: list[dict[str, object]] = [
        {"device-id": one, "data": {"enabled": index % 2 == 0, "ext": {"n": index, "brand": f"b{index % 7}"}}}
        for index, one in enumerate(MANY)
    ]
    devices[1] = {"device-id": MANY[1], "data": {"via": [MANY[0]]}}
    file = tmp_path_factory.mktemp("plant") / "devices.json"
    file.write_text(json.dumps([{"tenant": tenant_id, "devices": devices}]))
    registry.run("load", str(file))
    return tenant_id


def test_list_of_thousands(operate: Operate, plant: str) -> None:
    assert operate("device", "list", plant, "-q").stdout.splitlines() == MANY
    found = lines(operate("device", "list", plant, "--json"))
    assert [one["id"] for one in found] == MANY
    assert found[5]["ext"] == {"n": 5, "brand": "b5"}
    titles, *rows = operate("device", "list", plant).stdout.splitlines()
    assert titles.split("  ")[0].strip() == "id"
    assert len(rows) == len(MANY)
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[1].split()[:3] == ["d0001", "yes", "d0000"]
    assert "\x1b" not in titles
    titles, first, *_ = operate("device", "list", plant, "--column", "id", "--column", "/ext/n").stdout.splitlines()
    assert (titles, first) == ("id     /ext/n", "d0000  0")


def test_search(operate: Operate, plant: str) -> None:
    """Management 7.2 to 7.4: filters, order, gateways."""

    def found(*options: str) -> list[str]:
        return operate("device", "search", plant, "-q", *options).stdout.splitlines()

    assert found("--filter", "ext.n=1234") == ["d1234"]
    assert found("--filter", "ext.n=1234.0") == ["d1234"]
    assert found("--filter", "id=d123?") == MANY[1230:1240]
    assert found("--filter", "id=d12*", "--filter", "enabled=false") == MANY[1201:1300:2]
    assert found("--filter", "/ext/brand=b3", "--sort", "ext.n:desc") == MANY[3::7][::-1]
    assert found("--sort", "ext.brand:desc", "--sort", "id", "--limit", "3") == MANY[6:21:7]
    assert found("--gateways") == ["d0000"]
    assert found("--no-gateways") == MANY[1:]
    assert found("--offset", "2990") == MANY[2990:]
    assert found("--limit", "450", "--page-size", "100") == MANY[:450]
    assert found("--sort", "ext.n:desc", "--offset", "10", "--limit", "5", "--page-size", "2") == MANY[2985:2990][::-1]
    result = operate("device", "search", plant, "--filter", "id=d1*", "--limit", "2")
    assert result.stderr == "2 of 1000 shown.\n"
    assert len(result.stdout.splitlines()) == 3
    assert operate("device", "search", plant, "--count").stdout == "3000\n"
    assert operate("device", "search", plant, "--filter", "id=x", "--count", expect_status=REFUSED).stdout == "0\n"
    result = operate("device", "search", plant, "--filter", 'ext.n="5"', expect_status=REFUSED)
    assert (result.stdout, result.stderr) == ("", "No match.\n")
    result = operate("device", "search", plant, "--filter", "ext.brand=5", expect_status=REFUSED)
    assert result.stderr == "No match. To look for text instead of 5: --filter '/ext/brand=\"5\"'.\n"
    result = operate("device", "search", new_id(), expect_status=REFUSED)
    assert "there is no tenant" in result.stderr


def test_tenants_are_listed_and_searched(operate: Operate, registry: Registry) -> None:
    mark = new_id()
    ids = sorted(registry.create_tenant(document={"ext": {"mark": mark}}) for _ in range(3))
    document = {
        "alias": new_id("a"),
        "adapters": [{"type": "hono-mqtt", "enabled": True}, {"type": "hono-http", "enabled": False}],
        "trusted-ca": [Authority.create(f"CN={mark}").trust_anchor()],
    }
    registry.request("PUT", f"/v1/tenants/{ids[0]}", document | {"ext": {"mark": mark}})
    assert operate("tenant", "search", "--filter", f"ext.mark={mark}", "-q").stdout.splitlines() == ids
    listed = operate("tenant", "list", "-q").stdout.splitlines()
    assert [one for one in listed if one in ids] == ids
    _, row, other, _ = operate("tenant", "search", "--filter", f"ext.mark={mark}").stdout.splitlines()
    assert row.split() == [ids[0], "yes", document["alias"], "hono-mqtt", f"CN={mark}"]
    assert other.split() == [ids[1], "yes", "-", "all", "-"]


def test_registry_that_counts_pages_and_finds_nothing_with_200(new_registry: NewRegistry, operate: Operate) -> None:
    """Management 7.1 and 7.5, the other way round."""
    registry = new_registry({"search.page_offset_unit": "pages", "search.empty_result": "200"})
    at = ("--url", registry.http_url)
    result = operate("tenant", "list", *at)
    assert (result.stdout, result.stderr) == ("", "")
    assert operate("tenant", "search", *at, expect_status=REFUSED).stderr == "No match.\n"
    tenant_id = registry.create_tenant()
    assert operate("device", "list", tenant_id, *at).stdout == ""
    ids = [registry.create_device(tenant_id, f"d{number:02}") for number in range(30)]
    options = ("--sort", "id:desc", "--page-size", "7", "-q")
    assert operate("device", "search", tenant_id, *options, *at).stdout.splitlines() == ids[::-1]
    result = operate("device", "search", tenant_id, *options, "--offset", "10", *at)
    assert result.stdout.splitlines() == ids[::-1][10:]


@pytest.mark.row("management-api 13.5", 134)
def test_empty_registry(new_registry: NewRegistry, operate: Operate) -> None:
    """A 404 that is no error of a list."""
    at = ("--url", new_registry().http_url)
    result = operate("tenant", "list", *at)
    assert (result.stdout, result.stderr) == ("", "")
    assert operate("tenant", "search", *at, expect_status=REFUSED).stderr == "No match.\n"


def test_all_devices_are_deleted_only_after_a_yes(registry: Registry, operate: Operate, at: dict[str, str]) -> None:
    """Management 5.6."""
    tenant_id = registry.create_tenant()
    for _ in range(3):
        registry.create_device(tenant_id)
    assert "--yes" in operate("device", "delete", tenant_id, "--all", expect_status=USAGE).stderr
    for answer, status, left in (("n", REFUSED, "3\n"), ("y", OK, "0\n")):
        terminal = Terminal("device", "delete", tenant_id, "--all", environment=at)
        terminal.answer(f"Delete 3 devices of tenant {tenant_id} and their credentials? [y/N]", answer)
        terminal.end(status)
        counted = operate("device", "search", tenant_id, "--count", expect_status=OK if status else REFUSED)
        assert counted.stdout == left
    assert "has no devices" in operate("device", "delete", tenant_id, "--all").stderr
    registry.create_device(tenant_id)
    assert "1 device deleted" in operate("device", "delete", tenant_id, "--all", "--yes").stderr
    # Management 8.2: a tenant that is not there is no error.
    operate("device", "delete", new_id(), "--all", "--yes")


def test_first_rows_come_at_once_and_a_reader_may_go(nowhere: dict[str, str]) -> None:
    """`kamado device list T | head -1` ends quietly, and asks for no more than it prints."""
    with FakeRegistry(device_ids=[f"d{number:05}" for number in range(20_000)], delay=0.2) as fake:
        process = subprocess.Popen(
            [sys.executable, "-m", "kamado", "device", "list", "T"],
            env={**os.environ, **nowhere, "KAMADO_URL": fake.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("id")
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        assert process.wait(120) == READER_GONE
        assert errors == ""
        # There are 100 pages, of which the pipe holds a few if this does not get its turn to read.
        assert len(fake.requests) < 50


def test_list_of_nothing(operate: Operate) -> None:
    """A search without match is 404 (management 7.5); a list of nothing is none of the registry's errors."""
    with FakeRegistry() as fake:
        result = operate("device", "list", "T", "--url", fake.url)
        assert (result.stdout, result.stderr) == ("", "")
        result = operate("device", "list", "U", "--url", fake.url, expect_status=REFUSED)
        assert result.stderr == "there is no such thing\n"
        result = operate("device", "search", "T", "--url", fake.url, expect_status=REFUSED)
        assert (result.stdout, result.stderr) == ("", "No match.\n")


def test_what_would_steer_a_terminal_is_written_as_escapes(operate: Operate) -> None:
    page = json.dumps({"total": 1, "result": [{"id": "\x1b[31m", "via": ["a\nb\x9b"]}]}).encode()
    for form in ((), ("-q",), ("--json",)):
        with FakeRegistry(answers=[(200, {}, page)]) as fake:
            result = operate("device", "list", "T", "--url", fake.url, *form)
            assert "\x1b" not in result.stdout
            assert "\x9b" not in result.stdout
    with FakeRegistry(answers=[(400, {}, b'{"error": "\\u001b[31m"}')]) as fake:
        result = operate("tenant", "get", "T", "--url", fake.url, expect_status=WRONG_REQUEST)
        assert result.stderr == "\\x1b[31m\n"


# Completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [("kamado ten", "tenant"), ("kamado device li", "list"), ("kamado device search T --fil", "--filter")],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, words: str, expected: str, nowhere: dict[str, str]) -> None:
    assert expected in complete(shell, words, nowhere)


def complete(shell: str, words: str, environment: dict[str, str]) -> str:
    variables = {
        "_KAMADO_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = subprocess.run(
        [KAMADO],
        env={**os.environ, **environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in result.stderr
    return result.stdout


def test_completion_of_profiles(tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text('[plant-1]\nurl = "http://a"\n[office]\nurl = "http://b"\n')
    at = {"KAMADO_PROFILES": str(file)}
    assert complete("bash", "kamado tenant list --profile pl", at).split() == ["plant-1"]
    file.write_text("[")
    assert complete("bash", "kamado tenant list --profile pl", at).strip() == ""


def test_completion_can_be_installed(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell in ("bash", "zsh", "fish"):
        command = [str(KAMADO), "--show-completion", shell]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert "_KAMADO_COMPLETE" in shown.stdout
