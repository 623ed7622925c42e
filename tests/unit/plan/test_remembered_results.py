"""Results that are remembered are those that torch's fake tensors compute."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from trainer.plan.remembered_results import RememberedResults


class _Remembering(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.results = RememberedResults()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.results.run(func, args, kwargs or {})


@pytest.fixture
def fakes() -> Iterator[None]:
    with FakeTensorMode(), _Remembering():
        yield


def _attended(x: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x @ x.T,
    "view": lambda x: x.view(2, -1),
    "a part at an offset": lambda x: x[1:, 2:],
    "transposed": lambda x: x.T,
    "parts": lambda x: x.split([1, 3]),
    "in place": lambda x: x.add_(1),
    "positions": lambda x: x.topk(2),
    "joined": lambda x: torch.cat([x, x.new_zeros(1, 6)]),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "integers": lambda x: x.argsort(dim=1)[:, :1].expand(-1, 3),
    "attention": lambda x: _attended(x.view(1, 1, 4, 6)),
}


def _facts(values: Any, x: Tensor) -> list[Any]:
    tensors = [values] if isinstance(values, Tensor) else list(values)
    shapes = [(type(one), one.shape, one.stride(), one.dtype, one.device, one.requires_grad) for one in tensors]
    storages = [one.untyped_storage() for one in tensors]
    owners = [(one is x, own._cdata == x.untyped_storage()._cdata) for one, own in zip(tensors, storages, strict=True)]
    return [shapes, owners, [one.storage_offset() for one in tensors], [own.nbytes() for own in storages]]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_result_is_the_same_each_time(fakes: None, name: str) -> None:
    first, second, plain = (torch.empty(4, 6) for _ in range(3))
    computed = _facts(OPERATIONS[name](first), first)
    assert _facts(OPERATIONS[name](second), second) == computed
    with _disable_current_modes(), FakeTensorMode():
        plain = torch.empty(4, 6)
        assert _facts(OPERATIONS[name](plain), plain) == computed


@pytest.mark.parametrize("made", [lambda n: torch.full((2,), n), lambda n: torch.zeros(2) + n, lambda n: torch.ones(n)])
def test_equal_numbers_of_other_types_and_other_sizes_are_not_confused(fakes: None, made: Any) -> None:
    kinds = [made(n) for n in (1, 2, *((1.0, True) if made(1).numel() == 2 else ()))]
    with _disable_current_modes(), FakeTensorMode():
        plain = [made(n) for n in (1, 2, *((1.0, True) if made(1).numel() == 2 else ()))]
    assert [(x.shape, x.dtype) for x in kinds] == [(x.shape, x.dtype) for x in plain]


def test_what_changes_its_argument_is_done_each_time(fakes: None) -> None:
    for _ in range(2):
        x = torch.empty(4, 6)
        x.resize_(8, 6)
        assert x.shape == (8, 6)
        x.t_()
        assert x.shape == (6, 8)


def test_gradients_pass_through_remembered_results(fakes: None) -> None:
    for _ in range(2):
        x = torch.empty(4, 6, requires_grad=True)
        (x.view(2, 12).sin()[1:] * 2).sum().backward()
        assert isinstance(x.grad, FakeTensor) and x.grad.shape == (4, 6)


def test_no_tensor_is_kept(fakes: None) -> None:
    gc.disable()
    try:
        storages = []
        for _ in range(2):
            x = torch.empty(4, 6)
            parts = x.split([1, 3])
            storages.append(weakref.ref(x.untyped_storage()))
            del x, parts
        assert [storage() for storage in storages] == [None, None]
    finally:
        gc.enable()
