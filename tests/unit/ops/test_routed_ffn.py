"""One node for the experts: values and gradients of plain autograd, and what it saves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.registries import KERNELS
from trainer.ops.activations import Activation, ClampedSwiGLU, hidden_width
from trainer.ops.expert_ffn import ExpertBiases, reference_ffn
from trainer.ops.kernels import ExpertsKernel, run_experts

N, K, E, D, F = 40, 3, 5, 16, 24
PLUGIN: Any = "trainer.ops.expert_ffn:loop_ffn"
CLAMPED = ClampedSwiGLU(alpha=1.5, limit=0.6)  # which many hidden values exceed


def _inputs(
    activation: Activation, dtype: torch.dtype = torch.float64, *, has_bias: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return experts of the tokens, and x, weights, w_in, w_out and biases; expert 2 is idle, some slots are empty."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(E + 1, generator=generator)[:K] for _ in range(N)])
    index[:5], index[index == 2] = E, E
    width = hidden_width(F, activation)
    shapes = [(N, D), (N, K), (E, width, D), (E, D, F), *([(E, width), (E, D)] if has_bias else [])]
    wide = torch.promote_types(dtype, torch.float32)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(wide) * 0.5 for shape in shapes]
    return index, [values[0].to(dtype).requires_grad_(), *(v.requires_grad_() for v in values[1:])]


def _run(
    kernel: ExpertsKernel,
    index: Tensor,
    inputs: list[Tensor],
    activation: Activation = "swiglu",
    *,
    num_rows: int | None = None,
    recompute: bool = False,
) -> Tensor:
    x, weight, w_in, w_out, *biases = inputs
    return run_experts(
        kernel,
        x,
        index,
        weight,
        w_in,
        w_out,
        activation,
        biases=ExpertBiases(*biases) if biases else None,
        num_rows=num_rows,
        recompute=recompute,
    )


def _oracle(index: Tensor, inputs: list[Tensor], activation: Activation = "swiglu") -> Tensor:
    x, weight, w_in, w_out, *biases = inputs
    return reference_ffn(x, index, weight, w_in, w_out, activation, ExpertBiases(*biases) if biases else None)


def _gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), inputs)]


def _compare(kernel: ExpertsKernel, is_counted: bool, activation: Activation, *, has_bias: bool) -> list[Tensor]:
    index, inputs = _inputs(activation, has_bias=has_bias)
    num_rows = None if is_counted else int((index < E).sum())
    mine = _gradients(_run(kernel, index, inputs, activation, num_rows=num_rows), inputs)
    oracle = _gradients(_oracle(index, inputs, activation), inputs)
    for one, other in zip(mine, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * max(1.0, float(other.abs().max())))
    assert not any(gradient[2].any() for gradient in mine[3:]), "an idle expert has zero gradients"
    return mine


@pytest.mark.parametrize("activation", ["swiglu", "gelu", CLAMPED])
@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize("kernel", ["loop", "padded", "fused", PLUGIN])
def test_values_and_gradients_are_those_of_plain_autograd(
    kernel: ExpertsKernel, is_counted: bool, activation: Activation
) -> None:
    _compare(kernel, is_counted, activation, has_bias=False)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", CLAMPED])
@pytest.mark.parametrize("kernel", ["loop", "padded", "fused"])
def test_so_are_those_of_experts_with_biases(kernel: ExpertsKernel, activation: Activation) -> None:
    gradients = _compare(kernel, True, activation, has_bias=True)
    assert all(gradient[0].any() for gradient in gradients[5:]) and len(gradients) == 7


def test_biases_are_counted_once_for_each_expert_that_is_chosen_twice() -> None:
    """As a router of somebody's own may; the oracle does not care how often it sees an expert."""
    index, inputs = _inputs("gelu", has_bias=True)
    index[:, 1] = index[:, 0]
    mine, oracle = (
        _gradients(run, inputs) for run in (_run("loop", index, inputs, "gelu"), _oracle(index, inputs, "gelu"))
    )
    for one, other in zip(mine, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("kernel", [PLUGIN, "sonicmoe", "scattermoe"])
def test_kernels_that_have_no_biases_refuse_them(kernel: ExpertsKernel) -> None:
    index, inputs = _inputs("swiglu", has_bias=True)
    with pytest.raises(TypeError, match=f"kernel {kernel} has no biases; use a built-in one, such as loop"):
        _run(kernel, index, inputs)


@pytest.mark.parametrize("activation", ["swiglu", CLAMPED])
@pytest.mark.parametrize("kernel", KERNELS)
def test_in_bfloat16_the_masters_get_float32_gradients(kernel: ExpertsKernel, activation: Activation) -> None:
    index, inputs = _inputs(activation, torch.bfloat16, has_bias=activation is CLAMPED)
    y = _run(kernel, index, inputs, activation)
    mine = _gradients(y, inputs)
    oracle = _gradients(_oracle(index, inputs, activation), inputs)
    assert [g.dtype for g in mine] == [torch.float32, torch.bfloat16, *[torch.float32] * (len(mine) - 2)]
    for one, other in zip(mine, oracle, strict=True):  # 8 bits, and sums of some 30 rounded terms
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_values_that_are_computed_again_have_the_same_bits(kernel: ExpertsKernel, dtype: torch.dtype) -> None:
    index, inputs = _inputs("swiglu", dtype, has_bias=True)
    saved, again = (_gradients(_run(kernel, index, inputs, recompute=recompute), inputs) for recompute in (False, True))
    for one, other in zip(saved, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_only_tokens_and_hidden_values_are_saved(kernel: ExpertsKernel, recompute: bool, has_bias: bool) -> None:
    index, inputs = _inputs("swiglu", torch.float32, has_bias=has_bias)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _run(kernel, index, inputs, recompute=recompute)
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    floats = [t for pointer, t in saved.items() if pointer not in given and t.is_floating_point()]
    num_rows = int((index < E).sum())
    num_rows += 63 if kernel == "fused_onednn" else 0  # beyond the last group
    assert [tuple(t.shape) for t in floats] == ([] if recompute else [(num_rows, 2 * F)])
    numbers = [t for pointer, t in saved.items() if pointer not in given and not t.is_floating_point()]
    assert sum(t.untyped_storage().nbytes() for t in numbers) <= 4 * N * K + 8 * (E + 1)


def test_one_expert_for_each_token_keeps_the_dtype_of_tokens() -> None:
    """Nothing is summed, so that rows come back from other ranks as narrow as they were sent."""
    index, inputs = _inputs("swiglu", torch.bfloat16)
    y = _run("grouped", index[:, :1], [inputs[0], inputs[1][:, :1], *inputs[2:]])
    assert y.dtype is torch.bfloat16
