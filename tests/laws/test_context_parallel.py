"""Law: ranks that share rows learn what one process learns: losses, every gradient, norms, weights, routers' biases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.builders import latent_attention, make_packed_batch
from tests.ranks import mesh_here
from tests.small_proofs import TIMEOUT_S, assert_learns_the_same, collect_of, small_config, write_documents
from trainer.data.batches.batch import Batch
from trainer.data.batches.row_parts import own_part
from trainer.experiment import ExperimentConfig
from trainer.parallel.shared_rows import SharedRows
from trainer.prove.cases import Case, reference
from trainer.prove.compare import compare
from trainer.prove.pool import LocalRanks
from trainer.prove.rounding import FLOORS

_NOISY = {"kind": "bias_balanced", "jitter": 0.2, "bias_update_rate": 0.05}
MODELS: dict[str, dict[str, Any]] = {
    "dense, one key head": {"moe": None, "num_kv_heads": 1},
    "three heads of two ranks, windows, sinks, caps": {
        "moe": None,
        "d_model": 12,
        "num_heads": 3,
        "attention": {"window": 5, "window_pattern": ["sliding", "full"], "sinks": True, "softcap": 1.5},
    },
    "latents, documents": {"moe": {}, "document_mask": True, **latent_attention()},
    "noise, losses of rows, capacity": {
        "moe": {
            "router": _NOISY,
            "balance": {"coef": 0.1, "scope": "sequence"},
            "cv_squared": {"importance_coef": 0.3, "scope": "sequence"},
            "capacity": {"factor": 1.0, "min": 1, "renormalize_after_drop": True},
        },
        "document_mask": True,
    },
    "losses of the batch, capacity by choice": {
        "moe": {
            "router": {"kind": "noisy_top_k"},
            "cv_squared": {"importance_coef": 0.3, "load_coef": 0.3},
            "capacity": {"factor": 1.0, "min": 1, "policy": "choice_major"},
        }
    },
    "capacity at random, balance only logged": {
        "moe": {
            "capacity": {"factor": 1.0, "min": 1, "policy": "random"},
            "balance": {"coef": 0, "scope": "sequence"},
            "device_balance": {"coef": 0.1, "groups": 2},
        }
    },
    "second choices at random, capacity by choice": {
        "moe": {
            "router": {"kind": "gshard"},
            "capacity": {"factor": 1.0, "min": 1, "policy": "choice_major"},
        }
    },
    "experts choose tokens": {"moe": {"router": {"kind": "expert_choice"}, "balance": {"coef": 0.0}}},
    "a transport plan": {"moe": {"router": {"kind": "sinkhorn"}}},
    "a balanced assignment": {"moe": {"router": {"kind": "base"}}},
    "some tokens pass": {"moe": {"num_experts": 1, "router": {"kind": "mixture_of_depths", "capacity": 0.5}}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2 ranks": {"world_size": 2, "cp_size": 2},
    "experts over both": {"world_size": 2, "cp_size": 2, "ep_size": 2},
    "4 ranks, dense": {"world_size": 4, "cp_size": 4, "recompute": "block"},
    "4 ranks, experts over all": {"world_size": 4, "cp_size": 2, "ep_size": 4},
    "4 ranks share rows": {"world_size": 4, "cp_size": 4, "ep_size": 2, "micro_batch_size": 2, "recompute": "block"},
    "sharded": {"world_size": 4, "cp_size": 2, "ep_size": 2, "data": "shard", "micro_batch_size": 1},
    "ring of 2": {"world_size": 2, "cp_size": 2, "cp": "ring", "micro_batch_size": 2},
    "ring of 4": {"world_size": 4, "cp_size": 4, "cp": "ring", "recompute": "block"},
    "ring of 4 with experts": {"world_size": 4, "cp_size": 4, "cp": "ring", "ep_size": 2, "data": "shard"},
    "two rings, experts over all": {"world_size": 4, "cp_size": 2, "cp": "ring", "ep_size": 4},
    "ZeRO": {"world_size": 2, "cp_size": 2, "ep_size": 2, "zero_stage": 2, "micro_batch_size": 2},
}
FOR: dict[str, list[str]] = {
    "dense, one key head": ["2 ranks", "4 ranks, dense", "ring of 4"],
    "three heads of two ranks, windows, sinks, caps": ["2 ranks", "ring of 2"],
    "latents, documents": ["4 ranks share rows", "ring of 4 with experts"],
    "noise, losses of rows, capacity": [
        "experts over both",
        "4 ranks, experts over all",
        "4 ranks share rows",
        "sharded",
        "two rings, experts over all",
    ],
    "some tokens pass": ["2 ranks"],
}
CASES = [(model, layout) for model in MODELS for layout in FOR.get(model, ["4 ranks share rows"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("rows"))


def config_of(model: str, folder: Path) -> ExperimentConfig:
    return small_config(MODELS[model], folder, d_ff=24)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_ranks_that_share_rows_learn_the_same(model: str, layout: str, folder: Path, local_ranks: LocalRanks) -> None:
    assert_learns_the_same(config_of(model, folder), LAYOUTS[layout], local_ranks)


def test_deepspeed_shares_rows_too(folder: Path, local_ranks: LocalRanks) -> None:
    """In float32, which is what DeepSpeed sums in."""
    config = config_of("noise, losses of rows, capacity", folder)
    config = ExperimentConfig.model_validate(
        config.model_dump() | {"train": config.train.model_dump() | {"dtype": "float32"}}
    )
    case = Case(**LAYOUTS["ZeRO"])
    whole = collect_of(config, reference(config), local_ranks)
    found = compare(collect_of(config, case, local_ranks), whole, tolerance=1e-3, floor=FLOORS["float32"])
    assert found.is_equal, f"{found.first_different}: {found.cause}"


def whole_again(batch: Batch) -> dict[str, Tensor]:
    """Return what a rank puts together of the rows that it has a part of, as its routing record does."""
    mesh = mesh_here(cp_size=dist.get_world_size())
    return SharedRows(mesh.cp).whole_batch(own_part(batch, mesh.layout)).tensors()


def test_a_record_has_whole_rows(local_ranks: LocalRanks) -> None:
    batch = make_packed_batch(3, 8)
    batch = replace(batch, experts=torch.arange(3 * 8 * 4).view(3, 8, 2, 2).to(torch.int32))
    for found in local_ranks.run(2, whole_again, batch, timeout_s=TIMEOUT_S):
        assert found.keys() == batch.tensors().keys()
        assert all(torch.equal(found[name], whole) for name, whole in batch.tensors().items())
