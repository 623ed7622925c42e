"""Measure the memory of a streamed export: a random model of about 2 GB is written as a checkpoint and exported.

    python -m scripts.export_memory [--gigabytes 2] [--shard-size 200]

Prints the peak of resident memory of the export, in a process of its own, above that after its imports. Not in the
suite: it writes twice the size of the model and takes minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.streamed import GlobalTensor, save_streamed
from trainer.config.dump import dump
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT

_MEGABYTE = 1e6


class _RandomRows:
    """Random tensors that exist a few rows at a time."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return random rows."""
        generator = torch.Generator().manual_seed(start)
        return torch.empty((length, *self._shapes[name][1:])).uniform_(-0.02, 0.02, generator=generator)


def make_random_run(folder: Path, gigabytes: float) -> RunFolder:
    """Write a run of a Mixtral with random weights."""
    layers = max(1, round(gigabytes * 9))  # 0.11 GB each
    moe = {"num_experts": 8, "d_ff": 1024, "router": {"kind": "top_k"}}
    model = {"num_layers": layers, "d_model": 1024, "num_heads": 16, "num_kv_heads": 4, "seq_len": 64, "moe": moe}
    source = {"kind": "text", "path": str(folder / "none.txt"), "domain": "prose"}
    values: dict[str, Any] = {"name": "random", "runs_dir": str(folder), "model": model, "data": {"sources": [source]}}
    config = ExperimentConfig.model_validate(values)
    run = RunFolder(folder / "random")
    run.path.mkdir()
    run.config.write_text(dump(config))
    with torch.device("meta"):
        gpt = GPT(config.model, ByteTokenizer.vocab_size)
    tensors = {
        f"model.{name}": GlobalTensor(shape=tuple(parameter.shape), is_of_experts=".experts." in name)
        for name, parameter in gpt.named_parameters()
    }
    record = {
        **dict.fromkeys(("position", "tokens", "skipped_steps", "skipped_in_a_row"), 0),
        "data_fingerprint": None,
        "tokenizer_fingerprint": ByteTokenizer.fingerprint,
        "config": json.loads(config.model_dump_json()),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    save_streamed(CheckpointFolder(run.checkpoints), tensors, _RandomRows(shapes), record)
    return run


def measure(run: Path, out: Path, shard_bytes: int) -> tuple[float, float]:
    """Export in this process; return resident memory after the imports, and its peak, in MB."""
    import transformers.models.mixtral.modeling_mixtral

    from trainer.commands.resolve import recorded_config
    from trainer.convert.hf_export import ExportOptions, export
    from trainer.families.registry import FAMILIES

    assert transformers.models.mixtral.modeling_mixtral
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    folder = RunFolder(run)
    options = ExportOptions(family=FAMILIES["mixtral"], shard_bytes=shard_bytes, gate="tensors")
    export(recorded_config(folder), folder, out, options, warn=print)
    return before, _resident("VmHWM")


def _resident(key: str) -> float:
    """Return resident memory, now (VmRSS) or at its peak (VmHWM), in MB; files that are mapped count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / _MEGABYTE for line in lines if line.startswith(key))


def main() -> None:
    """Measure, or, in the process that is measured, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-size", type=int, default=200, help="in MB")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shard_bytes = int(options.shard_size * _MEGABYTE)
    if options.run is not None:
        print(*measure(options.run, options.run.parent / "out", shard_bytes))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = make_random_run(Path(folder), options.gigabytes)
        command = [sys.executable, "-m", "scripts.export_memory", "--shard-size", str(options.shard_size)]
        printed = subprocess.run([*command, "--run", str(run.path)], check=True, capture_output=True, text=True).stdout
        before, peak = map(float, printed.split()[-2:])
        size = sum(path.stat().st_size for path in (Path(folder) / "out").glob("*.safetensors")) / _MEGABYTE
    print(f"model {size:.0f} MB in shards of {options.shard_size} MB")
    print(f"memory after imports {before:.0f} MB, at its peak {peak:.0f} MB: {peak - before:.0f} MB for the export")


if __name__ == "__main__":
    main()
