"""Collect the evidence of one layout: every tensor of the first step, and the result of some more steps."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.coverage import AVERAGE, WEIGHT
from trainer.checkpoint.find_checkpoint import find_newest
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.data.batches.batch import Batch
from trainer.data.batches.row_parts import own_part
from trainer.data.batches.stream import TrainStream
from trainer.data.config import DataConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.distributed.mesh import Mesh
from trainer.engine.step import StepEngine
from trainer.experiment import ExperimentConfig
from trainer.prove.gather import gather_state
from trainer.training.model import build_parallel_model, numerics, resolve_kernel


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Whole tensors, whatever the layout; only on rank 0."""

    losses: list[float] = field(default_factory=list)
    """Cross-entropy of every step."""
    balance_losses: list[float] = field(default_factory=list)
    z_losses: list[float] = field(default_factory=list)
    extra_losses: list[float] = field(default_factory=list)
    """Sum of all other auxiliary losses."""
    objectives: list[float] = field(default_factory=list)
    """Cross-entropy plus every auxiliary loss times its coefficient."""
    grad_norms: list[float] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    """(L, E) assignments of every step, before drops."""
    dropped: list[Tensor] = field(default_factory=list)
    """(L,) assignments over capacity in every step."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """Weights and buffers before the first step."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the first step before clipping."""
    first_update: dict[str, Tensor] = field(default_factory=dict)
    """Weights and buffers after the first step."""
    last_update: dict[str, Tensor] = field(default_factory=dict)
    """Weights and buffers after the last step."""
    learning_rates: list[float] = field(default_factory=list)
    """Of every step, without the factors of weights."""
    rate_factors: dict[str, float] = field(default_factory=dict)
    """Factor of the learning rate of each weight that learns."""
    adam_eps: float = 0.0
    disagreements: list[str] = field(default_factory=list)
    """Weights and buffers whose replicas differ after the first or the last step."""

    def scalars(self, group: str) -> list[float]:
        """Return a group of scalars, one per step: `loss`, `balance`, `z`, `further` or gradient `norm`."""
        return {
            "loss": self.losses,
            "balance": self.balance_losses,
            "z": self.z_losses,
            "further": self.extra_losses,
            "norm": self.grad_norms,
        }[group]

    def flips(self, reference: "Evidence") -> list[int]:
        """Return the number of assignments to other experts in each step, as far as counts show."""
        pairs = zip(self.counts, reference.counts, strict=True)
        return [int((ours - theirs).abs().sum()) // 2 for ours, theirs in pairs]


def collect(
    config: ExperimentConfig,
    mesh: Mesh,
    *,
    steps: int,
    replays: bool = False,
    moves_to: Literal["contiguous", "round_robin"] | None = None,
) -> Evidence:
    """Train some steps under a layout and collect the evidence. Collective.

    With `replays`, it is that of a second training, which replays the experts that the first one has chosen. With
    `moves_to`, it goes on from a checkpoint with this placement after the first step.
    """
    device = torch.device("cpu")
    config = resolve_kernel(config, device)
    corpus = _corpus_of(config.data.model_dump_json(), config.model.seq_len)
    stream = TrainStream(corpus, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)

    def build(config: ExperimentConfig) -> StepEngine:
        model = build_parallel_model(config, corpus.tokenizer, mesh, device, warn=lambda _: None)  # training shows it
        engine = config.engine.build(model, config.optim, numerics(config), mesh)
        assert isinstance(engine, StepEngine)
        return engine

    steps_rows = [_micro_batches(config, stream, mesh, step) for step in range(steps)]
    if replays:
        with closing(build(config)) as engine:
            steps_rows = _with_choices(config, engine, steps_rows)
    alone = steps if moves_to is None else 1
    evidence = Evidence(adam_eps=getattr(config.optim, "eps", 1e-8))
    with TemporaryDirectory() as mine:
        folder = CheckpointFolder(Path(mesh.world.broadcast_object(mine)))
        with closing(build(config)) as engine:
            _train(config, engine, steps_rows[:alone], mesh, evidence)
            if alone < steps:
                _save(engine, folder, mesh)
        if alone < steps:
            parallel = config.parallel.model_copy(update={"placement": moves_to})
            with closing(build(config.model_copy(update={"parallel": parallel}))) as engine:
                _load(engine, folder, mesh)
                _train(config, engine, steps_rows[alone:], mesh, evidence)
        mesh.world.all_gather_objects(None)  # rank 0 removes the folder once all have read it
    return evidence


@lru_cache(maxsize=1)
def _corpus_of(data: str, seq_len: int) -> Corpus:
    """Open the text of a `data` section, given as JSON; once in a process, for all layouts that it proves."""
    return build_corpus(DataConfig.model_validate_json(data), seq_len=seq_len)


def _save(engine: StepEngine, folder: CheckpointFolder, mesh: Mesh) -> None:
    """Write a checkpoint, as a run does."""
    saver = Saver(folder, mesh)
    saver.start(1, engine.state(), {})
    saved = saver.wait()
    saver.close()
    if saved is not None and saved.error is not None:
        raise saved.error


def _load(engine: StepEngine, folder: CheckpointFolder, mesh: Mesh) -> None:
    """Read the checkpoint, as a run does that resumes."""
    found = find_newest(folder, mesh.world, warn=print)
    assert found is not None, "it was saved"
    with StoredTensors(found.path, found.manifest) as tensors:
        engine.load_state(tensors.like(engine.wanted()))


def _micro_batches(config: ExperimentConfig, stream: TrainStream, mesh: Mesh, step: int) -> list[Batch]:
    """Return this rank's micro-batches of a step."""
    batches = stream.micro_batches(
        step * config.train.global_batch_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.parallel.micro_batch_size,
        rank=mesh.layout.data_rank,
        world_size=mesh.layout.data_size,
    )
    return [own_part(batch, mesh.layout) for batch in batches]


def _with_choices(
    config: ExperimentConfig, engine: StepEngine, steps_rows: Sequence[Sequence[Batch]]
) -> list[list[Batch]]:
    """Train and return the micro-batches of each step with the experts that were chosen for them."""
    schedule, found = config.schedule.build(total_steps=config.train.steps), list[list[Batch]]()
    for step, batches in enumerate(steps_rows):
        result = engine.train_step(batches, lr=schedule(step), return_experts=True)
        pairs = zip(batches, result.experts, strict=True)
        found.append([replace(batch, experts=experts) for batch, experts in pairs])
    return found


def _train(
    config: ExperimentConfig, engine: StepEngine, steps_rows: Sequence[Sequence[Batch]], mesh: Mesh, evidence: Evidence
) -> None:
    """Train on, and add to the evidence; its first step is the one of the gradients."""
    schedule = config.schedule.build(total_steps=config.train.steps)
    if not evidence.losses:
        evidence.start, evidence.rate_factors = _weights(engine, mesh), engine.rate_factors
    for step, batches in enumerate(steps_rows, start=len(evidence.losses)):
        gradient = engine.accumulate(batches)
        if step == 0:
            evidence.gradients = _whole(engine.gradients(), mesh)
        evidence.objectives.append(float(gradient.total.objective))
        evidence.learning_rates.append(schedule(step))
        result = engine.apply(gradient, lr=schedule(step))
        if step == 0:
            evidence.first_update = _weights(engine, mesh)
            evidence.disagreements = _disagreements(engine, mesh)
        evidence.losses.append(result.loss)
        evidence.grad_norms.append(result.grad_norm)
        if result.balance_loss is not None:
            evidence.balance_losses.append(result.balance_loss)
        if result.z_loss is not None:
            evidence.z_losses.append(result.z_loss)
        if result.extra_losses:
            evidence.extra_losses.append(sum(result.extra_losses.values()))
        if result.routing is not None:
            evidence.counts.append(result.routing.counts)
            evidence.dropped.append(result.routing.dropped)
    evidence.last_update = _weights(engine, mesh)
    evidence.disagreements = evidence.disagreements or _disagreements(engine, mesh)


def _weights(engine: StepEngine, mesh: Mesh) -> dict[str, Tensor]:
    return _whole(TrainState(slices=_learned(engine)), mesh)


def _learned(engine: StepEngine) -> dict[str, Slice]:
    """Return weights and buffers by their names in the model, and averages (`train.ema`) by those in a state."""
    slices = engine.state().slices.items()
    return {name.removeprefix(WEIGHT): part for name, part in slices if name.startswith((WEIGHT, AVERAGE))}


def _disagreements(engine: StepEngine, mesh: Mesh) -> list[str]:
    """Return the names of weights and buffers whose replicas are not bitwise equal."""
    slices = _learned(engine)
    local = {name: [str((part.start, part.tensor.shape)), _digest(part.tensor)] for name, part in slices.items()}
    gathered = mesh.world.all_gather_objects(local)
    differing = []
    for name in dict.fromkeys(name for parts in gathered for name in parts):
        replicas = [tuple(parts[name]) for parts in gathered if name in parts]
        if len(set(replicas)) > len({place for place, _ in replicas}):
            differing.append(name)
    return differing


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _whole(state: TrainState, mesh: Mesh) -> dict[str, Tensor]:
    """Return copies of the whole tensors on rank 0; nothing on other ranks."""
    slices = gather_state(state, mesh).slices
    return {name: part.tensor.detach().clone() for name, part in slices.items()} if mesh.layout.rank == 0 else {}
