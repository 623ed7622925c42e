"""Resume a run from a checkpoint."""

from collections.abc import Mapping

from pydantic import ValidationError

from trainer.checkpoint.compatible import check_fits, check_model, check_record, check_tokenizer
from trainer.checkpoint.config_changes import check_belongs, order_warnings
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.manifest import recorded_layout
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.config.dump import ABSENT, changed_keys, short
from trainer.data.tokenizers.base import Tokenizer
from trainer.engine.base import Engine
from trainer.experiment import ExperimentConfig
from trainer.training.resume_text import resume_text
from trainer.training.run import RunState

_RATE_TOLERANCE = 0.01
"""Relative change of the learning rate that needs no warning."""
_RATE_KEYS = ("schedule.", "train.steps")


def resume(run: RunState, checkpoint: CheckpointHandle) -> None:
    """Restore a run from a checkpoint: each rank reads its own slices, whatever layout wrote them.

    Raises:
        CheckpointError: if the checkpoint is damaged or of another model or tokenizer.
        DataError: if the run was trained on other text, unless `data.changed` says how to go on.
    """
    run.mesh.world.recorder.enter("loading the checkpoint")
    stored = load_state(checkpoint, run.engine, run.config, run.corpus.tokenizer)
    if not run.folder.config.is_file():  # otherwise compared before torch was imported
        for warning in _changes_since(checkpoint, stored, run.config):
            run.console.warning(warning)
    run.start_step, run.position = checkpoint.step, int(checkpoint.run["position"])
    run.tokens = int(checkpoint.run["tokens"])
    run.optimizer_steps_taken_over = int(checkpoint.run.get("optimizer_steps_taken_over", 0))
    is_other_text = resume_text(run, checkpoint)
    run.best.restore(checkpoint.run)
    run.early_stopping.restore(checkpoint.run)
    run.skipped_steps = int(checkpoint.run["skipped_steps"])
    run.skipped_in_a_row = int(checkpoint.run["skipped_in_a_row"])
    run.spikes.restore({} if is_other_text else checkpoint.run.get("spikes", {}))  # losses of the old text
    run.bias_watch.restore(checkpoint.run.get("bias_watch", {}))
    if run.watch is not None:
        run.watch.alarms.restore({} if is_other_text else checkpoint.run.get("alarms", {}))
    if (jump := _rate_jump(stored, run)) is not None:
        run.console.warning(jump)
    default = {"placement": "contiguous", "cp_size": 1, "tp_size": 1, "pp_size": 1}
    before, layout = default | recorded_layout(checkpoint.manifest), default | run.layout_record()
    changes = [f"{k} {before[k]} -> {v}" for k, v in layout.items() if k in before and before[k] != v]
    run.console.message(f"resuming from {checkpoint.path}" + (f" ({', '.join(changes)})" if changes else ""))


def check_best(run: RunState) -> None:
    """Forget the best checkpoint if the run folder does not have it whole, as a branch has not. Collective.

    So a value from before never stands in the way of keeping a checkpoint.
    """
    best = run.best.found
    if best is None or run.mesh.world.broadcast_object(run.saver.folder.is_whole(best.step)):
        return
    run.best.forget()
    run.console.message(
        f"the best checkpoint so far, of step {best.step}, is not in this folder, or not whole: the next is the best"
    )


def load_state(
    checkpoint: CheckpointHandle, engine: Engine, config: ExperimentConfig, tokenizer: Tokenizer
) -> ExperimentConfig | None:
    """Load this rank's slices of weights and optimizer state, after checking that they fit the model and tokenizer.

    Returns:
        The config that the checkpoint was written with; None if this version cannot read it.
    """
    check_record(checkpoint)
    stored = _stored_config(checkpoint)
    stored_model = None if stored is None else stored.model.model_dump(mode="json")
    check_model(checkpoint, config.model.model_dump(mode="json"), stored=stored_model)
    check_tokenizer(checkpoint, fingerprint=tokenizer.fingerprint)
    wanted = engine.wanted()
    check_fits(checkpoint, wanted, elsewhere=engine.model.elsewhere)
    with StoredTensors(checkpoint.path, checkpoint.manifest) as tensors:
        engine.load_state(tensors.like(wanted))
    return stored


def _stored_config(checkpoint: CheckpointHandle) -> ExperimentConfig | None:
    """Return the config that a checkpoint was written with; None if this version cannot read it."""
    try:
        return ExperimentConfig.model_validate(checkpoint.run.get("config"))
    except ValidationError:
        return None


def _changes_since(
    checkpoint: CheckpointHandle, stored: ExperimentConfig | None, config: ExperimentConfig
) -> list[str]:
    """Return a warning for each change since a checkpoint that affects what is learned; refuse another model."""
    if stored is not None:
        folder, changes = RunFolder(checkpoint.path), changed_keys(stored, config)
        return check_belongs(folder, changes, may_read_other_text=config.data.changed is not None)
    counters = checkpoint.run.get("random")
    seed = counters.get("seed") if isinstance(counters, Mapping) else None
    warnings = [f"{checkpoint.path}: this version cannot read its config; only model and seed are compared"]
    if seed != config.seed:
        warnings.append(f"seed was {short(seed)} in {checkpoint.path} and is now {config.seed}")
        warnings += order_warnings(["seed"])
    return warnings


def _rate_jump(stored: ExperimentConfig | None, run: RunState) -> str | None:
    """Return a warning if the learning rate jumps because the schedule or the length of the run changed."""
    done = run.start_step
    if stored is None or not 0 < done < run.config.train.steps:
        return None
    before, now = stored.schedule.build(total_steps=stored.train.steps), run.schedule(done)
    if abs(now - before(done)) <= _RATE_TOLERANCE * abs(before(done)):
        return None
    changes = changed_keys(stored, run.config)
    # Options that only one of two schedule kinds has follow from the change of kind.
    keys = [str(c) for c in changes if c.key.startswith(_RATE_KEYS) and ABSENT not in (c.old, c.new)]
    return (
        f"the learning rate was {before(done - 1):.2e} in step {done} and continues at {now:.2e} in step {done + 1} "
        f"({', '.join(keys)})"
    )
