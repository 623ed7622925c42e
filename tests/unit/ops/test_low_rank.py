"""Low-rank additions to the experts' weights: values and gradients of W + s B A, and what frozen weights cost."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.registries import KERNELS
from trainer.ops.expert_ffn import ExpertBiases, reference_ffn
from trainer.ops.kernels import ExpertsKernel, run_experts
from trainer.ops.lora_kernels import LORA_KERNELS
from trainer.ops.low_rank import ExpertAdapters, LowRank

N, K, E, D, F, RANK, SCALE = 40, 3, 5, 16, 24, 3, 0.7
BOTH, FIRST, SECOND = (True, True), (True, False), (False, True)


class _Layer(NamedTuple):
    index: Tensor
    """(N, K); expert 2 is idle, some slots are empty."""
    inputs: list[Tensor]
    """x, weights, w_in, w_out, biases."""
    factors: list[Tensor]
    """A and B of w_in and of w_out."""


def _layer(dtype: torch.dtype = torch.float64, *, frozen: bool = False) -> _Layer:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(E + 1, generator=generator)[:K] for _ in range(N)])
    index[:5], index[index == 2] = E, E
    shapes = [(N, D), (N, K), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D)]
    shapes += [(E, RANK, D), (E, 2 * F, RANK), (E, RANK, F), (E, D, RANK)]
    wide = torch.promote_types(dtype, torch.float32)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(wide) * 0.5 for shape in shapes]
    values[0] = values[0].to(dtype)
    for i, value in enumerate(values):
        value.requires_grad_(not (frozen and 2 <= i < 6))
    return _Layer(index, values[:6], values[6:])


def _adapters(factors: list[Tensor], which: tuple[bool, bool]) -> ExpertAdapters:
    a_in, b_in, a_out, b_out = factors
    given = LowRank(a_in, b_in, SCALE), LowRank(a_out, b_out, SCALE)
    return ExpertAdapters(*(low if has else None for low, has in zip(given, which, strict=True)))


def _run(layer: _Layer, kernel: ExpertsKernel, which: tuple[bool, bool] = BOTH, **options: Any) -> Tensor:
    x, weight, w_in, w_out, *biases = layer.inputs
    adapters = _adapters(layer.factors, which)
    given: dict[str, Any] = {"biases": ExpertBiases(*biases), "adapters": adapters, **options}
    return run_experts(kernel, x, layer.index, weight, w_in, w_out, "swiglu", **given)


def _composed(layer: _Layer, which: tuple[bool, bool] = BOTH) -> Tensor:
    """Compute with W + s B A in plain autograd."""
    x, weight, w_in, w_out, *biases = layer.inputs
    a_in, b_in, a_out, b_out = layer.factors
    w_in = w_in + SCALE * b_in @ a_in if which[0] else w_in
    w_out = w_out + SCALE * b_out @ a_out if which[1] else w_out
    return reference_ffn(x, layer.index, weight, w_in, w_out, "swiglu", ExpertBiases(*biases))


def _results(y: Tensor, layer: _Layer) -> list[Tensor]:
    tensors = [tensor for tensor in (*layer.inputs, *layer.factors) if tensor.requires_grad]
    grads = torch.autograd.grad(y.double().square().sum(), tensors, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True))]


def _compare(mine: list[Tensor], oracle: list[Tensor], tolerance: float) -> None:
    for one, other in zip(mine, oracle, strict=True):
        atol = tolerance * max(1e-3, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("which", [BOTH, FIRST, SECOND])
@pytest.mark.parametrize("kernel", ["loop", "padded", "fused"])
def test_values_and_gradients_are_those_of_the_sum_of_both_matrices(
    kernel: ExpertsKernel, which: tuple[bool, bool]
) -> None:
    layer = _layer()
    for options in ({}, {"recompute": True}, {"num_rows": int((layer.index < E).sum())}):
        mine = _results(_run(layer, kernel, which, **options), layer)
        _compare(mine, _results(_composed(layer, which), layer), 1e-12)
        assert not any(gradient[2].any() for gradient in mine[3:]), "an idle expert has zero gradients"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_so_they_are_in_narrow_formats(kernel: ExpertsKernel, dtype: torch.dtype, tolerance: float) -> None:
    """Also of a rank, 3, that no grouped product takes."""
    layer = _layer(dtype)
    mine = _results(_run(layer, kernel), layer)
    assert [g.dtype for g in mine[1:]] == [t.dtype for t in (*layer.inputs, *layer.factors)]
    exact = _Layer(layer.index, *([t.detach().double().requires_grad_() for t in part] for part in layer[1:]))
    _compare(mine, _results(_composed(exact), exact), tolerance)
    again = _results(_run(layer, kernel, recompute=True), layer)
    assert all(torch.equal(one, other) for one, other in zip(mine, again, strict=True))


class _LargeResults(TorchDispatchMode):
    """Counts results of the sizes of both weights."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += isinstance(out, Tensor) and out.shape in ((E, 2 * F, D), (E, D, F)) and not out._is_view()
        return out


@pytest.mark.parametrize("kernel", LORA_KERNELS)
def test_frozen_weights_get_no_gradient_and_no_tensor_of_their_size_is_made(kernel: ExpertsKernel) -> None:
    """So no sum W + s B A is there, and no gradient of a frozen weight; other gradients keep their bits."""
    frozen, whole = _layer(torch.float32, frozen=True), _layer(torch.float32)
    with _LargeResults() as of_frozen:
        mine = _results(_run(frozen, kernel), frozen)
    with _LargeResults() as of_whole:
        others = _results(_run(whole, kernel), whole)
    assert of_frozen.found == 0 < of_whole.found
    kept = [*others[:3], *others[-4:]]
    assert all(torch.equal(one, other) for one, other in zip(mine, kept, strict=True))


def test_no_rows_give_zeros() -> None:
    layer = _layer()
    layer.index.fill_(E)
    assert not any(result.any() for result in _results(_run(layer, "loop"), layer))


@pytest.mark.parametrize("kernel", ["triton", "mxfp8", "sonicmoe", "scattermoe", "trainer.ops.expert_ffn:loop_ffn"])
def test_other_kernels_refuse_them(kernel: Any) -> None:
    layer = _layer()
    x, weight, w_in, w_out, *_ = layer.inputs
    adapters = _adapters(layer.factors, BOTH)
    with pytest.raises(TypeError, match=f"kernel {kernel} has no LoRA; use one of loop, padded"):
        run_experts(kernel, x, layer.index, weight, w_in, w_out, "swiglu", adapters=adapters)
