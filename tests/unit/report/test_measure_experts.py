"""Tests for the likeness of experts: copies, copies in another order, adapters; and for choices of any number."""

import numpy as np
import pytest
import torch

from trainer.moe.experts import Experts
from trainer.moe.routing import RoutingDecision
from trainer.report.measure_experts import compared_outputs, duplicates, weight_similarity
from trainer.report.routed_text import assignments, choices_of

E, D, F = 4, 8, 6


def experts_with_copies() -> Experts:
    """Return experts of which 1 is a copy of 0, and 3 one of 2 with its hidden units in another order."""
    torch.manual_seed(0)
    experts = Experts(E, D, F, activation="swiglu", kernel="loop").double()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        experts.w_in[1], experts.w_out[1] = experts.w_in[0], experts.w_out[0]
        experts.w_in[3] = experts.w_in[2][torch.cat([order, order + F])]
        experts.w_out[3] = experts.w_out[2][:, order]
    return experts


def test_copies_are_found_by_weights_and_copies_in_another_order_by_outputs() -> None:
    experts, x = experts_with_copies(), torch.randn(20, D, dtype=torch.float64)
    weights, outputs = weight_similarity(experts), compared_outputs(x, experts)
    assert weights[0, 1] == pytest.approx(1, abs=1e-12) and weights[2, 3] < 0.9
    assert [outputs[0, 1], outputs[2, 3], outputs[1, 1]] == pytest.approx([1, 1, 1], abs=1e-12)
    assert [(pair.first, pair.second) for pair in duplicates(weights, outputs)] in ([(0, 1), (2, 3)], [(2, 3), (0, 1)])
    assert [(pair.first, pair.second, pair.outputs) for pair in duplicates(weights, None)] == [(0, 1, None)]


def test_weights_are_compared_with_their_adapters() -> None:
    experts = experts_with_copies()
    experts.add_adapter("w_in", 2, 1.5)
    b = experts.get_parameter("w_in_lora_b")
    torch.nn.init.normal_(b)
    merged = experts.w_in + 1.5 * b @ experts.get_parameter("w_in_lora_a")
    flat = torch.cat([merged.flatten(1), experts.w_out.flatten(1)], dim=1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    assert weight_similarity(experts) == pytest.approx((unit @ unit.T).detach().numpy(), abs=1e-12)


def test_choices_have_the_experts_of_each_token_whatever_their_number() -> None:
    token, expert = torch.tensor([0, 0, 2, 2, 2, 3]), torch.tensor([3, 1, 0, 2, 4, 1])  # 4 is a null expert
    kept = torch.tensor([True, True, True, True, True, False])  # the last token is padding
    decision = RoutingDecision(
        token_index=token, expert_index=expert, combine_weight=torch.ones(6), kept=kept, num_tokens=4, num_experts=E
    )
    chosen = choices_of(decision)
    assert chosen.tolist() == [[3, 1], [-1, -1], [0, 2], [-1, -1]]
    found = assignments(chosen)
    assert np.stack(found).tolist() == [[0, 0, 2, 2], [3, 1, 0, 2]]
