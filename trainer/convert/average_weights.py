"""Average the weights of several checkpoints of one model: soups, and exponential moving averages over a run.

Source: Model Soups (Wortsman et al. 2022, arXiv 2203.05482); checkpoints of one run, or of runs from one start.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from trainer.checkpoint.coverage import WEIGHT
from trainer.convert.hidden_units import weighted_mean
from trainer.convert.loaded_run import WeightSource
from trainer.convert.router_columns import tensors_of
from trainer.errors import CheckpointError
from trainer.models.gpt import GPT


@torch.no_grad()
def average_weights(sources: Sequence[WeightSource], model: GPT, shares: Sequence[float]) -> list[str]:
    """Fill a model with the weighted mean of checkpoints, one tensor at a time; return what was done.

    The shares add up to 1. Sums are in float64. Integers, which only a plug-in's buffers have, are the first one's.

    Raises:
        CheckpointError: if the checkpoints are of different tokenizers or models.
    """
    first = sources[0].checkpoint
    for other in (source.checkpoint for source in sources[1:]):
        if other.run["tokenizer_fingerprint"] != first.run["tokenizer_fingerprint"]:
            raise CheckpointError(f"{other.path}: has another tokenizer than {first.path}; average runs of one")
    with ExitStack() as stack:
        stored = [stack.enter_context(source.weights(model)) for source in sources]
        for name, tensor in tensors_of(model).items():
            values = [one.read(f"{WEIGHT}{name}") for one in stored]
            tensor.copy_(weighted_mean(values, shares) if tensor.is_floating_point() else values[0])
    return [
        f"{share:.4g} of {source.folder.path.name} at step {source.checkpoint.step}"
        for source, share in zip(sources, shares, strict=True)
    ]
