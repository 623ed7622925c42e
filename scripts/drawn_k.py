"""One model trained with k drawn from 1 to 4, evaluated at each k, beside four models that were trained with that k.

    python -m scripts.drawn_k [--seeds 1 2] [--runs-dir runs/drawn_k] [--steps 200] [a.b=c ...]

All have the shape of configs/quickstart.yaml's kind in scripts/losses_over_seeds.py and see the same rows. Prints the
held-out loss in nats per byte: the fixed models at their own k, then the drawn one at each k. Finished runs are kept;
docs/routing.md has the result.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from scripts.losses_over_seeds import CONFIG, SHAPE, last_loss, parser_over_seeds, print_losses, turnout

KS = (1, 2, 3, 4)


def main() -> None:
    options = parser_over_seeds(__doc__, steps=200, runs_dir="runs/drawn_k").parse_intermixed_args()
    columns = [*((f"fixed {k}", 9) for k in KS), *((f"drawn at {k}", 12) for k in KS)]
    print_losses(columns, ((seed, compare(seed, options)) for seed in options.seeds))


def compare(seed: int, options: argparse.Namespace) -> list[float]:
    """Train the five models of a seed; return the fixed ones' losses, and the drawn one's at each k."""
    losses = []
    for k in KS:
        # One normalised weight is always 1, so that its router would learn nothing from the text.
        keys = [f"model.moe.router.top_k={k}", f"model.moe.router.normalize={str(k > 1).lower()}"]
        losses.append(last_loss(_train(f"fixed{k}", keys, seed, options)))
    drawn = _train("drawn", [f"model.moe.router.top_k_choices={list(KS)}"], seed, options)
    return [*losses, *_losses_at_each_k(drawn)]


def _train(name: str, keys: list[str], seed: int, options: argparse.Namespace) -> Path:
    run = options.runs_dir / f"{name}-{seed}"
    shared = [*SHAPE, f"train.steps={options.steps}", f"runs_dir={options.runs_dir}", *options.overrides]
    turnout("train", CONFIG, *shared, *keys, f"seed={seed}", f"name={run.name}", makes=run)
    return run


def _losses_at_each_k(run: Path) -> list[float]:
    """Return the held-out loss of a run at each k."""
    command = [
        sys.executable,
        "-m",
        "trainer",
        "eval",
        str(run),
        "--experts-per-token",
        ",".join(map(str, KS)),
        "--json",
    ]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [result["experts_per_token"][str(k)]["eval/loss"] for k in KS]


if __name__ == "__main__":
    main()
