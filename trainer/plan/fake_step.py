"""Take one fake step of a config as one rank of a layout."""

from collections.abc import Sequence

import torch

from trainer.distributed.rank_layout import Layout
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.ops.package_experts import PACKAGE_EXPERTS
from trainer.plan.assumed_load import AssumedLoad, skewed_shares
from trainer.plan.assumed_values import UnknownValue
from trainer.plan.fake_ranks import fake_mesh, fake_tensors
from trainer.plan.step_probe import ProbedStep, ProbeOptions, probe_step
from trainer.training.model import resolve_kernel

_NO_FAKES = ("triton", "mxfp8", *PACKAGE_EXPERTS)
"""Kernels that run on GPUs alone; what they keep is that of `grouped`."""


def num_ids_of(config: ExperimentConfig) -> int:
    """Return the ids of a config's tokenizer, or the rows of its embedding if these are known before a file is read.

    Raises:
        ConfigError: if neither is known.
    """
    tokenizer = config.data.tokenizer
    known = 256 if tokenizer.kind == "byte" else getattr(tokenizer, "vocab_size", None)
    known = config.model.vocab_size or known
    if known is None:
        raise ConfigError(
            f"data.tokenizer: how many ids a tokenizer of kind {tokenizer.kind} has is known once its file is read; "
            "set model.vocab_size to at least as many"
        )
    return known


def load_of(
    config: ExperimentConfig, ep_size: int, imbalance: float, shares: Sequence[float] = ()
) -> AssumedLoad | None:
    """Return the load to assume: recorded shares (E,) of the experts, or skewed ones; None for a dense model."""
    moe = config.model.moe
    if moe is None:
        return None
    top_k = max(1, round(moe.experts_per_token))
    return AssumedLoad(shares or skewed_shares(moe.num_experts, ep_size, imbalance), top_k)


def runnable(config: ExperimentConfig, device: str) -> ExperimentConfig:
    """Return the config with what `device` would have, or what stands for it under fake tensors."""
    parallel = config.parallel
    parallel = parallel.model_copy(update={"dispatcher": parallel.dispatcher.on_any_device()})
    config = config.model_copy(update={"parallel": parallel})
    if parallel.experts_kernel in _NO_FAKES:
        config = config.model_copy(update={"parallel": parallel.model_copy(update={"experts_kernel": "grouped"})})
    return resolve_kernel(config, torch.device(device))


def fake_step(
    config: ExperimentConfig,
    layout: Layout,
    load: AssumedLoad | None,
    *,
    device: str,
    micro_batches: tuple[int | None, int | None] = (None, None),
) -> ProbedStep:
    """Take a step as the layout's rank, for a device that need not be here.

    `micro_batches` are those of the step before and of the one that is measured: see `ProbeOptions`.

    Fake tensors count as those of a CPU, on which every operation is known, whatever the device.

    Raises:
        ConfigError: if the model's routing depends on values, so that sizes cannot be known.
    """
    first, taken = micro_batches
    options = ProbeOptions(num_ids=num_ids_of(config), num_micro_batches=taken, first_micro_batches=first)
    try:
        with fake_mesh(layout) as mesh, fake_tensors(load):
            return probe_step(runnable(config, device), mesh, torch.device("cpu"), options)
    except UnknownValue as error:
        moe = config.model.moe
        kind = "its routing" if moe is None else f"routing by {moe.router.kind}"
        raise ConfigError(
            f"model.moe.router: {kind} decides by values how much is sent and computed: {error}; plan "
            "with top_k, whose sizes follow from an assumed load"
        ) from error
