"""A reader of tensors that shows on the screen how much of them has been read."""

from torch import Tensor

from trainer.checkpoint.streamed import TensorReader
from trainer.console.console import ProgressBar


class WatchedTensors:
    """Tensors of another reader."""

    def __init__(self, reader: TensorReader, bar: ProgressBar) -> None:
        self._reader, self._bar = reader, bar

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return some indices of dimension 0 of a tensor."""
        rows = self._reader.read(name, start, length)
        self._bar.update(self._bar.done_bytes + rows.nbytes)
        return rows
