"""A published config.json that is read key by key, so that no key which changes the model is overlooked. No torch."""

from collections.abc import Mapping
from typing import Any, Final

from trainer.errors import DataError

_WITHOUT_EFFECT: Final = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "attn_implementation",
        "architectures",
        "auto_map",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "attention_dropout",
        "output_router_logits",
        "router_jitter_noise",
        "max_window_layers",
        "pretraining_tp",
        "ep_size",
        "seq_aux",
        "aux_loss_alpha",
        "initializer_factor",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "num_nextn_predict_layers",
        "tokenizer_class",
    ]
)
"""Keys that change nothing in what the model computes at inference, or are read elsewhere."""


class ForeignConfigError(DataError):
    """A published config has a value that cannot be expressed here."""


class HFConfig:
    """A config.json, with typed access to its keys.

    Raises:
        ForeignConfigError: from every method, if a value has another type or is not among those allowed.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self._read: set[str] = set()

    def integer(self, *keys: str, default: int | None = None) -> int:
        """Return the integer under the first of several names of a key that is there and not null."""
        return self._of_type(int, keys, default)

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return a number as a float."""
        return float(self._of_type((int, float), keys, default))

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._value((key,), default)
        if not isinstance(value, bool):
            raise ForeignConfigError(f"{key}: {value!r} is neither true nor false")
        return value

    def optional(self, key: str) -> Any:
        """Return any value; None where it is null or missing."""
        self._read.add(key)
        return self.values.get(key)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that is neither missing nor among those that can be expressed."""
        value = self.optional(key)
        if value is not None and value not in allowed:
            instead = ", ".join(map(repr, allowed)) if allowed else "null"
            raise ForeignConfigError(f"{key}: {value!r} cannot be expressed here; only {instead}")

    def finish(self) -> None:
        """Refuse keys that were not read, which may change what the model computes."""
        unread = [
            key
            for key, value in self.values.items()
            if key not in self._read and key not in _WITHOUT_EFFECT and value is not None
        ]
        if unread:
            raise ForeignConfigError(
                f"{unread[0]}: {self.values[unread[0]]!r} is unknown for {self.values.get('model_type')}; remove the "
                "key if it changes nothing"
            )

    def _of_type(self, kind: Any, keys: tuple[str, ...], default: Any) -> Any:
        value = self._value(keys, default)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ForeignConfigError(f"{keys[0]}: {value!r} is not a number of the right type")
        return value

    def _value(self, keys: tuple[str, ...], default: Any) -> Any:
        self._read.update(keys)
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        if default is None:
            raise ForeignConfigError(f"{keys[0]}: is missing")
        return default
