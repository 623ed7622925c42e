"""Two layouts' evidence side by side: worst errors, the first thing that differs, and what that looks like."""

from dataclasses import dataclass

from torch import Tensor

from trainer.prove.diagnose import diagnose, kind_of, other_start
from trainer.prove.evidence import Evidence
from trainer.prove.rounding import Ruler

GROUPS = (
    "loss",
    "balance",
    "z",
    "further",
    "norm",
    "gradient: dense",
    "gradient: router",
    "gradient: expert",
    "weights",
    "bias",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Difference between a layout and one process."""

    worst: dict[str, float]
    """Worst error of each group; a group that the config does not have is missing."""
    first_different: str | None
    """The first thing, in the order it is computed, that is further away than the tolerance."""
    cause: str | None
    """Usual cause of such a difference."""
    flips: int
    """Assignments that differ, over all steps: a near tie decided the other way."""
    is_beyond_labels: bool = False
    """It is of a kind that no setting explains: copies that part, other starting values."""

    @property
    def is_equal(self) -> bool:
        """Tell whether everything is within the tolerance."""
        return self.first_different is None


def compare(
    mine: Evidence, reference: Evidence, *, tolerance: float, floor: float = 0.0, steps: int | None = None
) -> Comparison:
    """Compare a layout with one process.

    Args:
        mine: the layout's.
        reference: one process's.
        tolerance: largest relative error that is the order of the sums.
        floor: share of a step's size below which a number is compared with that share.
        steps: how many steps of the trajectory count; None: all.
    """
    end = steps or len(reference.losses)
    ruler = Ruler(reference=reference, tolerance=tolerance, floor=floor)
    errors: list[tuple[str, str, int, float]] = []  # group, name, step, error; in the order of the computation

    def scalars(step: int, *groups: str) -> None:
        for group in groups:
            here, there = mine.scalars(group), reference.scalars(group)
            if there:
                error = ruler.scalar(group, step, here[step], there[step])
                errors.append((group, f"{group} of step {step + 1}", step, error))

    def weights(step: int, here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
        for name, tensor in there.items():
            group = "bias" if name not in reference.gradients else "weights"
            error = ruler.weight(name, here[name], tensor, steps=step + 1)
            errors.append((group, f"{name} after step {step + 1}", step, error))

    scalars(0, "loss", "balance", "z", "further")
    for name in reversed(list(reference.gradients)):  # the backward pass begins at the end
        error = ruler.gradient(name, mine.gradients[name])
        errors.append((f"gradient: {kind_of(name)}", f"gradient of {name}", 0, error))
    scalars(0, "norm")
    weights(0, mine.first_update, reference.first_update)
    for step in range(1, end):
        scalars(step, "loss", "balance", "z", "further", "norm")
    if end == len(reference.losses):
        weights(end - 1, mine.last_update, reference.last_update)
    worst: dict[str, float] = {}
    for group, _, _, error in errors:
        worst[group] = max(worst.get(group, 0.0), error)
    first, cause = None, None
    for _, name, step, error in errors:
        if not error <= tolerance:
            first, cause = name, diagnose(mine, ruler, step=step)
            break
    if mine.disagreements:
        first = first or f"{mine.disagreements[0]} on another rank than 0"
        cause = f"ranks hold different copies of {mine.disagreements[0]}: they reduce, clip or update by themselves"
    return Comparison(
        worst=worst,
        first_different=first,
        cause=cause,
        flips=sum(mine.flips(reference)),
        is_beyond_labels=bool(mine.disagreements) or other_start(mine, reference) is not None,
    )
