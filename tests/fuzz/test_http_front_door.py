"""Any bytes at the HTTP front door: a proper answer or a closed connection, never 5xx, and the process lives on.

KAMADO_FUZZ_SECONDS lengthens each run (default: some seconds together).
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.databases import Databases
from tests.integration.registry import Registry, new_id

SECONDS = float(os.environ.get("KAMADO_FUZZ_SECONDS", "3"))
PATIENCE = 60.0
"""Seconds for an answer. All requests below are complete or end with the sending side, so none waits for more."""

STATUSES = {200, 201, 204, 400, 403, 404, 405, 409, 412, 413}
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*\Z")
LENGTH = re.compile(rb"(?im)^content-length: (\d+)\r?$")


@pytest.fixture(scope="module")
def registry(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry of this file's own; stopping it checks that it has logged no traceback."""
    directory = tmp_path_factory.mktemp("fuzz")
    with Registry(directory, url=databases.create(directory / "data")) as running:
        yield running


@pytest.fixture(autouse=True)
def tenant_and_device(registry: Registry) -> None:
    """What the requests are about; those of an earlier test may have deleted it."""
    for path in ("/v1/tenants/T1", "/v1/devices/T1/d1"):
        assert registry.request("POST", path).status in {201, 409}


def exchange(registry: Registry, pieces: list[bytes]) -> bytes:
    """Send pieces, end the sending side, and return all that comes back."""
    received = b""
    with socket.create_connection(("127.0.0.1", registry.http_port), PATIENCE) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server need not read on once it has refused
        try:
            while data := sock.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    return received


def check_answers(received: bytes, *, heads: frozenset[int] = frozenset()) -> list[int]:
    """Take a stream of responses apart, which must leave nothing over, and return their statuses.

    Args:
        received: Everything the server sent.
        heads: Which of the answers, counted from 0, are to HEAD and have no body.
    """
    statuses: list[int] = []
    while received:
        head, separator, rest = received.partition(b"\r\n\r\n")
        assert separator, f"no end of the head: {received[:200]!r}"
        line, _, fields = head.partition(b"\r\n")
        matched = STATUS_LINE.match(line)
        assert matched, f"no status line: {line!r}"
        status = int(matched[1])
        if status == 100:
            received = rest
            continue
        assert status in STATUSES, head
        length = LENGTH.search(fields)
        assert length, head
        size = 0 if len(statuses) in heads else int(length[1])
        body, received = rest[:size], rest[size:]
        assert len(body) == size
        if status >= 400 and size:
            assert b"content-type: application/json; charset=utf-8" in fields
            assert isinstance(json.loads(body)["error"], str)
        statuses.append(status)
    return statuses


def run(check: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Try examples until the time is over."""
    deadline = time.monotonic() + SECONDS

    @settings(
        max_examples=int(SECONDS * 100),
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def attempt(values: tuple[Any, ...]) -> None:
        if time.monotonic() < deadline:
            check(*values)

    attempt()


METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "CONNECT"])
SEGMENTS = st.one_of(
    st.sampled_from(["v1", "v2", "tenants", "devices", "credentials", "T1", "d1", "", ".", "..", "%2F", "%zz", "%4"]),
    st.text("abcXYZ019-._~%:=@!$&'()*+,;", max_size=12),
    st.binary(max_size=6).map(lambda data: "".join(f"%{byte:02X}" for byte in data)),
)
KNOWN_PATHS = st.sampled_from(
    ["/v1/tenants", "/v1/tenants/", "/v1/tenants/T1", "/v1/devices/T1", "/v1/devices/T1/d1", "/v1/credentials/T1/d1"]
)
PATHS = st.one_of(KNOWN_PATHS, st.lists(SEGMENTS, min_size=1, max_size=7).map(lambda parts: "/" + "/".join(parts)))
QUERIES = st.one_of(st.just(""), st.text("abc=&%?/+0", max_size=20).map("?{}".format))
HEADER_VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just("Content-Type"), st.sampled_from(["application/json", "text/plain", "", ";", "a/b; c"])),
        st.tuples(
            st.sampled_from(["If-Match", "Origin", "Accept", "Authorization", "Content-Type", "X"]), HEADER_VALUES
        ),
        st.tuples(st.just("Expect"), st.sampled_from(["100-continue", "200-ok"])),
        st.tuples(st.just("Access-Control-Request-Method"), st.sampled_from(["PUT", "x", ""])),
        st.tuples(st.just("Connection"), st.sampled_from(["close", "keep-alive", "upgrade", "x, close"])),
        st.tuples(st.just("Upgrade"), st.sampled_from(["websocket", "h2c"])),
    ),
    max_size=5,
)

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["2024-01-01T00:00:00Z", "bcrypt", "sha-256", "psk", "x509-cert", "AAAA", "CN=a,O=b", "monthly"]),
)
MEMBERS = st.one_of(
    st.sampled_from(
        [
            *("enabled", "alias", "ext", "defaults", "adapters", "minimum-message-size", "resource-limits", "tracing"),
            *(
                "registration-limits",
                "trust-anchor-group",
                "trusted-ca",
                "max-devices",
                "data-volume",
                "period",
                "mode",
            ),
            *("effective-since", "cert", "subject-dn", "public-key", "not-before", "not-after", "algorithm", "id"),
            *("auth-id-template", "ocsp-revocation-enabled", "via", "viaGroups", "memberOf", "authorities", "status"),
            *("command-endpoint", "uri", "headers", "type", "auth-id", "secrets", "comment", "pwd-hash", "salt"),
            *("hash-function", "key", "sampling-mode", "sampling-mode-per-auth-id", "device-id", "tenant-id"),
        ]
    ),
    st.text(max_size=6),
)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(MEMBERS, inner, max_size=5)),
    max_leaves=20,
)
CREDENTIALS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["hashed-password", "psk", "x509-cert", "rpk", "my-own", ""]),
            "auth-id": st.one_of(st.sampled_from(["s1", "CN=a", "cn=a, o=\\", "="]), st.text(max_size=8)),
            "secrets": st.lists(st.dictionaries(MEMBERS, LEAVES, max_size=4), max_size=3),
        },
        optional={"ext": DOCUMENTS, "comment": LEAVES, "cert": LEAVES, "enabled": LEAVES},
    ),
    max_size=3,
)
BODIES = st.one_of(
    st.just(b""),
    st.one_of(DOCUMENTS, CREDENTIALS).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    st.sampled_from(
        [b"[" * 60000, b'{"a":' * 5000, b'{"ext":{"n":1e999}}', b"\xef\xbb\xbf{}", b'{"alias":"\\ud800"}', b"x" * 70000]
    ),
)


def encode_request(
    method: str, target: str, headers: list[tuple[str, str]], body: bytes, *, chunk: int | None = None
) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers)
    if chunk is None:
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
    parts = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    return (
        f"{head}Transfer-Encoding: chunked\r\n\r\n".encode("latin-1")
        + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        + b"0\r\n\r\n"
    )


def test_well_formed_requests(registry: Registry) -> None:
    """Whatever a request asks for, its answer is one of management 3.8; never 5xx (D38)."""

    def check(
        method: str,
        path: str,
        query: str,
        headers: list[tuple[str, str]],
        body: bytes,
        chunk: int | None,
        cut: int,
    ) -> None:
        request = encode_request(method, f"{path}{query}", headers, body, chunk=chunk)
        received = exchange(registry, [request[:cut], request[cut:]])
        statuses = check_answers(received, heads=frozenset({0} if method == "HEAD" else ()))
        assert len(statuses) == 1, received

    run(
        check,
        METHODS,
        PATHS,
        QUERIES,
        HEADERS,
        BODIES,
        st.one_of(st.none(), st.integers(1000, 70000)),
        st.integers(1, 300),
    )


def test_documents(registry: Registry) -> None:
    """Any JSON in the place of a tenant, a device or credentials."""

    def check(path: str, body: object) -> None:
        received = exchange(
            registry,
            [encode_request("PUT", path, [("Content-Type", "application/json")], json.dumps(body).encode())],
        )
        (status,) = check_answers(received)
        assert status in {204, 400, 409, 413}

    run(check, st.sampled_from(["/v1/tenants/T1", "/v1/devices/T1/d1"]), DOCUMENTS)
    run(check, st.just("/v1/credentials/T1/d1"), st.one_of(CREDENTIALS, DOCUMENTS))


def test_any_bytes(registry: Registry) -> None:
    """What is no HTTP gets 400 in JSON, or, cut short, nothing; the connection closes in either case."""
    pieces = st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.sampled_from(
                [
                    *(
                        b"GET /v1/tenants/T1 HTTP/1.1\r\n",
                        b"POST /v1/tenants HTTP/1.1\r\n",
                        b"Host: localhost\r\n",
                        b"\r\n",
                    ),
                    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n"),
                    *(b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n", b"FFFFFFFFFFFFFFFFF\r\n"),
                    *(b"GET http://h/v1/tenants/T1 HTTP/1.0\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01", b"AMQP\x00\x01\x00\x00"),
                    *(
                        b"GET /\xc3\xa4 HTTP/1.1\r\nHost: localhost\r\n\r\n",
                        b"CONNECT h:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    ),
                    *(b"X" * 70000, b"A: " + b"b" * 70000 + b"\r\n", b"G", b"\x00", b"\r", b"\n"),
                ]
            ),
        ),
        max_size=8,
    )

    def check(sent: list[bytes]) -> None:
        check_answers(exchange(registry, sent))

    run(check, pieces)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_peer_that_asks_and_asks_is_not_read_ahead_of_its_answers(registry: Registry, method: str) -> None:
    """What one connection may have in store is bounded, and others are served meanwhile."""
    requests = encode_request(method, "/v1/tenants/T1", [], b"") * 100
    with socket.create_connection(("127.0.0.1", registry.http_port), timeout=0.5) as peer:
        deadline = time.monotonic() + 3
        sent = 0
        while time.monotonic() < deadline and sent < 100_000_000:
            try:
                sent += peer.send(requests)
            except OSError:  # not read any more, or cut off
                break
            assert registry.request("GET", "/v1/nothing").status == 404
        assert sent < 100_000_000
        assert resident_kib(registry) < 150 * 1024


def test_pipelined_requests_are_answered_in_order(registry: Registry) -> None:
    """Garbage behind requests does not cost them their answers."""
    good = encode_request("GET", "/v1/devices/T1/d1", [], b"")
    bad = encode_request("GET", "/v1/devices/T1/none", [], b"")
    received = exchange(registry, [good + bad + good + b"GARBAGE\r\n\r\n"])
    assert check_answers(received) == [200, 404, 200, 400]
    broken = b"PUT /v1/tenants/T1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    assert check_answers(exchange(registry, [good + broken])) == [200, 400]
    assert check_answers(exchange(registry, [broken])) == [400]
    assert check_answers(exchange(registry, [good * 500])) == [200] * 500


def test_heads_that_do_not_end(registry: Registry) -> None:
    """Memory for a peer is bounded, whatever it sends around its requests."""
    endless: list[list[bytes]] = [
        [b"GET /", *[b"x" * 10000] * 30],
        [b"GET / HTTP/1.1\r\n", *[b"A: b\r\n" * 1000] * 30],
        [b"GET / HTTP/1.1\r\nA: ", *[b"b" * 10000] * 30],
        [
            b"POST /v1/tenants HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            *[b"A: b\r\n" * 10000] * 30,
        ],
        [b"POST /v1/tenants HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;", *[b"x" * 50000] * 30],
    ]
    for pieces in endless:
        # The answer may be lost, since the connection is closed with bytes unread.
        assert check_answers(exchange(registry, pieces)) in ([400], [])


def resident_kib(registry: Registry) -> int:
    status = Path(f"/proc/{registry.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_the_process_is_well_afterwards(registry: Registry) -> None:
    """It answers, no connection is left over, and it has not grown."""
    tenant = registry.create_tenant(new_id())
    assert registry.request("GET", f"/v1/tenants/{tenant}").status == 200
    assert resident_kib(registry) < 150 * 1024
    deadline = time.monotonic() + PATIENCE
    while True:
        sockets = 0
        for entry in Path(f"/proc/{registry.pid}/fd").iterdir():
            # Some are closed while this looks at them.
            with contextlib.suppress(FileNotFoundError):
                sockets += os.readlink(entry).startswith("socket:")
        if sockets < 12:
            break
        assert time.monotonic() < deadline, f"{sockets} sockets are open"
        time.sleep(0.02)
