"""The kernel canary: an experts kernel against the oracle, on the cases in which kernels of others have been wrong.

Groups without rows, for which kernels returned non-zero or uninitialized gradients of weights (pytorch#172439,
transformers#48205); sizes that are no multiple of 64 (marin#8339); one expert that takes all rows, and more than 2^31
elements, where indices overflow (flashinfer#3792); buffers that are not filled again (mori#675): every case has values
of its own, and the first runs twice.

# N tokens, k slots per token, R rows, E experts, D d_model, F d_ff, H width before the activation, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.errors import first_line, is_out_of_memory
from trainer.ops.activations import hidden_width
from trainer.ops.expert_ffn import ExpertBiases, reference_ffn
from trainer.ops.layer_widths import LayerWidths
from trainer.ops.low_rank import ExpertAdapters, LowRank
from trainer.ops.oracle_difference import LayerResult, first_difference, layer_result, rounding_tolerance
from trainer.ops.poisoned_memory import poisoned_memory

LayerFunction = Callable[..., Tensor]
"""(x, expert_index, weight, w_in, w_out, activation) -> (N, D): `run_experts` of one kernel; `biases` and `adapters`,
if it has."""
_HOST = torch.device("cpu")
_FAR_WIDTH, _END = 512, 65
"""Width of the rows, and rows compared at each end, of a case with very many elements."""
_FAR_BUFFERS = 16
"""Buffers of a case with very many elements that exist at once."""


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Rows of each expert, and the slots of a token."""

    name: str
    rows: tuple[int, ...]
    num_slots: int

    def expert_index(self, generator: torch.Generator) -> Tensor:
        """Return (N, k) experts in a random order of tokens; some have an empty slot, and some no expert."""
        experts = torch.arange(len(self.rows)).repeat_interleave(torch.tensor(self.rows))
        num_tokens = sum(self.rows) // self.num_slots + 3
        padding = experts.new_full((num_tokens * self.num_slots - len(experts),), len(self.rows))
        table = torch.cat([experts, padding]).view(self.num_slots, num_tokens).T  # experts of a token differ
        table = torch.cat([table, table.new_full((2, self.num_slots), len(self.rows))])
        return table[torch.randperm(len(table), generator=generator)]


GROUPS = RowGroups("groups of 0, 1, 7, 63, 65 and 0 rows", (0, 1, 7, 63, 65, 0), 2)
ONE_TAKES_ALL = RowGroups("one expert takes all 136 rows", (0, 0, 136, 0, 0, 0), 1)
NO_ROWS = RowGroups("no rows", (0, 0, 0, 0, 0, 0), 2)
_CANARY = (GROUPS, GROUPS, ONE_TAKES_ALL, NO_ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Values that `dtype` can represent, in at least float32."""

    expert_index: Tensor
    """(N, k)."""
    inputs: Sequence[Tensor | None]
    """x (N, D), combine weights (N, k), w_in (E, H, D), w_out (E, D, F), biases (E, H) and (E, D), and the factors A
    (E, r, K) and B (E, N, r) of the additions to w_in and to w_out; None for what a layer does not have."""
    grad: Tensor
    """(N, D) gradient of the outputs."""


def kernel_fault(
    run: LayerFunction, widths: LayerWidths, device: torch.device, *, emulation: LayerFunction | None = None
) -> str | None:
    """Return what a kernel does wrong on a device: case, result, how far off and where; None if nothing.

    A kernel in a coarser format is far from the oracle. It is compared with its `emulation` on the host, which rounds
    where the kernel does; not at the ends of very many rows, since such formats round neighbouring rows together.
    """
    widths = widths.narrowed()
    for seed, groups in enumerate(_CANARY):
        if (fault := groups_fault(run, groups, widths, device, seed=seed, emulation=emulation)) is not None:
            return fault
    return far_rows_fault(run, widths, device) if device.type == "cuda" and emulation is None else None


def groups_fault(
    run: LayerFunction,
    groups: RowGroups,
    widths: LayerWidths,
    device: torch.device,
    *,
    seed: int = 0,
    emulation: LayerFunction | None = None,
) -> str | None:
    """Return what a kernel does wrong with these groups, in memory full of NaN; None if nothing."""
    generator = torch.Generator().manual_seed(seed)
    index = groups.expert_index(generator)
    sample = _sample(index, len(groups.rows), widths, generator)
    longest = max(widths.d_model, widths.hidden, sum(groups.rows))
    sizes = [sum(groups.rows) * width for width in (1, widths.d_model, widths.d_ff, widths.hidden)]
    sizes += [tensor.numel() for tensor in sample.inputs if tensor is not None]
    try:
        with poisoned_memory(sizes, [widths.dtype, sample.grad.dtype], device):
            found = _run(run, sample, widths, device)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{groups.name}: {type(error).__name__}: {first_line(error)}"
    expected = _oracle(sample, widths) if emulation is None else _run(emulation, sample, widths, _HOST)
    fault = first_difference(found, expected, rounding_tolerance(widths.dtype, longest))
    return None if fault is None else f"{groups.name}: {fault}"


def far_rows_fault(
    run: LayerFunction, widths: LayerWidths, device: torch.device, *, num_elements: int = 1 << 31
) -> str | None:
    """Return what a kernel does wrong with rows beyond `num_elements` elements; None if nothing, or if memory is short.

    One expert takes all rows. Only those at both ends have a gradient, so the oracle needs no others.
    """
    d_ff = _FAR_WIDTH // hidden_width(1, widths.activation)
    far = replace(widths, d_model=_FAR_WIDTH, d_ff=d_ff)
    needed = _FAR_BUFFERS * num_elements * widths.dtype.itemsize
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        return None
    try:
        return _far_rows_fault(run, far, device, num_elements // _FAR_WIDTH + _END)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        return f"over {num_elements} elements: {type(error).__name__}: {first_line(error)}"
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _far_rows_fault(run: LayerFunction, widths: LayerWidths, device: torch.device, num_rows: int) -> str | None:
    generator = torch.Generator().manual_seed(0)
    ends = _sample(torch.ones(2 * _END, 1, dtype=torch.int64), 3, widths, generator)
    middle = torch.ones(num_rows - 2 * _END, 1, device=device)

    def spread(x: Tensor, fill: float) -> Tensor:
        """Move the ends apart: (2 * 65, width) -> (N, width)."""
        whole = torch.full((num_rows, x.shape[1]), fill, dtype=widths.dtype, device=device)
        whole[:_END], whole[-_END:] = x[:_END].to(whole), x[_END:].to(whole)
        return whole

    x, weight, *parameters = ends.inputs
    assert x is not None and weight is not None, "every sample has both"
    weights = torch.cat([weight[:_END].to(device), middle, weight[_END:].to(device)])
    index = torch.ones(num_rows, 1, dtype=torch.int64, device=device)
    sample = _Sample(expert_index=index, inputs=(spread(x, 1.0), weights, *parameters), grad=spread(ends.grad, 0.0))
    whole = _run(run, sample, widths, device)
    y, x_grad, weight_grad = (torch.cat([each[:_END], each[-_END:]]) for each in whole[:3])
    found = LayerResult(y, x_grad, weight_grad, *whole[3:])
    fault = first_difference(found, _oracle(ends, widths), rounding_tolerance(widths.dtype, 2 * _FAR_WIDTH))
    return None if fault is None else f"one expert takes {num_rows} rows of {_FAR_WIDTH} (its ends): {fault}"


def _sample(index: Tensor, num_experts: int, widths: LayerWidths, generator: torch.Generator) -> _Sample:
    wide = torch.promote_types(widths.dtype, torch.float32)

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=wide) * scale).to(widths.dtype).to(wide)

    num_tokens, num_slots = index.shape
    weight = torch.rand(num_tokens, num_slots, generator=generator, dtype=wide) + 0.25
    w_in = values(num_experts, widths.hidden, widths.d_model, scale=widths.d_model**-0.5)
    w_out = values(num_experts, widths.d_model, widths.d_ff, scale=widths.d_ff**-0.5)
    tokens, grad = values(num_tokens, widths.d_model), values(num_tokens, widths.d_model)
    biases: list[Tensor | None] = [None, None]
    if widths.has_bias:
        biases = [values(num_experts, widths.hidden), values(num_experts, widths.d_model)]
    factors: list[Tensor | None] = []
    for i, weights in enumerate((w_in, w_out)):
        (_, rows, columns), low = weights.shape, widths.adapters
        if low is None or not low.is_of[i]:
            factors += [None, None]
        else:
            factors.append(values(num_experts, low.rank, columns, scale=columns**-0.5))
            factors.append(values(num_experts, rows, low.rank, scale=low.rank**-0.5))
    return _Sample(expert_index=index, inputs=[tokens, weight, w_in, w_out, *biases, *factors], grad=grad)


def _run(run: LayerFunction, sample: _Sample, widths: LayerWidths, device: torch.device) -> LayerResult:
    """Run a kernel as training does: under autocast in bfloat16."""
    inputs = _inputs(sample, widths, device)
    is_narrow = widths.dtype is torch.bfloat16
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=is_narrow):
        y = _apply(run, inputs, sample.expert_index.to(device), widths)
    return layer_result(y, sample.grad.to(device), inputs)


def _oracle(sample: _Sample, widths: LayerWidths) -> LayerResult:
    """Compute the oracle on the host: in float64, or in float32 for bfloat16; additions are added to the weights."""
    dtype = torch.float32 if widths.dtype is torch.bfloat16 else torch.float64
    inputs = _inputs(sample, widths, _HOST, dtype)
    with torch.enable_grad():
        x, weight, w_in, w_out, *biases = inputs[:6]
        scale = 0.0 if widths.adapters is None else widths.adapters.scale
        w_in, w_out = (
            w if a is None or b is None or w is None else w + scale * b @ a
            for w, a, b in ((w_in, *inputs[6:8]), (w_out, *inputs[8:10]))
        )
        plain = replace(widths, adapters=None)
        y = _apply(reference_ffn, [x, weight, w_in, w_out, *biases, *[None] * 4], sample.expert_index.cpu(), plain)
    return layer_result(y, sample.grad.to("cpu", dtype), inputs)


def _inputs(
    sample: _Sample, widths: LayerWidths, device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Return copies of a sample's tensors, which record gradients unless the weights are frozen."""
    copies = [None if tensor is None else tensor.to(device, dtype).detach() for tensor in sample.inputs]
    for i, copy in enumerate(copies):
        if copy is not None:
            copy.requires_grad_(not (widths.is_frozen and 2 <= i < 6))
    return copies


def _apply(run: LayerFunction, inputs: Sequence[Tensor | None], index: Tensor, widths: LayerWidths) -> Tensor:
    x, weight, w_in, w_out, b_in, b_out, *factors = inputs
    named: dict[str, Any] = {}
    if b_in is not None and b_out is not None:
        named["biases"] = ExpertBiases(b_in, b_out)
    if widths.adapters is not None:
        pairs = zip(factors[::2], factors[1::2], strict=True)
        scale = widths.adapters.scale
        named["adapters"] = ExpertAdapters(
            *(None if a is None or b is None else LowRank(a, b, scale) for a, b in pairs)
        )
    return run(x, index, weight, w_in, w_out, widths.activation, **named)
