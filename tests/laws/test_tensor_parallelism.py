"""Law: ranks that share heads and rows learn what one process learns: losses, gradients, norms, weights, biases."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.builders import latent_attention
from trainer.experiment import ExperimentConfig
from trainer.prove.cases import Case, reference
from trainer.prove.compare import compare
from trainer.prove.evidence import Evidence
from trainer.prove.pool import LocalRanks
from trainer.prove.rounding import FLOORS
from trainer.prove.run_case import run_case

STEPS, TOLERANCE, TIMEOUT_S, ROWS, SEQ_LEN = 3, 1e-9, 120.0, 3, 16

_NOISY = {"kind": "bias_balanced", "jitter": 0.2, "bias_update_rate": 0.05}
_BIASED = {"qkv_bias": True, "out_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense, grouped queries, biases, sinks": {
        "moe": None,
        "num_heads": 8,
        "num_kv_heads": 4,
        "qk_norm": True,
        "attention": {**_BIASED, "sinks": True, "softcap": 1.5, "window": 5, "window_pattern": ["sliding", "full"]},
    },
    "three heads, gelu": {"moe": None, "d_model": 12, "num_heads": 3, "d_ff": 21, "activation": "gelu"},
    "latents, documents": {
        "moe": {"num_shared_experts": 1, "first_dense_layers": 1},
        "num_layers": 3,
        "document_mask": True,
        **latent_attention(biases=True),
    },
    "latents of keys only": {"moe": {}, **latent_attention(q_lora_rank=None)},
    "noise, losses of rows, capacity": {
        "moe": {
            "router": _NOISY,
            "first_dense_layers": 1,
            "num_shared_experts": 1,
            "balance": {"coef": 0.1, "scope": "sequence"},
            "capacity": {"factor": 1.0, "min": 1, "renormalize_after_drop": True},
        },
        "num_layers": 3,
        "document_mask": True,
    },
    "experts choose tokens": {"moe": {"router": {"kind": "expert_choice"}, "balance": {"coef": 0.0}}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2 ranks": {"world_size": 2, "tp_size": 2},
    "2 ranks, experts over both": {"world_size": 2, "tp_size": 2, "ep_size": 2, "micro_batch_size": 2},
    "2 ranks, blocks again": {"world_size": 2, "tp_size": 2, "recompute": "block", "micro_batch_size": 1},
    "3 ranks, norms again": {"world_size": 3, "tp_size": 3, "recompute": "norms_and_activations"},
    "4 ranks": {"world_size": 4, "tp_size": 4, "recompute": "norms_and_activations"},
    "4 ranks, experts over all": {"world_size": 4, "tp_size": 2, "ep_size": 4},
    "2 ranks, micro-batches overlap": {
        "world_size": 2,
        "tp_size": 2,
        "ep_size": 2,
        "overlap": "micro_batches",
        "micro_batch_size": 1,
    },
    "sharded": {"world_size": 4, "tp_size": 2, "ep_size": 2, "data": "shard", "micro_batch_size": 1},
    "sharded by two": {"world_size": 4, "tp_size": 2, "data": "shard", "shard_size": 2, "shard_keeps": "nothing"},
    "sharded, no experts": {"world_size": 4, "tp_size": 2, "data": "shard"},
    "rows shared by heads, no experts": {"world_size": 4, "tp_size": 2, "cp_size": 2, "recompute": "block"},
    "stages": {"world_size": 4, "tp_size": 2, "pp_size": 2, "pp_schedule": "gpipe", "micro_batch_size": 1},
    "rows shared by heads": {"world_size": 4, "tp_size": 2, "cp_size": 2, "ep_size": 4},
    "rows shared in a ring": {"world_size": 4, "tp_size": 2, "cp_size": 2, "cp": "ring", "data": "shard"},
}
FOR: dict[str, list[str]] = {
    "dense, grouped queries, biases, sinks": [
        "2 ranks",
        "4 ranks",
        "sharded, no experts",
        "rows shared by heads, no experts",
    ],
    "three heads, gelu": ["2 ranks, blocks again"],
    "latents, documents": ["2 ranks, experts over both", "sharded by two", "rows shared in a ring"],
    "latents of keys only": ["4 ranks"],
    "noise, losses of rows, capacity": [
        "2 ranks",
        "2 ranks, micro-batches overlap",
        "4 ranks, experts over all",
        "sharded",
        "stages",
    ],
    "experts choose tokens": ["rows shared by heads"],
}
CASES = [(model, layout) for model in MODELS for layout in FOR[model]]


def config_of(model: str, folder: Path) -> ExperimentConfig:
    own = MODELS[model]
    moe = None if own["moe"] is None else {"num_experts": 6, "d_ff": 12, "balance": {"coef": 0.1}, **own["moe"]}
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 22, "seq_len": SEQ_LEN, "init_std": 0.3}
    source = {"kind": "jsonl", "path": str(folder / "text.jsonl")}
    return ExperimentConfig.model_validate(
        {
            "name": "heads",
            "model": {**sizes, **own, "moe": moe},
            "data": {"sources": [source], "cache_dir": str(folder / "cache"), "packing": "bfd"},
            "schedule": {"kind": "warmup_cosine", "warmup_steps": 1},
            "train": {"steps": 10, "global_batch_size": ROWS, "dtype": "float64", "grad_clip": 0.1},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    rows = [{"text": f"{n}: {'Rain. ' * (n % 3)}"} for n in range(60)]  # several documents in a row
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@cache
def alone(model: str, folder: Path) -> Evidence:
    """Train in one process, once for all layouts of a model."""
    config = config_of(model, folder)
    return collect_of(config, reference(config), None)


def collect_of(config: ExperimentConfig, case: Case, ranks: LocalRanks | None) -> Evidence:
    return run_case(config, case, ranks, steps=STEPS, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_ranks_that_share_heads_learn_the_same(model: str, layout: str, folder: Path, local_ranks: LocalRanks) -> None:
    fields: dict[str, Any] = {"micro_batch_size": ROWS, **LAYOUTS[layout]}
    together = collect_of(config_of(model, folder), Case(**fields), local_ranks)
    found = compare(together, alone(model, folder), tolerance=TOLERANCE, floor=FLOORS["float64"])
    assert found.is_equal, f"{found.first_different}: {found.cause}"
    assert found.flips == 0
