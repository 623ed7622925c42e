"""Faults of sweeps."""

from tests.planted.fault import in_package as _fault

OUTCOME = "sweep/test_outcome.py"

FAULTS = [
    _fault(
        "the standard error is the standard deviation",
        "runs/significance.py",
        "statistics.stdev(values) / math.sqrt(len(values))",
        "statistics.stdev(values)",
        OUTCOME,
    ),
    _fault(
        "a candidate of which a trial failed is chosen",
        "sweep/outcome.py",
        "return self.is_final and len(self.results) == self.num_trials",
        "return self.is_final",
        OUTCOME,
    ),
    _fault(
        "a trial counts as trained from its first checkpoint on",
        "sweep/trial_result.py",
        ".steps()[-1:] >= [min(step, trial.steps)]",
        ".steps() != []",
        "sweep/test_run_sweep.py",
    ),
    _fault(
        "the worst of a rung go on",
        "sweep/halving.py",
        "key=lambda entry: -entry[0] if maximize else entry[0]",
        "key=lambda entry: entry[0] if maximize else -entry[0]",
        "sweep/test_halving.py",
    ),
    _fault(
        "a run that stops after a step has not evaluated there",
        "training/loop.py",
        "is_last or done == run.config.train.stop_after",
        "is_last",
        "sweep/test_halving.py",
    ),
    _fault(
        "trials outlive a sweep that was killed",
        "sweep/trial_process.py",
        "preexec_fn=end_with(os.getpid()),",
        "",
        "sweep/test_run_sweep.py",
    ),
    _fault(
        "the best at the end of a grid goes unsaid where there is more to try",
        "sweep/grid_ends.py",
        "if _is_allowed(sweep, candidate, key, beyond):",
        "if not _is_allowed(sweep, candidate, key, beyond):",
        "sweep/test_grid_ends.py",
    ),
    _fault(
        "every log is read again after each trial",
        "sweep/run_sweep.py",
        "        if key not in self._results:\n",
        "        if True:\n",
        "sweep/test_run_sweep.py",
    ),
    _fault(
        "the seed of a candidate is that of the experiment",
        "sweep/plan_trials.py",
        'if seed is not None:\n            own.append(_Override(f"seed={seed}"',
        'if True:\n            own.append(_Override(f"seed={base.seed if seed is None else seed}"',
        "sweep/test_plan_trials.py",
    ),
    _fault(
        "the time of a training is that of its logged steps",
        "runs/run_figures.py",
        'mean * max(0, record["step"] - before)',
        "mean",
        "runs/test_run_figures.py",
    ),
]
