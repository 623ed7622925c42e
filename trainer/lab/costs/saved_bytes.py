"""Memory that a computation keeps or reaches: tensors saved for the backward pass, and the peak."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


@contextmanager
def counting_saved_bytes(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Yield the sizes in bytes, by address, of the storages that are saved for the backward pass inside the context.

    A storage counts once, whole, however many tensors share it. Those of `parameters` do not count, but their copies
    in another dtype do.
    """
    left_out = {_local(p).untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in left_out:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor  # alive until the backward pass, so that no address is used twice

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _local(tensor: Tensor) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that `run` allocates at a time, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Every block of the CPU allocator is an event, those of compiled code included, which a dispatch mode misses.
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what the profiler's library writes to standard error, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
