"""flex_attention equals the other kernels; on the CPU its backward pass is torch's uncompiled definition of it."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import BlockMask

from tests.builders import make_engine, make_packed_batch, tiny_model_config
from trainer.distributed.runtime import has_cpp_compiler
from trainer.engine.native import NativeEngine
from trainer.models.block import Block
from trainer.ops import block_attention
from trainer.ops.attention import blocked_attention, torch_attention
from trainer.ops.attention_mask import AttentionMask
from trainer.ops.block_attention import flex, suits_blocks
from trainer.parallel.config import ParallelConfig

B, H, d = 2, 4, 16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run flex_attention as torch defines it, with gradients, which torch refuses on the CPU since it lacks kernels."""
    torch._dynamo.reset()  # what other tests compiled counts towards its limit, beyond which nothing is compiled
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(block_attention, "_fused", lambda: torch.compile(module.flex_attention, backend="aot_eager"))


def _mask(S: int, window: int | None) -> AttentionMask:
    document = (torch.rand(B, S, generator=torch.Generator().manual_seed(S)) < 0.02).cumsum(1)
    document[1, S - S // 3 :] = -1
    return AttentionMask(document=document, window=window)


def _run(
    attention: Callable, S: int, kv_heads: int, dtype: torch.dtype, mask: object, value_width: int = d
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(B, heads, S, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads, width in ((H, d), (kv_heads, d), (kv_heads, value_width))
    )
    y = attention(q, k, v, mask)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return [y, *torch.autograd.grad((y * weight).sum(), (q, k, v))]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("S", "kv_heads", "window"), [(40, 4, None), (200, 2, 30), (256, 1, None)])
def test_it_equals_the_other_kernels(S: int, kv_heads: int, window: int | None) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if S == 256 else (torch.float64, 1e-12)
    mask = _mask(S, window)
    found = _run(flex, S, kv_heads, dtype, mask.blocks())
    for other in (torch_attention, blocked_attention):
        for mine, its in zip(found, _run(other, S, kv_heads, dtype, mask.dense()), strict=True):
            torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("uncompiled")
def test_values_may_be_narrower_than_keys() -> None:
    """As in latent attention."""
    mask = _mask(150, None)
    found = _run(flex, 150, H, torch.float64, mask.blocks(), 8)
    for mine, its in zip(found, _run(torch_attention, 150, H, torch.float64, mask.dense(), 8), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_its_fused_kernel_equals_torchs() -> None:
    S, mask = 300, _mask(300, None)
    q, k, v = (torch.randn(B, heads, S, d, generator=torch.Generator().manual_seed(heads)) for heads in (H, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach the products
        torch.testing.assert_close(flex(q, k, v, mask.blocks()), torch_attention(q, k, v, mask.dense()))


def _engine(parallel: ParallelConfig, fields: dict[str, Any]) -> NativeEngine:
    config = tiny_model_config(seq_len=150, num_heads=4, num_kv_heads=2, d_model=32, **fields)
    return make_engine(config, dtype=torch.float64, parallel=parallel)


CHANGED_SCORES = {"sinks": True, "softcap": 1.0, "window": 40, "window_pattern": ["sliding", "full"]}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "fields", [{"document_mask": True}, {"attention": CHANGED_SCORES}], ids=["documents", "scores"]
)
def test_a_model_learns_the_same(fields: dict[str, Any]) -> None:
    dense, blocks = _engine(ParallelConfig(), fields), _engine(ParallelConfig(recompute="block"), fields)
    blocks.model.mask_form = "blocks"
    for block in blocks.model.blocks:
        cast(Block, block).attention.core_attention = flex
    masks = blocks.model._masks(make_packed_batch(1, 150))
    assert all(isinstance(mask, BlockMask) for mask in masks.values()), "the law compares two ways"
    for step in range(2):
        batch = make_packed_batch(3, 150, seed=step, first_sample=3 * step, longest=60)
        mine, its = (engine.train_step([batch], lr=3e-3) for engine in (blocks, dense))
        torch.testing.assert_close([mine.loss, mine.grad_norm], [its.loss, its.grad_norm], rtol=0, atol=1e-11)


def test_another_micro_batch_compiles_nothing_new() -> None:
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module.flex_attention, backend=backend, dynamic=False)
    for seed in range(3):
        q = torch.randn(B, H, 200, d, generator=torch.Generator().manual_seed(seed))
        compiled(q, q, q, block_mask=AttentionMask(document=_mask(200, None).document + seed).blocks())
    assert len(graphs) == 1


def test_only_gpus_up_to_float32_have_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "find_spec", lambda _: object())
    assert suits_blocks(CUDA, torch.bfloat16, 64) and suits_blocks(CUDA, torch.float32, 16)
    assert not suits_blocks(CPU, torch.float32, 64), "no backward pass"
    assert not suits_blocks(CUDA, torch.float64, 64) and not suits_blocks(CUDA, torch.float32, 8)
    monkeypatch.setattr(block_attention, "find_spec", lambda _: None)
    assert not suits_blocks(CUDA, torch.bfloat16, 64), "torch compiles it by Triton"
