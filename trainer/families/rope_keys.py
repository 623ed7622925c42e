"""Keys of rotary positions, of both generations of transformers. Imports no torch.

Up to version 4 the base is `rope_theta` and the scaling `rope_scaling`; version 5 has both in `rope_parameters`, and
reads the older keys too, which other programs want: these are written.
"""

from typing import Any, Final

from trainer.families.hf_config import ForeignConfigError, HFConfig
from trainer.models.config import ModelConfig
from trainer.models.rope_scaling_config import DynamicRopeScaling

_NAMES: Final = {"original_length": "original_max_position_embeddings"}
"""Keys of a scaling that have another name there."""
_NUMBERS: Final = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary positions, and the number of positions."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"max_position_embeddings": model.seq_len, "rope_theta": model.rope_theta, "rope_scaling": None}
    values = scaling.model_dump(exclude={"kind"}, exclude_none=True)
    positions = model.seq_len
    if isinstance(scaling, DynamicRopeScaling):
        positions = values.pop("original_length")  # it is read from there
    theirs = {"rope_type": scaling.kind, "type": scaling.kind}
    theirs |= {_NAMES.get(key, key): value for key, value in values.items()}
    return {"max_position_embeddings": positions, "rope_theta": model.rope_theta, "rope_scaling": theirs}


def rope_from_hf(hf: HFConfig, *, default_theta: float) -> dict[str, Any]:
    """Read base and scaling; of partial rotation only that there is none, unless it was read before."""
    newer, scaling = hf.optional("rope_parameters"), hf.optional("rope_scaling")
    if newer and scaling and newer != scaling:
        raise ForeignConfigError(
            f"rope_scaling: {scaling!r} stands beside another rope_parameters, and transformers reads one of them; "
            "keep one"
        )
    section = newer or scaling or {}
    if not isinstance(section, dict):
        raise ForeignConfigError(f"rope_parameters: {section!r} is not a section")
    older = {key: hf.optional(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = HFConfig({**older, **{key: value for key, value in section.items() if value is not None}})
    kind = rope.optional("rope_type") or rope.optional("type") or "default"
    rope.optional("type")
    values: dict[str, Any] = {"rope_theta": rope.number("rope_theta", default=default_theta)}
    fraction = rope.number("partial_rotary_factor", default=1.0)
    if fraction != 1.0:
        values["rotary_fraction"] = fraction
    if kind != "default":
        values["rope_scaling"] = _scaling(kind, rope, hf)
    rope.finish()
    return values


def _scaling(kind: Any, rope: HFConfig, hf: HFConfig) -> dict[str, Any]:
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise ForeignConfigError(f"rope_type: {kind!r} cannot be expressed here; only {', '.join(_NUMBERS)}")
    given = {key: rope.number(key) for key in _NUMBERS[kind] if rope.optional(key) is not None}
    values = {"kind": kind, **given}
    if kind == "dynamic":
        values["original_length"] = hf.integer("max_position_embeddings")
        rope.optional("original_max_position_embeddings")
    elif kind != "linear":
        positions = hf.integer("max_position_embeddings")
        values["original_length"] = rope.integer("original_max_position_embeddings", default=positions)
    if kind == "yarn" and rope.optional("truncate") is not None:
        values["truncate"] = rope.boolean("truncate")
    return values
