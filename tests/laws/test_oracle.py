"""Law: gate weights, layer output, balance loss and z-loss equal a plain loop in float64, gradients included."""

from collections import Counter
from typing import Any

import pytest
import torch

from tests import reference
from tests.builders import make_context, moe_config, tiny_model_config
from trainer.models.feed_forward import FeedForward
from trainer.moe.balance import balance_loss
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE
from trainer.moe.loss_stats import LossStats
from trainer.moe.losses import Denominators, objective, z_loss
from trainer.ops.activations import Activation
from trainer.ops.kernels import ExpertsKernel

NUM_ROWS, SEQ_LEN, D_MODEL, NUM_EXPERTS, D_FF = 3, 5, 6, 4, 7
TOLERANCE = 1e-10

ROUTERS = [
    {"kind": "top_k", "top_k": 2},
    {"kind": "top_k", "top_k": 1, "normalize": False},
    {"kind": "top_k", "top_k": 4, "score": "sigmoid", "scale": 2.5},
    {"kind": "top_k", "top_k": 3, "score": "sigmoid", "normalize": False},
    {"kind": "bias_balanced", "top_k": 2},
    {"kind": "dense"},
]


def _layer(router: dict, activation: Activation, kernel: ExpertsKernel, **fields: Any) -> MoE:
    config = moe_config(num_experts=NUM_EXPERTS, d_ff=D_FF, router=router, **fields)
    layer = MoE(
        router=config.router.build(d_model=D_MODEL, num_experts=NUM_EXPERTS, layer=0),
        experts=Experts(NUM_EXPERTS, D_MODEL, D_FF, activation=activation, kernel=kernel),
        dispatcher=LocalDispatcher(),
        capacity=config.capacity,
        shared=FeedForward(tiny_model_config(d_model=D_MODEL, num_heads=1, num_kv_heads=1), 3)
        if config.num_shared_experts
        else None,
    ).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def _tokens_and_valid() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(NUM_ROWS, SEQ_LEN, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    valid = torch.ones(NUM_ROWS, SEQ_LEN, dtype=torch.bool)
    valid[1, 3:] = False  # trailing padding
    valid[2, :] = False  # a row that is all padding
    return x.requires_grad_(), valid.flatten()


def _oracle(layer: MoE, x: torch.Tensor, valid: torch.Tensor, router: dict) -> reference.Routed:
    is_dense = router["kind"] == "dense"
    return reference.route(
        x.flatten(0, 1),
        layer.router.get_parameter("gate.weight"),
        valid,
        top_k=NUM_EXPERTS if is_dense else router["top_k"],
        score=router.get("score", "sigmoid" if router["kind"] == "bias_balanced" else "softmax"),
        normalize=router.get("normalize", True) and not is_dense,
        scale=router.get("scale", 1.0),
    )


def _gradients(value: torch.Tensor, layer: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def _assert_same(mine: torch.Tensor, oracle: torch.Tensor, layer: MoE, x: torch.Tensor) -> None:
    torch.testing.assert_close(mine, oracle, rtol=0, atol=TOLERANCE)
    probe = torch.linspace(-1, 1, mine.numel(), dtype=torch.float64).view(mine.shape)
    for ours, theirs in zip(
        _gradients((mine * probe).sum(), layer, x), _gradients((oracle * probe).sum(), layer, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("kernel", ["loop", "padded", "fused"])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_layer_output_equals_a_loop_over_tokens_and_experts(
    router: dict, kernel: ExpertsKernel, activation: Activation
) -> None:
    layer, (x, valid) = _layer(router, activation, kernel), _tokens_and_valid()
    y, _ = layer(x, make_context(NUM_ROWS, SEQ_LEN, valid))
    oracle = reference.moe_output(
        x.flatten(0, 1), _oracle(layer, x, valid, router), layer.experts.w_in, layer.experts.w_out, activation
    )
    _assert_same(y.flatten(0, 1), oracle, layer, x)
    assert (y.flatten(0, 1)[~valid] == 0).all(), "padding must come out as exact zeros"


def _drop(routed: reference.Routed, room: int, policy: str, *, renormalize: bool) -> None:
    """Drop, row by row, the assignments beyond the capacity `room` of their expert."""
    for first in range(0, NUM_ROWS * SEQ_LEN, SEQ_LEN):
        row = range(first, first + SEQ_LEN)
        asked = [(t, slot) for t in row for slot in range(len(routed.experts[t]))]
        if policy == "choice_major":
            asked.sort(key=lambda pair: pair[1])
        taken, kept = Counter[int](), set()
        for t, slot in asked:
            taken[routed.experts[t][slot]] += 1
            if taken[routed.experts[t][slot]] <= room:
                kept.add((t, slot))
        for t in row:
            slots = [slot for slot in range(len(routed.experts[t])) if (t, slot) in kept]
            weights = [routed.weights[t][slot] for slot in slots]
            scale = sum(routed.weights[t]) / sum(weights) if renormalize and weights else 1.0
            routed.experts[t] = [routed.experts[t][slot] for slot in slots]
            routed.weights[t] = [weight * scale for weight in weights]


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("policy", ["position", "choice_major"])
@pytest.mark.parametrize("router", [ROUTERS[0], ROUTERS[3]], ids=str)
def test_what_finds_no_room_adds_nothing(router: dict, policy: str, renormalize: bool, with_shared: bool) -> None:
    """The output of a token whose experts are all full is that of the shared experts only."""
    limit = {"factor": 0.2, "min": 1, "policy": policy, "renormalize_after_drop": renormalize}  # capacity 1 per row
    layer = _layer(router, "swiglu", "loop", capacity=limit, num_shared_experts=int(with_shared))
    x, valid = _tokens_and_valid()
    y, _ = layer(x, make_context(NUM_ROWS, SEQ_LEN, valid))
    routed = _oracle(layer, x, valid, router)
    _drop(routed, 1, policy, renormalize=renormalize)
    out_of_luck = torch.tensor([not experts for experts in routed.experts]) & valid
    assert out_of_luck.any() and not out_of_luck.all()
    tokens = x.flatten(0, 1)
    oracle = reference.moe_output(tokens, routed, layer.experts.w_in, layer.experts.w_out, "swiglu")
    if isinstance(layer.shared, FeedForward):
        weights = layer.shared.w_in.weight, layer.shared.w_out.weight
        passed = torch.stack([reference.expert_output(token, *weights, "swiglu") for token in tokens])
        oracle = oracle + passed * valid[:, None]
    else:
        assert (y.flatten(0, 1)[out_of_luck] == 0).all(), "exact zeros"
    _assert_same(y.flatten(0, 1), oracle, layer, x)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_gate_weights_equal_a_loop(router: dict) -> None:
    layer, (x, valid) = _layer(router, "swiglu", "loop"), _tokens_and_valid()
    decision = layer.router(x.flatten(0, 1), make_context(NUM_ROWS, SEQ_LEN, valid)).decision
    oracle = _oracle(layer, x, valid, router)
    experts = [e for token in oracle.experts for e in (sorted(token) if router["kind"] == "dense" else token)]
    assert decision.expert_index[decision.kept].tolist() == experts
    pairs = [
        sorted(zip(token, weights, strict=True), key=lambda pair: pair[0])
        if router["kind"] == "dense"
        else list(zip(token, weights, strict=True))
        for token, weights in zip(oracle.experts, oracle.weights, strict=True)
    ]
    weights = torch.stack([weight for token in pairs for _, weight in token])
    _assert_same(decision.combine_weight[decision.kept], weights, layer, x)


SCOPES = ["sequence", "global_batch", "micro_batch"]


def _scopes(scope: str, valid: torch.Tensor) -> list[list[int]]:
    tokens = [t for t in range(len(valid)) if valid[t]]
    if scope == "sequence":
        return [[t for t in tokens if t // SEQ_LEN == row] for row in range(NUM_ROWS)]
    return [tokens]


@pytest.mark.parametrize("convention", ["canonical", "hf", "megatron", "gshard_first_choice"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_objective_equals_a_loop_for_every_scope_and_convention(router: dict, scope: str, convention: str) -> None:
    if router["kind"] == "dense" and convention == "gshard_first_choice":
        return  # refused by the config: a dense router has no first choice
    layer, (x, valid) = _layer(router, "swiglu", "loop"), _tokens_and_valid()
    _, stats = layer(x, make_context(NUM_ROWS, SEQ_LEN, valid))
    config = moe_config(
        num_experts=NUM_EXPERTS,
        router=router,
        z_loss_coef=0.3,
        balance={"coef": 0.7, "scope": scope, "convention": convention},
    )
    routed = _oracle(layer, x, valid, router)
    loss_sum = (x.sum() * 0.25).exp()  # any differentiable stand-in for a cross-entropy
    denominators = Denominators(target_tokens=5, routed_tokens=int(valid.sum()))
    mine = objective(loss_sum, [stats, stats], global_stats=None, denominators=denominators, losses=config.aux_losses)

    first_only = convention == "gshard_first_choice"
    balance = reference.balance_loss(routed, _scopes(scope, valid), first_choice_only=first_only)
    z = reference.z_loss(routed, [t for t in range(len(valid)) if valid[t]])
    scale = {"hf": config.experts_per_token, "megatron": 2}.get(convention, 1)  # two MoE layers
    oracle = loss_sum / 5 + 0.5 * (2 * 0.7 * scale * balance + 2 * 0.3 * z) / int(valid.sum())
    _assert_same(mine.total, oracle, layer, x)
    torch.testing.assert_close(mine.balance_loss, (balance / valid.sum()).detach(), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(mine.z_loss, (z / valid.sum()).detach(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_global_counts_replace_this_micro_batch_s_own(router: dict) -> None:
    layer, (x, valid) = _layer(router, "swiglu", "loop"), _tokens_and_valid()
    _, stats = layer(x, make_context(NUM_ROWS, SEQ_LEN, valid))
    routed = _oracle(layer, x, valid, router)
    elsewhere = torch.tensor([5, 0, 2, 9])
    total = stats.counts.sum(0) + elsewhere
    config = moe_config(num_experts=NUM_EXPERTS, router=router, balance={"scope": "global_batch"})
    mine = balance_loss(stats, config.aux_losses, global_stats=LossStats(counts=total))
    p_sum = torch.stack([routed.probs[t] for t in range(len(valid)) if valid[t]]).sum(0)
    oracle = sum(
        (NUM_EXPERTS * (int(total[e]) / int(total.sum())) * p_sum[e] for e in range(NUM_EXPERTS)),
        torch.zeros((), dtype=torch.float64),
    )
    _assert_same(mine, oracle, layer, x)


def test_z_loss_leaves_the_selection_bias_out() -> None:
    layer, (x, valid) = _layer({"kind": "bias_balanced", "top_k": 2}, "swiglu", "loop"), _tokens_and_valid()
    context = make_context(NUM_ROWS, SEQ_LEN, valid)
    before = z_loss(layer(x, context)[1])
    layer.router.get_buffer("bias").add_(torch.tensor([3.0, -3.0, 0.5, 0.0]))
    assert torch.equal(before, z_loss(layer(x, context)[1]))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("scope", SCOPES)
def test_an_even_load_with_even_probabilities_gives_one_per_token(scope: str, top_k: int) -> None:
    router = {"kind": "top_k", "top_k": top_k, "normalize": False}
    layer = _layer(router, "swiglu", "loop")
    layer.router.get_parameter("gate.weight").data.zero_()
    _, stats = layer(torch.zeros(2, 4, D_MODEL, dtype=torch.float64), make_context(2, 4))
    config = moe_config(num_experts=NUM_EXPERTS, router=router, balance={"scope": scope})
    assert balance_loss(stats, config.aux_losses, global_stats=None).item() == pytest.approx(8.0)
