"""Runs with random weights, made without training, and what they are exported to."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.builders import make_model
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import save_tokenizer
from trainer.checkpoint.streamed import GlobalTensor, save_streamed
from trainer.config.dump import dump
from trainer.data.corpus import build_tokenizer
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import FACTOR_B

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40


class _Rows:
    """Tensors of a model, and the load that its engine starts from."""

    def __init__(self, model: GPT) -> None:
        self.tensors = {f"model.{name}": t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
        counts = (len(model.moe_layers()), model.config.moe.num_experts) if model.config.moe is not None else (0, 0)
        self.tensors["engine.previous_counts"] = torch.ones(counts, dtype=torch.int64)

    def read(self, name: str, start: int, length: int) -> torch.Tensor:
        return self.tensors[name][start : start + length]


def make_run(
    folder: Path, model: dict[str, Any], *, tokenizer: dict[str, Any] | None = None, file_bytes: int = 1 << 29
) -> tuple[ExperimentConfig, RunFolder, GPT]:
    """Write the run folder of a model in which no two weights are alike; small `file_bytes` cut tensors into slices."""
    (folder / "text.txt").write_text(TEXT)
    source = {"kind": "text", "path": str(folder / "text.txt"), "domain": "prose"}
    data = {"sources": [source], "tokenizer": tokenizer or {"kind": "byte"}, "cache_dir": str(folder / "cache")}
    config = ExperimentConfig.model_validate(
        {"name": "x", "runs_dir": str(folder / "runs"), "model": model, "data": data}
    )
    run = RunFolder(folder / "runs" / "x")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    ours = build_tokenizer(config.data)
    save_tokenizer(run, ours)
    gpt = unlike(make_model(config.model, vocab_size=ours.vocab_size))
    rows = _Rows(gpt)
    tensors = {
        name: GlobalTensor(
            shape=tuple(t.shape),
            dtype="float32" if t.is_floating_point() else "int64",
            is_of_experts=".experts." in name,
        )
        for name, t in rows.tensors.items()
    }
    record = {
        **dict.fromkeys(("position", "tokens", "skipped_steps", "skipped_in_a_row"), 0),
        "data_fingerprint": None,
        "tokenizer_fingerprint": ours.fingerprint,
        "config": json.loads(config.model_dump_json()),
    }
    save_streamed(CheckpointFolder(run.checkpoints), tensors, rows, record, file_size_bytes=file_bytes)
    return config, run, gpt


def unlike(model: GPT) -> GPT:
    """Add noise to norms, biases and adapters, which start alike; not to a selection bias that never changes."""
    generator = torch.Generator().manual_seed(1)
    router = model.config.moe.router if model.config.moe is not None else None
    fixed = "router.bias" if getattr(router, "bias_update_rate", 1.0) == 0 else "-"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ("norm" in name or "bias" in name or "sink" in name) and fixed not in name:
            tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    for name, tensor in model.named_parameters():
        if name.endswith(FACTOR_B):
            tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model
