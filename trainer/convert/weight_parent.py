"""The model that `init_from` names: its config is found and compared with the new one. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from trainer.checkpoint.checkpoint_folder import CheckpointFolder, step_in_name
from trainer.checkpoint.identity import Parent, parent_in
from trainer.checkpoint.init_from import InitFromConfig
from trainer.checkpoint.manifest import Manifest, run_record_problems
from trainer.checkpoint.manifest_file import read_manifest
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import inline
from trainer.config.nodes import shown_path
from trainer.config.plugins import searching
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.foreign_model import ForeignModel, read_foreign_model
from trainer.errors import CheckpointError, ConfigError
from trainer.experiment import ExperimentConfig
from trainer.families.expressible import inference_values
from trainer.models.config import ModelConfig
from trainer.models.lora_config import LoRAConfig

_FREE: Final = ("moe.num_experts", "moe.router.top_k", "lora")
"""Keys, or sections, of `model` that may differ without a word."""
_NOTED: Final = (
    *("rope_theta", "rope_scaling", "norm_eps", "logit_softcap", "swiglu_alpha", "swiglu_limit", "moe.router"),
    *("attention.window", "attention.softcap", "attention.scale", "attention.clip_qkv"),
)
"""Keys that change what the same weights compute, which a longer context or other routing may want."""
_MEANING: Final = ("num_heads", "num_kv_heads", "attention.head_dim", "attention.rotary_fraction", "norm", "activation")
"""Keys under which weights of the same shapes mean something else."""
_FOLLOWING: Final = {
    "num_layers": ("moe.layers", "attention.window"),
    "num_heads": ("num_kv_heads", "attention.head_dim"),
}
"""Keys whose values follow from another one, which is enough to name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParent:
    """A run whose checkpoint is read: config and record are known, its bytes have not been looked at."""

    where: str
    """Its path, for messages."""
    folder: RunFolder
    checkpoints: CheckpointFolder
    step: int | None
    """None: the newest intact one."""
    manifest: Manifest
    config: ExperimentConfig

    @property
    def model(self) -> ModelConfig:
        """Its `model` section."""
        return self.config.model

    def as_parent(self, manifest: Manifest) -> Parent | None:
        """Return the entry in the record of a run that is made from one of its checkpoints; None without an id."""
        folder = self.folder.path if self.folder.run_id.is_file() else None
        return parent_in(manifest.run, name=self.config.name, step=manifest.step, folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedParent:
    """A published model: its config.json is read."""

    where: str
    folder: ForeignFolder
    foreign: ForeignModel

    @property
    def model(self) -> ModelConfig:
        """Our `model` section for it, with the rows of its embedding."""
        return self.foreign.model.model_copy(update={"vocab_size": self.foreign.vocab_size})


def find_parent(init: InitFromConfig, own: RunFolder) -> RunParent | PublishedParent:
    """Find the model that a section names, for a run in the folder `own`.

    Raises:
        ConfigError: if it is the run itself, or one that is being trained.
        CheckpointError: if there is no such run or checkpoint, or it cannot be read.
        DataError: if the published folder is none.
    """
    if init.hf is not None:
        folder = ForeignFolder(Path(init.hf))
        return PublishedParent(where=shown_path(folder.path), folder=folder, foreign=read_foreign_model(folder))
    if init.checkpoint is not None:
        return _checkpoint_parent(Path(init.checkpoint))
    return _run_parent(Path(init.run or ""), own, step=init.step)


def _checkpoint_parent(path: Path) -> RunParent:
    where = f"init_from.checkpoint: {shown_path(path)}"
    if not path.is_dir():
        raise CheckpointError(f"{where}: no such folder; name a checkpoint, RUN/checkpoints/step_N")
    real = path.resolve()
    step = step_in_name(real.name)
    if step is None:
        raise CheckpointError(f"{where}: is not named step_N, as checkpoints are; name one, or a run by init_from.run")
    manifest, folder = read_manifest(real), RunFolder(real.parent.parent)
    return RunParent(
        where=shown_path(path),
        folder=folder,
        checkpoints=CheckpointFolder(real.parent),
        step=step,
        manifest=manifest,
        config=_recorded_config(shown_path(path), manifest, folder),
    )


def _run_parent(path: Path, own: RunFolder, *, step: int | None) -> RunParent:
    where, folder = f"init_from.run: {shown_path(path)}", RunFolder(path)
    if not path.is_dir():
        raise CheckpointError(f"{where}: no such folder; name that of a run, RUNS_DIR/NAME")
    if own.path.exists() and path.samefile(own.path):
        raise ConfigError(f"{where}: is this run itself; name another one, or give this one another name=...")
    if not folder.checkpoints.is_dir():
        is_step = step_in_name(path.resolve().name) is not None
        advice = "name it by init_from.checkpoint" if is_step else "name the folder of a run that has some"
        raise CheckpointError(f"{where}: has no folder of checkpoints, so it is no run to start from; {advice}")
    if step is None and (owner := folder.owner()) is not None:
        raise ConfigError(
            f"{where}: {owner} is training into it, so its newest checkpoint is not its last; wait for it, or name one "
            "by init_from.step"
        )
    checkpoints = CheckpointFolder(folder.checkpoints)
    manifest = _newest_manifest(checkpoints) if step is None else checkpoints.manifest(checkpoints.resolve_step(step))
    return RunParent(
        where=shown_path(path),
        folder=folder,
        checkpoints=checkpoints,
        step=step,
        manifest=manifest,
        config=_recorded_config(shown_path(path), manifest, folder),
    )


def _newest_manifest(checkpoints: CheckpointFolder) -> Manifest:
    """Return the newest manifest that can be read; whether its files can is found when all bytes are verified."""
    checkpoints.resolve_step(None)
    first: CheckpointError | None = None
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.manifest(step)
        except CheckpointError as error:
            first = first or error
    assert first is not None, "there is a checkpoint"
    raise first


def _recorded_config(where: str, manifest: Manifest, folder: RunFolder) -> ExperimentConfig:
    """Return the config that a checkpoint was written with."""
    for problem in run_record_problems(manifest):
        raise CheckpointError(f"{where}: is invalid: {problem}")
    try:
        with searching(folder.recorded_directories()):
            return ExperimentConfig.model_validate(manifest.run.get("config"))
    except ValidationError:
        raise CheckpointError(
            f"{where}: this version cannot read the config in its manifest (run.config); use one of this version"
        ) from None


def check_models(init: InitFromConfig, parent: RunParent | PublishedParent, model: ModelConfig) -> list[str]:
    """Compare the keys of two models; return notes about those that change what the weights compute.

    Keys that decide shapes are compared tensor by tensor, if the section renames or excludes any.

    Raises:
        ConfigError: with a line for each key under which the weights cannot be taken.
    """
    ours, theirs = inference_values(model), inference_values(parent.model)
    where, chooses = parent.where, bool(init.exclude or init.rename)
    if (model.moe is None) != (parent.model.moe is None) and not chooses:
        raise ConfigError(_other_kind(where, is_moe=model.moe is not None))
    if model.d_model != parent.model.d_model:
        raise ConfigError(
            f"init_from: model.d_model is {model.d_model}, and {where} has {parent.model.d_model}: weights of another "
            f"width cannot be taken; use model.d_model: {parent.model.d_model}"
        )
    lines, notes = [], _adapter_notes(where, parent.model.lora, model.lora)
    different = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    followed = {key for cause, keys in _FOLLOWING.items() if cause in different for key in keys}
    for key in different:
        mine, other = ours.get(key), theirs.get(key)
        if key in followed or _is_in(key, _FREE):
            continue
        if _is_in(key, _NOTED):
            notes.append(f"model.{key} is {_text(mine)}, and {where} was trained with {_text(other)}")
        elif key in _MEANING or not chooses:
            remedy = f"use {_text(other)}" + ("" if key in _MEANING else ", or say which tensors by rename or exclude")
            lines.append(f"init_from: model.{key} is {_text(mine)}, and {where} has {_text(other)}; {remedy}")
    if lines:
        raise ConfigError("\n".join(lines))
    return notes


def _adapter_notes(where: str, theirs: LoRAConfig | None, ours: LoRAConfig | None) -> list[str]:
    """Return a note if adapters that are taken over are multiplied by another factor than they were trained with."""
    if theirs is None or ours is None or ours.scale == theirs.scale:
        return []
    factors = f"{ours.scale:g}, and the adapters of {where} were trained with {theirs.scale:g}"
    return [f"the factor of model.lora (alpha, rank, use_rslora) is {factors}"]


def _other_kind(where: str, *, is_moe: bool) -> str:
    if is_moe:
        return (
            f"init_from: {where} is a dense model, and model.moe is not null: experts are made of it by `turnout "
            "upcycle`, whose run can then be named here"
        )
    return (
        f"init_from: {where} has experts, and model.moe is null: they are made dense by `turnout surgery to-dense`, "
        "whose run can then be named here"
    )


def _is_in(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _text(value: object) -> str:
    return inline(list(value) if isinstance(value, tuple) else value)
