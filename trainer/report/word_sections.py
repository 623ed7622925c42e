"""Write what each expert is for in words: tokens, n-grams, passages and typical rows of held-out text."""

from collections.abc import Iterator, Sequence
from typing import Final

from trainer.report.markup import details, figure_number, foreign, quoted, spelled_token
from trainer.report.report_data import Excerpt, ExpertFindings, LayerFindings, Word

_MOST_WORDS: Final = 16
_MOST_NGRAMS: Final = 10
_MOST_EXCERPTS: Final = 6
_MOST_ROWS: Final = 4
_MOST_CHARACTERS: Final = 240  # of a passage on each side, and of a row


def expert_words(layers: Sequence[LayerFindings], domains: Sequence[str], *, most_bytes: int) -> str:
    """Return a card for each expert, in order, until they are as long as there is room for."""
    written, left, body = 0, 0, []
    for layer in layers:
        cards = []
        for expert in layer.experts:
            card = _card(expert, domains)
            if written + len(card.encode()) <= most_bytes and not left:
                cards.append(card)
                written += len(card.encode())
            else:
                left += 1
        if cards:
            body.append(f'<h3>layer {layer.layer}</h3><div class="grid">{"".join(cards)}</div>\n')
    if left:
        body.append(f'<p class="note">{left} more experts are only in the JSON: the page would grow too large.</p>\n')
    return "".join(body)


def _card(expert: ExpertFindings, domains: Sequence[str]) -> str:
    head = f"expert {expert.expert}: {100 * expert.share:.1f} % of the assignments"
    parts = [f"<h3>{head}</h3>", *_domains(expert, domains)]
    if expert.tokens == 0:
        parts.append("<p>dead: no token chose it</p>")
    elif not expert.words and not expert.ngrams:
        parts.append('<p class="note">no token is above chance</p>')
    if expert.words:
        parts.append(f"<div>{''.join(map(_chip, expert.words[:_MOST_WORDS]))}</div>")
    if expert.ngrams:
        parts.append(
            f'<div><span class="note">n-grams</span> {"".join(map(_chip, expert.ngrams[:_MOST_NGRAMS]))}</div>'
        )
    if expert.excerpts:
        parts += [_excerpt(excerpt) for excerpt in expert.excerpts[:2]]
    if len(expert.excerpts) > 2 or expert.rows:
        more = [_excerpt(excerpt) for excerpt in expert.excerpts[2:_MOST_EXCERPTS]]
        more += _typical(expert)
        parts.append(details("more passages and typical rows", "".join(more)))
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


def _typical(expert: ExpertFindings) -> Iterator[str]:
    if expert.rows:
        yield '<p class="note">rows of which it sees most</p>'
    for row in expert.rows[:_MOST_ROWS]:
        place = f'<span class="note">{100 * row.share:.0f} % of {foreign(row.domain)} {row.row}: </span>'
        yield f'<div class="excerpt">{place}{foreign(row.text[:_MOST_CHARACTERS])}</div>'
