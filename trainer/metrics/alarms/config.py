"""The `metrics.alarms` section. Imports no torch."""

from typing import Annotated

from pydantic import Field

from trainer.config.base import Config
from trainer.config.numbers import Factor, Steps

Share = Annotated[float, Field(gt=0, lt=1)]


class AlarmsConfig(Config):
    """Alarms while training: on the console, in alarms.jsonl and in wandb. Null as threshold switches an alarm off."""

    patience: Steps = 50
    """Steps that a condition must hold, at every logged step and at three at least, before its alarm rings. As many
    without it end the alarm."""
    repeat_after: Steps = 1000
    """Steps after which an alarm that goes on is shown again; before that only if it became twice as bad."""
    collapse: Share | None = 0.1
    """Experts in use beyond k, as a share of those beyond k, below which a layer has collapsed: exp of the entropy of
    the load counts the experts in use."""
    alike_tokens: Share | None = 1e-3
    """Information that a router has of the token, as a share of ln E, below which all tokens are alike to it."""
    dead_expert: Share | None = 0.01
    """Load of an expert, as a share of an even one, below which it is dead."""
    imbalance: Factor | None = 2.0
    """Load of the busiest expert over the mean, or half way to the most that is possible if that is less, from which an
    imbalance counts: for `imbalance_growth` and `bias_steps`. Null switches both off."""
    imbalance_growth: Factor | None = 1.5
    """Growth of the imbalance over 60 steps that is an alarm."""
    bias_steps: Steps | None = 1000
    """Steps that a selection bias still needs at its pace, from which it is inert; so is one that does not move, or
    that has left the range of the scores."""
    entropy: Share | None = 0.01
    """Entropy of the router probabilities, as a share of ln E, below which a router no longer explores."""
    router_gradient: Share | None = 1e-6
    """Norm of a router's gradient over that of the whole gradient, below which it has vanished."""
    plateau: Share | None = 0.005
    """Fall of the loss, as a share of it, over the second half of the window that is too little: if even two standard
    errors more would be less. A rate of 0 is too little too."""
    plateau_steps: Steps = 80
    """Window of the plateau, or half of all steps so far if that is more."""
    slow_rank: Factor | None = 1.25
    """Own time of the slowest rank, without waiting, over the median rank's, from which it holds up the others."""
