"""The command `bench`, and `bench routers`: compare the routers that a config can choose."""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_folder import RunFolder
from trainer.commands import bench_costs
from trainer.commands.arguments import Subparsers, add_command, add_overrides, as_path, check_target, seed, whole
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS, router_kinds, select_kinds
from trainer.lab.router_trainings import plan_trainings

_MAX_LOGITS = 1 << 30
"""Tokens times experts: 4 GiB."""
_LOGITS_DEFAULTS = {"tokens": 256, "sequences": 4, "experts": 8, "top_k": 2, "seed": 0, "rounds": 5, "run": None}
_TRAINING_DEFAULTS = {"budget": None, "seeds": 1, "out": Path("runs/bench_routers")}
"""Options of one of the two modes only, with their defaults."""


def add(subparsers: Subparsers) -> None:
    """Add the subcommands with their arguments."""
    bench = subparsers.add_parser("bench", help="Compare routers, kernels, dispatchers and other libraries.")
    subcommands = bench.add_subparsers(required=True, metavar="COMMAND")
    bench_costs.add(subcommands)

    example = "--train configs/smoke.yaml --budget 65536 --only top_k,hash"
    sub = add_command(subcommands, "routers", bench_routers_command, example=example)
    sub.add_argument("--only", metavar="A,B", help="only these routers")
    sub.add_argument("--json", type=as_path, metavar="FILE", help="also write the result as JSON")
    sub.add_argument("--svg", type=as_path, metavar="FILE", help="also draw it")

    same = sub.add_argument_group("on the same logits (without --train)")
    same.add_argument("--tokens", type=whole, metavar="S", help="tokens per sequence (256)")
    same.add_argument("--sequences", type=whole, metavar="B", help="sequences (4)")
    same.add_argument("--experts", type=whole, metavar="E", help="experts (8)")
    same.add_argument("--top-k", type=whole, metavar="K", help="experts per token (2, or the run's)")
    same.add_argument("--seed", type=seed, help="seed of the logits and all noise (0)")
    same.add_argument("--rounds", type=whole, metavar="N", help="timings per router (5)")
    what = "run folder or experiment file: also use the logits of its newest checkpoint"
    same.add_argument("--run", type=as_path, help=what)

    trained = sub.add_argument_group("trained on the same text")
    trained.add_argument("--train", type=as_path, metavar="CONFIG", help="train this config with each router in turn")
    add_overrides(sub, "train.global_batch_size=16")
    trained.add_argument("--budget", type=whole, metavar="TOKENS", help="tokens per training (all steps of the config)")
    trained.add_argument("--seeds", type=whole, metavar="N", help="trainings per router (1)")
    trained.add_argument("--out", type=as_path, metavar="DIR", help="folder of the runs (runs/bench_routers)")


def bench_routers_command(options: argparse.Namespace) -> int:
    """Compare all routers: their choices for the same logits or, with --train, what is learned with them."""
    return _compare_choices(options) if options.train is None else _compare_trainings(options)


def _fill_defaults(
    options: argparse.Namespace, *, own: Mapping[str, Any], others: Mapping[str, Any], why: str
) -> set[str]:
    """Fill in the defaults of this mode's options; return the names of those given. Refuse the other mode's."""
    for name in others:
        if getattr(options, name) is not None:
            raise ConfigError(f"{_flag(name)}: {why}; remove it")
    given = {name for name in own if getattr(options, name) is not None}
    vars(options).update({name: default for name, default in own.items() if name not in given})
    for name in ("json", "svg"):
        check_target(_flag(name), getattr(options, name))
    if options.json is not None and options.svg is not None and options.json.resolve() == options.svg.resolve():
        raise ConfigError(f"--svg: {options.svg} is the file of --json; name another")
    return given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _compare_choices(options: argparse.Namespace) -> int:
    """Compare routers on the same logits."""
    given = _fill_defaults(options, own=_LOGITS_DEFAULTS, others=_TRAINING_DEFAULTS, why="goes with --train")
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]}: changes a config, and there is none without --train; remove it")
    kinds = select_kinds(options.only, [kind for kind in router_kinds() if kind != MIXTURE_OF_DEPTHS])
    run = None if options.run is None else _run_for_logits(options, given)
    num_logits = options.sequences * options.tokens * options.experts
    if num_logits > _MAX_LOGITS:
        raise ConfigError(
            f"--tokens: {options.sequences} sequences of {options.tokens} tokens have {num_logits} logits for "
            f"{options.experts} experts; use at most {_MAX_LOGITS}"
        )
    if options.top_k > options.experts:
        raise ConfigError(
            f"--top-k: {options.top_k} is more than {options.experts} experts; use 1 to {options.experts}"
        )

    from trainer.lab.bench_routers import ChoicesOptions, bench_choices

    with nullcontext() if run is None else suggest_prepare(run[0]):
        return bench_choices(
            kinds,
            ChoicesOptions(
                sequences=options.sequences,
                tokens=options.tokens,
                num_experts=options.experts,
                top_k=options.top_k,
                seed=options.seed,
                rounds=options.rounds,
            ),
            run=run,
            json_path=options.json,
            svg_path=options.svg,
        )


def _run_for_logits(options: argparse.Namespace, given: set[str]) -> tuple[ExperimentConfig, RunFolder]:
    """Return the run of `--run`; take the numbers of tokens and experts and, by default, k from it."""
    config, folder = existing_run(argparse.Namespace(config=options.run, overrides=[]), other_options=options)
    moe = config.model.moe
    if moe is None or moe.num_experts < 2:
        raise ConfigError(f"--run: {options.run} has fewer than 2 experts; name another run")
    for name in sorted({"experts", "tokens"} & given):
        raise ConfigError(f"{_flag(name)}: is taken from the run with --run; remove it")
    options.experts, options.tokens = moe.num_experts, config.model.seq_len
    if "top_k" not in given:
        options.top_k = min(moe.num_experts, getattr(moe.router, "top_k", 2))  # null experts allow more
    return config, folder


def _compare_trainings(options: argparse.Namespace) -> int:
    """Compare routers by training with each."""
    _fill_defaults(options, own=_TRAINING_DEFAULTS, others=_LOGITS_DEFAULTS, why="does not go with --train")
    kinds = select_kinds(options.only, router_kinds())
    trainings = plan_trainings(
        options.train, options.overrides, kinds, budget=options.budget, seeds=options.seeds, out=options.out
    )

    from trainer.lab.bench_routers import bench_trainings

    return bench_trainings(trainings, json_path=options.json, svg_path=options.svg)
