"""Collectives of a step with sharded weights, counted; and that what is kept does not change the gradient."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.engine.native import NativeEngine
from trainer.models.config import ShardKeeps
from trainer.parallel.config import ParallelConfig
from trainer.parallel.shard import gather_ahead
from trainer.prove.gather import gather_state

_LAYERS = 3


class _Calls(TorchDispatchMode):
    """Counts collectives by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def _engine(
    keeps: ShardKeeps,
    dtype: torch.dtype,
    *,
    shard_size: int | None = None,
    counts: str = "previous_step",
    **parallel: Any,
) -> NativeEngine:
    moe = {"num_experts": 4, "num_shared_experts": 1, "balance": {"coef": 0.1, "counts": counts}}
    return make_engine(
        tiny_model_config(moe, num_layers=_LAYERS),
        dtype=dtype,
        mesh=mesh_here(shard_size=shard_size, ep_size=parallel.get("ep_size", 1)),
        parallel=ParallelConfig(data="shard", shard_keeps=keeps, shard_size=shard_size, **parallel),
    )


def _collectives(
    keeps: ShardKeeps,
    num_micro_batches: int,
    dtype: torch.dtype,
    counts: str = "previous_step",
    *,
    is_ahead: bool = False,
    **parallel: Any,
) -> tuple[int, int]:
    """Gathers and reductions of weights in the second step."""
    engine = _engine(keeps, dtype, counts=counts, **parallel)
    if is_ahead:
        gather_ahead(engine.model)
    batches = [make_batch(2, 8, seed=i) for i in range(num_micro_batches)]
    engine.train_step(batches, lr=1e-3)
    with _Calls() as calls:
        engine.train_step(batches, lr=1e-3)
    return calls.count["_allgather_base_"], calls.count["_reduce_scatter_base_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("keeps", "num_micro_batches", "passes", "reductions"),
    [
        ("nothing", 1, 2, 1),
        ("nothing", 4, 8, 4),
        ("gradients", 1, 2, 1),
        ("gradients", 4, 5, 1),
        ("weights", 1, 1, 1),
        ("weights", 4, 1, 1),
    ],
)
def test_gradients_are_reduced_once_a_step(
    ranks: Ranks, keeps: ShardKeeps, num_micro_batches: int, passes: int, reductions: int, dtype: torch.dtype
) -> None:
    """Two groups a block, its dense matrices and its experts, and one group of all the rest."""
    groups = 2 * _LAYERS
    rest = num_micro_batches if keeps == "nothing" else 1
    expected = (passes * groups + rest, reductions * groups + rest)
    assert ranks.run(2, _collectives, keeps, num_micro_batches, dtype) == [expected] * 2


@pytest.mark.parametrize(("keeps", "passes"), [("nothing", 12), ("gradients", 5), ("weights", 1)])
def test_a_counting_pass_gathers_nothing_again_if_anything_is_kept(
    ranks: Ranks, keeps: ShardKeeps, passes: int
) -> None:
    gathers, _ = ranks.run(2, _collectives, keeps, 4, torch.float32, "exact")[0]
    assert gathers == passes * 2 * _LAYERS + (4 if keeps == "nothing" else 1)


def _collectives_ahead() -> tuple[int, int]:
    return _collectives("gradients", 4, torch.float32, is_ahead=True)


def test_gathering_ahead_gathers_as_often(ranks: Ranks) -> None:
    assert ranks.run(2, _collectives_ahead) == [(5 * 2 * _LAYERS + 1, 2 * _LAYERS + 1)] * 2


def _collectives_of_pairs(keeps: ShardKeeps, is_ahead: bool) -> tuple[int, int]:
    return _collectives(keeps, 4, torch.bfloat16, is_ahead=is_ahead, ep_size=2, overlap="micro_batches")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize(("keeps", "passes", "reductions"), [("nothing", 4, 2), ("gradients", 3, 1), ("weights", 1, 1)])
def test_weights_are_gathered_once_for_two_micro_batches_that_overlap(
    ranks: Ranks, keeps: ShardKeeps, passes: int, reductions: int, is_ahead: bool
) -> None:
    rest = 2 if keeps == "nothing" else 1
    expected = (passes * 2 * _LAYERS + rest, reductions * 2 * _LAYERS + rest)
    assert ranks.run(4, _collectives_of_pairs, keeps, is_ahead) == [expected] * 4


def _gradient(
    keeps: ShardKeeps, dtype: torch.dtype, shard_size: int | None, is_ahead: bool = False
) -> dict[str, torch.Tensor]:
    engine = _engine(keeps, dtype, shard_size=shard_size, counts="exact")
    if is_ahead:
        gather_ahead(engine.model)
    rank = engine.mesh.layout.rank
    for _ in range(2):  # what a step leaves behind must not reach the next
        engine.eval_loss(make_batch(2, 8, seed=9), dropless=True)
        engine.train_step([make_batch(1, 8, seed=10 * rank + i) for i in range(3)], lr=1e-2)
    engine.accumulate([make_batch(1, 8, seed=10 * rank + i) for i in range(3)])
    return {name: part.tensor.clone() for name, part in gather_state(engine.gradients(), engine.mesh).slices.items()}


Gradients = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def gradients(ranks: Ranks) -> Gradients:
    """Compute each once, for all that it is compared with."""

    @cache
    def compute(keeps: ShardKeeps, shard_size: int | None = None, is_ahead: bool = False) -> dict[str, torch.Tensor]:
        return ranks.run(4, _gradient, keeps, torch.float64, shard_size, is_ahead)[0]

    return compute


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shard_size", [None, 2])
@pytest.mark.parametrize("keeps", ["nothing", "weights"])
def test_what_is_kept_does_not_change_the_gradient(
    gradients: Gradients, keeps: ShardKeeps, shard_size: int | None
) -> None:
    kept, other = gradients("gradients", shard_size), gradients(keeps, shard_size)
    assert kept.keys() == other.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keeps", ["gradients", "weights"])
def test_gathering_ahead_does_not_change_the_gradient(gradients: Gradients, keeps: ShardKeeps) -> None:
    usual, ahead = gradients(keeps, None), gradients(keeps, None, is_ahead=True)
    assert all([torch.equal(ahead[name], gradient) for name, gradient in usual.items()])
