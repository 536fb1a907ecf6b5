"""The statements of `sql.py` in PostgreSQL's words. That the joined forms do the same is tested on every engine."""

import pytest

from kamado.storage import connections, sql
from kamado.storage.postgresql_statements import translate
from kamado.storage.together import LOCK_NAME


def test_parameters_are_numbered_as_postgresql_does() -> None:
    found = translate("SELECT a FROM t WHERE x = ?2 AND y = ?1", may_lock=True)
    assert found.text == "SELECT a FROM t WHERE x = $2 AND y = $1"
    assert (found.parameters, found.is_select, found.returns_rows) == (2, True, True)


def test_an_array_comes_as_one_text() -> None:
    found = translate("SELECT a FROM t WHERE x = ANY(?1)", may_lock=True)
    assert found.text == r"SELECT a FROM t WHERE x = ANY(string_to_array($1, E'\x02'))"


@pytest.mark.parametrize("lock", ["FOR UPDATE", "FOR KEY SHARE"])
def test_a_transaction_that_only_reads_locks_nothing(lock: str) -> None:
    statement = f"SELECT a FROM t WHERE x = ?1 {lock}"
    assert translate(statement, may_lock=True).text.endswith(lock)
    assert translate(statement, may_lock=False).text == "SELECT a FROM t WHERE x = $1"


def test_a_look_up_is_joined_with_the_table_of_parameters() -> None:
    found = translate("SELECT a FROM t WHERE x = ?1 AND y = ?2", may_lock=False)
    assert found.joined is not None
    assert found.joined.format(source=found.source(["text", "int8"])) == (
        "SELECT p.o, s.* FROM unnest($1::text[], $2::int8[]) WITH ORDINALITY AS p(p1, p2, o), "
        "LATERAL (SELECT a FROM t WHERE x = p.p1 AND y = p.p2 OFFSET 0) AS s"
    )


def test_a_bound_that_is_a_parameter_keeps_a_statement_alone() -> None:
    assert translate("SELECT a FROM t WHERE x = ?1 LIMIT ?2", may_lock=True).joined is None
    assert translate("SELECT a FROM t WHERE x = ?1 LIMIT 1", may_lock=True).joined is not None


def test_an_update_tells_whose_rows_it_has_changed() -> None:
    found = translate("UPDATE t SET a = a + ?1 WHERE x = ?2 RETURNING a", may_lock=True)
    assert found.joined == "UPDATE t SET a = a + p.p1 FROM {source} WHERE x = p.p2 RETURNING p.o, a"
    assert found.returns_rows
    found = translate("DELETE FROM t WHERE x = ?1", may_lock=True)
    assert found.joined == "DELETE FROM t USING {source} WHERE x = p.p1 RETURNING p.o"
    assert not found.returns_rows


def test_an_insertion_that_may_leave_rows_out_tells_the_keys_of_those_it_has_inserted() -> None:
    found = translate("INSERT INTO t (a, b, c) VALUES (?1, ?2, ?3) ON CONFLICT (c, a) DO NOTHING", may_lock=True)
    assert found.joined == (
        "INSERT INTO t (a, b, c) SELECT p.p1, p.p2, p.p3 FROM {source} ORDER BY p.o "
        "ON CONFLICT (c, a) DO NOTHING RETURNING t.c, t.a"
    )
    assert (found.key, found.is_certain) == ((2, 0), False)


def test_an_insertion_without_conflicts_is_certain() -> None:
    found = translate("INSERT INTO t (a) VALUES (?1)", may_lock=True)
    assert found.joined == "INSERT INTO t (a) SELECT p.p1 FROM {source} ORDER BY p.o"
    assert found.is_certain


def test_of_which_conflict_it_is_must_be_said_to_join_an_insertion() -> None:
    assert translate("INSERT INTO t (a) VALUES (?1) ON CONFLICT DO NOTHING", may_lock=True).joined is None


def test_a_name_is_locked_until_the_transaction_ends() -> None:
    assert "pg_advisory_xact_lock" in translate(LOCK_NAME, may_lock=True).text


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((sql, name) for name in ("FIND_TENANT", "FIND_DEVICE_TO_CHANGE", "LOCK_CREDENTIALS", "FIND_RANGE")),
        *((sql, name) for name in ("INSERT_DEVICE", "INSERT_DEVICE_MEMBER", "INSERT_GROUP", "INSERT_CREDENTIAL")),
        *(
            (sql, name)
            for name in ("PUT_CREDENTIAL_SET", "KEEP_CREDENTIAL_SET", "CHANGE_COUNT", "CHANGE_RANGE", "UPDATE_DEVICE")
        ),
        *((sql, name) for name in ("DELETE_CREDENTIALS", "DELETE_DEVICE", "DELETE_DEVICE_MEMBER", "FIND_CREDENTIAL")),
        *((sql, name) for name in dir(sql) if name.startswith("LOOK_UP_")),
        *((connections, name) for name in ("FIND_CONNECTION", "UPDATE_GATEWAY", "INSERT_CONNECTION", "CHANGE_COUNT")),
    ],
)
def test_what_devices_and_adapters_need_can_be_joined(module: object, name: str) -> None:
    assert translate(getattr(module, name), may_lock=True).joined is not None
