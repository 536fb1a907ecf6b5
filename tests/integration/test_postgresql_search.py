"""Searches on PostgreSQL: what the rules say is tested for every engine; here is what only this one takes care of."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import asyncpg
import pytest
from tests.contract.records import CREATED
from tests.postgresql import PostgresqlServer

from kamado.document import JsonObject, encode
from kamado.errors import Unavailable
from kamado.search import Filter, Query, Sort, index_entries, matches, order_key
from kamado.storage import StoreSettings, migrate
from kamado.storage.escape import escape
from kamado.storage.postgresql_database import Connection
from kamado.storage.postgresql_search import PostgresqlSearches
from kamado.store import Searches

INSERT_DEVICE = "INSERT INTO devices (tenant_id, device_id, version, created, document) VALUES ('t', $1, 'v', $2, $3)"
INSERT_MEMBER = "INSERT INTO device_members VALUES ('t', $1, $2, $3, $4)"
INSERT_RANGE = "INSERT INTO device_ranges VALUES ('t', '', $1)"
LIST_RUNNING = """
SELECT query FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND (state <> 'idle' OR xact_start IS NOT NULL)"""


class Registry:
    """A database with devices in it, and searches of it."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", settings: StoreSettings) -> None:
        self.pool = pool

        @asynccontextmanager
        async def acquire() -> AsyncIterator[Connection]:
            try:
                async with pool.acquire() as connection:
                    yield connection
            except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                raise Unavailable("the database cannot be used now") from error

        self.searches = PostgresqlSearches(acquire, settings)

    async def insert(self, documents: Mapping[str, JsonObject]) -> None:
        created = int(CREATED.timestamp()) * 1_000_000
        await self.pool.executemany(
            INSERT_DEVICE, [(device_id, created, encode(each).decode()) for device_id, each in documents.items()]
        )
        await self.pool.executemany(
            INSERT_MEMBER,
            [
                (
                    escape(entry.member),
                    escape(entry.key),
                    device_id,
                    None if entry.long_text is None else escape(entry.long_text),
                )
                for device_id, document in documents.items()
                for entry in index_entries(document)
            ],
        )
        await self.pool.execute(INSERT_RANGE, len(documents))
        await self.pool.execute("INSERT INTO tenant_usage VALUES ('t', $1)", len(documents))

    async def find(self, query: Query, *, is_heavy: bool = False) -> list[str]:
        found = await self.searches.run(lambda each: each.find_devices("t", query), is_heavy=is_heavy)
        return [device.device_id for device in found.results]


async def leave(connection: Connection) -> None:
    """Leave a connection as it is when it is given back, as the store does."""


def run_with(
    server: PostgresqlServer, test: Callable[[Registry], Awaitable[None]], settings: StoreSettings | None = None
) -> None:
    url = server.create_database()

    async def run() -> None:
        await migrate(url)
        async with asyncpg.create_pool(url, min_size=1, max_size=4, reset=leave) as pool:
            registry = Registry(pool, settings or StoreSettings())
            await test(registry)
            await registry.searches.close()

    asyncio.run(run())
    server.drop_database(url)


NUMBERS: Sequence[int | float] = (
    *(
        0,
        -0.0,
        1.5,
        0.1,
        5e-324,
        -1e-7,
        1e15 + 0.5,
        2**53 + 1,
        2.0**53,
        2**53,
        9007199254740994.0,
        2**70,
        -(2**70),
        2.0**70,
    ),
    # A fraction stands for the nearest double, which may be no power of ten.
    *(
        1e22,
        10**22,
        1e23,
        10**23,
        int(1e23),
        -1e23,
        -(10**23),
        1.7976931348623157e308,
        int(1.7976931348623157e308),
        10**400,
    ),
)


def test_numbers_compare_exactly(postgresql: PostgresqlServer) -> None:
    """Management 7.2 and 7.3: whatever a double or 64 bits can hold."""
    documents: dict[str, JsonObject] = {f"d{index:02}": {"ext": {"n": [n]}} for index, n in enumerate(NUMBERS)}

    async def test(registry: Registry) -> None:
        await registry.insert(documents)
        sort = Sort(pointer=("ext", "n", "0"))
        wanted = sorted(documents, key=lambda device_id: order_key(sort, documents[device_id]))
        assert await registry.find(Query(sorts=(sort,))) == wanted
        for number in NUMBERS:
            condition = Filter(pointer=("ext", "n", "0"), value=number)
            equal = [device_id for device_id, document in documents.items() if matches(condition, document)]
            assert await registry.find(Query(filters=(condition,))) == equal, number

    run_with(postgresql, test)


@pytest.mark.parametrize(
    "pattern",
    ["*" * 1024, "*?" * 512, "?" * 1024, "?*" * 511 + "y", "*?" + "(*" * 500, "*\x03" * 512, "*?a" + "*a" * 500 + "b"],
    ids=["stars", "both", "one-each", "both-and-end", "brackets", "controls", "letters"],
)
def test_no_pattern_is_too_long(postgresql: PostgresqlServer, pattern: str) -> None:
    """Management 7.2, also for texts that hold NUL, which are compared in another way."""
    texts = ["x" * 30000 + "y", "\0" * 1024, "\0" + "(" * 600, "\0" + "a" * 30000, "\0" + "\x03" * 600, "", "\0"]
    documents: dict[str, JsonObject] = {f"d{index}": {"ext": {"n": 1, "s": text}} for index, text in enumerate(texts)}

    async def test(registry: Registry) -> None:
        await registry.insert(documents)
        condition = Filter(pointer=("ext", "s"), value=pattern)
        wanted = [each for each in documents if matches(condition, documents[each])]
        assert await registry.find(Query(filters=(condition,))) == wanted
        # Beside an equality, it is the documents that are looked at.
        assert await registry.find(Query(filters=(condition, Filter(pointer=("ext", "n"), value=1)))) == wanted

    run_with(postgresql, test)


async def fill(registry: Registry) -> None:
    await registry.insert({f"d{index:04}": {"ext": {"list": ["x" * 40] * 20}} for index in range(1000)})


async def search_on_and_on(searches: Searches) -> None:
    while True:
        await searches.find_devices("t", Query(sorts=(Sort(pointer=("ext", "list", "0")),) * 8))


def test_a_search_of_many_statements_ends_in_its_time(postgresql: PostgresqlServer) -> None:
    """The server is told anew how much is left."""

    async def test(registry: Registry) -> None:
        await fill(registry)
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"took longer than 1 s; a filter by equality or prefix"):
            await registry.searches.run(search_on_and_on, is_heavy=True)
        # Without a limit for all of them it would never end.
        assert 1 <= time.monotonic() - started < 1 + 10
        assert await registry.pool.fetch(LIST_RUNNING) == []
        assert len(await registry.find(Query())) == 30

    run_with(postgresql, test, StoreSettings(search_timeout=1.0))


def test_a_search_whose_caller_leaves_ends_on_the_server(postgresql: PostgresqlServer) -> None:
    async def test(registry: Registry) -> None:
        await fill(registry)
        task = asyncio.create_task(registry.searches.run(search_on_and_on, is_heavy=True))
        while not await registry.pool.fetch(LIST_RUNNING):  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await registry.pool.fetch(LIST_RUNNING) == []
        assert len(await registry.find(Query())) == 30

    run_with(postgresql, test)


def test_a_connection_is_given_back_as_it_was(postgresql: PostgresqlServer) -> None:
    """Settings of a search are those of its transaction: look-ups may have the connection next."""

    async def test(registry: Registry) -> None:
        await registry.insert({"d": {}})
        before = await registry.pool.fetch("SELECT name, setting FROM pg_settings ORDER BY name")
        await registry.find(Query())
        with pytest.raises(Unavailable, match="cannot be used"):
            await registry.searches.run(break_down, is_heavy=False)
        assert await registry.pool.fetch("SELECT name, setting FROM pg_settings ORDER BY name") == before
        assert registry.pool.get_size() == 1

    async def break_down(searches: Searches) -> None:
        await searches.find_devices("t", Query(after="\ud800"))

    run_with(postgresql, test)
