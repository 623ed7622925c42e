"""The command `generate`: write text with a checkpoint of a run."""

import argparse

from trainer.commands.arguments import Subparsers, add_command, add_run, add_step, seed, whole
from trainer.commands.resolve import existing_run
from trainer.errors import ConfigError

_DEFAULT_TEMPERATURE = 0.8


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke --prompt 'It was' --max-tokens 100"
    sub = add_step(add_run(add_command(subparsers, "generate", generate_command, example=example)))
    sub.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    sub.add_argument("--max-tokens", type=whole, default=400, help="generate at most this many tokens (400)")
    sub.add_argument("--temperature", type=float, help="0 always takes the most likely token (0.8)")
    sub.add_argument("--top-k", type=whole, help="sample from the k most likely tokens only")
    what = "sample from the most likely tokens of this total mass (1)"
    sub.add_argument("--top-p", type=float, default=1.0, help=what)
    sub.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    sub.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text (0)")


def generate_command(options: argparse.Namespace) -> int:
    """Generate text with a run's newest checkpoint."""
    temperature = _DEFAULT_TEMPERATURE if options.temperature is None else options.temperature
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"generate: --temperature: {temperature:g} is not a finite number of at least 0")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"generate: --top-p: {options.top_p:g} is not more than 0 and at most 1")
    if options.greedy and options.temperature:
        raise ConfigError(f"generate: --greedy is --temperature 0, not {temperature:g}; leave one of them out")
    config, folder = existing_run(options)

    from trainer.models.sampling import SamplingOptions
    from trainer.training.generate_text import generate_text

    temperature = 0.0 if options.greedy else temperature
    generate_text(
        config,
        folder,
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        sampling=SamplingOptions(temperature=temperature, top_k=options.top_k, top_p=options.top_p),
        seed=options.seed,
        step=options.step,
    )
    return 0
