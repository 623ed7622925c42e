import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.manifest import UnsupportedFormat
from trainer.distributed.wire_format import error_from_wire, error_to_wire, from_json, to_json
from trainer.errors import CheckpointError, CommError, ResourceError


def test_plain_values_come_back() -> None:
    value = {"a": [None, True, -3, 0.1 + 0.2, 5e-324, math.inf, "\ud800 \u2028 \0"], "b": {"c": []}}
    assert from_json(to_json(value)) == value
    assert math.isnan(from_json(to_json(math.nan)))
    assert from_json(to_json((1, (2, "x")))) == [1, [2, "x"]]


@pytest.mark.parametrize("value", [{1: 2}, b"x", {"a": {None: 1}}, [Path()], torch.zeros(1), {1}, CommError("x")])
def test_what_is_not_plain_is_refused_where_it_is_sent(value: Any) -> None:
    with pytest.raises(TypeError):
        to_json(value)


def test_errors_keep_their_kind_and_text() -> None:
    for error in (ResourceError("full"), UnsupportedFormat("old"), CheckpointError("")):
        found = error_from_wire(from_json(to_json(error_to_wire(error))))
        assert (type(found), str(found)) == (type(error), str(error))
    assert error_from_wire(error_to_wire(None)) is None


class Evil:
    """Executes code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def receive_from_a_hostile_rank(path: str) -> str:
    """Rank 1 sends a pickle, as torch's all_gather_object would, where JSON is expected."""
    world = mesh_here().world
    if world.index == 1:
        data = torch.frombuffer(bytearray(pickle.dumps(Evil(path))), dtype=torch.uint8)
        longest = torch.tensor([len(data)])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = torch.nn.functional.pad(data, (0, int(longest) - len(data)))
        dist.all_gather([torch.empty_like(padded) for _ in range(2)], padded)
        return ""
    try:
        return str(world.all_gather_objects("hello"))
    except CommError as error:
        return str(error)


def test_a_pickle_that_arrives_is_an_error_and_executes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    said, _ = ranks.run(2, receive_from_a_hostile_rank, str(tmp_path / "executed"))
    assert not (tmp_path / "executed").exists()
    assert said.startswith("rank 0: #") and "all_gather_object over world" in said and "sent invalid JSON" in said


def exchange_values() -> list[Any]:
    world = mesh_here().world
    mine = {"rank": world.index, "text": "x" * 1000 * world.index}
    return [world.all_gather_objects(mine), world.broadcast_object(mine if world.index == 0 else None)]


def test_values_of_different_lengths_reach_every_rank(ranks: Ranks) -> None:
    everyone = [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(3)]
    assert ranks.run(3, exchange_values) == [[everyone, everyone[0]]] * 3
