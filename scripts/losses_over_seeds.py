"""Runs of configs/quickstart.yaml's kind that are compared over seeds, for the scripts `*_gain`."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
SHAPE = [
    "model.num_layers=3",
    "model.d_model=64",
    "model.d_ff=176",
    "model.seq_len=64",
    "train.global_batch_size=16",
    "parallel.micro_batch_size=16",
    "eval.every=null",
]


def parser_over_seeds(description: str | None, *, steps: int, runs_dir: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every comparison: use `parse_intermixed_args`, as overrides may come last."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of every run, such as schedule.peak_lr=2e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--runs-dir", type=Path, default=Path(runs_dir))
    return parser


def print_losses(columns: Sequence[tuple[str, int]], compared: Iterable[tuple[int, Sequence[float]]]) -> None:
    """Print seeds with their losses as they come, and the mean; `columns` are titles with widths."""
    print(f"{'':8}" + "".join(f"{title:>{width}}" for title, width in columns))
    found = []
    for seed, losses in compared:
        found.append(losses)
        _print_row(f"seed {seed}", losses, columns)
    _print_row("mean", [statistics.mean(column) for column in zip(*found, strict=True)], columns)


def _print_row(title: str, losses: Sequence[float], columns: Sequence[tuple[str, int]]) -> None:
    cells = (f"{loss:{width}.4f}" for loss, (_, width) in zip(losses, columns, strict=True))
    print(f"{title:8}" + "".join(cells), flush=True)


def turnout(*arguments: object, makes: Path, trains: bool = True) -> None:
    """Run a command unless its run is there: trained to its end, or only made."""
    is_there = (makes / "metrics.jsonl").exists() and finished(makes) if trains else makes.exists()
    if not is_there:
        command = [sys.executable, "-m", "trainer", *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def finished(run: Path) -> bool:
    """Return whether a run has evaluated its last step, which it does at the end only."""
    return "eval/loss" in (run / "metrics.jsonl").read_text()


def last_loss(run: Path) -> float:
    """Return the last held-out loss of a run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["eval/loss"] for record in records if "eval/loss" in record][-1]
