"""Law: published models are expressible: their config.json gives a model of the size that they have."""

from decimal import Decimal
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests import published_models
from tests.published_dense_models import PUBLISHED_DENSE
from tests.published_models import PublishedModel
from trainer.families.expressible import inexpressible
from trainer.families.link import coverage_problems
from trainer.families.registry import family_of
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import parameter_role

PUBLISHED = published_models.PUBLISHED | PUBLISHED_DENSE


def _config(published: PublishedModel) -> ModelConfig:
    return ModelConfig.model_validate(family_of(published.config).from_hf(published.config))


def _ours(config: ModelConfig) -> GPT:
    assert config.vocab_size is not None
    with torch.device("meta"):
        return GPT(config, config.vocab_size)


def _theirs(published: PublishedModel) -> nn.Module:
    config: Any = cast(Any, CONFIG_MAPPING)[published.config["model_type"]].from_dict(published.config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _buffers(model: nn.Module) -> int:
    """Values of routers' selection biases; rotary tables are no part of a checkpoint."""
    return sum(buffer.numel() for name, buffer in model.named_buffers() if not name.endswith("inv_freq"))


def test_all_of_them_are_expressible() -> None:
    assert len(PUBLISHED) == 11
    for published in PUBLISHED.values():
        assert inexpressible(family_of(published.config), _config(published)) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_as_many_parameters_as_theirs_and_as_published(name: str) -> None:
    published = PUBLISHED[name]
    ours, theirs = _ours(_config(published)), _theirs(published)
    assert _parameters(ours) == _parameters(theirs) == published.parameters
    assert _buffers(ours) == _buffers(theirs)
    billions = Decimal(published.parameters) / 10**9
    assert billions.quantize(Decimal(published.stated), rounding=published.rounding) == Decimal(published.stated)


@pytest.mark.parametrize("name", PUBLISHED)
def test_so_does_the_config_without_a_model(name: str) -> None:
    published = PUBLISHED[name]
    config = _config(published)
    num_experts = 0 if config.moe is None else config.moe.num_experts
    counted = config.weights(vocab_size=1)
    routers = sum(p.numel() for key, p in _ours(config).named_parameters() if parameter_role(key) == "router")
    assert counted.dense + num_experts * counted.expert + routers == published.parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_theirs_has_its_place_in_ours(name: str) -> None:
    published = PUBLISHED[name]
    config = _config(published)
    ours = _ours(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in [*ours.named_parameters(), *ours.named_buffers()]}
    assert config.vocab_size is not None
    links = list(family_of(published.config).links(config, config.vocab_size))
    assert list(coverage_problems(links, shapes)) == []
    assert sum(link.num_elements for link in links) == published.parameters + _buffers(ours)
