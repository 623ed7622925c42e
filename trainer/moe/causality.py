"""Warnings about routers that are not causal: a token's experts depend on later tokens.

A language model that is trained with a look at later tokens learns from what it will not have when it writes.
"""

from collections.abc import Sequence

from trainer.moe.capacity import capacity_causality
from trainer.moe.config import MoEConfig
from trainer.moe.layer import MoE
from trainer.moe.routing import Causality, weaker

_HOW: dict[Causality, str] = {"within_sequence": "later tokens of its row", "no": "tokens of other rows"}


def training_warning(config: MoEConfig, layers: Sequence[MoE]) -> str | None:
    """Return what to say before a router or capacity that looks ahead is trained; None where none does."""
    by_router, by_capacity = (
        _weakest([layer.router.causal for layer in layers]),
        capacity_causality(config.capacity, is_training=True),
    )
    is_honest = getattr(config.router, "evaluation_routing", "top_k") == "top_k"
    advice = "; go by the loss on held-out text, not by that of training" if is_honest else ""
    if by_router != "strict":
        return (
            f"model.moe.router: {config.router.kind} chooses a token's experts by {_HOW[by_router]} as well, which "
            f"nobody has who writes text{advice}"
        )
    if layers and by_capacity != "strict":
        what = "scope: rank" if by_capacity == "no" else f"policy: {config.capacity.policy}"
        return (
            f"model.moe.capacity: with {what} a token's experts can be taken by {_HOW[by_capacity]}, which nobody has "
            f"who writes text{advice}"
        )
    return None


def evaluation_warning(layers: Sequence[MoE]) -> str | None:
    """Return what to say beside the loss of a model that sees what it predicts; None where no token does."""
    causal = _weakest([layer.router.causal_in_evaluation for layer in layers])
    if causal == "strict":
        return None
    return (
        f"model.moe.router.evaluation_routing: as_trained lets a token's experts depend on {_HOW[causal]}: held-out "
        "loss is of a model that has seen some of what it predicts; generated text is routed by top_k"
    )


def _weakest(promises: Sequence[Causality]) -> Causality:
    weakest: Causality = "strict"
    for promise in promises:
        weakest = weaker(weakest, promise)
    return weakest
