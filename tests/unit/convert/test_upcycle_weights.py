"""Laws of upcycling: the new model computes what the dense one did, whatever its experts; changes are as announced."""

from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_model, tiny_model_config
from trainer.convert.hidden_units import HiddenUnits
from trainer.convert.preservation import logit_difference
from trainer.convert.upcycle_plan import UpcycleOptions, plan_upcycle
from trainer.convert.upcycle_weights import upcycle_weights
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT

_GROUPS = {"kind": "group_limited", "groups": 2, "groups_kept": 1, "top_k": 4}
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copies": ({"d_ff": 24}, {}),
    "one expert per token, raw scores of 1": ({"d_ff": 24, "num_experts": 1, "router": {"kind": "dense"}}, {}),
    "slices": ({"d_ff": 12, "num_experts": 6}, {}),
    "fine slices": ({"d_ff": 6, "num_experts": 16, "router": {"kind": "top_k", "top_k": 8}}, {}),
    "sigmoid scores": ({"d_ff": 24, "router": {"kind": "top_k", "score": "sigmoid"}}, {}),
    "scaled weights": ({"d_ff": 12, "router": {"kind": "top_k", "scale": 2.5}}, {}),
    "bias and groups": ({"d_ff": 6, "num_experts": 16, "router": {**_GROUPS, "bias_update_rate": 0.1}}, {}),
    "cosine": ({"d_ff": 8, "num_experts": 6, "router": {"kind": "cosine", "top_k": 3, "d_proj": 4}}, {}),
    "shared copies": ({"d_ff": 12, "num_experts": 8, "num_shared_experts": 4}, {}),
    "a shared slice": ({"d_ff": 8, "num_shared_experts": 1}, {"shared": "slices"}),
    "copies beside a shared slice": ({"d_ff": 12, "num_shared_experts": 1}, {"shared": "slices"}),
    "a shared copy of its own width": ({"d_ff": 12, "num_shared_experts": 1, "shared_d_ff": 24}, {}),
    "a gate on shared copies": ({"d_ff": 24, "num_shared_experts": 2, "shared_gate": True}, {}),
    "a gate on a shared slice": (
        {"d_ff": 10, "num_shared_experts": 1, "shared_d_ff": 4, "shared_gate": True},
        {"shared": "slices"},
    ),
    "layers by index": ({"d_ff": 24, "layers": [1]}, {}),
    "biases of experts": ({"d_ff": 12, "expert_bias": True}, {}),
    "dense layers": ({"d_ff": 24, "first_dense_layers": 1}, {}),
    "equal weights by hash": ({"d_ff": 24, "router": {"kind": "hash", "top_k": 2}}, {}),
}


def _dense(**fields: Any) -> tuple[ModelConfig, GPT]:
    config = tiny_model_config(**fields).model_copy(update={"moe": None})
    return config, make_model(config, dtype=torch.float64, seed=3)


def _upcycled(dense: GPT, moe: dict[str, Any], options: UpcycleOptions, *, seed: int = 0, **fields: Any) -> GPT:
    config = tiny_model_config(moe, **fields)
    model = make_model(config, dtype=torch.float64, seed=seed)
    upcycle_weights(dense, model, plan_upcycle(dense.config, config, options), seed=seed)
    return model


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_by_definition_preserves_the_logits(name: str, activation: Any) -> None:
    moe, options = EXACT[name]
    fields: dict[str, Any] = {"activation": activation, "tie_embeddings": activation == "gelu"}
    config, dense = _dense(**fields)
    plan = plan_upcycle(config, tiny_model_config(moe, **fields), UpcycleOptions(**options))
    assert plan.reasons == ()
    model = _upcycled(dense, moe, UpcycleOptions(**options), **fields)
    difference = logit_difference(dense, model, [make_batch(2, 8, seed=s, ragged=True) for s in range(3)])
    assert difference.largest < 1e-12 * difference.scale


INEXACT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "noise": ({"d_ff": 24}, {"noise": 0.1}, "noise 0.1 is added"),
    "new units": ({"d_ff": 24}, {"drop_fraction": 0.5}, "0.5 of each expert's hidden units"),
    "raw scores": ({"d_ff": 24, "router": {"kind": "top_k", "normalize": False}}, {}, "do not add up to a constant"),
    "null experts": ({"d_ff": 24, "router": {"kind": "top_k", "null_experts": 2}}, {}, "null_experts (2)"),
    "half a network": (
        {"d_ff": 12, "router": {"kind": "top_k", "top_k": 3}},
        {},
        "3 experts per token are no multiple",
    ),
    "hash of slices": ({"d_ff": 12, "router": {"kind": "hash", "top_k": 2}}, {}, "hash does not choose the 2 experts"),
    "half a shared copy": ({"d_ff": 12, "num_shared_experts": 1}, {}, "the shared experts are 0.5 of"),
    "scale of all": ({"d_ff": 12}, {"scale": "all"}, "the factor 2 is spread"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_is_not_exact_says_why_and_differs(name: str) -> None:
    moe, options, reason = INEXACT[name]
    config, dense = _dense()
    plan = plan_upcycle(config, tiny_model_config(moe), UpcycleOptions(**options))
    assert len(plan.reasons) == 1 and reason in plan.reasons[0]
    model = _upcycled(dense, moe, UpcycleOptions(**options))
    assert not logit_difference(dense, model, [make_batch(2, 8)]).is_preserved


def test_the_scale_of_raw_scores_is_right_where_all_experts_score_alike() -> None:
    _, dense = _dense()
    for score in ("softmax", "sigmoid"):
        router = {"kind": "top_k", "top_k": 4, "normalize": False, "score": score}
        model = _upcycled(dense, {"d_ff": 12, "router": router}, UpcycleOptions(router_std=0.0))
        assert logit_difference(dense, model, [make_batch(2, 8)]).largest < 1e-12


def _expert(model: GPT, layer: int, expert: int) -> HiddenUnits:
    return HiddenUnits.of_expert(model.moe_layers()[layer].experts, expert)


def test_a_slice_is_a_range_of_hidden_units_and_its_router_rows_repeat() -> None:
    _, dense = _dense()
    model = _upcycled(dense, {"d_ff": 6, "num_experts": 8, "router": {"kind": "top_k", "top_k": 4}}, UpcycleOptions())
    w_in = dense.get_parameter("blocks.0.ffn.w_in.weight")
    for e in (1, 5):
        torch.testing.assert_close(_expert(model, 0, e).w_in, torch.cat([w_in[6:12], w_in[30:36]]), rtol=0, atol=0)
    gate = model.get_parameter("blocks.0.ffn.router.gate.weight")
    assert gate[:4].unique(dim=0).shape[0] == gate[4:].unique(dim=0).shape[0] == 1 and (gate[0] != gate[4]).all()


def test_each_expert_replaces_its_own_units_with_the_statistics_of_the_old_ones() -> None:
    _, dense = _dense(d_ff=600)
    model = _upcycled(dense, {"d_ff": 600}, UpcycleOptions(drop_fraction=0.25), d_ff=600)
    old = HiddenUnits.of_layer(dense.blocks[0].ffn)  # type: ignore[arg-type]
    replaced = [(_expert(model, 0, e).w_out != old.w_out).any(0) for e in range(4)]
    for e, units in enumerate(replaced):
        assert int(units.sum()) == 150
        new, chosen = _expert(model, 0, e), units.nonzero()[:, 0]
        rows = torch.cat([chosen, chosen + 600])
        assert torch.equal((new.w_in != old.w_in).any(1).nonzero()[:, 0], rows)
        for mine, theirs in ((new.w_in[rows], old.w_in[rows]), (new.w_out[:, chosen], old.w_out[:, chosen])):
            assert abs(float(mine.std() / theirs.std()) - 1) < 0.1
    assert not torch.equal(replaced[0], replaced[1])


def test_noise_and_new_units_depend_on_the_seed_and_the_expert_only() -> None:
    _, dense = _dense()
    options = UpcycleOptions(noise=0.1, drop_fraction=0.5)
    few = _upcycled(dense, {"d_ff": 24, "num_experts": 2}, options)
    many = _upcycled(dense, {"d_ff": 24, "num_experts": 4}, options)
    other = _upcycled(dense, {"d_ff": 24, "num_experts": 4}, options, seed=1)
    for e in range(2):
        torch.testing.assert_close(_expert(few, 1, e).w_in, _expert(many, 1, e).w_in, rtol=0, atol=0)
        assert not torch.equal(_expert(other, 1, e).w_in, _expert(many, 1, e).w_in)
    noise = _expert(_upcycled(dense, {"d_ff": 24}, UpcycleOptions(noise=0.1)), 0, 0)
    old = HiddenUnits.of_layer(dense.blocks[0].ffn)  # type: ignore[arg-type]
    assert abs(float((noise.w_in - old.w_in).std() / old.w_in.std()) - 0.1) < 0.01
