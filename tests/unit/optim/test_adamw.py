"""AdamW against its formula."""

import torch
from torch import nn

from trainer.optim.registry import AdamWConfig


def _moved(config: AdamWConfig, *, is_decayed: bool) -> float:
    """Return a weight of 1 after gradients of 1 and 3 at a learning rate of 0.1."""
    weight = nn.Parameter(torch.ones(1))
    parts = ([weight], []) if is_decayed else ([], [weight])
    optimizer = config.build(decayed=parts[0], not_decayed=parts[1])
    for gradient in (1.0, 3.0):
        weight.grad = torch.tensor([gradient])
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    return weight.item()


def _by_hand(config: AdamWConfig, weight_decay: float) -> float:
    """Loshchilov and Hutter 2017 (arXiv 1711.05101), algorithm 2."""
    (beta1, beta2), weight, m, v = config.betas, 1.0, 0.0, 0.0
    for t, gradient in enumerate((1.0, 3.0), start=1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + config.eps)
        weight -= 0.1 * (update + weight_decay * weight)
    return weight


def test_the_update_has_the_betas_eps_and_decay_of_the_config() -> None:
    config = AdamWConfig(betas=(0.6, 0.7), eps=0.3, weight_decay=0.5)
    for is_decayed, weight_decay in ((True, 0.5), (False, 0.0)):
        expected = _by_hand(config, weight_decay)
        assert abs(_moved(config, is_decayed=is_decayed) - expected) < 1e-6
