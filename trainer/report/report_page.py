"""Write the report of runs as one page that needs nothing else: no network, no script, no other file."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Final

from trainer.report.comparison_section import comparison_section, run_card
from trainer.report.markup import foreign, quoted, section
from trainer.report.page_script import PAGE_SCRIPT
from trainer.report.page_style import style_sheet
from trainer.report.report_data import ReportData
from trainer.report.routing_sections import (
    checkpoint_curves,
    coactivation_maps,
    domain_maps,
    drop_figures,
    flow_figures,
    load_map,
    similarity_maps,
)
from trainer.report.run_logs import read_run_logs
from trainer.report.run_sections import (
    alarm_section,
    damage_notes,
    expert_load_section,
    load_section,
    loss_section,
    step_time_section,
)
from trainer.report.word_sections import expert_words
from trainer.runs.compared_runs import other_text
from trainer.runs.recorded_run import RecordedRun

MOST_BYTES: Final = 2_000_000
"""Bytes of a page, which passages of text are left out to keep."""
_WORD_BYTES: Final = 800_000
_FIXED_BYTES: Final = 60_000  # style, script and what is around the sections
_TOO_LARGE: Final = "Too large for a page: the JSON and the logs have its numbers."
_SENTENCE_BYTES: Final = 2_000  # more than a section that was replaced has


def report_html(data: Sequence[ReportData], runs: Sequence[RecordedRun]) -> str:
    """Return the page of runs, with their numbers in `data` and their logs read from `runs`, in the same order."""
    logs = read_run_logs(runs)
    names = [log.name for log in logs]
    of_run = "What was trained, and on what text it was measured."
    before = [
        _beside(names, "card", "Run", of_run, [run_card(one) for one in data]),
        comparison_section(names, [one.card for one in data], other_text(runs)),
        alarm_section(logs),
        loss_section(logs),
        load_section(logs),
        step_time_section(logs),
        expert_load_section(logs, [one.card for one in data]),
        _beside(names, "layers", "Layers and experts", "On held-out text, without drops.", [load_map(d) for d in data]),
    ]
    after = _expert_sections(names, data)
    fitting = _fitting([*before, *after], MOST_BYTES - _FIXED_BYTES - _WORD_BYTES)
    sections = [*fitting[: len(before) + 1], _words(names, data), *fitting[len(before) + 1 :]]
    title = f"Turnout: {', '.join(names)}"
    notes = "".join(f'<p class="note">{foreign(note)}</p>' for note in damage_notes(logs))
    body = f"<h1>{foreign(title)}</h1>\n{_contents(sections)}\n{notes}{''.join(sections)}"
    return _document(title, body)


def _words(names: Sequence[str], data: Sequence[ReportData]) -> str:
    """Return the section of what experts are for, whose length is limited."""
    room = _WORD_BYTES // max(1, len(data))
    bodies = []
    for one in data:
        domains, num_tokens = (one.text.domains, one.text.tokens) if one.text else ((), 0)
        bodies.append(expert_words(one.layers, domains, num_tokens=num_tokens, most_bytes=room))
    note = (
        "Words, n-grams and kinds of token that choose the expert more often than chance explains, most certain first. "
        "A percent is the share of a word's occurrences that chose it, which by chance is its percent of all tokens; "
        "domains are times their mean. In passages the token that was routed is marked; \u2423 is a space."
    )
    return _beside(names, "words", "What each expert is for", note, bodies, is_wide=True)


def _expert_sections(names: Sequence[str], data: Sequence[ReportData]) -> list[str]:
    """Return the sections that are measured from checkpoints but the words, each with all runs; domains first."""
    of_domains = (
        "A row is a domain: percent of its assignments. Mutual information is 0 when all domains use the experts "
        "alike, and log2 of their number when each has its own."
    )
    of_pairs = "On the same token."
    of_flow = "Pairs of an assignment in a layer and one of the same token in the next."
    of_time = "Saturation is the share of the choices that are already those of the last checkpoint."
    of_likeness = "Cosines of their weights, and of their outputs on the same tokens: 100 would be a duplicate."
    of_drops = "At the capacity of training, in micro-batches of training's size."
    return [
        _beside(names, "domains", "Domains and experts", of_domains, [domain_maps(d) for d in data]),
        _beside(names, "together", "Experts chosen together", of_pairs, [coactivation_maps(d) for d in data]),
        _beside(names, "flow", "From layer to layer", of_flow, [flow_figures(d) for d in data]),
        _beside(names, "checkpoints", "Across checkpoints", of_time, [checkpoint_curves(d) for d in data]),
        _beside(names, "similar", "Similarity of experts", of_likeness, [similarity_maps(d) for d in data]),
        _beside(names, "drops", "Dropped assignments", of_drops, [drop_figures(d) for d in data]),
    ]


def _fitting(sections: Sequence[str], room: int) -> list[str]:
    """Return sections of which the longest are replaced by a sentence until all are as long as there is room for."""
    kept = list(sections)
    sizes = [len(one.encode()) for one in kept]
    while sum(sizes) > room and max(sizes) > _SENTENCE_BYTES:
        longest = sizes.index(max(sizes))
        head = kept[longest].split("<p", 1)[0]
        kept[longest] = (
            f'{head}<p class="note">Too large for a page: the JSON and the logs have its numbers.</p></section>\n'
        )
        sizes[longest] = len(kept[longest].encode())
    return kept


def _beside(
    names: Sequence[str], anchor: str, title: str, note: str, bodies: Sequence[str], *, is_wide: bool = False
) -> str:
    """Return a section with the same of all runs beside each other, or below each other if it is wide."""
    if not any(bodies):
        return ""
    if len(names) == 1:
        return section(anchor, title, note, bodies)
    none = '<p class="note">nothing to show</p>'
    cells = [f"<div><h3>{foreign(name)}</h3>{body or none}</div>" for name, body in zip(names, bodies, strict=True)]
    return section(anchor, title, note, cells if is_wide else [f'<div class="pair">{"".join(cells)}</div>'])


def _contents(sections: Sequence[str]) -> str:
    """Return links to the sections that are there."""
    links = []
    for one in filter(None, sections):
        anchor = one.split('id="', 1)[1].split('"', 1)[0]
        heading = one.split("<h2>", 1)[1].split("</h2>", 1)[0]
        links.append(f'<a href="#{anchor}">{heading}</a>')
    return f'<nav aria-label="sections">{" ".join(links)}</nav>'


def _document(title: str, body: str) -> str:
    """Return the whole file; its policy allows no request, and no script but ours."""
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f'<link rel="icon" href="data:,"/>\n<title>{quoted(title)}</title>\n<style>{style_sheet()}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{PAGE_SCRIPT}</script>\n</body>\n</html>\n"
    )
