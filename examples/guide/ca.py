"""The example's certification authority.

    ca.py prepare          make the CA and the tenant FACTORY that trusts it (once; `make serve` does it)
    ca.py device NAME      make a certificate for a device, CN=NAME,O=Example Factory

Everything goes to `var/guide/` of the project. A real CA keeps its key elsewhere.
"""

import argparse
import base64
import datetime
import json
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DIRECTORY = Path(__file__).resolve().parents[2] / "var" / "guide"
TENANT = "FACTORY"


def distinguished_name(common_name: str) -> x509.Name:
    """Build the name that RFC 2253 writes as CN=...,O=Example Factory."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Factory"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    """Sign a certificate; subject and issuer are equal for the CA's own."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(distinguished_name(subject))
        .issuer_name(distinguished_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key so that only its owner can read it."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def prepare() -> None:
    """Make the CA and the file of the tenant, unless they are there."""
    tenant_file = DIRECTORY / "factory.json"
    if tenant_file.exists():
        return
    DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    ca = certificate("Example CA", key, "Example CA", key, days=3650)
    write_key(DIRECTORY / "ca.key", key)
    (DIRECTORY / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    anchor = {
        "cert": base64.b64encode(ca.public_bytes(serialization.Encoding.DER)).decode(),
        "auto-provisioning-enabled": True,
        "auto-provisioning-device-id-template": "{{subject-cn}}",
    }
    # Written last: while it is absent, the next start begins again.
    tenant_file.write_text(json.dumps([{"tenant-id": TENANT, "enabled": True, "trusted-ca": [anchor]}], indent=2))


def make_device(name: str) -> Path:
    """Make a device's key and certificate; return the path of the certificate."""
    ca_key = serialization.load_pem_private_key((DIRECTORY / "ca.key").read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    path = DIRECTORY / f"{name}.crt"
    write_key(path.with_suffix(".key"), key)
    made = certificate(name, key, "Example CA", ca_key, days=365)
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="make the CA and its tenant, unless they are there")
    device = commands.add_parser("device", help="make a certificate for a device")
    device.add_argument("name", help="common name, letters, digits and hyphens")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare()
    elif not (DIRECTORY / "ca.key").exists():
        parser.exit(1, "There is no CA yet: start the registry with `make serve` first.\n")
    elif not arguments.name.replace("-", "").isalnum():
        parser.error("a name consists of letters, digits and hyphens")
    else:
        print(os.path.relpath(make_device(arguments.name)))


if __name__ == "__main__":
    main()
