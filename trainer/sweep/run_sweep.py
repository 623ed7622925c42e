"""Run a sweep: train what has not trained yet, and keep the outcome up to date. Imports no torch."""

from collections.abc import Sequence

from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import DataError, ResourceError
from trainer.supervise.stop_signals import StopSignals
from trainer.sweep.candidates import Candidate
from trainer.sweep.halving import rungs, survivors
from trainer.sweep.outcome import CandidateOutcome
from trainer.sweep.plan_trials import Sweep, Trial
from trainer.sweep.sweep_config import HalvingConfig
from trainer.sweep.sweep_report import show_sweep, write_sweep
from trainer.sweep.trial_process import run_trials
from trainer.sweep.trial_result import TrialResult, has_trained, read_result
from trainer.terminal import print_safe

FAILED = 1
"""Exit code of a sweep of which a trial failed."""


def run_sweep(sweep: Sweep) -> int:
    """Train the trials of a sweep; return the exit code: 0, or 1 if a trial failed. What has trained is left as it is.

    Raises:
        ConfigError: if another process runs this sweep.
        ResourceError: if its folder cannot be written.
        StopRequested: after a stop signal; all trials have saved.
    """
    folder = RunFolder(sweep.folder)
    folder.lock()
    if others := _other_runs(sweep):
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        print_safe(f"{sweep.folder} has runs that are no trials of this sweep: {shown}; they are left as they are")
    with StopSignals() as stop:
        running = _RunningSweep(sweep, stop)
        running.train()
    outcomes = running.outcomes()
    show_sweep(sweep, outcomes)
    write_sweep(sweep, outcomes)
    print_safe(f"written: {sweep.folder / 'sweep.json'}, {sweep.folder / 'sweep.svg'}")
    return FAILED if any(one.failures for one in outcomes) else 0


def _other_runs(sweep: Sweep) -> list[str]:
    """Return the names of runs in the folder that are no trials: of a file that was changed, or of another sweep."""
    own = {trial.name for trial in sweep.trials}
    return sorted(path.parent.name for path in sweep.folder.glob("*/config.yaml") if path.parent.name not in own)


class _RunningSweep:
    """A sweep with what has become of its candidates."""

    def __init__(self, sweep: Sweep, stop: StopSignals) -> None:
        self.sweep, self.stop = sweep, stop
        self._failures: dict[str, str] = {}
        self._has_warned = False
        self._results: dict[tuple[str, int], TrialResult] = {}
        """Results that were read already, by trial and step: logs are read once, however many trials there are."""
        self._last_step = {candidate.name: 0 for candidate in sweep.candidates}
        """Step that each candidate is trained to, if its training has as many."""

    def train(self) -> None:
        """Train rung by rung; each but the last keeps the best. Without halving there is one rung.

        Nothing is remembered but the runs: a repeated command finds the same order in their metrics.
        """
        steps, method = max(trial.steps for trial in self.sweep.trials), self.sweep.config.method
        left = list(self.sweep.candidates)
        for until in rungs(method, steps):
            if until < steps and len(left) == 1:  # there is nothing to compare it with
                continue
            self._last_step |= {candidate.name: until for candidate in left}
            self._train([trial for trial in self.sweep.trials if trial.candidate in left], until)
            if isinstance(method, HalvingConfig) and until < steps:
                outcomes = [one for one in self.outcomes() if one.candidate in left]
                left = survivors(outcomes, eta=method.eta, maximize=self.sweep.config.maximize)
                names = ", ".join(one.name for one in left) or "none"
                print_safe(f"after step {until} of {steps}, {names} of {len(outcomes)} candidates go on")

    def _train(self, trials: Sequence[Trial], until: int) -> None:
        """Train trials up to a step, but those that have, and write the outcome as each ends."""
        config = self.sweep.config
        left = [trial for trial in trials if not has_trained(trial, until)]
        number = len(trials) - len(left)
        if number:
            print_safe(f"{number} of {len(trials)} trials have trained to step {until} already")
        for trial, reason in run_trials(left, until=until, slots=config.slots, ranks=config.ranks, stop=self.stop):
            number += 1
            if reason is not None:
                self._failures[trial.name] = reason
            print_safe(f"{number}/{len(trials)} {trial.name}: {reason or self._shown(trial, until)}")
            try:
                write_sweep(self.sweep, self.outcomes())
            except ResourceError as error:  # trials may find room; the last attempt is at the end of the sweep
                if not self._has_warned:
                    print_safe(f"warning: {error}")
                self._has_warned = True

    def outcomes(self) -> list[CandidateOutcome]:
        """Read the outcome of every candidate that has begun."""
        return [self._outcome(one) for one in self.sweep.candidates if self._last_step[one.name]]

    def _outcome(self, candidate: Candidate) -> CandidateOutcome:
        trials, results, failures = self.sweep.trials_of(candidate), {}, {}
        until = self._last_step[candidate.name]
        for trial in trials:
            try:
                if trial.name in self._failures:
                    failures[trial.name] = self._failures[trial.name]
                elif (result := self._result(trial, until)) is not None:
                    results[trial.fold, trial.seed] = result
            except DataError as error:
                failures[trial.name] = str(error)
        return CandidateOutcome(
            candidate=candidate,
            steps=min(until, trials[0].steps),
            is_final=until >= trials[0].steps,
            results=results,
            failures=failures,
            num_trials=len(trials),
        )

    def _result(self, trial: Trial, until: int) -> TrialResult | None:
        """Return the result of a trial, read once; None if it has not trained to that step."""
        key = trial.name, until
        if key not in self._results:
            if not has_trained(trial, until):
                return None
            self._results[key] = read_result(trial, self.sweep.config.metric, until)
        return self._results[key]

    def _shown(self, trial: Trial, until: int) -> str:
        try:
            result = self._result(trial, until)
        except DataError as error:
            return str(error)
        assert result is not None, "it has trained"
        return f"{self.sweep.config.metric} {result.value:.4f} in {result.train_s:.1f} s of training"
