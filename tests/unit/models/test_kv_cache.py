"""Rows of a KV cache grow independently, and match a full forward pass over each of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import latent_attention, make_batch, make_model, tiny_model_config
from tests.registries import router_sections
from trainer.models.gpt import GPT

MODELS: dict[str, dict[str, Any]] = {
    "moe": {},
    "positions route": {"moe": {"router": {"kind": "round_robin"}}},
    "qk_norm, as many key heads as heads": {"qk_norm": True, "num_kv_heads": None},
    "latents": latent_attention(),
    "latents, plain queries": latent_attention(q_lora_rank=None),
    "latents, biases, windows": latent_attention(biases=True, window=3),
    "dynamic rotary positions": {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_length": 3}},
    "windows": {"attention": {"window": 3, "window_pattern": ["sliding", "full"]}},
    "sinks, capped scores of another scale": {
        "logit_softcap": 2.0,
        "norm": "rms_plus_one",
        "attention": {"sinks": True, "softcap": 0.5, "scale": 0.7, "window": 3, "window_pattern": ["sliding", "full"]},
    },
    "windows of one": {"attention": {"window": 1, "window_pattern": ["full", "sliding"]}},
    "partly rotated, biases": {"attention": {"rotary_fraction": 0.5, "qkv_bias": True, "qk_norm_over": "all_heads"}},
    **{kind: {"moe": section} for kind, section in router_sections(without=[{}]).items()},
}


def _model(fields: dict[str, Any]) -> GPT:
    fields = dict(fields)
    return make_model(tiny_model_config(fields.pop("moe", None), seq_len=16, **fields), dtype=torch.float64)


def _tokens(num_rows: int, length: int) -> Tensor:
    return torch.randint(0, 32, (num_rows, length), generator=torch.Generator().manual_seed(1))


def _log_probs(model: GPT, text: Tensor) -> Tensor:
    """Log-probabilities (S, V) after each token of one text (S,), by a full forward pass."""
    batch = make_batch(1, len(text))
    batch.tokens[0] = text
    logits = model(batch, want_logits=True).logits
    assert logits is not None
    return logits[0].log_softmax(-1)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_rows_of_any_lengths_give_the_logits_of_full_passes(fields: dict[str, Any]) -> None:
    """Append 1, 4 and 0 tokens in rows of 4, then 3, 1 and 2 in rows of 3: padding is neither attended nor routed."""
    model, text = _model(fields), _tokens(3, 8)
    first, then = torch.tensor([1, 4, 0]), torch.tensor([3, 1, 2])
    cache = model.new_cache(3, 7)
    model.next_logits(text[:, :4], cache, first)
    columns = first[:, None] + torch.arange(3)
    logits = model.next_logits(text.gather(1, columns), cache, then)
    assert cache.lengths.tolist() == [4, 5, 2]
    for row, length in enumerate(cache.lengths.tolist()):
        expected = _log_probs(model, text[row, :length])[-1]
        torch.testing.assert_close(logits[row].log_softmax(-1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_a_selected_row_goes_on_by_itself_wherever_it_was_copied_to(fields: dict[str, Any]) -> None:
    model, text = _model(fields), _tokens(2, 12)
    cache = model.new_cache(2, 5)
    model.next_logits(text[:, :5], cache, torch.tensor([5, 2]))
    chosen = cache.select(torch.tensor([1, 0, 1]), capacity=9)
    branches = _tokens(3, 4) + torch.tensor([[0], [0], [1]])
    logits = model.next_logits(branches % 32, chosen)
    for row, (source, length) in enumerate([(1, 2), (0, 5), (1, 2)]):
        whole = torch.cat([text[source, :length], branches[row] % 32])
        torch.testing.assert_close(logits[row].log_softmax(-1), _log_probs(model, whole)[-1], rtol=0, atol=1e-12)
    assert cache.lengths.tolist() == [5, 2], "the row that was copied is left alone"


@pytest.mark.parametrize("kind", ["expert_choice", "sinkhorn", "linear_program"])
def test_pieces_of_a_row_are_never_routed_together(kind: str) -> None:
    """Even with `as_trained`: the rest of a cached sequence is unknown."""
    text, logits = _tokens(2, 8), []
    for evaluation_routing in ("top_k", "as_trained"):
        model = _model({"moe": {"router": {"kind": kind, "evaluation_routing": evaluation_routing}}})
        cache = model.new_cache(2, 8)
        logits.append(model.next_logits(text, cache))
    assert torch.equal(*logits)


def test_latent_attention_caches_a_latent_and_one_rotated_key_per_token() -> None:
    cache = _model(latent_attention()).new_cache(3, 5)
    assert cache.keys.numel() + cache.values.numel() == 2 * 3 * 5 * (12 + 4), "layers, rows, slots"


@pytest.mark.parametrize("loss_chunk", [None, 1, 3])
def test_target_log_probs_are_those_of_a_full_pass(loss_chunk: int | None) -> None:
    model, text = _model({}), _tokens(2, 9)
    model.loss_chunk = loss_chunk
    found, is_likeliest = model.target_log_probs(text[:, :-1], text[:, 1:], model.new_cache(2, 8), torch.tensor([8, 3]))
    for row, length in enumerate([8, 3]):
        full = _log_probs(model, text[row, :length])
        expected = full.gather(1, text[row, 1 : length + 1, None])[:, 0]
        torch.testing.assert_close(found[row, :length], expected, rtol=0, atol=1e-12)
        assert is_likeliest[row, :length].tolist() == (full.argmax(-1) == text[row, 1 : length + 1]).tolist()


def test_a_cache_that_would_overflow_is_a_bug_that_says_so() -> None:
    model = _model({})
    with pytest.raises(AssertionError, match="5 tokens in a cache for 4"):
        model.next_logits(_tokens(1, 5), model.new_cache(1, 4))
