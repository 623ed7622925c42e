"""Measurements of a cluster as lines of a terminal. Imports no torch."""

import statistics
from collections.abc import Iterator

from trainer.console import formatting
from trainer.console.text_table import text_table
from trainer.doctor.cluster.cluster_evidence import ClusterEvidence


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
    if not cluster.links:
        return
    yield ""
    yield from text_table(["bytes", *(_spoken(name) for name in cluster.collectives)], list(_collectives(cluster)))
    yield ""
    yield from text_table(["links", "number", "bytes/s", "slowest", "latency"], list(_links(cluster)))


def _collectives(cluster: ClusterEvidence) -> Iterator[list[str]]:
    for of_size in zip(*cluster.collectives.values(), strict=True):
        times = [f"{1e3 * one.rounds.median:.2f} ms" for one in of_size]
        yield [formatting.size(of_size[0].num_bytes), *times]


def _spoken(name: str) -> str:
    return name.replace("_", "-")


def _links(cluster: ClusterEvidence) -> Iterator[list[str]]:
    for name, is_inside in (("within machines", True), ("between machines", False)):
        links = [link for link in cluster.links if link.is_inside == is_inside]
        if links:
            rates = [cluster.link_bytes / link.exchange.median for link in links]
            latency = statistics.median(link.latency.median for link in links)
            usual, slowest = (f"{formatting.size(one)}/s" for one in (statistics.median(rates), min(rates)))
            yield [name, f"{len(links)}", usual, slowest, f"{1e6 * latency:.0f} us"]
