"""The client of the management API, against registries with peculiarities."""

import socket
import ssl
import threading
import time

import pytest
from tests.integration.fake_registry import FakeRegistry

from kamado.http import client as client_module
from kamado.http.client import ClientSettings, ErrorAnswer, RegistryClient, Unreachable

MANY = [f"d{number:04}" for number in range(450)]


def connect(fake: FakeRegistry, timeout: float = 20.0, login: str | None = None) -> RegistryClient:
    username, _, password = (login or "").partition(":")
    return RegistryClient(
        ClientSettings(url=fake.url, username=username or None, password=password or None, timeout=timeout)
    )


def walk(fake: FakeRegistry, *, page_size: int = 200, offset: int = 0, by_id: bool = True) -> list[str]:
    with connect(fake) as client:
        pages = client.search("devices", "T", page_size=page_size, offset=offset, by_id=by_id)
        return [one for page in pages for one in page.ids]


# Walking through searches


@pytest.mark.parametrize("count", [1, 199, 200, 201, 400, 450])
def test_walk_goes_on_after_the_last_id(count: int) -> None:
    with FakeRegistry(device_ids=MANY[:count]) as fake:
        assert walk(fake) == MANY[:count]
        assert not any("pageOffset" in target for _, target in fake.requests)
        assert len(fake.requests) <= count // 200 + 1


@pytest.mark.parametrize("offset_counts", ["items", "pages"])
@pytest.mark.parametrize("page_size", [1, 7, 200])
@pytest.mark.parametrize("order", [1, -1])
def test_registry_that_ignores_after_is_walked_through_by_offset(
    offset_counts: str, page_size: int, order: int
) -> None:
    """Management 7.1: both readings of `pageOffset`."""
    ids = MANY[:30] if page_size < 200 else MANY
    with FakeRegistry(device_ids=ids, knows_after=False, offset_counts=offset_counts, order=order) as fake:
        assert walk(fake, page_size=page_size) == ids[::order]


def test_registry_that_knows_no_paging_at_all_is_no_endless_walk() -> None:
    with (
        FakeRegistry(device_ids=MANY, knows_after=False, offset_counts="nothing") as fake,
        pytest.raises(Unreachable, match="every page"),
    ):
        walk(fake)


@pytest.mark.parametrize("offset_counts", ["items", "pages"])
@pytest.mark.parametrize(("offset", "page_size"), [(1, 1), (3, 7), (7, 7), (10, 7), (29, 7), (30, 7), (99, 200)])
def test_walk_from_an_offset(offset_counts: str, offset: int, page_size: int) -> None:
    with FakeRegistry(device_ids=MANY[:30], offset_counts=offset_counts) as fake:
        assert walk(fake, offset=offset, page_size=page_size) == MANY[offset:30]


def test_sorted_search_is_walked_through_by_offset() -> None:
    with FakeRegistry(device_ids=MANY[:30], order=-1) as fake:
        assert walk(fake, page_size=7, by_id=False) == MANY[:30][::-1]
        assert not any("after" in target for _, target in fake.requests)


def test_registry_that_sorts_otherwise_is_not_asked_to_go_on_after_an_id() -> None:
    with FakeRegistry(device_ids=MANY, order=-1) as fake:
        assert walk(fake) == MANY[::-1]
        assert not any("after" in target for _, target in fake.requests)


@pytest.mark.parametrize("status", [404, 200])
def test_nothing_after_the_last_id(status: int) -> None:
    page = b'{"total": 200, "result": [%s]}' % b",".join(b'{"id": "%s"}' % one.encode() for one in MANY[:200])
    empty = b'{"error": "nothing found"}' if status == 404 else b'{"total": 201, "result": []}'
    with FakeRegistry(answers=[(200, {}, page), (status, {}, empty)]) as fake:
        assert walk(fake) == MANY[:200]
        assert len(fake.requests) == 2


def test_count() -> None:
    with FakeRegistry(device_ids=MANY) as fake, connect(fake) as client:
        assert client.count("devices", "T") == 450


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"result": [1]}', b'{"result": [{"id": 1}]}', b"<html>", b""])
def test_what_is_no_search_result(body: bytes) -> None:
    with FakeRegistry(answers=[(200, {}, body)]) as fake, pytest.raises(Unreachable, match="not the management API"):
        walk(fake)


# Requests


def test_reads_are_repeated_when_the_registry_asks_for_it() -> None:
    busy = (503, {"Retry-After": "0"}, b'{"error": "busy"}')
    with FakeRegistry(answers=[busy, busy]) as fake, connect(fake) as client:
        assert client.get("tenants", "T").object == {"enabled": True}
        assert len(fake.requests) == 3


def test_reads_are_not_repeated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_USUAL_RETRY_WAIT", 0.0)
    busy = (503, {"Retry-After": "Fri, 01 Jan 2038 00:00:00 GMT"}, b'{"error": "busy"}')
    with FakeRegistry(answers=[busy] * 9) as fake, connect(fake) as client:
        with pytest.raises(ErrorAnswer, match="busy"):
            client.get("tenants", "T")
        assert len(fake.requests) == 4


def test_writes_are_not_repeated() -> None:
    busy = (503, {"Retry-After": "0"}, b'{"error": "busy"}')
    with FakeRegistry(answers=[busy]) as fake, connect(fake) as client:
        with pytest.raises(ErrorAnswer, match="busy"):
            client.write("DELETE", "tenants", "T")
        assert len(fake.requests) == 1


def test_ids_stay_one_segment_of_the_path() -> None:
    with FakeRegistry() as fake, connect(fake) as client:
        for identifier in ("..", ".", "a/b", "a b", "ü", "%41", "?x", "urn:dev=1"):
            with pytest.raises(ErrorAnswer):
                client.get("devices", "T", identifier)
        targets = [target for _, target in fake.requests]
        assert targets[:2] == ["/v1/devices/T/%2E%2E", "/v1/devices/T/%2E"]
        assert targets[2:] == [
            f"/v1/devices/T/{one}" for one in ("a%2Fb", "a%20b", "%C3%BC", "%2541", "%3Fx", "urn%3Adev%3D1")
        ]


def test_login() -> None:
    """Management 3.11."""
    with FakeRegistry(login="alice:geheim ü") as fake:
        with connect(fake, login="alice:geheim ü") as client:
            client.get("tenants", "T")
        with connect(fake) as client, pytest.raises(ErrorAnswer) as info:
            client.get("tenants", "T")
        assert info.value.status == 401


def test_error_with_details_and_without_text() -> None:
    details = b'{"error": "in use", "subject-dn": "CN=a"}'
    answers: list[tuple[int, dict[str, str], bytes]] = [(409, {}, details), (404, {}, b""), (502, {}, b"oops")]
    with FakeRegistry(answers=answers) as fake, connect(fake) as client:
        for status, text, more in (
            (409, "in use", {"subject-dn": "CN=a"}),
            (404, "Not Found", {}),
            (502, "Bad Gateway", {}),
        ):
            with pytest.raises(ErrorAnswer) as info:
                client.get("tenants", "T")
            assert (info.value.status, str(info.value), info.value.details) == (status, text, more)


def test_what_is_no_registry() -> None:
    html = {"Content-Type": "text/html"}
    answers = [
        (404, html, b"<html>"),
        (200, html, b"<html>"),
        (302, {"Location": "/login"}, b""),
    ]
    with FakeRegistry(answers=answers) as fake, connect(fake) as client:
        for words in ("not the management API", "not the management API", "refers to /login"):
            with pytest.raises(Unreachable, match=words):
                client.get("tenants", "T")


def test_registry_that_is_too_slow() -> None:
    with FakeRegistry(delay=10.0) as fake, connect(fake, timeout=1.0) as client:
        with pytest.raises(Unreachable, match=r"no answer within 1 s$"):
            client.get("tenants", "T")
        with pytest.raises(Unreachable, match="may have been done, or not"):
            client.write("DELETE", "tenants", "T")


def test_answer_that_comes_drop_by_drop_has_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    while True:
                        peer.sendall(b" ")
                        time.sleep(0.02)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        settings = ClientSettings(url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=1.0)
        with RegistryClient(settings) as client, pytest.raises(Unreachable, match="no answer within"):
            client.get("tenants", "T")
        thread.join()


def test_what_speaks_another_protocol() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"AMQP\x00\x01\x00\x00")

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with RegistryClient(ClientSettings(url=url)) as client, pytest.raises(Unreachable, match="speak HTTP"):
            client.get("tenants", "T")
        thread.join()


def test_tls_where_there_is_none() -> None:
    with FakeRegistry() as fake:
        settings = ClientSettings(
            url=fake.url.replace("http:", "https:"), ssl_context=ssl.create_default_context(), timeout=30.0
        )
        with RegistryClient(settings) as client, pytest.raises(Unreachable, match="TLS failed"):
            client.get("tenants", "T")
