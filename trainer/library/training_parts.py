"""Parts for your own training loop in one process: the model, its batches, its loss and the update of its routers."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import build_corpus, build_tokenizer
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.library.config import check_config
from trainer.models.gpt import GPT
from trainer.moe.losses import Denominators, objective
from trainer.moe.routing import RoutingOptions
from trainer.moe.stats import MoEStats
from trainer.training.model import build_parallel_model, resolve_kernel, single_process


def build_model(config: ExperimentConfig, *, device: str | torch.device = "cpu") -> GPT:
    """Return the model of a config with initial values, which are a function of `seed`.

    The size of the vocabulary is the tokenizer's, so a `bpe` reads the text if the cache does not have it.

    Raises:
        TypeError: if `config` is not an `ExperimentConfig`.
        ConfigError: if this machine has no such device.
    """
    check_config(config)
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= (num_gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"device: {device}, but torch sees {num_gpus or 'no'} GPU{'s' * (num_gpus > 1)} here; use cpu"
        )
    config = resolve_kernel(single_process(config), device)
    return build_parallel_model(config, build_tokenizer(config.data), Mesh.of_one(), device, warn=lambda _: None)


def load_batches(config: ExperimentConfig, *, batch_size: int | None = None, first_row: int = 0) -> Iterator[Batch]:
    """Return batches of training rows without end, in the order of a run.

    Args:
        config: its `data`, `model.seq_len` and `seed`.
        batch_size: rows of a batch; None: `train.global_batch_size`.
        first_row: number of the first row, to resume.

    Raises:
        TypeError: if `config` is not an `ExperimentConfig`.
        ValueError: if a number is not whole or too small.
    """
    check_config(config)
    count = config.train.global_batch_size if batch_size is None else batch_size
    for name, value, least in (("batch_size", count, 1), ("first_row", first_row, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return _batches(config, count, first_row)


def _batches(config: ExperimentConfig, count: int, first_row: int) -> Iterator[Batch]:
    seq_len = config.model.seq_len
    corpus = build_corpus(config.data, seq_len=seq_len)
    stream = TrainStream(corpus, packing=config.data.packing, seq_len=seq_len, seed=config.seed)
    while True:
        stream.load_blocks(first_row, count, prefetch=True)
        yield stream.rows(first_row, count)
        first_row += count


def training_loss(model: GPT, batch: Batch, *, seed: int = 0) -> tuple[Tensor, tuple[MoEStats, ...]]:
    """Return the loss of a batch and the routing statistics of each MoE layer.

    The loss is the cross-entropy per target token plus the auxiliary losses of the model's config.

    Args:
        model: the model.
        batch: a whole optimizer step, on the model's device; losses over a global batch use this batch.
        seed: of the routing noise, which differs from row to row.
    """
    output = model(batch, RoutingOptions(noise_seed=seed))
    moe = model.config.moe
    share = objective(
        output.row_loss.sum(),
        output.moe,
        global_stats=None,
        denominators=Denominators(target_tokens=batch.target_weight or 1.0, routed_tokens=batch.num_valid),
        losses=None if moe is None else moe.aux_losses,
        vocab_z=output.vocab_z,
    )
    return share.total, output.moe


def update_routers(model: GPT, stats: Sequence[MoEStats]) -> None:
    """Update the routers with a selection bias (`bias_balanced`) from the loads of a step; others ignore it.

    Call it after each `optimizer.step()`; `train` does the same.

    Args:
        model: the model.
        stats: returned by `training_loss`.
    """
    for moe, layer_stats in zip(model.moe_layers(), stats, strict=True):
        moe.router.update(layer_stats.choices())
