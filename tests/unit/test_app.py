"""The composition root, as far as it decides anything: who calls the management API, and names."""

import asyncio
import socket
from pathlib import Path

import pytest

from kamado.app import EXIT_CONFIGURATION, Process, StartFailed, check_access
from kamado.config import Config, load


def configured(tmp_path: Path, *assignments: str) -> Config:
    file = tmp_path / "kamado.toml"
    file.touch()
    return load(config_file=file, assignments=assignments, environment={}).config


ELSEWHERE = ("http.insecure.bind=192.0.2.1", "http.insecure.enabled=true")


def test_who_may_use_the_management_api(tmp_path: Path) -> None:
    """Management 3.11; choice "Who may use HTTP"."""
    local = configured(tmp_path).http
    elsewhere = configured(tmp_path, *ELSEWHERE).http
    open_to_all = configured(tmp_path, *ELSEWHERE, "http.auth.allow_anonymous=true").http
    for http in (local, elsewhere, open_to_all):
        assert check_access(http, has_operators=True) == "operators log in by name and password"
    assert "only this machine" in check_access(local, has_operators=False)
    assert "whoever reaches it" in check_access(open_to_all, has_operators=False)
    with pytest.raises(StartFailed, match=r"\(kamado operator add NAME --config x\)") as refused:
        check_access(elsewhere, has_operators=False, options=" --config x")
    assert refused.value.status == EXIT_CONFIGURATION


def test_container_id_names_the_listener(tmp_path: Path) -> None:
    """Amqp-apis 2.1: stable, unique per process."""
    config = configured(tmp_path, "amqp.container_name=registry-b", "amqp.insecure.port=5679")
    assert Process(config, None, "kamado", "")._container_id() == "registry-b-127.0.0.1:5679"


def test_name_that_is_not_resolved_is_told(tmp_path: Path) -> None:
    config = configured(tmp_path)

    class Server:
        async def listen(self, *_: object) -> tuple[str, int]:
            raise socket.gaierror(-2, "Name or service not known")

        def share(self, *_: object) -> None:
            raise AssertionError

    async def start() -> None:
        await Process(config, None, "kamado", "")._listen_one("health", "registry.invalid", 1, None, Server())

    with pytest.raises(StartFailed, match=r"registry\.invalid:1 cannot be had: Name or service not known"):
        asyncio.run(start())
