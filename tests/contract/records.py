"""Tenants, devices and credentials for tests of storage, made by the parsers that make them in the product."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kamado.credentials import Credential, CredentialRules, merge, parse_credentials
from kamado.devices import parse_device
from kamado.document import Identifiers, new_id
from kamado.store import StoredCredentials, StoredDevice, StoredTenant
from kamado.tenants import Tenant, parse_tenant
from kamado.x509 import DistinguishedName

__all__ = [
    "CREATED",
    "UPDATED",
    "credential",
    "stored_credentials",
    "stored_device",
    "stored_tenant",
    "tenant_with_names",
]

CREATED = datetime(2024, 5, 2, 8, 0, 0, 123456, tzinfo=UTC)
UPDATED = datetime(2025, 1, 31, 23, 59, 59, 999999, tzinfo=UTC)


@cache
def _public_key() -> str:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return base64.b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def tenant_with_names(*names: str | bytes, group: str | None = None, **members: object) -> Tenant:
    """Make a tenant with a trust anchor for each name, which is a text or an encoded name."""
    document: dict[str, object] = {
        **members,
        "trusted-ca": [
            {
                "subject-dn": name if isinstance(name, str) else DistinguishedName.from_der(name).text,
                "public-key": _public_key(),
                "algorithm": "EC",
                "not-before": "2020-01-01T00:00:00Z",
                "not-after": "2040-01-01T00:00:00Z",
            }
            for name in names
        ],
    }
    if group is not None:
        document["trust-anchor-group"] = group
    tenant = parse_tenant(document)
    anchors = tuple(
        anchor if isinstance(name, str) else replace(anchor, subject=DistinguishedName.from_der(name))
        for anchor, name in zip(tenant.trust_anchors, names, strict=True)
    )
    return replace(tenant, trust_anchors=anchors)


def stored_tenant(tenant_id: str, tenant: Tenant | Mapping[str, object] | None = None) -> StoredTenant:
    if not isinstance(tenant, Tenant):
        tenant = parse_tenant(dict(tenant or {}))
    return StoredTenant(tenant_id=tenant_id, version=new_id(), created=CREATED, tenant=tenant)


def stored_device(tenant_id: str, device_id: str, document: Mapping[str, object] | None = None) -> StoredDevice:
    return StoredDevice(
        tenant_id=tenant_id,
        device_id=device_id,
        version=new_id(),
        created=CREATED,
        device=parse_device(dict(document or {})),
    )


def credential(type_: str, auth_id: str, **members: object) -> Credential:
    """Make a credential; of type psk or custom."""
    document = {"type": type_, "auth-id": auth_id, "secrets": [{"key": "dGVhLXBvdC00Mg=="}], **members}
    updates = parse_credentials(
        [document], rules=CredentialRules(identifiers=Identifiers()), trust_anchors=(), now=CREATED
    )
    (made,) = merge((), updates)
    return made


def stored_credentials(tenant_id: str, device_id: str, credentials: Sequence[Credential] = ()) -> StoredCredentials:
    return StoredCredentials(tenant_id=tenant_id, device_id=device_id, version=new_id(), credentials=tuple(credentials))
