"""Asks an external system over HTTP whether a device is wanted (provisioning 9).

Hides httpx, the signature (that of the Standard Webhooks specification) and what keeps a receiver that is down, slow
or hostile from doing harm: one deadline for everything, one bound for how many are asked at a time, one for the size of
an answer; no redirects, no proxies, no second try.

Each connection is a client of its own, used by one request at a time. A pool that is shared loses places for ever when
requests are cancelled at the wrong moment (httpcore issue 1093), and a deadline is a cancellation. So whatever ends
otherwise than with a whole answer is closed, and nothing else has to be known about its state.
"""

import asyncio
import hashlib
import hmac
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import httpx

from kamado.document import JsonObject, decode, encode, encode_base64, format_timestamp, new_id
from kamado.errors import BadRequest
from kamado.provisioning import HookFailed, HookQuestion, HookReply

__all__ = ["HttpHook", "HttpHookSettings", "sign"]

_MAX_BODY_SIZE: Final = 64 * 1024
_REFUSALS: Final = frozenset((403, 404))
# Common servers close a connection that has been idle for five seconds; one that they are about to close must not be
# used, since nothing is sent twice.
_MAX_IDLE_TIME: Final = 4.0
_MAX_IDLE: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpHookSettings:
    """Whom to ask, and for how long."""

    url: str
    timeout: float = 0.1
    """Seconds for everything, from the connection to the end of the answer."""
    max_concurrent: int = 100
    """How many may be asked at a time; one more fails."""
    secret: bytes | None = field(default=None, repr=False)
    """Key of the signature."""
    tls: ssl.SSLContext | None = None
    """For https; without it no server is trusted."""
    version: str = ""
    """Of this program."""


@dataclass(slots=True)
class _Idle:
    client: httpx.AsyncClient
    since: float


class HttpHook:
    """A `ProvisioningHook` that sends `POST` requests.

    Args:
        settings: Whom to ask.
        clock: Monotonic seconds.
        wall_clock: Seconds since 1970, for the signature.
    """

    def __init__(
        self,
        settings: HttpHookSettings,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._wall_clock = wall_clock
        # Given none, httpx would make one for each connection, at the price of many answers.
        self._tls = settings.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            # A short text may unpack to any length.
            "Accept-Encoding": "identity",
            "User-Agent": f"kamado/{settings.version}",
        }
        self._idle: list[_Idle] = []
        """The one used last comes last."""
        self._timer: asyncio.TimerHandle | None = None
        """Closes what has been idle for too long, if nobody asks meanwhile."""
        self._closing: set[asyncio.Task[None]] = set()
        self._asking = 0
        self._is_closed = False

    async def ask(self, question: HookQuestion) -> HookReply:
        """Ask; see `ProvisioningHook.ask`. At most `timeout`, after which the connection is closed."""
        # A look-up is started by hand and becomes a task when it waits for the first time (decision 8). What follows
        # needs a task.
        await asyncio.sleep(0)
        if self._is_closed:
            raise HookFailed("the registry is being stopped")
        if self._asking >= self._settings.max_concurrent:
            raise HookFailed("as many are being asked as may be: provisioning.hook.max_concurrent")
        self._asking += 1
        try:
            async with asyncio.timeout(self._settings.timeout):
                status, body = await self._exchange(question)
        except TimeoutError:
            raise HookFailed("no answer in time: provisioning.hook.timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise HookFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self._asking -= 1
        return _read_answer(status, body)

    async def close(self) -> None:
        """Close all connections; who is asked from now on fails."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        idle, self._idle = self._idle, []
        await _close([one.client for one in idle])
        if self._closing:
            await asyncio.wait(self._closing)

    async def _exchange(self, question: HookQuestion) -> tuple[int, bytes]:
        """Send one request and read its answer, on a connection that is kept only if all went well."""
        client, spent = self._take_client()
        try:
            content, headers = self._make_request(question)
            async with client.stream("POST", self._settings.url, content=content, headers=headers) as response:
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise HookFailed("the answer is compressed, which was not asked for")
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _MAX_BODY_SIZE:
                        raise HookFailed(f"the answer is longer than {_MAX_BODY_SIZE} bytes")
            if not self._is_closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(_Idle(client, self._clock()))
                spent.remove(client)
                self._await_expiry()
        finally:
            await _close(spent)
        return response.status_code, bytes(body)

    def _take_client(self) -> tuple[httpx.AsyncClient, list[httpx.AsyncClient]]:
        """Take an idle connection or a new one.

        Returns:
            It, and all that are to be closed in the end: those that have been idle for too long and, unless it can be
            kept, this one.
        """
        spent = self._take_expired()
        client = self._idle.pop().client if self._idle else self._make_client()
        return client, [*spent, client]

    def _take_expired(self) -> list[httpx.AsyncClient]:
        now = self._clock()
        expired = [one.client for one in self._idle if now - one.since >= _MAX_IDLE_TIME]
        del self._idle[: len(expired)]
        return expired

    def _await_expiry(self) -> None:
        if self._timer is None and self._idle:
            left = max(0.0, self._idle[0].since + _MAX_IDLE_TIME - self._clock())
            self._timer = asyncio.get_running_loop().call_later(left + 0.01, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if expired := self._take_expired():
            task = asyncio.get_running_loop().create_task(_close(expired))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._await_expiry()

    def _make_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._tls,
            trust_env=False,
            follow_redirects=False,
            # There is one deadline, for everything.
            timeout=httpx.Timeout(None),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_MAX_IDLE_TIME),
        )

    def _make_request(self, question: HookQuestion) -> tuple[bytes, dict[str, str]]:
        now = self._wall_clock()
        request_id, timestamp = new_id(), str(int(now))
        members: dict[str, str | None] = {
            "type": question.kind.value,
            "request-id": request_id,
            "timestamp": format_timestamp(datetime.fromtimestamp(now, UTC)),
            "tenant-id": question.tenant_id,
            "device-id": question.device_id,
            "auth-id": question.auth_id,
            "issuer-dn": question.issuer_dn,
            "certificate": None if question.certificate is None else encode_base64(question.certificate),
            "gateway-id": question.gateway_id,
        }
        document: JsonObject = {name: value for name, value in members.items() if value is not None}
        content = encode(document)
        headers = self._headers | {"webhook-id": request_id, "webhook-timestamp": timestamp}
        if self._settings.secret is not None:
            headers["webhook-signature"] = sign(self._settings.secret, request_id, timestamp, content)
        return content, headers


def sign(secret: bytes, request_id: str, timestamp: str, content: bytes) -> str:
    """Make the value of `webhook-signature` (Standard Webhooks 1.0, symmetric signatures)."""
    signed = b"%b.%b.%b" % (request_id.encode(), timestamp.encode(), content)
    return f"v1,{encode_base64(hmac.digest(secret, signed, hashlib.sha256))}"


async def _close(clients: Iterable[httpx.AsyncClient]) -> None:
    for client in clients:
        await client.aclose()


def _read_answer(status: int, body: bytes) -> HookReply:
    if status in _REFUSALS:
        return HookReply(is_wanted=False)
    if not 200 <= status < 300:
        raise HookFailed(f"the answer has status {status}")
    if not body:
        return HookReply(is_wanted=True)
    try:
        document = decode(body)
    except BadRequest as error:
        raise HookFailed(f"the answer cannot be used: {error}") from error
    if not isinstance(document, dict):
        raise HookFailed("the answer cannot be used: must be a JSON object")
    return HookReply(is_wanted=True, body=document)
