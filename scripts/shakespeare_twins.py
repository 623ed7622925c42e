"""Tiny Shakespeare, character level: mixture of experts against a dense model of the same active size, over seeds.

    python scripts/shakespeare_twins.py PATH/TO/shakespeare.txt [--seeds 1 2 3] [--jobs 2]

Each run is `python -m trainer train configs/shakespeare_char.yaml` with one thread; the dense twin has
`model.moe=null` and the feed-forward width of top_k experts. The result is the loss over the whole held-out tenth.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig

CONFIG = Path(__file__).parents[1] / "configs/shakespeare_char.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="concurrent runs, one thread each")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/shakespeare_twins"))
    options = parser.parse_args()
    moe = load(CONFIG, [], ExperimentConfig).model.moe
    assert moe is not None, "the config has experts"
    twins = {"moe": [], "dense": ["model.moe=null", f"model.d_ff={int(moe.d_ff * moe.experts_per_token)}"]}
    jobs = [(name, overrides, seed) for seed in options.seeds for name, overrides in twins.items()]
    with ThreadPoolExecutor(options.jobs) as pool:
        losses = list(pool.map(lambda job: train(options, *job), jobs))
    results = {name: [loss for job, loss in zip(jobs, losses, strict=True) if job[0] == name] for name in twins}
    for name, values in results.items():
        print(
            f"{name:6} {' '.join(f'{v:.4f}' for v in values)}   mean {statistics.mean(values):.4f} nats per character"
        )
    gap = statistics.mean(results["dense"]) - statistics.mean(results["moe"])
    print(f"=> the mixture is {gap:.4f} below its dense twin")


def train(options: argparse.Namespace, name: str, overrides: list[str], seed: int) -> float:
    """Run one twin and return its last held-out loss."""
    run = f"{name}-seed{seed}"
    command = [sys.executable, "-m", "trainer", "train", str(CONFIG), f"name={run}", f"seed={seed}", *overrides]
    command += [f"runs_dir={options.runs_dir}", f"data.sources.0.path={options.text}", "eval.every=null"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    lines = (options.runs_dir / run / "metrics.jsonl").read_text().splitlines()
    loss = [record["eval/loss"] for record in map(json.loads, lines) if "eval/loss" in record][-1]
    print(f"  {run}: {loss:.4f}", flush=True)
    return loss


if __name__ == "__main__":
    main()
