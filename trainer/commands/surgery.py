"""The command `surgery`, with its subcommands: change the experts of a trained run, or average checkpoints."""

import argparse
from pathlib import Path
from typing import Any

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import (
    Subparsers,
    add_command,
    add_overrides,
    add_step,
    as_path,
    fraction,
    names,
    whole,
)
from trainer.commands.resolve import existing_run, load_config_of, run_to_read, suggest_prepare
from trainer.commands.shipped import as_config
from trainer.config.nodes import shown
from trainer.convert.surgery_plan import (
    AddExperts,
    AverageRuns,
    MergeAdapters,
    MergeExperts,
    Named,
    PruneExperts,
    SplitExperts,
    Surgery,
    ToDense,
)
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.terminal import print_safe

_ALLOW_CHANGE = "write the run although it computes something else than before"
_EXPERTS = "experts by number, of all layers (3,5) or by layer (0:3,5/1:2,7)"


def add(subparsers: Subparsers) -> None:
    """Add the subcommands with their arguments."""
    surgery = subparsers.add_parser("surgery", help="Change a trained run's experts, or average checkpoints.")
    subcommands = surgery.add_subparsers(required=True, metavar="COMMAND")

    sub = _add_verb(subcommands, "prune", prune_experts_command, "pruned --keep 6")
    sub.add_argument("--keep", type=whole, metavar="N", help="experts to keep: those that the text uses most")
    sub.add_argument("--experts", type=_named, metavar="LIST", help=f"experts to remove instead: {_EXPERTS}")

    sub = _add_verb(subcommands, "merge", merge_experts_command, "merged --keep 6")
    sub.add_argument("--keep", type=whole, metavar="N", required=True, help="experts to be left")
    what = "leave the mean as it is, instead of fitting its last matrix to the outputs of its group"
    sub.add_argument("--no-refit", action="store_true", help=what)

    sub = _add_verb(subcommands, "split", split_experts_command, "finer --halves")
    sub.add_argument("--halves", action="store_true", help="halves of the hidden units instead of copies")
    sub.add_argument("--experts", type=_named, metavar="LIST", help=f"copy only these: {_EXPERTS}")
    sub.add_argument("--allow-change", action="store_true", help=_ALLOW_CHANGE)

    sub = _add_verb(subcommands, "add", add_experts_command, "larger --count 2 --noise 0.2")
    sub.add_argument("--count", type=whole, metavar="N", help="copy the N experts that the text uses most")
    sub.add_argument("--experts", type=_named, metavar="LIST", help=f"experts to copy instead: {_EXPERTS}")
    what = "Gaussian noise on each copy, in standard deviations of each matrix (0.1)"
    sub.add_argument("--noise", type=fraction, default=0.1, metavar="X", help=what)

    sub = _add_verb(subcommands, "to-dense", to_dense_command, "flat --d-ff 192")
    sub.add_argument("--d-ff", type=whole, metavar="F", help="width (that of the experts that a token visits)")
    what = "numbers that experts are multiplied by (least_squares)"
    sub.add_argument("--fit", choices=["least_squares", "mean_weight"], default="least_squares", help=what)

    sub = _add_verb(subcommands, "average", average_runs_command, "soup --steps 100,200", has_text=False)
    sub.add_argument("--steps", type=_steps, metavar="A,B", help="steps of RUN (the newest)")
    sub.add_argument("--last", type=whole, metavar="N", help="the last N checkpoints of RUN")
    what = "further runs of the same model, each with its newest checkpoint"
    sub.add_argument("--runs", type=_paths, default=[], metavar="RUN,RUN", help=what)
    sub.add_argument("--weights", type=_weights, metavar="X,Y", help="weight of each checkpoint (equal)")
    what = "exponential moving average with this decay over the checkpoints, the newest last"
    sub.add_argument("--ema", type=fraction, metavar="D", help=what)

    sub = _add_verb(subcommands, "merge-lora", merge_lora_command, "merged", has_text=False)
    add_step(sub)
    sub.add_argument("--allow-change", action="store_true", help=_ALLOW_CHANGE)


def prune_experts_command(options: argparse.Namespace) -> int:
    """Start a run from another one without the experts that its text uses least, or without named ones."""
    _check_one_of(options, "keep", "experts")
    return _operate(options, PruneExperts(keep=options.keep, named=options.experts or {}))


def merge_experts_command(options: argparse.Namespace) -> int:
    """Start a run from another one with experts averaged whose outputs on its text are alike."""
    return _operate(options, MergeExperts(keep=options.keep, refit=not options.no_refit))


def split_experts_command(options: argparse.Namespace) -> int:
    """Start a run from another one with every expert as two that are chosen together: it computes the same."""
    surgery = SplitExperts(halves=options.halves, named=options.experts or {})
    return _operate(options, surgery, allow_change=options.allow_change)


def add_experts_command(options: argparse.Namespace) -> int:
    """Start a run from another one with more experts: noisy copies of those that its text uses most."""
    _check_one_of(options, "count", "experts")
    return _operate(options, AddExperts(count=options.count, noise=options.noise, named=options.experts or {}))


def to_dense_command(options: argparse.Namespace) -> int:
    """Start a dense run from a mixture of experts: its shared and most weighted experts side by side."""
    return _operate(options, ToDense(d_ff=options.d_ff, fit=options.fit))


def average_runs_command(options: argparse.Namespace) -> int:
    """Start a run from the average of several checkpoints of one model, of one run or of several."""
    _check_at_most_one(options, "steps", "last")
    _check_at_most_one(options, "weights", "ema")
    others = [run_to_read(path)[1] for path in options.runs]
    config, folder = existing_run(options)
    steps: list[int | None] = list(options.steps or [None])
    if options.last is not None:
        found = CheckpointFolder(folder.checkpoints).steps()
        if len(found) < options.last:
            raise ConfigError(f"--last: {options.last} of the {len(found)} checkpoints of {folder.path}; use fewer")
        steps = list(found[-options.last :])
    runs = [*((folder, step) for step in steps), *((other, None) for other in others)]
    if len(runs) < 2:
        raise ConfigError("surgery average: one checkpoint is its own average; add --steps, --last or --runs")
    surgery = AverageRuns(weights=options.weights or (), ema=options.ema)
    surgery.shares(len(runs))
    return _write(options, config, runs, surgery)


def merge_lora_command(options: argparse.Namespace) -> int:
    """Start a run from another one with its adapters merged into the weights: it computes the same."""
    return _operate(options, MergeAdapters(), allow_change=options.allow_change)


def _operate(options: argparse.Namespace, surgery: Surgery, *, allow_change: bool = False) -> int:
    config, folder = existing_run(options)
    return _write(options, config, [(folder, options.step)], surgery, allow_change=allow_change)


def _write(
    options: argparse.Namespace,
    old: ExperimentConfig,
    runs: list[tuple[RunFolder, int | None]],
    surgery: Surgery,
    *,
    allow_change: bool = False,
) -> int:
    changed = [*options.overrides, f"name={options.name}", *surgery.overrides(old.model)]
    if options.config.is_dir() and ":" not in old.parallel.experts_kernel:  # recorded for another shape
        changed.insert(0, "parallel.experts_kernel=auto")
    config = load_config_of(options.config, changed)

    from trainer.convert.surgery_run import operate

    tokens = getattr(options, "tokens", 0)
    with suggest_prepare(config):
        made = operate(runs, old, config, surgery, num_tokens=tokens, allow_change=allow_change)
    for note in made.notes:
        print_safe(note)
    print_safe(f"loss on held-out text: {made.loss_before:.4f} before, {made.loss_after:.4f} after")
    print_safe(f"saved {made.path}: train {made.path.parents[1]} to continue")
    return 0


def _add_verb(
    subcommands: Subparsers, verb: str, command: Any, example: str, *, has_text: bool = True
) -> argparse.ArgumentParser:
    sub = add_command(subcommands, verb, command, example=f"runs/smoke {example}")
    sub.add_argument("config", type=as_config, metavar="RUN", help="run folder, or experiment file of a run")
    sub.add_argument("name", metavar="NAME", help="name of the new run, in the same runs_dir")
    add_overrides(sub, "train.steps=100")
    if has_text:
        add_step(sub)
        what = "tokens of training text on which experts are compared (4096)"
        sub.add_argument("--tokens", type=whole, default=4096, metavar="N", help=what)
    return sub


def _check_one_of(options: argparse.Namespace, first: str, second: str) -> None:
    if (getattr(options, first) is None) == (getattr(options, second) is None):
        raise ConfigError(f"surgery: give either --{first} or --{second}")


def _check_at_most_one(options: argparse.Namespace, first: str, second: str) -> None:
    if getattr(options, first) is not None and getattr(options, second) is not None:
        raise ConfigError(f"surgery average: give --{first} or --{second}, not both")


def _paths(text: str) -> list[Path]:
    return [as_path(part).absolute() for part in names(text)]


def _steps(text: str) -> list[int]:
    return [whole(part, least=0) for part in names(text)]


def _weights(text: str) -> list[float]:
    try:
        found = [float(part) for part in names(text)]
    except ValueError:
        found = [-1.0]
    if not (all(0 <= weight < float("inf") for weight in found) and sum(found) > 0):
        raise argparse.ArgumentTypeError(f"must be numbers of at least 0 and not all 0, got {shown(text)}")
    return found


def _named(text: str) -> Named:
    """Parse `3,5`, or `0:3,5/1:2,7` by layer."""
    found: dict[int | None, list[int]] = {}
    for part in text.split("/"):
        layer, colon, experts = part.rpartition(":")
        if not colon and "/" in text:
            raise argparse.ArgumentTypeError(f"must name a layer before each list, as 0:3,5/1:2,7, got {shown(text)}")
        found[whole(layer, least=0) if colon else None] = [whole(e, least=0) for e in names(experts)]
    return found
