"""Gain of upcycling: a dense run continued, and its upcycled twin, for the same steps of the same rows, over seeds.

    python -m scripts.upcycling_gain [--seeds 1 2 3] [--runs-dir runs/upcycling] [--steps 200] [a.b=c ...]

A dense model of configs/quickstart.yaml's kind is trained; then both go on from its weights with moments of zero, the
same rows in the same order and the same schedule. Prints the held-out losses and the largest difference of logits
before. Finished runs are kept; docs/benchmarks.md has the result.
"""

import argparse
import json

from scripts.losses_over_seeds import CONFIG, SHAPE, last_loss, parser_over_seeds, print_losses, turnout

DENSE = ["model.moe=null", "train.steps=400"]
VARIANTS = {
    "copies": ([], []),
    "slices of a half": (["model.moe.num_experts=16", "model.moe.d_ff=88", "model.moe.router.top_k=4"], []),
    "half of the units anew": ([], ["--drop-fraction", "0.5", "--allow-change"]),
}


def main() -> None:
    parser = parser_over_seeds(__doc__, steps=200, runs_dir="runs/upcycling")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["copies"])
    options = parser.parse_intermixed_args()
    columns = [("dense", 10), ("continued", 11), *((name, 25) for name in options.variants)]
    print_losses(columns, ((seed, compare(seed, options)) for seed in options.seeds))


def compare(seed: int, options: argparse.Namespace) -> list[float]:
    """Train and continue with one seed; return the held-out loss of each model, and of the dense one before."""
    shared = [*SHAPE, f"runs_dir={options.runs_dir}", *options.overrides]
    dense = options.runs_dir / f"dense-{seed}"
    turnout("train", CONFIG, *shared, *DENSE, f"seed={seed}", f"name={dense.name}", makes=dense)
    further = [f"train.steps={options.steps}", f"seed={seed + 100}"]  # other rows than before
    goes_on = options.runs_dir / f"continued-{seed}"
    turnout("surgery", "average", dense, goes_on.name, "--runs", dense, *further, makes=goes_on, trains=False)
    turnout("train", goes_on, makes=goes_on)
    losses = [last_loss(dense), last_loss(goes_on)]
    for name in options.variants:
        keys, how = VARIANTS[name]
        run = options.runs_dir / f"{name.replace(' ', '-')}-{seed}"
        config = [*shared, "model.moe.d_ff=176", *keys, *further, f"name={run.name}"]
        turnout("upcycle", dense, CONFIG, *config, *how, makes=run, trains=False)
        turnout("train", run, makes=run)
        losses.append(last_loss(run))
        before = json.loads((run / "made_from.json").read_text())
        print(f"{name}, seed {seed}: {before['notes'][0]}, loss {before['loss_after']:.4f} at step 0", flush=True)
    return losses


if __name__ == "__main__":
    main()
