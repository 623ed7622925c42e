"""Check that the parts of a tensor cover each index exactly once. Imports no torch.

Experts held by a single rank are easily lost in silence: a file without them loads, and training continues from fresh
ones (KempnerForge #202, DeepSpeed #6589). So names and parts are checked on write and on read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

WEIGHT, MOMENTS = "model.", ("optim.exp_avg.", "optim.exp_avg_sq.")
"""Prefixes of a parameter and its AdamW moments in a state."""
AVERAGE = "ema."
"""Prefix of a parameter's moving average in a state."""


def partition_error(spans: Iterable[tuple[int, int]], total: int) -> str | None:
    """Return why parts, (start, length) in any order, do not partition 0 .. total - 1; None if they do."""
    end = 0
    for start, length in sorted(span for span in spans if span[1] > 0):
        if start > end:
            return f"indices {end} to {start - 1} of {total} are missing"
        if start < end:
            return f"indices {start} to {min(end, start + length) - 1} are there twice"
        end = start + length
    if end < total:
        return f"indices {end} to {total - 1} of {total} are missing"
    return f"it reaches to {end} of {total}" if end > total else None


def spans_of(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the runs of consecutive numbers: index of the first one, the first one, and how many they are."""
    runs: list[tuple[int, int, int]] = []
    for index, number in enumerate(numbers):
        if runs and number == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((index, number, 1))
    return runs


def is_moment(name: str) -> bool:
    """Return whether a tensor of a state is a moment of the optimizer."""
    return name.startswith(MOMENTS)


def is_average(name: str) -> bool:
    """Return whether a tensor of a state is the moving average of a weight."""
    return name.startswith(AVERAGE)


def weight_of(name: str) -> str:
    """Return the weight that a moment or an average belongs to, by their names in a state; else the name itself."""
    prefix = next((prefix for prefix in (*MOMENTS, AVERAGE) if name.startswith(prefix)), None)
    return name if prefix is None else WEIGHT + name.removeprefix(prefix)


def missing_moments(shapes: Mapping[str, Sequence[int]], of_experts: Iterable[str]) -> Iterator[str]:
    """Yield a line for each learning expert weight whose two moments are missing or differ from it in shape.

    `of_experts` names the tensors whose dimension 0 counts experts. If there are averages, each has one too.
    """
    prefixes = (*MOMENTS, AVERAGE) if any(map(is_average, shapes)) else MOMENTS
    for name in of_experts:
        if not name.startswith(WEIGHT):
            continue
        parameter = name.removeprefix(WEIGHT)
        for moment in prefixes:
            found = shapes.get(moment + parameter)
            if found is None or list(found) != list(shapes[name]):
                instead = "" if found is None else f": it is {list(found)}"
                yield f"{moment}{parameter} of {list(shapes[name])} is missing{instead}"
