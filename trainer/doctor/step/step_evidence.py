"""Measurements of one real step, which the checks of a step look at. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.doctor.finding import Check

_MOST_SHOWN = 4


@dataclass(slots=True, kw_only=True)
class LayerEvidence:
    """One MoE layer. None: not measured, or the router has nothing of the kind."""

    layer: int
    """Index in the model."""
    learns: bool = True
    """The router has weights that learn."""
    lm_gradient: float | None = None
    """Norm of the gradient of the cross-entropy alone, by the router's weights."""
    lm_gradient_all: float | None = None
    """The same by all weights of the layer."""
    logit_spread: float | None = None
    """Largest standard deviation of an expert's logit over tokens, as a share of the largest logit."""
    logit_dtype: str | None = None
    num_valid: int = 0
    """Tokens of a batch with padding, without it."""
    expected_assignments: int | None = None
    """k times those."""
    counted_assignments: int | None = None
    counted_probability: float | None = None
    """Sum of the probabilities that statistics have counted."""
    counts: Sequence[int] = ()
    """(E,) assignments of the step."""
    bias_moves: Sequence[float] | None = None
    """(E,) by how much the step has moved the selection bias."""
    bias_selects: bool | None = None
    """A large bias has brought an expert more tokens."""
    identical_pairs: Sequence[tuple[int, int]] = ()
    """Experts with equal weights."""
    unfed_gradients: Sequence[int] = ()
    """Experts without a token that have a gradient."""
    silent_experts: Sequence[int] = ()
    """Experts with tokens whose targets count in the loss that have none."""


@dataclass(slots=True, kw_only=True)
class TextEvidence:
    """The rows of the step, and the text behind them."""

    num_tokens: int = 0
    padding: int = 0
    targets: int = 0
    """Positions that count in the loss."""
    seq_len: int = 0
    packing: str = "wrapped"
    epochs: float = 0.0
    """Of the domain that the whole run reads most often."""
    domain: str = ""
    """Its name."""
    vocab_rows: int = 0
    num_ids: int = 0
    """Of the tokenizer."""


@dataclass(slots=True, kw_only=True)
class StepEvidence:
    """One step of a model on its text."""

    layers: list[LayerEvidence] = field(default_factory=list)
    text: TextEvidence = field(default_factory=TextEvidence)
    is_trained: bool = False
    """Weights are not the initial values of a seed."""
    loss: float = 0.0
    grad_norms: Sequence[float] = ()
    """As each rank has it."""
    whole_norm: float | None = None
    """2-norm of the whole gradients, put together from all ranks."""
    not_finite: str | None = None
    repeated: bool | None = None
    """The same step computed again has the same loss and gradient norm, bit for bit."""
    unchanged: Sequence[str] = ()
    """Weights that have a gradient and were not changed by the step."""
    without_gradient: Sequence[str] = ()
    """Weights that learn and got no gradient, apart from routers, experts and adapters."""
    changed_frozen: Sequence[str] = ()
    decayed_vectors: Sequence[str] = ()
    """Norms, biases and other vectors that weight decay pulls to 0."""
    later_tokens_change: dict[str, float] = field(default_factory=dict)
    """Largest relative change of a logit if later tokens are others: in `training` and in `evaluation`, where the model
    says that there is none."""
    other_rows_change: float | None = None
    """Largest relative change of a logit in evaluation if other rows are not there."""
    tolerance: float = 1e-3
    """Largest relative change that rounding explains."""
    kernel_faults: Sequence[str] = ()
    """Findings of the canary."""


StepCheck = Check[StepEvidence]


def few_names(names: Sequence[object]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"{', '.join(map(str, names[:_MOST_SHOWN]))}{more}"
