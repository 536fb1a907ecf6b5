"""Front doors that several processes serve: who takes the next connection (decision 23)."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable

import pytest

from kamado.listeners import ABSENT, Share, SharedListener, bind, open_counts, read_counts


@pytest.fixture
def counts() -> memoryview:
    descriptor, made = open_counts(1, 3)
    os.close(descriptor)
    return made


def test_nobody_takes_part_in_the_beginning(counts: memoryview) -> None:
    assert list(counts) == [ABSENT] * 3
    # Who is not there is nobody's rival.
    assert Share(counts, 0).is_next


def test_other_processes_see_the_same(counts: memoryview) -> None:
    descriptor, made = open_counts(2, 2)
    try:
        Share(read_counts(descriptor)[2:], 1).open()
    finally:
        os.close(descriptor)
    assert list(made) == [ABSENT, ABSENT, ABSENT, 0]


def test_who_has_fewest_is_next(counts: memoryview) -> None:
    one, two, three = (Share(counts, own) for own in range(3))
    one.open()
    two.open()
    assert one.is_next
    assert two.is_next
    one.begin()
    assert list(counts) == [1, 0, ABSENT]
    assert [share.is_next for share in (one, two)] == [False, True]
    two.begin()
    assert [share.is_next for share in (one, two)] == [True, True]
    two.begin()
    two.end()
    assert [share.is_next for share in (one, two)] == [True, True]
    # One that comes back has none.
    three.open()
    assert [share.is_next for share in (one, two, three)] == [False, False, True]
    three.close()
    assert [share.is_next for share in (one, two)] == [True, True]


def test_one_that_stops_does_not_come_back_when_its_connections_end(counts: memoryview) -> None:
    share = Share(counts, 0)
    share.open()
    share.begin()
    share.close()
    share.end()
    assert counts[0] == ABSENT


class Greeter(asyncio.Protocol):
    """Says who it is, and counts itself out in the end."""

    def __init__(self, name: bytes, share: Share) -> None:
        self._name = name
        self._share = share

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._name)

    def connection_lost(self, exc: Exception | None) -> None:
        self._share.end()


Listen = Callable[[bytes, Share], None]


def serve(use: Callable[[Listen, int], Awaitable[None]], context: ssl.SSLContext | None = None) -> None:
    """Let listeners take turns on one socket."""

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            (listening,) = await bind("127.0.0.1", 0)
            stack.callback(listening.close)
            listeners: list[SharedListener] = []

            def listen(name: bytes, share: Share) -> None:
                listeners.append(
                    SharedListener(
                        listening.dup(),
                        share,
                        lambda: Greeter(name, share),
                        context=context,
                        handshake_timeout=1.0,
                        shutdown_timeout=1.0,
                    )
                )

            await use(listen, listening.getsockname()[1])
            for listener in listeners:
                listener.close()
                listener.close()  # harmless
                await listener.wait_closed()

    asyncio.run(main())


async def greet(port: int) -> tuple[bytes, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    return await asyncio.wait_for(reader.read(1), 60), writer


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.005)


def test_connections_are_spread(counts: memoryview) -> None:
    async def use(listen: Listen, port: int) -> None:
        listen(b"a", Share(counts, 0))
        listen(b"b", Share(counts, 1))
        greetings = [await greet(port) for _ in range(10)]
        assert sorted(name for name, _ in greetings) == [b"a"] * 5 + [b"b"] * 5
        for _, writer in greetings:
            writer.close()
        await until(lambda: list(counts) == [0, 0, ABSENT])

    serve(use)


def test_who_would_be_next_but_hangs_is_not_waited_for_long(counts: memoryview) -> None:
    async def use(listen: Listen, port: int) -> None:
        Share(counts, 1).open()
        listen(b"a", Share(counts, 0))
        greetings = [await greet(port) for _ in range(3)]
        assert [name for name, _ in greetings] == [b"a"] * 3
        for _, writer in greetings:
            writer.close()

    serve(use)


def test_one_that_has_too_many_open_files_goes_on_later(
    counts: memoryview, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused(socket.socket):
        refusals = 2

        def accept(self) -> tuple[socket.socket, object]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def main() -> None:
        (bound,) = await bind("127.0.0.1", 0)
        share = Share(counts, 0)
        listening = Refused(fileno=bound.detach())
        listener = SharedListener(
            listening, share, lambda: Greeter(b"a", share), context=None, handshake_timeout=1.0, shutdown_timeout=1.0
        )
        name, writer = await greet(listening.getsockname()[1])
        assert name == b"a"
        writer.close()
        await until(lambda: counts[0] == 0)
        listener.close()
        await listener.wait_closed()

    monkeypatch.setattr("kamado.listeners._TROUBLE", 0.05)
    asyncio.run(main())
    assert [record.message for record in caplog.records] == ["no connection can be taken now"] * 2


def test_a_handshake_that_fails_is_counted_out(counts: memoryview) -> None:
    async def use(listen: Listen, port: int) -> None:
        listen(b"a", Share(counts, 0))
        _, silent = await asyncio.open_connection("127.0.0.1", port)
        reader, wrong = await asyncio.open_connection("127.0.0.1", port)
        await until(lambda: counts[0] == 2)
        wrong.write(b"this is no TLS at all, not even by far")
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 60)
        await until(lambda: counts[0] == 0)
        silent.close()
        wrong.close()

    serve(use, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_a_connection_that_comes_to_nothing_is_counted_out(
    counts: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason; or this process would be passed over from then on."""

    def fail() -> asyncio.Protocol:
        raise RuntimeError("injected")

    async def main() -> None:
        (listening,) = await bind("127.0.0.1", 0)
        port = listening.getsockname()[1]
        listener = SharedListener(
            listening, Share(counts, 0), fail, context=None, handshake_timeout=1.0, shutdown_timeout=1.0
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        assert counts[0] == 0
        writer.close()
        listener.close()
        await listener.wait_closed()

    asyncio.run(main())
    (event,) = caplog.records
    assert (event.message, event.exc_info is not None) == ("connection not taken", True)


def test_an_address_that_is_taken_leaves_nothing_open() -> None:
    async def main() -> None:
        (first,) = await bind("127.0.0.1", 0)
        with first, pytest.raises(OSError, match="in use"):
            await bind("127.0.0.1", first.getsockname()[1])

    asyncio.run(main())


def test_ipv6_stands_for_itself() -> None:
    async def main() -> None:
        try:
            (bound,) = await bind("::1", 0)
        except OSError:
            pytest.skip("no IPv6 here")
        with bound:
            assert bound.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1

    asyncio.run(main())
