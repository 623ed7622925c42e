"""Mixture-of-experts layer for any module: takes a plain (B, S, D) tensor, returns one and statistics.

# B sequences of S tokens, T = B * S, E experts, D d_model, F d_ff.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from trainer.library.layer_arguments import check_arguments, check_inputs
from trainer.moe.balance import balance_loss
from trainer.moe.build_router import build_router
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE
from trainer.moe.layer_options import BalanceConfig, CapacityConfig
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routing import RoutingContext
from trainer.moe.stats import MoEStats
from trainer.moe.terms import AuxLosses
from trainer.ops.activations import ClampedSwiGLU
from trainer.ops.kernels import ExpertsKernel
from trainer.ops.noise import token_keys

_NUM_DRAWS: Final = 2**31


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of one forward pass of a `MoELayer`."""

    sums: MoEStats
    """Sums per sequence, as the trainer uses them."""
    num_null_experts: int = 0

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64 assignments, before drops."""
        return self.sums.counts.sum(0)

    @property
    def load_imbalance(self) -> Tensor:
        """Assignments of the busiest expert over the mean: 1 when balanced."""
        counts = self.tokens_per_expert.float()
        return counts.max() / counts.mean().clamp(min=1)

    @property
    def drop_rate(self) -> Tensor:
        """Fraction of assignments that exceeded the capacity."""
        return self.sums.dropped.sum() / self.sums.counts.sum().clamp(min=1)

    def balance_loss(self) -> Tensor:
        """Return the load-balancing loss per token, E * sum_e f_e P_e: 1 when balanced, for every E and k.

        Multiply it by a coefficient such as 0.01 and add it to the loss. transformers' `load_balancing_loss_func` is
        top_k times this value.

        Raises:
            ValueError: if the router has no probabilities, as `hash`, `random` and `round_robin`.

        Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4, with f over all k choices.
        """
        if self.sums.prob_sum is None:
            raise ValueError("this router has no probabilities, so there is no balance loss")
        losses = AuxLosses(balance=BalanceConfig(scope="micro_batch"), num_null_experts=self.num_null_experts)
        return balance_loss(self.sums, losses, global_stats=None) / self.sums.tokens.sum().clamp(min=1)

    def z_loss(self) -> Tensor:
        """Return the mean squared logsumexp of the router logits per token (ST-MoE, arXiv 2202.08906).

        Raises:
            ValueError: if the router has no logits.
        """
        if self.sums.z_sum is None:
            raise ValueError("this router has no logits, so there is no z-loss")
        return self.sums.z_sum.sum() / self.sums.tokens.sum().clamp(min=1)


class MoELayer(nn.Module):
    """Experts that each token chooses from, in place of a feed-forward network.

    All experts are in this process. With `router="bias_balanced"`, call `update_router` after each optimizer step.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        d_ff: int | None = None,
        router: str | Mapping[str, Any] | RouterOptions = "top_k",
        capacity_factor: float | None = None,
        activation: Literal["swiglu", "gelu", "clamped_swiglu"] = "swiglu",
        expert_bias: bool = False,
        kernel: ExpertsKernel = "loop",
        seed: int = 0,
    ) -> None:
        """Create the layer with random weights.

        Args:
            d_model: D.
            num_experts: E.
            top_k: experts per token, for routers that have the option; None: the router's own.
            d_ff: F, the hidden width of one expert; None: 4 * d_model.
            router: a kind, such as "switch" or "my_package.module:ClassConfig"; its options, such as
                {"kind": "top_k", "score": "sigmoid"}; or a config object.
            capacity_factor: rows of a sequence that an expert accepts, in units of its fair share; None: dropless.
            activation: "swiglu", "gelu", or "clamped_swiglu" as in GPT-OSS.
            expert_bias: add learned biases to both products of every expert.
            kernel: kernel of the experts, as `parallel.experts_kernel`, without "auto".
            seed: of the routing noise, mixed with a number from torch's generator that each call in training draws.

        Raises:
            ConfigError: with a line for each wrong argument.
        """
        super().__init__()
        values = {
            "d_model": d_model,
            "num_experts": num_experts,
            "d_ff": d_ff,
            "capacity_factor": capacity_factor,
            "activation": activation,
            "expert_bias": expert_bias,
            "kernel": kernel,
            "seed": seed,
        }
        config = check_arguments(router, top_k, values).router
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.moe = MoE(
            router=build_router(config, d_model=d_model, num_experts=num_experts, layer=0, key="router"),
            experts=Experts(
                num_experts,
                d_model,
                d_ff,
                activation=ClampedSwiGLU() if activation == "clamped_swiglu" else activation,
                kernel=kernel,
                has_bias=expert_bias,
            ),
            dispatcher=LocalDispatcher(),
            capacity=CapacityConfig(factor=capacity_factor),
        )
        self.num_null_experts, self._needs_token_ids = config.num_null_experts, config.needs_token_ids
        self._d_model, self._seed = d_model, seed

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, LayerStats]:
        """Return the layer's output (B, S, D) and its statistics.

        Args:
            x: (B, S, D).
            valid: (B, S) bool; padding is not routed, gets 0 and is not counted. None: all tokens are valid.
            token_ids: (B, S) int64; required by `hash`, which routes by them, and ignored by other routers.

        Raises:
            TypeError: if an input is not a tensor, or has the wrong dtype.
            ValueError: if an input is missing, or has the wrong shape.
        """
        check_inputs(x, valid, token_ids, d_model=self._d_model, needs_token_ids=self._needs_token_ids)
        B, S, _ = x.shape
        position = torch.arange(S, device=x.device).repeat(B)
        sequence_index = torch.arange(B, device=x.device).repeat_interleave(S)
        noise_key = None
        if self.training:
            # From torch's generator, whose state activation checkpointing restores before it recomputes a layer.
            draw = torch.randint(_NUM_DRAWS, (), device=x.device)
            noise_key = token_keys(self._seed, sequence_index + draw * B, position)
        context = RoutingContext(
            token_ids=torch.zeros_like(position) if token_ids is None else token_ids.flatten(),
            valid=torch.ones_like(position, dtype=torch.bool) if valid is None else valid.flatten(),
            position=position,
            sequence_index=sequence_index,
            num_sequences=B,
            num_valid=B * S if valid is None else None,
            noise_key=noise_key,
        )
        y, sums = self.moe(x, context)
        return y, LayerStats(sums, self.num_null_experts)

    def update_router(self, *stats: LayerStats) -> None:
        """Update a selection bias from the loads of an optimizer step; other routers ignore it.

        Args:
            stats: of every forward pass of the step: several with gradient accumulation.
        """
        if not stats:
            raise TypeError("update_router: expected the statistics of at least one forward pass, got none")
        self.moe.router.update(torch.stack([one.sums.choices() for one in stats]).sum(0))
