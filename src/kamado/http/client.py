"""A client of the management API, for the operator's commands: requests, errors, and walking through searches.

Hides the HTTP library, and what tells one registry from another: some know our search parameter `after`, some count
`pageOffset` in items, some in pages (management 7.1).
"""

import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final, Self, cast
from urllib.parse import quote, urlsplit

import httpx

from kamado import __version__
from kamado.document import JsonObject, decode, encode
from kamado.errors import BadRequest

__all__ = [
    "Answer",
    "CertificateRefused",
    "ClientSettings",
    "ErrorAnswer",
    "Page",
    "Query",
    "RegistryClient",
    "RequestFailed",
    "Unreachable",
    "is_loopback",
]

Query = Sequence[tuple[str, str]]

MAX_PAGE_SIZE: Final = 200
"""Objects (management 7.1)."""
_MAX_ANSWER_SIZE: Final = 256 * 1024 * 1024
"""Bytes; a page of 200 objects of 64 KiB each is far below."""
_READ_ATTEMPTS: Final = 4
_MAX_RETRY_WAIT: Final = 5.0
_USUAL_RETRY_WAIT: Final = 1.0


class RequestFailed(Exception):
    """A request did not do what it was sent for; the text says why, for people."""


class Unreachable(RequestFailed):
    """No answer, or none of a registry."""


class CertificateRefused(Unreachable):
    """The server's certificate is not to be trusted."""


class ErrorAnswer(RequestFailed):
    """The registry answered with an error."""

    def __init__(self, status: int, text: str, details: JsonObject) -> None:
        super().__init__(text)
        self.status = status
        self.details = details
        """What the error says beside its text (management 3.8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where the registry is, and as whom to log in."""

    url: str
    """With a path if the API is below one: `/v1` is added."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = None
    """For https; without one nobody is trusted."""
    timeout: float = 60.0
    """Seconds for each request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response."""

    status: int
    version: str | None
    """As the registry wrote it."""
    value: object
    """`None` if there is no body."""

    @property
    def object(self) -> JsonObject:
        """The value, which must be an object.

        Raises:
            Unreachable: It is none: no registry answers like this.
        """
        if not isinstance(self.value, dict):
            raise _no_registry()
        return cast(JsonObject, self.value)

    @property
    def array(self) -> list[JsonObject]:
        """The value, which must be an array of objects.

        Raises:
            Unreachable: It is none.
        """
        if not isinstance(self.value, list) or not all(isinstance(one, dict) for one in self.value):
            raise _no_registry()
        return cast(list[JsonObject], self.value)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of what a search found."""

    total: int | None
    """Matches altogether; `None` if the registry does not say."""
    result: list[JsonObject]
    """Each with its `id`."""

    @property
    def ids(self) -> list[str]:
        """The ids, in order."""
        return [cast(str, one["id"]) for one in self.result]

    def is_last(self, size: int, seen: int) -> bool:
        """Whether nothing can follow.

        Args:
            size: How many objects were asked for.
            seen: How many have come altogether.
        """
        return not self.result or (len(self.result) < size and (self.total is None or seen >= self.total))


class _Offset(Enum):
    """What `pageOffset` counts."""

    ITEMS = auto()
    PAGES = auto()


class RegistryClient:
    """Sends requests on a connection that is kept.

    Reads are repeated a few times if the registry asks for it (503 with `Retry-After`), writes never are.

    Raises:
        Unreachable: The URL, or a proxy that the environment names, cannot be used.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        login = None
        if settings.username is not None:
            login = httpx.BasicAuth(settings.username.encode(), (settings.password or "").encode())
        try:
            self._http = httpx.Client(
                base_url=settings.url,
                auth=login,
                headers={
                    "Accept": "application/json",
                    "Accept-Encoding": "identity",
                    "User-Agent": f"kamado/{__version__}",
                },
                timeout=settings.timeout,
                # Plain HTTP needs none, and to load the system's CAs takes long: one that trusts nobody.
                verify=settings.ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                # Proxies are for what is elsewhere.
                trust_env=not is_loopback(settings.url),
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise Unreachable(str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, *path: str, query: Query = ()) -> Answer:
        """Read a resource.

        Args:
            path: Names and ids, below `/v1`.
            query: Parameters.

        Raises:
            ErrorAnswer: The registry refuses.
            Unreachable: There is no answer, or none of a registry.
        """
        attempts = _READ_ATTEMPTS
        while True:
            attempts -= 1
            response = self._send("GET", path, query=query)
            if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE or not attempts:
                return _answer(response)
            if "Retry-After" not in response.headers:
                return _answer(response)
            time.sleep(_retry_wait(response.headers["Retry-After"]))

    def write(
        self,
        method: str,
        *path: str,
        document: object = None,
        if_match: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Create, replace or delete a resource.

        Args:
            method: POST, PUT or DELETE.
            path: Names and ids, below `/v1`.
            document: The body; `None` for none.
            if_match: Version that the resource must have.
            timeout: Seconds, in place of those of the settings.

        Raises:
            ErrorAnswer: The registry refuses.
            Unreachable: There is no answer, or none of a registry; it may have been done, or not.
        """
        headers = {} if if_match is None else {"If-Match": if_match.encode()}
        body = None if document is None else encode(document)
        return _answer(self._send(method, path, body=body, headers=headers, timeout=timeout))

    # Searches (management 7)

    def search(
        self, *path: str, query: Query = (), page_size: int = MAX_PAGE_SIZE, offset: int = 0, by_id: bool = True
    ) -> Iterator[Page]:
        """Walk through all that a search finds, page by page.

        Args:
            path: Names and ids, below `/v1`.
            query: Filters and so on.
            page_size: Objects for each request, at most 200.
            offset: Objects to skip.
            by_id: The result is sorted by id, so that the walk can go on after the last id. Nothing is then left out
                or shown twice when others write at the same time.

        Raises:
            ErrorAnswer: The registry refuses; with status 404 nothing was found (7.5), or the tenant is unknown.
            Unreachable: There is no answer, or none of a registry.
        """
        if not by_id or offset:
            yield from self._search_by_offset(path, query, page_size, offset)
            return
        sized = [*query, ("pageSize", str(page_size))]
        page = self._page(path, sized)
        yield page
        seen = len(page.result)
        last = _last_of_ascending(page, None)
        while last is not None and not page.is_last(page_size, seen):
            try:
                page = self._page(path, [*sized, ("after", last)])
            except ErrorAnswer as error:
                if error.status == HTTPStatus.NOT_FOUND:
                    return
                raise
            if not page.result:
                return
            last = _last_of_ascending(page, last)
            if last is not None:
                yield page
                seen += len(page.result)
        if last is None and not page.is_last(page_size, seen):
            # A registry that does not know `after`.
            yield from self._search_by_offset(path, query, page_size, seen)

    def count(self, *path: str, query: Query = ()) -> int | None:
        """Count what a search finds; `None` if the registry does not say.

        Raises:
            ErrorAnswer: The registry refuses; with status 404 nothing was found, or the tenant is unknown.
            Unreachable: There is no answer, or none of a registry.
        """
        # Of size 0 Hono's own registries make an internal error (D15).
        return self._page(path, [*query, ("pageSize", "1")]).total

    def check_search_is_known(self, *path: str, error: ErrorAnswer) -> None:
        """Make sure that a 404 means that nothing was found: what is no registry says the same of any path.

        Raises:
            Unreachable: It is none.
        """
        try:
            self.get(*path, "any", "path")
        except ErrorAnswer as other:
            if (other.status, str(other)) != (error.status, str(error)):
                return
        raise _no_registry()

    def _search_by_offset(self, path: Sequence[str], query: Query, size: int, offset: int) -> Iterator[Page]:
        sized = [*query, ("pageSize", str(size))]
        counts: _Offset | None = None
        start = offset
        while True:
            if offset and counts is None:
                counts = self._what_offset_counts(path, query)
            skip = 0
            number = offset
            if counts is _Offset.PAGES:
                number, skip = divmod(offset, size)
            try:
                page = self._page(path, [*sized, ("pageOffset", str(number))] if number else sized)
            except ErrorAnswer as error:
                if error.status == HTTPStatus.NOT_FOUND and offset > start:
                    return
                raise
            rest = page.result[skip:]
            offset += len(rest)
            yield Page(page.total, rest)
            if not rest or page.is_last(size, offset) or (page.total is not None and offset >= page.total):
                return

    def _what_offset_counts(self, path: Sequence[str], query: Query) -> _Offset:
        """Find out what the registry counts: with pages of two, the second item is on the first or the next page.

        Raises:
            Unreachable: It counts nothing: every page is the first one.
        """
        # Somebody may write between two requests: that it counts pages must be seen twice.
        for _ in range(2):
            first = self._page(path, [*query, ("pageSize", "2")]).ids
            try:
                second = self._page(path, [*query, ("pageSize", "2"), ("pageOffset", "1")]).ids
            except ErrorAnswer as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                second = []
            if len(first) < 2 or second[:1] == first[1:2]:
                return _Offset.ITEMS
            if second[:1] == first[:1]:
                raise Unreachable("this registry answers every page of a search with the first one")
        return _Offset.PAGES

    def _page(self, path: Sequence[str], query: Query) -> Page:
        value = self.get(*path, query=query).object
        total, result = value.get("total"), value.get("result")
        if not isinstance(result, list) or not all(
            isinstance(one, dict) and isinstance(one.get("id"), str) for one in result
        ):
            raise _no_registry()
        return Page(total if isinstance(total, int) else None, result)

    # Requests

    def _send(
        self,
        method: str,
        path: Sequence[str],
        *,
        query: Query = (),
        body: bytes | None = None,
        headers: dict[str, bytes] | None = None,
        timeout: float | None = None,
    ) -> httpx.Response:
        """Send a request and read the response to its end."""
        target = "/v1/" + "/".join(_escape(segment) for segment in path)
        headers = dict(headers or {})
        if body is not None:
            headers["Content-Type"] = b"application/json"
        timeout = self._settings.timeout if timeout is None else timeout
        request = self._http.build_request(
            method,
            target,
            params=list(query),
            content=body,
            headers=[(name.encode(), value) for name, value in headers.items()],
            timeout=timeout,
        )
        deadline = time.monotonic() + timeout
        try:
            response = self._http.send(request, stream=True)
            try:
                content = bytearray()
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > _MAX_ANSWER_SIZE:
                        raise Unreachable("the answer is too long")
                    if time.monotonic() > deadline:
                        raise Unreachable(_too_slow(method, timeout))
            finally:
                response.close()
        except httpx.TimeoutException:
            raise Unreachable(_too_slow(method, timeout)) from None
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise _unreachable(error) from error
        return httpx.Response(response.status_code, headers=response.headers, content=bytes(content))


def _too_slow(method: str, timeout: float) -> str:
    text = f"no answer within {timeout:g} s"
    return text if method == "GET" else f"{text}; what was asked may have been done, or not"


def is_loopback(url: str) -> bool:
    """Whether a URL is one of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _escape(segment: str) -> str:
    # The library would follow a segment of dots as a path.
    return segment.replace(".", "%2E") if segment in {".", ".."} else quote(segment, safe="")


def _retry_wait(text: str) -> float:
    try:
        return min(max(float(text), 0.0), _MAX_RETRY_WAIT)
    except ValueError:
        return _USUAL_RETRY_WAIT


def _last_of_ascending(page: Page, after: str | None) -> str | None:
    """Return the last id of a page whose ids ascend, all of them greater than `after`; `None` for any other page."""
    last = after
    for one in page.ids:
        # Code points compare as the bytes of UTF-8 do.
        if last is not None and one <= last:
            return None
        last = one
    return last


def _unreachable(error: Exception) -> Unreachable:
    """Say what went wrong on the connection: what lies deepest tells most."""
    text = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return CertificateRefused(f"its certificate is not trusted: {cause.verify_message or cause}")
        if isinstance(cause, ssl.SSLError):
            return Unreachable(f"TLS failed: {cause.reason or cause}")
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.RemoteProtocolError):
        text = f"what listens there does not speak HTTP, or wants TLS: {text}"
    return Unreachable(text)


def _no_registry() -> Unreachable:
    return Unreachable("what answers there is not the management API of a registry")


def _answer(response: httpx.Response) -> Answer:
    """Take a response apart.

    Raises:
        ErrorAnswer: It is an error of the registry.
        Unreachable: It is not an answer of a registry at all.
    """
    status = response.status_code
    value: object = None
    if response.content:
        try:
            value = decode(response.content)
        except BadRequest:
            if status < 400 or "html" in response.headers.get("Content-Type", ""):
                raise _no_registry() from None
    if 300 <= status < 400:
        raise Unreachable(f"what answers there refers to {response.headers.get('Location', 'another place')}")
    if status < 400:
        return Answer(status, response.headers.get("ETag"), value)
    details = dict(value) if isinstance(value, dict) else {}
    text = details.pop("error", None)
    if not isinstance(text, str) or not text:
        try:
            text = HTTPStatus(status).phrase
        except ValueError:
            text = f"status {status}"
    raise ErrorAnswer(status, text, details)
