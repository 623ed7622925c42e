"""Open safetensors files of a folder, so that a header is read once and not for each of its tensors."""

import weakref
from collections import OrderedDict
from typing import Final

from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.shard_file import ShardFile

_MAX_OPEN: Final = 16


class OpenShards:
    """Files that stay open between reads, a few at a time; closed by `close`, or with this object."""

    def __init__(self, folder: ForeignFolder) -> None:
        self._folder = folder
        self._open: OrderedDict[str, ShardFile] = OrderedDict()
        self.close = weakref.finalize(self, _close_all, self._open)

    def shard(self, file: str) -> ShardFile:
        """Return an open file; the one that was used longest ago is closed if there are many.

        Raises:
            CheckpointError: if it is damaged.
            DataError: if it cannot be opened.
        """
        if file not in self._open:
            if len(self._open) == _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[file] = ShardFile(self._folder, file)
        self._open.move_to_end(file)
        return self._open[file]


def _close_all(shards: OrderedDict[str, ShardFile]) -> None:
    for shard in shards.values():
        shard.close()
    shards.clear()
