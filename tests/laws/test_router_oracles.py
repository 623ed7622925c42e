"""Law: every router's choice, weights, output and own loss equal a plain loop in float64, gradients included."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.builders import make_context, moe_config
from tests.registries import ROUTERS, num_experts_of
from tests.router_oracles import ORACLES, Case
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE
from trainer.moe.routers.registry import RouterConfig
from trainer.moe.routing import RoutingContext
from trainer.ops.noise import token_keys, uniform

NUM_ROWS, SEQ_LEN, D_MODEL, D_FF = 3, 6, 5, 7
TOLERANCE = 1e-10
KINDS = [router.model_fields["kind"].default for router in get_args(get_args(RouterConfig)[0])]

VARIANTS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in ROUTERS),
    {"kind": "top_k", "null_experts": 3, "top_k": 3},
    {"kind": "bias_balanced", "null_experts": 2, "score": "softmax"},
    {"kind": "top_k", "jitter": 0.3},
    {"kind": "top_k", "gate_bias": True, "null_experts": 1, "score": "sigmoid"},
    {"kind": "top_p", "jitter": 0.2},
    {"kind": "group_limited", "groups": 2, "groups_kept": 1, "null_experts": 1, "bias_update_rate": 0.1},
    {"kind": "group_limited", "groups": 4, "groups_kept": 2, "group_score": "best", "score": "softmax"},
    {"kind": "gshard", "top_k": 3, "random_second": False},
    {"kind": "gshard", "top_k": 3, "scale": 2.0},
    {"kind": "noisy_top_k", "top_k": 1, "normalize": False},
    {"kind": "noisy_top_k", "top_k": 3, "null_experts": 1},
    {"kind": "cosine", "d_proj": 3, "top_k": 3},
    {"kind": "top_p", "p": 0.8, "normalize": True},
    {"kind": "top_p", "p": 1.0, "max_experts": 3, "sparsity_coef": 0.5},
    {"kind": "expert_choice", "evaluation_routing": "as_trained", "capacity_factor": 1.5},
    {"kind": "sinkhorn", "top_k": 2, "score": "softmax", "iterations": 4},
    {"kind": "linear_program", "capacity_factor": 1.5, "top_k": 1},
    {"kind": "linear_program", "capacity_factor": 0.6},
    {"kind": "greedy", "capacity_factor": 0.6, "top_k": 3},
    {"kind": "hash", "top_k": 3, "salt": 4},
    {"kind": "mixture_of_depths", "capacity": 0.4},
    {"kind": "mixture_of_depths", "capacity": 0.5, "evaluation_routing": "as_trained", "predictor_coef": 0.3},
]


def make_layer(router: dict[str, Any], *, spread: float = 0.7) -> MoE:
    num_experts = num_experts_of(router["kind"])
    config = moe_config(num_experts=num_experts, d_ff=D_FF, router=router)
    layer = MoE(
        router=config.router.build(d_model=D_MODEL, num_experts=num_experts, layer=0),
        experts=Experts(num_experts, D_MODEL, D_FF, activation="swiglu", kernel="loop"),
        dispatcher=LocalDispatcher(),
        capacity=config.capacity,
    ).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(0, spread, generator=generator)
    for buffer in layer.buffers():
        buffer.copy_(torch.linspace(-0.2, 0.3, buffer.numel()))
    return layer


def make_tokens(*, is_training: bool) -> tuple[Tensor, RoutingContext]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(NUM_ROWS, SEQ_LEN, D_MODEL, dtype=torch.float64, generator=generator)
    valid = torch.ones(NUM_ROWS, SEQ_LEN, dtype=torch.bool)
    valid[1, 3:] = False  # trailing padding
    valid[2, :] = False  # a row that is all padding
    ids = torch.randint(0, 50, (NUM_ROWS * SEQ_LEN,), generator=generator)
    position = torch.arange(SEQ_LEN).repeat(NUM_ROWS)
    key = token_keys(1, ids, position) if is_training else None
    context = make_context(NUM_ROWS, SEQ_LEN, valid.flatten(), noise_key=key)
    return x.requires_grad_(), replace(context, token_ids=ids)


def _same(mine: Tensor, oracle: Tensor, layer: MoE, x: Tensor) -> None:
    torch.testing.assert_close(mine, oracle, rtol=0, atol=TOLERANCE)
    probe = torch.linspace(-1, 1, mine.numel(), dtype=torch.float64).view(mine.shape)
    inputs = [x, *layer.parameters()]
    pairs = []
    for value in (mine, oracle):
        found = (
            torch.autograd.grad((value * probe).sum(), inputs, allow_unused=True, retain_graph=True)
            if value.requires_grad
            else [None] * len(inputs)
        )
        pairs.append([torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)])
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_every_kind_has_an_oracle() -> None:
    assert set(KINDS) == set(ORACLES)


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("router", VARIANTS, ids=str)
def test_a_router_equals_its_plain_loop(router: dict[str, Any], is_training: bool) -> None:
    layer, (x, context) = make_layer(router), make_tokens(is_training=is_training)
    config = moe_config(num_experts=layer.experts.num_experts, d_ff=D_FF, router=router).router
    parameters = dict(layer.router.named_parameters()) | dict(layer.router.named_buffers())
    tokens = x.flatten(0, 1)
    case = Case(tokens, parameters, {"jitter": 0.0, **config.model_dump()}, layer.experts.num_experts, context)
    if case.options["jitter"] and context.noise_key is not None:  # of the gate's input only
        drawn = uniform(context.noise_key, D_MODEL, salt=0).double()
        case.x = tokens * (1 - case.options["jitter"] + 2 * case.options["jitter"] * drawn)
    if router["kind"] not in ORACLES:
        pytest.skip("no plain loop was written for this router")
    oracle = ORACLES[router["kind"]](case)

    output = layer.router(tokens, context)
    decision = output.decision
    if output.logits is not None:
        _same(output.logits[context.valid], oracle.logits[context.valid], layer, x)
    kept = decision.kept & (decision.expert_index < decision.num_experts)
    pairs = list(zip(decision.token_index[kept].tolist(), decision.expert_index[kept].tolist(), strict=True))
    assert pairs == [(t, e) for t, mine in enumerate(oracle.experts) for e in mine]
    weights = [weight for mine in oracle.weights for weight in mine]
    _same(decision.combine_weight[kept], torch.stack(weights), layer, x)

    y, stats = layer(x, context)
    theirs = reference.moe_output(tokens, oracle, layer.experts.w_in, layer.experts.w_out, "swiglu")
    _same(y.flatten(0, 1), theirs, layer, x)
    mask = context.valid.view(NUM_ROWS, SEQ_LEN)
    if stats.prob_sum is not None:
        probs = oracle.probs
        if probs.shape[1] > 4:
            probs = torch.cat([probs[:, :4], probs[:, 4:].sum(1, keepdim=True)], dim=1)
        _same(stats.prob_sum, (probs.view(NUM_ROWS, SEQ_LEN, -1) * mask[..., None]).sum(1), layer, x)
    for name, mine in (("load", stats.load), ("loss", stats.router_loss)):
        assert (mine is not None) == (name in case.extra)
        if mine is not None:
            per_token = case.extra[name].view(NUM_ROWS, SEQ_LEN, *case.extra[name].shape[1:])
            _same(mine, (per_token * mask.view(*mask.shape, *(1 for _ in mine.shape[1:]))).sum(1), layer, x)


def test_a_fuller_call_overrides_k() -> None:
    for router in VARIANTS:
        layer, (x, context) = make_layer(router), make_tokens(is_training=False)
        config = moe_config(num_experts=layer.experts.num_experts, router=router).router
        if "top_k" not in type(config).model_fields or config.num_null_experts:
            continue  # has no k, or k includes null experts
        if any(config.model_copy(update={"top_k": 3}).problems_among(layer.experts.num_experts)):
            continue  # such as groups that limit k
        decision = layer.router(x.flatten(0, 1), replace(context, top_k=3)).decision
        per_token = torch.bincount(decision.token_index[decision.kept], minlength=len(x.flatten(0, 1)))
        if router.get("evaluation_routing") == "as_trained":
            assert per_token.sum() > 0
            continue
        assert per_token[context.valid].tolist() == [3] * int(context.valid.sum()), router
