"""A text that is revised has the logits of one that was written at once."""

import pytest
import torch

from tests.builders import make_model, tiny_model_config
from tests.family_models import MODELS, SIZES
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.models.growing_text import GrowingText

REVISIONS = (
    *([1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [1, 8, 9, 4], [1, 2, 9], [1, 2, 9]),
    *([7], [7, 1, 2, 3, 4, 5, 6, 0], [7, 1]),
)


def fresh(model: GPT, tokens: list[int]) -> torch.Tensor:
    return model.next_logits(torch.tensor([tokens]), model.new_cache(1, model.config.seq_len))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_logits_are_those_of_a_new_text(family: str) -> None:
    """With windows, latents and sinks too."""
    config = ModelConfig.model_validate({**SIZES, **MODELS[family]})
    model = make_model(config).double()
    text = GrowingText(model)
    for tokens in REVISIONS:
        torch.testing.assert_close(text.logits_after(tokens), fresh(model, tokens), rtol=1e-12, atol=1e-12)


def test_only_new_tokens_are_computed() -> None:
    text = GrowingText(make_model(tiny_model_config()))
    computed = []
    for tokens in REVISIONS:
        before = text.num_computed
        text.logits_after(tokens)
        computed.append(text.num_computed - before)
    assert computed == [2, 1, 2, 3, 2, 1, 1, 7, 1]


@torch.no_grad()
def test_an_interrupted_token_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tiny_model_config()).double()
    text = GrowingText(model)
    text.logits_after([1, 2])
    original = GPT._logits

    def interrupted(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.logits_after([1, 2, 3, 4])
    monkeypatch.setattr(GPT, "_logits", original)
    torch.testing.assert_close(text.logits_after([1, 2, 5]), fresh(model, [1, 2, 5]), rtol=1e-12, atol=1e-12)
