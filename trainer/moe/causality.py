"""Warnings about routing that is not causal: a token's experts depend on later tokens, absent at generation time."""

from collections.abc import Sequence

from trainer.moe.capacity import capacity_causality
from trainer.moe.config import MoEConfig
from trainer.moe.layer import MoE
from trainer.moe.routers.non_causal import NonCausalRouter
from trainer.moe.routing import Causality, weakest

_HOW: dict[Causality, str] = {"within_sequence": "later tokens of its sequence", "no": "tokens of other sequences"}


def training_warning(config: MoEConfig, layers: Sequence[MoE]) -> str | None:
    """Return a warning if router or capacity is not causal in training; None if both are."""
    by_router = weakest([layer.router.causal for layer in layers])
    by_capacity = capacity_causality(config.capacity, is_training=True)
    is_causal_in_evaluation = _in_evaluation(layers) == "strict"
    advice = "; judge by the held-out loss, not by the training loss" if is_causal_in_evaluation else ""
    if by_router != "strict":
        return (
            f"model.moe.router: {config.router.kind} is not causal: a token's experts depend on {_HOW[by_router]}, "
            f"which do not exist at generation time{advice}"
        )
    if layers and by_capacity != "strict":
        what = "scope: rank" if by_capacity == "no" else f"policy: {config.capacity.policy}"
        return (
            f"model.moe.capacity: {what} is not causal: {_HOW[by_capacity]}, which do not exist at generation "
            f"time, can evict a token from its experts{advice}"
        )
    return None


def evaluation_warning(layers: Sequence[MoE]) -> str | None:
    """Return a warning if evaluation is not causal, so that its loss is too low; None if it is causal."""
    causal = _in_evaluation(layers)
    if causal == "strict":
        return None
    has_key = all(isinstance(layer.router, NonCausalRouter) for layer in layers)
    what = "router.evaluation_routing: as_trained" if has_key else "router: in evaluation it"
    return (
        f"model.moe.{what} lets a token's experts depend on {_HOW[causal]}: held-out loss is that of a model that sees "
        f"some of what it predicts{', and generation routes by top_k instead' if has_key else ''}"
    )


def _in_evaluation(layers: Sequence[MoE]) -> Causality:
    return weakest([layer.router.causal_in_evaluation for layer in layers])
