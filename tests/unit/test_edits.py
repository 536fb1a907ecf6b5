"""What options make of documents."""

import pytest

from kamado.edits import (
    Assignment,
    add_credential,
    find_member,
    parse_assignment,
    parse_filter,
    parse_member,
    parse_sort,
    remove_credential,
    set_credential,
    set_member,
    show_value,
    unset_member,
)
from kamado.errors import BadRequest, Conflict, NotFound


@pytest.mark.parametrize(
    ("text", "member"),
    [
        ("enabled", ("enabled",)),
        ("ext.brand", ("ext", "brand")),
        ("/ext/brand", ("ext", "brand")),
        ("/ext/a.b", ("ext", "a.b")),
        ("/ext/a~1b~0c", ("ext", "a/b~c")),
        ("adapters.0.type", ("adapters", "0", "type")),
    ],
)
def test_members_are_named_with_dots_or_as_json_pointers(text: str, member: tuple[str, ...]) -> None:
    assert parse_member(text) == member


@pytest.mark.parametrize("text", ["", "ext.", ".ext", "a..b", "/", "/a//b", "/a~2"])
def test_what_names_no_member(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_member(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=true", True),
        ("a=12", 12),
        ("a=1.5", 1.5),
        ("a=null", None),
        ("a=ACME", "ACME"),
        ("a=", ""),
        ('a="12"', "12"),
        ("a=0815", "0815"),
        ("a=x=y", "x=y"),
        ('a=["b"]', ["b"]),
        ('a={"b": 1}', {"b": 1}),
        ("a=Überall GmbH", "Überall GmbH"),
    ],
)
def test_value_that_is_json_is_that_and_any_other_is_text(text: str, value: object) -> None:
    assert parse_assignment(text) == Assignment(("a",), value)


def test_an_id_template_is_text() -> None:
    assert parse_assignment("a={{subject-cn}}-1") == Assignment(("a",), "{{subject-cn}}-1")


@pytest.mark.parametrize("text", ["a", "=1", 'a={"b": 1', "a=[1,]", 'a="x', "a=\udcff"])
def test_wrong_assignments(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("ext.brand=al*", "/ext/brand", "al*"),
        ("/ext/a~1b=x", "/ext/a~1b", "x"),
        ("enabled=true", "/enabled", True),
        ("ext.n=2.0", "/ext/n", 2.0),
        ('ext.n="2"', "/ext/n", "2"),
        ("ext.n=null", "/ext/n", "null"),
        ("ext.n=[1]", "/ext/n", "[1]"),
        ("ext.n={", "/ext/n", "{"),
    ],
)
def test_filters_have_values_of_management_7_2(text: str, field: str, value: object) -> None:
    assert parse_filter(text) == {"field": field, "value": value}
    with pytest.raises(BadRequest):
        parse_filter("enabled")


@pytest.mark.parametrize(
    ("text", "field", "direction"),
    [
        ("id", "/id", "asc"),
        ("ext.n:desc", "/ext/n", "desc"),
        ("ext.n:asc", "/ext/n", "asc"),
        ("/ext/urn:x", "/ext/urn:x", "asc"),
        ("/ext/urn:x:desc", "/ext/urn:x", "desc"),
    ],
)
def test_sort_keys_of_management_7_3(text: str, field: str, direction: str) -> None:
    with pytest.raises(BadRequest, match="asc or desc"):
        parse_sort("id:down")
    assert parse_sort(text) == {"field": field, "direction": direction}


def test_members_are_set_without_touching_the_original() -> None:
    document: dict[str, object] = {"ext": {"a": 1}, "adapters": [{"type": "x"}]}
    changed = set_member(document, Assignment(("ext", "b", "c"), 2))
    changed = set_member(changed, Assignment(("adapters", "0", "enabled"), True))
    assert changed == {"ext": {"a": 1, "b": {"c": 2}}, "adapters": [{"type": "x", "enabled": True}]}
    assert set_member(changed, Assignment(("adapters", "0"), 1))["adapters"] == [1]
    assert document == {"ext": {"a": 1}, "adapters": [{"type": "x"}]}


@pytest.mark.parametrize("member", ["enabled.x", "via.1", "via.x", "via.0.x", "enabled.x.y", "via.7.x"])
def test_member_of_what_is_no_object(member: str) -> None:
    with pytest.raises(BadRequest, match="what holds"):
        set_member({"enabled": True, "via": ["gw"]}, Assignment(parse_member(member), 1))


def test_members_are_left_out() -> None:
    document: dict[str, object] = {"ext": {"a": 1, "b": 2}, "via": ["x", "y"]}
    assert unset_member(document, ("ext", "a")) == {"ext": {"b": 2}, "via": ["x", "y"]}
    assert unset_member(document, ("via", "0"))["via"] == ["y"]
    for member in (("no",), ("ext", "no"), ("no", "no"), ("via", "7"), ("via", "7", "x"), ("ext", "a", "x")):
        assert unset_member(document, member) == document


def test_members_are_found_as_a_search_finds_them() -> None:
    """Management 7.2: in an array any element counts, unless there is an index."""
    document: dict[str, object] = {"adapters": [{"type": "a"}, {"type": "b"}, {}], "ext": {"x": None}, "enabled": False}
    assert find_member(document, ("adapters", "type")) == ["a", "b"]
    assert find_member(document, ("adapters", "1", "type")) == "b"
    assert find_member(document, ("adapters", "7", "type")) is None
    assert find_member(document, ("enabled", "x")) is None
    assert find_member(document, ("enabled",)) is False


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        ([], "-"),
        ({}, "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (["a", "b"], "a,b"),
        ([1], "[1]"),
        ({"a": 1}, '{"a":1}'),
        ("x", "x"),
    ],
)
def test_values_in_a_table(value: object, text: str) -> None:
    assert show_value(value) == text


# Credentials

PASSWORD: dict[str, object] = {
    "type": "hashed-password",
    "auth-id": "a",
    "enabled": False,
    "ext": {"x": 1},
    "secrets": [{"id": "1"}],
}
PSK: dict[str, object] = {"type": "psk", "auth-id": "a", "enabled": True, "secrets": [{"id": "2"}]}
NEW: dict[str, object] = {"type": "hashed-password", "auth-id": "a", "secrets": [{"pwd-plain": "x"}]}
CERTIFICATE: dict[str, object] = {"type": "x509-cert", "auth-id": "CN=a", "cert": "AAEC"}


def test_set_replaces_the_secrets_of_one_and_keeps_the_rest() -> None:
    assert set_credential([PASSWORD, PSK], NEW) == [{**PASSWORD, "secrets": [{"pwd-plain": "x"}]}, PSK]
    assert set_credential([PSK], NEW) == [PSK, NEW]
    old = {"type": "x509-cert", "auth-id": "CN=a", "enabled": False, "secrets": [{"id": "3"}]}
    assert set_credential([old], CERTIFICATE) == [{**CERTIFICATE, "enabled": False}]


def test_add_keeps_all_secrets() -> None:
    assert add_credential([PASSWORD, PSK], NEW) == [{**PASSWORD, "secrets": [{"id": "1"}, {"pwd-plain": "x"}]}, PSK]
    assert add_credential([PSK], NEW) == [PSK, NEW]
    assert add_credential([PSK], CERTIFICATE) == [PSK, CERTIFICATE]
    with pytest.raises(Conflict, match="CN=a"):
        add_credential([CERTIFICATE], CERTIFICATE)


def test_remove_one_or_one_of_its_secrets() -> None:
    two = {**PASSWORD, "secrets": [{"id": "1"}, {"id": "2"}]}
    assert remove_credential([two, PSK], "psk", "a") == [two]
    assert remove_credential([two, PSK], "hashed-password", "a", "1") == [{**two, "secrets": [{"id": "2"}]}, PSK]
    for arguments in (("psk", "b"), ("x", "a"), ("psk", "a", "1")):
        with pytest.raises(NotFound):
            remove_credential([two, PSK], *arguments)
    with pytest.raises(Conflict, match="only secret"):
        remove_credential([PSK], "psk", "a", "2")
