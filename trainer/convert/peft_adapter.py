"""Adapters as files that peft loads on the exported base: adapter_config.json and adapter_model.safetensors.

Matrices that are one here and several there share a copy of A; their rows of B are in the order that the family has.
Experts are one parameter of transformers 5 for a layer, which peft adapts by `target_parameters`; it stacks the ranks
of all experts:

    A  (E, r, K) here   (E r, K) there, experts outermost
    B  (E, N, r) here   (N, r E) there, experts innermost

# r rank, E experts, N rows and K columns of a matrix.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.choice import NEWEST, CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.tensor_files import safetensors_header
from trainer.checkpoint.tools.output_folder import check_output_folder, output_folder
from trainer.convert.exported_model import ExportDType, ExportedModel
from trainer.convert.hf_export import model_of
from trainer.convert.link_tensors import to_theirs
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.families.base import Family
from trainer.families.link import Link
from trainer.models.lora_config import LoRAConfig
from trainer.training.load_trained import intact_checkpoint

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
_FEED_FORWARD: Final = ("gate_proj", "up_proj", "down_proj")
_EXPERTS: Final = {"w_in": "gate_up_proj", "w_out": "down_proj"}
"""Parameters of a layer's experts in transformers 5, of all families."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factor:
    """A tensor of the file, and where it comes from."""

    name: str
    kind: Literal["a", "b"]
    source: str
    """Name in the model."""
    link: Link
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """How adapters are written."""

    family: Family
    dtype: ExportDType = "float32"
    choice: CheckpointChoice = NEWEST
    """Weights that are written."""
    base: str | None = None
    """Name of the model that they adapt, for readers."""


class WrittenAdapter(NamedTuple):
    """Summary of written adapters."""

    step: int
    parameters: int


def export_adapter(
    config: ExperimentConfig, folder: RunFolder, out: Path, options: AdapterOptions, *, warn: Callable[[str], None]
) -> WrittenAdapter:
    """Write a run's adapters alone into a new folder `out`.

    Raises:
        ConfigError: if `out` exists, the run has no adapters, or adapters alone do not say what it learned.
        CheckpointError: if there is no such checkpoint, or it is damaged or of another model.
    """
    lora = config.model.lora
    if lora is None:
        raise ConfigError("--adapter: the run has no adapters (model.lora: null); leave the option out")
    if lora.trains:
        raise ConfigError(
            f"--adapter: the run also trained {', '.join(lora.trains)} (model.lora.trains), which adapter files cannot "
            "hold; leave the option out, which exports the merged model"
        )
    check_output_folder(out)
    checkpoint = intact_checkpoint(CheckpointFolder(folder.checkpoints), options.choice, warn)
    model = model_of(config, folder, checkpoint, family=options.family, dtype=options.dtype)
    factors = list(_factors(model, lora))
    with output_folder(out) as temporary:
        with (temporary / WEIGHTS).open("xb") as file:
            entries = {each.name: (model.dtype, each.shape) for each in factors}
            file.write(safetensors_header(entries, {"format": "pt"}))  # type: ignore[arg-type]
            for each in factors:
                tensor = _read(model, each).to(getattr(torch, model.dtype)).contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        text = json.dumps(_config(model, lora, options.base), indent=2)
        (temporary / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    return WrittenAdapter(checkpoint.step, sum(prod(each.shape) for each in factors))


def _config(model: ExportedModel, lora: LoRAConfig, base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **_targets(model),
    }


def _adapted(model: ExportedModel) -> Iterator[Link]:
    """Yield the links of matrices with an adapter; of the experts of a layer one for each of both weights."""
    seen = set()
    for link in model.links:
        if link.ours not in model.weights.adapters or (_is_of_experts(link) and link.ours in seen):
            continue
        seen.add(link.ours)
        order = link.interleaved
        if order is not None and order.dim % len(model.weights.shapes[link.ours]) != int(_is_of_experts(link)):
            raise ConfigError(
                f"--adapter: {link.theirs} has other columns than {link.ours}, which no adapter of peft expresses; "
                "leave the option out, which exports the merged model"
            )
        yield link


def _factors(model: ExportedModel, lora: LoRAConfig) -> Iterator[_Factor]:
    for link in _adapted(model):
        rows, columns = model.weights.shapes[link.ours][-2:]
        if _is_of_experts(link):
            experts, stem = model.weights.shapes[link.ours][0], _expert_module(model, link)
            shapes = (experts * lora.rank, columns), (rows, experts * lora.rank)
        else:
            start, end = link.at[0] if link.at else (0, rows)
            shapes, stem = ((lora.rank, columns), (end - start, lora.rank)), _module(link)
        for kind, source, shape in zip(("a", "b"), model.weights.adapters[link.ours], shapes, strict=True):
            name = f"base_model.model.{stem}.lora_{kind.upper()}.weight"
            yield _Factor(name=name, kind=kind, source=source, link=link, shape=shape)  # type: ignore[arg-type]


def _read(model: ExportedModel, factor: _Factor) -> Tensor:
    values, is_of_experts = model.weights.factor(factor.source), _is_of_experts(factor.link)
    if factor.kind == "a":
        return values.flatten(0, -2)
    b = values[slice(*factor.link.at[0])] if factor.link.at and not is_of_experts else values
    theirs = to_theirs(b, replace(factor.link, at=(), transposed=False, shape=tuple(b.shape)))
    return theirs.permute(1, 2, 0).flatten(1) if is_of_experts else theirs


def _targets(model: ExportedModel) -> dict[str, list[str]]:
    """Return peft's targets: ends of names, as short as they can be without another module that ends so.

    In a mixture peft takes modules named like an expert's matrices for those of experts, as transformers 4 had them, so
    that those of dense layers and shared experts are given as parameters.
    """
    modules, parameters, others = [], [], []
    for link in model.links:
        if _is_of_experts(link) or not link.theirs.endswith(".weight") or len(link.shape) != 2:
            continue
        if link.ours not in model.weights.adapters:
            others.append(_module(link))
        elif model.config.moe is not None and _module(link).endswith(_FEED_FORWARD):
            parameters.append(link.theirs)
        else:
            modules.append(_module(link))
    experts = {f"mlp.experts.{_EXPERTS[_own(link)]}" for link in _adapted(model) if _is_of_experts(link)}
    others += [_module(link) for link in model.links if _is_of_experts(link)]
    ends = _shortest_ends(parameters, [f"{name}.weight" for name in others])
    return {"target_modules": _shortest_ends(modules, others), "target_parameters": sorted({*experts, *ends})}


def _shortest_ends(adapted: Sequence[str], others: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in adapted:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))] = None
    return sorted(found)


def _is_of_experts(link: Link) -> bool:
    return ".experts." in link.ours


def _own(link: Link) -> str:
    return link.ours.rpartition(".")[2]


def _module(link: Link) -> str:
    return link.theirs.removesuffix(".weight")


def _expert_module(model: ExportedModel, link: Link) -> str:
    """Return the module that peft makes: the second parameter's wraps that of the first, if both are adapted."""
    module = f"model.layers.{link.ours.split('.')[1]}.mlp.experts"
    prefix = link.ours.rpartition(".")[0]
    is_inner = _own(link) == "w_in" and f"{prefix}.w_out" in model.weights.adapters
    return f"{module}.base_layer" if is_inner else module
