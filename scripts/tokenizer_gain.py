"""Gain of `init_from` under another tokenizer: loss after a few steps, against a fresh start, over seeds.

    python -m scripts.tokenizer_gain [--seeds 1 2 3] [--runs-dir runs/tokenizers] [--steps 50] [a.b=c ...]

A model of configs/quickstart.yaml's kind is trained on bytes. Three runs follow with a BPE of 1024 pieces, on rows in
another order: from fresh weights; from those of the first, the embedding, which is also the head, by piece; and from
those without it. Prints the held-out losses; docs/benchmarks.md has the result.
"""

import argparse

from scripts.losses_over_seeds import CONFIG, SHAPE, last_loss, parser_over_seeds, print_losses, turnout

_FIRST = ["train.steps=400", "data.tokenizer={kind: byte}"]
_OTHER = ["data.tokenizer={kind: bpe, vocab_size: 1024}", "schedule.warmup_steps=10"]


def main() -> None:
    options = parser_over_seeds(__doc__, steps=50, runs_dir="runs/tokenizers").parse_intermixed_args()
    columns = [("fresh", 10), ("by piece", 10), ("without embedding", 20)]
    print_losses(columns, ((seed, _compare(seed, options)) for seed in options.seeds))


def _compare(seed: int, options: argparse.Namespace) -> list[float]:
    """Train with one seed; return the held-out loss of each start."""
    shared = [*SHAPE, "model.moe.d_ff=176", f"runs_dir={options.runs_dir}", *options.overrides]
    first = options.runs_dir / f"first-{seed}"
    turnout("train", CONFIG, *shared, *_FIRST, f"seed={seed}", f"name={first.name}", makes=first)
    starts = {
        "fresh": "null",
        "by-piece": f"{{run: {first}}}",
        "without": f"{{run: {first}, exclude: [embedding]}}",
    }
    losses = []
    for name, start in starts.items():
        run = options.runs_dir / f"{name}-{seed}"
        further = [f"train.steps={options.steps}", f"seed={seed + 100}", f"name={run.name}", f"init_from={start}"]
        turnout("train", CONFIG, *shared, *_OTHER, *further, makes=run)
        losses.append(last_loss(run))
    return losses


if __name__ == "__main__":
    main()
