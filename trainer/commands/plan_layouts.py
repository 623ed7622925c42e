"""The command `plan`: layouts that fit on GPUs that need not be here, the fastest first. Imports no torch."""

import argparse
from typing import Final

from trainer.commands.arguments import Subparsers, add_command, add_config, as_path, check_target, names, ranks, whole
from trainer.commands.resolve import load_config_of
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.plan.gpus import Gpu, gpu_named
from trainer.plan.layouts import ENGINES, RECOMPUTES, Choices, Cluster
from trainer.plan.links import read_links

_DEFAULT_IMBALANCE: Final = 1.25
_MOST_RANKS: Final = 16384
"""Beyond, lists of all ranks take longer than the fake steps."""


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "configs/planning/qwen3_30b_a3b.yaml --world-size 64 --gpu H100"
    sub = add_config(add_command(subparsers, "plan", plan_command, example=example))
    sub.add_argument("--world-size", type=ranks, required=True, metavar="N", help="ranks, one for each GPU")
    sub.add_argument("--gpu", required=True, metavar="NAME", help="device, such as H100 or cpu")
    sub.add_argument("--nodes", type=ranks, metavar="M", help="machines that the ranks are on (full ones)")
    sub.add_argument("--memory", type=_positive, metavar="GB", help="memory of a rank (the device's)")
    what = f"rows of the busiest rank's experts, times the mean ({_DEFAULT_IMBALANCE})"
    sub.add_argument("--imbalance", type=_at_least_one, metavar="X", help=what)
    sub.add_argument("--trace", type=as_path, metavar="TRACE", help="load of the experts in a trace, instead")
    sub.add_argument("--links", type=as_path, metavar="FILE", help="speeds that doctor --cluster has measured")
    sub.add_argument("--ep-size", type=_numbers, metavar="A,B", help="expert-parallel sizes to try (all)")
    sub.add_argument("--cp-size", type=_numbers, metavar="A,B", help="ranks that share rows, to try (as rows allow)")
    sub.add_argument("--pp-size", type=_numbers, metavar="A,B", help="pipeline stages to try (1 to 16)")
    sub.add_argument("--micro-batch", type=_numbers, metavar="A,B", help="micro-batch sizes to try (powers of two)")
    sub.add_argument("--recompute", type=names, default=RECOMPUTES, metavar="A,B", help="what to compute again (all)")
    sub.add_argument("--engine", type=names, default=ENGINES, metavar="A,B", help="native, deepspeed (both)")
    sub.add_argument("--top", type=whole, default=6, metavar="N", help="layouts to find (6)")
    what = "after so many seconds, measure no further layout if one fits (17)"
    sub.add_argument("--seconds", type=_positive, default=17.0, metavar="S", help=what)
    sub.add_argument("--write", type=as_path, metavar="FILE", help="write the config with the fastest layout")
    sub.add_argument("--json", action="store_true", help="print what was found as one JSON object")


def plan_command(options: argparse.Namespace) -> int:
    """Find layouts of a config that fit on a cluster, by steps of the real code on fake tensors (docs/planning.md)."""
    _check_names(options.recompute, RECOMPUTES, "--recompute")
    _check_names(options.engine, ENGINES, "--engine")
    if options.imbalance is not None and options.trace is not None:
        raise ConfigError("--imbalance: the trace has its own load; give one of --imbalance and --trace")
    if options.write is not None and options.write.exists():
        raise ConfigError(f"--write: {options.write} exists; name a new file")
    check_target("--write", options.write)
    gpu = gpu_named(options.gpu)
    links = None if options.links is None else read_links(options.links)
    gpu = gpu if links is None else links.of(gpu)
    cluster = _cluster(options, gpu)
    if links is not None and links.ranks == 1 < cluster.world_size:
        raise ConfigError(f"--links: {options.links} was measured on one rank, without links; measure two or more")
    config = load_config_of(options.config, options.overrides)
    choices = Choices(
        ep_sizes=options.ep_size,
        micro_batch_sizes=options.micro_batch,
        recomputes=options.recompute,
        engines=options.engine,
        cp_sizes=options.cp_size,
        pp_sizes=options.pp_size,
    )

    from trainer.plan.plan_config import PlanRequest, plan_config

    request = PlanRequest(
        config=config,
        cluster=cluster,
        choices=choices,
        links=links,
        imbalance=options.imbalance or _DEFAULT_IMBALANCE,
        trace=options.trace,
        wanted=options.top,
        seconds=options.seconds,
    )
    return plan_config(request, write=options.write, as_json=options.json)


def _cluster(options: argparse.Namespace, gpu: Gpu) -> Cluster:
    """Return the ranks and their machines; a ConfigError if they do not fill these."""
    world = options.world_size
    if world > _MOST_RANKS:
        raise ConfigError(
            f"--world-size: {world}, and a plan is made for at most {_MOST_RANKS} ranks; plan a part of them with as "
            "large a part of train.global_batch_size: layouts repeat"
        )
    if options.nodes is None:
        per_node = min(world, gpu.per_node)
        if world % per_node:
            fitting = f"{world // per_node * per_node} or {-(-world // per_node) * per_node}"
            raise ConfigError(
                f"--world-size: {world} ranks do not fill machines of {per_node}; use {fitting}, or say by --nodes on "
                "how many they are"
            )
    else:
        if world % options.nodes:
            allowed = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise ConfigError(f"--nodes: {options.nodes} does not divide --world-size {world}; use one of {allowed}")
        per_node = world // options.nodes
    usable = gpu.usable if options.memory is None else int(options.memory * 1e9)
    return Cluster(world, per_node, gpu, usable)


def _check_names(given: list[str], allowed: tuple[str, ...], option: str) -> None:
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{option}: {shown(name)} is not known; use {', '.join(allowed)}")


def _numbers(text: str) -> list[int]:
    return [whole(name) for name in names(text)]


def _positive(text: str) -> float:
    return _number(text, "above 0", above=0)


def _at_least_one(text: str) -> float:
    return _number(text, "of at least 1", above=1 - 1e-12)


def _number(text: str, allowed: str, *, above: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = above
    if not above < value < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number {allowed} and below 1e9, got {shown(text)}")
    return value
