"""The `checkpoint` section: when to save, and which checkpoints to keep. Imports no torch."""

from typing import Annotated

from pydantic import Field

from trainer.config.base import Config
from trainer.config.numbers import MAX_INT, Count, Seconds


class CheckpointConfig(Config):
    """When to save, and which checkpoints to keep."""

    every: Count | None = 500
    """Steps between checkpoints; the last step is always saved. Null: only the last step."""
    keep: Annotated[int, Field(ge=2, le=MAX_INT)] = 3
    """Number of newest intact checkpoints to keep: at least two, in case one is damaged."""
    keep_every: Count | None = None
    """Keep checkpoints of steps that are a multiple of this forever. Null: none."""
    retry_s: Seconds = 600.0
    """How long to retry the final save after a disk error, in seconds."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in memory. False: training waits, and no copy is made."""
