"""The header of a run."""

import pytest

from trainer.training.screens import text_size


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(812, "812 B"), (45_230, "45.2 kB"), (1_000_000, "1.0 MB"), (12_345_678, "12.3 MB")]
)
def test_small_texts_have_a_size_above_zero(num_bytes: int, expected: str) -> None:
    assert text_size(num_bytes) == expected
