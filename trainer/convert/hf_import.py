"""Import a published model: its weights, streamed into the first checkpoint of a new run, its config and tokenizer."""

import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.new_folder import new_folder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import save_tokenizer
from trainer.checkpoint.streamed import save_streamed
from trainer.config.dump import dump
from trainer.config.nodes import shown_path
from trainer.console import formatting
from trainer.console.console import Console
from trainer.convert.compare_logits import compare_logits
from trainer.convert.compare_tensors import CheckpointRows, check_equal_tensors
from trainer.convert.dequantized import open_published
from trainer.convert.first_record import check_is_new, check_room, first_record
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.foreign_model import read_foreign_model
from trainer.convert.gate_report import Gate, GateError
from trainer.convert.import_config import TO_SET
from trainer.convert.import_plan import ImportPlan, plan_import
from trainer.convert.import_tokenizer import source_files
from trainer.convert.linked_weights import LinkedWeights
from trainer.convert.their_model import load_model
from trainer.convert.watched_tensors import WatchedTensors
from trainer.distributed import runtime
from trainer.errors import CheckpointError, ConfigError, ResourceError
from trainer.metrics.system_stats import total_memory
from trainer.models.gpt import GPT
from trainer.packages import is_installed, missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Summary of a written import."""

    run: Path
    family: str
    num_parameters: int
    checked: str
    """Finding of the gate, in words."""


def import_model(path: Path, config_path: Path | None, overrides: Sequence[str], *, gate: Gate) -> Imported:
    """Import a published folder into a new run folder, which is complete or not there.

    Args:
        path: the folder.
        config_path: experiment file; None: a complete one is written.
        overrides: changes of it.
        gate: `logits` also compares with transformers, which needs memory for both models; `tensors` only bit for bit.

    Raises:
        DataError: if config.json or the tokenizer is unusable.
        CheckpointError: if the weights are, or a gate does not hold.
        ConfigError: if the experiment is of another model, or its run folder exists.
        ResourceError: if disk or memory are too small.
    """
    folder = ForeignFolder(path)
    foreign = read_foreign_model(folder)
    if foreign.quantization is not None and gate == "logits":
        raise ConfigError(
            f"{shown_path(path)}: its weights are quantized, and transformers would compute with them as they are; "
            "--gate tensors compares what they stand for"
        )
    if gate == "logits" and not is_installed("transformers"):
        raise ConfigError(missing("transformers", user="--gate logits") + ", or use --gate tensors")
    with open_published(folder, foreign.quantization) as source:
        plan = plan_import(folder, foreign, source, config_path, overrides)
        final = check_is_new(plan.config)
        _check_room(plan, gate, final)
        with new_folder(final) as run:
            _write_small_files(plan, run)
            with closing(_write_weights(plan, run)) as rows:
                check_equal_tensors(rows, source, plan.links)
                checked = f"{len(plan.links)} tensors equal bit for bit"
                if gate == "logits":
                    checked += f", {_check_logits(plan, rows)}"
    return Imported(run=final, family=foreign.family.name, num_parameters=plan.num_parameters, checked=checked)


def _write_small_files(plan: ImportPlan, run: RunFolder) -> None:
    """Write config, tokenizer, the published folder's own small files, and where paths are relative to."""
    run.source.mkdir()
    for name, content in source_files(plan.source.folder):
        (run.source / name).write_bytes(content)
    save_tokenizer(run, plan.tokenizer)
    from_where = shown_path(plan.source.folder.path)
    note = f"# Imported from {from_where} ({plan.foreign.family.name}); before training set {TO_SET}.\n"
    run.write(run.config, note + dump(plan.config))
    source = {"family": plan.foreign.family.name, "folder": from_where}
    run.write(run.made_from, json.dumps({"command": "import", "from": source, "parents": []}) + "\n")
    run.write_environment(runtime.environment_info())


def _write_weights(plan: ImportPlan, run: RunFolder) -> CheckpointRows:
    """Write the checkpoint of step 0, and return it to be read."""
    dtypes = {plan.source.entries[link.theirs].dtype for link in plan.links}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    record = first_record(
        plan.config,
        run_id=secrets.token_hex(8),
        data_fingerprint=None,  # it may read any text
        tokenizer_fingerprint=plan.tokenizer.fingerprint,
    )
    run.write(run.run_id, f"{record['id']}\n")
    record["imported"] = {
        "family": plan.foreign.family.name,
        "dtype": str(widest).removeprefix("torch."),
        "folder": plan.source.folder.path.name,
    }
    checkpoints, tensors = CheckpointFolder(run.checkpoints), plan.tensors
    weights = LinkedWeights(plan.source, plan.links, tensors, plan.initial)
    with (
        closing(Console(file=sys.stderr)) as console,
        console.progress_bar("writing weights", plan.size_bytes) as bar,
    ):
        manifest = save_streamed(checkpoints, tensors, WatchedTensors(weights, bar), record)
    return CheckpointRows(checkpoints.of_step(0), manifest)


def _check_room(plan: ImportPlan, gate: Gate, final: Path) -> None:
    """Refuse what cannot fit on the disk, or in memory, before anything is written."""
    check_room(final, plan.size_bytes, of="the weights")
    needed, available = 2 * 4 * plan.num_parameters, total_memory(torch.device("cpu"))
    if gate == "logits" and needed > available:
        raise ResourceError(
            f"comparing logits needs both models in memory, {formatting.size(needed)}, and this machine has "
            f"{formatting.size(available)}; --gate tensors compares every tensor bit for bit instead"
        )


def _check_logits(plan: ImportPlan, rows: CheckpointRows) -> str:
    """Compare logits with transformers'; return the result in words."""
    where = shown_path(plan.source.folder.path)
    try:
        return compare_logits(_load(plan, rows), load_model(plan.source.folder.path))
    except GateError as error:
        raise CheckpointError(f"{where}: {error}; nothing was imported") from None


def _load(plan: ImportPlan, rows: CheckpointRows) -> GPT:
    """Return the model with the weights of the checkpoint, in float32."""
    model = plan.model.to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(rows.read(WEIGHT + name, 0, len(tensor)))
    return model
