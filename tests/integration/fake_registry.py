"""A registry that is none: one tenant with devices that can be searched, with the peculiarities of other registries."""

import base64
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

__all__ = ["FakeRegistry"]

JsonObject = dict[str, object]


@dataclass(kw_only=True)
class FakeRegistry:
    """Serves tenant T on a port that the system chooses while it is entered."""

    device_ids: Sequence[str] = ()
    knows_after: bool = True
    offset_counts: str = "items"
    """Or `pages`, or `nothing`."""
    order: int = 1
    """-1 for descending ids."""
    login: str | None = None
    """NAME:PASSWORD."""
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    """Given first, one for each request, in place of what would be right."""
    delay: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Methods and targets that have been asked for."""

    def __enter__(self) -> "FakeRegistry":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                fake.answer(self)

            do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # Peers that do not wait for an answer are part of the tests.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self.requests.append((handler.command, handler.path))
        if self.delay:
            time.sleep(self.delay)
        headers = {"Content-Type": "application/json; charset=utf-8"}
        if self.answers:
            status, headers, body = self.answers.pop(0)
        elif self.login is not None and handler.headers.get("Authorization") != self._authorization(self.login):
            status, body = 401, b'{"error":"no such login"}'
        else:
            status, value = self._value(handler.command, handler.path)
            body = json.dumps(value).encode()
        handler.send_response(status)
        for name, text in (headers | {"Content-Length": str(len(body))}).items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(body)

    @staticmethod
    def _authorization(login: str) -> str:
        return f"Basic {base64.b64encode(login.encode()).decode()}"

    def _value(self, method: str, target: str) -> tuple[int, JsonObject]:
        parts = urlsplit(target)
        if parts.path == "/v1/tenants/T":
            return 200, {"enabled": True}
        if parts.path != "/v1/devices/T" or method != "GET":
            return 404, {"error": "there is no such thing"}
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        ids = sorted(self.device_ids)[:: self.order]
        total = len(ids)
        if not ids:
            return 404, {"error": "nothing found"}
        size, offset = int(query.get("pageSize", 30)), int(query.get("pageOffset", 0))
        assert size <= 200
        if self.knows_after and "after" in query:
            ids = [one for one in ids if one > query["after"]]
        offset *= {"items": 1, "pages": size, "nothing": 0}[self.offset_counts]
        return 200, {"total": total, "result": [{"id": one, "enabled": True} for one in ids[offset : offset + size]]}
