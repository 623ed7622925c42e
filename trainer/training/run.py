"""Everything of one training run, as the loop and the guard have it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.checkpoint.identity import Parent
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.saver import Saver
from trainer.console.console import Console
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import Corpus
from trainer.data.token_cache.skipped import write_list
from trainer.distributed.mesh import Mesh
from trainer.distributed.version import turnout_version
from trainer.engine.base import Engine
from trainer.evaluation.tasks.base import Task
from trainer.experiment import ExperimentConfig
from trainer.metrics.profiler import Profiler
from trainer.metrics.system_stats import Machine
from trainer.models.flops import ModelSize
from trainer.trackers.base import JsonlTracker, Trackers
from trainer.training.spikes import SpikeWindow


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything of one training run."""

    config: ExperimentConfig
    mesh: Mesh
    folder: RunFolder
    corpus: Corpus
    stream: TrainStream
    tasks: Sequence[Task]
    engine: Engine
    schedule: Callable[[int], float]
    saver: Saver
    console: Console
    trackers: Trackers
    logs: JsonlTracker | None
    """metrics.jsonl and routing.jsonl, where this rank writes them."""
    machine: Machine
    profiler: Profiler
    size: ModelSize
    spikes: SpikeWindow
    id: str = ""
    """Run id for trackers; rank 0 knows it."""
    parent: Parent | None = None
    """The run that it branched off from; rank 0 knows it."""
    start_step: int = 0
    """Completed steps."""
    position: int = 0
    """Number of the next training row: with the seed, all there is to resume of the data."""
    tokens: int = 0
    """Tokens read so far, without padding."""
    skipped_steps: int = 0
    """Steps so far that were not taken: not finite, or skipped spikes."""
    skipped_in_a_row: int = 0
    """Steps that were not finite since the last one that was taken."""
    copies_equal_at: int | None = None
    """Completed steps when ranks were last seen to hold equal copies; None: not looked yet."""

    def checkpoint_info(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself beside the state."""
        return {
            "id": self.id,
            "parent": self.parent_record(),
            "position": self.position,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.record(),
            "tokens": self.tokens,
            "logs": {} if self.logs is None else self.logs.record(),
            "streams": self.stream.places(self.position),
            "rows_of_a_step": self.config.train.global_batch_size,
            "data_fingerprint": self.corpus.fingerprint,
            "tokenizer_fingerprint": self.corpus.tokenizer.fingerprint,
            # No generator has a state: weights, order of the rows and all noise are functions of this and the numbers
            # of step and row.
            "random": {"kind": "counter_based", "seed": self.config.seed},
            "layout": self.layout(),
            "versions": {"turnout": turnout_version(), "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
        }

    def parent_record(self) -> dict[str, Any] | None:
        """Return the run that it branched off from, in JSON values."""
        return None if self.parent is None else asdict(self.parent)

    def list_skipped_rows(self) -> None:
        """Write what was left out of the text so far into the run folder; a disk that refuses is a warning."""
        try:
            skipped = self.stream.skipped(self.config.data.sources)
            write_list(self.folder.skipped_rows, skipped, goes_on=self.position > 0)
        except OSError as error:
            self.console.warning(f"{self.folder.skipped_rows}: cannot be written: {error.strerror or error}")

    def layout(self) -> dict[str, int | str]:
        """Return who trains, in JSON values."""
        return {
            "world_size": self.mesh.layout.world_size,
            "ep_size": self.mesh.layout.ep_size,
            "data": self.config.parallel.data,
            "engine": self.config.engine.kind,
        }
