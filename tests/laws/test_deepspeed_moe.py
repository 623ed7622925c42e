"""Our MoE layer beside DeepSpeed's own: the same outputs, gradients and balance loss where both mean the same."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.builders import make_context, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed.start import join, load_deepspeed, single_process_group
from trainer.models.block import build_moe
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig
from trainer.moe.losses import Denominators, objective

pytestmark = pytest.mark.slow

EXPERTS, WIDTH, HIDDEN, ROWS, SEQ_LEN = 4, 16, 12, 3, 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Convention:
    """The options of `deepspeed.moe.layer.MoE`, and ours that say the same."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    dropped: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.theirs.items())


CONVENTIONS = [
    Convention(
        {"k": 1, "drop_tokens": False, "use_rts": False},
        {"router": {"kind": "top_k", "top_k": 1, "normalize": False}},
    ),
    Convention(
        {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False},
        {"router": {"kind": "top_k", "top_k": 2}, "balance": {"coef": 1.0, "convention": "gshard_first_choice"}},
    ),
    Convention(
        {"k": 2, "capacity_factor": 0.8, "min_capacity": 1, "top2_2nd_expert_sampling": False},
        {
            "router": {"kind": "top_k", "top_k": 2},
            "balance": {"coef": 1.0, "convention": "gshard_first_choice"},
            "capacity": {
                "factor": 0.8,
                "min": 1,
                "scope": "rank",
                "policy": "choice_major",
                "renormalize_after_drop": True,
            },
        },
        dropped=True,
    ),
    Convention({"k": 3, "drop_tokens": False}, {"router": {"kind": "top_k", "top_k": 3}}),
]


class TheirExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(WIDTH, 2 * HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)


def _weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"gate": (EXPERTS, WIDTH), "w_in": (EXPERTS, 2 * HIDDEN, WIDTH), "w_out": (EXPERTS, WIDTH, HIDDEN)}
    return {name: torch.randn(shape, generator=draw) * 0.5 for name, shape in shapes.items()}


def _x(rank: int) -> tuple[Tensor, Tensor]:
    """What goes in on a rank, and what the gradient of its output is."""
    draw = torch.Generator().manual_seed(10 + rank)
    x, cotangent = (torch.randn(ROWS, SEQ_LEN, WIDTH, generator=draw) for _ in range(2))
    return x.requires_grad_(), cotangent


def _theirs(convention: Convention, mesh: Mesh) -> dict[str, Tensor]:
    join(load_deepspeed(CPU), mesh, CPU)
    from deepspeed.moe.layer import MoE

    ep_size, weights = mesh.layout.ep_size, _weights()
    layer: Any = MoE(WIDTH, TheirExpert(), EXPERTS, ep_size, **convention.theirs)
    layer.set_deepspeed_parallelism()
    first = mesh.layout.ep_rank * (EXPERTS // ep_size)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(weights["gate"])
        for i, expert in enumerate(experts):
            expert.w_in.weight.copy_(weights["w_in"][first + i])
            expert.w_out.weight.copy_(weights["w_out"][first + i])
    x, cotangent = _x(mesh.layout.rank)
    out, balance, counts = layer(x)
    ((out * cotangent).sum() + balance).backward()
    return {
        "out": out.detach(),
        "balance": balance.detach(),
        "counts": counts,
        "x": _grad(x),
        "gate": _grad(layer.deepspeed_moe.gate.wg.weight),
        "w_in": torch.stack([_grad(expert.w_in.weight) for expert in experts]),
        "w_out": torch.stack([_grad(expert.w_out.weight) for expert in experts]),
    }


def _ours(convention: Convention, mesh: Mesh) -> dict[str, Tensor]:
    section = {"num_experts": EXPERTS, "d_ff": HIDDEN, "z_loss_coef": 0.0, "balance": {"coef": 1.0}, **convention.ours}
    config, weights, ep_size = tiny_model_config(section), _weights(), mesh.layout.ep_size
    layer = build_moe(config, 0, "loop")
    layer.dispatcher = AllToAllDispatcherConfig().build(mesh, EXPERTS)
    share = EXPERTS // ep_size
    first = mesh.layout.ep_rank * share
    if ep_size > 1:
        layer.experts.keep(range(first, first + share))
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights["gate"])  # type: ignore[union-attr]
        layer.experts.w_in.copy_(weights["w_in"][first : first + share])
        layer.experts.w_out.copy_(weights["w_out"][first : first + share])
    x, cotangent = _x(mesh.layout.rank)
    out, stats = layer(x, make_context(ROWS, SEQ_LEN))
    tokens = Denominators(target_tokens=1, routed_tokens=ROWS * SEQ_LEN)
    assert config.moe is not None
    losses = config.moe.aux_losses
    share_ = objective(torch.zeros(()), [stats], global_stats=None, denominators=tokens, losses=losses)
    ((out * cotangent).sum() + share_.total).backward()
    assert bool(stats.dropped.sum() > 0) == convention.dropped
    return {
        "out": out.detach(),
        "balance": share_.total.detach(),
        "counts": stats.counts.sum(0),
        "x": _grad(x),
        "gate": _grad(layer.router.gate.weight),  # type: ignore[union-attr]
        "w_in": _grad(layer.experts.w_in),
        "w_out": _grad(layer.experts.w_out),
    }


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _both(convention: Convention, ep_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = mesh_here(ep_size=ep_size) if ep_size > 1 else Mesh.of_one()
    with single_process_group(mesh, CPU):
        return _theirs(convention, mesh), _ours(convention, mesh)


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
def test_the_layers_agree(ranks: Ranks, convention: Convention, ep_size: int) -> None:
    for theirs, ours in ranks.run(ep_size, _both, convention, ep_size):
        assert torch.equal(theirs["counts"], ours["counts"])
        for name in ("out", "balance", "x", "gate", "w_in", "w_out"):
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
