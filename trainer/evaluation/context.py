"""Evaluation context: the model, its process group and its token budget for a forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from trainer.distributed.collectives import Group
from trainer.engine.base import Engine

KV_CACHE_BATCH_FACTOR = 4
"""Tokens of a cached pass per token of a training micro-batch: inference keeps one layer's activations and few logits,
where training keeps all layers' and one logit per token and vocabulary entry."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalContext:
    """The model under evaluation, its process group and its token budget."""

    engine: Engine
    world: Group
    """All ranks. Each evaluates its share, and all run the same number of forward passes, since experts exchange tokens
    in each of them."""
    tp: Group = field(default_factory=Group.of_one)
    """Ranks that hold one copy of the heads together, so that they evaluate the same share."""
    pp: Group = field(default_factory=Group.of_one)
    """Ranks that hold the layers of one copy together, so that they evaluate the same share."""
    tokens_per_pass: int
    """Token budget of one rank's forward pass, padding included; a longer sequence gets a pass of its own."""

    @property
    def num_shares(self) -> int:
        """Number of shares that evaluations are split into."""
        return self.world.size // self.pp.size // self.tp.size

    @property
    def share(self) -> int:
        """Index of this rank's share."""
        return self.world.index % (self.world.size // self.pp.size) // self.tp.size

    @property
    def is_first_of_share(self) -> bool:
        """Whether this is the rank, of those with its share, that sends the results."""
        return self.tp.index == 0 and self.pp.index == 0

    @property
    def seq_len(self) -> int:
        """Longest sequence of the model, in tokens."""
        return self.engine.model.config.seq_len


def split_batches(
    items: Sequence[_Item], sizes: Sequence[int], *, budget: int, max_items: int | None = None
) -> Iterator[list[_Item]]:
    """Split items, given with their sizes in tokens, into batches of neighbours, which should have similar sizes.

    A batch has at most `max_items` items and, each padded to the longest, `budget` tokens; a single item may have more.
    """
    batch, longest = list[_Item](), 0
    for item, size in zip(items, sizes, strict=True):
        longest = max(longest, size)
        if batch and (longest * (len(batch) + 1) > budget or len(batch) == max_items):
            yield batch
            batch, longest = [], size
        batch.append(item)
    if batch:
        yield batch
