"""NCCL EP on its double: handles whose tokens are done with route others, and what the library does not take."""

from typing import Any

import pytest
import torch

from tests.contracts import test_dispatchers
from tests.doubles import nccl_ep
from tests.doubles.nccl_ep import Group
from tests.ranks import Ranks, mesh_here
from trainer.moe.dispatch.registry import NcclEPDispatcherConfig


def handles() -> list[int]:
    """Return how many handles there are after passes whose gradients were computed, and with two passes in flight."""
    mesh, found = mesh_here(ep_size=2), []
    experts = 2 * mesh.ep.index, 2 * mesh.ep.index + 2
    with nccl_ep.doubled(rows=torch.float64, weights=torch.float64):
        dispatcher = NcclEPDispatcherConfig(tokens_per_rank=64).build(mesh, 4)
        for _ in range(3):
            decision = test_dispatchers._decision(mesh.layout.rank, "random", 4, 2, None)
            test_dispatchers._through(dispatcher, mesh.layout.rank, experts, decision, 4)
            (buffer,) = mesh.ep.buffers.values()
            found.append(len(buffer._ep_group.handles))
        x = torch.ones(8, 6, dtype=torch.float64, requires_grad=True)
        both = [dispatcher.begin(x, decision) for _ in range(2)]
        found.append(len(buffer._ep_group.handles))
        for begun in both:
            begun.wait()
        del both, begun
        assert len(buffer._free) == 2
    return found


def test_a_handle_routes_other_tokens_once_its_own_are_done_with(ranks: Ranks) -> None:
    assert ranks.run(2, handles) == [[1, 1, 1, 2]] * 2


def misuse() -> int:
    """Return how many wrong calls the double has refused."""
    group, refused = mesh_here(ep_size=2).ep.handle, 0
    with nccl_ep.doubled():
        import nccl.ep as ep  # type: ignore[import-not-found]

        def note(call: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal refused
            with pytest.raises(AssertionError):
                call(*args, **kwargs)
            refused += 1

        sizes = {"num_experts": 4, "max_dispatch_tokens_per_rank": 4, "num_topk": 1}
        high = {"algorithm": ep.Algorithm.HIGH_THROUGHPUT, **sizes}
        note(Group.create, group, ep.GroupConfig(max_token_bytes=32, **sizes))
        note(Group.create, group, ep.GroupConfig(max_token_bytes=20, **high))
        made = Group.create(group, ep.GroupConfig(max_token_bytes=32, **high))
        counts = torch.zeros(3, dtype=torch.int32)
        layout = {"recv_total_counter": ep.Tensor(counts[:1]), "expert_counters": ep.Tensor(counts[1:])}
        index, local = ep.Tensor(torch.tensor([[0], [-1], [3]])), ep.ExpertIdKind.LOCAL
        note(made.create_handle, ep.Layout.FLAT, index, layout_info=ep.LayoutInfo(**layout), stream=0)
        info = ep.LayoutInfo(recv_topk_idx_kind=local, **layout)
        note(made.create_handle, ep.Layout.UNSET, index, layout_info=info, stream=0)
        note(made.create_handle, ep.Layout.FLAT, ep.Tensor(torch.zeros(5, 1).long()), layout_info=info, stream=0)
        handle = made.create_handle(ep.Layout.FLAT, index, layout_info=info, stream=0)
        assert counts[0] == 2 and counts[1:].sum() == 2, "each rank sends one token to each"
        x, here = torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(2, 16, dtype=torch.bfloat16)
        backward = ep.DispatchConfig(pass_direction=ep.PassDir.BWD)
        to, given = ep.DispatchOutputs(tokens=ep.Tensor(here)), ep.DispatchInputs(tokens=ep.Tensor(x))
        note(handle.dispatch, given, to, config=ep.DispatchConfig(), stream=0)
        note(handle.dispatch, ep.DispatchInputs(tokens=ep.Tensor(x[:2])), to, config=backward, stream=0)
        handle.dispatch(given, to, config=backward, stream=0)
        total = ep.CombineOutputs(tokens=ep.Tensor(torch.zeros(3, 16, dtype=torch.bfloat16)))
        note(handle.combine, ep.CombineInputs(tokens=ep.Tensor(x)), total, config=ep.CombineConfig(), stream=0)
        note(ep.Tensor, x.T)
    return refused


def test_the_double_refuses_what_the_library_does_not_take(ranks: Ranks) -> None:
    """Control: the contract of dispatchers would fail by these."""
    assert ranks.run(2, misuse) == [9, 9]
