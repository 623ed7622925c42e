"""The `export` section. Imports no torch."""

from collections.abc import Iterator
from typing import Literal

from trainer.config.base import Config, Problem
from trainer.families.registry import choose_family
from trainer.models.config import ModelConfig

Target = Literal[
    "auto",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "dots1",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
]
"""A family of transformers by its model_type, the last four for dense models, or the first that can express it."""


class ExportConfig(Config):
    """Check before training that the model can be exported."""

    target: Target | None = None
    """Family of transformers that `turnout export` will write; a model that it cannot express is refused before
    training. `auto`: any of them. Null: no check, and export chooses."""

    def problems_of(self, model: ModelConfig) -> Iterator[Problem]:
        """Check the model against the target."""
        if self.target is None:
            return
        chosen = choose_family(model, self.target)
        if isinstance(chosen, str):
            yield Problem("target", chosen)
