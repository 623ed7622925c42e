"""The blocks of a model, by their number in it: all of them, or those that one stage of a pipeline keeps."""

from collections.abc import Collection, Iterator
from typing import cast

from torch import nn

from trainer.models.block import Block


class Blocks(nn.ModuleList):
    """Blocks of a model, by their number: all, or those that are kept."""

    def keep(self, layers: Collection[int]) -> None:
        """Give up all blocks but some; these keep their names."""
        self._modules = {name: block for name, block in self._modules.items() if int(name) in layers}

    @property
    def numbers(self) -> list[int]:
        """Numbers of those that are here, in order."""
        return [int(name) for name in self._modules]

    def numbered(self, layers: Collection[int] | None = None) -> Iterator[tuple[int, Block]]:
        """Yield number and block of those that are here, or that are here and in `layers`."""
        for name, block in self._modules.items():
            if layers is None or int(name) in layers:
                yield int(name), cast(Block, block)
