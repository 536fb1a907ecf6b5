"""Queries, the rules of matching and order, and the keys of the index (management 7)."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamado.errors import BadRequest
from kamado.search import (
    Filter,
    Query,
    Sort,
    index_entries,
    key_pattern,
    matches,
    order_key,
    parse_query,
    text_range,
    value_key,
)


def parse(**parameters: str | list[str]) -> object:
    return parse_query(
        {name: [value] if isinstance(value, str) else value for name, value in parameters.items()}, for_devices=True
    )


# Parameters (management 7.1)


def test_without_parameters_the_first_thirty_by_id() -> None:
    query = parse_query({}, for_devices=True)
    assert (query.page_size, query.page_offset, query.filters, query.sorts) == (30, 0, (), ())
    assert query.is_gateway is None


def test_the_first_of_several_counts() -> None:
    query = parse_query({"pageSize": ["1", "x"], "pageOffset": ["2", "3"], "isGateway": ["", "true"]}, for_devices=True)
    assert (query.page_size, query.page_offset, query.is_gateway) == (1, 2, None)


@pytest.mark.parametrize(
    ("text", "wanted"), [("true", True), ("TRUE", True), ("", None), ("false", False), ("1", False), ("yes", False)]
)
def test_is_gateway(text: str, wanted: bool | None) -> None:
    assert parse_query({"isGateway": [text]}, for_devices=True).is_gateway is wanted
    assert parse_query({"isGateway": [text]}, for_devices=False).is_gateway is None


def test_an_offset_in_pages_skips_that_many_items() -> None:
    query = parse_query({"pageSize": ["20"], "pageOffset": ["3"]}, for_devices=True, offset_in_pages=True)
    assert query.page_offset == 60


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pageSize", "201"),
        ("pageSize", "-1"),
        ("pageSize", ""),
        ("pageSize", "1.0"),
        ("pageSize", "+5"),
        ("pageOffset", "-0"),
        ("pageSize", "١"),
        ("pageOffset", "-1"),
        ("pageOffset", "x"),
        ("pageOffset", "9" * 30),
        ("filterJson", ""),
        ("filterJson", "{"),
        ("filterJson", "[]"),
        ("filterJson", "null"),
        ("filterJson", '{"value":1}'),
        ("filterJson", '{"field":"/a"}'),
        ("filterJson", '{"field":"a","value":1}'),
        ("filterJson", '{"field":1,"value":1}'),
        ("filterJson", '{"field":"/a","value":null}'),
        ("filterJson", '{"field":"/a","value":[1]}'),
        ("filterJson", '{"field":"/a","value":{}}'),
        ("filterJson", '{"field":"/a","value":1,"op":"gt"}'),
        ("filterJson", '{"field":"/a","value":1,"more":1}'),
        ("filterJson", '{"field":"/a~","value":1}'),
        ("filterJson", '{"field":"/%s","value":1}' % ("a" * 2000)),
        ("filterJson", '{"field":"/a","value":"*%s"}' % ("a" * 2000)),
        ("filterJson", '{"field":"/a","value":1e999}'),
        ("sortJson", "{"),
        ("sortJson", "{}"),
        ("sortJson", '{"field":"x"}'),
        ("sortJson", '{"field":"/x","direction":"up"}'),
        ("sortJson", '{"field":"/x","value":1}'),
    ],
)
def test_an_error_names_the_parameter(name: str, value: str) -> None:
    with pytest.raises(BadRequest, match=name):
        parse(**{name: value})


@pytest.mark.parametrize("other", [{"sortJson": '{"field":"/a"}'}, {"pageOffset": "1"}])
def test_after_is_for_the_order_of_ids_only(other: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match="after"):
        parse(after="d", **other)


@pytest.mark.parametrize(("name", "text"), [("filterJson", '{"field":"/a","value":1}'), ("sortJson", '{"field":"/a"}')])
def test_there_is_an_end_to_filters_and_sort_keys(name: str, text: str) -> None:
    with pytest.raises(BadRequest, match=name):
        parse(**{name: [text] * 17})


def test_pointers_are_unescaped() -> None:
    query = parse_query({"filterJson": ['{"field":"/a~1b/~01/","value":"x"}']}, for_devices=True)
    assert query.filters == (Filter(pointer=("a/b", "~1", ""), value="x"),)


@pytest.mark.parametrize(
    ("filters", "sorts", "heavy"),
    [
        ([], [], False),
        ([(("id",), "a*")], [], False),
        ([(("ext", "a"), "a*b")], [], False),
        ([(("ext", "a"), "*b"), (("ext", "n"), 1)], [], False),
        ([(("ext", "a"), "*b")], [], True),
        ([(("id",), "?b")], [], True),
        ([(("status", "created"), "2026*")], [], True),
        ([], [("id",)], False),
        ([(("ext", "n"), 1)], [("ext", "n")], True),
    ],
)
def test_what_takes_long_is_known_before(
    filters: list[tuple[tuple[str, ...], str | int]], sorts: list[tuple[str, ...]], heavy: bool
) -> None:
    query = Query(
        filters=tuple(Filter(pointer=pointer, value=value) for pointer, value in filters),
        sorts=tuple(Sort(pointer=pointer) for pointer in sorts),
    )
    assert query.is_heavy is heavy


# Matching (management 7.2)

DOCUMENT = {
    "enabled": True,
    "ext": {
        "brand": "alpha",
        "n": 15,
        "x": 1.5,
        "list": ["a", "b", {"c": 1}],
        "deep": [[{"c": "d"}]],
        "0": "zero",
        "none": None,
        "": "empty",
        "line": "a\nb",
    },
}


@pytest.mark.parametrize(
    ("pointer", "value", "expected"),
    [
        (("ext", "brand"), "alpha", True),
        (("ext", "brand"), "ALPHA", False),
        (("ext", "brand"), "al*", True),
        (("ext", "brand"), "*", True),
        (("ext", "brand"), "?l?ha", True),
        (("ext", "brand"), "?l??a", True),
        (("ext", "brand"), "alpha*", True),
        (("ext", "brand"), "alpha?", False),
        (("ext", "brand"), "*p*a", True),
        (("ext", "brand"), "a.*", False),
        (("ext", "line"), "a?b", True),
        (("ext", "line"), "a*b", True),
        (("ext", "n"), 15, True),
        (("ext", "n"), 15.0, True),
        (("ext", "n"), "15", False),
        (("ext", "n"), "*", False),
        (("ext", "n"), True, False),
        (("enabled",), True, True),
        (("enabled",), 1, False),
        (("enabled",), "true", False),
        (("ext", "x"), 1.5, True),
        (("ext", "none"), "*", False),
        (("ext", "missing"), "*", False),
        (("ext", "brand", "more"), "*", False),
        (("ext",), "*", False),
        ((), "*", False),
        (("ext", ""), "empty", True),
        (("ext", "list"), "b", True),
        (("ext", "list", "1"), "b", True),
        (("ext", "list", "0"), "b", False),
        (("ext", "list", "9"), "b", False),
        (("ext", "list", "9" * 50), "b", False),
        (("ext", "list", "01"), "b", False),
        (("ext", "list", "c"), 1, True),
        (("ext", "list", "2", "c"), 1, True),
        (("ext", "deep", "c"), "d", True),
        (("ext", "deep", "0", "0", "c"), "d", True),
        (("ext", "0"), "zero", True),
    ],
)
def test_matching(pointer: tuple[str, ...], value: str | float | bool, expected: bool) -> None:
    assert matches(Filter(pointer=pointer, value=value), DOCUMENT) is expected


def test_a_pattern_cannot_be_made_to_take_long() -> None:
    started = time.process_time()
    assert not matches(Filter(pointer=("a",), value="*a" * 500 + "b"), {"a": "a" * 60_000})
    assert not matches(Filter(pointer=("a",), value="*?a" * 300 + "b"), {"a": "a" * 60_000})
    # One that tries all ways would take hours.
    assert time.process_time() - started < 10


# Order (management 7.3)


def test_the_order_of_values() -> None:
    values: list[object] = [None, -1.5, 0, 2, 10, "", "Z", "a", "é", "\U0001f600", {"a": 1}, [1], False, True]
    keys = [order_key(Sort(pointer=("a",)), {"a": value}) for value in values]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert order_key(Sort(pointer=("a",)), {}) == keys[0]


def test_a_sort_key_passes_arrays_by_index_only() -> None:
    document = {"a": [{"b": 1}]}
    assert order_key(Sort(pointer=("a", "0", "b")), document) == (1, 1)
    assert order_key(Sort(pointer=("a", "b")), document) == (0, 0)


# Keys of the index

scalars = st.one_of(
    st.text(max_size=12),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.just("a" * 400),
)


@given(scalars, scalars)
def test_keys_are_equal_where_values_are(one: str | float | bool, other: str | float | bool) -> None:
    is_equal = isinstance(one, bool) == isinstance(other, bool) and one == other
    assert (value_key(one) == value_key(other)) is is_equal


def test_whole_numbers_have_one_key_however_they_are_written() -> None:
    assert value_key(15) == value_key(15.0)
    assert value_key(10**22) == value_key(1e22)
    assert value_key(0) == value_key(-0.0)
    assert value_key(2**53 + 1) != value_key(float(2**53 + 1))
    assert value_key(1) != value_key(True)
    assert value_key("1") != value_key(1)


def test_long_values_have_a_key_that_fits_and_stand_whole_beside_it() -> None:
    one, other = "x" * 5000 + "1", "x" * 5000 + "2"
    assert value_key(one) != value_key(other)
    assert len(value_key(one)) < 400
    (entry,) = index_entries({"ext": {"a": one}})
    assert entry.key == value_key(one)
    assert entry.long_text == "s" + one


@given(st.text(max_size=6), st.text(max_size=6))
def test_a_range_holds_what_begins_like_its_prefix_and_nothing_else(prefix: str, text: str) -> None:
    low, high = text_range(prefix)
    for each in (prefix + text, text):
        is_inside = low.encode("utf-8", "surrogatepass") <= each.encode("utf-8", "surrogatepass") and (
            not high or each.encode("utf-8", "surrogatepass") < high.encode("utf-8", "surrogatepass")
        )
        assert is_inside is each.startswith(prefix)


def test_the_range_of_a_pattern_ends_with_its_first_wildcard() -> None:
    assert key_pattern("ab*c?") == ((("sab"), "sac"), "sab*c?")
    assert key_pattern("*") == (("s", "t"), "s*")


def test_entries() -> None:
    entries = index_entries(
        {"enabled": True, "via": ["g1", "g2"], "ext": {"a/b": {"c": [1, [True, "x"]]}, "none": None, "enabled": True}}
    )
    assert {(member, key) for member, key, _ in entries} == {
        ("/via", "sg1"),
        ("/via", "sg2"),
        ("/ext/a~1b/c", "n1"),
        ("/ext/a~1b/c", "b1"),
        ("/ext/a~1b/c", "sx"),
        ("/ext/enabled", "b1"),
    }
    assert {entry.member for entry in index_entries({"enabled": False})} == {"/enabled"}
