"""Diagnose a difference between two layouts, from what differs in the first step and by which factor."""

import torch

from trainer.models.parameter_roles import parameter_role
from trainer.prove.evidence import Evidence
from trainer.prove.rounding import Ruler

_SAME_RATIO = 1e-3
"""A ratio of two gradients counts as constant within this."""


def diagnose(mine: Evidence, ruler: Ruler, *, step: int) -> str:
    """Say what a difference looks like.

    Args:
        mine: the layout's evidence.
        ruler: against one process.
        step: the first one, from 0, that differs.
    """
    reference = ruler.reference

    def differs(group: str) -> bool:
        here, there = mine.scalars(group), reference.scalars(group)
        return bool(there) and not ruler.scalar(group, 0, here[0], there[0]) <= ruler.tolerance

    if started := other_start(mine, reference):
        return f"{started} starts from other values: initialisation hangs on the rank"
    if reference.counts:
        if int(mine.counts[0].sum()) != int(reference.counts[0].sum()):
            return "the experts' counts add up to another number: rows are counted twice, not at all, or after drops"
        if not torch.equal(mine.counts[0][0], reference.counts[0][0]):
            return "tokens chose other experts in the first layer: the router or the rows of the batch differ"
    if lost := _lost_experts(mine, ruler):
        return f"{lost} got no gradient: their rows are lost"
    if reference.dropped and int(mine.dropped[0][0]) != int(reference.dropped[0][0]):
        return "other rows are dropped in the first layer: the capacity hangs on the layout"
    if differs("loss"):
        return (
            "the forward pass differs though tokens chose the same experts: rows are combined with other weights, or "
            "experts got other rows"
        )
    for group, name in (("balance", "balance loss"), ("z", "z-loss"), ("further", "sum of further losses")):
        if differs(group):
            times = _times(mine.scalars(group)[0], reference.scalars(group)[0])
            return f"the {name} is {times}: its counts or its divisor"
    if said := _gradients(mine, ruler):
        return said
    if differs("norm"):
        return "gradients are equal and their norm is not: weights are left out of it, or counted more than once"
    for name, tensor in reference.first_update.items():
        if not ruler.weight(name, mine.first_update[name], tensor, steps=1) <= ruler.tolerance:
            if name not in reference.gradients:
                return "the selection bias was updated from other counts than those of all ranks"
            return "equal gradients gave other weights: the update, the clipping or the learning rate differs by rank"
    return _later(mine, ruler, step)


def other_start(mine: Evidence, reference: Evidence) -> str | None:
    """Name the first weight or buffer that starts from other values."""
    return next((name for name, tensor in reference.start.items() if not torch.equal(mine.start[name], tensor)), None)


def kind_of(name: str) -> str:
    """Return whose gradient it is: a `router`'s, an `expert`'s, or `dense`."""
    role = parameter_role(name)
    return role if role in ("router", "expert") else "dense"


def _gradients(mine: Evidence, ruler: Ruler) -> str | None:
    """Say by which factor gradients of the first step are wrong, or that they are by none."""
    ratios = {kind: _common_ratio(mine, ruler, kind) for kind in ("dense", "router", "expert")}
    wrong = {kind: ratio for kind, ratio in ratios.items() if ratio is not None and abs(ratio - 1) > ruler.tolerance}
    different = {
        kind_of(name)
        for name in ruler.reference.gradients
        if not ruler.gradient(name, mine.gradients[name]) <= ruler.tolerance
    }
    uneven = [kind for kind, ratio in ratios.items() if ratio is None and kind in different]
    if uneven:
        return f"gradients of {' and '.join(uneven)} weights differ by no common factor: some ranks' share is missing"
    factors = [
        f"{kind} gradients are {ratio:.4g} times those of one process"
        for kind, ratio in wrong.items()
        if kind in different
    ]
    return f"{', '.join(factors)}: a factor of the number of ranks where gradients are summed" if factors else None


def _later(mine: Evidence, ruler: Ruler, step: int) -> str:
    """Say what parts layouts whose first step is equal; a near tie only where choices were counted that fell so."""
    flips = mine.flips(ruler.reference)[: step + 1]
    if any(flips):
        first = next(at for at, number in enumerate(flips) if number)
        return (
            f"the first step is equal: later ones part, as they do when a near tie in the routing falls the other way "
            f"({flips[first]} choices in step {first + 1})"
        )
    moved = [
        name
        for name, tensor in ruler.reference.first_update.items()
        if ruler.is_rounding(name) and not torch.equal(mine.first_update[name], tensor)
    ]
    if moved and ruler.noise > ruler.tolerance * ruler.reference.adam_eps:
        return (
            f"the gradient of {moved[0]} is nothing but rounding in the first step, and optim.eps "
            f"{ruler.reference.adam_eps:g} is small enough for AdamW to make steps of it, which differ"
        )
    return (
        f"the first step is equal and no choice fell the other way up to step {step + 1}: what changes from step to "
        "step differs, such as moments, a bias or a learning rate"
    )


def _times(here: float, there: float) -> str:
    return f"{here / there:.4g} times that of one process" if there else f"{here:.4g}, and 0 in one process"


def _common_ratio(mine: Evidence, ruler: Ruler, kind: str) -> float | None:
    """Return the factor between two sets of gradients, if it is the same everywhere."""
    ratios = []
    for name, gradient in ruler.reference.gradients.items():
        if kind_of(name) != kind or ruler.is_rounding(name):
            continue
        a, b = mine.gradients[name].double().flatten(), gradient.double().flatten()
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


def _lost_experts(mine: Evidence, ruler: Ruler) -> str | None:
    """Name the experts of the first weight that have a gradient in one process and none here."""
    for name, gradient in ruler.reference.gradients.items():
        if kind_of(name) == "expert":
            here, there = (g.flatten(1).abs().amax(1) for g in (mine.gradients[name], gradient))
            lost = (there > ruler.noise) & (here == 0)
            if bool(lost.any()):
                return f"experts {lost.nonzero().flatten().tolist()} of {name}"
    return None
