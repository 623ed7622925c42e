"""Entries that `bench layer` times: our MoE layer by each kernel, a dense twin, and the products alone.

# T tokens, k experts per token, R = T * k rows, E experts, D d_model, F d_ff.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.config.build_plugin import build_plugin
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.distributed.runtime import cpu_vendor
from trainer.lab.costs.cost_options import LayerShape
from trainer.lab.costs.given_routing import GivenLogits, GivenRouter, choices, given_router
from trainer.lab.costs.message_counter import MessageCounter
from trainer.lab.costs.saved_bytes import counting_saved_bytes, peak_bytes
from trainer.metrics.device_waits import DeviceWaits
from trainer.models.block import build_moe
from trainer.models.config import ModelConfig
from trainer.models.feed_forward import FeedForward
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.dispatch.registry import DispatcherOptions
from trainer.moe.layer import MoE
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import RoutingContext
from trainer.ops.kernels import ExpertsKernel, choose_experts_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROW = 256  # tokens of a sequence, if they can be split so
_FACT_TURN = 1000
"""Turn whose inputs facts are measured on."""


class LayerInput:
    """Input, gradient and routing of a layer, shared by all entries of a comparison."""

    def __init__(self, shape: LayerShape, logits: GivenLogits, device: torch.device) -> None:
        self.shape, self.logits, self.device = shape, logits, device
        draw = torch.Generator().manual_seed(logits.seed)
        T, D = shape.tokens, shape.d_model
        width = _ROW if T % _ROW == 0 else T
        self.x = torch.randn(T // width, width, D, generator=draw).to(device).requires_grad_()  # (B, S, D)
        self.grad = torch.randn(T // width, width, D, generator=draw).to(device)
        row, column = torch.arange(T // width).repeat_interleave(width), torch.arange(width).repeat(T // width)
        self.context = RoutingContext(
            token_ids=torch.zeros(T, dtype=torch.int64, device=device),
            valid=torch.ones(T, dtype=torch.bool, device=device),
            position=column.to(device),
            sequence_index=row.to(device),
            num_sequences=T // width,
            num_valid=T,
        )

    def given(self, turn: int) -> Tensor:
        """Return the router logits (T, E) of a turn."""
        return self.logits.draw(self.shape.tokens, turn).to(self.device)

    def autocast(self) -> Any:
        """Return the context of the forward pass."""
        if self.shape.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.shape.dtype])


class LayerEntry:
    """Forward and backward pass of one layer."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor], Tensor],
        given: LayerInput,
        routers: Iterable[GivenRouter] = (),
    ) -> None:
        """Create the entry.

        Args:
            module: with the parameters.
            forward: input (B, S, D) -> output (B, S, D).
            given: input, gradient and routing.
            routers: get the router logits of each turn; those of a peer have the same attribute.
        """
        self.module, self.forward, self.input, self.routers = module.to(given.device), forward, given, list(routers)

    def prepare(self, turn: int) -> None:
        """Forget the gradients and give the routers their logits."""
        self.input.x.grad = None
        for parameter in self.module.parameters():
            parameter.grad = None
        for router in self.routers:
            router.given = self.input.given(turn)

    def run(self) -> None:
        """Run forward and backward."""
        with self.input.autocast():
            out = self.forward(self.input.x)
        out.backward(self.input.grad.to(out.dtype))

    def facts(self) -> dict[str, Any]:
        """Return the bytes saved for backward, the peak of both passes, what was sent, and the waits for the device."""
        tokens = self.input.shape.tokens
        self.prepare(_FACT_TURN)
        with (
            counting_saved_bytes(self.module.parameters()) as saved,
            MessageCounter(self.input.shape.d_model) as counter,
        ):
            with self.input.autocast():
                out = self.forward(self.input.x)
            out.backward(self.input.grad.to(out.dtype))
        del out
        self.prepare(_FACT_TURN)
        sent = counter.sent
        facts = {
            "saved_bytes_per_token": sum(saved.values()) / tokens,
            "least_saved_bytes_per_token": self.input.shape.least_saved,
            "peak_bytes": peak_bytes(self.run, self.input.device),
        }
        if sent.collectives:
            facts |= sent.facts(tokens)
        self.prepare(_FACT_TURN)
        with DeviceWaits() as counted:
            self.run()
        facts["waits"] = len(counted.waits)
        return facts


def moe_entry(
    given: LayerInput,
    kernel: str,
    *,
    is_compiled: bool = False,
    mesh: Mesh | None = None,
    dispatcher: DispatcherOptions | None = None,
    capacity_factor: float | None = None,
) -> LayerEntry:
    """Return our layer, with all experts here or those of this rank, and the routing of the benchmark."""
    shape = given.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.logits.seed)
        layer = build_moe(ModelConfig.model_validate(shape.sections()), 0, cast(ExpertsKernel, kernel))
        router = given_router(shape.d_model, num_experts=shape.num_experts, top_k=shape.top_k)
    layer.router, layer.capacity = router, CapacityConfig(factor=capacity_factor)
    if mesh is not None and dispatcher is not None:
        layer.dispatcher = build_plugin(dispatcher, Dispatcher, "--dispatcher", mesh, shape.num_experts)
        if mesh.ep.size > 1:
            layer.experts.keep(range(*even_slice(shape.num_experts, mesh.ep.size, mesh.ep.index)))
    layer.experts.is_compiled = is_compiled
    return LayerEntry(layer, lambda x: _output(layer, x, given.context), given, [router])


def _output(layer: MoE, x: Tensor, context: RoutingContext) -> Tensor:
    y, _ = layer(x, context)
    return y


def default_kernel(shape: LayerShape, device: torch.device) -> ExpertsKernel:
    """Return the kernel that training would choose."""
    return choose_experts_kernel(
        device.type,
        DTYPES[shape.dtype],
        cpu_vendor=cpu_vendor(),
        rows_per_expert=shape.tokens * shape.top_k // shape.num_experts,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
    )


def dense_entry(given: LayerInput) -> LayerEntry:
    """Return the dense twin: one feed-forward network as wide as the experts of a token together."""
    shape = given.shape
    layer = FeedForward(ModelConfig.model_validate(shape.sections()), shape.top_k * shape.d_ff)
    return LayerEntry(layer, layer, given)


class ProductsEntry:
    """The experts' six matrix products and nothing else: no routing, no activation, no copies. The floor.

    Weights are in the dtype of the products, outputs are allocated once. On the CPU sizes of bfloat16 products are
    rounded up to a multiple of 64, since the library builds a kernel for every new size.
    """

    def __init__(self, given: LayerInput) -> None:
        self.input, shape, device = given, given.shape, given.device
        dtype, E, D, F = DTYPES[shape.dtype], shape.num_experts, shape.d_model, shape.d_ff
        self.multiple = 64 if dtype is torch.bfloat16 else 1
        rows = shape.tokens * shape.top_k + self.multiple * E

        def numbers(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        self.w_in, self.w_out = numbers(E, 2 * F, D), numbers(E, D, F)
        self.grad_in, self.grad_out = numbers(E, 2 * F, D), numbers(E, D, F)
        self.x, self.y, self.dx, self.dy = (numbers(rows, D) for _ in range(4))
        self.h, self.dh = numbers(rows, 2 * F), numbers(rows, 2 * F)
        self.a, self.da = numbers(rows, F), numbers(rows, F)
        self.groups: list[tuple[int, slice]] = []

    def prepare(self, turn: int) -> None:
        """Read the sizes of the groups."""
        shape, start = self.input.shape, 0
        chosen = choices(self.input.given(turn), shape.top_k).flatten()
        self.groups = []
        for expert, count in enumerate(torch.bincount(chosen, minlength=shape.num_experts).tolist()):
            end = start + -(-count // self.multiple) * self.multiple
            if count:
                self.groups.append((expert, slice(start, end)))
            start = end

    def run(self) -> None:
        """Multiply: two products forward, four backward, expert by expert."""
        for expert, rows in self.groups:
            torch.mm(self.x[rows], self.w_in[expert].T, out=self.h[rows])
            torch.mm(self.a[rows], self.w_out[expert].T, out=self.y[rows])
        for expert, rows in self.groups:
            torch.mm(self.dy[rows], self.w_out[expert], out=self.da[rows])
            torch.mm(self.dy[rows].T, self.a[rows], out=self.grad_out[expert])
            torch.mm(self.dh[rows].T, self.x[rows], out=self.grad_in[expert])
            torch.mm(self.dh[rows], self.w_in[expert], out=self.dx[rows])

    def facts(self) -> dict[str, Any]:
        """Return nothing: no memory is allocated."""
        return {}
