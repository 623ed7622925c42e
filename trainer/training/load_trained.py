"""Load a run's checkpoint for evaluation, in one process."""

from collections.abc import Callable
from dataclasses import replace

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.compatible import check_record
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find, find_newest, removed_meanwhile
from trainer.checkpoint.manifest import UnsupportedFormat
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import tokenizer_of
from trainer.checkpoint.safetensors_file import check_finite_values
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.training import memory
from trainer.training.model import build_parallel_model, numerics, resolve_kernel, single_process
from trainer.training.resume import load_state


def load_trained(
    config: ExperimentConfig, folder: RunFolder, choice: CheckpointChoice, *, warn: Callable[[str], None]
) -> tuple[Engine, Tokenizer, CheckpointHandle]:
    """Load the weights of a checkpoint into an engine in this process.

    The tokenizer is the one kept in the run folder. If a running trainer removes the newest checkpoint before it is
    read, the next one is loaded. An engine of averaged weights has no average beside them.

    Raises:
        CheckpointError: if there is none, it is damaged or of another model, or it has no averaged weights.
    """
    candidates, mesh = CheckpointFolder(folder.checkpoints), Mesh.of_one()
    checkpoint = intact_checkpoint(candidates, choice, warn)
    check_record(checkpoint)
    tokenizer = tokenizer_of(folder, config.data, fingerprint=checkpoint.run["tokenizer_fingerprint"])
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(single_process(config), device)
    if choice.weights == "ema":
        config = config.model_copy(update={"train": config.train.model_copy(update={"ema": None})})
    with memory.hint(config, "reading a checkpoint"):
        model = build_parallel_model(config, tokenizer, mesh, device, warn=warn)
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    while True:
        try:
            load_state(checkpoint, engine, config, tokenizer)
        except CheckpointError as error:
            removed = removed_meanwhile(checkpoint.path)
            if removed is None or choice.step is not None:
                raise CheckpointError(removed or str(error)) from None
            checkpoint = intact_checkpoint(candidates, choice, warn)
            warn(f"{removed}; using step {checkpoint.step} instead")
        else:
            return engine, tokenizer, checkpoint


def intact_checkpoint(
    checkpoints: CheckpointFolder, choice: CheckpointChoice, warn: Callable[[str], None]
) -> CheckpointHandle:
    """Return the verified checkpoint of a step, or the newest one that is intact, for a reader in one process.

    Averaged weights, if they are chosen, are in the place of the others.

    Raises:
        CheckpointError: if there is none, that of the step is damaged, or it has no averaged weights.
    """
    found = _newest(checkpoints, warn) if choice.step is None else _find_intact(checkpoints, choice.step)
    if choice.weights == "raw":
        return found
    if (averaged := found.manifest.averaged()) is None:
        raise CheckpointError(
            f"{found.path}: has no moving average of its weights; read the weights themselves (raw), or a checkpoint "
            "that was trained with train.ema"
        )
    return replace(found, manifest=averaged)


def _newest(checkpoints: CheckpointFolder, warn: Callable[[str], None]) -> CheckpointHandle:
    checkpoint = find_newest(checkpoints, Mesh.of_one().world, warn=warn)
    if checkpoint is None:
        raise CheckpointError(f"{checkpoints.path}: has no checkpoint; train first")
    return checkpoint


def _find_intact(checkpoints: CheckpointFolder, step: int) -> CheckpointHandle:
    checkpoints.resolve_step(step)
    try:
        checkpoint = find(checkpoints, step)
        check_finite_values(checkpoint.path, checkpoint.manifest.files)
    except UnsupportedFormat:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}; use the checkpoint of another step") from None
    return checkpoint
