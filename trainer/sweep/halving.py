"""Successive halving: which candidates go on, and for how long. Imports no torch.

Source: Jamieson and Talwalkar, arXiv 1502.07943, with a factor of eta in place of 2, as in Hyperband (1603.06560). A
candidate goes on from its checkpoint: nothing is trained twice. All rungs follow the learning rates of the whole
training, so that the winner is the run that it would have been without the others; its price is that rungs are compared
before the rate has decayed.
"""

from collections.abc import Sequence

from trainer.sweep.candidates import Candidate
from trainer.sweep.outcome import CandidateOutcome
from trainer.sweep.sweep_config import HalvingConfig, MethodConfig


def rungs(method: MethodConfig, steps: int) -> list[int]:
    """Return the step at which each rung ends; the last is that of the whole training."""
    found = [method.first_steps] if isinstance(method, HalvingConfig) else [steps]
    while found[-1] < steps:
        assert isinstance(method, HalvingConfig), "others have one rung"
        found.append(found[-1] * method.eta)
    return [*found[:-1], steps]


def survivors(outcomes: Sequence[CandidateOutcome], *, eta: int, maximize: bool) -> list[Candidate]:
    """Return the best 1 / eta of a rung's candidates, at least one, in their order; none of which a trial failed."""
    whole = [(one.mean, one) for one in outcomes if one.mean is not None and len(one.results) == one.num_trials]
    ranked = sorted(whole, key=lambda entry: -entry[0] if maximize else entry[0])
    kept = [one.name for _, one in ranked[: max(1, len(outcomes) // eta)]]
    return [one.candidate for one in outcomes if one.name in kept]
