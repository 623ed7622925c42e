"""Take one real step of a config, on one rank or on those of a launcher, and measure it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.batches.assemble import row_slice
from trainer.data.batches.batch import Batch
from trainer.data.batches.row_parts import own_part
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import Corpus, build_corpus
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.mesh import Mesh
from trainer.doctor.step.probe_layers import LayerProbe
from trainer.doctor.step.step_evidence import LayerEvidence, StepEvidence, TextEvidence
from trainer.engine.step import Accumulated, StepEngine
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.freeze import is_frozen
from trainer.models.parameter_roles import is_adapter, is_decayed, parameter_role
from trainer.moe.routing import RoutingOptions
from trainer.optim.schedule import resolve_warmup
from trainer.parallel.pipeline_stages import check_micro_batches
from trainer.prove.gather import gather_state
from trainer.training.memory import check_memory
from trainer.training.model import build_parallel_model, check_kernel, numerics, resolve_kernel, single_process

_MOST_PROBED = 4
"""Rows that layers are asked about."""
_TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1}


def measure_step(
    config: ExperimentConfig, mesh: Mesh, device: torch.device, *, warn: Callable[[str], None]
) -> StepEvidence:
    """Take the first step of a config, of at most one micro-batch per rank, or some for stages, and measure it.

    Collective. Each of several ranks asks its layers about its own rows, if it has whole rows and all layers; what a
    step changes in weights is looked at on one rank.

    Raises:
        TurnoutError: if the text, the model or the memory does not allow it.
    """
    is_alone = mesh.world.size == 1
    config = single_process(config) if is_alone else config
    parallel = config.parallel.model_copy(update={"compile": False})
    config = resolve_kernel(config.model_copy(update={"parallel": parallel}), device)
    check_memory(config, mesh.layout, device)
    faults = list[str]()
    try:
        config, _ = check_kernel(config, mesh, device, warn=faults.append)
    except ConfigError as error:
        faults += str(error).splitlines()
        config = config.model_copy(update={"parallel": parallel.model_copy(update={"experts_kernel": "loop"})})
    with raise_together(mesh.world):
        corpus = build_corpus(config.data, seq_len=config.model.seq_len)
    stream = TrainStream(corpus, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)
    rows = min(config.train.global_batch_size, mesh.layout.data_size * config.parallel.micro_batch_size * _number(mesh))
    whole_rows = stream.micro_batches(
        0,
        global_batch_size=rows,
        micro_batch_size=config.parallel.micro_batch_size,
        rank=mesh.layout.data_rank,
        world_size=mesh.layout.data_size,
    )
    check_micro_batches(mesh.layout, len(whole_rows), at_once=config.parallel.at_once)
    batches = [own_part(batch, mesh.layout) for batch in whole_rows]
    model = build_parallel_model(config, corpus.tokenizer, mesh, device, warn=warn)
    evidence = StepEvidence(
        text=_text(config, corpus, stream, batches, mesh),
        tolerance=_TOLERANCES[config.train.dtype],
        kernel_faults=faults,
    )
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    assert isinstance(engine, StepEngine)
    with closing(engine):
        if config.parallel.row_size == config.parallel.pp_size == 1:  # or a rank has parts of rows, or of the model
            is_whole = config.parallel.data == "replicate"
            batch = row_slice(batches[0], 0, _MOST_PROBED).to(device)
            probe = LayerProbe(
                model=model, batch=batch, autocast=engine.autocast, seed=config.seed, has_gradients=is_whole
            )
            evidence.layers = probe.layers()
            evidence.later_tokens_change = probe.later_tokens_change()
            evidence.other_rows_change = probe.other_rows_change()
        _take_step(config, engine, batches, evidence)
    return evidence


def _number(mesh: Mesh) -> int:
    """Return the micro-batches of a rank's step: as many as every schedule takes, of pairs too."""
    return 4 * mesh.layout.pp_size if mesh.layout.pp_size > 1 else 1


def _text(
    config: ExperimentConfig, corpus: Corpus, stream: TrainStream, batches: Sequence[Batch], mesh: Mesh
) -> TextEvidence:
    """Return what the rows of all ranks are. Collective."""
    epochs = stream.epochs(config.train.steps * config.train.global_batch_size)
    domain = max(epochs, key=lambda name: epochs[name])
    of_each = []
    for batch in batches:
        positions = int(batch.valid.any(1).sum()) * batch.valid.shape[1]  # rows that fill up a batch are no text
        of_each.append((positions, positions - batch.num_valid, int((batch.target_mask > 0).sum())))
    own = torch.tensor(of_each).sum(0) * (mesh.pp.index == 0)  # the stages of a pipeline have the same rows
    num_tokens, padding, targets = mesh.host.all_reduce_(own).tolist()
    return TextEvidence(
        num_tokens=num_tokens,
        padding=padding,
        targets=targets,
        seq_len=config.model.seq_len,
        packing=config.data.packing,
        epochs=epochs[domain],
        domain=domain,
        vocab_rows=config.model.vocab_size or corpus.tokenizer.vocab_size,
        num_ids=corpus.tokenizer.vocab_size,
    )


def _take_step(config: ExperimentConfig, engine: StepEngine, batches: Sequence[Batch], evidence: StepEvidence) -> None:
    """Compute the step twice and apply it once."""
    first = _numbers(engine.accumulate(batches))
    engine._drop_gradients()
    step = engine.accumulate(batches)
    evidence.loss, norm = _numbers(step)
    evidence.repeated = first == (evidence.loss, norm)
    evidence.grad_norms = engine.mesh.world.all_gather_objects(norm)
    gradients = {name: part.tensor for name, part in gather_state(engine.gradients(), engine.mesh).slices.items()}
    whole = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    evidence.whole_norm = engine.mesh.world.broadcast_object(whole if engine.mesh.layout.rank == 0 else None)
    lr = config.schedule.build(total_steps=config.train.steps)
    rate = lr(resolve_warmup(config.schedule.warmup_steps, config.train.steps))
    is_alone, biases = engine.mesh.world.size == 1, _biases(engine)
    before = _Before.of(engine, gradients) if is_alone else None
    if step.routing is not None and evidence.layers:
        targets = _target_counts(config, engine, batches)
        for layer, counts, learned in zip(evidence.layers, step.routing.counts.tolist(), targets, strict=True):
            layer.counts = counts
            if engine.mesh.layout.rank == 0:  # which has all gradients
                _experts_gradients(layer, learned, gradients.get(f"blocks.{layer.layer}.ffn.experts.w_out"))
    result = engine.apply(step, lr=rate)
    evidence.not_finite = result.not_finite
    if not result.skipped:
        _bias_moves(evidence, biases, _biases(engine))
        if before is not None:
            before.compare(engine, evidence)
    evidence.decayed_vectors = _decayed_vectors(engine)


def _numbers(step: Accumulated) -> tuple[float, float]:
    return float(step.total.loss), float(step.grad_norm)


@torch.no_grad()
def _target_counts(config: ExperimentConfig, engine: StepEngine, batches: Sequence[Batch]) -> list[list[int]]:
    """Return (L, E) the assignments of all ranks' tokens with targets in the loss; zeros where the step may differ.

    In the last layer, tokens that count in no loss give an expert no gradient. A drawn k, or drops, are not repeated.
    """
    moe = config.model.moe
    layers = len(engine.model.moe_layers())
    if moe is None or moe.can_drop or getattr(moe.router, "top_k_choices", None) is not None:
        return [[0] * (0 if moe is None else moe.num_experts)] * layers
    options = RoutingOptions(noise_seed=config.seed, counts_targets_only=True)
    with engine.autocast():
        outputs = [engine.model(batch.to(engine.device), options) for batch in batches]
    counts = [torch.stack([stats.counts.sum(0) for stats in output.moe]) for output in outputs]  # (L, E) each
    return engine.mesh.world.all_reduce_(torch.stack(counts).sum(0)).tolist()


def _experts_gradients(layer: LayerEvidence, targets: Sequence[int], gradient: Tensor | None) -> None:
    """Compare assignments of experts with the gradient of their second product (E, D, F); None: it is frozen."""
    if gradient is None or len(gradient) != len(layer.counts):
        return
    has_gradient = (gradient.flatten(1).abs().amax(1) > 0).tolist()
    layer.silent_experts = [
        e for e, (count, has) in enumerate(zip(targets, has_gradient, strict=True)) if count and not has
    ]
    layer.unfed_gradients = [
        e for e, (count, has) in enumerate(zip(layer.counts, has_gradient, strict=True)) if has and not count
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """Weights before a step: all frozen ones, and of each that learns the element with the largest gradient."""

    elements: Mapping[str, tuple[int, float, float]]
    """Index, gradient, value."""
    frozen: Mapping[str, Tensor]

    @classmethod
    def of(cls, engine: StepEngine, gradients: Mapping[str, Tensor]) -> "_Before":
        elements = {}
        for name, parameter in engine.learning.items():
            gradient = gradients[name].flatten()
            index = int(gradient.abs().argmax())
            elements[name] = index, float(gradient[index]), float(parameter.detach().flatten()[index])
        frozen = {name: p.detach().clone() for name, p in engine.parameters.items() if name not in engine.learning}
        return cls(elements=elements, frozen=frozen)

    def compare(self, engine: StepEngine, evidence: StepEvidence) -> None:
        """Note what the step has changed, and what not."""
        now = {name: float(engine.learning[name].detach().flatten()[at]) for name, (at, _, _) in self.elements.items()}
        items = self.elements.items()
        evidence.unchanged = [name for name, (_, gradient, value) in items if gradient and now[name] == value]
        evidence.without_gradient = [
            name
            for name, (_, gradient, _) in items
            if not gradient and parameter_role(name) not in ("router", "expert") and not is_adapter(name)
        ]
        frozen = self.frozen.items()
        evidence.changed_frozen = [name for name, was in frozen if not torch.equal(was, engine.parameters[name])]


def _bias_moves(evidence: StepEvidence, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> None:
    """Note how the step has moved selection biases (E,)."""
    for layer, was, now in zip(evidence.layers, before, after, strict=bool(evidence.layers)):
        if was is not None and now is not None and len(now) == len(layer.counts):
            layer.bias_moves = (now - was).tolist()


def _biases(engine: StepEngine) -> list[Tensor | None]:
    routers = [layer.router for layer in engine.model.moe_layers()]
    found = [None if is_frozen(router) else getattr(router, "bias", None) for router in routers]
    return [bias.detach().clone() if isinstance(bias, Tensor) and not bias.requires_grad else None for bias in found]


def _decayed_vectors(engine: StepEngine) -> list[str]:
    """Return weights that the native optimizer decays and that are no matrices."""
    names = {id(p): name for name, p in engine.learning.items()}
    groups = getattr(getattr(engine, "optimizer", None), "param_groups", [])
    decayed = [p for group in groups if group.get("weight_decay") for p in group["params"] if id(p) in names]
    return [names[id(p)] for p in decayed if not is_decayed(names[id(p)], p)]
