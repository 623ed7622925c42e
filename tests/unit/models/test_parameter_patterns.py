"""Selection of parameters: roles, patterns of names, exceptions, and what is refused."""

import re
from typing import Any

import pytest
import torch

from tests.builders import latent_attention, tiny_model_config
from trainer.engine.config import TrainConfig
from trainer.errors import ConfigError
from trainer.models.freeze import freeze_parameters, frozen_names, is_frozen
from trainer.models.gpt import GPT

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
