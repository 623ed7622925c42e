"""Links of multi-head latent attention (DeepSeek-V2 and V3). Imports no torch.

They rotate neighbours, (2 i, 2 i + 1), where we rotate halves, (i, i + r / 2): the rotated rows have another order.

# D d_model, H heads; widths of a head: n without and r with rotary positions; c latent of keys and values.
"""

from collections.abc import Iterator

from trainer.families.link import Interleaved, Link
from trainer.models.config import ModelConfig


def latent_links(model: ModelConfig, layer: int) -> Iterator[Link]:
    """Link the attention of a layer."""
    latent = model.attention.latent
    assert latent is not None, "grouped-query attention has other links"
    theirs, ours = f"model.layers.{layer}.self_attn", f"blocks.{layer}.attention"
    D, c, q, heads = model.d_model, latent.kv_lora_rank, latent.q_lora_rank, model.num_heads
    n, r = latent.qk_nope_head_dim, latent.qk_rope_head_dim
    queries = heads * (n + r)
    of_heads = Interleaved(dim=0, block=n + r, within=(n, n + r))

    def whole(name: str, shape: tuple[int, ...], mine: str, order: Interleaved | None = None) -> Link:
        return Link(theirs=f"{theirs}.{name}", shape=shape, ours=f"{ours}.{mine}", interleaved=order)

    def part_of_a(name: str, rows: tuple[int, int], order: Interleaved | None) -> Iterator[Link]:
        size = rows[1] - rows[0]
        for kind, shape in (("weight", (size, D)), *([("bias", (size,))] if model.attention.qkv_bias else [])):
            mine = f"{ours}.qkv_a.{kind}"
            yield Link(theirs=f"{theirs}.{name}.{kind}", shape=shape, ours=mine, at=(rows,), interleaved=order)

    if q is None:
        yield from part_of_a("q_proj", (0, queries), of_heads)
    else:
        yield from part_of_a("q_a_proj", (0, q), None)
        yield whole("q_a_layernorm.weight", (q,), "q_norm.weight")
        yield whole("q_b_proj.weight", (queries, q), "q_b.weight", of_heads)
    start = queries if q is None else q
    key = Interleaved(dim=0, block=c + r, within=(c, c + r))
    yield from part_of_a("kv_a_proj_with_mqa", (start, start + c + r), key)
    yield whole("kv_a_layernorm.weight", (c,), "kv_norm.weight")
    yield whole("kv_b_proj.weight", (heads * (n + latent.v_head_dim), c), "kv_b.weight")
    yield whole("o_proj.weight", (D, heads * latent.v_head_dim), "out.weight")
    if model.attention.out_bias:
        yield whole("o_proj.bias", (D,), "out.bias")
