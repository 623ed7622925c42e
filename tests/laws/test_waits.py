"""Law: a step waits for the device as often as docs/benchmarks.md says, for each dispatcher, router and loss."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.registries import DISPATCHERS as REGISTERED
from tests.registries import ROUTERS
from tests.step_waits import DISPATCHERS, LOSSES, Layout, cell_of_router, cells_of_dispatcher, count, count_on_ranks
from trainer.moe.config import MoEConfig

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def _rows() -> dict[str, list[str]]:
    """Return the cells of the tables in the section on waits, by their first cell."""
    section = PAGE.read_text().split("## Waits for the device\n")[1].split("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"
    ]
    return {first: cells for first, *cells in table}


ROWS = _rows()
OF_ROUTER = {
    kind: cells[0] for first, cells in ROWS.items() if len(cells) == 1 for kind in re.findall("`(.+?)`", first)
}


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_layer_and_a_step_wait_as_the_page_says(name: str, ranks: Ranks) -> None:
    assert cells_of_dispatcher(ranks, DISPATCHERS[name]) == ROWS[name][:4]


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_waits_as_the_page_says(kind: str) -> None:
    assert cell_of_router(kind) == OF_ROUTER[kind]


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits(name: str) -> None:
    plain, found = count({}), count(LOSSES[name])
    assert (found.per_layer, found.step, found.copies) == (plain.per_layer, plain.step, 0)


@pytest.mark.parametrize("others", [{"data": "shard"}, {"recompute": "block"}, {"recompute": "experts"}], ids=str)
def test_neither_sharding_nor_recomputation_waits(others: dict[str, Any], ranks: Ranks) -> None:
    plain, found = (
        count_on_ranks(ranks, {}, Layout(dispatcher="all_to_all", ranks=2, others=it)) for it in ({}, others)
    )
    assert (found.per_layer, found.step, found.copies) == (plain.per_layer, plain.step, 0)


def test_further_micro_batches_wait_in_their_layers_only() -> None:
    one, three = count({"balance": {"coef": 0.0}}), count({"balance": {"coef": 0.0}}, num_batches=3)
    assert (three.per_layer, three.step) == (one.per_layer, one.step)


def test_a_step_has_two_waits_at_most_besides_its_layers() -> None:
    assert all(int(cells[2]) <= 2 for first, cells in ROWS.items() if len(cells) > 1)


def test_every_dispatcher_router_and_loss_is_counted() -> None:
    assert {layout.dispatcher for layout in DISPATCHERS.values()} == set(REGISTERED)
    assert set(OF_ROUTER) == set(ROUTERS)
    sections = [MoEConfig.model_validate({"num_experts": 8, "d_ff": 16, **moe}) for moe in LOSSES.values()]
    counted = {term.name for moe in sections for term in moe.aux_losses.terms()}
    assert counted >= {"balance", "device_balance", "importance", "load", "z", "diversity", "router"}
