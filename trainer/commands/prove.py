"""The command `prove`: compare all layouts of a config."""

import argparse

from trainer.commands.arguments import Subparsers, add_command, add_config, as_path, check_target, names, whole
from trainer.commands.resolve import load_named_config, suggest_prepare
from trainer.config.check_packages import check_packages
from trainer.config.nodes import shown
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.errors import ConfigError
from trainer.prove.cases import ENGINES, MAX_RANKS, MOST_RANKS

_MAX_TIMEOUT_S = 1e8


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_config(add_command(subparsers, "prove", prove_command, example="configs/quickstart.yaml --scale small"))
    sub.add_argument("--steps", type=whole, default=10, help="optimizer steps per layout (10)")
    what = "precision (float64; float32 with deepspeed, which has no float64)"
    sub.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], help=what)
    what = "native, deepspeed (ZeRO 1 and 2) or both; default: the config's"
    sub.add_argument("--engines", type=_engines, metavar="A,B", help=what)
    sub.add_argument("--scale", choices=["full", "small"], default="full", help="small: shrink model and batch first")
    what = f"layouts of at most N local ranks, {MOST_RANKS} at most ({MAX_RANKS})"
    sub.add_argument("--ranks", type=_ranks, default=MAX_RANKS, metavar="N", help=what)
    sub.add_argument("--layouts", metavar="TEXT", help="only layouts whose name contains this text, such as 'ep 2'")
    sub.add_argument("--json", type=as_path, metavar="FILE", help="also write the result as JSON")
    what = "seconds after which a rank stops waiting for another (120)"
    sub.add_argument("--timeout", type=float, default=120.0, help=what)


def prove_command(options: argparse.Namespace) -> int:
    """Check that every layout with up to four ranks, or eight, learns the same as one process from a config."""
    config = load_named_config(options)
    if not 0 < options.timeout <= _MAX_TIMEOUT_S:
        raise ConfigError(f"prove: use 0 < --timeout <= {_MAX_TIMEOUT_S:.0e}, not {options.timeout:g}")
    check_target("--json", options.json)

    if "deepspeed" in (options.engines or [config.engine.kind]):
        check_packages(DeepSpeedEngineConfig(), at="engine")

    from trainer.prove.proof import prove

    with suggest_prepare(config):
        return prove(
            config,
            steps=options.steps,
            dtype=options.dtype,
            is_small=options.scale == "small",
            only=options.layouts,
            engines=options.engines,
            most_ranks=options.ranks,
            json_path=options.json,
            timeout_s=options.timeout,
        )


def _ranks(text: str) -> int:
    number = whole(text)
    if number > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{number} ranks are too many for a proof; use 1 to {MOST_RANKS}")
    return number


def _engines(text: str) -> list[str]:
    for name in names(text):
        if name not in ENGINES:
            allowed = f"{' or '.join(ENGINES)}, or both separated by a comma"
            raise argparse.ArgumentTypeError(f"{shown(name)} is not an engine; use {allowed}")
    return names(text)
