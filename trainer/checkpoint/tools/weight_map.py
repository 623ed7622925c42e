"""Map from another trainer's weights to ours: a YAML file. Imports no torch."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config, Problem

Name = Annotated[str, Field(min_length=1, max_length=500)]


class WeightMapConfig(Config):
    """Names of ours, and where each of them comes from.

    `<layer>` stands for a number on both sides, `<expert>` in a source for each expert's in turn. Several sources are
    put together along their first dimension.
    """

    weights: dict[Name, Name | list[Name]]
    """Our name, or a pattern of our names: the name or names there."""
    ignore: list[Name] = Field(default_factory=list)
    """Names there, with * and ?, that are not needed."""
    transpose: list[Name] = Field(default_factory=list)
    """Names there, with * and ?, whose two dimensions are the other way round."""

    def problems(self) -> Iterator[Problem]:
        """Refuse numbers that nobody can know."""
        for ours, theirs in self.weights.items():
            if ours.count("<layer>") > 1:
                yield Problem("weights", f"{ours}: has <layer> more than once")
            if not theirs:
                yield Problem("weights", f"{ours}: has no source")
            for source in [theirs] if isinstance(theirs, str) else theirs:
                unknown = set(re.findall("<.*?>", source)) - {"<expert>", *re.findall("<layer>", ours)}
                if unknown:
                    yield Problem("weights", f"{source}: {min(unknown)} is not in {ours}")

    def sources(self, name: str) -> list[str] | None:
        """Return where one of our weights comes from, `<expert>` left as it is; None if nothing says so."""
        for ours, theirs in self.weights.items():
            pattern = re.escape(ours).replace("<layer>", r"(?P<layer>\d+)")
            match = re.fullmatch(pattern, name)
            if match is not None:
                layer = match.groupdict().get("layer", "")
                found = [theirs] if isinstance(theirs, str) else theirs
                return [source.replace("<layer>", layer) for source in found]
        return None
