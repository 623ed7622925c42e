"""Run a sweep: train what has not trained yet, and keep the outcome up to date. Imports no torch."""

from collections.abc import Sequence

from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import DataError
from trainer.supervise.stop_signals import StopSignals
from trainer.sweep.candidates import Candidate
from trainer.sweep.outcome import CandidateOutcome
from trainer.sweep.plan_trials import Sweep, Trial
from trainer.sweep.sweep_report import show_sweep, write_sweep
from trainer.sweep.trial_process import run_trials
from trainer.sweep.trial_result import has_trained, read_result
from trainer.terminal import print_safe

FAILED = 1
"""Exit code of a sweep of which a trial failed."""


def run_sweep(sweep: Sweep) -> int:
    """Train the trials of a sweep; return the exit code: 0, or 1 if a trial failed. What has trained is left as it is.

    Raises:
        ConfigError: if another process runs this sweep.
        StopRequested: after a stop signal; all trials have saved.
    """
    folder = RunFolder(sweep.folder)
    folder.lock()
    running = _RunningSweep(sweep)
    with StopSignals() as stop:
        running.train(sweep.trials, stop)
    outcomes = running.outcomes()
    write_sweep(sweep.folder, sweep.config, outcomes)
    show_sweep(sweep.config, outcomes)
    print_safe(f"written: {sweep.folder / 'sweep.json'}, {sweep.folder / 'sweep.svg'}")
    return FAILED if any(one.failures for one in outcomes) else 0


class _RunningSweep:
    """A sweep with the trials that have failed."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.failures: dict[str, str] = {}

    def train(self, trials: Sequence[Trial], stop: StopSignals) -> None:
        """Train the trials that have not, and write the outcome as each ends."""
        config = self.sweep.config
        left = [trial for trial in trials if not has_trained(trial, trial.config.train.steps)]
        if len(left) < len(trials):
            print_safe(f"{len(trials) - len(left)} of {len(trials)} trials have trained already")
        for trial, reason in run_trials(left, slots=config.slots, ranks=config.ranks, stop=stop):
            if reason is not None:
                self.failures[trial.name] = reason
            number = f"{len(trials) - len(left) + 1 + left.index(trial)}/{len(trials)}"
            print_safe(f"{number} {trial.name}: {reason or self._shown(trial)}")
            write_sweep(self.sweep.folder, config, self.outcomes())

    def outcomes(self) -> list[CandidateOutcome]:
        """Read the outcome of every candidate."""
        return [self._outcome(candidate) for candidate in self.sweep.candidates]

    def _outcome(self, candidate: Candidate) -> CandidateOutcome:
        trials, results, failures = self.sweep.trials_of(candidate), {}, {}
        for trial in trials:
            if trial.name in self.failures:
                failures[trial.name] = self.failures[trial.name]
            elif has_trained(trial, trial.config.train.steps):
                try:
                    results[trial.fold, trial.seed] = read_result(trial, self.sweep.config.metric, _steps(trial))
                except DataError as error:
                    failures[trial.name] = str(error)
        return CandidateOutcome(
            candidate=candidate,
            steps=_steps(trials[0]),
            is_final=True,
            results=results,
            failures=failures,
            num_trials=len(trials),
        )

    def _shown(self, trial: Trial) -> str:
        try:
            result = read_result(trial, self.sweep.config.metric, _steps(trial))
        except DataError as error:
            return str(error)
        return f"{self.sweep.config.metric} {result.value:.4f} in {result.train_s:.1f} s of training"


def _steps(trial: Trial) -> int:
    return trial.config.train.steps
