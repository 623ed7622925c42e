"""Compare the evidence of a layout with that of one process: largest errors, first difference, likely cause."""

from dataclasses import dataclass

from torch import Tensor

from trainer.checkpoint.coverage import AVERAGE
from trainer.prove.diagnose import diagnose, different_start, gradient_group
from trainer.prove.evidence import Evidence
from trainer.prove.rounding import Ruler

_SCALARS = ("loss", "balance", "z", "further", "norm")
GROUPS = (*_SCALARS, "gradient: dense", "gradient: router", "gradient: expert", "weights", "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Difference between a layout and one process."""

    worst: dict[str, float]
    """Largest error of each group that the config has."""
    first_different: str | None
    """First quantity, in order of computation, whose error exceeds the tolerance."""
    cause: str | None
    """Likely cause of the difference."""
    flips: int
    """Assignments that differ, over all steps: near ties decided the other way."""
    is_beyond_labels: bool = False
    """True if no labelled setting explains it: replicas or initial values differ."""

    @property
    def is_equal(self) -> bool:
        """Whether all errors are within the tolerance."""
        return self.first_different is None


def compare(
    actual: Evidence, reference: Evidence, *, tolerance: float, floor: float = 0.0, steps: int | None = None
) -> Comparison:
    """Compare a layout with one process (`reference`), over all or the first `steps`; see `Ruler` for the tolerance."""
    end = steps or len(reference.losses)
    ruler = Ruler(reference=reference, tolerance=tolerance, floor=floor)
    errors: list[tuple[str, str, int, float]] = []  # group, name, step, error; in the order of the computation

    def scalars(step: int, *groups: str) -> None:
        for group in groups:
            values, expected = actual.scalars(group), reference.scalars(group)
            if expected:
                error = ruler.scalar(group, step, values[step], expected[step])
                errors.append((group, f"{group} of step {step + 1}", step, error))

    def weights(step: int, values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for name, tensor in expected.items():
            weight = name.removeprefix(AVERAGE)  # an average moves no further than its weight
            group = "bias" if weight not in reference.gradients else "weights"
            error = ruler.weight(weight, values[name], tensor, actual.gradients.get(weight), steps=step + 1)
            errors.append((group, f"{name} after step {step + 1}", step, error))

    scalars(0, *_SCALARS[:-1])
    for name in reversed(list(reference.gradients)):  # in order of the backward pass
        error = ruler.gradient(name, actual.gradients[name])
        errors.append((f"gradient: {gradient_group(name)}", f"gradient of {name}", 0, error))
    scalars(0, "norm")
    weights(0, actual.first_update, reference.first_update)
    for step in range(1, end):
        scalars(step, *_SCALARS)
    if end == len(reference.losses):
        weights(end - 1, actual.last_update, reference.last_update)
    worst: dict[str, float] = {}
    first, cause = None, None
    for group, name, step, error in errors:
        worst[group] = max(worst.get(group, 0.0), error)
        if first is None and not error <= tolerance:
            first, cause = name, diagnose(actual, ruler, step=step)
    if actual.disagreements:
        first = first or f"{actual.disagreements[0]} differs between ranks"
        cause = f"replicas of {actual.disagreements[0]} differ: some ranks reduce, clip or update on their own"
    return Comparison(
        worst=worst,
        first_different=first,
        cause=cause,
        flips=sum(actual.flips(reference)),
        is_beyond_labels=bool(actual.disagreements) or different_start(actual, reference) is not None,
    )
