"""The command `import`."""

import argparse
from pathlib import Path

from trainer.commands.arguments import Subparsers, add_command, add_overrides
from trainer.commands.shipped import as_config, check_name
from trainer.convert.import_config import TO_SET
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_command(subparsers, "import", import_command, example="downloads/Qwen3-30B-A3B name=qwen --gate tensors")
    what = "folder of a published model, with config.json and safetensors; or its OWNER/NAME on the hub"
    sub.add_argument("folder", metavar="FOLDER", help=what)
    what = "experiment file, whose model must be the published one; without it a complete config is written"
    sub.add_argument("config", nargs="?", metavar="CONFIG", help=what)
    add_overrides(sub, "name=mine")
    what = "logits: also compare with transformers, which needs both models in memory; tensors: only bit for bit"
    sub.add_argument("--gate", choices=("logits", "tensors"), default="logits", help=f"{what} (logits)")


def import_command(options: argparse.Namespace) -> int:
    """Start a run from a published model: its weights, config and tokenizer; `train` goes on from there."""
    config: Path | None = None
    overrides = list(options.overrides)
    if options.config is not None and "=" in options.config and not Path(options.config).exists():
        overrides.insert(0, options.config)
    elif options.config is not None:
        config = as_config(options.config)
        check_name(config)

    from trainer.convert.hf_import import import_model
    from trainer.convert.hub import local_folder

    imported = import_model(local_folder(options.folder), config, overrides, gate=options.gate)
    parameters = f"{imported.num_parameters / 1e6:,.2f}M parameters"
    print_safe(f"{imported.run}: {imported.family}, {parameters}; {imported.checked}")
    if config is None:
        print_safe(f"set {TO_SET} in {imported.run / 'config.yaml'}, or as overrides")
    print_safe(f"then: turnout train {imported.run}")
    return 0
