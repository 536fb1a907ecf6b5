"""Searches as SQL: which index leads, what is checked on the way, where a page begins (management 7).

Two indexes carry it. `device_members` (and `tenant_members`) hold each value of a document under its pointer, so that
equality and prefix of any member are ranges of a key. `device_ranges` counts the devices of consecutive ids, so that
the page at any offset is found without passing all that lie before it.

A search has one **driver**, the set of candidates that is read in order: the smallest index range among its filters,
or else all devices of the tenant. All other conditions are checked on each candidate. Every set begins with the tenant,
which is a parameter like every other value: no filter reaches another tenant's devices.
"""

# ruff: noqa: S608 - the parts of a statement are texts of this file; what comes from outside is a parameter

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kamado.search import (
    Filter,
    KeyRange,
    Pointer,
    Query,
    Sort,
    index_entries,
    is_index,
    key_pattern,
    member_key,
    split_pattern,
    text_range,
    value_key,
)
from kamado.storage.sql import (
    COUNT_DEVICES,
    INSERT_DEVICE_MEMBER,
    INSERT_RANGE,
    INSERT_TENANT_MEMBER,
    Row,
    Session,
    Value,
    document_of,
    instant_of,
)
from kamado.store import Found, FoundDevice, FoundTenant

__all__ = ["Order", "SearchDialect", "SearchSession", "SqlSearches", "fill_search_tables"]

_FEW: Final = 5000
"""Candidates of a driver up to which other conditions are better checked on each document than by another index."""

_MAX_PLACES: Final = 8
"""Where a pointer with array indexes may lead, for an index that does not have them."""

FIND_TENANT = "SELECT 1 FROM tenants WHERE tenant_id = ?1"
COUNT_TENANTS = "SELECT count(*) FROM tenants"
COUNT_ALL = """SELECT (SELECT count(*) FROM tenants),
 (SELECT CAST(coalesce(sum(devices), 0) AS BIGINT) FROM tenant_usage
  WHERE tenant_id IN (SELECT tenant_id FROM tenants))"""
FETCH_TENANTS = "SELECT tenant_id, document FROM tenants WHERE tenant_id = ANY(?1)"
FETCH_DEVICES = """
SELECT device_id, created, updated, auto_provisioned, notification_sent, document
FROM devices WHERE tenant_id = ?1 AND device_id = ANY(?2)"""

# Places in the order of ids, by `device_ranges`.

FIND_RANGE_OF_ID = "SELECT max(first_id) FROM device_ranges WHERE tenant_id = ?1 AND first_id <= ?2"
COUNT_BEFORE_RANGE = "SELECT coalesce(sum(devices), 0) FROM device_ranges WHERE tenant_id = ?1 AND first_id < ?2"
COUNT_IN_RANGE = "SELECT count(*) FROM devices WHERE tenant_id = ?1 AND device_id >= ?2 AND device_id < ?3"
FIND_RANGE_OF_PLACE = """
SELECT first_id, place FROM
  (SELECT first_id, devices, CAST(sum(devices) OVER (ORDER BY first_id) AS BIGINT) - devices AS place
   FROM device_ranges WHERE tenant_id = ?1) AS places
WHERE place <= ?2 AND place + devices > ?2"""
LIST_FROM_RANGE = """
SELECT device_id FROM devices WHERE tenant_id = ?1 AND device_id >= ?2 ORDER BY device_id LIMIT ?3 OFFSET ?4"""
LIST_AFTER = """
SELECT device_id FROM devices WHERE tenant_id = ?1 AND device_id > ?2 ORDER BY device_id LIMIT ?3"""

# All ids that stand in some device's `via`: one step through the index for each, however many devices each has.
GATEWAYS: Final = """
WITH RECURSIVE named (key) AS (
  SELECT min(value) FROM device_members WHERE tenant_id = ?1 AND member = '/via'
  UNION ALL
  SELECT (SELECT min(value) FROM device_members WHERE tenant_id = ?1 AND member = '/via' AND value > named.key)
  FROM named WHERE named.key IS NOT NULL)
SELECT substr(key, 2) AS device_id FROM named WHERE key IS NOT NULL
UNION SELECT device_id FROM device_groups WHERE tenant_id = ?1"""


class SearchSession(Protocol):
    """What of `sql.Session` searches need; see there."""

    async def one(self, statement: str, *parameters: Value) -> Row | None:
        """Return the first row."""

    async def all(self, statement: str, *parameters: Value) -> list[Row]:
        """Return all rows."""

    def array(self, values: Sequence[str]) -> Value:
        """Return the parameter for `= ANY(?n)`."""


class Order(NamedTuple):
    """A place in an order, as SQL."""

    join: str
    """What follows the table of the document in `FROM`; mostly nothing."""
    parts: Sequence[str]
    """The first goes first."""


class SearchDialect(Protocol):
    """What databases do not have in common, as SQL."""

    reads_documents_quickly: bool
    """Whether `meets` is to check patterns on many documents, too, rather than a set of all that match."""

    def is_match(self, text: str, pattern: str, add: Callable[[Value], str]) -> str:
        """Return "a text matches a pattern" (management 7.2); `add` makes a value a parameter."""

    def meets(self, document: str, condition: Filter, add: Callable[[Value], str]) -> str:
        """Return "a document meets a condition", by the rules themselves."""

    def timestamp(self, column: str) -> str:
        """Return an instant as `status` shows it."""

    def order(self, document: str, sort: Sort, name: str, add: Callable[[Value], str]) -> Order:
        """Return a document's place in an order (management 7.3).

        Args:
            document: The column.
            sort: The order.
            name: A name for what has to be joined, which nothing else has.
            add: See `is_match`.
        """


class _Space(NamedTuple):
    """What is searched: its tables and their key."""

    table: str
    members: str
    identifier: str


_DEVICES: Final = _Space("devices", "device_members", "device_id")
_TENANTS: Final = _Space("tenants", "tenant_members", "tenant_id")


class _Statement:
    """A statement in the making. Its first parameter is the tenant, where there is one."""

    def __init__(self, tenant_id: str | None) -> None:
        self.values: list[Value] = [] if tenant_id is None else [tenant_id]
        self._has_tenant = tenant_id is not None

    def add(self, value: Value) -> str:
        """Add a parameter."""
        self.values.append(value)
        return f"?{len(self.values)}"

    def own(self, alias: str) -> str:
        """Return the condition that keeps a table to the tenant."""
        return f"{alias}.tenant_id = ?1" if self._has_tenant else "1 = 1"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where candidates come from."""

    sql: str
    identifier: str
    conditions: tuple[str, ...] = ()
    has_document: bool = False
    """Whether it is the table with the documents, under the name `d`."""
    is_repeated: bool = False
    """Whether a candidate may come more than once."""


class _Driver(NamedTuple):
    source: Callable[[_Statement], _Source]
    candidates: int
    """Up to `_FEW` exactly; one more stands for any number."""
    leads: Filter | None = None
    """The filter that all candidates meet."""
    looks_for: Filter | None = None
    """The pattern that is looked for among more entries of the index than match."""


class _Condition(NamedTuple):
    """A condition on a candidate, from the statement and the name of the candidate's id."""

    sql: Callable[[_Statement, str], str]
    needs_document: bool = False


class SqlSearches:
    """`store.Searches` over a session; see there."""

    def __init__(self, session: SearchSession, dialect: SearchDialect) -> None:
        self._session = session
        self._dialect = dialect

    async def find_tenants(self, query: Query) -> Found[FoundTenant]:
        page = await _Search(self._session, self._dialect, _TENANTS, None, query).run()
        rows: dict[str, Row] = {}
        if page.ids:
            rows = {row[0]: row for row in await self._session.all(FETCH_TENANTS, self._session.array(page.ids))}
        return Found(
            total=page.total,
            results=tuple(
                FoundTenant(tenant_id=tenant_id, document=document_of(rows[tenant_id][1], "tenants", tenant_id))
                for tenant_id in page.ids
            ),
            scanned=page.scanned,
        )

    async def find_devices(self, tenant_id: str, query: Query) -> Found[FoundDevice]:
        session = self._session
        has_tenant = await session.one(FIND_TENANT, tenant_id) is not None
        interval = _interval(query)
        if interval is None:
            page = await _Search(session, self._dialect, _DEVICES, tenant_id, query).run()
        else:
            page = await _Interval(session, tenant_id, query, interval).run()
        rows: dict[str, Row] = {}
        if page.ids:
            rows = {row[0]: row for row in await session.all(FETCH_DEVICES, tenant_id, session.array(page.ids))}
        return Found(
            total=page.total,
            results=tuple(_found_device(tenant_id, rows[device_id]) for device_id in page.ids),
            scanned=page.scanned,
            has_tenant=has_tenant,
        )

    async def count(self) -> tuple[int, int]:
        row = await self._session.one(COUNT_ALL)
        assert row is not None
        return row[0], row[1]


def _found_device(tenant_id: str, row: Row) -> FoundDevice:
    device_id, created, updated, auto_provisioned, notification_sent, text = row
    return FoundDevice(
        device_id=device_id,
        created=instant_of(created),
        updated=None if updated is None else instant_of(updated),
        auto_provisioned=bool(auto_provisioned),
        notification_sent=bool(notification_sent),
        document=document_of(text, "devices", tenant_id, device_id),
    )


class _Page(NamedTuple):
    ids: list[str]
    total: int
    scanned: int


# Devices in the order of their ids, without a condition that would need a look at each


def _interval(query: Query) -> KeyRange | None:
    """Return the ids that a query asks for, if they are an interval in the order of ids, or in its reverse."""
    if query.is_gateway is not None or len(query.filters) > 1 or len(query.sorts) > 1:
        return None
    if query.sorts and query.sorts[0].pointer != ("id",):
        return None
    if not query.filters:
        return KeyRange("", "")
    (condition,) = query.filters
    if condition.pointer != ("id",) or not isinstance(condition.value, str):
        return None
    prefix, rest = split_pattern(condition.value)
    return text_range(prefix) if prefix and rest == "*" else None


class _Interval:
    """A page of an interval of ids, found by places: `device_ranges` tells how many devices lie before an id."""

    def __init__(self, session: SearchSession, tenant_id: str, query: Query, interval: KeyRange) -> None:
        self._session = session
        self._tenant_id = tenant_id
        self._query = query
        self._interval = interval

    async def run(self) -> _Page:
        query, (low, high) = self._query, self._interval
        first = await self._count_before(low) if low else 0
        end = await self._count_before(high) if high else await self._count_all()
        total, size, start = end - first, query.page_size, first + query.page_offset
        if query.after is not None and query.after >= low:
            rows = await self._session.all(LIST_AFTER, self._tenant_id, query.after, size)
            ids = [row[0] for row in rows if not high or row[0] < high]
            return _Page(ids, total, len(ids))
        is_reversed = bool(query.sorts) and query.sorts[0].descending
        if is_reversed:
            size = min(size, total - query.page_offset)
            start = end - query.page_offset - size
        size = min(size, end - start)
        if size <= 0:
            return _Page([], total, 0)
        row = await self._session.one(FIND_RANGE_OF_PLACE, self._tenant_id, start)
        assert row is not None, "device_ranges counts fewer devices than tenant_usage"
        rows = await self._session.all(LIST_FROM_RANGE, self._tenant_id, row[0], size, start - row[1])
        ids = [row[0] for row in rows]
        if is_reversed:
            ids.reverse()
        return _Page(ids, total, len(ids))

    async def _count_all(self) -> int:
        row = await self._session.one(COUNT_DEVICES, self._tenant_id)
        return 0 if row is None else int(row[0])

    async def _count_before(self, device_id: str) -> int:
        row = await self._session.one(FIND_RANGE_OF_ID, self._tenant_id, device_id)
        if row is None or row[0] is None:
            return 0
        before = await self._session.one(COUNT_BEFORE_RANGE, self._tenant_id, row[0])
        inside = await self._session.one(COUNT_IN_RANGE, self._tenant_id, row[0], device_id)
        assert before is not None
        assert inside is not None
        return int(before[0]) + int(inside[0])


# Everything else


class _Search:
    """One search with conditions, or in another order."""

    def __init__(
        self, session: SearchSession, dialect: SearchDialect, space: _Space, tenant_id: str | None, query: Query
    ) -> None:
        self._session = session
        self._dialect = dialect
        self._space = space
        self._tenant_id = tenant_id
        self._query = query

    async def run(self) -> _Page:
        query = self._query
        if any(self._is_impossible(condition) for condition in query.filters):
            return _Page([], 0, 0)
        driver = await self._choose_driver()
        few = driver.candidates <= _FEW
        conditions = [
            self._condition(condition, is_probe=few) for condition in query.filters if condition is not driver.leads
        ]
        if query.is_gateway is not None and driver.source != self._gateways:
            conditions.append(self._gateway_condition(wanted=query.is_gateway, is_probe=few))
        candidates = driver.candidates if few else await self._count(driver, [])
        complement = await self._count_complement(driver, conditions)
        if complement is not None:
            total = candidates - complement
        else:
            total = await self._count(driver, conditions) if conditions else candidates
        ids: list[str] = []
        if total and query.page_size and query.page_offset < total:
            ids = await self._list(driver, conditions)
        if query.sorts or (conditions and complement is None):
            scanned = candidates
        else:
            scanned = (complement or 0) + min(total, query.page_offset + len(ids))
        if driver.looks_for is not None:
            scanned = max(scanned, await self._count_entries(driver.looks_for))
        return _Page(ids, total, scanned)

    # Conditions

    def _is_impossible(self, condition: Filter) -> bool:
        """Tell whether nothing can meet a condition, whatever is stored."""
        pointer, value = condition.pointer, condition.value
        if not pointer:
            return True  # the whole object, which is no scalar
        if pointer == ("id",):
            return not isinstance(value, str)
        if pointer == ("enabled",):
            return not isinstance(value, bool)
        if self._has_status and pointer[0] == "status":
            is_text = isinstance(value, str)
            return not (pointer in _FLAGS and value is True) and not (pointer in _INSTANTS and is_text)
        return False

    @property
    def _has_status(self) -> bool:
        return self._space is _DEVICES

    def _condition(self, condition: Filter, *, is_probe: bool) -> _Condition:
        """Return the condition of a filter.

        Args:
            condition: The filter.
            is_probe: There are few candidates, so a look at each document is cheap.
        """
        pointer, value = condition.pointer, condition.value
        if pointer == ("id",):
            return _Condition(lambda statement, identifier: self._id_condition(statement, condition, identifier))
        if pointer == ("enabled",):
            return _Condition(lambda statement, identifier: self._enabled_condition(statement, condition, identifier))
        if self._has_status and pointer in _FLAGS:
            return _Condition(lambda *_: f"d.{_FLAGS[pointer]} = 1", needs_document=True)
        if self._has_status and pointer in _INSTANTS:
            assert isinstance(value, str)
            text = self._dialect.timestamp(f"d.{_INSTANTS[pointer]}")
            return _Condition(lambda statement, _: self._is_match(statement, text, value), needs_document=True)
        is_read = is_probe or self._dialect.reads_documents_quickly
        if condition.has_index or (is_read and condition.is_pattern):
            return _Condition(
                lambda statement, _: self._dialect.meets("d.document", condition, statement.add),
                needs_document=True,
            )
        if condition.is_pattern:
            return _Condition(
                lambda statement, identifier: f"{identifier} IN ({self._matching_ids(statement, condition)})"
            )
        return _Condition(lambda statement, identifier: self._has_member(statement, condition, identifier))

    def _id_condition(self, statement: _Statement, condition: Filter, identifier: str) -> str:
        assert isinstance(condition.value, str)
        if not condition.is_pattern:
            return f"{identifier} = {statement.add(condition.value)}"
        low, high = text_range(split_pattern(condition.value)[0])
        parts = [self._is_match(statement, identifier, condition.value)]
        if low:
            parts.append(f"{identifier} >= {statement.add(low)}")
        if high:
            parts.append(f"{identifier} < {statement.add(high)}")
        return " AND ".join(parts)

    def _enabled_condition(self, statement: _Statement, condition: Filter, identifier: str) -> str:
        # The index has those that are disabled.
        disabled = self._has_member(statement, _DISABLED, identifier)
        return disabled if condition.value is False else f"NOT {disabled}"

    def _has_member(self, statement: _Statement, condition: Filter, identifier: str) -> str:
        return (
            f"EXISTS (SELECT 1 FROM {self._space.members} h WHERE {self._members(statement, 'h', condition)} "
            f"AND h.{self._space.identifier} = {identifier} {_EACH})"
        )

    def _matching_ids(self, statement: _Statement, condition: Filter) -> str:
        return (
            f"SELECT p.{self._space.identifier} FROM {self._space.members} p "
            f"WHERE {self._members(statement, 'p', condition)}"
        )

    def _members(self, statement: _Statement, alias: str, condition: Filter) -> str:
        """Return the condition on the rows of the index that meet a filter."""
        own = f"{statement.own(alias)} AND {alias}.member = {statement.add(member_key(condition.pointer))}"
        if not condition.is_pattern:
            return f"{own} AND {alias}.value = {statement.add(value_key(condition.value))}"
        assert isinstance(condition.value, str)
        (low, high), pattern = key_pattern(condition.value)
        within = f"{own} AND {alias}.value >= {statement.add(low)} AND {alias}.value < {statement.add(high)}"
        if pattern == f"{low}*":
            return within
        text = f"coalesce({alias}.long_text, {alias}.value)"
        return f"{within} AND {self._is_match(statement, text, pattern)}"

    def _is_match(self, statement: _Statement, text: str, pattern: str) -> str:
        return self._dialect.is_match(text, pattern, statement.add)

    def _gateway_condition(self, *, wanted: bool, is_probe: bool) -> _Condition:
        """Return the condition of management 7.4; see `_condition`."""
        # For many candidates PostgreSQL may read all gateways once.
        each = _EACH if is_probe else ""

        def sql(statement: _Statement, identifier: str) -> str:
            is_gateway = (
                f"(EXISTS (SELECT 1 FROM device_members v WHERE {statement.own('v')} AND v.member = '/via' "
                f"AND v.value = 's' || {identifier} {each}) "
                f"OR EXISTS (SELECT 1 FROM device_groups g WHERE {statement.own('g')} "
                f"AND g.device_id = {identifier} {each}))"
            )
            return is_gateway if wanted else f"NOT {is_gateway}"

        return _Condition(sql)

    # Drivers

    async def _choose_driver(self) -> _Driver:
        best: _Driver | None = None
        # Equality first: of two that are large, it comes in the order of ids and needs no sorting.
        for condition in sorted(self._query.filters, key=lambda each: each.is_pattern):
            if best is not None and best.candidates <= _FEW and condition.is_pattern:
                break  # to find out how many match could take longer than to check the few
            source = self._lead(condition)
            if source is None:
                continue
            leads = None if condition.has_index else condition
            looks_for = condition if condition.is_pattern and condition.pointer != ("id",) else None
            driver = _Driver(source, await self._count_few(source), leads, looks_for)
            if best is None or driver.candidates < best.candidates:
                best = driver
        if best is not None:
            return best
        if self._query.is_gateway:
            return _Driver(self._gateways, await self._count_few(self._gateways))
        return _Driver(self._everything, await self._count_few(self._everything))

    def _lead(self, condition: Filter) -> Callable[[_Statement], _Source] | None:
        """Return the source of all that meets a filter, if an index has it."""
        space = self._space
        if condition.pointer == ("id",):
            if not split_pattern(str(condition.value))[0]:
                return None

            def by_id(statement: _Statement) -> _Source:
                named = self._id_condition(statement, condition, f"d.{space.identifier}")
                return _Source(f"{space.table} d", f"d.{space.identifier}", (statement.own("d"), named), True)

            return by_id
        if self._has_status and condition.pointer[0] == "status":
            return None
        if condition.has_index:
            return self._lead_to_element(condition)
        if condition.pointer == ("enabled",) and condition.value is True:
            return None
        if condition.is_pattern:
            return lambda statement: _Source(
                f"({self._matching_ids(statement, condition)}) c", f"c.{space.identifier}", is_repeated=True
            )
        return lambda statement: _Source(
            f"{space.members} m", f"m.{space.identifier}", (self._members(statement, "m", condition),)
        )

    def _lead_to_element(self, condition: Filter) -> Callable[[_Statement], _Source] | None:
        """Return a source of what may meet a filter with array indexes, which the index does not have.

        Each may also be the name of a member, so there are two places to look for each.
        """
        pointers: list[Pointer] = [()]
        for token in condition.pointer:
            kept = [(*pointer, token) for pointer in pointers]
            pointers = kept + (pointers if is_index(token) else [])
        if len(pointers) > _MAX_PLACES:
            return None
        places = [Filter(pointer=pointer, value=condition.value) for pointer in pointers if pointer]
        return lambda statement: _Source(
            f"({' UNION ALL '.join(self._matching_ids(statement, place) for place in places)}) c",
            f"c.{self._space.identifier}",
            is_repeated=True,
        )

    def _everything(self, statement: _Statement) -> _Source:
        space = self._space
        return _Source(f"{space.table} d", f"d.{space.identifier}", (statement.own("d"),), True)

    def _gateways(self, statement: _Statement) -> _Source:
        # Who is named need not exist.
        exists = f"EXISTS (SELECT 1 FROM devices x WHERE {statement.own('x')} AND x.device_id = c.device_id {_EACH})"
        return _Source(f"({GATEWAYS}) c", "c.device_id", (exists,))

    # Statements

    async def _count_few(self, source: Callable[[_Statement], _Source]) -> int:
        """Count candidates as `_Driver` has them."""
        statement = _Statement(self._tenant_id)
        found = source(statement)
        text = (
            f"SELECT count(*), count(DISTINCT id) FROM (SELECT {found.identifier} AS id FROM {found.sql} "
            f"{_where(found.conditions)} LIMIT {statement.add(_FEW + 1)}) few"
        )
        row = await self._session.one(text, *statement.values)
        assert row is not None
        return int(row[1] if row[0] <= _FEW else row[0])

    async def _count(self, driver: _Driver, conditions: list[_Condition]) -> int:
        if driver.source == self._everything and not conditions:
            return await self._count_everything()
        statement = _Statement(self._tenant_id)
        tail, _ = self._tail(statement, driver, conditions)
        return await self._number(f"SELECT count(*) {tail}", statement)

    async def _count_everything(self) -> int:
        statement = _Statement(self._tenant_id)
        return await self._number(COUNT_TENANTS if self._tenant_id is None else COUNT_DEVICES, statement)

    async def _count_complement(self, driver: _Driver, conditions: list[_Condition]) -> int | None:
        """Count what one condition leaves out, if an index has that and not what it keeps: disabled ones, gateways."""
        query = self._query
        if len(conditions) != 1 or driver.source != self._everything:
            return None
        if query.is_gateway is False:
            return await self._count(_Driver(self._gateways, 0), [])
        if query.filters and query.filters[0] == _ENABLED:
            disabled = self._lead(_DISABLED)
            assert disabled is not None
            return await self._count(_Driver(disabled, 0), [])
        return None

    async def _count_entries(self, condition: Filter) -> int:
        """Count the entries of the index that are compared with a pattern."""
        assert isinstance(condition.value, str)
        statement = _Statement(self._tenant_id)
        (low, high), _ = key_pattern(condition.value)
        text = (
            f"SELECT count(*) FROM {self._space.members} e WHERE {statement.own('e')} "
            f"AND e.member = {statement.add(member_key(condition.pointer))} "
            f"AND e.value >= {statement.add(low)} AND e.value < {statement.add(high)}"
        )
        return await self._number(text, statement)

    async def _list(self, driver: _Driver, conditions: list[_Condition]) -> list[str]:
        query = self._query
        statement = _Statement(self._tenant_id)
        orders = [self._order(statement, sort, f"o{index}") for index, sort in enumerate(query.sorts)]
        tail, identifier = self._tail(statement, driver, conditions, orders)
        if query.after is not None:
            tail += f" AND {identifier} > {statement.add(query.after)}"
        order = [
            part + (" DESC" if sort.descending else "")
            for sort, place in zip(query.sorts, orders, strict=True)
            for part in (place.parts if place is not None else [identifier])
        ]
        text = (
            f"SELECT {identifier} {tail} ORDER BY {', '.join([*order, identifier])} "
            f"LIMIT {statement.add(query.page_size)} OFFSET {statement.add(query.page_offset)}"
        )
        return [row[0] for row in await self._session.all(text, *statement.values)]

    def _tail(
        self,
        statement: _Statement,
        driver: _Driver,
        conditions: list[_Condition],
        orders: Sequence[Order | None] = (),
    ) -> tuple[str, str]:
        """Return a statement from `FROM` to the last condition, and the name of the candidate's id."""
        source = driver.source(statement)
        text, space = source.sql, self._space
        if source.is_repeated:
            text = f"(SELECT DISTINCT {source.identifier} FROM {text}) c"
        places = [place for place in orders if place is not None]
        needs_document = bool(places) or any(condition.needs_document for condition in conditions)
        if needs_document and not source.has_document:
            text += f" JOIN {space.table} d ON {statement.own('d')} AND d.{space.identifier} = {source.identifier}"
        text += "".join(place.join for place in places)
        checks = [condition.sql(statement, source.identifier) for condition in conditions]
        return f"FROM {text} {_where((*source.conditions, *checks))}", source.identifier

    def _order(self, statement: _Statement, sort: Sort, name: str) -> Order | None:
        """Return a document's place in an order; `None` if that is the place of its id."""
        if sort.pointer == ("id",):
            return None
        if self._has_status and sort.pointer in _INSTANTS:
            column = f"d.{_INSTANTS[sort.pointer]}"
            # Within a second they are equal, as they are shown.
            return Order("", [f"{column} IS NOT NULL", f"{column} / 1000000"])
        if self._has_status and sort.pointer in _FLAGS:
            return Order("", [f"d.{_FLAGS[sort.pointer]}"])
        return self._dialect.order("d.document", sort, name, statement.add)

    async def _number(self, text: str, statement: _Statement) -> int:
        row = await self._session.one(text, *statement.values)
        return 0 if row is None else int(row[0])


_ENABLED: Final = Filter(pointer=("enabled",), value=True)
_DISABLED: Final = Filter(pointer=("enabled",), value=False)

# Where the members of `status` are kept (management 5.4).
_INSTANTS: Final = {("status", "created"): "created", ("status", "updated"): "updated"}
_FLAGS: Final = {
    ("status", "auto-provisioned"): "auto_provisioned",
    ("status", "auto-provisioning-notification-sent"): "notification_sent",
}


_EACH: Final = "LIMIT 1 OFFSET 0"
"""Keeps PostgreSQL from making a join of `EXISTS`. Of a value that its statistics do not know it expects one row, and
may compare each candidate with each row there is; a look into the index for each is quick enough, and always so."""


def _where(conditions: tuple[str, ...]) -> str:
    return f"WHERE {' AND '.join(conditions) or '1 = 1'}"


# Filling the tables of a database that was there before them

_SLICE: Final = 1000
LIST_TENANTS = "SELECT tenant_id, document FROM tenants WHERE tenant_id > ?1 ORDER BY tenant_id LIMIT ?2"
LIST_DEVICES = """
SELECT tenant_id, device_id, document FROM devices
WHERE (tenant_id, device_id) > (?1, ?2) ORDER BY tenant_id, device_id LIMIT ?3"""


async def fill_search_tables(session: Session) -> None:
    """Enter what is there into the tables that searches go by."""
    rows: list[Row] = []
    while rows := await session.all(LIST_TENANTS, rows[-1][0] if rows else "", _SLICE):
        entries = [
            (member, key, tenant_id, text)
            for tenant_id, document in rows
            for member, key, text in index_entries(document_of(document, "tenants", tenant_id))
        ]
        await session.many(INSERT_TENANT_MEMBER, entries)
    last, tenant = ("", ""), None
    while rows := await session.all(LIST_DEVICES, *last, _SLICE):
        last = rows[-1][0], rows[-1][1]
        device_entries = [
            (tenant_id, member, key, device_id, text)
            for tenant_id, device_id, document in rows
            for member, key, text in index_entries(document_of(document, "devices", tenant_id, device_id))
        ]
        await session.many(INSERT_DEVICE_MEMBER, device_entries)
        # Each slice is a range; the first of a tenant begins with the empty id.
        ranges: dict[str, tuple[str, int]] = {}
        for tenant_id, device_id, _ in rows:
            first, number = ranges.get(tenant_id, (device_id if tenant_id == tenant else "", 0))
            ranges[tenant_id] = first, number + 1
        await session.many(INSERT_RANGE, [(tenant_id, *counted) for tenant_id, counted in ranges.items()])
        tenant = last[0]
