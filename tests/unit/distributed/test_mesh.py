"""Start of process groups."""

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
def test_nccl_is_told_the_device(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, backend: str, device_id: torch.device | None
) -> None:
    started: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: started.append((name, options)))
    store = dist.HashStore()
    start_groups(Layout(world_size=4, rank=3), store, device, timedelta(seconds=5))
    expected = {"store": store, "rank": 3, "world_size": 4, "timeout": timedelta(seconds=5), "device_id": device_id}
    assert started == [(backend, expected)]
