"""Registries for the tests that drive the real process."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from tests.databases import Databases
from tests.integration.pages import Example
from tests.integration.registry import Registry


class NewRegistry(Protocol):
    """Starts a registry of a test's own; it is stopped, and its log checked, at the end of the test."""

    def __call__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        tls: bool = False,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        start: bool = True,
    ) -> Registry: ...


@pytest.fixture(scope="session")
def registry(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that tests share: plain listeners and TLS; use tenants of your own (`new_id()`)."""
    directory = tmp_path_factory.mktemp("registry")
    with Registry(directory, tls=True, url=databases.create(directory / "data")) as running:
        yield running


@pytest.fixture(scope="module")
def example(
    request: pytest.FixtureRequest, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Example]:
    """What `make serve` starts, for the page of documentation that a module names as `PAGE`; on each database."""
    directory = tmp_path_factory.mktemp(request.module.PAGE.stem)
    example = Example(directory, databases.create(directory / "var" / "guide"))
    example.start()
    try:
        yield example
        example.registry.stop()
    finally:
        example.registry.kill()


@pytest.fixture
def new_registry(databases: Databases, tmp_path: Path) -> Iterator[NewRegistry]:
    """A factory of registries with settings and databases of their own."""
    made: list[Registry] = []
    urls: list[str] = []

    def start_registry(
        settings: Mapping[str, str] | None = None,
        *,
        tls: bool = False,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        start: bool = True,
    ) -> Registry:
        directory = directory or tmp_path / f"registry-{len(made)}"
        url = (settings or {}).get("storage.url")
        if url is None:
            url = databases.create(directory / "data")
            urls.append(url)
        one = Registry(directory, settings, tls=tls, arguments=arguments, environment=environment, url=url)
        made.append(one)
        return one.start() if start else one

    try:
        yield start_registry
        for one in made:
            one.stop()
    finally:
        for one in made:
            one.kill()
        for url in urls:
            databases.drop(url)
