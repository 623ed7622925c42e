"""A text of one row that grows and is revised, with a KV cache of what it kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.models.gpt import GPT


class GrowingText:
    """Tokens in the cache of a model, at most a row of them.

    A text that begins as the last one did costs only its other tokens.
    """

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._cache = model.new_cache(1, model.config.seq_len)
        self._tokens: list[int] = []
        self.num_computed = 0
        """Tokens that were computed so far."""

    @torch.no_grad()
    def logits_after(self, tokens: Sequence[int]) -> Tensor:
        """Return (1, V) logits of the token after `tokens`, which are at least one and at most a row.

        May be interrupted: what is then half written in the cache is not counted.
        """
        kept = min(_num_alike(self._tokens, tokens), len(tokens) - 1)  # the last one gives the logits
        self._tokens = self._tokens[:kept]
        self._cache.shorten(kept)
        new = list(tokens[kept:])
        device = self._model.embedding.weight.device
        logits = self._model.next_logits(torch.tensor([new], device=device), self._cache)
        self._tokens += new
        self.num_computed += len(new)
        return logits


def _num_alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    if list(theirs[: len(ours)]) == ours:  # as for each token of an answer
        return len(ours)
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
