"""Weights cut over ranks: how much each has, and that nothing but place changes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.builders import make_batch, tiny_model_config
from tests.ranks import Ranks
from trainer.checkpoint.gather import gather_state
from trainer.distributed.journal import Journal
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.engine.native import NativeEngine, NumericsConfig
from trainer.models.generation import generate
from trainer.models.gpt import GPT
from trainer.models.initialize import initialize
from trainer.models.sampling import SamplingOptions
from trainer.optim.registry import AdamWConfig
from trainer.parallel.config import ParallelConfig
from trainer.parallel.parallelize import parallelize
from trainer.parallel.shard import local, shard


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.close()


def engine(mesh: Mesh, data: str, dtype: torch.dtype) -> NativeEngine:
    master = torch.float64 if dtype is torch.float64 else torch.float32
    with torch.device("meta"):
        model = GPT(tiny_model_config({"num_experts": 6, "num_shared_experts": 1}), 32).to(master)
    section = ParallelConfig(ep_size=mesh.layout.ep_size)
    model = parallelize(model, section, mesh, torch.device("cpu"), can_compile=False)
    model.to_empty(device="cpu")
    initialize(model, 5)
    if data == "shard":
        model = shard(model, mesh, dtype=dtype)
    return NativeEngine(model, AdamWConfig(), NumericsConfig(seed=5, dtype=dtype, grad_clip=0.5), mesh)


def mesh_of(ep_size: int) -> Mesh:
    return build_mesh(Layout(world_size=dist.get_world_size(), rank=dist.get_rank(), ep_size=ep_size), Journal())


def _sizes(ep_size: int) -> dict[str, list[int]]:
    """Numbers held here: of weights and of optimizer state, dense and of experts."""
    mine = engine(mesh_of(ep_size), "shard", torch.float64)
    mine.train_step([make_batch(2, 8, seed=1)], lr=1e-3)
    sizes: dict[str, list[int]] = {"dense": [0, 0], "expert": [0, 0]}
    for name, p in mine.parameters.items():
        kind = sizes["expert" if name in mine.first_expert else "dense"]
        kind[0] += local(p).numel()
        kind[1] += sum(local(mine.optimizer.state[p][key]).numel() for key in ("exp_avg", "exp_avg_sq"))
    return sizes


@pytest.mark.parametrize("ep_size", [1, 2])
def test_every_number_is_on_one_rank_and_so_is_its_optimizer_state(ranks: Ranks, ep_size: int) -> None:
    whole = engine(Mesh.of_one(), "replicate", torch.float64)
    totals = {"dense": 0, "expert": 0}
    for name, p in whole.parameters.items():
        totals["expert" if name in whole.first_expert else "dense"] += p.numel()
    held = ranks.run(4, _sizes, ep_size)
    for kind, total in totals.items():
        assert sum(mine[kind][0] for mine in held) == total
        assert sum(mine[kind][1] for mine in held) == 2 * total
        assert max(mine[kind][0] for mine in held) < 0.4 * total


def _text(data: str, dtype: torch.dtype) -> list[int]:
    mine = engine(mesh_of(2), data, dtype)
    tokens = generate(
        mine.model,
        [3, 1, 4],
        max_new_tokens=12,
        options=SamplingOptions(temperature=1.0),
        generator=torch.Generator().manual_seed(1),
    )
    with mine.autocast():
        return list(tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sharded_model_writes_the_same_text(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks.run(4, _text, "shard", dtype) == ranks.run(4, _text, "replicate", dtype)


def _first_step(data: str) -> dict[str, torch.Tensor]:
    mesh = mesh_of(2)
    mine = engine(mesh, data, torch.bfloat16)
    mine.accumulate([make_batch(2, 8, seed=mesh.layout.rank)])
    state = gather_state(mine.gradients(), mesh)
    return {name: part.tensor.clone() for name, part in state.slices.items()}


def test_bfloat16_rounds_sharded_gradients_as_it_rounds_replicated_ones(ranks: Ranks) -> None:
    """Of two ranks every sum has two terms, so that nothing but rounding could make a difference."""
    sharded, replicated = (ranks.run(2, _first_step, data)[0] for data in ("shard", "replicate"))
    assert sharded.keys() == replicated.keys()
    for name, gradient in replicated.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(sharded[name], gradient), name
