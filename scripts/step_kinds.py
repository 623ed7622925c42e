"""Say where a bfloat16 step of mixtures spends more than its dense twin: self time by kind of operation.

    python -m scripts.step_kinds [CONFIG] [--rounds 6] [a.b=c ...]

The sums are medians over rounds of torch's profiler, the two models in turn in one process. `floor` is the ratio that
would be left if the mixture spent more only on what it must: the products of narrower groups, optimizer, clipping and
casts of more weights, and gathered rows. Keep the machine idle.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.step_entries import OurStep, dense_twin

KINDS = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm"),
    "optimizer and clipping": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach", "aten::mul_"),
    "casts and copies": ("aten::copy_",),
    "gathered rows": ("aten::index", "aten::gather", "aten::scatter", "aten::embedding"),
    "compiled between products": ("## Call CompiledFxGraph",),
}
REST = "everything else: router, order, statistics, calls"
NEEDED = ("products", "optimizer and clipping", "casts and copies", "gathered rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/bench.yaml"))
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    config = load(options.config, ["train.dtype=bfloat16", *options.overrides], ExperimentConfig)
    mesh, device = Mesh.of_one(), torch.device("cpu")
    steps = {"mixture": OurStep(config, mesh, device), "dense twin": OurStep(dense_twin(config), mesh, device)}
    for step in steps.values():
        for turn in range(3):  # compiles
            step.prepare(turn)
            step.run()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(options.rounds):
        for name, step in steps.items():
            rounds[name].append(_profiled(step, turn))
    mixture, twin = (
        {kind: statistics.median(each[kind] for each in rounds[name]) for kind in [*KINDS, REST]} for name in steps
    )
    total, least = sum(mixture.values()), sum(twin.values())
    print(f"{'ms, self time':<50} {'mixture':>8} {'twin':>8} {'more, of the twin':>18}")
    for kind in [*KINDS, REST]:
        more = (mixture[kind] - twin[kind]) / least
        print(f"{kind:<50} {mixture[kind]:8.1f} {twin[kind]:8.1f} {more:18.1%}")
    needed = sum(mixture[kind] - twin[kind] for kind in NEEDED)
    print(f"{'all':<50} {total:8.1f} {least:8.1f} {total / least - 1:18.1%}")
    print(f"floor {1 + needed / least:.3f}, measured {total / least:.3f}")


def _profiled(step: OurStep, turn: int) -> dict[str, float]:
    """Return the self time of a step by kind, in ms."""
    step.prepare(turn)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step.run()
    times = dict.fromkeys([*KINDS, REST], 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), REST)
        times[kind] += event.self_cpu_time_total / 1e3
    return times


if __name__ == "__main__":
    main()
