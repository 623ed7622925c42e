import numpy as np
import pytest

from trainer.data.tokenizers.byte import ByteTokenizer


def test_tokens_are_utf8_bytes():
    assert ByteTokenizer().encode("aö").tolist() == [0x61, 0xC3, 0xB6]


def test_tokens_take_one_byte_each():
    assert ByteTokenizer().encode("a").dtype == np.uint8


def test_an_empty_text_has_no_tokens():
    assert ByteTokenizer().encode("").tolist() == []


def test_decoding_gives_the_bytes_back_without_ends_of_documents():
    assert ByteTokenizer().decode([0x61, 0xFF, 0xC3]) == b"a\xc3"


def test_arrays_are_decoded_too():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("schön")).decode() == "schön"


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="range"):
        ByteTokenizer().decode([256])


def test_every_token_but_special_ones_is_one_byte():
    num_bytes = ByteTokenizer().token_bytes()
    assert num_bytes.tolist() == [1] * 0xF8 + [0] * 8


def test_special_tokens_are_bytes_that_utf8_never_uses():
    special = ByteTokenizer().special_tokens()
    assert sorted(special.values()) == list(range(0xF8, 0x100))
    every_byte = {byte for character in map(chr, range(0x110000)) for byte in character.encode(errors="ignore")}
    assert not every_byte & set(special.values())
    assert ByteTokenizer().decode([0x61, *special.values(), 0x62]) == b"ab"
