"""What holds for all tests."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests of rows that the specification does not have."""
    check_rows(items)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server that tests share; use databases of your own, and do not stop it."""
    with PostgresqlServer() as server:
        yield server
