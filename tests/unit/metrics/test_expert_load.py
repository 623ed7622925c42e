"""Relative expert loads."""

import pytest

from trainer.metrics.expert_load import layer_loads


def test_an_even_load_is_one_and_layers_keep_their_indices():
    loads = layer_loads({"step": 1, "counts": [[6, 2, 0, 0], [1, 1, 1, 1]], "dropped": [0, 0]}, [1, 3])
    assert loads == {"load/layer_01": [3.0, 1.0, 0.0, 0.0], "load/layer_03": [1.0, 1.0, 1.0, 1.0]}


def test_a_layer_without_tokens_has_zero_load():
    assert layer_loads({"counts": [[0, 0]]}, [0]) == {"load/layer_00": [0.0, 0.0]}


@pytest.mark.parametrize(("num_experts", "num_cells"), [(512, 512), (513, 257), (1100, 367)])
def test_many_experts_share_cells(num_experts: int, num_cells: int):
    (row,) = layer_loads({"counts": [[5] * num_experts]}, [0]).values()
    assert row == [1.0] * num_cells
