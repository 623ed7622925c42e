"""Options of the commands that sample text."""

import argparse
from typing import TYPE_CHECKING, Final

from trainer.commands.arguments import seed, whole
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.models.sampling import SamplingOptions

_DEFAULT_TEMPERATURE: Final = 0.8


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling to a command's options."""
    parser.add_argument("--max-tokens", type=whole, default=400, help="generate at most this many tokens (400)")
    parser.add_argument("--temperature", type=float, help="0 always takes the most likely token (0.8)")
    parser.add_argument("--top-k", type=whole, help="sample from the k most likely tokens only")
    what = "sample from the most likely tokens of this total mass (1)"
    parser.add_argument("--top-p", type=float, default=1.0, help=what)
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text (0)")


def check_sampling(options: argparse.Namespace, command: str) -> None:
    """Refuse options out of their range, or that contradict each other."""
    temperature = _DEFAULT_TEMPERATURE if options.temperature is None else options.temperature
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"{command}: --temperature: {temperature:g} is not a finite number of at least 0")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"{command}: --top-p: {options.top_p:g} is not more than 0 and at most 1")
    if options.greedy and options.temperature:
        raise ConfigError(f"{command}: --greedy is --temperature 0, not {temperature:g}; leave one of them out")


def sampling_of(options: argparse.Namespace) -> "SamplingOptions":
    """Return the options of sampling, which are checked; this imports torch."""
    from trainer.models.sampling import SamplingOptions

    temperature = _DEFAULT_TEMPERATURE if options.temperature is None else options.temperature
    temperature = 0.0 if options.greedy else temperature
    return SamplingOptions(temperature=temperature, top_k=options.top_k, top_p=options.top_p)
