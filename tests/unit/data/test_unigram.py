from math import log2

import pytest

from trainer.data import unigram
from trainer.data.unigram import unigram_bits_per_byte


def test_bits_are_those_of_the_smoothed_training_counts(make_corpus):
    bits = unigram_bits_per_byte(make_corpus(a="aab" + "abc"), 0)
    assert bits == pytest.approx(-(log2(3 / 259) + log2(2 / 259) + log2(1 / 259)) / 3)


def test_bytes_and_not_characters_are_the_unit(make_corpus):
    corpus = make_corpus(a="äöü" + "ä")
    expected = -(log2(3 / 260) + log2(1 / 260) + log2(3 / 260) + log2(2 / 260)) / 4  # c3 bc c3 a4
    assert corpus.validation[0].num_bytes == 4
    assert unigram_bits_per_byte(corpus, 0) == pytest.approx(expected)


def test_long_texts_are_counted_in_parts(make_corpus, monkeypatch):
    corpus = make_corpus(a="abcdefghij" * 10)
    whole = unigram_bits_per_byte(corpus, 0)
    monkeypatch.setattr(unigram, "_CHUNK_TOKENS", 7)
    assert unigram_bits_per_byte(corpus, 0) == whole
