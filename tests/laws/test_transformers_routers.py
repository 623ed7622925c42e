"""Law: routers choose the experts of transformers' routers, with their weights and gradients, in float64 to 1e-12."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from tests.builders import make_context, moe_config
from tests.transformers_models import WithoutFloat32
from trainer.moe.routers.top_k import TopKRouter

NUM_TOKENS, NUM_EXPERTS, D_MODEL = 96, 8, 6


@dataclass(frozen=True)
class Pair:
    """One of their routers, and the config of ours."""

    theirs: type[nn.Module]
    family: str
    options: dict[str, Any]
    router: dict[str, Any]
    spread: float = 1.0


def _v3(theirs: type[nn.Module], family: str, **router: Any) -> Pair:
    """Sigmoid scores, a selection bias and groups, from our options."""
    options = {
        "n_group": router.get("groups", 1),
        "topk_group": router.get("groups_kept", 1),
        "norm_topk_prob": router.get("normalize", True),
        "routed_scaling_factor": router.get("scale", 1.0),
    }
    return Pair(theirs, family, options, {"bias_update_rate": 0.01, **router})


LIMITED = {"kind": "group_limited", "groups": 4, "groups_kept": 2, "top_k": 3, "scale": 2.5}
GREEDY = {"topk_method": "greedy", "routed_scaling_factor": 16.0}
V2_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
BEST = {"group_score": "best", "score": "softmax", "normalize": False}
PAIRS = {
    "DeepSeek-V3, Kimi K2": _v3(DeepseekV3TopkRouter, "deepseek_v3", **LIMITED),
    "DeepSeek-V3, weights as they are": _v3(DeepseekV3TopkRouter, "deepseek_v3", **LIMITED, normalize=False),
    "dots1, one group": _v3(Dots1TopkRouter, "dots1", kind="bias_balanced", top_k=3, scale=2.5),
    "GLM-4-MoE, one group": _v3(Glm4MoeTopkRouter, "glm4_moe", kind="bias_balanced", top_k=5, scale=2.5),
    "GLM-4-MoE, one expert": _v3(
        Glm4MoeTopkRouter, "glm4_moe", kind="bias_balanced", top_k=1, normalize=False, scale=2.5
    ),
    "MiniMax-M2": Pair(MiniMaxM2TopKRouter, "minimax_m2", {}, {"kind": "bias_balanced", "top_k": 3}),
    "DeepSeek-V2, greedy": Pair(
        DeepseekV2TopkRouter, "deepseek_v2", GREEDY, {"kind": "top_k", "top_k": 3, "normalize": False, "scale": 16.0}
    ),
    "DeepSeek-V2, groups": Pair(DeepseekV2TopkRouter, "deepseek_v2", V2_GROUPS, {**LIMITED, **BEST, "scale": 16.0}),
    "GPT-OSS": Pair(GptOssTopKRouter, "gpt_oss", {}, {"kind": "top_k", "top_k": 4, "gate_bias": True}),
    "GPT-OSS, far apart": Pair(GptOssTopKRouter, "gpt_oss", {}, {"kind": "top_k", "gate_bias": True}, spread=60.0),
    "Mixtral": Pair(MixtralTopKRouter, "mixtral", {}, {"kind": "top_k", "top_k": 2}),
    "OLMoE": Pair(OlmoeTopKRouter, "olmoe", {}, {"kind": "top_k", "top_k": 3, "normalize": False}),
    "Qwen2-MoE": Pair(
        Qwen2MoeTopKRouter, "qwen2_moe", {"norm_topk_prob": True}, {"kind": "top_k", "top_k": 8, "normalize": True}
    ),
}


def _theirs(pair: Pair, tensors: dict[str, Tensor]) -> nn.Module:
    """Return their router with these weights; some name the number of experts in another way."""
    top_k = {"num_experts_per_tok": pair.router.get("top_k", 2)}
    config = AutoConfig.for_model(pair.family, hidden_size=D_MODEL, num_attention_heads=1, **top_k, **pair.options)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        setattr(config, name, NUM_EXPERTS)
    router = pair.theirs(config).double()
    with torch.no_grad():
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            tensor.copy_(tensors[name])
    return router


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_choices_weights_and_gradients_are_theirs(pair: Pair, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * spread

    bias = drawn(NUM_EXPERTS, spread=0.2)
    tensors = {"weight": drawn(NUM_EXPERTS, D_MODEL, spread=pair.spread), "bias": bias, "e_score_correction_bias": bias}
    config = moe_config(num_experts=NUM_EXPERTS, router=pair.router).router
    ours = config.build(d_model=D_MODEL, num_experts=NUM_EXPERTS, layer=0).double()
    assert isinstance(ours, TopKRouter)
    ours.gate.weight.data.copy_(tensors["weight"])
    if ours.gate.bias is not None:
        ours.gate.bias.data.copy_(bias)
    if "bias" in dict(ours.named_buffers()) and pair.family != "deepseek_v2":
        ours.get_buffer("bias").copy_(bias)
    theirs = _theirs(pair, tensors)

    x = drawn(NUM_TOKENS, D_MODEL).requires_grad_()
    output = ours(x, make_context(1, NUM_TOKENS))
    decision = output.decision
    mine = torch.zeros(NUM_TOKENS, NUM_EXPERTS, dtype=torch.float64)
    mine = mine.index_put((decision.token_index, decision.expert_index), decision.combine_weight)
    more = (bias,) if pair.family == "minimax_m2" else ()
    with WithoutFloat32():
        logits, weights, experts = theirs(x, *more)
    other = torch.zeros_like(mine).scatter(1, experts, weights)
    assert output.logits is not None
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-12)
    assert torch.equal(mine != 0, other != 0), "the same experts"
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    probe = drawn(NUM_TOKENS, NUM_EXPERTS)
    pairs = zip(
        torch.autograd.grad((mine * probe).sum(), [x, *ours.parameters()]),
        torch.autograd.grad((other * probe).sum(), [x, *theirs.parameters()]),
        strict=True,
    )
    for one, another in pairs:
        torch.testing.assert_close(one, another, rtol=1e-12, atol=1e-12)
