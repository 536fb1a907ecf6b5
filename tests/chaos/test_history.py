"""The checker of histories finds what it is there for."""

import pytest
from tests.chaos.history import Contact, Kind, Operation, Outcome, check, check_contacts

OK, FAIL, UNKNOWN = Outcome.OK, Outcome.FAIL, Outcome.UNKNOWN


def create(state: int, begin: float, end: float, outcome: Outcome = OK) -> Operation:
    version = f"v{state}" if outcome is OK else None
    return Operation(
        resource="d", kind=Kind.CREATE, outcome=outcome, begin=begin, end=end, state=state, version=version
    )


def update(state: int, replaces: int, begin: float, end: float, outcome: Outcome = OK) -> Operation:
    version = f"v{state}" if outcome is OK else None
    return Operation(
        resource="d",
        kind=Kind.UPDATE,
        outcome=outcome,
        begin=begin,
        end=end,
        state=state,
        version=version,
        replaces=f"v{replaces}",
    )


def delete(replaces: int, begin: float, end: float, outcome: Outcome = OK) -> Operation:
    return Operation(resource="d", kind=Kind.DELETE, outcome=outcome, begin=begin, end=end, replaces=f"v{replaces}")


def read(state: int | None, begin: float, end: float, version: str | None = None) -> Operation:
    return Operation(resource="d", kind=Kind.READ, outcome=OK, begin=begin, end=end, state=state, version=version)


GOOD: dict[str, list[Operation]] = {
    "nothing": [],
    "one after the other": [
        read(None, 0, 1),
        create(1, 2, 3),
        read(1, 4, 5),
        update(2, 1, 6, 7),
        read(2, 8, 9),
        delete(2, 10, 11),
        read(None, 12, 13),
        create(3, 14, 15),
        read(3, 16, 17),
    ],
    "side by side": [
        create(1, 0, 10),
        read(None, 1, 2),
        read(1, 3, 4),
        update(2, 1, 11, 20),
        read(1, 12, 13),
        read(2, 14, 15),
        delete(2, 21, 30),
        read(2, 22, 23),
        read(None, 24, 25),
    ],
    "unknown and done": [
        create(1, 0, 1),
        update(2, 1, 2, 3, UNKNOWN),
        read(1, 4, 5),
        read(2, 6, 7, "v2"),
        update(3, 2, 8, 9),
        read(3, 10, 11),
    ],
    "unknown and not done": [create(1, 0, 1), update(2, 1, 2, 3, UNKNOWN), update(3, 1, 4, 5), read(3, 6, 7)],
    "refused": [create(1, 0, 1), create(2, 2, 3, FAIL), update(3, 1, 4, 5, FAIL), read(1, 6, 7)],
    "a deletion of which nobody knows": [create(1, 0, 1), delete(1, 2, 3, UNKNOWN), read(None, 4, 5), create(2, 6, 7)],
    "a creation of which nobody knows": [create(1, 0, 1, UNKNOWN), read(1, 2, 3, "v1"), delete(1, 4, 5)],
}
BAD: dict[str, tuple[list[Operation], str]] = {
    "a write is lost": ([create(1, 0, 1), update(2, 1, 2, 3), read(1, 4, 5)], "after it was replaced"),
    "a creation is lost": ([create(1, 0, 1), read(None, 2, 3)], "missing"),
    "two replace the same": ([create(1, 0, 1), update(2, 1, 2, 3), update(3, 1, 2, 3)], "replaced twice"),
    "a deletion replaces what was replaced": ([create(1, 0, 1), update(2, 1, 2, 3), delete(1, 4, 5)], "replaced twice"),
    "an unknown one replaces the same": (
        [create(1, 0, 1), update(2, 1, 2, 3, UNKNOWN), update(3, 1, 4, 5), read(2, 6, 7)],
        "replaced twice",
    ),
    "created twice": ([create(1, 0, 1), create(2, 2, 3)], "created, though it was there"),
    "refused and done": ([create(1, 0, 1), update(2, 1, 2, 3, FAIL), read(2, 4, 5)], "was refused, and has happened"),
    "out of nothing": ([create(1, 0, 1), read(9, 2, 3)], "never written"),
    "before its time": ([read(1, 0, 1), create(1, 2, 3)], "before it was written"),
    "deleted and found": ([create(1, 0, 1), delete(1, 2, 3), read(1, 4, 5)], "after it was replaced by a deletion"),
    "missing in another life": (
        [create(1, 0, 1), delete(1, 2, 3), create(2, 4, 5), read(None, 6, 7), delete(2, 8, 9)],
        "missing",
    ),
    "a version of two states": ([create(1, 0, 1), update(2, 1, 2, 3), read(1, 2, 3, "v2")], "belongs to states"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_history_that_can_be_true_has_no_problem(name: str) -> None:
    assert check(GOOD[name]) == []


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_cannot_be_true_is_found(name: str) -> None:
    history, text = BAD[name]
    assert any(text in problem for problem in check(history)), check(history)


def test_a_history_of_hours_is_checked() -> None:
    """Looking at each life for each operation would take an hour."""
    history = []
    for number in range(20_000):
        begin = 10 * number
        history += [
            create(number, begin, begin + 1),
            read(number, begin + 2, begin + 3),
            read(None, begin + 8, begin + 9),
        ]
        history.append(delete(number, begin + 4, begin + 5))
    assert check(history) == []
    assert len(check([*history, read(None, 123_452, 123_453)])) == 1


def contact(auth_id: str, device_id: str, *, is_new: bool = False) -> Contact:
    return Contact(auth_id=auth_id, device_id=device_id, is_new=is_new)


def test_first_contacts() -> None:
    contacts = [contact("a", "1", is_new=True), contact("a", "1"), contact("b", "2")]
    assert check_contacts(contacts, {"a": "1", "b": "2", "c": "3"}) == []
    for wrong, stored, text in (
        (contact("a", "9"), {"a": "1", "b": "2"}, "the reply named device 9"),
        (contact("a", "1", is_new=True), {"a": "1", "b": "2"}, "made twice"),
        (contact("a", "1"), {"b": "2"}, "stored is None"),
        (contact("a", "1"), {"a": "1", "b": "2", "c": "2"}, "two certificates"),
    ):
        assert any(text in problem for problem in check_contacts([*contacts, wrong], stored))
