"""The card of an exported model: README.md with figures of its run."""

from textwrap import indent
from typing import Final

from trainer.checkpoint.ancestors import ancestors
from trainer.checkpoint.choice import WeightsOf
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import dump
from trainer.console import formatting
from trainer.convert.exported_model import ExportedModel
from trainer.convert.gate_report import GateReport
from trainer.experiment import ExperimentConfig
from trainer.models.config import ModelConfig
from trainer.models.flops import ModelSize
from trainer.runs.recorded_log import RecordedLog, read_log

_SECTIONS: Final = ("model", "optim", "schedule", "train")
"""Sections of the config that a reader needs; `data` and `metrics` have paths of the machine that trained the model."""
_FIGURES: Final = (
    ("loss", "training loss (nats per token)"),
    ("eval/loss", "held-out loss (nats per token)"),
    ("eval/bits_per_byte", "held-out bits per byte"),
)
"""Metrics of the newest records, and how the card calls them."""


def model_card(
    config: ExperimentConfig,
    folder: RunFolder,
    checkpoint: CheckpointHandle,
    model: ExportedModel,
    size: ModelSize,
    *,
    weights: WeightsOf,
    has_picture: bool,
) -> str:
    """Return the text of README.md; `has_picture` if the folder has experts.svg. The gate's line is added later."""
    kind = "dense" if config.model.moe is None else "mixture-of-experts"
    losses = _figures(folder, checkpoint.step, weights)
    rows = [
        (
            "architecture",
            f"{model.family.architecture}, {config.model.num_layers} layers, width {config.model.d_model}",
        ),
        *_experts(config.model),
        ("parameters", f"{size.total_parameters / 1e6:.2f}M, {size.active_parameters / 1e6:.2f}M active"),
        ("dtype", model.dtype),
        ("trained", f"{checkpoint.step} steps, {formatting.rate(int(checkpoint.run['tokens']))} tokens"),
        *([] if weights == "raw" else [("weights", "the moving average of those of the steps (`train.ema`)")]),
        *((key, formatting.number(value)) for key, value in losses.items()),
        *(("made from", ancestor.text.replace("|", "\\|")) for ancestor in ancestors(folder)),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    picture = "\n![Experts by domain](experts.svg)\n" if has_picture else ""
    sections = "".join(f"{name}:\n{indent(dump(getattr(config, name)), '  ')}" for name in _SECTIONS)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{kind}, turnout]
---

# {config.name}

A {kind} language model, trained by Turnout.

| | |
|---|---|
{table}
{picture}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = tokenizer("It was", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

The text that it was trained on, its licence and its limits are not known to the program that wrote this card.

## Config

```yaml
seed: {config.seed}
{sections.rstrip()}
```
"""


def with_gate(card: str, report: GateReport) -> str:
    """Return a card with what the gate compared."""
    head, config = card.rsplit("\n## Config\n", 1)
    return f"{head}\nChecked when it was exported; {report.line()}.\n\n## Config\n{config}"


def _experts(model: ModelConfig) -> list[tuple[str, str]]:
    """Return the row of experts, if there are any."""
    if (moe := model.moe) is None:
        return []
    return [
        ("experts", f"{moe.num_experts}, {moe.experts_per_token:g} for each token; shared: {moe.num_shared_experts}")
    ]


def _figures(folder: RunFolder, step: int, weights: WeightsOf) -> dict[str, float]:
    """Return losses of the newest records of metrics.jsonl up to a step; of averaged weights where they have some."""
    records = [record for record in read_log(folder.metrics).records if record["step"] <= step]
    log = RecordedLog(records=records)
    keys = {label: key if weights == "raw" else key.replace("eval/", "eval/ema/") for key, label in _FIGURES}
    return {label: value for label, key in keys.items() if (value := log.newest(key)) is not None}
