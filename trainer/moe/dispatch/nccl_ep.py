"""Tokens by NCCL EP, NVIDIA's expert-parallel library on NCCL's device API (`nccl.ep` of nccl-extensions 0.1).

Its high-throughput algorithm in the flat layout: what arrives is as long as the tokens are many, which the host reads.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving
from trainer.distributed.exchange_stream import exchange_stream, stream_pointer
from trainer.moe.dispatch.library_exchange import KEY, starting
from trainer.moe.dispatch.token_library import BufferSize, SentTokens, TokenBuffer, TokenLibraryDispatcher
from trainer.packages import importing

# T tokens, k slots, N copies of tokens that arrive, D d_model.


class NcclEPDispatcher(TokenLibraryDispatcher):
    """Sends each token once to each rank that has any of its experts, by NCCL EP."""

    kind = "nccl_ep"

    def new_buffer(self, size: BufferSize) -> TokenBuffer:
        """Make a group of the library, with a communicator of its own. Collective.

        Raises:
            ConfigError: if the package, or what it needs of the machine, is missing.
        """
        with starting("NCCL EP"):
            with importing("nccl", user=f"{KEY}: nccl_ep"):
                # pyrefly: ignore[missing-import]
                import nccl.ep

                # pyrefly: ignore[missing-import]
                from nccl.ep.interop.torch import get_nccl_comm_from_group
            config = nccl.ep.GroupConfig(
                algorithm=nccl.ep.Algorithm.HIGH_THROUGHPUT,
                num_experts=size.num_experts,
                max_dispatch_tokens_per_rank=size.tokens_per_rank,
                max_recv_tokens_per_rank=0,  # outputs are as long as what arrives
                max_token_bytes=size.width * size.dtype.itemsize,
                num_topk=size.num_slots,
            )
            group = nccl.ep.Group.create(get_nccl_comm_from_group(self.group.handle), config)
            return _NcclTokenBuffer(nccl.ep, group, self.group, size)


class _Routing:
    """Where tokens go: a handle of the library, and the shapes of what travels by it."""

    handle: Any
    num_tokens: int
    """T."""
    num_here: int
    """N."""
    num_rows: int
    """Slots that arrive with an expert of this rank."""


class _NcclTokenBuffer(TokenBuffer):
    """A group of the library. All of its calls are made on one stream, in the same order on all ranks."""

    def __init__(self, library: Any, ep_group: Any, group: Group, size: BufferSize) -> None:
        self._ep, self._ep_group, self._size = library, ep_group, size
        self._device, self._stream = group.device, exchange_stream(group.device)
        self._experts_here = size.num_experts // group.size
        self._free: list[Any] = []
        """Handles whose routing nobody needs any more: their memory is allocated."""

    def dispatch(self, x: Tensor, expert: Tensor, weight: Tensor) -> SentTokens:
        """Start to send tokens; the host waits until it knows how many arrive."""
        routing = _Routing()
        arriving = self._stream.start(partial(self._dispatch, routing, x, expert, weight), (x, expert, weight))
        here, weight_here, local_expert = arriving.tensors
        return SentTokens(
            routing=routing,
            arriving=Arriving((here, weight_here), arriving.wait),
            local_expert=local_expert,
            num_rows=routing.num_rows,
        )

    def dispatch_again(self, routing: _Routing, x: Tensor) -> Arriving:
        """Start to send tokens where others went: the library's backward pass of a combine."""
        return self._stream.start(partial(self._dispatch_again, routing, x), (x,))

    def combine(self, routing: _Routing, x: Tensor) -> Arriving:
        """Start to sum tokens."""
        return self._stream.start(partial(self._combine, routing, x), (x,))

    def combine_weighted(self, routing: _Routing, x: Tensor, weight: Tensor) -> Arriving:
        """Start to sum tokens and weights: the library's backward pass of a dispatch."""
        return self._stream.start(partial(self._combine_weighted, routing, x, weight), (x, weight))

    def _dispatch(self, routing: _Routing, x: Tensor, expert: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        ep, num_slots = self._ep, expert.shape[1]
        self._route(routing, expert)
        here, weight_here = x.new_empty(routing.num_here, x.shape[1]), weight.new_empty(routing.num_here, num_slots)
        local_expert = expert.new_empty(routing.num_here, num_slots)
        routing.handle.dispatch(
            ep.DispatchInputs(tokens=ep.Tensor(x), topk_weights=ep.Tensor(weight)),
            ep.DispatchOutputs(
                tokens=ep.Tensor(here), topk_weights=ep.Tensor(weight_here), topk_idx=ep.Tensor(local_expert)
            ),
            config=ep.DispatchConfig(pass_direction=ep.PassDir.FWD),
            stream=stream_pointer(self._device),
        )
        return here, weight_here, local_expert

    def _dispatch_again(self, routing: _Routing, x: Tensor) -> tuple[Tensor]:
        ep, here = self._ep, x.new_empty(routing.num_here, x.shape[1])
        routing.handle.dispatch(
            ep.DispatchInputs(tokens=ep.Tensor(x)),
            ep.DispatchOutputs(tokens=ep.Tensor(here)),
            config=ep.DispatchConfig(pass_direction=ep.PassDir.BWD),
            stream=stream_pointer(self._device),
        )
        return (here,)

    def _combine(self, routing: _Routing, x: Tensor) -> tuple[Tensor]:
        ep, total = self._ep, x.new_empty(routing.num_tokens, x.shape[1])
        routing.handle.combine(
            ep.CombineInputs(tokens=ep.Tensor(x)),
            ep.CombineOutputs(tokens=ep.Tensor(total)),
            config=ep.CombineConfig(pass_direction=ep.PassDir.FWD),
            stream=stream_pointer(self._device),
        )
        return (total,)

    def _combine_weighted(self, routing: _Routing, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ep, total = self._ep, x.new_empty(routing.num_tokens, x.shape[1])
        of_weight = weight.new_empty(routing.num_tokens, weight.shape[1])
        routing.handle.combine(
            ep.CombineInputs(tokens=ep.Tensor(x), topk_weights=ep.Tensor(weight)),
            ep.CombineOutputs(tokens=ep.Tensor(total), topk_weights=ep.Tensor(of_weight)),
            config=ep.CombineConfig(pass_direction=ep.PassDir.BWD),
            stream=stream_pointer(self._device),
        )
        return total, of_weight

    def _route(self, routing: _Routing, expert: Tensor) -> None:
        """Tell all ranks where the tokens with these experts (T, k) go, and wait for what arrives here."""
        ep, counts = self._ep, torch.zeros(1 + self._experts_here, dtype=torch.int32, device=expert.device)
        layout = ep.LayoutInfo(
            recv_total_counter=ep.Tensor(counts[:1]),
            expert_counters=ep.Tensor(counts[1:]),
            recv_topk_idx_kind=ep.ExpertIdKind.LOCAL,
        )
        index, stream = ep.Tensor(expert), stream_pointer(self._device)
        if self._free:
            routing.handle = self._free.pop()
            routing.handle.update(index, layout_info=layout, stream=stream)
        else:
            routing.handle = self._ep_group.create_handle(ep.Layout.FLAT, index, layout_info=layout, stream=stream)
        routing.num_tokens, (routing.num_here, *of_experts) = len(expert), counts.tolist()
        routing.num_rows = sum(of_experts)
        weakref.finalize(routing, self._free.append, routing.handle).atexit = False
