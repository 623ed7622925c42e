"""Bytes to text, a piece at a time."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.console.utf8_stream import Utf8Streamer


def test_a_character_appears_with_its_last_byte_and_not_before():
    streamer = Utf8Streamer()
    assert [streamer.feed(bytes([b])) for b in "a\u20acb".encode()] == ["a", "", "", "\u20ac", "b"]
    assert streamer.flush() == ""


def test_an_invalid_byte_is_replaced_at_once():
    streamer = Utf8Streamer()
    assert streamer.feed(b"a\xffb") == "a\ufffdb"


def test_a_broken_character_gives_way_to_the_next_one():
    streamer = Utf8Streamer()
    assert streamer.feed(b"\xe2\x82") == ""
    assert streamer.feed(b"A") == "\ufffdA"


def test_flush_replaces_what_is_unfinished_and_starts_afresh():
    streamer = Utf8Streamer()
    streamer.feed(b"\xf0\x9f")
    assert streamer.flush() == "\ufffd"
    assert streamer.feed("\u00e9".encode()) == "\u00e9"


@given(st.lists(st.binary(max_size=6)))
def test_pieces_join_to_what_decoding_all_at_once_gives(pieces: list[bytes]):
    streamer = Utf8Streamer()
    text = "".join([streamer.feed(piece) for piece in pieces]) + streamer.flush()
    assert text == b"".join(pieces).decode("utf-8", "replace")


@given(st.text(), st.integers(1, 4))
def test_valid_text_survives_any_cutting(text: str, length: int):
    data = text.encode("utf-8", "ignore")
    streamer = Utf8Streamer()
    pieces = [streamer.feed(data[i : i + length]) for i in range(0, len(data), length)]
    assert "".join(pieces) == data.decode()
    assert streamer.flush() == ""
