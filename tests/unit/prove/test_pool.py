"""Tests for local ranks: results, failures and dead processes."""

import os
import signal
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.errors import DataError, RemoteRankError
from trainer.parallel.shards import first_row
from trainer.prove.pool import Failure, LocalRanks


def pid() -> int:
    return os.getpid()


def interfaces() -> list[str | None]:
    return [os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]


def fail(kind: type[Exception] | None) -> int:
    if dist.get_rank() == 1:
        if kind is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise kind("rows are lost")
    return dist.get_rank()


def first_of_shard(num_more: int) -> int:
    """Return the first row of this rank's shard, in groups that torch numbers after `num_more` others."""
    for _ in range(num_more):
        dist.new_group(list(range(dist.get_world_size())))
    layout = Layout(world_size=4, rank=dist.get_rank(), ranks_per_node=4, shard_size=2)
    mesh = build_mesh(layout, FlightRecorder())
    x = distribute_tensor(torch.ones(4), mesh.shard.device_mesh(mesh.shard_copies), [Replicate(), Shard(0)])
    return first_row(torch.empty_like(x))


def test_processes_are_reused() -> None:
    with closing(LocalRanks()) as ranks:
        assert ranks.run(2, pid, timeout_s=60) == ranks.run(2, pid, timeout_s=60)


def test_a_layout_does_not_meet_the_groups_of_the_one_before(local_ranks: LocalRanks) -> None:
    for num_more in (0, 1):  # which gives the same ranks a group of another name
        assert local_ranks.run(4, first_of_shard, num_more, timeout_s=60) == [0, 2, 0, 2]


def test_local_ranks_listen_on_the_loopback_interface_alone() -> None:
    with closing(LocalRanks()) as ranks:
        assert ranks.run(2, interfaces, timeout_s=60) == [["lo", "lo"]] * 2


def test_a_failure_is_returned_for_its_rank_and_the_processes_are_replaced() -> None:
    with closing(LocalRanks()) as ranks:
        for kind in (DataError, RemoteRankError, None):
            _, failure = ranks.run(2, fail, kind, timeout_s=60)
            assert isinstance(failure, Failure)
            assert failure.is_lost == (kind is None)
            if kind is not None:
                assert type(failure.error) is kind and str(failure.error) == "rows are lost"
        assert len(set(ranks.run(2, pid, timeout_s=60))) == 2


def test_a_process_that_died_between_two_functions_is_a_failure() -> None:
    with closing(LocalRanks()) as ranks:
        first, _ = ranks.run(2, pid, timeout_s=60)
        os.kill(first, signal.SIGKILL)
        ranks._workers[0].process.join()
        lost, _ = ranks.run(2, pid, timeout_s=5)
        assert isinstance(lost, Failure) and lost.is_lost


def store_path() -> str:
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.FileStore)
    # pyrefly: ignore[missing-attribute]
    return store.path


def test_the_file_of_a_group_is_there_as_long_as_the_processes() -> None:
    """Torch ends a process that frees the store of a group while its file is being removed."""
    with closing(LocalRanks()) as ranks:
        (path,) = ranks.run(1, store_path, timeout_s=30)
        assert Path(path).parent.is_dir()
        assert ranks.run(1, store_path, timeout_s=30) != [path]
    assert not Path(path).parent.exists()


def store_timeout() -> float:
    """Return the seconds after which this rank gives up a key that no rank sets."""
    store = dist.distributed_c10d._get_default_store()
    return store.timeout.total_seconds()  # pyrefly: ignore[missing-attribute]


def test_a_rank_waits_for_the_store_as_long_as_for_a_message() -> None:
    with closing(LocalRanks()) as ranks:
        assert ranks.run(2, store_timeout, timeout_s=60) == [60, 60]
