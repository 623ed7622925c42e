"""Checks of what decides on a token's experts: later tokens, capacity, drawn k, frozen routers. Import no torch."""

from collections.abc import Iterator

from trainer.doctor.finding import Sign
from trainer.doctor.static.config_on_host import ConfigCheck, ConfigOnHost
from trainer.moe.routers.config.options import NonCausalOptions

_UNEVEN = 1.1
"""Experts of the fullest rank over the mean from which it is worth a word."""


def _look_ahead(subject: ConfigOnHost) -> Iterator[Sign]:
    router = getattr(subject.config.model.moe, "router", None)
    if not isinstance(router, NonCausalOptions):
        return
    if router.evaluation_routing == "as_trained":
        yield Sign(
            f"model.moe.router: {router.kind} with evaluation_routing as_trained: held-out loss is that of a model "
            "that sees some of what it predicts",
            "use evaluation_routing: top_k",
            "severe",
        )
    else:
        yield Sign(
            f"model.moe.router: {router.kind} routes a token by later ones, which do not exist when text is generated",
            "judge it by eval/loss, not by the training loss; or use kind: top_k",
        )


def _eviction(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = subject.config.model.moe
    if moe is None or not moe.can_drop:
        return
    if moe.capacity.scope == "rank":
        yield Sign(
            "model.moe.capacity.scope: rank: texts of a micro-batch push each other out of experts, in training and in "
            "eval/loss_capacity",
            "use scope: sequence",
        )
    elif moe.capacity.policy in ("choice_major", "probability"):
        yield Sign(
            f"model.moe.capacity.policy: {moe.capacity.policy}: a later token can push an earlier one out of its "
            "expert",
            "use policy: position, or factor: null",
        )


def _tight_capacity(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = subject.config.model.moe
    factor = None if moe is None else moe.capacity.factor
    if moe is not None and factor is not None and moe.can_drop and factor < 1:
        yield Sign(
            f"model.moe.capacity.factor: {factor:g}: at least {1 - factor:.0%} of the assignments are dropped however "
            "even the load is",
            "use 1.25, or null",
        )


def _drawn_single(subject: ConfigOnHost) -> Iterator[Sign]:
    router = getattr(subject.config.model.moe, "router", None)
    choices = getattr(router, "top_k_choices", None)
    if router is not None and choices and 1 in choices and router.weight_sum is not None:
        yield Sign(
            f"model.moe.router.top_k_choices: {choices} with normalize: steps with k = 1 have the constant weight 1",
            "set normalize: false, or remove 1",
        )


def _frozen_at_random(subject: ConfigOnHost) -> Iterator[Sign]:
    config = subject.config
    if config.model.moe is not None and "router" in config.train.freeze and config.init_from is None:
        yield Sign(
            "train.freeze: router, and the run starts from random weights: experts are chosen at random for ever",
            "remove router, or start from trained weights (init_from)",
        )


def _uneven_experts(subject: ConfigOnHost) -> Iterator[Sign]:
    moe, ep_size = subject.config.model.moe, subject.config.parallel.ep_size
    if moe is None:
        return
    most, mean = -(-moe.num_experts // ep_size), moe.num_experts / ep_size
    if most > _UNEVEN * mean:
        yield Sign(
            f"parallel.ep_size: {moe.num_experts} experts over {ep_size} ranks: some hold {most}, the mean is "
            f"{mean:.2f}, and all wait for them: {1 - mean / most:.0%} of the experts' time is lost",
            "use an ep_size that divides model.moe.num_experts",
        )


CHOICE_CHECKS: tuple[ConfigCheck, ...] = (
    ConfigCheck(
        name="look_ahead_routing",
        severity="warning",
        find=_look_ahead,
        why="the training loss is too low: the choice of experts tells a token about those that follow",
        source="arXiv 2408.15664, section on expert choice; arXiv 2202.09368",
    ),
    ConfigCheck(
        name="eviction",
        severity="warning",
        find=_eviction,
        why="what a text gets depends on what comes with or after it, so results change with the batch",
        source="microsoft/Tutel#230; arXiv 2006.16668",
    ),
    ConfigCheck(
        name="tight_capacity",
        severity="warning",
        find=_tight_capacity,
        why="dropped tokens skip their experts, in training and in eval/loss_capacity",
        source="arXiv 2101.03961, table 1",
    ),
    ConfigCheck(
        name="drawn_single_expert",
        severity="warning",
        find=_drawn_single,
        why="in these steps the router learns from its auxiliary losses only, whose optimum is uniform",
        source="jingyaogong/minimind#858",
    ),
    ConfigCheck(
        name="frozen_random_router",
        severity="warning",
        find=_frozen_at_random,
        why="a random router is a baseline, not a mixture that learns",
        source="karpathy/nanochat, branch moe3; arXiv 2106.04426",
    ),
    ConfigCheck(
        name="uneven_experts",
        severity="warning",
        find=_uneven_experts,
        why="a step takes as long as its busiest rank",
        source="pytorch/torchtitan#4258",
    ),
)
