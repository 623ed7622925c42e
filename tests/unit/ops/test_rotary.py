"""Rotation of pairs by their position's angle, its gradient, and the compiled form."""

import cmath

import pytest
import torch

from trainer.ops.rotary import rotary_rates, rotary_table, rotate

# B rows, H heads, S tokens, d head width.


def test_each_pair_is_multiplied_by_a_complex_number_of_its_angle() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    turned = rotate(x, rotary_table(torch.arange(5), rotary_rates(6, 100.0), x.dtype))
    for position in range(5):
        for i in range(3):
            factor = cmath.exp(1j * position * 100.0 ** (-2 * i / 6))
            pair = torch.complex(x[..., position, i], x[..., position, i + 3]) * factor
            torch.testing.assert_close(turned[..., position, i], pair.real, rtol=0, atol=1e-15)
            torch.testing.assert_close(turned[..., position, i + 3], pair.imag, rtol=0, atol=1e-15)


@pytest.mark.parametrize("strides", ["contiguous", "of heads"])
def test_its_gradient_is_that_of_finite_differences(strides: str) -> None:
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)  # (B, S, H, d) or (B, H, S, d)
    x = (x.transpose(1, 2) if strides == "of heads" else x).requires_grad_()
    rotary = rotary_table(torch.arange(x.shape[2]), rotary_rates(4, 10.0), x.dtype)
    assert torch.autograd.gradcheck(lambda values: rotate(values, rotary), x)


def test_the_result_is_in_the_wider_dtype_and_the_gradient_in_that_of_the_input() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    rotary = rotary_table(torch.arange(3), rotary_rates(4, 10.0), torch.float32)
    turned = rotate(x, rotary)
    turned.sum().backward()
    assert turned.dtype is torch.float32 and x.grad is not None and x.grad.dtype is torch.bfloat16
    torch.testing.assert_close(turned, rotate(x.detach().float(), rotary), rtol=0, atol=0)


def test_rows_can_have_positions_of_their_own() -> None:
    x = torch.randn(2, 3, 5, 4)  # (B, H, S, d)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    turned = rotate(x, rotary_table(positions[:, None], rotary_rates(4, 10.0), x.dtype))
    for row in range(2):
        alone = rotate(x[row], rotary_table(positions[row], rotary_rates(4, 10.0), x.dtype))
        assert torch.equal(turned[row], alone)


def test_the_rest_of_a_head_is_left_as_it_is() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    rotary = rotary_table(torch.arange(5), rotary_rates(4, 100.0), x.dtype)
    turned = rotate(x, rotary)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], rotary))
    assert torch.autograd.gradcheck(lambda values: rotate(values, rotary), x.requires_grad_())
    narrow = rotate(x.detach().bfloat16(), rotary.float())
    assert narrow.dtype is torch.float32, "all of a head in the wider dtype"


@pytest.mark.slow
def test_the_compiled_form_is_equal() -> None:
    rotary = rotary_table(torch.arange(5), rotary_rates(6, 100.0), torch.float64)
    results = []
    for function in (rotate, torch.compile(rotate)):
        x = torch.ones(2, 5, 6, dtype=torch.float64, requires_grad=True)
        y = function(x, rotary)
        y.square().sum().backward()
        results.append((y, x.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=1e-14)
