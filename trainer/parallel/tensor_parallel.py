"""Tensor parallelism of attention and dense feed-forward, with sequence-parallel norms (arXiv 1909.08053, 2205.05198).

                 whole on every rank                  cut over the ranks
    attention    norms, biases of outputs             heads: rows of qkv, columns of out, sinks
      latents    what makes and normalizes latents    heads: rows of q_b and kv_b, columns of out
    dense block  norm                                 hidden units: rows of w_in, columns of w_out

Where ranks are more than heads of keys, neighbours share one: each has some of its queries, and makes a part of its
keys and values, which they exchange. So every element of a weight is on one rank of a group.

What is whole sees a rank's part of each row, or its heads, so that its gradient is a partial sum on every rank, as any
dense gradient is. What is cut sees all tokens of the ranks: its gradient is complete but for other rows.

# B rows, S tokens in a part of a row, n ranks, D width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import even_slices
from trainer.models.block import Block
from trainer.models.feed_forward import FeedForward
from trainer.models.gpt import GPT
from trainer.ops.attention import CausalAttention
from trainer.ops.attention_mask import PreparedMask, RowMask
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.cut import Cut
from trainer.ops.scored_attention import ScoreRule
from trainer.ops.zigzag import in_row_order, part_of
from trainer.parallel.heads_of_ranks import heads_of_ranks

_Move = Callable[[Tensor, Group], Tensor]


class TensorParallel:
    """Exchange of tokens between the ranks that hold a block's matrices together."""

    def __init__(
        self, group: Group, cuts: Sequence[Mapping[str, Cut]], *, head_parts: Sequence[int] | None = None
    ) -> None:
        """Take what each rank has.

        Args:
            group: the ranks.
            cuts: those that each rank has of the parameters, by name.
            head_parts: width of each rank's part of the head of keys that this rank shares, 0 of those with another
                head; None: every head is on one rank.
        """
        self.group, self.cuts, self._head_parts = group, cuts, head_parts

    def gathered(self, x: Tensor, *, is_part: bool) -> Tensor:
        """Return the tokens (B, n S, D) of all ranks in the order of the row, from those here (B, S, D). Collective.

        They travel as the product would round them.
        """
        return _Exchange.apply(x.to(compute_dtype(x)), self.group, _gathered, _summed) if is_part else x

    def reduced(self, y: Tensor, *, is_part: bool) -> Tensor:
        """Return the sums over ranks (B, S, D) of the tokens here, from a share (B, n S, D) for all. Collective."""
        if is_part:
            return _Exchange.apply(y, self.group, _summed, _gathered)
        assert not y.requires_grad, "whole rows are for evaluation and generation"
        return self.group.all_reduce_(y.to(torch.promote_types(y.dtype, torch.float32), copy=True)).to(y.dtype)

    def whole_heads(self, x: Tensor, *, num_queries: int) -> Tensor:
        """Return queries, keys and values (B, S, .) in which keys and values that ranks share are whole. Collective.

        Each rank made the part of them that its rows of the weight give, which no other rank has.
        """
        if self._head_parts is None:
            return x
        q, kv = x.split([num_queries, x.shape[-1] - num_queries], dim=-1)
        there, back = (partial(move, parts=self._head_parts) for move in (_joined, _returned))
        parts = kv.unflatten(-1, (2, -1)).movedim(-1, 0)  # (w, B, S, 2)
        whole = _Exchange.apply(parts, self.group, there, back)  # (d, B, S, 2)
        return torch.cat([q, whole.movedim(0, -1).flatten(-2)], dim=-1)


class WholeRows:
    """Kernel of attention around another one, for ranks that see whole rows of their heads."""

    def __init__(self, kernel: CausalAttention) -> None:
        self._kernel = kernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | None = None, rule: ScoreRule | None = None
    ) -> Tensor:
        """Attend with the mask of whole rows."""
        return self._kernel(q, k, v, mask.whole if isinstance(mask, RowMask) else mask, rule)


class _Exchange(torch.autograd.Function):
    """An exchange whose gradient is exchanged by another one: gathering and summing are each other's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: _Move, back: _Move) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def _gathered(x: Tensor, group: Group) -> Tensor:
    return in_row_order(group.all_gather(x).unbind())


def _summed(y: Tensor, group: Group) -> Tensor:
    """Return the sums over ranks of this rank's tokens, added in at least float32, in the order of the ranks."""
    n, B = group.size, len(y)
    parts = torch.cat([part_of(y, index, n) for index in range(n)])  # (n B, S, D)
    shares = group.issue_all_to_all(parts, [B] * n, [B] * n).wait().unflatten(0, (n, B))
    return shares.sum(0, dtype=torch.promote_types(y.dtype, torch.float32)).to(y.dtype)


def _joined(part: Tensor, group: Group, parts: Sequence[int]) -> Tensor:
    """Return a whole head (d, ...) from the parts (w, ...) of the ranks that share it, for each of them."""
    send = [len(part) if width else 0 for width in parts]
    copies = part.repeat(sum(send) // len(part), *[1] * (part.dim() - 1))
    return group.issue_all_to_all(copies, send, parts).wait()


def _returned(grad: Tensor, group: Group, parts: Sequence[int]) -> Tensor:
    """Return the gradient (w, ...) of this rank's part: the sum of those that the queries of each sharing rank give."""
    receive = [parts[group.index] if width else 0 for width in parts]
    shares = group.issue_all_to_all(grad, parts, receive).wait().unflatten(0, (-1, parts[group.index]))
    return shares.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


@dataclass(frozen=True, slots=True)
class CutParameter:
    """A parameter that the ranks of a group hold together."""

    module: str
    """Name of the part of the model that it belongs to."""
    group: Group
    cuts: tuple[Cut, ...]
    """The cut of each rank."""

    @property
    def own(self) -> Cut:
        """The cut of this rank."""
        return self.cuts[self.group.index]

    def whole_rows(self, rows: Tensor) -> tuple[int, Tensor]:
        """Exchange some columns of some rows for all columns of fewer of these rows; return the first and them.

        Collective. All ranks give the same rows (R, ...), and get about R / n of them each.
        """
        slices, me = even_slices(len(rows), self.group.size), self.group.index
        first, last = slices[me]
        send = [(end - start) * rows[0].numel() for start, end in slices]
        receive = [(last - first) * cut.width for cut in self.cuts]
        found = self.group.issue_all_to_all(rows.reshape(-1), send, receive).wait().split(receive)
        columns = [part.view(last - first, cut.width) for part, cut in zip(found, self.cuts, strict=True)]
        return first, torch.cat(columns, 1)


def cut_matrices(model: GPT, group: Group) -> None:
    """Let a model on the meta device keep this rank's heads and hidden units, in place."""
    for block in cast(Iterable[Block], model.blocks):
        attention = block.attention
        heads = heads_of_ranks(attention.num_key_heads, group.size)
        cuts, own = [attention.cut_of_heads(each) for each in heads], heads[group.index]
        parts = None
        if group.size > attention.num_key_heads:
            widths = [cut["qkv.weight"].ranges[1] for cut in cuts]
            parts = [
                end - start if each.first == own.first else 0 for each, (start, end) in zip(heads, widths, strict=True)
            ]
        attention.exchange = TensorParallel(group, cuts, head_parts=parts)
        attention.keep_heads(own)
        if isinstance(block.ffn, FeedForward):
            units = even_slices(block.ffn.w_out.in_features, group.size)
            block.ffn.exchange = TensorParallel(group, [block.ffn.cut_of_units(*each) for each in units])
            block.ffn.keep_units(*units[group.index])


def cut_parameters(model: nn.Module) -> dict[str, CutParameter]:
    """Return the parameters that are here in part, by name."""
    found: dict[str, CutParameter] = {}
    for prefix, module in model.named_modules():
        exchange = getattr(module, "exchange", None)
        if isinstance(exchange, TensorParallel):
            for name in exchange.cuts[0]:
                cuts = tuple(of_rank[name] for of_rank in exchange.cuts)
                found[f"{prefix}.{name}"] = CutParameter(prefix, exchange.group, cuts)
    return found
