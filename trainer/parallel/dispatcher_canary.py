"""The dispatcher canary: a tiny layer through a dispatcher, on its own ranks, against all experts in one process.

Each rank draws the tokens of all ranks of its group, so that it can compute the oracle by itself: outputs and gradients
of its own tokens by all experts, and gradients of its own experts from all tokens. The layer runs twice with other
values, since a backend may move the first payload only (mori#675).

# T tokens of a rank, k experts per token, G ranks of the group, N = G * T, E experts, D d_model, F d_ff.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.errors import CommError, first_line
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.routing import RoutingDecision
from trainer.ops.expert_ffn import reference_ffn
from trainer.ops.oracle_difference import LayerResult, first_difference, layer_result, rounding_tolerance
from trainer.ops.poisoned_memory import poisoned_memory

_T, _D, _F = 8, 16, 8
_MOST_SLOTS = 2
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDtypes:
    """Dtypes of a layer's rows."""

    compute: torch.dtype
    """Dtype of the experts' products."""
    wire: torch.dtype
    """Dtype of the rows that are sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Tokens of all ranks, with values that the wire can represent."""

    x: Tensor
    """(N, D)."""
    expert_index: Tensor
    """(N, k)."""
    weight: Tensor
    """(N, k)."""
    kept: Tensor
    """(N, k) bool."""
    grad: Tensor
    """(N, D)."""
    w_in: Tensor
    """(E, 2 F, D)."""
    w_out: Tensor
    """(E, D, F)."""


def dispatcher_fault(
    dispatcher: Dispatcher, mesh: Mesh, num_experts: int, dtypes: RowDtypes, device: torch.device
) -> str | None:
    """Return what a dispatcher does wrong on this rank; None if nothing. Collective.

    Every rank makes the same calls whatever it finds, so that none waits for another.
    """
    faults = [_round_fault(dispatcher, mesh, num_experts, dtypes, device, number) for number in range(_ROUNDS)]
    return next((fault for fault in faults if fault is not None), None)


def _round_fault(
    dispatcher: Dispatcher, mesh: Mesh, num_experts: int, dtypes: RowDtypes, device: torch.device, number: int
) -> str | None:
    tokens = _tokens(mesh.ep.size, num_experts, dtypes, number)
    own = slice(mesh.ep.index * _T, (mesh.ep.index + 1) * _T)
    experts = slice(*even_slice(num_experts, mesh.ep.size, mesh.ep.index))
    try:
        with poisoned_memory([], [], device):  # a buffer that receives nothing is NaN
            found = _dispatched(dispatcher, tokens, own, experts, dtypes, device)
    except CommError:
        raise
    except Exception as error:
        return f"pass {number + 1}: {type(error).__name__}: {first_line(error)}"
    oracle = _oracle(tokens)
    expected = LayerResult(
        oracle.y[own],
        oracle.x_grad[own],
        oracle.weight_grad[own],
        oracle.w_in_grad[experts],
        oracle.w_out_grad[experts],
    )
    fault = first_difference(found, expected, rounding_tolerance(dtypes.wire, max(_D, 2 * _F, len(tokens.x))))
    return None if fault is None else f"pass {number + 1}: {fault}"


def _tokens(num_ranks: int, num_experts: int, dtypes: RowDtypes, number: int) -> _Tokens:
    """Draw the tokens of all ranks: the last of each is padding, and after the first round some choices are dropped."""
    generator = torch.Generator().manual_seed(number)
    wide = torch.promote_types(dtypes.compute, torch.float32)
    num_tokens, num_slots = num_ranks * _T, min(_MOST_SLOTS, num_experts)

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=wide) * scale).to(dtypes.wire).to(wide)

    scores = torch.rand(num_tokens, num_experts, generator=generator)
    kept = (torch.arange(num_tokens) % _T < _T - 1)[:, None].repeat(1, num_slots)
    if number:
        kept &= torch.rand(num_tokens, num_slots, generator=generator) < 0.75
    return _Tokens(
        x=values(num_tokens, _D),
        expert_index=scores.topk(num_slots).indices,
        weight=torch.rand(num_tokens, num_slots, generator=generator, dtype=wide) + 0.25,
        kept=kept,
        grad=values(num_tokens, _D),
        w_in=values(num_experts, 2 * _F, _D, scale=_D**-0.5),
        w_out=values(num_experts, _D, _F, scale=_F**-0.5),
    )


def _dispatched(
    dispatcher: Dispatcher, tokens: _Tokens, own: slice, experts: slice, dtypes: RowDtypes, device: torch.device
) -> LayerResult:
    """Send this rank's tokens through the dispatcher to the experts; those here compute in the oracle's way."""
    given = (tokens.x[own], tokens.weight[own], tokens.w_in[experts], tokens.w_out[experts])
    inputs = [tensor.to(device).detach().requires_grad_() for tensor in given]
    x, weight, w_in, w_out = inputs

    def run_local(
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        *,
        num_rows: int | None = None,
        part: tuple[int, int] | None = None,
    ) -> Tensor:
        mine = slice(*(part or (0, len(w_in))))
        there = int((expert_index < len(w_in[mine])).sum())
        if num_rows not in (None, there):
            raise ValueError(f"num_rows is {num_rows}, and {there} experts are there")
        with torch.autocast(device.type, enabled=False):
            y = reference_ffn(x.to(w_in.dtype), expert_index, weight, w_in[mine], w_out[mine], "swiglu")
        return y.to(x.dtype)

    is_narrow = dtypes.compute is torch.bfloat16
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=is_narrow):
        decision = _decision(tokens, own, weight, device)
        y = dispatcher.forward(x, decision, run_local)
    return layer_result(y, tokens.grad[own].to(device), inputs)


def _decision(tokens: _Tokens, own: slice, weight: Tensor, device: torch.device) -> RoutingDecision:
    """Return the decision of this rank; any expert has room for all its tokens."""
    kept = tokens.kept[own]
    decision = RoutingDecision.from_top_k(
        tokens.expert_index[own].to(device),
        weight,
        num_experts=len(tokens.w_in),
        valid=torch.ones(_T, dtype=torch.bool, device=device),
    )
    num_rows = int(kept.sum())
    is_known = num_rows == (_T - 1) * kept.shape[1]  # nothing was dropped
    return replace(decision, kept=kept.reshape(-1).to(device), capacity=_T, num_rows=num_rows if is_known else None)


def _oracle(tokens: _Tokens) -> LayerResult:
    """Compute all tokens with all experts on the host, in float64."""
    given = (tokens.x, tokens.weight, tokens.w_in, tokens.w_out)
    inputs = [tensor.double().detach().requires_grad_() for tensor in given]
    x, weight, w_in, w_out = inputs
    index = torch.where(tokens.kept, tokens.expert_index, len(w_in))
    with torch.enable_grad():
        y = reference_ffn(x, index, weight, w_in, w_out, "swiglu")
    return layer_result(y, tokens.grad.double(), inputs)
