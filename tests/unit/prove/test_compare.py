"""What counts as a difference between two layouts' gradients, and what as rounding."""

import pytest
import torch
from torch import Tensor

from trainer.prove.compare import compare
from trainer.prove.evidence import Evidence

LARGE, ZERO = "blocks.0.ffn.router.gate.weight", "blocks.0.attention.q_norm.weight"
SHAPES = {LARGE: (4, 3), ZERO: (5,)}


def evidence(changed: dict[str, Tensor] | None = None, *, dtype: torch.dtype = torch.float64) -> Evidence:
    """One step whose second weight has a gradient that is 0 but for rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}
    gradients = {LARGE: torch.rand(SHAPES[LARGE], dtype=dtype, generator=generator), ZERO: rounding(0, dtype)}
    return Evidence(
        losses=[1.0],
        grad_norms=[1.0],
        start=weights,
        gradients={**gradients, **(changed or {})},
        first_update=weights,
        last_update=weights,
    )


def rounding(seed: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.rand(SHAPES[ZERO], dtype=dtype, generator=torch.Generator().manual_seed(seed)) - 0.5
    return drawn * torch.finfo(dtype).eps / 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_gradient_that_is_0_but_for_rounding_is_equal_to_another_one(dtype: torch.dtype, tolerance: float) -> None:
    other = evidence({ZERO: rounding(1, dtype)}, dtype=dtype)
    assert (other.gradients[ZERO] / evidence(dtype=dtype).gradients[ZERO] - 1).abs().max() > 0.5
    found = compare(other, evidence(dtype=dtype), tolerance=tolerance)
    assert found.is_equal and max(found.worst.values()) == 0


def test_a_small_gradient_that_one_layout_loses_is_a_difference() -> None:
    """Small, but far above the rounding of the largest one."""
    small = torch.full(SHAPES[ZERO], 1e-12, dtype=torch.float64)
    found = compare(evidence({ZERO: 0 * small}), evidence({ZERO: small}), tolerance=1e-9)
    assert found.first_different == f"gradient of {ZERO}" and found.worst["gradient: dense"] == 1
    back = compare(evidence({ZERO: small}), evidence({ZERO: 0 * small}), tolerance=1e-9)
    assert back.first_different == f"gradient of {ZERO}"


def test_a_factor_is_named_though_other_gradients_are_rounding() -> None:
    right = evidence()
    wrong = evidence({LARGE: 2 * right.gradients[LARGE], ZERO: rounding(1, torch.float64)})
    found = compare(wrong, right, tolerance=1e-9)
    assert found.first_different == f"gradient of {LARGE}"
    assert found.cause is not None and "router gradients are 2 times those of one process" in found.cause
    assert "dense" not in found.cause


def test_a_gradient_that_is_not_a_number_is_a_difference() -> None:
    found = compare(evidence({ZERO: torch.full(SHAPES[ZERO], torch.nan)}), evidence(), tolerance=1e-9)
    assert not found.is_equal
