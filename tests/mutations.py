"""Faults as trainers really had them, planted in a rank's process before it starts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.collectives import Group
from trainer.engine import step
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.native import NativeEngine
from trainer.models import initialize
from trainer.models.gpt import GPT
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher
from trainer.moe.dispatch.order import ExpertOrder
from trainer.moe.experts import Experts
from trainer.parallel.replicate import GradientReducer

EP_SIZE = 2


def expert_gradients_times_ep() -> None:
    """PyTorch #160285: the way back of the rows has summed already, and a reducer multiplies once more."""
    whole = GradientReducer.finish

    def wrong(self: GradientReducer) -> None:
        whole(self)
        if self.group.name == "edp":
            for p in self.parameters:
                assert p.grad is not None
                p.grad.mul_(EP_SIZE)

    GradientReducer.finish = wrong  # type: ignore[method-assign]


def dense_gradients_not_summed() -> None:
    """Every rank steps by its own share."""
    whole = GradientReducer.__init__

    def wrong(self: GradientReducer, parameters: Sequence[torch.nn.Parameter], group: Group) -> None:
        whole(self, parameters, Group.of_one() if group.name == "world" else group)

    GradientReducer.__init__ = wrong  # type: ignore[method-assign]


def norm_of_one_rank() -> None:
    """DeepSpeed #8475, Automodel #3816: every rank clips by the norm of what it holds."""
    whole = NativeEngine._reduce_sums

    def wrong(self: NativeEngine, total: Any, choices: Any, routing: Any, norm: Any) -> Any:
        *rest, _ = whole(self, total, choices, routing, norm)
        return (*rest, norm)

    NativeEngine._reduce_sums = wrong  # type: ignore[method-assign]


def balance_loss_divided_by_dp() -> None:
    """Megatron #3672: an average over ranks where a sum was meant."""
    whole = step.objective

    def wrong(*args: Any, **kwargs: Any) -> Any:
        share = whole(*args, **kwargs)
        assert share.balance_loss is not None
        losses, stats = kwargs["losses"], args[1]
        halved = losses.balance.model_copy(update={"coef": losses.balance.coef / 2})
        kwargs["losses"] = replace(losses, balance=halved)
        return replace(whole(args[0], stats, **kwargs), balance_loss=share.balance_loss / 2)

    step.objective = wrong


def counts_after_drop() -> None:
    """The load is counted after the capacity has cut it."""
    from trainer.moe import layer

    whole = layer.collect_stats

    def wrong(routed: Any, limited: Any, context: Any, **kwargs: Any) -> Any:
        stats = whole(routed, limited, context, **kwargs)
        kept = replace(routed.decision, kept=limited.kept)
        return replace(stats, counts=whole(replace(routed, decision=kept), kept, context).counts)

    layer.collect_stats = wrong


def experts_seeded_by_rank() -> None:
    """FastMoE #4: every rank draws its experts from the same stream."""
    whole = initialize.expert_parameters

    def wrong(model: GPT) -> dict[str, int]:
        return dict.fromkeys(whole(model), 0)

    initialize.expert_parameters = wrong


def lost_expert() -> None:
    """The last expert of a rank computes nothing."""
    whole = Experts.forward

    def wrong(self: Experts, x: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
        y = whole(self, x, rows_per_expert)
        return torch.cat(
            [y[: len(y) - int(rows_per_expert[-1])], torch.zeros_like(y[len(y) - int(rows_per_expert[-1]) :])]
        )

    Experts.forward = wrong  # type: ignore[method-assign]


def swapped_combine_weights() -> None:
    """A token's rows come back in another order than their weights."""
    whole = ExpertOrder.combine

    def wrong(self: ExpertOrder, rows: torch.Tensor, *, is_compiled: bool) -> torch.Tensor:
        return whole(replace(self, weight=self.weight.flip(1)), rows, is_compiled=is_compiled)

    ExpertOrder.combine = wrong  # type: ignore[method-assign]


def skipped_collective() -> None:
    """A rank that has nothing to send leaves out the exchange (Automodel #935)."""
    import torch.distributed as dist

    whole = AllToAllDispatcher.send

    def wrong(self: AllToAllDispatcher, rows: torch.Tensor, sizes: Any) -> torch.Tensor:
        if dist.get_rank() == 1:
            return rows.new_zeros(sum(row[1] for row in sizes), rows.shape[1])
        return whole(self, rows, sizes)

    AllToAllDispatcher.send = wrong  # type: ignore[method-assign]


def bias_by_rank() -> None:
    """The selection bias follows counts that the other ranks do not have."""
    import torch.distributed as dist

    from trainer.moe.routers.bias_balanced import BiasBalancedRouter

    whole = BiasBalancedRouter.update

    def wrong(self: BiasBalancedRouter, tokens_per_expert: torch.Tensor) -> None:
        whole(self, tokens_per_expert.roll(dist.get_rank()))

    BiasBalancedRouter.update = wrong  # type: ignore[method-assign]


def router_gradients_doubled() -> None:
    """A factor that is seen nowhere else: without losses of its own a router has a small part of a step's gradient."""
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
    """What DeepSpeed does unless it is told otherwise: a mean over ranks of what were parts of a sum."""
    _other_option("gradient_allreduce_op", lambda _: "mean")


def deepspeed_clips_elsewhere() -> None:
    """Its own limit, beside that of the config."""
    _other_option("gradient_clipping", lambda limit: 3 * limit)


def deepspeed_forgets_micro_batches() -> None:
    """Every micro-batch is taken for the last one of the step."""
    from trainer.engine.deepspeed.engine import DeepSpeedEngine

    whole = DeepSpeedEngine._backward

    def wrong(self: DeepSpeedEngine, objective: torch.Tensor, *, is_last: bool) -> None:
        whole(self, objective, is_last=True)

    DeepSpeedEngine._backward = wrong  # type: ignore[method-assign]


IN_DEEPSPEED: dict[Callable[[], None], str] = {
    deepspeed_averages: "dense gradients are 0.5 times those of one process, router gradients are 0.5 times",
    deepspeed_clips_elsewhere: "equal gradients gave other weights: clipping, learning rate or update",
    deepspeed_forgets_micro_batches: "gradients of dense and router and expert weights differ by no common factor",
}
"""The same under DeepSpeed."""
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
"""What a proof says of each."""
