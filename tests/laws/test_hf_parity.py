"""Law: balance loss and gate weights are those of Hugging Face's Mixtral, so its coefficients carry over."""

import pytest
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

from tests.builders import make_context, moe_config
from trainer.moe.losses import Denominators, objective
from trainer.moe.stats import collect_stats

NUM_ROWS, SEQ_LEN, D_MODEL = 4, 32, 16


def _routed(num_experts: int, top_k: int, valid: torch.Tensor) -> tuple:
    config = moe_config(
        num_experts=num_experts,
        router={"kind": "top_k", "top_k": top_k},
        balance={"coef": 0.02, "scope": "micro_batch", "convention": "hf"},
        z_loss_coef=0.0,
    )
    router = config.router.build(d_model=D_MODEL, num_experts=num_experts, layer=0)
    x = torch.randn(NUM_ROWS * SEQ_LEN, D_MODEL, generator=torch.Generator().manual_seed(1))
    context = make_context(NUM_ROWS, SEQ_LEN, valid)
    return config, router, x, context


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 3), (16, 4)])
def test_balance_loss_and_its_gradient_equal_mixtral_s(num_experts: int, top_k: int, padded: bool) -> None:
    valid = torch.ones(NUM_ROWS, SEQ_LEN, dtype=torch.bool)
    if padded:
        valid[0, 20:] = valid[2, 5:] = False
    config, router, x, context = _routed(num_experts, top_k, valid.flatten())
    routed = router(x, context)
    stats = collect_stats(routed, routed.decision, context)
    denominators = Denominators(target_tokens=1, routed_tokens=int(valid.sum()))
    ours = objective(
        torch.zeros(()), [stats], global_stats=None, denominators=denominators, losses=config.aux_losses
    ).total
    theirs = 0.02 * load_balancing_loss_func(
        (routed.logits,), num_experts, top_k, attention_mask=valid.long() if padded else None
    )
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    weight = router.gate.weight
    (our_gradient,) = torch.autograd.grad(ours, weight, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 3), (16, 4)])
def test_gate_weights_and_choices_equal_mixtral_s(num_experts: int, top_k: int) -> None:
    valid = torch.ones(NUM_ROWS * SEQ_LEN, dtype=torch.bool)
    _, router, x, context = _routed(num_experts, top_k, valid)
    theirs = MixtralTopKRouter(
        MixtralConfig(hidden_size=D_MODEL, num_local_experts=num_experts, num_experts_per_tok=top_k)
    )
    theirs.weight.data.copy_(router.gate.weight.data)
    decision = router(x, context).decision
    _, their_weights, their_experts = theirs(x)
    assert torch.equal(decision.expert_index.view(-1, top_k), their_experts)
    torch.testing.assert_close(decision.combine_weight.view(-1, top_k), their_weights, rtol=0, atol=1e-6)
