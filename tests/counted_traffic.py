"""What a rank exchanges at start, comparison of copies, save and resume: the real code on simulated ranks.

    python -m tests.counted_traffic 8 64 512

prints the table of docs/scale.md.
"""

import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.simulated_ranks import Traffic, World
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import find_newest
from trainer.checkpoint.replica_check import check_copies
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.consistency import differences_across_ranks
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.metrics.system_stats import reduce_over_ranks
from trainer.step_timer import PARTS

_LAYERS, _CONFIG = 4, {"model": {f"key_{i}": i for i in range(300)}}
_PER_NODE = 8


def state_of(mesh: Mesh, *, is_sharded: bool) -> TrainState:
    """Return a state of experts and of dense weights, both with moments; dense ones are copies, or shards."""
    slices = {}
    ep, shard = mesh.ep, mesh.shard
    for prefix in ("model.", "optim.exp_avg.", "optim.exp_avg_sq."):
        for layer in range(*even_slice(_LAYERS, mesh.pp.size, mesh.pp.index)):
            rows = torch.full((8, 2), float(layer))
            if is_sharded:
                local = rows.repeat(shard.size, 1)[: 8 * shard.size]
                slices[f"{prefix}w{layer}"] = Slice(tensor=rows, global_shape=tuple(local.shape), start=8 * shard.index)
            else:
                slices[f"{prefix}w{layer}"] = Slice.whole(rows)
            experts = torch.full((2, 4), float(ep.index))
            slices[f"{prefix}e{layer}"] = Slice(
                tensor=experts, global_shape=(2 * ep.size, 4), start=2 * ep.index, is_of_experts=True
            )
    return TrainState(slices=slices, values={"optimizer_steps": 1})


def phases(folder: Path, *, is_sharded: bool) -> Iterator[tuple[str, Callable[[Mesh], Any]]]:
    """Yield what ranks do together, by name, in its order."""
    checkpoints = CheckpointFolder(folder)
    savers: dict[int, Saver] = {}

    def start(mesh: Mesh) -> None:
        assert not differences_across_ranks(mesh.world, {"host": socket.gethostname(), **_CONFIG})
        for _ in range(8):  # as often as `training/main.py` and `setup.py` agree that no rank has failed
            with raise_together(mesh.world):
                pass
        assert find_newest(checkpoints, mesh.world, warn=print) is None

    def compare(mesh: Mesh) -> None:
        check_copies(state_of(mesh, is_sharded=is_sharded), mesh, step=1, equal_at=None)

    def save(mesh: Mesh, step: int) -> None:
        saver = savers.setdefault(mesh.layout.rank, Saver(checkpoints, mesh))
        saver._mesh, saver._group = mesh, mesh.saving
        saver.start(step, state_of(mesh, is_sharded=is_sharded), {})
        saved = saver.wait()
        saver.close()
        assert saved is not None and saved.error is None, saved

    few_at_once = threading.Semaphore(_PER_NODE * 16)  # all read here, and a process may map some 65,000 files

    def resume(mesh: Mesh) -> None:
        found = find_newest(checkpoints, mesh.world, warn=print)
        assert found is not None and found.step == 2
        wanted = state_of(mesh, is_sharded=is_sharded)
        with few_at_once, StoredTensors(found.path, found.manifest) as tensors:
            for name, part in tensors.like(wanted).slices.items():
                assert torch.equal(part.tensor, wanted.slices[name].tensor), name

    def log(mesh: Mesh) -> None:
        reduce_over_ranks(dict.fromkeys(PARTS, 1.0), {"system/x": 1.0}, mesh.host)

    yield "start", start
    yield "log a step", log
    yield "compare copies", compare
    yield "first save", lambda mesh: save(mesh, 1)
    yield "save", lambda mesh: save(mesh, 2)
    yield "resume", resume


def count(world_size: int, *, is_sharded: bool = False, pp_size: int = 1) -> dict[str, tuple[list[Traffic], float]]:
    """Return the traffic of every rank in each phase, and the seconds of all ranks on this machine."""
    counted = {}
    stage_size = world_size // pp_size
    degrees = {"ep_size": min(stage_size, _PER_NODE), "ranks_per_node": _PER_NODE, "pp_size": pp_size}
    if is_sharded:
        degrees["shard_size"] = min(stage_size, _PER_NODE)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("trainer.checkpoint.tensor_files.os.fsync"),
        patch("torch.cuda.is_available", lambda: False),
    ):
        world = World(world_size, **degrees)
        world.run(lambda mesh: None)  # which makes the groups
        for name, act in phases(Path(folder), is_sharded=is_sharded):
            began = time.perf_counter()
            world.run(act)
            counted[name] = world.take_traffic(), time.perf_counter() - began
    return counted


def main() -> None:
    """Print rank 0, rank 1 and the last, for each number of ranks."""
    print("phase           ranks | rank 0: messages, bytes | rank 1 | last rank | seconds of all ranks here")
    for world_size in map(int, sys.argv[1:]):
        for name, (traffic, seconds) in count(world_size, is_sharded=True).items():
            shown = [f"{one.messages:>5}, {one.received_bytes:>7}" for one in (traffic[0], traffic[1], traffic[-1])]
            print(f"{name:<16}{world_size:>5} | {' | '.join(shown)} | {seconds:.1f}", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of all {world_size}: {peak:.0f} MB")


if __name__ == "__main__":
    main()
