"""Inputs and comparisons for the checks of a router.

# B sequences of S tokens, T = B * S, E experts, D d_model.
"""

from dataclasses import replace

import torch
from torch import Tensor

from trainer.lab.logits import training_context
from trainer.moe.build_router import build_router
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routing import Router, RoutingContext, RoutingDecision

B, S, D = 3, 8, 6


def make_router(config: RouterOptions, num_experts: int, *, spread: float = 0.8) -> Router:
    """Make a router in float64 with normal weights of standard deviation `spread`."""
    router = build_router(config, d_model=D, num_experts=num_experts, layer=0, key="").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.normal_(0, spread, generator=generator)
    for buffer in router.buffers():
        buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
    return router


def make_x(seed: int = 0) -> Tensor:
    """Return random tokens (B * S, D)."""
    return torch.randn(B * S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context_of(*, is_training: bool, rows: int = B, valid: Tensor | None = None, seed: int = 0) -> RoutingContext:
    """Return a context whose token ids, and noise while training, differ from token to token."""
    ids = torch.randint(0, 99, (rows, S), generator=torch.Generator().manual_seed(seed))
    context = training_context(ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid, seed=seed)
    return context if is_training else replace(context, noise_key=None)


def matrix(decision: RoutingDecision) -> Tensor:
    """Return (T, E): the combine weights of kept assignments, NaN elsewhere."""
    cells = torch.full((decision.num_tokens, decision.num_experts), torch.nan, dtype=torch.float64)
    kept = decision.kept & (decision.expert_index < decision.num_experts)
    cells[decision.token_index[kept], decision.expert_index[kept]] = decision.combine_weight.detach()[kept].double()
    return cells


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two matrices are bitwise equal, NaN included."""
    return torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))


def repeated_tokens() -> dict[str, tuple[Tensor, Tensor]]:
    """Return rows (B * S, D) with repeated tokens, as in indentation and blank lines, and the valid tokens."""
    drawn = make_x(2).view(B, S, D)
    one_each, everything = drawn[:, :1].expand(B, S, D), torch.ones(B, S, dtype=torch.bool)
    alone = torch.arange(S) == torch.tensor([[0], [S // 2], [S - 1]])
    blocks = drawn[:, :3].repeat(1, S, 1)[:, :S]
    rows = {
        "equal": (one_each, everything),
        "all but one equal": (torch.cat([drawn[:, 1:2], one_each[:, 1:]], dim=1), everything),
        "blocks": (blocks, everything),
        "blocks before padding": (blocks, torch.arange(S) < torch.tensor([[S], [6], [0]])),
        "one valid": (drawn, alone),
        "zeros": (torch.zeros_like(drawn), everything),
    }
    return {name: (x.reshape(-1, D), valid.flatten()) for name, (x, valid) in rows.items()}
