"""Assumed choices of experts."""

import pytest
import torch

from trainer.plan.assumed_load import AssumedLoad, skewed_shares


@pytest.mark.parametrize(("shares", "top_k"), [([1, 1, 1, 1], 2), ([8, 1, 1, 0], 2), ([3, 2, 1, 1, 1], 3), ([1], 1)])
def test_every_token_has_different_experts_and_every_expert_its_share(shares: list[float], top_k: int) -> None:
    load = AssumedLoad(shares, top_k)
    choice = load.choice(120)
    assert all(len(set(row)) == top_k for row in choice.tolist())
    counts = choice.flatten().bincount(minlength=len(shares))
    assert counts.tolist() == load.rows_per_expert(120).tolist()
    limited = [min(share / sum(shares), 1 / top_k) for share in shares]
    assert all(count / (120 * top_k) >= share - 0.01 for count, share in zip(counts.tolist(), limited, strict=True))


def test_the_order_of_all_experts_begins_with_the_choice() -> None:
    load = AssumedLoad([5, 1, 1, 1], 2)
    order = load.order(12)
    assert torch.equal(order[:, :2], load.choice(12))
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(12, -1))


@pytest.mark.parametrize(("ep_size", "imbalance"), [(4, 1.0), (4, 1.5), (4, 4.0), (1, 2.0)])
def test_the_first_rank_is_the_busiest(ep_size: int, imbalance: float) -> None:
    shares = skewed_shares(16, ep_size, imbalance)
    load = AssumedLoad(shares, 1)
    assert sum(shares) == pytest.approx(1.0) and load.busiest_rank(ep_size) == 0
    busy = load.of_rank(0, ep_size) * ep_size if ep_size > 1 else shares[0] * 16
    assert busy == pytest.approx(imbalance)
