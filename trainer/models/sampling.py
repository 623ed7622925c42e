"""Sampling of the next token: temperature, top-k, nucleus (top-p) and greedy, as pure functions.

# B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


class BrokenLogits(ValueError):
    """Logits that cannot be sampled: some are NaN or +inf, or no token is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Options for sampling tokens.

    Raises:
        ValueError: if a value is out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int | None = None
    """Keep only the k most probable tokens. None: all."""
    top_p: float | None = None
    """Keep only the fewest tokens whose probabilities add up to p, after `top_k`. None: all."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature: {self.temperature} is not a finite number >= 0; 0 is greedy, 1 changes nothing"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} is less than 1; leave it out to allow every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]; leave it out to allow every token")

    def sample(self, logits: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Sample a token for each row of logits: (B, V) to (B,) int64.

        The same state of the generator, which is on the device of the logits, gives the same tokens. Temperature 0 is
        greedy, breaks ties by the lowest id, and does not use it.

        Raises:
            ValueError: as `filter_logits`.
        """
        filtered = self.filter_logits(logits)
        if self.temperature == 0:
            return filtered.isfinite().to(torch.uint8).argmax(dim=-1)  # one survivor in each row
        return torch.multinomial(filtered.softmax(dim=-1), 1, generator=generator).squeeze(-1)

    def filter_logits(self, logits: Tensor) -> Tensor:
        """Scale logits (B, V) by the temperature and set those of excluded tokens to -inf.

        Applied in the order temperature, top_k, top_p (renormalized after top_k). Of equal logits the lower id ranks
        first. Each row keeps at least one token; at temperature 0 exactly one. A logit of -inf excludes a token.

        Returns:
            (B, V), at least float32, with 0 as the maximum of every row; its softmax is the sampling distribution.

        Raises:
            ValueError: for a shape that is not (B, V).
            BrokenLogits: for a NaN or +inf, or a row with no token left.

        Source: Holtzman et al. 2019 (arXiv 1904.09751) for top_p.
        """
        if logits.dim() != 2 or logits.size(1) == 0 or not logits.is_floating_point():
            raise ValueError(f"logits: {logits.dtype} of shape {tuple(logits.shape)}; (B, V) of a float type is needed")
        # NaN if the row holds one. Waits for the device, but the sampled token is read right after anyway.
        if not logits.amax(dim=-1).isfinite().all().item():
            raise BrokenLogits("logits: a row holds NaN or +inf, or has no token left; the model or the mask is broken")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A stable sort, unlike topk, puts the lower id first among equals.
        ranked, token_ids = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
        # Subtract before dividing, which would overflow at low temperatures; after sorting, as rounding makes new ties.
        ranked = ranked - ranked[:, :1]
        top_k = self.top_k
        if self.temperature == 0:
            top_k = 1
        else:
            ranked = ranked / max(self.temperature, torch.finfo(logits.dtype).tiny)
        if top_k is not None:
            ranked[:, top_k:] = -math.inf
        if self.top_p is not None and self.top_p < 1:
            probs = ranked.softmax(dim=-1)
            mass_before = probs.cumsum(dim=-1) - probs
            mass_before[:, 0] = 0  # exactly: the most probable token always stays
            ranked = ranked.masked_fill(mass_before >= self.top_p, -math.inf)
        return torch.empty_like(logits).scatter_(-1, token_ids, ranked)
