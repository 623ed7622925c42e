"""Double of torch's symmetric memory over gloo: the operator, as its CUDA source does it, behind torch's own signature.

What an exchange returns is NaN until it is awaited, and so are received rows that nobody sent. Memory that another rank
may still read or write, since only two exchanges later all are done with it, is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from tests.doubles.late_stream import NAN_BYTE, LateStream
from trainer.distributed import symmetric_rows

_MOST_PARTS, _MOST_RANKS = 16, 32


@contextmanager
def doubled() -> Iterator[None]:
    """Let this process have symmetric memory."""
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("all_to_all_vdev_2d", _all_to_all_vdev_2d, "CPU")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        stack.callback(Memory.forget)
        for name, double in (
            ("empty", Memory.empty),
            ("rendezvous", Memory.rendezvous),
            ("get_backend", lambda device: None),
            ("set_backend", lambda name: None),
            ("is_nvshmem_available", lambda: True),
        ):
            stack.enter_context(patch.object(symm_mem, name, double))
        stack.enter_context(patch.object(symmetric_rows, "exchange_stream", lambda device: LateStream()))
        yield


class Memory:
    """Allocations of this rank, and what the last exchange of a group used."""

    sizes: ClassVar[dict[int, int]] = {}
    """Bytes by address."""
    shared: ClassVar[set[int]] = set()
    """Addresses that all ranks know."""
    busy: ClassVar[dict[str, set[int]]] = {}

    @classmethod
    def empty(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory with any content."""
        assert device.type == "cpu"
        tensor = torch.empty(shape, dtype=dtype)
        tensor.view(torch.uint8).fill_(NAN_BYTE)
        cls.sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    @classmethod
    def rendezvous(cls, tensor: Tensor, group: dist.ProcessGroup) -> None:
        """Tell all ranks of memory, which must be of one size."""
        assert len(set(_gather(group, cls.sizes[tensor.data_ptr()]))) == 1, "ranks have different buffers"
        cls.shared.add(tensor.data_ptr())

    @classmethod
    def forget(cls) -> None:
        """Leave nothing for the next test."""
        for everything in (cls.sizes, cls.shared, cls.busy):
            everything.clear()

    @classmethod
    def use(cls, group: str, tensors: Sequence[Tensor]) -> None:
        """Check memory that an exchange uses."""
        addresses = {tensor.data_ptr() for tensor in tensors}
        assert len(addresses) == len(tensors) and addresses <= cls.shared, "not symmetric"
        assert all(tensor.nbytes <= cls.sizes[tensor.data_ptr()] for tensor in tensors)
        assert not addresses & cls.busy.get(group, set()), "others may still use the memory of the last exchange"
        cls.busy[group] = addresses


def _all_to_all_vdev_2d(
    input: Tensor, out: Tensor, in_splits: Tensor, out_splits_offsets: Tensor, group_name: str, major_align: Any = None
) -> None:
    group, align = _resolve_process_group(GroupName(group_name)), 1 if major_align is None else major_align
    size, me, num_splits = group.size(), group.rank(), len(in_splits)
    Memory.use(group_name, [input, out, in_splits, out_splits_offsets])
    assert align > 0 and size <= _MOST_RANKS and num_splits % size == 0
    assert all(tensor.is_contiguous() for tensor in (input, out, in_splits, out_splits_offsets))
    assert out_splits_offsets.shape == (2, num_splits) and out_splits_offsets.dtype is in_splits.dtype is torch.int64
    assert input.dtype is out.dtype and input.stride(0) == out.stride(0)
    parts = num_splits // size
    assert parts <= _MOST_PARTS
    assert (in_splits >= 0).all() and in_splits.sum() <= len(input), "more rows than there are"
    sent = input[: int(in_splits.sum())].split(in_splits.tolist())
    everyone = _gather(group, [rows.clone() for rows in sent])
    out.view(torch.uint8).fill_(NAN_BYTE)
    row = 0
    for part in range(parts):
        first = row
        for source in range(size):
            rows = everyone[source][me * parts + part]
            assert row + len(rows) <= len(out), "the kernel would write beyond the buffer"
            out[row : row + len(rows)] = rows
            out_splits_offsets[:, part * size + source] = torch.tensor([len(rows), row])
            row += len(rows)
        row = first + max(align, -(-(row - first) // align) * align)  # an empty part has a row too


def _gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
