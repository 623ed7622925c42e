"""Measure the ranks that were started, and name those and the links that are slow."""

import json
from pathlib import Path

from trainer.atomic_io import replace_file
from trainer.distributed import runtime
from trainer.distributed.mesh import joined
from trainer.distributed.rank_layout import Layout
from trainer.doctor.cluster.cluster_checks import CLUSTER_CHECKS
from trainer.doctor.cluster.cluster_evidence import ClusterEvidence
from trainer.doctor.cluster.measure_cluster import measure_cluster
from trainer.doctor.diagnosis import Diagnosis

_TIMEOUT_S = 60.0


def diagnose_cluster(device: str, layout: Layout, *, links: Path | None) -> tuple[ClusterEvidence, Diagnosis]:
    """Return what was measured on all ranks and what is found in it. Collective; rank 0 writes the file `links`."""
    place = runtime.start(device)
    with joined(layout, place, timeout_s=_TIMEOUT_S) as mesh:
        evidence = measure_cluster(mesh, place)
    notes = [] if layout.world_size > 1 else ["one rank has no links: start this by torchrun on all machines"]
    if links is not None and layout.rank == 0:
        replace_file(links, json.dumps(evidence.record(), indent=1) + "\n")
    return evidence, Diagnosis.of(CLUSTER_CHECKS, evidence, notes=notes)
