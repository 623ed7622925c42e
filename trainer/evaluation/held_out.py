"""Evaluate held-out text: loss and bits per byte by domain, dropless and at capacity.

# L MoE layers, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.batches.assemble import row_slice
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.row_parts import own_part
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.distributed.rank_layout import Layout
from trainer.engine.base import Engine, EvalSums
from trainer.metrics.specialisation import specialisation_metrics
from trainer.moe.capacity import capacity_causality
from trainer.routing_record.record_batches import record_rows
from trainer.routing_record.record_writer import RecordWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainResult:
    """Results of one domain's held-out text."""

    domain: str
    sums: EvalSums
    target_bytes: int
    """UTF-8 bytes of the target tokens."""

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text, comparable between tokenizers."""
        return _bits_per_byte([self])

    @property
    def counts(self) -> list[list[int]]:
        """(L, E) assignments of predicted tokens, without prompts; empty for a dense model."""
        return [] if self.sums.routing is None else self.sums.routing.counts.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Results of all domains' held-out text."""

    domains: Sequence[DomainResult]
    """Dropless."""
    at_capacity: Sequence[DomainResult] | None
    """With the capacity of training; None without a capacity, or if not requested."""
    looks_ahead: bool = False
    """The routing is not causal: a token's experts depend on later tokens, which the model predicts."""
    capacity_looks_ahead: bool = False
    """The same for `at_capacity`: later tokens can displace a token at an expert."""

    def record(self) -> dict[str, float]:
        """Return the evaluation keys of metrics.jsonl."""
        record = {"eval/loss": _loss(self.domains), "eval/bits_per_byte": _bits_per_byte(self.domains)}
        if self.looks_ahead:
            record["eval/looks_ahead"] = 1.0
        if self.capacity_looks_ahead:
            record["eval/capacity_looks_ahead"] = 1.0
        if self.at_capacity is not None:
            record["eval/loss_capacity"] = _loss(self.at_capacity)
        for d in self.domains:
            record[f"eval/{d.domain}/loss"] = _loss([d])
            record[f"eval/{d.domain}/bits_per_byte"] = d.bits_per_byte
        return record | specialisation_metrics(self.counts())

    def counts(self) -> list[list[list[int]]]:
        """Return (L, domains, E) assignments; no layers for a dense model."""
        return [list(layer) for layer in zip(*(d.counts for d in self.domains), strict=True)]


def _loss(domains: Sequence[DomainResult]) -> float:
    """Return the loss over some domains, in nats per target token."""
    return sum(d.sums.loss_sum for d in domains) / max(1, sum(d.sums.target_tokens for d in domains))


def _bits_per_byte(domains: Sequence[DomainResult]) -> float:
    return sum(d.sums.loss_sum for d in domains) / math.log(2) / max(1, sum(d.target_bytes for d in domains))


def evaluate_held_out(
    engine: Engine,
    corpus: Corpus,
    *,
    packing: Packing,
    batch_size: int,
    max_tokens_per_domain: int | None,
    at_capacity: bool,
    layout: Layout,
    top_k: int | None = None,
    record: RecordWriter | None = None,
) -> EvalResult:
    """Evaluate every domain's held-out text, each token at most once. Collective.

    Each rank evaluates its share of a batch, `batch_size` rows in a forward pass; all ranks get the sums of all. The
    token budget of a domain (None: the whole text) is spent on evenly spaced rows. `at_capacity` evaluates a second
    time with the capacity of training, if the model has one; `top_k` replaces the configured number of experts.
    `record` gets this rank's rows with the experts of the first time.
    """
    moe, token_bytes = engine.model.config.moe, corpus.tokenizer.token_bytes()

    def evaluate_domain(index: int, *, dropless: bool) -> DomainResult:
        target_bytes, sums = 0, None
        for batch in evaluation_batches(
            corpus,
            index,
            packing=packing,
            seq_len=engine.model.config.seq_len,
            batch_size=batch_size * layout.data_size,
            max_tokens=max_tokens_per_domain,
        ):
            target_bytes += int(token_bytes[batch.targets[batch.target_mask].numpy()].sum())
            rows = row_slice(batch, batch_size * layout.data_rank, batch_size * (layout.data_rank + 1))
            local = own_part(rows, layout)
            returns = record is not None and dropless
            batch_sums = engine.eval_loss(local, dropless=dropless, top_k=top_k, return_experts=returns)
            if record is not None and batch_sums.experts is not None:
                record_rows(record, local, batch_sums.experts)
            sums = batch_sums if sums is None else sums + batch_sums
        assert sums is not None, "every domain has validation text"
        return DomainResult(domain=corpus.domains[index], sums=sums, target_bytes=target_bytes)

    domains = range(len(corpus.domains))
    has_capacity = at_capacity and moe is not None and moe.capacity.factor is not None
    return EvalResult(
        domains=[evaluate_domain(index, dropless=True) for index in domains],
        at_capacity=[evaluate_domain(index, dropless=False) for index in domains] if has_capacity else None,
        looks_ahead=any(layer.router.causal_in_evaluation != "strict" for layer in engine.model.moe_layers()),
        capacity_looks_ahead=has_capacity
        and moe is not None
        and capacity_causality(moe.capacity, is_training=False) != "strict",
    )
