"""The matrices of a block, by the names that adapters have for them. Imports no torch."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from trainer.models.attention_config import LatentAttentionConfig

GROUPS: Final = ("attention", "dense", "shared", "experts")
"""Parts of a block that have matrices; shared experts are one network."""


class Projection(NamedTuple):
    """A matrix of a block."""

    group: str
    name: str
    """Name of the module, or of the stacked weight of experts."""
    rows: int
    columns: int
    count: int
    """Layers that have it."""

    @property
    def target(self) -> str:
        """Name in `model.lora.targets`."""
        return f"{self.group}.{self.name}"


def grouped_query_projections(*, d_model: int, queries: int, keys: int, count: int) -> Iterator[Projection]:
    """Yield the matrices of grouped-query attention; widths are those of all heads together."""
    yield Projection("attention", "qkv", queries + 2 * keys, d_model, count)
    yield Projection("attention", "out", d_model, queries, count)


def latent_projections(
    latent: LatentAttentionConfig, *, d_model: int, num_heads: int, count: int
) -> Iterator[Projection]:
    """Yield the matrices of latent attention."""
    queries, compressed = num_heads * latent.qk_head_dim, latent.q_lora_rank
    yield Projection("attention", "qkv_a", (compressed or queries) + latent.cached_values, d_model, count)
    if compressed is not None:
        yield Projection("attention", "q_b", queries, compressed, count)
    rows = num_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    yield Projection("attention", "kv_b", rows, latent.kv_lora_rank, count)
    yield Projection("attention", "out", d_model, num_heads * latent.v_head_dim, count)


def network_projections(group: str, *, d_model: int, width: int, hidden: int, count: int) -> Iterator[Projection]:
    """Yield both matrices of a feed-forward network; `hidden` is its width before the activation."""
    if count:
        yield Projection(group, "w_in", hidden, d_model, count)
        yield Projection(group, "w_out", d_model, width, count)
