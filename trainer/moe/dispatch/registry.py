"""Configs of the dispatchers, and their union that `parallel.dispatcher` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from trainer.config.numbers import Experts
from trainer.config.plugins import KindConfig, Pluggable

if TYPE_CHECKING:
    from trainer.distributed.mesh import Mesh
    from trainer.moe.dispatch.base import Dispatcher


class DispatcherOptions(KindConfig):
    """Base class of all dispatcher configs."""

    needs_gpus: ClassVar[bool] = False
    """Rows travel by a library for GPUs."""

    def on_any_device(self) -> DispatcherOptions:
        """Return a dispatcher that sends the same rows on any device: itself, if it needs no GPU."""
        return self

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher of a rank."""
        raise NotImplementedError


class LocalDispatcherConfig(DispatcherOptions):
    """All experts are local: rows are grouped by expert and nothing is sent."""

    kind: Literal["local"] = "local"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher."""
        from trainer.moe.dispatch.local import LocalDispatcher

        assert mesh.ep.size == 1, "a config with ep_size > 1 is refused"
        return LocalDispatcher()


class WireOptions(DispatcherOptions):
    """Options of all dispatchers that communicate."""

    wire: Literal["compute", "bfloat16"] = "compute"
    """Dtype of communicated rows: that of the computation, or rounded to bfloat16, which changes results slightly."""


class ExchangeOptions(WireOptions):
    """Options of dispatchers that can overlap communication and computation."""

    chunks: Experts = 1
    """Parts that a rank's experts are split into, to overlap communication of one with computation of another.

    Each chunk costs a pass over the experts' gradients and, with `parallel.data: shard`, another gather of the weights.
    """


RowShare = Annotated[float, Field(ge=1, le=1e4)]


class AllToAllDispatcherConfig(ExchangeOptions):
    """Every row is sent to the rank of its expert; sizes are dynamic."""

    kind: Literal["all_to_all"] = "all_to_all"
    row_budget: RowShare | None = None
    """Receive buffers of static size in training: this many times an even share of the rows, so that nothing waits for
    sizes. If more rows go from one rank to another, the step is taken again without a budget: the result is the same.
    Null: sizes are exchanged. For a fixed number of experts per token, one chunk and the native engine."""

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher: `local` if all experts are on one rank."""
        if mesh.ep.size == 1:
            return LocalDispatcherConfig().build(mesh, num_experts)
        if self.row_budget is not None:
            from trainer.moe.dispatch.budgeted_all_to_all import BudgetedAllToAllDispatcher

            return BudgetedAllToAllDispatcher(mesh.ep, num_experts, self.wire, self.row_budget)
        from trainer.moe.dispatch.all_to_all import AllToAllDispatcher

        return AllToAllDispatcher(mesh.ep, num_experts, self.wire, self.chunks)


class PaddedAllToAllDispatcherConfig(ExchangeOptions):
    """Every expert gets as many rows as its capacity, so that no sizes are exchanged; needs a capacity factor."""

    kind: Literal["padded_all_to_all"] = "padded_all_to_all"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher."""
        from trainer.moe.dispatch.padded_all_to_all import PaddedAllToAllDispatcher

        return PaddedAllToAllDispatcher(mesh.ep, num_experts, self.wire, self.chunks)


class DeduplicatedDispatcherConfig(WireOptions):
    """`all_to_all` that sends a token once to each rank that has any of its experts, and returns one sum."""

    kind: Literal["deduplicated_all_to_all"] = "deduplicated_all_to_all"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher: `local` if all experts are on one rank."""
        if mesh.ep.size == 1:
            return LocalDispatcherConfig().build(mesh, num_experts)
        from trainer.moe.dispatch.deduplicated import DeduplicatedDispatcher

        return DeduplicatedDispatcher(mesh.ep, num_experts, self.wire)


class AllGatherDispatcherConfig(ExchangeOptions):
    """Every rank gets all tokens and selects the rows of its experts: for few ranks, and as a reference."""

    kind: Literal["all_gather"] = "all_gather"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher."""
        from trainer.moe.dispatch.all_gather import AllGatherDispatcher

        return AllGatherDispatcher(mesh.ep, num_experts, self.wire, self.chunks)


class HierarchicalDispatcherConfig(ExchangeOptions):
    """`all_to_all` in two hops, inside the node and between nodes, for an `ep_size` of several whole nodes."""

    kind: Literal["hierarchical"] = "hierarchical"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher: `all_to_all` if the expert-parallel ranks do not span several nodes."""
        if mesh.layout.nodes_of_ep == 1:
            return AllToAllDispatcherConfig(wire=self.wire, chunks=self.chunks).build(mesh, num_experts)
        from trainer.moe.dispatch.hierarchical import HierarchicalDispatcher

        return HierarchicalDispatcher(mesh, num_experts, self.wire, self.chunks)


class TokenLibraryOptions(DispatcherOptions):
    """Options of libraries that send a token once to each rank that has any of its experts, in bfloat16."""

    needs_gpus: ClassVar[bool] = True
    tokens_per_rank: Annotated[int, Field(ge=1, le=1 << 20)] = 8192
    """Most tokens that a rank sends in one pass, such as `micro_batch_size` x `seq_len`: buffers are made for them."""

    def on_any_device(self) -> DispatcherOptions:
        """Return the dispatcher that sends the same rows by collectives."""
        return DeduplicatedDispatcherConfig()


class DeepEPDispatcherConfig(TokenLibraryOptions):
    """`deduplicated_all_to_all` by DeepEP's kernels, in bfloat16, between GPUs. Proven on a double only."""

    kind: Literal["deepep"] = "deepep"

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the package that it is from."""
        yield "kind", "deep_ep"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher: `local` if all experts are on one rank."""
        if mesh.ep.size == 1:
            return LocalDispatcherConfig().build(mesh, num_experts)
        from trainer.moe.dispatch.deepep import DeepEPDispatcher

        return DeepEPDispatcher(mesh.ep, num_experts, self.tokens_per_rank)


class NcclEPDispatcherConfig(TokenLibraryOptions):
    """`deduplicated_all_to_all` by NVIDIA's NCCL EP, in bfloat16, between GPUs. Proven on a double only."""

    kind: Literal["nccl_ep"] = "nccl_ep"

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the package that it is from."""
        yield "kind", "nccl"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher: `local` if all experts are on one rank."""
        if mesh.ep.size == 1:
            return LocalDispatcherConfig().build(mesh, num_experts)
        from trainer.moe.dispatch.nccl_ep import NcclEPDispatcher

        return NcclEPDispatcher(mesh.ep, num_experts, self.tokens_per_rank)


class SymmetricMemoryDispatcherConfig(WireOptions):
    """`all_to_all` through torch's symmetric memory (NVSHMEM), between at most 32 GPUs. Proven on a double only."""

    needs_gpus: ClassVar[bool] = True
    kind: Literal["symmetric_memory"] = "symmetric_memory"
    row_budget: RowShare | None = None
    """Rows that a rank receives in training, in even shares, so that the host waits for nothing: the rest of them is
    empty. If more rows go to one rank, the step is taken again without a budget: the result is the same. Null: sizes
    are awaited. For a fixed number of experts per token and the native engine."""

    def on_any_device(self) -> DispatcherOptions:
        """Return the dispatcher that sends the same rows by collectives."""
        return AllToAllDispatcherConfig(wire=self.wire, row_budget=self.row_budget)

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Create the dispatcher: `local` if all experts are on one rank."""
        if mesh.ep.size == 1:
            return LocalDispatcherConfig().build(mesh, num_experts)
        from trainer.moe.dispatch.symmetric_memory import SymmetricMemoryDispatcher

        return SymmetricMemoryDispatcher(mesh.ep, num_experts, self.wire, self.row_budget)


DispatcherConfig = Annotated[
    LocalDispatcherConfig
    | AllToAllDispatcherConfig
    | PaddedAllToAllDispatcherConfig
    | DeduplicatedDispatcherConfig
    | AllGatherDispatcherConfig
    | HierarchicalDispatcherConfig
    | DeepEPDispatcherConfig
    | NcclEPDispatcherConfig
    | SymmetricMemoryDispatcherConfig,
    Field(discriminator="kind"),
    Pluggable("dispatchers", DispatcherOptions),
]
