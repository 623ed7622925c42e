"""Tests for the words of experts, where the truth is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.report.measure_words import FoundWord, Vocabulary, apart, vocabularies, words_of_experts
from trainer.report.routed_text import Choices, TextRows

E, PER_EXPERT, ROWS, S = 4, 12, 64, 64


def made_up_text(seed: int = 0) -> TextRows:
    """Return rows whose tokens are drawn from 4 disjoint vocabularies, each in phrases of its own."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, E, (ROWS, S // 4)).repeat(4, axis=1)
    tokens = topic * PER_EXPERT + rng.integers(0, PER_EXPERT, (ROWS, S))
    return TextRows(
        tokens=tokens.astype(np.int32),
        document=np.zeros((ROWS, S), dtype=np.int64),
        counted=np.ones((ROWS, S), dtype=bool),
        domain=np.zeros(ROWS, dtype=np.int64),
        number=np.arange(ROWS),
        domains=("all",),
    )


def oracle(text: TextRows) -> Choices:
    """Return the expert of each token's vocabulary."""
    return (text.tokens.reshape(-1, 1) // PER_EXPERT).astype(np.int16)


def found(text: TextRows, choices: Choices, longest: int = 3) -> list[list[list[FoundWord]]]:
    """Return all words of all experts, by length."""
    known = vocabularies(text, longest)
    tried = sum(len(v.words) for v in known) * E
    return [words_of_experts(v, choices, E, tried=tried, most=1000) for v in known]


def test_an_oracle_router_gives_each_expert_exactly_its_own_vocabulary() -> None:
    text = made_up_text()
    single, pairs, _ = found(text, oracle(text))
    for expert in range(E):
        assert {w.tokens[0] for w in single[expert]} == set(range(expert * PER_EXPERT, (expert + 1) * PER_EXPERT))
        share = np.mean(oracle(text) == expert)
        assert all(w.count == w.occurrences and w.lift == pytest.approx(1 / share, abs=1e-12) for w in single[expert])
        assert all(w.lift_low < w.lift for w in single[expert])
        assert pairs[expert] and all(w.tokens[1] // PER_EXPERT == expert for w in pairs[expert])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2])
def test_shuffled_experts_have_no_words(seed: int, k: int) -> None:
    text, rng = made_up_text(), np.random.default_rng(seed)
    chosen = np.concatenate([oracle(text), (oracle(text) + 1) % E], axis=1)[:, :k]
    assert not any(words for length in found(text, rng.permutation(chosen)) for words in length)


def test_counts_are_those_of_a_loop_and_no_n_gram_leaves_its_document() -> None:
    text = made_up_text()
    document = (np.arange(S) // 10)[None].repeat(ROWS, axis=0)
    counted = np.random.default_rng(1).random((ROWS, S)) < 0.8
    text = TextRows(
        tokens=text.tokens % 5,
        document=document,
        counted=counted,
        domain=text.domain,
        number=text.number,
        domains=("all",),
    )
    for length, vocabulary in enumerate(vocabularies(text, 3), start=1):
        assert dict(zip(vocabulary.words, vocabulary.occurrences, strict=True)) == {
            word: n for word, n in _by_loop(text, length).items() if n >= 8
        }
        _check_codes(text, vocabulary, length)


def _by_loop(text: TextRows, length: int) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for row, column in np.argwhere(text.counted):
        start = column - length + 1
        if start >= 0 and text.document[row, start] == text.document[row, column]:
            word = tuple(text.tokens[row, start : column + 1].tolist())
            counts[word] = counts.get(word, 0) + 1
    return counts


def _check_codes(text: TextRows, vocabulary: Vocabulary, length: int) -> None:
    flat: NDArray[np.int32] = text.tokens.ravel()
    for place, code in zip(text.place, vocabulary.code, strict=True):
        if code < len(vocabulary.words):
            assert tuple(flat[place - length + 1 : place + 1].tolist()) == vocabulary.words[code]


def test_of_words_within_each_other_the_first_stays() -> None:
    words = [
        FoundWord(tokens=t, count=9, occurrences=9, lift=2, lift_low=1.5) for t in [(1, 2), (1, 2, 3), (2, 3), (2,)]
    ]
    assert [w.tokens for w in apart(words, 8)] == [(1, 2), (2, 3)]
