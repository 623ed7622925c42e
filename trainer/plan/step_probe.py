"""Build a run's model and engine and take steps, real or fake, while bytes, collectives and operations are counted.

# B rows of a micro-batch, S tokens in a row.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.data.batches.batch import Batch
from trainer.data.batches.row_parts import own_part
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh
from trainer.engine.step import StepEngine
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.step_operations import StepOperations
from trainer.parallel.parallelize import parallelize
from trainer.plan.tensor_bytes import TensorBytes, Window
from trainer.training.model import meta_model, numerics

_LR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """How a step is taken."""

    num_ids: int
    """Ids of the tokenizer."""
    num_micro_batches: int | None = None
    """Micro-batches of the step; None: as many as the config's."""
    first_micro_batches: int | None = None
    """Micro-batches of the step before it; None: one, or as many if they pass through a pipeline, which has buffers."""
    seed: int | None = None
    """Seed of the weights and tokens; None: they have no values."""
    limit: int | None = None
    """Bytes of tensors that may be alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedStep:
    """One rank's step once the optimizer has its state."""

    weights: int
    """Bytes of the weights and buffers of this rank."""
    resident: int
    """Bytes that are alive when a step begins: weights, moments, what the engine keeps, and the rows of the step."""
    batch: int
    """Bytes of the rows of a micro-batch."""
    peaks: dict[Window, int]
    """Most bytes alive in each window of the step."""
    forward_starts: Sequence[int]
    """Bytes that are alive as each forward pass of a micro-batch through a stage starts."""
    operations: StepOperations
    """Operations and collectives."""
    first: StepOperations
    """The same of the step before it."""

    @property
    def peak(self) -> int:
        """Most bytes alive."""
        return max(self.peaks.values())


class WindowRecorder(FlightRecorder):
    """Flight recorder that passes the phases of a step on to a count."""

    counts: TensorBytes | None = None

    forward_starts: list[int]
    """Bytes that were alive as each forward pass of a micro-batch began, while there is a count."""

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        super().enter(phase)
        if self.counts is not None:
            self.counts.enter(phase)
            if phase == "forward":
                self.forward_starts.append(self.counts.live)


def probe_step(config: ExperimentConfig, mesh: Mesh, device: torch.device, options: ProbeOptions) -> ProbedStep:
    """Take a step of a config whose kernel is resolved, on one rank of a mesh with a `WindowRecorder`.

    Nothing is compiled. Before it, another step is taken, with fewer micro-batches.

    Raises:
        OverLimit: if more bytes are alive at once than the limit.
    """
    operations, first = StepOperations(), StepOperations()
    if mesh.pp.size > 1:
        import trainer.engine.pipeline  # noqa: F401  makes a tensor, which is none of the step's
    with ExitStack() as stack:
        counts = stack.enter_context(TensorBytes(options.limit))
        model = parallelize(
            meta_model(config, options.num_ids),
            config.parallel,
            mesh,
            device,
            seed=options.seed,
            dtype=numerics(config).dtype,
            can_compile=False,
        )
        weights = counts.live
        engine = config.engine.build(model, config.optim, numerics(config), mesh)
        stack.callback(engine.close)
        engine.held()  # makes the optimizer's state, so that the first step is as every other
        before = counts.live
        batches = random_batches(config, mesh, options)
        batch = (counts.live - before) // len(batches)
        num_first = options.first_micro_batches or (1 if mesh.pp.size == 1 else len(batches))
        with first:
            engine.train_step(batches[:num_first], lr=_LR)
        if mesh.pp.size > 1 and num_first != len(batches):
            assert isinstance(engine, StepEngine)
            engine.passes = engine._passes(model)  # its buffers are for another number of them
        gc.collect()  # cycles of the first step would be freed at some moment of the second
        resident = counts.live
        counts.peaks.clear()
        with _following(counts, mesh, model.blocks) as forward_starts, operations:
            engine.train_step(batches, lr=_LR)
    return ProbedStep(
        weights=weights,
        resident=resident,
        batch=batch,
        peaks=dict(counts.peaks),
        forward_starts=forward_starts,
        operations=operations,
        first=first,
    )


def shape_of_batches(config: ExperimentConfig, world_size: int) -> tuple[int, int]:
    """Return the number of micro-batches of a rank and the rows of each, as the stream splits a step."""
    own = config.parallel
    rows = -(-config.train.global_batch_size // (world_size // (own.row_size * own.pp_size)))
    num_batches = -(-rows // own.micro_batch_size)
    return num_batches, -(-rows // num_batches)


def random_batches(config: ExperimentConfig, mesh: Mesh, options: ProbeOptions) -> list[Batch]:
    """Return micro-batches of random tokens; the same on all ranks."""
    num_batches, B = shape_of_batches(config, mesh.layout.world_size)
    generator = torch.Generator().manual_seed(options.seed or 0)
    texts = (
        torch.randint(0, options.num_ids, (B, config.model.seq_len + 1), generator=generator)
        for _ in range(options.num_micro_batches or num_batches)
    )
    rows = (Batch.of_whole_rows(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts)
    # Each field with memory of its own, as those that are read.
    batches = (Batch(**{name: tensor.clone() for name, tensor in batch.tensors().items()}) for batch in rows)
    return [own_part(batch, mesh.layout) for batch in batches]


@contextmanager
def _following(counts: TensorBytes, mesh: Mesh, blocks: Sequence[nn.Module] | nn.ModuleList) -> Iterator[list[int]]:
    """Give the phases and blocks of a step windows of their own; yield the bytes as each forward pass begins."""
    recorder, handles = mesh.world.recorder, []
    assert isinstance(recorder, WindowRecorder), "the mesh was made for it"
    for number, block in enumerate(blocks):
        handles += _watch_block(counts, number, block)
    recorder.counts, recorder.forward_starts = counts, []
    try:
        yield recorder.forward_starts
    finally:
        recorder.counts = None
        for handle in handles:
            handle.remove()


def _watch_block(counts: TensorBytes, number: int, block: nn.Module) -> list[Any]:
    """Begin a window when a block's forward pass begins, and when the gradient of its output is there."""

    def before(_: nn.Module, inputs: Any) -> None:
        counts.enter("forward", number)

    def after(_: nn.Module, inputs: Any, output: Any) -> None:
        counts.enter("forward", None)
        hidden = output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: counts.enter("backward", number))

    return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
