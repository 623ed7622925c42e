"""Selection where scores are equal."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.ops.select import first_top_k


def _by_passes(scores: torch.Tensor, k: int) -> torch.Tensor:
    """K times: the first largest of what is left."""
    left, chosen = scores.clone(), []
    for _ in range(k):
        best = left.argmax(dim=-1)
        chosen.append(best)
        left.scatter_(1, best[:, None], float("-inf"))
    return torch.stack(chosen, dim=1)


@settings(max_examples=200)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([1, 2, 5, 1000]), st.data())
def test_equals_masked_passes_of_argmax(tokens: int, experts: int, seed: int, levels: int, data: st.DataObject) -> None:
    scores = torch.randint(0, levels, (tokens, experts), generator=torch.Generator().manual_seed(seed)).float() / levels
    k = data.draw(st.integers(1, experts))
    assert torch.equal(first_top_k(scores, k), _by_passes(scores, k))


def test_equal_scores_go_to_the_lower_expert() -> None:
    assert first_top_k(torch.ones(3, 64), 4).tolist() == [[0, 1, 2, 3]] * 3
