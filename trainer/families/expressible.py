"""What a family cannot express of a model, found by the round trip through its config. Imports no torch."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from trainer.config.dump import inline
from trainer.families.base import Family
from trainer.families.hf_config import ForeignConfigError
from trainer.families.routing_form import routing_form
from trainer.models.config import ModelConfig

_TRAINING_ONLY: Final = (
    "document_mask",
    "init_std",
    "vocab_z_loss_coef",
    "moe.balance",
    "moe.capacity",
    "moe.cv_squared",
    "moe.device_balance",
    "moe.diversity_coef",
    "moe.z_loss_coef",
)
"""Keys, or sections, of `model` that change nothing in what a trained model computes for one dropless document."""


class Inexpressible(NamedTuple):
    """A key of `model` that a family cannot express."""

    key: str
    """Dotted key below `model`."""
    message: str
    """What the value is, and what the family has instead."""


def inexpressible(family: Family, model: ModelConfig, vocab_size: int) -> list[Inexpressible]:
    """Return the keys of a model that a family cannot express; none if it can be exported to it."""
    if model.moe is None:
        return [Inexpressible("moe", f"null: a dense model is no {family.name}")]
    if routing_form(model.moe) is None:
        kind = model.moe.router.kind
        return [Inexpressible("moe.router.kind", f"{kind}: {family.name} selects the k best experts by one gate")]
    limits = [Inexpressible(*limit) for limit in family.limits(model)]
    try:
        returned = ModelConfig.model_validate(family.from_hf(family.to_hf(model, vocab_size)))
    except (ForeignConfigError, ValidationError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ForeignConfigError) else _first_problem(error)
        return limits or [Inexpressible("", f"its config cannot be read again as {family.name}: {reason}")]
    return limits + list(_differences(inference_values(model), inference_values(returned), family.name))


def inference_values(model: ModelConfig) -> dict[str, Any]:
    """Return every key of `model` that changes what the trained model computes, with nulls and routers spelled out."""
    values = dict(_leaves(model.model_dump(), ""))
    values |= {"num_kv_heads": model.num_kv_heads or model.num_heads, "attention.head_dim": model.head_dim}
    if model.moe is not None:
        values.pop("moe.first_dense_layers")
        values["moe.every"] = model.moe_layers
        if len(model.moe_layers) == model.num_layers:
            values.pop("d_ff")  # no block is dense
        form = routing_form(model.moe)
        if form is not None:
            values = {key: value for key, value in values.items() if not key.startswith("moe.router.")}
            values |= {f"moe.router.{key}": value for key, value in asdict(form).items()}
    return {key: value for key, value in values.items() if not _is_training_only(key)}


def _differences(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> Iterator[Inexpressible]:
    has_other_router = ours.get("moe.router.kind") != theirs.get("moe.router.kind")
    for key in ours:
        mine, other = ours[key], theirs.get(key)
        if mine == other or (has_other_router and key.startswith("moe.router.") and key != "moe.router.kind"):
            continue
        if key == "moe.every":
            yield Inexpressible(key, f"MoE layers {inline(list(mine))}: {name} would have {inline(list(other or ()))}")
        else:
            yield Inexpressible(key, f"{inline(mine)}: {name} would have {inline(other)}")


def _leaves(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_training_only(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _TRAINING_ONLY)


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
