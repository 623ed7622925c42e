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


def test_every_token_but_the_end_of_document_is_one_byte():
    num_bytes = ByteTokenizer().token_bytes()
    assert num_bytes.sum() == 255
    assert num_bytes[0xFF] == 0
