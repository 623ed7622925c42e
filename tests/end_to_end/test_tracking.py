"""A run that is killed and resumed has the same records in metrics.jsonl, wandb and TensorBoard."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import imported_once
from tests.wandb_server import WandbServer

CONFIG = """\
name: tiny
model: {num_layers: 2, d_model: 64, num_heads: 2, seq_len: 64, moe: {num_experts: 4, d_ff: 64}}
data: {sources: [{kind: text, path: text.txt}]}
schedule: {kind: warmup_cosine, warmup_steps: 2}
train: {steps: 50, global_batch_size: 16}
eval: {every: 10, max_tokens_per_domain: 512}
checkpoint: {every: 15}
parallel: {micro_batch_size: 16}
profile: {start: 45, steps: 1}
metrics: {log_every: 1, tensorboard: true, wandb: {mode: offline, project: paper, tags: [small]}}
"""
SECRETS = {"WANDB_API_KEY": "5ec7e7" * 6 + "5ec7", "HF_TOKEN": "hf_5ec7e7", "OPENAI_API_KEY": "sk-5ec7e7"}


def train(workplace: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**SECRETS, "HOME": str(workplace), **environment}
    return imported_once.run(["-m", "trainer", "train", "tiny.yaml"], cwd=workplace, environment=own, timeout=200)


def numbers(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if v is not None} for record in records]


def test_a_killed_and_resumed_run_is_the_same_in_metrics_wandb_and_tensorboard(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    killed = train(tmp_path, TURNOUT_FAULTS="phase.data#43=kill")
    assert killed.returncode == -9, killed.stderr
    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "wandb: offline; to upload the run: turnout sync-wandb runs/tiny" in resumed.stdout

    screen = resumed.stdout[resumed.stdout.index("tiny: 50 steps done") :].splitlines()
    assert any(re.fullmatch(r" *time \d+[ms].* since step 30 +tokens 51\.2k", line) for line in screen), screen
    last = resumed.stdout[resumed.stdout.index("written to") :]
    for label, place in (("metrics", "metrics.jsonl"), ("tensorboard", "tensorboard"), ("profile", "profile")):
        assert re.search(rf"^ *{label} +runs/tiny/{place}$", last, re.MULTILINE), last
    assert re.search(r"^ *wandb +turnout sync-wandb runs/tiny$", last, re.MULTILINE), last

    folder = tmp_path / "runs/tiny"
    run_id, lines = (folder / "run_id").read_text().strip(), numbers(folder / "metrics.jsonl")
    for manifest in folder.glob("checkpoints/step_*/manifest.json"):
        assert json.loads(manifest.read_text())["run"]["id"] == run_id

    assert not (tmp_path / ".cache/wandb").exists() and not (tmp_path / ".config").exists()
    with WandbServer() as server:
        command = [sys.executable, "-m", "trainer", "sync-wandb", "runs/tiny"]
        environment = {**os.environ, **server.environment, "HOME": str(tmp_path)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=100, capture_output=True)
        rows = [{k: v for k, v in row.items() if not k.startswith("load/")} for row in server.rows(run_id)]
        assert rows == lines
        sent = server.runs[run_id]
        assert (sent["project"], sent["displayName"], sent["tags"]) == ("paper", "tiny", ["small"])
        drawn = [row["step"] for row in server.rows(run_id) if "load/layer_01" in row]
        assert drawn == [1, 11, 21, 31, 41]
        best = min(line["eval/loss"] for line in lines if "eval/loss" in line)
        assert server.summary(run_id)["best/eval/loss"] == best
        config = {key: value["value"] for key, value in json.loads(sent["config"]).items()}
        assert config["model"]["moe"]["num_experts"] == 4 and config["layout"]["world_size"] == 1

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == losses  # which is of float32 as its events are
    assert [e.step for e in events.Scalars("eval/bits_per_byte")] == [10, 20, 30, 40, 50]
    assert events.Tags()["histograms"] == ["load/layer_00", "load/layer_01"]

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    leaks = [path for path in written for secret in SECRETS.values() if secret.encode() in path.read_bytes()]
    said = killed.stdout + killed.stderr + resumed.stdout + resumed.stderr
    assert not leaks and not [secret for secret in SECRETS.values() if secret in said]
