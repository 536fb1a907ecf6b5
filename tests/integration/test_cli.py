"""The command `kamado` in processes of its own, beside a running registry."""

import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.integration.certificates import Authority
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, kamado, new_id

from kamado.amqp.client import (
    AskError,
    AuthenticationFailed,
    LinkRefused,
    RequestRejected,
    RequestReleased,
    TimedOut,
)
from kamado.commands.ask import _failure_status

OK, REFUSED, USAGE, NOT_ALLOWED, WRONG_REQUEST = 0, 1, 2, 3, 4
WRONG_DATA, UNAVAILABLE, LOGIN_REFUSED, CONFIGURATION = 65, 69, 77, 78


def ask(registry: Registry, *arguments: str, expect_status: int | None = OK, stdin: str = "") -> str:
    """Run a subcommand of `ask` against the plain listener."""
    url = registry.addresses["amqp"]
    return registry.run("ask", *arguments, "--url", url, expect_status=expect_status, stdin=stdin).stdout


# ask


def test_ask_tenant(registry: Registry) -> None:
    tenant_id = registry.create_tenant(document={"ext": {"customer": "Überall GmbH"}})
    output = ask(registry, "tenant", tenant_id)
    assert output.startswith("200 OK\ncache_control: max-age = 180\n")
    assert f"tenant_id: {tenant_id}\n" in output
    assert "Überall GmbH" in output
    answer = json.loads(ask(registry, "tenant", tenant_id, "--json"))
    assert answer["status"] == 200
    assert answer["payload"]["tenant-id"] == tenant_id
    assert answer["application-properties"]["tenant_id"] == tenant_id


def test_ask_tenant_by_subject_dn(registry: Registry) -> None:
    name = f"CN={new_id()},O=Example"
    tenant_id = registry.create_tenant(document={"trusted-ca": [Authority.create(name).trust_anchor()]})
    answer = json.loads(ask(registry, "tenant", "--subject-dn", name, "--json"))
    assert answer["payload"]["tenant-id"] == tenant_id


def test_ask_tenant_that_is_not_there(registry: Registry) -> None:
    output = ask(registry, "tenant", new_id(), expect_status=REFUSED)
    assert output.startswith("404 Not Found")


@pytest.mark.parametrize("arguments", [[], ["a", "--subject-dn", "CN=a"]])
def test_ask_tenant_needs_one_criterion(registry: Registry, arguments: list[str]) -> None:
    result = registry.run("ask", "tenant", *arguments, expect_status=USAGE)
    assert "either a TENANT or a --subject-dn" in result.stderr


def test_ask_assert(registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    registry.create_device(tenant_id, "gw")
    registry.create_device(tenant_id, "d", {"via": ["gw"], "defaults": {"ttl": 5}})
    answer = json.loads(ask(registry, "assert", tenant_id, "d", "--via", "gw", "--json"))
    assert answer["payload"] == {"device-id": "d", "via": ["gw"], "defaults": {"ttl": 5}}
    ask(registry, "assert", tenant_id, "nobody", expect_status=REFUSED)
    # amqp-apis 10.2, steps 4 and 5.
    ask(registry, "assert", tenant_id, "gw", "--via", "d", expect_status=NOT_ALLOWED)


def test_ask_credentials(registry: Registry) -> None:
    tenant_id = registry.create_tenant()
    device_id = registry.create_device(tenant_id)
    registry.set_credentials(tenant_id, device_id, [{"type": "psk", "auth-id": "a", "secrets": [{"key": "AAEC"}]}])
    answer = json.loads(ask(registry, "credentials", tenant_id, "psk", "a", "--json"))
    assert answer["payload"]["device-id"] == device_id
    assert answer["payload"]["secrets"][0]["key"] == "AAEC"
    assert answer["cache-control"] == "no-cache"
    ask(registry, "credentials", tenant_id, "psk", "b", expect_status=REFUSED)
    ask(registry, "credentials", tenant_id, "psk", expect_status=USAGE)


def test_ask_connection(registry: Registry) -> None:
    """The five operations of amqp-apis 12, each with the exit status of its outcome."""
    tenant_id = new_id()
    ask(registry, "connection", "get-gateway", tenant_id, "d", expect_status=REFUSED)
    ask(registry, "connection", "get-instances", tenant_id, "d", expect_status=REFUSED)
    assert ask(registry, "connection", "set-gateway", tenant_id, "d", "gw").startswith("204 No Content\n")
    answer = json.loads(ask(registry, "connection", "get-gateway", tenant_id, "d", "--json"))
    assert answer["payload"]["gateway-id"] == "gw"
    ask(registry, "connection", "set-instance", tenant_id, "gw", "a1")
    ask(registry, "connection", "set-instance", tenant_id, "gw2", "a2", "--lifespan", "3600")
    ask(registry, "connection", "set-instance", tenant_id, "gw3", "a3", "--lifespan", "0")
    arguments = ("connection", "get-instances", tenant_id)
    found = json.loads(ask(registry, *arguments, "other", "gw", "gw2", "gw3", "--json"))["payload"]
    assert [entry["device-id"] for entry in found["adapter-instances"]] == ["gw", "gw2"]
    ask(registry, "connection", "remove-instance", tenant_id, "gw", "a2", expect_status=WRONG_REQUEST)
    ask(registry, "connection", "remove-instance", tenant_id, "gw", "a1")
    ask(registry, "connection", "remove-instance", tenant_id, "gw", "a1", expect_status=REFUSED)
    ask(registry, "connection", "set-instance", tenant_id, "d", "a", "--lifespan", "4294967296", expect_status=USAGE)


@pytest.mark.parametrize("form", ["pem", "der"])
def test_ask_credentials_provisions_by_certificate(registry: Registry, tmp_path: Path, form: str) -> None:
    authority = Authority.create(f"CN={new_id()}")
    anchor = authority.trust_anchor(auto_provisioning_enabled=True)
    tenant_id = registry.create_tenant(document={"trusted-ca": [anchor]})
    device = authority.issue("CN=press-7,O=Example")
    file = tmp_path / "device"
    file.write_bytes(device.pem if form == "pem" else device.der)
    arguments = ("credentials", tenant_id, "x509-cert", "--certificate", str(file), "--json")
    answer = json.loads(ask(registry, *arguments))
    assert answer["status"] == 201
    assert answer["payload"]["auth-id"] == "CN=press-7,O=Example"
    assert json.loads(ask(registry, *arguments))["status"] == 200


def test_ask_with_what_is_no_certificate(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing")
    for name, words in (("x", "is no X.509 certificate"), ("y", "cannot be read")):
        arguments = ("ask", "credentials", "t", "x509-cert", "--certificate", str(tmp_path / name))
        assert words in registry.run(*arguments, expect_status=WRONG_DATA).stderr


def test_ask_over_tls_with_password_and_with_certificate(registry: Registry, tmp_path: Path) -> None:
    assert registry.tls is not None
    tenant_id = registry.create_tenant()
    tls = ("--url", registry.addresses["amqps"], "--ca-file", str(registry.tls.ca_file))
    registry.run("ask", "tenant", tenant_id, *tls)
    name = new_id("adapter")
    cert, key = registry.tls.client(tmp_path, "client", f"CN={name},O=Example")
    external = (*tls, "--cert-file", str(cert), "--key-file", str(key))
    registry.run("ask", "tenant", tenant_id, *external, expect_status=LOGIN_REFUSED)
    registry.run("identity", "add", name, "--mechanism", "EXTERNAL")
    registry.run("ask", "tenant", tenant_id, *external)
    other = Authority.create("CN=Somebody")
    ca_file, _ = other.write(tmp_path, "other")
    result = registry.run(
        "ask",
        "tenant",
        tenant_id,
        "--url",
        registry.addresses["amqps"],
        "--ca-file",
        str(ca_file),
        expect_status=UNAVAILABLE,
    )
    assert "certificate" in result.stderr.lower()


def test_ask_by_other_logins(registry: Registry, tmp_path: Path) -> None:
    tenant_id = registry.create_tenant()
    url = registry.addresses["amqp"]
    file = tmp_path / "credentials"
    file.write_text(f"username={registry.username}\npassword={registry.password}\n")
    registry.run("ask", "tenant", tenant_id, "--url", url, "--credentials-file", str(file))
    file.write_text(f"username={registry.username}\npassword=wrong\n")
    result = registry.run(
        "ask", "tenant", tenant_id, "--url", url, "--credentials-file", str(file), expect_status=LOGIN_REFUSED
    )
    assert "wrong" not in result.stderr.replace("wrong user", "")
    file.write_text("nothing\n")
    registry.run("ask", "tenant", tenant_id, "--url", url, "--credentials-file", str(file), expect_status=CONFIGURATION)
    variables = {
        "KAMADO_ASK_URL": url,
        "KAMADO_ASK_USERNAME": registry.username,
        "KAMADO_ASK_PASSWORD": registry.password,
        "KAMADO_CONFIG": str(registry.config_file),
    }
    kamado("ask", "tenant", tenant_id, environment=variables)


def test_ask_where_nobody_listens(registry: Registry) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"amqp://127.0.0.1:{free.getsockname()[1]}"
        result = registry.run("ask", "tenant", "t", "--url", url, expect_status=UNAVAILABLE)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_ask_what_does_not_speak_amqp(registry: Registry) -> None:
    """Exit status 69, not 77: nobody has looked at the login."""
    for name in ("http", "health"):
        url = registry.addresses[name].replace("http:", "amqp:")
        result = registry.run("ask", "tenant", "t", "--url", url, expect_status=UNAVAILABLE)
        assert "Traceback" not in result.stderr


def test_refused_link_counts_as_what_an_adapter_makes_of_it(registry: Registry) -> None:
    """Amqp-apis 4.3: everything but the rights ends as 404."""
    result = registry.run("ask", "assert", "", "d", "--url", registry.addresses["amqp"], expect_status=REFUSED)
    assert "amqp:not-found" in result.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LinkRefused("x", condition="amqp:unauthorized-access"), NOT_ALLOWED),
        (LinkRefused("x", condition="amqp:resource-limit-exceeded"), NOT_ALLOWED),
        (LinkRefused("x", condition="amqp:internal-error"), UNAVAILABLE),
        (LinkRefused("x", condition="hono:bad-request"), WRONG_REQUEST),
        (LinkRefused("x", condition="amqp:invalid-field"), REFUSED),
        (LinkRefused("x"), REFUSED),
        (RequestRejected("x", condition="hono:bad-request"), WRONG_REQUEST),
        (RequestRejected("x", condition="amqp:decode-error"), WRONG_REQUEST),
        (RequestReleased("x"), UNAVAILABLE),
        (AuthenticationFailed("x"), LOGIN_REFUSED),
        (TimedOut("x"), UNAVAILABLE),
    ],
)
def test_status_of_a_request_without_a_reply(error: AskError, status: int) -> None:
    """What adapters make of it, amqp-apis 4.3 and 5.2."""
    assert _failure_status(error) == status


def test_password_is_not_asked_for_without_a_terminal(registry: Registry) -> None:
    url = registry.addresses["amqp"]
    result = registry.run("ask", "tenant", "t", "--url", url, "--username", "foo", expect_status=USAGE)
    assert "KAMADO_ASK_PASSWORD" in result.stderr
    assert ".py" not in result.stderr
    for command in ("add", "passwd"):
        result = registry.run("identity", command, "foo", "--prompt", expect_status=USAGE)
        assert "--password-file" in result.stderr
        assert ".py" not in result.stderr


def test_client_certificate_and_key_come_as_a_pair(registry: Registry, tmp_path: Path) -> None:
    assert registry.tls is not None
    name = new_id("adapter")
    cert, key = registry.tls.client(tmp_path, "client", f"CN={name},O=Example")
    tls = ("--url", registry.addresses["amqps"], "--ca-file", str(registry.tls.ca_file))
    for option, file, missing in (("--cert-file", cert, "--key-file"), ("--key-file", key, "--cert-file")):
        result = registry.run("ask", "tenant", "t", *tls, option, str(file), expect_status=USAGE)
        assert f"{missing} is missing" in result.stderr
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    registry.run("ask", "tenant", "t", *tls, "--cert-file", str(both), expect_status=LOGIN_REFUSED)


def test_lost_login_of_the_adapters_can_be_made_anew(new_registry: NewRegistry) -> None:
    """What `ask` says is what helps."""
    registry = new_registry()
    tenant_id = registry.create_tenant()
    arguments = ("ask", "tenant", tenant_id, "--url", registry.addresses["amqp"])
    registry.credentials_file.unlink()
    result = registry.run(*arguments, expect_status=CONFIGURATION)
    (hint,) = re.findall(r"make a new password: (\(umask 077; .*\))\.", result.stderr)
    assert f"identity passwd adapter --config {registry.config_file} --set " in hint
    password = urlsplit(registry.settings["storage.url"]).password
    if password is not None:
        assert password not in result.stderr
        hint = hint.replace("***", password)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["sh", "-c", hint], env=registry.environment | {"PATH": path}, timeout=120, check=True)
    assert stat.S_IMODE(registry.credentials_file.stat().st_mode) == 0o600
    registry.run(*arguments)
    result = registry.run(*arguments, "--credentials-file", "/no/file", expect_status=CONFIGURATION)
    assert "make a new password" not in result.stderr


@pytest.mark.parametrize("url", ["http://localhost:1", "localhost", "amqp://localhost:x"])
def test_ask_with_a_wrong_url(registry: Registry, url: str) -> None:
    assert "amqp://HOST:PORT" in registry.run("ask", "tenant", "t", "--url", url, expect_status=USAGE).stderr


# explain


def test_explain_says_why_and_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    authority = Authority.create(f"CN={new_id()}")
    tenant_id = registry.create_tenant(
        document={"trusted-ca": [authority.trust_anchor(auto_provisioning_enabled=True)], "enabled": True}
    )
    device_id = registry.create_device(tenant_id, document={"enabled": False})
    registry.set_credentials(
        tenant_id,
        device_id,
        [
            {
                "type": "hashed-password",
                "auth-id": "old",
                "secrets": [{"pwd-plain": "x", "not-after": "2020-01-01T00:00:00Z"}],
            },
            {"type": "psk", "auth-id": "off", "enabled": False, "secrets": [{"key": "AAEC"}]},
        ],
    )

    def reason(*arguments: str, status: int = REFUSED) -> str:
        answer = json.loads(registry.run("explain", *arguments, "--json", expect_status=status).stdout)
        value = answer["reason"]
        assert answer["text"]
        return str(value)

    assert reason("tenant", new_id()) == "tenant-unknown"
    assert reason("assert", tenant_id, device_id) == "device-disabled"
    assert reason("assert", tenant_id, "nobody") == "device-unknown"
    assert reason("credentials", tenant_id, "hashed-password", "old") == "secrets-expired"
    assert reason("credentials", tenant_id, "psk", "off") == "credential-disabled"
    assert reason("credentials", tenant_id, "psk", "none") == "credential-unknown"

    for name, issued, expected in (
        ("stranger", Authority.create("CN=Other").issue("CN=s"), "issuer-unknown"),
        (
            "forged",
            Authority.create("CN=Other").issue("CN=s", issuer_name=authority.certificate.subject),
            "signature-invalid",
        ),
    ):
        certificate, _ = issued.write(tmp_path, name)
        assert reason("credentials", tenant_id, "x509-cert", "--certificate", str(certificate)) == expected
    good, _ = authority.issue("CN=good,O=Example").write(tmp_path, "good")
    spelled = ("credentials", tenant_id, "x509-cert", "CN=good, O=Example", "--certificate", str(good))
    assert reason(*spelled, status=WRONG_REQUEST) == "subject-spelled-otherwise"

    result = registry.run("explain", "credentials", tenant_id, "x509-cert", "--certificate", str(good))
    assert result.stdout.startswith("201 Created")
    assert "Nothing was stored" in result.stdout
    ask(registry, "credentials", tenant_id, "x509-cert", "CN=good,O=Example", expect_status=REFUSED)


def test_explain_of_an_edge_device(registry: Registry) -> None:
    """What its gateway would provision is not stored; what it may not, is told (provisioning 4.1)."""
    tenant_id = registry.create_tenant()
    registry.create_device(tenant_id, "gw", {"authorities": ["auto-provisioning-enabled"]})
    registry.create_device(tenant_id, "off", {"authorities": ["auto-provisioning-enabled"], "enabled": False})
    registry.create_device(tenant_id, "plain")

    def explain(gateway_id: str, device_id: str = "edge-1", *, expect_status: int = 0) -> str:
        arguments = ("explain", "assert", tenant_id, device_id, "--via", gateway_id)
        return registry.run(*arguments, expect_status=expect_status).stdout

    assert "would be provisioned by this request, behind gw. Nothing was stored now." in explain("gw")
    assert "gateway-may-not-provision" in explain("plain", expect_status=REFUSED)
    assert "device-unknown-gateway-disabled" in explain("off", expect_status=REFUSED)
    assert "device-and-gateway-unknown" in explain("nope", expect_status=REFUSED)
    assert "edge-device-id-invalid" in explain("gw", "a b", expect_status=WRONG_REQUEST)
    assert registry.request("GET", f"/v1/devices/{tenant_id}/edge-1").status == 404
    registry.create_device(tenant_id, "edge-1", {"via": ["gw"]})
    assert explain("gw").endswith("The device may send through gw.\n")


def test_explain_text_is_for_people(registry: Registry) -> None:
    result = registry.run("explain", "tenant", new_id(), expect_status=REFUSED)
    assert result.stdout == "404 Not Found: tenant-unknown\nThere is no tenant of this id or alias.\n"


def test_explain_of_a_ca_that_nobody_trusts_and_of_what_is_no_name(registry: Registry) -> None:
    result = registry.run("explain", "tenant", "--subject-dn", "CN=nope", expect_status=REFUSED)
    assert result.stdout == "404 Not Found: issuer-unknown\nNo tenant trusts a CA of this name (`trusted-ca`).\n"
    result = registry.run("explain", "tenant", "--subject-dn", "foo", expect_status=WRONG_REQUEST)
    first, second = result.stdout.splitlines()
    assert first == "400 Bad Request: malformed-request"
    assert second.startswith("The request lacks something or is written wrongly: subject-dn: ")


def test_explain_tells_what_an_adapter_would_turn_away_later(registry: Registry) -> None:
    """An adapter gets credentials also of a disabled device (amqp-apis 11.2, 6d) and of a disabled tenant."""
    tenant_id = registry.create_tenant(document={"enabled": False})
    device_id = registry.create_device(tenant_id, document={"enabled": False})
    registry.set_credentials(tenant_id, device_id, [{"type": "psk", "auth-id": "a", "secrets": [{"key": "AAEC"}]}])
    text = registry.run("explain", "credentials", tenant_id, "psk", "a").stdout
    assert text.startswith("200 OK\n")
    assert device_id in text
    assert "device-disabled" in text
    assert "tenant-disabled" in text
    assert "AAEC" not in text
    assert "tenant-disabled" in registry.run("explain", "tenant", tenant_id).stdout


def test_explain_without_a_database(tmp_path: Path) -> None:
    result = kamado(
        "explain", "tenant", "t", "--set", f"storage.url=sqlite:///{tmp_path}/no.db", expect_status=UNAVAILABLE
    )
    assert "does not exist" in result.stderr
    assert not (tmp_path / "no.db").exists()


# identity


def test_identities_beside_a_running_registry(registry: Registry, tmp_path: Path) -> None:
    """`kamado identity` takes effect at once."""
    tenant_id = registry.create_tenant()
    url = registry.addresses["amqp"]
    name = new_id("mqtt")
    file = tmp_path / "made.credentials"
    result = registry.run("identity", "add", name)
    assert result.stdout.startswith(f"username={name}\npassword=")
    file.write_text(result.stdout)
    login = ("--url", url, "--credentials-file", str(file))
    registry.run("ask", "tenant", tenant_id, *login)

    listed = json.loads(registry.run("identity", "list", "--json").stdout)
    (entry,) = [entry for entry in listed if entry["name"] == name]
    assert entry["mechanism"] == "PLAIN"
    assert entry["roles"] == ["protocol-adapter"]
    assert name in registry.run("identity", "list").stdout

    assert "there is an identity" in registry.run("identity", "add", name, expect_status=REFUSED).stderr
    made = registry.run("identity", "passwd", name).stdout
    registry.run("ask", "tenant", tenant_id, *login, expect_status=LOGIN_REFUSED)
    file.write_text(made)
    registry.run("ask", "tenant", tenant_id, *login)
    registry.run("identity", "remove", name)
    registry.run("ask", "tenant", tenant_id, *login, expect_status=LOGIN_REFUSED)
    registry.run("identity", "remove", name, expect_status=REFUSED)
    registry.run("identity", "passwd", name, expect_status=REFUSED)


def test_passwords_from_a_file_and_from_standard_input(registry: Registry, tmp_path: Path) -> None:
    tenant_id = registry.create_tenant()
    name = new_id("http")
    (tmp_path / "password").write_text("geheim ü\nsecond line\n")
    result = registry.run("identity", "add", name, "--password-file", str(tmp_path / "password"))
    assert result.stdout == ""
    file = tmp_path / "credentials"
    login = ("--url", registry.addresses["amqp"], "--credentials-file", str(file))
    file.write_text(f"username={name}\npassword=geheim ü\n")
    registry.run("ask", "tenant", tenant_id, *login)
    registry.run("identity", "passwd", name, "--password-file", "-", stdin="other\r\n")
    file.write_text(f"username={name}\npassword=other\n")
    registry.run("ask", "tenant", tenant_id, *login)
    registry.run("identity", "passwd", name, "--password-file", "-", stdin="", expect_status=WRONG_DATA)
    registry.run("identity", "passwd", name, "--password-file", "-", stdin="x" * 73, expect_status=WRONG_DATA)
    registry.run("identity", "passwd", name, "--password-file", str(tmp_path / "none"), expect_status=WRONG_DATA)


def test_role_decides_what_a_login_may_do(registry: Registry, tmp_path: Path) -> None:
    """Authentication 3.3: a command router asks the Tenant and Registration APIs only."""
    tenant_id = registry.create_tenant()
    name = new_id("router")
    file = tmp_path / "credentials"
    file.write_text(registry.run("identity", "add", name, "--role", "command-router").stdout)
    login = ("--url", registry.addresses["amqp"], "--credentials-file", str(file))
    registry.run("ask", "tenant", tenant_id, *login)
    registry.run("ask", "credentials", tenant_id, "psk", "a", *login, expect_status=NOT_ALLOWED)
    result = registry.run("identity", "add", new_id(), "--role", "king", expect_status=USAGE)
    assert "protocol-adapter" in result.stderr


def test_external_has_no_password(registry: Registry, tmp_path: Path) -> None:
    name = new_id("coap")
    result = registry.run(
        "identity", "add", name, "--mechanism", "EXTERNAL", "--password-file", "-", stdin="x\n", expect_status=USAGE
    )
    assert "no password" in result.stderr
    assert registry.run("identity", "add", name, "--mechanism", "EXTERNAL").stdout == ""
    registry.run("identity", "passwd", name, expect_status=WRONG_DATA)


# load


def test_load_beside_a_running_registry(registry: Registry, tmp_path: Path) -> None:
    """`kamado load` takes effect at once, all or nothing."""
    tenant_id = new_id()
    tenants, devices = tmp_path / "tenants.json", tmp_path / "device-identities.json"
    credentials = tmp_path / "credentials.json"
    tenants.write_text(json.dumps([{"tenant-id": tenant_id}]))
    devices.write_text(json.dumps([{"tenant": tenant_id, "devices": [{"device-id": "d", "data": {"via": "gw"}}]}]))
    credentials.write_text(
        json.dumps(
            [
                {
                    "tenant": tenant_id,
                    "credentials": [
                        {
                            "device-id": "d",
                            "type": "hashed-password",
                            "auth-id": "a",
                            "secrets": [{"pwd-plain": "x"}],
                        }
                    ],
                }
            ]
        )
    )
    files = [str(credentials), str(tenants), str(devices)]
    devices_text = devices.read_text()
    devices.write_text(devices_text.replace('"via"', '"wire"'))
    result = registry.run("load", *files, expect_status=WRONG_DATA)
    assert "device-identities.json" in result.stderr
    assert "wire" in result.stderr
    assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 404
    devices.write_text(devices_text)
    result = registry.run("load", *files)
    assert "1 tenant" in result.stdout
    assert registry.request("GET", f"/v1/devices/{tenant_id}/d").object["via"] == ["gw"]
    answer = json.loads(ask(registry, "credentials", tenant_id, "hashed-password", "a", "--json"))
    assert answer["payload"]["device-id"] == "d"


def test_load_of_what_cannot_be_read(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[")
    for name in ("a.json", "b.json"):
        result = registry.run("load", str(tmp_path / name), expect_status=WRONG_DATA)
        assert name in result.stderr
        assert "Traceback" not in result.stderr


def test_load_lists_all_that_is_wrong_also_without_a_database(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text('[{"tenant-id": "a", "colour": 1}, {"tenant": "b", "devices": [{"device-id": "d"}]}]')
    result = registry.run("load", str(file), expect_status=WRONG_DATA)
    assert "colour: unknown member" in result.stderr
    assert "device d of tenant b: there is no such tenant" in result.stderr
    assert result.stderr.endswith("Nothing was loaded: 2 problems.\n")
    setting = f"storage.url=sqlite:///{file}/a.db"
    result = kamado("load", str(file), "--set", setting, expect_status=WRONG_DATA)
    assert "colour: unknown member" in result.stderr
    assert "were not compared with the database" in result.stderr
    # What holds no entry at all is no reason to make a database.
    missing = str(tmp_path / "no.json")
    kamado("load", missing, "--set", f"storage.url=sqlite:///{tmp_path}/a.db", expect_status=WRONG_DATA)
    assert not (tmp_path / "a.db").exists()


# A database that cannot be used


COMMANDS_WITH_A_DATABASE = {
    "migrate": ["migrate"],
    "load": ["load", "t.json"],
    "identity add": ["identity", "add", "a"],
    "identity list": ["identity", "list"],
    "identity remove": ["identity", "remove", "a"],
    "identity passwd": ["identity", "passwd", "a"],
    "operator add": ["operator", "add", "a"],
    "operator list": ["operator", "list"],
    "operator remove": ["operator", "remove", "a"],
    "operator passwd": ["operator", "passwd", "a"],
    "explain tenant": ["explain", "tenant", "t"],
    "explain assert": ["explain", "assert", "t", "d"],
    "explain credentials": ["explain", "credentials", "t", "psk", "a"],
}


def make_newer(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO schema_version (version, name, applied) VALUES (9999, 'later', '2030-01-01')")
    connection.close()


@pytest.fixture(scope="module")
def spare_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("spare") / "a.db"
    kamado("migrate", "--set", f"storage.url=sqlite:///{database}")
    return database


@pytest.mark.parametrize("name", COMMANDS_WITH_A_DATABASE)
def test_every_command_tells_in_a_line_that_the_database_cannot_be_used(
    name: str, spare_database: Path, tmp_path: Path
) -> None:
    """Exit status 69, docs/command-line.md: a newer schema, no directory, somebody else's file."""
    (tmp_path / "t.json").write_text("[]")
    newer, foreign = tmp_path / "newer.db", tmp_path / "foreign.db"
    shutil.copy(spare_database, newer)
    make_newer(newer)
    foreign.write_text("This is a letter, and long enough for one. " * 40)
    for database, words in (
        (newer, "later version"),
        (tmp_path / "t.json" / "a.db", "a.db"),
        (foreign, "is not a SQLite database"),
    ):
        arguments = [*COMMANDS_WITH_A_DATABASE[name], "--set", f"storage.url=sqlite:///{database}"]
        result = kamado(*arguments, cwd=tmp_path, expect_status=UNAVAILABLE)
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert words in line
        assert result.stdout == ""


@pytest.mark.parametrize("name", ["load", "identity add", "operator add", "explain tenant"])
def test_locked_database_is_told_in_a_line(name: str, spare_database: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"tenant-id": "t"}]')
    database = tmp_path / "a.db"
    shutil.copy(spare_database, database)
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN IMMEDIATE")
    try:
        arguments = [*COMMANDS_WITH_A_DATABASE[name], "--set", f"storage.url=sqlite:///{database}"]
        result = kamado(*arguments, cwd=tmp_path, expect_status=UNAVAILABLE)
    finally:
        other.close()
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert "another process" in line


def test_load_into_a_full_disk(spare_database: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; nothing of the load is there afterwards."""
    database = tmp_path / "a.db"
    shutil.copy(spare_database, database)
    tenants = [{"tenant-id": f"t{number}", "ext": {"x": "x" * 1000}} for number in range(400)]
    (tmp_path / "t.json").write_text(json.dumps(tenants))
    setting = f"storage.url=sqlite:///{database}"
    command = [sys.executable, "-m", "kamado", "load", str(tmp_path / "t.json"), "--set", setting]
    # Blocks of 512 bytes.
    limited = ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh", *command]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == UNAVAILABLE
    assert "Traceback" not in result.stderr
    assert "the database cannot" in result.stderr
    kamado("explain", "tenant", "t0", "--set", setting, expect_status=REFUSED)


# check-config, migrate, help


def test_check_config(tmp_path: Path) -> None:
    file = tmp_path / "kamado.toml"
    file.write_text("[amqp]\nlink_credit = 7\n")
    setting = f"storage.url=sqlite:///{tmp_path}/a.db"
    lines = kamado("check-config", "--config", str(file), "--set", setting).stdout.splitlines()
    assert lines[0] == "The configuration is fine."
    assert lines[1].startswith("Management API: nobody has to log in")
    assert list(tmp_path.iterdir()) == [file], "nothing is made"
    shown = kamado("check-config", "--print", "--config", str(file), environment={"KAMADO_HEALTH__PORT": "1"}).stdout
    assert f"amqp.link_credit = 7  # {file}\n" in shown
    assert "health.port = 1  # KAMADO_HEALTH__PORT\n" in shown
    assert tomllib.loads(shown)["http"]["insecure"]["port"] == 8080


def test_every_problem_of_the_configuration_is_listed(tmp_path: Path) -> None:
    """Configuration 1.2 and 8 row 8, and exit status 78."""
    arguments = ("--set", "http.colour=red", "--set", "amqp.link_credit=none", "--set", "health.port=-1")
    for command in ("check-config", "serve", "migrate"):
        result = kamado(command, *arguments, expect_status=CONFIGURATION, cwd=tmp_path)
        assert "has 3 problems" in result.stderr
        for key in ("http.colour", "amqp.link_credit", "health.port"):
            assert key in result.stderr
        assert result.stdout == ""


def test_check_config_reads_the_permissions_file(tmp_path: Path) -> None:
    file = tmp_path / "permissions.json"
    file.write_text('{"roles": {}, "users": {"u": {"mechanism": "PLAIN", "password": "c4nary", "authorities": ["x"]}}}')
    setting = f"auth.permissions_file={file}"
    result = kamado("check-config", "--set", setting, "--set", f"storage.url=sqlite:///{tmp_path}/a.db")
    assert "there is no role x" in result.stderr
    file.write_text('{"users": {"u": {"mechanism": "PLAIN"}}}')
    result = kamado("check-config", "--set", setting, expect_status=CONFIGURATION)
    assert "users.u" in result.stderr
    assert "users.u" in kamado("serve", "--set", setting, expect_status=CONFIGURATION, cwd=tmp_path).stdout


def test_migrate(tmp_path: Path) -> None:
    setting = ("--set", f"storage.url=sqlite:///{tmp_path}/a.db")
    assert kamado("migrate", *setting).stdout.startswith("schema 0 -> ")
    assert kamado("migrate", *setting).stdout.endswith("nothing to do\n")
    make_newer(tmp_path / "a.db")
    for command in ("migrate", "serve"):
        result = kamado(command, *setting, expect_status=UNAVAILABLE)
        assert "later version" in result.stderr + result.stdout


def test_help_and_version() -> None:
    assert re.fullmatch(r"kamado \d+\.\d+\.\d+\n", kamado("--version").stdout)
    for arguments in ([], ["identity"], ["ask"], ["explain"]):
        assert "Usage:" in kamado(*arguments, expect_status=USAGE).stdout + kamado(*arguments, "--help").stdout
    assert kamado("nonsense", expect_status=USAGE).stdout == ""
