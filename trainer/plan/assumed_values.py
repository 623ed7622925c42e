"""Fake tensors whose integers are known: those that become sizes of messages and rows have assumed values.

Floating-point tensors have no values. Positions of the largest of them, by which routers choose, are answered by an
`AssumedLoad`; integers that are computed from these and from sizes are computed for real, beside the fake tensors. So
the code that reads them goes on as in training. Every rank of a group is assumed to have what this rank has.

# T tokens, k experts per token, E experts, G ranks of a group.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from trainer.lab.costs.plain_tensor_mode import PlainTensorMode
from trainer.plan.assumed_load import AssumedLoad
from trainer.plan.remembered_results import RememberedResults

aten = torch.ops.aten
_MAX_KNOWN = 1 << 22
"""Elements of a tensor whose values are kept."""
_POSITIONS = {aten.argmax.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.topk.default}
_LIKE = {aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones}
_LIKE |= {aten.new_full, aten.new_empty, aten.new_empty_strided}
"""Operations that take nothing but the shape of their input."""


class UnknownValue(RuntimeError):
    """A value that depends on floating-point numbers, which are not computed."""


class AssumedValues(PlainTensorMode):
    """Computes integers beside fake tensors. To be entered inside a `FakeTensorMode`."""

    def __init__(self, load: AssumedLoad | None = None) -> None:
        """Answer the choices of routers by a load; None: a model without experts."""
        super().__init__()
        self.load, self._tolist, self._results = load, FakeTensor.tolist, RememberedResults()

    def __enter__(self) -> Self:
        """Begin; lists are read whole, which torch does element by element."""
        plain = self._tolist

        def read(tensor: FakeTensor) -> Any:
            known = _known(tensor)
            if known is None:
                return plain(tensor)
            with _disable_current_modes():
                return known.tolist()

        FakeTensor.tolist = read  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """End."""
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(exc_type, exc_val, exc_tb)

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on fake tensors, and on the values of its integers if they are known."""
        if func is aten._local_scalar_dense.default:
            return _read(args[0])
        if func.namespace == "c10d":
            out = func(*args, **kwargs)
            _communicate(func.name().removeprefix("c10d::").strip("_"), args)
            return out
        try:
            is_grouped = func is aten._grouped_mm.default
            out = _grouped(*args, **kwargs) if is_grouped else self._results.run(func, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            values = _compute(func, args, kwargs)
            if values is None:
                raise UnknownValue(f"the size of what {func} returns depends on values that are not computed") from None
            # FakeTensorMode may be off meanwhile: torch does so where it expects no fake tensors.
            with next(leaf.fake_mode for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)):
                out = tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype), values)
            _give(out, values)
            return out
        leaves = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        integers = [leaf for leaf in leaves if isinstance(leaf, Tensor) and _is_integer(leaf)]
        if integers and all(leaf.numel() <= _MAX_KNOWN for leaf in integers):
            is_choice = func in _POSITIONS and not _is_integer(args[0])
            _give(out, self._choices(func, *args, **kwargs) if is_choice else _compute(func, args, kwargs))
        return out

    def _choices(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return self._positions(func, *args, **kwargs)

    def _positions(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return assumed positions of the best values of x, in the form in which the operation returns them."""
        number = args[0] if func is aten.topk.default else None
        given = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
        dim = given.get("dim", -1)
        if dim is None:
            return torch.zeros((), dtype=torch.int64)
        dim %= x.dim()
        length, load = x.shape[dim], self.load
        is_of_experts = load is not None and x.dim() == 2 and dim == 1 and length >= load.num_experts
        if func is aten.argmax.default:
            turn = vars(x).get("turn", 0)  # experts are taken one after the other, each from what is left
            x.turn = turn + 1  # type: ignore[attr-defined]
            if is_of_experts and turn < load.top_k:
                found = load.choice(len(x))[:, turn : turn + 1]
            else:
                found = torch.full([1 if d == dim else n for d, n in enumerate(x.shape)], turn % length)
            return found if given.get("keepdim", False) else found.squeeze(dim)
        if is_of_experts:
            order = load.order(len(x))
            nulls = torch.arange(load.num_experts, length).expand(len(x), -1)
            order = torch.cat([order, nulls], dim=1)
        else:
            shape = [1] * x.dim()
            shape[dim] = length
            order = torch.arange(length).view(shape).expand(x.shape)
        order = order if number is None else order.narrow(dim, 0, number)
        return order.contiguous() if func is aten.argsort.default else (None, order.contiguous())


_ARGUMENTS: dict[Any, Sequence[str]] = {
    aten.argmax.default: ("dim", "keepdim"),
    aten.sort.default: ("dim", "descending"),
    aten.sort.stable: ("stable", "dim", "descending"),
    aten.argsort.default: ("dim", "descending"),
    aten.topk.default: ("k", "dim"),
}


def _grouped(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the result of torch's grouped product, whose own fake one knows bfloat16 only."""
    shape = (left.shape[0], right.shape[-1])
    return left.new_empty(shape if right.dim() == 3 else (len(offs), *shape))


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _known(x: Tensor) -> Tensor | None:
    """Return the values of an integer tensor; None if they are not known."""
    return vars(x).get("assumed") if isinstance(x, FakeTensor) else x


def _give(out: Any, values: Any) -> None:
    """Let fake tensors have values, of a result of the same structure; None: they are not known."""
    if isinstance(out, Tensor):
        out.assumed = values if isinstance(values, Tensor) and _is_integer(out) else None  # type: ignore[attr-defined]
    elif isinstance(out, (tuple, list)):
        for i, one in enumerate(out):
            _give(one, None if values is None else values[i])


def _read(x: Tensor) -> Any:
    """Return the value of a scalar; numbers that are not integers are 1, so that losses and norms are finite."""
    known = _known(x)
    if known is not None:
        with _disable_current_modes():
            return known.item()
    if not _is_integer(x):
        return 1.0
    raise UnknownValue("a size depends on values that are not computed")


class _NotKnown(Exception):
    pass


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation on the values of its integers; None if these are not all known."""
    is_like = func.overloadpacket in _LIKE

    def value(x: Tensor) -> Tensor:
        known = _known(x)
        if known is not None and (_is_integer(known) or not isinstance(x, FakeTensor)):
            return known
        if is_like or (x.numel() == 1 and not _is_integer(x)):
            return torch.ones(x.shape, dtype=x.dtype)
        raise _NotKnown

    with _disable_current_modes():
        try:
            args, kwargs = _each(args, value), {name: _each(x, value) for name, x in kwargs.items()}
        except _NotKnown:
            return None
        return func(*args, **kwargs)


def _each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return values with each tensor changed, also those in lists."""
    if isinstance(values, Tensor):
        return change(values)
    return type(values)(_each(one, change) for one in values) if type(values) in (list, tuple) else values


def _communicate(name: str, args: Sequence[Any]) -> None:
    """Give the integers that a collective returns the values that they have if every rank has those of this one."""
    handle = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
    if handle is None:
        return
    group = dist.ProcessGroup.unbox(handle)
    size, me = group.size(), group.rank()
    with _disable_current_modes():
        if name == "recv":  # torch's pipelines vote by these on whether shapes are known, and each rank says 1
            for x in args[0]:
                _give(x, torch.ones(x.shape, dtype=x.dtype) if _is_integer(x) else None)
        elif name == "allreduce":
            for x in args[0]:
                if _is_integer(x):
                    _give(x, _after(_known(x), lambda value: value * size))
        elif name == "allgather":
            for parts, x in zip(args[0], args[1], strict=True):
                for part in parts:
                    _give(part, _after(_known(x) if _is_integer(x) else None, Tensor.clone))
        elif name == "allgather_base":
            x = args[1]
            _give(args[0], _after(_known(x) if _is_integer(x) else None, lambda value: torch.cat([value] * size)))
        elif name == "alltoall_base" and _is_integer(args[1]):
            sizes = args[4] or [len(args[1]) // size] * size
            start = sum(sizes[:me])
            mine = _after(_known(args[1]), lambda value: torch.cat([value[start : start + sizes[me]]] * size))
            _give(args[0], None if mine is None or mine.shape != args[0].shape else mine)


def _after(value: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if value is None else change(value)
