"""Law: logits and every gradient of the whole model are those of transformers' models."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests import transformers_models
from tests.attention_cases import attention_cases
from tests.builders import make_batch, make_engine, make_model, make_packed_batch, rows_of, tiny_model_config
from trainer.data.batches.batch import Batch
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.ops.attention_mask import AttentionMask

NUM_ROWS, SEQ_LEN = 4, 8
QK_NORM = ("qwen3_moe", "dots1", "glm4_moe", "qwen3")
DENSE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Case:
    """One of their models, and ours that should compute the same."""

    family: str
    model: dict[str, Any]
    moe: dict[str, Any]

    def config(self, **fields: Any) -> ModelConfig:
        # Far from the defaults: a base, an epsilon or a layout of heads that nobody looks at shows.
        unusual = {"d_model": 32, "d_ff": 20, "rope_theta": 50.0, "norm_eps": 0.01, "qk_norm": self.family in QK_NORM}
        config = tiny_model_config(self.moe, **{**unusual, **self.model, **fields})
        return config.model_copy(update={"moe": None}) if self.family in DENSE else config


def _cases() -> dict[str, Case]:
    found = {}
    for family, top_ks in (("mixtral", (2, 3, 4)), ("qwen3_moe", (1, 2, 3, 4))):
        for top_k in top_ks:
            for kv_heads in (4, 2, 1):
                tied = (top_k + kv_heads // 2) % 2 == 0  # each number of heads and each k with both
                router = {"kind": "top_k", "top_k": top_k, "normalize": family == "mixtral" or top_k % 2 == 0}
                found[f"{family} k {top_k}, {4 // kv_heads} heads a key{', tied' if tied else ''}"] = Case(
                    family, {"num_kv_heads": kv_heads, "tie_embeddings": tied}, {"num_experts": 5, "router": router}
                )
    found["heads wider than d_model"] = Case("qwen3_moe", {"attention": {"head_dim": 10}}, {})
    found["first layers dense"] = Case("qwen3_moe", {"num_layers": 3}, {"first_dense_layers": 2})
    found["every second layer"] = Case("qwen3_moe", {"num_layers": 4}, {"every": 2})
    found["every third layer"] = Case("qwen3_moe", {"num_layers": 3}, {"every": 3})
    found["layers by index"] = Case("qwen3_moe", {"num_layers": 4}, {"layers": [0, 3]})
    found["shared expert with a gate"] = Case("qwen2_moe", {}, {"num_shared_experts": 1, "shared_gate": True})
    shared = {
        "num_shared_experts": 2,
        "shared_d_ff": 10,
        "shared_gate": True,
        "router": {"kind": "top_k", "normalize": False},
    }
    found["shared experts of their own width"] = Case("qwen2_moe", {"num_layers": 3}, {"every": 2, **shared})
    groups = {"kind": "group_limited", "groups": 4, "groups_kept": 2, "top_k": 3, "scale": 2.5, "bias_update_rate": 0.1}
    found["shared experts, groups, bias"] = Case(
        "dots1",
        {"num_layers": 3},
        {"num_experts": 8, "first_dense_layers": 1, "num_shared_experts": 2, "router": groups},
    )
    found["sigmoid, not normalised"] = Case(
        "dots1",
        {"num_kv_heads": 1, "tie_embeddings": True},
        {"num_experts": 8, "num_shared_experts": 1, "router": {**groups, "groups_kept": 4, "normalize": False}},
    )
    one_group = {"kind": "bias_balanced", "top_k": 3, "scale": 2.5, "bias_update_rate": 0.1}
    found["bias without groups"] = Case(
        "glm4_moe",
        {"num_kv_heads": 1},
        {"num_experts": 6, "first_dense_layers": 1, "num_shared_experts": 1, "router": one_group},
    )
    found |= _cases_of_routers() | _dense_cases()
    found |= {name: Case(*parts) for name, parts in attention_cases(SEQ_LEN).items()}
    return found | _latent_cases(groups)


def _cases_of_routers() -> dict[str, Case]:
    """GPT-OSS with all that it has, its clamp where values are and where they are not; and MiniMax-M2."""
    own = {"head_dim": 10, "qkv_bias": True, "out_bias": True, "sinks": True}
    yarn = {"kind": "yarn", "factor": 4.0, "original_length": SEQ_LEN // 2, "beta_fast": 2.0, "truncate": False}
    slides = {**own, "window": 3, "window_pattern": ["sliding", "full"]}
    clamped = {"activation": "clamped_swiglu"}
    biased = {"num_experts": 6, "expert_bias": True, "router": {"kind": "top_k", "top_k": 4, "gate_bias": True}}
    one_group = {"kind": "bias_balanced", "top_k": 3, "bias_update_rate": 0.1}
    normed = {"qk_norm": True, "attention": {"head_dim": 10, "qk_norm_over": "all_heads", "rotary_fraction": 0.6}}
    return {
        "gpt-oss": Case("gpt_oss", {**clamped, "attention": slides, "rope_scaling": yarn, "num_layers": 3}, biased),
        "gpt-oss, close limit": Case(
            "gpt_oss", {**clamped, "attention": {**own, "window": 4}, "swiglu_limit": 0.4, "swiglu_alpha": 1.4}, biased
        ),
        "minimax-m2": Case("minimax_m2", normed, {"num_experts": 6, "router": one_group}),
    }


def _dense_cases() -> dict[str, Case]:
    """Without experts."""
    llama3 = {"kind": "llama3", "factor": 4.0, "original_length": SEQ_LEN // 2, "high_freq_factor": 2.0}
    biased = {"qkv_bias": True, "out_bias": True}
    some = {"window": 3, "window_pattern": ["full", "sliding"]}
    return {
        f"dense: {family}": Case(family, model, {})
        for family, model in {
            "llama": {"attention": biased, "rope_scaling": llama3},
            "mistral": {"attention": {"head_dim": 10, "window": 3}, "num_kv_heads": 1},
            "qwen2": {"attention": {"qkv_bias": True, **some}, "tie_embeddings": True},
            "qwen3": {"attention": {"head_dim": 10, **some}, "num_layers": 3},
        }.items()
    }


def _latent_cases(groups: dict[str, Any]) -> dict[str, Case]:
    """All widths differ: none stands in for another."""
    latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
    compressed = {**latent, "q_lora_rank": 20}
    biased = {"latent": compressed, "qkv_bias": True, "out_bias": True}
    yarn = {"kind": "yarn", "factor": 4.0, "original_length": SEQ_LEN // 2, "mscale": 0.7, "mscale_all_dim": 0.7}
    own = {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 1.0, "beta_slow": 0.1}
    v2 = {"num_shared_experts": 2, "router": {"kind": "top_k", "top_k": 3, "normalize": False, "scale": 1.5}}
    v3 = {"num_experts": 8, "num_shared_experts": 1, "router": groups}
    return {
        name: Case(family, {"num_kv_heads": None, "qk_norm": False, "attention": {"latent": widths}, **model}, moe)
        for name, family, widths, model, moe in (
            ("latents", "deepseek_v2", latent, {"num_layers": 3}, {**v2, "first_dense_layers": 1}),
            ("latents, compressed queries", "deepseek_v2", compressed, {"tie_embeddings": True}, v2),
            ("latents, groups, bias", "deepseek_v3", compressed, {"num_layers": 3}, {**v3, "first_dense_layers": 1}),
            ("latents, plain queries, groups", "deepseek_v3", {**latent, "v_head_dim": 20}, {}, v3),
            ("latents, yarn", "deepseek_v2", latent, {"rope_scaling": yarn}, v2),
            ("latents, biases, yarn", "deepseek_v3", {}, {"attention": biased, "rope_scaling": {**yarn, **own}}, v3),
        )
    }


CASES = _cases()


def _rows(kind: str) -> tuple[Batch, dict[str, Any], Tensor | None]:
    """A batch, what our config says of it, and the mask that theirs needs."""
    match kind:
        case "whole rows":
            return make_batch(NUM_ROWS, SEQ_LEN, seed=5), {}, None
        case "ragged":
            batch = make_batch(NUM_ROWS, SEQ_LEN, seed=5, ragged=True)
            return batch, {}, batch.valid
        case _:
            batch = make_packed_batch(NUM_ROWS, SEQ_LEN, seed=5)
            return batch, {"document_mask": True}, AttentionMask(document=batch.document_id).dense()


ROWS = ["whole rows", "ragged", "documents"]


def _ours(config: ModelConfig, dtype: torch.dtype) -> GPT:
    """A model in which no two weights are alike, norms and the selection bias included."""
    model = make_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or "bias" in name or "sinks" in name:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.add_(0.3 * noise.to(dtype))
    return model


def _compare_gradients(ours: dict[str, Tensor], theirs: nn.Module, config: ModelConfig, tolerance: float) -> None:
    mine = transformers_models.in_their_names(ours, config)
    assert mine.keys() == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4, f"{name} has no gradient to speak of"
        torch.testing.assert_close(
            mine[name], parameter.grad, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def _compare(case: Case, rows: str, dtype: torch.dtype, tolerance: float) -> None:
    batch, fields, mask = _rows(rows)
    config = case.config(**fields)
    ours = _ours(config, dtype)
    theirs = transformers_models.build(case.family, ours)
    output = ours(batch, want_logits=True)
    logits = transformers_models.their_logits(theirs, batch.tokens, mask)
    if (cap := config.logit_softcap) is not None:  # as their Gemma 2 does
        logits = (logits / cap).tanh() * cap
    assert output.logits is not None and output.logits.dtype is dtype is logits.dtype
    torch.testing.assert_close(output.logits[batch.valid], logits[batch.valid], rtol=0, atol=tolerance)
    learned = batch.loss_mask & batch.valid
    (output.loss_sum / learned.sum()).backward()
    F.cross_entropy(logits[learned], batch.targets[learned]).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    _compare_gradients(gradients, theirs, config, tolerance)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_and_every_gradient_are_theirs_in_float64(case: Case, rows: str) -> None:
    _compare(case, rows, torch.float64, 1e-12)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_and_every_gradient_are_theirs_in_float32(case: Case) -> None:
    """With their casts, as everybody runs it."""
    _compare(case, "ragged", torch.float32, 1e-5)


def test_the_cases_are_what_they_say() -> None:
    """The law's own control."""
    families = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "deepseek_v2", "deepseek_v3"}
    families |= {"gpt_oss", "minimax_m2", *DENSE}
    assert {case.family for case in CASES.values()} == families
    assert {case.model.get("num_kv_heads", 2) for case in CASES.values()} == {None, 1, 2, 4}
    ragged, packed = _rows("ragged")[0], _rows("documents")[0]
    assert not ragged.valid.all() and not ragged.loss_mask[ragged.valid].all()
    assert not packed.valid.all() and not packed.loss_mask[packed.valid].all()
    assert packed.document_id.max() > NUM_ROWS, "several documents in a row"
    assert CASES["first layers dense"].config().moe_layers == (2,)
    assert CASES["every second layer"].config().moe_layers == (1, 3)
    assert CASES["layers by index"].config().moe_layers == (0, 3)


@pytest.mark.parametrize(
    "name",
    ["mixtral k 2, 2 heads a key", "qwen3_moe k 3, 4 heads a key", "latents, groups, bias", "latents, biases, yarn"],
)
def test_logits_by_way_of_the_cache_are_theirs(name: str) -> None:
    case, (batch, _, _) = CASES[name], _rows("whole rows")
    ours = _ours(case.config(), torch.float64)
    logits = transformers_models.their_logits(transformers_models.build(case.family, ours), batch.tokens, None)
    cache = ours.new_cache(NUM_ROWS, SEQ_LEN)
    for start, end in ((0, 3), (3, 4), (4, 8)):
        mine = ours.next_logits(batch.tokens[:, start:end], cache)
        torch.testing.assert_close(mine, logits[:, end - 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_pieces", [1, 2])
def test_a_step_has_the_gradient_of_their_loss_with_their_balance_loss(num_pieces: int) -> None:
    """Cross-entropy per target and balance loss per valid token: with one MoE layer, whose pool theirs is."""
    balance = {"coef": 0.3, "convention": "hf"}
    case = Case("qwen3_moe", {}, {"first_dense_layers": 1, "balance": balance, "z_loss_coef": 0.0})
    batch, _, mask = _rows("ragged")
    engine = make_engine(case.config(), dtype=torch.float64)
    theirs = transformers_models.build(case.family, engine.model)
    rows = NUM_ROWS // num_pieces
    step = engine.accumulate([rows_of(batch, i * rows, (i + 1) * rows) for i in range(num_pieces)])

    routed: list[Tensor] = []
    gate = theirs.get_submodule("model.layers.1.mlp.gate")
    gate.register_forward_hook(lambda _, inputs, output: routed.append(output[0]))
    logits = transformers_models.their_logits(theirs, batch.tokens, mask)
    learned = batch.loss_mask & batch.valid
    loss = F.cross_entropy(logits[learned], batch.targets[learned])
    with transformers_models.WithoutFloat32():
        balance_loss = load_balancing_loss_func((routed[0],), 4, 2, attention_mask=batch.valid.long())
    assert isinstance(balance_loss, Tensor)
    (loss + 0.3 * balance_loss).backward()
    assert float(step.total.loss) == pytest.approx(float(loss.detach()), abs=1e-12)
    assert step.total.balance_loss is not None
    assert float(step.total.balance_loss) == pytest.approx(float(balance_loss.detach()) / 2, abs=1e-12)
    gradients = {name: part.tensor for name, part in engine.gradients().slices.items()}
    _compare_gradients(gradients, theirs, case.config(), 1e-12)
