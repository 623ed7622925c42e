"""A rank of a run of many, in one process: fake tensors, torch's fake process group, a mesh that exchanges nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh, mesh_of_groups
from trainer.distributed.rank_layout import Layout
from trainer.distributed.wire_format import Plain
from trainer.plan.assumed_load import AssumedLoad
from trainer.plan.assumed_values import AssumedValues
from trainer.plan.step_probe import WindowRecorder


class AloneGroup(Group):
    """Group whose other members are not there: objects that they would send are assumed to be this rank's own."""

    def any(self, holds: bool) -> bool:
        """Return whether something holds on this rank."""
        return holds

    def agrees(self, value: Plain) -> bool:
        """Return that all members have this rank's value."""
        return True

    def gather_objects(self, value: Plain) -> list[Any] | None:
        """Return this rank's value for every member."""
        return self.all_gather_objects(value)

    def all_gather_objects(self, value: Plain) -> list[Any]:
        """Return this rank's value for every member."""
        return [value for _ in self.ranks]

    def broadcast_object(self, value: Plain) -> Any:
        """Return this rank's value."""
        return value


@contextmanager
def fake_mesh(layout: Layout) -> Iterator[Mesh]:
    """Yield the mesh of one rank of many; the other ranks do not exist. No process group may exist meanwhile."""
    recorder = WindowRecorder()
    if layout.world_size == 1:
        yield Mesh.of_one(recorder)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=layout.rank, world_size=layout.world_size)
    try:
        everyone = tuple(range(layout.world_size))
        handles: dict[tuple[int, ...], dist.ProcessGroup | None] = {everyone: dist.group.WORLD}

        def group(name: str, members: list[list[int]]) -> Group:
            """Return this rank's group of a kind. Those of other ranks need not be created: nobody waits for it."""
            mine = tuple(next(ranks for ranks in members if layout.rank in ranks))
            if mine not in handles:
                alone = len(mine) == 1
                handles[mine] = None if alone else cast(dist.ProcessGroup, dist.new_group(list(mine), backend="fake"))
            return AloneGroup(name, mine, me=layout.rank, handle=handles[mine], recorder=recorder)

        world = group("world", [list(everyone)])
        with _messages(layout):
            yield mesh_of_groups(layout, group, world=world, host=world, saving=world)
    finally:
        dist.destroy_process_group()


def _messages(layout: Layout) -> AbstractContextManager[None]:
    if layout.pp_size == 1:
        return nullcontext()
    from trainer.plan.sent_messages import kept_messages  # which imports torch's pipelining, and that makes a tensor

    return kept_messages()


@contextmanager
def fake_tensors(load: AssumedLoad | None) -> Iterator[None]:
    """Let all tensors inside the context be without memory, and routers choose by a load."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # It remembers tensors by weak references, with which torch cannot move a module's parameters to another device.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]
    swap, chunks = torch.utils.swap_tensors, _fsdp_param._chunk_with_empty

    def swapped(t1: Tensor, t2: Tensor) -> None:
        """Swap tensors, unless a module is only moved to where it is: DeepSpeed does, and refers to its parameters."""
        if t1.untyped_storage() is not t2.untyped_storage() or t1.dtype != t2.dtype:
            swap(t1, t2)

    torch.utils.swap_tensors = swapped
    _fsdp_param._chunk_with_empty = RankChunks  # type: ignore[assignment]
    try:
        with mode, AssumedValues(load):
            yield
    finally:
        torch.utils.swap_tensors, _fsdp_param._chunk_with_empty = swap, chunks


class RankChunks:
    """Chunks of a weight for all ranks, of which FSDP2 takes two: at 4096 ranks it spends minutes on the others."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._num_chunks, self._dim = tensor, num_chunks, dim

    def __len__(self) -> int:
        return self._num_chunks

    def __getitem__(self, rank: int) -> Tensor:
        """Return the chunk of a rank as `torch.chunk` cuts it; empty beyond the last one."""
        total = self._tensor.shape[self._dim]
        size = -(-total // self._num_chunks)
        start = rank * size
        if start >= total:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(size, total - start))
