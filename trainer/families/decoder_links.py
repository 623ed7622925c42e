"""Links that several families share. Imports no torch."""

from collections.abc import Iterator
from typing import NamedTuple

from trainer.families.latent_links import latent_links
from trainer.families.link import Link
from trainer.models.config import ModelConfig


class ExpertNames(NamedTuple):
    """Names of the products of one expert, below their MoE layer."""

    gate: str
    up: str
    down: str


PROJECTIONS = ExpertNames("gate_proj", "up_proj", "down_proj")
"""Names in most families."""


def outer_links(model: ModelConfig, vocab_size: int) -> Iterator[Link]:
    """Link embedding, final norm and output head."""
    table = (vocab_size, model.d_model)
    yield Link(theirs="model.embed_tokens.weight", shape=table, ours="embedding.weight")
    yield Link(theirs="model.norm.weight", shape=(model.d_model,), ours="norm.weight")
    if not model.tie_embeddings:
        yield Link(theirs="lm_head.weight", shape=table, ours="head.weight")


def norm_links(model: ModelConfig, layer: int) -> Iterator[Link]:
    """Link the two norms of a block."""
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    for theirs, ours in names.items():
        yield Link(
            theirs=f"model.layers.{layer}.{theirs}.weight",
            shape=(model.d_model,),
            ours=f"blocks.{layer}.{ours}.weight",
        )


def attention_links(model: ModelConfig, layer: int) -> Iterator[Link]:
    """Link the projections of grouped-query attention, their biases, and the norms of queries and keys."""
    theirs, ours = f"model.layers.{layer}.self_attn", f"blocks.{layer}.attention"
    D, d, heads, kv_heads = model.d_model, model.head_dim, model.num_heads, model.num_kv_heads or model.num_heads
    start = 0
    for name, rows in (("q_proj", heads * d), ("k_proj", kv_heads * d), ("v_proj", kv_heads * d)):
        at = ((start, start + rows),)
        yield Link(theirs=f"{theirs}.{name}.weight", shape=(rows, D), ours=f"{ours}.qkv.weight", at=at)
        if model.attention.qkv_bias:
            yield Link(theirs=f"{theirs}.{name}.bias", shape=(rows,), ours=f"{ours}.qkv.bias", at=at)
        start += rows
    yield Link(theirs=f"{theirs}.o_proj.weight", shape=(D, heads * d), ours=f"{ours}.out.weight")
    if model.attention.out_bias:
        yield Link(theirs=f"{theirs}.o_proj.bias", shape=(D,), ours=f"{ours}.out.bias")
    if model.qk_norm:
        of_all = model.attention.qk_norm_over == "all_heads"
        for name, num_heads in (("q_norm", heads), ("k_norm", kv_heads)):
            width = num_heads * d if of_all else d
            yield Link(theirs=f"{theirs}.{name}.weight", shape=(width,), ours=f"{ours}.{name}.weight")


def feed_forward_links(theirs: str, ours: str, d_model: int, d_ff: int) -> Iterator[Link]:
    """Link a SwiGLU feed-forward network: ours stacks the gate's rows on those of the other factor."""
    for name, at in (("gate_proj", (0, d_ff)), ("up_proj", (d_ff, 2 * d_ff))):
        yield Link(theirs=f"{theirs}.{name}.weight", shape=(d_ff, d_model), ours=f"{ours}.w_in.weight", at=(at,))
    yield Link(theirs=f"{theirs}.down_proj.weight", shape=(d_model, d_ff), ours=f"{ours}.w_out.weight")


def expert_links(theirs: str, layer: int, model: ModelConfig, names: ExpertNames = PROJECTIONS) -> Iterator[Link]:
    """Link every expert of a layer; on disk each of its matrices is a tensor."""
    assert model.moe is not None, "refused before its links are asked for"
    D, F, ours = model.d_model, model.moe.d_ff, f"blocks.{layer}.ffn.experts"
    for e in range(model.moe.num_experts):
        expert = f"{theirs}.experts.{e}"
        for name, rows in ((names.gate, (0, F)), (names.up, (F, 2 * F))):
            at = ((e, e + 1), rows)
            yield Link(theirs=f"{expert}.{name}.weight", shape=(F, D), ours=f"{ours}.w_in", at=at)
        yield Link(theirs=f"{expert}.{names.down}.weight", shape=(D, F), ours=f"{ours}.w_out", at=((e, e + 1),))


def gate_links(theirs: str, layer: int, model: ModelConfig, *, bias: bool = False) -> Iterator[Link]:
    """Link the router's gate, and its selection bias."""
    assert model.moe is not None, "refused before its links are asked for"
    E, router = model.moe.num_experts, f"blocks.{layer}.ffn.router"
    yield Link(theirs=f"{theirs}.gate.weight", shape=(E, model.d_model), ours=f"{router}.gate.weight")
    if bias:
        name = f"{theirs}.gate.e_score_correction_bias"
        yield Link(theirs=name, shape=(E,), ours=f"{router}.bias", is_float32=True)


def decoder_links(
    model: ModelConfig, vocab_size: int, *, has_bias: bool = False, shared: str | None = None
) -> Iterator[Link]:
    """Link a whole decoder of the most common layout.

    Args:
        model: our config.
        vocab_size: rows of the embedding.
        has_bias: the gate has a selection bias.
        shared: name of the shared experts, if any.
    """
    yield from outer_links(model, vocab_size)
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.mlp", f"blocks.{layer}.ffn"
        yield from norm_links(model, layer)
        yield from (attention_links if model.attention.latent is None else latent_links)(model, layer)
        if model.moe is None or not model.has_experts(layer):
            yield from feed_forward_links(theirs, ours, model.d_model, model.d_ff)
            continue
        yield from gate_links(theirs, layer, model, bias=has_bias)
        if shared is not None and model.moe.num_shared_experts:
            yield from feed_forward_links(f"{theirs}.{shared}", f"{ours}.shared", model.d_model, model.moe.shared_width)
        if shared is not None and model.moe.shared_gate:
            name = f"{theirs}.{shared}_gate.weight"
            yield Link(theirs=name, shape=(1, model.d_model), ours=f"{ours}.shared.gate.weight")
        yield from expert_links(theirs, layer, model)
