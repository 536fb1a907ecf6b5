"""What is asked, of a registry (`kamado ask`) or of its database (`kamado explain`), and what an answer comes to."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kamado.errors import BadRequest
from kamado.terminal import INTERNAL, NOT_ALLOWED, OK, REFUSED, UNAVAILABLE, WRONG_DATA, WRONG_REQUEST, fail

__all__ = [
    "AuthIdArgument",
    "CertificateOption",
    "DeviceArgument",
    "SubjectDnOption",
    "TenantArgument",
    "TenantCriterion",
    "TypeArgument",
    "ViaOption",
    "credentials_criterion",
    "exit_status",
    "tenant_criterion",
]

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE")]
TenantCriterion = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Id or alias.")]
SubjectDnOption = Annotated[
    str | None, typer.Option("--subject-dn", metavar="DN", help="Find by the name of a trusted CA (RFC 2253).")
]
ViaOption = Annotated[
    str | None, typer.Option("--via", metavar="GATEWAY", help="The gateway that acts for the device.")
]
TypeArgument = Annotated[str, typer.Argument(metavar="TYPE", help="hashed-password, psk, x509-cert, rpk or your own.")]
AuthIdArgument = Annotated[
    str | None, typer.Argument(metavar="[AUTH_ID]", help="With --certificate it may be left out: the subject.")
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate", metavar="FILE", help="The device's certificate (PEM or DER), as the adapter sends it along."
    ),
]


def tenant_criterion(tenant_id: str | None, subject_dn: str | None) -> bytes:
    if (tenant_id is None) == (subject_dn is None):
        raise typer.BadParameter("name either a TENANT or a --subject-dn")
    return json.dumps({"tenant-id": tenant_id} if subject_dn is None else {"subject-dn": subject_dn}).encode()


def credentials_criterion(type_: str, auth_id: str | None, certificate: Path | None) -> bytes:
    criterion = {"type": type_}
    if certificate is not None:
        der, subject = _read_certificate(certificate)
        auth_id = subject if auth_id is None else auth_id
        from kamado.document import encode_base64

        criterion["client-certificate"] = encode_base64(der)
    if auth_id is None:
        raise typer.BadParameter("name an AUTH_ID, or a --certificate whose subject it is")
    criterion["auth-id"] = auth_id
    return json.dumps(criterion).encode()


def _read_certificate(path: Path) -> tuple[bytes, str]:
    from kamado.x509 import parse_certificate

    try:
        parsed = parse_certificate(path.read_bytes())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", WRONG_DATA)
    except BadRequest as error:
        fail(f"{path} is no X.509 certificate: {error}", WRONG_DATA)
    return parsed.der, parsed.subject.text


def exit_status(status: int | None) -> int:
    match status:
        case 200 | 201 | 204:
            return OK
        case 404:
            return REFUSED
        case 403:
            return NOT_ALLOWED
        case None:
            return INTERNAL
        case _:
            return WRONG_REQUEST if status < 500 else UNAVAILABLE
