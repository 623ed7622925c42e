"""Tests for gathering a sharded state on rank 0."""

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.state import Slice, TrainState
from trainer.errors import CheckpointError
from trainer.prove.gather import gather_state

WHOLE = torch.arange(10.0).view(5, 2)


def _gathered(parts: list[tuple[int, int]]) -> tuple[torch.Tensor | None, str]:
    """Gather `WHOLE`; return the local result, and the error if any."""
    mesh = mesh_here()
    (start, end), odd = parts[mesh.layout.rank], mesh.layout.rank % 2
    slices = {
        "cut": Slice(tensor=WHOLE[start:end], global_shape=(5, 2), start=start),
        "copied": Slice.whole(torch.tensor(3)),
        "apart": Slice(tensor=WHOLE[odd::2], global_shape=(5, 2)).at(range(odd, 5, 2)),
    }
    try:
        state = gather_state(TrainState(slices=slices), mesh)
    except CheckpointError as error:
        return None, str(error)
    assert int(state.slices["copied"].tensor) == 3
    assert mesh.layout.rank or torch.equal(state.slices["apart"].tensor, WHOLE)
    return state.slices["cut"].tensor, ""


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 2), (2, 5), (0, 2), (2, 5)],  # two copies
        [(3, 5), (1, 1), (0, 1), (1, 3)],  # in any order, one of them empty
        [(0, 5), (0, 5), (0, 5), (0, 5)],
        [(5, 5), (0, 5), (5, 5), (5, 5)],  # all of it, but not on the first rank
    ],
)
def test_slices_are_gathered_on_rank_0(ranks: Ranks, parts: list[tuple[int, int]]) -> None:
    whole, error = ranks.run(4, _gathered, parts)[0]
    assert error == ""
    assert torch.equal(whole, WHOLE)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, 2), (3, 5)], "cut: no rank has the slice that starts at index 2 of 5; ranks have [[(0, 2)], [(3, 2)]]"),
        ([(0, 2), (1, 5)], "cut: no rank has the slice that starts at index 2 of 5"),
    ],
)
def test_a_missing_slice_is_an_error_on_every_rank(ranks: Ranks, parts: list[tuple[int, int]], message: str) -> None:
    for whole, error in ranks.run(2, _gathered, parts):
        assert whole is None and message in error
