"""Outcomes of made-up candidates, and places and a small text of real ones, for tests of sweeps."""

from pathlib import Path

from trainer.sweep.candidates import Candidate
from trainer.sweep.outcome import CandidateOutcome
from trainer.sweep.trial_result import TrialResult


def outcome(name: str, *values: float, flops: float | None = 1.0, trials: int | None = None) -> CandidateOutcome:
    results: dict[tuple[int | None, int], TrialResult] = {
        (None, seed): TrialResult(
            value=value, train_s=1.0, training_flops=flops, forward_flops_per_token=None, active_parameters=None
        )
        for seed, value in enumerate(values)
    }
    candidate = Candidate(name=name, changes={}, places={})
    number = len(values) if trials is None else trials
    return CandidateOutcome(candidate=candidate, steps=9, is_final=True, results=results, num_trials=number)


def places(folder: Path) -> list[str]:
    """Return overrides that keep a run in a folder, and train it on a small text there."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} times {n} is {n * n}, and {n} more is {n * n + n}" for n in range(300)))
    source = f"{{kind: text, path: '{text}', domain: numbers}}"
    return [f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache", f"data.sources=[{source}]"]
