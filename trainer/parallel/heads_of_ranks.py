"""Which heads of attention each of the ranks has that hold a block's matrices together. Imports no torch."""

from trainer.distributed.rank_layout import even_slices
from trainer.models.head_share import HeadShare


def heads_of_ranks(num_heads: int, num_ranks: int) -> list[HeadShare]:
    """Return the heads of keys and values of each rank; if they are fewer than ranks, neighbours share one."""
    if num_heads >= num_ranks:
        return [HeadShare(first, last) for first, last in even_slices(num_heads, num_ranks)]
    sharing = [last - first for first, last in even_slices(num_ranks, num_heads)]
    return [HeadShare(head, head + 1, part, parts) for head, parts in enumerate(sharing) for part in range(parts)]


def fewest_queries(num_heads: int, num_key_heads: int, num_ranks: int) -> int:
    """Return the heads of queries of the rank that has the fewest, without a list of ranks; 0 if a rank has none."""
    per_key = num_heads // num_key_heads
    if num_key_heads >= num_ranks:
        return num_key_heads // num_ranks * per_key
    return per_key // -(-num_ranks // num_key_heads)
