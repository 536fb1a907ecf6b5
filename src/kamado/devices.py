"""A device registration: what an operator may say of a device, checked (management 5).

Pure: no storage, no clock. Versions, times and flags (`status` on the wire) belong to whoever stores a device.
"""

from dataclasses import dataclass, field

from kamado.document import JsonObject, Members
from kamado.errors import BadRequest

__all__ = ["CommandEndpoint", "Device", "device_document", "parse_device", "stored_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEndpoint:
    """Where commands for a device are sent to (management 5.3)."""

    uri: str
    """May hold `{{deviceId}}`; not checked."""
    headers: dict[str, str] = field(default_factory=dict)
    payload_properties: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device registration (management 5.1)."""

    enabled: bool = True
    ext: JsonObject = field(default_factory=dict)
    defaults: JsonObject = field(default_factory=dict)
    via: tuple[str, ...] = ()
    """Devices that may act for this one."""
    via_groups: tuple[str, ...] = ()
    """Groups of devices that may act for this one."""
    member_of: tuple[str, ...] = ()
    """Groups that this device, a gateway, belongs to."""
    authorities: tuple[str, ...] = ()
    downstream_message_mapper: str | None = None
    upstream_message_mapper: str | None = None
    command_endpoint: CommandEndpoint | None = None


def parse_device(document: object) -> Device:
    """Read a device from the JSON value of a request.

    Raises:
        BadRequest: It breaks a rule of management 5; the text names the member.
    """
    members = Members(document, kind="device")
    # Management 3.6: a body obtained by GET can be sent back, and the path decides the id.
    members.drop("status", "device-id")
    device = Device(
        enabled=members.boolean("enabled") is not False,
        ext=members.free("ext"),
        defaults=members.free("defaults"),
        via=members.strings("via", single=True),
        via_groups=members.strings("viaGroups", single=True),
        member_of=members.strings("memberOf", single=True),
        # A set: duplicates collapse.
        authorities=tuple(dict.fromkeys(members.strings("authorities"))),
        downstream_message_mapper=members.string("downstream-message-mapper"),
        upstream_message_mapper=members.string("upstream-message-mapper"),
        command_endpoint=_parse_command_endpoint(members.nested("command-endpoint")),
    )
    members.finish()
    if device.member_of and (device.via or device.via_groups):
        raise BadRequest("memberOf: must not be combined with via or viaGroups: a gateway is not behind a gateway")
    return device


def _parse_command_endpoint(members: Members | None) -> CommandEndpoint | None:
    if members is None:
        return None
    uri = members.string("uri")
    if uri is None:
        raise BadRequest(f"{members.path('uri')}: is required")
    headers = Members(members.free("headers"), members.path("headers"))
    endpoint = CommandEndpoint(
        uri=uri,
        headers={name: value for name in headers.names() if (value := headers.string(name)) is not None},
        payload_properties=members.free("payload-properties"),
    )
    members.finish()
    return endpoint


def device_document(device: Device) -> JsonObject:
    """Return the read representation without `status` (management 5.5); it is also what is stored."""
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
    endpoint = device.command_endpoint
    if endpoint is not None:
        described: JsonObject = {"uri": endpoint.uri}
        if endpoint.headers:
            described["headers"] = endpoint.headers
        if endpoint.payload_properties:
            described["payload-properties"] = endpoint.payload_properties
        document["command-endpoint"] = described
    return document


def stored_device(document: JsonObject) -> Device:
    """Return the device that `device_document` described."""
    return parse_device(document)
