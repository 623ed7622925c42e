"""A router in a folder of its own, as a user has it: trained, resumed, evaluated, proved, checked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import imported_once
from tests.end_to_end.tiny import CONFIG
from tests.launched_ranks import ROOT

PACKAGE = ROOT / "tests" / "plugin_router" / "my_router"
ROUTER = "{kind: my_router.threshold:ThresholdRouterConfig, threshold: 0.55}"

pytestmark = pytest.mark.slow


def turnout(folder: Path, *arguments: str) -> str:
    """Run a command in a folder that is not on the import path; return what it printed."""
    result = imported_once.run(["-m", "trainer", *arguments], cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def launch(folder: Path, *arguments: str) -> None:
    """Start ranks as a user does."""
    command = [sys.executable, "-c", "from trainer.cli import main; main()", "launch", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_plugin_trains_resumes_evaluates_and_is_proved(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.copytree(PACKAGE, folder / "my_router")
    text = CONFIG.replace("{kind: bias_balanced, jitter: 0.1}", ROUTER).replace(", capacity: {factor: 1.5}", "")
    (folder / "mine.yaml").write_text(text)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)

    turnout(folder, "train", "mine.yaml", "train.steps=4")
    assert 'kind: "my_router.threshold:ThresholdRouterConfig"' in (folder / "runs/tiny/config.yaml").read_text()
    turnout(elsewhere, "train", str(folder / "runs/tiny"), "train.steps=6", "checkpoint.every=2")
    assert (folder / "runs/tiny/checkpoints/step_00000006").is_dir()
    assert "tiny at step 6" in turnout(elsewhere, "eval", str(folder / "runs/tiny"))
    launch(folder, "mine.yaml", "--nproc", "2", "parallel.ep_size=2", "name=two", "train.steps=3")
    proof = turnout(folder, "prove", "mine.yaml", "--scale", "small", "--steps", "2", "--layouts", "2 ranks, ep 2")
    assert proof.count("equal") >= 3 and "DIFFERS" not in proof
    assert "all checks passed" in turnout(folder, "check-plugin", "my_router.threshold:ThresholdRouterConfig")
