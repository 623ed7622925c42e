"""The command `prove`: compare all layouts of a config."""

import argparse

from trainer.commands.arguments import Subparsers, add_command, add_config, as_path
from trainer.commands.resolve import load_named_config, suggest_prepare
from trainer.config.nodes import shown
from trainer.config.numbers import MAX_STEPS
from trainer.errors import ConfigError
from trainer.prove.cases import ENGINES

_MAX_TIMEOUT_S = 1e8


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_config(add_command(subparsers, "prove", prove_command, example="configs/quickstart.yaml --scale small"))
    sub.add_argument("--steps", type=int, default=10, help="optimizer steps per layout (10)")
    what = "precision (float64; float32 with deepspeed, which has no float64)"
    sub.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], help=what)
    sub.add_argument("--engines", metavar="A,B", help="native, deepspeed (ZeRO 1 and 2) or both; default: the config's")
    sub.add_argument("--scale", choices=["full", "small"], default="full", help="small: shrink model and batch first")
    sub.add_argument("--layouts", metavar="TEXT", help="only layouts whose name contains this text, such as 'ep 2'")
    sub.add_argument("--json", type=as_path, metavar="FILE", help="also write the result as JSON")
    sub.add_argument(
        "--timeout", type=float, default=120.0, help="seconds after which a rank stops waiting for another (120)"
    )


def prove_command(options: argparse.Namespace) -> int:
    """Check that every layout with up to four ranks learns the same as one process from a config."""
    config = load_named_config(options)
    if not 1 <= options.steps <= MAX_STEPS or not 0 < options.timeout <= _MAX_TIMEOUT_S:
        raise ConfigError(
            f"prove: use 1 <= --steps <= {MAX_STEPS} and 0 < --timeout <= {_MAX_TIMEOUT_S:.0e}, not "
            f"{shown(options.steps)} and {options.timeout:g}"
        )

    from trainer.prove.proof import prove

    with suggest_prepare(config):
        return prove(
            config,
            steps=options.steps,
            dtype=options.dtype,
            is_small=options.scale == "small",
            only=options.layouts,
            engines=_engines(options.engines),
            json_path=options.json,
            timeout_s=options.timeout,
        )


def _engines(text: str | None) -> list[str] | None:
    """Parse `--engines`.

    Raises:
        ConfigError: if one is unknown.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ENGINES:
            raise ConfigError(
                f"--engines: {shown(name)} is not an engine; use {' or '.join(ENGINES)}, or both separated by a comma"
            )
    return names
