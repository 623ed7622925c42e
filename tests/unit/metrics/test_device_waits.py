"""Everything that would wait for a GPU is counted, once, with its place; what needs no wait is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.metrics import device_waits
from trainer.metrics.device_waits import DeviceWaits, Wait
from trainer.moe.routing import RoutingDecision

WAITING: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "item": (1, lambda x: x[0].item()),
    "float": (1, lambda x: float(x[0])),
    "int": (1, lambda x: int(x.sum())),
    "bool": (1, lambda x: bool((x > 0).any())),
    "tolist": (1, lambda x: x.tolist()),
    "numpy": (1, lambda x: x.numpy()),
    "array": (1, lambda x: np.asarray(x)),
    "cpu": (1, lambda x: x.cpu()),
    "to cpu": (1, lambda x: x.to("cpu")),
    "equal": (1, lambda x: torch.equal(x, x + 1)),
    "nonzero": (1, lambda x: x.nonzero()),
    "argwhere": (1, lambda x: torch.argwhere(x)),
    "where of one": (1, lambda x: torch.where(x > 0)),
    "bincount": (2, lambda x: torch.bincount(x, minlength=9)),
    "mask": (1, lambda x: x[x > 1]),
    "mask assigned rows": (1, lambda x: x.__setitem__(x > 1, torch.zeros(2, dtype=torch.int64))),
    "masked_select": (1, lambda x: x.masked_select(x > 1)),
    "unique": (1, lambda x: x.unique()),
    "repeat_interleave": (1, lambda x: x.repeat_interleave(x)),
    "split by a tensor": (1, lambda x: x.split(torch.bincount(x.clamp(max=0)).tolist())),
    "two": (2, lambda x: (x.sum().item(), x.max().item())),
}
WAITING["split by a tensor"] = (3, WAITING["split by a tensor"][1])  # its bincount waits, too
FREE: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x.sum(),
    "scatter_add": lambda x: x.new_zeros(9).scatter_add(0, x, x),
    "index": lambda x: x[x],
    "mask filled with a number": lambda x: x.__setitem__(x > 1, 0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "where of three": lambda x: torch.where(x > 1, x, 0),
    "repeat_interleave by a number": lambda x: x.repeat_interleave(2),
    "repeat_interleave of a known size": lambda x: torch.repeat_interleave(x, x, output_size=6),
    "sort": lambda x: x.sort(stable=True),
    "shape": lambda x: x.shape[0] + len(x),
    "a size made on the host": lambda x: torch.tensor([1, 2]).cumsum(0).tolist(),
    "a host factory": lambda x: torch.arange(3).view(3, 1).T.reshape(-1).tolist(),
}


def _tensor() -> Tensor:
    return torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("name", WAITING)
def test_what_asks_for_values_is_a_wait(name: str) -> None:
    expected, ask = WAITING[name]
    x = _tensor()
    with DeviceWaits() as counted:
        ask(x)
    assert len(counted.waits) == expected and not counted.copies


@pytest.mark.parametrize("name", FREE)
def test_what_asks_for_nothing_is_none(name: str) -> None:
    x = _tensor()
    with DeviceWaits() as counted:
        FREE[name](x)
    assert not counted.waits and not counted.copies


def test_a_line_that_only_the_cpu_runs_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_waits, "_PACKAGE", Path(__file__).parent)
    x = _tensor()
    with DeviceWaits() as counted:
        assert x.device.type == "cpu" and bool(x.any())
        assert not counted.waits
        assert bool(x.any())
    assert [wait.place.partition(":")[0] for wait in counted.waits] == [Path(__file__).name]


@pytest.mark.parametrize("name", WAITING)
def test_nothing_waits_for_tensors_on_the_host(name: str) -> None:
    x = _tensor()
    with DeviceWaits() as counted:
        counted.on_host([x])
        WAITING[name][1](x)
    assert not counted.waits


def test_a_copy_to_the_device_is_on_the_device() -> None:
    x, device = _tensor(), torch.device("cpu")
    with DeviceWaits() as counted:
        counted.on_host([x])
        there = x.to(device, non_blocking=True)
        assert not counted.copies
        assert there.sum().item() == 6 and len(counted.waits) == 1
        x.to(device)
        torch.tensor([1, 2], device=device)
        there.copy_(x)
        assert [copy.operation for copy in counted.copies] == ["to", "tensor", "aten::copy_"]
        x.copy_(there)
    assert [wait.operation for wait in counted.waits] == ["aten::_local_scalar_dense", "aten::copy_"]


def test_a_wait_has_the_place_of_our_line() -> None:
    chosen = torch.ones(3, 2, dtype=torch.bool)
    with DeviceWaits() as counted:
        RoutingDecision.from_mask(chosen, chosen.double(), valid=chosen[:, 0])
    (wait,) = counted.waits
    assert wait.place.startswith("moe/routing.py:") and wait.operation == "tolist"
    assert (counted.within("moe/"), counted.within("engine/"), counted.within("moe/routing.py", "ops/")) == (1, 0, 1)


class _Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


def test_waits_of_a_backward_pass_count() -> None:
    x = torch.ones(3, requires_grad=True)
    with DeviceWaits() as counted:
        value = _Asking.apply(x).sum()
        assert not counted.waits
        value.backward()
    assert [wait.operation for wait in counted.waits] == ["aten::_local_scalar_dense"]
    x.sum().item()
    assert counted.by_place() == {Wait("", "aten::_local_scalar_dense"): 1}
