"""SASL ahead of AMQP: amqp-apis 1.2 and 1.3; authentication 6, rows of PLAIN and EXTERNAL."""

import struct

import pytest

from kamado.amqp import codec
from kamado.amqp.connection import AMQP_HEADER
from kamado.amqp.sasl import (
    SASL_HEADER,
    ExternalAttempt,
    Outcome,
    PlainAttempt,
    SaslClient,
    SaslServer,
)


def frame(performative: codec.Performative) -> bytes:
    return codec.encode_frame(0, performative, frame_type=1)


def init(mechanism: str, response: bytes | None) -> bytes:
    return frame(codec.SaslInit(mechanism=mechanism, initial_response=response))


def written(server: SaslServer) -> list[codec.Performative]:
    """Read the SASL frames that the server has to send, after a header if there is one."""
    data = server.data_to_send().removeprefix(SASL_HEADER)
    result = []
    while data:
        size, offset, frame_type, channel = struct.unpack_from(">IBBH", data)
        assert (offset, frame_type, channel) == (2, 1, 0)
        result.append(codec.decode_performative(data[8:size])[0])
        data = data[size:]
    return result


def started(*mechanisms: str) -> SaslServer:
    server = SaslServer(mechanisms or ("EXTERNAL", "PLAIN"), now=0.0)
    assert server.receive(SASL_HEADER, 0.0) == []
    written(server)
    return server


def outcome(server: SaslServer) -> int:
    (performative,) = written(server)
    assert isinstance(performative, codec.SaslOutcome)
    return performative.outcome


def test_the_server_answers_the_header_with_its_mechanisms() -> None:
    # amqp-apis 1.2, 1.3, 15.1: header, then an array of symbols
    server = SaslServer(["EXTERNAL", "PLAIN"], now=0.0)
    server.receive(SASL_HEADER, 0.0)
    data = server.data_to_send()
    assert data[:8] == b"AMQP\x03\x01\x00\x00"
    assert data[8:] == bytes.fromhex("00000021 02010000 005340 c014 01 e011 02 a3 08") + b"EXTERNAL\x05PLAIN"
    assert not server.succeeded
    assert not server.is_over


def test_one_mechanism_is_an_array_too() -> None:
    server = SaslServer(["PLAIN"], now=0.0)
    server.receive(SASL_HEADER, 0.0)
    assert b"\xe0\x08\x01\xa3\x05PLAIN" in server.data_to_send()


@pytest.mark.parametrize(
    "first", [b"AMQP\x00\x01\x00\x00", b"AMQP\x02\x01\x00\x00", b"GET / HTTP/1.1\r\n", b"\x16\x03"]
)
def test_anything_but_the_sasl_header_is_answered_with_it_and_the_end(first: bytes) -> None:
    # amqp-apis 1.2
    server = SaslServer(["PLAIN"], now=0.0)
    assert server.receive(first, 0.0) == []
    assert server.data_to_send() == SASL_HEADER
    assert server.is_over
    assert not server.succeeded
    assert server.receive(SASL_HEADER, 0.0) == []
    assert server.data_to_send() == b""


def test_plain() -> None:
    server = started()
    (attempt,) = server.receive(init("PLAIN", b"\0adapter@HONO\0secret"), 0.0)
    assert attempt == PlainAttempt("", "adapter@HONO", "secret")
    assert "secret" not in repr(attempt)
    assert written(server) == []
    server.finish(Outcome.OK)
    assert outcome(server) == 0
    assert server.succeeded
    assert not server.is_over
    server.finish(Outcome.SYS)
    assert written(server) == []


def test_plain_with_an_authorization_id_and_utf8() -> None:
    server = started()
    (attempt,) = server.receive(init("PLAIN", "other\0käthe\0pässwörd".encode()), 0.0)
    assert attempt == PlainAttempt("other", "käthe", "pässwörd")


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"\0",
        b"user\0password",
        b"\0user\0",
        b"\0\0password",
        b"\0user\0pass\0word",
        b"\0us\xffer\0password",
    ],
)
def test_malformed_plain_responses_fail(response: bytes) -> None:
    # amqp-apis 1.3: outcome code 1, without an attempt
    server = started()
    assert server.receive(init("PLAIN", response), 0.0) == []
    assert outcome(server) == 1
    assert server.is_over


@pytest.mark.parametrize(("response", "authorization_id"), [(b"", ""), (b"other", "other")])
def test_external(response: bytes, authorization_id: str) -> None:
    server = started()
    assert server.receive(init("EXTERNAL", response), 0.0) == [ExternalAttempt(authorization_id)]


def test_malformed_external_responses_fail() -> None:
    server = started()
    assert server.receive(init("EXTERNAL", b"\xff"), 0.0) == []
    assert outcome(server) == 1


@pytest.mark.parametrize("mechanism", ["ANONYMOUS", "EXTERNAL", "SCRAM-SHA-256", "plain", ""])
def test_mechanisms_that_are_not_offered_fail(mechanism: str) -> None:
    # amqp-apis 1.3
    server = started("PLAIN")
    assert server.receive(init(mechanism, b"\0u\0p"), 0.0) == []
    assert outcome(server) == 1
    assert server.is_over


@pytest.mark.parametrize(
    ("mechanism", "response", "attempt"),
    [("PLAIN", b"\0u\0p", PlainAttempt("", "u", "p")), ("EXTERNAL", b"", ExternalAttempt(""))],
)
def test_a_missing_initial_response_is_asked_for(mechanism: str, response: bytes, attempt: object) -> None:
    # amqp-apis 1.3: one empty challenge
    server = started()
    assert server.receive(init(mechanism, None), 0.0) == []
    assert written(server) == [codec.SaslChallenge(challenge=b"")]
    assert server.receive(frame(codec.SaslResponse(response=response)), 0.0) == [attempt]


def test_at_most_one_challenge() -> None:
    server = started()
    server.receive(init("PLAIN", None), 0.0)
    written(server)
    assert server.receive(init("PLAIN", None), 0.0) == []
    assert written(server) == []
    assert server.is_over


@pytest.mark.parametrize("code", [Outcome.AUTH, Outcome.SYS, Outcome.SYS_PERM, Outcome.SYS_TEMP])
def test_any_other_outcome_is_the_end(code: Outcome) -> None:
    # amqp-apis 1.3
    server = started()
    server.receive(init("PLAIN", b"\0u\0p"), 0.0)
    server.finish(code)
    assert outcome(server) == code
    assert server.is_over
    assert not server.succeeded


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\x07\2\1\0\0",
        b"\0\0\2\1\2\1\0\0",
        b"\0\0\0\x08\1\1\0\0",
        b"\0\0\0\x08\3\1\0\0",
        b"\0\0\0\x08\2\0\0\0",
        b"\0\0\0\x08\2\1\0\0",
        b"\0\0\0\x0c\2\1\0\0\0\x53\x41\x45",
        b"\0\0\0\x0c\2\1\0\0junk",
        frame(codec.SaslOutcome(outcome=0)),
        frame(codec.SaslResponse(response=b"")),
        frame(codec.Close()),
    ],
    ids=bytes.hex,
)
def test_malformed_frames_are_the_end_without_an_outcome(data: bytes) -> None:
    server = started()
    assert server.receive(data, 0.0) == []
    assert server.is_over
    assert server.data_to_send() == b""


def test_everything_at_once_and_byte_by_byte() -> None:
    data = SASL_HEADER + init("PLAIN", b"\0u\0p") + AMQP_HEADER + b"rest"
    server = SaslServer(["PLAIN"], now=0.0)
    assert server.receive(data, 0.0) == [PlainAttempt("", "u", "p")]
    server.finish(Outcome.OK)
    assert server.remaining() == AMQP_HEADER + b"rest"
    assert server.remaining() == b""

    server = SaslServer(["PLAIN"], now=0.0)
    attempts = [attempt for byte in data for attempt in server.receive(bytes((byte,)), 0.0)]
    assert attempts == [PlainAttempt("", "u", "p")]
    server.finish(Outcome.OK)
    assert server.remaining() == AMQP_HEADER + b"rest"


def test_what_is_sent_ahead_is_bounded() -> None:
    server = started()
    server.receive(init("PLAIN", b"\0u\0p"), 0.0)
    server.receive(b"x" * 65536, 0.0)
    assert server.next_deadline() is not None
    server.receive(b"x", 0.0)
    assert server.is_over
    server.finish(Outcome.OK)
    assert not server.succeeded


def test_the_exchange_must_end_in_time() -> None:
    # amqp-apis 1.2
    server = SaslServer(["PLAIN"], now=100.0, timeout=5.0)
    assert server.next_deadline() == 105.0
    server.tick(104.9)
    assert server.next_deadline() is not None
    server.tick(105.0)
    assert server.is_over
    assert server.next_deadline() is None


def test_no_deadline_after_the_outcome() -> None:
    server = started()
    server.receive(init("PLAIN", b"\0u\0p"), 0.0)
    server.finish(Outcome.OK)
    assert server.next_deadline() is None
    server.tick(1e9)
    assert server.succeeded


# --- The client's side ------------------------------------------------------------------------------------------------


def exchange(client: SaslClient, server: SaslServer, code: Outcome = Outcome.OK) -> list[object]:
    attempts: list[object] = []
    for _ in range(5):
        for attempt in server.receive(client.data_to_send(), 0.0):
            attempts.append(attempt)
            server.finish(code)
        client.receive(server.data_to_send())
    return attempts


def test_client_and_server_with_plain() -> None:
    client = SaslClient("user", "password")
    assert exchange(client, SaslServer(["EXTERNAL", "PLAIN"], now=0.0)) == [PlainAttempt("", "user", "password")]
    assert client.outcome == 0
    client.receive(AMQP_HEADER)
    assert client.remaining() == AMQP_HEADER


def test_client_and_server_with_external() -> None:
    client = SaslClient(None, None)
    server = SaslServer(["EXTERNAL", "PLAIN"], now=0.0)
    assert exchange(client, server, Outcome.SYS_TEMP) == [ExternalAttempt("")]
    assert client.outcome == 4


def test_a_client_without_a_common_mechanism() -> None:
    client = SaslClient(None, None)
    assert exchange(client, SaslServer(["PLAIN"], now=0.0)) == []
    assert client.failure == "the server offers PLAIN, not EXTERNAL"


def test_a_client_answers_a_challenge() -> None:
    client = SaslClient("u", "p")
    client.receive(SASL_HEADER + frame(codec.SaslMechanisms(sasl_server_mechanisms=("PLAIN",))))
    client.data_to_send()
    client.receive(frame(codec.SaslChallenge(challenge=b"?")))
    assert client.data_to_send() == frame(codec.SaslResponse(response=b""))


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400", AMQP_HEADER, SASL_HEADER + b"\0\0\0\1\2\1\0\0", SASL_HEADER + frame(codec.Close())]
)
def test_a_client_of_a_server_that_speaks_something_else(data: bytes) -> None:
    client = SaslClient("u", "p")
    client.receive(data[:3])
    client.receive(data[3:])
    assert client.failure == "the server does not speak AMQP 1.0 with SASL"
