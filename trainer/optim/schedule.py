"""Learning-rate schedules: pure functions of the step, so there is nothing of them to save."""

import math


def default_warmup(total_steps: int) -> int:
    """Return the steps of warmup where none are configured."""
    return min(100, total_steps // 10)


def warmup_cosine(step: int, *, total_steps: int, peak_lr: float, warmup_steps: int, final_fraction: float) -> float:
    """Learning rate of a 0-based step: linear warmup, then half a cosine that ends at `final_fraction * peak_lr`."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak_lr * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_stable_decay(
    step: int, *, total_steps: int, peak_lr: float, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> float:
    """Learning rate of a 0-based step: linear warmup, constant, then linear down to `final_fraction * peak_lr`."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    decay_steps = round(decay_fraction * total_steps)
    decayed = step - (total_steps - 1 - decay_steps)
    if decayed <= 0 or decay_steps == 0:
        return peak_lr
    return peak_lr * (1 - (1 - final_fraction) * min(1.0, decayed / decay_steps))
