"""The engine: clipping, skipping, decay by role, bias updates, evaluation."""

import math

import pytest
import torch

from tests.builders import make_batch, make_engine, make_model, rows_of, tiny_model_config
from trainer.engine.native import NativeEngine
from trainer.engine.numerics import NumericsConfig
from trainer.moe.routing import RoutingOptions
from trainer.optim.registry import AdamWConfig


def _weights(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: part.tensor.clone() for name, part in engine.state().slices.items()}


def test_the_gradient_norm_is_that_of_plain_autograd() -> None:
    config = tiny_model_config({"balance": {"coef": 0.0}, "z_loss_coef": 0.0})
    batch = make_batch(4, 8, ragged=True)
    model = make_model(config, dtype=torch.float64)
    (model(batch).loss_sum / batch.target_mask.sum()).backward()
    by_hand = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    engine = make_engine(config, dtype=torch.float64)
    pieces = [rows_of(batch, 0, 1), rows_of(batch, 1, 4)]
    assert engine.train_step(pieces, lr=0.0).grad_norm == pytest.approx(by_hand, rel=1e-12)


def test_the_loss_is_per_target_and_what_routers_lose_is_per_valid_token() -> None:
    moe = {"balance": {"coef": 0.0, "scope": "sequence"}, "router": {"kind": "top_p", "sparsity_coef": 0.3}}
    engine = make_engine(tiny_model_config({**moe, "z_loss_coef": 0.2}), dtype=torch.float64)
    batch = make_batch(4, 8, seed=1, ragged=True)
    num_targets, num_valid = int(batch.target_mask.sum()), int(batch.valid.sum())
    assert num_targets < num_valid < batch.valid.numel()
    output = engine.model(batch, RoutingOptions(return_router_outputs=True))
    valid, z, sparsity = batch.valid.flatten(), [], []
    for stats in output.moe:
        assert stats.routed is not None and stats.routed.logits is not None and stats.routed.probs is not None
        z.append(stats.routed.logits[valid].detach().exp().sum(1).log().square().sum())
        sparsity.append(0.3 * torch.special.entr(stats.routed.probs[valid].detach()).sum())
    step = engine.accumulate([rows_of(batch, 0, 3), rows_of(batch, 3, 4)])
    result = engine.apply(step, lr=0.0)
    assert result.loss == pytest.approx(float(output.loss_sum.detach()) / num_targets, rel=1e-12)
    assert result.z_loss == pytest.approx(float(sum(z)) / (2 * num_valid), rel=1e-12), "a mean over two layers as well"
    assert result.z_loss is not None and result.extra_losses["router"] == pytest.approx(
        float(sum(sparsity)) / (2 * num_valid), rel=1e-12
    )
    assert float(step.total.objective) == pytest.approx(
        result.loss + 0.2 * result.z_loss + result.extra_losses["router"], rel=1e-12
    )
    assert result.num_tokens == num_valid


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_clipping_scales_the_whole_gradient_once(clip: float) -> None:
    """With betas of 0 the first moment is the gradient that the optimizer received."""
    config = tiny_model_config()
    model = make_model(config, dtype=torch.float64)
    numerics = NumericsConfig(seed=0, dtype=torch.float64, grad_clip=clip)
    engine = NativeEngine(model, AdamWConfig(betas=(0.0, 0.95)), numerics)
    norm = engine.train_step([make_batch(4, 8)], lr=0.0).grad_norm
    moments = [t for name, t in _weights(engine).items() if name.startswith("optim.exp_avg.")]
    seen = math.sqrt(sum(float(m.square().sum()) for m in moments))
    assert seen == pytest.approx(min(norm, clip), rel=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_changes_nothing(poison: float) -> None:
    config = tiny_model_config({"router": {"kind": "bias_balanced"}, "balance": {"counts": "previous_step"}})
    engine = make_engine(config)
    engine.train_step([make_batch(4, 8)], lr=1e-2)
    before = _weights(engine)
    weight = engine.model.moe_layers()[0].experts.w_in
    good = weight.detach().clone()
    weight.data[1] = poison
    result = engine.train_step([make_batch(4, 8, seed=1)], lr=1e-2)
    weight.data.copy_(good)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert result.not_finite is not None and result.not_finite.endswith("(loss not finite)")
    assert all(torch.equal(before[name], now) for name, now in _weights(engine).items())
    assert engine.state().values["optimizer_steps"] == 1
    assert not engine.train_step([make_batch(4, 8, seed=1)], lr=1e-2).skipped


def test_a_skipped_step_leaves_the_run_as_if_it_had_not_been() -> None:
    a, b = make_engine(tiny_model_config()), make_engine(tiny_model_config())
    head = a.model.get_parameter("head.weight")
    good = head.detach().clone()
    head.data[0, 0] = float("nan")
    assert a.train_step([make_batch(4, 8)], lr=1e-2).skipped
    head.data.copy_(good)
    for engine in (a, b):
        engine.train_step([make_batch(4, 8, seed=2)], lr=1e-2)
    assert all(torch.equal(x, y) for x, y in zip(_weights(a).values(), _weights(b).values(), strict=True))


def test_a_loss_over_the_limit_skips_the_step_and_changes_nothing() -> None:
    engine = make_engine(tiny_model_config({"router": {"kind": "bias_balanced"}}))
    loss = engine.train_step([make_batch(4, 8)], lr=0.0).loss
    before = _weights(engine)
    result = engine.train_step([make_batch(4, 8)], lr=1e-2, skip_above=loss - 1e-3)
    assert result.skipped and result.not_finite is None and math.isfinite(result.grad_norm)
    assert all(torch.equal(before[name], now) for name, now in _weights(engine).items())
    assert not engine.train_step([make_batch(4, 8)], lr=1e-2, skip_above=loss + 1.0).skipped


def test_what_is_added_to_the_loss_must_be_finite_too() -> None:
    """The square of huge logits is infinite in float32, but its gradient times a tiny coefficient is not."""
    engine = make_engine(tiny_model_config({"z_loss_coef": 1e-25}, num_layers=1))
    engine.model.moe_layers()[0].router.get_parameter("gate.weight").data.mul_(1e20)
    result = engine.train_step([make_batch(4, 8)], lr=1e-2)
    assert math.isfinite(result.loss) and math.isfinite(result.grad_norm) and result.z_loss == math.inf
    assert result.skipped
    assert result.not_finite == "the loss is not finite, though the gradient is (loss not finite)"


def test_weight_decay_goes_by_role() -> None:
    """With a negligible gradient, only decayed weights shrink."""
    config = tiny_model_config({"num_shared_experts": 1}, qk_norm=True)
    engine = make_engine(config, weight_decay=0.5, eps=1e6)  # a huge eps makes the update negligible
    before = _weights(engine)
    engine.train_step([make_batch(4, 8)], lr=0.1)
    for name, now in _weights(engine).items():
        if not name.startswith("model."):
            continue
        decays = not ("norm" in name or "embedding" in name)
        expected = before[name] * (0.95 if decays else 1.0)
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_bias_moves_by_gamma_against_the_load_of_the_whole_step() -> None:
    router = {"kind": "bias_balanced", "bias_update_rate": 0.25}
    engine = make_engine(tiny_model_config({"router": router}))
    batch = make_batch(4, 8)
    pieces = [rows_of(batch, i, i + 1) for i in range(4)]
    routing = engine.train_step(pieces, lr=0.0).routing
    assert routing is not None
    for layer, moe in enumerate(engine.model.moe_layers()):
        counts, bias = routing.counts[layer], moe.router.get_buffer("bias")
        sign = torch.sign(counts.double().mean() - counts)
        assert torch.equal(bias, 0.25 * sign.float())
        assert bias.any()


def test_evaluation_changes_nothing_and_knows_no_noise() -> None:
    moe = {"router": {"kind": "bias_balanced", "jitter": 0.5}, "capacity": {"factor": 0.3, "min": 1}}
    engine = make_engine(tiny_model_config(moe))
    batch, before = make_batch(4, 8), _weights(engine)
    free, limited = engine.eval_loss(batch, dropless=True), engine.eval_loss(batch, dropless=False)
    assert free.loss_sum == engine.eval_loss(batch, dropless=True).loss_sum != limited.loss_sum
    assert free.routing is not None and limited.routing is not None
    assert int(free.routing.dropped.sum()) == 0 < int(limited.routing.dropped.sum())
    assert all(torch.equal(before[name], now) for name, now in _weights(engine).items())
    assert free.target_tokens == 32


def test_a_dense_model_trains_too() -> None:
    engine = make_engine(tiny_model_config().model_copy(update={"moe": None}))
    results = [engine.train_step([make_batch(4, 8)], lr=1e-2) for _ in range(5)]
    assert results[-1].loss < results[0].loss
    assert results[0].balance_loss is None and results[0].routing is None


def test_a_router_without_probabilities_has_no_balance_or_z_loss() -> None:
    result = make_engine(tiny_model_config({"router": {"kind": "round_robin"}})).train_step([make_batch(4, 8)], lr=0.0)
    assert result.balance_loss is None and result.z_loss is None
    assert result.routing is not None and result.routing.entropy_sum is None


def test_a_batch_without_a_single_target_is_harmless() -> None:
    batch = make_batch(2, 8)
    batch.valid[:] = False
    result = make_engine(tiny_model_config()).train_step([batch], lr=1e-2)
    assert result.loss == 0 and result.grad_norm == 0 and not result.skipped


def test_bfloat16_keeps_float32_weights_and_learns_about_the_same() -> None:
    a = make_engine(tiny_model_config(), dtype=torch.bfloat16, kernel="fused")
    b = make_engine(tiny_model_config())
    for step in range(10):
        first = a.train_step([make_batch(8, 8, seed=step % 2)], lr=1e-2)
        second = b.train_step([make_batch(8, 8, seed=step % 2)], lr=1e-2)
    assert all(p.dtype is torch.float32 for p in a.model.parameters())
    assert abs(first.loss - second.loss) < 0.05 * second.loss
