"""Rows exchanged through torch's symmetric memory: how many go where is read by the GPUs alone.

Each rank copies its rows into memory that all ranks of the group can read, and fetches what is for it, by
`torch.ops.symm_mem.all_to_all_vdev_2d`. The host knows no sizes and waits for nothing.

# R rows to send, N rows that arrive, G ranks, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Self

import torch
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving
from trainer.distributed.exchange_stream import exchange_stream

MOST_RANKS = 32
"""Members of a group that the kernel can sum over: those of a warp."""
_MOST_PARTS, _BLOCKS = 16, 64
"""Parts of a rank's rows that the kernel takes, and thread blocks that it starts: one for each rank and part."""


class SymmetricRows:
    """Memory of a group through which its ranks send each other rows. It grows as needed, and is never freed.

    Two sets of buffers take turns: others may still read the rows of the last exchange, and write their counts for the
    next, until all ranks have started the next one.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.num_parts = max(1, min(_MOST_PARTS, _BLOCKS // group.size))
        self._stream = exchange_stream(group.device)
        if symm_mem.get_backend(group.device) != "NVSHMEM":
            symm_mem.set_backend("NVSHMEM")
        self._sets: list[_Buffers] = []
        self._outgrown: list[_Buffers] = []
        self._num_bytes, self._turn = 0, 0

    def start(self, tensors: Sequence[Tensor], to: Tensor, num_rows: int, most_rows: int) -> Arriving:
        """Start to send rows; they arrive ordered by sender. Collective.

        Args:
            tensors: (R, width) each: parts of the rows, ordered by receiver; rows after those of `to` stay here.
            to: (G,) int64 rows for each rank.
            num_rows: N. Rows that no rank sends are 0.
            most_rows: the largest R and N of any rank, known to all.
        """
        fields = _Fields.of(tensors)
        self._reserve((most_rows + self.num_parts + 1) * fields.num_bytes)
        return self._stream.start(partial(self._exchange, fields, tensors, to, num_rows), [*tensors, to])

    def _reserve(self, num_bytes: int) -> None:
        """Make new buffers if these are too small. Collective then; exchanges in progress keep the old ones."""
        if num_bytes > self._num_bytes:
            self._outgrown += self._sets
            self._num_bytes = 1 << (num_bytes - 1).bit_length()
            splits = self.group.size * self.num_parts
            self._sets = [_Buffers.of(self.group, self._num_bytes, splits) for _ in range(2)]

    def _exchange(self, fields: "_Fields", tensors: Sequence[Tensor], to: Tensor, num_rows: int) -> tuple[Tensor, ...]:
        """Copy rows into the buffers, exchange them and copy what arrived out of them."""
        self._turn = 1 - self._turn
        buffers = self._sets[self._turn]
        sent, received = fields.rows(buffers.sent), fields.rows(buffers.received)
        for part, tensor in zip(fields.parts(sent), tensors, strict=True):
            part[: len(tensor)].copy_(tensor)
        buffers.splits.copy_(self._in_parts(to))
        name = self.group.handle.group_name
        torch.ops.symm_mem.all_to_all_vdev_2d(sent, received, buffers.splits, buffers.arrived, name)
        received[-1].zero_()
        place = self._places(buffers.arrived, num_rows, len(received) - 1)
        return tuple(part.index_select(0, place) for part in fields.parts(received))

    def _in_parts(self, to: Tensor) -> Tensor:
        """Return (G * P,): the rows for each rank in nearly equal parts, so that more thread blocks fetch them."""
        share = torch.arange(self.num_parts + 1, device=to.device)
        return (to[:, None] * share // self.num_parts).diff(dim=1).reshape(-1)

    def _places(self, arrived: Tensor, num_rows: int, none: int) -> Tensor:
        """Return (N,): where the rows are, ordered by sender; `none` for those that have not been sent.

        They arrive by part, then sender, and the kernel begins a part without rows one row later.
        """
        by_sender = arrived.view(2, self.num_parts, self.group.size).transpose(1, 2)
        count, start = by_sender.reshape(2, -1)
        end, row = count.cumsum(0), torch.arange(num_rows, device=arrived.device)
        part = torch.searchsorted(end, row, right=True).clamp(max=len(end) - 1)
        return torch.where(row < end[-1], (start - end + count)[part] + row, none)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """Symmetric memory of one exchange."""

    sent: Tensor
    """(bytes,)."""
    received: Tensor
    """(bytes,)."""
    splits: Tensor
    """(G * P,) rows for each part of each rank."""
    arrived: Tensor
    """(2, P * G) rows of each rank in each part, and where they begin."""

    @classmethod
    def of(cls, group: Group, num_bytes: int, num_splits: int) -> Self:
        """Allocate the memory. Collective."""

        def shared(*shape: int, dtype: torch.dtype) -> Tensor:
            tensor = symm_mem.empty(*shape, dtype=dtype, device=group.device)
            symm_mem.rendezvous(tensor, group.handle)
            return tensor

        return cls(
            sent=shared(num_bytes, dtype=torch.uint8),
            received=shared(num_bytes, dtype=torch.uint8),
            splits=shared(num_splits, dtype=torch.int64),
            arrived=shared(2, num_splits, dtype=torch.int64),
        )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Where the parts of a row are in its bytes."""

    widths: Sequence[tuple[torch.dtype, int]]
    starts: Sequence[int]
    """Multiples of 8 bytes, as a wide dtype needs."""
    num_bytes: int
    """Bytes of a row; a multiple of 16, which GPUs copy at once."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        """Place tensors (R, width) beside each other."""
        widths = [(tensor.dtype, tensor.shape[1]) for tensor in tensors]
        *starts, end = accumulate((-(-n * dtype.itemsize // 8) * 8 for dtype, n in widths), initial=0)
        return cls(widths, starts, -(-end // 16) * 16)

    def rows(self, memory: Tensor) -> Tensor:
        """Return the rows (rows, bytes) that memory (bytes,) has room for."""
        num_rows = len(memory) // self.num_bytes
        return memory[: num_rows * self.num_bytes].view(num_rows, self.num_bytes)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Return the parts (rows, width) of rows (rows, bytes), in the same memory."""
        return [
            rows[:, start : start + width * dtype.itemsize].view(dtype)
            for start, (dtype, width) in zip(self.starts, self.widths, strict=True)
        ]
