"""Facts about a run from its folder, which the checks of a run look at. Imports torch only to read checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.doctor.finding import Check
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.metrics.records import parse_record, read_lines
from trainer.runs.recorded_log import RecordedLog, read_log
from trainer.runs.recorded_run import RecordedRun
from trainer.runs.run_state import RunProgress, read_state

_COMPARED = ("turnout", "torch", "python", "gpu")
"""Versions of environment.json that should stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvidence:
    """A run as its folder records it."""

    config: ExperimentConfig
    log: RecordedLog = field(default_factory=RecordedLog)
    progress: RunProgress = field(default_factory=lambda: RunProgress(state="finished"))
    alarms: Sequence[Mapping[str, Any]] = ()
    """Last line of each alarm that has not ended."""
    versions: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Those that differ: in environment.json, here."""
    world_size: int = 1
    checkpoints: Sequence[int] = ()
    damaged: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Findings of `checkpoint verify`, by step."""
    is_verified: bool = False

    def newest(self, key: str) -> float:
        """Return the last value of a metric; 0 without one."""
        return self.log.newest(key) or 0.0

    def values(self, key: str) -> list[float]:
        """Return the finite values of a metric, in order."""
        return [value for value in self.log.series(key)[1] if value == value]


RunCheck = Check[RunEvidence]


def read_run(path: Path, here: Mapping[str, Any], *, verifies: bool) -> RunEvidence:
    """Read a run folder; `here` are the versions of this process (`environment_info`), none: not to compare."""
    run = RecordedRun(path)
    log, environment = read_log(run.folder.metrics), run.environment()
    steps = run.checkpoints
    return RunEvidence(
        config=run.config,
        log=log,
        progress=read_state(path, log),
        alarms=_ringing(run.folder),
        versions={
            name: (environment[name], here[name])
            for name in _COMPARED
            if name in environment and name in here and environment[name] != here[name]
        },
        world_size=_whole(environment.get("world_size")),
        checkpoints=steps,
        damaged=_damaged(CheckpointFolder(run.folder.checkpoints), steps) if verifies else {},
        is_verified=verifies,
    )


def _whole(value: object) -> int:
    return value if type(value) is int and value > 0 else 1


def _ringing(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the last line of each alarm that has rung and not ended."""
    last: dict[tuple[Any, Any, Any], dict[str, Any]] = {}
    if not folder.alarms.is_file():
        return []
    for line in read_lines(folder.alarms):
        record = parse_record(line)
        if record is not None and isinstance(record.get("alarm"), str):
            last[record["alarm"], record.get("layer"), record.get("rank")] = record
    return [record for record in last.values() if record.get("state") != "ended"]


def _damaged(folder: CheckpointFolder, steps: Sequence[int]) -> dict[int, list[str]]:
    from trainer.checkpoint.tools.verify import verify_checkpoint

    found = {}
    for step in steps:
        try:
            findings = verify_checkpoint(folder, step).findings
        except FileNotFoundError:  # pruned by a running trainer
            continue
        except CheckpointError as error:
            findings = [str(error)]
        if findings:
            found[step] = findings
    return found
