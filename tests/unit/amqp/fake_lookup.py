"""A `LookupService` whose answers a test decides."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from kamado.auth import Principal
from kamado.errors import NotFound, Reason
from kamado.lookup import Answer

__all__ = ["Clock", "FakeLookup"]


class Clock:
    """The time, as the test sets it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 31, 8, 15, 30, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: float) -> None:
        self.now += timedelta(**duration)


class FakeLookup:
    """Finds every tenant and every device but `nope`; `behave` runs before an assertion is answered."""

    def __init__(self) -> None:
        self.behave: Callable[[], Awaitable[object]] | None = None
        self.asked: list[tuple[str, ...]] = []
        self.cancelled = 0
        self.assertion = b'{"device-id":"d1"}'

    @contextmanager
    def batch(self) -> Iterator[None]:
        yield

    async def get_tenant(self, principal: Principal, tenant_id: str) -> Answer:
        self.asked.append(("tenant", tenant_id))
        return Answer(200, b'{"enabled":true}', "max-age = 180", tenant_id)

    async def get_tenant_by_body(self, principal: Principal, body: bytes | None) -> Answer:
        return await self.get_tenant(principal, (body or b"").decode())

    async def assert_registration(
        self, principal: Principal, tenant_id: str, device_id: str, gateway_id: str | None = None
    ) -> Answer:
        self.asked.append(("registration", tenant_id, device_id, gateway_id or ""))
        if self.behave is not None:
            try:
                await self.behave()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if device_id == "nope":
            raise NotFound("no such device", reason=Reason.DEVICE_UNKNOWN)
        return Answer(200, self.assertion, "max-age = 300", tenant_id)

    async def get_credentials(self, principal: Principal, tenant_id: str, body: bytes | None) -> Answer:
        self.asked.append(("credentials", tenant_id, (body or b"").decode()))
        return Answer(200, b"{}", "no-cache", tenant_id)
