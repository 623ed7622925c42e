"""System statistics of one rank and their reduction over ranks."""

from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.distributed.collectives import Group
from trainer.metrics.system_stats import SystemStats, reduce_over_ranks
from trainer.step_timer import PARTS, StepPart


def _parts(**seconds: float) -> dict[StepPart, float]:
    return {part: seconds.get(part, 0.0) for part in PARTS}


def test_statistics_of_process_host_and_disk_are_read_and_missing_ones_are_null(tmp_path: Path):
    seen = SystemStats(tmp_path, torch.device("cpu")).read()
    assert 0.01 < (seen["system/process_gb"] or 0) < 100
    assert 0 < (seen["system/host_free_gb"] or 0) < 10_000
    assert (seen["system/disk_free_gb"] or 0) >= 0
    assert 0 <= (seen["system/cpu_percent"] or 0) <= 100
    assert seen["system/gpu_peak_gb"] is None
    gone = SystemStats(tmp_path / "gone", torch.device("cpu")).read()
    assert gone["system/disk_free_gb"] is None and gone.keys() == seen.keys()


def test_one_rank_records_its_own_statistics(tmp_path: Path):
    seen = SystemStats(tmp_path, torch.device("cpu")).read()
    record = reduce_over_ranks(_parts(data=2.0), seen, Group.of_one())
    assert record == {**{f"time/{part}": 2.0 * (part == "data") for part in PARTS}, **seen}


def _on_a_rank() -> dict[str, float | None]:
    mesh = mesh_here()
    rank = mesh.layout.rank
    machine = {
        "system/process_gb": 1.0 + rank,
        "system/host_free_gb": 8.0 - rank,
        "system/cpu_percent": None if rank else 50.0,
        "system/disk_free_gb": 3.0,
        "system/gpu_peak_gb": None,
    }
    return reduce_over_ranks(_parts(data=1.0 + 2 * rank, communication=2.0 - 2 * rank), machine, mesh.world)


def test_several_ranks_record_mean_and_longest_times_and_the_worst_statistics(ranks: Ranks):
    first, second = ranks.run(2, _on_a_rank)
    assert second == {}
    assert (first["time/data"], first["time_max/data"]) == (2.0, 3.0)
    assert (first["time/communication"], first["time_max/communication"]) == (1.0, 2.0)
    machine = {key: value for key, value in first.items() if key.startswith("system/")}
    assert machine == {
        "system/process_gb": 2.0,
        "system/host_free_gb": 7.0,
        "system/cpu_percent": 50.0,
        "system/disk_free_gb": 3.0,
        "system/gpu_peak_gb": None,
    }
    assert sum(v or 0 for k, v in first.items() if k.startswith("time/")) == pytest.approx(3.0)
    # Of data 1 and 3 s; in communication ranks wait for each other.
    assert (first["slowest_rank"], first["slowest_rank_ratio"]) == (1, 3.0)
