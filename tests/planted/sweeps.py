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
        ".steps()[-1:] >= [step]",
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
]
