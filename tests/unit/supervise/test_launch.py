import os
import sys

import pytest

from trainer.environment import SUPERVISOR
from trainer.errors import ConfigError
from trainer.status import ATTEMPT
from trainer.supervise.launch import Launch, environment_of_attempt


def test_options_stand_before_the_environment() -> None:
    assert Launch.of({}, {}) == Launch(nproc=1, nnodes=1)
    assert Launch.of({"nproc": "3"}, {"NPROC": "2", "NNODES": ""}).world_size == 3
    environment = {"NPROC": "2", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    expected = Launch(nproc=2, nnodes=2, node_rank=1, master_addr="b", master_port=5)
    assert Launch.of({"master_addr": "b"}, environment) == expected
    assert Launch.of({}, {"NODE_RANK": "x", "MASTER_PORT": "y"}) == Launch(), "of no concern on one machine"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
def test_what_is_no_number_is_refused_with_its_source(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--nproc {text}: is not a number of at least 1$"):
        Launch.of({"nproc": text}, {})
    with pytest.raises(ConfigError, match=f"^NPROC={text}: is not a number of at least 1$"):
        Launch.of({}, {"NPROC": text})
    with pytest.raises(ConfigError, match=r"^NODE_RANK=2: is not a number from 0 to 1$"):
        Launch.of({}, {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"})


def test_one_rank_is_started_directly_and_several_by_torchrun() -> None:
    trainer = ["-m", "trainer", "train", "x.yaml"]
    torchrun = [sys.executable, "-m", "trainer.distributed.torchrun"]
    assert Launch().command(["train", "x.yaml"]) == [sys.executable, *trainer]
    several = Launch(nproc=2).command(["train", "x.yaml"])
    here = ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", "0"]
    assert several == [*torchrun, *here, "--nproc-per-node", "2", *trainer], "nobody else can connect"
    nodes = Launch(nproc=1, nnodes=2, node_rank=1, master_addr="a", master_port=7).command(["train", "x.yaml"])
    meeting = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "a", "--master-port", "7", "--nproc-per-node", "1"]
    assert nodes == [*torchrun, *meeting, *trainer]


def test_ranks_are_counted_node_by_node() -> None:
    assert list(Launch(nproc=2).ranks) == [0, 1]
    assert list(Launch(nproc=2, nnodes=3, node_rank=2, master_addr="a").ranks) == [4, 5]


def test_every_attempt_has_its_name_and_torchrun_hears_usr1_and_is_patient() -> None:
    one, two = environment_of_attempt({"A": "b"}), environment_of_attempt({})
    assert one["A"] == "b" and one[ATTEMPT] != two[ATTEMPT] and one[SUPERVISOR] == str(os.getpid())
    assert "SIGUSR1" in one["PET_SIGNALS_TO_HANDLE"] and one["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"
    theirs = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"]
    assert not {*theirs} & {*environment_of_attempt(dict.fromkeys(theirs, "1"))}, "of another launcher"
    theirs = ["PET_STANDALONE", "PET_RDZV_BACKEND", "PET_MAX_RESTARTS", "PET_NO_PYTHON"]
    assert not {*theirs} & {*environment_of_attempt(dict.fromkeys(theirs, "1"))}, "of torchrun's options"
    own = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    environment = environment_of_attempt(own)
    assert environment["PET_SIGNALS_TO_HANDLE"] == "SIGTERM" and environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "5"
