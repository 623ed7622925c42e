"""Law: a run goes on under any other number of ranks, any other split of the experts, with copies or shards."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.builders import make_batch, make_engine, rows_of, tiny_model_config
from tests.checkpoint_helpers import digest, load, resume
from tests.ranks import Ranks, mesh_here
from tests.unit.checkpoint.test_manifest import rewrite
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import find_newest
from trainer.checkpoint.manifest import StoredFile
from trainer.checkpoint.saver import Saver
from trainer.data.batches.row_parts import own_part
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.engine.config import EMAConfig
from trainer.engine.native import NativeEngine
from trainer.errors import CheckpointError
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

pytestmark = pytest.mark.slow

ROWS, SEQ_LEN, EXPERTS, BEFORE = 12, 8, 8, 4
SHORT, LONG = 3, 50
"""Steps after the change. What is lost in it shows in the first ones, at these tolerances; differences that add up do
so in one layout as in another."""
MOE = {
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "router": {"kind": "bias_balanced", "bias_update_rate": 0.05, "jitter": 0.1},
    "balance": {"coef": 0.1, "counts": "previous_step"},
}


@dataclass(frozen=True)
class Where:
    """How a run is laid out."""

    world_size: int
    ep_size: int
    data: str = "replicate"
    shard_size: int | None = None
    placement: str = "contiguous"
    cp_size: int = 1
    cp: str = "ulysses"
    pp_size: int = 1
    tp_size: int = 1
    has_dense_layer: bool = False
    """The model has a layer without experts, sinks and biases, and averaged weights."""
    has_adapters: bool = False
    """And low-rank adapters of all matrices."""

    def __str__(self) -> str:
        rows = f", cp {self.cp_size} {self.cp}" if self.cp_size > 1 else ""
        stages = f", pp {self.pp_size}" if self.pp_size > 1 else ""
        stages += f", tp {self.tp_size}" if self.tp_size > 1 else ""
        shard = f"{self.data} {self.shard_size or ''}"
        what = ", adapters" if self.has_adapters else ""
        return f"{self.world_size} ranks, ep {self.ep_size}, {shard}, {self.placement}{rows}{stages}{what}"


ONE = Where(1, 1)
EP = {size: Where(size, size) for size in (1, 2, 3, 4)}
RESIZES = [(EP[a], EP[b]) for a in (1, 2, 4) for b in (1, 2, 4)]
UNEVEN = [(EP[3], EP[2]), (EP[4], EP[3]), (EP[3], EP[1])]
SHARDED = [
    (Where(4, 2, "shard"), Where(2, 2)),
    (Where(4, 2), Where(4, 1, "shard")),
    (Where(3, 1, "shard"), Where(2, 1, "shard")),
    (Where(4, 4), Where(3, 3, "shard")),
    (Where(4, 2, "shard", 2), Where(4, 1, "shard", 2)),
    (Where(4, 1, "shard", 2), Where(3, 1, "shard")),
]

MOVED = [
    (Where(3, 3), Where(3, 3, placement="round_robin")),
    (Where(4, 2, "shard", placement="round_robin"), Where(4, 1, "shard", 2)),
    (EP[1], Where(4, 2, "shard", 2, "round_robin")),
]
SHARED_ROWS = [
    (Where(4, 4, cp_size=2), EP[3]),
    (Where(2, 1, "shard"), Where(4, 2, "shard", cp_size=4, cp="ring")),
]

STAGES = [
    (Where(2, 1, pp_size=2), ONE),
    (EP[2], Where(4, 2, pp_size=2)),
    (Where(4, 1, "shard", pp_size=2), Where(4, 2, pp_size=2)),
    (Where(4, 2, pp_size=2), Where(4, 1, "shard", 2)),
]
DENSE = partial(Where, has_dense_layer=True)
ADAPTED = partial(DENSE, has_adapters=True)
HEADS = [
    (DENSE(2, 1, tp_size=2), DENSE(1, 1)),
    (DENSE(1, 1), DENSE(2, 2, tp_size=2)),
    (DENSE(4, 2, "shard", tp_size=2), DENSE(4, 4, cp_size=2, tp_size=2)),
    (DENSE(4, 2, tp_size=2), DENSE(4, 1, "shard", 2, tp_size=2)),
    (DENSE(3, 1, "shard"), DENSE(4, 1, "shard", tp_size=2, pp_size=2)),
    (DENSE(4, 4, tp_size=4), DENSE(2, 1, "shard")),  # two of the ranks share a head of keys
    (DENSE(1, 1), DENSE(4, 2, tp_size=4)),
    (ADAPTED(2, 2, tp_size=2), ADAPTED(1, 1)),
    (ADAPTED(1, 1), ADAPTED(4, 1, "shard", tp_size=2)),
]


def _engine(where: Where, dtype: torch.dtype) -> NativeEngine:
    sizes: dict[str, Any] = {"ep_size": where.ep_size, "shard_size": where.shard_size, "cp_size": where.cp_size}
    sizes |= {"pp_size": where.pp_size, "pp_schedule": "gpipe"}  # which takes a single micro-batch
    sizes |= {"tp_size": where.tp_size}
    mesh = mesh_here(**sizes) if where.world_size > 1 else Mesh.of_one()
    section = ParallelConfig(data=where.data, placement=where.placement, cp=where.cp, **sizes)  # type: ignore[arg-type]
    model, ema = tiny_model_config(MOE), None
    if where.has_dense_layer:
        attention, ema = {"sinks": True, "qkv_bias": True, "out_bias": True}, EMAConfig(decay=0.5)
        lora = {"rank": 3, "trains": ["router"]} if where.has_adapters else None
        model = tiny_model_config({**MOE, "first_dense_layers": 1}, num_layers=3, attention=attention, lora=lora)
    return make_engine(model, dtype=dtype, seed=5, grad_clip=0.5, mesh=mesh, parallel=section, ema=ema)


def _train(engine: NativeEngine, first: int, last: int) -> list[float]:
    layout, losses = engine.mesh.layout, []
    for step in range(first, last):
        batch = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
        mine = own_part(rows_of(batch, *even_slice(ROWS, layout.data_size, layout.data_rank)), layout)
        losses.append(engine.train_step([mine], lr=1e-2 / (1 + step)).loss)
    return losses


def _hash(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def _here(engine: NativeEngine) -> dict[str, str]:
    """Hashes of the whole tensors, put together from all ranks; they are of use on rank 0."""
    state = gather_state(engine.state(), engine.mesh)
    return _hash({name: part.tensor for name, part in state.slices.items()}) if engine.mesh.layout.rank == 0 else {}


def _save(where: Where, dtype: torch.dtype, folder: Path) -> dict[str, str]:
    engine = _engine(where, dtype)
    _train(engine, 0, BEFORE)
    saver = Saver(CheckpointFolder(folder), engine.mesh)
    saver.start(BEFORE, engine.state(), {})
    saved = saver.wait()
    assert saved is not None and saved.error is None, saved
    return _here(engine)


def _go_on(where: Where, dtype: torch.dtype, folder: Path, steps: int) -> tuple[dict[str, str], list[float]]:
    engine = _engine(where, dtype)
    resume(engine, folder, BEFORE)
    return _here(engine), _train(engine, BEFORE, BEFORE + steps)


def _on(ranks: Ranks, where: Where, function: Callable[..., Any], *args: object) -> Any:
    return ranks.run(where.world_size, function, where, *args)[0]


@dataclass(frozen=True)
class Stayed:
    """A run that was saved and went on where it was."""

    folder: Path
    left: dict[str, str]
    """Hashes of its state when it was saved."""
    losses: list[float]
    """Of the steps after that."""


Stay = Callable[[Where, torch.dtype, int], Stayed]


@pytest.fixture(scope="module")
def stay(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Stay:
    """Runs each of them once, for all layouts that go on from it."""

    @cache
    def run(where: Where, dtype: torch.dtype, steps: int) -> Stayed:
        folder = tmp_path_factory.mktemp("stayed")
        left = _on(ranks, where, _save, dtype, folder)
        assert _hash(load(folder, BEFORE)) == left, "what is in the files is what the ranks had, bit for bit"
        found, losses = _on(ranks, where, _go_on, dtype, folder, steps)
        assert found == left
        return Stayed(folder, left, losses)

    return run


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("before", "after"), RESIZES + UNEVEN + SHARDED + MOVED + SHARED_ROWS, ids=lambda where: str(where)
)
def test_a_run_goes_on_under_another_layout(ranks: Ranks, stay: Stay, before: Where, after: Where) -> None:
    many = LONG if (before, after) == RESIZES[-2] else SHORT
    for dtype, steps, tolerance in ((torch.float32, SHORT, 1e-5), (torch.float64, many, 1e-9)):
        run = stay(before, dtype, steps)
        found, losses = _on(ranks, after, _go_on, dtype, run.folder, steps)
        assert found == run.left, "every rank has its own part of it, bit for bit"
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.losses), rtol=tolerance, atol=0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("before", "after"), STAGES, ids=lambda where: str(where))
def test_a_run_goes_on_with_other_stages(ranks: Ranks, stay: Stay, before: Where, after: Where) -> None:
    run = stay(before, torch.float64, 3)
    found, losses = _on(ranks, after, _go_on, torch.float64, run.folder, 3)
    assert found == run.left
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.losses), rtol=1e-9, atol=0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("before", "after"), HEADS, ids=lambda where: str(where))
def test_a_run_goes_on_with_heads_on_other_ranks(ranks: Ranks, stay: Stay, before: Where, after: Where) -> None:
    run = stay(before, torch.float64, 3)
    found, losses = _on(ranks, after, _go_on, torch.float64, run.folder, 3)
    assert found == run.left, "every rank has its own part of it, bit for bit"
    assert any(name.startswith("ema.") for name in found)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.losses), rtol=1e-9, atol=0)


def _write_alone(where: Where, folder: Path) -> list[str]:
    """Names of the files of a checkpoint and who wrote most of it."""
    engine = _engine(where, torch.float32)
    saver = Saver(CheckpointFolder(folder), engine.mesh)
    saver.start(1, engine.state(), {})
    saver.wait()
    return [f"{path.name} {path.stat().st_size}" for path in sorted(folder.rglob("*.safetensors"))]


def test_every_rank_writes_its_share(ranks: Ranks, tmp_path: Path) -> None:
    files = ranks.run(4, _write_alone, Where(4, 2), tmp_path)[0]
    assert [file.split()[0] for file in files] == [f"tensors-{rank:05d}-00000.safetensors" for rank in range(4)]
    sizes = [int(file.split()[1]) for file in files]
    assert max(sizes) < 2 * min(sizes)


def _disk_of_one_is_full(where: Where, folder: Path, victim: int) -> tuple[str, list[str]]:
    engine = _engine(where, torch.float32)
    saver = Saver(CheckpointFolder(folder), engine.mesh)
    saver.start(1, engine.state(), {})
    saver.wait()
    if dist.get_rank() == victim:
        import trainer.checkpoint.tensor_files as files

        def full(path: Path, pieces: Sequence[bytes | memoryview]) -> StoredFile:
            raise OSError(28, "No space left on device")

        files.write_durably = full
    saver.start(2, engine.state(), {})
    saved = saver.wait()
    assert saved is not None
    return str(saved.error), sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_rank_cannot_write_nobody_has_saved(ranks: Ranks, tmp_path: Path, victim: int) -> None:
    with_fault = Ranks()  # of its own: the fault stays in its processes
    try:
        for error, names in with_fault.run(2, _disk_of_one_is_full, EP[2], tmp_path, victim):
            assert f"step 2 not saved (rank {victim}): No space left on device" in error
            assert names == ["step_00000001"]
    finally:
        with_fault.close()


def _find(where: Where, folder: Path) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    found = find_newest(CheckpointFolder(folder), mesh_here().world, warn=warnings.append)
    return None if found is None else found.step, warnings


@pytest.mark.parametrize("number", range(3))
def test_all_ranks_fall_back_together_whoever_finds_the_damage(ranks: Ranks, tmp_path: Path, number: int) -> None:
    """Each rank reads some of the files; the one that finds the damage is not always the first."""
    for step in (1, 2):
        ranks.run(3, _save_as, EP[3], tmp_path, step)
    files = sorted(CheckpointFolder(tmp_path).of_step(2).glob("*.safetensors"))
    assert len(files) == 3
    files[number].write_bytes(files[number].read_bytes()[:-1])
    for step, warnings in ranks.run(3, _find, EP[3], tmp_path):
        assert step == 1
        assert len(warnings) == 1 and files[number].name in warnings[0] and "using step 1 instead" in warnings[0]


def _find_own(folder: Path) -> str:
    try:
        find_newest(CheckpointFolder(folder / str(dist.get_rank())), mesh_here().world, warn=print)
    except CheckpointError as error:
        return str(error)
    return ""


def test_hosts_that_see_different_checkpoints_under_one_name_are_told_so(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, _save_as, EP[2], tmp_path / "0", 1)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    assert ranks.run(2, _find_own, tmp_path) == ["", ""]
    rewrite(CheckpointFolder(tmp_path / "1").of_step(1), lambda values: values["run"].update(position=999))
    for error in ranks.run(2, _find_own, tmp_path):
        assert "step_00000001: is another checkpoint on rank 1 than on rank 0; set runs_dir to a file system" in error


def _save_as(where: Where, folder: Path, step: int) -> None:
    engine = _engine(where, torch.float32)
    saver = Saver(CheckpointFolder(folder), engine.mesh)
    saver.start(step, engine.state(), {})
    saver.wait()
