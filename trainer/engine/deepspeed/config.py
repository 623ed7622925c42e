"""Options of the DeepSpeed engine. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema
from pydantic_core import PydanticCustomError

from trainer.config.base import Config, Problem, expand_home, repeated
from trainer.config.nodes import shown, shown_path
from trainer.engine.deepspeed.passthrough import RunOptions, conflicts, merged

if TYPE_CHECKING:
    from trainer.distributed.mesh import Mesh
    from trainer.engine.base import Engine
    from trainer.engine.numerics import NumericsConfig
    from trainer.models.gpt import GPT
    from trainer.optim.registry import OptimConfig

_STAGES = {
    0: "DeepSpeed clips by the mean of the ranks' norms there, wrong for experts; use 1, or engine.kind native",
    3: "DeepSpeed has no expert parallelism there; use 1 or 2, or engine.kind native with parallel.data shard",
}


def _read(value: Any) -> Any:
    """Replace the path of a JSON file by its content, which the run folder records and ranks compare."""
    if not isinstance(value, str):
        return value
    try:
        values = json.loads(Path(expand_home(value)).read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
        if isinstance(values, dict):
            return values
        reason = "is not a mapping"
    except OSError as error:
        reason = error.strerror or str(error)
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise PydanticCustomError("file", "{text}", {"text": f"{shown_path(value)}: {reason}"})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key in repeated(key for key, _ in pairs):
        raise ValueError(f"has the key {shown(key)[1:-1]} twice")
    return dict(pairs)


_MAPPING = {"anyOf": [{"type": "object"}, {"type": "string"}]}
RawConfig = Annotated[dict[str, JsonValue], BeforeValidator(_read), WithJsonSchema(_MAPPING)]
"""A mapping, or the path of a JSON file that contains one."""


class DeepSpeedEngineConfig(Config):
    """Optimizer steps by DeepSpeed's ZeRO (arXiv 1910.02054), on the same model, objective and checkpoints."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: int = 1
    """ZeRO stage: 1 shards the moments over the replicas of a weight, 2 its gradient as well."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Device of master weights and moments, which also updates them."""
    adam: Literal["auto", "torch", "deepspeed"] = "auto"
    """Implementation of AdamW: `deepspeed` compiles its kernel if needed, `auto` uses it if it was built at install."""
    deepspeed_config: RawConfig = Field(default_factory=dict)
    """DeepSpeed's own options, or a JSON file of them. Those that do not change what is learned are passed through; one
    that contradicts this config is an error, and `auto` is ignored."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the engine's library."""
        yield "kind", "deepspeed"

    def problems(self) -> Iterator[Problem]:
        """Refuse ZeRO stages that cannot train experts."""
        if self.zero_stage not in (1, 2):
            reason = _STAGES.get(self.zero_stage, "there is no such stage; use 1 or 2")
            yield Problem("zero_stage", f"{self.zero_stage}: {reason}")

    def conflicts(self, ours: RunOptions) -> Iterator[Problem]:
        """Yield the options of `deepspeed_config` that contradict the other sections."""
        for problem in conflicts(self.deepspeed_config, ours):
            yield Problem(f"engine.deepspeed_config.{problem.key}", problem.message)

    def resolved(self, *, grad_clip: float | None, folder: Path | None = None) -> dict[str, Any]:
        """Return the configuration passed to DeepSpeed, which writes its files into `folder`, or none without it."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer != "none":
            zero["offload_optimizer"] = {"device": self.offload_optimizer}
        ours = {
            "train_micro_batch_size_per_gpu": 1,  # makes DeepSpeed divide by nothing
            "gradient_accumulation_steps": 1,
            "gradient_allreduce_op": "sum",
            "gradient_clipping": grad_clip or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},  # would wait for the device in every forward pass
        }
        return merged(self.deepspeed_config, ours, folder=folder)

    def build(
        self,
        model: GPT,
        optim: OptimConfig,
        numerics: NumericsConfig,
        mesh: Mesh,
        *,
        folder: Path | None = None,
    ) -> Engine:
        """Start DeepSpeed for an initialized model; it writes its files into `folder`. Collective."""
        from trainer.engine.deepspeed.engine import DeepSpeedEngine

        config = self.resolved(grad_clip=numerics.grad_clip, folder=folder)
        return DeepSpeedEngine(model, optim, numerics, mesh, config=config, adam=self.adam)
