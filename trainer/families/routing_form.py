"""Function of a router once training is over, whatever its kind is called here. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Final

from trainer.moe.config import MoEConfig

_KINDS: Final = ("top_k", "switch", "gshard", "bias_balanced", "group_limited")
"""Routers that at inference select the k best-scored experts by one gate, with or without a bias and groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingForm:
    """Top-k selection at inference."""

    kind: str
    """`top_k`, `bias_balanced`, or `group_limited` if groups limit the selection; these two have a bias."""
    top_k: int
    score: str = "softmax"
    normalize: bool
    scale: float
    gate_bias: bool = False
    null_experts: int = 0
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "best_two"

    @property
    def has_bias(self) -> bool:
        """True if there is a selection bias."""
        return self.kind != "top_k"


def routing_form(moe: MoEConfig) -> RoutingForm | None:
    """Return the form of a router; None if it is no selection of the k best by one gate."""
    router: Any = moe.router
    if router.kind not in _KINDS:
        return None
    common = {"top_k": router.top_k, "normalize": router.normalize, "scale": router.scale}
    common |= {"gate_bias": getattr(router, "gate_bias", False)}
    common |= {"score": getattr(router, "score", "softmax"), "null_experts": router.null_experts}
    if router.kind == "group_limited" and router.groups_kept < router.groups:
        groups = {key: getattr(router, key) for key in ("groups", "groups_kept", "group_score")}
        return RoutingForm(kind="group_limited", **common, **groups)
    has_bias = router.kind in ("bias_balanced", "group_limited")
    return RoutingForm(kind="bias_balanced" if has_bias else "top_k", **common)


def required_form(moe: MoEConfig) -> RoutingForm:
    """Return the form of a router that is known to have one."""
    form = routing_form(moe)
    assert form is not None, f"{moe.router.kind} is refused before its config is written"
    return form
