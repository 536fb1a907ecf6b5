"""A receiver of the provisioning hook (provisioning 9) that behaves as a test wants, on a bare socket.

    with Receiver(answer(200, {"ext": {"a": 1}})) as receiver:
        registry = new_registry({"provisioning.hook.url": receiver.url})

Independent of the registry: the signature is checked here by what the Standard Webhooks specification says.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

__all__ = [
    "Behaviour",
    "Question",
    "Receiver",
    "answer",
    "deaf_port",
    "drip",
    "endless",
    "hang",
    "raw",
    "reset",
    "verify",
]


@dataclass(frozen=True)
class Question:
    """One request, read to its end."""

    line: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


Behaviour = Callable[[socket.socket, Question, threading.Event], bool]
"""Answers a question; returns whether the connection stays open. The event says that the test is over."""


def raw(data: bytes, *, stays: bool = False) -> Behaviour:
    """Send some bytes."""

    def behave(connection: socket.socket, question: Question, over: threading.Event) -> bool:
        connection.sendall(data)
        return stays

    return behave


def answer(status: int, document: object = None, *, headers: Mapping[str, str] | None = None) -> Behaviour:
    """Answer properly; `bytes` are sent as they are, anything else but `None` as JSON."""
    body = b"" if document is None else document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if status != 204:
        lines.append(f"Content-Length: {len(body)}")
    return raw("\r\n".join([*lines, "", ""]).encode() + body, stays=True)


def hang(connection: socket.socket, question: Question, over: threading.Event) -> bool:
    """Say nothing."""
    over.wait(30)
    return False


def drip(data: bytes, pause: float) -> Behaviour:
    """Send byte by byte."""

    def behave(connection: socket.socket, question: Question, over: threading.Event) -> bool:
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            if over.wait(pause):
                break
        return False

    return behave


def endless(head: bytes, piece: bytes) -> Behaviour:
    """Send without end."""

    def behave(connection: socket.socket, question: Question, over: threading.Event) -> bool:
        connection.sendall(head)
        while not over.is_set():
            connection.sendall(piece)
        return False

    return behave


def reset(connection: socket.socket, question: Question, over: threading.Event) -> bool:
    """End the connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


class Receiver:
    """A server on 127.0.0.1; a thread for each connection.

    Args:
        behaviour: What it does with a question; may be replaced at any time.
        tls: Its certificate, and whether clients need one.
    """

    def __init__(self, behaviour: Behaviour, *, tls: ssl.SSLContext | None = None) -> None:
        self.behaviour = behaviour
        self.questions: list[Question] = []
        self.connections = 0
        self._tls = tls
        self._over = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}/devices?from=kamado"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    @property
    def open_connections(self) -> int:
        """Connections that neither side has ended."""
        return len(self._open)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.add(connection)
                self._start(self._serve, connection)

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
                self._open.discard(plain)
                self._open.add(connection)
            stays = True
            with connection.makefile("rb") as file:
                while stays and (question := _read(file)) is not None:
                    self.questions.append(question)
                    stays = self.behaviour(connection, question, self._over)
        except (OSError, ssl.SSLError):
            pass
        finally:
            self._open.discard(plain)
            self._open.discard(connection)
            connection.close()


def _read(file: Any) -> Question | None:
    line = file.readline().decode().strip()
    if not line:
        return None
    headers: dict[str, str] = {}
    while header := file.readline().decode().strip():
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    return Question(line, headers, file.read(int(headers.get("content-length", "0"))))


def verify(question: Question, secret: str) -> None:
    """Check the signature as the Standard Webhooks specification says."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    identifier, timestamp = question.headers["webhook-id"], question.headers["webhook-timestamp"]
    assert abs(time.time() - int(timestamp)) < 300
    signed = f"{identifier}.{timestamp}.".encode() + question.body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert question.headers["webhook-signature"].split() == [f"v1,{expected}"]


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port that accepts no further connection: attempts wait for ever."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    port: int = listener.getsockname()[1]
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
        fillers.append(filler)
    try:
        yield port
    finally:
        for one in (*fillers, listener):
            one.close()
