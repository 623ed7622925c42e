"""Law: importance, load, device balance, diversity, null experts' balance and the z-losses equal their formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_batch, make_context, make_engine, make_model, moe_config, rows_of, tiny_model_config
from tests.laws.test_router_oracles import NUM_ROWS, SEQ_LEN, make_layer, make_tokens
from trainer.models.block import build_moe
from trainer.moe.balance import balance_loss, cv_squared, cv_squared_loss, device_balance_loss
from trainer.moe.expert_similarity import ExpertOutputs
from trainer.moe.layer import MoE
from trainer.moe.losses import Denominators, objective
from trainer.moe.routing import RoutingDecision
from trainer.moe.stats import MoEStats
from trainer.parallel.config import ParallelConfig

TOLERANCE = 1e-10


def _run(router: dict[str, Any]) -> tuple[MoE, Tensor, list[int], MoEStats, Tensor]:
    """A layer with all statistics on; its input, valid tokens, statistics and output."""
    layer, (x, context) = make_layer(router), make_tokens(is_training=True)
    layer.needs_importance = layer.needs_expert_similarity = True
    y, stats = layer(x, context)
    return layer, x, context.valid.nonzero().flatten().tolist(), stats, y


def _same(mine: Tensor, oracle: Tensor, layer: MoE, x: Tensor) -> None:
    torch.testing.assert_close(mine, oracle, rtol=0, atol=TOLERANCE)
    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(v.sum(), inputs, allow_unused=True, retain_graph=True) for v in (mine, oracle)]
    for ours, theirs, of in zip(*gradients, inputs, strict=True):
        zero = torch.zeros_like(of)
        torch.testing.assert_close(
            zero if ours is None else ours, zero if theirs is None else theirs, rtol=0, atol=TOLERANCE
        )


def _cv_squared(sums: list[Tensor]) -> Tensor:
    mean = sum(sums, torch.zeros(())) / len(sums)
    return sum(((s - mean) ** 2 for s in sums), torch.zeros(())) / len(sums) / mean**2


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize("kind", ["top_k", "noisy_top_k", "top_p"])
def test_importance_is_the_variation_of_summed_weights(kind: str, scope: Any) -> None:
    layer, x, valid, stats, _ = _run({"kind": kind})
    decision = layer.router(x.flatten(0, 1), make_tokens(is_training=True)[1]).decision
    sequences = [[t for t in valid if t // SEQ_LEN == row] for row in range(NUM_ROWS)]
    oracle = torch.zeros(())
    for tokens in [valid] if scope == "global_batch" else [tokens for tokens in sequences if tokens]:
        sums = [torch.zeros(()) for _ in range(4)]
        for t, e, weight in zip(decision.token_index, decision.expert_index, decision.combine_weight, strict=True):
            if int(t) in tokens:
                sums[int(e)] = sums[int(e)] + weight
        oracle = oracle + len(tokens) * _cv_squared(sums)
    assert stats.importance is not None
    mine = cv_squared_loss(stats.importance, stats.tokens, scope=scope, step_sums=None, routed_tokens=len(valid))
    _same(mine, oracle, layer, x)


def test_load_is_the_variation_of_summed_chances() -> None:
    layer, x, valid, stats, _ = _run({"kind": "noisy_top_k"})
    load = layer.router(x.flatten(0, 1), make_tokens(is_training=True)[1]).load
    oracle = len(valid) * _cv_squared([sum((load[t, e] for t in valid), torch.zeros(())) for e in range(4)])
    assert stats.load is not None
    mine = cv_squared_loss(stats.load, stats.tokens, scope="global_batch", step_sums=None, routed_tokens=len(valid))
    _same(mine, oracle, layer, x)


def test_shares_of_a_variation_add_up_to_it_with_their_gradients() -> None:
    own = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([3, 5, 2, 4, 6])
    whole = cv_squared_loss(own, tokens, scope="global_batch", step_sums=None, routed_tokens=20)
    known = own.detach().sum(0)
    parts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    shares = [
        cv_squared_loss(own[p], tokens[p], scope="global_batch", step_sums=known, routed_tokens=20) for p in parts
    ]
    assert whole.item() == pytest.approx(20 * float(cv_squared(known)), abs=1e-12)
    assert sum(share.item() for share in shares) == pytest.approx(whole.item(), abs=1e-12)
    (oracle,) = torch.autograd.grad(20 * cv_squared(own.sum(0)), own)
    for value in (whole, sum(shares, torch.zeros(()))):
        torch.testing.assert_close(torch.autograd.grad(value, own, retain_graph=True)[0], oracle, rtol=0, atol=1e-12)


def test_a_variation_of_nothing_is_zero_and_has_no_nan() -> None:
    sums = torch.zeros(2, 4, dtype=torch.float64).requires_grad_()
    value = cv_squared_loss(sums, torch.zeros(2), scope="sequence", step_sums=None, routed_tokens=1)
    assert value.item() == 0 and torch.equal(torch.autograd.grad(value, sums)[0], torch.zeros(2, 4).double())
    assert cv_squared(torch.ones(4)).item() == 0
    assert cv_squared(torch.tensor([4.0, 0, 0, 0])).item() == 3  # E - 1: everything at one expert


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
def test_device_balance_is_the_balance_of_groups(scope: str) -> None:
    layer, x, valid, stats, _ = _run({"kind": "top_k"})
    output = layer.router(x.flatten(0, 1), make_tokens(is_training=True)[1])
    config = moe_config(balance={"scope": scope}, device_balance={"coef": 1.0, "groups": 2})
    sequences = [[t for t in valid if t // SEQ_LEN == row] for row in range(NUM_ROWS)]
    oracle = torch.zeros(())
    for tokens in [valid] if scope == "global_batch" else sequences:
        chosen = [
            int(e)
            for t, e in zip(output.decision.token_index, output.decision.expert_index, strict=True)
            if int(t) in tokens
        ]
        for group in ((0, 1), (2, 3)):
            f = sum(e in group for e in chosen) / max(1, len(chosen))
            p = sum((output.probs[t, e] for t in tokens for e in group), torch.zeros(()))
            oracle = oracle + 2 * f * p
    _same(device_balance_loss(stats, config.aux_losses, global_stats=None), oracle, layer, x)


def test_null_experts_are_balanced_as_that_many_equal_experts() -> None:
    router = {"kind": "top_k", "top_k": 3, "null_experts": 3}
    layer, x, valid, stats, _ = _run(router)
    tokens = x.flatten(0, 1)
    probs = (tokens @ layer.router.get_parameter("gate.weight").t()).softmax(-1)
    chosen = [e for t in valid for e in probs[t].argsort(descending=True)[:3].tolist()]
    oracle = torch.zeros(())
    for e in range(4):
        oracle = oracle + 7 * (chosen.count(e) / len(chosen)) * sum((probs[t, e] for t in valid), torch.zeros(()))
    of_nulls = sum(e >= 4 for e in chosen) / len(chosen) / 3  # share of each null expert, if uniform
    for e in range(4, 7):
        oracle = oracle + 7 * of_nulls * sum((probs[t, e] for t in valid), torch.zeros(()))
    _same(balance_loss(stats, moe_config(router=router).aux_losses, global_stats=None), oracle, layer, x)
    assert stats.null_counts is not None
    assert int(stats.counts.sum() + stats.null_counts.sum()) == 3 * len(valid)


@pytest.mark.parametrize("router", [{"kind": "top_k", "top_k": 3}, {"kind": "top_p", "p": 0.7}], ids=str)
def test_diversity_is_the_mean_squared_cosine_between_a_tokens_experts(router: dict[str, Any]) -> None:
    layer, x, valid, stats, _ = _run(router)
    decision = layer.router(x.flatten(0, 1), make_tokens(is_training=True)[1]).decision
    oracle = torch.zeros(())
    for t in valid:
        experts = decision.expert_index[decision.token_index == t].tolist()
        token, one = x.flatten(0, 1)[t][None], torch.ones(1, 1, dtype=x.dtype)
        outputs = [layer.experts(token, torch.tensor([[e]]), one)[0] for e in experts]
        pairs = [(a, b) for i, a in enumerate(outputs) for j, b in enumerate(outputs) if i != j]
        cosines = [((a * b).sum() / (a.norm() * b.norm())) ** 2 for a, b in pairs]
        oracle = oracle + sum(cosines, torch.zeros(())) / max(1, len(cosines))
    assert stats.similarity_sum is not None
    _same(stats.similarity_sum.sum(), oracle, layer, x)


def test_expert_similarity_is_as_exact_under_autocast() -> None:
    """The mean squared cosine of random outputs is 1 / D, which vanishes in bfloat16."""
    T, D = 64, 512
    rows = torch.randn(2 * T, D, generator=torch.Generator().manual_seed(0))
    decision = RoutingDecision.from_top_k(
        torch.tensor([[0, 1]]).repeat(T, 1), torch.ones(T, 2), num_experts=2, valid=torch.ones(T, dtype=torch.bool)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expert_similarity = ExpertOutputs(y=rows, decision=decision).similarity()
    exact = ExpertOutputs(y=rows.double(), decision=decision).similarity()
    assert expert_similarity.dtype == torch.float32
    torch.testing.assert_close(expert_similarity.double(), exact, rtol=0, atol=1e-6)
    assert float(exact.mean()) == pytest.approx(1 / D, rel=0.3)


def test_every_loss_is_in_the_objective_with_its_coefficient() -> None:
    moe = {
        "router": {"kind": "noisy_top_k"},
        "balance": {"coef": 0.0},
        "z_loss_coef": 0.0,
        "cv_squared": {"importance_coef": 0.1, "load_coef": 0.2},
        "device_balance": {"coef": 0.3, "groups": 2},
        "diversity_coef": 0.4,
    }
    config = tiny_model_config(moe)
    assert config.moe is not None
    layer = build_moe(config, 0, "loop").double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    context = make_context(2, 8, noise_key=torch.arange(16))
    _, stats = layer(x, context)
    share = objective(
        torch.tensor(0.0),
        [stats, stats],
        global_stats=None,
        denominators=Denominators(target_tokens=1, routed_tokens=16),
        losses=config.moe.aux_losses,
    )
    assert set(share.extra) == {"importance", "load", "device_balance", "diversity"}
    coefs = {"importance": 0.1, "load": 0.2, "device_balance": 0.3, "diversity": 0.4}
    assert share.total.item() == pytest.approx(sum(coefs[n] * v.item() for n, v in share.extra.items()), abs=1e-12)
    for value in share.extra.values():
        assert 0 < value.item() < 3


def test_the_z_loss_on_the_vocabulary_is_the_mean_squared_logsumexp_over_targets() -> None:
    config = tiny_model_config(vocab_z_loss_coef=0.1)
    model, batch = make_model(config, dtype=torch.float64), make_batch(3, 8, ragged=True)
    output = model(batch, want_logits=True)
    assert output.logits is not None and output.vocab_z is not None
    squares = [
        float(output.logits.detach()[b, s].exp().sum().log() ** 2) for b, s in batch.target_mask.nonzero().tolist()
    ]
    engine = make_engine(config, dtype=torch.float64)
    denominators = Denominators(target_tokens=len(squares), routed_tokens=1)
    share = objective(
        output.loss_sum, (), global_stats=None, denominators=denominators, losses=None, vocab_z=output.vocab_z
    )
    assert share.extra["vocab_z"].item() == pytest.approx(sum(squares) / len(squares), abs=1e-12)
    assert (share.total - share.loss).item() == pytest.approx(0.1 * share.extra["vocab_z"].item(), abs=1e-12)
    logged = engine.train_step([batch], lr=0.0)
    assert logged.extra_losses["vocab_z"] == pytest.approx(share.extra["vocab_z"].item(), abs=1e-12)
    assert logged.loss == pytest.approx(share.loss.item(), abs=1e-12), "the loss is the cross-entropy alone"
    assert make_model(tiny_model_config(), dtype=torch.float64)(batch).vocab_z is None


@pytest.mark.parametrize("loss_chunk", [None, 5, 1024])
def test_it_teaches_the_same_in_chunks_and_micro_batches(loss_chunk: int | None) -> None:
    config, batch = tiny_model_config(vocab_z_loss_coef=0.3), make_batch(4, 8, ragged=True)
    gradients = []
    for chunk, parts in ((None, [batch]), (loss_chunk, [rows_of(batch, 0, 1), rows_of(batch, 1, 4)])):
        engine = make_engine(config, dtype=torch.float64, parallel=ParallelConfig(loss_chunk=chunk))
        engine.accumulate(parts)
        gradients.append({name: part.tensor.clone() for name, part in engine.gradients().slices.items()})
    without = make_engine(tiny_model_config(), dtype=torch.float64)
    without.accumulate([batch])
    plain = without.gradients().slices
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=0, atol=1e-12, msg=name)
    assert (gradients[0]["head.weight"] - plain["head.weight"].tensor).norm() > 0.01 * gradients[0][
        "head.weight"
    ].norm()
