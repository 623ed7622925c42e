"""A batch counts its tokens on the host, once, and a changed copy counts anew."""

from dataclasses import replace

import torch

from tests.builders import make_batch


def test_a_batch_on_a_device_keeps_the_counts_of_the_host() -> None:
    batch = make_batch(3, 8, ragged=True)
    expected = int(batch.valid.sum()), int(batch.target_mask.sum())
    there = batch.to(torch.device("meta"))  # which cannot be counted
    assert (there.num_valid, there.target_weight) == expected and expected[1] < expected[0] < 24


def test_a_changed_copy_is_counted_anew() -> None:
    batch = make_batch(2, 8).to(torch.device("cpu"))
    assert (batch.num_valid, batch.target_weight) == (16, 16)
    changed = replace(batch, valid=batch.position < 3)
    assert (changed.num_valid, changed.target_weight) == (6, 6)


class _Tensor(torch.Tensor):
    """A tensor on the host that notes what is done with it."""

    done: list[object]

    def pin_memory(self, *_: object) -> "_Tensor":  # type: ignore[override]
        self.done.append("pinned")
        return self

    def to(self, *args: object, **options: object) -> "_Tensor":  # type: ignore[override]
        self.done += [*args, options]
        return self


def test_a_gpu_copies_from_pinned_memory_while_the_host_goes_on() -> None:
    batch = make_batch(2, 8)
    tensors = {name: tensor.as_subclass(_Tensor) for name, tensor in batch.tensors().items()}
    for tensor in tensors.values():
        tensor.done = []
    replace(batch, **tensors).to(torch.device("cuda", 1))
    for tensor in tensors.values():
        assert tensor.done == ["pinned", torch.device("cuda", 1), {"non_blocking": True}]
