"""Instances are killed, the database is restarted, connections are cut: nothing is lost, nothing is wrong.

CHAOS_SECONDS lengthens it (default: half a minute), CHAOS_SEED chooses what happens.
"""

import os
from pathlib import Path

from tests.chaos.run import Chaos
from tests.integration.registry import poll

SECONDS = float(os.environ.get("CHAOS_SECONDS", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))


def processes_of(marker: str) -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                environment = (directory / "environ").read_bytes()
            except OSError:
                continue
            if marker.encode() in environment:
                found.append(int(directory.name))
    return found


def test_no_acknowledged_write_is_lost_and_no_answer_is_wrong(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, SECONDS, SEED)
    report = chaos.run()
    print(f"seed {SEED}, {SECONDS:g} s")
    print("\n".join(report.lines()))
    poll(lambda: not processes_of(chaos.marker), what="the end of all processes")
    assert not report.problems, "\n".join(report.problems[:20])
    assert len(report.faults) == 7
