"""Measure the memory and time of a streamed import, and of the export of what was imported, on a random model.

    python -m scripts.bench_conversion --folder /tmp/conversion [--layers 12]

Writes a random Qwen3-MoE of 12 layers, 2 GB in bfloat16 in files of 500 MB, and removes it at the end; with the run and
the export it takes 8 GB of disk. Memory is the peak of the process's resident set, files mapped into it included, above
what it held before, with torch loaded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.families.link import Link
from trainer.families.registry import FAMILIES
from trainer.models.config import ModelConfig

SHARD_BYTES, VOCABULARY = 500_000_000, 32_000
ALLOWED = 300e6
"""Goal: the largest file, and this."""


def model_of(num_layers: int) -> ModelConfig:
    """Return the model: 1.0 billion parameters with 12 layers."""
    moe = {"num_experts": 32, "d_ff": 768, "router": {"kind": "top_k", "top_k": 4}}
    sizes = {"num_layers": num_layers, "d_model": 1024, "num_heads": 16, "num_kv_heads": 4, "seq_len": 1024}
    return ModelConfig.model_validate({**sizes, "qk_norm": True, "moe": moe})


def write_folder(folder: Path, model: ModelConfig) -> int:
    """Write random weights as a published model; return the bytes of the largest file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    family, where, largest = FAMILIES["qwen3_moe"], {}, 0
    for number, links in enumerate(_shards(list(family.links(model, VOCABULARY)))):
        file = f"model-{number:05d}.safetensors"
        tensors = {link.theirs: torch.randn(link.shape).mul_(0.02).bfloat16() for link in links}
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        largest = max(largest, sum(2 * link.num_elements for link in links))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(family.to_hf(model, VOCABULARY)))
    for name, text in ByteTokenizer().files().items():
        (folder / name).write_text(text)
    return largest


def _shards(links: Sequence[Link]) -> Iterator[list[Link]]:
    found: list[Link] = []
    for link in links:
        if found and 2 * sum(one.num_elements for one in [*found, link]) > SHARD_BYTES:
            yield found
            found = []
        found.append(link)
    yield found


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Run one command of the command line in a process of its own, and return its figures."""
    run = [sys.executable, "-m", "scripts.bench_conversion", "--child", *command]
    return json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def child(command: Sequence[str]) -> None:
    """Run one command here and print what it took."""
    import trainer.convert.hf_export
    import trainer.convert.hf_import  # noqa: F401 - loaded before memory is measured
    from trainer.cli import main as turnout

    before, began = _status("VmRSS"), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    try:
        turnout(list(command))
    except SystemExit as ended:
        if ended.code:
            raise
    figures = {"peak": _status("VmHWM") - before, "before": before, "seconds": time.monotonic() - began}
    print(json.dumps(figures))


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def main() -> int:
    """Measure both directions; return 1 if one took more memory than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("conversion"))
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    folder = options.folder.absolute()
    theirs, run, out = folder / "theirs", folder / "runs" / "imported", folder / "out"
    try:
        largest = write_folder(theirs, model_of(options.layers))
        size = sum(file.stat().st_size for file in theirs.glob("*.safetensors"))
        print(f"model: {size / 1e9:.2f} GB in bfloat16, largest file {largest / 1e6:.0f} MB")
        text = folder / "text.txt"
        text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 400)
        source = f"data.sources=[{{kind: text, path: {text}, domain: prose}}]"
        keys = ["name=imported", f"runs_dir={folder / 'runs'}", f"model.vocab_size={VOCABULARY}", source]
        keys.append(f"data.cache_dir={folder / 'cache'}")
        commands = {
            "import": ["import", str(theirs), *keys, "--gate", "tensors"],
            "export": [
                "export",
                str(run),
                str(out),
                "--dtype",
                "bfloat16",
                "--shard-size",
                "500MB",
                "--gate",
                "tensors",
            ],
        }
        is_met = True
        for name, command in commands.items():
            figures = measured(command)
            peak, allowed = figures["peak"], largest + ALLOWED
            is_met = is_met and peak <= allowed
            print(
                f"{name}: peak {peak / 1e6:.0f} MB above the {figures['before'] / 1e6:.0f} MB held before (allowed "
                f"{allowed / 1e6:.0f}), {figures['seconds']:.0f} s"
            )
        return 0 if is_met else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        sys.exit(main())
