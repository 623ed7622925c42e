"""The record of a run that has not taken a step, and the place for its folder."""

import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.new_folder import check_nothing_is_at
from trainer.console import formatting
from trainer.distributed.version import turnout_version
from trainer.errors import ResourceError
from trainer.experiment import ExperimentConfig


def check_is_new(config: ExperimentConfig) -> Path:
    """Return the run folder of a config; raise a ConfigError if there is anything of its name."""
    return check_nothing_is_at(Path(config.runs_dir) / config.name)


def check_room(folder: Path, size_bytes: int, *, of: str) -> None:
    """Refuse weights that cannot fit on the disk of a folder, which may not exist; raise a ResourceError."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size_bytes > free:
        needed, available = formatting.size(size_bytes), formatting.size(free)
        raise ResourceError(f"{folder}: {of} need {needed} of disk, and {available} are free; set runs_dir")


def first_record(
    config: ExperimentConfig, *, run_id: str, data_fingerprint: str | None, tokenizer_fingerprint: str
) -> dict[str, Any]:
    """Return the record of a run at its beginning, as a run that trains writes it.

    `data_fingerprint` is None if the run may read any text.
    """
    return {
        **dict.fromkeys(("position", "tokens", "skipped_steps", "skipped_in_a_row"), 0),
        "id": run_id,
        "parent": None,
        "spikes": {},
        "logs": {},
        "streams": {},
        "rows_of_a_step": config.train.global_batch_size,
        "data_fingerprint": data_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "random": {"kind": "counter_based", "seed": config.seed},
        "layout": {"world_size": 1, "ep_size": 1, "data": "replicate", "engine": "native"},
        "versions": {"turnout": turnout_version(), "torch": torch.__version__},
        "config": config.model_dump(mode="json"),
    }
