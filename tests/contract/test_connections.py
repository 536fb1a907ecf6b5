"""What every engine behind `Connections` promises. The tests know none of them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.databases import Databases

from kamado.connections import Connections, ConnectionTransaction, DeviceConnection
from kamado.errors import Forbidden, Unavailable
from kamado.storage import StoreSettings, open_connections

NOW = datetime(2026, 1, 31, 8, 15, 30, 123456, tzinfo=UTC)
LATER = NOW + timedelta(microseconds=1)


class Engine:
    """A database of a test's own."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> Connections:
        """Open it, once more each time; nothing is refused because the machine is busy."""
        return await open_connections(self._url, StoreSettings(statement_timeout=20, acquire_timeout=20))


@pytest.fixture
def engine(databases: Databases, tmp_path: Path) -> Iterator[Engine]:
    url = databases.create(tmp_path)
    yield Engine(url)
    databases.drop(url)


def with_two(test: Callable[[Connections, Connections], Awaitable[None]]) -> Callable[[Engine], None]:
    """Make a coroutine function of what two processes have of one database a test of each engine."""

    async def opened(engine: Engine) -> None:
        first, second = await asyncio.gather(engine.open(), engine.open())
        try:
            await test(first, second)
        finally:
            await first.close()
            await second.close()

    def run(engine: Engine) -> None:
        asyncio.run(opened(engine))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def insert(connections: Connections, tenant_id: str, device_id: str, *entry: object) -> None:
    made = DeviceConnection(*entry)  # type: ignore[arg-type]
    await connections.write(lambda transaction: transaction.insert_connection(tenant_id, device_id, made))


async def delete(connections: Connections, *keys: tuple[str, str]) -> None:
    await connections.write(lambda transaction: transaction.delete_connections(keys))


async def count(connections: Connections, tenant_id: str) -> int:
    return await connections.write(lambda transaction: transaction.count_connections(tenant_id))


@pytest.mark.parametrize(
    "entry",
    [
        DeviceConnection(),
        DeviceConnection("gw1", NOW),
        DeviceConnection(None, None, "a1", None),
        DeviceConnection("gw1", NOW, "a1", LATER),
        DeviceConnection("ä😀'\"%", NOW, "\x01", datetime(2094, 1, 1, tzinfo=UTC)),
    ],
)
def test_an_entry_is_found_as_it_was_put(engine: Engine, entry: DeviceConnection) -> None:
    async def test(first: Connections, second: Connections) -> None:
        await insert(first, "t", "d", *entry)
        for connections in (first, second):
            assert await connections.find_connection("t", "d") == entry
            assert await connections.write(lambda transaction: transaction.find_connection("t", "d")) == entry
            for other in (("t", "D"), ("T", "d"), ("d", "t"), ("t", "d "), ("", "d")):
                assert await connections.find_connection(*other) is None

    with_two(test)(engine)


@with_two
async def test_halves_are_updated_by_themselves(first: Connections, second: Connections) -> None:
    async def update_gateway(device_id: str) -> bool:
        return await first.write(lambda transaction: transaction.update_gateway("t", device_id, "gw2", LATER))

    async def update_instance(device_id: str, instance_id: str | None, expires: datetime | None) -> bool:
        return await second.write(
            lambda transaction: transaction.update_adapter_instance("t", device_id, instance_id, expires)
        )

    assert not await update_gateway("d")
    assert not await update_instance("d", "a1", None)
    assert await first.find_connection("t", "d") is None
    await insert(first, "t", "d", "gw1", NOW)
    await insert(first, "t", "other", "gw1", NOW)
    assert await update_instance("d", "a1", LATER)
    assert await first.find_connection("t", "d") == DeviceConnection("gw1", NOW, "a1", LATER)
    assert await update_gateway("d")
    assert await first.find_connection("t", "d") == DeviceConnection("gw2", LATER, "a1", LATER)
    assert await update_instance("d", None, None)
    assert await first.find_connection("t", "d") == DeviceConnection("gw2", LATER)
    assert await first.find_connection("t", "other") == DeviceConnection("gw1", NOW)


@with_two
async def test_instances_are_found_of_those_that_have_one_now(first: Connections, second: Connections) -> None:
    await insert(first, "t", "for-ever", None, None, "a1", None)
    await insert(first, "t", "until-later", "gw", NOW, "a2", LATER)
    await insert(first, "t", "until-now", None, None, "a3", NOW)
    await insert(first, "t", "none", "gw", NOW)
    await insert(first, "other", "elsewhere", None, None, "a4", None)
    ids = ["for-ever", "until-later", "until-now", "none", "elsewhere", "unknown", "", "%", "a\0b"]
    for connections in (first, second):
        found = await connections.find_adapter_instances("t", ids, NOW)
        assert sorted(found) == [("for-ever", "a1"), ("until-later", "a2")]
        assert await connections.find_adapter_instances("t", ids, LATER) == [("for-ever", "a1")]
        assert await connections.find_adapter_instances("t", [], NOW) == []


@with_two
async def test_several_entries_are_found_at_once(first: Connections, second: Connections) -> None:
    await insert(first, "t", "d1", "gw", NOW)
    await insert(first, "u", "d2", None, None, "a1", LATER)
    keys = [("t", "d1"), ("t", "d2"), ("u", "d2")]
    expected = [DeviceConnection("gw", NOW), None, DeviceConnection(None, None, "a1", LATER)]
    assert await second.write(lambda transaction: transaction.find_connections(keys)) == expected
    assert await second.write(lambda transaction: transaction.find_connections([])) == []


@with_two
async def test_entries_are_counted_by_tenant(first: Connections, second: Connections) -> None:
    for number in range(5):
        await insert(first, "t", f"d{number}", "gw", NOW)
        await insert(second, "u", f"d{number}", "gw", NOW)
    assert [await count(second, tenant_id) for tenant_id in ("t", "u", "v")] == [5, 5, 0]
    await delete(first, ("t", "d0"), ("t", "d1"), ("u", "d0"), ("t", "d1"), ("v", "d0"))
    assert [await count(second, tenant_id) for tenant_id in ("t", "u", "v")] == [3, 4, 0]
    await delete(second, *(("t", f"d{number}") for number in range(5)))
    assert await count(first, "t") == 0
    await insert(first, "t", "d0", "gw", NOW)
    assert await count(first, "t") == 1


@with_two
async def test_entries_are_listed_in_order_from_any_key_on(first: Connections, second: Connections) -> None:
    keys = sorted((tenant_id, device_id) for tenant_id in ("a", "b", "ä") for device_id in ("1", "2", "~"))
    for tenant_id, device_id in reversed(keys):
        await insert(first, tenant_id, device_id, "gw", NOW)
    seen: list[tuple[str, str]] = []
    after = "", ""
    while True:
        start = after
        listed = await second.write(lambda transaction, start=start: transaction.list_connections(start, 2))  # type: ignore[misc]
        seen += [key for key, _ in listed]
        assert all(entry == DeviceConnection("gw", NOW) for _, entry in listed)
        if len(listed) < 2:
            break
        after = listed[-1][0]
    assert seen == keys
    assert await first.write(lambda transaction: transaction.list_connections(("a", "~"), 1)) == [
        (("b", "1"), DeviceConnection("gw", NOW))
    ]


@with_two
async def test_a_use_case_that_fails_leaves_no_trace(first: Connections, second: Connections) -> None:
    async def fail(transaction: ConnectionTransaction) -> None:
        await transaction.insert_connection("t", "d", DeviceConnection("gw", NOW))
        raise Forbidden("a limit")

    outcomes = await asyncio.gather(
        insert(first, "t", "before", "gw", NOW),
        first.write(fail),
        insert(first, "t", "after", "gw", NOW),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), Forbidden, type(None)]
    assert await second.find_connection("t", "d") is None
    assert await count(second, "t") == 2


@pytest.mark.sqlite_only("only there look-ups are answered at once")
@with_two
async def test_a_batch_is_one_snapshot(first: Connections, second: Connections) -> None:
    await insert(first, "t", "d", "gw", NOW)
    with second.batch():
        assert await second.find_connection("t", "d") is not None
        await delete(first, ("t", "d"))
        assert await second.find_connection("t", "d") is not None
    assert await second.find_connection("t", "d") is None


@with_two
async def test_two_that_write_at_once_lose_nothing(first: Connections, second: Connections) -> None:
    await asyncio.gather(
        *(
            insert(connections, "t", f"{name}{number}", "gw", NOW)
            for number in range(200)
            for name, connections in (("one-", first), ("two-", second))
        )
    )
    assert await count(first, "t") == await count(second, "t") == 400


def test_closing_finishes_what_was_accepted_and_takes_nothing_more(engine: Engine) -> None:
    async def test() -> None:
        connections = await engine.open()
        tasks = [asyncio.create_task(insert(connections, "t", f"d{number}", "gw", NOW)) for number in range(50)]
        await asyncio.sleep(0)
        await connections.close()
        await connections.close()
        assert await asyncio.gather(*tasks) == [None] * 50
        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: insert(connections, "t", "late", "gw", NOW),
            lambda: connections.find_connection("t", "d1"),
            lambda: connections.find_adapter_instances("t", ["d1"], NOW),
        ]
        for use in uses:
            with pytest.raises(Unavailable):
                await use()
        connections = await engine.open()
        assert await count(connections, "t") == 50
        await connections.close()

    asyncio.run(test())
