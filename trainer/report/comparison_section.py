"""Write what a run is, and in what several runs differ: config and results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from trainer.config.dump import inline
from trainer.console.formatting import duration, rate
from trainer.report.markup import PageTable, details, figure_number, foreign, quoted, section, table
from trainer.report.report_data import ReportData, RunCard

_NOT_RESULTS: Final = ("time/", "time_max/", "system/", "data/")


def run_card(data: ReportData) -> str:
    """Return what was trained, how far, and on what it was measured."""
    card, text = data.card, data.text
    facts = [
        ("steps", f"{figure_number(card.last.get('step', 0))} of {figure_number(card.planned_steps)}"),
        ("tokens trained", rate(card.trained_tokens)),
        ("parameters", _parameters(card)),
        ("experts", _experts(card)),
        ("router", _router(card)),
        ("time of training", None if card.training_s is None else duration(card.training_s)),
        ("trained on", card.trained_on),
        ("training loss", _last(card, "loss")),
        ("held-out loss", _last(card, "eval/loss")),
        ("held-out bits per byte", _last(card, "eval/bits_per_byte")),
        ("measured", None if card.step is None else f"the checkpoint of step {figure_number(card.step)}"),
        ("folder", card.folder),
    ]
    rows = "".join(f"<div><dt>{label}</dt><dd>{foreign(value)}</dd></div>" for label, value in facts if value)
    parts = [f"<dl>{rows}</dl>"]
    if text is not None:
        heads = ["domain", "tokens measured", "loss, nats per token"]
        of_domains = list(zip(text.domains, text.domain_tokens, text.domain_loss, strict=True))
        means = f"loss {figure_number(text.loss)}, {figure_number(text.bits_per_byte)} bits per byte"
        caption = f"the text of this page: {text.rows} rows of held-out text, {text.tokens} tokens, {means}"
        parts.append(table(PageTable(heads=heads, rows=of_domains, caption=caption)))
    parts += [f'<p class="note">{foreign(remark)}</p>' for remark in data.remarks]
    if card.config:
        keys = [[key, value] for key, value in _leaves(card.config)]
        parts.append(details("the whole config", table(PageTable(heads=["key", "value"], rows=keys))))
    return "".join(parts)


def comparison_section(names: Sequence[str], cards: Sequence[RunCard], cautions: Sequence[str]) -> str:
    """Return tables of the differences of config and of all results, or nothing for a single run.

    `cautions` say why results cannot be compared.
    """
    if len(cards) < 2:
        return ""
    configs = [dict(_leaves(card.config)) for card in cards]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = [key for key in keys if _differs(configs, key)]
    common = [key for key in differing if all(key in config for config in configs)]
    results = dict.fromkeys(key for card in cards for key in card.last if not key.startswith(_NOT_RESULTS))
    measured = sorted(results, key=lambda key: not key.startswith("eval/"))  # held-out text first
    rows = [[key, *(card.last.get(key) for card in cards)] for key in measured if key not in ("step", "tokens")]
    parts = [*(f"<p><b>Caution:</b> {quoted(caution)}.</p>" for caution in cautions)]
    if not differing:
        parts.append("<p>The configs are equal.</p>")
    tables = [_config_table(names, configs, common, "config, where it differs")] if common else []
    tables.append(table(PageTable(heads=["result", *names], rows=rows, caption="last value of every metric")))
    parts.append(f'<div class="pair">{"".join(f"<div>{one}</div>" for one in tables)}</div>')
    if single := [key for key in differing if key not in common]:
        parts.append(details("keys that not all of the runs have", _config_table(names, configs, single, "")))
    return section("differences", "Differences", "Between the runs of this page.", parts)


def _experts(card: RunCard) -> str:
    if not card.moe_layers or card.num_experts is None:
        return "none: a dense model"
    chosen = "" if card.top_k is None else f", {card.top_k} for each token"
    return f"{card.num_experts} in each of {len(card.moe_layers)} layers{chosen}"


def _config_table(names: Sequence[str], configs: Sequence[Mapping[str, str]], keys: Sequence[str], title: str) -> str:
    rows = [[key, *(config.get(key, "-") for config in configs)] for key in keys]
    return table(PageTable(heads=["key", *names], rows=rows, caption=title))


def _parameters(card: RunCard) -> str | None:
    if card.parameters is None or card.parameters == card.active_parameters:
        return None if card.parameters is None else rate(card.parameters)
    return f"{rate(card.parameters)}, {rate(card.active_parameters)} for each token"


def _router(card: RunCard) -> str | None:
    if card.router is None:
        return None
    return card.router + (", dropless" if card.capacity_factor is None else f", capacity {card.capacity_factor:g}")


def _last(card: RunCard, key: str) -> str | None:
    return figure_number(card.last[key]) if key in card.last else None


def _differs(configs: Sequence[Mapping[str, str]], key: str) -> bool:
    return len({config.get(key) for config in configs}) > 1


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of a config with their values in words."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{index}")
    else:
        yield key, inline(value)
