"""Fresh memory full of NaN, so that whoever returns or sums what it never wrote is seen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_UNINITIALIZED = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
}
_COPIES = 3
"""Buffers of one size that a kernel may hold at once."""


@contextmanager
def poisoned_memory(sizes: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[None]:
    """Make memory that is allocated in this block hold NaN until it is written.

    Buffers of the given sizes are allocated, filled and freed, so the allocator hands the same memory to operations
    that are written in C++, and what Python code, Triton's too, leaves uninitialized is filled. No setting of torch
    changes: `torch.use_deterministic_algorithms` would do the same, but select other kernels than the run's.
    """
    for _ in range(2):  # the first large buffers are returned to the system, the next ones are kept
        buffers = [
            torch.full((size,), torch.nan, dtype=dtype, device=device)
            for size in sizes
            for dtype in dtypes
            for _ in range(_COPIES)
        ]
        del buffers
    with _FillEmpty():
        yield


class _FillEmpty(TorchDispatchMode):
    """Fills what is left uninitialized, in backward passes too."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it would import it, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; fill floating-point memory that it leaves uninitialized."""
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _UNINITIALIZED and out.is_floating_point() and out.device.type != "meta":
            out.fill_(torch.nan)
        return out
