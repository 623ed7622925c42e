"""Compiled blocks of sharded weights: FSDP's hooks are around a block, not inside what is compiled."""

from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.parallel.config import ParallelConfig


def _traced(compile_function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile without its compiler, whatever backend is asked for: it needs no C++, and less time."""
    return lambda function, **options: compile_function(function, **{**options, "backend": "eager"})


def _graphs(data: Literal["replicate", "shard"], dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Graphs that are compiled in two steps, and the reasons for breaks."""
    from torch._dynamo.utils import counters  # takes seconds to import

    torch._dynamo.reset()
    counters.clear()
    config = tiny_model_config({"num_experts": 4, "num_shared_experts": 1})
    with patch.object(torch, "compile", _traced(torch.compile)):
        parallel = ParallelConfig(data=data, compile=True)
        engine = make_engine(config, dtype=dtype, mesh=mesh_here(), parallel=parallel)
        for step in range(2):
            engine.train_step([make_batch(2, 8, seed=step)], lr=1e-3)
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharding_breaks_no_graph(ranks: Ranks, dtype: torch.dtype) -> None:
    replicated = ranks.run(2, _graphs, "replicate", dtype)
    assert replicated[0][0] > 0
    assert ranks.run(2, _graphs, "shard", dtype) == [(replicated[0][0], {})] * 2
