"""Text generation, token by token, with a KV cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import NumericsError
from trainer.models.gpt import GPT
from trainer.models.kv_cache import KVCache
from trainer.models.sampling import BrokenLogits, SamplingOptions

_NO_TOKEN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTokens:
    """Tokens that one cache has held, and their experts."""

    tokens: list[int]
    """The last one may have been written and not read."""
    experts: Tensor
    """(n, L, k) experts of the n tokens that were read."""
    num_given: int
    """Tokens that were not written here: the prompt, or what another cache has held before."""


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
    read: list[ReadTokens] | None = None,
) -> Iterator[int]:
    """Yield new token ids until `max_new_tokens` or `stop_token` (which is not yielded).

    Positions beyond the trained sequence length were never learned: when the row is full, its second half becomes the
    prompt of a new cache.

    The prompt has at least one token; its last `seq_len` are used. The generator is on the CPU: the same seed gives the
    same text. If experts are on several ranks, `agree` returns one token for all, given that of this rank. `read` gets
    the tokens of each cache with their experts, from routers with a fixed k.

    Raises:
        NumericsError: if the model's logits are not finite.
    """
    if not prompt:
        raise ValueError("prompt: needs at least one token")
    device, seq_len = model.device, model.config.seq_len
    window = list(prompt)[-seq_len:]
    num_given, cache = len(window), model.new_cache(1, seq_len, keeps_experts=read is not None)
    logits = model.next_logits(torch.tensor([window], device=device), cache)
    try:
        for number in range(max_new_tokens):
            try:
                token = int(options.sample(logits.cpu(), generator=generator))
            except BrokenLogits:
                token = _NO_TOKEN
            token = agree(token)
            if token == _NO_TOKEN:  # on all ranks, so that none waits for another
                raise NumericsError(f"token {number}: the model's logits are not finite, so no token can be sampled")
            window.append(token)
            if token == stop_token:
                return
            yield token
            if cache.longest == seq_len:
                _note(read, window, cache, num_given)
                window = window[-max(1, seq_len // 2) :]
                num_given, cache = len(window), model.new_cache(1, seq_len, keeps_experts=read is not None)
                logits = model.next_logits(torch.tensor([window], device=device), cache)
            else:
                logits = model.next_logits(torch.tensor([[token]], device=device), cache)
    finally:
        _note(read, window, cache, num_given)


def _note(read: list[ReadTokens] | None, tokens: list[int], cache: KVCache, num_given: int) -> None:
    if read is not None and cache.experts is not None:
        experts = torch.cat(cache.experts, dim=1)[0].cpu()
        read.append(ReadTokens(tokens=tokens, experts=experts, num_given=num_given))


@torch.no_grad()
def generate_many(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    choose: Callable[[Tensor, Sequence[int]], Tensor],
    stop_token: int,
    is_over: Callable[[Sequence[int]], bool] = lambda _: False,
    anybody: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Generate continuations of several prompts in one batch.

    A text does not depend on the others in the batch, up to floating-point reordering.

    Args:
        model: runs dropless and without noise.
        prompts: token ids, at least one each, leaving `max_new_tokens` of the sequence length. May be empty: with
            experts on several ranks, all ranks continue until none has a text left.
        max_new_tokens: maximum number of new tokens.
        choose: takes logits (n, V) and the prompt index of each; returns n token ids.
        stop_token: ends a text, and is included in it.
        is_over: returns whether a non-empty text ends for another reason.
        anybody: takes whether this rank continues; returns whether any rank does.
    """
    device = model.device
    longest = max(map(len, prompts), default=1)
    assert longest + max_new_tokens - 1 <= model.config.seq_len, "positions beyond a row were never learned"
    texts: list[list[int]] = [[] for _ in prompts]
    owner: list[int | None] = list(range(len(prompts))) or [None]  # text of each row; None: finished
    cache = model.new_cache(len(owner), longest + max_new_tokens - 1)
    tokens, num_new = pad_right(prompts or [[]], device)
    for left in reversed(range(max_new_tokens)):
        logits = model.next_logits(tokens, cache, num_new)
        going = [(row, text) for row, text in enumerate(owner) if text is not None]
        new: list[list[int]] = [[] for _ in owner]
        if going:
            # Waits for the device: the next forward pass depends on it.
            chosen = choose(logits[[row for row, _ in going]], [text for _, text in going]).tolist()
            for (row, text), token in zip(going, chosen, strict=True):
                texts[text].append(token)
                if token == stop_token or is_over(texts[text]):
                    owner[row] = None
                else:
                    new[row] = [token]
        if left == 0 or not anybody(any(new)):
            break
        kept = [row for row, text in enumerate(owner) if text is not None] or [0]
        if 2 * len(kept) <= len(owner):  # finished rows cost as much as others
            cache = cache.select(torch.tensor(kept, device=device))
            owner, new = [owner[row] for row in kept], [new[row] for row in kept]
        tokens, num_new = pad_right(new, device)
    return texts


def greedy_tokens(logits: Tensor, _: Sequence[int]) -> Tensor:
    """Return the most probable token of each row of logits (n, V); the lowest id wins a tie."""
    return logits.argmax(-1)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as (B, S), padded with 0 on the right, and their lengths (B,)."""
    width = max(1, *(len(row) for row in rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return tokens, torch.tensor([len(row) for row in rows], device=device)
