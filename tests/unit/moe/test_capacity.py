"""Capacity: the kept assignments equal those of a loop that fills the experts one by one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_context
from trainer.moe.capacity import expert_capacity, limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import round_mantissa


def _decision(
    experts: list[list[int]], weights: list[list[float]], valid: list[bool], num_experts: int
) -> RoutingDecision:
    return RoutingDecision.from_top_k(
        torch.tensor(experts),
        torch.tensor(weights, dtype=torch.float64),
        num_experts=num_experts,
        valid=torch.tensor(valid),
    )


def _kept_by_a_loop(decision: RoutingDecision, config: CapacityConfig, context: RoutingContext) -> list[bool]:
    """Claim capacity in the policy's order, while fewer than C assignments of the queue are kept."""
    k = decision.top_k or 1
    assignments = list(range(len(decision.expert_index)))
    if config.policy == "choice_major":
        assignments.sort(key=lambda a: (a % k, a // k))
    elif config.policy == "probability":
        assignments.sort(key=lambda a: (-float(round_mantissa(decision.combine_weight[a])), a))
    elif config.policy == "random" and context.noise_key is not None:
        drawn = uniform(context.noise_key, 1, salt="capacity 0").flatten().tolist()
        assignments.sort(key=lambda a: (drawn[int(decision.token_index[a])], a))
    rows = context.num_sequences if config.scope == "sequence" else 1
    capacity = expert_capacity(
        len(assignments) // rows, decision.num_experts, factor=config.factor or 1.0, minimum=config.min
    )
    taken: dict[tuple[int, int], int] = {}
    kept = [False] * len(assignments)
    for a in assignments:
        if not decision.kept[a]:
            continue
        row = int(context.sequence_index[decision.token_index[a]]) if config.scope == "sequence" else 0
        queue = (row, int(decision.expert_index[a]))
        if taken.get(queue, 0) < capacity:
            taken[queue] = taken.get(queue, 0) + 1
            kept[a] = True
    return kept


@st.composite
def _cases(draw: st.DrawFn) -> tuple[RoutingDecision, RoutingContext, CapacityConfig]:
    rows, seq_len = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num_experts))
    tokens = rows * seq_len
    experts = [draw(st.permutations(range(num_experts)))[:top_k] for _ in range(tokens)]
    weight = st.sampled_from([0.0, 0.1, 0.25, 0.25, 0.5, 1.0])
    weights = [[draw(weight) for _ in range(top_k)] for _ in range(tokens)]
    valid = [draw(st.booleans()) for _ in range(tokens)]
    config = CapacityConfig(
        factor=draw(st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 4.0])),
        min=draw(st.integers(1, 3)),
        scope=draw(st.sampled_from(["sequence", "rank"])),
        policy=draw(st.sampled_from(["position", "choice_major", "probability", "random"])),
        renormalize_after_drop=draw(st.booleans()),
    )
    key = torch.arange(tokens) if draw(st.booleans()) else None
    context = make_context(rows, seq_len, torch.tensor(valid), noise_key=key)
    return _decision(experts, weights, valid, num_experts), context, config


@settings(max_examples=300)
@given(_cases())
def test_kept_assignments_are_those_of_a_loop(case: tuple) -> None:
    decision, context, config = case
    limited = limit_to_capacity(decision, config, context)
    assert limited.kept.tolist() == _kept_by_a_loop(decision, config, context)
    assert torch.equal(limited.expert_index, decision.expert_index)


@settings(max_examples=100)
@given(_cases())
def test_no_expert_gets_more_than_its_static_capacity(case: tuple) -> None:
    decision, context, config = case
    limited = limit_to_capacity(decision, config, context)
    load = torch.bincount(decision.expert_index[limited.kept], minlength=decision.num_experts)
    assert limited.capacity is not None
    assert int(load.max()) <= limited.capacity


@settings(max_examples=100)
@given(_cases())
def test_renormalising_gives_survivors_what_was_dropped_and_nothing_else(case: tuple) -> None:
    decision, context, config = case
    limited = limit_to_capacity(decision, config, context)
    for t in range(decision.num_tokens):
        mine = decision.token_index == t
        before = float(decision.combine_weight[mine & decision.kept].sum())
        after = float(limited.combine_weight[mine & limited.kept].sum())
        if not config.renormalize_after_drop:
            assert torch.equal(limited.combine_weight, decision.combine_weight)
        elif float(decision.combine_weight[mine & limited.kept].sum()) > 0:
            assert after == pytest.approx(before)


@pytest.mark.parametrize(
    ("assignments", "num_experts", "factor", "minimum", "rows"),
    [
        (128, 8, 1.25, 4, 20),  # textbook case of another trainer: 1.25 * 2 * 64 / 8
        (10, 1, 1.1, 1, 11),  # 1.1 * 10 is 11.000000000000002 in binary
        (10, 4, 1.0, 1, 3),  # rounds up
        (2, 64, 1.0, 4, 4),  # the minimum
        (100, 8, 0.5, 1, 7),
    ],
)
def test_capacity_is_the_rounded_up_share(
    assignments: int, num_experts: int, factor: float, minimum: int, rows: int
) -> None:
    assert expert_capacity(assignments, num_experts, factor=factor, minimum=minimum) == rows


def test_without_a_factor_nothing_is_dropped() -> None:
    decision = _decision([[0], [0], [0]], [[1.0], [1.0], [1.0]], [True] * 3, 2)
    assert limit_to_capacity(decision, CapacityConfig(), make_context(1, 3)) is decision


@pytest.mark.parametrize("scope", ["sequence", "rank"])
def test_room_is_never_more_than_there_are_assignments(scope: Any) -> None:
    decision = _decision([[0, 1]] * 6, [[0.5, 0.5]] * 6, [True] * 6, 4)
    context = make_context(2, 3)
    limited = limit_to_capacity(decision, CapacityConfig(factor=1e6, min=2**27, scope=scope), context)
    assert limited.capacity == 12 and bool(limited.kept.all())


def test_dropless_evaluation_ignores_the_capacity() -> None:
    decision = _decision([[0], [0], [0]], [[1.0], [1.0], [1.0]], [True] * 3, 2)
    config = CapacityConfig(factor=0.1, min=1)
    assert limit_to_capacity(decision, config, make_context(1, 3, dropless=True)) is decision


def test_null_experts_are_never_limited() -> None:
    decision = _decision([[2], [2], [2], [0]], [[1.0]] * 4, [True] * 4, 2)  # expert 2 of 2: null
    limited = limit_to_capacity(decision, CapacityConfig(factor=0.1, min=1), make_context(1, 4))
    assert limited.kept.all()


def test_padding_takes_no_place() -> None:
    decision = _decision([[0], [0], [0]], [[1.0]] * 3, [False, True, True], 1)
    limited = limit_to_capacity(
        decision, CapacityConfig(factor=0.5, min=2), make_context(1, 3, torch.tensor([False, True, True]))
    )
    assert limited.kept.tolist() == [False, True, True]


@pytest.mark.parametrize("policy", ["position", "choice_major", "probability", "random"])
def test_only_the_position_policy_is_causal(policy: str) -> None:
    """Change the last token's experts; earlier tokens must not be affected."""
    config = CapacityConfig.model_validate({"factor": 0.5, "min": 1, "policy": policy})
    early = [[1, 0], [0, 1], [1, 0]]
    weights = [[0.6, 0.4], [0.7, 0.3], [0.55, 0.45]]
    kept = []
    for last, heavy in (([0, 2], 0.99), ([1, 2], 0.99)):
        decision = _decision([*early, last], [*weights, [heavy, 0.01]], [True] * 4, 3)
        context = make_context(1, 4, noise_key=torch.arange(4) + 3)  # the last token has the highest random priority
        kept.append(limit_to_capacity(decision, config, context).kept[:6].tolist())
    assert (kept[0] == kept[1]) == (policy == "position")
