"""Hints on how to write a value; the schema accepts every hinted value."""

from typing import Any, get_origin

import pytest

from trainer.config import slots
from trainer.config.hints import accepts, how_to_write
from trainer.config.nodes import Finding, Node, SourceLocation
from trainer.config.yaml_nodes import compose
from trainer.experiment import ExperimentConfig

HERE = SourceLocation(1, 0, 0, "<override 1>")
VALUES = [
    *("x.txt", "a/b.jsonl.gz", "rows.parquet", "corpus/**/*.md", "no/suffix", "it's, [odd]: {x}", "x" * 80),
    *("on", "off", "true", "false", "none", "5", "0.5", "1,2", "0.9, 0.95", "1_000", "installed", "byte", "gpt2"),
    *("cosine", "linear", "adamw_torch", "AdamW", "mixtral", "alltoall", "cuda", "bf16", "hf", "jsonl", "deepspeed"),
    *("5 ", "'5'", "3", "1.0", "1e3", "'yes'", "{a: 1}", "{kind: text, path: x.txt}", "[1]", "null"),
]


def read(text: str) -> Node:
    findings: list[Finding] = []
    node = compose(text, lambda line, column: HERE, findings)
    assert node is not None and not findings, text
    return node


def annotations() -> dict[str, Any]:
    """Return each distinct type of the schema, by its repr."""
    found: dict[str, Any] = {}
    for name, homes in slots.homes(ExperimentConfig).items():
        for home in homes:
            for annotation in slots.at(ExperimentConfig, f"{home}.{name}".lstrip(".")):
                found.setdefault(repr(annotation), annotation)
                if any(get_origin(one) is list for one in slots.alternatives(annotation)):
                    entry = slots.entry(slots.Slot(annotation), 0).annotation
                    found.setdefault(repr(entry), entry)
    return found


def as_node(text: str) -> Node:
    try:
        return read(text)
    except Exception:  # invalid YAML: as if it were in quotes
        return Node(text, HERE, HERE)


def test_every_hinted_value_is_accepted() -> None:
    followed = 0
    for annotation in annotations().values():
        for text in VALUES:
            node = as_node(text)
            if accepts(annotation, node.plain()):
                continue
            hint = how_to_write(node, annotation)
            if hint is None or not hint.startswith("write ") or hint.startswith("write its keys"):
                continue
            written = read(hint.removeprefix("write "))
            followed += 1
            assert accepts(annotation, written.plain()), (text, hint, annotation)
    assert followed > 100


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("data.sources", "x.txt", "write [{kind: text, path: x.txt}]"),
        ("data.sources", "x.jsonl.gz", "write [{kind: jsonl, path: x.jsonl.gz}]"),
        ("data.sources", "x.csv", "write [{kind: hf, path: csv, data_files: x.csv}]"),
        ("data.sources", "corpus", "write [{kind: text, path: corpus}]"),
        ("data.sources", "installed", "write [{kind: installed}]"),
        ("data.sources", "{kind: text}", "put it in brackets: [{...}]"),
        ("data.sources.0", "x.md", "write {kind: text, path: x.md}"),
        ("data.sources.0.path", "{a: 1}", None),
        ("data.tokenizer", "gpt2", "write {kind: file, path: ...}"),
        ("data.tokenizer", "my/tokenizer.json", "write {kind: file, path: my/tokenizer.json}"),
        ("optim", "adamw_torch", "write {kind: adamw}"),
        ("optim.betas", "0.9,0.95", "write [0.9, 0.95]"),
        ("optim.betas", "0.9", None),
        ("schedule", "cosine", "write {kind: warmup_cosine}"),
        ("schedule", "constant", "write {kind: warmup_cosine, final_fraction: 1}"),
        ("schedule", "linear", "write {kind: warmup_stable_decay, decay_fraction: 1}"),
        ("metrics.wandb", "off", "write {mode: disabled}"),
        ("metrics.wandb", "true", "write {mode: online}"),
        ("metrics.wandb.tags", "one", "write ['one']"),
        ("parallel", "cuda", "write {device: cuda}"),
        ("parallel.dispatcher", "alltoall", "write {kind: all_to_all}"),
        ("model.moe", "off", "write null"),
        ("profile.ranks", "0", "write [0]"),
        ("profile.ranks", "0,1", "write [0, 1]"),
        ("profile.ranks", "first", None),
        ("eval.tasks", "x.jsonl", None),
        ("train", "5", None),
    ],
)
def test_a_hint_writes_the_section_list_or_value_that_was_meant(key: str, value: str, hint: str | None) -> None:
    assert how_to_write(as_node(value), slots.at(ExperimentConfig, key)[0]) == hint
