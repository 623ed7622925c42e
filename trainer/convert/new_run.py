"""Write a new run, whose first checkpoint has weights that were made from those of other runs.

RUNS_DIR/.NAME.partial/     everything is written here, under a lock; removed after an error
RUNS_DIR/NAME/              its name at the end: a killed command leaves no run that would start from random weights
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from trainer.atomic_io import sync_folder
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.identity import Parent
from trainer.checkpoint.plan import local_placements
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import save_tokenizer
from trainer.checkpoint.streamed import GlobalTensor, save_streamed
from trainer.config.dump import dump
from trainer.config.nodes import shown_path
from trainer.data.corpus import Corpus
from trainer.distributed import runtime
from trainer.distributed.version import turnout_version
from trainer.engine.base import Engine
from trainer.errors import ConfigError, ResourceError
from trainer.experiment import ExperimentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run that has not taken a step: its config, weights and text, and what it was made from."""

    config: ExperimentConfig
    engine: Engine
    """Holds the weights, in one process."""
    corpus: Corpus
    parent: Parent | None
    made_from: dict[str, Any]
    """Record of how it was made, for made_from.json."""

    def write(self) -> Path:
        """Write the run folder with the checkpoint of step 0; return the checkpoint's path.

        Raises:
            ConfigError: if the folder exists, or another process is writing it.
            ResourceError: if the disk refuses; nothing is left.
        """
        final = check_is_new(self.config)
        with _new_folder(final) as folder:
            run_id, parent = token_hex(8), None if self.parent is None else asdict(self.parent)
            place = str(final.absolute())
            origin = {"id": run_id, "name": self.config.name, "folder": place, "parent": parent}
            save_tokenizer(folder, self.corpus.tokenizer)
            folder.write(folder.run_id, f"{run_id}\n")
            folder.write(folder.origin, json.dumps(origin, indent=1) + "\n")
            folder.write(folder.made_from, json.dumps(self.made_from) + "\n")
            folder.write(folder.config, dump(self.config))
            places = {"working_directory": str(Path.cwd()), "run_folder": place}
            folder.write(folder.environment, json.dumps({**runtime.environment_info(), **places}, indent=1) + "\n")
            run, state = {"id": run_id, "parent": parent, **self._record()}, _EngineTensors(self.engine)
            save_streamed(CheckpointFolder(folder.checkpoints), state.shapes(), state, run)
        return CheckpointFolder(RunFolder(final).checkpoints).of_step(0)

    def _record(self) -> dict[str, Any]:
        """Return the record of a run at its beginning, as a run that trains writes it."""
        return {
            **dict.fromkeys(("position", "tokens", "skipped_steps", "skipped_in_a_row"), 0),
            "spikes": {},
            "made_from": self.made_from.get("command"),
            "logs": {},
            "streams": {},
            "rows_of_a_step": self.config.train.global_batch_size,
            "data_fingerprint": self.corpus.fingerprint,
            "tokenizer_fingerprint": self.corpus.tokenizer.fingerprint,
            "random": {"kind": "counter_based", "seed": self.config.seed},
            "layout": {"world_size": 1, "ep_size": 1, "data": "replicate", "engine": "native"},
            "versions": {"turnout": turnout_version(), "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
        }


class _EngineTensors:
    """Tensors of an engine in one process, without moments, to be saved."""

    def __init__(self, engine: Engine) -> None:
        self._state = engine.state_without_moments()

    def shapes(self) -> dict[str, GlobalTensor]:
        """Return the shape and dtype of each tensor."""
        return {
            name: GlobalTensor(shape=tuple(place.shape), dtype=place.dtype, is_of_experts=place.is_of_experts)
            for name, place in local_placements(self._state).items()
        }

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor, on the CPU."""
        return self._state.slices[name].tensor[start : start + length].detach().cpu()


def check_is_new(config: ExperimentConfig) -> Path:
    """Return the run folder of a config; raise a ConfigError if there is anything of its name."""
    path = Path(config.runs_dir) / config.name
    if os.path.lexists(path):
        raise ConfigError(f"{shown_path(path)}: exists; choose another name for the new run, or remove it")
    return path


@contextmanager
def _new_folder(final: Path) -> Iterator[RunFolder]:
    """Yield a locked folder that gets its name at the end; after an error nothing is left of it."""
    partial = RunFolder(final.with_name(f".{final.name}.partial"))
    partial.lock()
    try:
        _empty(partial.path)  # a killed command left it
        yield partial
        sync_folder(partial.path)
        partial.path.rename(final)  # refused if it exists by now, unless that is an empty folder
        sync_folder(final.parent)
    except OSError as error:
        raise ResourceError(f"{shown_path(final)}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial.path, ignore_errors=True)


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
