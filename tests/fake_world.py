"""One rank of a large world that exchanges nothing, to count what it holds.

    python -m tests.fake_world '{"world_size": 512, "ep_size": 8}' '{"num_experts": 128, ...}' [cpu]

prints as JSON the weights of this rank, the largest of the groups that FSDP pads, and the peak of its memory; with
`cpu` the weights are made, otherwise they have no memory.
"""

import json
import resource
import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.builders import tiny_model_config
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.parallel.config import ParallelConfig
from trainer.parallel.parallelize import parallelize
from trainer.parallel.shards import local


def fake_mesh(layout: Layout) -> Mesh:
    """Return the mesh of a rank whose collectives send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=layout.rank, world_size=layout.world_size)
    new_group = dist.new_group
    with patch.object(dist, "new_group", lambda ranks, **options: new_group(ranks, **options | {"backend": "fake"})):
        return build_mesh(layout, FlightRecorder())


def held(layout: dict[str, Any], model: dict[str, Any], device: str = "meta") -> dict[str, int]:
    """Return the dense and expert weights of this rank, and its peak memory in bytes."""
    mesh = fake_mesh(Layout(**layout))
    moe = {name: model.pop(name) for name in ("num_experts", "d_ff") if name in model}

    def started(config: ModelConfig) -> GPT:
        with torch.device("meta"):
            whole = GPT(config, 32000 if config.d_model > 16 else 32)
        parallel, on = ParallelConfig(data="shard", ep_size=mesh.layout.ep_size), torch.device(device)
        return parallelize(whole, parallel, mesh, on, seed=0, dtype=torch.bfloat16, can_compile=False)

    started(tiny_model_config(d_model=16))  # what is imported by the first one is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = started(tiny_model_config({"router": {"kind": "top_k"}, **moe}, **model))
    sizes = {name: local(p).numel() for name, p in whole.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"dense": sum(sizes.values()) - experts, "experts": experts, "peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(held(json.loads(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:])))
