"""A dispatch mode that sees operations on plain tensors, real or fake, and none on tensors of parts."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

_DEVICE = torch.ops.prim.device.default
_PLAIN = (Tensor, Parameter, FakeTensor)


class PlainTensorMode(TorchDispatchMode):
    """Passes each operation on plain tensors to `operation`; of tensors of parts, the operations on these."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing is compiled here, and torch's guard against it takes longer than most operations."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than anything is computed
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented
        return self.operation(func, args, kwargs or {})

    @abstractmethod
    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on plain tensors; return what it returns."""
