"""Device registrations: management 5; rows are those of management 13.3."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_document import JSON

from kamado.devices import CommandEndpoint, Device, device_document, parse_device, stored_device
from kamado.document import JsonObject, decode, encode
from kamado.errors import BadRequest

FREE = st.dictionaries(st.text(max_size=6), JSON, max_size=3)
NAMES = st.lists(st.text(max_size=6), max_size=3).map(tuple)
ENDPOINTS = st.builds(
    CommandEndpoint,
    uri=st.text(min_size=1, max_size=8),
    headers=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
    payload_properties=FREE,
)
MAPPERS = st.none() | st.text(min_size=1, max_size=8)
DEVICES = st.builds(
    Device,
    enabled=st.booleans(),
    ext=FREE,
    defaults=FREE,
    via=NAMES,
    via_groups=NAMES,
    authorities=st.lists(st.text(max_size=6), max_size=3, unique=True).map(tuple),
    downstream_message_mapper=MAPPERS,
    upstream_message_mapper=MAPPERS,
    command_endpoint=st.none() | ENDPOINTS,
)


def test_an_empty_device_is_enabled_and_has_nothing_else() -> None:
    """Management 5.1, 5.5 (D5)."""
    assert parse_device({}) == Device()
    assert device_document(Device()) == {"enabled": True}


def test_every_member_comes_back() -> None:
    document: JsonObject = {
        "enabled": False,
        "ext": {"serial": "A-17", "room": {"floor": 2, "none": None}},
        "defaults": {"content-type": "application/cbor", "ttl": 45},
        "via": ["edge-a", "edge-b", "edge-a"],
        "viaGroups": ["g"],
        "authorities": ["auto-provisioning-enabled"],
        "downstream-message-mapper": "m",
        "upstream-message-mapper": "n",
        "command-endpoint": {
            "uri": "https://example.com/{{deviceId}}",
            "headers": {"a": "b"},
            "payload-properties": {"p": [1, {"q": None}]},
        },
    }
    assert device_document(parse_device(document)) == document


def test_what_is_empty_is_not_written() -> None:
    """Management 5.3, 5.5."""
    device = parse_device(
        {
            "ext": {},
            "defaults": {},
            "via": [],
            "viaGroups": [],
            "memberOf": [],
            "authorities": [],
            "downstream-message-mapper": "",
            "upstream-message-mapper": "",
            "command-endpoint": {"uri": "u", "headers": {}, "payload-properties": {}},
        }
    )
    assert device_document(device) == {"enabled": True, "command-endpoint": {"uri": "u"}}


def test_null_is_the_same_as_left_out() -> None:
    """Management 3.6 (D23)."""
    names = ("enabled", "ext", "defaults", "via", "viaGroups", "memberOf", "authorities")
    mappers = ("downstream-message-mapper", "upstream-message-mapper", "command-endpoint")
    assert parse_device(dict.fromkeys(names + mappers)) == Device()
    assert parse_device({"command-endpoint": {"uri": "u", "headers": None, "payload-properties": None}}) == Device(
        command_endpoint=CommandEndpoint(uri="u")
    )


@pytest.mark.parametrize("value", [None, {}, "x", {"created": "1999-01-01T00:00:00Z"}, 5])
@pytest.mark.row("management-api 13.3", 56)
def test_status_and_device_id_are_dropped(value: object) -> None:
    """Management 3.6 (D6, D41)."""
    assert parse_device({"status": value, "device-id": value}) == Device()


@pytest.mark.parametrize("name", ["via", "viaGroups", "memberOf"])
@pytest.mark.row("management-api 13.3", 59)
def test_one_text_counts_as_an_array(name: str) -> None:
    """Management 3.6, 5.2."""
    assert device_document(parse_device({name: "gw-1"})) == {"enabled": True, name: ["gw-1"]}
    assert device_document(parse_device({name: ["gw-1"]})) == {"enabled": True, name: ["gw-1"]}


def test_scalars_in_arrays_become_texts() -> None:
    """Management 3.6 (D22): tools that render numbers without quotes."""
    assert parse_device({"via": [4712, True], "authorities": [1]}) == Device(via=("4712", "true"), authorities=("1",))
    assert parse_device({"via": 4712}) == Device(via=("4712",))


def test_authorities_are_a_set() -> None:
    """Management 5.1."""
    assert parse_device({"authorities": ["b", "a", "b"]}).authorities == ("b", "a")


def test_headers_are_texts() -> None:
    """Management 5.3."""
    device = parse_device({"command-endpoint": {"uri": "u", "headers": {"n": 1, "b": True, "s": "x"}}})
    assert device.command_endpoint == CommandEndpoint(uri="u", headers={"n": "1", "b": "true", "s": "x"})


def test_headers_are_not_shown() -> None:
    assert "secret" not in repr(parse_device({"command-endpoint": {"uri": "u", "headers": {"auth": "secret"}}}))


@pytest.mark.parametrize(
    ("document", "member"),
    [
        ({"via": ["a"], "memberOf": ["g"]}, "memberOf"),
        ({"viaGroups": ["a"], "memberOf": "g"}, "memberOf"),
        ({"via": {"a": 1}}, "via"),
        ({"via": [None]}, "via[0]"),
        ({"via": ["a", ["b"]]}, "via[1]"),
        ({"memberOf": [{}]}, "memberOf[0]"),
        ({"authorities": "a"}, "authorities"),
        ({"mapper": "m"}, "mapper"),
        ({"unknown": 1}, "unknown"),
        ({"tenant-id": "T1"}, "tenant-id"),
        ({"enabled": "yes"}, "enabled"),
        ({"ext": []}, "ext"),
        ({"defaults": "x"}, "defaults"),
        ({"downstream-message-mapper": {}}, "downstream-message-mapper"),
        ({"upstream-message-mapper": []}, "upstream-message-mapper"),
        ({"command-endpoint": "u"}, "command-endpoint"),
        ({"command-endpoint": {"headers": {"a": "b"}}}, "command-endpoint.uri"),
        ({"command-endpoint": {"uri": None}}, "command-endpoint.uri"),
        ({"command-endpoint": {"uri": "u", "headers": {"a": None}}}, "command-endpoint.headers.a"),
        ({"command-endpoint": {"uri": "u", "headers": {"a": []}}}, "command-endpoint.headers.a"),
        ({"command-endpoint": {"uri": "u", "payload-properties": []}}, "command-endpoint.payload-properties"),
        ({"command-endpoint": {"uri": "u", "method": "PUT"}}, "command-endpoint.method"),
    ],
)
def test_errors_name_the_member(document: JsonObject, member: str) -> None:
    """Row 60; management 5.1 to 5.3."""
    with pytest.raises(BadRequest) as caught:
        parse_device(document)
    assert str(caught.value).startswith(f"{member}: ")


@pytest.mark.parametrize("document", [None, [], "x", 1, True])
def test_a_device_is_an_object(document: object) -> None:
    """Management 3.5."""
    with pytest.raises(BadRequest, match="must be a JSON object"):
        parse_device(document)


@pytest.mark.parametrize("first", ["via", "memberOf"])
def test_empty_arrays_exclude_nothing(first: str) -> None:
    """Management 5.2; rows 61, 62: whatever the order."""
    members: JsonObject = {"memberOf": ["g"], "via": [], "viaGroups": []}
    ordered = {first: members[first], **members}
    assert device_document(parse_device(ordered)) == {"enabled": True, "memberOf": ["g"]}
    assert parse_device({"via": ["a"], "viaGroups": ["g"]}) == Device(via=("a",), via_groups=("g",))


def test_numbers_of_ext_keep_their_kind() -> None:
    """Row 64."""
    ext = {"n": 1, "f": 1.5, "z": None, "l": [True], "whole": 1.0, "huge": 10**40}
    written = decode(encode(device_document(parse_device({"ext": ext}))))
    assert isinstance(written, dict)
    assert repr(written["ext"]) == repr(ext)


@given(DEVICES, st.booleans())
def test_what_is_written_is_read_back(device: Device, is_member: bool) -> None:
    if is_member:
        device = replace(device, via=(), via_groups=(), member_of=("g", ""))
    document = device_document(device)
    assert stored_device(document) == device
    assert parse_device(document) == device
    text = decode(encode(document))
    assert isinstance(text, dict)
    assert stored_device(text) == device


MEMBERS = st.sampled_from(
    ["enabled", "ext", "via", "viaGroups", "memberOf", "authorities", "command-endpoint", "upstream-message-mapper"]
)


@given(JSON | st.dictionaries(MEMBERS, JSON | st.dictionaries(st.sampled_from(["uri", "headers"]), JSON)))
def test_any_value_is_a_device_or_a_bad_request(document: object) -> None:
    with suppress(BadRequest):
        device = parse_device(document)
        assert parse_device(device_document(device)) == device


def test_what_was_stored_without_enabled_is_enabled() -> None:
    """Configuration 2.1: absent means enabled."""
    assert stored_device({}) == Device()
