"""Helpers: tasks from plain values, and a small model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from tests.builders import make_engine, tiny_model_config
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.collectives import Group
from trainer.evaluation.context import EvalContext
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.registry import AnyTaskConfig

SEQ_LEN = 64
_CONFIG: TypeAdapter[Any] = TypeAdapter(AnyTaskConfig)


def build(folder: Path, rows: Sequence[Any], *, seq_len: int = SEQ_LEN, **fields: Any) -> Task:
    """Write rows to folder/rows.jsonl and build a task over them."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {"name": "task", "prompt": "{q}", "rows": {"kind": "jsonl", "path": str(path)}, **fields}
    return _CONFIG.validate_python(values).build(ByteTokenizer(), seq_len=seq_len)


def subject() -> EvalContext:
    """Build a small byte-level model with random weights."""
    engine = make_engine(tiny_model_config(seq_len=SEQ_LEN), dtype=torch.float64, vocab_size=256)
    return EvalContext(engine=engine, world=Group.of_one(), tokens_per_pass=300)
