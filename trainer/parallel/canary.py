"""The canary of a run: its experts kernel and its dispatcher, compared with the oracle on the devices that it has.

Kernels are chosen by a table of measurements made elsewhere, and a build of torch, a driver or a GPU may have one that
is wrong. All ranks decide alike: a kernel that is wrong on one rank's device is wrong for all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch

from trainer.config.build_plugin import build_plugin
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.dispatch.registry import DispatcherOptions, WireOptions
from trainer.ops.kernel_canary import kernel_fault
from trainer.ops.kernels import ExpertsKernel, emulation_of, fallback_kernels, run_experts
from trainer.ops.layer_widths import LayerWidths
from trainer.parallel.config import ParallelConfig, RecomputeEveryConfig
from trainer.parallel.dispatcher_canary import RowDtypes, dispatcher_fault

_FALL_BACK = "take another, such as loop; or set parallel.kernel_canary=fall_back to train with the next that is right"
_NONE_LEFT = "no kernel is right here: suspect the device or this build of torch"
_OFF = "set parallel.kernel_canary=off to train with it all the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryReport:
    """Findings of the canary."""

    experts_kernel: str
    """Kernel to train with."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fault of each kernel that was refused."""
    seconds: float = 0.0


def run_canary(
    config: ParallelConfig, widths: LayerWidths, num_experts: int, mesh: Mesh, device: torch.device
) -> CanaryReport:
    """Check the kernel and the dispatcher of a run, whose `experts_kernel` is not `auto`. Collective.

    Raises:
        ConfigError: if the dispatcher is wrong, or the kernel is and `kernel_canary` is not `fall_back`, or no kernel
            is right.
    """
    name = config.experts_kernel
    if config.kernel_canary == "off":
        return CanaryReport(experts_kernel=name)
    start = time.perf_counter()
    candidates, remedy = [name], _FALL_BACK
    if config.kernel_canary == "fall_back":
        candidates, remedy = [name, *fallback_kernels(name, device.type)], _NONE_LEFT

    def fault_of(kernel: str) -> str | None:
        runs = (partial(run_experts, cast(ExpertsKernel, kernel), recompute=again) for again in _recomputes(config))
        found = (kernel_fault(run, widths, device, emulation=emulation_of(kernel)) for run in runs)
        return next(filter(None, found), None)

    report = first_sound(candidates, fault_of, mesh.host, remedy=remedy)
    check_dispatcher(config, widths.dtype, num_experts, mesh, device)
    return replace(report, seconds=time.perf_counter() - start)


def _recomputes(config: ParallelConfig) -> Sequence[bool]:
    """Return whether experts compute their hidden values again: True, False, or both if some blocks do."""
    if isinstance(config.recompute, RecomputeEveryConfig):
        return False, True
    return (config.recompute in ("experts", "block"),)


def first_sound(
    candidates: Sequence[str], fault_of: Callable[[str], str | None], group: Group, *, remedy: str
) -> CanaryReport:
    """Return the first of this rank's candidates that no rank finds wrong. Collective; candidates may differ by rank.

    Raises:
        ConfigError: on all ranks, with the remedy, if one has none left.
    """
    refused: dict[str, str] = {}
    while True:
        mine = next((name for name in candidates if name not in refused), None)
        found = None if mine is None else fault_of(mine)
        if not group.any(mine is None or found is not None):
            assert mine is not None
            return CanaryReport(experts_kernel=mine, refused=refused)
        answers = group.all_gather_objects([mine, found])
        if any(name is None for name, _ in answers):
            lines = [
                f"parallel.experts_kernel: {name} is wrong on this device: {what}" for name, what in refused.items()
            ]
            raise ConfigError("\n".join(lines) + f"; {remedy}; or {_OFF}")
        wrong = [(rank, name, fault) for rank, (name, fault) in zip(group.ranks, answers, strict=True) if fault]
        for rank, name, fault in wrong:
            refused.setdefault(name, fault if group.size == 1 else f"rank {rank}: {fault}")


def row_dtypes(dispatcher: DispatcherOptions, dtype: torch.dtype) -> RowDtypes:
    """Return the dtypes of rows that a dispatcher sends, given that of the experts' products."""
    rounds = isinstance(dispatcher, WireOptions) and dispatcher.wire == "bfloat16"
    return RowDtypes(compute=dtype, wire=torch.bfloat16 if rounds else dtype)


def check_dispatcher(
    config: ParallelConfig, dtype: torch.dtype, num_experts: int, mesh: Mesh, device: torch.device
) -> None:
    """Check the dispatcher on its own ranks. Collective.

    Raises:
        ConfigError: on all ranks, if it is wrong on one.
    """
    dispatcher = build_plugin(config.dispatcher, Dispatcher, "parallel.dispatcher", mesh, num_experts)
    found = dispatcher_fault(dispatcher, mesh, num_experts, row_dtypes(config.dispatcher, dtype), device)
    if not mesh.host.any(found is not None):
        return
    faults = mesh.host.all_gather_objects(found)
    for rank, fault in zip(mesh.host.ranks, faults, strict=True):
        if fault is not None:
            where = "" if mesh.host.size == 1 else f"rank {rank}: "
            kind = config.dispatcher.kind
            other = "all_gather" if kind == "all_to_all" else "all_to_all"
            raise ConfigError(
                f"parallel.dispatcher: {kind} is wrong on these ranks: {where}{fault}; take another, such as {other}; "
                f"or {_OFF}"
            )
