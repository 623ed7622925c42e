"""Choice of the cases that run at every push; the others of a test are nightly."""

from collections.abc import Collection, Iterable, Iterator
from itertools import groupby

import pytest


def mark_nightly(items: list[pytest.Item]) -> None:
    """Mark the cases of tests marked `one_in(n)` as nightly, but every n-th one.

    Of several lists that are multiplied these are on a diagonal: the places of the values of a case add up to a
    multiple of n. Where another list has n values, each value of a list has its turn: of two lists of three and n = 3,
    the first with the first, the second with the third, the third with the second.
    """
    sampled = [item for item in items if isinstance(item, pytest.Function) and item.get_closest_marker("one_in")]
    for _, group in groupby(sampled, key=lambda item: (item.path, item.originalname)):
        cases = list(group)
        mark = cases[0].get_closest_marker("one_in")
        assert mark is not None
        for case, place in zip(cases, _places(cases), strict=True):
            if place % mark.args[0]:
                case.add_marker(pytest.mark.nightly)


def nightly_but(every_push: Collection[str], names: Iterable[str]) -> list[object]:
    """Return the names as parameters; those that are not for every push are marked as nightly."""
    return [name if name in every_push else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def chosen(request: pytest.FixtureRequest, argument: str) -> list[str]:
    """Return the values of an argument in the cases of a file that are to run, for a fixture that they share."""
    cases = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    given = [case.callspec.params for case in cases if hasattr(case, "callspec")]
    return [str(values[argument]) for values in given if argument in values]


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
