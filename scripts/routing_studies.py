"""Two studies of load balancing on configs/quickstart.yaml, over seeds; results are in docs/routing.md.

    python scripts/routing_studies.py bias      [--seeds 1337 1 2] [--runs-dir runs/studies] [a.b=c ...]
    python scripts/routing_studies.py counting

bias: selection bias against balance loss, the latter with the default router and with a twin that scores by sigmoids
like the bias router. counting: what the balance loss counts loads over in a step of four micro-batches: the global
batch (exact, of the previous step, or a running count) or each sequence.

Runs alternate between seeds; finished ones are skipped and interrupted ones resume. MaxVio is the busiest expert's load
over the mean load, minus 1, in the worst layer, over the global batch.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
STUDIES = {
    "bias": {
        "balance loss": ["metrics.routing_gap_every=125"],
        "twin": ["model.moe.router={kind: top_k, score: sigmoid}", "metrics.routing_gap_every=125"],
        "bias": [
            "model.moe.router={kind: bias_balanced, bias_update_rate: 0.003}",
            "model.moe.balance.coef=0",
            "metrics.routing_gap_every=125",
        ],
    },
    "counting": {
        name: ["parallel.micro_batch_size=8", override]
        for name, override in {
            "exact": "model.moe.balance.counts=exact",
            "step before": "model.moe.balance.counts=previous_step",
            "running": "model.moe.balance.counts=running",
            "sequence": "model.moe.balance.scope=sequence",
        }.items()
    },
}
COLUMNS = ("held-out loss", "MaxVio, last step", "MaxVio, last tenth", "MI bits", "gap", "seconds a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("overrides", nargs="*", help="overrides of every run, such as train.steps=60")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/studies"))
    options = parser.parse_intermixed_args()  # overrides may follow options
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STUDIES[options.study]}
    print(f"{'':22}", *(f"{title:>18}" for title in COLUMNS))
    for seed in options.seeds:
        for name, overrides in STUDIES[options.study].items():
            folder = options.runs_dir / f"{name.replace(' ', '-')}-seed{seed}"
            train(folder, [f"seed={seed}", *overrides, *options.overrides])
            found[name].append(findings(folder))
            show(f"{name}, seed {seed}", found[name][-1])
    for name, results in found.items():
        means = {c: statistics.mean(r[c] for r in results) for c in COLUMNS if all(c in r for r in results)}
        show(f"{name}, mean", means)


def train(folder: Path, overrides: list[str]) -> None:
    """Train, unless the run has finished."""
    command = [sys.executable, "-m", "trainer", "train", str(CONFIG), f"name={folder.name}"]
    command += [f"runs_dir={folder.parent}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def findings(folder: Path) -> dict[str, float]:
    """Return the columns of one run."""
    records: list[dict[str, Any]] = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    steps = [record for record in records if "load_imbalance" in record]
    last = [record["load_imbalance"] - 1 for record in steps if record["step"] > 0.9 * steps[-1]["step"]]
    evaluation = [record for record in records if "eval/loss" in record][-1]
    result = {
        "held-out loss": evaluation["eval/loss"],
        "MaxVio, last step": steps[-1]["load_imbalance"] - 1,
        "MaxVio, last tenth": statistics.mean(last),
        "MI bits": evaluation["eval/expert_domain_mi"],
        "seconds a step": statistics.median(record["step_s"] for record in steps[1:]),
    }
    gaps = [record["routing_gap"] for record in records if "routing_gap" in record]
    return {**result, "gap": gaps[-1]} if gaps else result


def show(title: str, result: dict[str, float]) -> None:
    cells = (f"{result[column]:18.4f}" if column in result else f"{'-':>18}" for column in COLUMNS)
    print(f"{title:22}", *cells, flush=True)


if __name__ == "__main__":
    main()
