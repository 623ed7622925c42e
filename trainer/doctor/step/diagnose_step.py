"""Take a real step of a config on the ranks that were started, and say what is wrong with it."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final, Literal

import torch

from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh, joined
from trainer.distributed.rank_layout import Layout
from trainer.doctor.diagnosis import Diagnosis
from trainer.doctor.finding import DoctorFinding
from trainer.doctor.step.measure_step import measure_step
from trainer.doctor.step.step_checks import STEP_CHECKS
from trainer.doctor.step.text_checks import TEXT_CHECKS
from trainer.errors import ConfigError, DataError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.models.flops import model_size
from trainer.models.gpt import GPT
from trainer.prove.small_config import shrink
from trainer.training.memory import check_memory
from trainer.training.model import single_process

Scale = Literal["auto", "full", "small"]
"""Model of the step: `auto` is full where that is a matter of a minute or so, and fits."""
_MOST_FLOPS: Final = 2e12
"""Most operations of a full step on a CPU: minutes on one core, since it is computed twice and layers are asked."""
_BYTE_VOCABULARY: Final = 256


def diagnose_step(config: ExperimentConfig, layout: Layout, *, scale: Scale) -> Diagnosis:
    """Return what is found in the first step of a config, or of a small copy of it; the same on all ranks. Collective.

    On one rank, a step that cannot be taken here is a note: the machine that trains may be another.
    """
    notes, reason = list[str](), None
    if config.init_from is not None:
        notes.append("the step was taken from the initial values of the seed, not from init_from")
    try:
        device = runtime.start(config.parallel.device)
        reason = _is_too_large(config, layout, device) if scale == "auto" else None
        config = shrink(config) if scale == "small" or reason else config
        if layout.world_size > 1:  # a small copy has fewer degrees
            layout = replace(layout, **asdict(config.parallel.degrees))
        with joined(layout, device, timeout_s=config.parallel.timeout_s) as mesh:
            evidence = measure_step(config, mesh, device, warn=notes.append)
            found = Diagnosis.of((*STEP_CHECKS, *TEXT_CHECKS), evidence)
            found = replace(found, findings=of_all_ranks(found.findings, mesh))
    except (ConfigError, DataError, ResourceError) as error:
        if layout.world_size > 1:
            raise
        remedy = "; --scale small takes one of a small copy" if isinstance(error, ResourceError) else ""
        return Diagnosis(notes=[f"no step was taken: {error}{remedy}"])
    if reason:
        notes.append(f"the step was one of a small copy, --scale full takes it of the model itself: {reason}")
    if layout.world_size > 1:
        notes.append(_unseen(config))
    return replace(found, notes=notes)


def _is_too_large(config: ExperimentConfig, layout: Layout, device: torch.device) -> str | None:
    """Return why a step of the model itself is not for this device; None if it is."""
    if layout.world_size == 1:
        try:
            check_memory(single_process(config), layout, device)
        except ResourceError as error:
            return str(error)
    if device.type != "cpu":
        return None
    with torch.device("meta"):
        model = GPT(config.model, getattr(config.data.tokenizer, "vocab_size", _BYTE_VOCABULARY))
    rows = min(config.parallel.micro_batch_size, config.train.global_batch_size)
    flops = rows * config.model.seq_len * model_size(model).training_flops_per_token
    return f"it needs {flops:.1e} FLOPs, on a CPU" if flops > _MOST_FLOPS else None


def of_all_ranks(found: Sequence[DoctorFinding], mesh: Mesh) -> list[DoctorFinding]:
    """Return of each check what the first rank has found that found anything. Collective."""
    first = dict[str, list[DoctorFinding]]()
    for records in mesh.world.all_gather_objects([finding.record() for finding in found]):
        of_rank = [DoctorFinding(**record) for record in records]
        for name in {one.check: one for one in of_rank}:
            first.setdefault(name, [one for one in of_rank if one.check == name])
    return [finding for of_check in first.values() for finding in of_check]


def _unseen(config: ExperimentConfig) -> str:
    """Return a note about what several ranks have not looked at."""
    alone = "; run the command without a launcher, too"
    if config.parallel.row_size > 1:
        key = "tp_size" if config.parallel.cp_size == 1 else "cp_size"
        return f"layers were not asked about rows, of which each rank has parts (parallel.{key}){alone}"
    if config.parallel.pp_size > 1:
        return f"layers were not asked about rows, of which each rank has some (parallel.pp_size){alone}"
    if config.parallel.data == "shard":
        return f"gradients of single layers, and what a step changes, were not looked at in shards of weights{alone}"
    return f"what a step changes in each weight was not looked at{alone}"
