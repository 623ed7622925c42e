"""Warnings about routers and capacity policies that are not causal."""

from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_model, tiny_model_config
from tests.registries import ROUTERS, num_experts_of
from trainer.models.gpt import GPT
from trainer.moe.capacity import capacity_causality
from trainer.moe.causality import evaluation_warning, training_warning
from trainer.moe.layer_options import CapacityConfig


def _said(moe: dict[str, Any]) -> tuple[str | None, str | None]:
    config = tiny_model_config(moe)
    layers = make_model(config).moe_layers()
    assert config.moe is not None
    return training_warning(config.moe, layers), evaluation_warning(layers)


CAUSAL = {
    kind: router().build(d_model=4, num_experts=num_experts_of(kind), layer=0).causal == "strict"
    for kind, router in ROUTERS.items()
}


@pytest.mark.parametrize("kind", [kind for kind, is_causal in CAUSAL.items() if is_causal])
def test_nothing_is_said_of_routers_that_do_not(kind: str) -> None:
    assert _said({"num_experts": num_experts_of(kind), "router": {"kind": kind}}) == (None, None)
    assert _said({"capacity": {"factor": 1.0}}) == (None, None)
    assert _said({"capacity": {"policy": "random"}}) == (None, None), "nothing is dropped"


@pytest.mark.parametrize("kind", [kind for kind, is_causal in CAUSAL.items() if not is_causal])
def test_training_one_that_does_warns(kind: str) -> None:
    training, evaluation = _said({"num_experts": num_experts_of(kind), "router": {"kind": kind}})
    assert (
        training is not None
        and f"{kind} is not causal: a token's experts depend on later tokens of its sequence" in training
    )
    assert evaluation is None, "each token chooses for itself then"
    _, evaluation = _said(
        {"num_experts": num_experts_of(kind), "router": {"kind": kind, "evaluation_routing": "as_trained"}}
    )
    assert evaluation is not None and "sees some of what it predicts" in evaluation
    training, _ = _said(
        {"num_experts": num_experts_of(kind), "router": {"kind": kind, "evaluation_routing": "as_trained"}}
    )
    assert training is not None and "go by the loss on held-out text" not in training


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        ({}, "strict"),
        ({"factor": 1.0}, "strict"),
        ({"factor": 1.0, "policy": "random"}, "strict"),  # by position in evaluation
        ({"factor": 1.0, "policy": "probability"}, "within_sequence"),
        ({"factor": 1.0, "policy": "choice_major"}, "within_sequence"),
        ({"factor": 1.0, "scope": "rank"}, "no"),
    ],
    ids=str,
)
def test_what_a_capacity_lets_a_token_know_in_evaluation(capacity: dict[str, Any], expected: str) -> None:
    config = CapacityConfig.model_validate({"min": 1, **capacity})
    assert capacity_causality(config, is_training=False) == expected
    leaks = crosses = False
    model = make_model(tiny_model_config({"capacity": config.model_dump()}), dtype=torch.float64)
    for seed in range(8):
        before = _logits(model, seed, None)
        for column in (3, 7):
            after = _logits(model, seed, column)
            leaks |= bool((after[0, :column] - before[0, :column]).abs().max() > 1e-9)
            crosses |= bool((after[1] - before[1]).abs().max() > 1e-9)
    assert (leaks, crosses) == (expected == "within_sequence", expected == "no")


def _logits(model: GPT, seed: int, changed_from: int | None) -> torch.Tensor:
    """Logits of two rows at capacity, with other tokens in the first row from a column on."""
    batch = make_batch(2, 8, seed=seed)
    if changed_from is not None:
        batch.tokens[0, changed_from:] = (batch.tokens[0, changed_from:] + 5) % 32
    with torch.no_grad():
        output = model(batch, want_logits=True)
    assert output.logits is not None
    return output.logits


@pytest.mark.parametrize("policy", ["choice_major", "probability", "random"])
def test_a_capacity_that_later_tokens_fill_warns(policy: str) -> None:
    training, evaluation = _said({"capacity": {"factor": 1.0, "policy": policy}})
    assert training is not None and f"policy: {policy} is not causal" in training and "later tokens" in training
    assert evaluation is None
    training, _ = _said({"capacity": {"factor": 1.0, "scope": "rank"}})
    assert training is not None and "tokens of other sequences" in training
