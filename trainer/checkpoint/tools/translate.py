"""Another trainer's weights made ours, as a map says which become which.

# E experts.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from trainer.checkpoint.finite import not_finite
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.errors import CheckpointError

_SHOWN = 5


def translate(
    theirs: Mapping[str, Tensor], map_: WeightMapConfig, ours: Mapping[str, torch.Size], of_experts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the weights of our model.

    Args:
        theirs: their weights by their names.
        map_: which of them become which of ours.
        ours: shapes of all our parameters.
        of_experts: names of the stacked ones among them, with E.

    Raises:
        CheckpointError: naming every weight of ours that has no source, every source that is missing or has another
            shape, and every weight of theirs that is not used.
    """
    source = _Source(theirs, map_.transpose)
    result: dict[str, Tensor] = {}
    for name, shape in ours.items():
        tensor = source.make(name, map_.sources(name), of_experts.get(name))
        if tensor is None:
            continue
        if not_finite({name: tensor}):
            source.problems.append(f"{name}: is not finite there; use another checkpoint")
        if tensor.shape != shape:
            source.problems.append(f"{name}: is {list(shape)} here and {list(tensor.shape)} there; the models differ")
        result[name] = tensor
    problems = [*source.problems, *source.unused(map_.ignore)]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointError("\n".join(problems[:_SHOWN] + more))
    assert result.keys() == ours.keys(), "every weight without a source is a problem"
    return result


class _Source:
    """Their weights: what is taken of them, and what is wrong with it. None stands for what could not be made."""

    def __init__(self, weights: Mapping[str, Tensor], transpose: Sequence[str]) -> None:
        self._weights, self._transpose = weights, transpose
        self._used: set[str] = set()
        self.problems: list[str] = []

    def make(self, ours: str, sources: Sequence[str] | None, num_experts: int | None) -> Tensor | None:
        """Return a weight of ours, of the sources that the map names; `num_experts` if it is stacked."""
        if sources is None:
            self.problems.append(f"{ours}: no line of the map says where it comes from")
            return None
        if num_experts is None:
            return self._joined(sources)
        if not all("<expert>" in source for source in sources):
            self.problems.append(f"{ours}: is one tensor for each expert there; write <expert> for its number")
            return None
        return self._stacked(ours, [[s.replace("<expert>", str(e)) for s in sources] for e in range(num_experts)])

    def unused(self, ignore: Sequence[str]) -> list[str]:
        """Return what is wrong with weights of theirs that nothing was made of."""
        rest = [n for n in self._weights if n not in self._used and not _is_among(n, ignore)]
        return [f"{name}: is not used; map it, or name it under `ignore`" for name in rest]

    def _taken(self, name: str) -> Tensor | None:
        self._used.add(name)
        if name not in self._weights:
            near = get_close_matches(name, self._weights, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(f"{name}: is not in the checkpoint{hint}")
            return None
        tensor = self._weights[name].float()
        if not _is_among(name, self._transpose):
            return tensor
        if tensor.dim() != 2:
            self.problems.append(f"{name}: has {tensor.dim()} dimensions, and `transpose` is for two")
            return None
        return tensor.mT

    def _joined(self, names: Sequence[str]) -> Tensor | None:
        parts = [self._taken(name) for name in names]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return None
        try:
            return torch.cat(present) if len(present) > 1 else present[0]
        except RuntimeError:
            self.problems.append(f"{names[0]}: cannot be put together with {', '.join(names[1:])}: other shapes")
            return None

    def _stacked(self, ours: str, names: Sequence[Sequence[str]]) -> Tensor | None:
        """Return what `names` has for each expert, as one tensor."""
        experts = [self._joined(of_one) for of_one in names]
        present = [expert for expert in experts if expert is not None]
        shapes = sorted({str(list(expert.shape)) for expert in present})
        if len(shapes) > 1:
            self.problems.append(f"{ours}: experts have different shapes there: {', '.join(shapes)}")
        return torch.stack(present) if len(present) == len(experts) and len(shapes) == 1 else None


def _is_among(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
