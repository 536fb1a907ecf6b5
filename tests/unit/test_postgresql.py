"""Parts of the PostgreSQL dialect that need no server."""

import asyncio
from typing import cast

from kamado.storage.postgresql import Connection, Executor
from kamado.storage.together import LOCK_NAME


def test_a_transaction_that_only_reads_waits_for_no_name() -> None:
    """Logins are read all the time, and must not wait for each other as their changes do."""
    nobody = cast(Connection, None)  # whoever asks it fails
    assert asyncio.run(Executor(nobody, may_lock=False).execute(LOCK_NAME, [("a",), ("b",)])) == [[], []]
