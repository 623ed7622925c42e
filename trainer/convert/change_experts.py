"""Fill a model whose experts are changed ones of another model: one function for each operation of surgery."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from trainer.convert.dense_from_experts import dense_network
from trainer.convert.hidden_units import HiddenUnits, noise_like
from trainer.convert.layer_traces import LayerTrace
from trainer.convert.merge_experts import merged_expert, output_similarity, similar_groups
from trainer.convert.refit_output import refit_output
from trainer.convert.router_columns import expert_dimensions, tensors_of
from trainer.convert.surgery_plan import (
    AddExperts,
    MergeExperts,
    PruneExperts,
    SplitExperts,
    ToDense,
    experts_of_layer,
    num_groups,
)
from trainer.convert.take_experts import copy_outside, moe_layers_of, take_experts
from trainer.models.feed_forward import FeedForward
from trainer.models.gpt import GPT
from trainer.moe.config import MoEConfig
from trainer.ops.noise import stable_hash

_SHOWN = 12
Traces = Mapping[int, LayerTrace]
"""Trace of each MoE layer, by the number of its block."""


@torch.no_grad()
def change_experts(
    old: GPT,
    new: GPT,
    surgery: PruneExperts | MergeExperts | SplitExperts | AddExperts | ToDense,
    traces: Traces,
    *,
    seed: int,
) -> list[str]:
    """Fill `new`, of the changed config, from `old`; return what was done, a line for each layer."""
    match surgery:
        case PruneExperts():
            return _prune(old, new, surgery, traces)
        case MergeExperts():
            return _merge(old, new, surgery, traces)
        case SplitExperts():
            return _split(old, new, surgery)
        case AddExperts():
            return _add(old, new, surgery, traces, seed=seed)
        case ToDense():
            return _make_dense(old, new, surgery, traces)


def _prune(old: GPT, new: GPT, prune: PruneExperts, traces: Traces) -> list[str]:
    sources, notes, moe = {}, [], _moe_of(old)
    for layer, trace in traces.items():
        removed = experts_of_layer(prune.named, layer) or _least_used(trace, moe, moe.num_experts - (prune.keep or 0))
        sources[layer] = [e for e in range(moe.num_experts) if e not in removed]
        share = float(trace.share[removed].sum())
        notes.append(f"layer {layer}: removed {_listed(removed)}, {share:.1%} of the assignments")
    take_experts(old, new, sources)
    return notes


def _merge(old: GPT, new: GPT, merge: MergeExperts, traces: Traces) -> list[str]:
    groups, notes, layers = {}, [], moe_layers_of(old)
    for layer, trace in traces.items():
        similarity = output_similarity(trace, layers[layer].experts)
        groups[layer] = similar_groups(similarity, trace.share, keep=merge.keep, num_groups=num_groups(_moe_of(old)))
        merged = [_listed(sorted(group.experts), "+") for group in groups[layer] if len(group.experts) > 1]
        notes.append(f"layer {layer}: merged {', '.join(merged)}")
    take_experts(old, new, {layer: [group.experts[0] for group in found] for layer, found in groups.items()})
    for layer, moe in moe_layers_of(new).items():
        for i, group in enumerate(groups[layer]):
            units = merged_expert(layers[layer].experts, group)
            if merge.refit and len(group.experts) > 1:
                units = refit_output(units, group.experts, traces[layer], layers[layer].experts)
            units.copy_to(HiddenUnits.of_expert(moe.experts, i))
    return notes


def _split(old: GPT, new: GPT, split: SplitExperts) -> list[str]:
    moe, sources, factor = _moe_of(old), {}, split.factor(_moe_of(old))
    for layer in old.config.moe_layers:
        twice = experts_of_layer(split.named, layer) if split.named else range(moe.num_experts)
        sources[layer] = [e for e in range(moe.num_experts) for _ in range(2 if e in twice else 1)]
    take_experts(old, new, sources)
    before = moe_layers_of(old)
    for layer, after in moe_layers_of(new).items():
        for i, e in enumerate(sources[layer]):
            units = HiddenUnits.of_expert(before[layer].experts, e)
            if split.halves:
                units = units.take(torch.arange(moe.d_ff // 2) + i % 2 * (moe.d_ff // 2))
            units.scaled(factor).copy_to(HiddenUnits.of_expert(after.experts, i))
    what = "halves" if split.halves else "copies"
    return [f"each layer: {_listed(split.named.get(None, ())) if split.named else 'all experts'} as two {what}"]


def _add(old: GPT, new: GPT, add: AddExperts, traces: Traces, *, seed: int) -> list[str]:
    moe, sources, notes, copies = _moe_of(old), {}, [], {}
    for layer, trace in traces.items():
        chosen = experts_of_layer(add.named, layer) or _most_used(trace, moe, add.count or 0)
        sources[layer], places = _with_copies(moe, chosen)
        copies[layer] = places
        of = [sources[layer][i] for i in places]
        share = float(trace.share[of].sum())
        notes.append(f"layer {layer}: copied {_listed(of)}, {share:.1%} of the assignments")
    take_experts(old, new, sources)
    for layer, after in moe_layers_of(new).items():
        dimensions = expert_dimensions(new.config, layer)
        for i in copies[layer]:
            generator = torch.Generator().manual_seed(stable_hash("surgery add", seed, layer, i))
            units = HiddenUnits.of_expert(after.experts, i)
            units.noisy(add.noise, generator).copy_to(units)
            for name, dim in dimensions.items():
                column = tensors_of(after.router)[name].detach().select(dim, i)
                if column.dim():  # not a bias
                    column += noise_like(column, add.noise, generator)
    return notes


def _make_dense(old: GPT, new: GPT, dense: ToDense, traces: Traces) -> list[str]:
    moe = _moe_of(old)
    count = (dense.width(old.config) - moe.shared_width) // moe.d_ff
    copy_outside(old, new, [f"blocks.{layer}.ffn." for layer in traces])
    for layer, before in moe_layers_of(old).items():
        network = dense_network(before, traces[layer], num_experts=count, fit=dense.fit)
        network.copy_to(HiddenUnits.of_layer(cast(FeedForward, new.blocks[layer].ffn)))
    shared = "the shared experts and " if moe.num_shared_experts else ""
    how = "least squares" if dense.fit == "least_squares" else "mean combine weight"
    return [f"each layer: {shared}{count} of {moe.num_experts} experts, weighted by {how}"]


def _moe_of(model: GPT) -> MoEConfig:
    assert model.config.moe is not None, "surgery_plan.py refuses dense runs"
    return model.config.moe


def _groups(moe: MoEConfig) -> list[range]:
    """Return the experts of each of the router's groups."""
    size = moe.num_experts // num_groups(moe)
    return [range(start, start + size) for start in range(0, moe.num_experts, size)]


def _least_used(trace: LayerTrace, moe: MoEConfig, count: int) -> list[int]:
    """Return the `count` experts with the fewest assignments, as many of each group; of equal ones the later."""
    each, counts = count // num_groups(moe), trace.counts.tolist()
    return sorted(e for group in _groups(moe) for e in sorted(group, key=lambda e: (counts[e], -e))[:each])


def _most_used(trace: LayerTrace, moe: MoEConfig, count: int) -> list[int]:
    """Return the `count` experts with the most assignments, as many of each group; of equal ones the earlier."""
    each, counts = count // num_groups(moe), trace.counts.tolist()
    return sorted(e for group in _groups(moe) for e in sorted(group, key=lambda e: (-counts[e], e))[:each])


def _with_copies(moe: MoEConfig, copied: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the expert that each new expert is taken from, and the places of copies: at the end of their group."""
    sources: list[int] = []
    places: list[int] = []
    for group in _groups(moe):
        sources += group
        for e in copied:
            if e in group:
                places.append(len(sources))
                sources.append(e)
    return sources, places


def _listed(experts: Sequence[int], by: str = ", ") -> str:
    shown = by.join(map(str, experts[:_SHOWN]))
    return shown if len(experts) <= _SHOWN else f"{shown}{by}and {len(experts) - _SHOWN} more"
