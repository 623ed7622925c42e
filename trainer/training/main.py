"""Train a run from its first line to its last screen."""

import io
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from trainer.checkpoint.branch import Branch
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.distributed import runtime
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.mesh import joined
from trainer.distributed.rank_layout import Layout
from trainer.distributed.signals import StopRequest
from trainer.environment import is_restarted
from trainer.errors import PREEMPTED, CommError, MemoryExhausted, NumericsError, TurnoutError
from trainer.evaluation.eval_report import EvalReport
from trainer.experiment import ExperimentConfig
from trainer.status import StatusFile, remove_others
from trainer.training.experts_picture import write_experts_picture
from trainer.training.first_weights import FirstWeights
from trainer.training.generate_text import sample_held_out
from trainer.training.loop import fit
from trainer.training.model import check_what_learns
from trainer.training.run import RunState
from trainer.training.save import report_save
from trainer.training.screens import final_summary, header
from trainer.training.setup import build_run
from trainer.training.start_trackers import start_trackers


def train_run(
    config: ExperimentConfig,
    folder: RunFolder,
    layout: Layout,
    *,
    warnings: Sequence[str],
    stop: StopRequest,
    status: StatusFile,
    first_weights: FirstWeights | None = None,
    branch: Branch | None = None,
) -> int:
    """Train as one rank of a layout, after showing the warnings; return the exit code. Rank 0 locks the folder.

    `first_weights` are those that the config's `init_from` names, for a run without a checkpoint. A run that is a new
    `branch` of another one is made first, by rank 0.
    """
    stop.check()
    started_s = time.monotonic()
    device = runtime.start(config.parallel.device)
    screen = None if layout.rank == 0 else io.StringIO()  # only rank 0 prints
    with (
        ExitStack() as outermost,
        joined(layout, device, timeout_s=config.parallel.timeout_s) as mesh,
        closing(Console(config.train.steps, file=screen)) as console,
    ):
        for warning in warnings:
            console.warning(warning)
        if branch is not None:
            mesh.world.recorder.enter("copying a checkpoint")
            with raise_together(mesh.world):
                if layout.rank == 0 and not (is_restarted() and branch.is_made(folder.path)):
                    parent = branch.make(folder.path)
                    console.message(f"branched off from {parent.folder} at step {parent.step}: {folder.path}")
        with raise_together(mesh.world):
            if layout.rank == 0:
                check_what_learns(config)
                if first_weights is not None:
                    mesh.world.recorder.enter("verifying the weights to start from")
                    first_weights.verify(warn=console.warning)
                mesh.world.recorder.enter("locking the run folder")
                folder.lock()
                mesh.world.recorder.enter("removing old status files")
                remove_others(folder.status, world_size=layout.world_size)
        status.enter("start-up")
        run = build_run(config, folder, console, mesh, device, first_weights=first_weights)
        status.status.experts_kernel = run.config.parallel.experts_kernel
        mesh.world.recorder.enter("opening the trackers")
        outermost.enter_context(start_trackers(run))  # closed after the mesh, so that no rank waits for an upload
        console.header(header(run))
        if run.start_step >= config.train.steps:
            console.message(f"already at step {run.start_step} of {config.train.steps}: nothing is left to train")
        evaluation = _fit(run, stop, status)
        if evaluation is None:
            run.engine.close()
            run.trackers.exit_code = PREEMPTED
            return PREEMPTED
        _finish(run, evaluation, started_s=started_s)
    return 0


def _fit(run: RunState, stop: StopRequest, status: StatusFile) -> EvalReport | None:
    """Train, and finish the save in progress even after an error, unless that needs a rank that was lost."""
    try:
        evaluation = fit(run, stop, status)
    except Exception as error:
        is_on_all_ranks = isinstance(error, TurnoutError) and not isinstance(error, CommError | MemoryExhausted)
        if is_on_all_ranks or run.mesh.world.size == 1:
            report_save(run, run.saver.wait())
            run.saver.close()
        raise
    run.saver.close()  # a thread still running at interpreter shutdown may abort the process
    return evaluation


def _finish(run: RunState, evaluation: EvalReport, *, started_s: float) -> None:
    """Sample a text and show the summary; an error of the sample is that weights are finite but too large."""
    recorder = run.mesh.world.recorder
    recorder.enter("sampling")
    sample = sample_held_out(run)
    if run.mesh.layout.rank == 0:
        recorder.enter("summary")
        summary = final_summary(run, evaluation, sample, elapsed_s=time.monotonic() - started_s)
        try:
            picture = write_experts_picture(run.folder, summary)
        except OSError as error:  # the screen is still shown
            run.console.warning(f"{run.folder.experts_picture}: is not written: {error.strerror or error}")
            picture = []
        run.console.summary(replace(summary, written=[*summary.written, *picture]))
    run.engine.close()
    if sample.error is not None:
        raise NumericsError(f"{run.saver.folder.of_step(run.last_step)}: {sample.error}") from None
