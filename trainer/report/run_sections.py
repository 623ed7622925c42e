"""Write the sections of a report that a run's logs are enough for: curves, load, times, alarms."""

import math
from collections.abc import Sequence
from typing import Any, Final

from trainer.report.curve_chart import Curve, curve_chart, share_bars
from trainer.report.heat_chart import EVEN_SHARE, HeatMap, heat_chart
from trainer.report.markup import figure, figure_number, foreign, grid, maps, quoted, section
from trainer.report.report_data import RunCard
from trainer.report.run_logs import RunLogs

_CURVES: Final = (
    ("load_imbalance", "load of the busiest expert", "times the mean; 1 is even", 1.0),
    ("drop_rate", "dropped assignments", "share", 0.0),
    ("dead_experts", "dead experts", "pairs of layer and expert without a token in a step", 0.0),
    ("router_entropy", "router entropy", "nats per token", 0.0),
    ("balance_loss", "balance loss", "1 is even", None),
    ("experts_per_token", "experts per token", "", None),
    ("grad_norm", "gradient norm", "before clipping", 0.0),
    ("lr", "learning rate", "", 0.0),
    ("tokens_per_s", "speed", "tokens per second", 0.0),
    ("step_s", "time of a step", "seconds", 0.0),
    ("system/process_gb", "memory of the largest rank", "GB", 0.0),
)
"""Key of metrics.jsonl, title, unit, and a value that the axis includes."""
_MOST_STRETCHES: Final = 16  # columns of the load over time
_FEWEST_STRETCHES: Final = 4
_MOST_CELLS: Final = 8192  # of the load over time of a run
_MOST_DOMAINS: Final = 12  # curves of one run


def loss_section(logs: Sequence[RunLogs]) -> str:
    """Return the losses over time: training and held-out text, all of it and by domain."""
    parts = [curve_chart("loss", _losses(logs), unit="nats per token")]
    bits = _of_runs(logs, "eval/bits_per_byte")
    parts.append(curve_chart("held-out text", bits, unit="bits per byte"))
    for log in logs:
        keys = [key for key in log.keys("eval/", "/bits_per_byte") if key != "eval/bits_per_byte"][:_MOST_DOMAINS]
        curves = [
            log.curve(key, key.removeprefix("eval/").removesuffix("/bits_per_byte"), colour=i, dash=i // 9)
            for i, key in enumerate(keys)
        ]
        title = "held-out text by domain" + (f": {log.name}" if len(logs) > 1 else "")
        parts.append(curve_chart(title, curves, unit="bits per byte"))
    note = "Cross-entropy, nothing added; held-out text is evaluated without drops. Lower is better."
    return section("loss", "Loss", note, [grid(parts)])


def load_section(logs: Sequence[RunLogs]) -> str:
    """Return load, and what else was logged, over time."""
    charts = []
    for key, title, unit, floor in _CURVES:
        curves = _of_runs(logs, key)
        if not _changes(curves):
            continue  # none was dropped, none died: the last values are in the tables
        charts.append(curve_chart(title, curves, unit=unit, floor=floor))
    note = "Of the logged steps; speed and time of a step are means since the logged step before."
    return section("time", "Load and speed over time", note, [grid(charts)])


def expert_load_section(logs: Sequence[RunLogs], cards: Sequence[RunCard]) -> str:
    """Return the load of every expert over time."""
    owners = [f": {log.name}" if len(logs) > 1 else "" for log in logs]
    charted = [
        chart for log, card, owner in zip(logs, cards, owners, strict=True) for chart in _load_maps(log, card, owner)
    ]
    note = f"Percent of its layer's assignments in the logged steps up to the one above; {EVEN_SHARE}."
    return section("load", "Load of every expert over time", note, [maps(charted)])


def step_time_section(logs: Sequence[RunLogs]) -> str:
    """Return where the time of a step went: means over the logged steps but the first, in which things warm up."""
    parts = list(dict.fromkeys(key for log in logs for key in log.keys("time/")))
    bars = []
    for log in logs:
        means = [_mean([v for v in log.curve(key, key).values if v is not None][1:]) for key in parts]
        if any(means):
            bars.append((log.name if len(logs) > 1 else "", [1000 * mean for mean in means]))
    if not bars:
        return ""
    names = [key.removeprefix("time/") for key in parts]
    note = "Milliseconds, mean over ranks and over all logged steps but the first; the parts do not overlap."
    return section(
        "parts", "Where the time of a step goes", note, [maps([share_bars("parts of a step", names, bars, unit="ms")])]
    )


def alarm_section(logs: Sequence[RunLogs]) -> str:
    """Return what rang while training, and what to do; a card for each kind, layer and rank."""
    parts = []
    for log in logs:
        kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in log.alarms.records:
            kinds.setdefault(tuple(str(record.get(key)) for key in ("alarm", "layer", "rank")), []).append(record)
        parts += [_alarm(log.name if len(logs) > 1 else "", records) for records in kinds.values()]
    unwatched = [log for log in logs if not log.alarms.records and not log.keys("alarms")]
    if len(parts) == 0 and len(unwatched) < len(logs):
        parts.append('<p class="fine">None rang.</p>')
    whose = f": {', '.join(log.name for log in unwatched)}" if len(logs) > 1 else ""
    if unwatched:
        parts.append(
            f'<p class="note">None was watched for (metrics.alarms), or nothing is logged yet{quoted(whose)}.</p>'
        )
    return section("alarms", "Alarms", "What the run warned of while it trained (alarms.jsonl).", parts)


def damage_notes(logs: Sequence[RunLogs]) -> list[str]:
    """Return sentences about lines of logs that could not be read."""
    found = []
    for log in logs:
        files = (("metrics.jsonl", log.metrics), ("routing.jsonl", log.routing), ("alarms.jsonl", log.alarms))
        for name, content in files:
            if content.unreadable:
                found.append(f"{log.name}: {name} cannot be read: {content.unreadable}")
            if content.damaged:
                found.append(f"{log.name}: {len(content.damaged)} damaged lines of {name} are left out")
    return found


def _of_runs(logs: Sequence[RunLogs], key: str) -> list[Curve]:
    """Return the curve of a metric of every run; that of a single one needs no name."""
    return [log.curve(key, log.name if len(logs) > 1 else "", colour=i) for i, log in enumerate(logs)]


def _losses(logs: Sequence[RunLogs]) -> list[Curve]:
    curves = []
    for index, log in enumerate(logs):
        prefix = f"{log.name}, " if len(logs) > 1 else ""
        held_out = index if len(logs) > 1 else 1
        curves.append(log.curve("loss", f"{prefix}training", colour=index))
        curves.append(log.curve("eval/loss", f"{prefix}held out", colour=held_out, dash=1))
    return curves


def _load_maps(log: RunLogs, card: RunCard, owner: str) -> list[str]:
    """Return a map for each layer: experts by stretches of steps, shares of the assignments."""
    records = list(log.counts())
    if not records or len(records[0][1][0]) < 2:
        return []
    num_layers, num_experts = len(records[0][1]), len(records[0][1][0])
    most = min(_MOST_STRETCHES, _MOST_CELLS // (num_layers * num_experts))
    if most < _FEWEST_STRETCHES:
        return [figure(f"{num_layers} x {num_experts}{owner}", "They are too many for a page: routing.jsonl has it.")]
    size = math.ceil(len(records) / most)
    stretches = [records[start : start + size] for start in range(0, len(records), size)]
    charts = []
    indices = card.moe_layers if len(card.moe_layers) == num_layers else range(num_layers)
    for layer in range(num_layers):
        sums = [[math.fsum(c[layer][e] for _, c in part) for e in range(num_experts)] for part in stretches]
        totals = [math.fsum(column) or math.nan for column in sums]
        values = [[column[e] / total for column, total in zip(sums, totals, strict=True)] for e in range(num_experts)]
        heat = HeatMap(
            title=f"load of layer {indices[layer]}{owner}",
            rows=[f"expert {expert}" for expert in range(num_experts)],
            columns=[str(part[-1][0]) for part in stretches],
            values=values,
            scale="even_share",
            corner="to step",
            even=1 / num_experts,
        )
        charts.append(heat_chart(heat))
    return charts


def _alarm(run: str, records: Sequence[dict[str, Any]]) -> str:
    """Return the card of an alarm of one layer and rank: its newest words while it rang, and whether it goes on."""
    rung = [record for record in records if record.get("state") != "ended"] or records
    first, last = rung[0], rung[-1]
    where = "".join(f", {key} {first[key]}" for key in ("layer", "rank") if first.get(key) is not None)
    times = "" if len(rung) == 1 else f", {len(rung)} times until step {last['step']}"
    end = f"ended at step {records[-1]['step']}" if records[-1] is not last else "has not ended"
    head = f"{foreign(str(first.get('alarm', 'alarm')))}{quoted(where)}: rang at step {first['step']}{times}; {end}"
    owner = f'<p class="note">{foreign(run)}</p>' if run else ""
    message, advice = foreign(str(last.get("message", ""))), foreign(str(last.get("advice", "")))
    numbers = {key: last[key] for key in ("value", "threshold", "since") if isinstance(last.get(key), int | float)}
    more = ", ".join(f"{key} {figure_number(value)}" for key, value in numbers.items())
    words = f'<p>{message} <span class="note">{more}</span></p><p><b>What to do:</b> {advice}</p>'
    return f'<div class="card alarm"><h3>{head}</h3>{owner}{words}</div>\n'


def _changes(curves: Sequence[Curve]) -> bool:
    """Return whether there is more than one value: a straight line tells nothing."""
    return len({value for curve in curves for value in curve.values}) > 1


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else 0.0
