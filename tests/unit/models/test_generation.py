"""Generation: reproducible, stops, goes on beyond the trained row."""

import pytest
import torch

from tests.builders import make_batch, make_model, tiny_model_config
from trainer.models.generation import generate
from trainer.models.sampling import SamplingOptions


def _text(seed: int = 0, count: int = 20, stop: int | None = None, temperature: float = 1.0) -> list[int]:
    model = make_model(tiny_model_config())
    generator = torch.Generator().manual_seed(seed)
    sampling = SamplingOptions(temperature=temperature)
    return list(generate(model, [1, 2], max_new_tokens=count, options=sampling, generator=generator, stop_token=stop))


def test_the_same_seed_writes_the_same_text() -> None:
    assert _text(seed=1) == _text(seed=1) != _text(seed=2)


def test_greedy_takes_the_likeliest_token_of_a_full_pass() -> None:
    model = make_model(tiny_model_config())
    tokens = [1, 2]
    for token in _text(count=5, temperature=0.0):
        batch = make_batch(1, len(tokens))
        batch.tokens[0] = torch.tensor(tokens)
        logits = model(batch, want_logits=True).logits
        assert logits is not None and int(logits[0, -1].argmax()) == token
        tokens.append(token)


def test_it_goes_on_when_the_row_is_full() -> None:
    assert len(_text(count=40)) == 40  # five rows of 8


def test_it_stops_at_the_stop_token_and_does_not_write_it() -> None:
    free = _text(count=20)
    assert _text(count=20, stop=free[7]) == free[: free.index(free[7])]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        next(
            generate(
                make_model(tiny_model_config()),
                [],
                max_new_tokens=1,
                options=SamplingOptions(),
                generator=torch.Generator(),
            )
        )
