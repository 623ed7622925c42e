"""Tests for placements: as many experts on each rank, the even one never worse, and the best where it is known."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from trainer.errors import ConfigError
from trainer.what_if.expert_placement import balanced_placement, contiguous_placement, read_placement


def _busiest(loads: torch.Tensor, owner: torch.Tensor) -> int:
    return int(torch.zeros(int(owner.max()) + 1, dtype=loads.dtype).index_add(0, owner, loads).max())


@pytest.mark.parametrize("seed", range(6))
def test_a_balanced_placement_is_nearly_the_best_of_all(seed: int) -> None:
    loads = torch.randint(0, 100, (1, 6), generator=torch.Generator().manual_seed(seed)) ** 2
    (owner,), (plain,) = balanced_placement(loads, 2), contiguous_placement(1, 6, 2)
    assert owner.bincount().tolist() == plain.bincount().tolist() == [3, 3]
    best = min(_busiest(loads[0], torch.tensor(order)) for order in set(permutations(plain.tolist())))
    assert best <= _busiest(loads[0], owner) <= min(1.1 * best, _busiest(loads[0], plain))


def test_uneven_ranks_keep_their_numbers() -> None:
    loads = torch.tensor([[1, 1, 9, 9, 9], [0, 0, 0, 0, 0]])
    owner = balanced_placement(loads, 2)
    assert [layer.bincount().tolist() for layer in owner] == [[2, 3], [2, 3]]
    assert [layer.bincount().tolist() for layer in contiguous_placement(2, 5, 2)] == [[2, 3], [2, 3]]
    assert _busiest(loads[0], owner[0]) == 18 < _busiest(loads[0], contiguous_placement(1, 5, 2)[0]) == 27


@pytest.mark.parametrize("text", ["[[0, 1]]", "[[0, 1], [0, -1]]", "[[0, 1], [0, 1.0]]", "{", '{"a": 1}'])
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text("[[0, 1], [1, 0]]")
    assert read_placement(tmp_path / "p.json", 2, 2).tolist() == [[0, 1], [1, 0]]
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--placement: .*p\.json: (is no list of 2 lists|cannot be read as JSON)"):
        read_placement(tmp_path / "p.json", 2, 2)
