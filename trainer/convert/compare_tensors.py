"""Compare a written checkpoint with the published tensors that it was made from, bit for bit, a few rows at a time."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.manifest import Manifest
from trainer.config.nodes import shown_path
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.link_tensors import to_theirs
from trainer.convert.linked_weights import parts_of, region
from trainer.convert.open_shards import OpenShards
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.errors import CheckpointError
from trainer.families.link import Link


class CheckpointRows:
    """Rows of the tensors of a checkpoint, by plain reads: nothing of it stays in memory but headers."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.manifest, self._shards = manifest, OpenShards(ForeignFolder(path))

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Return indices first .. last - 1 of dimension 0."""
        stored, pieces = self.manifest.tensors[name], []
        for part in sorted(stored.slices, key=lambda part: part.start):
            start, end = max(first, part.start), min(last, part.start + part.length)
            if start < end:
                pieces.append(
                    self._shards.shard(part.file).read(stored.kept_as(name), start - part.start, end - part.start)
                )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def close(self) -> None:
        """Close its files; after that nothing more is read."""
        self._shards.close()


def check_equal_tensors(rows: CheckpointRows, source: SafetensorsFolder, links: Iterable[Link]) -> None:
    """Check that each of their tensors, made from ours as an export makes it, is the one on disk.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for link in links:
        stored = rows.manifest.tensors[WEIGHT + link.ours]
        for (first, last), part in parts_of(link, tuple(stored.shape), index_bytes=stored.index_bytes):
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
