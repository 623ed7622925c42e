"""The `metrics` and `profile` sections. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config.base import LINE_PATTERN, Config, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.numbers import Count, Rows, Steps, Whole
from trainer.config.plugins import KindConfig, Pluggable
from trainer.errors import ConfigError

_NOT_IN_A_PROJECT = r"/\#?%:"
Label = Annotated[str, Field(min_length=1, max_length=128, pattern=LINE_PATTERN)]
Tag = Annotated[str, Field(min_length=1, max_length=64, pattern=LINE_PATTERN)]


class WandbConfig(Config):
    """Weights & Biases: the same metrics there, sent by a process beside rank 0 for which the run never waits."""

    mode: Literal["disabled", "auto", "online", "offline"] = "disabled"
    """`auto`: online if wandb finds an API key (WANDB_API_KEY, netrc), else offline. Offline runs stay in the run
    folder, for `wandb sync`; so does one whose server does not answer."""
    project: Label | None = None
    """Null: WANDB_PROJECT, or turnout."""
    entity: Label | None = None
    """User or team. Null: WANDB_ENTITY, or the key's own."""
    group: Label | None = None
    """Shows runs together."""
    name: Label | None = None
    """Name of the run there. Null: `name` of the experiment."""
    job_type: Label | None = None
    """A second way to sort runs."""
    tags: list[Tag] = Field(default=[])
    """Words to find it by."""
    notes: Annotated[str, Field(max_length=10000)] | None = None
    """Free notes on the run."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield wandb, where it is used."""
        if self.mode != "disabled":
            yield "mode", "wandb"

    def problems(self) -> Iterator[Problem]:
        """Reject values that wandb would reject later or misread."""
        bad = [c for c in _NOT_IN_A_PROJECT if c in (self.project or "")]
        if bad:
            yield Problem(
                "project", f"{shown(self.project)} has {' '.join(bad)}; wandb allows none of / \\ # ? % : in it"
            )
        if "/" in (self.entity or ""):
            yield Problem("entity", f"{shown(self.entity)} has a slash; give the user or team alone, and set project")
        if twice := repeated(self.tags):
            yield Problem("tags", f"{shown(twice[0])} is there twice; remove one")


class TrackerOptions(KindConfig):
    """Base class of the configs of trackers that are plug-ins."""

    def build(self, folder: Path, *, start_step: int, config: dict[str, Any]) -> Any:
        """Make the tracker, which has the methods of `trainer.trackers.base.Tracker`.

        Args:
            folder: folder of the run.
            start_step: completed steps; records of later steps that it has from before are void.
            config: the whole configuration as plain values.
        """
        raise NotImplementedError

    def problems(self) -> Iterator[Problem]:
        """Refuse a kind that is no plug-in."""
        if type(self) is TrackerOptions:
            yield Problem("kind", "no tracker has this name; write my_package.module:ClassConfig")


TrackerConfig = Annotated[TrackerOptions, Pluggable("trackers", TrackerOptions)]


class MetricsConfig(Config):
    """Metrics that are logged while training, to metrics.jsonl and routing.jsonl at least."""

    log_every: Count = 10
    """Steps between lines of metrics.jsonl and routing.jsonl."""
    peak_tflops: Annotated[float, Field(ge=1e-6, le=1e9)] | None = None
    """Peak of one rank's device in this precision, for `mfu`. Null: not reported where it is unknown."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write the same metrics to the run folder for TensorBoard, too; needs `pip install 'turnout[tensorboard]'`."""
    trackers: list[TrackerConfig] = Field(default=[])
    """Trackers of your own, which get the same metrics."""
    routing_gap_every: Count | None = None
    """Steps between comparisons of the routers' choices with the best ones there are (`routing_gap`). Null: never."""
    routing_gap_rows: Rows = 2
    """Rows of each domain's held-out text that are compared, the same ones every time. A linear programme each."""
    heatmap_every: Count | None = 10
    """In wandb and TensorBoard every so many logged steps have, for each MoE layer, the load of each of its experts
    (1 is an even share): drawn over the steps, a heat map. Null: never."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield what the trackers need, and the solver that `routing_gap` is measured with."""
        if self.tensorboard:
            yield "tensorboard", "tensorboard"
        if self.routing_gap_every is not None:
            yield "routing_gap_every", "scipy"


class ProfileConfig(Config):
    """Steps that torch's profiler looks at; what is learned does not change by it."""

    start: Steps = 10
    """First step, counted from 1 over the whole run."""
    steps: Steps = 3
    """Number of steps; a trace has every operation of them."""
    ranks: Annotated[list[Whole], Field(min_length=1)] = Field(default=[0])
    """Ranks to profile."""
    shapes: bool = False
    """Record the shapes that operations work on."""
    stacks: bool = False
    """Record where in the code operations come from: slower, and a larger trace."""
    memory: bool = False
    """Record what is allocated and freed; on a GPU with a snapshot for pytorch.org/memory_viz."""

    @property
    def last(self) -> int:
        """The last step."""
        return self.start + self.steps - 1

    def problems(self) -> Iterator[Problem]:
        """Refuse a rank that is named twice."""
        for twice in repeated(self.ranks):
            yield Problem("ranks", f"{twice} is named twice; name each rank once")

    def check_ranks(self, world_size: int) -> None:
        """Refuse ranks that there are not.

        Raises:
            ConfigError: with the first of them.
        """
        for rank in self.ranks:
            if rank >= world_size:
                raise ConfigError(
                    f"profile.ranks: there is no rank {rank} among {world_size}; use 0 to {world_size - 1}"
                )
