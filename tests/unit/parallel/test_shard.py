"""Sharded weights: how much each rank holds, and that results do not change."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.checkpoint_helpers import resume
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.saver import Saver
from trainer.distributed.mesh import Mesh
from trainer.engine.native import NativeEngine
from trainer.models.generation import generate
from trainer.models.sampling import SamplingOptions
from trainer.parallel.config import ParallelConfig
from trainer.parallel.shards import first_row, local, rows, shard_index
from trainer.prove.gather import gather_state

Data = Literal["replicate", "shard"]


def engine(mesh: Mesh, data: Data, dtype: torch.dtype) -> NativeEngine:
    """Return an engine whose 6 experts are sharded inside each expert if there are 4 ranks, with ep_size 1."""
    config = tiny_model_config({"num_experts": 6, "num_shared_experts": 1})
    return make_engine(config, dtype=dtype, seed=5, grad_clip=0.5, mesh=mesh, parallel=ParallelConfig(data=data))


def _sizes(ep_size: int) -> dict[str, list[int]]:
    """Local elements of weights and optimizer state, dense and experts."""
    mine = engine(mesh_here(ep_size=ep_size), "shard", torch.float64)
    mine.train_step([make_batch(2, 8, seed=1)], lr=1e-3)
    sizes: dict[str, list[int]] = {"dense": [0, 0], "expert": [0, 0]}
    for name, p in mine.parameters.items():
        kind = sizes["expert" if name in mine.expert_numbers else "dense"]
        kind[0] += local(p).numel()
        kind[1] += sum(local(mine.optimizer.state[p][key]).numel() for key in ("exp_avg", "exp_avg_sq"))
    return sizes


@pytest.mark.parametrize("ep_size", [1, 2])
def test_every_number_is_on_one_rank_and_so_is_its_optimizer_state(ranks: Ranks, ep_size: int) -> None:
    whole = engine(Mesh.of_one(), "replicate", torch.float64)
    totals = {"dense": 0, "expert": 0}
    for name, p in whole.parameters.items():
        totals["expert" if name in whole.expert_numbers else "dense"] += p.numel()
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


def _first_step(data: Data, ep_size: int, kernel: str) -> dict[str, torch.Tensor]:
    mesh = mesh_here(ep_size=ep_size)
    moe = {"num_experts": 5, "d_ff": 16, "num_shared_experts": 1, "balance": {"counts": "previous_step"}}
    parallel = ParallelConfig(data=data)  # with the loss in chunks
    mine = make_engine(tiny_model_config(moe), dtype=torch.bfloat16, mesh=mesh, parallel=parallel, kernel=kernel)
    mine.accumulate([make_batch(2, 8, seed=mesh.layout.rank + 2 * i) for i in range(3)])
    state = gather_state(mine.gradients(), mesh)
    return {name: part.tensor.clone() for name, part in state.slices.items()}


@pytest.mark.parametrize("kernel", ["loop", "fused", "grouped"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_bfloat16_rounds_sharded_gradients_as_it_rounds_replicated_ones(
    ranks: Ranks, ep_size: int, kernel: str
) -> None:
    """On two ranks every sum has two terms, so results are bit-identical; those of experts too, gathered in bfloat16.

    Each micro-batch's gradient is rounded to bfloat16, and they are summed in float32.
    """
    sharded, replicated = (ranks.run(2, _first_step, data, ep_size, kernel)[0] for data in ("shard", "replicate"))
    assert sharded.keys() == replicated.keys()
    for name, gradient in replicated.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(sharded[name], gradient), name


def _is_where_it_is_said_to_be(shard_size: int | None) -> bool:
    """Whether each rank's rows equal those of the whole weight from `first_row` on."""
    mesh = mesh_here(shard_size=shard_size)
    weights = [p for p in engine(mesh, "shard", torch.float64).parameters.values() if isinstance(p, DTensor)]
    parts = [(rows(p), p.full_tensor()[first_row(p) :]) for p in weights]
    return all([torch.equal(mine, whole[: len(mine)]) for mine, whole in parts])


@pytest.mark.parametrize(("num_ranks", "shard_size"), [(3, None), (4, None), (4, 2)])
def test_parts_begin_where_they_are_said_to(ranks: Ranks, num_ranks: int, shard_size: int | None) -> None:
    """Hardly any weight divides evenly over three ranks."""
    assert ranks.run(num_ranks, _is_where_it_is_said_to_be, shard_size) == [True] * num_ranks


def _placements(num_experts: int, ep_size: int, shard_size: int | None) -> tuple[str, str]:
    """Placement of a dense and of an expert weight."""
    config, mesh = tiny_model_config({"num_experts": num_experts}), mesh_here(ep_size=ep_size, shard_size=shard_size)
    mine = make_engine(config, mesh=mesh, parallel=ParallelConfig(data="shard"))
    names = ("blocks.0.attention.qkv.weight", "blocks.0.ffn.experts.w_in")
    dense, expert = (
        str(tuple(p.placements)) if isinstance(p, DTensor) else "whole" for p in map(mine.parameters.get, names)
    )
    return dense, expert


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "shard_size", "dense", "expert"),
    [
        (8, 1, None, "(Shard(dim=0),)", "(Shard(dim=0),)"),
        (6, 1, None, "(Shard(dim=0),)", "(Shard(dim=1),)"),
        (2, 2, None, "(Shard(dim=0),)", "(Shard(dim=1),)"),
        (8, 4, None, "(Shard(dim=0),)", "whole"),
        (8, 1, 2, "(Replicate(), Shard(dim=0))", "(Replicate(), Shard(dim=0))"),
        (3, 1, 2, "(Replicate(), Shard(dim=0))", "(Replicate(), Shard(dim=1))"),
        (8, 2, 2, "(Replicate(), Shard(dim=0))", "whole"),
    ],
)
def test_experts_are_divided_among_the_ranks_that_share_them_however_few_they_are(
    ranks: Ranks, num_experts: int, ep_size: int, shard_size: int | None, dense: str, expert: str
) -> None:
    assert ranks.run(4, _placements, num_experts, ep_size, shard_size) == [(dense, expert)] * 4


def _gradients(data: Data, ep_size: int, shard_size: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    mesh = mesh_here(ep_size=ep_size, shard_size=shard_size)
    mine = engine(mesh, data, torch.float64)
    step = mine.accumulate([make_batch(2, 8, seed=mesh.layout.rank + 4 * i) for i in range(2)])
    state = gather_state(mine.gradients(), mesh)
    assert step.routing is not None and step.routing.router_squares is not None
    norms = torch.cat([step.grad_norm[None], step.routing.router_squares.sqrt()]).tolist()
    return norms, {name: part.tensor.clone() for name, part in state.slices.items()}


@pytest.mark.parametrize(("ep_size", "shard_size"), [(1, None), (2, None), (1, 2), (2, 2), (4, 2)])
def test_every_weight_counts_once_in_gradient_and_norm(ranks: Ranks, ep_size: int, shard_size: int | None) -> None:
    expected, whole = ranks.run(4, _gradients, "replicate", ep_size, None)[0]
    found = ranks.run(4, _gradients, "shard", ep_size, shard_size)
    for norms, _ in found:
        assert norms == pytest.approx(expected, rel=1e-13)
    of_routers = [gradient.norm() for name, gradient in whole.items() if ".router." in name]
    assert expected[1:] == pytest.approx([float(norm) for norm in of_routers], rel=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-11, atol=1e-12)


def _save(folder: Path) -> dict[str, torch.Tensor]:
    mine = engine(mesh_here(), "shard", torch.float64)
    mine.train_step([make_batch(2, 8, seed=1)], lr=1e-2)
    saver = Saver(CheckpointFolder(folder), mine.mesh)
    saver.start(1, mine.state(), {})
    saved = saver.wait()
    assert saved is not None and saved.error is None, saved
    saver.close()
    return _whole(mine)


def _whole(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: part.tensor.clone() for name, part in gather_state(engine.state(), engine.mesh).slices.items()}


def _load(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    mine = engine(mesh_here(), data, torch.float64)
    resume(mine, folder, 1)
    return _whole(mine)


def test_weights_sharded_inside_their_experts_are_saved_and_loaded_by_expert(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run(4, _save, tmp_path)[0]
    layouts: list[tuple[int, Data]] = [(4, "shard"), (4, "replicate"), (2, "shard")]
    for num_ranks, data in layouts:
        loaded = ranks.run(num_ranks, _load, tmp_path, data)[0]
        assert saved.keys() == loaded.keys()
        assert all([torch.equal(loaded[name], tensor) for name, tensor in saved.items()])


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


def _starts_as_unsharded(num_experts: int, ep_size: int, shard_size: int | None) -> bool:
    """Whether each shard has, from the first moment, the values that the whole weight has in one process."""
    biases = {"qkv_bias": True, "out_bias": True}
    config = tiny_model_config({"num_experts": num_experts, "num_shared_experts": 1}, qk_norm=True, attention=biases)
    whole = make_engine(config, seed=3).parameters
    mesh = mesh_here(ep_size=ep_size, shard_size=shard_size)
    mine = make_engine(config, seed=3, mesh=mesh, parallel=ParallelConfig(data="shard"))
    are_equal = []
    for name, p in mine.parameters.items():
        expected = whole[name].detach()
        if (numbers := mine.expert_numbers.get(name)) is not None:
            expected = expected[list(numbers)]
        are_equal.append(torch.equal(local(p), expected[shard_index(p)] if isinstance(p, DTensor) else expected))
    return all(are_equal)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "ep_size", "shard_size"),
    [(2, 4, 1, None), (3, 4, 1, None), (4, 6, 1, None), (4, 6, 2, None), (4, 8, 2, 2)],
)
def test_every_shard_starts_from_the_values_of_one_process(
    ranks: Ranks, num_ranks: int, num_experts: int, ep_size: int, shard_size: int | None
) -> None:
    assert ranks.run(num_ranks, _starts_as_unsharded, num_experts, ep_size, shard_size) == [True] * num_ranks
