"""Weights out of a checkpoint that DeepSpeed wrote for a model with its own MoE layers, under our names.

FOLDER/latest                                          names TAG
FOLDER/TAG/mp_rank_00_model_states.pt                  everything but experts
FOLDER/TAG/layer_L_expert_E_mp_rank_00_model_states.pt expert E of the L-th MoE layer, whichever rank held it

These are pickles, which can run code where they are read: only for files whose writer is trusted. Moments are not taken
over: DeepSpeed keeps them by rank and position, not by name.

# E experts.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.weight_map import WeightMapConfig
from trainer.config.nodes import shown_path
from trainer.errors import CheckpointError

_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_\d+_model_states\.pt")
_OF_EXPERT = re.compile(r"\.deepspeed_experts\.(\d+)\.")
_SHOWN = 5


def read_deepspeed(folder: Path, *, is_trusted: bool) -> dict[str, Tensor]:
    """Return every weight of a checkpoint by its name there; experts by their global numbers.

    Args:
        folder: that `save_checkpoint` was given, or the one of a tag in it.
        is_trusted: the user has said that reading pickles from there is right.

    Raises:
        CheckpointError: if they are not to be trusted, it is no such checkpoint, or experts are missing.
    """
    if not is_trusted:
        raise CheckpointError(
            f"{shown_path(folder)}: DeepSpeed's checkpoints are pickles, which can run code when they are read; give "
            "--trust-checkpoint if you trust whoever wrote it"
        )
    folder = _of_tag(folder)
    _refuse_other_kinds(folder)
    record = _unpickled(folder / "mp_rank_00_model_states.pt")
    weights = _tensors(record.get("module"), folder / "mp_rank_00_model_states.pt")
    found: dict[int, set[int]] = {}
    for path in sorted(folder.iterdir()):
        match = _EXPERT.fullmatch(path.name)
        if match is None:
            continue
        layer, expert = int(match[1]), int(match[2])
        found.setdefault(layer, set()).add(expert)
        for name, tensor in _tensors(_unpickled(path), path).items():
            number = _OF_EXPERT.search(name)
            if number is None or int(number[1]) != expert:
                raise CheckpointError(f"{path}: {name} is not a weight of expert {expert}")
            weights[name] = tensor
    _check_experts(folder, found, record.get("num_experts"))
    return weights


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
    problems: list[str] = []
    used: set[str] = set()
    result: dict[str, Tensor] = {}

    def take(name: str) -> Tensor | None:
        used.add(name)
        if name not in theirs:
            near = get_close_matches(name, theirs, n=1)
            problems.append(f"{name}: is not in the checkpoint" + (f"; did you mean {near[0]}?" if near else ""))
            return None
        tensor = theirs[name].float()
        if not any(fnmatchcase(name, pattern) for pattern in map_.transpose):
            return tensor
        if tensor.dim() != 2:
            problems.append(f"{name}: has {tensor.dim()} dimensions, and `transpose` is for two")
            return None
        return tensor.mT

    def joined(sources: list[str]) -> Tensor | None:
        parts = [take(source) for source in sources]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return None
        try:
            return torch.cat(present) if len(present) > 1 else present[0]
        except RuntimeError:
            problems.append(f"{sources[0]}: cannot be put together with {', '.join(sources[1:])}: other shapes")
            return None

    for name, shape in ours.items():
        sources = map_.sources(name)
        if sources is None:
            problems.append(f"{name}: no line of the map says where it comes from")
            continue
        if name in of_experts:
            if not all("<expert>" in source for source in sources):
                problems.append(f"{name}: is one tensor for each expert there; write <expert> for its number")
                continue
            experts = [joined([s.replace("<expert>", str(e)) for s in sources]) for e in range(of_experts[name])]
            whole = [expert for expert in experts if expert is not None]
            shapes = sorted({str(list(expert.shape)) for expert in whole})
            if len(shapes) > 1:
                problems.append(f"{name}: experts have different shapes there: {', '.join(shapes)}")
            tensor = torch.stack(whole) if len(whole) == len(experts) and len(shapes) == 1 else None
        else:
            tensor = joined(sources)
        if tensor is None:
            continue
        if tensor.shape != shape:
            problems.append(f"{name}: is {list(shape)} here and {list(tensor.shape)} there; the models differ")
        result[name] = tensor
    rest = [n for n in theirs if n not in used and not any(fnmatchcase(n, pattern) for pattern in map_.ignore)]
    problems += [f"{name}: is not used; map it, or name it under `ignore`" for name in rest]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointError("\n".join(problems[:_SHOWN] + more))
    assert result.keys() == ours.keys(), "every weight without a source is a problem"
    return result


def _of_tag(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    tag = latest.read_text(errors="replace").strip()
    if not re.fullmatch(r"[\w.-]+", tag) or tag in (".", ".."):
        raise CheckpointError(
            f"{shown_path(latest)}: {tag!r:.60} is not the name of a folder beside it; give the tag's folder"
        )
    return folder / tag


def _refuse_other_kinds(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    where = shown_path(folder)
    if any(re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name) for name in names):
        raise CheckpointError(
            f"{where}: its weights are cut over ranks (ZeRO 3); put them together with DeepSpeed first"
        )
    if any(re.fullmatch(r"layer_\d+-.*model_states\.pt", name) for name in names):
        raise CheckpointError(f"{where}: is of a pipeline (files layer_N-model_states.pt), which is not read here")
    if sum(bool(re.fullmatch(r"mp_rank_\d+_model_states\.pt", name)) for name in names) > 1:
        raise CheckpointError(f"{where}: its weights are cut over tensor-parallel ranks, which is not read here")
    if "mp_rank_00_model_states.pt" not in names:
        raise CheckpointError(f"{where}: is no checkpoint of DeepSpeed: it has no mp_rank_00_model_states.pt")


def _unpickled(path: Path) -> Mapping[str, Any]:
    """Read a file; as data only wherever that is possible."""
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:
            values = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever unpickling comes to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{shown_path(path)}: cannot be read: {reason:.200}") from None
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{shown_path(path)}: holds no names")
    return values


def _tensors(values: Any, path: Path) -> dict[str, Tensor]:
    found = {k: v for k, v in values.items() if isinstance(v, Tensor)} if isinstance(values, Mapping) else {}
    if not found:
        raise CheckpointError(f"{shown_path(path)}: holds no weights")
    return found


def _check_experts(folder: Path, found: Mapping[int, set[int]], counts: Any) -> None:
    """Every layer must have each of its experts once; the main file says how many there are."""
    expected = [count for count in counts if isinstance(count, int)] if isinstance(counts, list | tuple) else []
    for layer in sorted({*found, *range(len(expected))}):
        experts = found.get(layer, set())
        number = expected[layer] if layer < len(expected) else max(experts) + 1
        missing = sorted(set(range(number)) - experts)
        if missing:
            raise CheckpointError(
                f"{shown_path(folder)}: MoE layer {layer} has {number} experts, and there are no files of "
                f"{', '.join(map(str, missing[:_SHOWN]))}{', ...' if len(missing) > _SHOWN else ''}"
            )
