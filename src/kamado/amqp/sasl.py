"""SASL PLAIN and EXTERNAL ahead of AMQP, both sides, without I/O (amqp-apis 1.2, 1.3).

How a server drives it:

    sasl = SaslServer(["EXTERNAL", "PLAIN"], now=loop.time())
    for attempt in sasl.receive(data, now): ...      # at most one attempt in the life of a connection
        sasl.finish(Outcome.OK)                      # now or later, from a task
    transport.write(sasl.data_to_send())
    if sasl.is_over: close the socket, or if sasl.succeeded: Connection(...).receive(sasl.remaining(), now)

What is malformed, offers no such mechanism or is not SASL is answered here, without an attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

__all__ = ["ExternalAttempt", "Outcome", "PlainAttempt", "SaslAttempt", "SaslServer"]


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


class SaslServer:
    """See the module."""

    def __init__(self, mechanisms: Sequence[str], *, now: float, timeout: float = 10.0) -> None:
        raise NotImplementedError

    def receive(self, data: bytes, now: float) -> list[SaslAttempt]:
        """Take what was read; never raises. What follows the SASL exchange is kept for `remaining`."""
        raise NotImplementedError

    def finish(self, outcome: Outcome) -> None:
        """Answer the attempt. Any outcome but OK ends the connection."""
        raise NotImplementedError

    def data_to_send(self) -> bytes:
        raise NotImplementedError

    def remaining(self) -> bytes:
        """Bytes that came after the exchange, for `Connection.receive`."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When the peer must be through; at that time call `tick`."""
        raise NotImplementedError

    def tick(self, now: float) -> None:
        """End the exchange if it has taken too long (`is_over`)."""
        raise NotImplementedError

    @property
    def succeeded(self) -> bool:
        """Whether the outcome was OK: the rest belongs to `Connection`."""
        raise NotImplementedError

    @property
    def is_over(self) -> bool:
        """Whether the exchange failed: write `data_to_send` and close the socket."""
        raise NotImplementedError
