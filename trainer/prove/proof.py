"""Compare every layout of a config with one process."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from trainer.config.nodes import shown
from trainer.console.console import Console
from trainer.data.corpus import build_corpus
from trainer.distributed.rank_layout import Layout
from trainer.engine.registry import NativeEngineConfig
from trainer.errors import ConfigError, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.prove.all_cases import all_cases
from trainer.prove.cases import MAX_RANKS, in_dtype, labels, reference, without_repeated_options
from trainer.prove.compare import compare
from trainer.prove.pool import LocalRanks
from trainer.prove.progress import LayoutProgress
from trainer.prove.report import Table, TableRow, write_json
from trainer.prove.rounding import FLOORS, TOLERANCES
from trainer.prove.run_case import run_case
from trainer.prove.small_config import shrink
from trainer.training.memory import check_memory

_COMPARED_STEPS = 5
"""Steps compared below float64, where near ties in the routing eventually separate correct trajectories."""


def prove(
    config: ExperimentConfig,
    *,
    steps: int,
    dtype: str | None,
    is_small: bool,
    only: str | None,
    engines: Sequence[str] | None,
    most_ranks: int = MAX_RANKS,
    json_path: Path | None,
    timeout_s: float,
) -> int:
    """Run all layouts and print the results; return 0 if all learn the same as one process, else 1.

    The arguments are the command's: `only` is part of a layout's name, and without a dtype it is float64, or float32 if
    an engine has no float64.
    """
    config = without_repeated_options(config)
    config = shrink(config) if is_small else config
    has_deepspeed = "deepspeed" in (engines or [config.engine.kind])
    if has_deepspeed and dtype == "float64":
        raise ConfigError("--dtype: float64: DeepSpeed sums gradients in float32; use float32, or --engines native")
    dtype = dtype or ("float32" if has_deepspeed else "float64")
    if not has_deepspeed:  # the config's engine may not support this dtype
        config = config.model_copy(update={"engine": NativeEngineConfig()})
    config = in_dtype(config, dtype)
    check_memory(config, Layout(), torch.device("cpu"))
    with Console().progress_bar("reading text") as bar:
        build_corpus(config.data, seq_len=config.model.seq_len, progress=bar)
    tolerance, floor = TOLERANCES[dtype], FLOORS[dtype]
    first_steps = None if dtype == "float64" else min(steps, _COMPARED_STEPS)
    possible = all_cases(config, engines, most_ranks)
    cases = [case for case in possible if only is None or only in case.name]
    if not cases:
        names = "\n  ".join(case.name for case in possible)
        raise ConfigError(f"--layouts: no layout has {shown(only)} in its name; the layouts are\n  {names}")
    compared = "" if first_steps in (None, steps) else f", the first {first_steps} compared"
    exceptions = labels(config)
    rows, progress, single = [], LayoutProgress(len(cases)), reference(config)
    with closing(LocalRanks()) as ranks:
        with progress.running(single.name):
            expected = run_case(config, single, ranks, steps=steps, timeout_s=timeout_s)
        table = Table(cases, compare(expected, expected, tolerance=tolerance).worst, labels=exceptions)
        counted = "1 layout" if len(cases) == 1 else f"{len(cases)} layouts"
        title = f"{config.name}: {counted} against one process, {steps} steps in {dtype}{compared}"
        table.head(title, tolerance=tolerance)
        for number, case in enumerate(cases, 1):
            try:
                with progress.running(case.name, number):
                    actual = run_case(config, case, ranks, steps=steps, timeout_s=timeout_s)
                comparison = compare(actual, expected, tolerance=tolerance, floor=floor, steps=first_steps)
                rows.append(TableRow(case=case, comparison=comparison))
            except TurnoutError as error:
                rows.append(TableRow(case=case, comparison=None, error=str(error)))
            table.line(rows[-1])
    table.foot(rows)
    if json_path is not None:
        write_json(json_path, rows, tolerance=tolerance, labels=exceptions)
    return 0 if all(row.is_accepted(exceptions) for row in rows) else 1
