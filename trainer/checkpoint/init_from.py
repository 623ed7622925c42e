"""The `init_from` section: the first weights of a new run, taken from elsewhere. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, PathText, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.numbers import Whole
from trainer.models.parameter_patterns import PatternText, unknown_role

Renaming = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*-]{1,300}$")]
"""Name of a tensor; * is a wildcard."""


class InitFromConfig(Config):
    """Another model whose weights are the first ones of a new run: a run, one of its checkpoints or a published one."""

    run: PathText | None = None
    """Folder of a run; its newest intact checkpoint, or that of `step`."""
    checkpoint: PathText | None = None
    """Folder of one checkpoint, step_N."""
    hf: PathText | None = None
    """Folder of a published model, with config.json and safetensors."""
    step: Whole | None = None
    """Step of the checkpoint of `run`. Null: the newest."""
    parts: Literal["weights", "weights+optimizer"] = "weights"
    """Parts taken: weights, or also the optimizer's moments and step count, of tensors that are taken whole."""
    exclude: list[PatternText] = Field(default_factory=list)
    """Tensors that are not taken: roles or names, as in train.freeze. Those of this model start from initial values."""
    rename: dict[Renaming, Renaming] = Field(default_factory=dict)
    """Name there: name here. A * stands for any text, which each * of the name here repeats in turn."""

    @property
    def path(self) -> str:
        """Where the other model is."""
        return self.run or self.checkpoint or self.hf or ""

    def problems(self) -> Iterator[Problem]:
        """Refuse no source or several, and options that do not go with it."""
        given = [key for key in ("run", "checkpoint", "hf") if getattr(self, key) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "nothing is named"
            yield Problem("", f"{what}; name exactly one of run, checkpoint and hf, or set init_from: null")
        if self.step is not None and self.run is None:
            yield Problem("step", f"{self.step}, and no run is named; it belongs to `run`, so leave it out")
        if self.parts != "weights" and self.hf is not None:
            yield Problem("parts", f"{self.parts}, and a published model has no optimizer state; use weights")
        for pattern in repeated(self.exclude):
            yield Problem("exclude", f"{shown(pattern)} is named twice; name it once")
        for problem in filter(None, map(unknown_role, self.exclude)):
            yield Problem("exclude", problem)
        for old, new in self.rename.items():
            if new.count("*") > old.count("*"):
                yield Problem("rename", f"{old}: {new} has more * than it; each * repeats one of the name there")
