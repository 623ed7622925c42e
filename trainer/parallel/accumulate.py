"""Accumulation over the micro-batches of a step with sharded weights: what stays whole between them.

    keeps      weights are gathered          gradients are reduced   whole on every rank between micro-batches
    nothing    forward and backward of each  after each              nothing
    gradients  once more than micro-batches  after the last          float32 gradients; weights while there are no
                                                                     activations, from a backward to the next forward
    weights    once                          after the last          float32 gradients, and weights all the time

A counting pass (`balance.counts: exact`) gathers twice more for each micro-batch if nothing is kept; otherwise not at
all: it saves no activations, so weights stay from its first micro-batch to the forward pass of the first.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from trainer.models.gpt import GPT

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@contextmanager
def step_of(model: GPT) -> Iterator[None]:
    """Keep gathered weights during the counting pass of a step, unless nothing is kept; see `before_forward`."""
    _free_after_forward(model, model.shard_keeps == "nothing")
    yield
    _free_after_forward(model, True)  # an evaluation must not leave weights that grow stale


def free_gathered(model: nn.Module) -> None:
    """Free gathered weights, which would be stale once the shards are overwritten: the model's own group stays."""
    for module in model.modules():
        if _is_group(module):
            module.reshard()


def before_forward(model: GPT) -> None:
    """Choose whether the next forward pass that saves activations frees the weights, or its backward pass does."""
    _free_after_forward(model, model.shard_keeps != "weights")


def _free_after_forward(model: nn.Module, frees: bool) -> None:
    for module in model.modules():
        if _is_group(module) and module is not model:  # the model's own group stays in any case
            module.set_reshard_after_forward(frees, recurse=False)


def before_backward(model: GPT, *, is_last: bool) -> None:
    """Choose what the next backward pass reduces and frees; the last one of a step reduces and frees everything."""
    reduces = is_last or model.shard_keeps == "nothing"
    if not _is_group(model):
        return
    model.set_requires_gradient_sync(reduces)
    model.set_requires_all_reduce(is_last)  # between copies: sums of shards wait for the last
    model.set_reshard_after_backward(reduces)
    model.set_is_last_backward(is_last)


def _is_group(module: object) -> "TypeGuard[FSDPModule]":
    fsdp = sys.modules.get("torch.distributed.fsdp")  # unless it is imported, nothing is sharded
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
