"""Cross-entropy of an output head, without the logits of all tokens at once.

A chunk of tokens at a time: logits, losses, and already the gradients of hidden states and weight, as if the loss of
each row had gradient 1. If the backward pass brings one gradient for all rows, as that of their sum does, it only
scales these, so there are no more products than in plain autograd. For any other gradient it computes the logits once
more. Nothing of T * V elements exists in either pass.

# B rows, S tokens in a row, T = B * S, n tokens of a chunk, D d_model, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.first_derivative import only_first_derivative
from trainer.ops.softcap import softcapped


@dataclass(frozen=True, slots=True)
class HeadChunks:
    """How an output head is applied: how many tokens at a time, and in which dtype."""

    size: int
    """Maximum tokens of a chunk, n."""
    dtype: torch.dtype
    """Dtype of the products; losses are at least float32."""
    is_compiled: bool = False
    """Compile the operations between the products."""
    softcap: float | None = None
    """Soft limit of the logits; None: none."""

    def of(self, num_tokens: int) -> Iterator[slice]:
        """Yield chunks of equal length, the last of which may be shorter."""
        count = -(-num_tokens // self.size)
        length = -(-num_tokens // max(1, count))
        yield from (slice(start, start + length) for start in range(0, num_tokens, max(1, length)))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_mask: Tensor, chunks: HeadChunks, *, needs_z: bool = False
) -> tuple[Tensor, Tensor]:
    """Return each row's cross-entropy in nats, and squared logsumexp of its logits, both (B,), summed over targets.

    Args:
        hidden: (B, S, D) normalized residual stream.
        weight: (V, D), whole.
        targets: (B, S) token ids.
        target_mask: (B, S) bool; the other tokens have no loss. Or weights, which multiply the losses.
        chunks: tokens at a time, and dtype.
        needs_z: the second result will have a gradient, so no gradient is computed in the forward pass.
    """
    prepares = torch.is_grad_enabled() and not needs_z
    with torch.autocast(hidden.device.type, enabled=False):  # casts as `chunks` says
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, target_mask, chunks, prepares)


@torch.no_grad()
def chunked_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, chunks: HeadChunks) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (B, S) in nats, and whether it is the most probable token."""
    nats, is_greedy, weight = [], [], weight.to(chunks.dtype)
    tokens, token_ids = hidden.flatten(0, 1), targets.flatten()
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in chunks.of(len(tokens)):
            logits = _capped(F.linear(tokens[chunk].to(chunks.dtype), weight), chunks.softcap)  # (n, V)
            nats.append(_losses(logits, token_ids[chunk])[0])
            is_greedy.append(logits.argmax(-1) == token_ids[chunk])
    return -torch.cat(nats).view(targets.shape), torch.cat(is_greedy).view(targets.shape)


class _Needed(NamedTuple):
    """Whether something learns from the gradient of the hidden states, and whether the weight does."""

    hidden: bool
    weight: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        target_mask: Tensor,
        chunks: HeadChunks,
        prepares: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets, target_mask)
        ctx.set_materialize_grads(False)
        ctx.chunks, ctx.prepared = chunks, None
        mask = target_mask.to(_wide(chunks.dtype))
        if prepares:
            needed = _Needed(*ctx.needs_input_grad[:2])
            nats, logsumexp, *ctx.prepared = _with_gradients(hidden, weight, targets, mask, None, chunks, needed)
        else:
            tokens, token_ids, cast = hidden.flatten(0, 1), targets.flatten(), weight.to(chunks.dtype)
            parts = [
                _losses(_capped(F.linear(tokens[chunk].to(chunks.dtype), cast), chunks.softcap), token_ids[chunk])
                for chunk in chunks.of(len(tokens))
            ]
            nats, logsumexp = (torch.cat(part).view(targets.shape) for part in zip(*parts, strict=True))
        return (nats * mask).sum(1), (logsumexp.square() * mask).sum(1)

    @staticmethod
    @only_first_derivative
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_loss: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, target_mask = ctx.saved_tensors
        prepared, ctx.prepared = ctx.prepared, None  # scaled in place, so a second backward pass computes its own
        if prepared is not None and grad_z is None and grad_loss is not None and _is_uniform(grad_loss):
            scale = grad_loss[0]
            grad_hidden, grad_weight = (None if gradient is None else gradient.mul_(scale) for gradient in prepared)
        else:
            mask = target_mask.to(_wide(ctx.chunks.dtype))
            on_loss = mask * (0 if grad_loss is None else grad_loss[:, None])
            on_z = None if grad_z is None else mask * grad_z[:, None]
            needed = _Needed(*ctx.needs_input_grad[:2])
            found = _with_gradients(hidden, weight, targets, on_loss, on_z, ctx.chunks, needed)
            *_, grad_hidden, grad_weight = found
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _with_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    on_loss: Tensor,
    on_z: Tensor | None,
    chunks: HeadChunks,
    needed: _Needed,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return nats and logsumexp (B, S), and the gradients of hidden and weight, given those of nats and logsumexp^2.

    One that is not needed is None, and costs no product and no memory.
    """
    tokens, token_ids, cast = hidden.flatten(0, 1), targets.flatten(), weight.to(chunks.dtype)
    nats, logsumexp = (torch.empty(targets.shape, dtype=on_loss.dtype, device=hidden.device) for _ in range(2))
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed.hidden else None
    grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if needed.weight else None
    losses_and_gradient = _parts(chunks.is_compiled)
    for chunk in chunks.of(len(tokens)):
        x = tokens[chunk].to(chunks.dtype)  # (n, D)
        z = None if on_z is None else on_z.reshape(-1)[chunk]
        gradients = on_loss.reshape(-1)[chunk], z
        found = losses_and_gradient(F.linear(x, cast), token_ids[chunk], *gradients, chunks.softcap)
        nats.view(-1)[chunk], logsumexp.view(-1)[chunk], grad_logits = found
        if grad_hidden is not None:
            grad_hidden.view(tokens.shape)[chunk] = grad_logits @ cast
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits.T, x)
    return nats, logsumexp, grad_hidden, grad_weight


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy in nats and logsumexp (n,) of logits (n, V)."""
    return _at_targets(torch.log_softmax(logits, dim=-1, dtype=_wide(logits.dtype)), logits, targets)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcapped(logits.to(_wide(logits.dtype)), softcap)


def _losses_and_gradient(
    products: Tensor, targets: Tensor, on_loss: Tensor, on_z: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return also the gradient (n, V) of the uncapped logits, given those of nats and logsumexp^2 (n,); None: 0."""
    logits = _capped(products, softcap)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=_wide(logits.dtype))
    nats, logsumexp = _at_targets(log_probs, logits, targets)
    on_probs = on_loss if on_z is None else on_loss + 2 * on_z * logsumexp
    gradient = log_probs.exp_().mul_(on_probs[:, None]).scatter_add_(1, targets[:, None], -on_loss[:, None])
    if softcap is not None:
        gradient.mul_(1 - (logits / softcap).square())
    return nats, logsumexp, gradient.to(products.dtype)


@cache
def _parts(is_compiled: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_losses_and_gradient, dynamic=False) if is_compiled else _losses_and_gradient


def _at_targets(log_probs: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    nats = -log_probs.gather(1, targets[:, None])[:, 0]
    return nats, logits.gather(1, targets[:, None])[:, 0] + nats


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b in place; a sum of bfloat16 products is kept in float32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # which the FLOP counter sees, unlike addmm_
    else:
        total.add_(a @ b)


def _is_uniform(gradient: Tensor) -> bool:
    """Return whether all elements of a (B,) gradient are one element in memory, without waiting for the device."""
    return gradient.numel() == 1 or gradient.stride(0) == 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
