"""A registry from one database to another: `begin`, `copy`, `compare`, `finish`.

Records go page by page, in the order of their keys. How far the copy is stands in the copy itself, written in the
transaction that brings a page: killed at any moment, it goes on where it stopped. It is finished only when both
databases were read once more and found equal, and until then nobody opens it to serve.

The source is only read. Nothing keeps others from changing it meanwhile; the comparison tells.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from kamado.errors import Conflict
from kamado.store import CopyNote, Record, RecordKind, Store, Transaction

__all__ = ["Comparison", "Difference", "Stopped", "begin", "compare", "copy", "finish"]

Progress = Callable[[int, int], None]
"""Told how many records are done, of how many."""
ShouldStop = Callable[[], bool]

_PAGE: Final = 1000
_ALL: Final = tuple(RecordKind)


class Stopped(Exception):
    """Somebody wanted it to stop, between two transactions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A record that is not the same in both databases."""

    kind: RecordKind
    key: Record
    in_source: bool
    in_target: bool

    def __str__(self) -> str:
        what = "is different"
        if not self.in_target:
            what = "is only in the source"
        elif not self.in_source:
            what = "is only in the target"
        return f"{self.kind}: {' / '.join(map(str, self.key))} {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What has come of comparing two databases."""

    counts: dict[RecordKind, int]
    """The records of the source."""
    differences: int
    first: tuple[Difference, ...]
    """Some of them."""


async def begin(source: Store, target: Store) -> CopyNote:
    """Begin a copy, or find the one that was begun.

    Returns:
        How far it is.

    Raises:
        Conflict: The target holds something else, or the schemas are not the same.
    """
    await _check_schemas(source, target)
    note = CopyNote(source=await _identify(source))

    async def work(transaction: Transaction) -> CopyNote:
        found = await transaction.find_copy()
        if found is not None:
            if found.source != note.source:
                raise Conflict(
                    "the target is an unfinished copy of another database, or the source has changed since: begin "
                    "again with an empty target"
                )
            return found
        for kind in _ALL:
            if await transaction.list_records(kind, (), 1):
                raise Conflict(f"the target must be empty, and holds {kind}")
        await transaction.put_copy(note)
        return note

    return await target.write(work)


async def _check_schemas(source: Store, target: Store) -> None:
    """A later schema that this version can work with may have more than it knows of."""
    ours, theirs = [await store.read(lambda transaction: transaction.find_schema()) for store in (source, target)]
    if ours != theirs:
        raise Conflict(
            f"the source has schema {ours}, the target {theirs}: use the version of Kamado that knows the later one, "
            "and bring both up to date with it"
        )


async def _identify(source: Store) -> str:
    """Tell a source from others: by its logins, whose hashes are like no others, and its first tenants' versions."""

    async def work(transaction: Transaction) -> list[list[Record]]:
        kinds = (RecordKind.IDENTITY, RecordKind.OPERATOR, RecordKind.TENANT)
        return [await transaction.list_records(kind, (), _PAGE) for kind in kinds]

    return hashlib.sha256(json.dumps(await source.read(work)).encode()).hexdigest()


async def copy(
    source: Store, target: Store, note: CopyNote, *, progress: Progress, should_stop: ShouldStop
) -> CopyNote:
    """Copy what is missing.

    Args:
        source: What is copied.
        target: Where to; `begin` was there.
        note: What `begin` said.
        progress: See there.
        should_stop: Asked before each page.

    Returns:
        The note of a copy that has everything.

    Raises:
        Stopped: `should_stop` said so.
        Conflict: Somebody else makes the copy go on.
        DamagedRow: The document of a record cannot be read.
    """
    total = sum((await _count(source)).values())
    progress(note.records, total)
    kinds = () if note.kind is None else _ALL[_ALL.index(note.kind) :]
    for kind in kinds:
        last = note.last if kind is note.kind else ()
        page = await _read(source, kind, last)
        while page:
            if should_stop():
                raise Stopped
            last = page[-1][: kind.key_size]
            after = replace(note, kind=kind, last=last, records=note.records + len(page))
            # While one database writes a page, the other one reads the next.
            _, page = await asyncio.gather(
                target.write(partial(_insert, kind=kind, page=page, before=note, after=after)),
                _read(source, kind, last),
            )
            note = after
            progress(note.records, max(total, note.records))
    if note.kind is not None:
        complete = replace(note, kind=None, last=())
        await target.write(partial(_go_on, before=note, after=complete))
        note = complete
    return note


async def _insert(
    transaction: Transaction, *, kind: RecordKind, page: Sequence[Record], before: CopyNote, after: CopyNote
) -> None:
    await _go_on(transaction, before=before, after=after)
    await transaction.insert_records(kind, page)


async def _go_on(transaction: Transaction, *, before: CopyNote, after: CopyNote) -> None:
    if await transaction.find_copy() != before:
        raise Conflict("another process copies into the same target")
    await transaction.put_copy(after)


async def finish(target: Store) -> None:
    """Let a copy be served, once `compare` has found nothing."""
    await target.write(lambda transaction: transaction.delete_copy())


async def compare(
    source: Store, target: Store, *, progress: Progress, should_stop: ShouldStop, shown: int = 10
) -> Comparison:
    """Compare all records of two databases.

    Args:
        source: One.
        target: The other one.
        progress: See there.
        should_stop: Asked before each page.
        shown: How many differences to return.

    Raises:
        Stopped: `should_stop` said so.
        Conflict: The schemas are not the same.
    """
    await _check_schemas(source, target)
    total = sum((await _count(source)).values())
    counts = dict.fromkeys(_ALL, 0)
    differences = 0
    first: list[Difference] = []
    progress(0, total)
    for kind in _ALL:
        async for number, found in _compare(source, target, kind):
            if should_stop():
                raise Stopped
            counts[kind] += number
            differences += len(found)
            first += found[: shown - len(first)]
            done = sum(counts.values())
            progress(done, max(total, done))
    return Comparison(counts=counts, differences=differences, first=tuple(first))


async def _compare(source: Store, target: Store, kind: RecordKind) -> AsyncIterator[tuple[int, list[Difference]]]:
    """Compare the records of a kind, a page at a time: how many the source has, and what is different."""
    size = kind.key_size
    after: Record = ()
    while True:
        ours, theirs = await asyncio.gather(_read(source, kind, after), _read(target, kind, after))
        # What comes after the last one of a full page was not read.
        ends = [page[-1][:size] for page in (ours, theirs) if len(page) == _PAGE]
        end = min(ends, default=None)
        if ours == theirs:
            yield len(ours), []
        else:
            left, right = (
                {record[:size]: record for record in page if end is None or record[:size] <= end}
                for page in (ours, theirs)
            )
            yield (
                len(left),
                [
                    Difference(kind=kind, key=key, in_source=key in left, in_target=key in right)
                    for key in sorted({*left, *right})
                    if left.get(key) != right.get(key)
                ],
            )
        if end is None:
            return
        after = end


async def _read(store: Store, kind: RecordKind, after: Record) -> list[Record]:
    return await store.read(lambda transaction: transaction.list_records(kind, after, _PAGE))


async def _count(store: Store) -> dict[RecordKind, int]:
    async def work(transaction: Transaction) -> dict[RecordKind, int]:
        return {kind: await transaction.count_records(kind) for kind in _ALL}

    return await store.read(work)
