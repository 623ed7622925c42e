"""Alarms about progress: a loss that no longer falls, a rank that holds up the others. Import no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation
from trainer.metrics.alarms.symptom import Symptom

_MOST_BLOCKS = 512
_HELD = 0.5
"""Share of the highest rate so far from which the rate counts as held: neither warming up nor decaying."""


class _Block(NamedTuple):
    """Mean of neighbouring logged steps."""

    step: int
    loss: float
    lr: float


class LossPlateau:
    """Finds a loss that no longer falls although the learning rate is held.

    Losses fall by a power of the steps, so the window is half of all steps. A flat loss is an alarm only where a fall
    would have been noticed: its halves are compared with the noise of the losses.
    """

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._blocks: list[_Block] = []
        self._lines, self._pending = 1, list[_Block]()  # of a block; logged steps that are no block yet
        self._highest_lr = 0.0

    def find(self, observation: Observation) -> Iterator[Symptom]:
        """Yield a plateau."""
        limit, step, lr = self._config.plateau, observation.step, observation.lr
        self._highest_lr = max(self._highest_lr, lr)
        self._add(_Block(step, observation.loss, lr))
        window = max(self._config.plateau_steps, step // 2)
        inside = [block for block in self._blocks if block.step >= step - window]
        if limit is None or len(inside) < 6 or step - self._blocks[0].step < self._config.plateau_steps:
            return
        if all(block.lr == 0 for block in inside):
            yield self._finding(0.0, limit, f"the learning rate is 0 since {window} steps, so the loss cannot fall")
        elif min(lr, inside[0].lr) >= _HELD * self._highest_lr:
            yield from self._flat(inside, limit)

    def _flat(self, inside: Sequence[_Block], limit: float) -> Iterator[Symptom]:
        half = len(inside) // 2
        halves = [[block.loss for block in part] for part in (inside[:half], inside[half:])]
        (before, noise), (after, more_noise) = map(_mean_and_square_error, halves)
        fall, error = before - after, math.sqrt(noise + more_noise)
        if before > 0 and fall + 2 * error < limit * before:
            steps = inside[-1].step - inside[0].step
            text = f"the loss does not fall: {before:.4g} and then {after:.4g} (+- {error:.1g}) over {steps:,} steps"
            yield self._finding(fall / before, limit, f"{text}, at rate {inside[-1].lr:.1e}")

    def _finding(self, value: float, limit: float, text: str) -> Symptom:
        return Symptom(alarm="plateau", value=value, threshold=limit, text=text, severity=1.0, is_lasting=True)

    def _add(self, line: _Block) -> None:
        self._pending.append(line)
        if len(self._pending) < self._lines:
            return
        self._blocks.append(_merged(self._pending))
        self._pending = []
        if len(self._blocks) > _MOST_BLOCKS:  # twice as many lines to a block: bounded memory, the same window
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=False)
            left = self._blocks[-1:] if len(self._blocks) % 2 else []
            self._blocks, self._lines = [_merged(pair) for pair in pairs] + left, 2 * self._lines

    def record(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        blocks, pending = [list(block) for block in self._blocks], [list(line) for line in self._pending]
        return {"blocks": blocks, "pending": pending, "lines": self._lines, "highest_lr": self._highest_lr}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restore a `record`."""
        self._blocks = [_Block(*block) for block in record.get("blocks", [])]
        self._pending = [_Block(*line) for line in record.get("pending", [])]
        self._lines, self._highest_lr = int(record.get("lines", 1)), float(record.get("highest_lr", 0.0))


def _merged(blocks: Sequence[_Block]) -> _Block:
    count = len(blocks)
    return _Block(blocks[-1].step, math.fsum(b.loss for b in blocks) / count, math.fsum(b.lr for b in blocks) / count)


def _mean_and_square_error(losses: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    return mean, variance / len(losses)


def slow_rank(observation: Observation, config: AlarmsConfig) -> Iterator[Symptom]:
    """Yield the rank that the others wait for."""
    limit, rank, ratio = config.slow_rank, observation.slowest_rank, observation.slowest_rank_ratio
    if limit is None or rank is None or ratio is None or ratio < limit:
        return
    yield Symptom(
        alarm="slow_rank",
        rank=rank,
        value=ratio,
        threshold=limit,
        text=f"rank {rank} is always last: its own work takes {ratio:.2f} times the median rank's, and the others wait",
        severity=ratio / limit,
    )
