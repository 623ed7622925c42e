"""The training loop."""

from dataclasses import replace

import torch

from trainer.data.batches.batch import Batch
from trainer.data.batches.row_parts import own_part
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.rank_layout import is_first_on_node
from trainer.distributed.signals import StopRequest
from trainer.engine.base import StepResult
from trainer.evaluation.eval_report import EvalReport, due_tasks
from trainer.evaluation.routing_gap import RoutingGap, held_out_rows, routing_gap
from trainer.metrics.throughput import ThroughputMeter
from trainer.status import StatusFile
from trainer.training import anomalies, memory
from trainer.training.evaluate_run import evaluate_run
from trainer.training.log_metrics import log_evaluation, log_step
from trainer.training.run import RunState
from trainer.training.save import report_save, save


def fit(run: RunState, stop: StopRequest, status: StatusFile) -> EvalReport | None:
    """Train to `train.steps`, or until it stops early; return the last evaluation, None after a stop by a signal.

    Raises:
        StopRequested: if it was asked to stop before the first step.
        NumericsError: if `train.max_consecutive_skips` steps in a row were not finite.
        DivergedError: if replicas differ.
        ResourceError: if the last checkpoint could not be saved.
    """
    config, recorder, keeps_best = run.config, run.mesh.world.recorder, run.best.config is not None
    pace = ThroughputMeter(recorder.step_timer)
    evaluation = None
    with memory.hint(
        config, "making the optimizer state, two numbers per weight"
    ):  # the moments are compared too, and so allocated here
        anomalies.check_replicas(run, run.start_step)
    stop.begin_steps()
    if config.train.stop_after is not None and run.start_step >= config.train.stop_after:
        after = f"train.stop_after is {config.train.stop_after}; set it to null to go on"
        run.console.message(f"already at step {run.start_step}: {after}")
        return None
    if run.early_stopping.is_over and run.start_step < config.train.steps:  # it does not go on by itself
        run.stopped_at = run.start_step
        run.console.message(f"already stopped early after step {run.start_step}: {run.early_stopping.reason}")
    for step in range(run.start_step, run.last_step):
        done, is_last = step + 1, step + 1 == config.train.steps
        recorder.step, recorder.is_in_step = done, step > run.start_step
        is_end = is_last or done == config.train.stop_after
        is_logged = every(config.metrics.log_every, done) or is_end or done == run.start_step + 1
        has_gap = every(config.metrics.routing_gap_every, done)
        result, lr = _take_step(run, step, pace, status, is_logged=is_logged or has_gap)
        recorder.enter("agreeing on a stop")
        is_saved = every(config.checkpoint.every, done) or is_end
        stopped_by, is_folder_lost = _agree(run, stop, checks_folder=is_logged or is_saved or keeps_best)
        stopped_by = stopped_by or ("train.stop_after" if is_end and not is_last else None)
        if is_folder_lost:  # its state is still in memory and is saved next; another run may have taken the folder
            with raise_together(run.mesh.world):
                if run.mesh.layout.rank == 0:
                    run.console.warning(run.folder.regain())
        gap = _routing_gap(run) if has_gap else None
        if is_logged or gap is not None:
            log_step(run, done, result, lr=lr, pace=pace, gap=gap)
        recorder.enter("ending the step")
        run.console.tick(done)
        anomalies.check_patience(run, done, result)
        recorder.is_in_step = False
        run.profiler.end(done)
        if every(config.parallel.check_copies_every, done):
            anomalies.check_replicas(run, done)
        # Before saving: a run that resumes from the checkpoint finds its evaluation in metrics.jsonl.
        evaluated = _evaluate_if_due(run, done, status)
        evaluation = evaluated or evaluation
        is_best = evaluated is not None and _note(run, done, evaluated)
        if run.early_stopping.is_over and not is_last:
            is_last = is_saved = True
            run.stopped_at = done
            evaluation = _evaluate_rest(run, done, evaluated) or evaluation
        if is_saved or is_best or stopped_by or is_folder_lost:
            if run.recorder is not None:  # a run that resumes here goes on after what is recorded
                recorder.enter("writing the routing record")
                run.recorder.flush()
            recorder.enter("saving")
            status.enter("saving")
            with memory.hint(config, "copying the state to save it"):
                save(run, done, is_last=is_last, is_stopped=stopped_by is not None)
        else:
            report_save(run, run.saver.finished())
        recorder.enter("between steps")
        if stopped_by and not is_last:
            stop.obey()
            how = "set it to null to go on" if stopped_by == "train.stop_after" else "start again to resume"
            run.console.message(f"stopped by {stopped_by} after step {done}: saved; {how}")
            return None
        if run.stopped_at is not None:
            run.console.message(f"stopped early after step {done}: {run.early_stopping.reason}")
            break
    if run.recorder is not None:
        recorder.enter("finishing the routing record")
        run.recorder.finish()
    return evaluation or evaluate_run(config, run.engine, run.corpus, run.tasks, run.mesh)


def every(interval: int | None, done: int) -> bool:
    """Return whether something that happens every `interval` steps is due after `done` steps; None: never."""
    return interval is not None and done % interval == 0


def _take_step(
    run: RunState, step: int, pace: ThroughputMeter, status: StatusFile, *, is_logged: bool
) -> tuple[StepResult, float]:
    """Read the rows of a step, take it and update the run's counters; return the result and the learning rate."""
    config, recorder, batch_size = run.config, run.mesh.world.recorder, run.config.train.global_batch_size
    status.begin_step(step + 1, first_row=run.position, num_rows=batch_size)
    run.profiler.begin(step + 1)
    pace.begin()
    recorder.enter("data")
    if run.stream.needs_new_block(run.position, batch_size):
        status.enter("reading")
        with raise_together(run.mesh.world):
            run.stream.load_blocks(run.position, batch_size, prefetch=is_first_on_node())
        if run.mesh.layout.rank == 0:
            run.write_skipped_rows()
    batches = run.ahead.take(run.position) or _micro_batches(run, run.position)
    next_row, is_last = run.position + batch_size, step + 1 == config.train.steps
    # A new block is read by all ranks together, at the beginning of its step.
    if run.ahead.is_on and not is_last and not run.stream.needs_new_block(next_row, batch_size):
        run.ahead.start(next_row, _micro_batches(run, next_row))
    lr, limit = run.schedule(step), run.spikes.limit()
    with memory.hint(config, "taking a step"):
        result = run.engine.train_step(
            batches,
            lr=lr,
            skip_above=limit if config.train.spikes.skip else None,
            return_experts=run.recorder is not None and run.recorder.is_due(step + 1),
            with_router_norms=is_logged,
        )
    if result.experts and run.recorder is not None:
        recorder.enter("recording experts")
        run.recorder.add(step + 1, batches, result.experts)
    run.position += batch_size
    run.tokens += result.num_tokens
    pace.end(result.num_tokens)
    recorder.enter("checking the step")
    anomalies.record_step_health(run, step + 1, result, limit=limit)
    return result, lr


def _micro_batches(run: RunState, first_row: int) -> list[Batch]:
    """Return this rank's micro-batches of the step that begins with a row."""
    batches = run.stream.micro_batches(
        first_row,
        global_batch_size=run.config.train.global_batch_size,
        micro_batch_size=run.config.parallel.micro_batch_size,
        rank=run.mesh.layout.data_rank,
        world_size=run.mesh.layout.data_size,
    )
    if run.replayed is not None:
        with raise_together(run.mesh.world):
            batches = [run.replayed.with_experts(batch) for batch in batches]
    return [own_part(batch, run.mesh.layout) for batch in batches]


def _evaluate_if_due(run: RunState, done: int, status: StatusFile) -> EvalReport | None:
    """Run and log the evaluations that are due after `done` steps; None: there are none."""
    is_last = done == run.config.train.steps
    with_held_out = every(run.config.eval.every, done) or is_last or done == run.config.train.stop_after
    tasks = due_tasks(run.tasks, done, with_held_out=with_held_out, is_last=is_last)
    if not with_held_out and not tasks:
        return None
    run.mesh.world.recorder.enter("evaluation")
    status.enter("evaluating")
    with memory.hint(run.config, "evaluating the model"):
        evaluation = evaluate_run(run.config, run.engine, run.corpus, tasks, run.mesh, with_held_out=with_held_out)
    log_evaluation(run, done, evaluation)
    return evaluation


def _note(run: RunState, done: int, evaluation: EvalReport) -> bool:
    """Take in an evaluation; return whether it is the best so far. Collective.

    Its numbers are those that rank 0 has, so that every rank decides alike.
    """
    if run.best.config is None and run.config.train.early_stopping is None:
        return False
    numbers = run.mesh.world.broadcast_object(evaluation.record())
    run.early_stopping.note(done, numbers)
    return run.best.note(done, numbers)


def _evaluate_rest(run: RunState, done: int, evaluated: EvalReport | None) -> EvalReport | None:
    """Run and log the tasks that a last step has more than an evaluation; return the two as one."""
    known = () if evaluated is None else evaluated.tasks
    rest = [task for task in run.tasks if task.name not in {result.name for result in known}]
    if evaluated is None or not rest:
        return evaluated
    with memory.hint(run.config, "evaluating the model"):
        more = evaluate_run(run.config, run.engine, run.corpus, rest, run.mesh, with_held_out=False)
    log_evaluation(run, done, more)
    return replace(evaluated, tasks=[*known, *more.tasks])


def _routing_gap(run: RunState) -> RoutingGap | None:
    """Compare the routing of some held-out rows with the optimum; None for routers without scores."""
    config, moe = run.config, run.config.model.moe
    run.mesh.world.recorder.enter("evaluation")
    if moe is None:
        return None
    rows = held_out_rows(
        run.corpus,
        packing=config.data.packing,
        seq_len=config.model.seq_len,
        rows_of_a_domain=config.metrics.routing_gap_rows,
        batch_size=config.parallel.micro_batch_size,
    )
    with memory.hint(config, "evaluating the model"):
        return routing_gap(run.engine, rows, moe, seed=config.seed, world=run.mesh.world)


def _agree(run: RunState, stop: StopRequest, *, checks_folder: bool) -> tuple[str | None, bool]:
    """Return the signal that asked any rank to stop, and whether the run folder was lost. Collective.

    With `checks_folder`, rank 0 checks that it still holds the folder's lock.
    """
    is_folder_lost = checks_folder and not run.folder.is_held()
    flags = torch.tensor([int(bool(stop)), int(is_folder_lost)])  # on the host, as the group is
    num_stopped, num_lost = run.mesh.host.all_reduce_(flags).tolist()
    return (stop.requested_by or "a signal to another rank") if num_stopped else None, bool(num_lost)
