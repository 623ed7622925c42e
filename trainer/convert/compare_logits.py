"""Compare the logits of a model here with those of transformers, for weights that are known to be equal.

# B rows, S tokens in a row, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from trainer.convert.gate_report import LIMIT, GateError
from trainer.convert.gates import our_logits
from trainer.convert.their_model import their_logits
from trainer.models.gpt import GPT

_SEEDS: Final = (0, 1)
"""Seeds of tokens: where two experts score alike, rounding alone may choose the other one."""
_SHAPES: Final = ((2, 64), (3, 33), (1, 7))
"""B and S of each batch."""
_ONE_UNIT: Final = 2.0**-23  # in the last place of float32
_OPERATIONS: Final = 4  # that round at once, each as much as the embedding does


@torch.no_grad()
def compare_logits(ours: GPT, theirs: Any) -> str:
    """Return the largest difference on random tokens, in words.

    Where float32 itself does not reach the limit, the logits of most tokens must be as close as transformers' own are
    after a change of the embedding in its last place.

    Raises:
        GateError: if that is not rounding.
    """
    found = [_differences(ours, theirs, seed) for seed in _SEEDS]
    worst, limit = min(((float(each.max()), limit) for each, limit in found), key=lambda one: one[0] / one[1])
    if worst <= limit:
        return f"logits within {worst:.0e} of transformers'"
    differ = float(torch.cat([each for each, _ in found]).median())
    moved = float(torch.cat([_moved(ours, theirs, seed) for seed in _SEEDS]).median())
    if differ <= max(limit, _OPERATIONS * moved):
        return f"logits of most tokens within {differ:.0e} of transformers', whose own rounding is {moved:.0e}"
    raise GateError(f"its logits here differ from transformers' by {differ:.2g}, and {moved:.1g} is rounding")


def _differences(ours: GPT, theirs: Any, seed: int) -> tuple[Tensor, float]:
    """Return the largest difference for each token (T,), and the largest that is rounding."""
    found, limit = [], LIMIT
    for ids in _batches(ours, seed):
        expected = their_logits(theirs, ids)
        found.append(_by_token(expected - our_logits(ours, ids)))
        limit = max(limit, LIMIT * float(expected.abs().max()))
    return torch.cat(found), limit


def _moved(ours: GPT, theirs: Any, seed: int) -> Tensor:
    """Return by how much each token's logits (T,) change in transformers with the last place of the embedding."""
    weight, generator = theirs.get_input_embeddings().weight, torch.Generator().manual_seed(seed)
    before = [their_logits(theirs, ids) for ids in _batches(ours, seed)]
    kept = weight.clone()
    signs = torch.randint(0, 2, weight.shape, generator=generator).mul_(2).sub_(1)
    weight.mul_(1 + _ONE_UNIT * signs)
    after = [their_logits(theirs, ids) for ids in _batches(ours, seed)]
    weight.copy_(kept)
    return torch.cat([_by_token(new - old) for new, old in zip(after, before, strict=True)])


def _by_token(difference: Tensor) -> Tensor:
    return difference.abs().amax(-1).flatten().nan_to_num(nan=float("inf"))


def _batches(model: GPT, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for num_rows, length in _SHAPES:
        size = (num_rows, min(length, model.config.seq_len))
        yield torch.randint(0, model.num_tokens, size, generator=generator)
