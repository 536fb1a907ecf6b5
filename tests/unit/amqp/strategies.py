"""Hypothesis strategies for AMQP values and for messages as all kinds of clients write them."""

import uuid

from hypothesis import strategies as st

from kamado.amqp import values

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
symbols = st.text(st.characters(max_codepoint=127), max_size=300).map(values.Symbol)
uuids = st.uuids(version=4) | st.builds(lambda data: uuid.UUID(bytes=data), st.binary(min_size=16, max_size=16))
ulongs = st.integers(0, 2**64 - 1).map(values.ULong)

scalars: st.SearchStrategy[object] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 2**8 - 1).map(values.UByte),
    st.integers(0, 2**16 - 1).map(values.UShort),
    st.integers(0, 2**32 - 1).map(values.UInt),
    ulongs,
    st.integers(-(2**7), 2**7 - 1).map(values.Byte),
    st.integers(-(2**15), 2**15 - 1).map(values.Short),
    st.integers(-(2**31), 2**31 - 1).map(values.Int),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1).map(values.Timestamp),
    st.floats(width=32, allow_nan=False).map(values.Float),
    st.floats(allow_nan=False),
    st.binary(min_size=4, max_size=4).map(values.Decimal32),
    st.binary(min_size=8, max_size=8).map(values.Decimal64),
    st.binary(min_size=16, max_size=16).map(values.Decimal128),
    st.characters(exclude_categories=["Cs"]).map(values.Char),
    uuids,
    st.binary(max_size=300),
    text,
    symbols,
)

# One strategy for the items of an array, whose constructor is one for all.
_ARRAYS = {
    0x40: st.none(),
    0x43: st.just(values.UInt(0)),
    0x50: st.integers(0, 2**8 - 1).map(values.UByte),
    0x52: st.integers(0, 2**8 - 1).map(values.UInt),
    0x56: st.booleans(),
    0x60: st.integers(0, 2**16 - 1).map(values.UShort),
    0x71: st.integers(-(2**31), 2**31 - 1).map(values.Int),
    0x72: st.floats(width=32, allow_nan=False).map(values.Float),
    0x80: ulongs,
    0x81: st.integers(-(2**63), 2**63 - 1),
    0x83: st.integers(-(2**63), 2**63 - 1).map(values.Timestamp),
    0x98: uuids,
    0xA0: st.binary(max_size=255),
    0xA3: st.text(st.characters(max_codepoint=127), max_size=255).map(values.Symbol),
    0xB1: text,
}


def _array_of(code: int) -> st.SearchStrategy[values.Array]:
    return st.lists(_ARRAYS[code], max_size=8).map(lambda items: values.Array(tuple(items), code))


arrays: st.SearchStrategy[object] = st.sampled_from(sorted(_ARRAYS)).flatmap(_array_of)

anything: st.SearchStrategy[object] = st.recursive(
    scalars | arrays,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(scalars, inner, max_size=5),
        st.builds(values.Described, ulongs | symbols, inner),
    ),
    max_leaves=20,
)
