"""Write what each expert is for in words: tokens, n-grams, passages and typical rows of held-out text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from trainer.report.markup import PageTable, chip, details, foreign, quoted, spelled_token, table
from trainer.report.report_data import Excerpt, ExpertFindings, LayerFindings, Word

_MOST_LINES: Final = 64
_MOST_WORDS, _MOST_NGRAMS = 6, 4  # of a line
_CLEARLY: Final = 1.25  # times the mean
_CUT, _LONGEST_WORD = 50, 20  # characters of a passage that is probably cut; of a word that is left out there
_MOST_CHARACTERS: Final = 240  # of a passage on each side, and of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class _Detail:
    """Most that is said about an expert."""

    words: int
    ngrams: int
    passages: int
    folded: int
    """More passages and typical rows, shown when asked for."""


_DETAILS: Final = (
    _Detail(words=16, ngrams=10, passages=2, folded=4),
    _Detail(words=12, ngrams=6, passages=2, folded=0),
    _Detail(words=8, ngrams=4, passages=1, folded=0),
    _Detail(words=5, ngrams=2, passages=0, folded=0),
)
"""From the richest to the leanest."""


def expert_words(layers: Sequence[LayerFindings], domains: Sequence[str], *, num_tokens: int, most_bytes: int) -> str:
    """Return a line and a card for each expert, with as much detail as there is room for.

    Of too many experts the most specialised have a line, and the first of each layer a card.
    """
    if not layers:
        return ""
    detail, cards = _DETAILS[0], _cards(layers, domains, num_tokens, _DETAILS[0])
    for leaner in _DETAILS[1:]:
        if _size(cards) > most_bytes:
            detail, cards = leaner, _cards(layers, domains, num_tokens, leaner)
    room = most_bytes // len(layers)
    shown = cards if _size(cards) <= most_bytes else [_first(row, room) for row in cards]
    body = [_digest(layers, domains, num_tokens)]
    if detail is not _DETAILS[0]:
        body.append('<p class="note">Shortened to keep the page small: the JSON has more words and passages.</p>\n')
    for layer, row, whole in zip(layers, shown, cards, strict=True):
        left = len(whole) - len(row)
        more = f'<p class="note">{left} more experts are only in the JSON.</p>' if left else ""
        title = f"layer {layer.layer}: words, kinds of token and passages of its experts"
        body.append(details(title, f'<div class="grid">{"".join(row)}</div>{more}'))
    return "".join(body)


def _digest(layers: Sequence[LayerFindings], domains: Sequence[str], num_tokens: int) -> str:
    """Return a table with a line for each expert, for the most specialised ones where there are many."""
    experts = [(layer.layer, expert) for layer in layers for expert in layer.experts]
    if is_part := len(experts) > _MOST_LINES:
        chosen = sorted(experts, key=lambda one: -_specialisation(one[1]))[:_MOST_LINES]
        experts = [one for one in experts if one in chosen]
    rows = [
        [
            layer,
            expert.expert,
            float(f"{100 * expert.tokens / max(1, num_tokens):.2g}"),
            tuple(word.text for word in (*expert.words[:_MOST_WORDS], *expert.ngrams[:_MOST_NGRAMS])),
            ", ".join(f"{name} {lift:.2f}x" for name, lift in _preferred(expert, domains)),
            ", ".join(
                f"{kind.text} {100 * kind.count / max(1, kind.occurrences):.0f}\u00a0%" for kind in expert.kinds[:3]
            ),
            round(100 * expert.explained),
        ]
        for layer, expert in experts
    ]
    heads = ["layer", "expert", "% of tokens", "words and n-grams", "domains", "kinds of token", "% its words"]
    caption = f"the {len(experts)} most specialised experts" if is_part else "in a line each"
    return table(PageTable(heads=heads, rows=rows, caption=caption))


def _specialisation(expert: ExpertFindings) -> float:
    return max(expert.domain_lift, default=1.0) + expert.explained if expert.tokens else 0.0


def _preferred(expert: ExpertFindings, domains: Sequence[str]) -> list[tuple[str, float]]:
    """Return the domains that the expert sees clearly more often than their mean, most often first."""
    found = [(name, lift) for name, lift in zip(domains, expert.domain_lift, strict=True) if lift >= _CLEARLY]
    return sorted(found, key=lambda one: -one[1]) if len(domains) > 1 else []


def _cards(
    layers: Sequence[LayerFindings], domains: Sequence[str], num_tokens: int, detail: _Detail
) -> list[list[str]]:
    return [[_card(expert, domains, num_tokens, detail) for expert in layer.experts] for layer in layers]


def _size(cards: Sequence[Sequence[str]]) -> int:
    return sum(len(card.encode()) for row in cards for card in row)


def _first(cards: Sequence[str], most_bytes: int) -> list[str]:
    """Return the first cards that fit."""
    sizes = accumulate(len(card.encode()) for card in cards)
    return [card for card, size in zip(cards, sizes, strict=True) if size <= most_bytes]


def _card(expert: ExpertFindings, domains: Sequence[str], num_tokens: int, detail: _Detail) -> str:
    share = f'<span class="note">{100 * expert.tokens / max(1, num_tokens):.1f} % of all tokens</span>'
    parts = [f"<h3>expert {expert.expert} {share}</h3>", *_domains(expert, domains)]
    if expert.tokens == 0:
        parts.append("<p>dead: no token chose it</p>")
    elif not expert.words and not expert.ngrams and not expert.kinds:
        parts.append('<p class="note">no token is above chance</p>')
    parts += _chips("kinds", expert.kinds)
    parts += _chips("words", expert.words[: detail.words])
    parts += _chips("n-grams", expert.ngrams[: detail.ngrams])
    if expert.words:
        parts.append(f'<p class="note">{100 * expert.explained:.0f} % of its tokens are its words</p>')
    parts += [_excerpt(excerpt) for excerpt in expert.excerpts[: detail.passages]]
    if detail.folded and (len(expert.excerpts) > detail.passages or expert.rows):
        more = [_excerpt(excerpt) for excerpt in expert.excerpts[detail.passages :][: detail.folded]]
        parts.append(details("more passages and typical rows", "".join([*more, *_typical(expert, detail.folded)])))
    return f'<div class="card">{"".join(parts)}</div>\n'


def _domains(expert: ExpertFindings, domains: Sequence[str]) -> Iterator[str]:
    """Yield the domains that the expert sees more than half as often again as the others."""
    if expert.tokens and len(domains) > 1:
        lifts = sorted(zip(expert.domain_lift, domains, strict=True), key=lambda one: -one[0])
        shown = ", ".join(f"{foreign(name)} {lift:.2f}x" for lift, name in lifts[:4])
        yield f'<p class="note">{shown}</p>'


def _chips(name: str, words: Sequence[Word]) -> Iterator[str]:
    """Yield words with the percent of their occurrences that chose the expert."""
    if words:
        chips = "".join(
            chip(
                word.text,
                f"{100 * word.count / max(1, word.occurrences):.0f} %",
                tip=f"{word.count} of {word.occurrences}; lift {word.lift:.3g}, at least {word.lift_low:.3g}",
            )
            for word in words
        )
        yield f'<div><span class="note">{name}</span> {chips}</div>'


def _excerpt(excerpt: Excerpt) -> str:
    token = f"<mark><bdi>{quoted(spelled_token(excerpt.token))}</bdi></mark>"
    place = f'<span class="note">{foreign(excerpt.domain)} {excerpt.row}: </span>'
    before, after = foreign(_last(excerpt.before)), foreign(_first_words(excerpt.after))
    return f'<div class="excerpt">{place}{before}{token}{after}</div>'


def _last(text: str) -> str:
    """Return the end of a passage, from the beginning of a word where it was cut."""
    text = text[-_MOST_CHARACTERS:]
    return f"\u2026{text[text.find(' ') :]}" if len(text) >= _CUT and 0 <= text.find(" ") < _LONGEST_WORD else text


def _first_words(text: str) -> str:
    """Return the beginning of a passage, to the end of a word where it was cut."""
    text = text[:_MOST_CHARACTERS]
    is_cut = len(text) >= _CUT and len(text) - text.rfind(" ") < _LONGEST_WORD
    return f"{text[: text.rfind(' ')]} \u2026" if is_cut else text


def _typical(expert: ExpertFindings, most: int) -> Iterator[str]:
    if expert.rows:
        yield '<p class="note">rows of which it sees most</p>'
    for row in expert.rows[:most]:
        place = f'<span class="note">{100 * row.share:.0f} % of {foreign(row.domain)} {row.row}: </span>'
        yield f'<div class="excerpt">{place}{foreign(_first_words(row.text))}</div>'
