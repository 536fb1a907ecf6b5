"""The provisioning hook over HTTP (provisioning 9), against a receiver on a bare socket."""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
import uvloop
from tests.integration.receiver import (
    Behaviour,
    Question,
    Receiver,
    answer,
    deaf_port,
    drip,
    endless,
    hang,
    raw,
    reset,
    verify,
)

from kamado.http.hook import HttpHook, HttpHookSettings, sign
from kamado.provisioning import FirstContact, HookFailed, HookQuestion, HookReply

T = TypeVar("T")

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BY_CERTIFICATE = HookQuestion(
    kind=FirstContact.CERTIFICATE,
    tenant_id="acme",
    device_id="d-1",
    auth_id="CN=p,O=Acmé",
    issuer_dn="CN=CA",
    certificate=b"\x30\x00",
)
THROUGH_GATEWAY = HookQuestion(kind=FirstContact.GATEWAY, tenant_id="acme", device_id="e-1", gateway_id="gw-1")
NOTHING: HookReply = HookReply(is_wanted=True)


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def count_connections(port: int) -> int:
    """Count the sockets, in whatever state, that lead to a port of this machine and that some process still holds."""
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return len([fields for fields in lines if fields[2].endswith(f":{port:04X}") and fields[9] != "0"])


async def using(hook: HttpHook, use: Callable[[HttpHook], Awaitable[T]]) -> T:
    """Use a hook; afterwards there is neither task nor connection left."""
    port = urlsplit(hook._settings.url).port
    assert port is not None
    before = count_connections(port)

    async def settle() -> None:
        # A loop closes sockets in its next turn.
        async with asyncio.timeout(60):
            while count_connections(port) > before:  # noqa: ASYNC110 - the system tells nobody
                await asyncio.sleep(0.001)

    try:
        return await use(hook)
    finally:
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert hook._asking == 0
        await settle()
        await hook.close()


def ask(settings: HttpHookSettings, question: HookQuestion = THROUGH_GATEWAY) -> HookReply:
    return run(using(HttpHook(settings), lambda hook: hook.ask(question)))


class TestQuestion:
    def test_members_and_headers(self) -> None:
        with Receiver(answer(200)) as receiver:
            settings = HttpHookSettings(url=receiver.url, timeout=60, secret=bytes(range(32)), version="9")

            async def both(hook: HttpHook) -> None:
                assert await hook.ask(BY_CERTIFICATE) == await hook.ask(THROUGH_GATEWAY) == NOTHING

            run(using(HttpHook(settings), both))
            first, second = receiver.questions
        assert first.line == "POST /devices?from=kamado HTTP/1.1"
        assert first.headers["content-type"] == "application/json"
        assert first.headers["user-agent"] == "kamado/9"
        for question in (first, second):
            verify(question, SECRET)
            assert question.document["request-id"] == question.headers["webhook-id"]
        assert first.headers["webhook-id"] != second.headers["webhook-id"]
        document = first.document
        assert document.pop("request-id")
        assert document.pop("timestamp").endswith("Z")
        assert document == {
            "type": "first-contact.certificate",
            "tenant-id": "acme",
            "device-id": "d-1",
            "auth-id": "CN=p,O=Acmé",
            "issuer-dn": "CN=CA",
            "certificate": "MAA=",
        }
        document = second.document
        del document["request-id"], document["timestamp"]
        assert document == {
            "type": "first-contact.gateway",
            "tenant-id": "acme",
            "device-id": "e-1",
            "gateway-id": "gw-1",
        }

    def test_without_a_secret(self) -> None:
        with Receiver(answer(204)) as receiver:
            assert ask(HttpHookSettings(url=receiver.url, timeout=60)) == NOTHING
            (question,) = receiver.questions
        assert "webhook-signature" not in question.headers
        assert question.headers["webhook-id"]

    def test_signature_of_the_specifications_example(self) -> None:
        """Standard Webhooks 1.0: its published test vector."""
        secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
        signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
        assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

    def test_no_proxy_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with Receiver(answer(200)) as receiver:
            assert ask(HttpHookSettings(url=receiver.url, timeout=60)) == NOTHING


class TestAnswer:
    @pytest.mark.parametrize(
        ("behaviour", "reply"),
        [
            (answer(200), NOTHING),
            (answer(201, {"device-id": "x"}), HookReply(is_wanted=True, body={"device-id": "x"})),
            (answer(299, {}), HookReply(is_wanted=True, body={})),
            (answer(204), NOTHING),
            (answer(403, b"no"), HookReply(is_wanted=False)),
            (answer(404), HookReply(is_wanted=False)),
            (raw(b"HTTP/1.0 200 OK\r\n\r\n{}"), HookReply(is_wanted=True, body={})),
            (raw(b"HTTP/1.1 100 X\r\n\r\nHTTP/1.1 204 X\r\n\r\n", stays=True), NOTHING),
            (answer(200, b'{"ext":{"a":"' + b"x" * (64 * 1024 - 16) + b'"}}'), None),
        ],
    )
    def test_good(self, behaviour: Behaviour, reply: HookReply | None) -> None:
        with Receiver(behaviour) as receiver:
            got = ask(HttpHookSettings(url=receiver.url, timeout=60))
        assert got.is_wanted if reply is None else got == reply

    @pytest.mark.parametrize(
        ("behaviour", "words"),
        [
            (answer(500, {}), "status 500"),
            (answer(503), "status 503"),
            (answer(400), "status 400"),
            (answer(401), "status 401"),
            (answer(410), "status 410"),
            (answer(302, headers={"Location": "http://127.0.0.1:1/"}), "status 302"),
            (answer(307, headers={"Location": "/other"}), "status 307"),
            (answer(304), "status 304"),
            (answer(101, headers={"Upgrade": "x", "Connection": "upgrade"}), "status 101|RemoteProtocolError"),
            (answer(200, b"OK"), "not valid JSON"),
            (answer(200, []), "JSON object"),
            (answer(200, b"null"), "JSON object"),
            (answer(200, b"\xff{}"), "not valid JSON"),
            (answer(200, b"[" * 5000 + b"]" * 5000), "nested deeper"),
            (answer(200, b"{} {}"), "not valid JSON"),
            (answer(200, b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), "compressed"),
            (answer(200, b"x" * (64 * 1024 + 1)), "longer than 65536"),
            (answer(404, b"x" * (64 * 1024 + 1)), "longer than 65536"),
            (
                endless(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"x" * 1024 + b"\r\n"),
                "longer than 65536",
            ),
            (endless(b"HTTP/1.1 200 X\r\n", b"X: " + b"y" * 1000 + b"\r\n"), "ProtocolError"),
            (raw(b"HTTP/1.1 200 X\r\nContent-Length: 10\r\n\r\n{}"), "RemoteProtocolError"),
            (raw(b"220 mail.example ESMTP\r\n"), "RemoteProtocolError"),
            (raw(b""), "RemoteProtocolError"),
            (reset, "ReadError|RemoteProtocolError"),
        ],
    )
    def test_rubbish(self, behaviour: Behaviour, words: str) -> None:
        with Receiver(behaviour) as receiver:
            with pytest.raises(HookFailed, match=words):
                ask(HttpHookSettings(url=receiver.url, timeout=60))
            assert len(receiver.questions) == 1


class TestTime:
    @pytest.mark.parametrize(
        "behaviour",
        [
            hang,
            drip(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0.02),
            raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{", stays=True),
            endless(b"", b"HTTP/1.1 100 X\r\n\r\n"),
        ],
        ids=["hang", "drip", "half", "continue"],
    )
    def test_the_limit_is_for_everything(self, behaviour: Behaviour) -> None:
        with Receiver(behaviour) as receiver:
            started = time.monotonic()
            with pytest.raises(HookFailed, match=r"provisioning\.hook\.timeout"):
                ask(HttpHookSettings(url=receiver.url, timeout=0.2))
            # None of them would ever end.
            assert 0.15 < time.monotonic() - started < 20

    def test_no_connection_to_be_had(self) -> None:
        with deaf_port() as port, pytest.raises(HookFailed, match=r"provisioning\.hook\.timeout"):
            ask(HttpHookSettings(url=f"http://127.0.0.1:{port}/", timeout=0.2))

    def test_nobody_listens(self) -> None:
        with socket.socket() as deaf:
            # Bound, and never listening: nobody else is given the port.
            deaf.bind(("127.0.0.1", 0))
            with pytest.raises(HookFailed, match="ConnectError"):
                ask(HttpHookSettings(url=f"http://127.0.0.1:{deaf.getsockname()[1]}/", timeout=60))

    @pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 50])
    def test_a_cancel_at_any_step_leaves_nothing(self, steps: int) -> None:
        with Receiver(answer(200)) as receiver:

            async def cancel(hook: HttpHook) -> None:
                for _ in range(10):
                    task = asyncio.ensure_future(hook.ask(THROUGH_GATEWAY))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
                assert await hook.ask(THROUGH_GATEWAY) == NOTHING

            run(using(HttpHook(HttpHookSettings(url=receiver.url, timeout=60)), cancel))

    def test_a_storm_of_time_outs_leaves_it_as_it_was(self) -> None:
        with Receiver(hang) as receiver:

            async def storm(hook: HttpHook) -> None:
                for _ in range(3):
                    results = await asyncio.gather(
                        *(hook.ask(BY_CERTIFICATE) for _ in range(30)), return_exceptions=True
                    )
                    assert all(isinstance(result, HookFailed) for result in results)
                receiver.behaviour = answer(200)
                # The receiver, too, may be slow on a busy machine.
                hook._settings = replace(hook._settings, timeout=60)
                assert await asyncio.gather(*(hook.ask(BY_CERTIFICATE) for _ in range(10))) == [NOTHING] * 10

            run(using(HttpHook(HttpHookSettings(url=receiver.url, timeout=0.3, max_concurrent=30)), storm))

    def test_more_than_may_be_asked_at_a_time(self) -> None:
        with Receiver(hang) as receiver:

            async def crowd(hook: HttpHook) -> list[HookReply | BaseException]:
                return await asyncio.gather(*(hook.ask(BY_CERTIFICATE) for _ in range(5)), return_exceptions=True)

            results = run(using(HttpHook(HttpHookSettings(url=receiver.url, timeout=0.3, max_concurrent=3)), crowd))
        assert sorted("max_concurrent" in str(result) for result in results) == [False, False, False, True, True]

    def test_started_by_hand_outside_of_a_task(self) -> None:
        """Decision 8: its first wait comes before anything that needs a task."""

        async def start() -> None:
            hook = HttpHook(HttpHookSettings(url="http://127.0.0.1:1/"))
            work = hook.ask(THROUGH_GATEWAY)
            asyncio.get_running_loop().call_soon(lambda: waited.append(work.send(None)))
            waited: list[object] = []
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert waited == [None]
            work.close()
            assert hook._asking == 0

        run(start())


class TestConnections:
    def test_each_question_has_one_of_its_own(self) -> None:
        with Receiver(answer(200)) as receiver:

            async def several(hook: HttpHook) -> None:
                for _ in range(3):
                    await hook.ask(THROUGH_GATEWAY)

            run(using(HttpHook(HttpHookSettings(url=receiver.url, timeout=60)), several))
            assert (receiver.connections, len(receiver.questions)) == (3, 3)

    @pytest.mark.parametrize("pause", [0.0, 0.05])
    def test_what_comes_behind_an_answer_is_not_the_next_one(self, pause: float) -> None:
        def twice(connection: socket.socket, question: Question, over: threading.Event) -> bool:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            time.sleep(pause)
            with suppress(OSError):
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True

        with Receiver(twice) as receiver:

            async def several(hook: HttpHook) -> None:
                for _ in range(4):
                    assert (await hook.ask(THROUGH_GATEWAY)).is_wanted
                    await asyncio.sleep(2 * pause)

            run(using(HttpHook(HttpHookSettings(url=receiver.url, timeout=60)), several))

    def test_none_after_the_end(self) -> None:
        with Receiver(answer(200)) as receiver:

            async def use(hook: HttpHook) -> None:
                await hook.close()
                await hook.ask(THROUGH_GATEWAY)

            with pytest.raises(HookFailed, match="stopped"):
                run(using(HttpHook(HttpHookSettings(url=receiver.url)), use))
            assert not receiver.connections
