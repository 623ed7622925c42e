"""Weights of a verified checkpoint, read a region at a time, with the memory of what is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from torch import Tensor

from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.families.link import Link

_MAPPED_BYTES: Final = 64 << 20
"""Files are mapped into memory; what was read of them stays there until they are closed."""


class CheckpointWeights:
    """The model's parameters and buffers in a checkpoint, by the names they have in the model."""

    def __init__(self, checkpoint: CheckpointHandle) -> None:
        self.folder: Path = checkpoint.path
        self._manifest: Manifest = checkpoint.manifest
        self._tensors = StoredTensors(self.folder, self._manifest)
        self._mapped_bytes = 0
        self.shapes = {
            name.removeprefix(WEIGHT): tuple(stored.shape)
            for name, stored in self._manifest.tensors.items()
            if name.startswith(WEIGHT)
        }
        """Shape of each tensor."""

    def region(self, link: Link) -> Tensor:
        """Return a copy of the region `link.at` of a tensor."""
        first, *inside = link.at or ((0, self.shapes[link.ours][0]),)
        rows = self.read(link.ours, first[0], first[1] - first[0])
        return rows[(slice(None), *(slice(*r) for r in inside))].clone()

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0 of a tensor; valid until the next call."""
        if self._mapped_bytes > _MAPPED_BYTES:
            self._tensors, self._mapped_bytes = StoredTensors(self.folder, self._manifest), 0
        found = self._tensors.read(WEIGHT + name, start, length)
        self._mapped_bytes += found.nbytes
        return found

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first index, block) of a tensor, in blocks of bounded size along dimension 0."""
        stored = self._manifest.tensors[WEIGHT + name]
        length = max(1, _MAPPED_BYTES // max(1, stored.index_bytes))
        for start in range(0, stored.length, length):
            yield start, self.read(name, start, min(length, stored.length - start))
