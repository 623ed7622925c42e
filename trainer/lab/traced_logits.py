"""Logits of a trained run: what the routers of its newest checkpoint make of held-out text.

# B rows of S tokens, T = B * S, L MoE layers, E experts.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.data.batches.batch import Batch
from trainer.data.corpus import build_corpus
from trainer.engine.base import Engine
from trainer.errors import ConfigError
from trainer.evaluation.routing_gap import held_out_rows
from trainer.experiment import ExperimentConfig
from trainer.lab.logits import LayerLogits, Logits, training_context
from trainer.moe.routing import RoutingOptions
from trainer.training.resume import load_trained


def traced(config: ExperimentConfig, folder: RunFolder, *, sequences: int, seed: int) -> Logits:
    """Return the logits of every MoE layer of a run, on evenly spaced rows of its held-out text.

    The model runs as in training, with noise, so that later layers see what they saw then. Of neighbouring rows one is
    measured and one rehearsed; where there is only one, it is both.

    Args:
        config: of the run.
        folder: where its checkpoints are.
        sequences: rows to measure, B: one of each domain at least, and fewer if there are no more.
        seed: of the noise.

    Raises:
        CheckpointError: if there is no checkpoint to load.
        ConfigError: if its routers have no logits.
    """
    console = Console(file=sys.stderr)
    engine, tokenizer, _ = load_trained(config, folder, step=None, warn=console.warning)
    with console.progress_bar("reading text") as bar:
        corpus = build_corpus(config.data, tokenizer=tokenizer, progress=bar)
    rows_of_a_domain = 2 * -(-sequences // len(corpus.domains))
    batches = held_out_rows(
        corpus,
        packing=config.data.packing,
        seq_len=config.model.seq_len,
        rows_of_a_domain=rows_of_a_domain,
        batch_size=min(rows_of_a_domain, config.parallel.micro_batch_size),
    )
    parts = [_traced_batch(engine, batch, config, seed=seed) for batch in batches]
    tokens, valid = (torch.cat([part[index] for part in parts]) for index in (0, 1))  # (B, S)
    logits = torch.cat([part[2] for part in parts], dim=1)  # (L, B, S, E)
    measured, rehearsed = slice(0, None, 2), slice(1, None, 2) if len(tokens) > 1 else slice(0, None)
    return Logits(
        kind="traced",
        layers=[
            LayerLogits(
                name=f"layer {number}",
                measured=layer[measured].flatten(0, 1),
                rehearsed=[layer[rehearsed].flatten(0, 1)],
            )
            for number, layer in zip(config.model.moe_layers, logits, strict=True)
        ],
        context=training_context(tokens[measured], valid[measured], seed=seed),
        rehearsal=training_context(tokens[rehearsed], valid[rehearsed], seed=seed),
    )


def _traced_batch(
    engine: Engine, batch: Batch, config: ExperimentConfig, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (B, S), which of them are valid, and logits (L, B, S, E), of the rows that are no padding."""
    moe = config.model.moe
    assert moe is not None, "whoever asks has looked"
    here = batch.to(engine.model.embedding.weight.device)
    with torch.no_grad(), engine.autocast():
        output = engine.model(here, RoutingOptions(noise_seed=seed, return_router_outputs=True))
    is_text = batch.valid.any(1)
    layers = [stats.routed.logits for stats in output.moe if stats.routed is not None]
    stacked = [
        _without_nulls(layer, moe.num_experts).view(*batch.valid.shape, -1)
        for layer in _scored(layers, moe.router.kind)
    ]
    return batch.tokens[is_text], batch.valid[is_text], torch.stack(stacked)[:, is_text]


def _scored(layers: Sequence[Tensor | None], kind: str) -> list[Tensor]:
    found = [layer for layer in layers if layer is not None]
    if not found:
        raise ConfigError(f"--run: its router, {kind}, computes no logits; name a run whose router does")
    return found


def _without_nulls(logits: Tensor, num_experts: int) -> Tensor:
    return logits[:, :num_experts].float().cpu()
