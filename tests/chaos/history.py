"""What clients asked and were told, and whether it can be true.

Each resource (a device, the credentials of a device) is a register. Each state of it has a number of its own and the
version (ETag) that the registry gave it. Whoever changes or deletes a resource names the version that it replaces
(If-Match), so what was acknowledged forms a chain from each creation to the deletion.

What is checked, with nothing assumed about the order of what overlaps in time:

* of two acknowledged changes none replaces the same version: no acknowledged write is lost;
* a look-up returns a state that was written, and that was current at some moment between its begin and its end;
* nothing is missing that was there all the time, nor created while it was there;
* a change that was refused (fail) was never seen.

A change whose outcome is unknown may have happened at any time from its begin on, or never.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["Contact", "Kind", "Operation", "Outcome", "check", "check_contacts"]


class Kind(Enum):
    """What is asked."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    READ = "read"


class Outcome(Enum):
    """What the client was told."""

    OK = "ok"
    FAIL = "fail"
    """It has changed nothing, or has told nothing."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One request."""

    resource: str
    kind: Kind
    outcome: Outcome
    begin: float
    """Monotonic, seconds; as is `end`."""
    end: float
    state: int | None = None
    """Of CREATE and UPDATE the number of the new state; of READ that which was found, `None` if there was nothing."""
    version: str | None = None
    """The version of `state`, where the client was told."""
    replaces: str | None = None
    """Of UPDATE and DELETE the version that was to be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """A first contact that was answered."""

    auth_id: str
    device_id: str
    is_new: bool
    """Whether the reply said that the device was made for it."""


def check(operations: Iterable[Operation]) -> list[str]:
    """Return what cannot be true; nothing if all is well."""
    by_resource: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_resource[operation.resource].append(operation)
    return [
        f"{resource}: {problem}"
        for resource, some in by_resource.items()
        for problem in _Register(some).find_problems()
    ]


class _Register:
    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self._writes = {
            one.state: one for one in operations if one.kind in {Kind.CREATE, Kind.UPDATE} and one.state is not None
        }
        self._reads = [one for one in operations if one.kind is Kind.READ and one.outcome is Outcome.OK]
        self._states: dict[str, int] = {}
        """By their versions."""
        for one in operations:
            if one.version is not None and one.state is not None and one.outcome is Outcome.OK:
                self._states.setdefault(one.version, one.state)
        known = {one.state for one in self._reads}
        known |= {self._states.get(one.replaces) for one in operations if one.replaces is not None}
        self._applied = [
            one
            for one in operations
            if one.kind is not Kind.READ
            and (one.outcome is Outcome.OK or (one.state is not None and one.state in known))
        ]
        """Changes that have happened."""
        self._next: dict[int, Operation] = {}
        """What replaced a state."""
        self._origins: dict[int, int | None] = {}
        """Of a state that which its chain begins with, as far as `_find_creation` has found out."""
        self._lives = self._find_lives()

    def find_problems(self) -> list[str]:
        problems = [*self._check_versions(), *self._check_chain()]
        for one in self._reads:
            problems += self._check_absent(one, "missing") if one.state is None else self._check_state(one, one.state)
        for one in self._applied:
            if one.kind is Kind.CREATE:
                problems += self._check_absent(one, "created")
        return problems

    def _check_versions(self) -> list[str]:
        return [
            f"version {one.version} belongs to states {self._states[one.version]} and {one.state}"
            for one in self._operations
            if one.version is not None
            and one.state is not None
            and one.outcome is Outcome.OK
            and self._states[one.version] != one.state
        ]

    def _check_chain(self) -> list[str]:
        problems = []
        for one in self._applied:
            if one.outcome is Outcome.FAIL:
                problems.append(f"{one.kind.value} of state {one.state} was refused, and has happened")
            if one.replaces is None:
                continue
            before = self._states[one.replaces]
            other = self._next.setdefault(before, one)
            if other is not one:
                problems.append(f"state {before} was replaced twice: by {_name(other)} and by {_name(one)}")
        return problems

    def _check_state(self, read: Operation, state: int) -> list[str]:
        write = self._writes.get(state)
        if write is None:
            return [f"state {state} was found, and never written"]
        if read.end < write.begin:
            return [f"state {state} was found before it was written"]
        following = self._next.get(state)
        if following is not None and following.outcome is Outcome.OK and following.end < read.begin:
            late = read.begin - following.end
            return [f"state {state} was found {late:.3f} s after it was replaced by {_name(following)}"]
        return []

    def _check_absent(self, one: Operation, what: str) -> list[str]:
        """Find a creation from whose end to its first deletion there is all the time of an operation."""
        before = bisect_left(self._lives, one.begin, key=lambda life: life.begin)
        if before == 0 or self._lives[before - 1].longest_end <= one.end:
            return []
        return [f"{what}, though it was there since state {self._lives[before - 1].longest} was created"]

    def _find_lives(self) -> list["_Life"]:
        """When the resource was there for sure: from the end of each creation to its first deletion, as they begin."""
        deletions: dict[int | None, float] = {}
        for one in self._operations:
            if one.kind is Kind.DELETE and one.outcome is not Outcome.FAIL and one.replaces is not None:
                origin = self._find_creation(self._states[one.replaces])
                deletions[origin] = min(deletions.get(origin, math.inf), one.begin)
        # Of a chain whose begin is not known it may be any.
        any_deletion = deletions.get(None, math.inf)
        creations = [
            one
            for one in self._applied
            if one.kind is Kind.CREATE and one.outcome is Outcome.OK and one.state is not None
        ]
        lives: list[_Life] = []
        longest, longest_end = 0, -math.inf
        for creation in sorted(creations, key=lambda one: one.end):
            assert creation.state is not None
            end = min(deletions.get(creation.state, math.inf), any_deletion)
            if end > longest_end:
                longest, longest_end = creation.state, end
            lives.append(_Life(creation.end, longest, longest_end))
        return lives

    def _find_creation(self, state: int) -> int | None:
        """Return the state that the chain of a state begins with; `None` if that is not known."""
        passed: list[int] = []
        origin: int | None = None
        while state not in self._origins:
            # Should the chain be a circle: it begins nowhere.
            self._origins[state] = None
            passed.append(state)
            write = self._writes.get(state)
            if write is None:
                break
            if write.kind is Kind.CREATE:
                origin = state
                break
            assert write.replaces is not None
            state = self._states[write.replaces]
        else:
            origin = self._origins[state]
        self._origins.update(dict.fromkeys(passed, origin))
        return origin


@dataclass(frozen=True, slots=True)
class _Life:
    """From a creation on a resource is there."""

    begin: float
    """When the creation had ended."""
    longest: int
    """The state created by that or an earlier one that stays the longest; this long: `longest_end`."""
    longest_end: float


def _name(one: Operation) -> str:
    return "a deletion" if one.kind is Kind.DELETE else f"state {one.state}"


def check_contacts(contacts: Iterable[Contact], stored: Mapping[str, str]) -> list[str]:
    """Check first contacts: one device for each certificate, made once.

    Args:
        contacts: What clients were told.
        stored: Auth-id -> device id, as it is in the end.
    """
    problems = []
    made: set[str] = set()
    for one in contacts:
        found = stored.get(one.auth_id)
        if found != one.device_id:
            problems.append(f"{one.auth_id}: the reply named device {one.device_id}, stored is {found}")
        if one.is_new and one.auth_id in made:
            problems.append(f"{one.auth_id}: made twice")
        if one.is_new:
            made.add(one.auth_id)
    if len(set(stored.values())) != len(stored):
        problems.append("two certificates have one device")
    return problems
