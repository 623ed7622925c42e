"""Save checkpoints: snapshot the state, then write it in the background and commit it with a rename.

    training loop | copy this rank's parts |  next steps ...                                     | result
    background    |                        | write, hash, flush | vote of all ranks | manifest, rename | prune

The rename happens only after every rank has voted that its files are on disk; if one rank fails, the save fails on all.
A save is reported only after its rename. Old checkpoints are pruned last: verifying which are intact can mean reading
them all.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import fault_injection
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.finite import check_finite
from trainer.checkpoint.manifest import FORMAT, MANIFEST, Manifest, StoredFile, StoredSlice, StoredTensor
from trainer.checkpoint.manifest_file import manifest_text
from trainer.checkpoint.plan import SavePlan, StatePart
from trainer.checkpoint.plan_together import plan_together
from trainer.checkpoint.shared_fs import VISIBLE_S
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import PartKey, files_of, write_durably, write_files
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.distributed.wire_format import error_from_wire, error_to_wire
from trainer.errors import CheckpointError, ResourceError, TurnoutError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Saved:
    """Result of a save; the same on every rank."""

    step: int
    path: Path
    error: TurnoutError | None
    """Why the save failed; None if it succeeded."""
    size_bytes: int
    stalled_s: float
    """Time for which the save blocked this rank's training loop."""
    behind_s: float
    """Time from the snapshot to the rename."""


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    tensors: dict[PartKey, Tensor]
    """Parts of tensors that this rank writes, in CPU memory."""
    values: dict[str, int | float | str]
    run: dict[str, Any]
    prunes: bool


class Saver:
    """Saves the checkpoints of one run, on one of its ranks; one save at a time.

    With `copies=False` the state is not copied before it is written, so it must not change before the save has ended.
    """

    def __init__(self, folder: CheckpointFolder, mesh: Mesh, *, copies: bool = True) -> None:
        self.folder, self._mesh, self._group, self._copies = folder, mesh, mesh.saving, copies
        self._plan: SavePlan | None = None
        self._size_bytes = 0  # of a whole checkpoint
        self._buffers: dict[PartKey, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: threading.Event | None = None
        """Set when the result of the current save is known; None if there is no save, or its result was returned."""
        self._outcome: Saved | None = None
        self._failure: BaseException | None = None
        self._stalled_s = 0.0

    def start(self, step: int, state: TrainState, run: Mapping[str, Any], *, prunes: bool = True) -> None:
        """Take a snapshot and start to write it; collective, and only while no other save is in progress.

        `step` counts completed steps. `state` may change as soon as this returns. `run` is the JSON record of the run,
        of which rank 0's is written. `prunes`: prune old checkpoints afterwards, which may take long.

        Raises:
            CheckpointError: if the ranks together do not hold the whole state; on every rank.
            NumericsError: if a value is not finite; on every rank.
        """
        assert self._ended is None, "wait for the last save first"
        self.close()
        began = time.perf_counter()
        if self._plan is None:  # placement does not change within a run
            self._plan = plan_together(state, self._mesh)
            self._size_bytes = self._plan.size_bytes
        fault_injection.hit("save.planned")
        parts = self._plan.of_rank(self._mesh.layout.rank)
        check_finite({name: state.slices[name] for name, _ in parts}, self._mesh.world, self.folder, step=step)
        tensors = {
            (name, part.start): self._copy((name, part.start), _rows(state.slices[name], part)) for name, part in parts
        }
        job = _Job(step, tensors, dict(state.values), dict(run), prunes)
        if any(part.tensor.is_cuda for part in state.slices.values()):
            torch.cuda.synchronize()
        fault_injection.hit("save.snapshot")
        self._ended, self._outcome = threading.Event(), None
        self._thread = threading.Thread(target=self._work, args=(job, began, self._ended), name="saver", daemon=True)
        self._thread.start()
        self._stalled_s = time.perf_counter() - began

    def finished(self) -> Saved | None:
        """Return the result of a save that has ended, once, as `wait` does; None without a save, or while it runs."""
        return self.wait() if self._ended is not None and self._ended.is_set() else None

    def wait(self) -> Saved | None:
        """Wait for the current save, however long it takes while all ranks are alive; return its result, or None.

        Raises:
            CommError: if a rank was lost meanwhile.
        """
        ended, began = self._ended, time.perf_counter()
        if ended is None:
            return None
        if self._mesh.world.watch is not None:
            self._mesh.world.watch.wait_until(ended.wait)
        ended.wait()
        self._ended = None
        self._raise_failure()
        assert self._outcome is not None
        self._stalled_s += time.perf_counter() - began
        fault_injection.hit("save.finished")
        return replace(self._outcome, stalled_s=self._stalled_s)

    def close(self) -> None:
        """Wait for the background thread: until the last save has also pruned old checkpoints."""
        if self._thread is not None:
            self._thread.join()
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _copy(self, key: PartKey, tensor: Tensor) -> Tensor:
        """Copy a tensor into a CPU buffer that the next save reuses."""
        if not self._copies:
            return tensor.detach().cpu()
        if key not in self._buffers:
            self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._buffers[key].copy_(tensor.detach(), non_blocking=True)

    def _work(self, job: _Job, began: float, ended: threading.Event) -> None:
        try:
            error = self._write(job)
            path, behind_s = self.folder.of_step(job.step), time.perf_counter() - began
            self._outcome = Saved(job.step, path, error, self._size_bytes, stalled_s=0.0, behind_s=behind_s)
            ended.set()
            if error is None and job.prunes and self._group.index == 0:
                self.folder.prune(newest=job.step)
        except BaseException as caught:  # raised in the training loop, by `wait` or `close`
            self._failure = caught
        finally:
            ended.set()

    def _write(self, job: _Job) -> TurnoutError | None:
        """Write a checkpoint together with the other ranks; return the error, if any."""
        is_first, temporary = self._group.index == 0, self.folder.temporary(job.step)
        error = self._attempt(job, lambda: self.folder.begin(job.step)) if is_first else None
        error = _first_error(self._group, error)
        if error is None:
            files: dict[str, StoredFile] = {}
            try:
                _wait_for(temporary)
                files = write_files(temporary, job.tensors, rank=self._group.index)
            except (OSError, MemoryError) as refused:
                error = self._explain(job, refused)
            fault_injection.hit("save.before_vote")
            reports = self._group.gather_objects([list(stored.model_dump().values()) for stored in files.values()])
            error = _first_error(self._group, error)
            fault_injection.hit("save.voted")
            if reports is not None and error is None:
                error = self._attempt(job, lambda: self._commit(job, reports))
        if is_first and error is not None:
            self.folder.abandon(job.step)
        return _first_error(self._group, error)

    def _commit(self, job: _Job, reports: Sequence[Sequence[tuple[int, str]]]) -> None:
        """Write the manifest, given the size and hash of each file of each rank, in order, and rename the folder."""
        assert self._plan is not None
        temporary, tensors = self.folder.temporary(job.step), {}
        files: dict[str, StoredFile] = {}
        file_of: dict[tuple[int, PartKey], str] = {}
        sizes = self._plan.sizes_by_rank()
        for rank, written in enumerate(reports):
            named = files_of(sizes.get(rank, {}), rank=rank)
            for (name, keys), (size_bytes, sha256) in zip(named.items(), written, strict=True):
                files[name] = StoredFile(size_bytes=size_bytes, sha256=sha256)
                file_of |= {(rank, key): name for key in keys}
        for name, place in self._plan.places.items():
            slices = [
                StoredSlice(file=file_of[part.rank, (name, part.start)], start=part.start, length=part.length)
                for part in self._plan.parts[name]
            ]
            tensors[name] = StoredTensor(
                dtype=place.dtype,
                shape=list(place.shape),
                is_of_experts=place.is_of_experts,
                is_frozen=place.is_frozen,
                slices=slices,
            )
        for name, stored in files.items():
            size_bytes = (temporary / name).stat().st_size  # FileNotFoundError: not a shared file system
            if size_bytes != stored.size_bytes:
                raise OSError(errno.EIO, f"{name} has {size_bytes} bytes instead of {stored.size_bytes}")
        manifest = Manifest(format=FORMAT, step=job.step, run=job.run, values=job.values, tensors=tensors, files=files)
        fault_injection.hit("save.before_manifest")
        text = manifest_text(manifest)
        write_durably(temporary / MANIFEST, [text[: len(text) // 2], text[len(text) // 2 :]])
        self.folder.commit(job.step)

    def _attempt(self, job: _Job, act: Callable[[], object]) -> TurnoutError | None:
        try:
            act()
        except (OSError, MemoryError) as error:
            return self._explain(job, error)
        except CheckpointError as error:
            return error
        return None

    def _explain(self, job: _Job, error: OSError | MemoryError) -> ResourceError:
        where = f"{self.folder.path}: step {job.step} not saved"
        if self._group.size > 1:
            where += f" (rank {self._group.index})"
        if isinstance(error, MemoryError):
            return ResourceError(f"{where}: out of memory (the checkpoint has {self._size_bytes / 1e6:.0f} MB)")
        refused = f"{where}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        if error.errno not in _OUT_OF_SPACE:
            return ResourceError(refused)
        existing = next(folder for folder in (self.folder.path, *self.folder.path.parents) if folder.exists())
        free = os.statvfs(existing)
        free_mb = free.f_bavail * free.f_frsize / 1e6
        return ResourceError(f"{refused} (it needs {self._size_bytes / 1e6:.0f} MB, {free_mb:.0f} MB are free)")


def _rows(part: Slice, wanted: StatePart) -> Tensor:
    """Return the rows of a slice that are to be written; all of it if its indices are consecutive."""
    if part.numbers is None:
        return part.tensor
    first = next(first for first, start, _ in part.spans if start == wanted.start)
    return part.tensor[first : first + wanted.length]


def _first_error(group: Group, error: TurnoutError | None) -> TurnoutError | None:
    """Return the error of the first rank that has one; collective."""
    if not group.any(error is not None):
        return None
    reports = group.all_gather_objects(error_to_wire(error))
    return next((error_from_wire(report) for report in reports if report is not None), None)


def _wait_for(folder: Path) -> None:
    end = time.monotonic() + VISIBLE_S
    while not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.05)
