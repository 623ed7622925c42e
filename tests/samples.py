"""Choice of the cases that run at every push, of tests marked `one_in(n)`; the other cases are nightly."""

from collections.abc import Iterator
from itertools import groupby

import pytest


def mark_nightly(items: list[pytest.Item]) -> None:
    """Mark every case as nightly but each n-th one on a diagonal of its lists, on which each value has its turn.

    The places of the values of a case in their lists add up to a multiple of n: of two lists of three and n = 3, the
    first with the first, the second with the third, the third with the second.
    """
    sampled = [item for item in items if isinstance(item, pytest.Function) and item.get_closest_marker("one_in")]
    for _, group in groupby(sampled, key=lambda item: (item.path, item.originalname)):
        cases = list(group)
        mark = cases[0].get_closest_marker("one_in")
        assert mark is not None
        for case, place in zip(cases, _places(cases), strict=True):
            if place % mark.args[0]:
                case.add_marker(pytest.mark.nightly)


def _places(cases: list[pytest.Function]) -> Iterator[int]:
    """Yield of every case the sum of the places of its values in their lists.

    A value is told by its identity: cases of one list share its objects, which need not be hashable.
    """
    names = [mark.args[0] for mark in cases[0].iter_markers("parametrize")]
    lists = [name.replace(" ", "").split(",") if isinstance(name, str) else name for name in names]
    places: list[dict[tuple[int, ...], int]] = [{} for _ in lists]
    for case in cases:
        keys = [tuple(id(case.callspec.params[name]) for name in names) for names in lists]
        yield sum(known.setdefault(key, len(known)) for known, key in zip(places, keys, strict=True))
