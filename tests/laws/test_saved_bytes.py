"""Law: a MoE layer saves its input X and the hidden values H for the backward pass, and hardly anything else."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.builders import make_context, tiny_model_config
from tests.ranks import Ranks, mesh_here
from tests.registries import DISPATCHERS, KERNELS
from trainer.distributed.rank_layout import even_slice
from trainer.models.block import build_moe
from trainer.moe.layer import MoE
from trainer.ops.kernels import ExpertsKernel

ROWS, SEQ_LEN, NUM_EXPERTS, TOP_K, D_MODEL, D_FF = 4, 128, 16, 4, 64, 32
TOKENS = ROWS * SEQ_LEN
LIMIT = 1.15
"""Of X + H: the rest is probabilities, combine weights and the order of rows, which do not grow with the widths."""


def make_layer(kernel: ExpertsKernel, **fields: Any) -> MoE:
    moe = {"num_experts": NUM_EXPERTS, "d_ff": D_FF, "router": {"kind": "top_k", "top_k": TOP_K}, **fields}
    layer = build_moe(tiny_model_config(moe, d_model=D_MODEL), 0, kernel)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
    return layer


def saved_bytes(layer: MoE, *, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of all different storages that a forward pass saves, without parameters."""
    x = torch.randn(ROWS, SEQ_LEN, D_MODEL, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    is_narrow = dtype is torch.bfloat16
    autocast = torch.autocast("cpu", dtype=dtype) if is_narrow else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        layer(x, make_context(ROWS, SEQ_LEN))
    return sum(t.untyped_storage().nbytes() for pointer, t in found.items() if pointer not in parameters)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_rank_saves_tokens_and_hidden_values(kernel: ExpertsKernel) -> None:
    minimum = 4 * TOKENS * (D_MODEL + TOP_K * 2 * D_FF)
    found = saved_bytes(make_layer(kernel))
    print(f"{kernel}: {found / TOKENS:.0f} bytes a token, {found / minimum:.3f} times X + H")
    assert minimum <= found <= LIMIT * minimum


@pytest.mark.parametrize("kernel", KERNELS)
def test_biases_save_nothing_more(kernel: ExpertsKernel) -> None:
    assert saved_bytes(make_layer(kernel, expert_bias=True)) == saved_bytes(make_layer(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_adapters_save_nothing_more_and_frozen_weights_nothing_less_than_tokens(kernel: ExpertsKernel) -> None:
    layer = make_layer(kernel)
    whole = saved_bytes(layer)
    for name in ("w_in", "w_out"):
        layer.experts.add_adapter(name, 8, 2.0)
    for parameter in (layer.experts.w_in, layer.experts.w_out):
        parameter.requires_grad_(False)
    assert saved_bytes(layer) == whole


@pytest.mark.parametrize("kernel", KERNELS)
def test_in_bfloat16_no_rounded_copy_of_tokens_or_weights_is_kept(kernel: ExpertsKernel) -> None:
    """Experts share the float32 input of the router. The overhead is the same number of bytes as in float32."""
    overhead = saved_bytes(make_layer("fused")) - 4 * TOKENS * (D_MODEL + TOP_K * 2 * D_FF)
    # Groups of a multiple of 8, or groups of a multiple of 64 that overlap.
    num_rows = TOKENS * TOP_K + {"grouped": NUM_EXPERTS * 7, "fused": 63, "fused_onednn": 63}.get(kernel, 0)
    minimum = 4 * TOKENS * D_MODEL + 2 * num_rows * 2 * D_FF
    found = saved_bytes(make_layer(kernel), dtype=torch.bfloat16)
    assert minimum <= found <= minimum + overhead + 8 * NUM_EXPERTS * 7


@pytest.mark.parametrize("kernel", KERNELS)
def test_recomputed_experts_save_no_hidden_values(kernel: ExpertsKernel) -> None:
    layer = make_layer(kernel)
    whole = saved_bytes(layer)
    layer.experts.recompute = True
    num_rows = TOKENS * TOP_K + (63 if kernel == "fused_onednn" else 0)
    assert whole - saved_bytes(layer) == 4 * num_rows * 2 * D_FF


def on_a_rank(config: Any) -> tuple[int, int]:
    """Return the saved bytes of a rank, and the bytes of X, of the rows that it got and of their hidden values."""
    mesh, layer = mesh_here(ep_size=dist.get_world_size()), make_layer("grouped")
    layer.dispatcher = config.build(mesh, NUM_EXPERTS)
    layer.experts.keep(range(*even_slice(NUM_EXPERTS, mesh.ep.size, mesh.ep.index)))
    given = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: given.append((len(arguments[0]), arguments[1])))
    found = saved_bytes(layer)
    ((num_tokens, expert_index),) = given
    num_rows = int((expert_index < NUM_EXPERTS // mesh.ep.size).sum())
    return found, 4 * (TOKENS * D_MODEL + num_tokens * D_MODEL + num_rows * 2 * D_FF)


SENDING = {kind: config() for kind, config in DISPATCHERS.items() if kind not in ("local", "padded_all_to_all")}


@pytest.mark.parametrize("config", SENDING.values(), ids=SENDING.keys())
def test_a_rank_saves_its_tokens_what_it_received_and_hidden_values(ranks: Ranks, config: Any) -> None:
    for rank, (found, minimum) in enumerate(ranks.run(2, on_a_rank, config)):
        print(f"{config.kind}, rank {rank}: {found / TOKENS:.0f} bytes a token, {found / minimum:.3f} times X + H")
        assert minimum <= found <= LIMIT * minimum
