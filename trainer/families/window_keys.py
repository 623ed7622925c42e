"""Keys of sliding-window layers. Imports no torch."""

from collections.abc import Sequence
from typing import Any, Final

from trainer.families.hf_config import ForeignConfigError, HFConfig
from trainer.models.config import ModelConfig

_THEIRS: Final = {"sliding": "sliding_attention", "full": "full_attention"}
_OURS: Final = {theirs: ours for ours, theirs in _THEIRS.items()}


def window_of_all(model: ModelConfig) -> int | None:
    """Return the window for a family in which all layers have it or none."""
    return model.windows[0]


def layer_types(model: ModelConfig) -> list[str]:
    """Return the kind of every layer."""
    return [_THEIRS["full" if window is None else "sliding"] for window in model.windows]


def window_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a family whose layers may differ."""
    return {"sliding_window": model.attention.window, "layer_types": layer_types(model)}


def late_windows(hf: HFConfig, num_layers: int, *, default_first: int) -> dict[str, Any]:
    """Read windows by `layer_types`, without which the layers from `max_window_layers` on have one."""
    kinds, first = hf.optional("layer_types"), hf.integer("max_window_layers", default=default_first)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return window_of_layers(hf, default if kinds is None else kinds)


def qwen_windows_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of dense Qwen models; readers without `layer_types` know late windows only."""
    first = next((layer for layer, window in enumerate(model.windows) if window is not None), model.num_layers)
    return {
        **window_to_hf(model),
        "use_sliding_window": model.attention.window is not None,
        "max_window_layers": first,
    }


def qwen_windows(hf: HFConfig, num_layers: int) -> dict[str, Any]:
    """Read the windows of dense Qwen models, which may be turned off."""
    values = late_windows(hf, num_layers, default_first=28)
    return values if hf.boolean("use_sliding_window", default=False) else {}


def window_values(window: Any) -> dict[str, Any]:
    """Return values of `model.attention` for a window of all layers; null: no window."""
    if window is None:
        return {}
    if isinstance(window, bool) or not isinstance(window, int):
        raise ForeignConfigError(f"sliding_window: {window!r} is not a number of the right type")
    return {"window": window}


def window_of_layers(hf: HFConfig, kinds: Sequence[Any]) -> dict[str, Any]:
    """Return values of `model.attention` for the kind of every layer."""
    window, num_layers = hf.optional("sliding_window"), hf.integer("num_hidden_layers")
    if len(kinds) != num_layers:
        raise ForeignConfigError(f"layer_types: names {len(kinds)} layers, and num_hidden_layers is {num_layers}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _OURS:
            raise ForeignConfigError(f"layer_types: {kind!r} cannot be expressed here; only {', '.join(_OURS)}")
    pattern = [_OURS[kind] for kind in kinds]
    if "sliding" not in pattern or window is None:
        return {}
    values = window_values(window)
    period = next(n for n in range(1, len(pattern) + 1) if pattern == [pattern[i % n] for i in range(len(pattern))])
    return values if period == 1 else values | {"window_pattern": pattern[:period]}
