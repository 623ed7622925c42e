"""The training loop, and what happens around it at regular steps."""

import time

import torch

from trainer.checkpoint.saver import Saved
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.rank_layout import is_first_on_node
from trainer.distributed.signals import StopRequest
from trainer.engine.base import StepResult
from trainer.evaluation.eval_report import EvalReport, due_tasks, write_predictions
from trainer.evaluation.routing_gap import RoutingGap, held_out_rows, routing_gap
from trainer.metrics.routing import routing_metrics
from trainer.metrics.system_stats import over_ranks
from trainer.metrics.throughput import StepPace
from trainer.status import StatusFile
from trainer.training import anomalies, out_of_memory
from trainer.training.evaluate import examine
from trainer.training.run import Run

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
"""Between two attempts at a save that has to be."""


def fit(run: Run, stop: StopRequest, status: StatusFile) -> EvalReport | None:
    """Train to `train.steps`, logging, evaluating and saving on the way.

    Returns:
        What the last evaluation found; None if the run was asked to stop first (it has saved by then).

    Raises:
        Stopped: if it was asked to before the first step.
        NumericsError: if `train.max_consecutive_skips` steps in a row were not finite, or ranks hold different copies.
        ResourceError: if the last checkpoint could not be saved.
    """
    config, train = run.config, run.config.train
    recorder = run.mesh.world.recorder
    pace = StepPace(recorder.step_timer)
    examination = None
    with out_of_memory.making_optimizer(config):  # which moments are part of what is compared
        anomalies.confirm_copies(run, run.start_step)
    stop.begin_steps()
    for step in range(run.start_step, train.steps):
        recorder.step, recorder.is_in_step = step + 1, step > run.start_step
        status.begin_step(step + 1, first_row=run.position, num_rows=train.global_batch_size)
        run.profiler.begin(step + 1)
        pace.begin()
        recorder.enter("data")
        if run.stream.waits_for_text(run.position, train.global_batch_size):
            status.enter("reading")
            with raise_together(run.mesh.world):
                run.stream.read_on(run.position, train.global_batch_size, ahead=is_first_on_node())
            if run.mesh.layout.rank == 0:
                run.list_skipped_rows()
        batches = run.stream.micro_batches(
            run.position,
            global_batch_size=train.global_batch_size,
            micro_batch_size=config.parallel.micro_batch_size,
            rank=run.mesh.layout.rank,
            world_size=run.mesh.layout.world_size,
        )
        lr, limit = run.schedule(step), run.spikes.limit()
        with out_of_memory.taking_steps(config):
            result = run.engine.train_step(batches, lr=lr, skip_above=limit if train.spikes.skip else None)
        run.position += train.global_batch_size
        run.tokens += result.num_tokens
        pace.end(result.num_tokens)

        done, is_last = step + 1, step + 1 == train.steps
        recorder.enter("checking the step")
        anomalies.record_step_health(run, done, result, limit=limit)
        recorder.enter("agreeing on a stop")
        is_logged = every(config.metrics.log_every, done) or is_last or done == run.start_step + 1
        is_saved = every(config.checkpoint.every, done) or is_last
        stopped_by, is_lost = _agree(run, stop, looks=is_logged or is_saved)
        if is_lost:
            _regain_folder(run)
        gap = None
        if every(config.metrics.routing_gap_every, done):
            recorder.enter("evaluation")
            with out_of_memory.evaluating(config):
                gap = _compare_routing(run)
        if is_logged or gap is not None:
            log_step(run, done, result, lr=lr, pace=pace, gap=gap)
        recorder.enter("ending the step")
        run.console.tick(done)
        anomalies.check_patience(run, done, result)
        recorder.is_in_step = False
        run.profiler.end(done)
        if every(config.parallel.check_copies_every, done):
            anomalies.confirm_copies(run, done)
        # Evaluated first: what a checkpoint is resumed from has its evaluation in metrics.jsonl already.
        with_held_out = every(config.eval.every, done) or is_last
        tasks = due_tasks(run.tasks, done, with_held_out=with_held_out, is_last=is_last)
        if with_held_out or tasks:
            recorder.enter("evaluation")
            status.enter("evaluating")
            with out_of_memory.evaluating(config):
                examination = examine(config, run.engine, run.corpus, tasks, run.mesh, with_held_out=with_held_out)
            report(run, done, examination)
        if is_saved or stopped_by or is_lost:
            recorder.enter("saving")
            status.enter("saving")
            with out_of_memory.saving(config):
                save(run, done, is_last=is_last, is_stopped=stopped_by is not None)
        else:
            announce(run, run.saver.finished())
        recorder.enter("between steps")
        if stopped_by and not is_last:
            stop.obey()
            run.console.message(f"stopped by {stopped_by} after step {done}: saved; start again to go on")
            return None
    return examination or examine(config, run.engine, run.corpus, run.tasks, run.mesh)


def every(interval: int | None, done: int) -> bool:
    """Tell whether something that happens every `interval` steps happens after `done` steps; None: never."""
    return interval is not None and done % interval == 0


def report(run: Run, done: int, examination: EvalReport) -> None:
    """Write an evaluation to metrics.jsonl and what was written in it to files, and show it."""
    recorder = run.mesh.world.recorder
    recorder.enter("writing the evaluation")
    record = {"step": done, **examination.record()}
    if examination.held_out is not None:
        record |= {f"data/{domain}/epochs": number for domain, number in run.stream.epochs(run.position).items()}
    run.trackers.log(record)
    if examination.held_out is not None:
        run.console.evaluation(record)
    for result in examination.tasks:
        run.console.task(done, result.name, result.metrics)
    recorder.enter("writing predictions")
    if run.mesh.layout.rank == 0:
        for result in examination.tasks:
            try:
                write_predictions(run.folder.predictions, result, step=done)
            except OSError as error:  # no reason to stop learning
                run.console.warning(f"{run.folder.predictions}: predictions are lost: {error.strerror or error}")


def save(run: Run, done: int, *, is_last: bool = False, is_stopped: bool = False) -> None:
    """Begin to save a checkpoint, or save it now; a disk that refuses only ends the run if there is no later chance."""
    anomalies.confirm_copies(run, done)  # a copy that has gone wrong must not be saved as the truth
    announce(run, run.saver.wait())  # one at a time
    if is_last or is_stopped:
        _save_now(run, done, prunes=is_last)  # who asked a run to stop does not wait for long
        return
    run.saver.start(done, run.engine.state(), run.checkpoint_info())
    if not run.config.checkpoint.asynchronous:
        announce(run, run.saver.wait())


def _save_now(run: Run, done: int, *, prunes: bool) -> None:
    """Save and wait for it; what is learned is in memory still, so try again for a while if the disk refuses.

    Raises:
        ResourceError: if it refuses to the end.
    """
    pause_s, end = _FIRST_PAUSE_S, time.monotonic() + run.config.checkpoint.retry_s
    while True:
        run.saver.start(done, run.engine.state(), run.checkpoint_info(), prunes=prunes)
        saved = run.saver.wait()
        assert saved is not None, "it was started"
        if saved.error is None:
            announce(run, saved)
            return
        # Rank 0's clock decides for all.
        if not run.mesh.world.all_gather_objects(time.monotonic() + pause_s < end)[0]:
            break
        run.console.warning(f"{saved.error}; trying again in {pause_s:.0f} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    with raise_together(run.mesh.world):
        if run.mesh.layout.rank == 0:
            raise type(saved.error)(f"{saved.error}; earlier checkpoints are intact: make room and start the run again")


def announce(run: Run, saved: Saved | None) -> None:
    """Say how a save went, once it is known."""
    if saved is None:
        return
    if saved.error is not None:
        run.console.warning(f"{saved.error}; earlier checkpoints are intact")
        return
    lost = f"{saved.stalled_s * 1e3:.0f} ms" if saved.stalled_s < 1 else f"{saved.stalled_s:.1f} s"
    note = f"{saved.size_bytes / 1e6:.0f} MB in {saved.behind_s:.1f} s, of which training waited {lost}"
    run.console.checkpoint(saved.path, saved.step, note=note)


def _compare_routing(run: Run) -> RoutingGap | None:
    """Compare the routers' choices for some held-out rows with the best ones; None where there are no scores."""
    config, moe = run.config, run.config.model.moe
    if moe is None:
        return None
    rows = held_out_rows(
        run.corpus,
        packing=config.data.packing,
        seq_len=config.model.seq_len,
        rows_of_a_domain=config.metrics.routing_gap_rows,
        batch_size=config.parallel.micro_batch_size,
    )
    return routing_gap(run.engine, rows, moe, seed=config.seed, world=run.mesh.world)


def _agree(run: Run, stop: StopRequest, *, looks: bool) -> tuple[str | None, bool]:
    """Return the signal that asked any rank to stop, and whether the run folder was lost: the same on all ranks.

    Args:
        run: the run.
        stop: what this rank was asked.
        looks: let rank 0, which holds the folder, see whether it still does.
    """
    is_lost = looks and not run.folder.is_held()
    if run.mesh.world.size == 1:
        return stop.requested_by, is_lost
    asked = torch.tensor([int(bool(stop)), int(is_lost)], device=run.mesh.world.device)
    num_asked, num_lost = run.mesh.world.all_reduce_(asked).tolist()
    return (stop.requested_by or "a signal to another rank") if num_asked else None, bool(num_lost)


def _regain_folder(run: Run) -> None:
    """Make the run folder anew: what it held is on no disk now but may be in memory, and so is saved next.

    Raises:
        ConfigError: if it is another run's by now.
    """
    with raise_together(run.mesh.world):
        if run.mesh.layout.rank == 0:
            run.console.warning(run.folder.regain())


def log_step(
    run: Run, done: int, result: StepResult, *, lr: float, pace: StepPace, gap: RoutingGap | None = None
) -> None:
    """Write a step to metrics.jsonl, its counts to routing.jsonl, and show it; every rank must call it."""
    recorder = run.mesh.world.recorder
    recorder.enter("logging")
    speed = pace.take()
    peak = run.config.metrics.peak_tflops
    flops_per_s = speed.tokens_per_s * run.size.training_flops_per_token
    routing, experts = result.routing, None
    moe = run.config.model.moe
    has_static_flops = moe is None or moe.has_static_flops
    record = {
        "step": done,
        "tokens": run.tokens,
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "z_loss": result.z_loss,
        **{f"{name}_loss": value for name, value in result.extra_losses.items()},
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_s": speed.tokens_per_s,
        "step_s": speed.step_s,
        "mfu": None
        if peak is None or not has_static_flops
        else flops_per_s / (peak * 1e12 * run.mesh.layout.world_size),
        "drop_rate": None,
        "load_imbalance": None,
        "dead_experts": None,
        "router_entropy": None,
        "experts_per_token": None,
        "skipped_steps": run.skipped_steps,
        "loss_spikes": run.spikes.count,
    }
    if routing is not None:
        record |= routing_metrics(routing.counts, routing.dropped, routing.tokens, routing.entropy_sum)
        experts = {"step": done, "counts": routing.counts.tolist(), "dropped": routing.dropped.tolist()}
        if gap is not None:
            record |= gap.record()
            experts |= gap.experts()
    record |= over_ranks(speed.parts, run.machine.read(), run.mesh.world)
    recorder.enter("writing metrics")
    run.trackers.log(record, experts)
    run.console.step(record)
