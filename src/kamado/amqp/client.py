"""A small request/response client on our own codec, for `kamado ask`: one connection, one request, one reply."""

import asyncio
import contextlib
import ssl
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from kamado.amqp import codec
from kamado.amqp.connection import AMQP_HEADER
from kamado.amqp.sasl import SASL_HEADER, Outcome, SaslClient

__all__ = [
    "AskError",
    "AuthenticationFailed",
    "ClientSettings",
    "ConnectionFailed",
    "LinkRefused",
    "Reply",
    "RequestRejected",
    "RequestReleased",
    "TimedOut",
    "ask",
]


class AskError(Exception):
    """The request got no reply. The text says why, for people."""

    def __init__(self, text: str, *, condition: str | None = None) -> None:
        super().__init__(text)
        self.condition = condition
        """AMQP error condition, if the server gave one."""


class ConnectionFailed(AskError):
    """Nobody listens there, TLS failed, or the connection was lost or closed by the server."""


class AuthenticationFailed(AskError):
    """SASL outcome other than ok, or no mechanism in common."""


class LinkRefused(AskError):
    """The server refused to attach a link."""


class RequestRejected(AskError):
    """The server rejected or released the request message."""


class RequestReleased(RequestRejected):
    """The server cannot take the request message now."""


class TimedOut(AskError):
    """No answer in `ClientSettings.timeout`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where to ask and as whom."""

    host: str
    port: int
    username: str | None = None
    """PLAIN if given; otherwise EXTERNAL, with the client certificate of `ssl_context`."""
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = None
    timeout: float = 5.0
    """Seconds for everything together."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the adapter would see."""

    status: int | None
    """`None` if the reply has no application property `status` of type int: adapters release such a reply."""
    payload: bytes | None
    content_type: str | None
    cache_control: str | None
    application_properties: Mapping[str, object]


_MAX_FRAME_SIZE: Final = 65536
_WINDOW: Final = 0x7FFFFFFF
# Our handles.
_REPLIES: Final = 0
_REQUESTS: Final = 1


async def ask(
    settings: ClientSettings,
    address: str,
    *,
    subject: str,
    reply_to: str | None = None,
    application_properties: Mapping[str, object] | None = None,
    body: bytes | None = None,
) -> Reply:
    """Log in, attach both links, send one request, await its reply, close.

    Args:
        address: Target of the request link: `tenant`, `registration/T`, `credentials/T`.
        reply_to: Reply address; a fresh one below `address` if not given.

    Raises:
        AskError: One of its kinds above.
    """
    message_id = str(uuid.uuid4())
    reply_to = reply_to if reply_to is not None else f"{address}/{uuid.uuid4()}"
    properties = codec.Properties(
        message_id=message_id,
        to=address,
        subject=subject,
        reply_to=reply_to,
        content_type="application/json" if body is not None else None,
    )
    request = codec.encode_message(properties, application_properties, body)
    exchange = _Exchange(settings, address, reply_to, request, message_id)
    try:
        async with asyncio.timeout(settings.timeout):
            return await exchange.run()
    except TimeoutError:
        raise TimedOut(f"{exchange.stage} within {settings.timeout:g} s") from None
    except asyncio.IncompleteReadError:
        raise ConnectionFailed("the server closed the connection") from None
    except OSError as error:
        raise ConnectionFailed(f"{settings.host}:{settings.port}: {error.strerror or error}") from error
    except codec.DecodeError as error:
        raise ConnectionFailed(f"the server does not speak AMQP 1.0: {error}") from error


class _Exchange:
    """One connection from its start to its end."""

    def __init__(self, settings: ClientSettings, address: str, reply_to: str, request: bytes, message_id: str) -> None:
        self._settings = settings
        self._address = address
        self._reply_to = reply_to
        self._request = request
        self._message_id = message_id
        self._peer_max_frame_size = 512
        self._refused: int | None = None
        """Our handle of the link that the server refuses; the reason follows with its detach."""
        self._handles: dict[int, int] = {}
        """The server's handle -> ours."""
        self._reply = b""
        self.stage = "no connection"
        """What has not come about, for the text of `TimedOut`."""
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def run(self) -> Reply:
        settings = self._settings
        self._reader, self._writer = await asyncio.open_connection(
            settings.host, settings.port, ssl=settings.ssl_context
        )
        try:
            await self._log_in()
            self._writer.write(AMQP_HEADER)
            self._write(codec.Open(container_id=f"kamado-ask-{self._message_id}", max_frame_size=_MAX_FRAME_SIZE))
            self._write(codec.Begin(next_outgoing_id=0, incoming_window=_WINDOW, outgoing_window=_WINDOW))
            self._attach(_REPLIES)
            self.stage = "no answer to the links"
            if await self._reader.readexactly(8) != AMQP_HEADER:
                raise codec.DecodeError("its header is another")
            while True:
                performative, payload = await self._read()
                reply = self._take(performative, payload)
                if reply is not None:
                    self._write(codec.Close())
                    await self._writer.drain()
                    return reply
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _log_in(self) -> None:
        self.stage = "no answer to the login"
        sasl = SaslClient(self._settings.username, self._settings.password)
        self._writer.write(sasl.data_to_send())
        sasl.receive(await self._reader.readexactly(len(SASL_HEADER)))
        while sasl.outcome is None and sasl.failure is None:
            sasl.receive(await self._read_frame())
            self._writer.write(sasl.data_to_send())
        if sasl.failure is not None:
            # What has offered no mechanism has not shown that it speaks AMQP at all.
            raise (AuthenticationFailed if sasl.offered else ConnectionFailed)(sasl.failure)
        match sasl.outcome:
            case Outcome.OK:
                pass
            case Outcome.AUTH:
                raise AuthenticationFailed("the server does not accept these credentials")
            case Outcome.SYS_TEMP:
                raise AuthenticationFailed("the server cannot check credentials now; try again later")
            case _:
                raise AuthenticationFailed(f"the server refuses the login (SASL outcome {sasl.outcome})")

    async def _read_frame(self) -> bytes:
        start = await self._reader.readexactly(4)
        (size,) = struct.unpack(">I", start)
        if not 8 <= size <= _MAX_FRAME_SIZE:
            raise codec.DecodeError("the size of a frame is out of range")
        return start + await self._reader.readexactly(size - 4)

    async def _read(self) -> tuple[codec.Performative, bytes]:
        while True:
            frame = await self._read_frame()
            body = frame[4 * frame[4] :]
            if body:
                performative, pos = codec.decode_performative(body)
                return performative, body[pos:]

    def _write(self, performative: codec.Performative, payload: bytes = b"") -> None:
        self._writer.write(codec.encode_frame(0, performative, payload))

    def _attach(self, handle: int) -> None:
        receives = handle == _REPLIES
        self._write(
            codec.Attach(
                name=f"auto-{handle}",
                handle=handle,
                role=receives,
                snd_settle_mode=0,
                source=codec.Terminus.source(self._reply_to if receives else None),
                target=codec.Terminus.target(None if receives else self._address),
                initial_delivery_count=None if receives else 0,
            )
        )

    def _take(self, performative: codec.Performative, payload: bytes) -> Reply | None:
        """Do what a frame of the server asks for; return the reply when it is complete."""
        match performative:
            case codec.Open():
                self._peer_max_frame_size = max(512, performative.max_frame_size)
            case codec.Attach():
                self._on_attach(performative)
            case codec.Flow(handle=handle, link_credit=credit):
                if handle is not None and self._handles.get(handle) == _REQUESTS and credit and self._request:
                    self._send_request()
            case codec.Disposition(role=True):
                self._on_outcome(performative.state)
            case codec.Transfer():
                self._reply += payload
                if not performative.more:
                    return self._on_reply(performative)
            case codec.Detach(error=error):
                ours = self._handles.get(performative.handle)
                address = self._reply_to if ours == _REPLIES else self._address
                if self._refused is not None:
                    raise LinkRefused(f"the server refuses a link to {address}: {_text(error)}", condition=_name(error))
                raise ConnectionFailed(f"the server detached {address}: {_text(error)}", condition=_name(error))
            case codec.End(error=error) | codec.Close(error=error):
                raise ConnectionFailed(f"the server closed the connection: {_text(error)}", condition=_name(error))
            case _:
                pass
        return None

    def _on_attach(self, attach: codec.Attach) -> None:
        handle = _REQUESTS if attach.role else _REPLIES
        self._handles[attach.handle] = handle
        terminus = attach.target if attach.role else attach.source
        if terminus is None:
            self._refused = handle
        elif handle == _REPLIES:
            self._write(
                codec.Flow(
                    next_incoming_id=0,
                    incoming_window=_WINDOW,
                    next_outgoing_id=0,
                    outgoing_window=_WINDOW,
                    handle=_REPLIES,
                    delivery_count=0,
                    link_credit=1,
                )
            )
            self._attach(_REQUESTS)
        else:
            self.stage = "no credit for the request"

    def _send_request(self) -> None:
        request, self._request = self._request, b""
        room = self._peer_max_frame_size - 64
        for start in range(0, len(request), room):
            more = start + room < len(request)
            transfer = codec.Transfer(
                handle=_REQUESTS, delivery_id=0, delivery_tag=b"\0", message_format=0, settled=False, more=more
            )
            self._write(transfer, request[start : start + room])
        self.stage = "no answer to the request"

    def _on_outcome(self, state: object) -> None:
        if not isinstance(state, codec.Described):
            return
        if state.descriptor == 0x25:
            items = state.value if isinstance(state.value, list) else []
            error = codec.Error.read(items[0]) if items and items[0] is not None else None
            raise RequestRejected(f"the server rejects the request: {_text(error)}", condition=_name(error))
        if state.descriptor != 0x24:
            raise RequestReleased("the server does not take the request now")
        self.stage = "the request was accepted, but no reply came"

    def _on_reply(self, transfer: codec.Transfer) -> Reply:
        if not transfer.settled:
            accepted = codec.Described(codec.ULong(0x24), [])
            delivery_id = transfer.delivery_id or 0
            self._write(codec.Disposition(role=True, first=delivery_id, settled=True, state=accepted))
        message = codec.decode_message(self._reply)
        if message.properties.correlation_id != self._message_id:
            raise ConnectionFailed("the server sent a reply to another request")
        properties = message.application_properties
        status = properties.get("status")
        cache_control = properties.get("cache_control")
        return Reply(
            status=int(status) if isinstance(status, codec.Int) else None,
            payload=message.body if isinstance(message.body, bytes) else None,
            content_type=message.properties.content_type,
            cache_control=cache_control if type(cache_control) is str else None,
            application_properties=properties,
        )


def _text(error: codec.Error | None) -> str:
    if error is None:
        return "no reason given"
    return f"{error.condition}, {error.description}" if error.description else error.condition


def _name(error: codec.Error | None) -> str | None:
    return error.condition if error is not None else None
