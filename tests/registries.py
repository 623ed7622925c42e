"""Every registered kind of router, dispatcher, source, tokenizer and task: tests list none of them by hand."""

from collections.abc import Iterable
from typing import Any, get_args

from trainer.config.plugins import Pluggable
from trainer.data.sources.registry import SourceConfig
from trainer.data.tokenizers.registry import TokenizerConfig
from trainer.evaluation.tasks.registry import AnyTaskConfig
from trainer.moe.dispatch.registry import DispatcherConfig
from trainer.moe.routers.registry import RouterConfig
from trainer.ops.kernels import ExpertsKernel, emulation_of, missing_kernel


def by_kind(union: Any) -> dict[str, Any]:
    """Return the config class of each kind of an annotated union, in the order of the registry."""
    sections, *annotations = get_args(union)
    found = {section.model_fields["kind"].default: section for section in get_args(sections)}
    for mark in annotations:
        if isinstance(mark, Pluggable):
            found |= {kind: mark.section(kind) for kind in mark.lazy}
    return found


ROUTERS = by_kind(RouterConfig)
LIBRARY_DISPATCHERS = {kind: section for kind, section in by_kind(DispatcherConfig).items() if section.needs_gpus}
"""Dispatchers by libraries for GPUs, which tests/contracts/test_library_dispatchers.py runs on doubles."""
DISPATCHERS = {kind: section for kind, section in by_kind(DispatcherConfig).items() if kind not in LIBRARY_DISPATCHERS}
LEARNED_ROUTERS = {
    kind: router
    for kind, router in ROUTERS.items()
    if router.required_experts is None and list(router().build(d_model=4, num_experts=4, layer=0).parameters())
}
"""Routers with weights that choose among several experts."""
SOURCES = by_kind(SourceConfig)
TOKENIZERS = by_kind(TokenizerConfig)
TASKS = by_kind(AnyTaskConfig)
KERNELS: list[ExpertsKernel] = [
    name for name in get_args(ExpertsKernel) if missing_kernel(name, "cpu") is None and emulation_of(name) is None
]
"""Kernels of the experts that run here and equal the oracle up to rounding: not those in a coarser format. `triton` in
its interpreter has a file of its own: unit/ops/test_triton.py."""


def num_experts_of(kind: str, default: int = 4) -> int:
    """Return the number of experts for a kind of router: the only possible one, or a default."""
    return ROUTERS[kind].required_experts or default


def router_sections(*, without: Iterable[dict[str, Any]] = ()) -> dict[str, dict[str, Any]]:
    """Return a `moe` section with default options for each kind of router that is in none of the given sections."""
    covered = {section.get("router", {}).get("kind", "top_k") for section in without}
    return {
        kind: {"router": {"kind": kind}, **({"num_experts": n} if (n := router.required_experts) else {})}
        for kind, router in ROUTERS.items()
        if kind not in covered
    }
