"""The work of a rank of which `doctor --cluster` measures the time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.collectives import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of what is measured."""

    width: int
    """Rows and columns of the matrices of a product."""
    copied: int
    """Bytes of a copy in memory."""
    sizes: Sequence[int]
    """Bytes of collectives."""
    link: int
    """Bytes that ranks of a link send each other."""
    dtype: torch.dtype = torch.float32
    burst_s: float = 0.2
    """Time of a rank's products, and of its copies: clocks, quotas and neighbours show under load only."""
    computed_s: float = 2e-3
    """Time that a rank computes between two collectives, as in a step."""
    tiny_layers: Sequence[int] = (2, 6)
    """Layers of a shallow and a deep tiny model, whose difference has neither a first nor a last part. None: what a
    step takes beyond its products is not measured."""
    in_a_row_s: float = 0.03
    """Time of collectives that follow each other, with computation in between."""
    budget_s: float = 40.0
    """Time for all rounds of ranks and links."""
    overheads_s: float = 20.0
    """Time for all rounds of the rest."""

    @classmethod
    def of(cls, device: torch.device) -> "Workload":
        """Return sizes that take milliseconds on a device."""
        if device.type == "cpu":
            return cls(width=512, copied=32 << 20, sizes=[1 << 10, 1 << 16, 1 << 20, 8 << 20], link=4 << 20)
        sizes = [1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 26, 1 << 28]
        return cls(width=8192, copied=1 << 30, sizes=sizes, link=1 << 26, dtype=torch.bfloat16)


Work = tuple[str, ...]
"""Name of what is timed: `matmul`, `copy`, a collective as in `all_reduce BYTES`, `link A B`, `latency A B`, `compute`,
`beside all_reduce BYTES`, `tiny LAYERS SHARDED`."""
Piece = tuple[list[Work], Callable[[], None]]
"""Work, and the names under which its time is kept."""
MOST_IN_A_ROW = 10
"""Collectives one after the other, with computation between them."""


class Rank:
    """This rank's part of the work; tests slow parts of it."""

    def __init__(self, workload: Workload, world: Group, device: torch.device) -> None:
        self.workload, self.world, self.device = workload, world, device
        width, dtype = workload.width, workload.dtype
        self._factor = torch.randn(width, width, device=device).to(dtype) / width**0.5
        self._source = torch.ones(workload.copied // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._message, self._part = (torch.zeros(max(workload.sizes) // 4, device=device) for _ in range(2))
        self._rows = self._factor[: max(1, width // 8)]
        self.num_products = self.num_copies = self.num_small = 1
        self.in_a_row: dict[tuple[str | None, int], int] = {}

    def multiply(self) -> None:
        """Multiply two matrices, several times."""
        for _ in range(self.num_products):
            torch.mm(self._factor, self._factor)

    def copy(self) -> None:
        """Copy a block of memory, several times."""
        for _ in range(self.num_copies):
            self._target.copy_(self._source)

    def compute(self) -> None:
        """Compute as between two collectives of a step: small products and an activation after each."""
        hidden = self._rows
        for _ in range(self.num_small):
            hidden = torch.nn.functional.gelu(torch.mm(hidden, self._factor))

    def alternate(self, kind: str | None, num_bytes: int = 0) -> None:
        """Compute and take part in a collective in turn, several times; None: only compute."""
        for _ in range(self.in_a_row.get((kind, num_bytes), MOST_IN_A_ROW)):
            self.compute()
            if kind is not None:
                getattr(self, kind)(num_bytes)

    def all_reduce(self, num_bytes: int) -> None:
        """Sum a tensor over all ranks."""
        self.world.all_reduce_(self._message[: num_bytes // 4])

    def all_to_all(self, num_bytes: int) -> None:
        """Send each rank an equal part of a tensor."""
        count = max(1, num_bytes // 4 // self.world.size)
        self._exchange([count] * self.world.size)

    def all_gather(self, num_bytes: int) -> None:
        """Gather a tensor of so many bytes, of which each rank has an equal part, as FSDP does."""
        self.world.handle._allgather_base(*self._whole_and_part(num_bytes)).wait()

    def reduce_scatter(self, num_bytes: int) -> None:
        """Sum tensors of so many bytes; each rank keeps an equal part."""
        whole, part = self._whole_and_part(num_bytes)
        self.world.handle._reduce_scatter_base(part, whole, dist.ReduceScatterOptions()).wait()

    def exchange(self, partner: int | None, num_bytes: int) -> None:
        """Send a partner so many bytes and get as many; None: take part without sending."""
        counts = [num_bytes // 4 if other == partner else 0 for other in range(self.world.size)]
        self._exchange(counts)

    def _whole_and_part(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        count = max(1, num_bytes // 4 // self.world.size)
        return self._message[: count * self.world.size], self._part[:count]

    @torch.no_grad()
    def _exchange(self, counts: Sequence[int]) -> None:
        total = sum(counts)
        if total > len(self._message):
            self._message = torch.zeros(total, device=self.device)
        self.world.all_to_all(self._message[:total], counts, counts)
