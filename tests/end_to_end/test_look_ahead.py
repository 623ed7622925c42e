"""Non-causal routers warn before training, and mark losses that leak future tokens."""

import json
from pathlib import Path

from tests import imported_once
from tests.end_to_end.tiny import make_workplace

ROUTER = "model.moe.router={kind: expert_choice, evaluation_routing: as_trained}"
ARGUMENTS = ["train", "tiny.yaml", "model.moe.capacity.factor=null"]


def test_training_warns_and_evaluation_states_the_leak(tmp_path: Path) -> None:
    make_workplace(tmp_path, dtype="float32")
    told = imported_once.run(["-m", "trainer", *ARGUMENTS, "name=leaks", ROUTER], cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    printed = told.stdout + told.stderr
    assert "warning: model.moe.router: expert_choice is not causal: a token's experts depend on later tokens" in printed
    assert "  not causal" in printed
    records = [json.loads(line) for line in (tmp_path / "runs/leaks/metrics.jsonl").read_text().splitlines()]
    assert [record["eval/looks_ahead"] for record in records if "eval/loss" in record] == [1.0, 1.0]
    told = imported_once.run(["-m", "trainer", "eval", "runs/leaks", "--json"], cwd=tmp_path)
    assert "held-out loss is that of a model that sees some of what it predicts" in told.stderr
    assert json.loads(told.stdout)["eval/looks_ahead"] == 1.0


def test_by_default_evaluation_does_not_leak_and_says_nothing(tmp_path: Path) -> None:
    make_workplace(tmp_path, dtype="float32")
    told = imported_once.run(
        ["-m", "trainer", *ARGUMENTS, "name=fair", "model.moe.router={kind: expert_choice}"], cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    assert "warning: model.moe.router: expert_choice" in told.stdout + told.stderr
    told = imported_once.run(["-m", "trainer", "eval", "runs/fair", "--json"], cwd=tmp_path)
    assert "later tokens" not in told.stderr and "eval/looks_ahead" not in json.loads(told.stdout)
