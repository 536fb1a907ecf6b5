"""`kamado ask`: what an adapter asks over AMQP, and what it is answered."""

import asyncio
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn
from urllib.parse import urlsplit

import typer

from kamado.commands.configured import ConfigOption, JsonOption, SetOption, load_configuration, own_command, own_options
from kamado.commands.questions import (
    AuthIdArgument,
    CertificateOption,
    DeviceArgument,
    SubjectDnOption,
    TenantArgument,
    TenantCriterion,
    TypeArgument,
    ViaOption,
    credentials_criterion,
    exit_status,
    tenant_criterion,
)
from kamado.terminal import (
    LOGIN_REFUSED,
    UNAVAILABLE,
    WRONG_CONFIGURATION,
    ask_secret,
    fail,
    print_json,
    say,
    with_options,
)

if TYPE_CHECKING:
    from kamado.amqp.client import AskError, ClientSettings, Reply
    from kamado.config import Config

__all__ = ["CONDITIONS", "ask_app"]

ask_app = typer.Typer(no_args_is_help=True, help="Ask a running registry over AMQP, exactly as an adapter would.")
connection_app = typer.Typer(
    no_args_is_help=True,
    help="Read and write what adapters keep of device connections: last known gateways, and who handles commands.",
)
ask_app.add_typer(connection_app, name="connection")

CONDITIONS = {
    "amqp:unauthorized-access": 403,
    "amqp:resource-limit-exceeded": 403,
    "amqp:internal-error": 500,
    "hono:bad-request": 400,
}
"""What adapters make of AMQP error conditions; of a refused link with another one 404 (amqp-apis 4.3)."""


UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar="KAMADO_ASK_URL",
        help="amqp://HOST:PORT or amqps://HOST:PORT. Default: the listener of the configuration.",
    ),
]
UsernameOption = Annotated[
    str | None,
    typer.Option(
        "--username",
        metavar="NAME",
        envvar="KAMADO_ASK_USERNAME",
        help="Log in as NAME; the password comes from $KAMADO_ASK_PASSWORD or is asked for.",
    ),
]
CredentialsFileOption = Annotated[
    Path | None,
    typer.Option(
        "--credentials-file",
        metavar="FILE",
        help="Lines username= and password=. Default: adapter.credentials beside the database.",
    ),
]
CaFileOption = Annotated[
    Path | None, typer.Option("--ca-file", metavar="FILE", help="CA of the registry's certificate (PEM), for amqps.")
]
CertFileOption = Annotated[
    Path | None, typer.Option("--cert-file", metavar="FILE", help="Client certificate (PEM): log in by SASL EXTERNAL.")
]
KeyFileOption = Annotated[Path | None, typer.Option("--key-file", metavar="FILE", help="Key of --cert-file (PEM).")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Time for everything together.")
]


def _client_settings(
    *,
    url: UrlOption = None,
    username: UsernameOption = None,
    credentials_file: CredentialsFileOption = None,
    ca_file: CaFileOption = None,
    cert_file: CertFileOption = None,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = 5.0,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> "ClientSettings":
    """Work out where to ask and as whom; what is not said comes from the configuration."""
    import ssl

    from kamado.amqp.client import ClientSettings
    from kamado.config import TlsError, load_key_pair

    _check_key_pair(cert_file, key_file)
    settings = load_configuration(config, assignments).config
    own_certificate: Path | None = None
    if url is None:
        secure = settings.amqp.secure_enabled
        listener = settings.amqp.secure if secure else settings.amqp.insecure
        host, port = listener.bind, listener.port
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what is bound to, not what we bind
        own_certificate = settings.amqp.tls.cert_file
    else:
        parts = urlsplit(url)
        try:
            usual = {"amqp": 5672, "amqps": 5671}[parts.scheme]
            port = usual if parts.port is None else parts.port
        except (KeyError, ValueError) as error:
            raise typer.BadParameter("a URL has the form amqp://HOST:PORT or amqps://HOST:PORT") from error
        host, secure = parts.hostname or "127.0.0.1", parts.scheme == "amqps"
    context = None
    if secure:
        # Without --ca-file: the registry of the configuration is known by its very certificate.
        trusted = ca_file or own_certificate
        try:
            context = ssl.create_default_context(cafile=trusted)
        except ssl.SSLError:
            fail(f"{trusted} holds no PEM certificates", WRONG_CONFIGURATION)
        except OSError as error:
            fail(f"{trusted} cannot be read: {error.strerror}", WRONG_CONFIGURATION)
        if ca_file is None and own_certificate is not None:
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.check_hostname = False
        if cert_file is not None:
            try:
                load_key_pair(context, cert_file, key_file or cert_file)
            except TlsError as error:
                fail(str(error), WRONG_CONFIGURATION)
    elif cert_file is not None:
        raise typer.BadParameter("--cert-file needs TLS: --url amqps://HOST:PORT")
    password = None
    if cert_file is None:
        options = "".join(f" {shlex.quote(word)}" for word in own_options(config, assignments))
        username, password = _login(username, credentials_file, settings, options)
    return ClientSettings(
        host=host, port=port, username=username, password=password, ssl_context=context, timeout=timeout
    )


Login = Callable[[], "ClientSettings"]


@ask_app.command("tenant")
@with_options(_client_settings, "login")
def ask_tenant(
    *,
    tenant_id: TenantCriterion = None,
    subject_dn: SubjectDnOption = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Get a tenant, by id or by the name of a CA that it trusts."""
    body = tenant_criterion(tenant_id, subject_dn)
    _ask(login(), "tenant", "get", as_json=as_json, body=body)


@ask_app.command("assert")
@with_options(_client_settings, "login")
def ask_assert(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_id: ViaOption = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Ask whether a device is registered and enabled, and whether a gateway may act for it."""
    properties = {"device_id": device_id} | ({} if gateway_id is None else {"gateway_id": gateway_id})
    _ask(login(), f"registration/{tenant_id}", "assert", as_json=as_json, properties=properties)


@ask_app.command("credentials")
@with_options(_client_settings, "login")
def ask_credentials(
    *,
    tenant_id: TenantArgument,
    type_: TypeArgument,
    auth_id: AuthIdArgument = None,
    certificate: CertificateOption = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Get a device's credentials; with --certificate an unknown device may be provisioned."""
    body = credentials_criterion(type_, auth_id, certificate)
    _ask(login(), f"credentials/{tenant_id}", "get", as_json=as_json, body=body)


GatewayArgument = Annotated[str, typer.Argument(metavar="GATEWAY")]
InstanceArgument = Annotated[
    str, typer.Argument(metavar="INSTANCE", help="Adapter instance id, as the adapter's log shows it.")
]


def _ask_connection(
    settings: "ClientSettings",
    tenant_id: str,
    device_id: str,
    subject: str,
    *,
    as_json: bool,
    body: bytes | None = None,
    **properties: object,
) -> NoReturn:
    _ask(
        settings,
        f"device_con/{tenant_id}",
        subject,
        as_json=as_json,
        body=body,
        properties={"device_id": device_id, **properties},
    )


@connection_app.command("set-gateway")
@with_options(_client_settings, "login")
def ask_connection_set_gateway(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_id: GatewayArgument,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Say through which gateway a device was last heard of."""
    _ask_connection(login(), tenant_id, device_id, "set-last-gw", as_json=as_json, gateway_id=gateway_id)


@connection_app.command("get-gateway")
@with_options(_client_settings, "login")
def ask_connection_get_gateway(
    *, tenant_id: TenantArgument, device_id: DeviceArgument, as_json: JsonOption = False, login: Login
) -> None:
    """Get the gateway through which a device was last heard of."""
    _ask_connection(login(), tenant_id, device_id, "get-last-gw", as_json=as_json)


@connection_app.command("set-instance")
@with_options(_client_settings, "login")
def ask_connection_set_instance(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    instance_id: InstanceArgument,
    lifespan: Annotated[
        int,
        typer.Option(
            "--lifespan", metavar="SECONDS", min=-1, max=2**31 - 1, help="End it after this time; -1 is never."
        ),
    ] = -1,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Say which adapter instance handles a device's commands."""
    from kamado.amqp.codec import Int

    _ask_connection(
        login(),
        tenant_id,
        device_id,
        "set-cmd-handling-adapter-instance",
        as_json=as_json,
        adapter_instance_id=instance_id,
        lifespan=Int(lifespan),
    )


@connection_app.command("remove-instance")
@with_options(_client_settings, "login")
def ask_connection_remove_instance(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    instance_id: InstanceArgument,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Say that an adapter instance no longer handles a device's commands."""
    subject = "remove-cmd-handling-adapter-instance"
    _ask_connection(login(), tenant_id, device_id, subject, as_json=as_json, adapter_instance_id=instance_id)


@connection_app.command("get-instances")
@with_options(_client_settings, "login")
def ask_connection_get_instances(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="GATEWAY...", help="Gateways that may act for the device, as `via` lists them."),
    ] = None,
    as_json: JsonOption = False,
    login: Login,
) -> None:
    """Get the adapter instances that handle a device's commands, itself or through a gateway."""
    subject, body = "get-cmd-handling-adapter-instances", json.dumps({"gateway-ids": gateway_ids or []}).encode()
    _ask_connection(login(), tenant_id, device_id, subject, as_json=as_json, body=body)


def _check_key_pair(cert_file: Path | None, key_file: Path | None) -> None:
    if key_file is not None and cert_file is None:
        raise typer.BadParameter("--cert-file is missing: certificate and key come as a pair")
    if cert_file is None or key_file is not None:
        return
    try:
        has_key = b"PRIVATE KEY" in cert_file.read_bytes()
    except OSError as error:
        fail(f"{cert_file} cannot be read: {error.strerror}", WRONG_CONFIGURATION)
    if not has_key:
        raise typer.BadParameter(f"--key-file is missing: {cert_file} holds no key")


def _login(username: str | None, credentials_file: Path | None, config: "Config", options: str) -> tuple[str, str]:
    """Return name and password; `options` are for a hint what to do about a login that was lost."""
    if username is not None:
        password = os.environ.get("KAMADO_ASK_PASSWORD")
        return username, ask_secret("the variable KAMADO_ASK_PASSWORD") if password is None else password
    path = credentials_file or config.login_dir / "adapter.credentials"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}."
        if credentials_file is None and isinstance(error, FileNotFoundError):
            again = f"{own_command()} identity passwd adapter{options} > {shlex.quote(str(path))}"
            text += f" The first `kamado serve` writes it. If it was lost, make a new password: (umask 077; {again})."
        fail(f"{text} Or name another file with --credentials-file, or log in with --username", WRONG_CONFIGURATION)
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    if not {"username", "password"} <= found.keys():
        fail(f"{path} has no lines username= and password=", WRONG_CONFIGURATION)
    return found["username"], found["password"]


def _ask(
    settings: "ClientSettings",
    address: str,
    subject: str,
    *,
    as_json: bool,
    body: bytes | None = None,
    properties: dict[str, object] | dict[str, str] | None = None,
) -> NoReturn:
    from kamado.amqp.client import AskError, ask

    try:
        reply = asyncio.run(ask(settings, address, subject=subject, application_properties=properties, body=body))
    except AskError as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error), "condition": error.condition}, ensure_ascii=False))
        else:
            say(str(error))
        raise typer.Exit(_failure_status(error)) from error
    _print_reply(reply, as_json=as_json)
    raise typer.Exit(exit_status(reply.status))


def _failure_status(error: "AskError") -> int:
    """What a request without a reply comes to; where an adapter makes a status of it, the same one (amqp-apis 4.3)."""
    from kamado.amqp.client import AuthenticationFailed, LinkRefused, RequestRejected, RequestReleased

    match error:
        case AuthenticationFailed():
            return LOGIN_REFUSED
        case RequestReleased():
            return exit_status(503)
        case LinkRefused() | RequestRejected():
            usual = 404 if isinstance(error, LinkRefused) else 400
            return exit_status(CONDITIONS.get(error.condition or "", usual))
        case _:
            return UNAVAILABLE


def _print_reply(reply: "Reply", *, as_json: bool) -> None:
    payload: object = None
    if reply.payload:
        try:
            payload = json.loads(reply.payload)
        except ValueError:
            payload = reply.payload.decode(errors="replace")
    properties = {name: value for name, value in reply.application_properties.items() if isinstance(value, str | int)}
    if as_json:
        answer = {
            "status": reply.status,
            "cache-control": reply.cache_control,
            "application-properties": properties,
            "payload": payload,
        }
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    from http import HTTPStatus

    try:
        phrase = HTTPStatus(reply.status or 0).phrase
    except ValueError:
        phrase = "no status: an adapter would not accept this reply"
    typer.echo(f"{reply.status} {phrase}")
    if reply.cache_control is not None:
        typer.echo(f"cache_control: {reply.cache_control}")
    for name, value in properties.items():
        if name not in {"status", "cache_control"}:
            typer.echo(f"{name}: {value}")
    if payload is not None:
        print_json(payload)
