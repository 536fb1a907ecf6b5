"""What holds for all tests."""

import os
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from tests.databases import Databases, check_marks, kind_of, kinds_for, make_databases
from tests.postgresql import PostgresqlServer
from tests.rows import check_rows

# On a busy machine a slow example says nothing about the code. The suite tries the same examples each time, so that it
# passes or fails for everybody alike; a long run (`make fuzz`) tries others.
settings.register_profile(
    "kamado",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="KAMADO_FUZZ_SECONDS" not in os.environ,
)
settings.load_profile("kamado")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a database on each kind."""
    if "databases" in metafunc.fixturenames:
        metafunc.parametrize("databases", kinds_for(metafunc.definition), indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse marks that say nothing, and tell the runner which tests have to stay together.

    Those of a file share what they start, but for their cases on another database.
    """
    check_rows(items)
    check_marks(items)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(f"{item.nodeid.partition('::')[0]} {kind_of(item)}"))


@pytest.fixture(scope="session")
def databases(request: pytest.FixtureRequest) -> Databases:
    """Databases of one kind; see `tests/databases.py`."""
    return make_databases(request.param, partial(request.getfixturevalue, "postgresql"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server that tests share; use databases of your own, and do not stop it."""
    with PostgresqlServer() as server:
        yield server
