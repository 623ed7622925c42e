"""The kernel canary: the project's kernels pass, and each fault that kernels of others had is caught and named."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.registries import KERNELS
from trainer.ops.activations import ACTIVATIONS, Activation, ClampedSwiGLU
from trainer.ops.expert_ffn import ExpertBiases, reference_ffn
from trainer.ops.kernel_canary import GROUPS, NO_ROWS, ONE_TAKES_ALL, far_rows_fault, kernel_fault
from trainer.ops.kernels import ExpertsKernel, run_experts
from trainer.ops.layer_widths import AdapterWidths, LayerWidths
from trainer.ops.low_rank import ExpertAdapters, LowRank

CPU = torch.device("cpu")
PLUGIN = "trainer.ops.expert_ffn:loop_ffn"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def widths(dtype: torch.dtype = torch.float32, activation: Activation = "swiglu", d_model: int = 64) -> LayerWidths:
    return LayerWidths(d_model=d_model, d_ff=96, activation=activation, dtype=dtype)


class _Planted(torch.autograd.Function):
    """The oracle, with a fault in its outputs or its gradients."""

    @staticmethod
    def forward(ctx: Any, fault: "Fault", activation: Activation, index: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(index, *inputs)
        ctx.fault, ctx.activation = fault, activation
        x, weight, w_in, w_out = inputs
        y = reference_ffn(x, index, weight, w_in, w_out, activation)
        return fault(index, list(inputs), [y, None, None, None, None])[0]

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, *saved = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in saved]
        with torch.enable_grad():
            x, weight, w_in, w_out = inputs
            y = reference_ffn(x, index, weight, w_in, w_out, ctx.activation)
        grads = list(torch.autograd.grad(y, inputs, grad))
        GRAD["y"] = grad
        return (None, None, None, *ctx.fault(index, inputs, [None, *grads])[1:])


GRAD: dict[str, Tensor] = {}
"""Gradient of the outputs in the backward pass in progress."""
Fault = Callable[[Tensor, list[Tensor], list[Any]], list[Any]]
"""(expert_index, inputs, [y, then the gradients of the inputs]) -> the same list, in which each may be None."""


def rows_of(index: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(index.flatten(), minlength=num_experts + 1)[:num_experts]


def slots_of(index: Tensor, expert: int) -> list[tuple[int, int]]:
    """Return token and slot of an expert's rows, in order."""
    return [(t, s) for t, s in (index == expert).nonzero().tolist()]


def empty_groups_have_gradients(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """pytorch#172439: on Blackwell an expert without rows got a gradient."""
    if results[3] is not None:
        results[3][rows_of(index, len(results[3])) == 0] += 1e-6
    return results


def empty_groups_are_not_written(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """pytorch#154557: only the gradients of experts with rows are written."""
    if results[4] is not None:
        busy, whole = rows_of(index, len(results[4])) > 0, results[4]
        results[4] = torch.empty_like(whole)
        results[4][busy] = whole[busy]
    return results


def empty_rows_are_not_written(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """transformers#48205: tokens without an expert got what was in memory."""
    if results[0] is not None:
        has_expert, whole = (index < len(inputs[2])).any(1), results[0]
        results[0] = torch.empty_like(whole)
        results[0][has_expert] = whole[has_expert]
    return results


def only_multiples_of_64(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """marin#8339: weight gradients of groups beyond 64 rows miss the rows after the last multiple of 64."""
    if results[3] is None:
        return results
    x, weight, w_in, w_out = inputs
    lost = torch.full_like(index, len(w_in))  # only the rows that get lost
    for expert, count in enumerate(rows_of(index, len(w_in)).tolist()):
        for token, slot in slots_of(index, expert)[count // 64 * 64 :] if count > 64 else []:
            lost[token, slot] = expert
    with torch.enable_grad():
        product = (reference_ffn(x, lost, weight, w_in, w_out, "swiglu") * GRAD["y"]).sum()
    results[3] = results[3] - torch.autograd.grad(product, w_in)[0]
    return results


def offsets_overflow(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """flashinfer#3792, with 8 bits instead of 32: rows after the 127th of an expert are lost."""
    if results[0] is not None:
        for expert in range(len(inputs[2])):
            for token, _ in slots_of(index, expert)[127:]:
                results[0][token] = 0
    return results


def combine_weights_have_no_gradient(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """Automodel#2995: the router is detached."""
    results[2] = None
    return results


def combine_weight_of_another_slot(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """transformers#48687: the loss is right, and the router's gradient is that of another row."""
    if results[2] is not None:
        used = index < len(inputs[2])
        results[2][used] = results[2][used].roll(1)
    return results


def last_rows_are_dropped(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
    """The gradient of x misses the last row of each group."""
    if results[1] is not None:
        for expert in range(len(inputs[2])):
            for token, _ in slots_of(index, expert)[-1:]:
                results[1][token] = 0
    return results


class StaleBuffer:
    """mori#675: on a replay the payload is not moved."""

    def __init__(self) -> None:
        self.kept: dict[torch.Size, Tensor] = {}

    def __call__(self, index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
        if results[0] is not None:
            results[0] = self.kept.setdefault(results[0].shape, results[0])
        return results


def planted(fault: Fault) -> Any:
    def run(x: Tensor, index: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation) -> Tensor:
        return _Planted.apply(fault, activation, index, x, weight, w_in, w_out)

    return run


FAULTS = [
    (empty_groups_have_gradients, GROUPS.name, "the gradient of w_in of expert 0 is not 0"),
    (empty_groups_are_not_written, GROUPS.name, "the gradient of w_out of expert 0 is not finite"),
    (empty_rows_are_not_written, GROUPS.name, "the output of token"),
    (only_multiples_of_64, GROUPS.name, "the gradient of w_in of expert 4 is off by"),
    (offsets_overflow, ONE_TAKES_ALL.name, "the output of token"),
    (combine_weights_have_no_gradient, GROUPS.name, "the gradient of the combine weights is off by 1 of its size"),
    (combine_weight_of_another_slot, GROUPS.name, "the gradient of the combine weights is off by"),
    (last_rows_are_dropped, GROUPS.name, "the gradient of x of token"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fault", "case", "what"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_planted_fault_is_caught_and_named(fault: Fault, case: str, what: str, dtype: torch.dtype) -> None:
    found = kernel_fault(planted(fault), widths(dtype), CPU)
    assert found is not None and found.startswith(f"{case}: {what}"), found


def test_a_buffer_that_is_not_filled_again_is_caught_by_the_second_call() -> None:
    found = kernel_fault(planted(StaleBuffer()), widths(), CPU)
    assert found is not None and found.startswith(f"{GROUPS.name}: the output of token"), found


def test_the_oracle_without_a_fault_passes() -> None:
    assert kernel_fault(planted(lambda index, inputs, results: results), widths(), CPU) is None


def test_a_kernel_that_raises_is_refused_with_its_message() -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    found = kernel_fault(broken, widths(), CPU)
    assert found == f"{GROUPS.name}: RuntimeError: no kernel image is available for execution on the device"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("d_model", [16, 64, 1040])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [*KERNELS, PLUGIN])
def test_kernels_of_this_project_pass(kernel: Any, dtype: torch.dtype, activation: Activation, d_model: int) -> None:
    if kernel in ("grouped", "triton") and dtype is torch.float64:
        pytest.skip(f"{kernel} does not support float64")
    assert kernel_fault(partial(run_experts, kernel), widths(dtype, activation, d_model), CPU) is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["gelu", ClampedSwiGLU()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_so_do_they_with_biases(kernel: Any, dtype: torch.dtype, activation: Activation, recompute: bool) -> None:
    given = replace(widths(dtype, activation), has_bias=True)
    assert kernel_fault(partial(run_experts, kernel, recompute=recompute), given, CPU) is None


@pytest.mark.parametrize(("place", "name"), [(0, "w_in"), (1, "w_out")])
def test_a_bias_without_its_gradient_is_caught(place: int, name: str) -> None:
    def run(*args: Any, biases: ExpertBiases) -> Tensor:
        pair = [biases.w_in, biases.w_out]
        pair[place] = pair[place].detach()
        return reference_ffn(*args, biases=ExpertBiases(*pair))

    found = kernel_fault(run, replace(widths(), has_bias=True), CPU)
    assert f"the gradient of the bias of {name} of expert" in (found or "")


LOW = AdapterWidths(rank=3, scale=2.0, of_w_in=True, of_w_out=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_so_do_they_with_adapters_of_frozen_weights(kernel: Any, dtype: torch.dtype) -> None:
    for adapters in (LOW, replace(LOW, of_w_in=False), replace(LOW, of_w_out=False, rank=330, scale=100.0)):
        given = replace(widths(dtype), has_bias=True, adapters=adapters, is_frozen=True)
        assert kernel_fault(partial(run_experts, kernel), given, CPU) is None


@pytest.mark.parametrize("place", range(4))
def test_an_adapter_without_a_gradient_is_caught(place: int) -> None:
    def run(*args: Any, adapters: ExpertAdapters) -> Tensor:
        assert adapters.w_in is not None and adapters.w_out is not None
        factors = [*adapters.w_in[:2], *adapters.w_out[:2]]
        factors[place] = factors[place].detach()
        pairs = (LowRank(factors[0], factors[1], LOW.scale), LowRank(factors[2], factors[3], LOW.scale))
        return run_experts("loop", *args, adapters=ExpertAdapters(*pairs))

    found = kernel_fault(run, replace(widths(), adapters=LOW), CPU)
    name = f"{'AB'[place % 2]} of {('w_in', 'w_out')[place // 2]}"
    assert f"the gradient of the LoRA factor {name} of expert" in (found or "")


def test_a_gradient_of_frozen_weights_is_not_expected() -> None:
    found = kernel_fault(planted(lambda index, inputs, results: results), replace(widths(), is_frozen=True), CPU)
    assert found is None


@pytest.mark.parametrize("kernel", ["loop", "grouped", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_rows_are_compared_without_an_oracle_of_all(kernel: ExpertsKernel, dtype: torch.dtype) -> None:
    run = partial(run_experts, kernel)
    assert far_rows_fault(run, widths(dtype), CPU, num_elements=1 << 18) is None
    assert far_rows_fault(run, widths(dtype, "gelu"), CPU, num_elements=1 << 18) is None


@pytest.mark.parametrize("position", [0, 1])
def test_an_index_that_overflows_is_caught(position: int) -> None:
    def wraps(index: Tensor, inputs: list[Tensor], results: list[Any]) -> list[Any]:
        """Write elements from 2^18 on over those from 0."""
        if results[position] is not None:
            far = results[position].flatten()[1 << 18 :].clone()
            results[position].view(-1)[: len(far)] = far
        return results

    found = far_rows_fault(planted(wraps), widths(), CPU, num_elements=1 << 18)
    what = ("the output", "the gradient of x")[position]
    assert found is not None and found.startswith(f"one expert takes 577 rows of 512 (its ends): {what} of token"), (
        found
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_kernel_passes_at_widths_where_a_norm_can_cancel(dtype: torch.dtype) -> None:
    run = partial(run_experts, "loop")
    for d_model in range(1, 6):
        for d_ff in range(1, 4):
            tiny = LayerWidths(d_model=d_model, d_ff=d_ff, activation="swiglu", dtype=dtype)
            assert kernel_fault(run, tiny, CPU) is None


def test_narrowed_widths_stay_as_aligned_as_those_of_the_run() -> None:
    for width in (1, 8, 176, 319, 320, 2048, 1408, 14336, 5000):
        narrow = widths(d_model=width).narrowed().d_model
        assert narrow % 64 == width % 64
        assert narrow == (width + 64 if width < 16 else width if width < 320 else 256 + width % 64)


def test_groups_have_the_sizes_that_they_name() -> None:
    for groups in (GROUPS, ONE_TAKES_ALL, NO_ROWS):
        index = groups.expert_index(torch.Generator().manual_seed(0))
        assert tuple(rows_of(index, len(groups.rows)).tolist()) == groups.rows
        assert (index == len(groups.rows)).any(), "some slots are empty"
        assert (index == len(groups.rows)).all(1).any(), "some tokens have no expert"
        real = index[(index < len(groups.rows)).all(1)]
        assert groups.num_slots == 1 or (real[:, 0] != real[:, 1]).all(), "a token has different experts"
