"""What `init_from` gains under another tokenizer: loss after a few steps, against a fresh start, over seeds.

    python scripts/tokenizer_gain.py [--seeds 1 2 3] [--runs-dir runs/tokenizers] [--steps 50] [a.b=c ...]

A model of configs/quickstart.yaml's kind is trained on bytes. Three runs follow with a BPE of 1024 pieces, on rows in
another order: from fresh weights; from those of the first, the embedding, which is also the head, by piece; and from
those without it. Prints the held-out losses; docs/benchmarks.md has the result.
"""

import argparse
import statistics
from pathlib import Path

from scripts.upcycling_gain import CONFIG, SHAPE, last_loss, turnout

_FIRST = ["train.steps=400", "data.tokenizer={kind: byte}"]
_OTHER = ["data.tokenizer={kind: bpe, vocab_size: 1024}", "schedule.warmup_steps=10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of every run, such as schedule.peak_lr=2e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/tokenizers"))
    options = parser.parse_intermixed_args()  # overrides may follow options
    print(f"{'':8}{'fresh':>10}{'by piece':>10}{'without embedding':>20}")
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        losses = _compare(seed, options)
        for name, loss in losses.items():
            found.setdefault(name, []).append(loss)
        _show(f"seed {seed}", losses)
    _show("mean", {name: statistics.mean(values) for name, values in found.items()})


def _compare(seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train with one seed; return the held-out loss of each start."""
    shared = [*SHAPE, "model.moe.d_ff=176", f"runs_dir={options.runs_dir}", *options.overrides]
    first = options.runs_dir / f"first-{seed}"
    turnout("train", CONFIG, *shared, *_FIRST, f"seed={seed}", f"name={first.name}", makes=first)
    starts = {
        "fresh": "null",
        "by-piece": f"{{run: {first}}}",
        "without": f"{{run: {first}, exclude: [embedding]}}",
    }
    losses = {}
    for name, start in starts.items():
        run = options.runs_dir / f"{name}-{seed}"
        further = [f"train.steps={options.steps}", f"seed={seed + 100}", f"name={run.name}", f"init_from={start}"]
        turnout("train", CONFIG, *shared, *_OTHER, *further, makes=run)
        losses[name] = last_loss(run)
    return losses


def _show(title: str, losses: dict[str, float]) -> None:
    """Print a line of the table."""
    fresh, by_piece, without = losses.values()
    print(f"{title:8}{fresh:10.4f}{by_piece:10.4f}{without:20.4f}", flush=True)


if __name__ == "__main__":
    main()
