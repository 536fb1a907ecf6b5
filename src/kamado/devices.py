"""Device registrations: parse, check, serialise. A `Device` that exists keeps the rules of management 5.

Pure: knows neither storage nor time. The `status` of a device is not part of it; the registry keeps that itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from kamado.document import JsonObject, Members
from kamado.errors import BadRequest

__all__ = ["CommandEndpoint", "Device", "device_document", "parse_device", "stored_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEndpoint:
    """Where a protocol adapter sends commands for the device (management 5.3)."""

    uri: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """May hold an authorization."""
    payload_properties: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device registration (management 5.1)."""

    enabled: bool = True
    ext: JsonObject = field(default_factory=dict)
    defaults: JsonObject = field(default_factory=dict)
    via: tuple[str, ...] = ()
    """Device ids of the gateways that may act for this device."""
    via_groups: tuple[str, ...] = ()
    member_of: tuple[str, ...] = ()
    """Groups that this gateway belongs to."""
    authorities: tuple[str, ...] = ()
    """Each once."""
    downstream_message_mapper: str | None = None
    upstream_message_mapper: str | None = None
    command_endpoint: CommandEndpoint | None = None


def parse_device(document: object) -> Device:
    """Read a device from the JSON value of a request (management 5.1 to 5.3).

    Raises:
        BadRequest: A member is unknown or against its rule.
    """
    members = Members(document)
    members.drop("device-id", "status")
    enabled = members.boolean("enabled")
    device = Device(
        enabled=True if enabled is None else enabled,
        ext=members.object("ext"),
        defaults=members.object("defaults"),
        via=members.strings("via", or_single=True),
        via_groups=members.strings("viaGroups", or_single=True),
        member_of=members.strings("memberOf", or_single=True),
        authorities=tuple(dict.fromkeys(members.strings("authorities"))),
        downstream_message_mapper=members.string("downstream-message-mapper") or None,
        upstream_message_mapper=members.string("upstream-message-mapper") or None,
        command_endpoint=_parse_command_endpoint(members.members("command-endpoint")),
    )
    members.finish()
    if device.member_of and (device.via or device.via_groups):
        raise BadRequest("memberOf: a member of gateway groups cannot have a gateway itself (via, viaGroups)")
    return device


def _parse_command_endpoint(members: Members | None) -> CommandEndpoint | None:
    if members is None:
        return None
    endpoint = CommandEndpoint(
        uri=members.required_string("uri"),
        headers=members.string_map("headers"),
        payload_properties=members.object("payload-properties"),
    )
    members.finish()
    return endpoint


def device_document(device: Device) -> JsonObject:
    """Write a device as `GET` shows it, without `status` (management 5.5). This is what is stored, too."""
    document: JsonObject = {"enabled": device.enabled}
    for name, value in (
        ("ext", device.ext),
        ("defaults", device.defaults),
        ("via", list(device.via)),
        ("viaGroups", list(device.via_groups)),
        ("memberOf", list(device.member_of)),
        ("authorities", list(device.authorities)),
    ):
        if value:
            document[name] = value
    if device.downstream_message_mapper is not None:
        document["downstream-message-mapper"] = device.downstream_message_mapper
    if device.upstream_message_mapper is not None:
        document["upstream-message-mapper"] = device.upstream_message_mapper
    if device.command_endpoint is not None:
        endpoint: JsonObject = {"uri": device.command_endpoint.uri}
        if device.command_endpoint.headers:
            endpoint["headers"] = device.command_endpoint.headers
        if device.command_endpoint.payload_properties:
            endpoint["payload-properties"] = device.command_endpoint.payload_properties
        document["command-endpoint"] = endpoint
    return document


def stored_device(document: JsonObject) -> Device:
    """Read a device back from `device_document`; checks nothing."""
    members = cast(dict[str, Any], document)
    endpoint = members.get("command-endpoint")
    return Device(
        enabled=members.get("enabled", True),
        ext=members.get("ext", {}),
        defaults=members.get("defaults", {}),
        via=_strings(members.get("via")),
        via_groups=_strings(members.get("viaGroups")),
        member_of=_strings(members.get("memberOf")),
        authorities=_strings(members.get("authorities")),
        downstream_message_mapper=members.get("downstream-message-mapper"),
        upstream_message_mapper=members.get("upstream-message-mapper"),
        command_endpoint=None
        if endpoint is None
        else CommandEndpoint(
            uri=endpoint["uri"],
            headers=endpoint.get("headers", {}),
            payload_properties=endpoint.get("payload-properties", {}),
        ),
    )


def _strings(values: Sequence[str] | None) -> tuple[str, ...]:
    return () if values is None else tuple(values)
