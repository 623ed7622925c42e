"""The dry run of a training: one fake step, and what it needs."""

from collections import Counter
from collections.abc import Iterator

import torch

from trainer.console import formatting
from trainer.distributed.rank_layout import Layout
from trainer.errors import ResourceError
from trainer.experiment import ExperimentConfig
from trainer.metrics.system_stats import total_memory
from trainer.plan.fake_step import fake_step, load_of
from trainer.plan.step_probe import ProbedStep, shape_of_batches
from trainer.plan.tensor_bytes import Window
from trainer.terminal import print_safe


def dry_run(config: ExperimentConfig, layout: Layout, *, imbalance: float = 1.0) -> int:
    """Take a fake step, print what it needs on this rank and return the exit code. Nothing is read or written.

    Raises:
        ResourceError: if this machine has less memory.
    """
    device = config.parallel.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    step = fake_step(config, layout, load_of(config, layout.ep_size, imbalance), device=device)
    if layout.rank == 0:
        for line in dry_run_lines(config, layout, step):
            print_safe(line)
    if device == "cpu" or torch.cuda.is_available():
        num_here = layout.ranks_per_node if device == "cpu" else 1
        needed, available = num_here * step.peak, total_memory(torch.device(device))
        if needed > available:
            raise ResourceError(
                f"{config.name}: {num_here} ranks here need {formatting.size(needed)} of memory for tensors, and "
                f"{formatting.size(available)} is available; turnout plan finds layouts that fit"
            )
    return 0


def dry_run_lines(config: ExperimentConfig, layout: Layout, step: ProbedStep) -> Iterator[str]:
    """Yield lines about one fake step of a rank."""
    num_batches, rows = shape_of_batches(config, layout.world_size)
    yield f"dry run of {config.name}: rank {layout.rank} of {layout.world_size}, engine {config.engine.kind}"
    yield f"  micro-batches     {num_batches} of {rows} x {config.model.seq_len // config.parallel.row_size} tokens"
    yield f"  weights           {formatting.size(step.weights)}"
    yield f"  as a step begins  {formatting.size(step.resident)}, moments and the rows of a step included"
    window = max(step.peaks, key=lambda window: step.peaks[window])
    yield f"  peak              {formatting.size(step.peak)} of tensors, in {window_name(window)}"
    yield f"  matrix products   {formatting.rate(float(step.operations.flops))}FLOP in a step"
    kinds: Counter[str] = Counter()
    for call, number in step.operations.collectives.items():
        kinds[call.name] += number
    calls = ", ".join(f"{number} {name}" for name, number in sorted(kinds.items()))
    sent = formatting.size(step.operations.bytes_sent)
    yield f"  sent in a step    {sent} in {step.operations.messages} messages{': ' if calls else ''}{calls}"
    yield "  Routing is assumed to be even. Nothing was read, written or compiled."


def window_name(window: Window) -> str:
    """Return a window in words."""
    phase, block = window
    return f"the {phase} phase" if block is None else f"the {phase} pass of block {block}"
