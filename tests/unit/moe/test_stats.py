"""Statistics of a layer equal a loop over its assignments."""

from dataclasses import replace

import pytest
import torch

from tests.builders import make_context
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import RouterOutput, RoutingDecision
from trainer.moe.stats import collect_stats

NUM_ROWS, SEQ_LEN, NUM_EXPERTS, NUM_NULL, TOP_K = 3, 6, 4, 1, 2
NUM_TOKENS = NUM_ROWS * SEQ_LEN


@pytest.mark.parametrize("is_fixed_k", [True, False])
@pytest.mark.parametrize("counts_targets_only", [False, True])
def test_counts_are_of_what_was_chosen_and_drops_of_what_was_not_kept(
    counts_targets_only: bool, is_fixed_k: bool
) -> None:
    """First choices are counted before drops, of which there are many here."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(NUM_TOKENS, generator=generator) < 0.8
    counted = valid & (torch.rand(NUM_TOKENS, generator=generator) < 0.7) if counts_targets_only else valid
    context = replace(make_context(NUM_ROWS, SEQ_LEN, valid), counted=counted if counts_targets_only else None)
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS + NUM_NULL, dtype=torch.float64, generator=generator)
    chosen = logits.topk(TOP_K).indices
    weight = torch.rand(NUM_TOKENS, TOP_K, dtype=torch.float64, generator=generator)
    decision = RoutingDecision.from_top_k(chosen, weight, num_experts=NUM_EXPERTS, valid=valid)
    probs = logits.softmax(-1)
    limited = limit_to_capacity(decision, CapacityConfig(factor=0.5, min=1, policy="choice_major"), context)
    if not is_fixed_k:  # as a router that chooses any number of experts
        decision, limited = replace(decision, top_k=None), replace(limited, top_k=None)
    routed = RouterOutput(decision=decision, logits=logits, probs=probs, loss=weight[:, 0])
    stats = collect_stats(routed, limited, context, needs_importance=True)

    zero = torch.zeros(NUM_ROWS, NUM_EXPERTS, dtype=torch.int64)
    counts, first, importance = zero.clone(), zero.clone(), zero.double()
    null, dropped, tokens = (torch.zeros(NUM_ROWS, dtype=torch.int64) for _ in range(3))
    z, entropy, loss = (torch.zeros(NUM_ROWS, dtype=torch.float64) for _ in range(3))
    prob = torch.zeros(NUM_ROWS, NUM_EXPERTS + NUM_NULL, dtype=torch.float64)
    for t in range(NUM_TOKENS):
        row = t // SEQ_LEN
        if not counted[t]:
            continue
        tokens[row] += 1
        prob[row] += probs[t]
        z[row] += logits[t].exp().sum().log() ** 2
        entropy[row] -= (probs[t] * probs[t].log()).sum()
        loss[row] += weight[t, 0]
        for slot in range(TOP_K):
            expert = int(chosen[t, slot])
            if expert >= NUM_EXPERTS:
                null[row] += 1
                continue
            counts[row, expert] += 1
            first[row, expert] += slot == 0
            importance[row, expert] += weight[t, slot]
            dropped[row] += not limited.kept[t * TOP_K + slot]
    assert dropped.sum() > 3 and null.sum() > 0
    for mine, expected in (
        (stats.counts, counts),
        (stats.first_choice_counts, first),
        (stats.null_counts, null),
        (stats.dropped, dropped),
        (stats.tokens, tokens),
        (stats.prob_sum, prob),
        (stats.z_sum, z),
        (stats.entropy_sum, entropy),
        (stats.router_loss, loss),
        (stats.importance, importance),
    ):
        assert mine is not None
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
