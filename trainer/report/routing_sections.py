"""Write the sections of a report about what experts do on held-out text, for one run.

# L MoE layers, E experts, G domains.
"""

import math
from collections.abc import Sequence
from typing import Final

from trainer.report.curve_chart import Curve, curve_chart
from trainer.report.flow_chart import MOST_BANDED, flow_chart, strongest_flows
from trainer.report.heat_chart import EVEN_SHARE, SIGNED, HeatMap, HeatScale, heat_chart
from trainer.report.markup import PageTable, figure, figure_number, grid, maps, quoted, table
from trainer.report.report_data import LayerFindings, Matrix, ReportData

_MOST_FLOWS: Final = 12
_ALIEN: Final = 0.05
"""Cosine below which weights have nothing in common."""
MOST_SIMILAR: Final = 32
"""Experts of a layer whose pairs are drawn as a matrix; of more, the JSON has it."""


def load_map(data: ReportData) -> str:
    """Return the load of every expert of every layer on held-out text."""
    if not data.layers:
        return ""
    most = max(len(layer.load) for layer in data.layers)
    heat = HeatMap(
        title="layer x expert",
        rows=[f"layer {layer.layer}" for layer in data.layers],
        columns=[str(expert) for expert in range(most)],
        values=[[*layer.load, *[None] * (most - len(layer.load))] for layer in data.layers],
        scale="even_share",
        corner="expert",
    )
    heads = ["layer", "load imbalance", f"router entropy (at most {math.log(most):.3g})", "dead experts", "duplicates"]
    rows = [
        [
            layer.layer,
            layer.load_imbalance,
            layer.router_entropy,
            ", ".join(map(str, layer.dead)) or "none",
            "; ".join(_duplicate(layer)) or "none",
        ]
        for layer in data.layers
    ]
    legend = f'<p class="note">Percent of the assignments of a layer; {EVEN_SHARE}. Entropy is in nats per token.</p>'
    return legend + maps([heat_chart(heat), figure("of each layer", table(PageTable(heads=heads, rows=rows)))])


def domain_maps(data: ReportData) -> str:
    """Return which experts serve which domains, with their mutual information."""
    if data.text is None:
        return ""
    parts = []
    for layer in data.layers:
        bound = math.log2(max(1, len(data.text.domains)))
        heat = HeatMap(
            title=f"layer {layer.layer}",
            rows=list(data.text.domains),
            columns=[str(expert) for expert in range(len(layer.load))],
            values=[
                [count / total for count in row] if (total := math.fsum(row)) else [None] * len(row)
                for row in layer.domain_counts
            ],
            scale="even_share",
            corner="expert",
            note=f"expert and domain share {layer.mutual_information:.3g} of {bound:.3g} bits",
        )
        parts.append(heat_chart(heat))
    return maps(parts)


def coactivation_maps(data: ReportData) -> str:
    """Return which experts are chosen for the same tokens."""
    body = maps(_square(layer, layer.coactivation, "even_share") for layer in data.layers)
    return f'<p class="note">{_ROW_NOTE}</p>{body}' if body else ""


def flow_figures(data: ReportData) -> str:
    """Return how tokens go from the experts of each layer to those of the next."""
    if not data.flows:
        return ""
    parts = []
    bits = "; ".join(f"{flow.layer} and {flow.next_layer}: {flow.mutual_information:.3g}" for flow in data.flows)
    if all(len(flow.counts) <= MOST_BANDED and len(flow.counts[0]) <= MOST_BANDED for flow in data.flows):
        parts.append(flow_chart(data.flows))
    rows = [
        [
            f"{flow.layer} to {flow.next_layer}",
            source,
            target,
            round(100 * share, 2),
            round(lift, 3),
        ]
        for flow in data.flows
        for source, target, share, lift in strongest_flows(flow, max(1, _MOST_FLOWS // len(data.flows)))
    ]
    heads = ["layers", "from expert", "to expert", "% of the sender's", "times chance"]
    shared = f'<p class="note">Bits that the experts of two layers share: {bits}.</p>'
    return shared + maps([*parts, figure("strongest flows", table(PageTable(heads=heads, rows=rows)))])


def similarity_maps(data: ReportData) -> str:
    """Return how alike the experts of a layer are, by their weights and by their outputs."""
    charted, alien = [], []
    for layer in data.layers:
        if layer.weight_similarity is not None and _highest(layer.weight_similarity) < _ALIEN:
            alien.append(str(layer.layer))  # as of most experts that were made at random
        else:
            charted.append(_square(layer, layer.weight_similarity, "signed", "weights"))
        charted.append(_square(layer, layer.output_similarity, "signed", "outputs"))
    body = maps(charted)
    layers = f"layer{'s' * (len(alien) > 1)} {', '.join(alien)}"
    unlike = f" Weights of no two experts of {layers} have one of {_ALIEN:g} or more." if alien else ""
    return f'<p class="note">Cosines in {SIGNED}.{unlike}</p>{body}' if data.layers else ""


def drop_figures(data: ReportData) -> str:
    """Return which assignments were dropped at the capacity of training, by domain and by position."""
    dropping = [(layer, layer.drops) for layer in data.layers if layer.drops is not None]
    if not dropping or data.text is None:
        return ""
    curves = [
        Curve(name=f"layer {layer.layer}", steps=drops.positions, values=drops.by_position, colour=i, dash=i // 9)
        for i, (layer, drops) in enumerate(dropping)
    ]
    chart = curve_chart("dropped, by position in the row", curves, unit="share", floor=0.0, axis="position")
    rows = [[layer.layer, drops.overall, *drops.by_domain] for layer, drops in dropping]
    domains = table(
        PageTable(heads=["layer", "all", *data.text.domains], rows=rows, caption="dropped share, by domain")
    )
    return grid([chart]) + domains


def checkpoint_curves(data: ReportData) -> str:
    """Return how routing changed from checkpoint to checkpoint."""
    checkpoints = data.checkpoints
    if len(checkpoints) < 2:
        return '<p class="note">One checkpoint was measured: two are needed to see a change.</p>' if checkpoints else ""
    steps = [checkpoint.step for checkpoint in checkpoints]
    entropies = [checkpoint.router_entropy for checkpoint in checkpoints]
    charts = [
        _by_layer(data, "saturation", "share of the choices of the last", [c.saturation for c in checkpoints]),
        _by_layer(
            data, "specialisation", "bits that expert and domain share", [c.mutual_information for c in checkpoints]
        ),
        _by_layer(data, "router entropy", "nats per token", [e for e in entropies if e is not None])
        if all(entropy is not None for entropy in entropies)
        else "",
        _by_layer(data, "load imbalance", "times the mean", [c.load_imbalance for c in checkpoints]),
        curve_chart(
            "held-out loss",
            [Curve(name="", steps=steps, values=[c.loss for c in checkpoints])],
            unit="nats per token",
        ),
    ]
    rows = [[c.step, c.loss, c.dead_experts] for c in checkpoints]
    return grid(charts) + table(PageTable(heads=["step", "loss", "dead experts"], rows=rows))


_ROW_NOTE: Final = (
    "A row is an expert; a cell is the percent of its tokens that also chose the expert of the column. "
    "Blue is a quarter of the row's mean or less, orange four times it or more."
)


def _square(layer: LayerFindings, matrix: Matrix | None, scale: HeatScale, what: str = "") -> str:
    """Return the map of a matrix (E, E) without its diagonal."""
    if matrix is None:
        return ""
    title = f"layer {layer.layer}" + (f", {what}" if what else "")
    if len(matrix) > MOST_SIMILAR:
        return figure(title, f'<p class="note">{quoted(f"{len(matrix)} experts: the matrix is in the JSON")}</p>')
    names = [str(expert) for expert in range(len(matrix))]
    values = [[None if e == f else value for f, value in enumerate(row)] for e, row in enumerate(matrix)]
    return heat_chart(HeatMap(title=title, rows=names, columns=names, values=values, scale=scale, corner="expert"))


def _highest(matrix: Matrix) -> float:
    """Return the highest absolute value off the diagonal."""
    return max((abs(value) for e, row in enumerate(matrix) for f, value in enumerate(row) if e != f), default=0.0)


def _by_layer(data: ReportData, title: str, unit: str, values: Sequence[Sequence[float]]) -> str:
    """Return curves over checkpoints, one for each layer: values (checkpoints, L)."""
    steps = [checkpoint.step for checkpoint in data.checkpoints]
    curves = [
        Curve(
            name=f"layer {layer.layer}", steps=steps, values=[at[index] for at in values], colour=index, dash=index // 9
        )
        for index, layer in enumerate(data.layers)
    ]
    return curve_chart(title, curves, unit=unit, floor=0.0)


def _duplicate(layer: LayerFindings) -> list[str]:
    return [
        f"{pair.first} and {pair.second} (weights {figure_number(pair.weights)}, outputs {figure_number(pair.outputs)})"
        for pair in layer.duplicates
    ]
