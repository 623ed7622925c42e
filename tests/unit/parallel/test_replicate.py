"""Gradients are all-reduced during the backward pass."""

import gc
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import Ranks, mesh_here
from trainer.distributed.collectives import Group
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.parallel import replicate
from trainer.parallel.replicate import GradientReducer


def _sums(num_passes: int, who: int | None) -> tuple[list[Tensor], list[list[int]]]:
    """Gradients after backward passes of 4 layers, one bucket each, and the reductions started at each layer."""
    replicate._BUCKET_BYTES = 1
    recorder = FlightRecorder()
    mesh = mesh_here(recorder=recorder)
    generator = torch.Generator().manual_seed(3)
    layers = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(4)]).double()
    for p in layers.parameters():
        nn.init.normal_(p, generator=generator)
    unused = nn.Parameter(torch.ones(2).double())
    summed = GradientReducer([unused, *layers.parameters()], mesh.world)
    begun: list[list[int]] = []
    for i in range(num_passes):
        begun.append([])
        x: Tensor = torch.full((2, 3), 1.0 + (mesh.world.index if who is None else who) + 10 * i, dtype=torch.float64)
        if i == num_passes - 1:
            summed.expect()
        for layer in layers:
            x = layer(x)
            x.register_hook(lambda grad: begun[-1].append(recorder.count))
        x.square().sum().backward()
    summed.finish()
    return [torch.zeros(2) if p.grad is None else p.grad for p in (unused, *layers.parameters())], begun


@pytest.mark.parametrize("num_passes", [1, 3])
def test_gradients_are_those_of_all_ranks_and_passes(ranks: Ranks, num_passes: int) -> None:
    there = [mine for mine, _ in ranks.run(2, _sums, num_passes, None)]
    alone = [ranks.run(1, _sums, num_passes, who)[0][0] for who in range(2)]
    for mine in there:
        for gradient, *shares in zip(mine, *alone, strict=True):
            torch.testing.assert_close(gradient, torch.stack(shares).sum(0).double(), rtol=1e-12, atol=0)


def test_sums_begin_during_the_last_backward_pass_and_no_other(ranks: Ranks) -> None:
    """At a layer's output, the gradients of the layers above it are being reduced."""
    _, begun = ranks.run(2, _sums, 2, None)[0]
    assert begun == [[0, 0, 0, 0], [0, 1, 2, 3]]


def _is_left_behind() -> list[bool]:
    """Whether a model and the group that reduced its gradients live on after their last use."""
    mesh = mesh_here()
    layers = nn.Sequential(nn.Linear(3, 3))
    summed = GradientReducer(list(layers.parameters()), mesh.world)
    summed.expect()
    layers(torch.ones(2, 3)).sum().backward()
    summed.finish()
    left = [ref(layers[0].weight), ref(mesh.world)]
    del mesh, layers, summed
    gc.collect()
    return [alive() is not None for alive in left]


def test_a_model_that_nobody_uses_is_freed_with_its_group(ranks: Ranks) -> None:
    """Threads of a group look for messages as long as it lives; `prove` trains a hundred models in a process."""
    assert ranks.run(2, _is_left_behind) == [[False, False]] * 2


def _shares(world_is_one: bool, victim: int) -> tuple[list[bool], list[bool]]:
    """Whether local gradients were finite in three steps, and the gradients; the victim's is not in the second."""
    group = Group.of_one() if world_is_one else mesh_here().world
    layers = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(3)])
    summed = GradientReducer(list(layers.parameters()), group)
    shares, sums = [], []
    for i in range(3):
        layers.zero_grad()
        x = torch.ones(2, 3)
        if i == 1 and dist.get_rank() == victim:
            x[0, 1] = float("inf")
        summed.expect()
        layers(x).sum().backward()
        summed.finish()
        shares.append(summed.local_is_finite)
        sums.append(all(bool(p.grad.isfinite().all()) for p in layers.parameters() if p.grad is not None))
    return shares, sums


def test_a_rank_detects_that_its_own_gradient_was_not_finite(ranks: Ranks) -> None:
    (first, sums), (second, _) = ranks.run(2, _shares, False, 1)
    assert first == [True, True, True] and second == [True, False, True]
    assert sums == [True, False, True], "everybody's sum is not finite"
    (first, _), (second, _) = ranks.run(2, _shares, True, 1)
    assert first == [True, True, True] and second == [True, False, True]


def _late(bucket_bytes: int) -> list[float]:
    """Gradients of weights of which the backward pass reaches the last long before the first."""
    replicate._BUCKET_BYTES = bucket_bytes
    group = mesh_here().world
    weights = [nn.Parameter(torch.tensor([float(i + 1)], dtype=torch.float64)) for i in range(3)]
    summed = GradientReducer(weights, group)
    summed.expect()
    (weights[0] * weights[1] * weights[2] * (group.index + 1)).backward()
    summed.finish()
    return [float(weight.grad) for weight in weights if weight.grad is not None]


@pytest.mark.parametrize("bucket_bytes", [8, 16, 1 << 20])
def test_a_bucket_waits_for_the_gradients_of_all_its_weights(ranks: Ranks, bucket_bytes: int) -> None:
    assert ranks.run(2, _late, bucket_bytes) == [[3 * 6.0, 3 * 3.0, 3 * 2.0]] * 2
