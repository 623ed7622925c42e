"""Training with packages absent: a run needs only what its config uses, and a command names what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import imported_once
from tests.end_to_end.tiny import environment, make_workplace

WITHOUT = """
import sys
names, sys.argv = sys.argv[1].split(","), sys.argv[1:]
sys.modules.update(dict.fromkeys(names))  # None: importing it raises ModuleNotFoundError, and find_spec finds nothing
from trainer.cli import main
main()
"""

OPTIONAL = ["datasets", "deepspeed", "lm_eval", "rouge_score", "sacrebleu", "scipy", "tensorboard", "tokenizers"]
OPTIONAL += ["torch.utils.tensorboard", "wandb", "zstandard"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("absent"), dtype="float32")
    (folder / "without.py").write_text(WITHOUT)
    return folder


def train(workplace: Path, absent: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["without.py", absent, "train", "tiny.yaml", "train.steps=2", "schedule.warmup_steps=1", *options]
    return imported_once.run(arguments, cwd=workplace)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("absent", OPTIONAL)
def test_a_run_trains_without_a_package_that_it_does_not_use(workplace: Path, absent: str) -> None:
    result = train(workplace, absent, f"name={absent}", "metrics.routing_gap_every=null")
    assert result.returncode == 0, result.stderr
    lines = (workplace / "runs" / absent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]


def test_a_fresh_process_trains_without_all_of_them(workplace: Path) -> None:
    options = ["train.steps=2", "schedule.warmup_steps=1", "metrics.routing_gap_every=null", "name=without_all"]
    command = [sys.executable, "without.py", ",".join(OPTIONAL), "train", "tiny.yaml", *options]
    result = subprocess.run(command, cwd=workplace, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert (workplace / "runs/without_all/checkpoints/step_00000002").is_dir()


@pytest.mark.parametrize(
    ("absent", "option", "message"),
    [
        ("wandb", "metrics.wandb.mode=offline", "metrics.wandb.mode: needs wandb, "),
        ("tensorboard", "metrics.tensorboard=true", "metrics.tensorboard: needs tensorboard, "),
        ("scipy", "metrics.routing_gap_every=1", "metrics.routing_gap_every: needs scipy, "),
        (
            "scipy",
            "model.moe={num_experts: 4, router: {kind: base}, capacity: {factor: null}}",
            "model.moe.router.kind: needs scipy, ",
        ),
        ("deepspeed", "engine.kind=deepspeed", "engine.kind: needs deepspeed, "),
        ("tokenizers", "data.tokenizer={kind: bpe}", "data.tokenizer.kind: needs tokenizers, "),
    ],
)
def test_a_run_that_uses_it_is_refused_before_it_has_a_folder(
    workplace: Path, absent: str, option: str, message: str
) -> None:
    result = train(workplace, absent, "name=refused", "metrics.routing_gap_every=null", option)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(message) and "which is not installed; pip install " in line
    assert not (workplace / "runs/refused").exists()
