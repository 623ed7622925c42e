"""Tensors of the model that a new run starts from, under our names, read a few rows at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.find_checkpoint import CheckpointHandle, removed_meanwhile
from trainer.checkpoint.identity import Parent
from trainer.checkpoint.run_tokenizer import tokenizer_of
from trainer.checkpoint.streamed import GlobalTensor
from trainer.convert.compare_tensors import CheckpointRows
from trainer.convert.dequantized import open_published
from trainer.convert.foreign_tensors import check_foreign_tensors
from trainer.convert.linked_weights import LinkedWeights
from trainer.convert.router_columns import tensors_of
from trainer.convert.weight_parent import PublishedParent, RunParent
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.file import read_tokenizer
from trainer.data.tokenizers.hf_files import TOKENIZER
from trainer.engine.base import COUNTS
from trainer.errors import CheckpointError, DataError
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.training.load_trained import intact_checkpoint


class ParentTensors(ABC):
    """Tensors of another model, by name in a checkpoint."""

    where: str
    """Its path, for messages."""
    model: ModelConfig
    tensors: Mapping[str, GlobalTensor]
    values: Mapping[str, int | float | str] = MappingProxyType({"optimizer_steps": 0})
    """Scalars of its engine's state."""

    @abstractmethod
    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor, in its own dtype."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return its tokenizer; None if it comes without one."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return where it comes from, for the record of the new run."""

    @property
    def parent(self) -> Parent | None:
        """Entry of its run in the record of the new one."""
        return None

    def counts(self) -> Tensor | None:
        """Return (L, E) assignments to each expert in its last step; None if they are unknown."""
        return self.read(COUNTS, 0, self.tensors[COUNTS].shape[0]) if COUNTS in self.tensors else None

    @property
    def names(self) -> list[str]:
        """Names of its weights and buffers in a model."""
        return [name.removeprefix(WEIGHT) for name in self.tensors if name.startswith(WEIGHT)]

    @abstractmethod
    def close(self) -> None:
        """Close its files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunTensors(ParentTensors):
    """Tensors of a verified checkpoint."""

    def __init__(self, parent: RunParent, *, warn: Callable[[str], None]) -> None:
        """Verify the checkpoint, every byte of it.

        Raises:
            CheckpointError: if it is damaged.
        """
        self._of, self.where, self.model = parent, parent.where, parent.model
        self.handle: CheckpointHandle = intact_checkpoint(parent.checkpoints, CheckpointChoice(step=parent.step), warn)
        manifest = self.handle.manifest
        self.values = manifest.values
        self.tensors = {name: GlobalTensor.like(stored) for name, stored in manifest.tensors.items()}
        self._rows = CheckpointRows(self.handle.path, manifest)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor, in its own dtype."""
        try:
            return self._rows.read(name, start, start + length)
        except (DataError, CheckpointError) as error:
            raise CheckpointError(removed_meanwhile(self.handle.path) or str(error)) from None

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that its run keeps."""
        fingerprint = self.handle.run["tokenizer_fingerprint"]
        return tokenizer_of(self._of.folder, self._of.config.data, fingerprint=fingerprint)

    @property
    def parent(self) -> Parent | None:
        """Entry of its run in the record of the new one."""
        return self._of.as_parent(self.handle.manifest)

    def record(self) -> dict[str, Any]:
        """Return its run and step."""
        return {"run": self._of.config.name, "step": self.handle.step, "folder": str(self.handle.path)}

    def close(self) -> None:
        """Close its files."""
        self._rows.close()


class PublishedTensors(ParentTensors):
    """Tensors of a published folder, as those of our model of the same config."""

    def __init__(self, parent: PublishedParent) -> None:
        """Open the folder, and check that it has every tensor that its config.json promises.

        Raises:
            CheckpointError: if it has not.
        """
        self._of, self.where, self.model = parent, parent.where, parent.model
        folder, foreign = parent.folder, parent.foreign
        with ExitStack() as stack:
            source = stack.enter_context(open_published(folder, foreign.quantization))
            links = check_foreign_tensors(source, foreign.family.links(foreign.model, foreign.vocab_size), foreign)
            with torch.device("meta"):
                shapes = tensors_of(GPT(parent.model, foreign.vocab_size))
            linked = {link.ours for link in links}
            self.tensors = {
                WEIGHT + name: GlobalTensor(shape=tuple(tensor.shape))
                for name, tensor in shapes.items()
                if name in linked
            }
            self._rows = LinkedWeights(source, links, self.tensors, {})
            self._open = stack.pop_all()

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor, in float32."""
        return self._rows.read(name, start, length)

    def tokenizer(self) -> Tokenizer | None:
        """Return the folder's tokenizer; None if it has none."""
        folder = self._of.folder
        return read_tokenizer(folder.path, end_of_document=None) if folder.has(TOKENIZER) else None

    def record(self) -> dict[str, Any]:
        """Return its family and folder."""
        return {"family": self._of.foreign.family.name, "folder": str(self._of.folder.path.absolute())}

    def close(self) -> None:
        """Close its files."""
        self._open.close()


def open_parent(parent: RunParent | PublishedParent, *, warn: Callable[[str], None]) -> ParentTensors:
    """Open a parent's tensors; of a run after verifying every byte.

    Raises:
        CheckpointError: if they are damaged or incomplete.
    """
    return PublishedTensors(parent) if isinstance(parent, PublishedParent) else RunTensors(parent, warn=warn)
