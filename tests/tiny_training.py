"""Train a tiny run inside a test, in this process or on this rank of several, from its first step to its last."""

import io
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from trainer.atomic_io import replace_file
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.init_from_parent import find_first_weights
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.distributed.signals import StopRequest
from trainer.experiment import ExperimentConfig
from trainer.status import StatusFile
from trainer.training.loop import fit
from trainer.training.setup import build_run

CONFIG = """\
name: tiny
model:
  {num_layers: 2, d_model: 16, num_heads: 2, seq_len: 16, d_ff: 16, init_std: 0.1,
   moe: {num_experts: 4, d_ff: 16, router: {kind: bias_balanced, jitter: 0.1}}}
train: {steps: 12, global_batch_size: 6}
schedule: {kind: warmup_cosine, warmup_steps: 0, peak_lr: 1e-2}
checkpoint: {every: 3, keep: 20}
eval: {every: 100, max_tokens_per_domain: 64}
metrics: {log_every: 1}
parallel: {micro_batch_size: 3, device: cpu}
"""


def config_of(folder: Path, *overrides: str) -> ExperimentConfig:
    """Return the config of a run below a folder, whose caches and runs are there too."""
    if not (folder / "tiny.yaml").exists():
        replace_file(folder / "tiny.yaml", CONFIG)  # another rank may be about to read it
    places = [f"data.cache_dir={folder}/cache", f"runs_dir={folder}/runs"]
    return load(folder / "tiny.yaml", [*places, *overrides], ExperimentConfig)


def config_of_text(folder: Path, *overrides: str) -> ExperimentConfig:
    """Return the config of a run on a short text of its own, which is read much sooner."""
    lines = (f"{number} times {number % 7} is {number * (number % 7)}\n\n" for number in range(400))
    replace_file(folder / "text.txt", "".join(lines))
    return config_of(folder, f"data.sources=[{{kind: text, domain: sums, path: {folder}/text.txt}}]", *overrides)


def train_here(config: ExperimentConfig, mesh: Mesh | None = None) -> str:
    """Train, or resume, a run to its end on this rank; return what was on its screen."""
    folder, screen = RunFolder(Path(config.runs_dir) / config.name), io.StringIO()
    mesh, first = mesh or Mesh.of_one(), find_first_weights(config, folder)
    with StopRequest() as stop, closing(Console(config.train.steps, file=screen)) as console:
        if first is not None and mesh.layout.rank == 0:
            first.verify(warn=console.warning)
        run = build_run(config, folder, console, mesh, torch.device("cpu"), first_weights=first)
        fit(run, stop, StatusFile(folder.status, rank=mesh.layout.rank))
        run.saver.close()
        run.engine.close()
    return screen.getvalue()


def kill_after(run: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after it saved a step."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def losses(run: Path) -> list[tuple[int, float]]:
    """Return step and loss of each step of a run's log."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def final_files(run: Path) -> dict[str, Any]:
    """Return the hashes of the files of a run's last checkpoint, which are equal exactly if every bit is."""
    newest = max((run / "checkpoints").iterdir())
    return {newest.name: json.loads((newest / "manifest.json").read_text())["files"]}
