"""Law: the engine changes nothing that is learned. DeepSpeed's steps are the native engine's, and so are its states."""

import gc
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine_of, rows_of, tiny_model_config
from tests.checkpoint_helpers import digest, load, resume
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.saver import Saver
from trainer.data.batches.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.engine.base import StepResult
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.numerics import NumericsConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.step import StepEngine
from trainer.optim.registry import AdamWConfig
from trainer.prove.gather import gather_state

pytestmark = pytest.mark.slow

ROWS, SEQ_LEN, CLIP = 12, 8, 0.5
MOE = {
    "num_experts": 5,  # no number of ranks divides them
    "num_shared_experts": 1,
    "router": {"kind": "bias_balanced", "bias_update_rate": 0.05, "jitter": 0.1},
    "balance": {"coef": 0.1, "counts": "previous_step"},
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Where:
    """How a run is laid out; stage 0 is the native engine."""

    world_size: int
    ep_size: int
    stage: int = 0
    options: str = ""

    def __str__(self) -> str:
        engine = f"ZeRO {self.stage}" if self.stage else "native"
        return f"{self.world_size} ranks, ep {self.ep_size}, {engine}{self.options and ', ' + self.options}"

    @property
    def section(self) -> Any:
        if self.stage == 0:
            return NativeEngineConfig()
        if self.options == "offload":
            return DeepSpeedEngineConfig(zero_stage=self.stage, offload_optimizer="cpu")
        zero = {"round_robin_gradients": True, "parameter_alignment": True}
        raw: Any = {"zero_optimization": zero} if self.options == "raw" else {}
        return DeepSpeedEngineConfig(zero_stage=self.stage, deepspeed_config=raw)


LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]


def _engine(where: Where, dtype: torch.dtype = torch.float32, moe: Any = MOE) -> StepEngine:
    mesh = mesh_here(ep_size=where.ep_size) if where.world_size > 1 else Mesh.of_one()
    config = tiny_model_config(MOE) if moe else tiny_model_config().model_copy(update={"moe": None})
    return make_engine_of(where.section, config, dtype=dtype, seed=5, grad_clip=CLIP, mesh=mesh)


def _batches(engine: StepEngine, step: int, num_pieces: int) -> list[Batch]:
    batch = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
    mine = rows_of(batch, *even_slice(ROWS, engine.mesh.layout.world_size, engine.mesh.layout.rank))
    rows = mine.tokens.shape[0]
    return [rows_of(mine, *even_slice(rows, num_pieces, piece)) for piece in range(num_pieces)]


def _train(engine: StepEngine, first: int, last: int, num_pieces: int = 1) -> list[list[float]]:
    """Return loss, gradient norm, and the squared norm of each router's gradient, of some steps."""
    results = (
        engine.train_step(_batches(engine, step, num_pieces), lr=1e-2 / (1 + step)) for step in range(first, last)
    )
    return [[result.loss, result.grad_norm, *_router_squares(result)] for result in results]


def _router_squares(result: StepResult) -> list[float]:
    squares = None if result.routing is None else result.routing.router_squares
    return [] if squares is None else squares.tolist()


def _whole(engine: StepEngine) -> dict[str, torch.Tensor]:
    state = gather_state(engine.state(), engine.mesh)
    is_first = engine.mesh.layout.rank == 0
    return {name: part.tensor.clone() for name, part in state.slices.items()} if is_first else {}


def _run(where: Where, dtype: torch.dtype, steps: int, num_pieces: int, moe: Any = MOE) -> tuple[Any, Any]:
    with closing(_engine(where, dtype, moe)) as engine:
        return _train(engine, 0, steps, num_pieces), _whole(engine)


def _apart(mine: torch.Tensor, other: torch.Tensor) -> float:
    if not other.numel():
        return 0.0
    return float((mine.double() - other.double()).abs().max()) / max(float(other.double().abs().max()), 1e-30)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_pieces", [1, 2])
@pytest.mark.parametrize(("world_size", "ep_size"), LAYOUTS)
def test_its_steps_are_those_of_the_native_engine(
    ranks: Ranks, world_size: int, ep_size: int, num_pieces: int, dtype: torch.dtype
) -> None:
    """Loss, norm, weights and moments of five clipped steps."""
    tolerance = TOLERANCES[dtype]
    native, state = ranks.run(world_size, _run, Where(world_size, ep_size), dtype, 5, num_pieces)[0]
    assert all(norm > CLIP for _, norm, *_ in native), "every step is clipped"
    assert all(len(numbers) == 4 and min(numbers[2:]) > 0 for numbers in native), "of both routers"
    for stage in (1, 2):
        mine, found = ranks.run(world_size, _run, Where(world_size, ep_size, stage), dtype, 5, num_pieces)[0]
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(native), rtol=tolerance, atol=0)
        assert found.keys() == state.keys()
        assert {name: _apart(found[name], t) for name, t in state.items() if _apart(found[name], t) > tolerance} == {}


@pytest.mark.parametrize(
    "where", [Where(2, 1, 1, "offload"), Where(2, 2, 2, "offload"), Where(4, 2, 2, "raw")], ids=str
)
def test_neither_do_its_options_change_anything(ranks: Ranks, where: Where) -> None:
    """Moments on the CPU; other orders and gaps in the flat partitions."""
    native, state = ranks.run(where.world_size, _run, Where(where.world_size, where.ep_size), torch.float32, 5, 2)[0]
    mine, found = ranks.run(where.world_size, _run, where, torch.float32, 5, 2)[0]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(native), rtol=1e-5, atol=0)
    assert max(_apart(found[name], tensor) for name, tensor in state.items()) < 1e-5


def test_a_dense_model_needs_no_experts(ranks: Ranks) -> None:
    native, state = ranks.run(2, _run, Where(2, 1), torch.float32, 5, 2, None)[0]
    mine, found = ranks.run(2, _run, Where(2, 1, 2), torch.float32, 5, 2, None)[0]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(native), rtol=1e-5, atol=0)
    assert max(_apart(found[name], tensor) for name, tensor in state.items()) < 1e-5


def _save(where: Where, folder: Path, steps: int) -> dict[str, str]:
    with closing(_engine(where)) as engine:
        _train(engine, 0, steps)
        saver = Saver(CheckpointFolder(folder), engine.mesh)
        saver.start(steps, engine.state(), {})
        saved = saver.wait()
        saver.close()
        assert saved is not None and saved.error is None, saved
        return {name: digest(tensor) for name, tensor in _whole(engine).items()}


def _go_on(where: Where, folder: Path, first: int, last: int) -> tuple[dict[str, str], Any, Any]:
    with closing(_engine(where)) as engine:
        resume(engine, folder, first)
        left = {name: digest(tensor) for name, tensor in _whole(engine).items()}
        return left, _train(engine, first, last), _whole(engine)


SWITCHES = [
    (Where(2, 1), Where(2, 2, 1)),
    (Where(2, 2), Where(4, 2, 2)),
    (Where(4, 2, 1), Where(2, 2)),
    (Where(2, 2, 2), Where(1, 1)),
    (Where(1, 1), Where(4, 4, 2)),
    (Where(4, 2, 2), Where(4, 4, 1)),
    (Where(3, 3, 1, "offload"), Where(2, 1, 2)),
]


@pytest.fixture(scope="module")
def twenty_steps(ranks: Ranks) -> tuple[Any, Any]:
    """Losses and state of a native run that nothing has interrupted."""
    return ranks.run(1, _run, Where(1, 1), torch.float32, 20, 1)[0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("before", "after"), SWITCHES, ids=str)
def test_a_run_goes_on_under_the_other_engine(
    ranks: Ranks, twenty_steps: tuple[Any, Any], tmp_path: Path, before: Where, after: Where
) -> None:
    """Ten steps and ten steps are twenty steps of the native engine; in between, every bit is what it was."""
    left = ranks.run(before.world_size, _save, before, tmp_path, 10)[0]
    assert {name: digest(tensor) for name, tensor in load(tmp_path, 10).items()} == left
    found, losses, state = ranks.run(after.world_size, _go_on, after, tmp_path, 10, 20)[0]
    assert found == left
    all_losses, expected = twenty_steps
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(all_losses[10:]), rtol=1e-5, atol=0)
    assert {n: _apart(state[n], t) for n, t in expected.items() if _apart(state[n], t) > 1e-4} == {}


def _skips(where: Where) -> tuple[Any, Any, Any]:
    """Two steps that are not taken between two that are: a loss over the limit, a loss that is not finite."""
    with closing(_engine(where)) as engine:
        layout, kept = engine.mesh.layout, []
        engine.train_step(_batches(engine, 0, 2), lr=1e-2)
        for step, limit in ((1, 0.0), (2, None)):
            before = _whole(engine)
            if limit is None and layout.rank == layout.world_size - 1:
                _poison(engine)
            result = engine.train_step(_batches(engine, step, 2), lr=1e-2, skip_above=limit)
            after = _whole(engine)
            kept.append((result.skipped, result.not_finite, all(torch.equal(after[n], t) for n, t in before.items())))
        return kept, _train(engine, 3, 5, 2), _whole(engine)


def _poison(engine: StepEngine) -> None:
    """Make the loss of this rank's next micro-batch not finite."""
    whole = engine.model.losses

    def poisoned(*args: Any, **options: Any) -> Any:
        del engine.model.losses
        row_loss, *others = whole(*args, **options)
        return row_loss * math.nan, *others

    engine.model.losses = poisoned  # type: ignore[method-assign]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (2, 2), (2, 1)])
def test_a_step_is_skipped_everywhere_and_leaves_nothing_behind(ranks: Ranks, world_size: int, ep_size: int) -> None:
    native, losses, state = ranks.run(world_size, _skips, Where(world_size, ep_size))[0]
    assert [(skipped, same) for skipped, _, same in native] == [(True, True), (True, True)]
    for stage, options in ((1, ""), (2, ""), (2, "offload")):
        kept, mine, found = ranks.run(world_size, _skips, Where(world_size, ep_size, stage, options))[0]
        assert [(skipped, same) for skipped, _, same in kept] == [(True, True), (True, True)]
        assert kept[0][1] is None and "not finite" in kept[1][1]
        assert world_size == 1 or f"loss not finite on rank {world_size - 1}" in kept[1][1]
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=1e-5, atol=0)
        assert max(_apart(found[name], tensor) for name, tensor in state.items()) < 1e-5


def _buckets(where: Where, moe: dict[str, Any], size: int) -> Any:
    """Losses with buckets of a size; 0: none is said."""
    mesh = mesh_here(ep_size=where.ep_size)
    raw: Any = {"zero_optimization": {"reduce_bucket_size": size}} if size else {}
    section = DeepSpeedEngineConfig(zero_stage=where.stage, deepspeed_config=raw)
    with closing(make_engine_of(section, tiny_model_config(moe), seed=5, grad_clip=CLIP, mesh=mesh)) as engine:
        return _train(engine, 0, 3, 2)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stage", [1, 2])
def test_buckets_of_any_size_meet_their_own_kind(ranks: Ranks, stage: int) -> None:
    """Where all ranks hold the same number of experts; where they do not, a bucket holds the model."""
    even = {**MOE, "num_experts": 4}
    expected = ranks.run(2, _buckets, Where(2, 2, stage), even, 0)[0]
    for size in (700, 1000, 1500, 3000):
        losses = ranks.run(2, _buckets, Where(2, 2, stage), even, size)[0]
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    ranks.run(2, _buckets, Where(2, 2, stage), MOE, 0)


FREE: list[dict[str, Any]] = [
    {"wall_clock_breakdown": True},
    {"flops_profiler": {"enabled": True, "profile_step": 1}},
    {"memory_breakdown": True, "dump_state": True, "steps_per_print": 1, "disable_python_gc": True},
    {"zero_optimization": {"overlap_comm": True, "allgather_bucket_size": 1000}},
    {"zero_optimization": {"use_multi_rank_bucket_allreduce": False, "allgather_partitions": False}},
    {"zero_optimization": {"round_robin_gradients": True, "parameter_alignment": True, "sub_group_size": 1e9}},
    {"zero_optimization": {"ignore_unused_parameters": False}, "comms_logger": {"enabled": False}},
]


def _with_option(where: Where, raw: dict[str, Any], offload: Any) -> Any:
    gc.freeze()  # memory_breakdown collects garbage dozens of times, each time among all that was imported
    mesh = mesh_here(ep_size=where.ep_size)
    section = DeepSpeedEngineConfig(zero_stage=where.stage, offload_optimizer=offload, deepspeed_config=raw)
    with closing(make_engine_of(section, tiny_model_config(MOE), seed=5, grad_clip=CLIP, mesh=mesh)) as engine:
        return _train(engine, 0, 4, 2)


@pytest.fixture(scope="module")
def without_options(ranks: Ranks) -> Any:
    return ranks.run(2, _with_option, Where(2, 2, 2), {}, "none")[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("raw", FREE, ids=lambda raw: ", ".join(raw))
def test_every_option_that_is_handed_on_runs_and_changes_nothing(
    ranks: Ranks, without_options: Any, raw: dict[str, Any]
) -> None:
    for stage, offload in ((2, "none"), (1, "cpu")):
        losses = ranks.run(2, _with_option, Where(2, 2, stage), raw, offload)[0]
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(without_options), rtol=1e-5, atol=0)


def _closed(where: Where) -> tuple[list[str], int, list[list[float]]]:
    """What an engine leaves on its model, and the steps that a native one takes with it afterwards."""
    mesh = mesh_here(ep_size=where.ep_size)
    with closing(make_engine_of(where.section, tiny_model_config(MOE), seed=5, grad_clip=CLIP, mesh=mesh)) as engine:
        _train(engine, 0, 1)
    model = engine.model
    hooks = len(model._forward_pre_hooks) + len(model._forward_hooks)
    marks = [name for name, p in model.named_parameters() if hasattr(p, "allreduce")]
    numerics = NumericsConfig(seed=5, dtype=torch.float32, grad_clip=CLIP)
    native = NativeEngineConfig().build(model, AdamWConfig(), numerics, mesh)
    assert isinstance(native, StepEngine)
    return [*marks, *(n for n, _ in model.named_children() if "deepspeed" in n)], hooks, _train(native, 1, 3)


def test_a_closed_engine_leaves_the_model_to_others(ranks: Ranks) -> None:
    for left, hooks, losses in ranks.run(2, _closed, Where(2, 2, 2)):
        assert (left, hooks) == ([], 0)
        assert all(math.isfinite(loss) for loss, *_ in losses)
