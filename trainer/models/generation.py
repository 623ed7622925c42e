"""Generating text: one token after the other, with a cache of keys and values."""

from collections.abc import Callable, Iterator, Sequence

import torch

from trainer.models.gpt import GPT
from trainer.models.sampling import SamplingOptions


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    generator: torch.Generator,
    stop_token: int | None = None,
    agree: Callable[[int], int] = int,
) -> Iterator[int]:
    """Yield new token ids until `max_new_tokens` or `stop_token` (which is not yielded).

    Positions beyond the trained row length were never learned, so when the row is full the second half of it becomes
    the prompt of a fresh cache.

    Args:
        model: in evaluation use; dropless and without noise.
        prompt: at least one token id; only the last `seq_len` count.
        max_new_tokens: how many at the most.
        options: temperature, top-k, top-p.
        generator: on the CPU; the same seed gives the same text.
        stop_token: ends the text.
        agree: makes one token of what several ranks drew, where experts are on several ranks and all must go on alike.
    """
    if not prompt:
        raise ValueError("prompt: needs at least one token")
    device, seq_len = model.embedding.weight.device, model.config.seq_len
    window = list(prompt)[-seq_len:]
    cache = model.new_cache(1, seq_len, model.embedding.weight.dtype)
    logits = model.next_logits(torch.tensor([window], device=device), cache)
    for _ in range(max_new_tokens):
        token = agree(int(options.sample(logits.cpu(), generator=generator)))
        if token == stop_token:
            return
        yield token
        window.append(token)
        if cache.length == seq_len:
            window = window[-max(1, seq_len // 2) :]
            cache = model.new_cache(1, seq_len, cache.keys.dtype)
            logits = model.next_logits(torch.tensor([window], device=device), cache)
        else:
            logits = model.next_logits(torch.tensor([[token]], device=device), cache)
