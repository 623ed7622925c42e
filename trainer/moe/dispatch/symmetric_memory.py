"""All-to-all through torch's symmetric memory, whose kernels read on the GPU how many rows go where."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving, UnderWay
from trainer.distributed.symmetric_rows import MOST_RANKS, SymmetricRows
from trainer.errors import ConfigError
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.exchanging import ExchangingDispatcher, Wire
from trainer.moe.dispatch.library_exchange import KEY, LibraryExchange, starting
from trainer.moe.dispatch.row_budget import RowBudget
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.permute import gather_rows, sum_rows

# T tokens, k slots, R rows here, N rows that arrive, E experts, G ranks of the expert-parallel group, D d_model.


class SymmetricMemoryDispatcher(RowBudget, ExchangingDispatcher):
    """Sends every row to the rank of its expert, as `all_to_all` does, and in its order: results have the same bits.

    A row and its combine weight travel together. Exact sizes need one wait, for the shapes of what is computed. With a
    `row_budget` a rank computes a fixed number of rows, whatever arrives, and no size is ever read by the host; unlike
    those of `all_to_all` its rows travel without padding, and the budget is one of all rows that a rank receives.
    """

    def __init__(self, group: Group, num_experts: int, wire: Wire = "compute", row_budget: float | None = None) -> None:
        super().__init__(group, num_experts, wire)
        self.row_budget = row_budget

    def begin(self, x: Tensor, decision: RoutingDecision) -> "_RowsUnderWay":
        """Start to send a row for each kept assignment, with its combine weight, to its expert."""
        with self.step_timer.within("dispatch"):
            slots, x = TokenSlots.of(decision), x.to(compute_dtype(x))
            flow, expert_index = self._plan(slots, self.budget_of(decision))
            order = order_by_expert(slots.expert_index, slots.num_experts, num_rows=flow.num_sent)
            exchange = _Exchange(self._memory(), flow)
            rows = UnderWay.start(exchange, self.on_wire(gather_rows(x, order)), order.of_rows(slots.weight)[:, None])
            return _RowsUnderWay(rows, order, expert_index, flow, x.dtype)

    def compute(self, begun: "_RowsUnderWay", experts: RunExperts) -> "_RowsUnderWay":
        """Apply the experts, and start to send the rows back."""
        with self.step_timer.within("dispatch"):
            x, weight = begun.rows.wait()
            sent = Dispatched(
                x=x.to(begun.dtype), expert_index=begun.expert_index, weight=weight, num_rows=begun.flow.num_here
            )
        y = self.apply(sent, experts)
        with self.step_timer.within("combine"):
            exchange = _Exchange(self._memory(), begun.flow.reversed())
            wide = torch.promote_types(begun.dtype, weight.dtype)
            return begun._replace(rows=UnderWay.start(exchange, self.on_wire(y)), dtype_of_sum=wide)

    def finish(self, computed: "_RowsUnderWay") -> Tensor:
        """Wait for the rows, and sum those of each token."""
        with self.step_timer.within("combine"):
            (rows,) = computed.rows.wait()
            return sum_rows(rows.to(computed.dtype), computed.order, dtype=computed.dtype_of_sum)

    def _plan(self, slots: TokenSlots, budget: float | None) -> tuple["_Flow", Tensor]:
        """Return how many rows go where, and the local expert (N, 1) of each that arrives here."""
        counts, size, me = slots.counts(), self.group.size, self.group.index
        if budget is None:
            table, on_host = self.gather_counts(counts)
            sent = [sum(row) for row in on_host]
            received = [sum(sum(row[first:end]) for row in on_host) for first, end in self.bounds]
        else:
            num_slots = slots.expert_index.numel()
            sent, received = [num_slots] * size, [min(size * num_slots, -int(-budget * num_slots))] * size
            table = self._fitting(self.group.all_gather(counts), received[me])
        sizes = self._sizes(table)
        flow = _Flow(
            to=sizes[me], of=sizes[:, me], num_sent=sent[me], num_here=received[me], most=max(*sent, *received)
        )
        return flow, self._local_experts(table, flow.num_here)

    def _fitting(self, table: Tensor, budget: int) -> Tensor:
        """Return the rows (G, E) of each rank for each expert: none, if any rank would receive more than its budget."""
        excess = (self._sizes(table).sum(0) - budget).clamp(min=0).sum()
        self.add_overflow(excess)
        return table * (excess == 0)

    def _sizes(self, table: Tensor) -> Tensor:
        """Return the rows (G, G) from each rank to each."""
        owner = self.rank_of(torch.arange(table.shape[1], device=table.device))
        return table.new_zeros(self.group.size, self.group.size).index_add_(1, owner, table)

    def _local_experts(self, table: Tensor, num_rows: int) -> Tensor:
        """Return the local expert (N, 1) of rows that arrive by sender, then expert; the last one for empty rows."""
        first, end = self.bounds[self.group.index]
        ends = table[:, first:end].reshape(-1).cumsum(0)
        row = torch.arange(num_rows, device=table.device)
        cell = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
        return (cell % (end - first))[:, None]

    def _memory(self) -> SymmetricRows:
        """Return the memory of the group, which all layers share, made at its first use."""
        buffers = self.group.buffers
        if "symmetric memory" not in buffers:
            buffers["symmetric memory"] = _new_memory(self.group)
        return buffers["symmetric memory"]


def _new_memory(group: Group) -> SymmetricRows:
    """Prepare symmetric memory.

    Raises:
        ConfigError: if this build of torch or these devices have none.
    """
    if not symm_mem.is_nvshmem_available():
        raise ConfigError(
            f"{KEY}: symmetric_memory needs NVSHMEM, and torch {torch.__version__} finds none here; it comes with "
            "torch for CUDA (nvidia-nvshmem), for GPUs with NVLink or RDMA between them; use all_to_all instead"
        )
    if group.size > MOST_RANKS:
        raise ConfigError(
            f"{KEY}: symmetric_memory exchanges between at most {MOST_RANKS} ranks, and parallel.ep_size is "
            f"{group.size}; use a smaller ep_size, hierarchical or all_to_all"
        )
    with starting("symmetric memory"):
        return SymmetricRows(group)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flow:
    """Rows of this rank's exchange."""

    to: Tensor
    """(G,) rows to each rank."""
    of: Tensor
    """(G,) rows of each rank."""
    num_sent: int
    """R, or more."""
    num_here: int
    """N, or more."""
    most: int
    """The largest of both on any rank."""

    def reversed(self) -> "_Flow":
        """Return the way back."""
        return _Flow(to=self.of, of=self.to, num_sent=self.num_here, num_here=self.num_sent, most=self.most)


class _Exchange(LibraryExchange):
    """Rows there; their gradients are rows that go back."""

    def __init__(self, memory: SymmetricRows, flow: _Flow) -> None:
        super().__init__(memory.group, "symmetric memory")
        self._memory, self._flow = memory, flow

    def send(self, *tensors: Tensor) -> Arriving:
        """Start to send rows."""
        return self._memory.start(tensors, self._flow.to, self._flow.num_here, self._flow.most)

    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to send the gradients of rows."""
        return self._memory.start(gradients, self._flow.of, self._flow.num_sent, self._flow.most)


class _RowsUnderWay(NamedTuple):
    """Rows under way to their experts, or back."""

    rows: UnderWay
    order: ExpertOrder
    expert_index: Tensor
    """(N, 1) local expert of each row that arrives."""
    flow: _Flow
    dtype: torch.dtype
    """Dtype of the rows that are computed."""
    dtype_of_sum: torch.dtype = torch.float32
