"""What the `checkpoint` verbs do and print. Imports torch only where tensors are read."""

import json
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.catalogue import entries
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.pruning import plan_prune
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.weight_map import WeightMapConfig
from trainer.errors import CheckpointError, ResourceError
from trainer.experiment import ExperimentConfig


def show_list(run: RunFolder, *, with_content: bool, as_json: bool) -> int:
    """Print one line for each checkpoint of a run, oldest first."""
    folder = CheckpointFolder(run.checkpoints)
    folder.existing(None)
    if as_json:
        print(json.dumps([entry.record() for entry in entries(folder, with_content=with_content)]))
        return 0
    well = "sound" if with_content else "whole"
    for entry in entries(folder, with_content=with_content):
        size = "-" if entry.size_bytes is None else _megabytes(entry.size_bytes)
        name = folder.of_step(entry.step).name
        print(f"{name}  {size:>11}  {entry.written}  {entry.layout_text:<26}  {entry.wrong or well}")
    return 0


def verify(run: RunFolder, *, step: int | None, as_json: bool) -> int:
    """Examine checkpoints, newest first, and print every finding on a line; return 4 if there is any."""
    folder = CheckpointFolder(run.checkpoints)
    newest = folder.existing(step)
    steps = folder.steps() if step is None else [newest]

    from trainer.checkpoint.examine import examine

    records, is_sound = [], True
    for number in reversed(steps):
        found = None
        with suppress(FileNotFoundError):
            found = examine(folder, number)
        if found is None or not folder.of_step(number).exists():  # a running trainer has removed it meanwhile
            folder.existing(step)
            continue
        is_sound = is_sound and not found.findings
        records.append(found.record())
        if as_json:
            continue
        experts = f"{found.num_experts} experts in {found.num_layers} layers" if found.num_experts else "no experts"
        sound = f"sound: {found.num_tensors} tensors, {experts}, {_megabytes(found.size_bytes)}"
        print("\n".join(found.findings or [f"{folder.of_step(number)}: {sound}"]), flush=True)
    if as_json:
        print(json.dumps(records))
    return 0 if is_sound else CheckpointError.exit_code


def prune(run: RunFolder, *, keep: int, keep_every: int | None, with_damaged: bool, is_dry: bool) -> int:
    """Remove the checkpoints that nobody needs and what killed runs left; print each."""
    if not run.path.is_dir():
        raise CheckpointError(f"{run.path}: is no run folder; train first")
    run.lock()
    folder = CheckpointFolder(run.checkpoints, keep=keep, keep_every=keep_every)
    plan = plan_prune(folder, with_damaged=with_damaged)
    word = "would remove" if is_dry else "removed"
    for step in plan.remove:
        if not is_dry:
            folder.remove(step)
        print(f"{word} {folder.of_step(step)}", flush=True)
    if not is_dry:
        folder.clean()
    for path in plan.leftovers:
        if not is_dry and path.exists():
            raise ResourceError(f"{path}: cannot be removed; look who may write there")
        print(f"{word} {path}, which a killed run left")
    for step, reason in plan.damaged.items():
        if step not in plan.remove:
            print(f"kept {reason}; --damaged removes it")
    print(f"{len(plan.keep)} sound: {', '.join(folder.of_step(step).name for step in plan.keep)}")
    return 0


def export_dcp(run: RunFolder, out: Path, *, step: int | None) -> int:
    """Write a checkpoint as DCP files: of `step`, or the newest, which must be sound."""
    from trainer.checkpoint.export_dcp import export_dcp

    manifest = export_dcp(CheckpointFolder(run.checkpoints), step, out).manifest
    size = _megabytes(manifest.size_bytes)
    print(f"{out}: {len(manifest.tensors)} tensors of step {manifest.step}, {size}, read back equal bit for bit")
    print("DCP files are pickles and have no hashes: load them only where you trust everyone who can write there")
    return 0


def import_deepspeed(
    config: ExperimentConfig, run: RunFolder, source: Path, map_: WeightMapConfig, *, is_trusted: bool
) -> int:
    """Start a run from the weights of a checkpoint that DeepSpeed wrote."""
    from trainer.workflows import start_from_deepspeed

    saved = start_from_deepspeed(config, run, source, map_, is_trusted=is_trusted)
    print(f"saved {saved.path}: the weights of {source}, moments at zero; train the same config to go on from it")
    return 0


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
