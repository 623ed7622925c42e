"""Compute the router logits of a trained run on held-out text.

# B rows of S tokens, T = B * S, L MoE layers, E experts.
"""

import sys

import torch
from torch import Tensor

from trainer.checkpoint.choice import NEWEST
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.data.batches.batch import Batch
from trainer.engine.base import Engine
from trainer.errors import ConfigError
from trainer.evaluation.routing_gap import held_out_rows
from trainer.experiment import ExperimentConfig
from trainer.lab.logits import LayerLogits, Logits, training_context
from trainer.moe.routing import RoutingOptions
from trainer.training.load_trained import load_trained
from trainer.training.run_text import corpus_of_run


def logits_of_run(config: ExperimentConfig, folder: RunFolder, *, sequences: int, seed: int) -> Logits:
    """Return the logits of every MoE layer of a run, on evenly spaced rows of its held-out text.

    The model runs as in training, with noise, so that later layers get the inputs they were trained on. `sequences` is
    the number of rows to measure: at least one per domain, fewer if there are no more. Rows alternate between
    measurement and warm-up; a single row serves as both.

    Raises:
        CheckpointError: if there is no checkpoint to load.
        ConfigError: if the run's routers compute no logits.
    """
    console = Console(file=sys.stderr)
    engine, tokenizer, _ = load_trained(config, folder, NEWEST, warn=console.warning)
    with console.progress_bar("reading text") as bar:
        corpus = corpus_of_run(config, folder, tokenizer, progress=bar)
    rows_per_domain = 2 * -(-sequences // len(corpus.domains))
    batches = held_out_rows(
        corpus,
        packing=config.data.packing,
        seq_len=config.model.seq_len,
        rows_of_a_domain=rows_per_domain,
        batch_size=min(rows_per_domain, config.parallel.micro_batch_size),
    )
    parts = [_batch_logits(engine, batch, config, seed=seed) for batch in batches]
    tokens, valid = (torch.cat([part[index] for part in parts]) for index in (0, 1))  # (B, S)
    logits = torch.cat([part[2] for part in parts], dim=1)  # (L, B, S, E)
    measured, warmup = slice(0, None, 2), slice(1, None, 2) if len(tokens) > 1 else slice(0, None)
    return Logits(
        kind="traced",
        layers=[
            LayerLogits(name=f"layer {i}", measured=layer[measured].flatten(0, 1), warmup=[layer[warmup].flatten(0, 1)])
            for i, layer in zip(config.model.moe_layers, logits, strict=True)
        ],
        context=training_context(tokens[measured], valid[measured], seed=seed),
        warmup_context=training_context(tokens[warmup], valid[warmup], seed=seed),
    )


def _batch_logits(
    engine: Engine, batch: Batch, config: ExperimentConfig, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (B, S), their validity (B, S) and logits (L, B, S, E) of rows that are not padding."""
    moe = config.model.moe
    assert moe is not None, "the command checked that the run has MoE layers"
    batch = batch.to(engine.model.device)
    with torch.no_grad(), engine.autocast():
        output = engine.model(batch, RoutingOptions(noise_seed=seed, return_router_outputs=True))
    is_text = batch.valid.any(1)
    layers = [stats.routed.logits for stats in output.moe if stats.routed is not None]
    logits = [layer[:, : moe.num_experts].float().cpu() for layer in layers if layer is not None]  # no null experts
    if not logits:
        raise ConfigError(f"--run: its router, {moe.router.kind}, computes no logits; name a run whose router does")
    stacked = torch.stack(logits).view(len(logits), *batch.valid.shape, -1)
    return batch.tokens[is_text], batch.valid[is_text], stacked[:, is_text]
