"""Weights of a verified checkpoint, read a region at a time."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Final

from torch import Tensor

from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.convert.compare_tensors import CheckpointRows
from trainer.convert.link_tensors import to_theirs
from trainer.convert.linked_weights import parts_of, region
from trainer.families.link import Link

_BLOCK_BYTES: Final = 32 << 20


class CheckpointWeights:
    """The model's parameters and buffers in a checkpoint, by the names they have in the model."""

    def __init__(self, checkpoint: CheckpointHandle) -> None:
        self.folder: Path = checkpoint.path
        self._rows = CheckpointRows(checkpoint.path, checkpoint.manifest)
        self.shapes = {
            name.removeprefix(WEIGHT): tuple(stored.shape)
            for name, stored in checkpoint.manifest.tensors.items()
            if name.startswith(WEIGHT)
        }
        """Shape of each tensor."""

    def parts(self, link: Link) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield a link's tensor of theirs in parts that fit into memory, each with its range of dimension 0."""
        shape = self.shapes[link.ours]
        (begin, _), *inside = region(link, shape)
        for (first, last), part in parts_of(link, shape, index_bytes=4 * prod(shape[1:])):
            rows = self._rows.read(WEIGHT + link.ours, begin + first, begin + last)
            yield (first, last), to_theirs(rows[(slice(None), *(slice(*span) for span in inside))], part)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first index, block) of a tensor, in blocks of bounded size along dimension 0."""
        shape = self.shapes[name]
        most = max(1, _BLOCK_BYTES // max(1, 4 * prod(shape[1:])))
        for start in range(0, shape[0], most):
            yield start, self._rows.read(WEIGHT + name, start, min(start + most, shape[0]))
