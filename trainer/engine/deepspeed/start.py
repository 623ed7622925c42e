"""DeepSpeed, imported and started around a model: its process groups, its expert groups, its engine.

DeepSpeed looks for expert parameters only in a model that has one of its own MoE layers (without, it dies of them). So
the model is given one that has no parameters and does nothing, and each expert parameter the two marks that such a
layer sets on its own.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from trainer.distributed.collectives import Group
from trainer.distributed.interface import loopback_variables
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError, first_line

_MARKER = "deepspeed_expert_marker"
_TALKATIVE = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger")
"""Options of DeepSpeed whose only effect is a line in its log."""


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed.

    Raises:
        ConfigError: if it is not installed.
    """
    on_cpu = device.type == "cpu"
    # Read at its first import; else it guesses, with a warning.
    chosen = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if chosen != device.type:
        raise ConfigError(
            f"parallel.device: {device.type}, but DS_ACCELERATOR={chosen} is in the environment; make them agree"
        )
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(f"engine.kind: deepspeed: {error}; pip install deepspeed, or use native") from error
    if on_cpu:
        # A faster sum for ranks of one machine, which it would compile now: half a minute, an error without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join(deepspeed: Any, mesh: Mesh, device: torch.device) -> None:
    """Give DeepSpeed torch's process group, which must exist.

    What it remembers of another group, of an engine before this one, is forgotten.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    # DeepSpeed's own calls of what torch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    groups._release_process_group_references()
    # Not a copy, which would wait half an hour for a lost rank.
    groups._WORLD_GROUP = dist.group.WORLD  # type: ignore[assignment]
    comm.cdb = None
    with _environment(mesh, device):
        deepspeed.init_distributed(dist_init_required=False)


def start_engine(
    deepspeed: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    mesh: Mesh,
    device: torch.device,
) -> Any:
    """Return DeepSpeed's engine around a model whose experts are marked; every rank must call it.

    Raises:
        ConfigError: if DeepSpeed refuses its configuration, or lacks a package for it.
    """
    level = logging.INFO if any(config.get(key) for key in _TALKATIVE) else logging.WARNING
    logging.getLogger("DeepSpeed").setLevel(level)
    join(deepspeed, mesh, device)
    with _environment(mesh, device):
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=dict(config), dist_init_required=False
            )
        except (ImportError, ValueError) as error:  # pydantic's errors are of the second kind
            raise ConfigError(f"engine.deepspeed_config: DeepSpeed refuses it: {first_line(error):.200}") from error
    return engine


def release(engine: Any) -> None:
    """Take DeepSpeed's engine off its model."""
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.destroy()


@contextmanager
def alone(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Give a single process the process group that DeepSpeed cannot do without."""
    if mesh.world.size > 1 or dist.is_initialized():
        yield
        return
    missing = loopback_variables(os.environ)
    os.environ.update(missing)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for key in missing:
            del os.environ[key]


def _handle(group: Group) -> dist.ProcessGroup:
    """Return torch's group of ours; of one rank it is made here."""
    if group.size > 1:
        return group.handle
    return cast(dist.ProcessGroup, dist.new_group(list(group.ranks), use_local_synchronization=True))


def expert_group_name(mesh: Mesh) -> str:
    """Return what DeepSpeed calls the groups of ranks that share experts."""
    return f"ep_size_{mesh.layout.ep_size}"


@contextmanager
def marked(model: nn.Module, experts: Sequence[nn.Parameter], mesh: Mesh) -> Iterator[None]:
    """Say to DeepSpeed which parameters are copied over `mesh.edp` only. Always, also where that is all ranks."""
    if not experts:
        yield
        return
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    name = expert_group_name(mesh)

    class ExpertMarker(MoE):
        """Has no parameters and computes nothing."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size = mesh.layout.ep_size, mesh.layout.ep_size

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Say which groups they are, when an engine is made around the model."""
            groups._EXPERT_PARALLEL_GROUP[name] = _handle(mesh.ep)
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ep.ranks)
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = _handle(mesh.edp)
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.edp.ranks)

    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]
    model.add_module(_MARKER, ExpertMarker())
    try:
        yield
    finally:
        delattr(model, _MARKER)
        for parameter in experts:
            del parameter.allreduce, parameter.group_name  # type: ignore[attr-defined]


@contextmanager
def _environment(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Set what a launcher sets, for as long as DeepSpeed looks for it; what is there already stays."""
    layout = mesh.layout
    values = {"RANK": layout.rank, "LOCAL_RANK": device.index or 0, "WORLD_SIZE": layout.world_size}
    missing = {key: str(value) for key, value in values.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]
