"""Attention by torch's flex_attention, which reads only the blocks of keys that a query sees and stores no scores.

Its fused kernels exist for CUDA only: on the CPU it has no backward pass, and uncompiled it stores all scores.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from trainer.ops.attention import torch_attention
from trainer.ops.attention_mask import PreparedMask
from trainer.ops.scored_attention import ScoreRule
from trainer.ops.softcap import softcapped

_NARROWEST = 16
"""Minimum width of a head in flex_attention's kernels."""


def suits_blocks(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Say whether flex_attention has a fused kernel with a backward pass: on CUDA, up to float32."""
    is_narrow = dtype.itemsize <= torch.float32.itemsize and head_dim >= _NARROWEST
    return device.type == "cuda" and is_narrow and find_spec("triton") is not None


def flex(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | None = None, rule: ScoreRule | None = None) -> Tensor:
    """Attend by flex_attention to what a block mask shows; other masks are torch's fused kernel's.

    Like that kernel, all products are in the dtype of the values.
    """
    if not isinstance(mask, BlockMask):
        return torch_attention(q, k, v, mask, rule)
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": k.shape[1] != q.shape[1]}
    sinks = None if rule is None else rule.sinks
    if rule is not None and rule.softcap is not None:
        options["score_mod"] = _capped(rule.softcap)
    with torch.autocast(q.device.type, enabled=False):
        if sinks is None:
            return _fused()(q.to(v.dtype), k.to(v.dtype), v, **options)
        y, found = _fused()(q.to(v.dtype), k.to(v.dtype), v, return_aux=AuxRequest(lse=True), **options)
        # With a sink the normalizer exp(lse) becomes exp(lse) + exp(sink).
        return (y * torch.sigmoid(found.lse - sinks[:, None])[..., None]).to(v.dtype)


@functools.cache
def _fused() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Return what caps a score, which flex_attention compiles into its kernel."""

    def cap(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcapped(score, softcap)

    return cap
