"""The families that models are exported to and imported from. Imports no torch.

To add a family: one file beside this one, and a line in `FAMILIES`.
"""

from typing import Any, Final

from trainer.families.base import Family
from trainer.families.deepseek_v2 import DeepseekV2
from trainer.families.deepseek_v3 import DeepseekV3
from trainer.families.dots1 import Dots1
from trainer.families.expressible import Inexpressible, inexpressible, is_comparable
from trainer.families.glm4_moe import Glm4MoE
from trainer.families.gpt_oss import GptOss
from trainer.families.hf_config import ForeignConfigError
from trainer.families.llama import Llama
from trainer.families.mistral import Mistral
from trainer.families.mixtral import Mixtral
from trainer.families.olmoe import Olmoe
from trainer.families.qwen2 import Qwen2
from trainer.families.qwen2_moe import Qwen2MoE
from trainer.families.qwen3 import Qwen3
from trainer.families.qwen3_moe import Qwen3MoE
from trainer.models.config import ModelConfig

_ALL: Final = (
    Mixtral(),
    Qwen2MoE(),
    Qwen3MoE(),
    Olmoe(),
    Dots1(),
    Glm4MoE(),
    DeepseekV2(),
    DeepseekV3(),
    GptOss(),
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
)
FAMILIES: Final[dict[str, Family]] = {family.name: family for family in _ALL}
"""Families by transformers' model_type; `auto` takes the first that can express a model."""


def family_of(config: dict[str, Any]) -> Family:
    """Return the family of a published config.json.

    Raises:
        ForeignConfigError: if it is none of ours.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ForeignConfigError(f"model_type: {name!r} is not among {', '.join(FAMILIES)}")
    return FAMILIES[name]


def choose_family(model: ModelConfig, target: str = "auto") -> Family | str:
    """Return the family that a model is exported to: `target`, or under `auto` the first that can express it.

    If there is none, return the keys that the target, or the nearest family, cannot express, as a message.
    """
    same_kind = [family for family in FAMILIES.values() if family.is_dense == (model.moe is None)]
    candidates = same_kind if target == "auto" else [FAMILIES[target]]
    refused: list[tuple[Family, list[Inexpressible]]] = []
    for family in candidates:
        problems = inexpressible(family, model)
        if not problems:
            return family
        refused.append((family, problems))
    nearest, problems = min(refused, key=lambda one: (not is_comparable(one[0], model), len(one[1])))
    keys = "; ".join(f"model.{problem.key}: {problem.message}" for problem in problems)
    if target == "auto":
        return f"auto: no family can express this model; the nearest is {nearest.name}: {keys}"
    return f"{nearest.name} cannot express this model: {keys}; change it, or use another target, or auto"
