"""Rules for configs with a dispatcher by a library. Imports no torch."""

from collections.abc import Iterator

from trainer.config.base import Problem
from trainer.models.config import ModelConfig
from trainer.moe.dispatch.registry import DeepEPDispatcherConfig
from trainer.parallel.config import ParallelConfig


def library_problems(model: ModelConfig, parallel: ParallelConfig, dtype: str) -> Iterator[Problem]:
    """Yield what DeepEP's kernels do not take, if they are the dispatcher."""
    moe, dispatcher, key = model.moe, parallel.dispatcher, "parallel.dispatcher.kind"
    if moe is None or not isinstance(dispatcher, DeepEPDispatcherConfig):
        return
    instead = "use all_to_all or deduplicated_all_to_all"
    if parallel.device == "cpu":
        yield Problem(key, f"deepep exchanges between GPUs, and parallel.device is cpu; {instead}")
    if dtype != "bfloat16":
        yield Problem(key, f"deepep sends rows in bfloat16, and train.dtype is {dtype}; use bfloat16, or {instead}")
    if moe.num_experts % parallel.ep_size:
        given = f"{moe.num_experts} experts over ep_size {parallel.ep_size}"
        yield Problem(key, f"deepep needs equally many experts on all ranks, not {given}; {instead}")
    if not moe.router.has_fixed_k:
        yield Problem(key, f"deepep needs a fixed number of experts per token, unlike {moe.router.kind}; {instead}")
    if moe.diversity_coef:
        yield Problem(key, f"deepep does not dispatch each assignment apart (model.moe.diversity_coef); {instead}")
    if model.d_model % 8:
        yield Problem(key, f"deepep needs model.d_model to be a multiple of 8, not {model.d_model}; {instead}")
    tokens = parallel.micro_batch_size * model.seq_len // parallel.row_size
    if tokens > dispatcher.tokens_per_rank:
        given = f"{dispatcher.tokens_per_rank}, and a micro-batch has {tokens} tokens"
        remedy = "raise it, or lower parallel.micro_batch_size"
        yield Problem("parallel.dispatcher.tokens_per_rank", f"{given}; {remedy}")
