"""Law: `parallel.compile` changes how fast a model learns, not what."""

from typing import Any, cast

import pytest
import torch

from tests.builders import latent_attention, make_batch, make_engine, make_packed_batch, tiny_model_config
from trainer.distributed.runtime import has_cpp_compiler
from trainer.engine.native import NativeEngine
from trainer.models.block import Block
from trainer.models.config import Recompute
from trainer.ops.attention import blocked_attention, torch_attention
from trainer.parallel.config import ParallelConfig

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")]

STEPS, ROWS, SEQ_LEN = 6, 6, 70  # 70: a whole block of attention and a part of one

MOE = {"capacity": {"factor": 0.6, "min": 1}, "num_shared_experts": 1}


def _engine(
    document_mask: bool,
    *,
    is_compiled: bool,
    recompute: Recompute = "none",
    fields: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
) -> NativeEngine:
    config = tiny_model_config({**MOE, **(moe or {})}, seq_len=SEQ_LEN, document_mask=document_mask, **(fields or {}))
    engine = make_engine(
        config, kernel="fused", dtype=torch.float64, parallel=ParallelConfig(compile=is_compiled, recompute=recompute)
    )
    expected = blocked_attention if is_compiled else torch_attention
    assert cast(Block, engine.model.blocks[0]).attention.core_attention is expected, "the law compares two ways"
    return engine


def _curve(engine: NativeEngine) -> torch.Tensor:
    """Loss, balance loss and gradient norm of every step."""
    curve = []
    for step in range(STEPS):
        if engine.model.config.document_mask:
            batch = make_packed_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, longest=40)
        else:
            batch = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, ragged=step % 2 == 1)
        result = engine.train_step([batch], lr=3e-3)
        curve.append([result.loss, result.balance_loss or 0.0, result.grad_norm])
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.nightly
@pytest.mark.parametrize(("document_mask", "num_layers"), [(True, 1), (False, 2)])
def test_a_compiled_model_learns_the_same(document_mask: bool, num_layers: int) -> None:
    fields = {"num_layers": num_layers}
    engines = (_engine(document_mask, is_compiled=is_compiled, fields=fields) for is_compiled in (False, True))
    eager, compiled = map(_curve, engines)
    assert eager[-1, 0] < eager[0, 0]
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-10)


@pytest.mark.nightly
def test_so_does_one_with_latent_attention() -> None:
    fields = {"num_layers": 1, **latent_attention()}
    engines = (_engine(True, is_compiled=is_compiled, fields=fields) for is_compiled in (False, True))
    eager, compiled = map(_curve, engines)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-10)


@pytest.mark.nightly
def test_so_does_one_with_biases_and_clamped_activations() -> None:
    fields = {"activation": "clamped_swiglu", "swiglu_limit": 0.3}
    moe = {"expert_bias": True, "first_dense_layers": 1}
    engines = (_engine(False, is_compiled=is_compiled, fields=fields, moe=moe) for is_compiled in (False, True))
    eager, compiled = map(_curve, engines)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-10)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recompute", ["norms_and_activations", "block"])
def test_so_does_one_that_recomputes(recompute: Recompute) -> None:
    eager, compiled = (_engine(False, is_compiled=is_compiled, recompute=recompute) for is_compiled in (False, True))
    torch.testing.assert_close(_curve(compiled), _curve(eager), rtol=0, atol=1e-10)


@pytest.mark.nightly
def test_so_does_one_with_windows_sinks_and_capped_scores() -> None:
    """Which are not torch's fused kernel."""
    own = {"sinks": True, "softcap": 1.0, "scale": 0.4, "qkv_bias": True, "rotary_fraction": 0.5}
    fields = {"num_layers": 1, "attention": {**own, "window": 5}, "logit_softcap": 3.0, "norm": "rms_plus_one"}
    engines = (_engine(True, is_compiled=is_compiled, fields=fields) for is_compiled in (False, True))
    eager, compiled = map(_curve, engines)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-10)


def test_compiled_attention_keeps_no_softmax_weights() -> None:
    engine = _engine(False, is_compiled=True, fields={"num_layers": 1})
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_step([make_batch(ROWS, SEQ_LEN, seed=0)], lr=0.0)
    weights_of_a_block = ROWS * engine.model.config.num_heads * 64 * 64
    assert max(sizes) < weights_of_a_block, "of the first 64 queries"
