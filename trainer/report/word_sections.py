"""Write what each expert is for in words: tokens, n-grams, passages and typical rows of held-out text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from trainer.report.markup import details, figure_number, foreign, quoted, spelled_token
from trainer.report.report_data import Excerpt, ExpertFindings, LayerFindings, Word

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


def expert_words(layers: Sequence[LayerFindings], domains: Sequence[str], *, most_bytes: int) -> str:
    """Return a card for each expert, with as much detail as there is room for; of too many the first of each layer."""
    if not layers:
        return ""
    detail, cards = _DETAILS[0], _cards(layers, domains, _DETAILS[0])
    for leaner in _DETAILS[1:]:
        if _size(cards) > most_bytes:
            detail, cards = leaner, _cards(layers, domains, leaner)
    room = most_bytes // len(layers)
    shown = cards if _size(cards) <= most_bytes else [_first(row, room) for row in cards]
    body = []
    if detail is not _DETAILS[0]:
        body.append('<p class="note">Shortened to keep the page small: the JSON has more words and passages.</p>\n')
    for layer, row, whole in zip(layers, shown, cards, strict=True):
        left = len(whole) - len(row)
        more = f'<p class="note">{left} more experts are only in the JSON.</p>' if left else ""
        body.append(f'<h3>layer {layer.layer}</h3><div class="grid">{"".join(row)}</div>{more}\n')
    return "".join(body)


def _cards(layers: Sequence[LayerFindings], domains: Sequence[str], detail: _Detail) -> list[list[str]]:
    return [[_card(expert, domains, detail) for expert in layer.experts] for layer in layers]


def _size(cards: Sequence[Sequence[str]]) -> int:
    return sum(len(card.encode()) for row in cards for card in row)


def _first(cards: Sequence[str], most_bytes: int) -> list[str]:
    """Return the first cards that fit."""
    sizes = accumulate(len(card.encode()) for card in cards)
    return [card for card, size in zip(cards, sizes, strict=True) if size <= most_bytes]


def _card(expert: ExpertFindings, domains: Sequence[str], detail: _Detail) -> str:
    head = f"expert {expert.expert}: {100 * expert.share:.1f} % of the assignments"
    parts = [f"<h3>{head}</h3>", *_domains(expert, domains)]
    if expert.tokens == 0:
        parts.append("<p>dead: no token chose it</p>")
    elif not expert.words and not expert.ngrams:
        parts.append('<p class="note">no token is above chance</p>')
    if expert.words:
        parts.append(f"<div>{''.join(map(_chip, expert.words[: detail.words]))}</div>")
    if expert.ngrams:
        chips = "".join(map(_chip, expert.ngrams[: detail.ngrams]))
        parts.append(f'<div><span class="note">n-grams</span> {chips}</div>')
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


def _chip(word: Word) -> str:
    tip = f"{word.count} of {word.occurrences} occurrences; lift {word.lift:.3g}, at least {word.lift_low:.3g}"
    shown = f"<bdi>{quoted(spelled_token(word.text))}</bdi>"
    return f'<span class="chip" title="{tip}">{shown} <small>{figure_number(round(word.lift, 1))}x</small></span>'


def _excerpt(excerpt: Excerpt) -> str:
    before, after = excerpt.before[-_MOST_CHARACTERS:], excerpt.after[:_MOST_CHARACTERS]
    token = f"<mark><bdi>{quoted(spelled_token(excerpt.token))}</bdi></mark>"
    place = f'<span class="note">{foreign(excerpt.domain)} {excerpt.row}: </span>'
    return f'<div class="excerpt">{place}{foreign(before)}{token}{foreign(after)}</div>'


def _typical(expert: ExpertFindings, most: int) -> Iterator[str]:
    if expert.rows:
        yield '<p class="note">rows of which it sees most</p>'
    for row in expert.rows[:most]:
        place = f'<span class="note">{100 * row.share:.0f} % of {foreign(row.domain)} {row.row}: </span>'
        yield f'<div class="excerpt">{place}{foreign(row.text[:_MOST_CHARACTERS])}</div>'
