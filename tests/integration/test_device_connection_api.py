"""Device Connection API: amqp-apis 14, rows D, and section 12."""

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from proton import Delivery, int32, symbol, uint, ulong
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture
from tests.integration.adapter import Adapter, LinkRefused, Reply
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, new_id, poll
from tests.rows import Section

THE_FILE = pytest.mark.sqlite_only("PostgreSQL has no second file")
ROWS = Section("amqp-apis 14")

SET_GATEWAY = "set-last-gw"
GET_GATEWAY = "get-last-gw"
SET_INSTANCE = "set-cmd-handling-adapter-instance"
REMOVE_INSTANCE = "remove-cmd-handling-adapter-instance"
GET_INSTANCES = "get-cmd-handling-adapter-instances"
SUBJECTS = [SET_GATEWAY, GET_GATEWAY, SET_INSTANCE, REMOVE_INSTANCE, GET_INSTANCES]


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    yield from acme_fixture(databases, tmp_path_factory.mktemp("connections"))


@pytest.fixture(scope="module")
def adapter(acme: Acme) -> Iterator[Adapter]:
    with acme.adapter() as adapter:
        yield adapter


@pytest.fixture
def tenant() -> str:
    """A tenant that nobody has made: none is looked up here."""
    return new_id("t")


def log_in(registry: Registry) -> Adapter:
    return Adapter(registry.amqp_port, registry.username, registry.password)


def ask(
    adapter: Adapter, tenant_id: str, subject: str, device_id: object = None, body: object = None, **more: object
) -> Reply:
    """Send a request; arguments that are None are left out."""
    given = {"device_id": device_id} | more
    properties: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    text = body if body is None or isinstance(body, str | bytes) else json.dumps(body)
    reply = adapter.request(f"device_con/{tenant_id}", subject, properties=properties, body=text)
    assert reply.cache_control is None, "section 8"
    assert reply.tenant_id == tenant_id
    assert reply.status is not None
    if reply.status != 200:
        assert reply.body is None, "section 12: no body on errors, nor with 204"
    return reply


def set_gateway(adapter: Adapter, tenant_id: str, device_id: str, gateway_id: str) -> int | None:
    return ask(adapter, tenant_id, SET_GATEWAY, device_id, gateway_id=gateway_id).status


def get_gateway(adapter: Adapter, tenant_id: str, device_id: str) -> str | None:
    reply = ask(adapter, tenant_id, GET_GATEWAY, device_id)
    if reply.status == 404:
        return None
    payload = reply.json()
    assert payload.keys() == {"gateway-id", "last-updated"}
    updated = datetime.fromisoformat(payload["last-updated"])
    assert timedelta(seconds=-2) < datetime.now(UTC) - updated < timedelta(minutes=2)
    return str(payload["gateway-id"])


def set_instance(
    adapter: Adapter, tenant_id: str, device_id: str, instance_id: str, lifespan: object = None
) -> int | None:
    return ask(adapter, tenant_id, SET_INSTANCE, device_id, adapter_instance_id=instance_id, lifespan=lifespan).status


def remove_instance(adapter: Adapter, tenant_id: str, device_id: str, instance_id: str) -> int | None:
    return ask(adapter, tenant_id, REMOVE_INSTANCE, device_id, adapter_instance_id=instance_id).status


def get_instances(
    adapter: Adapter, tenant_id: str, device_id: str, gateway_ids: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return pairs of instance and device; none for 404."""
    reply = ask(adapter, tenant_id, GET_INSTANCES, device_id, {"gateway-ids": gateway_ids})
    if reply.status == 404:
        return []
    entries = reply.json()["adapter-instances"]
    return [(entry["adapter-instance-id"], entry["device-id"]) for entry in entries]


# The rows


@ROWS.row("D1", "D2")
def test_d1_d2_last_gateway(adapter: Adapter) -> None:
    reply = ask(adapter, "acme", SET_GATEWAY, "d2", gateway_id="gw1")
    assert reply.status == 204
    assert reply.device_id == "d2"
    reply = ask(adapter, "acme", GET_GATEWAY, "d2")
    assert reply.status == 200
    assert reply.device_id == "d2"
    assert reply.json()["gateway-id"] == "gw1"


@ROWS.row("D3")
def test_d3_never_set(adapter: Adapter) -> None:
    assert ask(adapter, "acme", GET_GATEWAY, "d1").status == 404


@ROWS.row("D4")
@pytest.mark.parametrize("gateway_id", [None, int32(5), symbol("gw1"), b"gw1", ""])
def test_d4_no_gateway_id(adapter: Adapter, gateway_id: object) -> None:
    assert ask(adapter, "acme", SET_GATEWAY, "d1", gateway_id=gateway_id).status == 400


@ROWS.row("D5", "D6")
def test_d5_d6_adapter_instance_of_a_gateway(adapter: Adapter) -> None:
    assert set_gateway(adapter, "acme", "d2", "gw1") == 204
    assert set_instance(adapter, "acme", "gw1", "a1") == 204
    reply = ask(adapter, "acme", GET_INSTANCES, "d2", {"gateway-ids": ["gw1", "gw2"]})
    assert reply.status == 200
    assert reply.json() == {"adapter-instances": [{"adapter-instance-id": "a1", "device-id": "gw1"}]}


@ROWS.row("D7")
@pytest.mark.parametrize("body", ["{}", None, "", "[]", '{"gateway-ids":null}', '{"gateway-ids":"gw1"}', '{"gateway'])
def test_d7_no_gateway_ids(adapter: Adapter, body: str | None) -> None:
    assert ask(adapter, "acme", GET_INSTANCES, "d2", body).status == 400


@ROWS.row("D8")
def test_d8_no_instance(adapter: Adapter) -> None:
    assert ask(adapter, "acme", GET_INSTANCES, "d1", {"gateway-ids": []}).status == 404


@ROWS.row("D9", "D10")
def test_d9_d10_remove(adapter: Adapter) -> None:
    assert set_instance(adapter, "acme", "gw1", "a1") == 204
    assert remove_instance(adapter, "acme", "gw1", "a2") == 412
    assert remove_instance(adapter, "acme", "gw1", "a1") == 204
    assert remove_instance(adapter, "acme", "gw1", "a1") == 404


# Section 12


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("device_id", [None, int32(5), symbol("d1")], ids=["none", "int", "symbol"])
def test_every_operation_needs_a_device(adapter: Adapter, subject: str, device_id: object) -> None:
    reply = ask(adapter, "acme", subject, device_id, {"gateway-ids": []}, gateway_id="gw1", adapter_instance_id="a1")
    assert reply.status == 400


@pytest.mark.parametrize("subject", ["get", "Set-last-gw", "set-last-known-gw", "register-command-consumer"])
def test_unknown_subject(adapter: Adapter, subject: str) -> None:
    assert ask(adapter, "acme", subject, "d1", gateway_id="gw1").status == 400


@pytest.mark.parametrize("subject", [SET_INSTANCE, REMOVE_INSTANCE])
@pytest.mark.parametrize("instance_id", [None, int32(5), symbol("a1")], ids=["none", "int", "symbol"])
def test_instance_id_missing(adapter: Adapter, subject: str, instance_id: object) -> None:
    assert ask(adapter, "acme", subject, "d1", adapter_instance_id=instance_id).status == 400


def test_the_last_gateway_is_overwritten(adapter: Adapter, tenant: str) -> None:
    """Not the first one for ever, as in Hono's own; devices and tenants need not exist."""
    for gateway_id in ("gw1", "gw1", "gw2", "d", "gw1"):
        assert set_gateway(adapter, tenant, "d", gateway_id) == 204
        assert get_gateway(adapter, tenant, "d") == gateway_id
    assert get_gateway(adapter, tenant, "other") is None
    assert get_gateway(adapter, tenant.upper(), "d") is None


def test_first_rule_that_yields_something_wins(adapter: Adapter, tenant: str) -> None:
    """Rules 1 to 4, from the last to the first."""
    vias = ["gw1", "gw2", "gw3"]
    assert get_instances(adapter, tenant, "d", vias) == []
    assert set_gateway(adapter, tenant, "d", "gw2") == 204
    assert set_instance(adapter, tenant, "gw1", "a1") == 204
    assert set_instance(adapter, tenant, "gw3", "a3") == 204
    assert get_instances(adapter, tenant, "d", vias) == [("a1", "gw1"), ("a3", "gw3")]
    assert set_instance(adapter, tenant, "gw2", "a2") == 204
    assert get_instances(adapter, tenant, "d", vias) == [("a2", "gw2")]
    assert get_instances(adapter, tenant, "d", ["gw1"]) == [("a1", "gw1")]
    assert set_instance(adapter, tenant, "d", "a0") == 204
    assert get_instances(adapter, tenant, "d", vias) == [("a0", "d")]
    assert get_instances(adapter, tenant, "d") == [("a0", "d")]


def test_setting_twice_is_204_twice_and_the_last_one_counts(adapter: Adapter, tenant: str) -> None:
    for instance_id in ("a1", "a1", "a2"):
        assert set_instance(adapter, tenant, "d", instance_id) == 204
        assert get_instances(adapter, tenant, "d") == [(instance_id, "d")]
    assert remove_instance(adapter, tenant, "d", "a1") == 412


@pytest.mark.parametrize("lifespan", [None, int32(-1), int32(-(2**31)), int32(2**31 - 1)])
def test_life_spans_that_do_not_end(adapter: Adapter, tenant: str, lifespan: object) -> None:
    assert set_instance(adapter, tenant, "d", "a1", lifespan) == 204
    assert get_instances(adapter, tenant, "d") == [("a1", "d")]


def test_a_life_span_ends(adapter: Adapter, tenant: str) -> None:
    began = time.monotonic()
    assert set_instance(adapter, tenant, "d", "a1", int32(4)) == 204
    assert get_instances(adapter, tenant, "d") == [("a1", "d")]
    poll(lambda: get_instances(adapter, tenant, "d") == [], what="the end of the life span")
    assert time.monotonic() - began >= 4.0
    assert remove_instance(adapter, tenant, "d", "a1") == 404


def test_a_life_span_of_zero_has_ended(adapter: Adapter, tenant: str) -> None:
    assert set_instance(adapter, tenant, "d", "a1") == 204
    assert set_instance(adapter, tenant, "d", "a1", int32(0)) == 204
    assert get_instances(adapter, tenant, "d") == []


@pytest.mark.parametrize("lifespan", [5, uint(5), ulong(5), "5", 5.0, True], ids=lambda value: type(value).__name__)
def test_a_life_span_of_another_type_is_refused(adapter: Adapter, tenant: str, lifespan: object) -> None:
    """Taken for absent, as other arguments are, it would be a life without end."""
    assert set_instance(adapter, tenant, "d", "a1", lifespan) == 400
    assert get_instances(adapter, tenant, "d") == []


def test_more_gateways_than_fit_into_one_look(adapter: Adapter, tenant: str) -> None:
    gateway_ids = [f"gateway-{number}" for number in range(3000)]
    for gateway_id in (gateway_ids[0], gateway_ids[-1]):
        assert set_instance(adapter, tenant, gateway_id, f"a-{gateway_id}") == 204
    found = get_instances(adapter, tenant, "d", gateway_ids)
    assert found == [(f"a-{gateway_id}", gateway_id) for gateway_id in (gateway_ids[0], gateway_ids[-1])]


def test_many_requests_at_once(adapter: Adapter, tenant: str) -> None:
    """Section 5.3; all that wait for the same commit are answered, each with its own status."""
    sender, receiver = adapter.links(f"device_con/{tenant}")
    for number in range(100):
        message = adapter.message(
            SET_GATEWAY,
            reply_to=receiver.source.address,
            properties={"device_id": f"d{number % 50}", "gateway_id": f"gw{number}"},
            message_id=f"m{number}",
        )
        adapter.send(sender, message)
    for number in range(100):
        assert adapter.await_reply(f"m{number}").status == 204
    adapter.wait(lambda: sender.credit == 100, "credit back")
    assert [get_gateway(adapter, tenant, f"d{number}") for number in range(50)] == [
        f"gw{number + 50}" for number in range(50)
    ]


# Rights


def test_no_right_to_any_operation(acme: Acme) -> None:
    """Section 12: E on device_con/T:<subject>; like R20."""
    with acme.adapter("links-only") as adapter:
        for subject in SUBJECTS:
            assert ask(adapter, "acme", subject, "d2", {"gateway-ids": []}, gateway_id="gw1").status == 403
        assert ask(adapter, "acme", "fetch", "d2").status == 400


def test_a_right_to_one_operation(acme: Acme, adapter: Adapter) -> None:
    with acme.adapter("sets-gateways") as limited:
        assert set_gateway(limited, "acme", "limited", "gw1") == 204
        for subject in SUBJECTS[1:]:
            reply = ask(limited, "acme", subject, "limited", {"gateway-ids": []}, adapter_instance_id="a1")
            assert reply.status == 403
        assert ask(limited, "other", SET_GATEWAY, "limited", gateway_id="gw1").status == 403
    assert get_gateway(adapter, "acme", "limited") == "gw1"
    assert get_gateway(adapter, "other", "limited") is None
    assert get_instances(adapter, "acme", "limited") == []


def test_no_right_to_the_link(acme: Acme) -> None:
    with acme.adapter("reads-registration") as adapter:
        for attach in (adapter.attach_sender, adapter.attach_receiver):
            with pytest.raises(LinkRefused) as refused:
                attach("device_con/acme/r1")
            assert refused.value.condition == "amqp:unauthorized-access"


def test_an_address_without_tenant(adapter: Adapter) -> None:
    """Section 4.3: the attach is accepted if the rights allow it, and every request then ends in 400."""
    with pytest.raises(LinkRefused) as refused:
        adapter.attach_sender("device_con")
    assert refused.value.condition == "amqp:unauthorized-access"


def test_an_address_without_tenant_of_one_who_may_do_everything(acme: Acme) -> None:
    with acme.adapter("everything") as adapter:
        receiver = adapter.attach_receiver("device_con/acme/r1")
        sender = adapter.attach_sender("device_con")
        message = adapter.message(
            GET_GATEWAY, reply_to=receiver.source.address, properties={"device_id": "d1"}, message_id="m1"
        )
        reply = adapter.exchange(sender, message, "m1")
        assert reply.status == 400
        assert reply.body is None


# Restarts, processes


def fill(adapter: Adapter) -> None:
    assert set_gateway(adapter, "t", "d", "gw1") == 204
    assert set_gateway(adapter, "t", "d", "gw2") == 204
    assert set_instance(adapter, "t", "gw2", "a1", int32(3600)) == 204
    assert set_instance(adapter, "t", "gw3", "a3") == 204
    assert set_instance(adapter, "t", "gw4", "a4") == 204
    assert remove_instance(adapter, "t", "gw4", "a4") == 204


def check(adapter: Adapter) -> None:
    assert get_gateway(adapter, "t", "d") == "gw2"
    assert get_instances(adapter, "t", "d", ["gw2", "gw3"]) == [("a1", "gw2")]
    assert get_instances(adapter, "t", "x", ["gw2", "gw3", "gw4"]) == [("a1", "gw2"), ("a3", "gw3")]


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_a_restart_keeps_everything(new_registry: NewRegistry, killed: bool) -> None:
    registry = new_registry()
    with log_in(registry) as adapter:
        fill(adapter)
        if killed:
            registry.kill()
    registry.stop()
    registry.start()
    with log_in(registry) as adapter:
        check(adapter)


def test_processes_of_one_database_see_each_other_s_entries_at_once(new_registry: NewRegistry) -> None:
    first = new_registry()
    second = new_registry({"storage.url": first.settings["storage.url"]})
    second.data_dir = first.data_dir
    with log_in(first) as one, log_in(second) as two:
        fill(one)
        check(two)
        for number in range(20):
            assert set_gateway(two, "t", "d", f"gw{number}") == 204
            assert get_gateway(one, "t", "d") == f"gw{number}"
            assert set_gateway(one, "t", "d", "gw") == 204
            assert get_gateway(two, "t", "d") == "gw"
        # What the other one has written is not taken for what this one wrote.
        assert set_instance(one, "t", "d", "a1") == 204
        assert remove_instance(two, "t", "d", "a1") == 204
        assert set_instance(one, "t", "d", "a1") == 204
        assert get_instances(two, "t", "d") == [("a1", "d")]


@THE_FILE
def test_registrations_of_the_database_are_not_touched(new_registry: NewRegistry) -> None:
    """The file of device connections is another one, beside the database."""
    registry = new_registry()
    with log_in(registry) as adapter:
        fill(adapter)
    registry.stop()
    path = registry.data_dir / "kamado.connections.db"
    assert path.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM device_connections").fetchall() == [(3,)]
    with closing(sqlite3.connect(registry.database)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert not any("connection" in name for name in tables)


# Limit, switch


def test_over_the_limit_known_devices_go_on(new_registry: NewRegistry) -> None:
    """Section 12: 403 for new keys."""
    registry = new_registry({"device_connection.max_devices_per_tenant": "2"})
    with log_in(registry) as adapter:
        assert set_gateway(adapter, "t", "d1", "gw1") == 204
        assert set_instance(adapter, "t", "d2", "a1") == 204
        assert set_gateway(adapter, "t", "d3", "gw1") == 403
        assert set_instance(adapter, "t", "d3", "a1") == 403
        assert set_gateway(adapter, "t", "d1", "gw2") == 204
        assert set_gateway(adapter, "t", "d2", "gw2") == 204
        assert set_gateway(adapter, "u", "d3", "gw1") == 204
        assert get_gateway(adapter, "t", "d3") is None
        assert remove_instance(adapter, "t", "d2", "a1") == 204
        assert set_gateway(adapter, "t", "d3", "gw1") == 403


def test_the_api_can_be_left_out(new_registry: NewRegistry) -> None:
    registry = new_registry({"device_connection.enabled": "false"})
    with log_in(registry) as adapter:
        for attach in (adapter.attach_sender, adapter.attach_receiver):
            with pytest.raises(LinkRefused) as refused:
                attach("device_con/acme/r1")
            assert refused.value.condition == "amqp:not-found"
    assert not (registry.data_dir / "kamado.connections.db").exists()


# The file


@THE_FILE
def test_a_file_that_cannot_be_used_is_set_aside_and_the_registry_starts(new_registry: NewRegistry) -> None:
    registry = new_registry(start=False)
    path = registry.data_dir / "kamado.connections.db"
    path.write_bytes(b"This is a diary.\n" * 1000)
    registry.start()
    with log_in(registry) as adapter:
        fill(adapter)
        check(adapter)
    assert Path(f"{path}.damaged").read_bytes().startswith(b"This is a diary.")
    assert "their file was set aside" in registry.log.read_text()


@THE_FILE
def test_a_file_that_is_taken_away_is_made_again(new_registry: NewRegistry) -> None:
    registry = new_registry()
    with log_in(registry) as adapter:
        fill(adapter)
        for suffix in ("", "-wal", "-shm"):
            (registry.data_dir / f"kamado.connections.db{suffix}").unlink()
        poll(lambda: set_gateway(adapter, "t", "d", "gw7") == 204, what="a new file")
        assert get_gateway(adapter, "t", "d") == "gw7"
        poll(lambda: get_instances(adapter, "t", "x", ["gw3"]) == [], what="a new file")
        assert registry.health("/readiness").status == 200
    registry.stop()
    registry.start()
    with log_in(registry) as adapter:
        assert get_gateway(adapter, "t", "d") == "gw7"


@THE_FILE
def test_a_directory_in_the_way_keeps_nothing_else_from_working(new_registry: NewRegistry) -> None:
    """503, adapters try again; the other APIs and the start do not suffer."""
    registry = new_registry(start=False)
    path = registry.data_dir / "kamado.connections.db"
    path.mkdir()
    registry.start()
    tenant_id = registry.create_tenant()
    registry.create_device(tenant_id, "d")
    with log_in(registry) as adapter:
        reply = adapter.request(f"registration/{tenant_id}", "assert", properties={"device_id": "d"})
        assert reply.status == 200
        assert set_gateway(adapter, "t", "d", "gw1") == 503
        assert ask(adapter, "t", GET_GATEWAY, "d").status == 503
        assert ask(adapter, "t", GET_INSTANCES, "d", {"gateway-ids": ["gw1"]}).status == 503
        path.rmdir()
        poll(lambda: set_gateway(adapter, "t", "d", "gw1") == 204, what="a new file")
        assert get_gateway(adapter, "t", "d") == "gw1"


@THE_FILE
def test_a_file_that_another_process_keeps_locked_is_503_and_read_all_the_same(new_registry: NewRegistry) -> None:
    registry = new_registry()
    with log_in(registry) as adapter:
        fill(adapter)
        path = registry.data_dir / "kamado.connections.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            # Nothing to write, so nothing to wait for.
            assert set_gateway(adapter, "t", "d", "gw2") == 204
            assert set_gateway(adapter, "t", "d", "gw9") == 503
            check(adapter)
            # Registrations have a lock of their own.
            registry.create_tenant()
            other.execute("ROLLBACK")
        assert set_gateway(adapter, "t", "d", "gw9") == 204


def test_requests_under_way_are_answered_before_the_stop(new_registry: NewRegistry) -> None:
    registry = new_registry()
    with log_in(registry) as adapter:
        sender, receiver = adapter.links("device_con/t")
        for number in range(100):
            message = adapter.message(
                SET_GATEWAY,
                reply_to=receiver.source.address,
                properties={"device_id": f"d{number}", "gateway_id": "gw1"},
                message_id=f"m{number}",
            )
            delivery = adapter.send(sender, message)
        assert adapter.await_disposition(delivery) == Delivery.ACCEPTED
        registry.stop()
    registry.start()
    with log_in(registry) as adapter:
        assert get_gateway(adapter, "t", "d99") == "gw1"
