"""Measure long rows that ranks share: memory of a rank and time per token, for each way and number of ranks.

    python -m scripts.shared_rows --seq-len 32768 --ranks 1 2 4 --repeats 3

Each layout takes real steps on gloo ranks of this machine: one row, a model of two MoE blocks. `peak` is that of the
tensors of a step, `kept` what is alive before it: weights, moments and the row. `seconds` are processor seconds of all
ranks together per thousand tokens, the least of the repeats, in which layouts take turns.
"""

import argparse
import time
from contextlib import closing
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.experiment import ExperimentConfig
from trainer.parallel.parallelize import parallelize
from trainer.plan.step_probe import ProbeOptions, WindowRecorder, probe_step, random_batches
from trainer.prove.pool import Failure, LocalRanks
from trainer.training.model import meta_model, numerics

_CPU = torch.device("cpu")
_NUM_IDS, _TIMEOUT_S = 256, 3600.0


class Shared(NamedTuple):
    """How many ranks share rows, and how."""

    cp_size: int
    cp: Literal["ulysses", "ring"]

    @property
    def name(self) -> str:
        """Name in the table."""
        return "one rank" if self.cp_size == 1 else f"{self.cp} of {self.cp_size}"


def config_of(layout: Shared, seq_len: int) -> ExperimentConfig:
    """Return the config of a layout: one row of a step."""
    moe = {"num_experts": 4, "d_ff": 64, "balance": {"scope": "sequence"}}
    model = {"num_layers": 2, "d_model": 64, "num_heads": 4, "d_ff": 128, "seq_len": seq_len, "moe": moe}
    parallel = {
        "cp_size": layout.cp_size,
        "cp": layout.cp,
        "micro_batch_size": 1,
        "device": "cpu",
        "experts_kernel": "loop",
    }
    train = {"global_batch_size": 1, "steps": 1000}
    values = {"name": "rows", "model": model, "parallel": parallel, "train": train}
    return ExperimentConfig.model_validate(values)


def measure_memory(layout: Shared, seq_len: int) -> tuple[int, int]:
    """Return the peak of this rank's tensors in a step, and what is alive before it."""
    config, options = config_of(layout, seq_len), ProbeOptions(num_ids=_NUM_IDS, seed=1)
    mesh = _mesh(layout)
    step = probe_step(config, mesh, _CPU, options)
    return step.peak, step.resident


def measure_time(layout: Shared, seq_len: int) -> float:
    """Return this rank's processor seconds of a step, after a first one."""
    config, mesh = config_of(layout, seq_len), _mesh(layout)
    whole, precision = meta_model(config, _NUM_IDS), numerics(config)
    options: dict[str, Any] = {"seed": 1, "dtype": precision.dtype, "can_compile": False}
    model = parallelize(whole, config.parallel, mesh, _CPU, **options)
    batches = random_batches(config, mesh, ProbeOptions(num_ids=_NUM_IDS, seed=1))
    with closing(config.engine.build(model, config.optim, precision, mesh)) as engine:
        engine.train_step(batches, lr=1e-4)
        start = time.process_time()
        engine.train_step(batches, lr=1e-4)
        return time.process_time() - start


def _mesh(layout: Shared) -> Mesh:
    size = layout.cp_size
    here = Layout(world_size=size, rank=dist.get_rank(), cp_size=size, ranks_per_node=size)
    return build_mesh(here, WindowRecorder())


def main() -> int:
    """Print a line for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    kinds: tuple[Literal["ulysses", "ring"], ...] = ("ulysses", "ring")
    layouts = [Shared(n, kind) for n in options.ranks for kind in kinds if n > 1 or kind == "ulysses"]
    seconds = {layout: float("inf") for layout in layouts}
    with closing(LocalRanks()) as ranks:

        def on_ranks(function: Any, layout: Shared) -> list[Any]:
            answers = ranks.run(layout.cp_size, function, layout, options.seq_len, timeout_s=_TIMEOUT_S)
            for answer in answers:
                if isinstance(answer, Failure):
                    raise RuntimeError(f"{layout.name}: {answer.error or answer.text}")
            return answers

        memory = {layout: max(on_ranks(measure_memory, layout)) for layout in layouts}
        for _ in range(options.repeats):
            for layout in layouts:
                seconds[layout] = min(seconds[layout], sum(on_ranks(measure_time, layout)))
    first = layouts[0]
    print(f"rows of {options.seq_len} tokens      peak MB   of one     kept MB   s per 1000 tokens   of one")
    for layout in layouts:
        (peak, kept), took = memory[layout], seconds[layout] * 1000 / options.seq_len
        share, slower = peak / memory[first][0], seconds[layout] / seconds[first]
        print(f"{layout.name:<26} {peak / 1e6:>8.1f} {share:>8.3f} {kept / 1e6:>11.1f} {took:>18.3f} {slower:>8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
