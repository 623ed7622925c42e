"""Guess the cause of a difference between layouts from what differs in the first step, and by which factor."""

import torch

from trainer.models.parameter_roles import parameter_role
from trainer.prove.evidence import Evidence
from trainer.prove.rounding import Ruler

_SAME_RATIO = 1e-3
"""Relative tolerance within which a ratio of gradients counts as constant."""


def diagnose(actual: Evidence, ruler: Ruler, *, step: int) -> str:
    """Describe the likely cause of a difference, of which `step`, from 0, is the first."""
    reference = ruler.reference

    def differs(group: str) -> bool:
        values, expected = actual.scalars(group), reference.scalars(group)
        return bool(expected) and not ruler.scalar(group, 0, values[0], expected[0]) <= ruler.tolerance

    if started := different_start(actual, reference):
        return f"{started} has other initial values: initialisation depends on the rank"
    if reference.counts:
        if int(actual.counts[0].sum()) != int(reference.counts[0].sum()):
            return (
                "the experts' token counts have another sum: assignments are counted twice, not at all, or after drops"
            )
        if not torch.equal(actual.counts[0][0], reference.counts[0][0]):
            return "tokens chose other experts in the first layer: the router or the batch differs"
    if lost := _lost_experts(actual, ruler):
        return f"{lost} received no gradient: their tokens are lost"
    if reference.dropped and int(actual.dropped[0][0]) != int(reference.dropped[0][0]):
        return "other tokens are dropped in the first layer: the capacity depends on the layout"
    if differs("loss"):
        return (
            "the forward pass differs although tokens chose the same experts: wrong combine weights, or experts "
            "received other tokens"
        )
    for group, name in (("balance", "balance loss"), ("z", "z-loss"), ("further", "sum of other losses")):
        if differs(group):
            ratio = _ratio(actual.scalars(group)[0], reference.scalars(group)[0])
            return f"the {name} is {ratio}: check its counts and its divisor"
    if cause := _gradient_cause(actual, ruler):
        return cause
    if differs("norm"):
        return "gradients are equal and their norm is not: the norm omits weights, or counts some more than once"
    for name, tensor in reference.first_update.items():
        gradient = actual.gradients.get(name)
        if not ruler.weight(name, actual.first_update[name], tensor, gradient, steps=1) <= ruler.tolerance:
            if name not in reference.gradients:
                return "the selection bias was not updated from the counts of all ranks"
            return "equal gradients gave other weights: clipping, learning rate or update differs between ranks"
    return _later_cause(actual, ruler, step)


def different_start(actual: Evidence, reference: Evidence) -> str | None:
    """Return the name of the first weight or buffer with other initial values; None if there is none."""
    return next((name for name, tensor in reference.start.items() if not torch.equal(actual.start[name], tensor)), None)


def gradient_group(name: str) -> str:
    """Return the group of a weight's gradient: `router`, `expert` or `dense`."""
    role = parameter_role(name)
    return role if role in ("router", "expert") else "dense"


def _gradient_cause(actual: Evidence, ruler: Ruler) -> str | None:
    """Describe how gradients of the first step are wrong: by a common factor, or by none; None if they are equal."""
    different = {
        gradient_group(name)
        for name in ruler.reference.gradients
        if not ruler.gradient(name, actual.gradients[name]) <= ruler.tolerance
    }
    kinds = [kind for kind in ("dense", "router", "expert") if kind in different]
    ratios = {kind: _common_ratio(actual, ruler, kind) for kind in kinds}
    if uneven := " and ".join(kind for kind, ratio in ratios.items() if ratio is None):
        return f"gradients of {uneven} weights differ by no common factor: the share of some ranks is missing"
    factors = [
        f"{kind} gradients are {ratio:.4g} times those of one process"
        for kind, ratio in ratios.items()
        if ratio is not None and abs(ratio - 1) > _SAME_RATIO
    ]
    if factors:
        return f"{', '.join(factors)}: gradients are summed with a wrong factor of the number of ranks"
    if not kinds:
        return None
    return (
        f"gradients of {' and '.join(kinds)} weights differ by less than a thousandth: something is rounded that is "
        "not in one process, or depends on the rows of a micro-batch"
    )


def _later_cause(actual: Evidence, ruler: Ruler, step: int) -> str:
    """Describe why layouts differ after an equal first step; near ties only if the counts show any."""
    flips = actual.flips(ruler.reference)[: step + 1]
    if any(flips):
        first = next(at for at, number in enumerate(flips) if number)
        return (
            f"the first step is equal; later steps differ after near ties in the routing were decided the other way "
            f"({flips[first]} choices in step {first + 1})"
        )
    moved = [
        name
        for name, tensor in ruler.reference.first_update.items()
        if ruler.is_rounding(name) and not torch.equal(actual.first_update[name], tensor)
    ]
    if moved and ruler.noise > ruler.tolerance * ruler.reference.adam_eps:
        return (
            f"the gradient of {moved[0]} is only rounding error in the first step, and optim.eps "
            f"{ruler.reference.adam_eps:g} is so small that AdamW turns it into steps, which differ"
        )
    return (
        f"the first step is equal and no choice differs up to step {step + 1}: state that is carried over steps "
        "differs, such as moments, a bias or the learning rate"
    )


def _ratio(actual: float, expected: float) -> str:
    return f"{actual / expected:.4g} times that of one process" if expected else f"{actual:.4g}, and 0 in one process"


def _common_ratio(actual: Evidence, ruler: Ruler, kind: str) -> float | None:
    """Return the factor between two sets of gradients; None if it is not constant."""
    ratios = []
    for name, gradient in ruler.reference.gradients.items():
        if gradient_group(name) != kind or ruler.is_rounding(name):
            continue
        a, b = actual.gradients[name].double().flatten(), gradient.double().flatten()
        square = float(b @ b)
        if square == 0:
            continue
        ratio = float(a @ b) / square
        if float((a - ratio * b).norm()) > _SAME_RATIO * float(b.norm()):
            return None
        ratios.append(ratio)
    if not ratios or max(ratios) - min(ratios) > _SAME_RATIO * abs(ratios[0]):
        return None
    return sum(ratios) / len(ratios)


def _lost_experts(actual: Evidence, ruler: Ruler) -> str | None:
    """Name the experts, of the first weight with any, that have a gradient in one process and none in this layout."""
    for name, gradient in ruler.reference.gradients.items():
        if gradient_group(name) == "expert":
            values, expected = (g.flatten(1).abs().amax(1) for g in (actual.gradients[name], gradient))
            lost = (expected > ruler.noise) & (values == 0)
            if bool(lost.any()):
                return f"experts {lost.nonzero().flatten().tolist()} of {name}"
    return None
