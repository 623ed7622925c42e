"""Runs whose weights are read, and models that are filled with them, each in one process and without moments."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.compatible import check_fits, check_model, check_record
from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.identity import Parent, parent_in
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import tokenizer_of
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.convert.router_columns import tensors_of
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.training import memory
from trainer.training.load_trained import intact_checkpoint
from trainer.training.model import build_parallel_model, numerics, resolve_kernel, single_process


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """A verified checkpoint of a run."""

    config: ExperimentConfig
    folder: RunFolder
    checkpoint: CheckpointHandle

    @classmethod
    def find(
        cls, config: ExperimentConfig, folder: RunFolder, *, step: int | None, warn: Callable[[str], None]
    ) -> Self:
        """Find a checkpoint of a model, of `step` or the newest one, and read all of its bytes.

        Raises:
            CheckpointError: if there is none, or it is damaged or of another model than `config`'s.
        """
        checkpoint = intact_checkpoint(CheckpointFolder(folder.checkpoints), CheckpointChoice(step=step), warn)
        check_record(checkpoint)
        check_model(checkpoint, config.model.model_dump(mode="json"))
        return cls(config=config, folder=folder, checkpoint=checkpoint)

    def as_parent(self) -> Parent | None:
        """Return the entry of this run in the record of one that is made from it; None if it never had an id."""
        checkpoint = self.checkpoint
        return parent_in(checkpoint.run, name=self.config.name, step=checkpoint.step, folder=self.folder.path)

    def weights(self, model: GPT) -> StoredTensors:
        """Return the stored parameters and buffers of a whole model, after comparing all names and shapes."""
        handle = self.checkpoint
        stored = {name: tensor for name, tensor in handle.manifest.tensors.items() if name.startswith(WEIGHT)}
        weights_only = handle.manifest.model_copy(update={"tensors": stored})
        wanted = {f"{WEIGHT}{name}": Slice.whole(tensor) for name, tensor in tensors_of(model).items()}
        check_fits(replace(handle, manifest=weights_only), TrainState(slices=wanted))
        return StoredTensors(handle.path, weights_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """Weights of a run's checkpoint in memory, and its tokenizer."""

    source: WeightSource
    engine: Engine
    tokenizer: Tokenizer

    @property
    def model(self) -> GPT:
        """The model with the checkpoint's weights."""
        return self.engine.model


def load_weights(source: WeightSource, *, warn: Callable[[str], None], seq_len: int | None = None) -> LoadedRun:
    """Load the weights of a checkpoint; `seq_len` is of the rows to evaluate, None: as in training."""
    config, checkpoint = source.config, source.checkpoint
    tokenizer = tokenizer_of(source.folder, config.data, fingerprint=checkpoint.run["tokenizer_fingerprint"])
    update = {} if seq_len is None else {"seq_len": seq_len}
    rows = config.model_copy(update={"model": config.model.model_copy(update=update)})
    engine = new_engine(rows, tokenizer, warn)
    with torch.no_grad(), source.weights(engine.model) as stored:
        for name, tensor in tensors_of(engine.model).items():
            tensor.copy_(stored.read(f"{WEIGHT}{name}"))
    return LoadedRun(source=source, engine=engine, tokenizer=tokenizer)


def new_engine(config: ExperimentConfig, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Engine:
    """Return a model with the initial values of a config, and an engine to evaluate it, in this process."""
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(single_process(config), device)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"compile": False})})
    mesh = Mesh.of_one()
    with memory.hint(config, "making the weights"):
        model = build_parallel_model(config, tokenizer, mesh, device, warn=warn)
    return config.engine.build(model, config.optim, numerics(config), mesh)
