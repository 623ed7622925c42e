"""Two layouts' evidence side by side: worst errors, the first thing that differs, and what that looks like."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.models.gpt import parameter_role
from trainer.prove.evidence import Evidence

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
_WORST_NAMED = 1e-3
"""A ratio of two gradients counts as constant within this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a layout is from one process."""

    worst: dict[str, float]
    """Worst relative error of each group; a group that the config does not have is missing."""
    first_different: str | None
    """The first thing, in the order it is computed, that is further away than the tolerance."""
    cause: str | None
    """What a difference of this kind usually is."""
    flips: int
    """Assignments that differ, over all steps: a near tie decided the other way."""

    @property
    def is_equal(self) -> bool:
        """Tell whether everything is within the tolerance."""
        return self.first_different is None


def compare(mine: Evidence, reference: Evidence, *, tolerance: float, steps: int | None = None) -> Comparison:
    """Compare a layout with one process.

    Args:
        mine: the layout's.
        reference: one process's.
        tolerance: largest relative error that is the order of the sums.
        steps: how many steps of the trajectory count; None: all.
    """
    end = steps or len(reference.losses)
    errors: list[tuple[str, str, float]] = []  # group, name, error; in the order of the computation

    def scalars(step: int, *groups: str) -> None:
        for group in groups:
            here, there = mine.scalars(group), reference.scalars(group)
            if there:
                errors.append((group, f"{group} of step {step + 1}", _error(here[step], there[step])))

    def weights(step: int, here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
        for name, tensor in there.items():
            group = "bias" if name not in reference.gradients else "weights"
            errors.append((group, f"{name} after step {step + 1}", _tensor_error(here[name], tensor)))

    scalars(0, "loss", "balance", "z", "further")
    rounding = _rounding(reference)
    for name in reversed(list(reference.gradients)):  # the backward pass begins at the end
        error = _tensor_error(mine.gradients[name], reference.gradients[name], rounding)
        errors.append((f"gradient: {_kind(name)}", f"gradient of {name}", error))
    scalars(0, "norm")
    weights(0, mine.first_update, reference.first_update)
    for step in range(1, end):
        scalars(step, "loss", "balance", "z", "further", "norm")
    if end == len(reference.losses):
        weights(end - 1, mine.last_update, reference.last_update)
    worst: dict[str, float] = {}
    for group, _, error in errors:
        worst[group] = max(worst.get(group, 0.0), error)
    first = next((name for _, name, error in errors if not error <= tolerance), None)
    cause = None if first is None else diagnose(mine, reference, tolerance)
    if mine.disagreements:
        first = first or f"{mine.disagreements[0]} on another rank than 0"
        cause = f"ranks hold different copies of {mine.disagreements[0]}: they reduce, clip or update by themselves"
    return Comparison(
        worst=worst,
        first_different=first,
        cause=cause,
        flips=_flips(mine, reference),
    )


def diagnose(mine: Evidence, reference: Evidence, tolerance: float) -> str:
    """Say what a difference looks like, from what differs in the first step and by which factor."""

    def differs(here: list[float], there: list[float]) -> bool:
        return bool(there) and not _error(here[0], there[0]) <= tolerance

    other_start = [name for name, tensor in reference.start.items() if not torch.equal(mine.start[name], tensor)]
    if other_start:
        return f"{other_start[0]} starts from other values: initialisation hangs on the rank"
    if reference.counts:
        if int(mine.counts[0].sum()) != int(reference.counts[0].sum()):
            return "the experts' counts add up to another number: rows are counted twice, not at all, or after drops"
        if not torch.equal(mine.counts[0][0], reference.counts[0][0]):
            return "tokens chose other experts in the first layer: the router or the rows of the batch differ"
    if lost := _lost_experts(mine, reference):
        return f"{lost} got no gradient: their rows are lost"
    if reference.dropped and int(mine.dropped[0][0]) != int(reference.dropped[0][0]):
        return "other rows are dropped in the first layer: the capacity hangs on the layout"
    if differs(mine.losses, reference.losses):
        return (
            "the forward pass differs though tokens chose the same experts: rows are combined with other weights, or "
            "experts got other rows"
        )
    for name, here, there in (
        ("balance loss", mine.balance_losses, reference.balance_losses),
        ("z-loss", mine.z_losses, reference.z_losses),
        ("sum of further losses", mine.extra_losses, reference.extra_losses),
    ):
        if differs(here, there):
            return f"the {name} is {here[0] / there[0]:.4g} times that of one process: its counts or its divisor"
    rounding = _rounding(reference)
    ratios = {kind: _ratio(mine, reference, kind, rounding) for kind in ("dense", "router", "expert")}
    wrong = {kind: ratio for kind, ratio in ratios.items() if ratio is not None and abs(ratio - 1) > tolerance}
    uneven = [
        kind
        for kind in ratios
        if ratios[kind] is None
        and any(
            not _tensor_error(mine.gradients[n], g, rounding) <= tolerance
            for n, g in reference.gradients.items()
            if _kind(n) == kind
        )
    ]
    if wrong and not uneven:
        factors = ", ".join(
            f"{kind} gradients are {ratio:.4g} times those of one process" for kind, ratio in wrong.items()
        )
        return f"{factors}: a factor of the number of ranks where gradients are summed"
    if uneven:
        return f"gradients of {' and '.join(uneven)} weights differ by no common factor: some ranks' share is missing"
    if differs(mine.grad_norms, reference.grad_norms):
        return "gradients are equal and their norm is not: weights are left out of it, or counted more than once"
    for name, tensor in reference.first_update.items():
        if not _tensor_error(mine.first_update[name], tensor) <= tolerance:
            if name not in reference.gradients:
                return "the selection bias was updated from other counts than those of all ranks"
            return "equal gradients gave other weights: the update, the clipping or the learning rate differs by rank"
    return "the first step is equal: later ones part, as they do when a near tie in the routing falls the other way"


def _kind(name: str) -> str:
    role = parameter_role(name)
    return role if role in ("router", "expert") else "dense"


def _error(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30) if a != b else 0.0


def _tensor_error(a: Tensor, b: Tensor, rounding: float = 0.0) -> float:
    """Return the largest difference over the largest value; 0 if it is rounding."""
    if a.shape != b.shape:
        return float("inf")
    difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return 0.0 if difference <= rounding else difference / max(float(b.double().abs().max()), 1e-30)


def _rounding(reference: Evidence) -> float:
    """Return the last bit of the largest gradient; a weight whose gradients are all below has none but for rounding.

    Of such are q and k where all tokens of a row are equal, and the router where normalised weights are of one expert.
    """
    gradients = reference.gradients.values()
    return max((float(g.abs().max()) * torch.finfo(g.dtype).eps for g in gradients if g.numel()), default=0.0)


def _ratio(mine: Evidence, reference: Evidence, kind: str, rounding: float) -> float | None:
    """Return the factor between two sets of gradients, if it is the same everywhere."""
    names = [name for name in reference.gradients if _kind(name) == kind]
    ratios = []
    for name in names:
        a, b = mine.gradients[name].double().flatten(), reference.gradients[name].double().flatten()
        square = float(b @ b)
        if square <= rounding**2:
            continue
        ratio = float(a @ b) / square
        if float((a - ratio * b).norm()) > _WORST_NAMED * float(b.norm()):
            return None
        ratios.append(ratio)
    if not ratios or max(ratios) - min(ratios) > _WORST_NAMED * abs(ratios[0]):
        return None
    return sum(ratios) / len(ratios)


def _lost_experts(mine: Evidence, reference: Evidence) -> str | None:
    """Name the experts of the first weight that have a gradient in one process and none here."""
    for name, gradient in reference.gradients.items():
        if _kind(name) == "expert":
            has, should = (g.flatten(1).abs().amax(1) > 0 for g in (mine.gradients[name], gradient))
            if bool((should & ~has).any()):
                return f"experts {(should & ~has).nonzero().flatten().tolist()} of {name}"
    return None


def _flips(mine: Evidence, reference: Evidence) -> int:
    pairs = zip(mine.counts, reference.counts, strict=True)
    return sum(int((a - b).abs().sum()) for a, b in pairs) // 2
