"""Measurements of a cluster as lines of a terminal. Imports no torch."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from trainer.console import formatting
from trainer.console.text_table import text_table
from trainer.doctor.cluster.cluster_evidence import ClusterEvidence
from trainer.doctor.cluster.timed_rounds import CollectiveSpeed


def cluster_lines(cluster: ClusterEvidence) -> Iterator[str]:
    """Yield tables of ranks, collectives and kinds of links."""
    clocks = {clock.rank: clock for clock in cluster.clocks}
    rows = []
    for rank in cluster.ranks:
        clock = clocks.get(rank.rank)
        rows.append(
            [
                f"{rank.rank}",
                rank.host,
                formatting.size(cluster.matmul_flops / rank.matmul.median).removesuffix("B") + "FLOP/s",
                f"{formatting.size(cluster.copy_bytes / rank.copy.median)}/s",
                "-" if clock is None else f"{1e3 * clock.middle_s:+.1f} ms",
            ]
        )
    yield from text_table(["rank", "machine", f"products in {cluster.dtype}", "memory", "clock"], rows, left=(0, 1))
    overheads = cluster.overheads
    if overheads is not None:
        yield f"the host starts an operation of a step in {1e6 * overheads.operation_s:.1f} us"
    if overheads is not None and overheads.sharded is not None:
        yield f"and needs {1e3 * overheads.shard_call_s:.2f} ms around each gather or reduction of sharded weights"
    if not cluster.links:
        return
    yield ""
    yield from _table_of_collectives("bytes", cluster.collectives)
    yield ""
    if overheads is not None:
        yield from _table_of_collectives("bytes, between computations", overheads.beside)
        yield ""
    yield from text_table(["links", "number", "bytes/s", "slowest", "latency"], list(_links(cluster)))


def _table_of_collectives(head: str, curves: Mapping[str, Sequence[CollectiveSpeed]]) -> Iterator[str]:
    rows = [
        [formatting.size(of_size[0].num_bytes), *(f"{1e3 * one.rounds.median:.2f} ms" for one in of_size)]
        for of_size in zip(*curves.values(), strict=True)
    ]
    yield from text_table([head, *(name.replace("_", "-") for name in curves)], rows)


def _links(cluster: ClusterEvidence) -> Iterator[list[str]]:
    for name, is_inside in (("within machines", True), ("between machines", False)):
        links = [link for link in cluster.links if link.is_inside == is_inside]
        if links:
            rates = [cluster.link_bytes / link.exchange.median for link in links]
            latency = statistics.median(link.latency.median for link in links)
            usual, slowest = (f"{formatting.size(one)}/s" for one in (statistics.median(rates), min(rates)))
            yield [name, f"{len(links)}", usual, slowest, f"{1e6 * latency:.0f} us"]
