"""Law: blocks compiled between exchanges learn the same where ranks share rows and heads, and are compiled once.

Values are float64, as in the laws that compile nothing. Most layouts are traced and run without torch's compiler, which
takes ten seconds for a layout: its code for such operations is compared in tests/laws/test_compile.py.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.builders import latent_attention
from tests.small_proofs import ROWS, STEPS, TIMEOUT_S, assert_same, small_config, write_documents
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.distributed.runtime import has_cpp_compiler
from trainer.experiment import ExperimentConfig
from trainer.models.block import Block
from trainer.models.latent_attention import LatentAttention
from trainer.models.norm import RMSNorm
from trainer.models.self_attention import Attention
from trainer.ops.attention import blocked_attention
from trainer.prove.cases import Case, apply_case
from trainer.prove.evidence import Evidence, collect
from trainer.prove.pool import Failure, LocalRanks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")]

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"moe": None, "num_layers": 1, "num_kv_heads": 2},
    "one head of keys": {
        "moe": {
            "router": {"kind": "bias_balanced", "jitter": 0.2, "bias_update_rate": 0.05},
            "num_shared_experts": 1,
            "first_dense_layers": 1,
            "balance": {"coef": 0.1, "scope": "sequence"},
        },
        "num_kv_heads": 1,
        "qk_norm": True,
        "attention": {"qkv_bias": True, "out_bias": True},
    },
    "latents, documents": {"moe": {}, "document_mask": True, **latent_attention()},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"world_size": 2, "cp_size": 2, "cp": "ring", "recompute": "block", "micro_batch_size": 1}),
    ("one head of keys", {"world_size": 2, "tp_size": 2, "ep_size": 2, "recompute": "block", "micro_batch_size": 1}),
    ("latents, documents", {"world_size": 4, "tp_size": 2, "cp_size": 2, "ep_size": 4}),
]
PARTS = (RMSNorm.forward, Attention.heads, LatentAttention.heads, Block.joined, blocked_attention)


class Found(NamedTuple):
    """What a rank found: the evidence, on rank 0; graphs of each part of a block; reasons for breaks of graphs."""

    evidence: Evidence
    graphs: dict[str, int]
    breaks: list[str]


def trained(config: ExperimentConfig, case: Case, backend: str) -> Found:
    """Train under a layout, with blocks compiled by a backend on rank 0, and only traced on the others."""
    from torch._dynamo import eval_frame, reset  # takes seconds to import
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    rank, compile_function = dist.get_rank(), torch.compile

    def compiled(function: Callable[..., Any], **options: Any) -> Any:
        own = options if rank == 0 and backend == "inductor" else {**options, "backend": "eager"}
        return compile_function(function, **own)

    config = apply_case(config, case)
    parallel = config.parallel.model_dump() | {"compile": True}
    config = ExperimentConfig.model_validate(config.model_dump() | {"parallel": parallel})
    layout = Layout(world_size=case.world_size, rank=rank, **asdict(config.parallel.degrees))
    with patch.object(torch, "compile", compiled):
        evidence = collect(config, build_mesh(layout, FlightRecorder()), steps=STEPS)
    graphs = {part.__qualname__: len(eval_frame._debug_get_cache_entry_list(part.__code__)) for part in PARTS}
    found = {name: count for name, count in graphs.items() if count > 0}
    return Found(evidence if rank == 0 else Evidence(), found, list(counters["graph_break"]))


def assert_learns_the_same(model: str, layout: dict[str, Any], backend: str, folder: Path, ranks: LocalRanks) -> None:
    """Compare with one process that is not compiled; every part has one graph, for all layers and micro-batches."""
    config = small_config(MODELS[model], folder, d_ff=24)
    fields: dict[str, Any] = {"micro_batch_size": ROWS, **layout}
    case = Case(**fields)
    found = ranks.run(case.world_size, trained, config, case, backend, timeout_s=TIMEOUT_S)
    assert not (failed := [rank.text for rank in found if isinstance(rank, Failure)]), failed
    assert_same(found[0].evidence, config)
    heads = "LatentAttention.heads" if "latents" in model else "Attention.heads"
    kernel = ["blocked_attention"] * (layout.get("cp") != "ring")  # the ring has its own
    expected = sorted(["RMSNorm.forward", heads, "Block.joined", *kernel])
    assert [(sorted(rank.graphs.items()), rank.breaks) for rank in found] == [
        ([(name, 1) for name in expected], [])
    ] * case.world_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=["ring", "heads", "rows and heads"])
def test_blocks_traced_between_exchanges_learn_the_same(
    model: str, layout: dict[str, Any], folder: Path, local_ranks: LocalRanks
) -> None:
    assert_learns_the_same(model, layout, "eager", folder, local_ranks)


@pytest.mark.nightly
def test_so_do_compiled_ones(folder: Path, local_ranks: LocalRanks) -> None:
    assert_learns_the_same("dense", {"world_size": 2, "cp_size": 2}, "inductor", folder, local_ranks)
