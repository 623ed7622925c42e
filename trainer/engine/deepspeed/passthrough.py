"""Handling of DeepSpeed's own options: passed through, required to agree with our sections, or refused.

An option is passed through only if it is known not to change what is learned, as `engine` promises. Imports neither
torch nor DeepSpeed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.base import Problem
from trainer.config.nodes import MAX_SHOWN, shown
from trainer.config.numbers import MAX_INT
from trainer.config.wording import near
from trainer.optim.registry import OptimConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Values of our sections for which DeepSpeed has options too."""

    zero_stage: int
    offload_optimizer: str
    global_batch_size: int
    micro_batch_size: int
    dtype: str
    grad_clip: float | None
    optim: OptimConfig
    peak_lr: float
    has_uneven_experts: bool
    """Ranks hold different numbers of experts."""


_SAME: dict[str, tuple[str, Callable[[RunOptions], Any]]] = {
    "train_batch_size": ("train.global_batch_size", lambda ours: ours.global_batch_size),
    "train_micro_batch_size_per_gpu": ("parallel.micro_batch_size", lambda ours: ours.micro_batch_size),
    "gradient_clipping": ("train.grad_clip", lambda ours: ours.grad_clip or 0.0),
    "zero_optimization.stage": ("engine.zero_stage", lambda ours: ours.zero_stage),
    "zero_optimization.offload_optimizer.device": ("engine.offload_optimizer", lambda ours: ours.offload_optimizer),
    "torch_autocast.enabled": ("`train.dtype: bfloat16`", lambda ours: ours.dtype == "bfloat16"),
    "optimizer.params.lr": ("schedule.peak_lr", lambda ours: ours.peak_lr),
    "optimizer.params.betas": ("optim.betas", lambda ours: list(ours.optim.betas)),
    "optimizer.params.eps": ("optim.eps", lambda ours: ours.optim.eps),
    "optimizer.params.weight_decay": ("optim.weight_decay", lambda ours: ours.optim.weight_decay),
}
"""Options that may repeat the value of one of our keys, with that key."""
_ONLY: dict[str, tuple[Any, str]] = {
    "optimizer.type": ("AdamW", "the engine trains with AdamW"),
    "bf16.enabled": (False, "it would round the router's weights as well; train.dtype: bfloat16 keeps them in float32"),
    "fp16.enabled": (False, "there is no float16; use train.dtype: bfloat16"),
    "amp.enabled": (False, "there is no float16; use train.dtype: bfloat16"),
    "torch_autocast.dtype": ("bfloat16", "there is no float16"),
    "gradient_allreduce_op": ("sum", "the objective is a sum, divided once by the tokens of the whole step"),
    "prescale_gradients": (False, "gradients are summed, not averaged"),
    "gradient_predivide_factor": (1.0, "gradients are summed, not averaged"),
    "communication_data_type": ("fp32", "gradients are summed in float32"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are summed in float32"),
    "zero_optimization.reduce_scatter": (True, "DeepSpeed needs it for experts"),
    "zero_optimization.contiguous_gradients": (True, "DeepSpeed needs it for experts"),
    "zero_optimization.compute_grad_norm": (True, "the norm decides whether a step is skipped"),
    "zero_optimization.zero_quantized_gradients": (False, "it rounds gradients during communication"),
    "zero_allow_untested_optimizer": (True, "the engine's optimizer is not DeepSpeed's"),
    "zero_force_ds_cpu_optimizer": (False, "engine.adam selects the optimizer on the CPU"),
    "managed_gradient_accumulation": (True, "the engine marks the last micro-batch"),
    "use_data_before_expert_parallel_": (False, "expert-parallel ranks are consecutive"),
}
"""Options with a single allowed value, and the reason."""
_FREE: dict[str, str] = {
    "steps_per_print": "a whole number above 0",
    "wall_clock_breakdown": "true or false",
    "memory_breakdown": "true or false",
    "dump_state": "true or false",
    "disable_python_gc": "true or false",
    "comms_logger": "a mapping",
    "flops_profiler": "a mapping",
    "tensorboard": "a mapping",
    "csv_monitor": "a mapping",
    "aio": "a mapping",
    "zero_optimization.allgather_bucket_size": "an even whole number above 0",
    "zero_optimization.allgather_partitions": "true or false",
    "zero_optimization.reduce_bucket_size": "a whole number above 0",
    "zero_optimization.use_multi_rank_bucket_allreduce": "true or false",
    "zero_optimization.overlap_comm": "true or false",
    "zero_optimization.round_robin_gradients": "true or false",
    "zero_optimization.parameter_alignment": "true or false",
    "zero_optimization.ignore_unused_parameters": "true or false",
    "zero_optimization.sub_group_size": "a whole number above 0",
    "zero_optimization.offload_optimizer.pin_memory": "true or false",
    "zero_optimization.offload_optimizer.fast_init": "true or false",
    "zero_optimization.offload_optimizer.buffer_count": "a whole number above 0",
}
"""Options and sections for speed, memory and logging, which are passed through, with their type."""
_NAMES = ("csv_monitor.job_name", "tensorboard.job_name", "flops_profiler.output_file")
"""Names of files or folders in the run folder."""
_WRITERS = ("csv_monitor", "tensorboard", "flops_profiler")
"""Sections that write files."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "a mapping": lambda value: isinstance(value, Mapping),
    "a whole number above 0": lambda value: _is_whole(value),
    "an even whole number above 0": lambda value: _is_whole(value) and value % 2 == 0,
}
_TRACKED = "it would upload from within the run and write outside the run folder; use metrics.wandb"
_REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "it follows from train.global_batch_size, parallel.micro_batch_size and the ranks",
    "scheduler": "the learning rate is that of `schedule`",
    "checkpoint": "checkpoints are those of `checkpoint`; docs/checkpoint.md",
    "elasticity": "runs resume on any number of ranks without it",
    "activation_checkpointing": "the model does not use DeepSpeed's",
    "expert_parallel": "experts are split over parallel.ep_size ranks",
    "zero_optimization.offload_param": "it belongs to stage 3",
    "zero_optimization.elastic_checkpoint": "checkpoints are those of `checkpoint`",
    "wandb": _TRACKED,
    "comet": _TRACKED,
}
_SWITCHED = ("bf16", "fp16", "amp", "torch_autocast", "wandb", "comet")
"""Sections without effect unless enabled."""
_STAGE_3 = "zero_optimization.stage3_"
"""Prefix of options that stages 1 and 2 ignore, but which many files contain."""


def conflicts(raw: Mapping[str, Any], ours: RunOptions) -> Iterator[Problem]:
    """Yield every option that cannot be passed through, with the reason."""
    yield from _unusable(raw, ours)
    off = {section for section in _SWITCHED if not _is_on(raw.get(section))}
    refused: list[str] = []
    for key, value in _leaves(raw):
        if value in ("auto", None, {}) or _is_free(key) or key.startswith(_STAGE_3) or key.split(".")[0] in off:
            continue
        section = next((section for section in _REFUSED if _is_below(key, section)), None)
        if section is not None:
            refused.append(section)
        elif message := _objection(key, value, ours):
            yield Problem(key, message)
    for section in dict.fromkeys(refused):  # once, however many options it has
        yield Problem(section, f"{_REFUSED[section]}; leave it out")


def _objection(key: str, value: Any, ours: RunOptions) -> str | None:
    """Return what is wrong with an option that has a single allowed value or is unknown; None if it is valid."""
    if key in _SAME:
        name, get = _SAME[key]
        wrong = f"{_as_json(value)}, but {name} is {json.dumps(get(ours))}; make them agree, or leave it out here"
        return None if _equal(value, get(ours)) else wrong
    if key in _ONLY:
        only, why = _ONLY[key]
        return None if _equal(value, only) else f"{_as_json(value)}: {why}; leave it out"
    similar = near(key, [*_SAME, *_ONLY, *_FREE, *_REFUSED], cutoff=0.85)
    hint = f"did you mean {similar}?" if similar else "leave it out"
    return f"not among DeepSpeed's options that are known not to change what is learned; {hint}"


def _unusable(raw: Mapping[str, Any], ours: RunOptions) -> Iterator[Problem]:
    """Yield every invalid value of a passed-through option."""
    for key, kind in _FREE.items():
        value = _value_at(raw, key)
        if value in ("auto", None):
            continue
        if not _IS[kind](value):
            yield Problem(key, f"{_as_json(value)} is not {kind}")
        elif key == "zero_optimization.reduce_bucket_size" and ours.has_uneven_experts:
            yield Problem(
                key,
                "parallel.ep_size does not divide model.moe.num_experts: ranks with different numbers of experts would "
                "fill their buckets at different moments; leave it out, and buckets hold the whole model",
            )
    for section in ("csv_monitor", "tensorboard"):  # their folders are in the run folder
        path = _value_at(raw, f"{section}.output_path")
        if path not in ("auto", "", None):
            message = f"{shown(path)}: it is deepspeed/{section} in the run folder; leave it out"
            yield Problem(f"{section}.output_path", message)
    for key in _NAMES:
        value = _value_at(raw, key)
        if value not in ("auto", "", None) and not (isinstance(value, str) and _NAME.fullmatch(value)):
            yield Problem(
                key,
                f"{shown(value)} is not the name of something in the run folder's deepspeed/; use at most 128 letters, "
                "digits, '.', '_' and '-', starting with a letter or a digit",
            )


def merged(raw: Mapping[str, Any], ours: Mapping[str, Any], *, folder: Path | None) -> dict[str, Any]:
    """Return the passed-through options, overridden by ours; files are written into `folder`.

    Without a folder, as in `prove`, no files are written.
    """
    result = free_options(raw)
    for section in _WRITERS:
        options = result.pop(section, {})
        if folder is not None and options:
            result[section] = options | _places(section, options, folder)
    for key, value in _leaves(ours):
        _put(result, key.split("."), value)
    return result


def _places(section: str, options: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the options for the location of a section's files."""
    if section == "flops_profiler":
        name = options.get("output_file")
        return {"output_file": str(folder / name)} if name else {}
    name = options.get("job_name")
    return {"output_path": str(folder / section if name else folder), "job_name": name or section}


def free_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the passed-through options."""
    result: dict[str, Any] = {}
    for key, value in _leaves(raw):
        if _is_free(key) and value not in ("auto", None):
            _put(result, key.split("."), value)
    return result


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value_at(values: Any, key: str) -> Any:
    """Return an option by its dotted key; None if it is absent."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _as_json(value: Any) -> str:
    """Return a value as JSON, truncated for messages."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _is_whole(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_INT and value == int(value)


def _is_on(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("enabled", False) not in (False, "auto")


def _is_below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _is_free(key: str) -> bool:
    return any(_is_below(key, free) for free in _FREE)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return value.lower() == other.lower()
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
