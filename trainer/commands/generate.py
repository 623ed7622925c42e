"""The command `generate`: write text with a checkpoint of a run."""

import argparse

from trainer.commands.arguments import Subparsers, add_command, add_run, add_step, seed, whole
from trainer.commands.resolve import existing_run
from trainer.errors import ConfigError


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke --prompt 'It was' --max-tokens 100"
    sub = add_step(add_run(add_command(subparsers, "generate", generate_command, example=example)))
    sub.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    sub.add_argument("--max-tokens", type=whole, default=400, help="generate at most this many tokens (400)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token (0.8)")
    sub.add_argument("--top-k", type=whole, help="sample from the k most likely tokens only")
    what = "sample from the most likely tokens of this total mass (1)"
    sub.add_argument("--top-p", type=float, default=1.0, help=what)
    sub.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    sub.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text (0)")


def generate_command(options: argparse.Namespace) -> int:
    """Generate text with a run's newest checkpoint."""
    config, folder = existing_run(options)
    if not (0 <= options.temperature < float("inf") and 0 < options.top_p <= 1):
        raise ConfigError("generate: use --temperature >= 0 and 0 < --top-p <= 1")

    from trainer.models.sampling import SamplingOptions
    from trainer.training.generate_text import generate_text

    temperature = 0.0 if options.greedy else options.temperature
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
