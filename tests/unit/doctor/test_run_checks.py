"""Every check of a run finds its seeded fault, and a run that went well has none."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_training import config_of_text, train_here
from trainer.doctor.finding import examine
from trainer.doctor.recorded.run_checks import RUN_CHECKS
from trainer.doctor.recorded.run_evidence import RunEvidence, read_run
from trainer.runs.recorded_log import RecordedLog
from trainer.runs.run_state import RunProgress, State


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 12 steps."""
    config = config_of_text(tmp_path_factory.mktemp("run"), "checkpoint.every=6", "eval.every=null")
    train_here(config)
    return Path(config.runs_dir) / config.name


@pytest.fixture(scope="module")
def sound(run: Path) -> RunEvidence:
    return read_run(run, {}, verifies=False)


def found(evidence: RunEvidence) -> set[str]:
    return {finding.check for finding in examine(RUN_CHECKS, evidence)}


def logged(*records: dict[str, Any]) -> Callable[[RunEvidence], RunEvidence]:
    lines = [{"step": 10 * number, **record} for number, record in enumerate(records, 1)]
    return lambda evidence: replace(evidence, log=RecordedLog(records=lines))


def ended(state: State = "finished", **values: Any) -> Callable[[RunEvidence], RunEvidence]:
    return lambda evidence: replace(evidence, progress=RunProgress(state=state, **values))


def each(key: str, values: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    return [{key: value, **more} for value in values]


RANG = {
    "step": 30,
    "alarm": "collapse",
    "layer": 1,
    "state": "rings",
    "message": "layer 1: 2 of 8",
    "advice": "balance",
}
FAULTS: dict[str, list[Callable[[RunEvidence], RunEvidence]]] = {
    "alarms_ring": [lambda evidence: replace(evidence, alarms=[RANG])],
    "skipped_steps": [logged({"skipped_steps": 1}), logged({"skipped_steps": 9})],
    "loss_spikes": [logged({"loss_spikes": 4})],
    "drops": [logged(*each("drop_rate", [0.0, 0.2, 0.2, 0.2, 0.2, 0.2]))],
    "failed_run": [ended(state="killed"), ended(state="running", troubled=["rank 3 is silent"])],
    "damaged_record": [ended(notes=["metrics.jsonl: line 3 damaged"])],
    "other_versions": [lambda evidence: replace(evidence, versions={"torch": ("2.1", "2.13")})],
    "damaged_checkpoints": [lambda evidence: replace(evidence, damaged={6: ["step_00000006: hash differs"]})],
    "always_slowest": [logged(*each("slowest_rank_ratio", [1.5] * 5, slowest_rank=3))],
    "waits_for_data": [logged(*each("time/data", [0.5] * 5, step_s=1.0))],
    "held_out_loss_rises": [logged(*each("eval/loss", [3.0, 2.0, 2.1, 2.2, 2.3]))],
    "always_clipped": [logged(*each("grad_norm", [50.0] * 24))],
    "rare_saves": [
        lambda evidence: replace(
            logged(*each("step_s", [400.0] * 10))(evidence),
            world_size=4096,
            config=evidence.config.model_copy(
                update={
                    "train": evidence.config.train.model_copy(update={"steps": 10000}),
                    "checkpoint": evidence.config.checkpoint.model_copy(update={"every": 500}),
                }
            ),
        )
    ],
}


def test_every_check_of_a_run_has_a_seeded_fault() -> None:
    assert [check.name for check in RUN_CHECKS] == list(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_check_finds_its_seeded_faults_and_no_other(name: str, sound: RunEvidence) -> None:
    for fault in FAULTS[name]:
        assert found(fault(sound)) == {name}


def test_nothing_is_found_in_a_run_that_went_well(run: Path) -> None:
    evidence = read_run(run, json.loads((run / "environment.json").read_text()), verifies=True)
    assert evidence.checkpoints and evidence.is_verified and evidence.log.last_step == 12
    assert found(evidence) == set()


def test_alarms_versions_and_checkpoints_are_read_from_the_folder(run: Path) -> None:
    over = {**RANG, "alarm": "plateau", "state": "ended"}
    (run / "alarms.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in (RANG, {**over, "state": "rings"}, over))
    )
    weights = next(path for path in (run / "checkpoints/step_00000006").iterdir() if path.suffix == ".safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    evidence = read_run(run, {"torch": "0.1", "python": "3.99", "cores": 3}, verifies=True)
    assert [alarm["alarm"] for alarm in evidence.alarms] == ["collapse"]
    assert evidence.versions["torch"][1] == "0.1" and set(evidence.versions) == {"torch", "python"}
    assert list(evidence.damaged) == [6]
    assert {"alarms_ring", "other_versions", "damaged_checkpoints"} <= found(evidence)
