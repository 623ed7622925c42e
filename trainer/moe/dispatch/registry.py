"""Every dispatcher's options, and the union of them that `parallel.dispatcher` accepts. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.numbers import Experts
from trainer.config.plugins import KindConfig, Pluggable

if TYPE_CHECKING:
    from trainer.distributed.mesh import Mesh
    from trainer.moe.dispatch.base import Dispatcher


class DispatcherOptions(KindConfig):
    """Base class of all dispatcher configs."""

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher of a rank."""
        raise NotImplementedError


class LocalDispatcherConfig(DispatcherOptions):
    """All experts are here: rows are grouped by expert and nothing is sent."""

    kind: Literal["local"] = "local"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher."""
        from trainer.moe.dispatch.local import LocalDispatcher

        assert mesh.ep.size == 1, "a config with ep_size > 1 is refused"
        return LocalDispatcher()


class ExchangeOptions(DispatcherOptions):
    """Options of all dispatchers that send rows."""

    wire: Literal["compute", "bfloat16"] = "compute"
    """Precision of rows on their way: as they are computed, or rounded (which changes what is learned a little)."""
    chunks: Experts = 1
    """Parts that a rank's experts are cut into: the rows of one travel while another one is computed.

    Each costs a pass over the experts' gradients, and with `parallel.data: shard` gathers their weights once more.
    """


class AllToAllDispatcherConfig(ExchangeOptions):
    """Every row is sent to the rank of its expert: any number of them."""

    kind: Literal["all_to_all"] = "all_to_all"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher; nothing is sent where all experts are on one rank."""
        if mesh.ep.size == 1:
            return LocalDispatcherConfig().build(mesh, num_experts)
        from trainer.moe.dispatch.all_to_all import AllToAllDispatcher

        return AllToAllDispatcher(mesh.ep, num_experts, self.wire, self.chunks)


class PaddedAllToAllDispatcherConfig(ExchangeOptions):
    """Every expert is sent as many rows as its capacity, so that no rank waits for a size; needs a capacity."""

    kind: Literal["padded_all_to_all"] = "padded_all_to_all"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher."""
        from trainer.moe.dispatch.padded_all_to_all import PaddedAllToAllDispatcher

        return PaddedAllToAllDispatcher(mesh.ep, num_experts, self.wire, self.chunks)


class AllGatherDispatcherConfig(ExchangeOptions):
    """Every rank gets all tokens and takes what its experts need: for few ranks, and to check the others against."""

    kind: Literal["all_gather"] = "all_gather"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher."""
        from trainer.moe.dispatch.all_gather import AllGatherDispatcher

        return AllGatherDispatcher(mesh.ep, num_experts, self.wire, self.chunks)


class HierarchicalDispatcherConfig(ExchangeOptions):
    """As `all_to_all`, in two hops, inside the node and then between nodes, for an `ep_size` of several whole nodes."""

    kind: Literal["hierarchical"] = "hierarchical"

    def build(self, mesh: Mesh, num_experts: int) -> Dispatcher:
        """Make the dispatcher; one hop where the ranks that share the experts do not fill several nodes."""
        if mesh.layout.nodes_of_ep == 1:
            return AllToAllDispatcherConfig(wire=self.wire, chunks=self.chunks).build(mesh, num_experts)
        from trainer.moe.dispatch.hierarchical import HierarchicalDispatcher

        return HierarchicalDispatcher(mesh, num_experts, self.wire, self.chunks)


DispatcherConfig = Annotated[
    LocalDispatcherConfig
    | AllToAllDispatcherConfig
    | PaddedAllToAllDispatcherConfig
    | AllGatherDispatcherConfig
    | HierarchicalDispatcherConfig,
    Field(discriminator="kind"),
    Pluggable("dispatchers", DispatcherOptions),
]
