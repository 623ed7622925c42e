"""The verb bench: what the parts that a config chooses between are worth."""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import Verbs, as_path, takes_overrides, verb
from trainer.commands.resolve import existing_run, telling_what_makes_it
from trainer.config.nodes import shown
from trainer.config.numbers import MAX_INT
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS, router_kinds, select_kinds
from trainer.lab.router_trainings import plan_trainings

_MOST = {"tokens": 1 << 20, "sequences": 1 << 20, "experts": 1 << 20, "rounds": 1 << 20, "seeds": 1000}
"""Largest values; of the other options that of a 64-bit number."""
_MOST_LOGITS = 1 << 30
"""Tokens times experts: 4 GiB."""
_OF_CHOICES = {"tokens": 256, "sequences": 4, "experts": 8, "top_k": 2, "seed": 0, "rounds": 5, "run": None}
_OF_TRAINING = {"budget": None, "seeds": 1, "out": Path("runs/bench_routers")}
"""Options that mean something in one of the two forms only, with their defaults."""


def add(verbs: Verbs) -> None:
    """Add its actions with their arguments."""
    bench = verbs.add_parser("bench", help="Compare what a config can choose between.")
    actions = bench.add_subparsers(required=True, metavar="ACTION")

    sub = verb(actions, "routers", routers, example="--train configs/smoke.yaml --budget 65536 --only top_k,hash")
    sub.add_argument("--only", metavar="A,B", help="only these routers")
    sub.add_argument("--json", type=as_path, metavar="FILE", help="write the result as JSON as well")
    sub.add_argument("--svg", type=as_path, metavar="FILE", help="draw it as well")

    same = sub.add_argument_group("on the same logits (without --train)")
    same.add_argument("--tokens", type=int, metavar="S", help="in a sequence (256)")
    same.add_argument("--sequences", type=int, metavar="B", help="how many (4)")
    same.add_argument("--experts", type=int, metavar="E", help="how many (8)")
    same.add_argument("--top-k", type=int, metavar="K", help="experts of a token (2, or the run's)")
    same.add_argument("--seed", type=int, help="of the logits and of all noise (0)")
    same.add_argument("--rounds", type=int, metavar="N", help="how often each router is timed (5)")
    same.add_argument("--run", type=as_path, help="run folder or experiment file: logits of its newest checkpoint too")

    trained = sub.add_argument_group("trained on the same text")
    trained.add_argument("--train", type=as_path, metavar="CONFIG", help="train this config with each router in turn")
    takes_overrides(sub, "train.global_batch_size=16")
    trained.add_argument("--budget", type=int, metavar="TOKENS", help="of each training (all steps of the config)")
    trained.add_argument("--seeds", type=int, metavar="N", help="trainings of each router (1)")
    trained.add_argument("--out", type=as_path, metavar="DIR", help="folder of the runs (runs/bench_routers)")


def routers(options: argparse.Namespace) -> int:
    """Compare all routers: what they choose when given the same logits, or (--train) what is learned with them."""
    return _compare_choices(options) if options.train is None else _compare_trainings(options)


def _settle(options: argparse.Namespace, *, mine: Mapping[str, Any], others: Mapping[str, Any], why: str) -> set[str]:
    """Give this form's options their defaults, refuse the other's and what makes no sense; return which were given.

    Raises:
        ConfigError: if there are any to refuse.
    """
    for name in others:
        if getattr(options, name) is not None:
            raise ConfigError(f"{_flag(name)}: {why}; remove it")
    given = {name for name in mine if getattr(options, name) is not None}
    for name, default in mine.items():
        value = getattr(options, name) if name in given else default
        setattr(options, name, value)
        least, most = (0 if name == "seed" else 1), _MOST.get(name, MAX_INT)
        if isinstance(value, int) and not least <= value <= most:
            allowed = f"{least} or more" if value < least else f"{most} at the most"
            raise ConfigError(f"{_flag(name)}: is {shown(value)}; use {allowed}")
    for name in ("json", "svg"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{_flag(name)}: {path} cannot be written: it needs the name of a file in a folder")
    if options.json is not None and options.svg is not None and options.json.resolve() == options.svg.resolve():
        raise ConfigError(f"--svg: {options.svg} is the file of --json; name another")
    return given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _compare_choices(options: argparse.Namespace) -> int:
    """Compare what routers choose."""
    given = _settle(options, mine=_OF_CHOICES, others=_OF_TRAINING, why="goes with --train")
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]}: changes a config, and there is none without --train; remove it")
    kinds = select_kinds(options.only, [kind for kind in router_kinds() if kind != MIXTURE_OF_DEPTHS])
    run = None if options.run is None else _measurable(options, given)
    num_logits = options.sequences * options.tokens * options.experts
    if num_logits > _MOST_LOGITS:
        raise ConfigError(
            f"--tokens: {options.sequences} sequences of {options.tokens} tokens have {num_logits} logits for "
            f"{options.experts} experts; use at most {_MOST_LOGITS}"
        )
    if options.top_k > options.experts:
        raise ConfigError(
            f"--top-k: {options.top_k} is more than {options.experts} experts; use 1 to {options.experts}"
        )

    from trainer.lab.bench_routers import ChoicesOptions, bench_choices

    with nullcontext() if run is None else telling_what_makes_it(run[0]):
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


def _measurable(options: argparse.Namespace, given: set[str]) -> tuple[ExperimentConfig, RunFolder]:
    """Return the run of `--run`, and take the number of tokens, of experts and, by default, k from it.

    Raises:
        ConfigError: if it has no routers with a choice, or its numbers were given as well.
    """
    config, folder = existing_run(argparse.Namespace(config=options.run, overrides=[]), beside=options)
    moe = config.model.moe
    if moe is None or moe.num_experts < 2:
        raise ConfigError(f"--run: {options.run} has no two experts to choose between; name another run")
    for name in sorted({"experts", "tokens"} & given):
        raise ConfigError(f"{_flag(name)}: is the run's own with --run; remove it")
    options.experts, options.tokens = moe.num_experts, config.model.seq_len
    if "top_k" not in given:
        options.top_k = min(moe.num_experts, getattr(moe.router, "top_k", 2))  # null experts allow more
    return config, folder


def _compare_trainings(options: argparse.Namespace) -> int:
    """Compare what is learned."""
    _settle(options, mine=_OF_TRAINING, others=_OF_CHOICES, why="does not go with --train")
    kinds = select_kinds(options.only, router_kinds())
    trainings = plan_trainings(
        options.train, options.overrides, kinds, budget=options.budget, seeds=options.seeds, out=options.out
    )

    from trainer.lab.bench_routers import bench_trainings

    return bench_trainings(trainings, json_path=options.json, svg_path=options.svg)
