"""Differences from the oracle: found by piece, worst first, and told in words."""

import math

import pytest
import torch

from trainer.ops.oracle_difference import LayerResult, first_difference, layer_result, rounding_tolerance

TOLERANCE = 0.01


def result() -> LayerResult:
    generator = torch.Generator().manual_seed(0)
    y, x_grad, weight_grad, w_in_grad, w_out_grad = (
        torch.randn(shape, generator=generator) for shape in ((4, 8), (4, 8), (4, 2), (3, 6, 8), (3, 8, 6))
    )
    weight_grad[0, 1], w_in_grad[2], w_out_grad[2] = 0, 0, 0
    return LayerResult(y, x_grad, weight_grad, w_in_grad, w_out_grad)


def changed(name: str, place: int | tuple[int, ...], value: float, *, by_factor: bool = False) -> str | None:
    found = result()
    tensor = getattr(found, name)
    tensor[place] = tensor[place] * value if by_factor else value
    return first_difference(found, result(), TOLERANCE)


def test_equal_results_and_rounded_ones_have_no_difference() -> None:
    assert first_difference(result(), result(), 0.0) is None
    assert changed("y", 2, 1.009, by_factor=True) is None


@pytest.mark.parametrize(
    ("name", "place", "value", "expected"),
    [
        ("y", 2, 0.0, "the output of token 2 is off by 1 of its size; rounding is 0.01 (1 of 4 tokens)"),
        ("x_grad", 3, math.nan, "the gradient of x of token 3 is not finite (1 of 4 tokens)"),
        ("w_in_grad", (2, 0, 0), 1e-30, "of w_in of expert 2 is not 0, and nothing contributes to it (1 of 3 experts)"),
        ("w_out_grad", (1, 0, 0), math.inf, "the gradient of w_out of expert 1 is not finite (1 of 3 experts)"),
        ("weight_grad", (0, 1), 0.1, "the gradient of the combine weights is not 0, and nothing contributes to it"),
    ],
)
def test_a_difference_names_what_and_where(
    name: str, place: int | tuple[int, ...], value: float, expected: str
) -> None:
    found = changed(name, place, value)
    assert found is not None and expected in found


def test_the_worst_of_several_is_named() -> None:
    found = result()
    found.y[0] *= 1.1
    found.y[1] *= 2
    assert first_difference(found, result(), TOLERANCE) == (
        "the output of token 1 is off by 1 of its size; rounding is 0.01 (2 of 4 tokens)"
    )


def test_another_shape_is_a_difference() -> None:
    found = result()._replace(y=torch.zeros(5, 8))
    assert first_difference(found, result(), TOLERANCE) == "the output has shape (5, 8), not (4, 8)"


def test_an_input_without_influence_has_a_gradient_of_zeros() -> None:
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    found = layer_result(x * 2, torch.ones(2, 3), [x, weight, torch.ones(1, 2, 3), torch.ones(1, 3, 2)][:2] * 2)
    assert found.x_grad.eq(2).all() and not found.weight_grad.any()
    constant = layer_result(torch.ones(2, 3), torch.ones(2, 3), [x, weight, x, weight])
    assert not constant.x_grad.any()


def test_the_tolerance_grows_with_the_roots_of_sums_and_stays_below_a_lost_row() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        unit = torch.finfo(dtype).eps / 2
        assert 8 * unit < rounding_tolerance(dtype, 100) < rounding_tolerance(dtype, 400) <= 8 * 21 * unit
        assert rounding_tolerance(dtype, 1024) < 136**-0.5 / 2
