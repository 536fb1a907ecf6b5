"""Throw-away certification authorities, device and server certificates.

Keys are P-256 unless asked otherwise, since they are made in no time. Names are given as RFC 4514 text
(`CN=device-1,O=Example`, most specific first) or as `cryptography.x509.Name`.
"""

import base64
import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

__all__ = ["Authority", "Issued", "TlsFiles", "make_key", "tls_files"]

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def make_key(algorithm: Literal["EC", "RSA"] = "EC") -> PrivateKey:
    """Make a private key."""
    if algorithm == "RSA":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1())


def _name(name: str | x509.Name) -> x509.Name:
    return x509.Name.from_rfc4514_string(name) if isinstance(name, str) else name


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: PrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def base64(self) -> str:
        """DER in Base64, as `cert` of a trust anchor and `client-certificate` of a request want it."""
        return base64.b64encode(self.der).decode()

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write `NAME.crt` and `NAME.key` (PEM) and return their paths."""
        certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
        certificate.write_bytes(self.pem)
        key.touch(mode=0o600)
        key.write_bytes(self.key_pem)
        return certificate, key


class Authority(Issued):
    """A certification authority: a self-signed certificate that issues others."""

    @classmethod
    def create(
        cls,
        name: str | x509.Name = "CN=Example CA,O=Kamado Tests",
        *,
        algorithm: Literal["EC", "RSA"] = "EC",
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
    ) -> "Authority":
        """Make an authority; valid from an hour ago for a year unless told otherwise."""
        key = make_key(algorithm)
        subject = _name(name)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or _now() - datetime.timedelta(hours=1))
            .not_valid_after(not_after or _now() + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(key, hashes.SHA256())
        )
        return cls(certificate=certificate, key=key)

    def issue(
        self,
        name: str | x509.Name,
        *,
        algorithm: Literal["EC", "RSA"] = "EC",
        key: PrivateKey | None = None,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
        issuer_name: str | x509.Name | None = None,
        server: bool = False,
    ) -> Issued:
        """Issue an end entity's certificate.

        Args:
            name: Its subject.
            algorithm: Of the new key, if none is given.
            key: The subject's key.
            not_before: An hour ago unless given.
            not_after: In 30 days unless given.
            issuer_name: Another issuer than this authority's name, for certificates that lie.
            server: For TLS on 127.0.0.1 and localhost instead of a client.
        """
        key = key or make_key(algorithm)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject if issuer_name is None else _name(issuer_name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or _now() - datetime.timedelta(hours=1))
            .not_valid_after(not_after or _now() + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
        )
        if server:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Issued(certificate=builder.sign(self.key, hashes.SHA256()), key=key)

    def trust_anchor(self, **members: object) -> dict[str, object]:
        """Return an entry of a tenant's `trusted-ca`; underscores in names become hyphens."""
        return {"cert": self.base64} | {name.replace("_", "-"): value for name, value in members.items()}


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """What a registry with TLS and its clients need, as PEM files."""

    ca_file: Path
    """The CA that issued the registry's certificate; clients trust it."""
    cert_file: Path
    key_file: Path
    client_ca_file: Path
    """The CA whose clients may use SASL EXTERNAL."""
    client_ca: Authority

    def client(self, directory: Path, name: str, subject: str) -> tuple[Path, Path]:
        """Issue a client's certificate and return the paths of certificate and key."""
        return self.client_ca.issue(subject).write(directory, name)


def tls_files(directory: Path) -> TlsFiles:
    """Make a server's certificate for 127.0.0.1 and a CA for clients in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    server_ca = Authority.create("CN=Server CA,O=Kamado Tests")
    ca_file, _ = server_ca.write(directory, "server-ca")
    cert_file, key_file = server_ca.issue("CN=localhost,O=Kamado Tests", server=True).write(directory, "server")
    client_ca = Authority.create("CN=Client CA,O=Kamado Tests")
    client_ca_file, _ = client_ca.write(directory, "client-ca")
    return TlsFiles(
        ca_file=ca_file, cert_file=cert_file, key_file=key_file, client_ca_file=client_ca_file, client_ca=client_ca
    )
