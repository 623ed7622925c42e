"""Record a trace: decisions and scores of a run's checkpoint that reads text, and its token ids.

# B rows of S tokens, T = B * S, L MoE layers, E experts, n null experts, k experts per token, m listed for each token.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.choice import NEWEST, CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.data.batches.evaluation import batches_of_all_domains
from trainer.data.corpus import Corpus
from trainer.engine.base import Engine
from trainer.errors import ConfigError, DataError
from trainer.experiment import ExperimentConfig
from trainer.models.flops import model_size
from trainer.moe.config import MoEConfig
from trainer.moe.routers.top_k import TopKRouter
from trainer.moe.routing import RouterOutput, RoutingOptions
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.select import stable_top_k
from trainer.routing_record.record_batches import record_rows
from trainer.routing_record.record_manifest import RecordFacts, RecordManifest
from trainer.routing_record.record_writer import RecordWriter, finish_record
from trainer.routing_record.trace_facts import Split, TraceFacts
from trainer.training import memory
from trainer.training.load_trained import load_trained
from trainer.training.routing_recorder import facts_of
from trainer.training.run_text import corpus_of_run


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """Text that a trace reads, and experts that it lists."""

    split: Split = "held-out"
    max_tokens: int | None = None
    """Positions of each domain, as for evaluation. None: all of its text."""
    num_ranked: int | None = None
    """Experts listed for each token, best first. None: twice the model's k."""
    choice: CheckpointChoice = NEWEST
    """Weights to read it with."""


def trace_checkpoint(config: ExperimentConfig, folder: RunFolder, to: Path, options: TraceOptions) -> RecordManifest:
    """Record a trace of a run's checkpoint into a new folder, dropless, and return its manifest.

    Raises:
        DataError: if there is no text to read, or the router does not choose by its own rule.
    """
    console = Console(file=sys.stderr)
    engine, tokenizer, checkpoint = load_trained(config, folder, options.choice, warn=console.warning)
    with console.progress_bar("reading text") as bar:
        corpus = corpus_of_run(config, folder, tokenizer, progress=bar)
    step, choice = checkpoint.step, options.choice
    facts = facts_of(config, tokenizer, origin="eval", step=step, choice=choice, domains=corpus.domains)
    with memory.hint(config, "evaluating the model"):
        return record_trace(config, engine, corpus, facts, to, options)


def record_trace(
    config: ExperimentConfig,
    engine: Engine,
    corpus: Corpus,
    facts: RecordFacts,
    to: Path,
    options: TraceOptions,
) -> RecordManifest:
    """Read a corpus with a model, and record what its routers do."""
    if options.split == "train":
        corpus = replace(corpus, validation=corpus.train)
    trace = trace_facts(config, engine, options)
    facts = facts.model_copy(update={"trace": trace})
    writer = RecordWriter(to, facts.model, vocab_size=facts.vocab_size)
    routing = RoutingOptions(dropless=True, counts_targets_only=True, return_router_outputs=True)
    batches = batches_of_all_domains(
        corpus,
        packing=config.data.packing,
        seq_len=config.model.seq_len,
        batch_size=trace.rows_per_pass,
        max_tokens=options.max_tokens,
    )
    for batch in batches:
        with torch.no_grad(), engine.autocast():
            outputs = [stats.routed for stats in engine.model(batch.to(engine.device), routing).moe]
        layers = [output for output in outputs if output is not None]
        experts = torch.stack([_of_tokens(o, o.decision.expert_index) for o in layers], 1)  # (T, L, k)
        traced = _listed(engine, layers, experts, trace) | {"is_counted": batch.target_mask.flatten() > 0}
        experts, *parts = (x.view(*batch.tokens.shape, *x.shape[1:]) for x in (experts, *traced.values()))
        record_rows(writer, batch, experts, traced=dict(zip(traced, parts, strict=True)))
    writer.flush()
    return finish_record(to, facts)


def trace_facts(config: ExperimentConfig, engine: Engine, options: TraceOptions) -> TraceFacts:
    """Return the facts of a trace of an engine's model.

    Raises:
        ConfigError: if it cannot list as many experts.
    """
    moe, layers = config.model.moe, engine.model.moe_layers()
    assert moe is not None and moe.router.recorded_k is not None, "checked before"
    top_k, choices = moe.router.recorded_k, moe.num_experts + moe.router.num_null_experts
    routers = [layer.router for layer in layers]
    num_ranked = 0
    if all(_is_ranking(router) for router in routers):
        num_ranked = min(choices, 2 * top_k) if options.num_ranked is None else options.num_ranked
        if not top_k <= num_ranked <= choices:
            raise ConfigError(f"--choices: {num_ranked} is not from the model's top_k {top_k} to its {choices} experts")
    elif options.num_ranked is not None:
        raise ConfigError(
            f"--choices: {moe.router.kind} does not rank experts by scores of its own, so only the chosen ones can be "
            "recorded; leave the option out"
        )
    first = routers[0]
    hidden = engine.model.embedding.weight
    with engine.autocast():
        value_bytes = compute_dtype(hidden).itemsize
    matrices = [weight for weight, _ in layers[0].experts.matrices()]
    expert_flops = 2 * sum(weight[0].numel() for weight in matrices)
    return TraceFacts(
        split=options.split,
        rows_per_pass=config.parallel.micro_batch_size,
        row_length=config.model.seq_len,
        num_ranked=num_ranked,
        largest_top_k=_largest_top_k(moe, num_ranked) if num_ranked else top_k,
        normalize=isinstance(first, TopKRouter) and first.normalize,
        scale=first.scale if isinstance(first, TopKRouter) else 1.0,
        score_dtype="float64" if hidden.dtype == torch.float64 else "float32",
        capacity=moe.capacity,
        d_model=config.model.d_model,
        value_bytes=value_bytes,
        expert_flops=expert_flops,
        other_flops=max(0, model_size(engine.model).forward_flops_per_token - len(layers) * top_k * expert_flops),
    )


def _is_ranking(router: object) -> bool:
    """Return whether a router takes the k best of scores that do not depend on k, and weights them by one rule."""
    same = ("forward", "decide")
    return isinstance(router, TopKRouter) and all(getattr(type(router), n) is getattr(TopKRouter, n) for n in same)


def _largest_top_k(moe: MoEConfig, most: int) -> int:
    """Return the largest k up to `most` that the router allows."""
    for top_k in range(most, 0, -1):
        try:
            moe.check_top_k(top_k)
        except ValueError:
            continue
        return top_k
    return most


def _of_tokens(output: RouterOutput, values: Tensor) -> Tensor:
    """Return values of assignments as (T, k)."""
    return values.view(output.decision.num_tokens, -1)


def _listed(engine: Engine, outputs: Sequence[RouterOutput], experts: Tensor, trace: TraceFacts) -> dict[str, Tensor]:
    """Return the further tensors (T, L, ...) of a pass, given the chosen experts (T, L, k)."""
    floats = torch.float64 if trace.score_dtype == "float64" else torch.float32
    if not trace.num_ranked:
        weights = [_of_tokens(output, output.decision.combine_weight) for output in outputs]
        return {"combine_weights": torch.stack(weights, 1).to(floats)}
    ranked, scores, top_k = [], [], experts.shape[2]
    for layer, output in zip(engine.model.moe_layers(), outputs, strict=True):
        assert isinstance(layer.router, TopKRouter) and output.scores is not None, "they rank"
        order = stable_top_k(layer.router.selection_scores(output.scores), trace.num_ranked)  # (T, m)
        ranked.append(order)
        scores.append(output.scores.gather(-1, order))
    order = torch.stack(ranked, 1)  # (T, L, m)
    if not torch.equal(order[..., :top_k], experts):
        raise DataError("the router has not chosen the best of its own scores, so no other k can be told from them")
    return {"further_experts": order[..., top_k:].to(torch.int32), "scores": torch.stack(scores, 1).to(floats)}
