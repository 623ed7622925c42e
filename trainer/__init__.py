"""Turnout: a distributed trainer of mixture-of-experts language models.

The names below are the public Python interface (docs/library.md). They are imported when they are first used, so that
`import trainer` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from trainer.library.config import load_config
    from trainer.library.moe_layer import LayerStats, MoELayer
    from trainer.library.runs import Run, load_run, train
    from trainer.library.training_parts import build_model, load_batches, training_loss, update_routers

__all__ = [
    "LayerStats",
    "MoELayer",
    "Run",
    "build_model",
    "load_batches",
    "load_config",
    "load_run",
    "train",
    "training_loss",
    "update_routers",
]

_MODULES: Final = {
    "LayerStats": "moe_layer",
    "MoELayer": "moe_layer",
    "Run": "runs",
    "build_model": "training_parts",
    "load_batches": "training_parts",
    "load_config": "config",
    "load_run": "runs",
    "train": "runs",
    "training_loss": "training_parts",
    "update_routers": "training_parts",
}
"""Module of trainer.library that has a public name."""


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"trainer.library.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
