"""The command `what-if`: predict from a trace, without training. Imports no torch."""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import (
    Subparsers,
    add_choice,
    add_command,
    as_path,
    check_target,
    choice_of,
    names,
    whole,
)
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.config.nodes import shown, shown_path
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.terminal import print_safe

DISPATCHERS = ("all_to_all", "padded_all_to_all", "deduplicated_all_to_all", "all_gather")
PLACEMENTS = ("contiguous", "round_robin", "greedy", "balanced")


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "traces/smoke --capacity none,1 --ep-size 2,4"
    sub = add_command(subparsers, "what-if", what_if_command, example=example)
    sub.add_argument("trace", type=as_path, metavar="TRACE", help="folder that turnout trace has made")
    what = "capacity factors, none for dropless (that of the model)"
    sub.add_argument("--capacity", type=_capacities, metavar="C,D", help=what)
    what = "whom a capacity prefers (as the model does)"
    sub.add_argument("--policy", choices=("position", "choice_major", "probability", "random"), help=what)
    sub.add_argument("--top-k", type=_numbers, metavar="K,L", help="experts per token (those of the model)")
    sub.add_argument("--ep-size", type=_numbers, metavar="N,M", default=[], help="ranks that the experts are on")
    what = "contiguous, round_robin, greedy or balanced (from this trace), or a JSON file (contiguous)"
    sub.add_argument("--placement", type=names, metavar="A,B", default=["contiguous"], help=what)
    what = "copies of other ranks' experts on each rank, as parallel.replicas (0)"
    sub.add_argument("--replicas", type=_copies, metavar="N", default=0, help=what)
    what = "write the balanced placement over the one --ep-size, for parallel.placement"
    sub.add_argument("--write-placement", type=as_path, metavar="FILE", help=what)
    what = f"what sends: {', '.join(DISPATCHERS)} (all_to_all)"
    sub.add_argument("--dispatcher", type=names, metavar="A,B", default=["all_to_all"], help=what)
    what = "FLOP/s of a rank, for a modelled step time; with --bandwidth"
    sub.add_argument("--flops", type=_positive, metavar="X", help=what)
    sub.add_argument("--bandwidth", type=_positive, metavar="X", help="bytes per second that a rank sends")
    what = "the traced run: evaluate it, so that every MoE layer is exact, with --step and --weights as traced"
    sub.add_argument("--run", type=as_path, metavar="RUN", help=what)
    add_choice(sub)
    sub.add_argument("--json", action="store_true", help="print the predictions as one JSON object")


def _copies(text: str) -> int:
    return whole(text, least=0)


def _numbers(text: str) -> list[int]:
    return [whole(name) for name in names(text)]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e30:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {shown(text)}")
    return value


def _capacities(text: str) -> list[float | None]:
    return [None if name == "none" else _positive(name) for name in names(text)]


def what_if_command(options: argparse.Namespace) -> int:
    """Predict drops, load of ranks and bytes sent at another capacity, k or layout, from a trace (docs/traces.md)."""
    for name in options.dispatcher:
        if name not in DISPATCHERS:
            raise ConfigError(f"--dispatcher: {shown(name)} is not predicted; use {', '.join(DISPATCHERS)}")
    if (options.flops is None) != (options.bandwidth is None):
        raise ConfigError("--flops: a step's time is modelled from both --flops and --bandwidth; give both or neither")
    for name in options.placement:
        if name not in PLACEMENTS and not name.endswith(".json"):
            raise ConfigError(f"--placement: {shown(name)} is none of {', '.join(PLACEMENTS)}, nor a JSON file")
    if options.write_placement is not None:
        if len(options.ep_size) != 1:
            raise ConfigError("--write-placement: a placement is for one number of ranks; give one --ep-size")
        if options.write_placement.suffix != ".json":
            raise ConfigError(
                f"--write-placement: {shown_path(options.write_placement)}: use a name that ends in .json"
            )

        check_target("--write-placement", options.write_placement)

    trace, named = options.trace, _named_run(options)

    from trainer.what_if.evaluated_run import RunOfTrace
    from trainer.what_if.prediction_table import prediction_lines
    from trainer.what_if.scenarios import Scenarios, predict_all, write_best_placement

    run = None if named is None else RunOfTrace(config=named[0], folder=named[1], choice=named[2])
    wanted = Scenarios(
        capacities=options.capacity,
        top_ks=options.top_k,
        ep_sizes=options.ep_size,
        placements=options.placement,
        replicas=options.replicas,
        policy=options.policy,
        dispatchers=options.dispatcher,
        speeds=None if options.flops is None else (options.flops, options.bandwidth),
    )
    with suggest_prepare(named[0]) if named is not None else nullcontext():
        predictions = predict_all(options.trace, wanted, run)
    said = []
    if options.write_placement is not None:
        file, size = options.write_placement, options.ep_size[0]
        said.append(write_best_placement(options.trace, size, file, num_copies=options.replicas))
    if options.json:
        found = [{**asdict(one), "drop_rate": one.drop_rate} for one in predictions]
        print(json.dumps({"trace": str(trace), "predictions": found}))
        return 0
    for line in [*prediction_lines(predictions), *said]:
        print_safe(line, file=sys.stdout)
    return 0


def _named_run(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder, CheckpointChoice] | None:
    """Return config, folder and weights of the run of `--run`; None without it.

    The working directory may change to that of the run, and the paths among the options become absolute.
    """
    if options.run is None:
        if options.step is not None or options.weights != "raw":
            raise ConfigError("--step and --weights: choose weights of --run; name the traced run, or leave them out")
        return None
    files = [name if name in PLACEMENTS else str(Path(name).absolute()) for name in options.placement]
    named = argparse.Namespace(config=options.run, overrides=[], step=options.step, weights=options.weights)
    config, folder = existing_run(named, other_options=options)
    options.placement = files
    return config, folder, choice_of(named)
