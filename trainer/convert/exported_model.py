"""Exported model: a checkpoint's weights, as a model of a family."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from trainer.convert.checkpoint_weights import CheckpointWeights
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import CheckpointError
from trainer.families.base import Family
from trainer.families.link import Link, coverage_problems
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT

ExportDType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)  # no slots: the links are cached
class ExportedModel:
    """A model of one of our checkpoints, as their family has it."""

    family: Family
    config: ModelConfig
    weights: CheckpointWeights
    tokenizer: Tokenizer
    dtype: ExportDType
    published_positions: int = 0
    """Positions of the published model that the run was imported from; 0 if it was not."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.weights.shapes["embedding.weight"][0]

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """A link for every tensor of theirs."""
        return tuple(self.family.links(self.config, self.vocab_size))

    def link(self, theirs: str) -> Link:
        """Return the link of one of their tensors."""
        return self._by_name[theirs]

    @cached_property
    def _by_name(self) -> dict[str, Link]:
        return {link.theirs: link for link in self.links}

    def check_coverage(self) -> None:
        """Raise a CheckpointError unless theirs has every element of the checkpoint's model once, but zeros."""
        zero = set(self.family.zero_tensors(self.config))
        linked = {name: shape for name, shape in self.weights.shapes.items() if name not in zero}
        where = f"{self.weights.folder}: cannot be exported to {self.family.name}"
        for problem in coverage_problems(self.links, linked):
            raise CheckpointError(f"{where}: {problem}")
        for name in sorted(zero):
            if any(bool(block.any()) for _, block in self.weights.blocks(name)):
                raise CheckpointError(f"{where}: {name} is not zero, and {self.family.name} has no such tensor")

    def dtype_of(self, link: Link) -> torch.dtype:
        """Return the dtype of their tensor."""
        return torch.float32 if link.is_float32 else getattr(torch, self.dtype)

    def parts(self, link: Link) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield their tensor from the checkpoint: whole, or in parts with their ranges of dimension 0."""
        for rows, part in self.weights.parts(link):
            yield rows, part.to(self.dtype_of(link)).contiguous()

    def reference(self) -> GPT:
        """Return our model in float32, with the weights rounded as in the export, read without any link."""
        with torch.device("meta"):
            model = GPT(self.config, self.tokenizer.vocab_size, experts_kernel="loop")
        model.to_empty(device="cpu")
        exact = {link.ours for link in self.links if link.is_float32}
        with torch.no_grad():
            for name, mine in _tensors(model):
                dtype = torch.float32 if name in exact else getattr(torch, self.dtype)
                for start, block in self.weights.blocks(name):
                    mine[start : start + len(block)] = block.to(dtype)
        return model.float().eval()


def _tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
