"""Counterparts of other trainers' option names and values, from foreign_names.toml; tried before similar names."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

ALSO_NEEDED: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys(("constant", "constant_with_warmup"), ("final_fraction", "1")),
    **dict.fromkeys(("linear", "linear_with_warmup"), ("decay_fraction", "1")),
}
"""Key and value that our counterpart of a value needs as well."""
OF_SUFFIX: Final[dict[str, str]] = {
    **dict.fromkeys(("txt", "text", "md", "rst"), "kind: text, path: "),
    **dict.fromkeys(("jsonl", "ndjson"), "kind: jsonl, path: "),
    **{name: f"kind: hf, path: {name}, data_files: " for name in ("parquet", "arrow", "csv", "json")},
}
"""Start of a section that reads a file, by the suffix of the file's name."""
NO_HALF: Final = frozenset({"fp16", "float16", "half", "16-mixed", "f16"})
"""Names of half precision, which is not supported and must not be taken for bfloat16."""
SECTIONS: Final = frozenset(
    {"training", "optimizer", "lr_scheduler", "parallelism", "model_args", "training_args", "job", "comm", "validation"}
)
"""Sections of other trainers whose keys are spread over ours."""


class Counterpart(NamedTuple):
    """Counterpart here of another trainer's option."""

    key: str
    """Dotted, from the root; empty if there is none."""
    note: str = ""
    """Conversion of the value; without a key, the reason and what to do instead."""

    @property
    def remark(self) -> str:
        """The note in parentheses, to stand behind a key."""
        return f" ({self.note})" if self.note else ""

    def __str__(self) -> str:
        """Format as the end of a message: what to do."""
        return f"write {self.key}{self.remark}" if self.key else self.note


def counterpart(name: str, section: str = "") -> Counterpart | None:
    """Return the counterpart of another trainer's option; None if no trainer has it.

    Args:
        name: of the option, with dashes or underscores.
        section: dotted section that it was found in.
    """
    bare = name.replace("-", "_").lower()
    for one in (f"{section.rpartition('.')[2]}.{bare}", bare):
        for table in tables().values():
            if one in table:
                return table[one]
    return None


@cache
def tables() -> Mapping[str, Mapping[str, Counterpart]]:
    """Return the options of every trainer, by its name."""
    data = _data()
    return {
        trainer: {name: _counterpart(entry, data["notes"]) for name, entry in table.items()}
        for trainer, table in data.items()
        if trainer not in ("notes", "values")
    }


@cache
def values() -> Mapping[str, str]:
    """Return our value for each value of other trainers, in lower case; it counts only where it is allowed."""
    return {theirs: ours for ours, all_theirs in _data()["values"].items() for theirs in all_theirs}


def _counterpart(entry: str | list[str], notes: Mapping[str, str]) -> Counterpart:
    if isinstance(entry, str):
        return Counterpart(entry)
    key, note = entry
    reference, *rest = note.split("; ", 1)
    if note.startswith("@"):
        note = "; ".join([notes[reference.removeprefix("@")], *rest])
    return Counterpart(key, note)


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("foreign_names.toml").read_text(encoding="utf-8"))
