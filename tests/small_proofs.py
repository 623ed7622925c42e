"""Small models that ranks train together, compared with one process: losses, gradients, norms, weights, biases."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from trainer.experiment import ExperimentConfig
from trainer.prove.cases import Case, reference
from trainer.prove.compare import compare
from trainer.prove.evidence import Evidence
from trainer.prove.pool import LocalRanks
from trainer.prove.rounding import FLOORS
from trainer.prove.run_case import run_case

STEPS, TOLERANCE, TIMEOUT_S, ROWS, SEQ_LEN = 3, 1e-9, 120.0, 3, 16


def write_documents(folder: Path) -> Path:
    """Write short documents with weights, several of which fit into a row; return the folder."""
    rows = [{"text": f"{n}: {'Rain. ' * (n % 3)}", "gain": (0, 0.3, 1, 2.25)[n % 4]} for n in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small_config(model: Mapping[str, Any], folder: Path, *, d_ff: int) -> ExperimentConfig:
    """Return a config with some keys of `model`, and the documents of a folder."""
    moe = None if model["moe"] is None else {"num_experts": 6, "d_ff": 12, "balance": {"coef": 0.1}, **model["moe"]}
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": d_ff, "seq_len": SEQ_LEN, "init_std": 0.3}
    source = {"kind": "jsonl", "path": str(folder / "text.jsonl"), "weight_key": "gain"}
    return ExperimentConfig.model_validate(
        {
            "name": "small",
            "model": {**sizes, **model, "moe": moe},
            "data": {"sources": [source], "cache_dir": str(folder / "cache"), "packing": "bfd"},
            "schedule": {"kind": "warmup_cosine", "warmup_steps": 1},
            "train": {"steps": 10, "global_batch_size": ROWS, "dtype": "float64", "grad_clip": 0.1},
        }
    )


def collect_of(config: ExperimentConfig, case: Case, ranks: LocalRanks) -> Evidence:
    """Train a config under a layout."""
    return run_case(config, case, ranks, steps=STEPS, timeout_s=TIMEOUT_S)


def assert_learns_the_same(config: ExperimentConfig, layout: Mapping[str, Any], ranks: LocalRanks) -> None:
    """Train under a layout, in micro-batches of all rows unless it says otherwise, and compare with one process."""
    fields: dict[str, Any] = {"micro_batch_size": ROWS, **layout}
    assert_same(collect_of(config, Case(**fields), ranks), config)


def assert_same(together: Evidence, config: ExperimentConfig) -> None:
    """Compare what ranks have learned with one process."""
    found = compare(together, _alone(config.model_dump_json()), tolerance=TOLERANCE, floor=FLOORS["float64"])
    assert found.is_equal, f"{found.first_different}: {found.cause}"
    assert found.flips == 0


@cache
def _alone(config: str) -> Evidence:
    """Train in one process, once for all layouts of a config, given as JSON."""
    alone = ExperimentConfig.model_validate_json(config)
    return collect_of(alone, reference(alone), LocalRanks())
