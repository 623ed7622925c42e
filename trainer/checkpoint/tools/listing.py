"""List a run's checkpoints, comparing file sizes or every byte with the manifests. Imports no torch."""

import datetime
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.file_integrity import check_file
from trainer.checkpoint.manifest import MANIFEST, recorded_layout
from trainer.checkpoint.safetensors_file import check_finite_values
from trainer.errors import CheckpointError, ResourceError


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """One checkpoint of a list."""

    step: int
    size_bytes: int | None
    """Total size of its files; None if the manifest cannot be read."""
    written_s: float
    """Modification time of the manifest, else of the folder: seconds since 1970, by the clock of the writer."""
    layout: dict[str, int | str]
    wrong: str | None
    best: str | None = None
    """Metric by which it is the best of the run."""

    @property
    def written(self) -> str:
        """Time it was written, in local time."""
        return datetime.datetime.fromtimestamp(self.written_s).isoformat(sep=" ", timespec="seconds")

    @property
    def layout_text(self) -> str:
        """Layout in words, such as `2 ranks, ep 2, replicate`."""
        ranks = self.layout.get("world_size")
        words = [] if ranks is None else [f"{ranks} rank{'' if ranks == 1 else 's'}"]
        words += [f"ep {self.layout['ep_size']}"] if "ep_size" in self.layout else []
        words += [f"{key} {self.layout[f'{key}_size']}" for key in ("cp", "tp") if f"{key}_size" in self.layout]
        words += [str(self.layout["data"])] if "data" in self.layout else []
        return ", ".join(words) or "-"

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "step": self.step,
            "size_bytes": self.size_bytes,
            "written": self.written,
            "layout": self.layout,
            "wrong": self.wrong,
            "best": self.best,
        }


def list_checkpoints(folder: CheckpointFolder, *, with_content: bool) -> Iterator[ListedCheckpoint]:
    """Yield the checkpoints, oldest first, without those removed meanwhile.

    With `with_content` hashes are verified and all values must be finite; otherwise only sizes are compared.
    """
    best = folder.best()
    for step in folder.steps():
        with suppress(FileNotFoundError):
            listed = _listed(folder, step, with_content=with_content)
            yield replace(listed, best=best.metric) if best is not None and best.step == step else listed


def _listed(folder: CheckpointFolder, step: int, *, with_content: bool) -> ListedCheckpoint:
    path, manifest, wrong = folder.of_step(step), None, None
    try:
        manifest = folder.manifest(step)
        for name, stated in manifest.files.items():
            check_file(path, name, stated, with_content=with_content)
        if with_content:
            check_finite_values(path, manifest.files)
    except (CheckpointError, ResourceError) as error:
        wrong = str(error)
    size_bytes, layout = (None, {}) if manifest is None else (manifest.size_bytes, recorded_layout(manifest))
    dated = path / MANIFEST if os.path.lexists(path / MANIFEST) else path
    return ListedCheckpoint(step, size_bytes, dated.lstat().st_mtime, layout, wrong)
