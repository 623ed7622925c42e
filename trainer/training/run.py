"""State of one training run, shared by the modules of this package."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.checkpoint.identity import Parent
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.saver import Saver
from trainer.console.console import Console
from trainer.data.batches.copy_ahead import CopyAhead
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import Corpus
from trainer.data.token_cache.skipped import write_skipped
from trainer.distributed.mesh import Mesh
from trainer.distributed.version import turnout_version
from trainer.engine.base import Engine
from trainer.evaluation.tasks.base import Task
from trainer.experiment import ExperimentConfig
from trainer.metrics.bias_watch import BiasWatch
from trainer.metrics.profiler import Profiler
from trainer.metrics.system_stats import SystemStats
from trainer.models.flops import ModelSize
from trainer.parallel.canary import CanaryReport
from trainer.routing_record.replayed_rows import ReplayedRows
from trainer.trackers.base import JsonlTracker, Trackers
from trainer.training.best_so_far import BestSoFar
from trainer.training.early_stopping import EarlyStopping
from trainer.training.routing_recorder import RoutingRecorder
from trainer.training.spikes import SpikeWindow
from trainer.training.watch_alarms import AlarmWatch


@dataclass(slots=True, kw_only=True)
class RunState:
    """State of one training run on one rank."""

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
    """metrics.jsonl and routing.jsonl; None on ranks that do not write them."""
    machine: SystemStats
    profiler: Profiler
    size: ModelSize
    spikes: SpikeWindow
    ahead: CopyAhead
    best: BestSoFar
    early_stopping: EarlyStopping
    stopped_at: int | None = None
    """Completed steps when it stopped early; None: it did not."""
    bias_watch: BiasWatch = field(default_factory=BiasWatch)
    watch: AlarmWatch | None = None
    """Alarms; None on ranks that do not write logs, and where they are switched off."""
    recorder: RoutingRecorder | None = None
    """Records the experts of this run's steps; None: no record."""
    replayed: ReplayedRows | None = None
    """Experts recorded for this run's rows; None: none are given, or they come with the rows."""
    canary: CanaryReport | None = None
    """Findings about the experts kernel; None for a dense model."""
    id: str = ""
    """Run id for trackers; on rank 0 only."""
    parent: Parent | None = None
    """Run that this one branched off from; on rank 0 only."""
    start_step: int = 0
    """Completed steps."""
    position: int = 0
    """Number of the next training row: with the seed, the whole state of the data order."""
    tokens: int = 0
    """Tokens trained on so far, without padding."""
    optimizer_steps_taken_over: int = 0
    """Steps of another run whose optimizer state this one began with."""
    skipped_steps: int = 0
    """Steps that were not taken so far: non-finite ones and skipped spikes."""
    skipped_in_a_row: int = 0
    """Non-finite steps since the last step that was taken."""
    copies_equal_at: int | None = None
    """Completed steps at the last check that replicas are equal; None: not checked yet."""

    def checkpoint_info(self) -> dict[str, Any]:
        """Return the metadata of a checkpoint."""
        return {
            "id": self.id,
            "parent": self.parent_record(),
            "position": self.position,
            "optimizer_steps_taken_over": self.optimizer_steps_taken_over,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.record(),
            "alarms": {} if self.watch is None else self.watch.alarms.record(),
            "bias_watch": self.bias_watch.record(),
            "tokens": self.tokens,
            "logs": {} if self.logs is None else self.logs.record(),
            "streams": self.stream.stream_positions(self.position),
            "text": self.stream.text_order(self.position).model_dump(),
            "rows_of_a_step": self.config.train.global_batch_size,
            "data_fingerprint": self.corpus.fingerprint,
            "tokenizer_fingerprint": self.corpus.tokenizer.fingerprint,
            # No generator has state: weights, row order and noise are functions of the seed, the step and the row.
            "random": {"kind": "counter_based", "seed": self.config.seed},
            "layout": self.layout_record(),
            "versions": {"turnout": turnout_version(), "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
            **self.best.record(),
            **self.early_stopping.record(),
        }

    @property
    def last_step(self) -> int:
        """Completed steps at the end of the run."""
        return max(self.start_step, self.config.train.steps) if self.stopped_at is None else self.stopped_at

    def parent_record(self) -> dict[str, Any] | None:
        """Return the parent run as JSON values."""
        return None if self.parent is None else asdict(self.parent)

    def write_skipped_rows(self) -> None:
        """List the rows skipped so far in the run folder; a disk error is a warning."""
        try:
            skipped = self.stream.skipped(self.config.data.sources)
            write_skipped(self.folder.skipped_rows, skipped, keeps_blocks=self.position > self.stream.first_slot)
        except OSError as error:
            self.console.warning(f"{self.folder.skipped_rows}: cannot be written: {error.strerror or error}")

    def layout_record(self) -> dict[str, int | str]:
        """Return the layout as JSON values."""
        placement, layout = self.config.parallel.placement, self.mesh.layout
        return {
            "world_size": layout.world_size,
            "ep_size": layout.ep_size,
            "data": self.config.parallel.data,
            "engine": self.config.engine.kind,
            **({} if layout.cp_size == 1 else {"cp_size": layout.cp_size}),
            **({} if layout.tp_size == 1 else {"tp_size": layout.tp_size}),
            **({} if layout.pp_size == 1 else {"pp_size": layout.pp_size}),
            **({} if placement == "contiguous" else {"placement": placement}),
        }
