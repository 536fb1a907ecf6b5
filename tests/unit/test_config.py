"""Settings: configuration 1.1 to 1.3 and the choices that the documents mark as settled."""

import json
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from tests.integration.certificates import Authority, tls_files

from kamado.config import (
    AmqpTlsConfig,
    Config,
    ConfigError,
    Loaded,
    load,
    read_hook_secret,
    settings,
    tls_context,
    usable_processors,
)


def loaded(tmp_path: Path, toml: str = "", *assignments: str, environment: dict[str, str] | None = None) -> Loaded:
    file = tmp_path / "kamado.toml"
    file.write_text(toml)
    return load(config_file=file, assignments=assignments, environment=environment or {}, directory=tmp_path)


def config_of(tmp_path: Path, toml: str = "", *assignments: str, environment: dict[str, str] | None = None) -> Config:
    return loaded(tmp_path, toml, *assignments, environment=environment).config


def problems_of(
    tmp_path: Path, toml: str = "", *assignments: str, environment: dict[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, toml, *assignments, environment=environment)
    return [str(problem) for problem in caught.value.problems]


def test_defaults(tmp_path: Path) -> None:
    """Configuration 1.3 and "Listeners without any configuration": plain, on loopback, 8080, 5672, 8088."""
    config = config_of(tmp_path)
    assert config.http.insecure_enabled
    assert config.amqp.insecure_enabled
    assert not config.http.secure_enabled
    assert not config.amqp.secure_enabled
    assert [config.http.insecure.port, config.amqp.insecure.port, config.health.port] == [8080, 5672, 8088]
    assert [config.http.secure.port, config.amqp.secure.port] == [8443, 5671]
    assert {config.http.insecure.bind, config.amqp.insecure.bind, config.health.bind} == {"127.0.0.1"}
    assert config.http.max_body_size == 65536
    assert config.http.cors_allowed_origins == ()
    assert not config.http.auth.allow_anonymous
    assert config.amqp.link_credit == 100
    assert config.amqp.max_message_size == 262144
    assert config.amqp.idle_timeout == 20
    assert config.amqp.sasl_mechanisms == ("EXTERNAL", "PLAIN")
    assert config.amqp.container_name == "hono-registry"
    assert (config.credentials.bcrypt_cost, config.credentials.bcrypt_max_cost) == (10, 12)
    assert (config.devices.max_per_tenant, config.credentials.max_per_device) == (-1, -1)
    # amqp-apis 8: tenant and credentials 180 s, assertion 300 s.
    assert config.tenants.cache_max_age == 180
    assert config.devices.cache_max_age == 300
    assert config.credentials.cache_max_age == 180
    assert config.auth.lifetime == 600
    assert config.provisioning.verify_signature
    assert config.storage.auto_migrate
    assert config.storage.url.startswith("sqlite:////")
    assert (config.startup.deadline, config.shutdown.drain_delay, config.shutdown.grace) == (60, 5, 15)


def test_default_patterns_are_those_of_management_3_2() -> None:
    ids = Config().ids
    assert ids.tenant_pattern.fullmatch("plant-7_a.B")
    assert not ids.tenant_pattern.fullmatch("plant:7")
    assert ids.device_pattern.fullmatch("urn:dev=7")
    assert not ids.device_pattern.fullmatch("dev/7")
    assert ids.username_pattern.fullmatch("sensor=1")
    assert not ids.username_pattern.fullmatch("sensor:1")
    assert not ids.tenant_pattern.fullmatch("plänt")


def test_precedence(tmp_path: Path) -> None:
    """Configuration 1.2: --set, environment, file, default."""
    toml = "[amqp]\nlink_credit = 1\nmax_connections = 11\ncontainer_name = 'file'\n"
    environment = {"KAMADO_AMQP__LINK_CREDIT": "2", "KAMADO_AMQP__MAX_CONNECTIONS": "22"}
    result = loaded(tmp_path, toml, "amqp.link_credit=3", environment=environment)
    assert result.config.amqp.link_credit == 3
    assert result.config.amqp.max_connections == 22
    assert result.config.amqp.container_name == "file"
    assert result.origins["amqp.link_credit"] == "--set"
    assert result.origins["amqp.max_connections"] == "KAMADO_AMQP__MAX_CONNECTIONS"
    assert result.origins["amqp.container_name"] == str(tmp_path / "kamado.toml")
    assert "amqp.idle_timeout" not in result.origins


def test_conf_d_is_merged_in_name_order(tmp_path: Path) -> None:
    directory = tmp_path / "conf.d"
    directory.mkdir()
    (directory / "20.toml").write_text("[amqp]\nlink_credit = 20\n")
    (directory / "10.toml").write_text("[amqp]\nlink_credit = 10\nmax_connections = 10\n")
    (directory / "notes.txt").write_text("not read")
    config = config_of(tmp_path, "[amqp]\nlink_credit = 1\nmax_connections = 1\ncontainer_name = 'a'\n")
    assert (config.amqp.link_credit, config.amqp.max_connections, config.amqp.container_name) == (20, 10, "a")


def test_file_named_by_environment(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("health.port = 9\n")
    assert load(environment={"KAMADO_CONFIG": str(file)}).config.health.port == 9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("'500ms'", 0.5),
        ("'30s'", 30),
        ("'5m'", 300),
        ("'1h'", 3600),
        ("'1.5s'", 1.5),
        ("'PT5M'", 300),
        ("'PT1H2M3.5S'", 3723.5),
        ("'90'", 90),
        ("90", 90),
        ("0.5", 0.5),
    ],
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    config = config_of(tmp_path, f"shutdown.grace = {text}\n")
    assert config.shutdown.grace == seconds


@pytest.mark.parametrize(
    "text", ["'x'", "'-1s'", "-1", "'PT'", "'5 minutes'", "''", "true", "nan", "inf", "'P1D'", "[1]"]
)
def test_wrong_durations(tmp_path: Path, text: str) -> None:
    (problem,) = problems_of(tmp_path, f"shutdown.grace = {text}\n")
    assert problem.startswith("shutdown.grace = ")
    assert str(tmp_path / "kamado.toml") in problem
    assert "expected a duration" in problem


@pytest.mark.parametrize(("text", "size"), [("'64KiB'", 65536), ("'1MiB'", 1048576), ("2048", 2048), ("'2048'", 2048)])
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    assert config_of(tmp_path, f"http.max_body_size = {text}\n").http.max_body_size == size


@pytest.mark.parametrize("text", ["128", "'64KB'", "'-1'", "1.5", "true", "'9999999999MiB'"])
def test_wrong_sizes(tmp_path: Path, text: str) -> None:
    """Management 3.5: the minimum of the body size is 129."""
    (problem,) = problems_of(tmp_path, f"http.max_body_size = {text}\n")
    assert "expected a size" in problem


@pytest.mark.parametrize("text", ['["PLAIN"]', "PLAIN", " PLAIN "])
def test_lists_in_the_environment_are_json_or_comma_separated(tmp_path: Path, text: str) -> None:
    config = config_of(tmp_path, environment={"KAMADO_AMQP__SASL_MECHANISMS": text})
    assert config.amqp.sasl_mechanisms == ("PLAIN",)


@pytest.mark.parametrize("text", ["", "[]", "ANONYMOUS", "PLAIN,ANONYMOUS", "PLAIN,PLAIN", "[1]", "[", '{"a":1}'])
def test_only_plain_and_external_can_be_offered(tmp_path: Path, text: str) -> None:
    """Configuration 1.3: subset of these two, not empty; SASL ANONYMOUS is never offered."""
    (problem,) = problems_of(tmp_path, "", f"amqp.sasl_mechanisms={text}")
    assert "EXTERNAL and PLAIN" in problem


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    """Configuration 1.2, validation rules, and 8 row 8."""
    toml = "[http]\nmax_body_size = 5\ncolour = 'red'\n[nonsense]\nx = 1\n[credentials]\nbcrypt_cost = 'high'\n"
    environment = {"KAMADO_AMQP__LINK_CREDITS": "5", "KAMADO_HEALTH__PORT": "70000"}
    problems = problems_of(tmp_path, toml, "log.level=loud", "oops", environment=environment)
    text = "\n".join(problems)
    assert len(problems) == 8
    assert "http.colour" in text
    assert "nonsense" in text
    assert (
        "KAMADO_AMQP__LINK_CREDITS (environment): there is no such setting; did you mean KAMADO_AMQP__LINK_CREDIT?"
        in text
    )
    assert 'health.port = "70000" (KAMADO_HEALTH__PORT): expected a whole number, 0 to 65535' in text
    assert 'log.level = "loud" (--set): expected "debug" or "info" or "warning" or "error"' in text
    assert "oops (--set): has the form key=value" in text


@pytest.mark.parametrize(
    ("content", "words"), [(b"[http", "is not TOML"), (b"\xff", "is not UTF-8"), (b"a = 1\na = 2\n", "is not TOML")]
)
def test_unusable_file(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "kamado.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(config_file=file, environment={})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(config_file=tmp_path / "none.toml", environment={})


def test_a_section_is_not_a_value(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "http = 5\n")
    assert "there is no such setting" in problem


def test_secret_from_a_file(tmp_path: Path) -> None:
    """Configuration 1.2, source 3: one trailing newline is stripped; giving both is an error."""
    (tmp_path / "url").write_text("sqlite:////data/x.db\n")
    environment = {"KAMADO_STORAGE__URL_FILE": str(tmp_path / "url")}
    assert config_of(tmp_path, environment=environment).storage.url == "sqlite:////data/x.db"
    both = environment | {"KAMADO_STORAGE__URL": "sqlite:////data/y.db"}
    (problem,) = problems_of(tmp_path, environment=both)
    assert "only one of them" in problem
    (problem,) = problems_of(tmp_path, environment={"KAMADO_STORAGE__URL_FILE": str(tmp_path / "none")})
    assert "cannot be read" in problem
    (problem,) = problems_of(tmp_path, environment={"KAMADO_AMQP__LINK_CREDIT_FILE": str(tmp_path / "url")})
    assert "there is no such setting" in problem


def test_value_of_a_secret_is_not_told(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "storage.url = 'mysql://root:c4nary@host/db'\n")
    assert "c4nary" not in problem
    assert "expected sqlite:///" in problem


@pytest.mark.parametrize(
    "url",
    [
        *("memory://", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///a?mode=ro", "sqlite://a.db", "x"),
        *("postgresql://h", "postgresql:///x", "postgresql://h:1:2/x", "postgresql://h:port/x", "postgresql://a,/x"),
        *(
            "postgresql://h/x#y",
            "postgresql://h/",
            "postgresql://h:65536/x",
            "postgresql://u:1/p@h/x",
            "postgresql://[::1/x",
        ),
    ],
)
def test_wrong_databases(tmp_path: Path, url: str) -> None:
    """There is no memory:// (settled)."""
    (problem,) = problems_of(tmp_path, "", f"storage.url={url}")
    assert problem.startswith("storage.url (--set)")


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql://h/x", "postgres://u:p@h:5432/x", "postgresql://u@a:1,b:2/x?target_session_attrs=read-write"),
        *("postgresql://[::1]:5432/x", "postgresql:///x?host=/run/postgresql", "postgresql://u@/x?host=/tmp&port=1"),
    ],
)
def test_postgresql_is_named_as_libpq_does(tmp_path: Path, url: str) -> None:
    config = config_of(tmp_path, "", f"storage.url={url}", f"storage.read_url={url}")
    assert (config.storage.url, config.storage.read_url, config.storage.file) == (url, url, None)


def test_relative_paths_start_from_where_they_are_written(tmp_path: Path) -> None:
    directory = tmp_path / "etc"
    directory.mkdir()
    (directory / "a.json").write_text("[]")
    (directory / "kamado.toml").write_text("storage.url = 'sqlite:///../var/a.db'\nstartup.load = ['a.json']\n")
    config = load(config_file=directory / "kamado.toml", environment={}, directory=tmp_path / "cwd").config
    assert config.storage.url == f"sqlite:///{tmp_path}/var/a.db"
    assert config.startup.load == (directory / "a.json",)
    config = load(assignments=["storage.url=sqlite:///b.db"], environment={}, directory=tmp_path / "cwd").config
    assert config.storage.url == f"sqlite:///{tmp_path}/cwd/b.db"


def test_a_file_may_be_named_by_its_uri(tmp_path: Path) -> None:
    """authentication 4.1"""
    file = tmp_path / "permissions of all.json"
    file.write_text("{}")
    assert config_of(tmp_path, f"auth.permissions_file = '{file.as_uri()}'\n").auth.permissions_file == file


def test_files_must_be_readable(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "startup.load = ['none.json']\nauth.permissions_file = 'none'\n")
    assert len(problems) == 2
    assert all("cannot be read: No such file" in problem for problem in problems)


# The provisioning hook


@pytest.mark.parametrize(
    "url",
    [
        "erp.example/devices",
        "ftp://erp.example/",
        "https://",
        "https://user:secret@erp.example/",
        "https://erp.example/#part",
        "https://erp.example:99999/",
        "https://erp.example:0/",
        "https://erp.example/a b",
        "https://-/",
    ],
)
def test_wrong_addresses_of_a_hook(tmp_path: Path, url: str) -> None:
    (problem,) = problems_of(tmp_path, f"provisioning.hook.url = '{url}'\n")
    assert "http:// or https://, a host and a path" in problem


@pytest.mark.parametrize(
    ("url", "warns"),
    [
        ("http://erp.example/", True),
        ("http://192.0.2.1:8080/", True),
        ("https://erp.example/", False),
        ("http://127.0.0.1:9/x?y=z", False),
        ("http://localhost:9", False),
        ("http://[::1]:9/", False),
    ],
)
def test_plain_hook_elsewhere_is_warned_of(tmp_path: Path, url: str, warns: bool) -> None:
    result = loaded(tmp_path, f"provisioning.hook.url = '{url}'\n")
    assert result.config.provisioning.hook.url == url
    assert any("provisioning.hook.url" in warning for warning in result.warnings) is warns


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("whsec_" + "A" * 32, 24),
        ("A" * 32 + "\n", 24),
        ("whsec_" + "A" * 84 + "AA==", 64),
        ("whsec_" + "A" * 28, None),
        ("whsec_" + "A" * 88, None),
        ("whsec_not base64", None),
        ("", None),
    ],
)
def test_secret_of_a_hook(tmp_path: Path, text: str, size: int | None) -> None:
    file = tmp_path / "hook.secret"
    file.write_text(text)
    file.chmod(0o600)
    toml = "provisioning.hook.secret_file = 'hook.secret'\n"
    if size is None:
        (problem,) = problems_of(tmp_path, toml)
        assert problem.endswith("must hold whsec_ and 24 to 64 bytes in Base64")
    else:
        result = loaded(tmp_path, toml)
        assert not result.warnings
        assert len(read_hook_secret(file)) == size
        file.chmod(0o644)
        (warning,) = loaded(tmp_path, toml).warnings
        assert "can be read by everybody" in warning


def test_files_of_a_hook_are_checked(tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    (tmp_path / "empty").touch()
    start = "[provisioning.hook]\nurl = 'https://erp.example/'\n"
    for lines, key in (
        ("secret_file = 'none'\n", "secret_file"),
        ("ca_file = 'none'\n", "ca_file"),
        ("ca_file = 'empty'\n", "ca_file"),
        (f"client_cert_file = '{files.cert_file}'\n", "client_key_file"),
        (f"client_key_file = '{files.key_file}'\n", "client_cert_file"),
        (f"client_cert_file = '{files.ca_file}'\nclient_key_file = '{files.key_file}'\n", "client_key_file"),
        (f"client_cert_file = 'empty'\nclient_key_file = '{files.key_file}'\n", "client_cert_file"),
    ):
        (problem,) = problems_of(tmp_path, start + lines)
        assert problem.startswith(f"provisioning.hook.{key}"), problem
    good = (
        f"ca_file = '{files.ca_file}'\nclient_cert_file = '{files.cert_file}'\nclient_key_file = '{files.key_file}'\n"
    )
    assert not loaded(tmp_path, start + good).warnings


# Listeners


@pytest.mark.parametrize("name", ["http", "amqp"])
def test_plain_listener_elsewhere_needs_to_be_asked_for_by_name(tmp_path: Path, name: str) -> None:
    toml = f"http.auth.allow_anonymous = true\n[{name}.insecure]\nbind = '0.0.0.0'\n"
    (problem,) = problems_of(tmp_path, toml)
    assert f"needs {name}.insecure.enabled=true" in problem
    result = loaded(tmp_path, toml, f"{name}.insecure.enabled=true")
    assert any("without TLS" in warning for warning in result.warnings)


@pytest.mark.parametrize("bind", ["0.0.0.0", "192.0.2.1", "::", "registry.example.com"])
def test_open_management_api_elsewhere_is_warned_of(tmp_path: Path, bind: str) -> None:
    """Management 3.11; without `allow_anonymous` it is for the start to refuse, since accounts are in the database."""
    toml = f"[http.insecure]\nbind = '{bind}'\nenabled = true\n"
    assert not loaded(tmp_path, toml).config.http.is_local
    assert not any("everybody" in warning for warning in loaded(tmp_path, toml).warnings)
    result = loaded(tmp_path, toml, "http.auth.allow_anonymous=true")
    assert any("everybody" in warning for warning in result.warnings)
    assert not any(
        "everybody" in warning for warning in loaded(tmp_path, "", "http.auth.allow_anonymous=true").warnings
    )


@pytest.mark.parametrize("realm", ['a"b', "a\\b", "Körner", "", "a\nb"])
def test_realm_fits_into_its_header(tmp_path: Path, realm: str) -> None:
    assert config_of(tmp_path).http.auth.realm == "Hono"
    (problem,) = problems_of(tmp_path, f"http.auth.realm = {json.dumps(realm)}\n")
    assert "printable ASCII" in problem


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_addresses(tmp_path: Path, bind: str) -> None:
    assert config_of(tmp_path, f"http.insecure.bind = '{bind}'\n").http.insecure_enabled


@pytest.mark.parametrize("bind", ["300.1.1.1", "a b", "", "-x", "http://x"])
def test_wrong_addresses(tmp_path: Path, bind: str) -> None:
    (problem,) = problems_of(tmp_path, f"health.bind = '{bind}'\n")
    assert "expected an IP address or a host name" in problem


def test_key_material_switches_from_plain_to_tls(tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    toml = f"[amqp.tls]\ncert_file = '{files.cert_file}'\nkey_file = '{files.key_file}'\n"
    config = config_of(tmp_path, toml)
    assert config.amqp.secure_enabled
    assert not config.amqp.insecure_enabled
    assert config_of(tmp_path, toml, "amqp.insecure.enabled=true").amqp.insecure_enabled
    (problem,) = problems_of(tmp_path, toml, "amqp.secure.enabled=false", "amqp.insecure.enabled=false")
    assert "neither" in problem


def test_tls_without_key_material(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "", "http.secure.enabled=true", "amqp.insecure.enabled=false")
    assert len(problems) == 2
    assert "http.tls.cert_file" in problems[0]
    assert "neither" in problems[1]


def test_certificate_and_key_come_as_a_pair_and_match(tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    other, other_key = Authority.create("CN=other").write(tmp_path, "other")
    (problem,) = problems_of(tmp_path, "", f"amqp.tls.cert_file={files.cert_file}")
    assert "amqp.tls.key_file" in problem
    (problem,) = problems_of(tmp_path, "", f"amqp.tls.cert_file={files.cert_file}", f"amqp.tls.key_file={other_key}")
    assert "is not the key of the certificate" in problem
    (problem,) = problems_of(
        tmp_path, "", f"amqp.tls.cert_file={files.key_file}", f"amqp.tls.key_file={files.key_file}"
    )
    assert f"amqp.tls.cert_file (--set): {files.key_file} holds no PEM certificate" in problem
    (problem,) = problems_of(tmp_path, "", f"amqp.tls.cert_file={tmp_path}/no", f"amqp.tls.key_file={files.key_file}")
    assert "cannot be read" in problem
    pair = (f"amqp.tls.cert_file={other}", f"amqp.tls.key_file={other_key}")
    (problem,) = problems_of(tmp_path, "", *pair, f"amqp.tls.client_ca_file={other_key}")
    assert "holds no PEM certificates" in problem
    for ciphers in ("NONSENSE", "ECDHE-RSA-AES128-GCM-SHA256,NONSENSE", "ECDHE+AESGCM:NONSENSE:!SHA1"):
        for key_material in (pair, ()):
            (problem,) = problems_of(tmp_path, "", *key_material, f"amqp.tls.ciphers={ciphers}")
            assert "amqp.tls.ciphers (--set): OpenSSL has no cipher NONSENSE for TLS 1.2" in problem
    (problem,) = problems_of(tmp_path, "", *pair, "amqp.tls.ciphers=ECDHE+AESGCM,!ECDHE")
    assert "these leave no cipher" in problem
    config_of(tmp_path, "", *pair, "amqp.tls.ciphers=ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE+AESGCM,!DSS,@STRENGTH")
    (problem,) = problems_of(tmp_path, "", *pair, "amqp.tls.client_auth=required")
    assert "amqp.tls.client_ca_file" in problem


def test_file_that_is_to_blame_is_named(tmp_path: Path) -> None:
    authority = Authority.create("CN=localhost")
    cert, key = authority.write(tmp_path, "good")
    files = {
        "encrypted": authority.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        ),
        "old-encrypted": authority.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.BestAvailableEncryption(b"secret"),
        ),
        "junk-cert": b"-----BEGIN CERTIFICATE-----\nAAECAwQFBgc=\n-----END CERTIFICATE-----\n",
        "junk-key": b"-----BEGIN PRIVATE KEY-----\nAAECAwQFBgc=\n-----END PRIVATE KEY-----\n",
        "letter": b"Dear reader",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def problem(cert_file: Path, key_file: Path) -> str:
        (one,) = problems_of(tmp_path, "", f"http.tls.cert_file={cert_file}", f"http.tls.key_file={key_file}")
        return one.replace(f"{tmp_path}/", "")

    for name in ("encrypted", "old-encrypted"):
        text = f"http.tls.key_file (--set): the key in {name} is encrypted and has to be without a pass phrase"
        assert problem(cert, tmp_path / name).startswith(text)
    assert problem(key, cert) == (
        f"http.tls.cert_file (--set): {key.name} is a key and {cert.name} a certificate: the two are swapped"
    )
    for name, text in (
        ("junk-cert", "the certificate in junk-cert cannot be decoded"),
        ("letter", "letter holds no PEM certificate"),
    ):
        assert problem(tmp_path / name, key) == f"http.tls.cert_file (--set): {text}"
    for name, text in (
        ("junk-key", "the key in junk-key cannot be decoded"),
        ("letter", "letter holds no PEM private key"),
    ):
        assert problem(cert, tmp_path / name) == f"http.tls.key_file (--set): {text}"


def test_database_that_is_a_directory(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "", f"storage.url=sqlite:///{tmp_path}")
    assert problem == f"storage.url (--set): {tmp_path} is a directory; name a file in it"


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("KAMADO_BLA", None),
        ("KAMADO_HTTP__FOO", None),
        ("KAMADO_STORAGE__URI", "KAMADO_STORAGE__URL"),
        ("KAMADO_HTTP__INSECURE__PROT", "KAMADO_HTTP__INSECURE__PORT"),
        ("KAMADO_ASK_URI", "KAMADO_ASK_URL"),
        ("KAMADO_HTTP__PORT", "KAMADO_HTTP__INSECURE__PORT"),
    ],
)
def test_only_what_is_near_is_suggested(tmp_path: Path, name: str, guess: str | None) -> None:
    (problem,) = problems_of(tmp_path, environment={name: "x"})
    suggestion = "" if guess is None else f"; did you mean {guess}?"
    assert problem == f"{name} (environment): there is no such setting{suggestion}"


def test_level_that_was_left_out_is_suggested(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "", "amqp.cert_file=x")
    assert problem.endswith("; did you mean amqp.tls.cert_file?")


@pytest.mark.parametrize("assignment", ["=1", " =1", "=", ""])
def test_assignment_without_a_key(tmp_path: Path, assignment: str) -> None:
    (problem,) = problems_of(tmp_path, "", assignment)
    assert problem == f"{assignment} (--set): has the form key=value"


def test_key_that_everybody_can_read_is_warned_of(tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    pair = (f"amqp.tls.cert_file={files.cert_file}", f"amqp.tls.key_file={files.key_file}")
    assert loaded(tmp_path, "", *pair).warnings == ()
    files.key_file.chmod(0o644)
    (warning,) = loaded(tmp_path, "", *pair).warnings
    assert "can be read by everybody" in warning


def test_client_certificates_are_requested_when_a_client_ca_is_set(tmp_path: Path) -> None:
    """Configuration 1.3, `L.tls.client_auth`."""
    files = tls_files(tmp_path)
    tls = AmqpTlsConfig(cert_file=files.cert_file, key_file=files.key_file)
    assert tls.effective_client_auth == "none"
    assert tls_context(tls).verify_mode.name == "CERT_NONE"
    tls = AmqpTlsConfig(cert_file=files.cert_file, key_file=files.key_file, client_ca_file=files.client_ca_file)
    context = tls_context(tls)
    assert context.verify_mode.name == "CERT_OPTIONAL"
    assert context.minimum_version.name == "TLSv1_2"
    assert all("GCM" in cipher["name"] or "CHACHA20" in cipher["name"] for cipher in context.get_ciphers())
    tls = AmqpTlsConfig(
        cert_file=files.cert_file,
        key_file=files.key_file,
        client_ca_file=files.client_ca_file,
        client_auth="required",
        min_version="1.3",
    )
    context = tls_context(tls)
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert context.minimum_version.name == "TLSv1_3"


@pytest.mark.parametrize(
    "assignments",
    [
        ("http.insecure.port=5672",),
        ("health.port=8080",),
        ("health.port=8080", "health.bind=0.0.0.0"),
    ],
)
def test_two_listeners_on_one_port(tmp_path: Path, assignments: tuple[str, ...]) -> None:
    (problem,) = problems_of(tmp_path, "", *assignments)
    assert "too" in problem


def test_equal_ports_on_different_addresses_and_port_0_are_fine(tmp_path: Path) -> None:
    config_of(tmp_path, "", "health.port=8080", "health.bind=127.0.0.2")
    config_of(tmp_path, "", "health.port=0", "http.insecure.port=0", "amqp.insecure.port=0")


# Others


def test_bcrypt_cost_is_at_most_the_highest_accepted(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "credentials.bcrypt_cost = 13\n")
    assert "credentials.bcrypt_max_cost" in problem


@pytest.mark.parametrize("key", ["devices.max_per_tenant", "credentials.max_per_device"])
def test_limit_of_zero_is_refused(tmp_path: Path, key: str) -> None:
    """Configuration 1.3: at least -1, not 0."""
    for value in ("0", "-2"):
        (problem,) = problems_of(tmp_path, "", f"{key}={value}")
        assert "not 0" in problem


@pytest.mark.parametrize("pattern", ["(", "[a-"])
def test_pattern_must_compile(tmp_path: Path, pattern: str) -> None:
    (problem,) = problems_of(tmp_path, f"ids.device_pattern = '{pattern}'\n")
    assert "regular expression" in problem


@pytest.mark.parametrize("origin", ["ui.example.com", "https://ui.example.com/", "null"])
def test_cors_origins(tmp_path: Path, origin: str) -> None:
    (problem,) = problems_of(tmp_path, f"http.cors_allowed_origins = ['{origin}']\n")
    assert "no origin" in problem
    good = "http.cors_allowed_origins = ['https://ui.example.com', 'http://localhost:3000']\n"
    assert len(config_of(tmp_path, good).http.cors_allowed_origins) == 2


def test_levels_of_single_loggers(tmp_path: Path) -> None:
    toml = "[log.levels]\n'kamado.amqp' = 'debug'\n"
    assert config_of(tmp_path, toml).log.levels == {"kamado.amqp": "debug"}
    text = "kamado.amqp=debug,kamado.http=error"
    levels = config_of(tmp_path, environment={"KAMADO_LOG__LEVELS": text}).log.levels
    assert levels == {"kamado.amqp": "debug", "kamado.http": "error"}
    (problem,) = problems_of(tmp_path, toml.replace("debug", "loud"))
    assert "log.levels" in problem


def test_effective_settings_are_toml_that_gives_the_same_configuration(tmp_path: Path) -> None:
    toml = "[amqp]\nidle_timeout = '1500ms'\n[log.levels]\n'a.b' = 'debug'\n[http]\nmax_body_size = '1MiB'\n"
    result = loaded(tmp_path, toml, "startup.load=", "ids.tenant_pattern=\\d+")
    lines = [f"{setting.key} = {shown}" for setting, shown, _ in result.effective() if shown]
    assert "startup.load = []" in lines
    text = "\n".join(lines)
    assert tomllib.loads(text)["http"]["max_body_size"] == "1MiB"
    (tmp_path / "again").mkdir()
    assert config_of(tmp_path / "again", text) == result.config
    origins = {setting.key: origin for setting, _, origin in result.effective()}
    assert origins["amqp.idle_timeout"] == str(tmp_path / "kamado.toml")
    assert origins["http.idle_timeout"] == "default"


def test_every_setting_has_a_default_a_form_and_a_line() -> None:
    for key, setting in settings().items():
        assert setting.doc.endswith("."), key
        assert setting.kind.expected, key
        assert "\n" not in setting.doc, key


def test_workers(tmp_path: Path) -> None:
    assert config_of(tmp_path).serve.effective_workers == 1
    assert config_of(tmp_path, "[serve]\nworkers = 3").serve.effective_workers == 3
    assert config_of(tmp_path, "", "serve.workers=auto").serve.effective_workers == usable_processors()
    for wrong in ("0", "65", "all", "true", "1.5"):
        (problem,) = problems_of(tmp_path, "", f"serve.workers={wrong}")
        assert 'expected a whole number, 1 to 64, or "auto"' in problem


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8),
        ({"": "max 100000"}, 8),
        ({"pod/kamado": "200000 100000"}, 2),
        ({"pod/kamado": "150000 100000"}, 2),
        ({"pod/kamado": "50000 100000"}, 1),
        ({"pod": "300000 100000", "pod/kamado": "max 100000"}, 3),
        ({"pod": "100000 100000", "pod/kamado": "300000 100000"}, 1),
        ({"pod/kamado": "1600000 100000"}, 8),
        ({"pod/kamado": "nonsense"}, 8),
    ],
)
def test_processors_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], expected: int
) -> None:
    """By affinity, and by the least limit of this control group and those above it (Kubernetes: `limits.cpu`)."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    own = tmp_path / "cgroup"
    own.write_text("1:name=systemd:/other\n0::/pod/kamado\n")
    for group, text in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(text)
    assert usable_processors(tmp_path, own) == expected


def test_processors_where_there_are_no_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert usable_processors(tmp_path, tmp_path / "none") == 2


def test_searches_that_would_have_no_connection_are_told_of(tmp_path: Path) -> None:
    url = "storage.url=postgresql://kamado@127.0.0.1/kamado"
    assert not loaded(tmp_path, "", url, "search.workers=3").warnings
    (warning,) = loaded(tmp_path, "", url, "search.workers=4").warnings
    assert warning.startswith("search.workers: with storage.pool_max=15 only 3 searches")
    assert not loaded(tmp_path, "", "search.workers=5").warnings
