"""The model: cached equals full forward, causality, padding, positions, dense blocks and shared experts."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.builders import latent_attention, make_batch, make_model, rows_of, tiny_model_config
from trainer.data.batches.batch import Batch
from trainer.errors import ConfigError
from trainer.models.gpt import GPT
from trainer.models.norm import RMSNorm
from trainer.models.parameter_roles import parameter_role
from trainer.moe.routing import RoutingOptions
from trainer.ops.rotary import rotary_rates, rotary_table, rotate

SHAPES = {
    "moe": {},
    "dense": {"moe": None},
    "qk_norm, tied, gelu": {"qk_norm": True, "tie_embeddings": True, "activation": "gelu"},
    "one kv head each": {"num_kv_heads": None},
    "shared expert, first layer dense": {"moe": {"num_shared_experts": 2, "first_dense_layers": 1}},
    "latent attention": latent_attention(),
    "sigmoid with bias": {"moe": {"router": {"kind": "bias_balanced"}}},
}


def _model(shape: dict) -> GPT:
    shape = dict(shape)
    if "moe" in shape and shape["moe"] is None:
        config = tiny_model_config().model_copy(update=shape)
        return make_model(config, dtype=torch.float64)
    return make_model(tiny_model_config(shape.pop("moe", None), **shape), dtype=torch.float64)


def _logits(model: GPT, batch: Batch) -> torch.Tensor:
    logits = model(batch, want_logits=True).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_cache_gives_the_logits_of_a_full_pass(shape: dict) -> None:
    model, batch = _model(shape), make_batch(2, 8)
    full = _logits(model, batch)
    cache = model.new_cache(2, 8)
    torch.testing.assert_close(model.next_logits(batch.tokens[:, :3], cache), full[:, 2])
    for column in range(3, 8):
        torch.testing.assert_close(model.next_logits(batch.tokens[:, column : column + 1], cache), full[:, column])


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("router", ["top_k", "bias_balanced", "dense", "round_robin"])
def test_no_later_token_changes_an_earlier_logit(router: str, capacity: float | None) -> None:
    """Causality of router and capacity together, where both are declared causal."""
    if router == "dense" and capacity is not None:
        return  # refused by the config
    moe = {"router": {"kind": router}, "capacity": {"factor": capacity, "min": 1}}
    model, batch = make_model(tiny_model_config(moe), dtype=torch.float64), make_batch(2, 8)
    changed = Batch(**{n: tensor.clone() for n, tensor in batch.tensors().items()})
    changed.tokens[:, 5:] = (changed.tokens[:, 5:] + 7) % 32
    before, after = _logits(model, batch), _logits(model, changed)
    # Not bit for bit: an expert's product over another number of rows may sum in another order.
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-13)
    assert (before[:, 5:] - after[:, 5:]).abs().amin(-1).max() > 1e-3


def test_padding_changes_nothing_and_is_never_routed() -> None:
    model, batch = make_model(tiny_model_config(), dtype=torch.float64), make_batch(3, 8, ragged=True)
    other = Batch(**{n: tensor.clone() for n, tensor in batch.tensors().items()})
    other.tokens[~batch.valid] = 1
    other.targets[~batch.valid] = 2
    a, b = model(batch), model(other)
    assert torch.equal(a.row_loss, b.row_loss)
    for mine, theirs in zip(a.moe, b.moe, strict=True):
        assert torch.equal(mine.counts, theirs.counts) and torch.equal(mine.prob_sum, theirs.prob_sum)
        assert mine.counts.sum(1).tolist() == (batch.valid.sum(1) * 2).tolist()


def test_loss_is_a_sum_over_targets_in_nats() -> None:
    model, batch = make_model(tiny_model_config(), dtype=torch.float64), make_batch(2, 8, ragged=True)
    logits = _logits(model, batch)
    by_hand = [
        sum(
            (
                -torch.log_softmax(logits[b, s], -1)[batch.targets[b, s]]
                for s in range(8)
                if batch.loss_mask[b, s] and batch.valid[b, s]
            ),
            torch.zeros((), dtype=torch.float64),
        )
        for b in range(2)
    ]
    torch.testing.assert_close(model(batch).row_loss, torch.stack(by_hand))


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_and_losses_are_no_narrower_than_float32(is_tied: bool) -> None:
    """Under autocast the head computes in bfloat16, whose 8 bits are too few for a softmax over a vocabulary."""
    model, batch = make_model(tiny_model_config(tie_embeddings=is_tied)), make_batch(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, want_logits=True)
        cached = model.next_logits(batch.tokens, model.new_cache(2, 8))
    assert output.logits is not None
    assert output.logits.dtype is output.row_loss.dtype is cached.dtype is torch.float32
    model.loss_chunk = 5
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(batch).row_loss, output.row_loss, rtol=1e-6, atol=0)
    exact = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    torch.testing.assert_close(output.row_loss, exact.view(2, 8).sum(1))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_loss_in_chunks_has_the_value_and_gradients_of_a_whole_one(is_tied: bool, chunk: int) -> None:
    model, batch = _model({"tie_embeddings": is_tied}), make_batch(3, 8, ragged=True)
    passes = []
    for model.loss_chunk in (None, chunk):
        row_loss = model(batch).row_loss
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(row_loss.sum() / 13, weights)
        passes.append({"row_loss": row_loss, **dict(zip(names, gradients, strict=True))})
    for name, whole in passes[0].items():
        torch.testing.assert_close(passes[1][name], whole, rtol=1e-12, atol=1e-12, msg=name)


def test_logits_can_be_wanted_of_a_model_with_a_loss_in_chunks() -> None:
    model, batch = _model({}), make_batch(3, 8, ragged=True)
    whole = model(batch, want_logits=True)
    model.loss_chunk = 5
    assert torch.equal(_logits(model, batch), whole.logits)
    torch.testing.assert_close(model(batch).row_loss, whole.row_loss, rtol=1e-12, atol=1e-12)
    assert model(batch).logits is None


def test_top_k_can_be_changed_per_call() -> None:
    model, batch = make_model(tiny_model_config()), make_batch(1, 8)
    assert model(batch, RoutingOptions(top_k=3)).moe[0].counts.sum() == 24
    assert model(batch).moe[0].counts.sum() == 16


def test_statistics_of_targets_and_of_what_is_only_read_are_those_of_all() -> None:
    moe = {"capacity": {"factor": 0.5, "min": 1}}
    model, batch = make_model(tiny_model_config(moe), dtype=torch.float64), make_batch(3, 8, ragged=True)
    options = RoutingOptions(counts_targets_only=True)
    mask = torch.arange(24).view(3, 8) % 3 > 0
    (targets, *_), (others, *_) = (model(replace(batch, loss_mask=m), options).moe for m in (mask, ~mask))
    (every, *_) = model(batch).moe
    assert targets.tokens.tolist() == (mask & batch.valid).sum(1).tolist()
    assert every.dropped.sum() > 0
    for field in fields(every):
        if getattr(every, field.name) is None:
            continue  # losses that are off
        torch.testing.assert_close(
            getattr(targets, field.name) + getattr(others, field.name), getattr(every, field.name)
        )


@pytest.mark.parametrize(
    ("moe", "top_k", "said"),
    [
        ({}, 5, "5 is more than num_experts 4; use 1 to 4"),
        ({}, 0, "4 experts"),
        ({"router": {"kind": "hash"}}, 5, "5 is more than num_experts 4"),
        ({"router": {"kind": "group_limited", "groups_kept": 2}}, 3, "2 experts of groups_kept"),
        ({"router": {"kind": "top_k", "null_experts": 2}}, 7, "num_experts 4 and 2 null experts; use 1 to 6"),
        *(({"router": {"kind": kind}}, 2, f"{kind} has no top_k") for kind in ("top_p", "dense", "base")),
    ],
    ids=str,
)
def test_a_k_that_the_router_cannot_give_is_refused(moe: dict[str, Any], top_k: int, said: str) -> None:
    model = make_model(tiny_model_config(moe))
    with pytest.raises(ValueError, match=said):
        model(make_batch(1, 8), RoutingOptions(top_k=top_k))


def test_rows_do_not_see_each_other() -> None:
    moe = {"capacity": {"factor": 0.5, "min": 1}}
    model, batch = make_model(tiny_model_config(moe), dtype=torch.float64), make_batch(3, 8)
    torch.testing.assert_close(_logits(model, batch)[1:2], _logits(model, rows_of(batch, 1, 2)))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    x, y = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def score(p: int, q: int) -> torch.Tensor:
        table = rotary_table(torch.tensor([p, q]), rotary_rates(8, 10000.0), torch.float64)
        return rotate(x[None], table[:, :1])[0] @ rotate(y[None], table[:, 1:])[0]

    torch.testing.assert_close(score(3, 1), score(12, 10))
    torch.testing.assert_close(score(0, 0), x @ y)
    assert not torch.isclose(score(3, 1), score(4, 1))


def test_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(4, eps=0.0)
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
    torch.testing.assert_close(norm(x), torch.tensor([[1.0, -2.0, 3.0, -4.0]]))


def test_every_parameter_has_a_role() -> None:
    config = tiny_model_config({"num_shared_experts": 1, "first_dense_layers": 1}, qk_norm=True)
    roles = {name: parameter_role(name) for name, _ in make_model(config).named_parameters()}
    assert roles["embedding.weight"] == "embedding" and roles["head.weight"] == "head"
    assert {n for n, r in roles.items() if r == "expert"} == {"blocks.1.ffn.experts.w_in", "blocks.1.ffn.experts.w_out"}
    assert {n for n, r in roles.items() if r == "router"} == {"blocks.1.ffn.router.gate.weight"}
    assert all(r == "norm" for n, r in roles.items() if n.endswith("norm.weight"))
    assert roles["blocks.1.ffn.shared.w_in.weight"] == "matrix" == roles["blocks.0.ffn.w_out.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_rows_beyond_the_ids_are_scored_and_never_generated(tied: bool) -> None:
    """As in a published model whose embedding is padded: in the softmax, but no text has them."""
    config = tiny_model_config(vocab_size=40, tie_embeddings=tied)
    model, batch = make_model(config, vocab_size=32, dtype=torch.float64), make_batch(2, 8)
    logits = _logits(model, batch)
    assert logits.shape == (2, 8, 40) and model.embedding.weight.shape == (40, 16)
    expected = F.cross_entropy(logits[batch.target_mask], batch.targets[batch.target_mask], reduction="sum")
    torch.testing.assert_close(model(batch).loss_sum, expected)
    following = model.next_logits(batch.tokens, model.new_cache(2, 8))
    torch.testing.assert_close(following, logits[:, -1, :32])
    assert config.weights(vocab_size=32) == tiny_model_config(tie_embeddings=tied).weights(vocab_size=40)


def test_fewer_rows_than_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 31 rows, and the tokenizer has 32 ids; use at least"):
        make_model(tiny_model_config(vocab_size=31), vocab_size=32)


@pytest.mark.parametrize("tie", [False, True])
def test_parts_of_a_model_are_disjoint_and_know_what_they_lack(tie: bool) -> None:
    config = tiny_model_config(num_layers=3, tie_embeddings=tie)
    whole = set(make_model(config).state_dict())
    parts = [make_model(config) for _ in range(3)]
    for layer, part in enumerate(parts):
        part.keep([layer])
        assert set(part.state_dict()) | part.elsewhere == whole and not set(part.state_dict()) & part.elsewhere
    names = [name for part in parts for name in part.state_dict()]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == ({"embedding.weight"} if tie else set()) and set(names) == whole


def test_layers_one_after_another_are_the_whole_model() -> None:
    model, batch = make_model(tiny_model_config(num_layers=3)), make_batch(2, 8)
    expected = model(batch)
    first = model(batch, layers=range(0, 1))
    second = model(batch, hidden=first.hidden, layers=range(1, 3))
    assert first.loss_sum == 0 and first.hidden is not None and second.hidden is None
    assert torch.equal(second.row_loss, expected.row_loss)
    assert [len(part.moe) for part in (first, second)] == [1, 2]
