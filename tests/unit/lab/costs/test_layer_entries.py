"""What `bench layer` compares does the same work: peers compute what ours computes, the twin has as many FLOPs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.lab.costs.cost_options import PEERS, LayerShape
from trainer.lab.costs.given_routing import GivenLogits
from trainer.lab.costs.layer_entries import LayerEntry, LayerInput, ProductsEntry, dense_entry, moe_entry
from trainer.lab.costs.transformers_peer import block_entry, why_not

SHAPE = LayerShape(num_experts=4, top_k=2, d_model=16, d_ff=8, tokens=24, dtype="float32")
CPU = torch.device("cpu")


def layer_input(kind: Any = "balanced", shape: LayerShape = SHAPE) -> LayerInput:
    """Return an input with its routing."""
    return LayerInput(shape, GivenLogits(kind, shape.num_experts, seed=0), CPU)


def output_and_gradient(entry: LayerEntry, turn: int) -> tuple[Tensor, Tensor]:
    """Run an entry's two passes."""
    entry.prepare(turn)
    out = entry.forward(entry.input.x)
    out.backward(entry.input.grad)
    assert entry.input.x.grad is not None
    return out.detach(), entry.input.x.grad.clone()


@pytest.mark.parametrize("kind", ["balanced", "skewed"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_computes_what_our_layer_computes(peer: str, kind: str) -> None:
    given = layer_input(kind)
    ours, theirs = moe_entry(given, "loop"), block_entry(given, peer)
    block: Any = theirs.module
    moe: Any = ours.module
    with torch.no_grad():
        block.experts.gate_up_proj.copy_(moe.experts.w_in)
        block.experts.down_proj.copy_(moe.experts.w_out)
        block.gate.weight.copy_(moe.router.gate.weight)
    for turn in (0, 1):
        for mine, other in zip(output_and_gradient(ours, turn), output_and_gradient(theirs, turn), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_dense_twin_and_the_products_alone_have_the_flops_of_the_experts() -> None:
    given = layer_input()
    flops = {}
    for name, entry in (("twin", dense_entry(given)), ("products", ProductsEntry(given))):
        entry.prepare(0)
        with FlopCounterMode(display=False) as counter:
            entry.run()
        flops[name] = counter.get_total_flops()
    active = 3 * SHAPE.top_k * SHAPE.d_ff * SHAPE.d_model
    assert flops["twin"] == flops["products"] == 3 * 2 * active * SHAPE.tokens


def test_the_least_that_is_saved_is_the_input_and_what_enters_the_activation() -> None:
    shape = LayerShape(num_experts=16, top_k=4, d_model=64, d_ff=32, tokens=512, dtype="float32")
    assert shape.least_saved == 1280


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_facts_are_measured_for_both_passes_and_parameters_are_left_out(dtype: str) -> None:
    given = layer_input(shape=LayerShape(num_experts=4, top_k=2, d_model=16, d_ff=8, tokens=24, dtype=dtype))
    entry = moe_entry(given, "grouped")
    facts = entry.facts()
    weights = sum(p.nbytes for p in entry.module.parameters())
    assert given.shape.least_saved <= facts["saved_bytes_per_token"]
    assert facts["peak_bytes"] > weights, "their gradients"
    assert "row_bytes_per_token" not in facts, "one rank sends nothing"
    assert facts == {**facts, **entry.facts()}, "the same again"


def test_the_copies_of_batched_mm_are_bounded() -> None:
    large = LayerShape(num_experts=8, top_k=2, d_model=256, d_ff=512, tokens=4096, dtype="float32")
    assert why_not("batched_mm", large) == "would copy 13 GB of weights, one set for each row"
    assert why_not("batched_mm", SHAPE) is None and why_not("grouped_mm", large) is None


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.packages.find_spec", lambda name: None)
    reason = why_not("eager", SHAPE)
    assert reason == "needs transformers, which is not installed; pip install 'turnout[hf]'"
