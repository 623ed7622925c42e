"""Cross-entropy in chunks: equal to torch's, for any gradient that comes back, and without logits of all tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trainer.ops.cross_entropy import HeadChunks, chunked_cross_entropy, chunked_log_probs

B, S, D, V = 3, 14, 8, 96
T = B * S
SIZES = [1, 4, 5, 14, T, 1000]
"""Chunks of one token, that do and do not divide the tokens, of a row, of all of them."""


def _inputs(dtype: torch.dtype = torch.float64, *, num_rows: int = B) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, targets and mask; the second row has no targets."""
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, S, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (num_rows, S), generator=generator)
    mask = torch.rand(num_rows, S, generator=generator) < 0.7
    mask[1:2] = False
    return hidden, weight, targets, mask


def _whole(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `chunked_cross_entropy` does, by torch."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (nats * mask).sum(1), (logits.logsumexp(-1).square() * mask).sum(1)


def _gradients(objective: Tensor, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(objective, inputs, **options)


def _close(mine: Any, theirs: Any) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_gradient_of_a_frozen_input_is_not_computed(frozen: int, is_uniform: bool) -> None:
    inputs = _inputs()
    inputs[frozen].requires_grad_(False)
    learning = inputs[1 - frozen]
    mine, _ = chunked_cross_entropy(*inputs, chunks=HeadChunks(5, torch.float64))
    theirs, _ = _whole(*inputs)
    with FlopCounterMode(display=False) as counter:
        sums = [loss.sum() if is_uniform else (loss * torch.arange(1.0, B + 1)).sum() for loss in (mine, theirs)]
        _close(*(_gradients(total, learning) for total in sums))
        chunked_cross_entropy(*inputs, chunks=HeadChunks(5, torch.float64))
    again = 2 * (not is_uniform)  # products of the logits and of the gradient, once more in the backward pass
    assert counter.get_total_flops() == 2 * T * D * V * (2 + again + 1), "with one product of torch's own"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [1, B])
def test_the_sum_of_rows_has_the_loss_and_gradients_of_torch(size: int, num_rows: int) -> None:
    hidden, weight, *_ = inputs = _inputs(num_rows=num_rows)
    mine, z = chunked_cross_entropy(*inputs, chunks=HeadChunks(size, torch.float64))
    theirs, their_z = _whole(*inputs)
    _close((mine, z), (theirs, their_z))
    _close(_gradients(mine.sum() / 7, hidden, weight), _gradients(theirs.sum() / 7, hidden, weight))


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("needs_z", [False, True])
def test_so_have_capped_logits(softcap: float, needs_z: bool) -> None:
    hidden, weight, targets, mask = _inputs()
    chunks = HeadChunks(5, torch.float64, softcap=softcap)
    mine = chunked_cross_entropy(hidden, weight, targets, mask, chunks, needs_z=needs_z)
    theirs = _whole(hidden, weight, targets, mask, softcap=softcap)
    _close(mine, theirs)
    ours, its = (loss.sum() / 7 + (z.sum() / 3 if needs_z else 0) for loss, z in (mine, theirs))
    _close(_gradients(ours, hidden, weight), _gradients(its, hidden, weight))
    log_probs, _ = chunked_log_probs(hidden, weight, targets, chunks)
    _close((-(log_probs * mask).sum(1),), theirs[:1])


@pytest.mark.parametrize("needs_z", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_so_has_any_other_function_of_rows(size: int, needs_z: bool) -> None:
    hidden, weight, *_ = inputs = _inputs()
    factor = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)
    mine, _ = chunked_cross_entropy(*inputs, chunks=HeadChunks(size, torch.float64), needs_z=needs_z)
    theirs, _ = _whole(*inputs)
    _close(
        _gradients((mine.square() * factor).sum(), hidden, weight),
        _gradients((theirs.square() * factor).sum(), hidden, weight),
    )


@pytest.mark.parametrize("needs_z", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_squared_logsumexp_has_gradients_too(size: int, needs_z: bool) -> None:
    """With and without the announcement, which is a matter of cost; alone, and beside the loss."""
    hidden, weight, *_ = inputs = _inputs()
    for loss_coef in (0.0, 1.0):
        mine, z = chunked_cross_entropy(*inputs, chunks=HeadChunks(size, torch.float64), needs_z=needs_z)
        theirs, their_z = _whole(*inputs)
        total = [(a.sum() * loss_coef if loss_coef else 0) + (b * b).sum() for a, b in ((mine, z), (theirs, their_z))]
        _close(_gradients(total[0], hidden, weight), _gradients(total[1], hidden, weight))


def test_a_second_backward_pass_has_its_own_scale() -> None:
    hidden, weight, *rest = _inputs()
    loss, _ = chunked_cross_entropy(hidden, weight, *rest, chunks=HeadChunks(5, torch.float64))
    first = _gradients(loss.sum() * 2, hidden, weight, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = _gradients(loss.sum() * 3, hidden, weight)
    _close(first, kept)
    _close(second, [gradient * 1.5 for gradient in kept])


def test_gradients_that_nobody_wants_are_not_made() -> None:
    hidden, weight, *rest = _inputs()
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(hidden, weight, *rest, chunks=HeadChunks(5, torch.float64))
    assert not loss.requires_grad
    _close((loss,), (_whole(hidden, weight, *rest)[0],))


@pytest.mark.parametrize("size", SIZES)
def test_log_probs_and_choices_are_those_of_all_logits(size: int) -> None:
    hidden, weight, targets, _ = _inputs()
    logits = F.linear(hidden, weight)
    targets[0] = logits[0].argmax(-1)
    log_probs, is_greedy = chunked_log_probs(hidden, weight, targets, HeadChunks(size, torch.float64))
    _close((log_probs,), (logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0],))
    assert torch.equal(is_greedy, logits.argmax(-1) == targets) and is_greedy[0].all()


def test_bfloat16_is_rounded_where_autocast_rounds_it() -> None:
    """Losses are equal; gradients are as far from the exact ones as those of autocast, which rounds them too."""
    hidden, weight, *rest = _inputs(torch.float32)
    exact = _gradients(_whole(hidden.double(), weight.double(), *rest)[0].sum(), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = _whole(hidden, weight, *rest)
        mine, _ = chunked_cross_entropy(hidden, weight, *rest, chunks=HeadChunks(T, torch.bfloat16))
        parts, _ = chunked_cross_entropy(hidden, weight, *rest, chunks=HeadChunks(5, torch.bfloat16))
    assert mine.dtype is torch.float32
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    errors = [
        [(a - b).norm() / b.norm() for a, b in zip(_gradients(loss.sum() / 7, hidden, weight), exact, strict=True)]
        for loss in (theirs * 7, mine * 7, parts * 7)
    ]
    for autocast, *chunked in zip(*errors, strict=True):
        assert 1e-4 < autocast < 1e-2 and max(chunked) < 1.2 * autocast


def test_gradients_are_summed_in_float32_and_come_in_the_dtype_of_the_inputs() -> None:
    hidden, weight, *rest = _inputs(torch.float32)
    narrow = weight.detach().bfloat16().requires_grad_()
    loss, _ = chunked_cross_entropy(hidden, narrow, *rest, chunks=HeadChunks(5, torch.bfloat16))
    grad_hidden, grad_weight = _gradients(loss.sum(), hidden, narrow)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16)
    exact = _gradients(_whole(hidden, narrow.float(), *rest)[0].sum(), hidden, narrow)
    assert (grad_weight.double() - exact[1].double()).norm() / exact[1].double().norm() < 1e-2


class _LargestTensor(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


def _largest(objective: Any) -> int:
    with _LargestTensor() as largest:
        objective().backward()
    return largest.elements


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_no_tensor_of_all_logits_is_made(dtype: torch.dtype, is_uniform: bool) -> None:
    hidden, weight, *rest = _inputs(torch.float32 if dtype is torch.bfloat16 else dtype)
    factor = torch.tensor([1.0, 1.0, 1.0] if is_uniform else [1.0, 2.0, 3.0])

    def chunked() -> Tensor:
        loss, _ = chunked_cross_entropy(hidden, weight, *rest, chunks=HeadChunks(5, dtype))
        return loss.sum() if is_uniform else (loss * factor).sum()

    assert _largest(lambda: _whole(hidden, weight, *rest)[0].sum()) >= T * V
    assert _largest(chunked) == max(V * D, 5 * V) < T * V / 4


def test_nothing_of_the_logits_is_saved_for_the_backward_pass() -> None:
    hidden, weight, *rest = inputs = _inputs()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(*inputs, chunks=HeadChunks(5, torch.float64))[0].sum()
    given = {tensor.data_ptr() for tensor in (hidden, weight, *rest)}
    assert {tensor.data_ptr() for tensor in saved} == given
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _whole(*inputs)[0].sum()
    assert max(tensor.numel() for tensor in saved) == T * V, "the count sees what torch saves"


def test_inputs_need_not_be_contiguous() -> None:
    hidden, weight, targets, mask = _inputs()
    columns, rows = (t.detach().mT.contiguous().mT.requires_grad_() for t in (hidden, weight))
    their_targets, their_mask = (t.T.contiguous().T for t in (targets, mask))
    found, _ = chunked_cross_entropy(columns, rows, their_targets, their_mask, HeadChunks(5, torch.float64))
    theirs, _ = _whole(hidden, weight, targets, mask)
    _close(_gradients(found.sum(), columns, rows), _gradients(theirs.sum(), hidden, weight))
