"""Count the bytes of the tensors that are alive, real or fake, and their peak by window of a step."""

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trainer.lab.costs.plain_tensor_mode import PlainTensorMode

Window = tuple[str, int | None]
"""Phase of a step, and the block that is computed in it; None: what belongs to no block."""

_Storage = torch.UntypedStorage


class OverLimit(RuntimeError):
    """Tensors that need more bytes than they may."""


class TensorBytes(PlainTensorMode):
    """Counts the storages that operations inside the context return, each once and whole, until it is freed.

    What a kernel of torch allocates and frees inside one operation is not seen. `limit` bytes alive at once raise
    `OverLimit`, as an allocator of so much memory would.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.limit = limit
        self.window: Window = ("start", None)
        self.peaks: dict[Window, int] = {}
        """Most bytes that were alive in each window."""
        self._sizes: dict[int, tuple[weakref.ref[_Storage], int]] = {}
        self._resize = _Storage.resize_

    def enter(self, phase: str, block: int | None = None) -> None:
        """Begin a window; one that was there before goes on."""
        self.window = (phase, block)
        self._note()

    def __enter__(self) -> Self:
        """Begin to count; storages that are resized in place, as FSDP does, are followed."""
        counter, resize = self, self._resize

        def followed(storage: _Storage, size: int) -> Any:
            result = resize(storage, size)
            counter._add(storage)
            return result

        _Storage.resize_ = followed  # pyrefly: ignore[bad-assignment]
        return super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """End the count."""
        _Storage.resize_ = self._resize
        super().__exit__(exc_type, exc_val, exc_tb)

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and add what it returns."""
        out = func(*args, **kwargs)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: _Storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is not None and known[1] == size:
            return
        reference = weakref.ref(storage, lambda _: self._free(key)) if known is None else known[0]
        self._sizes[key] = (reference, size)
        self.live += size - (0 if known is None else known[1])
        self._note()

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)[1]

    def _note(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peaks[self.window] = max(self.peaks.get(self.window, 0), self.live)
        if self.limit is not None and self.live > self.limit:
            raise OverLimit(f"{self.live} bytes of tensors, and {self.limit} are allowed")
