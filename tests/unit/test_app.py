"""The composition root, as far as it decides anything: who calls the management API, and names."""

import asyncio
import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kamado.app import EXIT_CONFIGURATION, EXIT_INTERNAL, Process, StartFailed, check_access, run_to_the_end
from kamado.config import Config, load
from kamado.http.server import Health
from kamado.listeners import bind, open_counts
from kamado.processes import Channel
from kamado.storage import migrate
from kamado.worker import DOORS, Task, Worker


def configured(tmp_path: Path, *assignments: str) -> Config:
    file = tmp_path / "kamado.toml"
    file.touch()
    return load(config_file=file, assignments=assignments, environment={}).config


PORTS = (
    *(f"{part}.enabled=true" for part in ("http.insecure", "amqp.insecure")),
    *(f"{part}.port=0" for part in ("http.insecure", "amqp.insecure", "health")),
)
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


# A part that fails


@pytest.fixture
def _collected() -> Iterator[None]:
    """A process that has started asks for less of the garbage collector."""
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_collected")
def test_a_part_that_fails_takes_the_rest_down_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Configuration 3.3: the database is closed; the exit status is that of an internal error."""

    async def watch(health: Health) -> None:
        while not health.is_started:  # noqa: ASYNC110 - tells nobody
            await asyncio.sleep(0.01)
        raise RuntimeError("injected")

    monkeypatch.setattr(Health, "watch", watch)
    database = tmp_path / "kamado.db"
    config = configured(tmp_path, f"storage.url=sqlite:///{database}", *PORTS)
    assert run_to_the_end(Process(config, None, "kamado", ()).main) == EXIT_INTERNAL
    assert database.exists()
    assert not database.with_name("kamado.db-wal").exists()
    (event,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (event.message, str(event.exc_info and event.exc_info[1])) == ("internal error", "injected")


@pytest.mark.usefixtures("_collected")
def test_a_worker_that_does_not_understand_the_supervisor_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(tmp_path, f"storage.url=sqlite:///{tmp_path / 'kamado.db'}", *PORTS)
    asyncio.run(migrate(config.storage.url))
    ours, theirs = socket.socketpair()
    descriptor, _ = open_counts(len(DOORS), 1)

    async def main() -> int:
        sockets = {door: [one.detach() for one in await bind("127.0.0.1", 0)] for door in DOORS}
        task = Task(config=config, number=1, workers=1, sockets=sockets, counts=descriptor)
        return await Worker(task, Channel(theirs.detach())).main()

    with ours:
        ours.sendall(bytes(4) + json.dumps({"do": "dance"}).encode() + b"\n")
        assert run_to_the_end(main) == EXIT_INTERNAL
        assert ours.recv(1) == b""
    (event,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (event.message, str(event.exc_info and event.exc_info[1])) == ("internal error", "'dance'")
