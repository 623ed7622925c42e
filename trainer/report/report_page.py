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
from trainer.report.run_sections import alarm_section, damage_notes, load_section, loss_section, step_time_section
from trainer.report.word_sections import expert_words
from trainer.runs.recorded_run import RecordedRun

MOST_BYTES: Final = 2_000_000
"""Bytes of a page, which passages of text are left out to keep."""
_WORD_BYTES: Final = 900_000


def report_html(data: Sequence[ReportData], runs: Sequence[RecordedRun]) -> str:
    """Return the page of runs, with their numbers in `data` and their logs read from `runs`, in the same order."""
    logs = read_run_logs(runs)
    names = [log.name for log in logs]
    sections = [
        _beside(
            names, "card", "Run", "What was trained, and on what text it was measured.", [run_card(d) for d in data]
        ),
        comparison_section(names, [one.card for one in data]),
        alarm_section(logs),
        loss_section(logs),
        load_section(logs),
        step_time_section(logs),
        *_expert_sections(names, data),
    ]
    title = f"Turnout: {', '.join(names)}"
    notes = "".join(f'<p class="note">{foreign(note)}</p>' for note in damage_notes(logs))
    body = f"<h1>{foreign(title)}</h1>\n{_contents(sections)}\n{notes}{''.join(sections)}"
    return _document(title, body)


def _expert_sections(names: Sequence[str], data: Sequence[ReportData]) -> list[str]:
    """Return the sections that are measured from checkpoints, each with all runs."""
    room = _WORD_BYTES // max(1, len(data))
    words = [expert_words(d.layers, d.text.domains if d.text else (), most_bytes=room) for d in data]
    of_words = (
        "Tokens and n-grams that the expert sees more often than chance gives it, times chance, most certain first; "
        "then passages around them, with the routed token marked. \u2423 is a space."
    )
    return [
        _beside(names, "layers", "Layers and experts", "On held-out text, without drops.", [load_map(d) for d in data]),
        _beside(
            names,
            "domains",
            "Domains and experts",
            "A row is a domain: percent of its assignments. Mutual information is 0 when all domains use the experts "
            "alike, and log2 of their number when each has its own.",
            [domain_maps(d) for d in data],
        ),
        _beside(names, "words", "What each expert is for", of_words, words),
        _beside(
            names, "together", "Experts chosen together", "On the same token.", [coactivation_maps(d) for d in data]
        ),
        _beside(
            names,
            "flow",
            "From layer to layer",
            "Pairs of an assignment in a layer and one of the same token in the next.",
            [flow_figures(d) for d in data],
        ),
        _beside(
            names,
            "checkpoints",
            "Across checkpoints",
            "Saturation is the share of the choices that are already those of the last checkpoint.",
            [checkpoint_curves(d) for d in data],
        ),
        _beside(
            names,
            "similar",
            "Similarity of experts",
            "Cosines of their weights, and of their outputs on the same tokens: 100 would be a duplicate.",
            [similarity_maps(d) for d in data],
        ),
        _beside(
            names,
            "drops",
            "Dropped assignments",
            "At the capacity of training, in micro-batches of training's size.",
            [drop_figures(d) for d in data],
        ),
    ]


def _beside(names: Sequence[str], anchor: str, title: str, note: str, bodies: Sequence[str]) -> str:
    """Return a section with the same of all runs beside each other."""
    if not any(bodies):
        return ""
    if len(names) == 1:
        return section(anchor, title, note, bodies)
    none = '<p class="note">nothing to show</p>'
    cells = [f"<div><h3>{foreign(name)}</h3>{body or none}</div>" for name, body in zip(names, bodies, strict=True)]
    return section(anchor, title, note, [f'<div class="pair">{"".join(cells)}</div>'])


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
