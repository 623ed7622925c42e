"""From a config to its model on its device, in its layout, with initial values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trainer.console import formatting
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.step import NumericsConfig
from trainer.errors import ConfigError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.metrics.system_stats import total_memory
from trainer.models.gpt import GPT
from trainer.moe.dispatch.registry import LocalDispatcherConfig
from trainer.ops.fused_ffn import has_onednn_product
from trainer.ops.kernels import choose_experts_kernel
from trainer.parallel.parallelize import parallelize

_LEAST_VOCABULARY = 256
"""Tokens, where only a file knows how many."""
_WITH_GRADIENT_AND_MOMENTS = 4
_BATCH_BYTES = 50
"""Bytes of a position in `Batch`: six whole numbers and two booleans."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def whole_model(config: ExperimentConfig, tokenizer: Tokenizer) -> GPT:
    """Make the model without values, as it is in one process."""
    kernel = config.parallel.experts_kernel
    assert kernel != "auto", "resolve_kernel comes first"
    with torch.device("meta"), _default_dtype(torch.float64 if config.train.dtype == "float64" else torch.float32):
        return GPT(config.model, tokenizer.vocab_size, experts_kernel=kernel)


def check_memory(config: ExperimentConfig, layout: Layout, device: torch.device) -> None:
    """Refuse a training that cannot fit into the memory of this machine, before anything of it is made.

    Only what must be there at once is counted: weights, gradients and moments, one micro-batch's activations, and on a
    CPU the rows of a step. Whether the rest fits is seen when it is asked for.

    Raises:
        ResourceError: saying what needs how much, and which key lowers it.
    """
    model, train, size = config.model, config.train, 8 if config.train.dtype == "float64" else 4
    rows_of_rank = -(-train.global_batch_size // layout.world_size)
    vocab_size = getattr(config.data.tokenizer, "vocab_size", _LEAST_VOCABULARY)
    weights = model.weights(vocab_size=vocab_size)
    experts_here = 0 if model.moe is None else model.moe.num_experts // layout.ep_size
    # Sharded weights are made whole first; whoever shards the moments has at least the weights whole.
    is_copied = config.parallel.data == "replicate" and isinstance(config.engine, NativeEngineConfig)
    held = size * (_WITH_GRADIENT_AND_MOMENTS if is_copied else 1) * (weights.dense + experts_here * weights.expert)
    num_rows = min(config.parallel.micro_batch_size, rows_of_rank)
    computed = size // 2 * model.activations(vocab_size=vocab_size, num_rows=num_rows)  # or in bfloat16
    batch = _BATCH_BYTES * rows_of_rank * model.seq_len if device.type == "cpu" else 0
    ranks_here = layout.ranks_per_node if device.type == "cpu" else 1
    needed, there = ranks_here * (held + computed + batch), total_memory(device)
    if needed <= there:
        return
    parts = {
        "weights with gradients and moments" if is_copied else "weights": (
            held,
            "model.d_model, model.num_layers or the experts, or share these among more ranks (parallel.ep_size)",
        ),
        "activations of one micro-batch": (computed, "parallel.micro_batch_size or model.seq_len"),
        "rows of one step": (batch, "train.global_batch_size or model.seq_len"),
    }
    what, (most, advice) = max(parts.items(), key=lambda part: part[1][0])
    where = f"{ranks_here} ranks on this machine need" if ranks_here > 1 else "it needs"
    raise ResourceError(
        f"{config.name}: {where} at least {formatting.size(needed)} of memory ({formatting.size(ranks_here * most)} "
        f"for {what}), and there are {formatting.size(there)}; lower {advice}"
    )


def build_model(
    config: ExperimentConfig, tokenizer: Tokenizer, mesh: Mesh, device: torch.device, *, warn: Callable[[str], None]
) -> GPT:
    """Make the initialised model on its device, in its layout."""
    can_compile = device.type != "cpu" or runtime.has_cpp_compiler()
    if config.parallel.compile and not can_compile:
        warn(
            "parallel.compile: true needs a C++ compiler (g++ or clang++), and there is none: going on without, slower"
        )
    return parallelize(
        whole_model(config, tokenizer),
        config.parallel,
        mesh,
        device,
        seed=config.seed,
        dtype=_DTYPES[config.train.dtype],
        can_compile=can_compile,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters in `dtype`; buffers that state their own dtype, such as the selection bias, keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def resolve_kernel(config: ExperimentConfig, device: torch.device) -> ExperimentConfig:
    """Replace `experts_kernel: auto` by what it means on this device, so that the run folder records it.

    Raises:
        ConfigError: if the kernel that is asked for is not in this build of torch.
    """
    if config.parallel.experts_kernel == "fused_onednn" and not has_onednn_product():
        raise ConfigError("parallel.experts_kernel: fused_onednn is not in this build of torch; use fused")
    if config.parallel.experts_kernel != "auto":
        return config
    moe, dtype = config.model.moe, _DTYPES[config.train.dtype]
    kernel = "loop"
    if moe is not None:
        tokens = config.parallel.micro_batch_size * config.model.seq_len
        kernel = choose_experts_kernel(
            device.type,
            dtype,
            cpu_vendor=runtime.cpu_vendor(),
            rows_per_expert=int(tokens * moe.experts_per_token / moe.num_experts),
            d_model=config.model.d_model,
            d_ff=moe.d_ff,
        )
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"experts_kernel": kernel})})


def numerics(config: ExperimentConfig) -> NumericsConfig:
    """Return what an engine must know of `train` and `seed`."""
    return NumericsConfig(seed=config.seed, dtype=_DTYPES[config.train.dtype], grad_clip=config.train.grad_clip)


def in_one_process(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config for one process that takes no steps: it has no use for another engine than the native one."""
    alone = config.parallel.model_copy(
        update={"ep_size": 1, "data": "replicate", "dispatcher": LocalDispatcherConfig()}
    )
    return config.model_copy(update={"parallel": alone, "engine": NativeEngineConfig()})
