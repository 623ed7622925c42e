"""Handle numerical anomalies of a run: skipped steps, loss spikes, replicas that differ."""

from trainer.checkpoint.finite import check_finite
from trainer.checkpoint.replica_check import check_copies
from trainer.engine.base import StepResult
from trainer.errors import NumericsError
from trainer.training.run import Run


def record_step_health(run: Run, done: int, result: StepResult, *, limit: float | None) -> None:
    """Count and report a step that was skipped or whose loss is a spike.

    Args:
        run: whose counters and window of losses move on.
        done: completed steps, this one included.
        result: of this step.
        limit: what the window said, before the step, a spike is above.
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
        usual = f"above {limit:.4g}, {spikes.sigmas:g} standard deviations over the mean of {len(spikes.losses)} losses"
        what = f"its loss {result.loss:.4g} is a spike ({usual})"
        if not result.skipped:
            run.console.warning(f"step {done}: {what}; it was taken, as train.spikes.skip is false")
        elif spikes.skipped():
            run.console.warning(
                f"step {done} skipped: {what}; the {spikes.skipped_in_a_row}. in a row: losses like it "
                "are taken for usual from now on"
            )
        else:
            run.console.warning(f"step {done} skipped: {what}")
    if not result.skipped:
        spikes.taken(result.loss)


def check_patience(run: Run, done: int, result: StepResult) -> None:
    """Give up a run whose loss or gradient does not become finite again.

    Raises:
        NumericsError: after `train.max_consecutive_skips` such steps, or because copies of the weights differ.
    """
    if result.not_finite is None or run.skipped_in_a_row < run.config.train.max_consecutive_skips:
        return
    confirm_copies(run, done)  # the likely cause, where one rank alone is ill
    check_finite(run.engine.state().slices, run.mesh.world, run.saver.folder, step=done)  # and where all are
    raise NumericsError(
        f"step {done}: {run.skipped_in_a_row} steps in a row are not finite, the last one because {result.not_finite}; "
        f"the weights are those of step {done - run.skipped_in_a_row - run.spikes.skipped_in_a_row}: lower "
        "schedule.peak_lr, or resume from an earlier checkpoint"
    )


def confirm_copies(run: Run, done: int) -> None:
    """See that all ranks with copies of the same numbers hold the same ones; after each step at the most once.

    Raises:
        NumericsError: if any differ.
    """
    if run.copies_equal_at != done:
        check_copies(run.engine.state(), run.mesh, step=done, equal_at=run.copies_equal_at)
        run.copies_equal_at = done
