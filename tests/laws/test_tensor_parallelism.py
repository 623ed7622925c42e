"""Law: ranks that share heads and rows learn what one process learns: losses, gradients, norms, weights, biases."""

from pathlib import Path
from typing import Any

import pytest

from tests.builders import latent_attention
from tests.small_proofs import assert_learns_the_same, small_config, write_documents
from trainer.prove.pool import LocalRanks

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
    "two heads of keys": {
        "moe": None,
        "num_heads": 8,
        "num_kv_heads": 2,
        "seq_len": 24,
        "qk_norm": True,
        "attention": {**_BIASED, "head_dim": 6, "sinks": True, "clip_qkv": 2.0},
    },
    "one head of keys": {
        "moe": {"first_dense_layers": 1},
        "num_layers": 3,
        "num_kv_heads": 1,
        "seq_len": 24,
        "document_mask": True,
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
    "adapters": {
        "moe": {"first_dense_layers": 1, "num_shared_experts": 1},
        "num_layers": 3,
        "num_kv_heads": 2,
        "attention": _BIASED,
        "lora": {"rank": 3, "alpha": 6, "trains": ["router", "norms"]},
    },
    "adapters of latents": {"moe": None, **latent_attention(), "lora": {"rank": 3, "use_rslora": True}},
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
    "two heads of keys": ["3 ranks, norms again", "4 ranks"],
    "one head of keys": [
        "3 ranks, norms again",
        "2 ranks, blocks again",
        "2 ranks, micro-batches overlap",
        "sharded",
        "rows shared by heads",
        "rows shared in a ring",
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
    "adapters": ["2 ranks", "4 ranks", "sharded", "rows shared by heads"],
    "adapters of latents": ["2 ranks, blocks again", "sharded, no experts"],
    "experts choose tokens": ["rows shared by heads"],
}
CASES = [(model, layout) for model in MODELS for layout in FOR[model]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("heads"))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_ranks_that_share_heads_learn_the_same(model: str, layout: str, folder: Path, local_ranks: LocalRanks) -> None:
    assert_learns_the_same(small_config(MODELS[model], folder, d_ff=22), LAYOUTS[layout], local_ranks)
