"""Generate texts for many prompts in batches, spread over the ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.distributed.collective_errors import barrier_gather
from trainer.evaluation.context import KV_CACHE_BATCH_FACTOR, EvalContext, split_batches
from trainer.models.generation import generate_many, greedy_tokens
from trainer.models.sampling import SamplingOptions
from trainer.ops.noise import stable_hash

Tokens = Sequence[int]


def generate_batched(
    context: EvalContext,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop_token: int,
    sampling: SamplingOptions,
    is_over: Callable[[Sequence[int]], bool] = lambda _: False,
) -> list[list[int]]:
    """Return the tokens generated after each prompt, with `stop_token` where it was reached. Collective.

    The result is the same on all ranks: random draws are a function of the prompt's number and the position. Prompts
    have at least one and at most `max_prompt_tokens` tokens. A text also ends where `is_over` of its tokens is true.
    """
    world = context.world
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # by length: little padding
    budget, plans = KV_CACHE_BATCH_FACTOR * context.tokens_per_pass, list[list[list[int]]]()
    for index in range(context.num_shares):
        share = order[index :: context.num_shares]
        plans.append(list(split_batches(share, [len(prompts[i]) + max_new_tokens for i in share], budget=budget)))
    generated: list[tuple[int, list[int]]] = []
    for turn in range(max(map(len, plans))):
        numbers = plans[context.share][turn] if turn < len(plans[context.share]) else []
        with context.engine.autocast():
            texts = generate_many(
                context.engine.model,
                [prompts[i] for i in numbers],
                max_new_tokens=max_new_tokens,
                choose=_chooser(context, sampling, numbers),
                stop_token=stop_token,
                is_over=is_over,
                anybody=lambda is_active: bool(world.all_reduce_(torch.tensor([int(is_active)], device=world.device))),
            )
        generated += zip(numbers, texts, strict=True)
    mine = generated if context.is_first_of_share else []
    return [text for _, text in sorted(item for part in barrier_gather(world, mine) for item in part)]


def max_prompt_tokens(max_new_tokens: int, *, seq_len: int) -> int:
    """Return how many tokens of a prompt fit: the last generated token is not read again."""
    return seq_len + 1 - max_new_tokens


def _chooser(
    context: EvalContext, sampling: SamplingOptions, numbers: Sequence[int]
) -> Callable[[Tensor, Sequence[int]], Tensor]:
    choose = _sampler(sampling, numbers)
    if context.tp.size == 1:
        return choose
    # One token for all ranks that write a text together: their logits may be rounded otherwise.
    return lambda logits, texts: context.tp.broadcast_(choose(logits, texts).to(context.tp.device))


def _sampler(sampling: SamplingOptions, numbers: Sequence[int]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    if sampling.temperature == 0:
        return greedy_tokens
    # One generator per text: its draws do not depend on the batch or the rank.
    generators = [torch.Generator().manual_seed(stable_hash("text", number)) for number in numbers]

    def choose(logits: Tensor, texts: Sequence[int]) -> Tensor:
        drawn = [sampling.sample(logits[[row]].cpu(), generator=generators[text]) for row, text in enumerate(texts)]
        return torch.cat(drawn)

    return choose
