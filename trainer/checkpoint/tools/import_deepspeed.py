"""Read the weights of a checkpoint that DeepSpeed wrote for a model with its own MoE layers.

FOLDER/latest                                          contains TAG
FOLDER/TAG/mp_rank_00_model_states.pt                  all weights but those of experts
FOLDER/TAG/layer_L_expert_E_mp_rank_00_model_states.pt expert E of the L-th MoE layer, whichever rank held it

These are pickles, which can execute code when they are loaded: read only trusted files. Moments are not imported:
DeepSpeed stores them by rank and position, not by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from trainer.config.nodes import shown_path
from trainer.errors import CheckpointError, first_line

_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_\d+_model_states\.pt")
_OF_EXPERT = re.compile(r"\.deepspeed_experts\.(\d+)\.")
_MAIN = "mp_rank_00_model_states.pt"
_SHOWN = 5


def read_deepspeed(folder: Path, *, is_trusted: bool) -> dict[str, Tensor]:
    """Return all weights of a checkpoint under DeepSpeed's names, experts with their global numbers.

    `folder` was passed to `save_checkpoint`, or is that of a tag in it. With `is_trusted` the user allows loading
    pickles from it.

    Raises:
        CheckpointError: if it is not trusted, is not such a checkpoint, or lacks experts.
    """
    if not is_trusted:
        raise CheckpointError(
            f"{shown_path(folder)}: DeepSpeed's checkpoints are pickles, which can run code when they are read; give "
            "--trust-checkpoint if you trust whoever wrote it"
        )
    folder = _tag_folder(folder)
    _refuse_other_kinds(folder)
    record = _unpickled(folder / _MAIN)
    weights = _tensors(record.get("module"), folder / _MAIN)
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


def _tag_folder(folder: Path) -> Path:
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
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    reasons = {
        r"zero_pp_rank_\d+_mp": "its weights are sharded over ranks (ZeRO 3); put them together with DeepSpeed first",
        r"layer_\d+-": "is of a pipeline (files layer_N-model_states.pt), which is not supported",
        r"mp_rank_(?!00)\d+": "its weights are sharded over tensor-parallel ranks, which is not supported",
    }
    for pattern, reason in reasons.items():
        if any(re.fullmatch(pattern + r".*model_states\.pt", name) for name in names):
            raise CheckpointError(f"{shown_path(folder)}: {reason}")
    if _MAIN not in names:
        raise CheckpointError(f"{shown_path(folder)}: is not a DeepSpeed checkpoint: it has no {_MAIN}")


def _unpickled(path: Path) -> Mapping[str, Any]:
    """Load a pickle with weights_only if possible, else in full."""
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:
            values = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling can raise anything
        raise CheckpointError(f"{shown_path(path)}: cannot be read: {first_line(error):.200}") from None
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{shown_path(path)}: holds no names")
    return values


def _tensors(values: Any, path: Path) -> dict[str, Tensor]:
    found = {k: v for k, v in values.items() if isinstance(v, Tensor)} if isinstance(values, Mapping) else {}
    if not found:
        raise CheckpointError(f"{shown_path(path)}: holds no weights")
    return found


def _check_experts(folder: Path, found: Mapping[int, set[int]], counts: Any) -> None:
    """Check that each layer has all of its experts; the main file records their number."""
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
