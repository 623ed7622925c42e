"""Say what is wrong with a run by its folder."""

from pathlib import Path

from trainer.distributed.runtime import environment_info
from trainer.doctor.diagnosis import Diagnosis
from trainer.doctor.recorded.run_checks import RUN_CHECKS
from trainer.doctor.recorded.run_evidence import read_run


def diagnose_run(path: Path, *, verifies: bool) -> Diagnosis:
    """Return what is found in a run's folder; `verifies`: every byte of its checkpoints is read."""
    notes = [] if verifies else ["checkpoints were not read; without --static every byte of them is"]
    return Diagnosis.of(RUN_CHECKS, read_run(path, environment_info(), verifies=verifies), notes=notes)
