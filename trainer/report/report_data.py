r"""The numbers of a report: one `ReportData` for each run, measured by measure_*.py, drawn by report_page.py.

Everything is plain: strings, numbers, tuples and dataclasses, so that `report_json` is all of it. A number that could
not be measured is None, never a guess; `ReportData.remarks` says why. Matrices are tuples of rows of float.

Text is whole Unicode, with control characters and bytes that are no UTF-8 as escapes such as \n and \xff. It is not
escaped for HTML: whoever writes a page does that.

# L MoE layers, E experts, G domains, N tokens: those of held-out text whose next token is predicted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

Matrix = tuple[tuple[float, ...], ...]
"""Rows of numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCard:
    """Description of a training and its results; known without a checkpoint."""

    name: str
    folder: str
    """As it was named on the command line."""
    step: int | None
    """Completed steps of the checkpoint that was measured; None: there is none yet."""
    planned_steps: int
    trained_tokens: int | None
    """Tokens up to the last record of metrics.jsonl."""
    parameters: int | None
    active_parameters: int | None
    """Parameters that a token uses."""
    moe_layers: tuple[int, ...]
    """Indices of the blocks with experts; empty: a dense model."""
    num_experts: int | None
    top_k: int | None
    """None: the router has no fixed number of experts per token, or the model is dense."""
    router: str | None
    """Its kind."""
    capacity_factor: float | None
    """None: dropless, or dense."""
    domains: tuple[str, ...]
    last: Mapping[str, float]
    """Last value of every key of metrics.jsonl, such as loss, eval/loss and tokens_per_second."""
    config: Mapping[str, Any]
    """The run's config as nested sections, for the table of differences."""
    training_s: float | None = None
    """Seconds of all logged steps, over all starts of the run, without evaluations and saves."""
    trained_on: str | None = None
    """Device and number of ranks of its last start."""
    training_load: Matrix = ()
    """(L, E) share of each expert in the last record of routing.jsonl; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A passage of held-out text around a token."""

    domain: str
    row: int
    """Number of the row in the domain's held-out text."""
    before: str
    token: str
    """The token, with the rest of its character if it is a part of one."""
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A token or n-gram that an expert sees more often than chance allows."""

    text: str
    tokens: tuple[int, ...]
    """Token ids; for an n-gram the last one is the routed token."""
    count: int
    """Occurrences that the expert was chosen for."""
    occurrences: int
    """Occurrences in the measured text."""
    lift: float
    """p(word | expert) / p(word): 1 by chance, at most 1 / the expert's share of all tokens."""
    lift_low: float
    """Lower end of the lift's 95 % interval (Wilson), by which words are ordered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalRow:
    """A row of held-out text of which an expert sees much."""

    domain: str
    row: int
    share: float
    """Share of the row's tokens that chose the expert."""
    text: str
    """Beginning of the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFindings:
    """Purpose of one expert of one layer. Empty words: nothing is above chance, which is a finding too."""

    expert: int
    tokens: int
    """Tokens that chose it, before drops."""
    share: float
    """Of all assignments in the layer; 1 / E if balanced."""
    domain_lift: tuple[float, ...]
    """(G,) p(expert | domain) / mean over domains of it: 1 if it has no preference; 0 for a dead expert."""
    kinds: tuple[Word, ...]
    """Kinds of token that it sees more often than chance allows, such as `number`; most frequent first."""
    explained: float
    """Share of its tokens that are among its words, those beyond `words` too: 0 where single tokens tell nothing."""
    words: tuple[Word, ...]
    ngrams: tuple[Word, ...]
    excerpts: tuple[Excerpt, ...]
    """Around tokens of its words, or of any tokens that chose it."""
    rows: tuple[TypicalRow, ...]
    """Most typical rows, highest share first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRates:
    """Share of assignments dropped at the capacity of training, in the micro-batches of training."""

    overall: float
    by_domain: tuple[float | None, ...]
    """(G,) None: no assignment."""
    by_position: tuple[float | None, ...]
    """Of equal ranges of columns of the row, from the first to the last."""
    positions: tuple[int, ...]
    """First column of each range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateExperts:
    """Two experts that compute nearly the same."""

    first: int
    second: int
    weights: float
    outputs: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFindings:
    """One MoE layer on held-out text, dropless but for `drops`."""

    layer: int
    """Index of the block."""
    load: tuple[float, ...]
    """(E,) share of the assignments; they sum to 1."""
    load_imbalance: float
    """Highest load over the mean: 1 if balanced."""
    domain_counts: Matrix
    """(G, E) assignments before drops."""
    mutual_information: float
    """Of expert and domain, in bits, domains weighing alike."""
    mutual_information_share: float | None
    """The same over log2 G, 0 to 1; None with one domain."""
    router_entropy: float | None
    """Nats per token; None: the router has no probabilities."""
    dead: tuple[int, ...]
    """Experts without a token."""
    coactivation: Matrix | None
    """(E, E) share of the tokens of expert e that also chose f, 1 on the diagonal; None if no token has two experts."""
    weight_similarity: Matrix | None
    """(E, E) cosine of two experts' weights, hidden units in the order in which they are stored."""
    output_similarity: Matrix | None
    """(E, E) mean cosine of two experts' outputs on the same tokens."""
    duplicates: tuple[DuplicateExperts, ...]
    drops: DropRates | None
    """None: the model has no capacity."""
    experts: tuple[ExpertFindings, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlow:
    """How tokens go from the experts of a MoE layer to those of the next one."""

    layer: int
    next_layer: int
    counts: Matrix
    """(E, E) pairs of an assignment in the layer and one of the same token in the next."""
    mutual_information: float
    """Bits that the expert in the layer tells about that in the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFindings:
    """Routing at one checkpoint, on the same text as all others; the lists have one entry per MoE layer."""

    step: int
    loss: float
    """Nats per target token, dropless."""
    saturation: tuple[float, ...]
    """Share of the choices that are also those of the newest checkpoint; 1 there (OLMoE, arXiv 2409.02060)."""
    mutual_information: tuple[float, ...]
    router_entropy: tuple[float, ...] | None
    load_imbalance: tuple[float, ...]
    dead_experts: int
    """Over all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredText:
    """The held-out text that everything was measured on."""

    tokens: int
    """N."""
    rows: int
    domains: tuple[str, ...]
    domain_tokens: tuple[int, ...]
    domain_loss: tuple[float, ...]
    """Nats per target token, dropless."""
    loss: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All numbers of one run; curves over steps are those of metrics.jsonl and are not repeated here."""

    card: RunCard
    text: MeasuredText | None = None
    """None, and all that follows empty: there is no checkpoint yet, so the report has only curves."""
    layers: tuple[LayerFindings, ...] = ()
    """Empty: a dense model."""
    flows: tuple[LayerFlow, ...] = ()
    """From each MoE layer to the next."""
    checkpoints: tuple[CheckpointFindings, ...] = ()
    """Oldest first; the last is that of `card.step`. Empty for a dense model."""
    remarks: tuple[str, ...] = field(default=())
    """Sentences for the reader: what could not be measured, and why."""


def report_json(value: Any) -> Any:
    """Return a value of dataclasses, mappings and sequences as what `json.dumps` takes; NaN and infinity are None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: report_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): report_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [report_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
