"""Verify that a checkpoint keeps the format's promises and that its values make sense, beyond what a hash shows.

A run may save weights that are not finite, and every byte of them is right. Two experts that are equal were seeded or
sharded wrongly (FastMoE #4) and stay equal, since they get the same gradients.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.file_integrity import check_file
from trainer.checkpoint.manifest import MANIFEST, Manifest, StoredTensor, run_record_problems
from trainer.checkpoint.safetensors_file import open_tensors
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.config.nodes import shown
from trainer.errors import CheckpointError

_BLOCK_BYTES = 64 << 20  # what is in memory at a time, unless a single expert is larger
_SQUARES = "optim.exp_avg_sq."


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Findings of one checkpoint."""

    step: int
    findings: list[str] = field(default_factory=list)
    """One line each; none: it is sound."""
    num_tensors: int = 0
    num_experts: int = 0
    """Experts of a layer; 0 for a dense model."""
    num_layers: int = 0
    """With experts."""
    size_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def verify_checkpoint(folder: CheckpointFolder, step: int) -> VerifyReport:
    """Read all of a checkpoint, a block of a tensor at a time."""
    path = folder.of_step(step)
    try:
        manifest = folder.manifest(step)
    except CheckpointError as error:
        return VerifyReport(step=step, findings=[str(error)])
    findings, unsound = [], set()
    for name, stated in sorted(manifest.files.items()):
        try:
            check_file(path, name, stated)
        except CheckpointError as error:
            findings.append(str(error))
            unsound.add(name)
    findings += [f"{path}: {flaw}" for flaw in _strangers(path, manifest)]
    findings += [f"{path}: {flaw}" for flaw in run_record_problems(manifest)]
    unreadable = {name for file in unsound for name in _placed_in(file, manifest)}
    for name in sorted(manifest.files.keys() - unsound):
        there, flaws = _names_in(path / name, manifest)
        findings += flaws
        unreadable |= _placed_in(name, manifest) - there
    with StoredTensors(path, manifest) as tensors:
        for name, stored in manifest.tensors.items():
            if name not in unreadable:
                findings += _look_at(path, name, stored, tensors)
    experts = [(name, stored) for name, stored in manifest.tensors.items() if stored.is_of_experts]
    layers = {name.rpartition(".")[0] for name, _ in experts if name.startswith(WEIGHT)}
    return VerifyReport(
        step=step,
        findings=findings,
        num_tensors=len(manifest.tensors),
        num_experts=max((stored.length for _, stored in experts), default=0),
        num_layers=len(layers),
        size_bytes=manifest.size_bytes,
    )


def _strangers(path: Path, manifest: Manifest) -> Iterator[str]:
    for name in sorted(entry.name for entry in path.iterdir()):
        if name != MANIFEST and name not in manifest.files:
            yield f"{shown(name)} is no file of this checkpoint; nothing reads it"


def _placed_in(file: str, manifest: Manifest) -> set[str]:
    """Return the names of the tensors that the manifest places in a file."""
    return {name for name, stored in manifest.tensors.items() if any(part.file == file for part in stored.slices)}


def _names_in(path: Path, manifest: Manifest) -> tuple[set[str], list[str]]:
    """Return the names in a file, and what is wrong with them."""
    try:
        there = set(open_tensors(path).keys())
    except CheckpointError as error:
        return set(), [str(error)]
    placed, flaws = _placed_in(path.name, manifest), []
    if lacking := sorted(placed - there):
        flaws.append(f"{path}: lacks {lacking[0]}, which {MANIFEST} places there ({len(lacking)} such names)")
    if more := sorted(there - placed):
        flaws.append(f"{path}: has {shown(more[0])}, which {MANIFEST} does not place there ({len(more)} such names)")
    return there, flaws


def _look_at(path: Path, name: str, stored: StoredTensor, tensors: StoredTensors) -> Iterator[str]:
    """Yield what is wrong with the numbers of one tensor."""
    where = f"{path}: {name}"
    not_finite: dict[int, int] = {}
    negative: dict[int, int] = {}
    of_bytes: defaultdict[bytes, list[int]] = defaultdict(list)
    try:
        for start, block in _blocks(name, stored, tensors):
            if block.is_floating_point():
                _count(not_finite, start, ~block.isfinite())
                if name.startswith(_SQUARES):
                    _count(negative, start, block < 0)
            # Moments of experts that never had a token are all zero, and so are those of a run's first checkpoint.
            if stored.is_of_experts and block.dim() > 1 and (name.startswith(WEIGHT) or bool(block.any())):
                of_bytes[_hash(block)].append(start)
    except CheckpointError as error:
        yield str(error)
        return
    for counts, what in ((not_finite, "not finite"), (negative, "negative")):
        if counts:
            of = f", in {_listed('expert', sorted(counts))} of {stored.length}" if stored.is_of_experts else ""
            yield f"{where}: {sum(counts.values())} values are {what}{of}"
    for same in of_bytes.values():
        if len(same) > 1:
            yield f"{where}: {_listed('expert', same)} of {stored.length} are equal to the last bit"


def _blocks(name: str, stored: StoredTensor, tensors: StoredTensors) -> Iterator[tuple[int, Tensor]]:
    """Yield pieces of a tensor with their first index: experts one by one, others as large as memory shall take."""
    if 0 in stored.shape:
        return
    length = 1 if stored.is_of_experts else max(1, _BLOCK_BYTES // stored.index_bytes)
    for start in range(0, stored.length, length):
        yield start, tensors.read(name, start, min(length, stored.length - start))


def _count(found: dict[int, int], start: int, mask: Tensor) -> None:
    number = int(mask.sum())
    if number:
        found[start] = number


def _hash(block: Tensor) -> bytes:
    return hashlib.sha256(block.contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _listed(noun: str, numbers: list[int]) -> str:
    """Write `expert 3`, `experts 1 and 2`, `experts 0, 1, 2, 3, 4, 5, 6, 7 and 56 more`."""
    first, rest = numbers[:8], len(numbers) - 8
    words = [str(number) for number in first] + ([f"{rest} more"] if rest > 0 else [])
    joined = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{noun}{'' if len(numbers) == 1 else 's'} {joined}"
