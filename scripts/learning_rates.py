"""The pick of the learning-rate finder (configs/sweeps/learning_rate.yaml) against a grid of rates, on two recipes.

    python -m scripts.learning_rates [--recipes smoke quickstart] [--runs-dir runs/learning_rates] [a.b=c ...]

Small models of both shipped configs are trained to the end at every rate of the finder. Successive halving stops the
same trainings earlier and changes nothing else in them, so that its pick is read from their held-out losses at its
rungs. Prints these losses in nats per byte, the pick, and how far it ends above the best. Finished runs are kept;
docs/benchmarks.md has the result.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
STEPS, RUNGS, KEPT = 192, (48, 96), 2
"""Steps of a training; steps of the rungs before; one of how many rates goes on."""
SMALL = [
    "model.num_layers=2",
    "model.d_model=32",
    "model.num_heads=2",
    "model.seq_len=64",
    "model.moe.d_ff=48",
    "train.global_batch_size=16",
    "parallel.micro_batch_size=16",
    f"train.steps={STEPS}",
    "eval.every=24",
    "eval.max_tokens_per_domain=8192",
    f"checkpoint.every={STEPS}",
    "checkpoint.keep=2",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of every run, such as seed=2")
    parser.add_argument("--recipes", nargs="+", default=["smoke", "quickstart"])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/learning_rates"))
    options = parser.parse_intermixed_args()
    print(f"{'':12}{'peak_lr':>8}" + "".join(f"{f'step {step}':>10}" for step in (*RUNGS, STEPS)))
    for recipe in options.recipes:
        found = {}
        for rate in RATES:
            found[rate] = _train(recipe, rate, options)
            cells = "".join(f"{found[rate][step]:10.4f}" for step in (*RUNGS, STEPS))
            print(f"{recipe:12}{rate:8g}{cells}", flush=True)
        picked, best = choose_rate(found), min(found[rate][STEPS] for rate in RATES)
        above, cost = found[picked][STEPS] / best - 1, trained_steps() / (STEPS * len(RATES))
        print(f"=> {recipe}: picks {picked:g}, {above:.2%} above the best, for {cost:.0%} of the grid's steps")


def _train(recipe: str, rate: float, options: argparse.Namespace) -> dict[int, float]:
    """Train at a rate, unless that has been done; return the held-out loss by step."""
    run = options.runs_dir / f"{recipe}-{rate:g}"
    if STEPS not in _losses(run):
        command = [sys.executable, "-m", "trainer", "train", str(CONFIGS / f"{recipe}.yaml"), *SMALL]
        command += [f"name={run.name}", f"runs_dir={options.runs_dir}", f"schedule.peak_lr={rate}", *options.overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return _losses(run)


def _losses(run: Path) -> dict[int, float]:
    if not (run / "metrics.jsonl").exists():
        return {}
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def choose_rate(found: Mapping[float, Mapping[int, float]]) -> float:
    """Return the rate that is left after the rungs."""
    left = list(found)
    for step in RUNGS:
        left = sorted(left, key=lambda rate: found[rate][step])[: max(1, len(left) // KEPT)]
    return min(left, key=lambda rate: found[rate][STEPS])


def trained_steps() -> int:
    """Return the steps that the finder trains, over all rates."""
    steps, number, before = 0, len(RATES), 0
    for step in (*RUNGS, STEPS):
        steps, before, number = steps + number * (step - before), step, max(1, number // KEPT)
    return steps


if __name__ == "__main__":
    main()
