"""Learning-rate schedules: pure functions of the step, so there is nothing of them to save."""

import math


def warmup_of(asked: float | None, total_steps: int) -> int:
    """Return the steps of warm-up that a config asks for: a number, a share of the run below 1, or None.

    None is 100, or a tenth of a run shorter than 1000. A share leaves at least the last step.
    """
    if asked is None:
        return min(100, total_steps // 10)
    return asked if isinstance(asked, int) else min(round(asked * total_steps), total_steps - 1)


def warmup_cosine(step: int, *, total_steps: int, peak_lr: float, warmup_steps: int, final_fraction: float) -> float:
    """Learning rate of a 0-based step: linear warmup, then half a cosine that ends at `final_fraction * peak_lr`."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak_lr * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_stable_decay(
    step: int, *, total_steps: int, peak_lr: float, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> float:
    """Learning rate of a 0-based step: linear warmup, constant, then linear down to `final_fraction * peak_lr`.

    Where the decay would begin within the warmup it begins at its end, from the peak: the rate never jumps.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    decay_steps = min(round(decay_fraction * total_steps), total_steps - warmup_steps)
    decayed = step - (total_steps - 1 - decay_steps)
    if decayed <= 0 or decay_steps <= 0:
        return peak_lr
    return peak_lr * (1 - (1 - final_fraction) * min(1.0, decayed / decay_steps))
