"""Registries for the tests that drive the real process."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
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
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that tests share: plain listeners and TLS; use tenants of your own (`new_id()`)."""
    with Registry(tmp_path_factory.mktemp("registry"), tls=True) as running:
        yield running


@pytest.fixture(scope="module")
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """What `make serve` starts, for the page of documentation that a module names as `PAGE`."""
    example = Example(tmp_path_factory.mktemp(request.module.PAGE.stem))
    example.start()
    try:
        yield example
        example.registry.stop()
    finally:
        example.registry.kill()


@pytest.fixture
def new_registry(tmp_path: Path) -> Iterator[NewRegistry]:
    """A factory of registries with settings of their own."""
    made: list[Registry] = []

    def start_registry(
        settings: Mapping[str, str] | None = None,
        *,
        tls: bool = False,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        start: bool = True,
    ) -> Registry:
        one = Registry(
            directory or tmp_path / f"registry-{len(made)}",
            settings,
            tls=tls,
            arguments=arguments,
            environment=environment,
        )
        made.append(one)
        return one.start() if start else one

    try:
        yield start_registry
        for one in made:
            one.stop()
    finally:
        for one in made:
            one.kill()
