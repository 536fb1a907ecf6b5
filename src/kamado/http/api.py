"""The routes of the management API: HTTP requests <-> calls of `Management`.

One ASGI application without a framework: a handful of path patterns, split at `/` before they are percent-decoded
(management 3.1). Everything that goes wrong leaves by one handler, in one JSON form (3.8). Knows no rule about tenants,
devices or credentials, and nothing of sockets.
"""

import asyncio
import base64
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import parse_qs, quote, unquote, unquote_to_bytes

from kamado.auth import LOCAL_OPERATOR, Principal
from kamado.document import Identifiers, JsonObject, decode, encode
from kamado.errors import BadRequest, Forbidden, NotFound, RegistryError, TooLarge, Unauthorized, Unavailable
from kamado.http.docs import Document, make_documents
from kamado.management import Expected, Management
from kamado.operators import Login
from kamado.search import Query, parse_query

__all__ = ["CONTENT_TYPE", "Access", "Api", "ApiSettings", "Headers", "Receive", "Send", "encode_error", "respond"]

_log = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

Access = Callable[[Login | None, str], Awaitable[Principal]]
"""Who calls, from what it presents and its address; raises `Unauthorized`."""

Observe = Callable[[str, str, int, float], None]
"""Takes each request: the template of its path, its method, the status of its answer, seconds."""

CONTENT_TYPE: Final = b"application/json; charset=utf-8"
_MAX_DISCARDED: Final = 8 * 1024 * 1024
"""Bytes of an unwanted body that are read and thrown away so that its sender sees the answer."""
_MAX_PARAMETERS: Final = 100
_MEDIA_TYPE: Final = b"application/json"
_BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_AUTHORIZATION: Final = re.compile(r"(?P<scheme>[!#$%&'*+.^_`|~0-9A-Za-z-]+) +(?P<rest>[\x21-\x7e][\x20-\x7e]*)")
_UNESCAPED_IN_LOCATION: Final = "!$&'()*+,;=:@"
"""What RFC 3986 allows in a path segment beside the characters that `quote` never escapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """What the configuration says about HTTP."""

    max_body_size: int = 64 * 1024
    """Bytes; a longer body is answered with 413 (management 3.5)."""
    cors_allowed_origins: frozenset[str] = frozenset()
    """Web origins, or `*`; pages of other origins are refused (management 3.10)."""
    realm: str = "Hono"
    page_offset_in_pages: bool = False
    """`pageOffset` of a search counts pages, as in Hono 2.7 with MongoDB, not items (management 7.1)."""
    identifiers: Identifiers = field(default_factory=Identifiers)
    """What the description of the API says about ids."""
    timeout: float = 30.0
    """Seconds for everything that a request may have to wait for, once it has arrived."""


class MethodNotAllowed(RegistryError):
    """The path is there, but not with this method."""

    status = 405

    def __init__(self, message: str, methods: Iterable[str]) -> None:
        super().__init__(message)
        self.methods = tuple(methods)


# Routes


@dataclass(slots=True)
class Request:
    """One request, taken apart as far as routing and headers go."""

    method: str
    path: str
    """Raw."""
    query: str
    """Raw, what follows the `?`."""
    receive: Receive
    source: str
    """The peer's address."""
    content_type: bytes | None = None
    content_length: bytes | None = None
    is_chunked: bool = False
    if_match: str | None = None
    if_none_match: str | None = None
    origin: str | None = None
    host: str | None = None
    authorization: str | None = None
    asked_method: bytes | None = None
    """Of a preflight."""
    expects_continue: bool = False
    is_read: bool = False
    """The body has come to its end."""
    cors: Headers = ()
    principal: Principal | None = field(default=None)
    route: str = "unknown"
    """Template of the path, once it is known to be one of ours."""
    time_limit: asyncio.Timeout | None = None

    @property
    def has_unread_body(self) -> bool:
        """Whether bytes of the body may still be on their way."""
        return not self.is_read and (self.is_chunked or self.content_length not in {None, b"0"})


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response."""

    status: int
    body: bytes = b""
    headers: Headers = ()
    content_type: bytes = CONTENT_TYPE


Handler = Callable[[Request, Principal, tuple[str, ...]], Awaitable[Answer]]


class Api:
    """The management API as an ASGI application.

    Args:
        management: The use cases.
        settings: See there.
        access: Who calls.
        observe: See there.
    """

    def __init__(
        self, management: Management, settings: ApiSettings, access: Access, *, observe: Observe = lambda *_: None
    ) -> None:
        self._management = management
        self._settings = settings
        self._access = access
        self._observe = observe
        self._tenants: dict[str, Handler] = {"GET": self._search_tenants, "POST": self._create_tenant}
        self._tenant: dict[str, Handler] = {
            "GET": self._get_tenant,
            "POST": self._create_tenant,
            "PUT": self._update_tenant,
            "DELETE": self._delete_tenant,
        }
        self._devices: dict[str, Handler] = {
            "GET": self._search_devices,
            "POST": self._create_device,
            "DELETE": self._delete_all_devices,
        }
        self._device: dict[str, Handler] = {
            "GET": self._get_device,
            "POST": self._create_device,
            "PUT": self._update_device,
            "DELETE": self._delete_device,
        }
        self._credentials: dict[str, Handler] = {"GET": self._get_credentials, "PUT": self._set_credentials}
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/tenants": self._tenants,
            "/v1/tenants/{tenant}": self._tenant,
            "/v1/devices/{tenant}": self._devices,
            "/v1/devices/{tenant}/{device}": self._device,
            "/v1/credentials/{tenant}/{device}": self._credentials,
        }
        documents = make_documents(settings.identifiers, settings.max_body_size, settings.realm)
        self._routes |= {path: {"GET": _document_handler(document)} for path, document in documents.items()}
        self._by_shape = {_shape(path.split("/")): path for path in self._routes}

    @property
    def routes(self) -> dict[str, list[str]]:
        """The methods of each path; ids in braces."""
        return {path: _methods(handlers) for path, handlers in self._routes.items()}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        request = _take_apart(scope, receive)
        try:
            async with asyncio.timeout(self._settings.timeout) as request.time_limit:
                answer = await self._answer(request, scope["scheme"])
        except TimeoutError:
            answer = self._fail(
                request, Unavailable("the registry was too slow; what was asked may have been done, or not")
            )
        except asyncio.CancelledError:
            # Only the end of the server does this, when the peer has been cut off already and nobody reads an answer;
            # the task ends here.
            return
        except Exception as error:
            answer = self._fail(request, error)
        await self._respond(request, answer, send)
        duration = time.perf_counter() - started
        self._observe(request.route, request.method, answer.status, duration)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "request",
                extra={
                    "principal": request.principal.name if request.principal else None,
                    "method": request.method,
                    "path": request.path,
                    "status": answer.status,
                    "duration": round(duration, 6),
                },
            )

    async def _answer(self, request: Request, scheme: str) -> Answer:
        """Answer a request, or raise what is wrong with it, in the order of management 3.15."""
        if request.origin is not None:
            self._check_origin(request, request.origin, scheme)
        is_preflight = request.method == "OPTIONS" and request.origin is not None and request.asked_method is not None
        if not is_preflight:
            request.principal = await self._find_caller(request)
        handlers, ids = self._route(request)
        if is_preflight:
            return Answer(204, headers=_preflight_headers(handlers))
        handler = handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            raise MethodNotAllowed(f"{request.method} is not supported on this path", _methods(handlers))
        assert request.principal is not None
        return await handler(request, request.principal, ids)

    # Callers (management 3.11)

    async def _find_caller(self, request: Request) -> Principal:
        login, problem = None, None
        try:
            login = _parse_basic(request.authorization) if request.authorization is not None else None
        except BadRequest as error:
            # While nobody has to log in, nobody reads the header either.
            problem = error
        try:
            principal = await self._access(login, request.source)
        except Unauthorized as error:
            raise problem or error from None
        if principal is LOCAL_OPERATOR and request.host is not None and not _is_local_host(request.host):
            # A page whose name has been made to resolve to this machine has the right origin (DNS rebinding, decision
            # 0005), but cannot hide its name.
            raise Forbidden("Host: only localhost and IP addresses are served while nobody has to log in")
        return principal

    # Paths (management 3.1)

    def _route(self, request: Request) -> tuple[dict[str, Handler], tuple[str, ...]]:
        """Find the handlers of a path, by method, and the ids in it.

        Raises:
            NotFound: There is no such path.
            BadRequest: An id is not percent-encoded UTF-8.
        """
        segments = request.path.split("/")
        has_slash = len(segments) > 2 and not segments[-1]
        if has_slash:
            del segments[-1]
        is_whole = len(segments) > 1 and not segments[0] and "" not in segments[1:]
        route = self._by_shape.get(_shape(segments)) if is_whole else None
        if route is None:
            raise NotFound("there is no such path; /docs describes those there are")
        request.route, handlers = route, self._routes[route]
        if handlers is self._devices and has_slash and request.method in {"POST", "DELETE"}:
            # The id was forgotten, most likely: a variable of a script that is empty (D30).
            raise NotFound("the device-id is missing; without the slash at the end, the path is that of all devices")
        return handlers, tuple(_decode(segment) if "%" in segment else segment for segment in segments[3:])

    # Tenants

    async def _create_tenant(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        document = await self._read_optional(request)
        created = await self._management.create_tenant(principal, ids[0] if ids else None, document)
        return _created(created.value, created.version, "/v1/tenants/" + _escape(created.value))

    async def _get_tenant(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        tenant = await self._management.get_tenant(principal, ids[0])
        return Answer(200, encode(tenant.value), (_etag(tenant.version),))

    async def _update_tenant(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        document = await self._read_required(request)
        version = await self._management.update_tenant(principal, ids[0], document, Expected.parse(request.if_match))
        return Answer(204, headers=(_etag(version),))

    async def _delete_tenant(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        await self._management.delete_tenant(principal, ids[0], Expected.parse(request.if_match))
        return Answer(204)

    async def _search_tenants(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        query = self._parse_query(request, for_devices=False)
        return Answer(200, encode(await self._management.search_tenants(principal, query)))

    # Devices

    async def _create_device(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        document = await self._read_optional(request)
        tenant_id, device_id = ids if len(ids) == 2 else (ids[0], None)
        created = await self._management.create_device(principal, tenant_id, device_id, document)
        location = f"/v1/devices/{_escape(tenant_id)}/{_escape(created.value)}"
        return _created(created.value, created.version, location)

    async def _get_device(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        device = await self._management.get_device(principal, ids[0], ids[1])
        return Answer(200, encode(device.value), (_etag(device.version),))

    async def _update_device(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        document = await self._read_required(request)
        version = await self._management.update_device(
            principal, ids[0], ids[1], document, Expected.parse(request.if_match)
        )
        return Answer(204, headers=(_etag(version),))

    async def _delete_device(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        await self._management.delete_device(principal, ids[0], ids[1], Expected.parse(request.if_match))
        return Answer(204)

    async def _delete_all_devices(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        # However long it takes: it goes on, slice by slice, and to give it up would only mean to do it again.
        assert request.time_limit is not None
        request.time_limit.reschedule(None)
        await self._management.delete_all_devices(principal, ids[0])
        return Answer(204)

    async def _search_devices(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        query = self._parse_query(request, for_devices=True)
        return Answer(200, encode(await self._management.search_devices(principal, ids[0], query)))

    def _parse_query(self, request: Request, *, for_devices: bool) -> Query:
        return parse_query(
            _parse_parameters(request.query),
            for_devices=for_devices,
            offset_in_pages=self._settings.page_offset_in_pages,
        )

    # Credentials

    async def _get_credentials(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        credentials = await self._management.get_credentials(principal, ids[0], ids[1])
        return Answer(200, encode(credentials.value), (_etag(credentials.version),))

    async def _set_credentials(self, request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        document = await self._read_required(request)
        version = await self._management.set_credentials(
            principal, ids[0], ids[1], document, Expected.parse(request.if_match)
        )
        return Answer(204, headers=(_etag(version),))

    # Bodies (management 3.4, 3.5)

    async def _read_optional(self, request: Request) -> object | None:
        """Read the body of a request that needs none; `None` if it has none."""
        body = await self._read(request)
        return _parse(request, body) if body else None

    async def _read_required(self, request: Request) -> object:
        body = await self._read(request)
        if not body:
            raise BadRequest("the request needs a body")
        return _parse(request, body)

    async def _read(self, request: Request) -> bytes:
        """Read the body.

        Raises:
            TooLarge: It is longer than allowed; the rest is not read.
            BadRequest: The peer has gone away before its end.
        """
        limit = self._settings.max_body_size
        if request.content_length is not None and int(request.content_length) > limit:
            raise TooLarge(f"the body must not be longer than {limit} bytes")
        assert request.time_limit is not None
        # How long the body may take is the server's to watch: a slow peer is answered with 400, not with 503.
        request.time_limit.reschedule(None)
        body = b""
        while not request.is_read:
            message = await request.receive()
            if message["type"] != "http.request":
                raise BadRequest("the body ended too early")
            body += message["body"]
            request.is_read = not message["more_body"]
            if len(body) > limit:
                raise TooLarge(f"the body must not be longer than {limit} bytes")
        request.time_limit.reschedule(asyncio.get_running_loop().time() + self._settings.timeout)
        return body

    # CORS (management 3.10)

    def _check_origin(self, request: Request, origin: str, scheme: str) -> None:
        """Make sure that a page of this origin may use the API, before anything is done for it (decision 0005)."""
        allowed = self._settings.cors_allowed_origins
        if "*" in allowed:
            request.cors = (
                (b"access-control-allow-origin", b"*"),
                (b"access-control-expose-headers", b"etag"),
            )
        elif origin in allowed:
            request.cors = (
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"vary", b"Origin"),
                (b"access-control-expose-headers", b"etag"),
            )
        elif request.host is None or origin.lower() != f"{scheme}://{request.host}".lower():
            raise Forbidden("Origin: pages of this origin may not use the API")

    # The way out

    def _fail(self, request: Request, error: Exception) -> Answer:
        """Turn an error into an answer: the one place that does."""
        headers: list[tuple[bytes, bytes]] = []
        body: JsonObject
        if isinstance(error, RegistryError):
            body = {"error": str(error), **(error.details or {})}
            status = error.status
            if isinstance(error, MethodNotAllowed):
                headers.append((b"allow", ", ".join(error.methods).encode()))
            elif isinstance(error, Unauthorized):
                headers.append((b"www-authenticate", f'Basic realm="{self._settings.realm}"'.encode()))
            elif isinstance(error, Unavailable):
                headers.append((b"retry-after", b"2"))
                _log.warning("request not answered", extra=_fields(request) | {"error": str(error)})
        else:
            _log.error("internal error", extra=_fields(request), exc_info=error)
            body, status = {"error": "internal error"}, 500
        return Answer(status, encode(body), tuple(headers))

    async def _respond(self, request: Request, answer: Answer, send: Send) -> None:
        headers = (*answer.headers, *request.cors)
        if not request.has_unread_body:
            await respond(send, answer.status, answer.body, headers, content_type=answer.content_type)
        elif request.expects_continue:
            # The peer waits to be told whether to send the body at all; it need not, but then we part.
            headers = (*headers, (b"connection", b"close"))
            await respond(send, answer.status, answer.body, headers, content_type=answer.content_type)
        else:
            # A peer may read only once it has written everything, and a connection that is closed with bytes unread
            # may take the answer with it: so the answer goes out now and the rest of the body is thrown away.
            # Not all of it, if there is much: then the connection ends.
            if request.is_chunked or int(request.content_length or 0) > _MAX_DISCARDED:
                headers = (*headers, (b"connection", b"close"))
            await respond(send, answer.status, answer.body, headers, content_type=answer.content_type, is_end=False)
            discarded = 0
            while not request.is_read and discarded <= _MAX_DISCARDED:
                message = await request.receive()
                request.is_read = not message.get("more_body", False)
                discarded += len(message.get("body", b""))
            await send({"type": "http.response.body", "body": b""})


def _parse_basic(authorization: str) -> Login | None:
    """Read an `Authorization` header (RFC 7617).

    Returns:
        `None` for another scheme than Basic, which proves nothing here.

    Raises:
        BadRequest: It is none of the forms of RFC 9110, 11.4, or holds no name and password in UTF-8.
    """
    match = _AUTHORIZATION.fullmatch(authorization)
    if match is None:
        raise BadRequest("Authorization: must be a scheme, a blank, and what the scheme asks for")
    if match["scheme"].lower() != "basic":
        return None
    try:
        text = base64.b64decode(match["rest"], validate=True).decode()
    except ValueError:
        raise BadRequest("Authorization: Basic must be followed by Base64 of UTF-8") from None
    name, colon, password = text.partition(":")
    if not colon:
        raise BadRequest("Authorization: Basic needs name and password with a colon between them")
    return Login(name=name, password=password)


def _is_local_host(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    name = name.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _take_apart(scope: Any, receive: Receive) -> Request:
    client = scope.get("client")
    request = Request(
        method=scope["method"],
        path=scope["raw_path"].decode("latin-1"),
        query=scope["query_string"].decode("latin-1"),
        receive=receive,
        source=client[0] if client else "",
    )
    for name, value in scope["headers"]:
        if name == b"content-type":
            request.content_type = value
        elif name == b"content-length":
            request.content_length = value
        elif name == b"transfer-encoding":
            request.is_chunked = True
        elif name == b"if-match":
            text = value.decode("latin-1")
            request.if_match = text if request.if_match is None else f"{request.if_match},{text}"
        elif name == b"if-none-match":
            request.if_none_match = value.decode("latin-1")
        elif name == b"origin":
            request.origin = value.decode("latin-1")
        elif name == b"host":
            request.host = value.decode("latin-1")
        elif name == b"authorization":
            # Two logins are none that could be read.
            text = value.decode("latin-1")
            request.authorization = text if request.authorization is None else f"{request.authorization},{text}"
        elif name == b"access-control-request-method":
            request.asked_method = value
        elif name == b"expect":
            request.expects_continue = value.lower() == b"100-continue"
    return request


def _parse(request: Request, body: bytes) -> object:
    media_type = (request.content_type or b"").partition(b";")[0].strip().lower()
    if media_type != _MEDIA_TYPE:
        raise BadRequest("Content-Type: must be application/json")
    document = decode(body)
    if document is None:
        raise BadRequest("the body must not be null")
    return document


def _shape(segments: list[str]) -> tuple[object, ...]:
    """What tells paths apart: the names that they begin with, and how many ids follow."""
    return (*(unquote(segment) for segment in segments[1:3]), len(segments))


def _document_handler(document: Document) -> Handler:
    headers = (*document.headers, (b"etag", document.tag.encode()))

    async def get(request: Request, principal: Principal, ids: tuple[str, ...]) -> Answer:
        if request.if_none_match is not None and document.is_known(request.if_none_match):
            return Answer(304, headers=headers)
        return Answer(200, document.body, headers, document.content_type)

    return get


def _decode(segment: str) -> str:
    if _BROKEN_ESCAPE.search(segment):
        raise BadRequest("the path has a % that is not followed by two hexadecimal digits")
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise BadRequest("the path is not UTF-8") from None


def _parse_parameters(query: str) -> dict[str, list[str]]:
    """Read the parameters after the `?`, in which `+` is a blank (management 7.1)."""
    if _BROKEN_ESCAPE.search(query):
        raise BadRequest("the query has a % that is not followed by two hexadecimal digits")
    try:
        return parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
    except UnicodeDecodeError:
        raise BadRequest("the query is not UTF-8") from None
    except ValueError:
        raise BadRequest(f"the query has more than {_MAX_PARAMETERS} parameters") from None


def _escape(identifier: str) -> str:
    return quote(identifier, safe=_UNESCAPED_IN_LOCATION)


def _etag(version: str) -> tuple[bytes, bytes]:
    # Without quotes: Hono's clients compare it with what they got (D17).
    return b"etag", version.encode()


def _created(identifier: str, version: str, location: str) -> Answer:
    return Answer(201, encode({"id": identifier}), (_etag(version), (b"location", location.encode("ascii"))))


def _methods(handlers: dict[str, Handler]) -> list[str]:
    methods = list(handlers)
    if "GET" in handlers:
        methods.insert(1, "HEAD")
    return methods


def _preflight_headers(handlers: dict[str, Handler]) -> Headers:
    return (
        (b"access-control-allow-methods", ", ".join(_methods(handlers)).encode()),
        (b"access-control-allow-headers", b"content-type,authorization,if-match"),
    )


def _fields(request: Request) -> dict[str, object]:
    return {
        "principal": request.principal.name if request.principal else None,
        "method": request.method,
        "path": request.path,
    }


def encode_error(text: str) -> bytes:
    """Write the body of an error (management 3.8)."""
    return encode({"error": text})


async def respond(
    send: Send,
    status: int,
    body: bytes,
    headers: Headers = (),
    *,
    content_type: bytes = CONTENT_TYPE,
    is_end: bool = True,
) -> None:
    """Send a response: with a content type if it has content, with its length even if that is 0 (management 3.7).

    Args:
        send: Where to.
        status: Of the response.
        body: JSON text, or what `content_type` says, or nothing.
        headers: Further headers.
        content_type: Of the body.
        is_end: Whether the connection may go on with the next request.
    """
    if body:
        headers = ((b"content-type", content_type), *headers)
    if status != 304:
        # There it would be the length of what is not sent (RFC 9110, 8.6).
        headers = ((b"content-length", b"%d" % len(body)), *headers)
    await send({"type": "http.response.start", "status": status, "headers": [*headers]})
    await send({"type": "http.response.body", "body": body, "more_body": not is_end})
