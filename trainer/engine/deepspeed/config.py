"""The DeepSpeed engine's options. Imports no torch and nothing of DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema
from pydantic_core import PydanticCustomError

from trainer.config.base import Config, Problem, at_home
from trainer.config.layers import MAX_BYTES as _MAX_BYTES
from trainer.config.nodes import shown_path
from trainer.engine.deepspeed.passthrough import Ours, conflicts, merged

if TYPE_CHECKING:
    from trainer.distributed.mesh import Mesh
    from trainer.engine.base import Engine
    from trainer.engine.step import NumericsConfig
    from trainer.models.gpt import GPT
    from trainer.optim.registry import OptimConfig

_STAGES = {
    0: "DeepSpeed clips by the mean of the ranks' norms there, wrong for experts; use 1, or engine.kind native",
    3: "DeepSpeed has no expert parallelism there; use 1 or 2, or engine.kind native with parallel.data shard",
}


def _read(value: Any) -> Any:
    """Replace the path of a JSON file by what is in it: the run folder records that, and ranks compare it."""
    if not isinstance(value, str):
        return value
    try:
        path = Path(at_home(value))
        if path.exists() and not path.is_file():
            raise ValueError("is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"has more than {_MAX_BYTES} bytes; a configuration has a few thousand")
        values = json.loads(path.read_text(), object_pairs_hook=_unique, parse_constant=_refuse)
        if isinstance(values, dict):
            return values
        reason = "is not a mapping"
    except OSError as error:
        reason = error.strerror or str(error)
    except RecursionError:
        reason = "is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error}"
    except ValueError as error:
        reason = str(error)
    raise PydanticCustomError("file", "{text}", {"text": f"{shown_path(value)}: {reason}"})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"has the key {key} twice")
    return dict(pairs)


def _refuse(name: str) -> Any:
    raise ValueError(f"has {name}, which is no JSON")


_MAPPING = {"anyOf": [{"type": "object"}, {"type": "string"}]}
RawConfig = Annotated[dict[str, JsonValue], BeforeValidator(_read), WithJsonSchema(_MAPPING)]
"""A mapping, or the path of a JSON file that holds one."""


class DeepSpeedEngineConfig(Config):
    """Optimizer steps by DeepSpeed's ZeRO (arXiv 1910.02054), on the same model, objective and checkpoints."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: int = 1
    """What is cut over the ranks that hold copies of a weight: 1 its moments, 2 its gradient as well."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where master weights and moments are, and where they are updated."""
    adam: Literal["auto", "torch", "deepspeed"] = "auto"
    """Whose AdamW: `deepspeed` compiles its kernel if need be, `auto` takes it if it was built with DeepSpeed."""
    deepspeed_config: RawConfig = Field(default_factory=dict)
    """DeepSpeed's own options (or a JSON file of them), of which those that leave what is learned alone are taken over.
    One that says otherwise than this file is an error; `auto` says nothing."""

    def problems(self) -> Iterator[Problem]:
        """Refuse the stages that cannot train experts."""
        if self.zero_stage not in (1, 2):
            reason = _STAGES.get(self.zero_stage, "there is no such stage; use 1 or 2")
            yield Problem("zero_stage", f"{self.zero_stage}: {reason}")

    def conflicts(self, ours: Ours) -> Iterator[Problem]:
        """Yield what `deepspeed_config` says that the other sections do not."""
        for problem in conflicts(self.deepspeed_config, ours):
            yield Problem(f"engine.deepspeed_config.{problem.key}", problem.message)

    def whole(self, *, grad_clip: float | None) -> dict[str, Any]:
        """Return the configuration that DeepSpeed is given."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer != "none":
            zero["offload_optimizer"] = {"device": self.offload_optimizer}
        ours = {
            "train_micro_batch_size_per_gpu": 1,  # rows are counted elsewhere: DeepSpeed divides by nothing
            "gradient_accumulation_steps": 1,
            "gradient_allreduce_op": "sum",
            "gradient_clipping": grad_clip or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},  # which would wait for the device in every forward pass
        }
        return merged(self.deepspeed_config, ours)

    def build(self, model: GPT, optim: OptimConfig, numerics: NumericsConfig, mesh: Mesh) -> Engine:
        """Start DeepSpeed around an initialised model; every rank must."""
        from trainer.engine.deepspeed.engine import DeepSpeedEngine

        config = self.whole(grad_clip=numerics.grad_clip)
        return DeepSpeedEngine(model, optim, numerics, mesh, config=config, adam=self.adam)
