"""Say what each expert of a layer is for: words, passages of text around them, and typical rows.

# N tokens, R rows, E experts, G domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.report.measure_words import FoundWord, Vocabulary, apart, lifts, vocabularies, words_of_experts
from trainer.report.report_data import Excerpt, ExpertFindings, TypicalRow, Word
from trainer.report.routed_text import Choices, TextRows, assignments
from trainer.report.token_kinds import KINDS, token_kinds
from trainer.report.token_text import TokenText

_MOST_WORDS, _MOST_NGRAMS, _MOST_EXCERPTS, _MOST_ROWS = 12, 8, 4, 2
_NGRAM_GAIN = 1.05  # over the lift of its last token alone, which is the one that is routed
_FEWEST_TOKENS = 16  # of a typical row
_EXCERPT_BYTES, _ROW_BYTES = 60, 200
_SMALL_VOCABULARY = 512  # tokens are bytes or characters, so that longer n-grams are the words


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DescribedText:
    """Held-out text with its words, made once for all layers and experts."""

    text: TextRows
    shown: TokenText
    words: Sequence[Vocabulary]
    """N-grams by length, from 1 on."""
    kinds: Vocabulary
    """Kinds of token, by their numbers in `token_kinds.KINDS`."""
    num_layers: int

    @classmethod
    def of(cls, text: TextRows, shown: TokenText, *, vocab_size: int, num_layers: int) -> "DescribedText":
        """Find the words of a text."""
        longest = 6 if vocab_size <= _SMALL_VOCABULARY else 3
        kinds = token_kinds(text, shown)
        return cls(text=text, shown=shown, words=vocabularies(text, longest), kinds=kinds, num_layers=num_layers)


def describe_experts(
    described: DescribedText, choices: Choices, counts: NDArray[np.int64]
) -> tuple[ExpertFindings, ...]:
    """Return the findings on each expert of a layer, given its assignments by domain (G, E)."""
    num_experts = counts.shape[1]
    tried = sum(len(v.words) for v in (*described.words, described.kinds)) * num_experts * described.num_layers
    by_length = [
        words_of_experts(v, choices, num_experts, tried=tried, most=64 if index else len(v.words))
        for index, v in enumerate(described.words)
    ]
    kinds = words_of_experts(described.kinds, choices, num_experts, tried=tried, most=len(KINDS))
    by_token = lifts(described.words[0], choices, num_experts)  # (W, E)
    number = {word[0]: index for index, word in enumerate(described.words[0].words)}
    load, by_domain = counts.sum(0), _domain_lift(counts)
    shares = _row_shares(described.text, choices, num_experts)
    found = []
    for expert in range(num_experts):
        single = by_length[0][expert][:_MOST_WORDS]
        longer = [
            word
            for words in by_length[1:]
            for word in words[expert]
            if word.lift >= _NGRAM_GAIN * by_token[number[word.tokens[-1]], expert]
        ]
        longer.sort(key=lambda word: (-word.lift_low, -len(word.tokens)))
        ngrams = apart(longer, _MOST_NGRAMS)
        places = described.text.place[(choices == expert).any(1)]
        found.append(
            ExpertFindings(
                expert=expert,
                tokens=int(load[expert]),
                share=float(load[expert] / max(1, load.sum())),
                domain_lift=tuple(by_domain[:, expert].tolist()),
                kinds=tuple(
                    _word(kind, KINDS[kind.tokens[0]], ())
                    for kind in sorted(kinds[expert], key=lambda kind: -kind.count)
                ),
                explained=sum(word.count for word in by_length[0][expert]) / max(1, int(load[expert])),
                words=tuple(_word(word, described.shown.of(word.tokens), word.tokens) for word in single),
                ngrams=tuple(_word(word, described.shown.of(word.tokens), word.tokens) for word in ngrams),
                excerpts=_excerpts(described, places, ngrams[:_MOST_EXCERPTS] or single[:_MOST_EXCERPTS]),
                rows=_typical_rows(described, shares[:, expert], float(load[expert] / max(1, len(choices)))),
            )
        )
    return tuple(found)


def _word(word: FoundWord, text: str, tokens: tuple[int, ...]) -> Word:
    return Word(
        text=text,
        tokens=tokens,
        count=word.count,
        occurrences=word.occurrences,
        lift=word.lift,
        lift_low=word.lift_low,
    )


def _domain_lift(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (G, E) p(expert | domain) over its mean over the domains that have assignments."""
    total = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(1, total)
    mean = shares[total[:, 0] > 0].mean(0) if total.any() else shares.sum(0)
    return shares / np.where(mean > 0, mean, 1)


def _excerpts(described: DescribedText, places: NDArray[np.int64], words: Sequence[FoundWord]) -> tuple[Excerpt, ...]:
    """Return passages around tokens at `places`: at the ends of an expert's words, else evenly spaced ones."""
    if not len(places):
        return ()
    flat = described.text.tokens.ravel()
    chosen: list[int] = []
    for word in words:
        is_here = np.ones(len(places), dtype=bool)
        for back, token in enumerate(reversed(word.tokens)):
            is_here &= (places >= back) & (flat[np.maximum(0, places - back)] == token)
        ends = [int(place) for place in places[is_here] if int(place) not in chosen]
        chosen += ends[len(ends) // 2 :][:1]
    if not words:
        chosen = places[np.arange(_MOST_EXCERPTS) * len(places) // _MOST_EXCERPTS].tolist()
    return tuple(_excerpt(described, place) for place in dict.fromkeys(chosen))


def _excerpt(described: DescribedText, place: int) -> Excerpt:
    row, column = divmod(place, described.text.tokens.shape[1])
    document = described.text.document[row]
    inside = np.flatnonzero(document == document[column])  # a row may have several, and padding
    tokens = described.text.tokens[row, inside].tolist()
    passage = described.shown.around(tokens, int(np.searchsorted(inside, column)), most_bytes=_EXCERPT_BYTES)
    domain, number = described.text.domains[described.text.domain[row]], int(described.text.number[row])
    return Excerpt(domain=domain, row=number, before=passage.before, token=passage.token, after=passage.after)


def _row_shares(text: TextRows, choices: Choices, num_experts: int) -> NDArray[np.float64]:
    """Return (R, E) the share of a row's tokens that chose each expert; -1 for rows with few tokens."""
    row_of = text.place // text.tokens.shape[1]
    token, expert = assignments(choices)
    shape = (len(text.tokens), num_experts)
    counts = np.bincount(row_of[token] * num_experts + expert, minlength=shape[0] * shape[1]).reshape(shape)
    tokens = np.bincount(row_of, minlength=shape[0])[:, None]
    return np.where(tokens >= min(_FEWEST_TOKENS, text.tokens.shape[1]), counts / np.maximum(1, tokens), -1.0)


def _typical_rows(described: DescribedText, shares: NDArray[np.float64], share_of_all: float) -> tuple[TypicalRow, ...]:
    """Return the rows with the highest shares of an expert, if they are above its share of all tokens."""
    text, best = described.text, np.argsort(-shares, kind="stable")[:_MOST_ROWS]
    return tuple(
        TypicalRow(
            domain=text.domains[text.domain[row]],
            row=int(text.number[row]),
            share=float(shares[row]),
            text=described.shown.beginning(text.tokens[row][text.document[row] >= 0].tolist(), most_bytes=_ROW_BYTES),
        )
        for row in best
        if shares[row] > share_of_all
    )
