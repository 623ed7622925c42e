"""The command `export`: write a checkpoint of a run as a model of transformers."""

import argparse
import re
import sys
from typing import Final

from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import Subparsers, add_choice, add_command, add_overrides, add_run, as_path, choice_of
from trainer.commands.resolve import existing_run
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.families.base import Family
from trainer.families.registry import FAMILIES, choose_family
from trainer.packages import is_installed, missing
from trainer.terminal import print_safe

_SIZE: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?([kMG])B", re.ASCII)
_UNITS: Final = {"k": 10**3, "M": 10**6, "G": 10**9}


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_command(subparsers, "export", export_command, example="runs/smoke exported/smoke --dtype bfloat16")
    add_run(sub, with_overrides=False)
    sub.add_argument("out", type=as_path, metavar="OUT", help="folder to create")
    add_overrides(sub, "data.cache_dir=cache")
    add_choice(sub)
    what = "family of transformers, by its model_type (export.target of the config, or the first that fits)"
    sub.add_argument("--target", choices=["auto", *FAMILIES], help=what)
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the tensors (float32)")
    what = "write the adapters (model.lora) alone, as peft reads them, in place of a model with them merged in"
    sub.add_argument("--adapter", action="store_true", help=what)
    what = "with --adapter: name or folder of the model that it adapts, for readers of adapter_config.json"
    sub.add_argument("--base", metavar="NAME", help=what)
    what = "largest size of a file; a larger tensor gets its own (5GB)"
    sub.add_argument("--shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help=what)
    what = "what is compared before the folder gets its name: logits in transformers (default), or all tensors on disk"
    sub.add_argument("--gate", choices=["logits", "tensors"], default="logits", help=what)


def export_command(options: argparse.Namespace) -> int:
    """Write a run's newest checkpoint as a model that transformers, vLLM and llama.cpp read, and compare the two.

    Adapters are merged into the weights, or written alone.
    """
    config, folder = existing_run(options)
    target = options.target or config.export.target or "auto"
    family = choose_family(config.model, target)
    if isinstance(family, str):
        raise ConfigError(f"--target: {family}")
    if options.base is not None and not options.adapter:
        raise ConfigError("--base: names the model that adapters are of; use it with --adapter, or leave it out")
    if options.adapter:
        return _export_adapter(options, config, folder, family)
    if not is_installed("transformers"):
        raise ConfigError(missing("transformers", user="export (which compares what it writes with transformers)"))

    from trainer.convert.hf_export import ExportOptions, export

    chosen = ExportOptions(
        family=family, dtype=options.dtype, shard_bytes=options.shard_size, gate=options.gate, choice=choice_of(options)
    )
    exported = export(config, folder, options.out, chosen, warn=_warn)
    files = f"{exported.num_files} file{'s' * (exported.num_files > 1)}, {exported.size_bytes / 1e6:.1f} MB"
    parameters = f"{exported.size.total_parameters / 1e6:.2f}M parameters in {options.dtype}"
    print_safe(f"{options.out}: {chosen.choice.said(exported.step)} as {family.name}, {parameters}, {files}")
    print_safe(exported.report.line())
    return 0


def _export_adapter(options: argparse.Namespace, config: ExperimentConfig, folder: RunFolder, family: Family) -> int:
    from trainer.convert.peft_adapter import AdapterOptions, export_adapter

    chosen = AdapterOptions(family=family, dtype=options.dtype, choice=choice_of(options), base=options.base)
    written = export_adapter(config, folder, options.out, chosen, warn=_warn)
    print_safe(
        f"{options.out}: {chosen.choice.said(written.step)} as adapters of {family.name} for peft, "
        f"{written.parameters / 1e6:.2f}M parameters in {options.dtype}; load them on the model that the run began with"
    )
    return 0


def _warn(message: str) -> None:
    print_safe(f"warning: {message}", file=sys.stderr)


def _size(text: str) -> int:
    """Parse a size such as 500MB or 5GB."""
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {shown(text)}")
    return int(float(match[1]) * _UNITS[match[2]])
