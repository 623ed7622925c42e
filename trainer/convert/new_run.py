"""Write a new run, whose first checkpoint has weights that were made from those of other runs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.identity import Parent, write_identity
from trainer.checkpoint.new_folder import new_folder
from trainer.checkpoint.plan import local_placements
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import save_tokenizer
from trainer.checkpoint.streamed import GlobalTensor, save_streamed
from trainer.config.dump import dump
from trainer.convert.first_record import check_is_new, first_record
from trainer.data.corpus import Corpus
from trainer.distributed import runtime
from trainer.engine.base import Engine
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
        config = self.config.model_copy(update={"init_from": None})  # of the run that it was made from
        with new_folder(final) as folder:
            run_id = token_hex(8)
            save_tokenizer(folder, self.corpus.tokenizer)
            write_identity(folder, run_id=run_id, name=self.config.name, parent=self.parent)
            folder.write(folder.made_from, json.dumps(self.made_from) + "\n")
            folder.write(folder.config, dump(config))
            folder.write_environment(runtime.environment_info())
            record = first_record(
                config,
                run_id=run_id,
                data_fingerprint=self.corpus.fingerprint,
                tokenizer_fingerprint=self.corpus.tokenizer.fingerprint,
            )
            parent = None if self.parent is None else asdict(self.parent)
            record |= {"parent": parent, "made_from": self.made_from.get("command")}
            state = _EngineTensors(self.engine)
            save_streamed(CheckpointFolder(folder.checkpoints), state.shapes(), state, record)
        return CheckpointFolder(RunFolder(final).checkpoints).of_step(0)


class _EngineTensors:
    """Tensors of an engine in one process, without moments, to be saved."""

    def __init__(self, engine: Engine) -> None:
        self._state = engine.state_without_moments()

    def shapes(self) -> dict[str, GlobalTensor]:
        """Return the shape and dtype of each tensor."""
        return {name: GlobalTensor.like(place) for name, place in local_placements(self._state).items()}

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor, on the CPU."""
        return self._state.slices[name].tensor[start : start + length].detach().cpu()
