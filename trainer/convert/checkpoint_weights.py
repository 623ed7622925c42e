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
from trainer.convert.merge_adapters import merged_weight
from trainer.families.link import Link
from trainer.models.parameter_roles import factor_names, is_adapter

_BLOCK_BYTES: Final = 32 << 20


class CheckpointWeights:
    """The model's parameters and buffers in a checkpoint, by the names they have in the model.

    Adapters are merged: a weight W that has one is W + s B A, rounded once to the dtype of W.
    """

    def __init__(self, checkpoint: CheckpointHandle, *, lora_scale: float | None = None) -> None:
        """Open a checkpoint; the scale s is that of its adapters, None without any."""
        self.folder: Path = checkpoint.path
        self._scale = lora_scale
        self._rows = CheckpointRows(checkpoint.path, checkpoint.manifest)
        self.shapes = {
            name.removeprefix(WEIGHT): tuple(stored.shape)
            for name, stored in checkpoint.manifest.tensors.items()
            if name.startswith(WEIGHT) and not is_adapter(name)
        }
        """Shape of each tensor but the adapters."""
        self.adapters = {
            name: factor_names(name)
            for name in self.shapes
            if WEIGHT + factor_names(name)[0] in checkpoint.manifest.tensors
        }
        """Names of both factors of each weight that has an adapter."""

    def parts(self, link: Link) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield a link's tensor of theirs in parts that fit into memory, each with its range of dimension 0."""
        shape = self.shapes[link.ours]
        (begin, _), *inside = region(link, shape)
        for (first, last), part in parts_of(link, shape, index_bytes=4 * prod(shape[1:])):
            rows = self._read(link.ours, begin + first, begin + last)
            yield (first, last), to_theirs(rows[(slice(None), *(slice(*span) for span in inside))], part)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first index, block) of a tensor, in blocks of bounded size along dimension 0."""
        shape = self.shapes[name]
        most = max(1, _BLOCK_BYTES // max(1, 4 * prod(shape[1:])))
        for start in range(0, shape[0], most):
            yield start, self._read(name, start, min(start + most, shape[0]))

    def factor(self, name: str) -> Tensor:
        """Return a factor of an adapter, by its own name."""
        return self._rows.read(WEIGHT + name, 0, self._rows.manifest.tensors[WEIGHT + name].shape[0])

    def _read(self, name: str, first: int, last: int) -> Tensor:
        """Return indices first .. last - 1 of dimension 0, with the adapter."""
        rows = self._rows.read(WEIGHT + name, first, last)
        if name not in self.adapters or self._scale is None:
            return rows
        a_name, b_name = (WEIGHT + factor for factor in self.adapters[name])
        # Experts have factors of their own, the rows of a matrix one A.
        a_rows = (first, last) if rows.dim() == 3 else (0, self._rows.manifest.tensors[a_name].shape[0])
        return merged_weight(rows, self._rows.read(a_name, *a_rows), self._rows.read(b_name, first, last), self._scale)
