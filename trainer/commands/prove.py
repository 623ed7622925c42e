"""The verb prove."""

import argparse

from trainer.commands.arguments import Verbs, as_path, takes_config, verb
from trainer.commands.resolve import named_config, telling_what_makes_it
from trainer.config.nodes import shown
from trainer.config.numbers import MAX_STEPS
from trainer.errors import ConfigError
from trainer.prove.cases import ENGINES

_LONGEST_S = 1e8


def add(verbs: Verbs) -> None:
    """Add it with its arguments."""
    sub = takes_config(verb(verbs, "prove", prove, example="configs/quickstart.yaml --scale small"))
    sub.add_argument("--steps", type=int, default=10, help="optimizer steps of each layout (10)")
    what = "(float64; float32 if deepspeed, which has no float64, is among the engines)"
    sub.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], help=what)
    sub.add_argument("--engines", metavar="A,B", help="native, deepspeed (ZeRO 1 and 2) or both; default: the config's")
    sub.add_argument("--scale", choices=["full", "small"], default="full", help="small: shrink model and batch first")
    sub.add_argument("--layouts", metavar="TEXT", help="only layouts whose name has this text, such as 'ep 2'")
    sub.add_argument("--json", type=as_path, metavar="FILE", help="write the result as JSON as well")
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds that ranks wait for each other (120)")


def prove(options: argparse.Namespace) -> int:
    """Prove that every layout up to four ranks learns what one process learns from this config."""
    config = named_config(options)
    if not 1 <= options.steps <= MAX_STEPS or not 0 < options.timeout <= _LONGEST_S:
        raise ConfigError(
            f"prove: use 1 <= --steps <= {MAX_STEPS} and 0 < --timeout <= {_LONGEST_S:.0e}, not {shown(options.steps)} "
            f"and {options.timeout:g}"
        )

    from trainer.prove.proof import prove

    with telling_what_makes_it(config):
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
    """Return the engines of `--engines`.

    Raises:
        ConfigError: if one is unknown.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ENGINES:
            raise ConfigError(f"--engines: {shown(name)} is not an engine; use some of {', '.join(ENGINES)}, by commas")
    return names
