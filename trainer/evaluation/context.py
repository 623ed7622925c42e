"""Evaluation context: the model, its process group and its token budget for a forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.distributed.collectives import Group
from trainer.engine.base import Engine

KV_CACHE_BATCH_FACTOR = 4
"""Tokens of a cached pass for each token of a training micro-batch: inference keeps one layer's activations and few
logits, where training keeps all layers' and a logit for each token and entry of the vocabulary."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalContext:
    """The model under evaluation, its process group and its token budget."""

    engine: Engine
    world: Group
    """All ranks. Each examines its part, and all run the same number of forward passes, since experts exchange tokens
    in each of them."""
    tokens_per_pass: int
    """Most tokens of a forward pass of one rank, padding included; a row that is longer has one of its own."""

    @property
    def seq_len(self) -> int:
        """Tokens that the model can read at once."""
        return self.engine.model.config.seq_len


def batches(
    items: Sequence[_Item], sizes: Sequence[int], *, budget: int, most: int | None = None
) -> Iterator[list[_Item]]:
    """Cut items into lists of neighbours.

    Args:
        items: what to cut; alike ones should stand together.
        sizes: tokens of each.
        budget: most tokens of a list, each item filled up to the longest in it; one alone may have more.
        most: most items of a list.
    """
    batch: list[_Item] = []
    longest = 0
    for item, size in zip(items, sizes, strict=True):
        longest = max(longest, size)
        if batch and (longest * (len(batch) + 1) > budget or len(batch) == most):
            yield batch
            batch, longest = [], size
        batch.append(item)
    if batch:
        yield batch
