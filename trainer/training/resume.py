"""From a checkpoint back to a run, or to a trained model in one process."""

from collections.abc import Callable, Mapping

from pydantic import ValidationError

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import abridged, check_fits, check_model, check_record, check_tokenizer
from trainer.checkpoint.config_changes import check_belongs, order_warnings
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find, find_newest, removed_meanwhile
from trainer.checkpoint.manifest import recorded_layout
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import tokenizer_of
from trainer.checkpoint.safetensors_file import check_finite_values
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.config.dump import ABSENT, changed_keys, short
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine
from trainer.errors import CheckpointError, DataError
from trainer.experiment import ExperimentConfig
from trainer.training import out_of_memory
from trainer.training.model import build_model, in_one_process, numerics, resolve_kernel
from trainer.training.run import Run

_SAME_RATE = 0.01
"""Share of a learning rate by which another schedule may change it without a word."""
_OF_THE_RATE = ("schedule.", "train.steps")


def resume(run: Run, found: CheckpointHandle) -> None:
    """Go on from a checkpoint: each rank reads its own parts, however the ranks that wrote it were laid out."""
    run.mesh.world.recorder.enter("loading the checkpoint")
    _load_state(found, run.engine, run.config, run.corpus.tokenizer)
    if not run.folder.config.is_file():  # with it, the comparison was made before torch was imported
        for warning in _changes_since(found, run.config):
            run.console.warning(warning)
    saved, now = found.run["data_fingerprint"], run.corpus.fingerprint
    if saved != now:
        raise DataError(
            f"{found.path}: was trained on other text than data.sources and data.split give now (fingerprint "
            f"{abridged(saved)}, now {abridged(now)}); restore the files, or start a new run with name=..."
        )
    run.start_step, run.position = found.step, int(found.run["position"])
    run.tokens = int(found.run["tokens"])
    run.stream.go_on_from(found.run.get("streams", {}))
    run.skipped_steps = int(found.run["skipped_steps"])
    run.skipped_in_a_row = int(found.run["skipped_in_a_row"])
    run.spikes.restore(found.run.get("spikes", {}))
    if (jump := _rate_jump(found, run)) is not None:
        run.console.warning(jump)
    run.console.message(f"resuming from {found.path}{_moved(found, run)}")


def _load_state(found: CheckpointHandle, engine: Engine, config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    check_record(found)
    stored = _stored_config(found)
    filled_up = None if stored is None else stored.model.model_dump(mode="json")
    check_model(found, config.model.model_dump(mode="json"), stored=filled_up)
    check_tokenizer(found, fingerprint=tokenizer.fingerprint)
    mine = engine.wanted()
    check_fits(found, mine)
    with StoredTensors(found.path, found.manifest) as tensors:
        engine.load_state(tensors.like(mine))


def _stored_config(found: CheckpointHandle) -> ExperimentConfig | None:
    """Return the config that a checkpoint was written with, filled up; None if this version cannot read it."""
    try:
        return ExperimentConfig.model_validate(found.run.get("config"))
    except ValidationError:
        return None


def _changes_since(found: CheckpointHandle, config: ExperimentConfig) -> list[str]:
    """Return a warning for each change of what is learned since a checkpoint.

    Raises:
        ConfigError: if the model itself changed.
    """
    stored = _stored_config(found)
    if stored is not None:
        return check_belongs(RunFolder(found.path), changed_keys(stored, config))
    counters = found.run.get("random")
    seed = counters.get("seed") if isinstance(counters, Mapping) else None
    unread = f"{found.path}: its config is not one of this version; beside model and seed nothing of it is compared"
    other = [f"seed was {short(seed)} in {found.path} and is now {config.seed}"] if seed != config.seed else []
    return [unread, *other, *(order_warnings(["seed"]) if other else [])]


def _rate_jump(found: CheckpointHandle, run: Run) -> str | None:
    """Say from where to where the learning rate jumps, if it goes on by another schedule or length of the run."""
    stored, done = _stored_config(found), found.step
    if stored is None or not 0 < done < run.config.train.steps:
        return None
    before, now = stored.schedule.build(total_steps=stored.train.steps), run.schedule(done)
    if abs(now - before(done)) <= _SAME_RATE * abs(before(done)):
        return None
    changes = changed_keys(stored, run.config)
    # An option that only one of two kinds has is no reason of its own.
    keys = [str(c) for c in changes if c.key.startswith(_OF_THE_RATE) and ABSENT not in (c.old, c.new)]
    return (
        f"the learning rate was {before(done - 1):.2e} in step {done} and goes on with {now:.2e} in step {done + 1} "
        f"({', '.join(keys)})"
    )


def _moved(found: CheckpointHandle, run: Run) -> str:
    """Say how the layout differs from the one that wrote the checkpoint."""
    before, now = recorded_layout(found.manifest), run.layout()
    changes = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f" ({', '.join(changes)})" if changes else ""


def _newest(checkpoints: CheckpointFolder, warn: Callable[[str], None]) -> CheckpointHandle:
    found = find_newest(checkpoints, Mesh.of_one().world, warn=warn)
    if found is None:
        raise CheckpointError(f"{checkpoints.path}: has no checkpoint; train first")
    return found


def _find_sound(checkpoints: CheckpointFolder, step: int) -> CheckpointHandle:
    found = find(checkpoints, step)
    try:
        check_finite_values(found.path, found.manifest.files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; use the checkpoint of another step") from None
    return found


def load_trained(
    config: ExperimentConfig, folder: RunFolder, *, step: int | None, warn: Callable[[str], None]
) -> tuple[Engine, Tokenizer, CheckpointHandle]:
    """Return an engine with the weights of a run's checkpoint, of `step` or the newest, all in this process.

    The tokenizer is the one that the run keeps in its folder. Where a run that trains removes the newest checkpoint
    before it is read, the next one is taken.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another model.
    """
    checkpoints, mesh = CheckpointFolder(folder.checkpoints), Mesh.of_one()
    found = _newest(checkpoints, warn) if step is None else _find_sound(checkpoints, step)
    check_record(found)
    tokenizer = tokenizer_of(folder, config.data, fingerprint=found.run["tokenizer_fingerprint"])
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(in_one_process(config), device)
    with out_of_memory.reading_checkpoint(config):
        model = build_model(config, tokenizer, mesh, device, warn=warn)
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    while True:
        try:
            _load_state(found, engine, config, tokenizer)
        except CheckpointError as error:
            removed = removed_meanwhile(found.path)
            if removed is None or step is not None:
                raise CheckpointError(removed or str(error)) from None
            found = _newest(checkpoints, warn)
            warn(f"{removed}; using step {found.step} instead")
        else:
            return engine, tokenizer, found
