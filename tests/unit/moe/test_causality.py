"""What is said of routers and capacities that look ahead."""

from typing import Any

import pytest

from tests.builders import make_model, tiny_model_config
from trainer.moe.causality import evaluation_warning, training_warning


def _said(moe: dict[str, Any]) -> tuple[str | None, str | None]:
    config = tiny_model_config(moe)
    layers = make_model(config).moe_layers()
    assert config.moe is not None
    return training_warning(config.moe, layers), evaluation_warning(layers)


@pytest.mark.parametrize("kind", ["top_k", "bias_balanced", "hash", "top_p", "dense"])
def test_nothing_is_said_of_routers_that_do_not(kind: str) -> None:
    assert _said({"router": {"kind": kind}}) == (None, None)
    assert _said({"capacity": {"factor": 1.0}}) == (None, None)
    assert _said({"capacity": {"policy": "random"}}) == (None, None), "nothing is dropped"


@pytest.mark.parametrize("kind", ["expert_choice", "sinkhorn", "base", "linear_program", "greedy"])
def test_training_one_that_does_warns(kind: str) -> None:
    training, evaluation = _said({"router": {"kind": kind}})
    assert training is not None and f"{kind} chooses a token's experts by later tokens of its row" in training
    assert evaluation is None, "each token chooses for itself then"
    _, evaluation = _said({"router": {"kind": kind, "evaluation": "same"}})
    assert evaluation is not None and "seen some of what it predicts" in evaluation


@pytest.mark.parametrize("policy", ["choice_major", "probability", "random"])
def test_a_capacity_that_later_tokens_fill_warns(policy: str) -> None:
    training, evaluation = _said({"capacity": {"factor": 1.0, "policy": policy}})
    assert training is not None and f"with policy: {policy}" in training and "later tokens" in training
    assert evaluation is None
    training, _ = _said({"capacity": {"factor": 1.0, "scope": "rank"}})
    assert training is not None and "tokens of other rows" in training
