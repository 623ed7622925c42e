"""Run folders made of files: what a run that was trained elsewhere would leave."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.config.dump import dump
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig

ROOT = Path(__file__).parents[1]


def make_run(path: Path, *overrides: str, losses: list[float] | None = None, eval_loss: float | None = None) -> Path:
    """Write a run folder with the config of smoke, a record per loss and one of an evaluation."""
    path.mkdir(parents=True, exist_ok=True)
    config = load(ROOT / "configs/smoke.yaml", [f"name={path.name}", *overrides], ExperimentConfig)
    (path / "config.yaml").write_text(dump(config))
    records: list[dict[str, Any]] = [
        {"step": step, "tokens": 100 * step, "loss": loss, "tokens_per_s": 50.0, "step_s": 2.0}
        for step, loss in enumerate(losses or [], 1)
    ]
    if eval_loss is not None:
        records.append({"step": len(records), "eval/loss": eval_loss, "eval/bits_per_byte": eval_loss / 2})
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def write_status(run: Path, rank: int, pid: int, **values: Any) -> None:
    """Write the status file of a rank that trains here now, with some values changed."""
    now = time.time()
    status: dict[str, Any] = {"attempt": "", "rank": rank, "host": socket.gethostname(), "pid": pid, "step": 5}
    status |= {
        "rows": [0, 5],
        "phase": "training",
        "experts_kernel": "loop",
        "state": "running",
        "exit_code": None,
        "error": None,
    }
    status |= {"exit_code": None, "error": None, "started": now, "updated": now, **values}
    (run / "status").mkdir(exist_ok=True)
    (run / f"status/rank{rank:05d}.json").write_text(json.dumps(status) + "\n")


def dead_pid() -> int:
    """Return the id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid
