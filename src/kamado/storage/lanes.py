"""Two lanes for searches, so that those that take seconds do not keep those that take milliseconds waiting.

Each has a bound on how many may wait or run. A search that was taken for a quick one and is not begins again in the
heavy lane. Knows no driver: how a search runs is the engine's affair.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from kamado.errors import Unavailable
from kamado.storage.sql import StoreSettings

__all__ = ["Lane", "Lanes", "TooSlow"]

T = TypeVar("T")

_QUICK: Final = 0.5
"""Seconds after which a search that was taken for a quick one begins again among those that are not."""


class TooSlow(Unavailable):
    """A search has had its time, or has not got its turn in it."""

    def __init__(self, *, has_begun: bool) -> None:
        super().__init__("the search took too long")
        self.has_begun = has_begun


class Lane:
    """Searches of a kind: how long each may run, and how many of them wait or run."""

    def __init__(self, name: str, settings: StoreSettings, time_limit: float) -> None:
        self.name = name
        self.time_limit = time_limit
        self._maximum = settings.max_waiting_searches
        self._number = 0

    def enter(self) -> None:
        """Let a search in, which calls `leave` in the end.

        Raises:
            Unavailable: There are too many.
        """
        if self._number >= self._maximum:
            raise Unavailable("too many searches are waiting for the database")
        self._number += 1

    def leave(self) -> None:
        """Take note of the end of a search."""
        self._number -= 1


class Lanes:
    """The quick lane and the heavy one."""

    def __init__(self, settings: StoreSettings) -> None:
        self._timeout = settings.search_timeout
        self.quick = Lane("quick", settings, min(_QUICK, settings.search_timeout))
        self.heavy = Lane("heavy", settings, settings.search_timeout)

    async def run(self, attempt: Callable[[Lane, float], Awaitable[T]], *, is_heavy: bool) -> T:
        """Run a search; see `store.Store.search`.

        Args:
            attempt: Runs it in a lane from its beginning, until a deadline (monotonic). Raises `TooSlow` after that or
                after the lane's time limit.
            is_heavy: It goes to the heavy lane at once.

        Raises:
            Unavailable: It took too long, or did not get its turn. Whatever else `attempt` raises passes through.
        """
        deadline = time.monotonic() + self._timeout
        has_begun = False
        if not is_heavy:
            try:
                return await attempt(self.quick, deadline)
            except TooSlow as error:
                has_begun = error.has_begun  # what looked quick was not
        try:
            return await attempt(self.heavy, deadline)
        except TooSlow as error:
            if has_begun or error.has_begun:
                raise Unavailable(
                    f"the search took longer than {self._timeout:g} s; a filter by equality or prefix is quicker"
                ) from error
            raise Unavailable(f"the search did not get its turn within {self._timeout:g} s: too many others") from error
