"""Configs of the engines, and their union that `engine` accepts. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import Config
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig

if TYPE_CHECKING:
    from trainer.distributed.mesh import Mesh
    from trainer.engine.base import Engine
    from trainer.engine.numerics import NumericsConfig
    from trainer.models.gpt import GPT
    from trainer.optim.registry import OptimConfig


class NativeEngineConfig(Config):
    """Optimizer steps in plain torch."""

    kind: Literal["native"] = "native"

    def build(
        self,
        model: GPT,
        optim: OptimConfig,
        numerics: NumericsConfig,
        mesh: Mesh,
        *,
        folder: Path | None = None,
    ) -> Engine:
        """Create the engine for an initialized model; `folder` is not used."""
        from trainer.engine.native import NativeEngine

        return NativeEngine(model, optim, numerics, mesh)


EngineConfig = Annotated[NativeEngineConfig | DeepSpeedEngineConfig, Field(discriminator="kind")]
