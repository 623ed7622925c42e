"""Generation is reproducible, stops, and continues beyond the trained sequence length."""

import pytest
import torch

from tests.builders import make_batch, make_model, tiny_model_config
from trainer.models.generation import generate, generate_many, greedy_tokens
from trainer.models.gpt import GPT
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


def _alone(model: GPT, prompt: list[int], count: int, stop: int | None) -> list[int]:
    """Greedy output of `generate`, including the stop token if it was reached."""
    sampling, generator = SamplingOptions(temperature=0.0), torch.Generator()
    text = list(generate(model, prompt, max_new_tokens=count, options=sampling, generator=generator, stop_token=stop))
    return text if stop is None or len(text) == count else [*text, stop]


@pytest.mark.parametrize("router", ["top_k", "round_robin"])
def test_texts_written_side_by_side_are_those_written_one_by_one(router: str) -> None:
    """Prompts of 1 to 9 tokens; the stop token is chosen so that texts end at different lengths, and some never."""
    model = make_model(tiny_model_config({"router": {"kind": router}}, seq_len=24), dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 32, (1 + n % 9,), generator=draw).tolist() for n in range(14)]
    free = [token for prompt in prompts for token in _alone(model, prompt, 12, None)]
    stop = max(set(free), key=free.count)
    texts = generate_many(model, prompts, max_new_tokens=12, choose=greedy_tokens, stop_token=stop)
    assert texts == [_alone(model, prompt, 12, stop) for prompt in prompts]
    assert len({len(text) for text in texts}) > 3 and any(text[-1] != stop for text in texts)


def test_a_text_can_end_for_another_reason() -> None:
    model = make_model(tiny_model_config(), dtype=torch.float64)
    free = generate_many(model, [[1, 2]], max_new_tokens=6, choose=greedy_tokens, stop_token=-1)[0]
    ended = generate_many(
        model, [[1, 2]], max_new_tokens=6, choose=greedy_tokens, stop_token=-1, is_over=lambda text: len(text) == 4
    )
    assert len(free) == 6 and ended == [free[:4]]


def test_a_rank_without_prompts_runs_until_all_ranks_are_done() -> None:
    """A rank without prompts runs as many forward passes as the others, and stops with them."""
    model, said = make_model(tiny_model_config()), iter([True, True, False])
    asked: list[bool] = []

    def anybody(goes_on: bool) -> bool:
        asked.append(goes_on)
        return next(said)

    assert generate_many(model, [], max_new_tokens=6, choose=greedy_tokens, stop_token=0, anybody=anybody) == []
    assert asked == [False] * 3


def test_a_full_row_goes_on_from_its_second_half() -> None:
    """A row has 8 tokens: from the 9th on, the output depends on the last 4."""
    model = make_model(tiny_model_config(), dtype=torch.float64)
    written = [1, 2, *_alone(model, [1, 2], 9, None)]
    assert written[9:] == _alone(model, written[5:9], 2, None)
    assert written[9:] != _alone(model, written[1:5], 2, None), "or nothing could be told"
