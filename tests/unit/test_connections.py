"""What is kept of device connections, and for how long: amqp-apis 12, on a real file."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.unit.sample_store import ADAPTER, Clock

from kamado.connections import (
    Connections,
    ConnectionTransaction,
    DeviceConnection,
    DeviceConnectionService,
    DeviceConnectionSettings,
    Key,
)
from kamado.errors import BadRequest, Forbidden, NotFound, PreconditionFailed, RegistryError, Unavailable
from kamado.storage import open_connections
from kamado.store import DamagedRow

T = TypeVar("T")


class CountedConnections:
    """Real connections, and how often they were written."""

    def __init__(self, inner: Connections) -> None:
        self.inner = inner
        self.writes = 0
        self.reads: list[int] = []
        """How many gateways each read of several was for."""

    def batch(self) -> AbstractContextManager[None]:
        return self.inner.batch()

    async def find_connection(self, tenant_id: str, device_id: str) -> DeviceConnection | None:
        return await self.inner.find_connection(tenant_id, device_id)

    async def find_adapter_instances(
        self, tenant_id: str, device_ids: Sequence[str], now: datetime
    ) -> list[tuple[str, str]]:
        self.reads.append(len(device_ids))
        return await self.inner.find_adapter_instances(tenant_id, device_ids, now)

    async def write(self, work: Callable[[ConnectionTransaction], Awaitable[T]], *, device: Key | None = None) -> T:
        self.writes += 1
        return await self.inner.write(work)

    async def close(self) -> None:
        await self.inner.close()


class Kept:
    """The service, a clock to turn, and a loop to run on."""

    def __init__(self, directory: Path, runner: asyncio.Runner) -> None:
        self.clock = Clock()
        self._runner = runner
        self.connections = CountedConnections(self.run(open_connections(f"sqlite:///{directory / 'registry.db'}")))
        self.service = self.new_service()

    def new_service(self, **settings: Any) -> DeviceConnectionService:
        self.service = DeviceConnectionService(self.connections, DeviceConnectionSettings(**settings), self.clock)
        return self.service

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def later(self, **duration: float) -> None:
        self.clock.now += timedelta(**duration)

    def set_gateway(self, device_id: str, gateway_id: str, tenant_id: str = "acme") -> None:
        self.run(self.service.set_last_gateway(ADAPTER, tenant_id, device_id, gateway_id))

    def gateway(self, device_id: str, tenant_id: str = "acme") -> dict[str, str]:
        answer: dict[str, str] = json.loads(self.run(self.service.get_last_gateway(ADAPTER, tenant_id, device_id)))
        return answer

    def set_instance(
        self, device_id: str, instance_id: str, lifespan: int | None = None, tenant_id: str = "acme"
    ) -> None:
        self.run(self.service.set_adapter_instance(ADAPTER, tenant_id, device_id, instance_id, lifespan))

    def remove_instance(self, device_id: str, instance_id: str, tenant_id: str = "acme") -> None:
        self.run(self.service.remove_adapter_instance(ADAPTER, tenant_id, device_id, instance_id))

    def instances(self, device_id: str, *gateway_ids: str, tenant_id: str = "acme") -> list[tuple[str, str]]:
        """Return pairs of instance and device, as they come; none if the answer is 404."""
        body = json.dumps({"gateway-ids": gateway_ids}).encode()
        try:
            answer = self.run(self.service.get_adapter_instances(ADAPTER, tenant_id, device_id, body))
        except NotFound:
            return []
        entries = json.loads(answer)["adapter-instances"]
        assert entries, "never an empty array"
        assert all(entry.keys() == {"adapter-instance-id", "device-id"} for entry in entries)
        return [(entry["adapter-instance-id"], entry["device-id"]) for entry in entries]

    def entry(self, device_id: str, tenant_id: str = "acme") -> DeviceConnection | None:
        return self.run(self.connections.find_connection(tenant_id, device_id))

    def count(self, tenant_id: str = "acme") -> int:
        return self.run(self.connections.inner.write(lambda transaction: transaction.count_connections(tenant_id)))


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with asyncio.Runner() as runner:
        kept = Kept(tmp_path, runner)
        yield kept
        kept.run(kept.connections.close())


# The last known gateway


def test_the_gateway_is_overwritten(kept: Kept) -> None:
    """Section 12: overwrite, refresh the time; not the first gateway for ever."""
    kept.set_gateway("d2", "gw1")
    assert kept.gateway("d2") == {"gateway-id": "gw1", "last-updated": "2026-03-01T12:00:00Z"}
    kept.later(seconds=1)
    kept.set_gateway("d2", "gw2")
    assert kept.gateway("d2") == {"gateway-id": "gw2", "last-updated": "2026-03-01T12:00:01Z"}


def test_tenants_and_devices_are_kept_apart(kept: Kept) -> None:
    kept.set_gateway("d2", "gw1")
    for tenant_id, device_id in (("acme", "D2"), ("acme", "gw1"), ("Acme", "d2"), ("other", "d2")):
        with pytest.raises(NotFound):
            kept.gateway(device_id, tenant_id)


def test_the_same_gateway_is_written_once_in_the_interval(kept: Kept) -> None:
    for _ in range(6):
        kept.set_gateway("d2", "gw1")
        kept.later(seconds=10)
    assert kept.connections.writes == 1
    kept.set_gateway("d2", "gw1")
    assert kept.connections.writes == 2
    assert kept.gateway("d2")["last-updated"] == "2026-03-01T12:01:00Z"


def test_a_clock_that_was_put_back_leaves_no_time_in_the_future(kept: Kept) -> None:
    kept.set_gateway("d2", "gw1")
    kept.later(days=-1)
    kept.set_gateway("d2", "gw1")
    assert kept.gateway("d2")["last-updated"] == "2026-02-28T12:00:00Z"


def test_without_interval_each_update_is_written(kept: Kept) -> None:
    kept.new_service(refresh_interval=0.0)
    for _ in range(3):
        kept.set_gateway("d2", "gw1")
    assert kept.connections.writes == 3


def test_a_gateway_is_forgotten_28_days_after_it_was_told_and_not_before(kept: Kept) -> None:
    """Section 12: entries may expire after 28 days. The last telling wrote nothing, and counts all the same."""
    kept.set_gateway("d2", "gw1")
    kept.later(seconds=59)
    kept.set_gateway("d2", "gw1")
    assert kept.connections.writes == 1
    kept.later(days=28, seconds=-1)
    assert kept.gateway("d2")["gateway-id"] == "gw1"
    kept.later(seconds=62)
    with pytest.raises(NotFound):
        kept.gateway("d2")
    kept.set_gateway("d2", "gw1")
    assert kept.gateway("d2")["gateway-id"] == "gw1"


def test_updates_sent_at_once_are_done_in_their_order(kept: Kept) -> None:
    """A read that does not see the update before would take the last one for the one that is stored."""

    async def send() -> None:
        updates = [
            kept.service.set_last_gateway(ADAPTER, "acme", "d2", gateway_id) for gateway_id in ("gw1", "gw2", "gw1")
        ]
        await asyncio.gather(*updates)

    kept.set_gateway("d2", "gw1")
    kept.run(send())
    assert kept.gateway("d2")["gateway-id"] == "gw1"
    assert not kept.service._turns


# Adapter instances


def test_the_device_s_own_instance_goes_first(kept: Kept) -> None:
    """Section 12, rule 1."""
    kept.set_instance("d2", "a-d2")
    kept.set_instance("gw1", "a-gw1")
    kept.set_gateway("d2", "gw1")
    assert kept.instances("d2", "gw1") == [("a-d2", "d2")]
    assert kept.instances("d2") == [("a-d2", "d2")]


def test_the_last_known_gateway_goes_before_the_others(kept: Kept) -> None:
    """Rule 2."""
    kept.set_instance("gw1", "a-gw1")
    kept.set_instance("gw2", "a-gw2")
    kept.set_gateway("d2", "gw2")
    assert kept.instances("d2", "gw1", "gw2") == [("a-gw2", "gw2")]


def test_a_last_known_gateway_that_may_not_act_any_more_does_not_count(kept: Kept) -> None:
    """Rule 2: if it is in gateway-ids."""
    kept.set_instance("gw1", "a-gw1")
    kept.set_instance("gw2", "a-gw2")
    kept.set_gateway("d2", "gw2")
    assert kept.instances("d2", "gw1") == [("a-gw1", "gw1")]
    assert kept.instances("d2") == []


def test_a_last_known_gateway_without_instance_does_not_count(kept: Kept) -> None:
    """Rule 2: and has an instance."""
    kept.set_instance("gw1", "a-gw1")
    kept.set_instance("gw3", "a-gw3")
    kept.set_gateway("d2", "gw2")
    assert kept.instances("d2", "gw3", "gw2", "gw1", "gw3") == [("a-gw3", "gw3"), ("a-gw1", "gw1")]


def test_a_last_known_gateway_that_was_forgotten_does_not_count(kept: Kept) -> None:
    kept.set_instance("gw1", "a-gw1")
    kept.set_instance("gw2", "a-gw2")
    kept.set_gateway("d2", "gw2")
    kept.later(days=29)
    assert kept.instances("d2", "gw1", "gw2") == [("a-gw1", "gw1"), ("a-gw2", "gw2")]


def test_nothing_is_found_for_nobody(kept: Kept) -> None:
    """Rule 4."""
    assert kept.instances("d2") == []
    kept.set_instance("gw1", "a-gw1", tenant_id="other")
    assert kept.instances("d2", "gw1", "") == []


@pytest.mark.parametrize("gateways", [500, 501, 1234])
def test_many_gateways_are_looked_up_in_lots(kept: Kept, gateways: int) -> None:
    """Others get their turn in between, and all rules hold all the same."""
    gateway_ids = [f"gw{number}" for number in range(gateways)]
    for gateway_id in (gateway_ids[0], gateway_ids[-1]):
        kept.set_instance(gateway_id, f"a-{gateway_id}")
    found = [(f"a-{gateway_id}", gateway_id) for gateway_id in (gateway_ids[0], gateway_ids[-1])]
    assert kept.instances("d2", *gateway_ids) == found
    assert sum(kept.connections.reads) == gateways
    assert max(kept.connections.reads) <= 500
    kept.set_gateway("d2", gateway_ids[-1])
    assert kept.instances("d2", *gateway_ids) == found[1:]


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        b"{}",
        b"[]",
        b'{"gateway-ids":',
        b'{"gateway-ids":null}',
        b'{"gateway-ids":"gw1"}',
        b'{"gateway-ids":{"gw1":1}}',
        b'{"gateway-ids":["gw1",1]}',
        b'{"gateway-ids":[null]}',
        b'\xef\xbb\xbf{"gateway-ids":[]}',
        b'{"gateway-ids":["\\ud800"]}',
        b'{"gateway-ids":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda body: "none" if body is None else body[:24].decode(errors="replace"),
)
def test_malformed_bodies(kept: Kept, body: bytes | None) -> None:
    """Section 12: 400 no body, no array of strings; section 6: a BOM is malformed."""
    with pytest.raises(BadRequest):
        kept.run(kept.service.get_adapter_instances(ADAPTER, "acme", "d2", body))


@pytest.mark.parametrize("lifespan", [None, -1, -(2**31)])
def test_without_life_span_an_instance_stays(kept: Kept, lifespan: int | None) -> None:
    kept.set_instance("d2", "a1", lifespan)
    kept.later(days=10_000)
    assert kept.instances("d2") == [("a1", "d2")]


@pytest.mark.parametrize("lifespan", [1, 60, 2**31 - 1])
def test_an_instance_ends_with_its_life_span_and_not_before(kept: Kept, lifespan: int) -> None:
    kept.set_instance("d2", "a1", lifespan)
    kept.later(seconds=lifespan, milliseconds=-1)
    assert kept.instances("d2") == [("a1", "d2")]
    kept.later(milliseconds=1)
    assert kept.instances("d2") == []
    assert kept.instances("d3", "d2") == []
    with pytest.raises(NotFound):
        kept.remove_instance("d2", "a1")


def test_a_life_span_of_zero_has_ended_already(kept: Kept) -> None:
    kept.set_instance("d2", "a1", 0)
    assert kept.instances("d2") == []
    assert kept.connections.writes == 0
    kept.set_instance("d2", "a1")
    kept.set_instance("d2", "a2", 0)
    assert kept.instances("d2") == []
    assert kept.entry("d2") is None
    kept.set_gateway("d2", "gw1")
    kept.set_instance("d2", "a1")
    kept.set_instance("d2", "a1", 0)
    assert kept.gateway("d2")["gateway-id"] == "gw1"
    assert kept.instances("d2") == []


def test_a_life_span_begins_anew(kept: Kept) -> None:
    kept.set_instance("d2", "a1", 60)
    kept.later(seconds=59)
    kept.set_instance("d2", "a1", 60)
    kept.later(seconds=59)
    assert kept.instances("d2") == [("a1", "d2")]
    kept.set_instance("d2", "a1", 5)
    kept.later(seconds=5)
    assert kept.instances("d2") == []
    kept.set_instance("d2", "a1", 5)
    kept.set_instance("d2", "a1")
    kept.later(days=1)
    assert kept.instances("d2") == [("a1", "d2")]
    kept.set_instance("d2", "a1", 5)
    kept.later(seconds=5)
    assert kept.instances("d2") == []


def test_an_instance_that_stays_is_written_once(kept: Kept) -> None:
    for lifespan in (None, -1, -7):
        kept.set_instance("d2", "a1", lifespan)
    assert kept.connections.writes == 1
    kept.set_instance("d2", "a2")
    assert kept.connections.writes == 2
    assert kept.instances("d2") == [("a2", "d2")]


def test_an_instance_is_removed_by_its_own_name_only(kept: Kept) -> None:
    """Section 12: 412 entry of another instance, 404 none; removed twice is 204, then 404."""
    with pytest.raises(NotFound):
        kept.remove_instance("gw1", "a1")
    kept.set_instance("gw1", "a1")
    with pytest.raises(PreconditionFailed):
        kept.remove_instance("gw1", "a2")
    assert kept.instances("gw1") == [("a1", "gw1")]
    kept.remove_instance("gw1", "a1")
    with pytest.raises(NotFound):
        kept.remove_instance("gw1", "a1")
    assert kept.entry("gw1") is None
    assert kept.count() == 0


def test_an_expired_instance_is_none_of_another_either(kept: Kept) -> None:
    """Section 12: 404 no entry (or expired)."""
    kept.set_instance("gw1", "a1", 5)
    kept.later(seconds=5)
    for instance_id in ("a1", "a2"):
        with pytest.raises(NotFound):
            kept.remove_instance("gw1", instance_id)


def test_removing_sent_right_behind_setting_finds_it(kept: Kept) -> None:
    async def send() -> None:
        await asyncio.gather(
            kept.service.set_adapter_instance(ADAPTER, "acme", "d2", "a1", None),
            kept.service.remove_adapter_instance(ADAPTER, "acme", "d2", "a1"),
            kept.service.set_adapter_instance(ADAPTER, "acme", "d2", "a2", None),
            kept.service.set_adapter_instance(ADAPTER, "acme", "d2", "a2", 0),
        )

    kept.run(send())
    assert kept.instances("d2") == []
    assert kept.entry("d2") is None


def test_the_gateway_stays_when_the_instance_goes_and_the_other_way_round(kept: Kept) -> None:
    kept.set_gateway("d2", "gw1")
    kept.set_instance("d2", "a1")
    kept.remove_instance("d2", "a1")
    assert kept.gateway("d2")["gateway-id"] == "gw1"
    kept.set_instance("d2", "a1")
    kept.later(days=29)
    assert kept.instances("d2") == [("a1", "d2")]
    with pytest.raises(NotFound):
        kept.gateway("d2")
    kept.remove_instance("d2", "a1")
    assert kept.entry("d2") is None


# Arguments


@pytest.mark.parametrize("bad", ["", "x" * 257, "a\0b"], ids=["empty", "long", "nul"])
def test_what_cannot_be_an_id_is_refused(kept: Kept, bad: str) -> None:
    """Nothing is stored that no device could be called by, and that would have no bound."""
    uses: list[Callable[[], object]] = [
        lambda: kept.set_gateway(bad, "gw1"),
        lambda: kept.set_gateway("d2", bad),
        lambda: kept.gateway(bad),
        lambda: kept.set_instance(bad, "a1"),
        lambda: kept.remove_instance(bad, "a1"),
        lambda: kept.instances(bad),
    ]
    for use in uses:
        with pytest.raises(BadRequest, match="characters"):
            use()
    for use in (lambda: kept.set_instance("d2", bad * 4), lambda: kept.remove_instance("d2", bad * 4)):
        with pytest.raises(BadRequest, match="adapter_instance_id"):
            use()


def test_ids_are_taken_as_they_are(kept: Kept) -> None:
    """Section 12: neither tenants nor devices are checked; instance ids are opaque."""
    for text in ("ä" * 256, "a b/c?\n", "😀", "%_*", 'it\'s "quoted"'):
        kept.set_gateway(text, text)
        assert kept.gateway(text)["gateway-id"] == text
        kept.set_instance(text, text)
        assert kept.instances("d", text) == [(text, text)]
    kept.set_instance("d2", "p" * 1024)
    assert kept.instances("d2") == [("p" * 1024, "d2")]


# Limit


def test_over_the_limit_known_devices_go_on(kept: Kept) -> None:
    """Section 12: 403 for new keys, updates of known keys go on."""
    kept.new_service(max_devices_per_tenant=2)
    kept.set_gateway("d1", "gw1")
    kept.set_instance("d2", "a1")
    uses: list[Callable[[], None]] = [lambda: kept.set_gateway("d3", "gw1"), lambda: kept.set_instance("d3", "a1")]
    for use in uses:
        with pytest.raises(Forbidden):
            use()
    # Either half of an entry that is there, since what is limited is devices.
    kept.set_gateway("d1", "gw2")
    kept.set_gateway("d2", "gw2")
    kept.set_instance("d1", "a2")
    kept.set_gateway("d3", "gw1", tenant_id="other")
    assert (kept.count(), kept.count("other")) == (2, 1)
    assert kept.entry("d3") is None


def test_what_is_removed_makes_room(kept: Kept) -> None:
    kept.new_service(max_devices_per_tenant=1)
    kept.set_instance("d1", "a1")
    kept.remove_instance("d1", "a1")
    kept.set_gateway("d2", "gw1")
    kept.later(days=29)
    with pytest.raises(Forbidden):
        kept.set_gateway("d3", "gw1")
    assert kept.run(kept.service.remove_expired()) == 1
    kept.set_gateway("d3", "gw1")


def test_there_need_not_be_a_limit(kept: Kept) -> None:
    kept.new_service(max_devices_per_tenant=-1)
    for number in range(5):
        kept.set_gateway(f"d{number}", "gw1")
    assert kept.count() == 5


# Removal


def test_removal_takes_what_has_expired_altogether(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kamado.connections._SLICE", 7)
    monkeypatch.setattr("kamado.connections._PAUSE", 0.0)
    for number in range(20):
        kept.set_gateway(f"old-{number:02}", "gw1", tenant_id=f"t{number % 3}")
    kept.set_instance("short", "a1", 60)
    kept.set_instance("short-with-gateway", "a1", 60)
    kept.set_gateway("for-ever", "gw1")
    kept.set_instance("for-ever", "a1")
    kept.later(days=20)
    kept.set_gateway("new", "gw1")
    kept.set_gateway("short-with-gateway", "gw1")
    kept.later(days=9)
    assert kept.run(kept.service.remove_expired()) == 21
    left = ("for-ever", "new", "short-with-gateway")
    assert [kept.entry(device_id) is not None for device_id in (*left, "short")] == [True, True, True, False]
    assert [kept.count(tenant_id) for tenant_id in ("acme", "t0", "t1", "t2")] == [3, 0, 0, 0]
    assert kept.instances("for-ever") == [("a1", "for-ever")]
    assert kept.run(kept.service.remove_expired()) == 0


def test_removal_goes_on_after_a_failure(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept.new_service(removal_interval=0.001)
    kept.set_instance("d1", "a1", 1)
    kept.later(seconds=2)
    failures: list[Exception] = [Unavailable("the database is busy"), DamagedRow("nobody can read it")]
    done = asyncio.Event()

    async def write(work: Callable[[ConnectionTransaction], Awaitable[T]], *, device: Key | None = None) -> T:
        if failures:
            raise failures.pop(0)
        result = await kept.connections.inner.write(work)
        done.set()
        return result

    async def run() -> None:
        task = asyncio.get_running_loop().create_task(kept.service.keep_clean())
        async with asyncio.timeout(60):
            await done.wait()
        assert await kept.connections.find_connection("acme", "d1") is None
        task.cancel()
        await asyncio.wait([task])

    monkeypatch.setattr(kept.connections, "write", write)
    kept.run(run())
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


# Failures


def test_a_write_that_fails_changes_nothing_and_is_told(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    async def write(work: Callable[[ConnectionTransaction], Awaitable[T]], *, device: Key | None = None) -> T:
        raise Unavailable("the disk is full")

    kept.set_gateway("d1", "gw1")
    monkeypatch.setattr(kept.connections, "write", write)
    for _ in range(2):
        with pytest.raises(RegistryError, match="full"):
            kept.set_gateway("d1", "gw2")
    assert not kept.service._turns
    assert kept.gateway("d1")["gateway-id"] == "gw1"
