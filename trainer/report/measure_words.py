"""Find the tokens and n-grams that each expert sees more often than chance allows.

lift(w, e) = p(w | e) / p(w) = (c / N_e) / (n / N), where w occurs n times in N tokens, of which c chose expert e, as
N_e of all tokens did. If experts were given to tokens by chance, c would be hypergeometric, and by Hoeffding (1963)

    P(count >= c) <= exp(-n KL(c / n || N_e / N)).

A word is one if this bound times the number of words and experts tried is at most 1 %: in text whose experts are
shuffled, all layers together have any in 1 % of the cases at most.

# N tokens, W words that are frequent enough, E experts, k experts of a token.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.report.routed_text import Choices, TextRows, assignments

MIN_COUNT = 8
"""Fewest occurrences of a word."""
MIN_LIFT = 1.2
"""Of what is above chance, the least that is worth a line."""
_ERROR = 0.01
_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    """Frequent n-grams of one length: which of them ends at each token."""

    words: tuple[tuple[int, ...], ...]
    """(W,) token ids."""
    code: NDArray[np.int64]
    """(N,) index into `words`; W: none, or a rare one."""
    occurrences: NDArray[np.int64]
    """(W,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundWord:
    """A word of an expert; see `report_data.Word`."""

    tokens: tuple[int, ...]
    count: int
    occurrences: int
    lift: float
    lift_low: float


def vocabularies(text: TextRows, longest: int) -> list[Vocabulary]:
    """Return the frequent n-grams of lengths 1 to `longest`; none reaches over the end of a row or a document."""
    flat, place, S = text.tokens.ravel().astype(np.int64), text.place, text.tokens.shape[1]
    document = text.document.ravel()
    code, found = np.unique(flat, return_inverse=True)[1], []
    is_whole = np.ones(len(flat), dtype=bool)
    column = np.arange(len(flat)) % S
    for length in range(1, longest + 1):
        if length > 1:  # the shorter one that ends one token earlier, and this token
            is_whole = (column >= length - 1) & (document == np.roll(document, length - 1))
            code = np.unique(np.roll(code, 1) * (flat.max() + 1) + flat, return_inverse=True)[1]
        found.append(_vocabulary(flat, code, place, is_whole[place], length))
    return found


def _vocabulary(
    flat: NDArray[np.int64], code: NDArray[np.int64], place: NDArray[np.int64], is_whole: NDArray[np.bool_], length: int
) -> Vocabulary:
    here = code[place]
    counts = np.bincount(here[is_whole], minlength=int(code.max(initial=0)) + 1)
    frequent = np.flatnonzero(counts >= MIN_COUNT)
    number = np.full(len(counts), len(frequent))
    number[frequent] = np.arange(len(frequent))
    numbered = np.where(is_whole, number[here], len(frequent))
    first = np.zeros(len(frequent) + 1, dtype=np.int64)
    first[numbered[::-1]] = place[::-1]  # the last assignment wins: the first place
    words = [tuple(flat[end - length + 1 : end + 1].tolist()) for end in first[:-1]]
    return Vocabulary(words=tuple(words), code=numbered, occurrences=counts[frequent])


def words_of_experts(
    vocabulary: Vocabulary, choices: Choices, num_experts: int, *, tried: int, most: int
) -> list[list[FoundWord]]:
    """Return the words of each expert of a layer, by `lift_low`, at most `most`.

    `tried` is the number of words and experts, over all vocabularies and layers, for the bound on chance.
    """
    if not vocabulary.words:
        return [[] for _ in range(num_experts)]
    counts, share = _counts_and_share(vocabulary, choices, num_experts)
    n = vocabulary.occurrences[:, None].astype(float)
    rate = counts / n
    lift = rate / np.maximum(share, 1e-300)
    is_found = (n * _divergence(rate, share) > math.log(max(1, tried) / _ERROR)) & (lift >= MIN_LIFT)
    low = _wilson_low(rate, n) / np.maximum(share, 1e-300)
    return [_best(vocabulary, counts[:, e], lift[:, e], low[:, e], is_found[:, e], most) for e in range(num_experts)]


def lifts(vocabulary: Vocabulary, choices: Choices, num_experts: int) -> NDArray[np.float64]:
    """Return (W, E) the lift of every frequent word for each expert of a layer; 0 for a dead expert."""
    counts, share = _counts_and_share(vocabulary, choices, num_experts)
    return counts / vocabulary.occurrences[:, None] / np.where(share > 0, share, 1)


def _counts_and_share(
    vocabulary: Vocabulary, choices: Choices, num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return (W, E) the occurrences that chose each expert, and (1, E) the share of all tokens that did."""
    num_words = len(vocabulary.words)
    token, expert = assignments(choices)
    word = vocabulary.code[token]
    is_word = word < num_words
    cells = np.bincount(word[is_word] * num_experts + expert[is_word], minlength=num_words * num_experts)
    sizes = np.bincount(expert, minlength=num_experts)  # (E,)
    return cells.reshape(num_words, num_experts), (sizes / max(1, len(choices)))[None]


def _best(
    vocabulary: Vocabulary,
    counts: NDArray[np.int64],
    lift: NDArray[np.float64],
    low: NDArray[np.float64],
    is_found: NDArray[np.bool_],
    most: int,
) -> list[FoundWord]:
    found = np.flatnonzero(is_found)
    order = found[np.argsort(-low[found], kind="stable")][:most]
    return [
        FoundWord(
            tokens=vocabulary.words[w],
            count=int(counts[w]),
            occurrences=int(vocabulary.occurrences[w]),
            lift=float(lift[w]),
            lift_low=float(low[w]),
        )
        for w in order
    ]


def apart(words: Sequence[FoundWord], most: int) -> list[FoundWord]:
    """Return the first words of which none contains another."""
    chosen: list[FoundWord] = []
    for word in words:
        if len(chosen) < most and not any(_is_within(word, c) or _is_within(c, word) for c in chosen):
            chosen.append(word)
    return chosen


def _is_within(word: FoundWord, other: FoundWord) -> bool:
    return word.tokens in set(_parts(other.tokens, len(word.tokens)))


def _parts(tokens: tuple[int, ...], length: int) -> Iterator[tuple[int, ...]]:
    return (tokens[i : i + length] for i in range(len(tokens) - length + 1))


def _divergence(rate: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(rate || share) of two coins in nats, 0 where the rate is not above the share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        yes = np.where(rate > 0, rate * np.log(rate / share), 0)
        no = np.where(rate < 1, (1 - rate) * np.log((1 - rate) / (1 - share)), 0)
    return np.where(rate > share, yes + no, 0)


def _wilson_low(rate: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lower end of Wilson's interval of a share."""
    middle = rate + _Z**2 / (2 * n)
    return np.maximum(0, middle - _Z * np.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))) / (1 + _Z**2 / n)
