"""What upcycling gains: a dense run continued, and its upcycled twin, for the same steps of the same rows, over seeds.

    python scripts/upcycling_gain.py [--seeds 1 2 3] [--runs-dir runs/upcycling] [--steps 200] [a.b=c ...]

A dense model of configs/quickstart.yaml's kind is trained; then both go on from its weights with moments of zero, the
same rows in the same order and the same schedule. Prints the held-out losses and the largest difference of logits
before. Finished runs are kept; docs/benchmarks.md has the result.
"""

import argparse
import json
import statistics
import subprocess
import sys
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
DENSE = ["model.moe=null", "train.steps=400"]
VARIANTS = {
    "copies": ([], []),
    "slices of a half": (["model.moe.num_experts=16", "model.moe.d_ff=88", "model.moe.router.top_k=4"], []),
    "half of the units anew": ([], ["--drop-fraction", "0.5", "--allow-change"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of every run, such as schedule.peak_lr=2e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["copies"])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/upcycling"))
    options = parser.parse_intermixed_args()  # overrides may follow options
    print(f"{'':8}{'dense':>10}{'continued':>11}", *(f"{name:>24}" for name in options.variants))
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        losses = compare(seed, options)
        for name, loss in losses.items():
            found.setdefault(name, []).append(loss)
        show(f"seed {seed}", losses)
    show("mean", {name: statistics.mean(values) for name, values in found.items()})


def compare(seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and continue with one seed; return the held-out loss of each model, and of the dense one before."""
    shared = [*SHAPE, f"runs_dir={options.runs_dir}", *options.overrides]
    dense = options.runs_dir / f"dense-{seed}"
    turnout("train", CONFIG, *shared, *DENSE, f"seed={seed}", f"name={dense.name}", makes=dense)
    further = [f"train.steps={options.steps}", f"seed={seed + 100}"]  # other rows than before
    goes_on = options.runs_dir / f"continued-{seed}"
    turnout("surgery", "average", dense, goes_on.name, "--runs", dense, *further, makes=goes_on, trains=False)
    turnout("train", goes_on, makes=goes_on)
    losses = {"dense": last_loss(dense), "continued": last_loss(goes_on)}
    for name in options.variants:
        keys, how = VARIANTS[name]
        run = options.runs_dir / f"{name.replace(' ', '-')}-{seed}"
        config = [*shared, "model.moe.d_ff=176", *keys, *further, f"name={run.name}"]
        turnout("upcycle", dense, CONFIG, *config, *how, makes=run, trains=False)
        turnout("train", run, makes=run)
        losses[name] = last_loss(run)
        before = json.loads((run / "made_from.json").read_text())
        print(f"{name}, seed {seed}: {before['notes'][0]}, loss {before['loss_after']:.4f} at step 0", flush=True)
    return losses


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


def show(title: str, losses: dict[str, float]) -> None:
    """Print a line of the table."""
    dense, continued, *others = losses.values()
    print(f"{title:8}{dense:10.4f}{continued:11.4f}", *(f"{loss:24.4f}" for loss in others), flush=True)


if __name__ == "__main__":
    main()
