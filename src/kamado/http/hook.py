"""Asks an external system over HTTP whether a device is wanted (provisioning 9).

Hides httpx, the signature (that of the Standard Webhooks specification) and what keeps a receiver that is down, slow
or hostile from doing harm: one deadline for everything, one bound for how many are asked at a time, one for the size of
an answer; no redirects, no proxies, no second try.

Each question has a connection of its own, which is closed whatever became of it: what a receiver sends beyond its
answer can then never be taken for the answer to a later question, about another device (decision 21).
"""

import asyncio
import hashlib
import hmac
import ssl
import time
from collections.abc import Callable
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


class HttpHook:
    """A `ProvisioningHook` that sends `POST` requests.

    Args:
        settings: Whom to ask.
        clock: Seconds since 1970, for the signature.
    """

    def __init__(
        self,
        settings: HttpHookSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._clock = clock
        # Given none, httpx would make one for each connection, at the price of many answers.
        self._tls = settings.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            # A short text may unpack to any length.
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": f"kamado/{settings.version}",
        }
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
        """Ask nobody any more. Questions under way end with their deadline."""
        self._is_closed = True

    async def _exchange(self, question: HookQuestion) -> tuple[int, bytes]:
        """Send one request and read its answer."""
        content, headers = self._make_request(question)
        async with (
            self._make_client() as client,
            client.stream("POST", self._settings.url, content=content, headers=headers) as response,
        ):
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise HookFailed("the answer is compressed, which was not asked for")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _MAX_BODY_SIZE:
                    raise HookFailed(f"the answer is longer than {_MAX_BODY_SIZE} bytes")
        return response.status_code, bytes(body)

    def _make_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._tls,
            trust_env=False,
            follow_redirects=False,
            # There is one deadline, for everything.
            timeout=httpx.Timeout(None),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
        )

    def _make_request(self, question: HookQuestion) -> tuple[bytes, dict[str, str]]:
        now = self._clock()
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
