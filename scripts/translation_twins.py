"""Multi30k: the mixture of experts of configs/recipes/translation.yaml against its dense twin, over seeds.

    python scripts/prepare_multi30k.py FOLDER
    python scripts/translation_twins.py [--seeds 1 2] [--runs-dir runs/translation_twins] [a.b=c ...]

Runs alternate; finished ones are skipped and interrupted ones resume. Prints, per run, held-out loss, BLEU and chrF on
test_2016_flickr by language, and the mutual information of experts and language pair; then the means.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

CONFIGS = {
    name: Path(__file__).parents[1] / f"configs/recipes/{config}.yaml"
    for name, config in {"moe": "translation", "dense": "translation_dense"}.items()
}
COLUMNS = {
    "loss": "eval/loss",
    "bits/byte": "eval/bits_per_byte",
    **{f"{metric} {language}": f"eval/flickr-{language}/{metric}" for language in ("de", "fr", "cs")
       for metric in ("bleu", "chrf")},
    "MI bits": "eval/expert_domain_mi",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of both configs, such as train.steps=20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/translation_twins"))
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGS}
    print(f"{'':12}", *(f"{title:>9}" for title in COLUMNS), sep="  ")
    for seed in options.seeds:
        for name, config in CONFIGS.items():
            results[name].append(last_evaluation(config, f"{name}-seed{seed}", seed, options))
            show(f"{name}-seed{seed}", results[name][-1])
    for name, found in results.items():
        columns = [key for key in COLUMNS.values() if key in found[0]]
        show(f"{name} mean", {key: statistics.mean(result[key] for result in found) for key in columns})
    gap = statistics.mean(
        d["eval/loss"] - m["eval/loss"] for d, m in zip(results["dense"], results["moe"], strict=True)
    )
    print(f"=> the mixture's held-out loss is {gap:.4f} nats per token below its dense twin's")


def last_evaluation(config: Path, run: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train, unless the run has finished, and return its last evaluation."""
    command = [sys.executable, "-m", "trainer", "train", str(config), f"name={run}", f"seed={seed}"]
    command += [f"runs_dir={options.runs_dir}", *options.overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (options.runs_dir / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "eval/flickr-cs/bleu" in record][-1]


def show(title: str, result: dict[str, float]) -> None:
    cells = (f"{result[key]:9.4f}" if key in result else f"{'-':>9}" for key in COLUMNS.values())
    print(f"{title:12}", *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main()
