"""Corrupt a checkpoint on disk: every corruption is detected, and the previous checkpoint is used.

python -m tests.chaos.corruption --count 1000 --seed 0

A run of two ranks is trained and saved several times, in several files each. Then the newest checkpoint is corrupted,
one at a time, and restored in between. A corruption that does not change the meaning of a file is drawn again: the same
bytes, or for the manifest the same JSON (its hash covers the content, not the white space).
"""

import argparse
import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.builders import make_batch, make_engine, rows_of, tiny_model_config
from tests.checkpoint_helpers import whole
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint import tensor_files
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find_newest
from trainer.checkpoint.saver import Saver
from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import even_slice
from trainer.errors import CheckpointError

MANIFEST = "manifest.json"
STEPS = (2, 4, 6)
_FILE_SIZE_BYTES = 16_000  # small, so that every rank writes several files

Corruption = Callable[[Path, Path, random.Random], None]
"""Damages a file of a checkpoint; the second path is the same file of the checkpoint before it."""


@dataclass(slots=True, kw_only=True)
class Result:
    """Counts of corruptions, by kind, and those that were missed."""

    count: int = 0
    by_harm: Counter[str] = field(default_factory=Counter)
    by_file: Counter[str] = field(default_factory=Counter)
    drawn_again: int = 0
    """Corruptions that changed nothing; they are not among `count`."""
    not_noticed: list[str] = field(default_factory=list)
    """Corruptions after which the damaged checkpoint was used, or was passed over without a word."""
    not_loadable: list[str] = field(default_factory=list)
    """Corruptions after which the checkpoint before it was not there in full, bit for bit."""

    def __str__(self) -> str:
        """Return a summary in one line."""
        kinds = ", ".join(f"{corruption} {times}" for corruption, times in sorted(self.by_harm.items()))
        noticed, loadable = self.count - len(self.not_noticed), self.count - len(self.not_loadable)
        return (
            f"{self.count} corruptions of {len(self.by_file)} files ({kinds}): {noticed} noticed and fallen back from, "
            f"after {loadable} a checkpoint is loadable bit for bit; {self.drawn_again} changed nothing, drawn again"
        )


def make_run(folder: Path, ranks: Ranks) -> None:
    """Train a tiny model on two ranks and save it at each of STEPS."""
    ranks.run(2, _train_and_save, folder)


def corrupt(folder: Path, count: int, seed: int) -> Result:
    """Damage the newest checkpoint `count` times; it is as it was in the end.

    Args:
        folder: with the checkpoints of a run, at least two.
        count: corruptions that change something.
        seed: the same one draws the same corruptions.
    """
    steps, result, chance = CheckpointFolder(folder).steps(), Result(), random.Random(seed)
    newest, older = (CheckpointFolder(folder).of_step(step) for step in (steps[-1], steps[-2]))
    good = {path.name: path.read_bytes() for path in sorted(newest.iterdir())}
    expected = _digest(_found(folder, older))
    while result.count < count:
        name = sorted(good)[result.count % len(good)]  # every file in turn
        corruption = chance.choice(sorted(CORRUPTIONS))
        CORRUPTIONS[corruption](newest / name, older / name, chance)
        if _says_the_same(newest, good):
            result.drawn_again += 1
        else:
            result.count += 1
            result.by_harm[corruption] += 1
            result.by_file[name] += 1
            _judge(folder, newest, expected, f"{corruption} of {name} (#{result.count} of seed {seed})", result)
        for file, data in good.items():
            if not (newest / file).is_file() or (newest / file).read_bytes() != data:
                (newest / file).write_bytes(data)
    return result


def _judge(folder: Path, newest: Path, expected: str, what: str, result: Result) -> None:
    warnings: list[str] = []
    try:
        found = find_newest(CheckpointFolder(folder), Group.of_one(), warn=warnings.append)
    except CheckpointError:
        found = None
    if found is None or found.path == newest or len(warnings) != 1 or newest.name not in warnings[0]:
        result.not_noticed.append(what)
    if found is None or (found.path != newest and _digest(found) != expected):
        result.not_loadable.append(what)


def _found(folder: Path, path: Path) -> CheckpointHandle:
    step = int(path.name.removeprefix("step_"))
    return CheckpointHandle(path=path, manifest=CheckpointFolder(folder).check(step))


def _digest(found: CheckpointHandle) -> str:
    """Return a hash of all tensors of a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in whole(found).items():
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _says_the_same(folder: Path, good: dict[str, bytes]) -> bool:
    return all(_content(folder / name) == _content(folder / name, data) for name, data in good.items())


def _content(path: Path, data: bytes | None = None) -> object:
    """Return the meaning of a file's bytes: for a manifest its JSON, if it is valid."""
    if data is None:
        if not path.is_file():
            return None
        data = path.read_bytes()
    if path.name == MANIFEST:
        try:
            return json.dumps(json.loads(data), sort_keys=True)
        except ValueError:
            return data
    return data


def _flip(path: Path, older: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, older: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(1, len(data))])


def _empty(path: Path, older: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def _delete(path: Path, older: Path, chance: random.Random) -> None:
    path.unlink()


def _grow(path: Path, older: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.choice([b"\0", b" ", b"\n", b"}", chance.randbytes(512)]))


def _zero_block(path: Path, older: Path, chance: random.Random) -> None:
    """A block of the disk that reads as zeros, or as something else where it was zeros."""
    data, size = bytearray(path.read_bytes()), chance.choice([512, 4096])
    start = chance.randrange(0, len(data), size)
    block = data[start : start + size]
    data[start : start + size] = bytes([0 if any(block) else 0xFF]) * len(block)
    path.write_bytes(data)


def _take_older(path: Path, older: Path, chance: random.Random) -> None:
    path.write_bytes(older.read_bytes())


def _swap_within(path: Path, older: Path, chance: random.Random) -> None:
    other = chance.choice(sorted(entry for entry in path.parent.iterdir() if entry != path and entry.is_file()))
    here, there = path.read_bytes(), other.read_bytes()
    path.write_bytes(there)
    other.write_bytes(here)


CORRUPTIONS: dict[str, Corruption] = {
    "bit flip": _flip,
    "cut": _truncate,
    "emptied": _empty,
    "deleted": _delete,
    "grown": _grow,
    "zeroed block": _zero_block,
    "file of an older one": _take_older,
    "two files swapped": _swap_within,
}


def _train_and_save(folder: Path) -> None:
    """On each of two ranks, which share the experts."""
    tensor_files.FILE_SIZE_BYTES = _FILE_SIZE_BYTES
    mesh = mesh_here(ep_size=2)
    engine = make_engine(tiny_model_config({"num_experts": 8}), seed=1, mesh=mesh)
    saver = Saver(CheckpointFolder(folder, keep=len(STEPS)), mesh)
    for step in range(STEPS[-1]):
        batch = make_batch(4, 8, seed=step, first_sample=4 * step)
        engine.train_step([rows_of(batch, *even_slice(4, 2, mesh.layout.rank))], lr=1e-2)
        if step + 1 in STEPS:
            saver.start(step + 1, engine.state(), {"position": 4 * (step + 1)})
            saved = saver.wait()
            assert saved is not None and saved.error is None, saved


def main() -> None:
    """Print the counts; exit with 1 if a corruption was missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_run(Path(folder), ranks)
        finally:
            ranks.close()
        result = corrupt(Path(folder), options.count, options.seed)
    print(result)
    for what in (*result.not_noticed, *result.not_loadable):
        print(f"  missed: {what}")
    raise SystemExit(1 if result.not_noticed or result.not_loadable else 0)


if __name__ == "__main__":
    main()
