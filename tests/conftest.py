"""What holds for all tests."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from tests.databases import Databases, check_marks, kinds_for, make_databases
from tests.postgresql import PostgresqlServer
from tests.rows import check_rows
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# On a busy machine a slow example says nothing about the code. The suite tries the same examples each time, so that it
# passes or fails for everybody alike; a long run (`make fuzz`) tries others.
settings.register_profile(
    "kamado",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="KAMADO_FUZZ_SECONDS" not in os.environ,
)
settings.load_profile("kamado")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and with them whatever they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What is set for the terminal of whoever runs the tests, or for their build server, is not for the commands under test.
for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a database on each kind."""
    if "databases" in metafunc.fixturenames:
        metafunc.parametrize("databases", kinds_for(metafunc.definition), indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse marks that say nothing."""
    check_rows(items)
    check_marks(items)


class ByFileAndDatabase(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Hands out the tests of a file together, since they share what they start; on each database by itself."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return f"{file} on PostgreSQL" if "[postgresql" in nodeid else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Refine what `--dist loadfile` does."""
    return ByFileAndDatabase(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def databases(request: pytest.FixtureRequest) -> Databases:
    """Databases of one kind; see `tests/databases.py`."""
    return make_databases(request.param, partial(request.getfixturevalue, "postgresql"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server that tests share; use databases of your own, and do not stop it."""
    with PostgresqlServer() as server:
        yield server
