"""Law: micro-batches that overlap inside stages learn what one process learns, and hide each other's exchanges."""

from typing import Any

import pytest

from tests.laws.test_overlap import exchanges
from tests.laws.test_pipeline import MODELS, check_same, train
from tests.ranks import Ranks

NOISE = "tied, bias, noise, capacity, the step before"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "gpipe, an odd number": (3, {"pp_schedule": "gpipe", "recompute": "block"}),
    "1f1b": (4, {}),
    "1f1b, sharded, an odd number": (3, {"data": "shard", "shard_keeps": "nothing"}),
    "interleaved": (4, {"pp_schedule": "interleaved_1f1b", "data": "shard"}),
    "interleaved, an odd number": (3, {"pp_schedule": "interleaved_1f1b", "dispatcher": {"kind": "all_to_all"}}),
    "zbv": (4, {"pp_schedule": "zbv"}),
    "dualpipe_v": (7, {"pp_schedule": "dualpipe_v"}),
}
"""Micro-batches of a step (the last one of seven has no rows), and what two stages of two ranks have beside that."""


@pytest.fixture(scope="module", params=MODELS)
def alone(request: pytest.FixtureRequest, ranks: Ranks) -> tuple[str, dict[str, Any]]:
    """Return a model, and what one process learns."""
    [found] = ranks.run(1, train, {}, MODELS[request.param])
    return request.param, found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_stages_whose_micro_batches_overlap_learn_what_one_rank_learns(
    ranks: Ranks, alone: tuple[str, dict[str, Any]], name: str
) -> None:
    num_pieces, own = LAYOUTS[name]
    layout = {"pp_size": 2, "ep_size": 2, "overlap": "micro_batches", **own}
    check_same(ranks.run(4, train, layout, MODELS[alone[0]], num_pieces), alone[1])


STAGES: dict[str, tuple[dict[str, Any], int]] = {
    "gpipe": ({"pp_schedule": "gpipe"}, 1),
    "1f1b": ({}, 1),
    "interleaved_1f1b": ({"pp_schedule": "interleaved_1f1b"}, 2),
}
"""Degrees, and the number of stages on a rank."""


@pytest.mark.parametrize("name", STAGES)
def test_rows_of_one_micro_batch_travel_while_the_other_of_its_pair_is_computed(ranks: Ranks, name: str) -> None:
    """Four micro-batches, two layers here. All exchanges are hidden but for the last of a stage that sends its output.

    Rows of the second micro-batch come back in its last layer, and their gradients go there first: nothing of the first
    one is left to compute, unless the loss is here.
    """
    own, num_stages = STAGES[name]
    layout = {"pp_size": 2, "ep_size": 2, **own}
    for rank, found in enumerate(ranks.run(4, exchanges, "micro_batches", layout, 4)):
        assert len(found) == 4 * 2 * 2 * 3
        assert all({of for _, of in computed} <= {owner ^ 1} for owner, computed in found)
        num_sending = num_stages - (rank >= 2)
        in_view = [owner for owner, computed in found if not computed]
        assert len(in_view) == 2 * 2 * num_sending and all(owner % 2 == 1 for owner in in_view)
