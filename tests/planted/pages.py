"""Faults of report pages."""

from tests.planted.fault import in_package as _fault

PAGE = "report/test_report_page.py"

FAULTS = [
    _fault(
        "foreign text in an attribute can end it",
        "report/markup.py",
        """.replace('"', "&quot;")""",
        "",
        "report/test_markup.py",
    ),
    _fault(
        "a long curve loses its lowest values",
        "report/curve_chart.py",
        "min(stretch, key=",
        "max(stretch, key=",
        "report/test_curve_chart.py",
    ),
    _fault(
        "a run between two starts of its ranks has ended",
        "commands/reported_run.py",
        'return was_ending or card.last.get("step", 0) >= card.planned_steps',
        "return True",
        "commands/test_report_runs.py",
    ),
    _fault(
        "an alarm that ended has lost its cure",
        "report/run_sections.py",
        'if record.get("state") != "ended"] or records',
        "] or records",
        PAGE,
    ),
    _fault(
        "a step that was trained again keeps its first value",
        "report/run_logs.py",
        "dict(zip(*self.metrics.series(key), strict=True))",
        "dict(reversed(list(zip(*self.metrics.series(key), strict=True))))",
        "report/test_run_logs.py",
    ),
    _fault(
        "a page that cannot be written fails a run that is finished",
        "commands/final_page.py",
        "except Exception as error:",
        "except ValueError as error:",
        "commands/test_final_page.py",
    ),
    _fault(
        "a run that was stopped is measured before it ends",
        "commands/final_page.py",
        'if how == "full" and is_finished:',
        'if how == "full":',
        "commands/test_final_page.py",
    ),
    _fault(
        "measuring a run at its end takes as long as it likes",
        "commands/final_page.py",
        "and time.monotonic() < end",
        "",
        "commands/test_final_page.py",
    ),
    _fault(
        "the letters of a word begin it each",
        "report/token_kinds.py",
        "& begins & goes_on, _INSIDE",
        "& begins & ~goes_on, _INSIDE",
        "report/test_token_kinds.py",
    ),
    _fault(
        "a log with a number of a million digits has no page",
        "report/run_logs.py",
        "all(map(_is_count, row))",
        "all(isinstance(n, int | float) for n in row)",
        PAGE,
    ),
]
