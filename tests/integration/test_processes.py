"""Worker processes that misbehave: real ones, which do what these tests want (`kamado.processes`)."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kamado.processes import WorkerFailed, Workers, WorkersSettings

PROGRAM = """
import asyncio, os, signal, sys, time
from kamado.processes import Channel

channel = Channel(int(sys.argv[1]))
what, _, argument = channel.task.decode().partition(" ")

asked = 0

async def answer():
    return [os.getpid(), what]

async def confirm():
    global asked
    asked += 1

async def count():
    return asked

async def never():
    await asyncio.Event().wait()

async def main():
    stopped = asyncio.Event()
    async def serve():
        await channel.serve({"stop": stopped.set, "hang": lambda: time.sleep(600)},
                            {"who": answer, "never": never, "alive": confirm, "asked": count})
        stopped.set()
    task = asyncio.create_task(serve())
    await asyncio.sleep(0.01)
    if what == "exit":
        sys.exit(int(argument))
    channel.tell_ready()
    if what == "die":
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    await stopped.wait()

asyncio.run(main())
"""

Run = Callable[[Workers], Awaitable[None]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkersSettings:
    (tmp_path / "odd_worker.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return WorkersSettings(
        number=2, module="odd_worker", first_pause=0.2, longest_pause=0.4, look_interval=0.1, max_unanswered=600
    )


def run(settings: WorkersSettings, task: Callable[[int], bytes], use: Run) -> list[int]:
    """Start workers, use them, end them; return the numbers of those that ended, in order."""
    gone: list[int] = []

    async def main() -> None:
        workers = Workers(settings, task, gone.append)
        try:
            await use(workers)
        finally:
            await workers.close()

    asyncio.run(main())
    return gone


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.01)


def test_all_are_asked_and_stop_in_order(settings: WorkersSettings, capfd: pytest.CaptureFixture[str]) -> None:
    async def use(workers: Workers) -> None:
        await workers.start()
        assert workers.ready == 2
        answers = await workers.ask("who", 60)
        assert list(answers) == [1, 2]
        assert [what for _, what in answers.values()] == ["serve1", "serve2"]
        await workers.stop(60)
        assert workers.ready == 0
        assert await workers.ask("who", 60) == {}

    assert sorted(run(settings, lambda number: f"serve{number}".encode(), use)) == [1, 2]
    assert capfd.readouterr().err == ""


def test_who_does_not_answer_is_left_out(settings: WorkersSettings) -> None:
    async def use(workers: Workers) -> None:
        await workers.start()
        assert await workers.ask("never", 0.2) == {}

    run(settings, lambda _: b"serve", use)


def test_one_that_cannot_start_ends_the_start_with_its_status(settings: WorkersSettings) -> None:
    async def use(workers: Workers) -> None:
        with pytest.raises(WorkerFailed) as failed:
            await workers.start()
        assert (failed.value.number, failed.value.status) == (2, 78)

    assert sorted(run(settings, lambda number: b"exit 78" if number == 2 else b"serve", use)) == [1, 2]


def test_one_that_dies_again_and_again_is_started_after_pauses(
    settings: WorkersSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """At once the first time, then later and later, up to a bound; the other one goes on."""

    async def use(workers: Workers) -> None:
        await workers.start()
        other = (await workers.ask("who", 60))[1]
        await until(lambda: workers.restarts >= 4)
        assert (await workers.ask("who", 60))[1] == other

    gone = run(settings, lambda number: b"die" if number == 2 else b"serve", use)
    assert gone.count(1) == 1
    events = [record for record in caplog.records if record.message == "worker ended, it is started again"]
    assert [vars(record)["pause"] for record in events][:4] == [0, 0.2, 0.4, 0.4]
    assert {(vars(record)["worker"], vars(record)["status"]) for record in events} == {(2, "SIGKILL")}


def test_one_that_fails_later_is_started_again_whatever_its_status(settings: WorkersSettings) -> None:
    first: list[int] = []

    def task(number: int) -> bytes:
        first.append(number)
        return b"exit 78" if first.count(2) == 2 and number == 2 else b"serve"

    async def use(workers: Workers) -> None:
        await workers.start()
        os.kill((await workers.ask("who", 60))[2][0], signal.SIGKILL)
        await until(lambda: workers.restarts == 2 and workers.ready == 2)

    run(settings, task, use)


def test_one_that_hangs_is_killed_and_started_again(
    settings: WorkersSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else would do so: the supervisor answers the probes."""
    # As long as a worker may take to start on a busy machine: until then it says nothing either.
    settings = replace(settings, max_unanswered=50)

    async def use(workers: Workers) -> None:
        await workers.start()
        before = (await workers.ask("who", 60))[1][0]
        os.kill(before, signal.SIGSTOP)
        await until(lambda: workers.restarts == 1 and workers.ready == 2)
        assert (await workers.ask("who", 60))[1][0] != before

    run(settings, lambda _: b"serve", use)
    assert next(vars(record)["worker"] for record in caplog.records if "does not answer" in record.message) == 1


def test_a_supervisor_that_stood_still_kills_nobody(settings: WorkersSettings) -> None:
    """A container that was paused, say: the workers could not answer because nobody asked them."""

    async def use(workers: Workers) -> None:
        await workers.start()
        before = await workers.ask("who", 60)
        loop = asyncio.get_running_loop()
        clock = loop.time
        loop.time = lambda: clock() + 3600  # type: ignore[method-assign]
        seen = await workers.ask("asked", 60)
        while (now := await workers.ask("asked", 60)).keys() != seen.keys() or any(now[n] < seen[n] + 3 for n in seen):
            assert workers.restarts == 0
        assert await workers.ask("who", 60) == before

    run(settings, lambda _: b"serve", use)


def test_one_that_does_not_stop_is_killed(settings: WorkersSettings, caplog: pytest.LogCaptureFixture) -> None:
    async def use(workers: Workers) -> None:
        await workers.start()
        os.kill((await workers.ask("who", 60))[2][0], signal.SIGSTOP)
        # Enough for the other one, however busy the machine is.
        await workers.stop(5)

    assert run(settings, lambda _: b"serve", use) == [1, 2]
    (event,) = [record for record in caplog.records if "did not stop in time" in record.message]
    assert vars(event)["workers"] == [2]


def test_what_has_not_begun_to_serve_is_not_waited_for(settings: WorkersSettings) -> None:
    async def use(workers: Workers) -> None:
        start = asyncio.create_task(workers.start())
        await asyncio.sleep(0)
        await workers.stop(60)
        start.cancel()

    run(settings, lambda _: b"serve", use)
