"""Experiment files, run folders and checkpoints from before the renames: they load, resume and export."""

import json
import shutil
from pathlib import Path

import pytest

from tests import imported_once
from tests.ignore_clock import without_clock
from trainer.trackers.jsonl import read_jsonl

FIXTURE = Path(__file__).parents[1] / "fixtures/runs_before_renames"
WARNINGS = {
    "expert_choice": ["attention_within: row is now document_mask: false", "room is now called capacity_factor",
                      "evaluation: same is now evaluation_routing: as_trained", "crossing is now wrapped"],
    "drawn_k": ["attention_within: document is now document_mask: true", "draw_top_k is now called top_k_choices",
                "whole is now bfd"],
    "depths": ["share is now called capacity", "crossing is now wrapped"],
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    for path in FIXTURE.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    shutil.copytree(FIXTURE / "folders", tmp_path / "runs")
    return tmp_path


def _turnout(workplace: Path, *words: str) -> str:
    done = imported_once.run(["-m", "trainer", *words], cwd=workplace)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", WARNINGS)
@pytest.mark.parametrize("by", ["config", "folder"])
def test_an_old_run_resumes(name: str, by: str, workplace: Path) -> None:
    """Its counts are equal, and its float64 sums up to the order of operations, which has changed since."""
    before = read_jsonl(FIXTURE / "folders" / name / "metrics.jsonl")
    said = _turnout(workplace, "train", f"{name}.yaml" if by == "config" else f"runs/{name}")
    assert f"resuming from runs/{name}/checkpoints/step_00000003" in said
    assert [text in said for text in WARNINGS[name]] == [by == "config"] * len(WARNINGS[name])
    assert "What was trained" in (workplace / "runs" / name / "report.html").read_text()
    after = read_jsonl(workplace / "runs" / name / "metrics.jsonl")
    for old, new in zip(map(without_clock, before), map(without_clock, after), strict=True):
        assert old.keys() == new.keys() - {"alarms"}  # which did not exist
        for key, value in old.items():
            expected = pytest.approx(value, rel=1e-12, abs=1e-14) if isinstance(value, float) else value
            assert new[key] == expected, (old["step"], key)


@pytest.mark.parametrize("name", WARNINGS)
def test_an_old_run_is_listed_verified_evaluated_and_exported(name: str, workplace: Path) -> None:
    run = f"runs/{name}"
    assert "step_00000003" in _turnout(workplace, "checkpoint", "list", run, "--full")
    _turnout(workplace, "checkpoint", "verify", run)
    numbers = json.loads(imported_once.run(["-m", "trainer", "eval", run, "--json"], cwd=workplace).stdout)
    (logged,) = [
        line for line in read_jsonl(FIXTURE / "folders" / name / "metrics.jsonl")
        if line["step"] == 3 and "eval/loss" in line
    ]  # fmt: skip
    assert numbers["eval/loss"] == pytest.approx(logged["eval/loss"], rel=1e-9)
    _turnout(workplace, "generate", run, "--max-tokens", "5")
    _turnout(workplace, "report", run, "-o", "page.html", "--max-tokens", "64", "--checkpoints", "1")
    assert "What each expert is for" in (workplace / "page.html").read_text()
    _turnout(workplace, "checkpoint", "export-dcp", run, "exported")
    assert (workplace / "exported" / ".metadata").is_file()
