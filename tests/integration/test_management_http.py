"""Conformance of the management API at HTTP level: management 13.1, and 3.1 to 3.10 where it has no row."""

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator

import pytest
from tests.databases import Databases
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry, Response, new_id, send_request
from tests.rows import Section

ROWS = Section("management-api 13.1")

JSON = {"Content-Type": "application/json"}
CONTENT_TYPE = "application/json; charset=utf-8"
UI = "http://ui.example"


def assert_error(response: Response, status: int) -> None:
    """Check a response against management 3.8."""
    assert response.status == status, (response.status, response.body)
    assert response.headers["Content-Type"] == CONTENT_TYPE
    assert response.headers["Content-Length"] == str(len(response.body))
    assert response.headers["ETag"] is None
    text = response.object["error"]
    assert isinstance(text, str)
    assert text


@pytest.mark.parametrize("path", ["/v1/nothing", "/v2/tenants/T1"])
@ROWS.row(1)
def test_unknown_path(registry: Registry, path: str) -> None:
    assert_error(registry.request("GET", path), 404)


@ROWS.row(2)
def test_row_2_method_that_no_resource_has(registry: Registry) -> None:
    response = registry.request("PATCH", "/v1/tenants/T1")
    assert_error(response, 405)
    assert {"GET", "PUT", "POST", "DELETE"} <= {one.strip() for one in response.headers["Allow"].split(",")}


@ROWS.row(3)
def test_row_3_method_that_credentials_do_not_have(registry: Registry) -> None:
    response = registry.request("POST", "/v1/credentials/T1/d1", b"[]", JSON)
    assert_error(response, 405)
    assert {one.strip() for one in response.headers["Allow"].split(",")} == {"GET", "HEAD", "PUT"}


def post_raw(registry: Registry, path: str, head: str, body: bytes = b"", method: str = "POST") -> Response:
    """Send a request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", registry.http_port, timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(len(body)))
        for line in filter(None, head.split("\r\n")):
            connection.putheader(*line.split(": ", 1))
        connection.endheaders(body)
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("head", ["Content-Type: text/plain", ""], ids=["text", "none"])
@ROWS.row(4)
def test_body_that_is_not_declared_as_json(registry: Registry, head: str) -> None:
    tenant = new_id()
    assert_error(post_raw(registry, f"/v1/tenants/{tenant}", head, b"{}"), 400)
    assert registry.request("GET", f"/v1/tenants/{tenant}").status == 404


@ROWS.row(5)
def test_row_5_content_type_of_an_empty_body_is_nobodys_affair(registry: Registry) -> None:
    assert post_raw(registry, f"/v1/tenants/{new_id()}", "Content-Type: text/plain").status == 201


@ROWS.row(6)
def test_row_6_content_type_in_any_case_with_parameters(registry: Registry) -> None:
    head = "Content-Type: Application/JSON; charset=utf-8"
    assert post_raw(registry, f"/v1/tenants/{new_id()}", head, b"{}").status == 201


@pytest.mark.parametrize("body", [b'{"enabled":', b"[]", b"null"])
@ROWS.row(7)
def test_body_that_is_no_json_object(registry: Registry, body: bytes) -> None:
    assert_error(registry.request("POST", f"/v1/tenants/{new_id()}", body, JSON), 400)


@ROWS.row(8)
def test_row_8_body_that_is_too_large(registry: Registry) -> None:
    tenant = new_id()
    assert_error(registry.request("POST", f"/v1/tenants/{tenant}", {"ext": {"x": "x" * 70000}}), 413)
    assert registry.request("GET", f"/v1/tenants/{tenant}").status == 404


def body_of(size: int) -> bytes:
    return b'{"ext":{"x":"%s"}}' % (b"x" * (size - len(b'{"ext":{"x":""}}')))


@pytest.mark.parametrize(("size", "status"), [(65536, 201), (65537, 413)])
def test_a_body_of_exactly_the_maximum_is_fine(registry: Registry, size: int, status: int) -> None:
    """Management 3.5."""
    body = body_of(size)
    assert len(body) == size
    assert registry.request("POST", f"/v1/tenants/{new_id()}", body, JSON).status == status


@pytest.mark.parametrize(("size", "status"), [(1000, 201), (65536, 201), (65537, 413), (1_000_000, 413)])
def test_chunked_body(registry: Registry, size: int, status: int) -> None:
    """Management 3.5: chunked bodies, counted while they come."""
    body = body_of(size)
    connection = http.client.HTTPConnection("127.0.0.1", registry.http_port, timeout=20)
    try:
        chunks = (body[start : start + 5000] for start in range(0, size, 5000))
        connection.request("POST", f"/v1/tenants/{new_id()}", chunks, JSON, encode_chunked=True)
        assert connection.getresponse().status == status
    finally:
        connection.close()


def test_413_reaches_a_peer_that_closes_and_keeps_the_connection_of_one_that_does_not(registry: Registry) -> None:
    path = f"/v1/tenants/{new_id()}"
    connection = http.client.HTTPConnection("127.0.0.1", registry.http_port, timeout=20)
    try:
        for _ in range(2):
            connection.request("POST", path, b"x" * 5_000_000, JSON)
            response = connection.getresponse()
            assert response.status == 413
            assert json.loads(response.read())["error"]
        connection.request("POST", path, b"x" * 5_000_000, JSON | {"Connection": "close"})
        assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_413_does_not_read_on_for_ever(registry: Registry) -> None:
    """Management 3.5; a body without end costs its sender the connection."""
    with socket.create_connection(("127.0.0.1", registry.http_port), timeout=10) as peer:
        peer.sendall(
            b"POST /v1/tenants HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100_000_000:
                sent += peer.send(b"x" * 65536)
        assert sent < 100_000_000
    assert registry.request("GET", "/v1/nothing").status == 404


def test_413_before_the_body_is_sent(registry: Registry) -> None:
    """A client that asks first (Expect: 100-continue) is told no, and never yes."""
    head = (
        f"POST /v1/tenants/{new_id()} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 100000\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", registry.http_port), 20) as sock:
        sock.sendall(head.encode())
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 413 ")


def test_100_continue(registry: Registry) -> None:
    head = (
        f"POST /v1/tenants/{new_id()} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", registry.http_port), 20) as sock:
        sock.sendall(head.encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"{}")
        assert b"".join(iter(lambda: sock.recv(65536), b"")).startswith(b"HTTP/1.1 201 ")


@ROWS.row(9)
def test_row_9_update_without_body(registry: Registry) -> None:
    tenant = registry.create_tenant()
    assert_error(registry.request("PUT", f"/v1/tenants/{tenant}", b"", JSON), 400)


@pytest.mark.parametrize(
    "path",
    ["/v1/tenants/a%20b", "/v1/tenants/%20", "/v1/devices/{}/x%2Fy", "/v1/devices/{}/%zz"],
)
@ROWS.row(10)
def test_identifier_that_is_none(registry: Registry, path: str) -> None:
    assert_error(registry.request("POST", path.format(registry.create_tenant())), 400)


@pytest.mark.parametrize(
    "segment", ["%4", "%", "x%", "%C3", "%FF%FE", "a+b", "%00", "%0A", "x%0A", "%C3%A4", "x" * 257, "a%252Fb"]
)
def test_more_identifiers_that_are_none(registry: Registry, segment: str) -> None:
    """Management 3.1 and 3.2: decoded as UTF-8 after splitting, `+` is a plus sign, at most 256 characters."""
    assert_error(registry.request("GET", f"/v1/tenants/{segment}"), 400)


def test_identifiers_may_be_escaped_and_are_as_long_as_256(registry: Registry) -> None:
    tenant = registry.create_tenant(new_id() + ".T")
    assert registry.request("GET", f"/v1/tenants/{tenant}?tenant_id=other&x=%zz").status == 200
    assert registry.request("GET", f"/v1/tenants/{tenant[:-2]}%2E%54").status == 200
    assert registry.request("GET", f"/v1/tenants/{tenant.lower()}").status == 404
    long = new_id().ljust(256, "x")
    assert registry.request("POST", f"/v1/tenants/{long}").status == 201


@ROWS.row(11)
def test_row_11_slash_where_the_device_id_is_missing(registry: Registry) -> None:
    tenant = registry.create_tenant()
    device = registry.create_device(tenant)
    for method in ("POST", "DELETE"):
        response = registry.request(method, f"/v1/devices/{tenant}/")
        assert_error(response, 404)
        assert "device-id" in str(response.object["error"])
    assert registry.request("GET", f"/v1/devices/{tenant}/{device}").status == 200


@ROWS.row("11a")
def test_row_11a_slash_after_an_id(registry: Registry) -> None:
    tenant = registry.create_tenant()
    without, with_slash = (registry.request("GET", f"/v1/tenants/{tenant}{end}") for end in ("", "/"))
    assert (with_slash.status, with_slash.body, with_slash.etag) == (200, without.body, without.etag)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "//", "/v1", "/v1/", "/v1/tenants//", "/v1//tenants", "/v1/devices//d1", "/v1/devices", "/v1/devices/"),
        *("/v1/devices/T1/d1//", "/v1/devices/T1/d1/x", "/v1/credentials/T1", "/v1/credentials/T1/d1/x", "/V1/tenants"),
        *("/v1/Tenants", "/v1/tenants/T1/x", "/v1/%zz", "/index.html", "/v1/tenants/T1//"),
    ],
)
def test_paths_that_are_unknown(registry: Registry, path: str) -> None:
    """Management 3.1."""
    for method in ("GET", "POST", "DELETE"):
        assert_error(registry.request(method, path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/tenants", "GET, HEAD, POST"),
        ("PUT", "/v1/tenants", "GET, HEAD, POST"),
        ("PUT", "/v1/devices/T1", "GET, HEAD, POST, DELETE"),
    ],
)
def test_methods_of_collections(registry: Registry, method: str, path: str, allowed: str) -> None:
    response = registry.request(method, path)
    assert_error(response, 405)
    assert response.headers["Allow"] == allowed


@pytest.fixture(scope="module")
def open_registry(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that pages of any origin may use."""
    directory = tmp_path_factory.mktemp("cors")
    with Registry(directory, {"http.cors_allowed_origins": "*"}, url=databases.create(directory / "data")) as running:
        yield running


@ROWS.row(12)
def test_row_12_preflight(open_registry: Registry) -> None:
    headers = {"Origin": UI, "Access-Control-Request-Method": "PUT"}
    response = open_registry.request("OPTIONS", "/v1/tenants/A", headers=headers)
    assert response.status == 204
    assert response.body == b""
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert {"GET", "POST", "PUT", "DELETE"} <= set(response.headers["Access-Control-Allow-Methods"].split(", "))
    assert set(response.headers["Access-Control-Allow-Headers"].split(",")) == {
        "content-type",
        "authorization",
        "if-match",
    }
    for absent in ("Access-Control-Allow-Credentials", "Access-Control-Max-Age"):
        assert response.headers[absent] is None
    assert_error(open_registry.request("OPTIONS", "/v1/nothing", headers=headers), 404)


@ROWS.row(13)
def test_row_13_request_of_a_page(open_registry: Registry) -> None:
    tenant = open_registry.create_tenant()
    response = open_registry.request("GET", f"/v1/tenants/{tenant}", headers={"Origin": UI})
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.headers["Access-Control-Expose-Headers"] == "etag"
    refused = open_registry.request("GET", "/v1/tenants/none", headers={"Origin": UI})
    assert_error(refused, 404)
    assert refused.headers["Access-Control-Allow-Origin"] == "*"


def test_no_page_may_use_the_api_by_default(registry: Registry) -> None:
    """Management 3.10, decision 0005."""
    tenant = new_id()
    for method, path, more in [
        ("POST", f"/v1/tenants/{tenant}", {}),
        ("GET", f"/v1/tenants/{tenant}", {}),
        ("OPTIONS", f"/v1/tenants/{tenant}", {"Access-Control-Request-Method": "PUT"}),
    ]:
        for origin in (UI, "null", "http://127.0.0.1:1", "http://127.0.0.1"):
            response = registry.request(method, path, headers={"Origin": origin, **more})
            assert_error(response, 403)
            assert response.headers["Access-Control-Allow-Origin"] is None
    assert registry.request("GET", f"/v1/tenants/{tenant}").status == 404


def test_the_registrys_own_origin_is_no_other_origin(registry: Registry) -> None:
    response = registry.request("POST", f"/v1/tenants/{new_id()}", headers={"Origin": registry.http_url})
    assert response.status == 201
    assert response.headers["Access-Control-Allow-Origin"] is None


def test_origins_by_name(new_registry: NewRegistry) -> None:
    """Management 3.10: a list of origins is answered with the one that asked."""
    registry = new_registry({"http.cors_allowed_origins": f"https://a.example, {UI}"})
    tenant = registry.create_tenant()
    response = registry.request("GET", f"/v1/tenants/{tenant}", headers={"Origin": UI})
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == UI
    assert response.headers["Vary"] == "Origin"
    assert registry.request("GET", f"/v1/tenants/{tenant}", headers={"Origin": "http://b.example"}).status == 403
    assert registry.request("GET", f"/v1/tenants/{tenant}").headers["Access-Control-Allow-Origin"] is None


def test_options_that_is_no_preflight(registry: Registry) -> None:
    """Management 3.3."""
    assert_error(registry.request("OPTIONS", "/v1/tenants/T1"), 405)


def test_head_is_get_without_body(registry: Registry) -> None:
    """Management 3.3."""
    tenant = registry.create_tenant()
    got, head = (registry.request(method, f"/v1/tenants/{tenant}") for method in ("GET", "HEAD"))
    assert (head.status, head.body, head.etag) == (200, b"", got.etag)
    assert head.headers["Content-Length"] == got.headers["Content-Length"]
    assert registry.request("HEAD", "/v1/tenants/none").status == 404


def test_no_cache_control(registry: Registry) -> None:
    """Management 3.7."""
    tenant = registry.create_tenant()
    assert registry.request("GET", f"/v1/tenants/{tenant}").headers["Cache-Control"] is None


@pytest.mark.parametrize(
    ("method", "body", "headers", "status"),
    [
        # Management 3.15: 404/405 before 413 before 400 before 404 of the tenant.
        ("PATCH", b"x" * 70000, {}, 405),
        ("PUT", b"x" * 70000, {"Content-Type": "text/plain"}, 413),
        ("PUT", b"{", JSON, 400),
        ("PUT", b"{}", {"Content-Type": "text/plain"}, 400),
        ("PUT", b'{"no-such":1}', JSON | {"If-Match": "x"}, 400),
        ("PUT", b"{}", JSON | {"If-Match": "x"}, 404),
    ],
)
def test_the_first_error_in_order_is_told(
    registry: Registry, method: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    for path in (f"/v1/tenants/{new_id()}", f"/v1/devices/{new_id()}/d"):
        assert_error(registry.request(method, path, body, headers), status)


def test_tls(registry: Registry) -> None:
    assert registry.tls is not None
    path = f"/v1/tenants/{new_id()}"
    context = ssl.create_default_context(cafile=registry.tls.ca_file)
    response = send_request(registry.https_url, "POST", path, {}, context=context)
    assert response.status == 201
    assert registry.request("GET", path).etag == response.etag


def test_health(registry: Registry) -> None:
    """Configuration 3.1: the forms of Hono 1.2 and 2.x at once; nothing of the API on this listener."""
    for path in ("/readiness", "/liveness", "/started", "/"):
        response = registry.health(path)
        assert response.status == 200
        assert response.headers["Content-Type"] == CONTENT_TYPE
        report = response.object
        assert report["status"] == report["outcome"] == "UP"
        checks = report["checks"]
        assert isinstance(checks, list)
        assert all({"id", "name", "status", "data"} == set(check) for check in checks)
    assert send_request(registry.health_url, "HEAD", "/readiness").status == 200
    assert send_request(registry.health_url, "POST", "/readiness").status == 405
    assert registry.health("/v1/tenants/T1").status == 404
    assert registry.request("GET", "/readiness").status == 404
