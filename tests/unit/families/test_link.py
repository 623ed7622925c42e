"""Links cover every element once, or say what they do not."""

import pytest

from trainer.families.link import Link, coverage_problems

OURS = {"w": (2, 4, 3), "norm": (3,)}


def _expert(e: int, name: str, rows: tuple[int, int]) -> Link:
    return Link(theirs=f"{e}.{name}", shape=(rows[1] - rows[0], 3), ours="w", at=((e, e + 1), rows))


def _links() -> list[Link]:
    experts = [_expert(e, name, rows) for e in (1, 0) for name, rows in (("up", (2, 4)), ("gate", (0, 2)))]
    return [*experts, Link(theirs="norm", shape=(3,), ours="norm")]


def test_regions_that_tile_their_tensors_cover_them() -> None:
    assert list(coverage_problems(_links(), OURS)) == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (_links()[1:], "w [2, 4, 3] is not covered once by 3 tensors"),
        ([*_links(), _expert(1, "again", (0, 4))], "w [2, 4, 3] is not covered once by 5 tensors"),
        (_links()[:-1], "norm [3] is not covered once by 0 tensors"),
        ([*_links()[:-1], Link(theirs="norm", shape=(4,), ours="norm")], "norm [4] has another size than its region"),
        ([*_links(), Link(theirs="bias", shape=(3,), ours="bias")], "bias is linked to bias, which is not in this"),
        ([*_links()[1:], _links()[1]], "1.gate is linked twice"),
        ([_expert(0, "up", (1, 3)), *_links()[1:]], "w [2, 4, 3] is not covered once by 4 tensors"),
    ],
)
def test_what_is_not_covered_once_is_named(changed: list[Link], problem: str) -> None:
    problems = list(coverage_problems(changed, OURS))
    assert any(problem in found for found in problems), problems
