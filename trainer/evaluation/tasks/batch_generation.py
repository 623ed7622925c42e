"""Generate texts after many prompts in batches, each rank its share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.distributed.collective_errors import barrier_gather
from trainer.evaluation.context import KV_CACHE_BATCH_FACTOR, EvalContext, batches
from trainer.models.generation import generate_many, greedy
from trainer.models.sampling import SamplingOptions
from trainer.ops.noise import stable_hash

Tokens = Sequence[int]


def write(
    subject: EvalContext,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop_token: int,
    options: SamplingOptions,
    is_over: Callable[[Sequence[int]], bool] = lambda _: False,
) -> list[list[int]]:
    """Return the tokens written after each prompt, the same on all ranks, `stop_token` at the end of those that end.

    Args:
        subject: who writes.
        prompts: at least one token each, and short enough for `max_new_tokens` more: see `room_for_prompt`.
        max_new_tokens: how many at the most.
        stop_token: ends a text.
        options: temperature and the like. What is drawn is a function of the prompt's number and the place in the text.
        is_over: tells whether a text ends for another reason.
    """
    world = subject.world
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike ones together: little padding
    plans = [_batches(prompts, order[rank :: world.size], max_new_tokens, subject) for rank in range(world.size)]
    written: list[tuple[int, list[int]]] = []
    for turn in range(max(map(len, plans))):
        numbers = plans[world.index][turn] if turn < len(plans[world.index]) else []
        with subject.engine.autocast():
            texts = generate_many(
                subject.engine.model,
                [prompts[i] for i in numbers],
                max_new_tokens=max_new_tokens,
                choose=_chooser(options, numbers),
                stop_token=stop_token,
                is_over=is_over,
                anybody=lambda goes_on: _any(subject, goes_on),
            )
        written += zip(numbers, texts, strict=True)
    return [text for _, text in sorted(item for part in barrier_gather(world, written) for item in part)]


def room_for_prompt(max_new_tokens: int, *, seq_len: int) -> int:
    """Return how many tokens of a prompt fit: the last token that is written is not read again."""
    return seq_len + 1 - max_new_tokens


def _batches(
    prompts: Sequence[Tokens], numbers: Sequence[int], max_new_tokens: int, subject: EvalContext
) -> list[list[int]]:
    sizes = [len(prompts[i]) + max_new_tokens for i in numbers]
    return list(batches(numbers, sizes, budget=KV_CACHE_BATCH_FACTOR * subject.tokens_per_pass))


def _any(subject: EvalContext, goes_on: bool) -> bool:
    if subject.world.size == 1:
        return goes_on
    return bool(subject.world.all_reduce_(torch.tensor([int(goes_on)], device=subject.world.device)))


def _chooser(options: SamplingOptions, numbers: Sequence[int]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    if options.temperature == 0:
        return greedy
    # A generator for each text: what is drawn for it does not know what is written beside it, or on which rank.
    generators = [torch.Generator().manual_seed(stable_hash("text", number)) for number in numbers]

    def choose(logits: Tensor, texts: Sequence[int]) -> Tensor:
        drawn = [options.sample(logits[[row]].cpu(), generator=generators[text]) for row, text in enumerate(texts)]
        return torch.cat(drawn)

    return choose
