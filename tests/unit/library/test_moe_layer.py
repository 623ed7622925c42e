"""The layer of the public interface: other implementations' numbers, gradients, dtypes and errors."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from trainer import MoELayer, packages
from trainer.errors import ConfigError
from trainer.moe.routers.config.token_choice import TopKRouterConfig
from trainer.ops.activations import ClampedSwiGLU

D, FF, E, B, S = 16, 24, 8, 2, 12


def tokens(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixtral(top_k: int) -> nn.Module:
    config = MixtralConfig(hidden_size=D, intermediate_size=FF, num_local_experts=E, num_experts_per_tok=top_k)
    return MixtralSparseMoeBlock(config)


def qwen3(top_k: int, *, normalize: bool) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=FF,
        num_experts=E,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalize,
    )
    return Qwen3MoeSparseMoeBlock(config)


def same_weights(theirs: Any, *, top_k: int, normalize: bool) -> MoELayer:
    """Make a layer with the weights of a block of transformers, which get random values first."""
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    layer = MoELayer(D, E, top_k, d_ff=FF, router={"kind": "top_k", "normalize": normalize})
    layer.moe.router.get_parameter("gate.weight").data.copy_(theirs.gate.weight.data)
    layer.moe.experts.w_in.data.copy_(theirs.experts.gate_up_proj.data)
    layer.moe.experts.w_out.data.copy_(theirs.experts.down_proj.data)
    return layer


@pytest.mark.parametrize(
    ("theirs", "top_k", "normalize"),
    [
        (mixtral(2), 2, True),
        (mixtral(3), 3, True),
        (qwen3(4, normalize=True), 4, True),
        (qwen3(2, normalize=False), 2, False),
        (qwen3(1, normalize=False), 1, False),
    ],
    ids=["mixtral 2", "mixtral 3", "qwen3 4", "qwen3 2 raw", "qwen3 1 raw"],
)
def test_it_equals_the_sparse_blocks_of_transformers(theirs: Any, top_k: int, normalize: bool) -> None:
    layer, x = same_weights(theirs, top_k=top_k, normalize=normalize), tokens().requires_grad_()
    y, stats = layer(x)
    expected = theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    gate = layer.moe.router.get_parameter("gate.weight")
    ours = torch.autograd.grad(y.square().sum(), [x, gate, layer.moe.experts.w_in, layer.moe.experts.w_out])
    weights = [x, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj]
    for mine, other in zip(ours, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    logits = F.linear(x.flatten(0, 1), theirs.gate.weight)
    hugging_face = load_balancing_loss_func((logits,), E, top_k)
    torch.testing.assert_close(top_k * stats.balance_loss(), torch.as_tensor(hugging_face), rtol=1e-4, atol=1e-5)


def test_experts_may_have_biases_and_a_clamped_activation() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF, activation="clamped_swiglu", expert_bias=True)
    assert layer.moe.experts.activation == ClampedSwiGLU()
    biases = [p for name, p in layer.named_parameters() if name.endswith("_bias")]
    assert [tuple(p.shape) for p in biases] == [(E, 2 * FF), (E, D)] and all(p.any() for p in biases)
    for gradient in torch.autograd.grad(layer(tokens())[0].square().sum(), biases):
        assert (gradient != 0).any()
    kernel: Any = "trainer.ops.expert_ffn:loop_ffn"
    with pytest.raises(ConfigError, match=r"^MoELayer: expert_bias: a kernel of your own has no biases; use False, or"):
        MoELayer(D, E, 2, expert_bias=True, kernel=kernel)


def test_the_gate_learns_from_the_output_and_from_the_balance_loss() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF)
    gate = layer.moe.router.get_parameter("gate.weight")
    y, stats = layer(tokens())
    for loss in (y.square().mean(), stats.balance_loss(), stats.z_loss()):
        (gradient,) = torch.autograd.grad(loss, gate, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient != 0).any()


def test_the_balance_loss_evens_out_the_load() -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(D, E, 2, d_ff=FF), tokens() + 1
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    before = float(layer(x)[1].load_imbalance)
    for _ in range(60):
        layer(x)[1].balance_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(layer(x)[1].load_imbalance) < before


@pytest.mark.parametrize(
    "router",
    ["top_k", "switch", "gshard", "noisy_top_k", "bias_balanced", "expert_choice", "sinkhorn", "top_p", "dense"],
)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_every_router_works_in_float32_and_under_autocast(router: str, is_autocast: bool) -> None:
    layer = MoELayer(D, 4, router=router, d_ff=FF)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        y, stats = layer(tokens())
    assert y.shape == (B, S, D) and y.dtype == torch.float32, "rows are combined in float32"
    assert stats.balance_loss().dtype == torch.float32
    (y.float().square().mean() + 0.01 * stats.balance_loss()).backward()
    layer.update_router(stats)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


def test_padding_is_not_routed() -> None:
    layer, valid = MoELayer(D, E, 2, d_ff=FF).eval(), torch.arange(S) < torch.tensor([[S], [3]])
    y, stats = layer(tokens(), valid=valid)
    assert int(stats.tokens_per_expert.sum()) == 2 * int(valid.sum())
    assert (y[~valid] == 0).all() and (y[valid] != 0).any()
    torch.testing.assert_close(y[0], layer(tokens())[0][0])


def test_a_capacity_drops_assignments() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF, capacity_factor=0.5)
    alike = tokens()[:, :1].expand(B, S, D)  # all tokens of a sequence take the same experts, whatever the weights
    assert float(layer(alike)[1].drop_rate) > 0
    assert float(MoELayer(D, E, 2, d_ff=FF)(alike)[1].drop_rate) == 0


def test_noise_is_drawn_anew_in_training_only() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF, router={"kind": "top_k", "jitter": 0.5})
    assert not torch.equal(layer(tokens())[0], layer(tokens())[0])
    layer.eval()
    assert torch.equal(layer(tokens())[0], layer(tokens())[0])


def test_layers_with_the_same_weights_have_their_own_noise() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF, router="random")
    twin = copy.deepcopy(layer)
    assert not torch.equal(layer(tokens())[0], twin(tokens())[0])


def test_activation_checkpointing_recomputes_with_the_same_noise() -> None:
    router = {"kind": "noisy_top_k", "jitter": 0.5}
    layers = nn.ModuleList(MoELayer(D, E, 2, d_ff=FF, router=router) for _ in range(2))
    gradients = []
    for recomputes in (False, True):
        torch.manual_seed(3)
        loss = torch.zeros(())
        for batch in range(2):  # two forward passes before one backward pass: the recomputed call is not the last one
            x = tokens(seed=batch)
            for layer in layers:
                x = checkpoint(layer, x, use_reentrant=False)[0] if recomputes else layer(x)[0]
            loss = loss + x.square().sum()
        gradients.append(torch.autograd.grad(loss, list(layers.parameters())))
    for stored, recomputed in zip(*gradients, strict=True):
        assert torch.equal(stored, recomputed)


def test_a_selection_bias_moves_with_the_load() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF, router="bias_balanced")
    stats = layer(tokens())[1]
    layer.update_router(stats)
    bias = layer.moe.router.get_buffer("bias")
    counts = stats.tokens_per_expert.float()
    assert bool((bias[counts > counts.mean()] < 0).all() and (bias[counts < counts.mean()] > 0).all())


def test_a_selection_bias_moves_by_the_loads_of_all_micro_batches() -> None:
    layer = MoELayer(D, E, 2, d_ff=FF, router="bias_balanced")
    stats = [layer(tokens(seed=seed))[1] for seed in range(3)]
    layer.update_router(*stats)
    counts = torch.stack([one.tokens_per_expert for one in stats]).sum(0).float()
    bias = layer.moe.router.get_buffer("bias")
    assert bool((bias[counts > counts.mean()] < 0).all() and (bias[counts < counts.mean()] > 0).all())
    with pytest.raises(TypeError, match="at least one forward pass"):
        layer.update_router()


def test_a_plugin_is_a_router() -> None:
    layer = MoELayer(D, E, router={"kind": "tests.added_router:ThresholdRouterConfig", "threshold": 0.5}, d_ff=FF)
    assert type(layer.moe.router).__name__ == "ThresholdRouter"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 9}, "top_k: 9 is more than num_experts 8"),
        ({"router": "expert_choice", "capacity_factor": 1.0}, "capacity_factor: expert_choice has no fixed number"),
        ({"router": "nope"}, "nope"),
        ({"router": {"kind": "top_k", "top_p": 0.5}}, "top_p"),
        ({"router": "topk"}, "^MoELayer: router: 'topk' is not one of .*; did you mean top_k\\?$"),
        ({"router": {"top_k": 2}}, "router: needs a kind"),
        ({"router": {"kind": "top_k", "scor": "sigmoid"}}, "router.scor: unknown key; did you mean score"),
        ({"router": "no_such_module:X"}, "router: there is no module no_such_module"),
        ({"router": None}, "router: expected a kind, a mapping .*, got null"),
        ({"top_k": 0}, "^MoELayer: top_k: must be more than 0, got 0"),
        ({"top_k": 2, "router": "top_p"}, "top_k: top_p has no such option; leave it out"),
        (
            {"top_k": 2, "router": "tests.added_router:ThresholdRouterConfig"},
            "top_k: tests.added_router:ThresholdRouterConfig has no such option; leave it out",
        ),
        ({"top_k": 2, "router": {"kind": "top_k", "top_k": 3}}, "top_k: 2, but the router's options have top_k 3"),
        ({"top_k": 2, "router": TopKRouterConfig(top_k=3)}, "top_k: 2, but the router's options have top_k 3"),
        ({"top_k": 1, "router": TopKRouterConfig(normalize=True)}, "router.normalize: true with top_k 1"),
        ({"capacity_factor": 0}, "capacity_factor: must be more than 0, got 0"),
        ({"capacity_factor": math.nan}, "capacity_factor: must be a finite number, got nan"),
        ({"capacity_factor": "1.0"}, "capacity_factor: expected a number or null, got '1.0'"),
        ({"activation": "relu"}, "activation: 'relu' is not one of swiglu, gelu"),
        ({"kernel": "fast"}, "kernel: 'fast' is not one of loop, padded, grouped, fused, fused_onednn, triton"),
        ({"kernel": "auto"}, "kernel: 'auto' is not one of loop"),
        ({"seed": "a"}, "seed: expected a whole number, got 'a'"),
        ({"d_ff": 0}, "d_ff: must be more than 0, got 0"),
    ],
)
def test_options_that_are_wrong_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        MoELayer(D, E, **options)


def test_a_kernel_that_is_not_installed_is_refused_with_one_that_this_interface_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"^MoELayer: kernel: triton: .*'turnout\[triton\]', or use loop$"):
        MoELayer(D, E, kernel="triton")


def test_sizes_that_are_wrong_are_refused_together() -> None:
    with pytest.raises(ConfigError) as refused:
        MoELayer(0, 0, 2)
    assert str(refused.value).splitlines() == [
        "MoELayer: d_model: must be more than 0, got 0",
        "MoELayer: num_experts: must be more than 0, got 0",
    ]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"x": torch.zeros(B, S, D + 1)}, f"x has shape .*; expected .* with d_model {D}"),
        ({"x": torch.zeros(0, S, D)}, "x has shape .* at least one sequence"),
        ({"x": torch.zeros(B, S, D, dtype=torch.int64)}, "x has dtype torch.int64; expected a floating-point dtype"),
        ({"x": np.zeros((B, S, D))}, "x is a numpy.ndarray; expected a torch.Tensor"),
        ({"valid": torch.ones(B, S + 1, dtype=torch.bool)}, "valid has shape"),
        ({"valid": torch.ones(B, S)}, "valid has dtype torch.float32; expected torch.bool"),
        ({"valid": torch.ones(B, S, dtype=torch.int64)}, "valid has dtype torch.int64; expected torch.bool"),
        ({"token_ids": torch.zeros(B, S)}, "token_ids has dtype torch.float32; expected torch.int64"),
        ({"token_ids": torch.zeros(S, dtype=torch.int64)}, "token_ids has shape"),
        ({}, "token_ids: missing"),
    ],
)
def test_inputs_that_are_wrong_are_refused(inputs: dict[str, Any], expected: str) -> None:
    layer = MoELayer(D, E, router="hash", d_ff=FF)
    with pytest.raises((TypeError, ValueError), match=expected):
        layer(**{"x": tokens(), **inputs})


def test_the_hash_router_routes_by_token_ids() -> None:
    token_ids = torch.arange(B * S).view(B, S)
    _, stats = MoELayer(D, E, router="hash", d_ff=FF)(tokens(), token_ids=token_ids)
    assert int((stats.tokens_per_expert > 0).sum()) > 1


def test_a_router_without_probabilities_has_no_balance_loss() -> None:
    _, stats = MoELayer(D, E, router="round_robin", d_ff=FF)(tokens())
    with pytest.raises(ValueError, match="no probabilities"):
        stats.balance_loss()
    with pytest.raises(ValueError, match="expected \\(batch, sequence, d_model\\)"):
        MoELayer(D, E, d_ff=FF)(torch.zeros(3, D))


@pytest.mark.slow
@pytest.mark.nightly
def test_it_compiles() -> None:
    layer, x = MoELayer(D, E, 2, d_ff=FF).eval(), tokens()
    torch.testing.assert_close(torch.compile(layer)(x)[0], layer(x)[0])
