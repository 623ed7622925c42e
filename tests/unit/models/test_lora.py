"""Adapters of a whole model: values and gradients of W + s B A, what is frozen, and what is saved."""

from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.builders import latent_attention, make_batch, make_model, tiny_model_config
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.models.lora import LoRALinear, whole_weight
from trainer.models.parameter_roles import FACTOR_A, FACTOR_B, is_adapter

RANK = 3
LAYER = {"num_shared_experts": 1, "shared_gate": True, "first_dense_layers": 1, "expert_bias": True}
MODELS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "everything": (LAYER, {"attention": {"qkv_bias": True}, "lora": {"rank": RANK, "alpha": 2.0, "use_rslora": True}}),
    "attention and routers": ({}, {"lora": {"rank": RANK, "targets": ["attention"], "trains": ["router", "norms"]}}),
    "half of the experts' weights": ({}, {"lora": {"rank": RANK, "targets": ["experts.w_out", "attention.qkv"]}}),
    "latents": ({}, {**latent_attention(), "lora": {"rank": RANK}}),
    "experts whose outputs are compared": ({"diversity_coef": 0.5}, {"lora": {"rank": RANK, "targets": ["experts"]}}),
}


def _adapted(name: str, *, dtype: torch.dtype = torch.float64, kernel: Any = "loop") -> GPT:
    """Return a model whose factors B are not 0 either."""
    moe, fields = MODELS[name]
    model = make_model(tiny_model_config(moe, **fields), dtype=dtype, kernel=kernel)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(FACTOR_B):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _composed(model: GPT) -> tuple[GPT, dict[str, Tensor]]:
    """Return the model without adapters, and its parameters as functions of those of the other: W + s B A."""
    lora = model.config.lora
    assert lora is not None
    plain = make_model(model.config.model_copy(update={"lora": None}), dtype=torch.float64)
    given = dict(model.named_parameters())
    found = {}
    for name in dict(plain.named_parameters()):
        of_linear = name.removesuffix("weight")
        prefix = next((p for p in (of_linear, f"{name}_") if p + FACTOR_A in given), None)
        weight = given[name]
        found[name] = (
            weight if prefix is None else weight + lora.scale * given[prefix + FACTOR_B] @ given[prefix + FACTOR_A]
        )
    return plain, found


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, list(learning.values())), strict=True))


@pytest.mark.parametrize("kernel", ["loop", "padded", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_sum_of_both_matrices(name: str, kernel: str) -> None:
    model, batch = _adapted(name, kernel=kernel), make_batch(2, 8, ragged=True)
    plain, merged = _composed(model)
    expected = functional_call(plain, merged, (batch,)).loss_sum
    gradients = _gradients(expected, model)
    assert any(FACTOR_A in name for name in gradients) and all(g.any() for g in gradients.values())
    for recompute in ("none", "experts", "norms_and_activations", "block"):
        for block in cast(Iterable[Block], model.blocks):
            block.set_recompute(recompute)
        loss = model(batch).loss_sum
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        for key, mine in _gradients(loss, model).items():
            scale = max(1.0, float(gradients[key].abs().max()))
            torch.testing.assert_close(mine, gradients[key], rtol=0, atol=1e-12 * scale, msg=f"{key}, {recompute}")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_begins_as_the_one_that_it_adapts_bit_for_bit(name: str) -> None:
    moe, fields = MODELS[name]
    config = tiny_model_config(moe, **fields)
    model, plain = make_model(config), make_model(config.model_copy(update={"lora": None}))
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in plain.state_dict().items())
    batch = make_batch(2, 8)
    logits = [m(batch, want_logits=True).logits for m in (model, plain)]
    assert torch.equal(logits[0], logits[1])
    factors = {key: value for key, value in weights.items() if is_adapter(key)}
    bounds = {key: float(value.abs().max()) * value.shape[-1] ** 0.5 for key, value in factors.items()}
    assert all(0.5 < bound <= 1 if key.endswith(FACTOR_A) else bound == 0 for key, bound in bounds.items())


def test_only_adapters_learn_and_what_is_named() -> None:
    def learning(**lora: Any) -> set[str]:
        model = make_model(tiny_model_config({"num_shared_experts": 1}, qk_norm=True, lora={"rank": 2, **lora}))
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert all(map(is_adapter, learning()))
    assert {name.rpartition(".")[0].partition(".")[2] for name in learning(targets=["experts"])} == {
        "0.ffn.experts",
        "1.ffn.experts",
    }
    more = learning(trains=["router", "blocks.1.attention.q_norm", "norm.weight"])
    assert {name for name in more if not is_adapter(name)} == {
        "blocks.0.ffn.router.gate.weight",
        "blocks.1.ffn.router.gate.weight",
        "blocks.1.attention.q_norm.weight",
        "norm.weight",
    }


def test_the_cache_of_latents_multiplies_by_the_whole_matrix() -> None:
    """A token's logits do not depend on whether the tokens before it came at once."""
    model = _adapted("latents").eval()
    tokens = make_batch(2, 6).tokens
    with torch.no_grad():
        cache = model.new_cache(2, 6)
        model.next_logits(tokens[:, :3], cache)
        pieces = [model.next_logits(tokens[:, i : i + 1], cache) for i in range(3, 6)]
        plain, merged = _composed(model)
        whole = plain.new_cache(2, 6)
        plain.load_state_dict({**plain.state_dict(), **merged})
        expected = plain.next_logits(tokens, whole)
    torch.testing.assert_close(pieces[-1], expected, rtol=0, atol=1e-12)
    module = model.get_submodule("blocks.0.attention.kv_b")
    assert isinstance(module, LoRALinear)
    torch.testing.assert_close(whole_weight(module), merged["blocks.0.attention.kv_b.weight"], rtol=0, atol=1e-14)


def _saved_bytes(linear: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass in bfloat16 saves, without parameters and their rounded copies."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if len(tensor) == len(x):
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype is torch.bfloat16
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_projection_saves_one_rounded_copy_of_its_input_and_a_narrow_one(frozen: bool) -> None:
    base = nn.Linear(64, 32, bias=False)
    linear = LoRALinear(base, RANK, 2.0)
    base.weight.requires_grad_(not frozen)
    assert _saved_bytes(linear, torch.randn(128, 64, requires_grad=True)) == 2 * 128 * (64 + RANK)
