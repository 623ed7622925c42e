"""Faults of configuration, supervision and `prove`."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "a run that stopped early goes on when it is started again",
        "training/resume.py",
        "    run.early_stopping.restore(checkpoint.run)\n",
        "",
        "training/test_early_stopping.py::test_a_run_stops_with_a_checkpoint_says_why_and_does_not_go_on",
    ),
    in_package(
        "a value that is not finite is the best one of early stopping",
        "training/early_stopping.py",
        "is_first = self._best is None and math.isfinite(value)",
        "is_first = self._best is None",
        "training/test_early_stopping.py::test_it_is_over_after_so_many_evaluations_without_a_better_one",
    ),
    in_package(
        "an option can come before its kind",
        "config/overrides.py",
        '(0, len(one[0])) if one[0][-1] == "kind" else (1, 0)',
        "(1, 0)",
        "config/test_overrides.py",
    ),
    in_package(
        "an earlier base lies over a later one",
        "config/layers.py",
        "[*layers, tree])",
        "[*reversed(layers), tree])",
        "config/test_loader.py",
    ),
    in_package(
        "options of another kind stay",
        "config/layers.py",
        "if other is not section or",
        "if other is section and",
        "config/test_loader.py",
        "config/test_overrides.py",
    ),
    in_package(
        "a rank that ended is blamed before one that was killed",
        "supervise/exit_status.py",
        "return 1 if code < 0 else 2",
        "return 2 if code < 0 else 1",
        "supervise/test_exit_status.py",
    ),
    in_package(
        "a killed run's exit code is below 128",
        "supervise/exit_status.py",
        "PREEMPTED), 128 - code)",
        "PREEMPTED), 128 + code)",
        "supervise/test_exit_status.py",
    ),
    in_package(
        "the first pause is doubled",
        "supervise/policy.py",
        "2 ** (number - 1)",
        "2 ** number",
        "supervise/test_policy.py",
    ),
    in_package(
        "an old checkpoint is progress",
        "supervise/policy.py",
        "outcome.checkpoint > newest)",
        "outcome.checkpoint >= newest)",
        "supervise/test_policy.py",
    ),
    in_package(
        "what is no number is equal",
        "prove/compare.py",
        "if first is None and not error <= tolerance:",
        "if first is None and error > tolerance:",
        "prove/test_compare.py",
    ),
    in_package(
        "the last step of a comparison is left out",
        "prove/compare.py",
        "for step in range(1, end):",
        "for step in range(1, end - 1):",
        "prove/test_compare.py",
    ),
    in_package(
        "a proof has no floor for gradients",
        "prove/rounding.py",
        "max(_max_abs(expected), self.floor * self.step_size)",
        "_max_abs(expected)",
        "prove/test_compare.py",
    ),
    in_package(
        "a weight of another shape is equal",
        "prove/rounding.py",
        'return float("inf")',
        "return 0.0",
        "prove/test_compare.py",
    ),
]
