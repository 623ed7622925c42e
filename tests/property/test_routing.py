"""Properties of every router over shapes, padding, numbers of experts and scores that nobody chose by hand."""

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from tests.builders import make_context
from tests.laws.test_router_oracles import KINDS
from trainer.contracts.router_inputs import D, matrix
from trainer.moe.capacity import expert_capacity, limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routers.config.options import AssignmentOptions, RouterOptions
from trainer.moe.routers.config.sequence_choice import MixtureOfDepthsRouterConfig
from trainer.moe.routers.registry import RouterConfig
from trainer.moe.routing import Router, RoutingContext
from trainer.ops.noise import token_keys

ADAPTER: TypeAdapter[Any] = TypeAdapter(RouterConfig)
Case = tuple[RouterOptions, Router, Tensor, RoutingContext, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))
    num_experts = 1 if kind == "mixture_of_depths" else draw(st.integers(2, 6))
    fields: dict[str, Any] = {"kind": kind}
    config_class = type(ADAPTER.validate_python(fields))
    if "top_k" in config_class.model_fields:
        fields["top_k"] = draw(st.integers(2, num_experts)) if num_experts > 1 else 1
    if "null_experts" in config_class.model_fields:
        fields["null_experts"] = draw(st.integers(0, 3))
    if kind == "group_limited":
        groups = draw(st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
        fields |= {"groups": groups, "groups_kept": groups}
    if "capacity_factor" in config_class.model_fields:
        fields["capacity_factor"] = draw(st.sampled_from([0.3, 1.0, 1.25, 2.0]))
    config = ADAPTER.validate_python(fields)
    assume(not list(config.problems_among(num_experts)))
    rows, seq_len, seed = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    router = config.build(d_model=D, num_experts=num_experts, layer=0).double()
    spread = draw(st.sampled_from([0.0, 0.3, 5.0]))  # all scores equal; usual ones; nearly one-hot ones
    for parameter in router.parameters():
        parameter.data.normal_(0, spread, generator=generator)
    for buffer in router.buffers():
        buffer.zero_()
    x = torch.randn(rows * seq_len, D, dtype=torch.float64, generator=generator)
    valid = torch.rand(rows * seq_len, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    context = make_context(rows, seq_len, valid)
    context = replace(context, token_ids=torch.randint(0, 30, (rows * seq_len,), generator=generator))
    if draw(st.booleans()):
        context = replace(context, noise_key=token_keys(seed, context.sequence_index, context.position))
    return config, router, x, context, num_experts


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases())
def test_a_decision_is_sound(case: Case) -> None:
    config, router, x, context, num_experts = case
    output = router(x, context)
    decision = output.decision
    pairs = list(zip(decision.token_index.tolist(), decision.expert_index.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) and pairs == sorted(pairs, key=lambda pair: pair[0])
    assert all(0 <= e < num_experts + config.num_null_experts for _, e in pairs)
    assert not decision.kept[~context.valid[decision.token_index]].any()
    assert torch.isfinite(decision.combine_weight).all() and (decision.combine_weight >= 0).all()
    if config.weight_sum is not None:
        sums = torch.zeros(len(x), dtype=torch.float64)
        sums.index_add_(0, decision.token_index, decision.combine_weight.detach().double() * decision.kept)
        torch.testing.assert_close(sums[context.valid], torch.full_like(sums[context.valid], config.weight_sum))
    for part in (output.logits, output.probs, output.load, output.loss):
        assert part is None or torch.isfinite(part).all()
    if output.probs is not None:
        torch.testing.assert_close(output.probs.sum(-1), torch.ones(len(x), dtype=torch.float64))


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases())
def test_rows_are_routed_alone_as_together(case: Case) -> None:
    _, router, x, context, _ = case
    together = matrix(router(x, context).decision)
    seq_len = len(x) // context.num_sequences
    for row in range(context.num_sequences):
        here = slice(row * seq_len, (row + 1) * seq_len)
        alone = replace(
            make_context(1, seq_len, context.valid[here]),
            token_ids=context.token_ids[here],
            noise_key=None if context.noise_key is None else context.noise_key[here],
        )
        mine = matrix(router(x[here], alone).decision)
        # A product of other rows may round otherwise; which experts there are, it does not change.
        torch.testing.assert_close(mine, together[here], rtol=0, atol=1e-12, equal_nan=True)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(["position", "probability", "random"]), st.sampled_from([0.4, 1.0, 1.25]))
def test_no_expert_gets_more_than_it_has_room_for(case: Case, policy: str, factor: float) -> None:
    config, router, x, context, num_experts = case
    decision = router(x, context).decision
    seq_len = len(x) // context.num_sequences
    valid = context.valid_rows.sum(1)
    if config.has_fixed_k:
        section = CapacityConfig.model_validate({"factor": factor, "min": 1, "policy": policy})
        decision = limit_to_capacity(decision, section, context)
        assert decision.top_k is not None
        room = [expert_capacity(seq_len * decision.top_k, num_experts, factor=factor, minimum=1)] * len(valid)
    elif isinstance(config, AssignmentOptions) and context.is_training:
        room = [math.ceil(config.capacity_factor * config.top_k * int(n) / num_experts - 1e-9) for n in valid]
    elif isinstance(config, MixtureOfDepthsRouterConfig) and context.is_training:
        room = [math.ceil(config.capacity * int(n) - 1e-9) for n in valid]
    else:
        return
    kept = ~matrix(decision).isnan().view(context.num_sequences, seq_len, -1)
    assert all(int(kept[row].sum(0).max()) <= room[row] for row in range(context.num_sequences))
