"""Layouts of five to eight ranks: each degree at its largest, and pairs and triples of degrees. Imports no torch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from trainer.prove.cases import Case

_UNEVEN: Final = (
    Case(world_size=5, ep_size=5, micro_batch_size=1),
    Case(world_size=5, data="shard", micro_batch_size=1),
    Case(world_size=6, ep_size=3, data="shard", recompute="block", micro_batch_size=1),
    Case(world_size=6, ep_size=2, data="shard", shard_size=2, shard_keeps="nothing", micro_batch_size=1),
    Case(world_size=6, ep_size=6, dispatcher="deduplicated_all_to_all", micro_batch_size=1),
    Case(world_size=6, ep_size=3, cp_size=2, cp="ring", micro_batch_size=1),
    Case(world_size=6, pp_size=3, ep_size=2, micro_batch_size=1),
    Case(world_size=7, ep_size=7, dispatcher="all_gather", micro_batch_size=1),
)
"""Ranks by which neither rows nor experts divide."""

_EXPERTS_AND_SHARDS: Final = (
    Case(world_size=8, ep_size=8, micro_batch_size=1),
    Case(world_size=8, ep_size=8, dispatcher="hierarchical", ranks_per_node=4, micro_batch_size=1),
    Case(world_size=8, ep_size=8, placement="round_robin", moves_to="contiguous", micro_batch_size=1),
    Case(world_size=8, ep_size=4, replicas=1, data="shard", micro_batch_size=1),
    Case(world_size=8, ep_size=4, data="shard", shard_size=4, recompute="block", micro_batch_size=1),
    Case(world_size=8, ep_size=2, data="shard", shard_size=4, micro_batch_size=1),
    Case(
        world_size=8,
        ep_size=2,
        data="shard",
        shard_keeps="nothing",
        recompute="norms_and_activations",
        micro_batch_size=1,
    ),
    Case(world_size=8, ep_size=4, data="shard", shard_size=2, shard_keeps="weights", micro_batch_size=1),
    Case(world_size=8, data="shard", shard_size=4, deterministic=True, micro_batch_size=1),
)

_ROWS_AND_STAGES: Final = (
    Case(world_size=8, cp_size=2, ep_size=4, data="shard", micro_batch_size=1),
    Case(world_size=8, cp_size=2, cp="ring", ep_size=8, recompute="block", micro_batch_size=1),
    Case(world_size=8, cp_size=4, ep_size=2, data="shard", shard_size=4, micro_batch_size=1),
    Case(world_size=8, cp_size=4, cp="ring", ep_size=8, micro_batch_size=1),
    Case(world_size=8, cp_size=8, cp="ring", data="shard", micro_batch_size=1),
    Case(world_size=8, pp_size=2, ep_size=4, micro_batch_size=1),
    Case(world_size=8, pp_size=2, ep_size=2, data="shard", recompute="block", micro_batch_size=1),
    Case(world_size=8, pp_size=2, ep_size=2, data="shard", shard_size=2, pp_schedule="gpipe", micro_batch_size=1),
    Case(world_size=8, pp_size=2, pp_schedule="interleaved_1f1b", ep_size=2, cp_size=2, micro_batch_size=1),
    Case(world_size=8, pp_size=2, pp_schedule="zbv", ep_size=4, data="shard", micro_batch_size=1),
    Case(world_size=8, pp_size=2, pp_schedule="dualpipe_v", ep_size=2, cp_size=2, cp="ring", micro_batch_size=1),
    Case(world_size=8, pp_size=2, cp_size=2, cp="ring", ep_size=4, data="shard", micro_batch_size=1),
    Case(world_size=8, pp_size=4, ep_size=2, micro_batch_size=1),
    Case(world_size=8, pp_size=4, pp_schedule="gpipe", cp_size=2, ep_size=2, micro_batch_size=1),
    Case(world_size=8, pp_size=4, data="shard", recompute="norms_and_activations", micro_batch_size=1),
    Case(world_size=8, pp_size=8, pp_schedule="gpipe", micro_batch_size=1),
)

_OVERLAPPED: Final = (
    Case(world_size=6, ep_size=3, overlap="micro_batches", micro_batch_size=1),
    Case(world_size=8, ep_size=8, overlap="micro_batches", recompute="block", micro_batch_size=1),
    Case(world_size=8, ep_size=4, data="shard", overlap="micro_batches", micro_batch_size=1),
    Case(world_size=8, ep_size=4, cp_size=2, overlap="micro_batches", micro_batch_size=1),
    Case(world_size=8, ep_size=4, tp_size=2, data="shard", overlap="micro_batches", micro_batch_size=1),
    Case(world_size=6, pp_size=3, ep_size=2, pp_schedule="gpipe", overlap="micro_batches", micro_batch_size=1),
    Case(world_size=8, pp_size=2, ep_size=4, recompute="block", overlap="micro_batches", micro_batch_size=1),
    Case(
        world_size=8,
        pp_size=2,
        ep_size=2,
        pp_schedule="interleaved_1f1b",
        data="shard",
        overlap="micro_batches",
        micro_batch_size=1,
    ),
    Case(world_size=8, pp_size=2, ep_size=2, cp_size=2, overlap="micro_batches", micro_batch_size=1),
    Case(world_size=8, pp_size=4, ep_size=2, pp_schedule="gpipe", overlap="micro_batches", micro_batch_size=1),
)

_HEADS: Final = (
    Case(world_size=6, tp_size=2, ep_size=3, micro_batch_size=1),
    Case(world_size=6, tp_size=3, data="shard", micro_batch_size=1),
    Case(world_size=8, tp_size=4, ep_size=8, recompute="block", micro_batch_size=1),
    Case(world_size=8, tp_size=2, ep_size=4, data="shard", micro_batch_size=1),
    Case(world_size=8, tp_size=2, ep_size=2, data="shard", shard_size=4, micro_batch_size=1),
    Case(world_size=8, tp_size=2, cp_size=2, ep_size=4, micro_batch_size=1),
    Case(world_size=8, tp_size=2, cp_size=2, cp="ring", ep_size=2, data="shard", micro_batch_size=1),
    Case(world_size=8, tp_size=2, pp_size=2, ep_size=4, micro_batch_size=1),
    Case(world_size=8, tp_size=2, pp_size=2, pp_schedule="interleaved_1f1b", data="shard", micro_batch_size=1),
    Case(world_size=8, tp_size=2, pp_size=2, cp_size=2, ep_size=2, micro_batch_size=1),
)


def many_ranks(num_rows: int, most: int) -> Iterator[Case]:
    """Yield layouts of more ranks than four, up to `most`, for global batches of `num_rows`; not all fit a config."""
    for case in (*_UNEVEN, *_EXPERTS_AND_SHARDS, *_ROWS_AND_STAGES, *_HEADS, *_OVERLAPPED):
        if case.world_size <= most:
            share = -(-num_rows * case.pp_size * case.cp_size * case.tp_size // case.world_size)
            # Stages need as many micro-batches as they are, and more under some schedules; an overlap needs two.
            yield case if case.pp_size > 1 or case.overlap != "none" else replace(case, micro_batch_size=share)
