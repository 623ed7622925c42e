"""The device of a rank."""

import os

import pytest
import torch

from trainer.distributed import runtime
from trainer.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A host with two GPUs; the list records the selected devices."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


@pytest.mark.parametrize("local_rank", [0, 7])
def test_more_ranks_than_gpus_are_refused_on_every_rank_of_the_machine(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, local_rank: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError) as caught:
        runtime.start("auto")
    assert str(caught.value) == (
        "parallel.device: 8 ranks on this machine, but torch sees 2 GPUs; start at most 2 here (NPROC, "
        "--nproc-per-node), or use parallel.device=cpu"
    )
    assert gpus == []
    assert runtime.start("cpu") == torch.device("cpu"), "where any number of ranks may be"


def test_as_many_ranks_as_gpus_take_one_each(gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert runtime.start("cuda") == torch.device("cuda", local_rank)
    assert gpus == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_a_gpu_grows_in_place_unless_the_user_configures_it(name: str) -> None:
    environment: dict[str, str] = {}
    runtime.prefer_expandable_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    chosen = {name: "max_split_size_mb:512"}
    runtime.prefer_expandable_segments(chosen)
    assert chosen == {name: "max_split_size_mb:512"}


def test_a_gpu_s_memory_is_configured_before_it_is_used(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    seen: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")))
    runtime.start("cuda")
    assert seen == ["expandable_segments:True"]


def test_deterministic_kernels_are_those_of_torch_and_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    chosen: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    runtime.use_deterministic_kernels()
    assert chosen == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
