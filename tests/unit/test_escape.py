"""Text with NUL, for databases that cannot hold it."""

from hypothesis import given
from hypothesis import strategies as st

from kamado.storage.escape import SEPARATOR, escape, join, unescape

texts = st.text("\0\x01\x02\x03ab\uffff", max_size=6)


@given(texts)
def test_what_is_stored_has_no_nul_and_is_read_as_it_was(text: str) -> None:
    assert "\0" not in escape(text)
    assert unescape(escape(text)) == text


@given(texts, texts)
def test_the_order_of_texts_and_their_prefixes_stay(one: str, other: str) -> None:
    assert (escape(one) < escape(other)) == (one < other)
    assert escape(one + other).startswith(escape(one))


@given(st.lists(texts.filter(bool), max_size=4))
def test_texts_that_were_joined_can_be_split(some: list[str]) -> None:
    joined = join(some)
    assert [unescape(part) for part in joined.split(SEPARATOR)] == (some or [""])
