"""Log steps and evaluations: to metrics.jsonl, routing.jsonl and the other trackers, and to the console."""

from typing import Any

from torch import Tensor

from trainer.engine.base import RoutingSums, StepResult
from trainer.engine.moe_layers import MoELayers
from trainer.evaluation.eval_report import EvalReport, write_predictions
from trainer.evaluation.routing_gap import RoutingGap
from trainer.metrics.bias_watch import selection_bias
from trainer.metrics.routing_metrics import replay_metrics, router_metrics, routing_metrics
from trainer.metrics.system_stats import reduce_over_ranks
from trainer.metrics.throughput import ThroughputMeter
from trainer.training.run import RunState


def log_step(
    run: RunState, done: int, result: StepResult, *, lr: float, pace: ThroughputMeter, gap: RoutingGap | None = None
) -> None:
    """Log a step. Collective."""
    recorder = run.mesh.world.recorder
    recorder.enter("logging")
    speed = pace.take()
    routing, experts = result.routing, None
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
        "mfu": _mfu(run, speed.tokens_per_s),
        **dict.fromkeys(("drop_rate", "load_imbalance", "dead_experts", "router_entropy", "experts_per_token")),
        "skipped_steps": run.skipped_steps,
        "loss_spikes": run.spikes.count,
    }
    if getattr(run.config.parallel.dispatcher, "row_budget", None) is not None:
        record["repeated_steps"] = run.engine.repeated_steps
    if routing is not None:
        biases = _biases(run)
        routing, biases = routing.on_host(biases)
        record |= routing_metrics(routing.counts, routing.dropped, routing.tokens, routing.entropy_sum)
        experts = {"step": done, "counts": routing.counts.tolist(), "dropped": routing.dropped.tolist()}
        experts |= router_metrics(
            tokens=routing.tokens,
            entropy_sum=routing.entropy_sum,
            prob_sum=routing.prob_sum,
            router_squares=routing.router_squares,
        )
        experts |= run.bias_watch.look(done, biases)
        if (replayed := _replay_metrics(run, routing)) is not None:
            record |= replayed[0]
            experts |= replayed[1]
        if gap is not None:
            record |= gap.record()
            experts |= gap.experts()
    record |= reduce_over_ranks(speed.parts, run.machine.read(), run.mesh.host)
    recorder.enter("writing metrics")
    lines = [] if run.watch is None else run.watch.look(record, experts)
    if run.watch is not None:
        record["alarms"] = len(run.watch.alarms.active)
    run.trackers.log(record, experts)
    run.console.step(record)
    for line in lines:
        run.console.warning(line)


def _biases(run: RunState) -> Tensor | None:
    """Return the selection biases of all MoE layers (L, E); None without any. Collective."""
    model, pp = run.engine.model, run.mesh.pp
    biases = selection_bias(layer.router for layer in model.moe_layers())
    if biases is None or pp.size == 1:
        return biases
    return pp.all_reduce_(MoELayers.of(model.config, model.blocks.numbers).placed(biases))


def _replay_metrics(run: RunState, routing: RoutingSums) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Return how far the live routers disagree with given experts, over all layers and by layer; None: none given."""
    moe, somewhere = run.config.model.moe, routing.replaced_somewhere
    if somewhere is None or moe is None or moe.router.recorded_k is None:
        return None
    assert routing.replaced is not None and routing.replaced_tokens is not None and routing.missed_mass is not None
    return replay_metrics(
        replaced=routing.replaced,
        replaced_tokens=routing.replaced_tokens,
        replaced_somewhere=somewhere,
        missed_mass=routing.missed_mass,
        tokens=routing.tokens,
        top_k=moe.router.recorded_k,
    )


def _mfu(run: RunState, tokens_per_s: float) -> float | None:
    """Return the model FLOPs utilisation; None without `metrics.peak_tflops`, or if FLOPs per token vary."""
    peak, moe = run.config.metrics.peak_tflops, run.config.model.moe
    if peak is None or (moe is not None and not moe.has_static_flops):
        return None
    return tokens_per_s * run.size.training_flops_per_token / (peak * 1e12 * run.mesh.layout.world_size)


def log_evaluation(run: RunState, done: int, evaluation: EvalReport) -> None:
    """Log an evaluation and write the generated texts to files."""
    recorder = run.mesh.world.recorder
    recorder.enter("writing the evaluation")
    record = {"step": done, **evaluation.record()}
    if evaluation.held_out is not None:
        record |= {f"data/{domain}/epochs": number for domain, number in run.stream.epochs(run.position).items()}
    run.trackers.log(record)
    if evaluation.held_out is not None:
        run.console.evaluation(record)
    for result in evaluation.tasks:
        run.console.task(done, result.name, result.metrics)
    recorder.enter("writing predictions")
    if run.mesh.layout.rank == 0:
        for result in evaluation.tasks:
            try:
                write_predictions(run.folder.predictions, result, step=done)
            except OSError as error:  # no reason to stop training
                run.console.warning(f"{run.folder.predictions}: predictions are lost: {error.strerror or error}")
