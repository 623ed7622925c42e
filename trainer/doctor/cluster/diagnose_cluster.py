"""Measure the ranks that were started, and name those, the links and the dispatcher that are slow."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.atomic_io import replace_file
from trainer.distributed import runtime
from trainer.distributed.mesh import joined
from trainer.distributed.rank_layout import Layout
from trainer.doctor.cluster.cluster_checks import CLUSTER_CHECKS
from trainer.doctor.cluster.cluster_evidence import ClusterEvidence
from trainer.doctor.cluster.cluster_lines import cluster_lines
from trainer.doctor.cluster.dispatch_checks import DISPATCH_CHECKS
from trainer.doctor.cluster.dispatch_evidence import DispatchEvidence
from trainer.doctor.cluster.dispatch_lines import dispatch_lines
from trainer.doctor.cluster.measure_cluster import measure_cluster
from trainer.doctor.cluster.measure_dispatchers import measure_dispatchers
from trainer.doctor.diagnosis import Diagnosis
from trainer.experiment import ExperimentConfig

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class MeasuredCluster:
    """Ranks and links, and dispatchers with the rows of a config."""

    cluster: ClusterEvidence
    dispatch: DispatchEvidence | None = None
    """None: without a config whose ranks share experts."""

    def record(self) -> dict[str, Any]:
        """Return JSON values, which `plan --links` reads."""
        return self.cluster.record() | ({} if self.dispatch is None else {"dispatchers": self.dispatch.record()})

    def lines(self) -> Iterator[str]:
        """Yield tables of everything."""
        yield from cluster_lines(self.cluster)
        if self.dispatch is not None:
            yield ""
            yield from dispatch_lines(self.dispatch)


def diagnose_cluster(
    device: str, layout: Layout, *, links: Path | None, config: ExperimentConfig | None = None
) -> tuple[MeasuredCluster, Diagnosis]:
    """Return what was measured on all ranks and what is found in it. Collective; rank 0 writes the file `links`.

    With a config whose experts the ranks of the layout share, its dispatcher is measured beside all others.
    """
    place, dispatch = runtime.start(device), None
    with joined(layout, place, timeout_s=_TIMEOUT_S) as mesh:
        cluster = measure_cluster(mesh, place)
        if config is not None and config.model.moe is not None and mesh.ep.size > 1:
            dispatch = measure_dispatchers(config, mesh, place)
    measured = MeasuredCluster(cluster, dispatch)
    notes = [] if layout.world_size > 1 else ["one rank has no links: start this by torchrun on all machines"]
    if links is not None and layout.rank == 0:
        replace_file(links, json.dumps(measured.record(), indent=1) + "\n")
    diagnosis = Diagnosis.of(CLUSTER_CHECKS, cluster, notes=notes)
    return measured, diagnosis if dispatch is None else diagnosis + Diagnosis.of(DISPATCH_CHECKS, dispatch)
