"""Import and start of DeepSpeed for a model: its process groups, expert groups and engine.

DeepSpeed handles expert parameters only in a model that contains one of its own MoE layers, and fails otherwise. So an
empty one is added to the model, and each expert parameter gets the two attributes that such a layer sets.
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
"""Options of DeepSpeed that only produce log lines."""


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed.

    Raises:
        ConfigError: if it is not installed.
    """
    on_cpu = device.type == "cpu"
    # Read at its first import; if unset, it guesses with a warning.
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
        # A faster all-reduce within a machine, which it would compile now: takes half a minute, and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join(deepspeed: Any, mesh: Mesh, device: torch.device) -> None:
    """Initialize DeepSpeed with torch's process group, which must exist, and drop references to earlier groups."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    groups._release_process_group_references()
    # Not a copy of the group, which would wait half an hour for a lost rank.
    groups._WORLD_GROUP = dist.group.WORLD  # type: ignore[assignment]
    comm.cdb = None
    with _environment(_launched(mesh, device)):
        deepspeed.init_distributed(dist_init_required=False)


def start_engine(
    deepspeed: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    mesh: Mesh,
    device: torch.device,
) -> Any:
    """Return DeepSpeed's engine for a model with marked experts. Collective: every rank must call it.

    Raises:
        ConfigError: if DeepSpeed rejects its configuration, or a package is missing.
    """
    level = logging.INFO if any(config.get(key) for key in _TALKATIVE) else logging.WARNING
    logging.getLogger("DeepSpeed").setLevel(level)
    join(deepspeed, mesh, device)
    with _environment(_launched(mesh, device)):
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=dict(config), dist_init_required=False
            )
        except (ImportError, ValueError) as error:  # pydantic's errors are ValueErrors
            raise ConfigError(f"engine.deepspeed_config: DeepSpeed refuses it: {first_line(error):.200}") from error
    return engine


def release(engine: Any) -> None:
    """Detach DeepSpeed's engine from its model."""
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.destroy()


@contextmanager
def single_process_group(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Provide the process group that DeepSpeed needs even in a single process."""
    if mesh.world.size > 1 or dist.is_initialized():
        yield
        return
    with _environment(loopback_variables(os.environ)):
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _handle(group: Group) -> dist.ProcessGroup:
    """Return the torch process group; a group of one rank is created here."""
    if group.size > 1:
        return group.handle
    return cast(dist.ProcessGroup, dist.new_group(list(group.ranks), use_local_synchronization=True))


def expert_group_name(mesh: Mesh) -> str:
    """Return DeepSpeed's name for the expert-parallel groups."""
    return f"ep_size_{mesh.layout.ep_size}"


@contextmanager
def expert_markers(model: nn.Module, experts: Sequence[nn.Parameter], mesh: Mesh) -> Iterator[None]:
    """Mark the parameters that are replicated over `mesh.edp` only, even if that is all ranks.

    Frozen ones belong to no group, and DeepSpeed refuses a model with expert layers and no group of experts. They get
    the mark of weights that are another rank's own: it would copy rank 0's to all ranks.
    """
    with _marked([p for p in experts if not p.requires_grad], ds_optim_param=True):
        learning = [p for p in experts if p.requires_grad]
        if not learning:
            yield
            return
        with _expert_layer(model, learning, mesh):
            yield


@contextmanager
def _marked(parameters: Sequence[nn.Parameter], **attributes: Any) -> Iterator[None]:
    """Set attributes of parameters."""
    for parameter in parameters:
        vars(parameter).update(attributes)
    try:
        yield
    finally:
        for parameter in parameters:
            for name in attributes:
                delattr(parameter, name)


@contextmanager
def _expert_layer(model: nn.Module, experts: Sequence[nn.Parameter], mesh: Mesh) -> Iterator[None]:
    """Add an empty MoE layer of DeepSpeed to the model, and mark the experts as its own."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    name = expert_group_name(mesh)

    class ExpertMarker(MoE):
        """Empty MoE layer, which registers the expert groups."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size = mesh.layout.ep_size, mesh.layout.ep_size

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Register the groups; DeepSpeed calls this when it creates an engine."""
            groups._EXPERT_PARALLEL_GROUP[name] = _handle(mesh.ep)
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ep.ranks)
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = _handle(mesh.edp)
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.edp.ranks)

    model.add_module(_MARKER, ExpertMarker())
    try:
        with _marked(experts, allreduce=False, group_name=name):
            yield
    finally:
        delattr(model, _MARKER)


def _launched(mesh: Mesh, device: torch.device) -> dict[str, str]:
    """Return the variables that a launcher sets."""
    layout = mesh.layout
    values = {"RANK": layout.rank, "LOCAL_RANK": device.index or 0, "WORLD_SIZE": layout.world_size}
    return {key: str(value) for key, value in values.items()}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those of these environment variables that are missing."""
    missing = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]
