"""The Triton kernels, in Triton's interpreter on the CPU, equal the oracle; on a GPU too where there is one.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor

from trainer import packages
from trainer.ops.activations import ACTIVATIONS, Activation, ClampedSwiGLU
from trainer.ops.expert_ffn import reference_ffn
from trainer.ops.ffn_kernel import ExpertRows, LayerWeights
from trainer.ops.kernel_canary import GROUPS, RowGroups, groups_fault, kernel_fault
from trainer.ops.kernels import choose_experts_kernel, missing_kernel, run_experts
from trainer.ops.layer_widths import LayerWidths
from trainer.ops.weighted_activation import weighted_activation

NEEDS_TRITON = pytest.mark.skipif(
    not packages.is_installed("triton"), reason="triton is not installed: pip install 'turnout[triton]'"
)
CPU = torch.device("cpu")


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret) as pool:
        yield pool


def _fault(
    groups: RowGroups, dtype: torch.dtype, activation: Activation, widths: tuple[int, int], has_bias: bool = False
) -> str | None:
    given = LayerWidths(d_model=widths[0], d_ff=widths[1], activation=activation, dtype=dtype, has_bias=has_bias)
    return groups_fault(partial(run_experts, "triton"), groups, given, CPU)


@pytest.mark.one_in(2)
@NEEDS_TRITON
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awkward_groups_are_right_forward_and_backward(
    interpreter: Executor, dtype: torch.dtype, activation: Activation
) -> None:
    """Groups of 0, 1, 7, 63 and 65 rows, in memory full of NaN; widths that are no multiple of a tile."""
    assert interpreter.submit(_fault, GROUPS, dtype, activation, (40, 72)).result() is None


@NEEDS_TRITON
@pytest.mark.parametrize("activation", ["gelu", ClampedSwiGLU(limit=1.0)])
def test_so_are_biases_and_values_beyond_a_limit(interpreter: Executor, activation: Activation) -> None:
    groups = RowGroups("groups of 0, 5 and 70 rows", (0, 5, 70), 1)
    assert interpreter.submit(_fault, groups, torch.float32, activation, (24, 40), has_bias=True).result() is None


@pytest.mark.one_in(2)
@NEEDS_TRITON
@pytest.mark.parametrize("widths", [(19, 33), (16, 64), (129, 65), (200, 8)], ids=str)
@pytest.mark.parametrize("rows", [(0, 0, 5), (130, 0, 131)], ids=str)
def test_any_widths_and_both_heights_of_a_tile(
    interpreter: Executor, rows: tuple[int, ...], widths: tuple[int, int]
) -> None:
    groups = RowGroups(f"groups of {rows}", rows, 1)
    assert interpreter.submit(_fault, groups, torch.float32, "swiglu", widths).result() is None


def _inputs(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return experts, and x, weights, w_in and w_out; x is not contiguous, and slots are empty."""
    draw = torch.Generator().manual_seed(2)
    shapes = ((6, 9), (9, 2), (3, 10, 6), (3, 6, 5))
    values = [torch.randn(shape, generator=draw) for shape in shapes]
    values[0] = values[0].to(dtype).T
    index = torch.tensor([[0, 2], [2, 0], [3, 3], [0, 3], [2, 3], [3, 2], [0, 2], [2, 0], [0, 3]])
    return index, [value.requires_grad_() for value in values]


def _results(dtype: torch.dtype, *, recompute: bool = False) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Return the output and the gradients, and the shapes of the floats that are saved."""
    index, inputs = _inputs(dtype)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, weight, w_in, w_out = inputs
        y = run_experts("triton", x, index, weight, w_in, w_out, "swiglu", recompute=recompute)
    given = {tensor.data_ptr() for tensor in inputs}
    kept = [tuple(t.shape) for t in saved if t.is_floating_point() and t.data_ptr() not in given]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)], kept


@NEEDS_TRITON
def test_gradients_are_those_of_plain_autograd_and_only_hidden_values_are_saved(interpreter: Executor) -> None:
    mine, kept = interpreter.submit(_results, torch.float32).result()
    index, inputs = _inputs(torch.float32)
    x, weight, w_in, w_out = inputs
    y = reference_ffn(x, index, weight, w_in, w_out, "swiglu")
    for one, other in zip(mine, [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    assert kept == [(int((index < 3).sum()), 10)]
    assert not mine[3][1].any() and not mine[4][1].any(), "an idle expert has zero gradients"


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_values_that_are_computed_again_have_the_same_bits(interpreter: Executor, dtype: torch.dtype) -> None:
    saved, _ = interpreter.submit(_results, dtype).result()
    again, kept = interpreter.submit(_results, dtype, recompute=True).result()
    assert kept == [] and [t.dtype for t in again] == [torch.float32, dtype, *[torch.float32] * 3]
    for one, other in zip(saved, again, strict=True):
        assert torch.equal(one, other)


def _hidden(x: Tensor, w_in: Tensor, activation: Activation) -> Tensor:
    """Return the hidden values of rows of one expert."""
    from trainer.ops.triton_ffn import TritonKernel

    token_of_row, rows_per_expert = torch.arange(len(x)), torch.tensor([len(x)])
    rows = ExpertRows(x=x, token_of_row=token_of_row, scale=torch.ones(len(x)), rows_per_expert=rows_per_expert)
    return TritonKernel(weighted_activation(activation, is_compiled=False)).hidden(
        rows, LayerWeights(w_in=w_in, w_out=w_in)
    )


@NEEDS_TRITON
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_rounded_to_the_nearest_with_ties_to_even(interpreter: Executor, activation: Activation) -> None:
    """Sums of whole numbers are exact in float32, so the bits are certain; some end in a tie."""
    draw = torch.Generator().manual_seed(1)
    x, w_in = (torch.randint(-15, 16, shape, generator=draw).bfloat16() for shape in ((9, 6), (1, 10, 6)))
    exact = x.float() @ w_in[0].float().T
    rounded = exact.bfloat16()
    assert (rounded.float().abs() > exact.abs()).any() and (rounded.float().abs() < exact.abs()).any()
    assert torch.equal(interpreter.submit(_hidden, x, w_in, activation).result(), rounded)


@NEEDS_TRITON
def test_float64_is_refused(interpreter: Executor) -> None:
    with pytest.raises(TypeError, match=r"triton computes in float32 or bfloat16, not torch\.float64; use loop"):
        interpreter.submit(_results, torch.float64).result()


@pytest.mark.gpu
@NEEDS_TRITON
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_canary_passes_on_a_gpu(dtype: torch.dtype, activation: Activation) -> None:
    widths = LayerWidths(d_model=1040, d_ff=200, activation=activation, dtype=dtype)
    assert kernel_fault(partial(run_experts, "triton"), widths, torch.device("cuda")) is None


@NEEDS_TRITON
def test_the_cpu_has_only_the_interpreter(interpreter: Executor) -> None:
    assert interpreter.submit(missing_kernel, "triton", "cpu").result() is None
    if os.environ.get("TRITON_INTERPRET") != "1":
        message = missing_kernel("triton", "cpu")
        assert message is not None and message.startswith("triton needs a GPU, and the device is cpu; use auto")
        assert missing_kernel("triton", "cuda") is None


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda package: False)
    message = "triton: needs triton, which is not installed; pip install 'turnout[triton]', or use auto"
    assert missing_kernel("triton", "cuda") == message


def test_it_is_never_chosen_by_itself() -> None:
    chosen = {
        choose_experts_kernel(device, dtype, cpu_vendor="", rows_per_expert=rows, d_model=64, d_ff=d_ff)
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for rows in (1, 10_000)
        for d_ff in (64, 63)
    }
    assert "triton" not in chosen and len(chosen) > 2
