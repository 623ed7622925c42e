"""Routings that a benchmark gives: balanced, skewed, traced; and the fewest copies of tokens to send."""

import pytest
import torch

from tests.builders import make_context
from trainer.distributed.rank_layout import even_slices
from trainer.lab.costs.given_routing import GivenLogits, GivenRouter, choices, least_copies


def test_every_turn_and_layer_has_its_own_logits_and_they_are_the_same_for_everyone() -> None:
    drawn = [GivenLogits("balanced", 4, seed=1).draw(8, turn, layer=layer) for turn in (0, 1) for layer in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[3], GivenLogits("balanced", 4, seed=1).draw(8, 1, layer=1))
    assert not torch.equal(drawn[3], GivenLogits("balanced", 4, seed=2).draw(8, 1, layer=1))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_routing_has_no_favourite(top_k: int) -> None:
    chosen = choices(GivenLogits("balanced", 8, seed=0).draw(8192, 0), top_k)
    share = torch.bincount(chosen.flatten(), minlength=8) / chosen.numel()
    assert (share - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_skewed_routing_has_half_of_all_tokens_on_the_first_expert(num_experts: int) -> None:
    for top_k in (1, num_experts // 2):
        chosen = choices(GivenLogits("skewed", num_experts, seed=0).draw(500, 3), top_k)
        assert (chosen == 0).any(-1).sum() == 250
        assert all(len(set(row)) == top_k for row in chosen.tolist())


def test_traced_routing_repeats_the_rows_of_each_layer_of_a_run() -> None:
    layers = (torch.randn(5, 3), torch.randn(5, 3))
    given = GivenLogits("traced", 3, seed=0, traced=layers)
    for layer in range(3):
        rows = {tuple(row) for row in layers[layer % 2].tolist()}
        assert {tuple(row) for row in given.draw(40, 0, layer=layer).tolist()} <= rows


def test_a_router_chooses_what_it_is_given_and_still_learns() -> None:
    router = GivenRouter(d_model=6, num_experts=5, top_k=2)
    router.given = GivenLogits("skewed", 5, seed=0).draw(12, 0)
    x = torch.randn(12, 6, requires_grad=True)
    decision = router(x, make_context(3, 4)).decision
    expected = choices(router.given, 2)
    assert torch.equal(decision.expert_index.view(12, 2).sort().values, expected.sort().values)
    decision.combine_weight.square().sum().backward()
    assert router.gate.weight.grad is not None and router.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("num_experts", "num_ranks", "top_k"), [(8, 2, 2), (8, 8, 4), (7, 3, 7), (4, 1, 2)])
def test_a_token_is_copied_once_to_each_other_rank_that_has_any_of_its_experts(
    num_experts: int, num_ranks: int, top_k: int
) -> None:
    chosen = choices(GivenLogits("balanced", num_experts, seed=4).draw(50, 0), top_k)
    bounds = even_slices(num_experts, num_ranks)
    for rank in range(num_ranks):
        expected = 0
        for experts in chosen.tolist():
            owners = {r for r, (first, end) in enumerate(bounds) for e in experts if first <= e < end}
            expected += len(owners - {rank})
        assert least_copies(chosen, num_experts=num_experts, num_ranks=num_ranks, rank=rank) == expected
