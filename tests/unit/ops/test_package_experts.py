"""Kernels of other packages, behind doubles with their signatures, layouts and rules: numbers of the oracle."""

import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import packages
from trainer.errors import ConfigError
from trainer.ops.activations import ACTIVATIONS, Activation
from trainer.ops.expert_ffn import reference_ffn
from trainer.ops.kernel_canary import kernel_fault
from trainer.ops.kernels import choose_experts_kernel, missing_kernel, run_experts
from trainer.ops.layer_widths import LayerWidths
from trainer.ops.package_experts import PACKAGE_EXPERTS

CPU = torch.device("cpu")
PACKAGES: list[Any] = list(PACKAGE_EXPERTS)


class ActivationType(Enum):
    """As sonicmoe.enums.ActivationType."""

    SWIGLU = "swiglu"
    GELU = "gelu"


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int,
    activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """As sonicmoe 0.1.2: weights with experts outermost in memory, gate and up by turns, tokens ascending."""
    assert activation_type is ActivationType.SWIGLU and b1 is b2 is None and not concat_layout
    assert w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
    assert w1.dtype == w2.dtype == x.dtype and router_scores.dtype.itemsize >= 4
    assert token_indices.dtype == expert_indices.dtype == torch.int32 and w1.shape[2] == w2.shape[2] == E
    assert len(token_indices) == len(expert_indices) == len(router_scores) > 0
    assert (token_indices.diff() >= 0).all() and not is_inference_mode_enabled
    out = torch.zeros(x.shape, dtype=router_scores.dtype)
    for e in range(E):
        mine = expert_indices == e
        tokens = token_indices[mine].long()
        h = x[tokens] @ w1[:, :, e].T
        y = (F.silu(h[:, 0::2]) * h[:, 1::2]) @ w2[:, :, e].T
        out = out.index_add(0, tokens, y.to(out.dtype) * router_scores[mine, None])
    return out.to(x.dtype), torch.bincount(expert_indices, minlength=E)


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """As scattermoe 0.3.0: rows of a number beyond the experts' come out as zeros."""
    assert len(sorted_expert_idxs) == len(sorted_scattered_idxs) == len(inputs) * k
    assert gates is expert_biases is None and inputs.dtype == expert_weights.dtype
    assert len(expert_offsets) == len(expert_weights) and (sorted_expert_idxs.diff() >= 0).all()
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    ends = expert_offsets.tolist()
    groups = [rows[start:end] @ w for start, end, w in zip([0, *ends], ends, expert_weights)]  # noqa: B905
    out = torch.cat([*groups, rows.new_zeros(len(rows) - ends[-1], expert_weights.shape[2])])
    return out if grouped_out else torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: dict[str, dict[str, Any]] = {
        "sonicmoe": {"moe_general_routing_inputs": moe_general_routing_inputs},
        "sonicmoe.enums": {"ActivationType": ActivationType},
        "scattermoe": {},
        "scattermoe.parallel_experts": {"parallel_linear": parallel_linear},
    }
    for name, members in functions.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def _cases() -> list[tuple[Any, Activation]]:
    return [("sonicmoe", "swiglu"), *(("scattermoe", activation) for activation in ACTIVATIONS)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel", "activation"), _cases())
def test_the_canary_finds_nothing_wrong(kernel: Any, activation: Activation, dtype: torch.dtype) -> None:
    """Tokens with empty slots and without experts, experts without rows, no rows; outputs and all gradients."""
    widths = LayerWidths(d_model=24, d_ff=40, activation=activation, dtype=dtype)
    assert kernel_fault(partial(run_experts, kernel), widths, CPU) is None


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("kernel", PACKAGES)
def test_output_and_gradients_are_the_oracle_s_in_its_dtype(kernel: Any, slots: int) -> None:
    draw = torch.Generator().manual_seed(0)
    index = torch.rand(30, 5, generator=draw).argsort(1)[:, :slots]  # 4 is none
    shapes = ((30, 16), (30, slots), (4, 24, 16), (4, 16, 12))
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, weight, w_in, w_out = inputs
    mine = run_experts(kernel, x, index, weight, w_in, w_out, "swiglu")
    oracle = reference_ffn(x, index, weight, w_in, w_out, "swiglu")
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (mine, oracle)]
    for one, other in zip([mine, *grads[0]], [oracle, *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.detach().abs().max()))
    narrow = run_experts(kernel, x.bfloat16(), index, weight.float(), w_in.float(), w_out.float(), "swiglu")
    assert narrow.dtype == (torch.float32 if slots > 1 else torch.bfloat16)


@pytest.mark.parametrize("kernel", PACKAGES)
def test_a_slot_of_no_expert_changes_nothing_whatever_its_weight_is(kernel: Any) -> None:
    index = torch.tensor([[0, 2], [2, 1]])
    weight = torch.tensor([[0.5, torch.nan], [torch.nan, 2.0]], requires_grad=True)
    y = run_experts(kernel, torch.ones(2, 4), index, weight, torch.ones(2, 6, 4), torch.ones(2, 4, 3), "swiglu")
    y.sum().backward()
    assert y.isfinite().all() and weight.grad is not None
    assert weight.grad.isfinite().all() and ((weight.grad == 0) == weight.isnan()).all()


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("kernel", PACKAGES)
def test_without_a_row_all_gradients_are_zeros(kernel: Any, num_tokens: int) -> None:
    inputs = [torch.ones(*s, requires_grad=True) for s in ((num_tokens, 4), (num_tokens, 2), (2, 6, 4), (2, 4, 3))]
    x, weight, w_in, w_out = inputs
    y = run_experts(kernel, x, torch.full((num_tokens, 2), 2), weight, w_in, w_out, "swiglu")
    assert y.shape == x.shape and not y.any()
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), inputs))


def test_sonicmoe_has_swiglu_only() -> None:
    index, weight = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(ValueError, match="sonicmoe has swiglu, not gelu; use loop"):
        run_experts("sonicmoe", torch.ones(1, 4), index, weight, torch.ones(1, 3, 4), torch.ones(1, 4, 3), "gelu")


@pytest.mark.parametrize("kernel", PACKAGES)
def test_a_package_that_is_missing_or_has_no_gpu_is_refused(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_installed(answer: bool) -> Callable[[str], bool]:
        return lambda package: answer and package == kernel

    monkeypatch.setattr(packages, "is_installed", is_installed(True))
    assert missing_kernel(kernel, "cuda") is None
    assert missing_kernel(kernel, "cpu") == f"{kernel} needs a GPU, and the device is cpu; use auto"
    monkeypatch.setattr(packages, "is_installed", is_installed(False))
    message = packages.missing(kernel, user=kernel)
    assert missing_kernel(kernel, "cuda", instead="loop") == f"{message}, or use loop"
    monkeypatch.setitem(sys.modules, kernel, None)
    monkeypatch.delitem(sys.modules, "scattermoe.parallel_experts")
    index, weight = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(ConfigError, match=rf"^{kernel}: needs {kernel}\S*, which is not installed"):
        run_experts(kernel, torch.ones(1, 4), index, weight, torch.ones(1, 6, 4), torch.ones(1, 4, 3), "swiglu")


def test_they_are_never_chosen_by_themselves() -> None:
    sizes = {"cpu_vendor": "", "rows_per_expert": 10_000, "d_model": 64, "d_ff": 64}
    assert choose_experts_kernel("cuda", torch.bfloat16, **sizes) not in PACKAGES
