"""Tiles of rows: each row is in one, with its expert, for any sizes of groups."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics.device_waits import DeviceWaits
from trainer.ops.row_tiles import RowTiles


@given(
    rows=st.lists(st.integers(0, 9) | st.sampled_from([63, 64, 65, 130]), min_size=1, max_size=6),
    beyond=st.integers(0, 5),
    size=st.sampled_from([1, 2, 64]),
)
def test_each_row_of_a_group_is_in_one_tile_of_its_expert(rows: list[int], beyond: int, size: int) -> None:
    """Rows beyond the last group belong to no expert."""
    tiles = RowTiles.of(torch.tensor(rows), sum(rows) + beyond, size).map
    owners: list[int] = []
    for expert, first, end in tiles.T.tolist():
        if first < end:
            assert first == len(owners), "tiles are in the order of rows"
            owners += [expert] * min(size, end - first)
    assert owners == [e for e, count in enumerate(rows) for _ in range(count)]
    assert tiles.shape[1] == (sum(rows) + beyond) // size + len(rows), "the bound depends on no size of a group"


def test_making_them_waits_for_nothing() -> None:
    rows_per_expert = torch.tensor([3, 0, 2])
    with DeviceWaits() as counted:
        RowTiles.of(rows_per_expert, 5, 2)
    assert not counted.waits and not counted.copies
