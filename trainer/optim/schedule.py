"""Learning-rate schedules, as pure functions of the step: they have no state to save."""

import math


def resolve_warmup(warmup: float | None, total_steps: int) -> int:
    """Return the warmup steps, given a number of steps, a fraction of the run below 1, or None.

    None gives 100, or a tenth of a run below 1000 steps. A fraction leaves at least the last step.
    """
    if warmup is None:
        return min(100, total_steps // 10)
    return warmup if isinstance(warmup, int) else min(round(warmup * total_steps), total_steps - 1)


def warmup_cosine(step: int, *, total_steps: int, peak_lr: float, warmup_steps: int, final_fraction: float) -> float:
    """Return the learning rate of a 0-based step: linear warmup, then cosine decay to `final_fraction * peak_lr`."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak_lr * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_stable_decay(
    step: int, *, total_steps: int, peak_lr: float, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> float:
    """Return the learning rate of a 0-based step: warmup, constant, then linear decay to `final_fraction * peak_lr`.

    A decay that would begin during warmup begins at its end instead, from the peak, so the rate never jumps.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    decay_steps = min(round(decay_fraction * total_steps), total_steps - warmup_steps)
    decayed = step - (total_steps - 1 - decay_steps)
    if decayed <= 0 or decay_steps <= 0:
        return peak_lr
    return peak_lr * (1 - (1 - final_fraction) * min(1.0, decayed / decay_steps))
