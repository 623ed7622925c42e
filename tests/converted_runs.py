"""Tiny runs for tests of conversions, written in milliseconds: random weights, a text of a few sentences."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.atomic_io import replace_file
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.convert.loaded_run import LoadedRun, WeightSource, load_weights, new_engine
from trainer.convert.new_run import NewRun
from trainer.data.corpus import build_corpus
from trainer.experiment import ExperimentConfig

MOE: dict[str, Any] = {"num_experts": 4, "d_ff": 12}
_MODEL = {"num_layers": 2, "d_model": 16, "num_heads": 2, "seq_len": 16, "d_ff": 24, "init_std": 0.3}
_TEXT = "It was a bright cold day in April, and the clocks were striking. Winston slipped through the doors. " * 30


def write_config(folder: Path, name: str, moe: dict[str, Any] | None, **model: Any) -> Path:
    """Write an experiment file of a tiny model, dense without `moe`; its run is folder/runs/NAME."""
    if not (folder / "text.txt").exists():  # another time of change would make the text be read again
        (folder / "text.txt").write_text(_TEXT)
    values = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "model": {**_MODEL, **model, "moe": moe},
        "data": {"sources": [{"kind": "text", "path": str(folder / "text.txt")}], "cache_dir": str(folder / "cache")},
        "train": {"steps": 4, "global_batch_size": 4},
        "schedule": {"kind": "warmup_cosine", "warmup_steps": 0},
        "parallel": {"micro_batch_size": 4, "device": "cpu"},
    }
    path = folder / f"{name}.yaml"
    replace_file(path, json.dumps(values))  # several ranks may write and read it at the same time
    return path


def make_run(
    folder: Path, name: str, moe: dict[str, Any] | None, *, seed: int = 0, overrides: Sequence[str] = (), **model: Any
) -> Path:
    """Write a run with initial weights of a seed; return its folder."""
    config = load(write_config(folder, name, moe, **model), [f"seed={seed}", *overrides], ExperimentConfig)
    corpus = build_corpus(config.data)
    engine = new_engine(config, corpus.tokenizer, print)
    NewRun(config=config, engine=engine, corpus=corpus, parent=None, made_from={}).write()
    return folder / "runs" / name


def loaded(run: Path, step: int | None = None) -> LoadedRun:
    """Return a run's weights, as conversions read them."""
    config = load(run / "config.yaml", [], ExperimentConfig)
    return load_weights(WeightSource.find(config, RunFolder(run), step=step, warn=print), warn=print)
