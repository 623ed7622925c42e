"""Ask the MoE layers of a model what they do with a rank's tokens, padding, biases and later tokens.

Every rank asks the same questions in the same order, since each of them is a forward pass, which may communicate.

# B rows, S tokens in a row, T = B * S, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from trainer.data.batches.assemble import row_slice
from trainer.data.batches.batch import Batch
from trainer.doctor.step.step_evidence import LayerEvidence
from trainer.models.freeze import is_frozen
from trainer.models.gpt import GPT, GPTOutput
from trainer.moe.capacity import capacity_causality
from trainer.moe.layer import MoE
from trainer.moe.routing import RoutingOptions
from trainer.moe.stats import MoEStats
from trainer.parallel.shards import is_sharded

_MOST_COMPARED = 1 << 16
"""Numbers of each expert that are compared."""
_LARGE_BIAS = 10.0
_EVALUATION = RoutingOptions(dropless=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProbe:
    """A model, and rows of this rank to ask it about. All methods are collective."""

    model: GPT
    batch: Batch
    autocast: Callable[[], AbstractContextManager[object]]
    """Precision of training."""
    seed: int
    has_gradients: bool = True
    """Weights are whole, so that a backward pass can stop at them."""

    def layers(self) -> list[LayerEvidence]:
        """Return what each MoE layer does."""
        moe = self.model.moe_layers()
        found = [LayerEvidence(layer=index, learns=_learns(layer)) for index, layer in self._numbered(moe)]
        if found:
            self._measure_gradients(found, moe)
            self._measure_statistics(found, moe)
            for evidence, layer in zip(found, moe, strict=True):
                evidence.bias_selects = self._bias_selects(layer, moe.index(layer))
                evidence.identical_pairs = _identical_pairs(layer)
        return found if self.batch.num_valid else [LayerEvidence(layer=one.layer) for one in found]

    def later_tokens_change(self) -> dict[str, float]:
        """Return the largest change of a row's first half if its second half is another, where there shall be none."""
        moe, found = self.model.moe_layers(), {}
        in_training = all(
            layer.router.causal == "strict" and capacity_causality(layer.capacity, is_training=True) == "strict"
            for layer in moe
        )
        in_evaluation = all(layer.router.causal_in_evaluation == "strict" for layer in moe)
        half = self.batch.tokens.shape[1] // 2
        other = self.batch.tokens.clone()
        other[:, half:] = (other[:, half:] + 1) % self.model.num_tokens
        changed = replace(self.batch, tokens=other)
        for when, is_causal, options in (
            ("training", in_training, RoutingOptions(noise_seed=self.seed)),
            ("evaluation", in_evaluation, _EVALUATION),
        ):
            if is_causal and half:
                before, after = (self._logits(batch, options)[:, :half] for batch in (self.batch, changed))
                found[when] = _change(before, after)
        return found

    def other_rows_change(self) -> float | None:
        """Return the largest change of a row's logits in evaluation if it is alone; None if rows are routed jointly."""
        is_joint = any(layer.router.causal_in_evaluation == "no" for layer in self.model.moe_layers())
        if len(self.batch.tokens) < 2 or is_joint:
            return None
        together = self._logits(self.batch, _EVALUATION)[:1]
        return _change(together, self._logits(row_slice(self.batch, 0, 1), _EVALUATION))

    def _numbered(self, moe: Sequence[MoE]) -> list[tuple[int, MoE]]:
        return list(zip(self.model.config.moe_layers, moe, strict=True))

    def _forward(self, batch: Batch, options: RoutingOptions, *, want_logits: bool = False) -> GPTOutput:
        with self.autocast():
            return self.model(batch, options, want_logits=want_logits)

    @torch.no_grad()
    def _logits(self, batch: Batch, options: RoutingOptions) -> Tensor:
        logits = self._forward(batch, options, want_logits=True).logits
        assert logits is not None
        return logits

    def _measure_gradients(self, found: Sequence[LayerEvidence], moe: Sequence[MoE]) -> None:
        """Measure gradients of the cross-entropy alone, and the routers' logits."""
        options = RoutingOptions(noise_seed=self.seed, return_router_outputs=True)
        with torch.set_grad_enabled(self.has_gradients):
            output = self._forward(self.batch, options)
            learning = [[p for p in layer.parameters() if p.requires_grad] for layer in moe]
            flat = [p for parameters in learning for p in parameters]
            loss = output.loss_sum / max(1.0, self.batch.target_weight)
            gradients = torch.autograd.grad(loss, flat, allow_unused=True) if flat and loss.requires_grad else []
        by_id = {id(p): gradient for p, gradient in zip(flat, gradients, strict=True)} if gradients else {}
        for evidence, layer, stats in zip(found, moe, output.moe, strict=True):
            if by_id:
                evidence.lm_gradient = _norm([by_id.get(id(p)) for p in layer.router.parameters()])
                evidence.lm_gradient_all = _norm([by_id.get(id(p)) for p in layer.parameters()])
            logits = None if stats.routed is None else stats.routed.logits
            if logits is not None and len(logits) > 1:
                evidence.logit_dtype = str(logits.dtype).removeprefix("torch.")
                evidence.logit_spread = _spread(logits.detach())

    @torch.no_grad()
    def _measure_statistics(self, found: Sequence[LayerEvidence], moe: Sequence[MoE]) -> None:
        """Measure what is counted of a batch whose last row is half padding."""
        valid = self.batch.valid.clone()
        valid[-1, valid.shape[1] // 2 :] = False
        padded = replace(self.batch, valid=valid, loss_mask=self.batch.loss_mask * valid)
        config = self.model.config.moe
        k = None if config is None else config.router.recorded_k
        for evidence, stats in zip(found, self._forward(padded, RoutingOptions()).moe, strict=True):
            evidence.num_valid = int(valid.sum())
            evidence.counted_probability = None if stats.prob_sum is None else float(stats.prob_sum.double().sum())
            if k is not None:
                evidence.expected_assignments, evidence.counted_assignments = k * evidence.num_valid, _counted(stats)

    @torch.no_grad()
    def _bias_selects(self, layer: MoE, index: int) -> bool | None:
        """Return whether a large selection bias brings an expert more tokens; None if there is none, or no room."""
        bias = getattr(layer.router, "bias", None)
        if not isinstance(bias, Tensor) or bias.requires_grad or bias.numel() != layer.experts.num_experts:
            return None
        before = self._forward(self.batch, RoutingOptions()).moe[index].counts.sum(0)  # (E,)
        expert, kept = int(before.argmin()), bias.clone()
        bias[expert] += _LARGE_BIAS
        after = self._forward(self.batch, RoutingOptions()).moe[index].counts.sum(0)
        bias.copy_(kept)
        return None if int(before[expert]) >= self.batch.num_valid else bool(after[expert] > before[expert])


def _learns(layer: MoE) -> bool:
    return any(p.requires_grad for p in layer.router.parameters()) and not is_frozen(layer.router)


def _counted(stats: MoEStats) -> int:
    return int(stats.counts.sum()) + (0 if stats.null_counts is None else int(stats.null_counts.sum()))


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return float(sum((float(g.double().square().sum()) for g in gradients if g is not None), 0.0)) ** 0.5


def _spread(logits: Tensor) -> float:
    """Return the largest standard deviation of a column of logits (T, E) as a share of the largest logit."""
    largest = float(logits.abs().max())
    return float(logits.double().std(0).max()) / largest if largest else 0.0


def _identical_pairs(layer: MoE) -> list[tuple[int, int]]:
    """Return pairs of this rank's experts whose weights are equal, as far as they are compared; none if sharded."""
    weights = [weight.detach() for weight in (layer.experts.w_in, layer.experts.w_out)]
    if any(map(is_sharded, weights)):
        return []
    rows = torch.cat([weight.flatten(1)[:, :_MOST_COMPARED] for weight in weights], dim=1)
    pairs = [(a, b) for a, b in combinations(range(len(rows)), 2) if torch.equal(rows[a], rows[b])]
    return [(layer.experts.numbers[a], layer.experts.numbers[b]) for a, b in pairs]


def _change(before: Tensor, after: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((before - after).abs().max() / before.abs().max().clamp(min=1e-30))
