"""Keys of a model that a family cannot express, found by the round trip through its config. Imports no torch."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from trainer.config.base import Problem
from trainer.config.dump import inline
from trainer.families.base import Family
from trainer.families.hf_config import ForeignConfigError
from trainer.families.routing_form import routing_form
from trainer.models.config import ModelConfig
from trainer.models.rope_scaling_config import DynamicRopeScaling

_TRAINING_ONLY: Final = (
    "document_mask",
    "init_std",
    "lora",
    "vocab_z_loss_coef",
    "moe.balance",
    "moe.capacity",
    "moe.cv_squared",
    "moe.device_balance",
    "moe.diversity_coef",
    "moe.z_loss_coef",
)
"""Keys, or sections, of `model` that change nothing in what a trained model computes for one dropless document.

Adapters are among them, since an export merges them into the weights.
"""


_SECTIONS: Final = ("attention.latent", "rope_scaling")
"""Sections that may be null."""
_ANY_VOCAB: Final = 256
"""Rows of the embedding, which every family has."""


class Inexpressible(NamedTuple):
    """A key of `model` that a family cannot express."""

    key: str
    """Dotted key below `model`."""
    message: str
    """The value, and the one that the family has instead."""


def inexpressible(family: Family, model: ModelConfig) -> list[Inexpressible]:
    """Return the keys of a model that a family cannot express; none if it can be exported to it."""
    if model.moe is None and not family.is_dense:
        return [Inexpressible("moe", f"null: a dense model is no {family.name}")]
    if model.moe is not None and family.is_dense:
        return [Inexpressible("moe", f"{model.moe.num_experts} experts: {family.name} is dense")]
    if model.moe is not None and routing_form(model.moe) is None:
        kind = model.moe.router.kind
        return [Inexpressible("moe.router.kind", f"{kind}: {family.name} selects the k best experts by one gate")]
    limits = [Inexpressible(*limit) for limit in (*family.limits(model), *_length_limits(model))]
    returned = _returned(family, model)
    if isinstance(returned, str):
        return limits or [Inexpressible("", f"its config cannot be read again as {family.name}: {returned}")]
    return limits + list(_differences(model, returned, family.name))


def is_comparable(family: Family, model: ModelConfig) -> bool:
    """Return whether `inexpressible` names every key that is in the way, not only those that keep it from a config."""
    if model.moe is None or routing_form(model.moe) is None:
        return True
    return isinstance(_returned(family, model), ModelConfig)


def inference_values(model: ModelConfig) -> dict[str, Any]:
    """Return every key of `model` that changes what the trained model computes, in one form for equal models.

    Nulls are replaced by what they stand for, and routers by what they do without training. `vocab_size` and `seq_len`
    are not among them: every family has them.
    """
    values = dict(_leaves(model.model_dump(exclude={"vocab_size", "seq_len"}), ""))
    values |= {"num_kv_heads": model.num_kv_heads or model.num_heads, "attention.head_dim": model.head_dim}
    values |= {"attention.window": list(model.windows)}
    values.pop("attention.window_pattern")
    if not model.qk_norm:
        values["attention.qk_norm_over"] = "head"  # of nothing
    moe = model.moe
    if moe is not None:
        values = {key: value for key, value in values.items() if key not in ("moe.first_dense_layers", "moe.every")}
        values |= {"moe.layers": list(model.moe_layers), "moe.shared_d_ff": moe.shared_width}
        values["moe.num_shared_experts"] = min(1, moe.num_shared_experts)  # one of their common width is the same
        if len(model.moe_layers) == model.num_layers:
            values.pop("d_ff")  # no block is dense
        form = routing_form(moe)
        if form is not None:
            values = {key: value for key, value in values.items() if not key.startswith("moe.router.")}
            values |= {f"moe.router.{key}": value for key, value in asdict(form).items()}
    return {key: value for key, value in values.items() if not _is_training_only(key)}


def _returned(family: Family, model: ModelConfig) -> ModelConfig | str:
    """Return the model that is read from its own config; if none, why."""
    try:
        return ModelConfig.model_validate(family.from_hf(family.to_hf(model, _ANY_VOCAB)))
    except ForeignConfigError as error:
        return str(error).splitlines()[0]
    except ValidationError as error:
        return _first_problem(error)


def _length_limits(model: ModelConfig) -> Iterator[Problem]:
    """Yield a scaling that no family has: transformers' depends on the length of each text."""
    scaling = model.rope_scaling
    if isinstance(scaling, DynamicRopeScaling) and model.seq_len > scaling.original_length:
        what = f"dynamic for seq_len {model.seq_len} beyond original_length {scaling.original_length}"
        yield Problem("rope_scaling.kind", f"{what}: transformers scales by the length of each text")


def _differences(model: ModelConfig, returned: ModelConfig, name: str) -> Iterator[Inexpressible]:
    ours, theirs = inference_values(model), inference_values(returned)
    different = {key for key in ours if ours[key] != theirs.get(key)}
    if "moe.router.kind" in different:  # says it all
        different -= {key for key in different if key.startswith("moe.router.")} - {"moe.router.kind"}
    if "moe.num_shared_experts" in different:
        different -= {"moe.shared_d_ff"}
    for section in _SECTIONS:
        below = {key for key in different if key.startswith(f"{section}.")}
        if below and theirs.get(section, "") is None:
            different -= below
            yield Inexpressible(section, f"{name} has none")
    raw = dict(_leaves(model.model_dump(), ""))
    for key in ours:
        if key in different:
            value = ours[key] if raw.get(key) is None else raw[key]
            yield Inexpressible(key, f"{inline(value)}: {name} would have {inline(theirs.get(key))}")


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
