"""The parts of your own training loop."""

import copy
from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine, tiny_model_config
from trainer import build_model, load_batches, load_config, training_loss, update_routers
from trainer.errors import ConfigError


@pytest.mark.parametrize("options", [{}, {"null_experts": 2}], ids=["experts only", "null experts"])
def test_update_routers_moves_a_selection_bias_as_the_engine_does(options: dict[str, Any]) -> None:
    config = tiny_model_config(
        {"router": {"kind": "bias_balanced", "top_k": 2, **options}, "balance": {"coef": 0.0}, "z_loss_coef": 0.0}
    )
    engine, batch = make_engine(config, seed=3), make_batch(4, 8)
    model = copy.deepcopy(engine.model)
    result = engine.train_step([batch], lr=0.0)
    loss, stats = training_loss(model, batch, seed=3)
    update_routers(model, stats)
    assert loss.item() == pytest.approx(result.loss, rel=1e-6)
    for moe, expected in zip(model.moe_layers(), engine.model.moe_layers(), strict=True):
        bias = moe.router.get_buffer("bias")
        assert (bias != 0).any() and torch.equal(bias, expected.router.get_buffer("bias"))


def test_update_routers_leaves_other_routers_and_dense_models_alone() -> None:
    routed = tiny_model_config({"router": {"kind": "top_k"}})
    for config in (routed, routed.model_copy(update={"moe": None})):
        model, batch = make_engine(config).model, make_batch(4, 8)
        before = copy.deepcopy(model.state_dict())
        update_routers(model, training_loss(model, batch)[1])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"batch_size": 1.5}, {"first_row": -1}])
def test_batches_of_no_rows_are_refused_when_they_are_requested(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected a whole number of at least"):
        load_batches(load_config("smoke"), **options)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device: cuda:99, but torch sees"):
        build_model(load_config("smoke"), device="cuda:99")
