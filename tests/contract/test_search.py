"""Searches on every engine, against the rules told once in `kamado.search`: no index may show in the results."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.records import CREATED, credential, stored_credentials, stored_device, stored_tenant
from tests.contract.test_store import Engine, engine, insert_device, insert_tenant, with_store

from kamado.credentials import Credential
from kamado.document import JsonObject, format_timestamp
from kamado.errors import Unavailable
from kamado.search import Filter, Query, Scalar, Sort, matches, order_key
from kamado.storage import StoreSettings, sql
from kamado.storage import search as sql_search
from kamado.store import Found, FoundDevice, Store, StoredDevice, Transaction

__all__ = ["engine"]  # a fixture


async def find(store: Store, tenant_id: str, query: Query | None = None) -> Found[FoundDevice]:
    return await store.search(lambda searches: searches.find_devices(tenant_id, query or Query()))


def ids(found: Found[FoundDevice]) -> list[str]:
    return [device.device_id for device in found.results]


# The rules, once more, over plain documents


def is_gateway(device_id: str, documents: dict[str, JsonObject]) -> bool:
    """Management 7.4."""
    named = any(device_id in cast(list[str], each.get("via", [])) for each in documents.values())
    return named or bool(documents[device_id].get("memberOf"))


def expected(query: Query, documents: dict[str, JsonObject]) -> list[str]:
    """The ids of all matches, in their order."""
    found = [
        device_id
        for device_id in sorted(documents)
        if all(matches(condition, documents[device_id]) for condition in query.filters)
        and (query.is_gateway is None or is_gateway(device_id, documents) is query.is_gateway)
    ]
    for sort in reversed(query.sorts):
        # `sorted` keeps the order of equals even if it is reversed.
        found.sort(key=lambda device_id: order_key(sort, documents[device_id]), reverse=sort.descending)
    return found


names = st.sampled_from(["a", "b", "c", "0", "1", "x y", 'q"', "t~/", "", "é", "-1", "01", "+1", "\0", "\\", "\x02"])
texts = st.sampled_from(
    [
        *("", "a", "ab", "abc", "b*", "?", "[a]", "A", "é", "a\nb", "x" * 350, "x" * 350 + "y", "%", "_"),
        *("\0", "a\0b", "\ufffd", "\ufffe", "\uffff", "a\uffff"),
        # What stands for NUL where text cannot hold it, and what looks like it in JSON.
        *("\x01", "\x02", "\x03", "\x01\x03", "\x01\x04a", "\\", "\\u0000", "\\\0", "\0\0"),
    ]
)
scalars = st.one_of(
    texts, st.booleans(), st.integers(-2, 3), st.sampled_from([0.5, 1.0, -0.0, 1e22, 2.0**53, 10**22, 2**53 + 1, 2**70])
)
values = st.recursive(
    st.one_of(scalars, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=5,
)
devices = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "ext": st.dictionaries(names, values, max_size=3),
        "via": st.lists(st.sampled_from(["d1", "d2", "gone"]), max_size=2),
        "defaults": st.dictionaries(names, values, max_size=1),
    },
) | st.fixed_dictionaries({"memberOf": st.lists(st.sampled_from(["g1", "g2"]), min_size=1, max_size=2)})
pointers = st.one_of(
    st.sampled_from(
        [
            (),
            ("id",),
            ("enabled",),
            ("via",),
            ("via", "0"),
            ("memberOf",),
            ("status",),
            ("status", "created"),
            ("status", "updated"),
            ("status", "auto-provisioned"),
            ("ext",),
            ("nowhere",),
        ]
    ),
    st.lists(names, min_size=1, max_size=3).map(lambda tokens: ("ext", *tokens)),
)
patterns = st.one_of(
    scalars,
    st.text("ab*?[]^%_\\\0\x01\x03\uffff\ufffd", max_size=5),
    st.sampled_from(["x" * 350 + "*", "*y", "d*", "d?", "d1", "2024-05-*", "2024-05-02T08:00:00Z", "*Z", "0*", "*"]),
)
filters = st.builds(lambda pointer, value: Filter(pointer=pointer, value=value), pointers, patterns)
sorts = st.builds(lambda pointer, down: Sort(pointer=pointer, descending=down), pointers, st.booleans())
queries = st.builds(
    lambda filters, sorts, wanted: Query(filters=tuple(filters), sorts=tuple(sorts), is_gateway=wanted, page_size=200),
    st.lists(filters, max_size=3),
    st.lists(sorts, max_size=2),
    st.sampled_from([None, None, True, False]),
)


def as_read(stored: StoredDevice, document: JsonObject) -> JsonObject:
    status: JsonObject = {"created": format_timestamp(stored.created)}
    if stored.updated is not None:
        status["updated"] = format_timestamp(stored.updated)
    if stored.auto_provisioned:
        status["auto-provisioned"] = True
    return {**document, "id": stored.device_id, "status": status}


@pytest.mark.parametrize("few", [5000, 1], ids=["many-are-few", "few-are-many"])
def test_a_search_finds_what_the_rules_say(
    engine: Engine, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Management 7.2 to 7.4, with every way to answer: small and large sets of candidates have their own."""
    monkeypatch.setattr(sql_search, "_FEW", few)
    monkeypatch.setattr(sql, "_MAX_RANGE", 3)
    number = 0

    async def check(store: Store, made: list[JsonObject], asked: list[Query], dice: random.Random) -> None:
        nonlocal number
        number += 1
        tenant, other = f"t{number}", f"t{number}-other"
        documents: dict[str, JsonObject] = {}
        await insert_tenant(store, stored_tenant(tenant))
        for index, document in enumerate(made):
            stored = stored_device(tenant, f"d{index}" if index else "zero", document)
            stored = replace(
                stored,
                created=CREATED + timedelta(milliseconds=400 * index),
                updated=CREATED + timedelta(hours=1) if index % 2 else None,
                auto_provisioned=index % 3 == 0,
            )
            await insert_device(store, stored)
            await insert_device(store, replace(stored, tenant_id=other))
            found = await find(store, tenant, Query(filters=(Filter(pointer=("id",), value=stored.device_id),)))
            (read,) = found.results
            documents[stored.device_id] = as_read(stored, read.document)
        for query in asked:
            wanted = expected(query, documents)
            found = await find(store, tenant, query)
            assert (found.total, ids(found)) == (len(wanted), wanted), query
            offset, size = dice.randrange(6), dice.randrange(4)
            page = await find(store, tenant, replace(query, page_offset=offset, page_size=size))
            assert (page.total, ids(page)) == (len(wanted), wanted[offset : offset + size]), query
            if not query.sorts:
                after = dice.choice([*documents, "", "d", "~"] if documents else [""])
                rest = await find(store, tenant, replace(query, after=after, page_size=2))
                assert rest.total == len(wanted)
                assert ids(rest) == [each for each in wanted if each > after][:2], (query, after)

    async def run() -> None:
        store = await engine.open()
        loop = asyncio.get_running_loop()
        try:

            @settings(max_examples=60, deadline=None)
            @given(st.lists(devices, max_size=7), st.lists(queries, min_size=1, max_size=6), st.randoms())
            def examples(made: list[JsonObject], asked: list[Query], dice: random.Random) -> None:
                asyncio.run_coroutine_threadsafe(check(store, made, asked, dice), loop).result()

            await asyncio.to_thread(examples)
        finally:
            await store.close()

    asyncio.run(run())


@with_store
async def test_tenants_are_found_by_the_same_rules(store: Store) -> None:
    for tenant_id, document in (
        ("a", {"ext": {"plant": "north"}, "adapters": [{"type": "hono-mqtt", "enabled": True}]}),
        ("b", {"ext": {"plant": "nord"}, "enabled": False}),
        ("c", {"alias": "see"}),
    ):
        await insert_tenant(store, stored_tenant(tenant_id, document))

    async def found(query: Query) -> tuple[int, list[str]]:
        result = await store.search(lambda searches: searches.find_tenants(query))
        return result.total, [tenant.tenant_id for tenant in result.results]

    def where(pointer: str, value: str | bool) -> Query:
        return Query(filters=(Filter(pointer=tuple(pointer.split("/")), value=value),))

    assert await found(Query()) == (3, ["a", "b", "c"])
    assert await found(Query(page_size=1, page_offset=1)) == (3, ["b"])
    assert await found(Query(after="a", page_size=1)) == (3, ["b"])
    assert await found(where("ext/plant", "no*")) == (2, ["a", "b"])
    assert await found(where("enabled", True)) == (2, ["a", "c"])
    assert await found(where("enabled", False)) == (1, ["b"])
    assert await found(where("alias", "s?e")) == (1, ["c"])
    assert await found(where("adapters/type", "hono-mqtt")) == (1, ["a"])
    assert await found(where("adapters/0/type", "hono-mqtt")) == (1, ["a"])
    assert await found(where("id", "?")) == (3, ["a", "b", "c"])
    assert await found(Query(sorts=(Sort(pointer=("id",), descending=True),))) == (3, ["c", "b", "a"])
    assert await found(Query(sorts=(Sort(pointer=("ext", "plant")),))) == (3, ["c", "b", "a"])


@with_store
async def test_what_is_updated_and_deleted_is_found_no_more(store: Store) -> None:
    await insert_tenant(store, stored_tenant("t", {"ext": {"n": 1}}))
    stored = stored_device("t", "d", {"ext": {"brand": "alpha", "other": ["x", "y"]}, "enabled": False})
    await insert_device(store, stored)
    brand = Query(filters=(Filter(pointer=("ext", "brand"), value="a*"),))
    disabled = Query(filters=(Filter(pointer=("enabled",), value=False),))
    assert ids(await find(store, "t", brand)) == ids(await find(store, "t", disabled)) == ["d"]
    changed = replace(stored, device=stored_device("t", "d", {"ext": {"other": ["y", "z"]}}).device)
    await store.write(lambda tx: tx.update_device(changed))
    assert ids(await find(store, "t", brand)) == ids(await find(store, "t", disabled)) == []
    for value, number in (("x", 0), ("y", 1), ("z", 1)):
        assert (await find(store, "t", Query(filters=(Filter(pointer=("ext", "other"), value=value),)))).total == number
    await store.write(lambda tx: tx.delete_device("t", "d"))
    assert (await find(store, "t")).total == 0
    await store.write(lambda tx: tx.delete_tenant("t"))
    assert not (await find(store, "t")).has_tenant
    assert (await store.search(lambda searches: searches.find_tenants(Query()))).total == 0


@with_store
async def test_left_overs_are_gone_from_the_index_when_the_tenant_is_created_again(store: Store) -> None:
    """Management 8.3."""
    await insert_tenant(store, stored_tenant("t"))
    await insert_device(store, stored_device("t", "d", {"ext": {"brand": "alpha"}}))
    await store.write(lambda tx: tx.delete_tenant("t"))
    await insert_tenant(store, stored_tenant("t"))
    assert (await find(store, "t")).total == 0
    assert (await find(store, "t", Query(filters=(Filter(pointer=("ext", "brand"), value="alpha"),)))).total == 0
    await insert_device(store, stored_device("t", "d", {"ext": {"brand": "beta"}}))
    assert (await find(store, "t")).total == 1


async def delete_device(store: Store, device_id: str) -> None:
    await store.write(lambda tx: tx.delete_device("t", device_id))


def test_pages_at_any_offset_after_random_changes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counted ranges of ids split, shrink and vanish; places must stay right."""
    monkeypatch.setattr(sql, "_MAX_RANGE", 4)

    async def run() -> None:
        store = await engine.open()
        dice = random.Random(7)
        present: set[str] = set()
        try:
            await insert_tenant(store, stored_tenant("t"))
            for step in range(300):
                device_id = f"d{dice.randrange(60):02}"
                if device_id in present:
                    await delete_device(store, device_id)
                    present.remove(device_id)
                else:
                    await insert_device(store, stored_device("t", device_id))
                    present.add(device_id)
                if step % 10 == 0:
                    ordered = sorted(present)
                    for prefix in ("", "d1", "d5", "x"):
                        matching = [each for each in ordered if each.startswith(prefix)]
                        filters = (Filter(pointer=("id",), value=f"{prefix}*"),) if prefix else ()
                        offset = dice.randrange(len(ordered) + 2)
                        for down in (False, True):
                            query = Query(
                                filters=filters,
                                page_size=3,
                                page_offset=offset,
                                sorts=(Sort(pointer=("id",), descending=down),),
                            )
                            wanted = list(reversed(matching)) if down else matching
                            found = await find(store, "t", query)
                            assert (found.total, ids(found)) == (len(matching), wanted[offset : offset + 3])
                            assert found.scanned <= 3
        finally:
            await store.close()

    asyncio.run(run())


HOSTILE = [
    "s1' OR '1'='1",
    "') OR 1=1 --",
    "?1",
    "*' UNION SELECT device_id FROM devices --",
    "\\",
    '"',
    "[^a]*",
    "*[",
    "%",
    "\u0000*",
    "/ext/secret",
]


@with_store
async def test_characters_that_are_none_are_told_apart(store: Store) -> None:
    """Management 7.2: everything but the wildcards is literal, also what SQLite takes for the end of a text."""
    await insert_tenant(store, stored_tenant("t"))
    for device_id, text in (("nul", "\0"), ("nul2", "a\0b"), ("ff", "\uffff"), ("fe", "\ufffe"), ("fd", "\ufffd")):
        await insert_device(store, stored_device("t", device_id, {"ext": {"s": text, text: 1}}))
    for value, wanted in (
        ("\0", ["nul"]),
        ("\uffff", ["ff"]),
        ("\uffff*", ["ff"]),
        ("*\uffff*", ["ff"]),
        ("*\ufffe", ["fe"]),
        ("*\ufffd", ["fd"]),
        ("a\uffff*", []),
        ("a*b", ["nul2"]),
        ("a?b", ["nul2"]),
        ("*\0*", ["nul", "nul2"]),
        ("a\0*", ["nul2"]),
        ("?", ["fd", "fe", "ff", "nul"]),
    ):
        assert ids(await find(store, "t", Query(filters=(Filter(pointer=("ext", "s"), value=value),)))) == wanted, value
    assert ids(await find(store, "t", Query(filters=(Filter(pointer=("ext", "\0"), value=1),)))) == ["nul"]


@with_store
async def test_texts_are_sorted_beyond_a_nul(store: Store) -> None:
    """Management 7.3: texts by their code points."""
    await insert_tenant(store, stored_tenant("t"))
    texts = {"n1": "x\0b", "n2": "x\0a", "n3": "x", "n4": "x\1"}
    documents: dict[str, JsonObject] = {one: {"ext": {"a": text}} for one, text in texts.items()}
    for device_id, document in documents.items():
        await insert_device(store, stored_device("t", device_id, document))
    for down in (False, True):
        query = Query(sorts=(Sort(pointer=("ext", "a"), descending=down),))
        assert ids(await find(store, "t", query)) == (["n4", "n1", "n2", "n3"] if down else ["n3", "n2", "n1", "n4"])


@with_store
async def test_no_filter_sees_the_devices_of_another_tenant(store: Store) -> None:
    """Whatever the pointer or the value."""
    for tenant in ("t", "other"):
        await insert_tenant(store, stored_tenant(tenant))
    await insert_device(store, stored_device("t", "mine", {"ext": {"a": "x"}}))
    for index, text in enumerate(HOSTILE):
        document = {"ext": {"secret": text, text: text, "a": "x"}, "via": ["mine"]}
        await insert_device(store, stored_device("other", f"theirs{index}", document))
    for token in [*HOSTILE, "a", "secret"]:
        values: list[Scalar] = [*HOSTILE, "*", True, 1]
        for value in values:
            for pointer in ((token,), ("ext", token), ("ext", token, "0"), ("id", token), ("status", token)):
                condition = Filter(pointer=pointer, value=value)
                for query in (
                    Query(filters=(condition,)),
                    Query(filters=(condition,), sorts=(Sort(pointer=pointer),)),
                    Query(sorts=(Sort(pointer=pointer, descending=True),), after=None),
                ):
                    assert set(ids(await find(store, "t", query))) <= {"mine"}
    # Being named in another tenant's device makes no gateway.
    assert ids(await find(store, "t", Query(is_gateway=True))) == []
    assert (await find(store, "nobody", Query(filters=(Filter(pointer=("ext", "a"), value="x"),)))).total == 0


@with_store
async def test_devices_are_deleted_in_slices(store: Store) -> None:
    await insert_tenant(store, stored_tenant("t"))
    for index in range(7):
        stored = stored_device("t", f"d{index}", {"ext": {"n": index}, "memberOf": ["g"]})
        await insert_device(store, stored, [credential("psk", f"a{index}", secrets=[{"key": "dGVhLXBvdC00Mg=="}])])
    late = replace(stored_device("t", "d3x"), created=CREATED + timedelta(days=1))
    await insert_device(store, late)

    async def delete(after: str, until: datetime = CREATED) -> tuple[int, str | None]:
        return await store.write(lambda tx: tx.delete_devices("t", after, 3, until))

    assert await delete("") == (3, "d2")
    assert ids(await find(store, "t")) == ["d3", "d3x", "d4", "d5", "d6"]
    assert await delete("d2") == (2, "d4")
    assert await delete("d4") == (2, None)
    assert ids(await find(store, "t")) == ["d3x"]
    assert await store.read(lambda tx: tx.count_devices("t")) == 1
    assert await store.lookups.find_credential("t", "psk", "a5") is None
    assert await store.lookups.find_group_members("t", ["g"]) == []
    assert (await find(store, "t", Query(filters=(Filter(pointer=("ext", "n"), value=5),)))).total == 0
    await insert_device(store, stored_device("t", "d5"), [credential("psk", "a5", secrets=[{"key": "AAAA"}])])


@with_store
async def test_slices_of_large_devices_are_small(store: Store) -> None:
    """A slice is bounded by the work that it is, so that look-ups and other writes have their turn."""
    await insert_tenant(store, stored_tenant("t"))
    small, large, huge = (
        {"ext": {f"m{number}": f"v{number}" for number in range(members)}} for members in (5, 2500, 15_000)
    )
    later = CREATED + timedelta(days=1)
    made = [("a", 40, small), ("b", 9, large), ("c", 2, huge), ("d", 40, small)]
    for prefix, number, document in made:
        devices = [stored_device("t", f"{prefix}{n:02}", document) for n in range(number)]
        devices += [replace(stored_device("t", f"{prefix}00-late"), created=later)]
        await store.write(partial(insert_many, devices=devices))
    slices: list[int] = []
    after: str | None = ""
    while after is not None:
        number, after = await store.write(partial(delete_slice, after=after))
        slices.append(number)
    assert sum(slices) == 91
    assert slices[0] >= 40, "small ones go together"
    assert all(0 < number <= 45 for number in slices)
    assert len(slices) >= 5, "large ones do not"
    assert ids(await find(store, "t")) == [f"{prefix}00-late" for prefix in "abcd"]
    assert (await find(store, "t", Query(filters=(Filter(pointer=("ext", "m1"), value="v1"),)))).total == 0
    assert await store.read(lambda tx: tx.count_devices("t")) == 4


async def insert_many(tx: Transaction, *, devices: list[StoredDevice]) -> None:
    await tx.insert_devices((device, stored_credentials("t", device.device_id)) for device in devices)


async def delete_slice(tx: Transaction, *, after: str) -> tuple[int, str | None]:
    return await tx.delete_devices("t", after, 500, CREATED)


async def set_credentials(store: Store, device_id: str, one: Credential) -> None:
    await store.write(lambda tx: tx.replace_credentials(stored_credentials("t", device_id, [one])))


@with_store
async def test_credentials_without_a_device_are_deleted_in_slices(store: Store) -> None:
    await insert_device(store, stored_device("t", "d1"))
    for index in range(4):
        await set_credentials(store, f"e{index}", credential("psk", f"a{index}", secrets=[{"key": "AAAA"}]))
    read = await store.read(lambda tx: tx.find_credentials("t", "e0"))
    assert read is not None
    assert not read.has_device
    assert await store.write(lambda tx: tx.delete_credential_sets("t", "", 3)) == (2, "e1")
    assert await store.write(lambda tx: tx.delete_credential_sets("t", "e1", 3)) == (2, None)
    assert await store.read(lambda tx: tx.find_credentials("t", "e0")) is None
    assert await store.read(lambda tx: tx.find_credentials("t", "d1")) is not None


# Limits


async def _fill(store: Store, number: int) -> None:
    await insert_tenant(store, stored_tenant("t"))
    for index in range(number):
        await insert_device(store, stored_device("t", f"d{index:04}", {"ext": {"list": ["x" * 40] * 20, "n": index}}))


SLOW = Query(filters=(Filter(pointer=("ext", "list", "19"), value="*" + "x*" * 300 + "y"),) * 8)


def run_with(engine: Engine, settings: StoreSettings, test: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        store = await engine.open(settings)
        try:
            await test(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_a_search_that_takes_too_long_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kamado.storage.sqlite_search._STEPS", 100)

    async def test(store: Store) -> None:
        await _fill(store, 400)
        heavy = Query(sorts=(Sort(pointer=("ext", "list", "0")),) * 8)
        for _ in range(50):  # on a busy machine it may not get its turn in so short a time
            with pytest.raises(Unavailable) as raised:
                await find(store, "t", heavy)
            if "took longer than 0.002 s" in str(raised.value):
                return
        raise AssertionError(str(raised.value))

    run_with(engine, StoreSettings(search_timeout=0.002), test)


def test_too_many_searches_at_once_are_refused(engine: Engine) -> None:
    async def test(store: Store) -> None:
        await _fill(store, 100)
        query = Query(sorts=(Sort(pointer=("ext", "list", "0")),))
        outcomes = await asyncio.gather(*(find(store, "t", query) for _ in range(10)), return_exceptions=True)
        refused = [each for each in outcomes if isinstance(each, Unavailable)]
        assert len(refused) == 7
        assert len(ids(await find(store, "t", query))) == 30

    run_with(engine, StoreSettings(search_workers=1, max_waiting_searches=3), test)


def test_long_searches_do_not_keep_quick_ones_waiting(engine: Engine) -> None:
    async def test(store: Store) -> None:
        await _fill(store, 400)
        heavy = Query(sorts=(Sort(pointer=("ext", "list", "0")),) * 8)
        assert heavy.is_heavy
        searches = [
            asyncio.create_task(store.search(lambda each: each.find_devices("t", heavy), is_heavy=True))
            for _ in range(20)
        ]
        await asyncio.sleep(0)
        quick = await find(store, "t", Query(filters=(Filter(pointer=("ext", "n"), value=7),)))
        assert ids(quick) == ["d0007"]
        assert not searches[-1].done(), "it was not in the same queue"
        assert all(found.total == 400 for found in await asyncio.gather(*searches))

    run_with(engine, StoreSettings(search_workers=1), test)


def test_a_search_that_only_looked_quick_is_answered_all_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamado.storage.lanes._QUICK", 0.0)

    async def test(store: Store) -> None:
        await _fill(store, 10)
        assert (await find(store, "t", Query(sorts=(Sort(pointer=("ext", "list", "0")),)))).total == 10

    run_with(engine, StoreSettings(), test)


def test_who_waits_for_too_long_is_told_so(engine: Engine) -> None:
    async def test(store: Store) -> None:
        await _fill(store, 300)
        heavy = Query(sorts=(Sort(pointer=("ext", "list", "0")),) * 8)
        outcomes = await asyncio.gather(
            *(store.search(lambda each: each.find_devices("t", heavy), is_heavy=True) for _ in range(400)),
            return_exceptions=True,
        )
        assert any("did not get its turn" in str(outcome) for outcome in outcomes)

    run_with(engine, StoreSettings(search_workers=1, max_waiting_searches=400, search_timeout=0.2), test)


def test_a_search_ends_with_its_caller_or_its_store(engine: Engine) -> None:
    async def test(store: Store) -> None:
        await _fill(store, 200)
        query = Query(sorts=(Sort(pointer=("ext", "list", "0")),) * 8)
        task = asyncio.create_task(find(store, "t", query))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await find(store, "t")).total == 200
        left = asyncio.create_task(find(store, "t", query))
        await asyncio.sleep(0)
        await store.close()
        with pytest.raises(Unavailable):
            await left
        with pytest.raises(Unavailable, match="closed"):
            await find(store, "t")

    run_with(engine, StoreSettings(search_workers=1), test)


def test_look_ups_and_writes_go_on_beside_a_long_search(engine: Engine) -> None:
    async def test(store: Store) -> None:
        await _fill(store, 400)
        query = Query(sorts=(Sort(pointer=("ext", "list", "0")),) * 8)
        search = asyncio.create_task(find(store, "t", query))
        await asyncio.sleep(0.01)
        await insert_device(store, stored_device("t", "new"))
        assert await store.lookups.find_registration("t", "new") is not None
        # What came after its beginning is not in it.
        found = await search
        assert found.total in {400, 401}
        assert (await find(store, "t")).total == 401

    run_with(engine, StoreSettings(), test)
