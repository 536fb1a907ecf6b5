"""AMQP 1.0 types, performatives and message sections <-> bytes."""

__all__ = ["Symbol", "encode_reply"]


class Symbol(str):
    """An AMQP symbol. A plain `str` is an AMQP string."""

    __slots__ = ()


def encode_reply(
    endpoint: str,
    correlation_id: bytes,
    status: int,
    payload: bytes | None = None,
    cache_control: str | None = None,
    tenant_id: str | None = None,
    device_id: str | None = None,
    content_type: str = "application/json",
) -> bytes:
    """Encode a reply message (amqp-apis 7), ready for `Link.send`.

    Args:
        endpoint: First segment of the property `to`, which is endpoint/tenant/device as far as known.
        correlation_id: `Request.correlation_id`, encoded with its type.
        payload: Body, sent as one data section; none if `None`. `content_type` is set only with a body.
    """
    raise NotImplementedError
