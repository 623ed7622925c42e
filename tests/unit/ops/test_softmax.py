"""Softmax and its normalizer from one saved tensor."""

import pytest
import torch

from trainer.ops.softmax import softmax_and_log_norm


@pytest.mark.parametrize("experts", [1, 2, 8, 64])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_values_and_gradients_are_those_of_torch(experts: int, scale: float) -> None:
    results = []
    for function in (softmax_and_log_norm, lambda x: (x.softmax(-1), x.logsumexp(-1))):
        draw = torch.Generator().manual_seed(experts)
        logits = (torch.randn(20, experts, dtype=torch.float64, generator=draw) * scale).requires_grad_()
        probs, log_norm = function(logits)
        weights = torch.randn(20, experts, dtype=torch.float64, generator=draw)
        ((probs * weights).sum() + log_norm.square().sum() / scale).backward()
        results.append((probs, log_norm, logits.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_an_excluded_column_has_probability_0() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 1.0], [1000.0, -torch.inf, -1000.0]], requires_grad=True)
    probs, log_norm = softmax_and_log_norm(logits)
    assert probs.tolist() == [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]
    torch.testing.assert_close(log_norm, logits.detach().logsumexp(-1))
    log_norm.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
