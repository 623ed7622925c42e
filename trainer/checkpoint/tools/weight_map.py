"""Config of a weight map: from another trainer's weight names to ours. Imports no torch."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config, Problem

Name = Annotated[str, Field(min_length=1, max_length=500)]


class WeightMapConfig(Config):
    """Sources of each of our weights.

    `<layer>` stands for a layer number on both sides, `<expert>` in a source for the number of each expert. Several
    sources are concatenated along dimension 0.
    """

    weights: dict[Name, Name | list[Name]]
    """Our name, or a pattern of our names: the name or names of its sources."""
    ignore: list[Name] = Field(default_factory=list)
    """Names of sources that are not needed; * and ? are wildcards."""
    transpose: list[Name] = Field(default_factory=list)
    """Names of two-dimensional sources to transpose; * and ? are wildcards."""

    def problems(self) -> Iterator[Problem]:
        """Refuse placeholders that cannot be resolved."""
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
        """Return the sources of one of our weights, with `<expert>` unresolved; None if it is not in the map."""
        for ours, theirs in self.weights.items():
            pattern = re.escape(ours).replace("<layer>", r"(?P<layer>\d+)")
            match = re.fullmatch(pattern, name)
            if match is not None:
                layer = match.groupdict().get("layer", "")
                found = [theirs] if isinstance(theirs, str) else theirs
                return [source.replace("<layer>", layer) for source in found]
        return None
