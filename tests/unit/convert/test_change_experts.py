"""Laws of surgery on experts, in float64: what each operation must preserve, and what it takes from where."""

from typing import Any, cast

import pytest
import torch

from tests.builders import make_batch, make_model, tiny_model_config
from trainer.convert.change_experts import change_experts
from trainer.convert.hidden_units import HiddenUnits
from trainer.convert.layer_traces import LayerTrace, trace_layers
from trainer.convert.merge_experts import aligned, merged_expert, output_similarity, similar_groups
from trainer.convert.preservation import logit_difference
from trainer.convert.refit_output import refit_output
from trainer.convert.router_columns import tensors_of
from trainer.convert.surgery_plan import AddExperts, MergeExperts, PruneExperts, SplitExperts, Surgery, ToDense
from trainer.convert.take_experts import moe_layers_of
from trainer.convert.upcycle_plan import UpcycleOptions, plan_upcycle
from trainer.convert.upcycle_weights import upcycle_weights
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT

BATCHES = [make_batch(2, 8, seed=seed, ragged=True) for seed in range(3)]


def _model(moe: dict[str, Any], **fields: Any) -> GPT:
    return make_model(tiny_model_config(moe, **fields), dtype=torch.float64, seed=3)


def _changed_config(model: ModelConfig, surgery: Surgery) -> ModelConfig:
    """Apply the overrides of an operation to a config."""
    values: dict[str, Any] = {"model": model.model_dump(mode="json")}
    for override in surgery.overrides(model):
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = None if value == "null" else int(value)
    return ModelConfig.model_validate(values["model"])


def _operated(old: GPT, surgery: Any, *, seed: int = 0) -> tuple[GPT, list[str], dict[int, LayerTrace]]:
    new = make_model(_changed_config(old.config, surgery), dtype=torch.float64, seed=9)
    traces = dict(zip(old.config.moe_layers, trace_layers(old, BATCHES), strict=True))
    return new, change_experts(old, new, surgery, traces, seed=seed), traces


def _largest(old: GPT, new: GPT) -> float:
    return logit_difference(old, new, [make_batch(2, 8, seed=7, ragged=True)]).largest


ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k"},
    "raw softmax": {"kind": "top_k", "normalize": False, "scale": 1.5},
    "raw sigmoid": {"kind": "top_k", "normalize": False, "score": "sigmoid"},
    "null experts": {"kind": "bias_balanced", "top_k": 3, "null_experts": 2},
    "groups": {"kind": "group_limited", "groups": 2, "groups_kept": 1, "group_score": "best", "bias_update_rate": 0.1},
    "cosine": {"kind": "cosine", "d_proj": 4},
    "all experts": {"kind": "dense"},
    "all of the top k": {"kind": "top_k", "top_k": 4},
}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_experts_as_two_compute_what_they_did(name: str, halves: bool) -> None:
    old = _model({"router": ROUTERS[name], "num_shared_experts": 1, "first_dense_layers": 1, "expert_bias": True})
    for parameter_name, parameter in old.named_parameters():
        if parameter_name.endswith("_bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    for buffer in old.buffers():  # a selection bias, as training leaves it
        buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()).view(buffer.shape))
    new, _, _ = _operated(old, SplitExperts(halves=halves))
    before, after = (model.get_parameter("blocks.1.ffn.experts.w_in").numel() for model in (old, new))
    assert after == before * (1 if halves else 2)
    assert _largest(old, new) < 1e-12


def test_two_copies_of_one_expert_take_two_places_of_a_token() -> None:
    old = _model({})
    new, _, _ = _operated(old, SplitExperts(named={None: [1]}))
    assert _largest(old, new) > 1e-3


def test_experts_that_no_token_visits_are_pruned_without_a_trace() -> None:
    """With a selection bias that excludes them, the rest is routed as if they were not there."""
    old = _model({"num_experts": 6, "router": {"kind": "bias_balanced"}, "num_shared_experts": 1})
    excluded: dict[int | None, list[int]] = {0: [1, 4], 1: [0, 5]}
    for layer, moe in moe_layers_of(old).items():
        cast(torch.Tensor, moe.router.bias)[excluded[layer]] = -1e3
    by_load, notes, _ = _operated(old, PruneExperts(keep=4))
    by_name, _, _ = _operated(old, PruneExperts(named=excluded))
    assert notes == [f"layer {n}: removed {a}, {b}, 0.0% of the assignments" for n, (a, b) in excluded.items()]
    for new in (by_load, by_name):
        assert _largest(old, new) < 1e-12
        assert [b.shape for b in new.buffers()] == [(4,), (4,)]


def test_the_experts_with_the_fewest_assignments_go_and_as_many_of_each_group() -> None:
    old = _model({"num_experts": 8, "router": {"kind": "group_limited", "groups": 2, "groups_kept": 2}})
    new, _, traces = _operated(old, PruneExperts(keep=6))
    for layer, trace in traces.items():
        counts = trace.counts.tolist()
        removed = {min(group, key=lambda e: (counts[e], -e)) for group in (range(4), range(4, 8))}
        kept = [e for e in range(8) if e not in removed]
        gates = [model.get_parameter(f"blocks.{layer}.ffn.router.gate.weight") for model in (old, new)]
        experts = [model.get_parameter(f"blocks.{layer}.ffn.experts.w_in") for model in (old, new)]
        assert torch.equal(gates[0][kept], gates[1]) and torch.equal(experts[0][kept], experts[1])


def test_a_trace_counts_what_the_layers_do() -> None:
    old = _model({"router": {"kind": "top_k", "null_experts": 2, "scale": 2.0}})
    traces = trace_layers(old, BATCHES)
    tokens = sum(int(batch.valid.sum()) for batch in BATCHES)
    for moe, trace in zip(old.moe_layers(), traces, strict=True):
        assert trace.x.shape == (tokens, 16) and trace.weight.shape == (tokens, 4)
        assert torch.equal((trace.weight > 0).sum(0), trace.counts)
        outputs = torch.cat([outputs for _, outputs in trace.outputs(moe.experts)], dim=1)
        e = HiddenUnits.of_expert(moe.experts, 2)
        gate, up = (trace.x @ e.w_in.T).chunk(2, -1)
        torch.testing.assert_close(outputs[2], (torch.nn.functional.silu(gate) * up) @ e.w_out.T, rtol=0, atol=1e-12)


def test_experts_that_differ_in_the_order_of_hidden_units_are_alike_and_merge_into_themselves() -> None:
    old = _model({"num_experts": 6})
    for seed, moe in enumerate(old.moe_layers()):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        twin = HiddenUnits.of_expert(moe.experts, 1)
        twin.take(order).copy_to(HiddenUnits.of_expert(moe.experts, 4))
    new, notes, traces = _operated(old, MergeExperts(keep=5))
    assert notes == ["layer 0: merged 1+4", "layer 1: merged 1+4"]
    for layer, moe in moe_layers_of(new).items():
        similarity = output_similarity(traces[layer], moe_layers_of(old)[layer].experts)
        torch.testing.assert_close(similarity[1, 4], similarity.new_tensor(1.0), rtol=0, atol=1e-12)
        first = min((1, 4), key=lambda e: -int(traces[layer].counts[e]))
        theirs = HiddenUnits.of_expert(moe_layers_of(old)[layer].experts, first)
        torch.testing.assert_close(HiddenUnits.of_expert(moe.experts, 1).w_in, theirs.w_in, rtol=0, atol=1e-12)


def test_a_merged_expert_is_the_mean_by_assignments_after_alignment() -> None:
    similarity = torch.eye(4)
    similarity[0, 2] = similarity[2, 0] = 0.9
    shares = torch.tensor([0.1, 0.5, 0.3, 0.1])
    groups = similar_groups(similarity, shares, keep=3, num_groups=1)
    assert [list(group.experts) for group in groups] == [[2, 0], [1], [3]]
    assert groups[0].weights == pytest.approx([0.75, 0.25])
    unused = similar_groups(similarity, torch.zeros(4), keep=3, num_groups=1)
    assert list(unused[0].weights) == [0.5, 0.5]
    in_groups = similar_groups(similarity, shares, keep=2, num_groups=2)
    assert [sorted(group.experts) for group in in_groups] == [[0, 1], [2, 3]]


def test_a_refitted_expert_is_nearer_to_what_its_group_computes() -> None:
    old = _model({"num_experts": 6})
    traces = trace_layers(old, [make_batch(16, 8, seed=seed) for seed in range(3)])
    experts, trace = old.moe_layers()[0].experts, traces[0]
    group = similar_groups(output_similarity(trace, experts), trace.share, keep=5, num_groups=1)
    group = next(found for found in group if len(found.experts) > 1)
    merged = merged_expert(experts, group)
    refitted = refit_output(merged, group.experts, trace, experts)
    weight = trace.weight[:, list(group.experts)]
    outputs = torch.cat([outputs for _, outputs in trace.outputs(experts)], dim=1)[list(group.experts)]
    target = torch.einsum("tm,mtd->td", weight, outputs)

    def error(units: HiddenUnits) -> float:
        gate, up = (trace.x @ units.w_in.T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ units.w_out.T
        return float((y * weight.sum(1, keepdim=True) - target).square().sum().detach())

    assert error(refitted) < 0.7 * error(merged)
    assert torch.equal(refitted.w_in, merged.w_in)
    unused = LayerTrace(x=trace.x, weight=torch.zeros_like(trace.weight), counts=torch.zeros_like(trace.counts))
    assert refit_output(merged, group.experts, unused, experts) is merged


def test_alignment_finds_the_permutation_under_noise() -> None:
    experts = _model({}).moe_layers()[0].experts
    first = HiddenUnits.of_expert(experts, 0)
    shuffled = first.noisy(0.05, torch.Generator().manual_seed(0)).take(torch.arange(12).flip(0))
    assert float((aligned(shuffled, first).w_out - first.w_out).abs().max()) < 0.3 * float(first.w_out.std())
    assert float((shuffled.w_out - first.w_out).abs().max()) > float(first.w_out.std())


def test_added_experts_are_noisy_copies_at_the_end_of_their_group() -> None:
    old = _model({"num_experts": 4, "router": {"kind": "group_limited", "groups": 2, "groups_kept": 2}})
    new, _, traces = _operated(old, AddExperts(count=2, noise=0.1))
    exact, _, _ = _operated(old, AddExperts(count=2, noise=0.0))
    other, _, _ = _operated(old, AddExperts(count=2, noise=0.1), seed=1)
    for layer, trace in traces.items():
        used = [int(trace.counts[:2].argmax()), 2 + int(trace.counts[2:].argmax())]
        sources = [0, 1, used[0], 2, 3, used[1]]
        for name in ("router.gate.weight", "experts.w_in", "experts.w_out"):
            theirs, mine, copied, redrawn = (
                model.get_parameter(f"blocks.{layer}.ffn.{name}") for model in (old, new, exact, other)
            )
            assert torch.equal(copied, theirs[sources])
            assert torch.equal(mine[[0, 1, 3, 4]], theirs)
            for i in (2, 5):
                noise = (mine[i] - copied[i]).std() / copied[i].std()
                assert 0.03 < float(noise.detach()) < 0.3 and not torch.equal(mine[i], redrawn[i])


@pytest.mark.parametrize("fit", ["least_squares", "mean_weight"])
def test_a_layer_with_constant_weights_is_a_dense_network(fit: Any) -> None:
    old = _model({"router": {"kind": "dense"}, "num_shared_experts": 1, "every": 2}, d_ff=60)
    with torch.no_grad():
        for name, tensor in old.named_parameters():
            if "router" in name:
                tensor.zero_()
    new, notes, _ = _operated(old, ToDense(fit=fit))
    assert _largest(old, new) < 1e-9 and new.config.d_ff == 60
    assert notes[0].startswith("each layer: the shared experts and 4 of 4 experts")


def test_an_upcycled_model_becomes_the_dense_one_again() -> None:
    dense = make_model(tiny_model_config().model_copy(update={"moe": None}), dtype=torch.float64)
    config = tiny_model_config({"d_ff": 24})
    old = make_model(config, dtype=torch.float64)
    upcycle_weights(dense, old, plan_upcycle(dense.config, config, UpcycleOptions()), seed=0)
    new, _, _ = _operated(old, ToDense(d_ff=24))
    assert _largest(dense, new) < 1e-9
    twice, _, _ = _operated(old, ToDense(d_ff=48))  # of two copies each gets a half
    assert _largest(dense, twice) < 1e-9


def test_least_squares_are_nearer_to_the_layer_than_mean_weights() -> None:
    old = _model({"num_experts": 6})
    errors = []
    for fit in ("least_squares", "mean_weight"):
        new, _, traces = _operated(old, ToDense(d_ff=24, fit=cast(Any, fit)))
        trace = traces[0]
        outputs = torch.cat([outputs for _, outputs in trace.outputs(old.moe_layers()[0].experts)], dim=1)
        target = torch.einsum("te,etd->td", trace.weight, outputs)
        errors.append(float((cast(Any, new.blocks[0]).ffn(trace.x) - target).square().sum().detach()))
    assert errors[0] < errors[1]


def test_everything_beside_the_changed_experts_is_copied() -> None:
    old = _model({"num_experts": 4, "first_dense_layers": 1, "num_shared_experts": 1})
    for surgery in (PruneExperts(keep=3), MergeExperts(keep=3), SplitExperts(), AddExperts(count=1)):
        new, _, _ = _operated(old, surgery)
        theirs = tensors_of(old)
        for name, tensor in tensors_of(new).items():
            if ".router." not in name and ".experts." not in name:
                assert torch.equal(tensor, theirs[name]), name
