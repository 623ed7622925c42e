"""Layers whose queries see a window of keys: how far a token reaches."""

from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_model, tiny_model_config
from trainer.data.batches.batch import Batch

S = 12


def _config(window: int | None, pattern: list[str], num_layers: int, **fields: Any) -> Any:
    attention = {"window": window, "window_pattern": pattern}
    return tiny_model_config(num_layers=num_layers, attention=attention, seq_len=S, **fields)


def _reach(config: Any) -> list[int]:
    """Positions whose logits change with token 2."""
    model, batch = make_model(config, dtype=torch.float64), make_batch(1, S)
    changed = Batch(**{name: tensor.clone() for name, tensor in batch.tensors().items()})
    changed.tokens[0, 2] = (changed.tokens[0, 2] + 7) % 32
    before, after = (model(one, want_logits=True).logits for one in (batch, changed))
    return ((before - after)[0].abs().amax(-1) > 1e-12).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("window", "pattern", "num_layers", "last"),
    [
        (3, ["sliding"], 1, 4),  # each layer passes it on by window - 1
        (3, ["sliding"], 3, 8),
        (1, ["sliding"], 3, 2),
        (2, ["sliding", "full"], 2, S - 1),
        (2, ["full", "sliding"], 2, S - 1),
        (None, ["sliding"], 1, S - 1),
        (S, ["sliding"], 1, S - 1),
    ],
)
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_token_reaches_as_far_as_its_windows(
    window: int | None, pattern: list[str], num_layers: int, last: int, document_mask: bool
) -> None:
    config = _config(window, pattern, num_layers, document_mask=document_mask)
    assert _reach(config) == list(range(2, last + 1))


def test_a_pattern_is_repeated_over_the_layers() -> None:
    assert _config(5, ["sliding", "full"], 5).windows == (5, None, 5, None, 5)
    assert _config(5, ["full", "full", "sliding"], 3).windows == (None, None, 5)
    assert _config(None, ["sliding"], 2).windows == (None, None)
