"""Law: noise differs by layer, row, position and run, and evaluation has none."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_batch, make_engine, make_model, tiny_model_config
from tests.laws.test_router_oracles import VARIANTS
from tests.registries import ROUTERS, num_experts_of
from trainer.data.batches.batch import Batch
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.models.routing_context import routing_context
from trainer.moe.layer import MoE
from trainer.moe.routers.config.options import NonCausalOptions
from trainer.moe.routing import RouterOutput, RoutingOptions

NUM_ROWS, SEQ_LEN = 4, 8
JITTERED = [kind for kind, router in ROUTERS.items() if "jitter" in router.model_fields]
NOISE: dict[str, dict[str, Any]] = {
    **{f"jitter of {kind}": {"router": {"kind": kind, "jitter": 0.4}} for kind in JITTERED},
    "noisy_top_k": {"router": {"kind": "noisy_top_k"}},
    "second expert of gshard": {"router": {"kind": "gshard"}},
    "random": {"router": {"kind": "random"}},
    "capacity at random": {"capacity": {"factor": 0.5, "min": 1, "policy": "random"}},
}
"""Each kind of noise alone."""


def _config(moe: dict[str, Any]) -> ModelConfig:
    num_experts = num_experts_of(moe.get("router", {}).get("kind", "top_k"))
    return tiny_model_config({"num_experts": num_experts, **moe})


def _model(moe: dict[str, Any]) -> GPT:
    return make_model(_config(moe), dtype=torch.float64)


def _same_text_in_every_row() -> Batch:
    batch = make_batch(NUM_ROWS, SEQ_LEN, first_sample=70)
    for part in (batch.tokens, batch.targets):
        part[:] = part[0].clone()
    return batch


def _logits(model: GPT, batch: Batch, seed: int | None) -> Tensor:
    """(B, S, V)."""
    logits = model(batch, RoutingOptions(noise_seed=seed), want_logits=True).logits
    assert logits is not None
    return logits


def _differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) > 1e-6


# --- layers -----------------------------------------------------------------------------------------------------------


def _drawn(name: str, layer: MoE, x: Tensor, seed: int | None) -> Tensor:
    """A value that depends on one kind of noise only."""
    context = routing_context(_same_text_in_every_row(), RoutingOptions(noise_seed=seed))
    if name == "capacity at random":
        return (layer(x, context)[0] == 0).double()  # dropped tokens
    output: RouterOutput = layer.router(x.flatten(0, 1), context)
    if name.startswith("jitter"):
        assert output.logits is not None
        return output.logits  # of noisy_top_k, those without its noise
    if name == "noisy_top_k":
        assert output.probs is not None
        return output.probs
    return torch.stack([output.decision.expert_index, output.decision.kept]).double()


@pytest.mark.parametrize("name", NOISE)
def test_layers_that_are_equal_draw_different_noise(name: str) -> None:
    model = _model(NOISE[name])
    one, other = model.moe_layers()
    other.load_state_dict(one.state_dict())
    x = torch.randn(NUM_ROWS, SEQ_LEN, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert _differ(_drawn(name, one, x, seed=3), _drawn(name, other, x, seed=3))
    assert _differ(_drawn(name, one, x, seed=3), _drawn(name, one, x, seed=None)), "there is noise"
    if name != "random":  # is random in evaluation as well
        assert not _differ(_drawn(name, one, x, seed=None), _drawn(name, other, x, seed=None)), "nothing else differs"


@pytest.mark.parametrize("kind", ["hash", "random"])
def test_layers_send_a_token_to_different_experts_in_evaluation_too(kind: str) -> None:
    model, batch = _model({"router": {"kind": kind}}), make_batch(NUM_ROWS, SEQ_LEN)
    one, other = (stats.counts for stats in model(batch).moe)
    assert not torch.equal(one, other)


# --- rows, positions, seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISE)
def test_equal_rows_draw_different_noise_wherever_they_stand(name: str) -> None:
    model, batch = _model(NOISE[name]), _same_text_in_every_row()
    logits = _logits(model, batch, seed=3)
    for row in range(1, NUM_ROWS):
        assert _differ(logits[row], logits[0])
        assert not _differ(*_logits(model, batch, seed=None)[[row, 0]])
    order = torch.tensor([2, 0, 3, 1])
    moved = Batch(**{field: tensor[order] for field, tensor in batch.tensors().items()})
    torch.testing.assert_close(_logits(model, moved, seed=3), logits[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NOISE)
def test_equal_tokens_of_a_row_draw_different_noise(name: str) -> None:
    model, batch = _model(NOISE[name]), make_batch(1, SEQ_LEN)
    batch.tokens[:] = 5  # attention over equal values is that value: positions differ in noise only
    logits = _logits(model, batch, seed=3)[0]
    assert len({tuple(token.round(decimals=6).tolist()) for token in logits}) > SEQ_LEN // 2
    if name not in ("capacity at random", "random"):  # which depend on the position even without noise
        assert not _differ(*(_logits(model, batch, seed=None)[0][i] for i in (0, -1)))


@pytest.mark.parametrize("name", NOISE)
def test_a_step_of_training_draws_by_the_seed_of_the_run(name: str) -> None:
    batch, losses = make_batch(NUM_ROWS, SEQ_LEN), []
    for seed in (3, 4):
        engine = make_engine(_config(NOISE[name]), dtype=torch.float64)
        engine.numerics = replace(engine.numerics, seed=seed)  # of the noise only, not of the weights
        loss = float(engine.accumulate([batch]).total.loss)
        expected = engine.model(batch, RoutingOptions(noise_seed=seed)).loss_sum.detach() / batch.target_mask.sum()
        assert loss == pytest.approx(float(expected), abs=1e-12)
        losses.append(loss)
    assert abs(losses[0] - losses[1]) > 1e-9


# --- evaluation -------------------------------------------------------------------------------------------------------


def _trains_otherwise(config: Any) -> bool:
    """Whether a router routes differently in training, by its config."""
    drawn = config.kind in ("noisy_top_k", "random") or getattr(config, "jitter", 0) > 0
    looks_ahead = isinstance(config, NonCausalOptions) and config.evaluation_routing == "top_k"
    return drawn or getattr(config, "random_second", False) or looks_ahead


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("router", VARIANTS, ids=str)
def test_evaluation_is_a_pass_of_the_model_without_noise(router: dict[str, Any], top_k: int | None) -> None:
    """For every router, with or without noise or joint routing."""
    engine = make_engine(_config({"router": router}), dtype=torch.float64)
    config, batch = engine.model.config.moe, make_batch(NUM_ROWS, SEQ_LEN, ragged=True)
    assert config is not None
    if top_k is not None and "top_k" not in type(config.router).model_fields:
        return  # the router has no k
    evaluated = engine.eval_loss(batch, dropless=True, top_k=top_k)
    plain = engine.model(batch, RoutingOptions(dropless=True, top_k=top_k))
    assert evaluated.loss_sum == float(plain.loss_sum.detach())
    assert evaluated.target_tokens == int(batch.target_mask.sum())
    in_training = engine.model(batch, RoutingOptions(noise_seed=0, dropless=True, top_k=top_k))
    differs = abs(float((in_training.loss_sum - plain.loss_sum).detach())) > 1e-9
    if top_k is None:
        assert differs == _trains_otherwise(config.router), "the control: with noise the loss would be another one"


@pytest.mark.parametrize("policy", ["position", "choice_major", "probability", "random"])
def test_evaluation_at_capacity_is_a_pass_of_the_model_without_noise(policy: str) -> None:
    limit = {"factor": 0.5, "min": 1, "policy": policy}
    engine = make_engine(_config({"capacity": limit}), dtype=torch.float64)
    batch = make_batch(NUM_ROWS, SEQ_LEN)
    evaluated, plain = engine.eval_loss(batch, dropless=False), engine.model(batch)
    assert evaluated.loss_sum == float(plain.loss_sum.detach())
    assert evaluated.routing is not None and int(evaluated.routing.dropped.sum()) > 0
    differs = _differ(engine.model(batch, RoutingOptions(noise_seed=0)).loss_sum, plain.loss_sum)
    assert differs == (policy == "random")
