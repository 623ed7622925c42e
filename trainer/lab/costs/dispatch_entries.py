"""Entries that `bench dispatch` times: one MoE layer over several ranks, by each dispatcher."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from trainer.distributed.mesh import Mesh
from trainer.lab.costs.cost_options import LayerShape, Routing
from trainer.lab.costs.given_routing import GivenLogits, choices, least_copies
from trainer.lab.costs.interleaved import Entry
from trainer.lab.costs.layer_entries import LayerEntry, LayerInput, default_kernel, moe_entry
from trainer.moe.dispatch.registry import DispatcherConfig

CAPACITY = 1.25
"""Capacity factor of a dispatcher that needs one."""
_FACT_TURN = 1000
_PASSES = 4  # rows travel there and back, and so do their gradients


class DispatchEntry:
    """One layer over the ranks, with what must be sent beside what is sent."""

    def __init__(self, layer: LayerEntry, mesh: Mesh) -> None:
        self.layer, self.mesh = layer, mesh

    def prepare(self, turn: int) -> None:
        """Give the router its logits."""
        self.layer.prepare(turn)

    def run(self) -> None:
        """Run forward and backward."""
        self.layer.run()

    def facts(self) -> dict[str, Any]:
        """Return the facts of the layer, and the least bytes of rows that any dispatcher has to send."""
        given, ep = self.layer.input, self.mesh.ep
        shape = given.shape
        copies = least_copies(
            choices(given.given(_FACT_TURN), shape.top_k),
            num_experts=shape.num_experts,
            num_ranks=ep.size,
            rank=ep.index,
        )
        copied = copies * shape.d_model * shape.itemsize / shape.tokens  # as many arrive, in the mean over ranks
        return {
            **self.layer.facts(),
            "least_saved_bytes_per_token": shape.least_saved + copied,
            "least_row_bytes_per_token": _PASSES * copied,
        }


def build_dispatch_entries(
    mesh: Mesh,
    device: torch.device,
    shape: LayerShape,
    routing: Routing,
    traced: tuple[Tensor, ...],
    kernel: str,
    dispatchers: Sequence[str],
    seed: int,
) -> Mapping[str, Entry]:
    """Return a layer for each dispatcher, for a team; each rank has the tokens of the shape."""
    logits = GivenLogits(routing.kind, shape.num_experts, seed + mesh.ep.index, traced)
    given = LayerInput(shape, logits, device)
    chosen = default_kernel(shape, device) if kernel == "auto" else kernel
    entries: dict[str, Entry] = {}
    for kind in dispatchers:
        config = TypeAdapter(DispatcherConfig).validate_python({"kind": kind})
        factor = CAPACITY if kind == "padded_all_to_all" else None
        layer = moe_entry(given, chosen, mesh=mesh, dispatcher=config, capacity_factor=factor)
        entries[kind] = DispatchEntry(layer, mesh)
    return entries
