"""The `metrics` and `profile` sections. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config.base import LINE_PATTERN, Config, PathText, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.numbers import Count, Rows, Steps, Whole
from trainer.config.plugins import KindConfig, Pluggable
from trainer.errors import ConfigError
from trainer.metrics.alarms.config import AlarmsConfig

_NOT_IN_A_PROJECT = r"/\#?%:"
Label = Annotated[str, Field(min_length=1, max_length=128, pattern=LINE_PATTERN)]
Tag = Annotated[str, Field(min_length=1, max_length=64, pattern=LINE_PATTERN)]


class WandbConfig(Config):
    """Weights & Biases: uploads the same metrics in a separate process that the run never waits for while it trains."""

    mode: Literal["disabled", "auto", "online", "offline"] = "disabled"
    """`auto`: online unless WANDB_MODE or a missing API key (WANDB_API_KEY, netrc) prevents it. `turnout sync-wandb`
    uploads an offline run, and what a server did not take."""
    project: Label | None = None
    """Null: WANDB_PROJECT, or turnout."""
    entity: Label | None = None
    """User or team. Null: WANDB_ENTITY, or the key's own."""
    group: Label | None = None
    """Group of runs."""
    name: Label | None = None
    """Name of the run there. Null: `name` of the experiment."""
    job_type: Label | None = None
    """Job type of the run."""
    tags: list[Tag] = Field(default=[])
    """Tags of the run."""
    notes: Annotated[str, Field(max_length=10000)] | None = None
    """Notes on the run."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield wandb, where it is used."""
        if self.mode != "disabled":
            yield "mode", "wandb"

    def problems(self) -> Iterator[Problem]:
        """Reject values that wandb would reject later or misread."""
        bad = [c for c in _NOT_IN_A_PROJECT if c in (self.project or "")]
        if bad:
            message = f"{shown(self.project)} has {' '.join(bad)}; wandb allows none of / \\ # ? % : in it"
            yield Problem("project", message)
        if "/" in (self.entity or ""):
            yield Problem("entity", f"{shown(self.entity)} has a slash; give the user or team alone, and set project")
        if twice := repeated(self.tags):
            yield Problem("tags", f"{shown(twice[0])} is there twice; remove one")


class TrackerOptions(KindConfig):
    """Base class of the configs of trackers that are plug-ins."""

    def build(self, folder: Path, *, start_step: int, config: dict[str, Any]) -> Any:
        """Make the tracker, which has the methods of `trainer.trackers.base.Tracker`, for the run in `folder`.

        Records that it has of steps after `start_step`, the completed ones, are void; `config` is the whole
        configuration as plain values.
        """
        raise NotImplementedError

    def problems(self) -> Iterator[Problem]:
        """Reject a kind that is not a plug-in."""
        if type(self) is TrackerOptions:
            yield Problem("kind", "no tracker has this name; write my_package.module:ClassConfig")


TrackerConfig = Annotated[TrackerOptions, Pluggable("trackers", TrackerOptions)]


class RoutingRecordConfig(Config):
    """A record of every token's experts in training, which `train.routing_replay` replays."""

    every: Count = 1
    """Steps between recorded steps. A replay needs every step."""
    path: PathText | None = None
    """Folder of the record. Null: routing_record in the run's folder."""


class MetricsConfig(Config):
    """Metrics logged during training, always to metrics.jsonl and routing.jsonl."""

    log_every: Count = 10
    """Steps between lines of metrics.jsonl and routing.jsonl."""
    peak_tflops: Annotated[float, Field(ge=1e-6, le=1e9)] | None = None
    """Peak of one rank's device in this precision, for `mfu`. Null: not reported where it is unknown."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write the same metrics to the run folder for TensorBoard; needs `pip install 'turnout[tensorboard]'`."""
    trackers: list[TrackerConfig] = Field(default=[])
    """Plug-in trackers, which get the same metrics."""
    routing_gap_every: Count | None = None
    """Steps between comparisons of the routers' choices with the optimum (`routing_gap`). Null: never."""
    routing_gap_rows: Rows = 2
    """Rows of each domain's held-out text to compare, always the same; each takes a linear programme."""
    routing_record: RoutingRecordConfig | None = None
    """Record each token's experts, before drops (docs/routing_replay.md). Null: no record."""
    alarms: AlarmsConfig | None = AlarmsConfig()
    """Alarms while training (docs/alarms.md). Null: none."""
    report: Literal["logs", "full"] | None = "logs"
    """The page report.html, with its numbers as report.json, in the run folder when a training ends (docs/report.md).
    `logs`: from its logs, in a tenth of a second. `full`: once all steps are done, measured as `turnout report` does,
    experts and their words too, on rank 0's device for at most 4 minutes. Null: none."""
    heatmap_every: Count | None = 10
    """Logged steps between expert loads in wandb and TensorBoard (1 is an even share), a heat map over steps for each
    MoE layer. Null: never."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the packages of the trackers, and the solver of `routing_gap`."""
        if self.tensorboard:
            yield "tensorboard", "tensorboard"
        if self.routing_gap_every is not None:
            yield "routing_gap_every", "scipy"


class ProfileConfig(Config):
    """Steps to profile with torch; does not change what is learned."""

    start: Steps = 10
    """First step, counted from 1 over the whole run."""
    steps: Steps = 3
    """Number of steps; the trace has every operation of them."""
    ranks: Annotated[list[Whole], Field(min_length=1)] = Field(default=[0])
    """Ranks to profile."""
    shapes: bool = False
    """Record the shapes of operands."""
    stacks: bool = False
    """Record the call stack of operations: slower, and a larger trace."""
    memory: bool = False
    """Record allocations; on a GPU with a snapshot for pytorch.org/memory_viz."""

    @property
    def last(self) -> int:
        """The last step."""
        return self.start + self.steps - 1

    def problems(self) -> Iterator[Problem]:
        """Reject a rank that is listed twice."""
        for twice in repeated(self.ranks):
            yield Problem("ranks", f"{twice} is named twice; name each rank once")

    def check_ranks(self, world_size: int) -> None:
        """Raise ConfigError for the first rank that does not exist."""
        for rank in self.ranks:
            if rank >= world_size:
                raise ConfigError(
                    f"profile.ranks: there is no rank {rank} among {world_size}; use 0 to {world_size - 1}"
                )
