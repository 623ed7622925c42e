"""Export a checkpoint to a folder that transformers, vLLM, SGLang and llama.cpp read."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.choice import NEWEST, CheckpointChoice
from trainer.checkpoint.compatible import check_model, check_record, check_tokenizer
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import tokenizer_of
from trainer.checkpoint.tools.output_folder import check_output_folder, output_folder
from trainer.console import formatting
from trainer.convert.checkpoint_weights import CheckpointWeights
from trainer.convert.exported_model import ExportDType, ExportedModel
from trainer.convert.foreign_model import published_positions
from trainer.convert.gate_report import Gate, GateError, GateReport, SplittingError
from trainer.convert.gates import logits_gate, tensors_gate, tokenizer_gate
from trainer.convert.hf_folder import write_small_files
from trainer.convert.model_card import model_card, with_gate
from trainer.convert.sample_tokens import sample_tokens
from trainer.convert.shard_writer import num_bytes, plan_shards, write_shards
from trainer.errors import CheckpointError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.families.base import Family
from trainer.models.flops import ModelSize, model_size
from trainer.models.gpt import GPT
from trainer.training.load_trained import intact_checkpoint
from trainer.training.run_template import chat_encoder, kept_template, served_template

_COPIES = 2.5  # of a model in float32 under the gate `logits`: theirs, ours, and a layer of each in two forms


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How a model is written."""

    family: Family
    dtype: ExportDType = "float32"
    shard_bytes: int = 5_000_000_000
    gate: Gate = "logits"
    choice: CheckpointChoice = NEWEST
    """Weights that are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Summary of a written export."""

    model: ExportedModel
    step: int
    num_files: int
    size_bytes: int
    size: ModelSize
    report: GateReport


def export(
    config: ExperimentConfig, folder: RunFolder, out: Path, options: ExportOptions, *, warn: Callable[[str], None]
) -> Exported:
    """Write a checkpoint of a run into a new folder `out`; it gets this name once the gate has passed.

    Raises:
        ConfigError: if `out` exists, or the tokenizer has no file for transformers.
        CheckpointError: if there is no such checkpoint, it is damaged or of another model, or the gate finds a
            difference; nothing is left then.
        ResourceError: if disk or memory do not suffice.
    """
    check_output_folder(out)
    checkpoint = intact_checkpoint(CheckpointFolder(folder.checkpoints), options.choice, warn)
    model = model_of(config, folder, checkpoint, family=options.family, dtype=options.dtype)
    template = kept_template(config, folder)
    if template is not None:
        template = served_template(config, template, model.tokenizer)
    chat = None if template is None else chat_encoder(config, template, model.tokenizer)
    with torch.device("meta"):
        size = model_size(GPT(model.config, model.tokenizer.vocab_size))
    size_bytes = num_bytes(model, model.links)
    _check_resources(out, size_bytes, size, options.gate)
    shards = plan_shards(model, options.shard_bytes)
    with output_folder(out) as temporary:
        write_shards(temporary, model, shards)
        write_small_files(temporary, model, chat)
        report = _gate(config, temporary, model, options, out)
        has_picture = folder.experts_picture.is_file()
        if has_picture:
            shutil.copyfile(folder.experts_picture, temporary / "experts.svg")
        card = model_card(
            config, folder, checkpoint, model, size, weights=options.choice.weights, has_picture=has_picture
        )
        (temporary / "README.md").write_text(with_gate(card, report), encoding="utf-8")
    return Exported(
        model=model, step=checkpoint.step, num_files=len(shards), size_bytes=size_bytes, size=size, report=report
    )


def model_of(
    config: ExperimentConfig, folder: RunFolder, checkpoint: CheckpointHandle, *, family: Family, dtype: ExportDType
) -> ExportedModel:
    """Return what is exported, after checking that the checkpoint is of this config and tokenizer."""
    check_record(checkpoint)
    tokenizer = tokenizer_of(folder, config.data, fingerprint=checkpoint.run["tokenizer_fingerprint"])
    check_model(checkpoint, config.model.model_dump(mode="json"))
    check_tokenizer(checkpoint, fingerprint=tokenizer.fingerprint)
    model = ExportedModel(
        family=family,
        config=config.model.merged,
        weights=CheckpointWeights(
            checkpoint, lora_scale=None if config.model.lora is None else config.model.lora.scale
        ),
        tokenizer=tokenizer,
        dtype=dtype,
        published_positions=published_positions(folder),
    )
    model.check_coverage()
    return model


def _gate(
    config: ExperimentConfig, temporary: Path, model: ExportedModel, options: ExportOptions, out: Path
) -> GateReport:
    """Run the gate; its errors name `out`."""
    try:
        if options.gate == "tensors":
            report = tensors_gate(temporary, model, plan_shards(model, options.shard_bytes))
            tokenizer_gate(temporary, model, sample_tokens(config, model.tokenizer).texts)
            return report
        samples = sample_tokens(config, model.tokenizer)
        tokenizer_gate(temporary, model, samples.texts)
        return logits_gate(temporary, model, samples.batches, tokens=samples.origin)
    except SplittingError as error:
        what = "use a tokenizer of Qwen2's, or another target"
        raise CheckpointError(f"{out}: not written: {error}, whatever the tokenizer's files say; {what}") from None
    except GateError as error:
        raise CheckpointError(f"{out}: not written: {error}; this is a fault of the export: please report it") from None


def _check_resources(out: Path, size_bytes: int, size: ModelSize, gate: Gate) -> None:
    """Check disk and memory before anything is written."""
    free = shutil.disk_usage(out.parent).free
    if free < size_bytes:
        text = f"needs {formatting.size(size_bytes)}, and {formatting.size(free)} is free"
        raise ResourceError(f"{out}: {text}; free space or name another folder")
    needed, available = int(4 * _COPIES * size.total_parameters), psutil.virtual_memory().available
    if gate == "logits" and needed > available:
        raise ResourceError(
            f"--gate logits: the model is loaded twice, in {formatting.size(needed)}, and {formatting.size(available)} "
            "of memory is available; use --gate tensors, which compares the files a tensor at a time and no logits"
        )
