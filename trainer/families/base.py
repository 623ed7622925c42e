"""The seam of model families: what a family of transformers is here. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.base import Problem
from trainer.families.hf_config import HFConfig

if TYPE_CHECKING:
    from trainer.families.link import Link
    from trainer.models.config import ModelConfig


class Family(ABC):
    """A model family of transformers, and how its configs and checkpoints relate to ours.

    `to_hf` may lose what the family cannot express: `inexpressible` finds that by the round trip.
    """

    name: ClassVar[str]
    """transformers' model_type."""
    architecture: ClassVar[str]
    """Class that loads it."""
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """transformers' values of keys that a config.json may leave out; without one the key must be there or is nought."""
    has_own_splitting: ClassVar[bool] = False
    """transformers gives its tokenizers Qwen2's normalization (NFC) and splitting of words, against their files."""
    is_dense: ClassVar[bool] = False
    """Its models have no experts; those of the others have some."""

    def to_hf(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """Return config.json, under the names that older readers know too; without token ids and dtype."""
        head = {"architectures": [self.architecture], "model_type": self.name, "vocab_size": vocab_size}
        return head | self.config_values(model)

    def from_hf(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the values of our `model` section.

        Raises:
            ForeignConfigError: if a key of theirs cannot be expressed or is unknown.
        """
        hf = HFConfig({**self.defaults, **config})
        values = self.model_values(hf)
        hf.finish()
        return values

    @abstractmethod
    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""

    @abstractmethod
    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config into values of our `model` section."""

    @abstractmethod
    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs, layer by layer."""

    def zero_tensors(self, model: ModelConfig) -> Iterator[str]:
        """Yield our tensors that theirs have no counterpart of: a model with others than zeros is another model."""
        yield from ()

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what the family cannot express although its config can be written."""
        yield from ()
