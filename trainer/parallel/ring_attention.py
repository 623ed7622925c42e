"""Attention to rows that several ranks share: keys and values travel round a ring (arXiv 2310.01889).

    step      0               1               2                    rank i has chunks i and 2n - 1 - i of each row
    rank 0    its own keys    those of 2      those of 1
    rank 1    its own keys    those of 0      those of 2           of a rank before, all queries see the front chunk;
    rank 2    its own keys    those of 1      those of 0           of a rank after, those of the back chunk see all

Every step is as much work on every rank. Nobody holds a whole row: a rank keeps its own queries, keys, values and
outputs. In the backward pass keys travel once more, and their gradient with them, to which each rank adds the share of
its queries; after n steps it is at home, complete.

# B rows, S positions of a rank, n ranks, H query heads, Hkv key and value heads, d width of a head, v of values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.distributed.collectives import Group, PendingOp
from trainer.ops.attention import CausalAttention
from trainer.ops.attention_mask import AttentionMask, MaskForm, PreparedMask, RowMask
from trainer.ops.partial_attention import SomeKeys, add_part, attend_to_some, gradients_of_some
from trainer.ops.scored_attention import ScoreRule
from trainer.ops.zigzag import part_of


class RingAttention:
    """Kernel of attention for parts of rows; a batch of whole rows is another kernel's, with masks of its form."""

    def __init__(self, group: Group, kernel: CausalAttention, form: MaskForm) -> None:
        self._group, self._kernel, self._form = group, kernel, form

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | None = None, rule: ScoreRule | None = None
    ) -> Tensor:
        """Attend; a mask is an `AttentionMask`, of whole rows, or None."""
        if not isinstance(mask, RowMask):
            whole = mask.prepared(self._form) if isinstance(mask, AttentionMask) else mask
            return self._kernel(q, k, v, whole, rule)
        assert mask.whole is None or isinstance(mask.whole, AttentionMask), "in the form `rule`"
        # As torch's kernel computes: in the values' dtype, on the CPU in at least float32.
        dtype = torch.promote_types(v.dtype, torch.float32) if v.device.type == "cpu" else v.dtype
        softcap, sinks = (None, None) if rule is None else (rule.softcap, rule.sinks)
        ring = _Ring(self._group, mask.whole, softcap)
        with torch.autocast(q.device.type, enabled=False):
            return _RingAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), sinks, ring).to(v.dtype)


@dataclass(frozen=True, slots=True)
class _Ring:
    """Steps of one rank."""

    group: Group
    mask: AttentionMask | None
    softcap: float | None

    def steps(self, S: int, k: Tensor, v: Tensor) -> Iterator[tuple[SomeKeys, slice]]:
        """Yield, for the keys of each rank in turn, what is seen of them, and the queries that see it.

        The next keys are under way meanwhile.
        """
        me, n = self.group.index, self.group.size
        message, pending = torch.cat([k.flatten(), v.flatten()]), None
        for step in range(n):
            message = message if pending is None else pending.wait()
            pending = self.group.start_shift(message) if step + 1 < n else None
            source = (me - step) % n
            queries = slice(S // 2, S) if source > me else slice(0, S)
            seen = slice(0, S // 2) if source < me else slice(0, S)
            keys, values = message.split([k.numel(), v.numel()])
            yield self._some_keys(keys.view_as(k), values.view_as(v), source, queries, seen), queries

    def _some_keys(self, k: Tensor, v: Tensor, source: int, queries: slice, seen: slice) -> SomeKeys:
        me, n = self.group.index, self.group.size
        places = torch.arange(n * k.shape[2], device=k.device)[None]
        documents = None
        if self.mask is not None:
            of_rows = self.mask.document
            documents = part_of(of_rows, me, n)[:, queries], part_of(of_rows, source, n)[:, seen]
        return SomeKeys(
            k=k[:, :, seen],
            v=v[:, :, seen],
            position=part_of(places, source, n)[0, seen],
            query_position=part_of(places, me, n)[0, queries],
            documents=documents,
            window=None if self.mask is None else self.mask.window,
            sees_all=source != me,
            is_square=source == me,
        )


class _RingAttention(torch.autograd.Function):
    """q (B, H, S, d), k (B, Hkv, S, d), v (B, Hkv, S, v), sinks (H,) or None -> (B, H, S, v), at least float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: _Ring) -> Tensor:
        steps = ring.steps(q.shape[2], k, v)
        out, lse = attend_to_some(q, next(steps)[0], ring.softcap)  # its own keys: every query sees at least its own
        for keys, queries in steps:
            more, its_lse = attend_to_some(q[:, :, queries], keys, ring.softcap)
            added = add_part(out[:, :, queries], lse[:, :, queries], more, its_lse)
            out[:, :, queries], lse[:, :, queries] = added
        if sinks is not None:  # a key without a value
            sink = sinks.to(lse.dtype)[:, None]
            out, lse = out * torch.sigmoid(lse - sink)[..., None], torch.logaddexp(lse, sink.expand_as(lse))
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        grad_q, sizes = torch.zeros_like(q, dtype=out.dtype), [k.numel(), v.numel()]
        pending: PendingOp | None = None
        for keys, queries in ring.steps(q.shape[2], k, v):
            mine, rows, outs, norms = (x[:, :, queries] for x in (grad, q, out, lse))
            of_q, of_k, of_v = gradients_of_some(mine, rows, keys, outs, norms, ring.softcap)
            grad_q[:, :, queries] += of_q
            travelling = k.new_zeros(sum(sizes), dtype=out.dtype) if pending is None else pending.wait()
            for whole, part in zip(travelling.split(sizes), (of_k, of_v), strict=True):
                shape = *k.shape[:3], part.shape[-1]
                whole.view(shape)[:, :, : part.shape[2]] += part  # a front chunk, or all
            pending = ring.group.start_shift(travelling)
        assert pending is not None
        grad_k, grad_v = pending.wait().split(sizes)
        grad_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.to(lse.dtype)[:, None] - lse) * (grad * out).sum(-1)  # (B, H, S)
            grad_sinks = -share.sum((0, 2)).to(sinks.dtype)
        return grad_q.to(q.dtype), grad_k.view_as(k).to(k.dtype), grad_v.view_as(v).to(v.dtype), grad_sinks, None
