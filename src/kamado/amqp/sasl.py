"""SASL PLAIN and EXTERNAL ahead of AMQP, both sides, without I/O (amqp-apis 1.2, 1.3).

How a server drives it:

    sasl = SaslServer(["EXTERNAL", "PLAIN"], now=loop.time())
    for attempt in sasl.receive(data, now): ...      # at most one attempt in the life of a connection
        sasl.finish(Outcome.OK)                      # now or later, from a task
    transport.write(sasl.data_to_send())
    if sasl.is_over: close the socket, or if sasl.succeeded: Connection(...).receive(sasl.remaining(), now)

What is malformed, names a mechanism not offered or is not SASL at all is answered here, without an attempt. The
client's side is `SaslClient`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from kamado.amqp import codec

__all__ = ["SASL_HEADER", "ExternalAttempt", "Outcome", "PlainAttempt", "SaslAttempt", "SaslClient", "SaslServer"]

SASL_HEADER: Final = b"AMQP\x03\x01\x00\x00"
# AMQP 2.8.1, MIN-MAX-FRAME-SIZE: SASL frames never exceed it (AMQP 5.3.1).
_MAX_FRAME_SIZE: Final = 512
# What a client may send on ahead while its credentials are being checked.
_MAX_PIPELINED: Final = 65536


class Outcome(IntEnum):
    """sasl-outcome.code, amqp-apis 1.3."""

    OK = 0
    AUTH = 1
    SYS = 2
    SYS_PERM = 3
    SYS_TEMP = 4


@dataclass(frozen=True, slots=True)
class PlainAttempt:
    """PLAIN with a well-formed response."""

    authorization_id: str
    """Empty if none was given."""
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ExternalAttempt:
    """EXTERNAL: the identity is the client certificate of the TLS connection."""

    authorization_id: str


SaslAttempt = PlainAttempt | ExternalAttempt


class _Malformed(Exception):
    """The bytes are not SASL frames."""


def _take_frame(buffer: bytearray) -> codec.Performative | None:
    """Take the first frame off the buffer; `None` while it is not complete."""
    if len(buffer) < 8:
        return None
    size, offset, frame_type, _channel = struct.unpack_from(">IBBH", buffer)
    if size > _MAX_FRAME_SIZE or not 8 <= 4 * offset <= size or frame_type != 1:
        raise _Malformed
    if len(buffer) < size:
        return None
    body = bytes(buffer[4 * offset : size])
    del buffer[:size]
    try:
        return codec.decode_performative(body)[0]
    except codec.DecodeError:
        raise _Malformed from None


def _frame(performative: codec.Performative) -> bytes:
    return codec.encode_frame(0, performative, frame_type=1)


class SaslServer:
    """See the module.

    Args:
        mechanisms: Offered, in order of preference: EXTERNAL, PLAIN.
        timeout: Seconds until the peer must be through (amqp-apis 1.2).
    """

    def __init__(self, mechanisms: Sequence[str], *, now: float, timeout: float = 10.0) -> None:
        self._mechanisms = tuple(mechanisms)
        self._deadline = now + timeout
        self._input = bytearray()
        self._output = b""
        self._expects_header = True
        self._challenged: str | None = None
        """The mechanism that was asked for its response by a challenge."""
        self._attempted = False
        self._outcome: Outcome | None = None
        self._is_over = False

    def receive(self, data: bytes, now: float) -> list[SaslAttempt]:
        """Take what was read; never raises. What follows the SASL exchange is kept for `remaining`."""
        if self._is_over:
            return []
        self._input += data
        if self._attempted:
            # The peer may only have sent ahead: there is nothing to read before the outcome.
            if len(self._input) > _MAX_PIPELINED:
                self._is_over = True
            return []
        try:
            if self._expects_header and not self._take_header():
                return []
            while not (self._attempted or self._is_over):
                performative = _take_frame(self._input)
                if performative is None:
                    break
                attempt = self._read(performative)
                if attempt is not None:
                    self._attempted = True
                    return [attempt]
        except _Malformed:
            self._is_over = True
        return []

    def _take_header(self) -> bool:
        header = bytes(self._input[:8])
        if not SASL_HEADER.startswith(header):
            # Any other protocol, AMQP without SASL among them: say what is spoken here, and close.
            self._output += SASL_HEADER
            self._is_over = True
            return False
        if len(header) < 8:
            return False
        del self._input[:8]
        self._expects_header = False
        self._output += SASL_HEADER + _frame(codec.SaslMechanisms(sasl_server_mechanisms=self._mechanisms))
        return True

    def _read(self, performative: codec.Performative) -> SaslAttempt | None:
        if isinstance(performative, codec.SaslInit) and self._challenged is None:
            mechanism = performative.mechanism
            if mechanism not in self._mechanisms:
                self.finish(Outcome.AUTH)
                return None
            if performative.initial_response is None:
                self._challenged = mechanism
                self._output += _frame(codec.SaslChallenge(challenge=b""))
                return None
            return self._attempt(mechanism, performative.initial_response)
        if isinstance(performative, codec.SaslResponse) and self._challenged is not None:
            return self._attempt(self._challenged, performative.response)
        raise _Malformed

    def _attempt(self, mechanism: str, response: bytes) -> SaslAttempt | None:
        try:
            if mechanism == "EXTERNAL":
                return ExternalAttempt(response.decode())
            authorization_id, username, password = response.decode().split("\0")
        except ValueError:  # not UTF-8, or not three fields
            username = password = ""
        if not username or not password:
            self.finish(Outcome.AUTH)
            return None
        return PlainAttempt(authorization_id, username, password)

    def finish(self, outcome: Outcome) -> None:
        """Answer the attempt. Any outcome but OK ends the connection."""
        if self._is_over or self._outcome is not None:
            return
        self._outcome = outcome
        self._output += _frame(codec.SaslOutcome(outcome=outcome))
        if outcome is not Outcome.OK:
            self._is_over = True

    def data_to_send(self) -> bytes:
        """Take what is to be written now."""
        output, self._output = self._output, b""
        return output

    def remaining(self) -> bytes:
        """Take the bytes that came after the exchange, for `Connection.receive`."""
        data = bytes(self._input)
        self._input.clear()
        return data

    def next_deadline(self) -> float | None:
        """When the peer must be through; at that time call `tick`."""
        return None if self._is_over or self._outcome is not None else self._deadline

    def tick(self, now: float) -> None:
        """End the exchange if it has taken too long (`is_over`)."""
        if self._outcome is None and now >= self._deadline:
            self._is_over = True

    @property
    def succeeded(self) -> bool:
        """Whether the outcome was OK: the rest belongs to `Connection`."""
        return self._outcome is Outcome.OK and not self._is_over

    @property
    def is_over(self) -> bool:
        """Whether the exchange failed: write `data_to_send` and close the socket."""
        return self._is_over


class SaslClient:
    """The client's side: PLAIN with a user name, EXTERNAL without."""

    def __init__(self, username: str | None, password: str | None) -> None:
        if username is None:
            self._mechanism, self._response = "EXTERNAL", b""
        else:
            self._mechanism, self._response = "PLAIN", f"\0{username}\0{password or ''}".encode()
        self._input = bytearray()
        self._output = SASL_HEADER
        self._expects_header = True
        self.outcome: int | None = None
        """Of the server; `None` while the exchange goes on."""
        self.offered: tuple[str, ...] = ()
        """Mechanisms that the server offers."""
        self.failure: str | None = None
        """Why the exchange cannot go on, if the server gave no outcome."""

    def receive(self, data: bytes) -> None:
        """Take what was read, up to the outcome."""
        self._input += data
        try:
            if self._expects_header:
                if not SASL_HEADER.startswith(bytes(self._input[:8])):
                    raise _Malformed
                if len(self._input) < 8:
                    return
                del self._input[:8]
                self._expects_header = False
            while self.outcome is None and self.failure is None:
                performative = _take_frame(self._input)
                if performative is None:
                    return
                self._read(performative)
        except _Malformed:
            self.failure = "the server does not speak AMQP 1.0 with SASL"

    def _read(self, performative: codec.Performative) -> None:
        if isinstance(performative, codec.SaslMechanisms):
            self.offered = performative.sasl_server_mechanisms
            if self._mechanism not in self.offered:
                self.failure = f"the server offers {', '.join(self.offered) or 'nothing'}, not {self._mechanism}"
                return
            self._output += _frame(codec.SaslInit(mechanism=self._mechanism, initial_response=self._response))
        elif isinstance(performative, codec.SaslChallenge):
            self._output += _frame(codec.SaslResponse(response=b""))
        elif isinstance(performative, codec.SaslOutcome):
            self.outcome = performative.outcome
        else:
            raise _Malformed

    def data_to_send(self) -> bytes:
        """Take what is to be written now."""
        output, self._output = self._output, b""
        return output

    def remaining(self) -> bytes:
        """Take the bytes that came after the outcome."""
        data = bytes(self._input)
        self._input.clear()
        return data
