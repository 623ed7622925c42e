"""Findings of rules at one logged step, and the facts of a training that rules need. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

AlarmName = Literal[
    "collapse",
    "alike_tokens",
    "dead_experts",
    "inert_bias",
    "imbalance_growth",
    "entropy_zero",
    "router_gradient",
    "plateau",
    "slow_rank",
]
ALARM_NAMES: tuple[AlarmName, ...] = get_args(AlarmName)
_WORST = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """Settings of a training that rules need and cures name."""

    num_experts: int = 0
    """0: a dense model."""
    router: str = ""
    """Kind of the router."""
    learns_routing: bool = False
    """The router has probabilities that are learned."""
    is_router_frozen: bool = False
    score: str = "softmax"
    balance_coef: float = 0.0
    z_loss_coef: float = 0.0
    bias_update_rate: float | None = None
    """None: the router has no selection bias."""
    peak_lr: float | None = None
    """None: the schedule has no such key."""
    layers: tuple[int, ...] = ()
    """Indices of the MoE layers in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """A condition that holds at a logged step."""

    alarm: AlarmName
    value: float
    threshold: float
    text: str
    """Description with values, to follow the name of the place."""
    severity: float
    """How bad it is: 1 at the threshold, higher is worse."""
    layer: int | None = None
    """Index in the model."""
    rank: int | None = None
    is_lasting: bool = False
    """The rule looked at many steps already."""
    since: int | None = None
    """First step at which it held, where the rule knows better than when it was found."""
    experts: list[int] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it holds."""
        return place_of(self.layer)


def place_of(layer: int | None) -> str:
    """Return the beginning of a message about a layer, or about the whole model."""
    return "" if layer is None else f"layer {layer}: "


def severity_below(value: float, threshold: float) -> float:
    """Return the severity of a value that is below its threshold."""
    return _WORST if value <= threshold / _WORST else threshold / value
