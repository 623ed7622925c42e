"""Selection of parameters: roles, patterns of names, exceptions, and what is refused."""

import re
from typing import Any

import pytest
import torch

from tests.builders import latent_attention, tiny_model_config
from trainer.engine.config import TrainConfig
from trainer.errors import ConfigError
from trainer.models.freeze import (
    check_rate_factors,
    freeze_parameters,
    frozen_names,
    frozen_router_warning,
    is_frozen,
    rate_factors,
)
from trainer.models.gpt import GPT
from trainer.models.parameter_patterns import in_fewer_layers

MOE = {"num_shared_experts": 1, "shared_gate": True, "first_dense_layers": 1, "expert_bias": True}
ROLES = {
    "embedding": ["embedding.weight"],
    "head": ["head.weight"],
    "norms": ["norm.weight", "blocks.0.ffn_norm.weight", "blocks.1.attention.q_norm.weight"],
    "attention": ["blocks.0.attention.qkv.weight", "blocks.1.attention.q_norm.weight"],
    "router": ["blocks.1.ffn.router.gate.weight"],
    "experts": ["blocks.1.ffn.experts.w_in", "blocks.1.ffn.experts.w_out_bias"],
    "shared": ["blocks.1.ffn.shared.w_in.weight", "blocks.1.ffn.shared.gate.weight"],
    "dense": ["blocks.0.ffn.w_in.weight", "blocks.0.ffn.w_out.weight"],
}


def _model(*, is_dense: bool = False, **fields: Any) -> GPT:
    config = tiny_model_config(MOE, **fields)
    with torch.device("meta"):
        return GPT(config.model_copy(update={"moe": None}) if is_dense else config, 32)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_selects_its_weights_and_no_others(role: str) -> None:
    found = frozen_names(_model(qk_norm=True), [role])
    assert set(ROLES[role]) <= set(found)
    others = {name for other, names in ROLES.items() if other != role for name in names} - set(ROLES[role])
    assert not others & set(found)


@pytest.mark.parametrize("fields", [{"qk_norm": True}, latent_attention(biases=True)], ids=["heads", "latent"])
def test_every_weight_has_a_role(fields: dict[str, Any]) -> None:
    model = _model(**fields)
    roles = [role for role in ROLES if role != "head"]
    assert frozen_names(model, roles) == [name for name, _ in model.named_parameters() if name != "head.weight"]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["blocks.1.ffn.experts.w_in"], ["blocks.1.ffn.experts.w_in"]),
        (["*.router.*"], ["blocks.1.ffn.router.gate.weight"]),
        (["blocks.*.ffn.router"], ["blocks.1.ffn.router.gate.weight"]),
        (["blocks.0.attention.q*"], ["blocks.0.attention.qkv.weight"]),
        (["blocks.[1-9].ffn.shared.w_*"], ["blocks.1.ffn.shared.w_in.weight", "blocks.1.ffn.shared.w_out.weight"]),
        (["norm.weight", "*.ffn", "!experts", "!shared", "!dense"], ["blocks.1.ffn.router.gate.weight", "norm.weight"]),
        ([], []),
    ],
)
def test_patterns_name_weights_or_modules_and_exceptions_come_last(entries: list[str], expected: list[str]) -> None:
    assert frozen_names(_model(), entries) == expected
    assert frozen_names(_model(), entries[::-1]) == expected, "whatever the order"


def test_frozen_weights_have_no_gradient() -> None:
    model = _model()
    freeze_parameters(model, frozen_names(model, ["router", "blocks.0"]))
    layer = model.moe_layers()[0]
    assert is_frozen(layer.router) and is_frozen(model.blocks[0]) and not is_frozen(layer)
    assert not is_frozen(torch.nn.Identity()), "without weights there is nothing to freeze"


@pytest.mark.parametrize(
    ("fields", "entries", "message"),
    [
        ({}, ["blocks.7.*"], "train.freeze: blocks.7.* matches no weight of this model; its weights are embedding."),
        ({"is_dense": True}, ["router"], "train.freeze: router matches no weight"),
        ({}, ["*", "!blocks.2"], "train.freeze: !blocks.2 matches no weight"),
        ({}, ["*"], "train.freeze: every weight of the model is frozen, so nothing learns; add an exception, such as"),
        ({"tie_embeddings": True}, ["embedding"], "train.freeze: selects embedding.weight alone, which is embedding"),
        ({"tie_embeddings": True}, ["head"], "train.freeze: selects head.weight alone, which is embedding and head at"),
        ({"tie_embeddings": True}, ["*", "!head"], "train.freeze: selects embedding.weight alone"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields: dict[str, Any], entries: list[str], message: str) -> None:
    model = _model(**fields)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        frozen_names(model, entries)


def test_a_tied_embedding_is_frozen_with_the_head() -> None:
    assert frozen_names(_model(tie_embeddings=True), ["embedding", "head"]) == ["embedding.weight"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["routers"], "freeze.0: routers is not a role of weights; did you mean router?"),
        (["embedding", "expert"], "freeze.1: expert is not a role of weights; did you mean experts?"),
        (["!atention"], "freeze.0: atention is not a role of weights; did you mean attention?"),
        (["wte"], "freeze.0: wte is not a role of weights; use one of embedding, head, norms"),
        (["!router"], "freeze: there are exceptions only, so nothing is frozen"),
    ],
)
def test_a_word_that_is_no_role_is_refused_with_the_config(entries: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(freeze=entries)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("blocks.7.attention.*", "blocks.1.attention.*"),
        ("!blocks.3", "!blocks.0"),
        ("blocks.[4-7].*", "blocks.1.*"),
        ("blocks.1.*", "blocks.1.*"),
        ("blocks.*.ffn", "blocks.*.ffn"),
        ("router", "router"),
        ("*.router.*", "*.router.*"),
    ],
)
def test_entries_of_layers_that_are_gone_select_layers_at_the_same_height(entry: str, expected: str) -> None:
    assert in_fewer_layers(entry, before=8, after=2) == expected


def _factors(model: GPT, factors: dict[str, float], freeze: list[str] | None = None) -> dict[str, float]:
    freeze_parameters(model, frozen_names(model, freeze or []))
    check_rate_factors(model, factors)
    return rate_factors(model, factors)


def test_a_weight_that_several_entries_match_has_the_product_of_their_factors() -> None:
    found = _factors(_model(qk_norm=True), {"norms": 0.5, "attention": 4.0, "blocks.1": 0.1, "*": 3.0}, ["router"])
    assert found["blocks.1.attention.q_norm.weight"] == pytest.approx(0.6)
    assert found["blocks.0.attention_norm.weight"] == 1.5 and found["embedding.weight"] == 3.0
    assert "blocks.1.ffn.router.gate.weight" not in found, "it does not learn"


def test_without_factors_every_rate_is_the_schedule_s() -> None:
    assert set(_factors(_model(), {}).values()) == {1.0}


@pytest.mark.parametrize(
    ("fields", "factors", "message"),
    [
        ({}, {"blocks.5": 2.0}, "train.lr_scale: blocks.5 matches no weight of this model"),
        ({}, {"router": 2.0}, "train.lr_scale: router matches only weights that train.freeze freezes; make it 1"),
        (
            {"tie_embeddings": True},
            {"head": 0.5},
            "train.lr_scale: embedding.weight has 1 and head.weight 0.5, and both are one weight: embedding and",
        ),
    ],
)
def test_factors_that_do_not_fit_the_model_are_refused(fields: Any, factors: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        _factors(_model(**fields), factors, ["router"])
    assert _factors(_model(), {"router": 1.0}, ["router"]), "a factor of 1 takes back one of another file"


def test_a_tied_embedding_has_one_factor() -> None:
    for both in ({"embedding": 0.5, "head": 0.5}, {"*": 0.5}):
        assert _factors(_model(tie_embeddings=True), both)["embedding.weight"] == 0.5


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"router": 0.0}, "lr_scale: router is 0; use a factor above 0, or list it in train.freeze"),
        ({"heads": 2.0}, "lr_scale: heads is not a role of weights; did you mean head?"),
        ({"!head": 2.0}, "lr_scale: '!head' is not a pattern of names; use at most 200 letters"),
        ({"a b": 2.0}, "lr_scale: 'a b' is not a pattern of names"),
    ],
)
def test_factors_are_checked_with_the_config(factors: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(lr_scale=factors)


def _warning(freeze: list[str], **balance: Any) -> str | None:
    with torch.device("meta"):
        model = GPT(tiny_model_config({"first_dense_layers": 1, **balance}), 32)
    freeze_parameters(model, frozen_names(model, freeze))
    return frozen_router_warning(model)


def test_a_loss_for_frozen_routers_is_warned_about() -> None:
    beginning = "train.freeze: every router is frozen, and the gradient of balance_loss and z_loss"
    assert _warning(["attention"]) is None
    assert _warning(["router"], balance={"coef": 0.0}, z_loss_coef=0.0) is None
    for freeze, does in (
        (["router"], "changes the weights below them instead"),
        (["*", "!blocks.1.ffn_norm"], "changes the weights below them instead"),
        (["*", "!blocks.1.ffn.experts", "!head"], "reaches nothing that learns"),
    ):
        found = _warning(freeze, balance={"coef": 0.1})
        assert found is not None and found.startswith(f"{beginning} {does}; set the coefficients to 0 in "), found
