"""Remember what operations on fake tensors return: shapes and aliases follow from shapes, which repeat in every layer.

torch's own cache of fake tensors serves every feature of theirs, and its keys take longer than all else in a fake step.
This one is for what a plan has: strided tensors without symbols.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_FAKE: Final = torch._C._TorchDispatchModeKey.FAKE
_NUMBERS: Final = (bool, int, float)
_OPAQUE: Final = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class _Unusual(Exception):
    """An argument or a result that is not remembered."""


@dataclass(frozen=True, slots=True)
class _Result:
    """Tensor that an operation returns."""

    argument: int | None
    """Tensor argument whose memory it has; None: it has its own."""
    is_same: bool
    """It is this argument itself."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    state: dict[str, Any]
    """Attributes of a fake tensor."""

    def made(self, mode: FakeTensorMode, tensors: list[FakeTensor]) -> FakeTensor:
        """Return such a tensor."""
        if self.is_same:
            assert self.argument is not None
            return tensors[self.argument]
        if self.argument is None:
            plain = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        else:
            plain = torch.empty_strided((0,), (1,), dtype=self.dtype, device="meta")
            plain.set_(tensors[self.argument].untyped_storage(), self.offset, self.shape, self.stride)
        fake = Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        fake.__dict__.update(self.state, fake_mode=mode)
        return fake


class RememberedResults:
    """Results of operations by the shapes of their arguments."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}
        """Results, in the structure in which the operation returns them; None: to be computed each time."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation, computed by the `FakeTensorMode` the first time."""
        mode = torch._C._get_dispatch_mode(_FAKE)
        tensors: list[FakeTensor] = []
        try:
            key = _key(mode, func, args, kwargs, tensors)
            known = self._known.get(key, key)
        except (_Unusual, TypeError):  # or one without a hash
            return func(*args, **kwargs)
        if known is None:
            return func(*args, **kwargs)
        if known is not key:
            with in_kernel_invocation_manager(mode):
                return _made(known, mode, tensors)
        out = func(*args, **kwargs)
        again: list[FakeTensor] = []
        try:
            is_as_before = _key(mode, func, args, kwargs, again) == key
            self._known[key] = _described(func, out, tensors) if is_as_before else None
        except _Unusual:
            self._known[key] = None
        return out


def _key(mode: Any, func: Any, args: Any, kwargs: Any, tensors: list[FakeTensor]) -> tuple[Any, ...]:
    if mode is None:
        raise _Unusual
    found = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    _add(found, mode, args, tensors)
    for name, value in kwargs.items():
        found.append(name)
        _add(found, mode, (value,), tensors)
    return tuple(found)


def _add(found: list[Any], mode: FakeTensorMode, values: Any, tensors: list[FakeTensor]) -> None:
    """Add what is known of values to a key."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.fake_mode is not mode or value.constant is not None or value.layout is not torch.strided:
                raise _Unusual
            tensors.append(value)
            found += (value.dtype, value._fake_device, value.shape, value.stride(), value.storage_offset())
        elif isinstance(value, (list, tuple)):
            found += (type(value), len(value))
            _add(found, mode, value, tensors)
        elif isinstance(value, Tensor):
            raise _Unusual
        else:
            found += (type(value), value) if isinstance(value, _NUMBERS) else (value,)


def _described(func: Any, out: Any, tensors: list[FakeTensor]) -> Any:
    """Return what is needed to make such a result again."""
    if func.namespace != "aten" or any(tag in func.tags for tag in _OPAQUE):
        raise _Unusual
    if out is None or isinstance(out, FakeTensor):
        return None if out is None else _result(out, tensors)
    if type(out) not in (list, tuple):
        raise _Unusual
    return type(out)(_described(func, each, tensors) for each in out)


def _result(out: FakeTensor, tensors: list[FakeTensor]) -> _Result:
    is_usual = type(out) is FakeTensor and out.constant is None and out.layout is torch.strided
    if not is_usual or out.requires_grad or out.is_conj() or out.is_neg():
        raise _Unusual
    same = next((place for place, tensor in enumerate(tensors) if tensor is out), None)
    memory = out.untyped_storage()._cdata
    owner = next((place for place, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == memory), None)
    return _Result(
        argument=owner if same is None else same,
        is_same=same is not None,
        shape=tuple(out.shape),
        stride=out.stride(),
        offset=int(out.storage_offset()),
        dtype=out.dtype,
        device=out._fake_device,
        state={} if same is not None else {name: value for name, value in vars(out).items() if name != "fake_mode"},
    )


def _made(known: Any, mode: FakeTensorMode, tensors: list[FakeTensor]) -> Any:
    if known is None:
        return None
    if isinstance(known, _Result):
        return known.made(mode, tensors)
    return type(known)(_made(each, mode, tensors) for each in known)
