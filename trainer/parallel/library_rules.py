"""Rules for configs with a dispatcher by a library. Imports no torch."""

from collections.abc import Iterator

from trainer.config.base import Problem
from trainer.models.config import ModelConfig
from trainer.moe.config import MoEConfig
from trainer.moe.dispatch.registry import SymmetricMemoryDispatcherConfig, TokenLibraryOptions
from trainer.parallel.config import ParallelConfig

_MOST_SHARING = 32
"""Ranks that exchange rows through symmetric memory: trainer/distributed/symmetric_rows.py says why."""
_INSTEAD = "use all_to_all or deduplicated_all_to_all"


def library_problems(model: ModelConfig, parallel: ParallelConfig, dtype: str) -> Iterator[Problem]:
    """Yield what kernels of a library do not take, if they are the dispatcher."""
    moe, dispatcher, key = model.moe, parallel.dispatcher, "parallel.dispatcher.kind"
    if moe is None or not dispatcher.needs_gpus:
        return
    if parallel.device == "cpu":
        text = f"{dispatcher.kind} exchanges between GPUs, and parallel.device is cpu; {_INSTEAD}"
        yield Problem(key, text)
    if isinstance(dispatcher, TokenLibraryOptions):
        for text in _of_tokens(model, moe, parallel, dtype):
            yield Problem(key, f"{dispatcher.kind} {text}; {_INSTEAD}")
        tokens = parallel.micro_batch_size * model.seq_len // parallel.row_size
        if tokens > dispatcher.tokens_per_rank:
            given = f"{dispatcher.tokens_per_rank}, and a micro-batch has {tokens} tokens"
            remedy = "raise it, or lower parallel.micro_batch_size"
            yield Problem("parallel.dispatcher.tokens_per_rank", f"{given}; {remedy}")
    if isinstance(dispatcher, SymmetricMemoryDispatcherConfig) and parallel.ep_size > _MOST_SHARING:
        given = f"{parallel.ep_size}, and symmetric_memory exchanges between at most {_MOST_SHARING} ranks"
        yield Problem("parallel.ep_size", f"{given}; use {_MOST_SHARING} or fewer, or {_INSTEAD.removeprefix('use ')}")


def _of_tokens(model: ModelConfig, moe: MoEConfig, parallel: ParallelConfig, dtype: str) -> Iterator[str]:
    """Yield what kernels that sum tokens do not take."""
    if dtype != "bfloat16":
        yield f"sends rows in bfloat16, and train.dtype is {dtype}; use bfloat16"
    if moe.num_experts % parallel.ep_size:
        given = f"{moe.num_experts} experts over ep_size {parallel.ep_size}"
        yield f"needs equally many experts on all ranks, not {given}"
    if not moe.router.has_fixed_k:
        yield f"needs a fixed number of experts per token, unlike {moe.router.kind}"
    if moe.diversity_coef:
        yield "does not dispatch each assignment apart (model.moe.diversity_coef)"
    if model.d_model % 8:
        yield f"needs model.d_model to be a multiple of 8, not {model.d_model}"
