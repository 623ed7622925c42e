"""Translate another trainer's weights into ours by a weight map.

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

    `map_` has the sources among `theirs` of each of our weights, `ours` the shapes of all our parameters, `of_experts`
    E of each of our stacked expert weights.

    Raises:
        CheckpointError: naming our weights without a source, sources that are missing or have another shape, and their
            weights that are not used.
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
    """Their weights, with a record of which were used and of all problems. Methods return None after a problem."""

    def __init__(self, weights: Mapping[str, Tensor], transpose: Sequence[str]) -> None:
        self._weights, self._transpose = weights, transpose
        self._used: set[str] = set()
        self.problems: list[str] = []

    def make(self, ours: str, sources: Sequence[str] | None, num_experts: int | None) -> Tensor | None:
        """Return one of our weights from its sources, stacked over `num_experts` unless that is None."""
        if sources is None:
            self.problems.append(f"{ours}: no line of the map says where it comes from")
            return None
        if num_experts is None:
            return self._concatenate(sources)
        if not all("<expert>" in source for source in sources):
            self.problems.append(f"{ours}: is one tensor for each expert there; write <expert> for its number")
            return None
        return self._stack(ours, [[s.replace("<expert>", str(e)) for s in sources] for e in range(num_experts)])

    def unused(self, ignore: Sequence[str]) -> list[str]:
        """Return a problem for each of their weights that was not used."""
        rest = [n for n in self._weights if n not in self._used and not _matches(n, ignore)]
        return [f"{name}: is not used; map it, or name it under `ignore`" for name in rest]

    def _take(self, name: str) -> Tensor | None:
        self._used.add(name)
        if name not in self._weights:
            near = get_close_matches(name, self._weights, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(f"{name}: is not in the checkpoint{hint}")
            return None
        tensor = self._weights[name].float()
        if not _matches(name, self._transpose):
            return tensor
        if tensor.dim() != 2:
            self.problems.append(f"{name}: has {tensor.dim()} dimensions, and `transpose` is for two")
            return None
        return tensor.mT

    def _concatenate(self, names: Sequence[str]) -> Tensor | None:
        parts = [self._take(name) for name in names]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return None
        try:
            return torch.cat(present) if len(present) > 1 else present[0]
        except RuntimeError:
            self.problems.append(f"{names[0]}: cannot be put together with {', '.join(names[1:])}: other shapes")
            return None

    def _stack(self, ours: str, names: Sequence[Sequence[str]]) -> Tensor | None:
        """Return the tensors of all experts, stacked; `names` are the sources of each."""
        experts = [self._concatenate(of_one) for of_one in names]
        present = [expert for expert in experts if expert is not None]
        shapes = sorted({str(list(expert.shape)) for expert in present})
        if len(shapes) > 1:
            self.problems.append(f"{ours}: experts have different shapes there: {', '.join(shapes)}")
        return torch.stack(present) if len(present) == len(experts) and len(shapes) == 1 else None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
