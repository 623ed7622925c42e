"""Tests for text of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.report.token_text import TokenText, escaped_text

TEXT = "a\u00e4\u4e2d\U0001f600b"
SHOWN = TokenText(ByteTokenizer())


@pytest.mark.parametrize("index", range(len(TEXT.encode())))
@pytest.mark.parametrize("most", [1, 2, 3, 4, 30])
def test_every_byte_is_shown_as_its_whole_character_among_whole_characters(index: int, most: int) -> None:
    encoded = TEXT.encode()
    passage = SHOWN.around(list(encoded), index, most_bytes=most)
    character = next(c for n, c in enumerate(TEXT) if len(TEXT[: n + 1].encode()) > index)
    place = TEXT.index(character)
    assert passage.token == character
    assert TEXT[:place].endswith(passage.before) and TEXT[place + 1 :].startswith(passage.after)
    if most == 30:
        assert passage.before + passage.token + passage.after == TEXT
    assert "\\x" not in passage.before + passage.after


@given(st.binary(max_size=40), st.integers(0, 39), st.integers(0, 9))
def test_any_bytes_become_text_that_can_be_seen(raw: bytes, index: int, most: int) -> None:
    index = min(index, max(0, len(raw) - 1))
    passage = SHOWN.around(list(raw), index, most_bytes=most)
    for part in (passage.before, passage.token, passage.after, SHOWN.of(raw), SHOWN.beginning(list(raw), most_bytes=7)):
        part.encode("utf-8")
        assert all(c.isprintable() or c.isspace() for c in part) and "\n" not in part


def test_control_characters_and_ends_of_documents_have_names() -> None:
    assert escaped_text(b"\n\x1b[31m\xff\xe4 \xe2\x80\xae") == "\\n\\x1b[31m\\xff\\xe4 \\u202e"
    assert SHOWN.of([65, 0xFF, 66]) == "A<|endoftext|>B"
