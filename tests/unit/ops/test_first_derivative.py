"""Second derivatives through written backward passes: refused, never silently incomplete."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.library.moe_layer import MoELayer
from trainer.ops.cross_entropy import HeadChunks, chunked_cross_entropy
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.permute import gather_rows, sum_rows
from trainer.ops.rms_norm import rms_norm
from trainer.ops.softmax import softmax_and_log_norm

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, torch.ones(4), 1e-6),
    "softmax": lambda x: softmax_and_log_norm(x)[1],
    "loss": lambda x: chunked_cross_entropy(x[None], torch.ones(5, 4), _ZEROS, _ZEROS == 0, HeadChunks(2, x.dtype))[0],
    "gather_rows": lambda x: gather_rows(x, _order()),
    "sum_rows": lambda x: sum_rows(x, _order()),
    "layer": lambda x: MoELayer(4, 2, 1, d_ff=2, router="random")(x[None])[0],
}
_ZEROS = torch.zeros(1, 3, dtype=torch.int64)


def _order() -> ExpertOrder:
    return order_by_expert(torch.tensor([[0], [1], [0]]), 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_of_a_plain_sum_is_not_taken_for_a_constant(name: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives are not available here"):
        torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    assert not gradient.requires_grad
