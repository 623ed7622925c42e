"""Sharded weights: how much each rank holds, and that results do not change."""

from typing import Literal

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.distributed.mesh import Mesh
from trainer.engine.native import NativeEngine
from trainer.models.generation import generate
from trainer.models.sampling import SamplingOptions
from trainer.parallel.config import ParallelConfig
from trainer.parallel.shard import first_row, local
from trainer.prove.gather import gather_state

Data = Literal["replicate", "shard"]


def engine(mesh: Mesh, data: Data, dtype: torch.dtype) -> NativeEngine:
    config = tiny_model_config({"num_experts": 6, "num_shared_experts": 1})
    return make_engine(config, dtype=dtype, seed=5, grad_clip=0.5, mesh=mesh, parallel=ParallelConfig(data=data))


def _sizes(ep_size: int) -> dict[str, list[int]]:
    """Local elements of weights and optimizer state, dense and experts."""
    mine = engine(mesh_here(ep_size=ep_size), "shard", torch.float64)
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


def _text(data: Data, dtype: torch.dtype) -> list[int]:
    mine = engine(mesh_here(ep_size=2), data, dtype)
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


def _first_step(data: Data) -> dict[str, torch.Tensor]:
    mesh = mesh_here(ep_size=2)
    mine = engine(mesh, data, torch.bfloat16)  # with the loss in chunks
    mine.accumulate([make_batch(2, 8, seed=mesh.layout.rank)])
    state = gather_state(mine.gradients(), mesh)
    return {name: part.tensor.clone() for name, part in state.slices.items()}


def test_bfloat16_rounds_sharded_gradients_as_it_rounds_replicated_ones(ranks: Ranks) -> None:
    """On two ranks every sum has two terms, so results are bit-identical."""
    sharded, replicated = (ranks.run(2, _first_step, data)[0] for data in ("shard", "replicate"))
    assert sharded.keys() == replicated.keys()
    for name, gradient in replicated.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(sharded[name], gradient), name


def _is_where_it_is_said_to_be() -> bool:
    """Whether each shard equals the rows of the whole weight from `first_row` on."""
    weights = [p for p in engine(mesh_here(), "shard", torch.float64).parameters.values() if isinstance(p, DTensor)]
    return all([torch.equal(local(p), p.full_tensor()[first_row(p) :][: len(local(p))]) for p in weights])


def test_parts_begin_where_they_are_said_to(ranks: Ranks) -> None:
    """Hardly any weight divides evenly over three ranks."""
    assert ranks.run(3, _is_where_it_is_said_to_be) == [True] * 3


def _head_gradients(data: Data, is_tied: bool, loss_chunk: int | None) -> dict[str, torch.Tensor]:
    mesh = mesh_here()
    parallel = ParallelConfig(data=data, loss_chunk=loss_chunk)
    mine = make_engine(tiny_model_config(tie_embeddings=is_tied), dtype=torch.float64, mesh=mesh, parallel=parallel)
    for step in range(2):  # of two micro-batches
        mine.train_step([make_batch(2, 8, seed=4 * step + 2 * i + mesh.layout.rank) for i in (0, 1)], lr=1e-2)
    mine.accumulate([make_batch(2, 8, seed=9 + mesh.layout.rank)])
    state = gather_state(mine.gradients(), mesh)
    return {name: part.tensor.clone() for name, part in state.slices.items()}


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_loss_in_chunks_uses_the_gathered_head(ranks: Ranks, is_tied: bool) -> None:
    sharded = ranks.run(2, _head_gradients, "shard", is_tied, 5)[0]
    replicated = ranks.run(2, _head_gradients, "replicate", is_tied, None)[0]
    assert sharded.keys() == replicated.keys()
    for name, gradient in replicated.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=0, atol=1e-12, msg=name)
