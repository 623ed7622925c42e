"""Waits for the device of a training step, counted for each dispatcher, kind of router and loss.

    python -m tests.step_waits      print the tables of docs/benchmarks.md

On the path of a GPU: bfloat16, and the kernel that is chosen there.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.ranks import Ranks, mesh_here
from tests.registries import ROUTERS, router_sections
from trainer.distributed.mesh import Mesh
from trainer.metrics.device_waits import DeviceWaits, Wait
from trainer.parallel.config import ParallelConfig

NUM_LAYERS, SEQ_LEN = 2, 8
CAPACITY = {"factor": 1.0, "min": 1}
LOSSES: dict[str, dict[str, Any]] = {
    "balance": {"balance": {"coef": 0.1}},
    "balance over sequences": {"balance": {"coef": 0.1, "scope": "sequence"}},
    "balance by first choices": {"balance": {"coef": 0.1, "convention": "gshard_first_choice"}},
    "device_balance": {"device_balance": {"coef": 0.2, "groups": 4}},
    "importance and load": {
        "router": {"kind": "noisy_top_k"},
        "cv_squared": {"importance_coef": 0.3, "load_coef": 0.3},
    },
    "z": {"z_loss_coef": 0.1},
    "diversity": {"diversity_coef": 0.5},
}
"""Sections `moe` with each auxiliary loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks and the dispatcher between them."""

    dispatcher: str = "local"
    chunks: int = 1
    row_budget: float | None = None
    ranks: int = 1
    ranks_per_node: int = 1
    others: dict[str, Any] = field(default_factory=dict)
    """Other options of `parallel`."""

    def parallel(self) -> dict[str, Any]:
        """Return the section `parallel`."""
        options: dict[str, Any] = {} if self.chunks == 1 else {"chunks": self.chunks}
        options |= {} if self.row_budget is None else {"row_budget": self.row_budget}
        return {"ep_size": self.ranks, "dispatcher": {"kind": self.dispatcher, **options}, **self.others}


DISPATCHERS = {
    "`local`": Layout(),
    "`all_to_all`": Layout(dispatcher="all_to_all", ranks=2),
    "`all_to_all`, 2 chunks": Layout(dispatcher="all_to_all", chunks=2, ranks=2),
    "`all_to_all`, row budget": Layout(dispatcher="all_to_all", row_budget=2.0, ranks=2),
    "`padded_all_to_all`": Layout(dispatcher="padded_all_to_all", ranks=2),
    "`deduplicated_all_to_all`": Layout(dispatcher="deduplicated_all_to_all", ranks=2),
    "`hierarchical`": Layout(dispatcher="hierarchical", ranks=4, ranks_per_node=2),
    "`all_gather`": Layout(dispatcher="all_gather", ranks=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWaits:
    """Waits of one step on one rank."""

    per_layer: int
    """Of one MoE layer, forward and backward, for one micro-batch."""
    step: int
    """All others."""
    copies: int
    """Copies of pageable memory to the device, in one layer."""
    waits: list[Wait]


def count(moe: dict[str, Any], layout: Layout | None = None, *, rows: int = 2, num_batches: int = 1) -> StepWaits:
    """Count the waits of the second step of this rank."""
    layout = layout or Layout()
    mesh = Mesh.of_one()
    if layout.ranks > 1:
        mesh = mesh_here(ep_size=layout.ranks, ranks_per_node=layout.ranks_per_node)
    config = tiny_model_config({"num_experts": 8, "d_ff": 16, **moe}, num_layers=NUM_LAYERS)
    parallel = ParallelConfig.model_validate(layout.parallel())
    engine = make_engine(config, dtype=torch.bfloat16, kernel="grouped", mesh=mesh, parallel=parallel)
    first = mesh.layout.rank * rows * num_batches
    batches = [make_batch(rows, SEQ_LEN, first_sample=first + i * rows, ragged=True) for i in range(num_batches)]
    engine.train_step(batches, lr=1e-3)
    with DeviceWaits() as counted:
        counted.on_host(tensor for batch in batches for tensor in batch.tensors().values())
        engine.train_step(batches, lr=1e-3)
    of_layers = counted.within("moe/", "ops/")
    passes = NUM_LAYERS * num_batches
    assert of_layers % passes == 0 and len(counted.copies) % passes == 0, (counted.by_place(), counted.copies)
    return StepWaits(
        per_layer=of_layers // passes,
        step=len(counted.waits) - of_layers,
        copies=len(counted.copies) // passes,
        waits=counted.waits,
    )


def count_on_ranks(ranks: Ranks, moe: dict[str, Any], layout: Layout) -> StepWaits:
    """Count the waits under a layout; the same on every rank."""
    if layout.ranks == 1:
        return count(moe, layout)
    found = ranks.run(layout.ranks, count, moe, layout)
    assert len({(one.per_layer, one.step, one.copies) for one in found}) == 1
    return found[0]


def cells_of_dispatcher(ranks: Ranks, layout: Layout) -> list[str]:
    """Return the waits of a layer without and with a capacity, those of the rest of a step, and a layer's copies."""
    cells, others = [], set()
    for moe in ({}, {"capacity": CAPACITY}):
        if not moe and layout.dispatcher == "padded_all_to_all":
            cells.append("-")  # it needs a capacity
            continue
        found = count_on_ranks(ranks, moe, layout)
        cells.append(str(found.per_layer))
        others.add((found.step, found.copies))
    (rest,) = others
    return [*cells, *map(str, rest)]


def cell_of_router(kind: str) -> str:
    """Return the waits of a layer with a kind of router, for B sequences."""
    moe = router_sections()[kind]
    one, two = (count(moe, rows=rows).per_layer for rows in (1, 2))
    return str(one) if one == two else f"{2 * one - two} + {two - one} B"


def main() -> None:
    """Print the tables."""
    ranks = Ranks()
    for name, layout in DISPATCHERS.items():
        print(f"| {name} | {' | '.join(cells_of_dispatcher(ranks, layout))} |")
    ranks.close()
    by_cell: dict[str, list[str]] = {}
    for kind in ROUTERS:
        by_cell.setdefault(cell_of_router(kind), []).append(f"`{kind}`")
    for cell, kinds in by_cell.items():
        print(f"| {', '.join(kinds)} | {cell} |")
    for name, moe in LOSSES.items():
        print(f"| {name} | {count(moe).per_layer} |")


if __name__ == "__main__":
    main()
