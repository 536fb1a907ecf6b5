"""Measure the AMQP engine alone: requests through `Connection`, a ready answer for each, no sockets.

    python -m bench.engine [--batch 100] [--seconds 2] [--profile]

Prints processor time per request (frames read, request handed over, accepted, reply encoded and sent, credit given
back) for several numbers of requests in one read.
"""

import argparse
import cProfile
import pstats
import time
import uuid

from kamado.amqp import codec, connection


def attach(handle: int, *, receiver: bool, address: str) -> bytes:
    return codec.encode_frame(
        0,
        codec.Attach(
            name=f"auto-{handle}",
            handle=handle,
            role=receiver,
            snd_settle_mode=0,
            source=codec.Terminus.source(address if receiver else None),
            target=codec.Terminus.target(None if receiver else address),
            initial_delivery_count=None if receiver else 0,
        ),
    )


class Server:
    """A connection with one request link and one reply link, and an application that knows one answer."""

    def __init__(self) -> None:
        self.connection = connection.Connection(
            connection.ConnectionSettings(container_id="bench", max_frame_size=65536), now=0.0
        )
        self.reply_link: connection.Link | None = None
        begin = codec.Begin(next_outgoing_id=0, incoming_window=0x7FFFFFFF, outgoing_window=0x7FFFFFFF)
        self.feed(
            connection.AMQP_HEADER
            + codec.encode_frame(0, codec.Open(container_id="client", idle_time_out=8000))
            + codec.encode_frame(0, begin)
            + attach(0, receiver=True, address="registration/acme/7c")
            + attach(1, receiver=False, address="registration/acme")
        )
        self.top_up()

    def top_up(self) -> None:
        """Give the server credit for replies without end."""
        flow = codec.Flow(
            next_incoming_id=0,
            incoming_window=0x7FFFFFFF,
            next_outgoing_id=0,
            outgoing_window=0x7FFFFFFF,
            handle=0,
            delivery_count=0,
            link_credit=0x7FFFFFFF,
        )
        self.feed(codec.encode_frame(0, flow))

    def feed(self, data: bytes) -> bytes:
        for event in self.connection.receive(data, 0.0):
            if isinstance(event, connection.RequestsReceived):
                link = event.link
                reply_link = self.reply_link
                assert reply_link is not None
                for request in event.requests:
                    correlation_id = request.correlation_id
                    if correlation_id is None or request.subject is None or request.reply_to is None:
                        link.reject_delivery(request, "hono:bad-request", "malformed request message")
                        continue
                    link.accept_delivery(request)
                    device_id = request.application_properties.get("device_id")
                    assert type(device_id) is str
                    reply_link.send(
                        codec.encode_reply(
                            "registration",
                            correlation_id,
                            200,
                            b'{"device-id":"device-00001234"}',
                            cache_control="max-age = 300",
                            tenant_id="acme",
                            device_id=device_id,
                        )
                    )
                link.give_credit(len(event.requests))
            elif isinstance(event, connection.LinkAttached):
                event.link.accept(1000)
                if event.link.is_sender:
                    self.reply_link = event.link
        return self.connection.data_to_send()


def requests(batch: int) -> bytes:
    """Encode assert requests as a Hono adapter sends them."""
    frames = []
    for number in range(batch):
        message = codec.encode_message(
            codec.Properties(
                message_id=f"registration-client-{uuid.UUID(int=number)}",
                to="registration/acme",
                subject="assert",
                reply_to="registration/acme/7c",
            ),
            {"device_id": f"device-{number:08}"},
        )
        transfer = codec.Transfer(
            handle=1, delivery_id=number, delivery_tag=number.to_bytes(2, "big"), message_format=0, settled=False
        )
        frames.append(codec.encode_frame(0, transfer, b"\0\x53\x70\x45" + message))
    return b"".join(frames)


def run(batch: int, seconds: float) -> float:
    """Return microseconds of processor time per request."""
    server = Server()
    data = requests(batch)
    assert server.feed(data).count(b"cache_control") == batch
    rounds = 0
    start = time.process_time()
    while time.process_time() - start < seconds:
        for _ in range(100):
            server.feed(data)
        rounds += 100
    return (time.process_time() - start) / rounds / batch * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, action="append", help="requests in one read; 1, 10 and 100 if not given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each batch size")
    parser.add_argument("--profile", action="store_true", help="tell where the time goes")
    arguments = parser.parse_args()
    for batch in arguments.batch or [1, 10, 100]:
        if arguments.profile:
            with cProfile.Profile() as profile:
                run(batch, arguments.seconds)
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)
        else:
            print(f"{batch:4} in one read: {run(batch, arguments.seconds):5.2f} µs per request")


if __name__ == "__main__":
    main()
