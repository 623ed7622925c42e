"""Traces of the MoE layers of a model on a text: their inputs, and the weights of each token's experts.

# T tokens, E experts, D d_model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import Corpus
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE
from trainer.moe.routing import RoutingDecision, RoutingOptions

_CHUNK = 512  # tokens whose outputs of all experts exist at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTrace:
    """Inputs and routing of one MoE layer, for the valid tokens of a text."""

    x: Tensor
    """(T, D)."""
    weight: Tensor
    """(T, E) combine weights; 0 for experts that a token does not visit."""
    counts: Tensor
    """(E,) int64 assignments."""

    @property
    def share(self) -> Tensor:
        """(E,) share of the assignments, which sum to 1."""
        return self.counts / self.counts.sum().clamp(min=1)

    def outputs(self, experts: Experts) -> Iterator[tuple[slice, Tensor]]:
        """Yield the outputs of all experts on some tokens after others: (E, t, D), without combine weights."""
        for start in range(0, len(self.x), _CHUNK):
            part = slice(start, start + _CHUNK)
            x = self.x[part]
            ones = torch.ones(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            alone = [experts(x, torch.full((len(x), 1), e, device=x.device), ones) for e in range(experts.num_experts)]
            yield part, torch.stack(alone)


@torch.no_grad()
def trace_layers(model: GPT, batches: Sequence[Batch]) -> list[LayerTrace]:
    """Return the traces of a whole model's MoE layers, dropless and without noise."""
    options = RoutingOptions(dropless=True, return_router_outputs=True)
    layers: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in model.moe_layers()]
    for batch in batches:
        here = batch.to(model.device)
        with _inputs(model.moe_layers()) as inputs:
            output = model(here, options)
        valid = here.valid.flatten()
        for layer, stats, x in zip(layers, output.moe, inputs, strict=True):
            assert stats.routed is not None, "they are requested"
            weight, counts = _dense(stats.routed.decision)
            layer.append((x[valid], weight[valid], counts))
    return [
        LayerTrace(
            x=torch.cat([x for x, _, _ in layer]),
            weight=torch.cat([weight for _, weight, _ in layer]),
            counts=torch.stack([counts for _, _, counts in layer]).sum(0),
        )
        for layer in layers
    ]


def training_text(config: ExperimentConfig, corpus: Corpus, num_tokens: int) -> list[Batch]:
    """Return the first rows of training text: what is measured on them is not measured on held-out text."""
    stream = TrainStream(corpus, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)
    rows = max(1, num_tokens // config.model.seq_len)
    stream.load_blocks(0, rows, prefetch=False)
    size = min(rows, config.parallel.micro_batch_size)
    return stream.micro_batches(0, global_batch_size=rows, micro_batch_size=size)


@contextmanager
def _inputs(layers: Sequence[MoE]) -> Iterator[list[Tensor]]:
    """Yield a list that a forward pass fills with the tokens (T, D) of each layer."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1))) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _dense(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return the combine weights (T, E) of a decision, and the assignments (E,) of each expert."""
    kept = decision.kept & (decision.expert_index < decision.num_experts)
    token, expert = decision.token_index[kept], decision.expert_index[kept]
    weight = decision.combine_weight.new_zeros(decision.num_tokens, decision.num_experts)
    weight[token, expert] = decision.combine_weight[kept]
    return weight, torch.bincount(expert, minlength=decision.num_experts)
