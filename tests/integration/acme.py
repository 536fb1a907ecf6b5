"""The fixture of amqp-apis 14 in a real registry, and callers with various rights.

Each test file makes it for itself with `acme_fixture`, so that tenant names, aliases and trust anchors can be the ones
of the specification.
"""

import datetime
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.databases import Databases
from tests.integration.adapter import Adapter, ClientTls, Reply
from tests.integration.certificates import Authority, Issued
from tests.integration.registry import Registry

__all__ = ["Acme", "acme_fixture", "credentials_request", "get_credentials", "permissions"]

ADAPTER_GRANTS: list[dict[str, Any]] = [
    {"resource": "tenant", "activities": ["READ", "WRITE"]},
    {"operation": "tenant/*:*", "activities": ["EXECUTE"]},
    {"resource": "registration/*", "activities": ["READ", "WRITE"]},
    {"operation": "registration/*:assert", "activities": ["EXECUTE"]},
    {"resource": "credentials/*", "activities": ["READ", "WRITE"]},
    {"operation": "credentials/*:get", "activities": ["EXECUTE"]},
    {"resource": "device_con/*", "activities": ["READ", "WRITE"]},
    {"operation": "device_con/*:*", "activities": ["EXECUTE"]},
]
LINKS: list[dict[str, Any]] = [
    {"resource": "tenant", "activities": ["READ", "WRITE"]},
    {"resource": "registration/*", "activities": ["READ", "WRITE"]},
    {"resource": "credentials/*", "activities": ["READ", "WRITE"]},
    {"resource": "device_con/*", "activities": ["READ", "WRITE"]},
]
ROLES: dict[str, list[dict[str, Any]]] = {
    "protocol-adapter": ADAPTER_GRANTS,
    "nothing": [],
    # T19, T20
    "other-tenant": [*LINKS, {"operation": "tenant/other:*"}],
    # R20; authentication 6, row 19
    "links-only": LINKS,
    # authentication 6, row 15
    "reads-registration": [{"resource": "registration/*", "activities": ["READ"]}],
    # authentication 6, row 16
    "search-goes-on": [
        {"resource": "registration/acme", "activities": ["READ"]},
        {"resource": "registration/*", "activities": ["WRITE"]},
    ],
    # authentication 6, row 17
    "asserts-acme": [*LINKS, {"operation": "registration/acme:assert"}],
    # amqp-apis 12: a right to each operation
    "sets-gateways": [*LINKS, {"operation": "device_con/acme:set-last-gw"}],
    # authentication 6, row 18
    "everything": [{"resource": "*", "activities": ["READ", "WRITE"]}, {"operation": "*:*"}],
    # amqp-apis 9.2: grants that cover every tenant
    "all-tenants-bare": [*LINKS, {"operation": "tenant:*"}],
}
PASSWORD = "adapter-secret"


def permissions(more: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return a permissions file with a user of each role, all with the same password, and more users."""
    users: dict[str, object] = {
        role: {"mechanism": "PLAIN", "password": PASSWORD, "authorities": ["hono-component", role]} for role in ROLES
    }
    return {"roles": ROLES, "users": users | dict(more or {})}


@dataclass(frozen=True)
class Acme:
    """A running registry with the fixture, and its CAs."""

    registry: Registry
    ca: Authority
    """Trusted by `acme`, provisions."""
    passive_ca: Authority
    """Trusted by `acme`, does not provision."""

    def adapter(self, user: str = "protocol-adapter", *, tls: bool = False, **options: Any) -> Adapter:
        """Log in as a user of `ROLES`."""
        if not tls:
            return Adapter(self.registry.amqp_port, user, PASSWORD, **options)
        return Adapter(self.registry.amqps_port, user, PASSWORD, tls=self.client_tls(), **options)

    def client_tls(self, **options: Any) -> ClientTls:
        """What a TLS client needs."""
        assert self.registry.tls is not None
        return ClientTls(ca_file=self.registry.tls.ca_file, **options)

    def new_device(self, ca: Authority | None = None) -> tuple[str, Issued]:
        """Return the subject DN and the certificate of a device that nobody has seen."""
        name = f"CN=pump-{uuid.uuid4().hex[:12]},OU=Plant 7,O=Acme"
        return name, (ca or self.ca).issue(name)


def credentials_request(auth_id: str, type_: str = "x509-cert", **context: object) -> str:
    """Return the body of a credentials request; underscores in names become hyphens."""
    members = {name.replace("_", "-"): value for name, value in context.items()}
    return json.dumps({"type": type_, "auth-id": auth_id} | members)


def get_credentials(adapter: Adapter, auth_id: str, type_: str = "x509-cert", **context: object) -> Reply:
    """Ask for credentials of `acme`."""
    return adapter.request("credentials/acme", "get", body=credentials_request(auth_id, type_, **context))


def _yesterday() -> str:
    instant = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")


def _fill(registry: Registry, ca: Authority, passive_ca: Authority) -> None:
    registry.create_tenant(
        "acme",
        {
            "alias": "plant7",
            "trusted-ca": [ca.trust_anchor(auto_provisioning_enabled=True), passive_ca.trust_anchor()],
        },
    )
    registry.create_tenant("off", {"enabled": False})
    registry.create_tenant("other")
    shared = Authority.create("CN=Shared,O=Acme")
    for tenant_id in ("s1", "s2"):
        registry.create_tenant(tenant_id, {"trust-anchor-group": "shared", "trusted-ca": [shared.trust_anchor()]})
    devices: dict[str, object] = {
        "d1": {},
        "d2": {"via": ["gw1"]},
        "d3": {"viaGroups": ["hall"]},
        "d4": {"enabled": False},
        "d5": {"via": ["gw3"]},
        "gw1": {},
        "gw2": {"memberOf": ["hall"]},
        "gw3": {"enabled": False},
        "gw4": {"memberOf": ["hall"], "authorities": ["auto-provisioning-enabled"]},
    }
    for device_id, document in devices.items():
        registry.create_device("acme", device_id, document)
    password = {"pwd-plain": "secret"}
    registry.set_credentials(
        "acme",
        "d1",
        [
            {"type": "hashed-password", "auth-id": "sensor1", "secrets": [password]},
            {"type": "psk", "auth-id": "psk1", "secrets": [{"key": "c2VjcmV0"}]},
            {"type": "x509-cert", "auth-id": "CN=dev 1,O=Acme", "secrets": [{}]},
            {"type": "hashed-password", "auth-id": "old", "secrets": [password | {"not-after": _yesterday()}]},
            {
                "type": "hashed-password",
                "auth-id": "mix",
                "secrets": [
                    password | {"enabled": False, "comment": "disabled"},
                    password | {"not-after": _yesterday(), "comment": "expired"},
                    password | {"comment": "good"},
                ],
            },
            {"type": "hashed-password", "auth-id": "dis", "enabled": False, "secrets": [password]},
            {"type": "hashed-password", "auth-id": "ctx", "ext": {"client-id": "a"}, "secrets": [password]},
        ],
    )
    registry.create_device("off", "d1", {})
    registry.set_credentials("off", "d1", [{"type": "hashed-password", "auth-id": "sensor1", "secrets": [password]}])


def acme_fixture(
    databases: Databases,
    directory: Path,
    users: Mapping[str, object] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Acme]:
    """Run a registry with the fixture.

    Args:
        databases: Where its database comes from.
        directory: For its files.
        users: More users of the permissions file.
        settings: More settings.
    """
    ca = Authority.create("CN=Device CA,OU=Plant 7,O=Acme")
    passive_ca = Authority.create("CN=Passive CA,O=Acme")
    file = directory / "permissions.json"
    file.write_text(json.dumps(permissions(users)))
    url = databases.create(directory / "data")
    settings = {"auth.permissions_file": str(file)} | dict(settings or {})
    with Registry(directory, settings, tls=True, url=url) as registry:
        _fill(registry, ca, passive_ca)
        yield Acme(registry=registry, ca=ca, passive_ca=passive_ca)
