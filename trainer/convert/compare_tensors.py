"""Compare a written checkpoint with the published tensors that it was made from, bit for bit, a few rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.manifest import Manifest, StoredTensor
from trainer.config.nodes import shown_path
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.link_tensors import to_theirs
from trainer.convert.linked_weights import independent_rows, region
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.convert.shard_file import ShardFile
from trainer.errors import CheckpointError
from trainer.families.link import Link

_BLOCK_BYTES: Final = 32 << 20


class CheckpointRows:
    """Rows of the tensors of a checkpoint, by plain reads: nothing of it stays in memory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.manifest, self._folder = manifest, ForeignFolder(path)

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Return indices first .. last - 1 of dimension 0."""
        stored, pieces = self.manifest.tensors[name], []
        for part in sorted(stored.slices, key=lambda part: part.start):
            start, end = max(first, part.start), min(last, part.start + part.length)
            if start < end:
                file = ShardFile(self._folder, part.file)
                try:
                    pieces.append(file.read(name, start - part.start, end - part.start))
                finally:
                    file.close()
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def check_equal_tensors(rows: CheckpointRows, source: SafetensorsFolder, links: Iterable[Link]) -> None:
    """Check that each of their tensors, made from ours as an export makes it, is the one on disk.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for link in links:
        stored = rows.manifest.tensors[WEIGHT + link.ours]
        for (first, last), part in _parts(link, stored):
            (begin, _), *inner = region(link, tuple(stored.shape))
            ours = rows.read(WEIGHT + link.ours, begin + first, begin + last)
            ours = ours[(slice(None), *(slice(*span) for span in inner))]
            whole = part.shape == link.shape
            theirs = source.read(link.theirs) if whole else source.read(link.theirs, first, last)
            if not torch.equal(to_theirs(ours, part), theirs.to(ours.dtype)):
                raise CheckpointError(
                    f"{shown_path(source.folder.path)}: {link.theirs} is not what was written of it; a disk or memory "
                    "fails, or this is a bug"
                )


def _parts(link: Link, stored: StoredTensor) -> Iterator[tuple[tuple[int, int], Link]]:
    """Yield ranges of dimension 0 of a link's region, and the link of each alone."""
    lengths = [end - begin for begin, end in region(link, tuple(stored.shape))]
    step = independent_rows(link, lengths)
    if step is None:
        yield (0, lengths[0]), link
        return
    most = max(1, _BLOCK_BYTES // (stored.index_bytes * step)) * step
    for first in range(0, lengths[0], most):
        last = min(first + most, lengths[0])
        yield (first, last), replace(link, shape=(last - first, *link.shape[1:]))
