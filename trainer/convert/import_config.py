"""The experiment of an imported model: written from its config.json, or the user's own, compared with it. No torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from trainer.config.dump import inline
from trainer.config.loader import validate
from trainer.config.nodes import Finding, SourceLocation, shown_path
from trainer.config.overrides import apply, as_node
from trainer.config.slots import Slot
from trainer.convert.foreign_folder import CONFIG, ForeignFolder
from trainer.convert.foreign_model import ForeignModel
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.families.expressible import inference_values

LONGEST_ROW: Final = 4096
"""Longest training row of a written config: published models state up to 10^6 positions."""
TO_SET: Final = "data.sources, train.steps and schedule.peak_lr"
"""Keys that a user must set in a written config."""
OWN_TOKENIZER: Final = "(the tokenizer that comes with the model)"
"""Path of a tokenizer in a config whose run folder is not yet known."""
_ANY_LENGTH: Final = ("seq_len",)
"""Keys that may differ from a published model's: a row may be shorter, or longer, than what it was trained on."""


def written_config(
    folder: ForeignFolder, foreign: ForeignModel, overrides: Sequence[str], *, name: str, is_bfloat16: bool
) -> ExperimentConfig:
    """Return a complete config for continued training, with the user's overrides.

    Its tokenizer is OWN_TOKENIZER, which `with_own_tokenizer` replaces.

    Raises:
        ConfigError: if an override is wrong.
    """
    model = foreign.model.model_dump()
    model |= {"seq_len": min(model["seq_len"], LONGEST_ROW), "vocab_size": None}  # rows: by the tokenizer, later
    if model["moe"] is not None:
        model["moe"]["z_loss_coef"] = 0.0  # published models were trained without it
    values: dict[str, Any] = {
        "name": name,
        "model": model,
        "data": {"sources": [{"kind": "installed"}], "tokenizer": {"kind": "file", "path": OWN_TOKENIZER}},
        "schedule": {"kind": "warmup_cosine", "peak_lr": 2e-5, "warmup_steps": 0.05},
        "train": {"steps": 1000, "global_batch_size": 32, "dtype": "bfloat16" if is_bfloat16 else "float32"},
        "parallel": {"micro_batch_size": 1},
    }
    findings: list[Finding] = []
    slot, place = Slot(ExperimentConfig), SourceLocation(0, 0, 0, str(folder.path / CONFIG))
    return validate(apply(as_node(values, place), overrides, slot, findings), ExperimentConfig, findings)


def with_own_tokenizer(config: ExperimentConfig) -> ExperimentConfig:
    """Return a written config whose tokenizer is the one that the run folder keeps, unless the user named another."""
    if getattr(config.data.tokenizer, "path", None) != OWN_TOKENIZER:
        return config
    path = str(Path(config.runs_dir) / config.name / "source")
    tokenizer = config.data.tokenizer.model_copy(update={"path": path})
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})


def default_name(path: Path) -> str:
    """Return a name for the run of a folder: its own, or that of its model in the hub's cache."""
    path = path.resolve()
    if path.parent.name == "snapshots":
        path = path.parents[1]
        path = path.with_name(path.name.rpartition("--")[2])
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-")[:100] or "imported"


def check_is_theirs(config: ExperimentConfig, where: str, folder: ForeignFolder, foreign: ForeignModel) -> None:
    """Raise a ConfigError with a line for each key of `model` under which it computes something else than theirs."""
    mine, theirs = inference_values(config.model), inference_values(foreign.model)
    name, lines = shown_path(folder.path), []
    if config.model.lora is not None:
        remedy = "leave it out, and put adapters on the imported run by init_from in a run of its own"
        lines.append(f"{where}: model.lora: an import writes what was published, which has no adapters; {remedy}")
    for key in {**mine, **theirs}:
        ours, other = mine.get(key), theirs.get(key)
        if ours != other and key not in _ANY_LENGTH:
            lines.append(f"{where}: model.{key} is {_text(ours)}, and {name} has {_text(other)}; use that")
    if lines:
        raise ConfigError("\n".join(lines))


def with_their_rows(config: ExperimentConfig, num_ids: int, folder: ForeignFolder, rows: int) -> ExperimentConfig:
    """Return a written config with the rows of their embedding, unless the user has set `model.vocab_size`.

    Raises:
        ConfigError: as `check_rows`, and if the ids are so few that they must be another model's.
    """
    if config.model.vocab_size is None and 2 * num_ids < rows:
        raise ConfigError(
            f"{shown_path(folder.path)}: its embedding has {rows} rows for {num_ids} ids of the tokenizer, which looks "
            f"like another model's; if it is this one's, say so: model.vocab_size={rows}"
        )
    if config.model.vocab_size is None and num_ids < rows:
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": rows})})
    check_rows(config, num_ids, folder, rows)
    return config


def check_rows(config: ExperimentConfig, num_ids: int, folder: ForeignFolder, rows: int) -> None:
    """Compare the rows of the embedding with those of theirs, and with the ids of the tokenizer.

    Raises:
        ConfigError: if they differ, or there are more ids.
    """
    name, stated = shown_path(folder.path), config.model.vocab_size
    if num_ids > rows:
        raise ConfigError(
            f"{name}: its embedding has {rows} rows, and the tokenizer {num_ids} ids: it is another model's; set "
            "data.tokenizer to the one that the model was trained with"
        )
    if (stated or num_ids) != rows:
        now = f"is null, so {num_ids}, one for each id" if stated is None else f"is {stated}"
        raise ConfigError(f"model.vocab_size {now}, and the embedding of {name} has {rows} rows; set it to {rows}")


def _text(value: Any) -> str:
    return inline(list(value) if isinstance(value, tuple) else value)
