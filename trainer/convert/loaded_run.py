"""Runs whose weights are read, and models that are filled with them, each in one process and without moments."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_fits, check_model, check_record
from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.identity import Parent
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import tokenizer_of
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
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
class LoadedRun:
    """Weights of a run's checkpoint, its config and tokenizer."""

    config: ExperimentConfig
    folder: RunFolder
    engine: Engine
    tokenizer: Tokenizer
    checkpoint: CheckpointHandle

    @property
    def model(self) -> GPT:
        """The model with the checkpoint's weights."""
        return self.engine.model

    def as_parent(self) -> Parent | None:
        """Return the entry of this run in the record of one that is made from it; None if it never had an id."""
        run_id = self.checkpoint.run.get("id")
        if not isinstance(run_id, str) or not run_id:
            return None
        folder = str(self.folder.path.absolute())
        return Parent(id=run_id, name=self.config.name, step=self.checkpoint.step, folder=folder)


def load_weights(
    config: ExperimentConfig,
    folder: RunFolder,
    *,
    step: int | None,
    warn: Callable[[str], None],
    seq_len: int | None = None,
) -> LoadedRun:
    """Load the weights of a checkpoint, of `step` or the newest one; `seq_len` is of the rows to evaluate.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another model.
    """
    checkpoint = intact_checkpoint(CheckpointFolder(folder.checkpoints), step, warn)
    check_record(checkpoint)
    tokenizer = tokenizer_of(folder, config.data, fingerprint=checkpoint.run["tokenizer_fingerprint"])
    check_model(checkpoint, config.model.model_dump(mode="json"))
    update = {} if seq_len is None else {"seq_len": seq_len}
    rows = config.model_copy(update={"model": config.model.model_copy(update=update)})
    engine = new_engine(rows, tokenizer, warn)
    read_weights(checkpoint, engine.model)
    return LoadedRun(config=config, folder=folder, engine=engine, tokenizer=tokenizer, checkpoint=checkpoint)


@torch.no_grad()
def read_weights(checkpoint: CheckpointHandle, model: GPT) -> None:
    """Copy a verified checkpoint's parameters and buffers into a whole model, after comparing all names and shapes."""
    mine = {f"{WEIGHT}{name}": tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    stored = {name: tensor for name, tensor in checkpoint.manifest.tensors.items() if name.startswith(WEIGHT)}
    weights_only = checkpoint.manifest.model_copy(update={"tensors": stored})
    wanted = TrainState(slices={name: Slice.whole(tensor) for name, tensor in mine.items()})
    check_fits(replace(checkpoint, manifest=weights_only), wanted)
    with StoredTensors(checkpoint.path, weights_only) as tensors:
        for name, tensor in mine.items():
            tensor.copy_(tensors.read(name))


def new_engine(config: ExperimentConfig, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Engine:
    """Return a model with the initial values of a config, and an engine to evaluate it, in this process."""
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(single_process(config), device)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"compile": False})})
    mesh = Mesh.of_one()
    with memory.hint(config, "making the weights"):
        model = build_parallel_model(config, tokenizer, mesh, device, warn=warn)
    return config.engine.build(model, config.optim, numerics(config), mesh)
