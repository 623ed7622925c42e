"""The `train` section: length and precision of training. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, PathText, Problem
from trainer.config.metric_direction import ComparedMetric, MetricKey
from trainer.config.numbers import Count, Factor, Rows, Steps, Whole
from trainer.models.parameter_patterns import PatternText, unknown_role

RateFactor = Annotated[float, Field(ge=0, le=1e6)]


class SpikesConfig(Config):
    """Losses far above those of recent steps: reported, counted in `loss_spikes` and, optionally, skipped."""

    sigmas: Factor | None = 6.0
    """A spike is a loss above mean + sigmas * standard deviation of the window. Null: no detection."""
    window: Annotated[int, Field(gt=0, le=2**20)] = 128
    """Number of recent losses of steps that were taken; no spike is detected before there are 32."""
    skip: bool = False
    """Skip the step of a spike on all ranks. After `max_consecutive_skips` in a row the window restarts, so that a loss
    that stays high is accepted."""

    def problems(self) -> Iterator[Problem]:
        """Check that the window can detect spikes, and that skipping has something to skip."""
        if self.window < 32:
            yield Problem("window", f"{self.window} losses are too few to detect spikes; use at least 32")
        if self.skip and self.sigmas is None:
            yield Problem("skip", "true, but sigmas is null, so no loss is a spike; set sigmas, or skip: false")


class RoutingReplayConfig(Config):
    """Replay of recorded experts: each token gets those of the record, weighted by the live router (R3, 2510.11370)."""

    path: PathText
    """Folder of a routing record (docs/routing_replay.md)."""
    rows: Literal["recorded", "sequences"] = "recorded"
    """Training rows. `recorded`: the rows of `data`, which must be those of the recorded training run. `sequences`: the
    sequences of the record, as an inference engine or `generate --record` has them; `data` is then read for the
    tokenizer and held-out text only."""


class EMAConfig(Config):
    """Exponential moving average of the weights: average = decay * average + (1 - decay) * weights."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that an update keeps: it looks back about every / (1 - decay) steps."""
    start_step: Whole = 0
    """Optimizer steps before the average begins, counted without skipped steps; until then it equals the weights."""
    every: Count = 1
    """Optimizer steps between updates."""
    warmup: bool = False
    """Keep min(decay, (1 + n) / (10 + n)) in update n = 0, 1, ..., so that the first weights are soon forgotten."""


class EarlyStoppingConfig(ComparedMetric):
    """End of a run whose evaluations no longer improve."""

    metric: MetricKey = "eval/loss"
    """Its key in metrics.jsonl: eval/loss, eval/ema/loss, eval/DOMAIN/loss, eval/TASK/acc."""
    patience: Count = 5
    """Evaluations in a row that may be no better than the best one; the run stops after the last of them."""
    min_delta: Annotated[float, Field(ge=0, le=1e30)] = 0.0
    """How much better a value must be to count."""


class TrainConfig(Config):
    """Length and precision of training."""

    steps: Steps = 2000
    """Optimizer steps."""
    stop_after: Steps | None = None
    """Evaluate, save and stop after this step, as after a signal; the learning rate still follows the schedule of all
    `steps`. Without it the same command goes on. Null: train to the end."""
    global_batch_size: Rows = 64
    """Sequences in one optimizer step, over all ranks and micro-batches."""
    grad_clip: Annotated[float, Field(gt=0, le=1e30)] | None = 1.0
    """Largest 2-norm of the whole gradient. Null: measured but not clipped."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of matrix products. Parameters and optimizer state are float32 (float64 with float64)."""
    max_consecutive_skips: Count = 5
    """Stop after this many non-finite steps since the last step that was taken."""
    spikes: SpikesConfig = SpikesConfig()
    """Detection of loss spikes."""
    freeze: list[PatternText] = Field(default=[])
    """Weights that do not learn: roles (embedding, head, norms, attention, router, experts, shared, dense) and patterns
    of names (blocks.0.*, *.attention.qkv). An entry with an exclamation mark is an exception: ["*", "!router"]."""
    lr_scale: dict[str, RateFactor] = Field(default={})
    """Factors of the learning rate, by the same roles and patterns: {router: 0.1, blocks.0.*: 0.5}. A weight that
    several match has the product."""
    routing_replay: RoutingReplayConfig | None = None
    """Recorded experts to use instead of the routers' choices. Null: the routers choose."""
    ema: EMAConfig | None = None
    """Moving average of the weights, evaluated beside them and saved with them. Null: none."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop, with a last checkpoint, when evaluations no longer improve. Null: train to `steps`."""

    def problems(self) -> Iterator[Problem]:
        """Check the roles, that exceptions have something to be excepted from, and that an average is ever updated."""
        if self.ema is not None and (first := self.ema.start_step + self.ema.every) > self.steps:
            given = f"the first update is after step {first}, and train.steps is {self.steps}"
            yield Problem("ema", f"{given}; lower start_step or every, or use null")
        if self.stop_after is not None and self.stop_after >= self.steps:
            message = f"{self.stop_after} is not before the end, steps {self.steps}; use a smaller number, or null"
            yield Problem("stop_after", message)
        for index, entry in enumerate(self.freeze):
            if (wrong := unknown_role(entry)) is not None:
                yield Problem(f"freeze.{index}", wrong)
        for entry, factor in self.lr_scale.items():
            if (wrong := unknown_role(entry, may_except=False)) is not None:
                yield Problem("lr_scale", wrong)
            if factor == 0:
                yield Problem("lr_scale", f"{entry} is 0; use a factor above 0, or list it in train.freeze")
        if self.freeze and all(entry.startswith("!") for entry in self.freeze):
            yield Problem("freeze", 'there are exceptions only, so nothing is frozen; begin with what is, such as "*"')
