"""The blocks of a model, by their number in it: all of them, or those that one stage of a pipeline keeps."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from trainer.models.block import Block, BlockInputs, Stream
from trainer.models.config import ModelConfig
from trainer.models.kv_cache import Extension
from trainer.moe.routing import RoutingContext
from trainer.moe.stats import MoEStats
from trainer.ops.attention_mask import PreparedMask

# B rows, S tokens in a row, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Inputs of all blocks beside the residual stream of a micro-batch."""

    rotary: Tensor
    context: RoutingContext
    masks: Mapping[int | None, PreparedMask | None] | None = None
    """Mask of each window."""
    extension: Extension | None = None

    def inputs(self, config: ModelConfig, layers: Iterable[int]) -> dict[int, BlockInputs]:
        """Return the inputs of some blocks."""
        windows, number = config.windows, {layer: index for index, layer in enumerate(config.moe_layers)}
        return {
            layer: BlockInputs(
                self.rotary,
                self.context.of_layer(number[layer]) if layer in number else self.context,
                None if self.masks is None else self.masks[windows[layer]],
                None if self.extension is None else self.extension.layer(layer, windows[layer]),
            )
            for layer in layers
        }


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

    def run(
        self, x: Tensor, given: MicroBatch, config: ModelConfig, layers: range
    ) -> tuple[Tensor, tuple[MoEStats, ...]]:
        """Return the residual stream (B, S, D) after some blocks, and the statistics of their MoE layers."""
        inputs, moe = given.inputs(config, layers), []
        for layer, block in self.numbered(layers):
            x, stats = block(x, *inputs[layer])
            if stats is not None:
                moe.append(stats)
        return x, tuple(moe)

    def run_overlapped(
        self, xs: Sequence[Tensor], given: Sequence[MicroBatch], config: ModelConfig, layers: range
    ) -> Iterator[tuple[Tensor, tuple[MoEStats, ...]]]:
        """Yield what `run` returns for each of two micro-batches: tokens of one travel while the other is computed.

        #  attend 1 | send 1 ~~~~~~~~~~~~| experts 1 | send back 1 ~~~~~~| attend 1 ...
        #           | attend 2 | send 2 ~~~~~~~~~~~~~| experts 2 | send back 2 ~~~~~~ ...

        The last tokens of the second are under way until it is asked for. The backward pass runs the nodes of one graph
        in reverse order, so gradients travel likewise, if the objectives are summed.
        """
        inputs = [of_batch.inputs(config, layers) for of_batch in given]
        streams, moe = [Stream(x) for x in xs], []
        for layer, block in self.numbered(layers):
            streams, before = block.overlapped(streams, [of_batch[layer] for of_batch in inputs])
            moe.append(before)
        for number, stream in enumerate(streams):
            x, last = stream.arrived()
            stats = [*(before[number] for before in moe), last]
            yield x, tuple(of_layer for of_layer in stats if of_layer is not None)
