"""Start of process groups."""

import os
from dataclasses import fields
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.fake_world import fake_mesh
from tests.ranks import Ranks, mesh_here
from trainer.distributed.collectives import Group
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh, start_groups
from trainer.distributed.rank_layout import Layout
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("device", "backend"),
    [(torch.device("cpu"), "gloo"), (torch.device("cuda", 3), "nccl")],
)
def test_groups_connect_at_their_first_use_and_others_wait_for_nccl(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, backend: str
) -> None:
    """A default group that is told its device is split into every later group at once, by all of its ranks."""
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "")  # so that it is as before after the test
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY")
    started: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: started.append((name, options)))
    store = dist.HashStore()
    start_groups(Layout(world_size=4, rank=3), store, device, timedelta(seconds=5))
    expected = {"store": store, "rank": 3, "world_size": 4, "timeout": timedelta(seconds=5)}
    assert started == [(backend, expected)]
    assert os.environ.get("TORCH_NCCL_HIGH_PRIORITY") == (None if backend == "gloo" else "1")


def test_whoever_has_chosen_the_priority_of_messages_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    start_groups(Layout(world_size=4, rank=3), dist.HashStore(), torch.device("cuda"), timedelta(seconds=5))
    assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "0"


@pytest.mark.parametrize(("world_size", "is_lazy"), [(64, None), (65, "1")])
def test_gloo_does_not_connect_every_two_of_many_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int, is_lazy: str | None
) -> None:
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")  # so that it is as before after the test
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    layout = Layout(world_size=world_size, rank=3)
    start_groups(layout, dist.HashStore(), torch.device("cpu"), timedelta(seconds=5))
    assert os.environ.get("TORCH_GLOO_LAZY_INIT") == is_lazy


def groups_of(mesh: Mesh) -> dict[str, Group]:
    values = {field.name: getattr(mesh, field.name) for field in fields(mesh)}
    return {name: value for name, value in values.items() if isinstance(value, Group)}


def use_every_group() -> dict[str, tuple[list[int], int, list[str]]]:
    """Return the ranks of each group, the sum of their numbers by the group itself, and the names members give it."""
    found = {}
    for name, group in groups_of(mesh_here(ep_size=2, shard_size=2)).items():
        total = group.all_reduce_(torch.tensor([dist.get_rank()]))
        names = group.all_gather_objects(group.handle.group_name if group.size > 1 else "")
        found[name] = list(group.ranks), int(total), names
    return found


def test_members_of_a_group_meet_although_each_rank_makes_only_its_own(ranks: Ranks) -> None:
    everyone = ranks.run(4, use_every_group)
    for rank, found in enumerate(everyone):
        for name, (members, total, names) in found.items():
            assert rank in members and total == sum(members) and len(set(names)) == 1, (rank, name)
    assert everyone[3]["ep"][0] == [2, 3] and everyone[3]["edp"][0] == [1, 3]
    assert everyone[3]["shard"][0] == [2, 3] and everyone[3]["shard_copies"][0] == [1, 3]


def refuse_other_degrees() -> tuple[str, int]:
    """Return the error of ranks whose degrees differ, and how many groups were made before it."""
    layout = Layout(world_size=4, rank=dist.get_rank(), ep_size=1 + dist.get_rank() // 3)
    with patch.object(dist, "new_group") as made, pytest.raises(ConfigError) as error:
        build_mesh(layout, FlightRecorder())
    return str(error.value), made.call_count


def test_degrees_are_compared_before_a_group_is_made(ranks: Ranks) -> None:
    (text, made), *others = ranks.run(4, refuse_other_degrees)
    assert made == 0 and others == [(text, made)] * 3
    assert text.startswith("parallel.ep_size: 1 on rank 0 (host ") and ", 2 on rank 3 (host " in text


@pytest.mark.parametrize("rank", [0, 1, 4095])
def test_a_rank_of_thousands_makes_its_own_groups_only(rank: int) -> None:
    made: list[Any] = []
    try:
        with patch("torch.distributed.distributed_c10d._process_group_name", wraps=_named(made)):
            mesh = fake_mesh(Layout(world_size=4096, rank=rank, ep_size=64, ranks_per_node=8, shard_size=256))
    finally:
        dist.destroy_process_group()
    ours = groups_of(mesh)
    assert len(made) <= len(ours) and all(rank in members or not members for members in made)
    assert ours["ep"].size == 64 and ours["ep_between"].ranks == tuple(range(64 * (rank // 64) + rank % 8, 4096, 8)[:8])


def _named(made: list[Any]) -> Any:
    """Return torch's function that names a group, noting the ranks of each."""
    name = dist.distributed_c10d._process_group_name

    def noted(ranks: Any, use_hashed_name: bool) -> str:
        made.append(list(ranks or ()))
        return name(ranks, use_hashed_name)

    return noted
