"""The commands `bench layer`, `step`, `dispatch`, `memory` and `scaling`: time, memory and messages, beside peers."""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any, Final

from trainer.commands.arguments import (
    Subparsers,
    add_command,
    add_config,
    add_overrides,
    as_path,
    check_target,
    seed,
    whole,
)
from trainer.commands.resolve import existing_run, load_named_config
from trainer.commands.shipped import as_config, check_name
from trainer.config.loader import load
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.cost_options import (
    PEERS,
    CostOptions,
    LayerShape,
    Routing,
    TracedRun,
    dispatchers_named,
    dtypes_named,
    kernels_named,
    moe_of,
    peers_named,
    shape_of_config,
    shapes_of,
)

_SHAPE: Final[dict[str, Any]] = {"experts": [8], "top_k": 2, "d_model": 256, "d_ff": 512, "tokens": 4096}
"""Shape of a layer without a config."""
_MOST_RANKS: Final = 64


def add(subcommands: Subparsers) -> None:
    """Add the subcommands with their arguments."""
    sub = add_command(subcommands, "layer", bench_layer_command, example="--experts 8,64 --dtype bfloat16")
    _add_shape(sub)
    _add_kernels(sub)
    sub.add_argument("--compile", action="store_true", help="compile what is between the matrix products")
    _add_common(sub, routing="balanced,skewed", rounds=8)

    sub = add_config(add_command(subcommands, "step", bench_step_command, example="bench --dtype bfloat16,float32"))
    sub.add_argument("--experts", type=_wholes, metavar="E,F", help="numbers of experts to compare (the config's)")
    sub.add_argument("--dtype", metavar="A,B", help="dtypes to compare (the config's)")
    sub.add_argument("--threads", type=whole, metavar="N", help="threads of each process (the cores)")
    _add_common(sub, routing="own", rounds=8)

    sub = add_command(subcommands, "dispatch", bench_dispatch_command, example="--ranks 2,4,8 --experts 64 --top-k 8")
    _add_shape(sub)
    sub.add_argument("--ranks", type=_wholes, default=[2, 4], metavar="N,M", help="numbers of ranks (2,4)")
    sub.add_argument("--dispatcher", default="all", metavar="A,B", help="dispatchers (all)")
    sub.add_argument("--kernel", default="auto", metavar="NAME", help="kernel of the experts (auto)")
    _add_common(sub, routing="balanced,skewed", rounds=8, with_peers=False, with_device=False)

    sub = add_command(subcommands, "memory", bench_memory_command, example="--experts 16 --top-k 4 --tokens 512")
    _add_shape(sub)
    _add_kernels(sub)
    sub.add_argument("--ranks", type=whole, default=2, metavar="N", help="ranks of the dispatchers (2)")
    sub.add_argument("--dispatcher", default="all", metavar="A,B", help="dispatchers, or none (all)")
    _add_common(sub, routing="balanced", rounds=None)

    sub = add_config(add_command(subcommands, "scaling", bench_scaling_command, example="quickstart --rounds 8"))
    sub.add_argument("--ranks", type=whole, default=2, metavar="N", help="ranks of one thread each (2)")
    sub.add_argument("--peers", choices=["deepspeed", "none"], default="deepspeed", help="DeepSpeed's layer and engine")
    _add_common(sub, routing=None, rounds=8, with_peers=False, with_device=False)


def _add_shape(sub: argparse.ArgumentParser) -> None:
    what = "take the shape from this experiment file, or a name such as quickstart"
    sub.add_argument("config", type=as_config, nargs="?", metavar="CONFIG", help=what)
    add_overrides(sub, "model.d_model=512")
    shape = sub.add_argument_group("shape (without CONFIG)")
    shape.add_argument("--experts", type=_wholes, metavar="E,F", help="numbers of experts to compare (8)")
    shape.add_argument("--top-k", type=whole, metavar="K", help="experts per token (2)")
    shape.add_argument("--d-model", type=whole, metavar="D", help="width (256)")
    shape.add_argument("--d-ff", type=whole, metavar="F", help="hidden width of one expert (512)")
    shape.add_argument("--tokens", type=whole, metavar="T", help="tokens of each rank (4096)")
    sub.add_argument("--dtype", metavar="A,B", help="dtypes to compare (float32, or the config's)")


def _add_kernels(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--kernel", default="all", metavar="A,B", help="kernels of the experts, or auto (all)")


def _add_common(
    sub: argparse.ArgumentParser,
    *,
    routing: str | None,
    rounds: int | None,
    with_peers: bool = True,
    with_device: bool = True,
) -> None:
    """Add the options that several of these commands have; None and False leave one out."""
    if routing is not None:
        what = f"balanced, skewed (half of all tokens on one expert), traced:RUN ({routing})"
        sub.add_argument("--routing", default=routing, metavar="A,B", help=what)
    if rounds is not None:
        sub.add_argument("--rounds", type=whole, default=rounds, metavar="N", help=f"counted rounds ({rounds})")
    if with_peers:
        what = f"implementations of Hugging Face: {', '.join(PEERS)}, all or none (all)"
        sub.add_argument("--peers", default="all", metavar="A,B", help=what)
    if with_device:
        sub.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="device (auto)")
    sub.add_argument("--seed", type=seed, default=0, help="seed of inputs and routing (0)")
    sub.add_argument("--json", type=as_path, metavar="FILE", help="also write the result as JSON")


def bench_layer_command(options: argparse.Namespace) -> int:
    """Time one MoE layer by every kernel and routing, beside a dense twin, its products alone and other libraries."""
    shapes, common = _shapes(options), _common(options, own=False)
    kernels = kernels_named(options.kernel)

    from trainer.lab.costs.bench_layer import bench_layer

    return bench_layer(shapes, common, kernels=kernels, is_compiled=options.compile)


def bench_step_command(options: argparse.Namespace) -> int:
    """Time whole training steps of a config in one process, beside its dense twin and Hugging Face's Mixtral."""
    configs = _configs(options)
    common = _common(options, own=True)

    from trainer.lab.costs.bench_step import bench_step

    return bench_step(configs, common, threads=options.threads)


def bench_dispatch_command(options: argparse.Namespace) -> int:
    """Time a MoE layer over several local ranks by every dispatcher, and count the bytes and messages it sends."""
    shapes, common = _shapes(options), _common(options, own=False)
    for ranks in options.ranks:
        _check_ranks(ranks, shapes)
    (kernel, *more) = kernels_named(options.kernel)
    if more:
        raise ConfigError(f"--kernel: {shown(options.kernel)} are several; name one")
    dispatchers = dispatchers_named(options.dispatcher)

    from trainer.lab.costs.bench_ranks import bench_dispatch

    return bench_dispatch(shapes, common, ranks=options.ranks, dispatchers=dispatchers, kernel=kernel)


def bench_memory_command(options: argparse.Namespace) -> int:
    """Weigh one MoE layer by every kernel and dispatcher: bytes kept for the backward pass, and the peak."""
    shapes, common = _shapes(options), _common(options, own=False)
    dispatchers = () if options.dispatcher == "none" else dispatchers_named(options.dispatcher)
    if dispatchers:
        _check_ranks(options.ranks, shapes)
    kernels = kernels_named(options.kernel)

    from trainer.lab.costs.bench_ranks import bench_memory

    return bench_memory(shapes, common, kernels=kernels, num_ranks=options.ranks, dispatchers=dispatchers)


def bench_scaling_command(options: argparse.Namespace) -> int:
    """Time training steps on several local ranks of one thread against one process of as many, beside DeepSpeed."""
    config = load_named_config(options)
    if not 2 <= options.ranks <= min(_MOST_RANKS, moe_of(config).num_experts):
        most = min(_MOST_RANKS, moe_of(config).num_experts)
        raise ConfigError(f"--ranks: {options.ranks} ranks cannot share the experts; use 2 to {most}")
    if rest := config.train.global_batch_size % options.ranks:
        size = config.train.global_batch_size
        raise ConfigError(f"--ranks: {options.ranks} ranks leave {rest} of {size} rows over; use a divisor of {size}")
    common = _common(options, own=True, takes_peers=False)

    from trainer.lab.costs.bench_scaling import bench_scaling

    return bench_scaling(config, common, num_ranks=options.ranks, with_peers=options.peers == "deepspeed")


def _configs(options: argparse.Namespace) -> list[ExperimentConfig]:
    """Return the config with each number of experts and dtype."""
    dtypes = [f"train.dtype={dtype}" for dtype in dtypes_named(options.dtype)] if options.dtype else []
    experts = [f"model.moe.num_experts={count}" for count in options.experts or ()]
    changes = [[change for change in pair if change] for pair in itertools.product(experts or [""], dtypes or [""])]
    check_name(options.config)
    configs = [load(options.config, [*options.overrides, *change], ExperimentConfig) for change in changes]
    for config in configs:
        moe_of(config)
        dtypes_named(config.train.dtype)
    return configs


def _shapes(options: argparse.Namespace) -> list[LayerShape]:
    """Return the shapes of the options, or of the config."""
    dtypes = dtypes_named(options.dtype) if options.dtype else ()
    if options.config is None or "=" in str(options.config):
        override = [*([str(options.config)] if options.config else []), *options.overrides]
        if override:
            raise ConfigError(f"{override[0]}: changes a config, and there is none; name one first")
        given = {name: value for name in _SHAPE if (value := getattr(options, name)) is not None}
        return shapes_of(**{**_SHAPE, **given}, dtypes=dtypes or ("float32",))
    for name in _SHAPE:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is taken from the config; remove it")
    return shape_of_config(load_named_config(options), dtypes)


def _common(options: argparse.Namespace, *, own: bool, takes_peers: bool = True) -> CostOptions:
    """Check the options that all commands share."""
    among = ["balanced", "skewed", "traced"]
    words = getattr(options, "routing", "own").split(",")
    routings = tuple(Routing.parse(word.strip(), among=["own", *among] if own else among) for word in words)
    check_target("--json", options.json)
    return CostOptions(
        rounds=getattr(options, "rounds", 0),
        device=getattr(options, "device", "cpu"),
        seed=options.seed,
        peers=peers_named(options.peers) if takes_peers and hasattr(options, "peers") else (),
        routings=routings,
        traced=tuple(_traced(routing, options) for routing in routings if routing.run is not None),
        json_path=options.json,
    )


def _traced(routing: Routing, options: argparse.Namespace) -> TracedRun:
    config, folder = existing_run(argparse.Namespace(config=routing.run, overrides=[]), other_options=options)
    moe_of(config)
    return TracedRun(routing, config, folder)


def _check_ranks(ranks: int, shapes: Sequence[LayerShape]) -> None:
    most = min(_MOST_RANKS, *(shape.num_experts for shape in shapes))
    if not 2 <= ranks <= most:
        raise ConfigError(f"--ranks: {ranks} ranks cannot share the experts; use 2 to {most}")


def _wholes(text: str) -> list[int]:
    return [whole(word.strip()) for word in text.split(",")]
