"""The command `checkpoint`, with its subcommands. Imports torch only to read tensors."""

import argparse
import json
from contextlib import suppress

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.tools.listing import list_checkpoints
from trainer.checkpoint.tools.pruning import plan_prune
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.commands.arguments import Subparsers, add_command, add_overrides, add_run, add_step, as_path, whole
from trainer.commands.resolve import existing_run, load_named_config, named_run_folder, run_folder_of, suggest_prepare
from trainer.config.loader import load
from trainer.errors import CheckpointError, ResourceError
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the subcommands with their arguments."""
    checkpoint = subparsers.add_parser("checkpoint", help="List, verify, prune and convert a run's checkpoints.")
    subcommands = checkpoint.add_subparsers(required=True, metavar="COMMAND")

    sub = add_run(add_command(subcommands, "list", list_command, example="runs/smoke --full"))
    sub.add_argument("--full", action="store_true", help="hash every byte instead of comparing sizes")
    sub.add_argument("--json", action="store_true", help="print one JSON list")

    sub = add_run(add_command(subcommands, "verify", verify_command, example="runs/smoke --step 40"))
    sub.add_argument("--step", type=int, help="only the checkpoint of this step")
    sub.add_argument("--json", action="store_true", help="print one JSON list")

    sub = add_run(add_command(subcommands, "prune", prune_command, example="runs/smoke --keep 2 --dry-run"))
    what = "number of newest intact checkpoints to keep (checkpoint.keep of the run's config)"
    sub.add_argument("--keep", type=whole, help=what)
    sub.add_argument("--keep-every", type=whole, help="also keep steps that are a multiple of this")
    sub.add_argument("--damaged", action="store_true", help="also remove damaged checkpoints")
    sub.add_argument("--dry-run", action="store_true", help="only print what would be removed")

    sub = add_command(subcommands, "export-dcp", export_dcp_command, example="runs/smoke exported/smoke")
    add_run(sub, with_overrides=False)
    sub.add_argument("out", type=as_path, metavar="OUT", help="folder to create")
    add_overrides(sub, "name=other")
    add_step(sub)

    example = "configs/mine.yaml theirs/checkpoints --map weights.yaml name=imported"
    sub = add_command(subcommands, "import-deepspeed", import_deepspeed_command, example=example)
    sub.add_argument("config", type=as_path, metavar="CONFIG", help="experiment file of the run to start")
    what = "the folder given to save_checkpoint, or the folder of a tag in it"
    sub.add_argument("folder", type=as_path, metavar="FOLDER", help=what)
    add_overrides(sub, "name=other")
    what = "mapping of weight names (docs/deepspeed.md)"
    sub.add_argument("--map", type=as_path, required=True, metavar="FILE", help=what)
    sub.add_argument("--trust-checkpoint", action="store_true", help="read its pickles, which can run code")


def list_command(options: argparse.Namespace) -> int:
    """List a run's checkpoints: step, size, time, layout, and whether manifest and sizes agree."""
    folder = CheckpointFolder(named_run_folder(options).checkpoints)
    folder.resolve_step(None)
    entries = list_checkpoints(folder, with_content=options.full)
    if options.json:
        print(json.dumps([entry.record() for entry in entries]))
        return 0
    good = "intact" if options.full else "complete"
    for entry in entries:
        size = "-" if entry.size_bytes is None else _megabytes(entry.size_bytes)
        name, best = folder.of_step(entry.step).name, f", the best {entry.best}" if entry.best else ""
        print_safe(f"{name}  {size:>11}  {entry.written}  {entry.layout_text:<26}  {entry.wrong or good}{best}")
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """Read every byte of a run's checkpoints and check hashes and values; exit code 4 if any is damaged."""
    folder = CheckpointFolder(named_run_folder(options).checkpoints)
    newest = folder.resolve_step(options.step)
    steps = folder.steps() if options.step is None else [newest]

    from trainer.checkpoint.tools.verify import verify_checkpoint

    records, is_intact = [], True
    for number in reversed(steps):
        result = None
        with suppress(FileNotFoundError):
            result = verify_checkpoint(folder, number)
        if result is None or not folder.of_step(number).exists():  # pruned by a running trainer
            folder.resolve_step(options.step)
            continue
        is_intact = is_intact and not result.findings
        records.append(result.record())
        if options.json:
            continue
        experts = f"{result.num_experts} experts in {result.num_layers} layers" if result.num_experts else "no experts"
        intact = f"intact: {result.num_tensors} tensors, {experts}, {_megabytes(result.size_bytes)}"
        print_safe("\n".join(result.findings or [f"{folder.of_step(number)}: {intact}"]))
    if options.json:
        print(json.dumps(records))
    return 0 if is_intact else CheckpointError.exit_code


def prune_command(options: argparse.Namespace) -> int:
    """Remove a run's old checkpoints and leftovers of killed runs, while it is not training."""
    config, run = existing_run(options)
    keep = config.checkpoint.keep if options.keep is None else options.keep
    keep_every = config.checkpoint.keep_every if options.keep_every is None else options.keep_every
    if not run.path.is_dir():
        raise CheckpointError(f"{run.path}: is not a run folder; train first")
    run.lock()
    folder = CheckpointFolder(run.checkpoints, keep=keep, keep_every=keep_every)
    plan = plan_prune(folder, with_damaged=options.damaged)
    word = "would remove" if options.dry_run else "removed"
    for step in plan.remove:
        if not options.dry_run:
            folder.remove(step)
        print_safe(f"{word} {folder.of_step(step)}")
    if not options.dry_run:
        folder.clean()
    for path in plan.leftovers:
        if not options.dry_run and path.exists():
            raise ResourceError(f"{path}: cannot be removed; check its permissions")
        print_safe(f"{word} {path}, left by a killed run")
    for step, reason in plan.damaged.items():
        if step not in plan.remove:
            print_safe(f"kept {reason}; --damaged removes it")
    print_safe(f"{len(plan.keep)} intact: {', '.join(folder.of_step(step).name for step in plan.keep)}")
    return 0


def export_dcp_command(options: argparse.Namespace) -> int:
    """Convert a checkpoint to torch.distributed.checkpoint, in a new folder."""
    folder = CheckpointFolder(named_run_folder(options).checkpoints)

    from trainer.checkpoint.tools.export_dcp import export_dcp

    manifest = export_dcp(folder, options.step, options.out).manifest
    size = _megabytes(manifest.size_bytes)
    print_safe(
        f"{options.out}: {len(manifest.tensors)} tensors of step {manifest.step}, {size}, read back equal bit for bit"
    )
    print_safe("DCP files are pickles and have no hashes: load them only where you trust everyone who can write there")
    return 0


def import_deepspeed_command(options: argparse.Namespace) -> int:
    """Start a run from the weights of a DeepSpeed checkpoint of a model with DeepSpeed MoE layers."""
    config = load_named_config(options)
    weight_map = load(options.map, [], WeightMapConfig)

    from trainer.training.start_from_deepspeed import start_from_deepspeed

    folder = run_folder_of(config)
    with suggest_prepare(config):
        saved = start_from_deepspeed(config, folder, options.folder, weight_map, is_trusted=options.trust_checkpoint)
    print_safe(
        f"saved {saved.path}: the weights of {options.folder}, moments at zero; train the same config to continue"
    )
    return 0


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
