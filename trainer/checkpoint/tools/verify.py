"""Verify a checkpoint beyond its hashes: names in the files, finite values, distinct experts.

Two equal experts were seeded or sharded wrongly (FastMoE #4) and stay equal, since they get the same gradients.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
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

_BLOCK_BYTES = 64 << 20  # in memory at a time, unless a single expert is larger


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Findings of one checkpoint."""

    step: int
    findings: list[str] = field(default_factory=list)
    """One line each; empty if the checkpoint is intact."""
    num_tensors: int = 0
    num_experts: int = 0
    """Experts per layer; 0 for a dense model."""
    num_layers: int = 0
    size_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def verify_checkpoint(folder: CheckpointFolder, step: int) -> VerifyReport:
    """Read a whole checkpoint in blocks, and return everything that is wrong with it."""
    path = folder.of_step(step)
    try:
        manifest = folder.manifest(step)
    except CheckpointError as error:
        return VerifyReport(step=step, findings=[str(error)])
    findings, damaged = [], set()
    for name, stated in sorted(manifest.files.items()):
        try:
            check_file(path, name, stated)
        except CheckpointError as error:
            findings.append(str(error))
            damaged.add(name)
    unlisted = sorted({entry.name for entry in path.iterdir()} - manifest.files.keys() - {MANIFEST})
    findings += [f"{path}: {shown(name)} is not a file of this checkpoint; nothing reads it" for name in unlisted]
    findings += [f"{path}: {problem}" for problem in run_record_problems(manifest)]
    unreadable = {name for file in damaged for name in _listed_names(file, manifest)}
    for name in sorted(manifest.files.keys() - damaged):
        present, problems = _present_names(path / name, manifest)
        findings += problems
        unreadable |= _listed_names(name, manifest) - present
    may_be_equal = manifest.step == 0 and "made_from" in manifest.run  # experts that were copied and not yet trained
    with StoredTensors(path, manifest) as tensors:
        for name, stored in manifest.tensors.items():
            if name not in unreadable:
                findings += _check_values(path, name, stored, tensors, may_be_equal=may_be_equal)
    experts = [(name, stored) for name, stored in manifest.tensors.items() if stored.is_of_experts]
    layers = {name.rpartition(".")[0] for name, _ in experts if name.startswith(WEIGHT)}
    num_experts = max((stored.length for _, stored in experts), default=0)
    return VerifyReport(step, findings, len(manifest.tensors), num_experts, len(layers), manifest.size_bytes)


def _listed_names(file: str, manifest: Manifest) -> set[str]:
    """Return the tensor names that the manifest lists for a file."""
    return {name for name, stored in manifest.tensors.items() if any(part.file == file for part in stored.slices)}


def _present_names(path: Path, manifest: Manifest) -> tuple[set[str], list[str]]:
    """Return the tensor names in a file, and its differences from the manifest."""
    try:
        present = set(open_tensors(path).keys())
    except CheckpointError as error:
        return set(), [str(error)]
    listed, problems = _listed_names(path.name, manifest), []
    if missing := sorted(listed - present):
        problems.append(f"{path}: lacks {missing[0]}, which {MANIFEST} lists there ({len(missing)} such)")
    if extra := sorted(present - listed):
        problems.append(f"{path}: has {shown(extra[0])}, which {MANIFEST} does not list there ({len(extra)} such)")
    return present, problems


def _check_values(
    path: Path, name: str, stored: StoredTensor, tensors: StoredTensors, *, may_be_equal: bool
) -> Iterator[str]:
    where = f"{path}: {name}"
    not_finite: dict[int, int] = {}
    negative: dict[int, int] = {}
    starts_by_hash: defaultdict[bytes, list[int]] = defaultdict(list)
    try:
        for start, block in _blocks(name, stored, tensors):
            if block.is_floating_point():
                not_finite[start] = int((~block.isfinite()).sum())
                negative[start] = int((block < 0).sum()) if name.startswith("optim.exp_avg_sq.") else 0
            # Moments and biases that are all zero may be equal: experts without tokens, or a checkpoint of step 0.
            is_matrix = name.startswith(WEIGHT) and block.dim() > 2
            if stored.is_of_experts and block.dim() > 1 and (is_matrix or bool(block.any())):
                starts_by_hash[_hash(block)].append(start)
    except CheckpointError as error:
        yield str(error)
        return
    for counts, what in ((not_finite, "not finite"), (negative, "negative")):
        if any(counts.values()):
            experts = [start for start, count in counts.items() if count]
            of = f", in {_listed('expert', experts)} of {stored.length}" if stored.is_of_experts else ""
            yield f"{where}: {sum(counts.values())} values are {what}{of}"
    for same in starts_by_hash.values():
        if len(same) > 1 and not may_be_equal:
            yield f"{where}: {_listed('expert', same)} of {stored.length} are equal to the last bit"


def _blocks(name: str, stored: StoredTensor, tensors: StoredTensors) -> Iterator[tuple[int, Tensor]]:
    """Yield (first index, block) of a tensor: experts one by one, others in blocks of _BLOCK_BYTES."""
    if 0 in stored.shape:
        return
    length = 1 if stored.is_of_experts else max(1, _BLOCK_BYTES // stored.index_bytes)
    for start in range(0, stored.length, length):
        yield start, tensors.read(name, start, min(length, stored.length - start))


def _hash(block: Tensor) -> bytes:
    return hashlib.sha256(block.contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _listed(noun: str, numbers: list[int]) -> str:
    """Return `expert 3`, `experts 1 and 2` or `experts 0, 1, 2, 3, 4, 5, 6, 7 and 56 more`."""
    first, rest = numbers[:8], len(numbers) - 8
    words = [str(number) for number in first] + ([f"{rest} more"] if rest > 0 else [])
    joined = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{noun}{'' if len(numbers) == 1 else 's'} {joined}"
