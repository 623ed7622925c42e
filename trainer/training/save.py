"""Save checkpoints: in the background during training, with retries at the end."""

import time

from trainer.checkpoint.saver import Saved
from trainer.distributed.collective_errors import raise_together
from trainer.training import anomalies
from trainer.training.run import RunState

_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
"""Between two attempts at the final save."""


def save(run: RunState, done: int, *, is_last: bool = False, is_stopped: bool = False) -> None:
    """Start saving a checkpoint, or save it now if it is the run's last one. Collective.

    A disk error is only a warning while there will be a later checkpoint.
    """
    anomalies.check_replicas(run, done)  # a corrupt replica must not become the saved state
    report_save(run, run.saver.wait())  # one at a time
    if is_last or is_stopped:
        _save_now(run, done, prunes=is_last)  # pruning may take long, and a stop must be quick
        return
    run.saver.start(done, run.engine.state(), run.checkpoint_info())
    if not run.config.checkpoint.asynchronous:
        report_save(run, run.saver.wait())


def _save_now(run: RunState, done: int, *, prunes: bool) -> None:
    """Save and wait; after a disk error retry for `checkpoint.retry_s`, while the state is still in memory."""
    pause_s, end = _FIRST_PAUSE_S, time.monotonic() + run.config.checkpoint.retry_s
    while True:
        run.saver.start(done, run.engine.state(), run.checkpoint_info(), prunes=prunes)
        saved = run.saver.wait()
        assert saved is not None, "it was started"
        if saved.error is None:
            report_save(run, saved)
            return
        # Rank 0's clock decides for all.
        if not run.mesh.world.broadcast_object(time.monotonic() + pause_s < end):
            break
        run.console.warning(f"{saved.error}; trying again in {pause_s:.0f} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)
    with raise_together(run.mesh.world):
        if run.mesh.layout.rank == 0:
            raise type(saved.error)(
                f"{saved.error}; earlier checkpoints are intact: free some space and start the run again"
            )


def report_save(run: RunState, saved: Saved | None) -> None:
    """Show the result of a save that has finished, if any."""
    if saved is None:
        return
    if saved.error is not None:
        run.best.note_lost(saved.step)
        run.console.warning(f"{saved.error}; earlier checkpoints are intact")
        return
    stalled = f"{saved.stalled_s * 1e3:.0f} ms" if saved.stalled_s < 1 else f"{saved.stalled_s:.1f} s"
    note = f"{saved.size_bytes / 1e6:.0f} MB in {saved.behind_s:.1f} s, of which training waited {stalled}"
    best = run.best.found
    if best is not None and best.step == saved.step:
        note += f", the best {best.metric} so far"
    run.console.checkpoint(saved.path, saved.step, note=note)
