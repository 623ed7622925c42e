"""Faults of real trainers, planted in the process of a rank before it starts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.collectives import Group
from trainer.engine import step_sums
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.native import NativeEngine
from trainer.models import initialize
from trainer.models.gpt import GPT
from trainer.moe.dispatch.exchanging import ExchangingDispatcher
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.experts import Experts
from trainer.moe.routing import RoutingDecision
from trainer.parallel.replicate import GradientReducer

EP_SIZE = 2


def expert_gradients_times_ep() -> None:
    """Scale expert gradients twice: in the backward all-to-all and again in the reducer (PyTorch #160285)."""
    whole = GradientReducer.finish

    def wrong(self: GradientReducer) -> None:
        whole(self)
        if self.group.name == "edp":
            for p in self.parameters:
                assert p.grad is not None
                p.grad.mul_(EP_SIZE)

    GradientReducer.finish = wrong  # type: ignore[method-assign]


def dense_gradients_not_summed() -> None:
    """Skip the all-reduce: every rank steps with its local gradient."""
    whole = GradientReducer.__init__

    def wrong(self: GradientReducer, parameters: Sequence[torch.nn.Parameter], group: Group) -> None:
        whole(self, parameters, Group.of_one() if group.name == "stage" else group)

    GradientReducer.__init__ = wrong  # type: ignore[method-assign]


def norm_of_one_rank() -> None:
    """Clip by the norm of the local shard (DeepSpeed #8475, Automodel #3816)."""
    whole = NativeEngine._reduce_sums

    def wrong(self: NativeEngine, total: Any, choices: Any, routing: Any, norm: Any) -> Any:
        *rest, _ = whole(self, total, choices, routing, norm)
        return (*rest, norm)

    NativeEngine._reduce_sums = wrong  # type: ignore[method-assign]


def balance_loss_divided_by_dp() -> None:
    """Average over ranks instead of summing (Megatron #3672)."""
    whole = step_sums.objective

    def wrong(*args: Any, **kwargs: Any) -> Any:
        share = whole(*args, **kwargs)
        assert share.balance_loss is not None
        losses, stats = kwargs["losses"], args[1]
        halved = losses.balance.model_copy(update={"coef": losses.balance.coef / 2})
        kwargs["losses"] = replace(losses, balance=halved)
        return replace(whole(args[0], stats, **kwargs), balance_loss=share.balance_loss / 2)

    step_sums.objective = wrong


def counts_after_drop() -> None:
    """Count the load after tokens over capacity are dropped."""
    from trainer.moe import layer

    whole = layer.collect_stats

    def wrong(routed: Any, limited: Any, context: Any, **kwargs: Any) -> Any:
        stats = whole(routed, limited, context, **kwargs)
        kept = replace(routed.decision, kept=limited.kept)
        return replace(stats, counts=whole(replace(routed, decision=kept), kept, context).counts)

    layer.collect_stats = wrong


def experts_seeded_by_rank() -> None:
    """Initialise the experts of every rank from the same random stream (FastMoE #4)."""
    whole = initialize.expert_parameters

    def wrong(model: GPT) -> dict[str, tuple[int, ...]]:
        return {name: tuple(range(len(numbers))) for name, numbers in whole(model).items()}

    initialize.expert_parameters = wrong


def lost_expert() -> None:
    """Leave out the last expert of a rank."""
    whole = Experts.forward

    def wrong(self: Experts, x: torch.Tensor, expert_index: torch.Tensor, weight: torch.Tensor, **kw: Any) -> Any:
        return whole(self, x, expert_index, weight * (expert_index != len(self.w_in) - 1), **kw)

    Experts.forward = wrong  # type: ignore[method-assign]


def swapped_combine_weights() -> None:
    """Combine a token's expert outputs in another order than its weights."""
    whole = TokenSlots.of

    def wrong(decision: RoutingDecision) -> TokenSlots:
        slots = whole(decision)
        return replace(slots, weight=slots.weight.flip(1))

    TokenSlots.of = wrong  # type: ignore[method-assign]


def skipped_collective() -> None:
    """Skip the collective on a rank that has nothing to send (Automodel #935)."""
    import torch.distributed as dist

    whole = ExchangingDispatcher.depart

    class Nothing:
        def __init__(self, rows: torch.Tensor) -> None:
            self.rows = rows

        def wait(self) -> torch.Tensor:
            return self.rows

    def wrong(self: ExchangingDispatcher, rows: torch.Tensor, sizes: Any) -> Any:
        if dist.get_rank() == 1:
            return Nothing(rows.new_zeros(sum(row[1] for row in sizes), rows.shape[1]))
        return whole(self, rows, sizes)

    ExchangingDispatcher.depart = wrong  # type: ignore[method-assign]


def bias_by_rank() -> None:
    """Update the selection bias from local counts."""
    import torch.distributed as dist

    from trainer.moe.routers.bias_balanced import BiasBalancedRouter

    whole = BiasBalancedRouter.update

    def wrong(self: BiasBalancedRouter, tokens_per_expert: torch.Tensor) -> None:
        whole(self, tokens_per_expert.roll(dist.get_rank()))

    BiasBalancedRouter.update = wrong  # type: ignore[method-assign]


def router_gradients_doubled() -> None:
    """Scale the router's gradient, which is a small part of the total without auxiliary losses."""
    whole = NativeEngine._reduce_gradients

    def wrong(self: NativeEngine) -> torch.Tensor:
        for name, p in self.parameters.items():
            if "router" in name and p.grad is not None:
                p.grad.mul_(2)
        return whole(self)

    NativeEngine._reduce_gradients = wrong  # type: ignore[method-assign]


def _other_option(key: str, change: Callable[[Any], Any]) -> None:
    whole = DeepSpeedEngineConfig.resolved

    def wrong(self: DeepSpeedEngineConfig, *, grad_clip: float | None, folder: Path | None = None) -> dict[str, Any]:
        config = whole(self, grad_clip=grad_clip, folder=folder)
        return {**config, key: change(config[key])}

    DeepSpeedEngineConfig.resolved = wrong  # type: ignore[method-assign]


def deepspeed_averages() -> None:
    """Average gradients over ranks, DeepSpeed's default, where they are parts of a sum."""
    _other_option("gradient_allreduce_op", lambda _: "mean")


def deepspeed_clips_elsewhere() -> None:
    """Clip a second time, by DeepSpeed's own limit."""
    _other_option("gradient_clipping", lambda limit: 3 * limit)


def deepspeed_forgets_micro_batches() -> None:
    """Treat every micro-batch as the last one of the step."""
    from trainer.engine.deepspeed.engine import DeepSpeedEngine

    whole = DeepSpeedEngine.begin_backward

    def wrong(self: DeepSpeedEngine, *, is_last: bool) -> None:
        whole(self, is_last=True)

    DeepSpeedEngine.begin_backward = wrong  # type: ignore[method-assign]


IN_DEEPSPEED: dict[Callable[[], None], str] = {
    deepspeed_averages: "dense gradients are 0.5 times those of one process, router gradients are 0.5 times",
    deepspeed_clips_elsewhere: "equal gradients gave other weights: clipping, learning rate or update",
    deepspeed_forgets_micro_batches: "gradients of dense and router and expert weights differ by no common factor",
}
"""Faults under the DeepSpeed engine."""
NAMED: dict[Callable[[], None], str] = {
    expert_gradients_times_ep: "expert gradients are 2 times those of one process",
    dense_gradients_not_summed: "differ: some ranks reduce, clip or update on their own",
    norm_of_one_rank: "differ: some ranks reduce, clip or update on their own",
    balance_loss_divided_by_dp: "the balance loss is 0.5 times that of one process",
    counts_after_drop: "the experts' token counts have another sum",
    experts_seeded_by_rank: "blocks.0.ffn.experts.w_in has other initial values: initialisation depends on the rank",
    lost_expert: "experts [2, 5] of blocks.0.ffn.experts.w_in received no gradient: their tokens are lost",
    swapped_combine_weights: "wrong combine weights",
    skipped_collective: "ranks",
    bias_by_rank: "replicas of blocks.0.ffn.router.bias differ",
}
"""Cause that `prove` reports for each fault."""
