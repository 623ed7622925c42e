"""Handle numerical anomalies of a run: skipped steps, loss spikes, replicas that differ."""

from trainer.checkpoint.finite import check_finite
from trainer.checkpoint.replica_check import check_copies
from trainer.engine.base import StepResult
from trainer.errors import NumericsError
from trainer.training.run import RunState


def record_step_health(run: RunState, done: int, result: StepResult, *, limit: float | None) -> None:
    """Count and report a skipped step or a spike: a loss above `limit`, which was taken before the step.

    `done` counts this step.
    """
    spikes = run.spikes
    is_spike = result.not_finite is None and limit is not None and result.loss > limit
    run.skipped_steps += result.skipped
    if result.not_finite is not None:
        run.skipped_in_a_row += 1
        run.console.warning(f"step {done} skipped: {result.not_finite}")
    elif not result.skipped:
        run.skipped_in_a_row = 0
    if is_spike:
        spikes.count += 1
        bound = f"above {limit:.4g}, {spikes.sigmas:g} standard deviations over the mean of {len(spikes.losses)} losses"
        problem = f"loss {result.loss:.4g} is a spike ({bound})"
        if not result.skipped:
            run.console.warning(f"step {done}: {problem}; the step was taken, as train.spikes.skip is false")
        else:
            restarts = spikes.note_skipped()
            note = f", number {spikes.skipped_in_a_row} in a row: the spike window restarts from here"
            run.console.warning(f"step {done} skipped: {problem}{note if restarts else ''}")
    if not result.skipped:
        spikes.note_taken(result.loss)


def check_patience(run: RunState, done: int, result: StepResult) -> None:
    """Stop a run whose loss or gradient stays non-finite.

    Raises:
        NumericsError: after `train.max_consecutive_skips` such steps.
        DivergedError: if replicas of the weights differ, the likely cause where one rank alone is affected.
    """
    if result.not_finite is None or run.skipped_in_a_row < run.config.train.max_consecutive_skips:
        return
    check_replicas(run, done)
    check_finite(run.engine.state().slices, run.mesh.world, run.saver.folder, step=done)
    raise NumericsError(
        f"step {done}: {run.skipped_in_a_row} steps in a row are not finite, the last one because {result.not_finite}; "
        f"the weights are those of step {done - run.skipped_in_a_row - run.spikes.skipped_in_a_row}: lower "
        "schedule.peak_lr, or resume from an earlier checkpoint"
    )


def check_replicas(run: RunState, done: int) -> None:
    """Raise `DivergedError` if replicated tensors are not bitwise equal; checked once per step. Collective."""
    if run.copies_equal_at != done:
        check_copies(run.engine.held(), run.mesh, step=done, equal_at=run.copies_equal_at)
        run.copies_equal_at = done
