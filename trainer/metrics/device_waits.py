"""Count the places where the host would wait for a GPU, on any machine.

A GPU runs behind the host as long as the host does not ask for a value or for a size that depends on values. Each such
question empties the queue and costs the time of what was queued, so a training step should ask as seldom as possible.
What asks is visible in the operations, whatever device runs them: here every tensor counts as being on the GPU, but for
those that the code makes without a `device` (`torch.tensor(sizes)`), what follows from them alone, and what `on_host`
names.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_PACKAGE = Path(__file__).resolve().parents[1]
_ASKS: Final = {
    "aten::_local_scalar_dense": 1,  # item, int, float, bool
    "aten::equal": 1,
    "aten::nonzero": 1,
    "aten::bincount": 2,  # for the smallest and the largest value
    "aten::masked_select": 1,
    "aten::_unique2": 1,
    "aten::unique_dim": 1,
    "aten::unique_consecutive": 1,
}
_INDEXES: Final = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_READS: Final = (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__)  # on the CPU they are no operations
_FROM_HOST: Final = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer, torch.asarray)


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait for the device, or a copy from pageable memory to it."""

    place: str
    """File and line of the innermost frame in this package, such as `moe/stats.py:97`; `` for none."""
    operation: str


class DeviceWaits:
    """Counts waits for the device between `__enter__` and `__exit__`, on this thread and in backward passes.

    A line that asks for the device type `cpu` itself is not on the GPU's path and does not count.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.copies: list[Wait] = []
        """Copies of pageable memory to the device, for which the host waits only until they are staged."""
        self._host = WeakTensorKeyDictionary()
        self._makes_on_host = False
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        """Start to count."""
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._modes.close()

    def on_host(self, tensors: Iterable[Tensor]) -> None:
        """Declare tensors to be on the host, such as batches that are not moved yet."""
        for tensor in tensors:
            self._host[tensor] = True

    def by_place(self) -> Counter[Wait]:
        """Return the number of waits by place and operation."""
        return Counter(self.waits)

    def within(self, *rooms: str) -> int:
        """Return the waits whose place is in one of these folders or files of the package."""
        return sum(wait.place.startswith(rooms) for wait in self.waits)

    def is_on_host(self, value: object) -> bool:
        """Return whether all tensors in a value are on the host; False without tensors."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return bool(tensors) and all(tensor in self._host for tensor in tensors)

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function of torch's Python interface, and count what is no operation on the CPU."""
        options = [arg for arg in (*args[1:], *kwargs.values()) if not isinstance(arg, Tensor)]
        if func in _READS or (func is Tensor.to and "cpu" in options):
            if not self.is_on_host(args[0]):
                self._note(self.waits, func.__name__)
            return self._as_host(func(*args, **kwargs))
        if func is Tensor.to and self.is_on_host(args[0]):
            out = func(*args, **kwargs)
            if not any(isinstance(option, str | torch.device) for option in options):
                return out
            if not kwargs.get("non_blocking", False):
                self._note(self.copies, "to")
            return self._off_host(out)
        makes = not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))
        if func in _FROM_HOST and makes and kwargs.get("device") is not None:
            self._note(self.copies, func.__name__)
            return func(*args, **kwargs)
        before, self._makes_on_host = self._makes_on_host, makes and "device" not in kwargs
        try:
            out = func(*args, **kwargs)
        finally:
            self._makes_on_host = before
        return self._as_host(out) if func in _FROM_HOST and makes else out

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation, and count it if it waits."""
        name = func._schema.name
        has_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        asked = args[:2] if name in _INDEXES else (args, kwargs)  # a mask on the host, whatever is written there
        on_host = self.is_on_host(asked) if has_tensors else self._makes_on_host
        if not on_host:
            for _ in range(_times(name, args, kwargs)):
                self._note(self.waits, name)
            if name == "aten::copy_" and not (len(args) > 2 and args[2]) and args[0].dim() > 0:
                to_host, from_host = (tensor in self._host for tensor in args[:2])
                if to_host != from_host:
                    self._note(self.waits if to_host else self.copies, name)
        out = func(*args, **kwargs)
        return self._as_host(out) if on_host else out

    def _as_host(self, out: Any) -> Any:
        self.on_host(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def _off_host(self, out: Tensor) -> Tensor:
        """Return a tensor that is another object than one on the host, as after a move."""
        copy = out.detach()
        self._host.pop(copy, None)
        return copy

    def _note(self, waits: list[Wait], operation: str) -> None:
        path, line = _place()
        if path is None or 'device.type == "cpu"' not in linecache.getline(path, line):
            place = "" if path is None else f"{Path(path).relative_to(_PACKAGE)}:{line}"
            waits.append(Wait(place, operation))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._waits.function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._waits.operation(func, args, kwargs or {})


def _times(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return how often an operation waits on a GPU."""
    if name in _INDEXES:  # a mask becomes the numbers of its entries, except to fill them with one value
        is_fill = name != "aten::index" and args[2].numel() == 1
        return sum(index is not None and index.dtype is torch.bool for index in args[1]) if not is_fill else 0
    if name == "aten::repeat_interleave":
        return int(kwargs.get("output_size") is None)
    return _ASKS.get(name, 0)


def _place() -> tuple[str | None, int]:
    """Return file and line of the innermost frame in this package, this file left out."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(f"{_PACKAGE}/"):
            return path, frame.f_lineno
        frame = frame.f_back
    return None, 0
