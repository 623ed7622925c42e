"""Start of process groups."""

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.distributed.mesh import start_groups
from trainer.distributed.rank_layout import Layout


@pytest.mark.parametrize(
    ("device", "backend", "device_id"),
    [(torch.device("cpu"), "gloo", None), (torch.device("cuda", 3), "nccl", torch.device("cuda", 3))],
)
def test_nccl_is_told_the_device_and_that_others_wait(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, backend: str, device_id: torch.device | None
) -> None:
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "")  # so that it is as before after the test
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY")
    started: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: started.append((name, options)))
    store = dist.HashStore()
    start_groups(Layout(world_size=4, rank=3), store, device, timedelta(seconds=5))
    expected = {"store": store, "rank": 3, "world_size": 4, "timeout": timedelta(seconds=5), "device_id": device_id}
    assert started == [(backend, expected)]
    assert os.environ.get("TORCH_NCCL_HIGH_PRIORITY") == (None if backend == "gloo" else "1")


def test_whoever_has_chosen_the_priority_of_messages_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    start_groups(Layout(world_size=4, rank=3), dist.HashStore(), torch.device("cuda"), timedelta(seconds=5))
    assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "0"
