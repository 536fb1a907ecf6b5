"""Distinguished names, device certificates, trust anchors and ID templates."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

__all__ = [
    "Certificate",
    "DistinguishedName",
    "IdTemplate",
    "TrustAnchor",
    "VerifiedCertificate",
    "check_public_key",
    "parse_certificate",
    "verify",
]


@dataclass(frozen=True, slots=True, eq=False)
class DistinguishedName:
    """An X.500 name. `==` and `hash` go by `text`; whether two names are the same name is asked of `equals`."""

    text: str
    """Java's RFC 2253 form, byte for byte (provisioning 7.1-7.3)."""
    canonical_key: str
    """Equal for names that are equal by rules 1-5 of provisioning 7.6."""
    der: bytes
    """The encoded Name."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a name from its text (provisioning 7.4).

        Raises:
            BadRequest: The text is no distinguished name.
        """
        raise NotImplementedError

    @classmethod
    def from_der(cls, der: bytes) -> Self:
        """Read a name from its DER encoding.

        Raises:
            BadRequest: The bytes are not exactly one encoded Name.
        """
        raise NotImplementedError

    def equals(self, other: "DistinguishedName") -> bool:
        """Tell whether both are the same name (provisioning 7.6, all six rules)."""
        raise NotImplementedError

    def values(self, keyword: str) -> list[str]:
        """Return the unescaped text values of an attribute, in the order of `text`; values in hex form are left out."""
        raise NotImplementedError

    @property
    def first_rdn_common_name(self) -> str | None:
        """The CN of the first RDN of `text` (authentication 4.3)."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the registry needs to know of an X.509 certificate."""

    subject: DistinguishedName
    issuer: DistinguishedName
    not_before: datetime
    not_after: datetime
    public_key: bytes
    """DER SubjectPublicKeyInfo."""
    algorithm: str
    """Key algorithm as Java names it: RSA, EC, DSA, EdDSA ...; a dotted OID if there is no name."""
    der: bytes


def parse_certificate(data: bytes) -> Certificate:
    """Read one certificate, DER or PEM.

    Raises:
        BadRequest: The bytes are no X.509 certificate.
    """
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class IdTemplate:
    """A template for an auth-id or a device id (management 4.6; provisioning 3.3, 3.4)."""

    text: str

    @classmethod
    def parse(cls, text: str, member: str) -> Self:
        """Check a template.

        Raises:
            BadRequest: It has no placeholder or one that is not known.
        """
        raise NotImplementedError

    def fill(self, subject: DistinguishedName) -> str:
        """Insert the subject's values.

        Raises:
            BadRequest: The subject lacks an attribute (reason `TEMPLATE_NOT_FILLED`).
        """
        raise NotImplementedError

    def adapter_fill(self, subject: DistinguishedName) -> str | None:
        """Return what a stock adapter makes of the template, `None` if it fails (provisioning 3.3)."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustAnchor:
    """A CA that a tenant trusts: an entry of `trusted-ca` (management 4.5)."""

    id: str
    subject: DistinguishedName
    subject_dn_bytes: bytes | None = None
    public_key: bytes
    """DER SubjectPublicKeyInfo."""
    algorithm: str | None = None
    not_before: datetime
    not_after: datetime
    auto_provisioning_enabled: bool = False
    auto_provision_as_gateway: bool = False
    device_id_template: IdTemplate | None = None
    auth_id_template: IdTemplate | None = None
    ocsp_revocation_enabled: bool = False
    ocsp_responder_uri: str | None = None
    ocsp_responder_cert: str | None = None
    """Base64, as it was given."""
    ocsp_nonce_enabled: bool = False

    def is_valid_at(self, now: datetime) -> bool:
        """Tell whether `now` lies in the CA's validity period, both ends included."""
        return self.not_before <= now <= self.not_after


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate that a trust anchor of the tenant vouches for. Only `verify` makes one."""

    certificate: Certificate
    anchor: TrustAnchor


def verify(
    certificate: Certificate, anchors: Sequence[TrustAnchor], now: datetime, *, check_signature: bool
) -> VerifiedCertificate:
    """Check a device certificate against a tenant's trust anchors (provisioning 3.2, rows 8-10).

    Raises:
        NotFound: It is not to be trusted; the reason says why.
    """
    raise NotImplementedError


def check_public_key(der: bytes, algorithm: str, member: str) -> None:
    """Check that the bytes are a public key of that algorithm (management 4.5, 6.6).

    Raises:
        BadRequest: Unknown algorithm, or not a key of it.
    """
    raise NotImplementedError
