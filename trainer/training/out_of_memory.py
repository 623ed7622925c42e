"""Advice for running out of memory, by phase: each context manager wraps one of them."""

from contextlib import AbstractContextManager

from trainer.errors import explain_out_of_memory
from trainer.experiment import ExperimentConfig


def reading_text() -> AbstractContextManager[None]:
    """Text becomes tokens, side by side."""
    return explain_out_of_memory("text is read", "lower data.workers, each of which holds a part of it")


def making_weights(config: ExperimentConfig, *, num_parameters: int) -> AbstractContextManager[None]:
    """Weights get memory and their initial values, whole but for the experts of other ranks."""
    return explain_out_of_memory(
        f"the weights are made ({num_parameters / 1e6:.1f}M parameters in all)", _smaller_model(config)
    )


def making_optimizer(config: ExperimentConfig) -> AbstractContextManager[None]:
    """The optimizer's two moments of every weight get memory."""
    shares = "" if config.parallel.data == "shard" else "cut it over more ranks (parallel.data: shard), or "
    return explain_out_of_memory(
        "the optimizer state is made, two numbers for each weight", f"{shares}{_smaller_model(config)}"
    )


def taking_steps(config: ExperimentConfig) -> AbstractContextManager[None]:
    """Rows go forward and backward, a micro-batch at a time."""
    return explain_out_of_memory("a step is taken", _smaller_batch(config))


def evaluating(config: ExperimentConfig) -> AbstractContextManager[None]:
    """Rows go forward, as many together as in a micro-batch."""
    return explain_out_of_memory("the model is evaluated", _smaller_batch(config))


def saving(config: ExperimentConfig) -> AbstractContextManager[None]:
    """Wrap the copy of what this rank writes, which lets training go on meanwhile."""
    is_copied = config.checkpoint.asynchronous
    advice = "set checkpoint.asynchronous: false, which makes no copy of it" if is_copied else _smaller_model(config)
    return explain_out_of_memory("the state is copied to be saved", advice)


def reading_checkpoint(config: ExperimentConfig) -> AbstractContextManager[None]:
    """Tensors are read from a checkpoint, one at a time beside the model."""
    more = " (parallel.ep_size)" if config.model.moe is not None else ""
    return explain_out_of_memory("a checkpoint is read", f"use more ranks{more}, or a machine with more memory")


def _smaller_batch(config: ExperimentConfig) -> str:
    rows = config.parallel.micro_batch_size
    if rows > 1:
        return f"lower parallel.micro_batch_size, which is {rows}"
    return f"parallel.micro_batch_size is 1 already: lower model.seq_len, or {_smaller_model(config)}"


def _smaller_model(config: ExperimentConfig) -> str:
    if config.model.moe is None:
        return "make the model smaller (model.d_model, model.d_ff, model.num_layers)"
    return (
        "make the model smaller (model.moe.num_experts, model.moe.d_ff, model.d_model, model.num_layers), or share its "
        "experts among more ranks (parallel.ep_size)"
    )
