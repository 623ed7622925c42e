"""Measured links."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.plan.gpus import gpu_named
from trainer.plan.links import read_links, seconds_at

GOOD: dict[str, Any] = {
    "schema": 1,
    "ranks": 2,
    "all_reduce": [{"bytes": 4000, "seconds": 0.02}, {"bytes": 1000, "seconds": 0.01}],
    "all_to_all": [{"bytes": 1000, "seconds": 0.005}],
    "matmul_flops_per_s": 2e11,
    "memory_bytes_per_s": 1e10,
}


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_times_are_between_the_measured_ones(tmp_path: Path) -> None:
    links = read_links(written(tmp_path / "links.json"))
    assert [seconds_at(links.all_reduce, size) for size in (10, 1000, 2500, 4000, 8000)] == pytest.approx(
        [0.01, 0.01, 0.015, 0.02, 0.04]
    )
    assert (links.all_gather, links.reduce_scatter) == ((), ()), "not in a file of an older version"
    more = read_links(written(tmp_path / "more.json", reduce_scatter=[{"bytes": 8, "seconds": 2}]))
    assert more.reduce_scatter == [(8, 2)]
    assert read_links(written(tmp_path / "one.json", ranks=1, all_reduce=[], all_to_all=[])).all_reduce == ()
    assert links.curve("all_reduce") == links.all_reduce and links.of(gpu_named("cpu")).reached.operation_s == 12e-6
    gpu = links.of(gpu_named("cpu"))
    assert gpu.flops["float32"] == 2e11 and gpu.bandwidth == 1e10 and gpu.reached.products == 1


def test_times_in_a_step_are_before_those_of_idle_ranks(tmp_path: Path) -> None:
    beside = {"all_reduce": [{"bytes": 1000, "seconds": 0.03}]}
    more = {"beside_computation": beside, "operation_s": 2e-5, "shard_call_s": 0.0}
    links = read_links(written(tmp_path / "links.json", **more))
    assert links.curve("all_reduce") == [(1000, 0.03)] and links.curve("all_to_all") == [(1000, 0.005)]
    reached = links.of(gpu_named("H100")).reached
    assert (reached.operation_s, reached.shard_call_s) == (2e-5, 0.0)
    assert (
        read_links(written(tmp_path / "links.json", shard_call_s=1e-3)).of(gpu_named("cpu")).reached.shard_call_s
        == 1e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2, and this version reads 1"),
        ({"all_to_all": []}, "a collective has no measurement"),
        ({"matmul_flops_per_s": 10**400}, "is not a positive number"),
        ({"memory_bytes_per_s": True}, "true is not a positive number"),
        ({"ranks": 0}, "ranks is 0, not 1 to 1048576"),
        ({"ranks": 1e300}, r"ranks is 1e\+300, not"),
        ({"matmul_flops_per_s": -1}, "-1 is not a positive number"),
        ({"all_reduce": [{"bytes": 1}]}, "'seconds'"),
        ({"beside_computation": {"all_reduce": []}}, "a collective has no measurement"),
        ({"beside_computation": 3}, "not iterable"),
        ({"operation_s": 0}, "0 is not a positive number"),
        ({"shard_call_s": -1}, "-1 is not a positive number"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_links(written(tmp_path / "links.json", **changes))
    (tmp_path / "links.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON: maximum recursion depth"):
        read_links(tmp_path / "links.json")
    with pytest.raises(ConfigError, match="No such file or directory; write one by turnout doctor --cluster"):
        read_links(tmp_path / "absent.json")
