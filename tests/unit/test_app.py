"""The composition root, as far as it decides anything: who calls the management API, and names."""

import asyncio
import socket
from pathlib import Path

import pytest

from kamado.app import Process, StartFailed, find_operator
from kamado.config import Config, load


def configured(tmp_path: Path, *assignments: str) -> Config:
    file = tmp_path / "kamado.toml"
    file.touch()
    return load(config_file=file, assignments=assignments, environment={}).config


def test_only_callers_on_this_machine_are_shown_secrets(tmp_path: Path) -> None:
    """Management 6.10, PSK `key`: the local caller of 3.11 may reveal secrets, nobody else yet."""
    assert find_operator(configured(tmp_path).http).may_reveal_secrets
    elsewhere = ("http.insecure.bind=192.0.2.1", "http.insecure.enabled=true", "http.auth.allow_anonymous=true")
    assert not find_operator(configured(tmp_path, *elsewhere).http).may_reveal_secrets
    # Permission to open the API is not the same as opening it.
    assert find_operator(configured(tmp_path, "http.auth.allow_anonymous=true").http).may_reveal_secrets


def test_container_id_names_the_listener(tmp_path: Path) -> None:
    """Amqp-apis 2.1: stable, unique per process."""
    config = configured(tmp_path, "amqp.container_name=registry-b", "amqp.insecure.port=5679")
    assert Process(config, None, "kamado", "")._container_id() == "registry-b-127.0.0.1:5679"


def test_name_that_is_not_resolved_is_told(tmp_path: Path) -> None:
    config = configured(tmp_path)

    async def listen(*_: object) -> tuple[str, int]:
        raise socket.gaierror(-2, "Name or service not known")

    async def start() -> None:
        await Process(config, None, "kamado", "")._listen_one("health", "registry.invalid", 1, None, listen)

    with pytest.raises(StartFailed, match=r"registry\.invalid:1 cannot be had: Name or service not known"):
        asyncio.run(start())
