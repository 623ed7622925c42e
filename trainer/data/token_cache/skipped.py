"""The list of what was left out of a text, a line for each source that was ingested and for each block of a stream.

{"source": 0, "block": null, "rows": 3, "reasons": {"not JSON": 2, "without text": 1}, "first": ["a.jsonl:7: not ..."]}
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.atomic_io import open_regular, replace_file
from trainer.data.records.bad_records import SkippedRows, all_skipped

_LARGEST_BYTES = 64 << 20


class SkippedOf(NamedTuple):
    """Rows left out of a source."""

    source: int
    """Index in `data.sources`."""
    block: int | None
    """Block of a stream; None for a source that was ingested."""
    rows: SkippedRows

    def line(self) -> dict[str, Any]:
        """Return its line."""
        listed = {"rows": self.rows.count, "reasons": self.rows.reasons, "first": self.rows.first}
        return {"source": self.source, "block": self.block, **listed}


def summary(skipped: Sequence[SkippedOf]) -> str:
    """Return how much was left out of which sources and why, for a line on the screen."""
    total = all_skipped(one.rows for one in skipped)
    sources = ", ".join(str(index) for index in sorted({one.source for one in skipped}))
    rows = "1 row" if total.count == 1 else f"{total.count} rows"
    return f"left out {rows} that cannot be used ({total}), of data.sources {sources}"


def write_list(path: Path, skipped: Iterable[SkippedOf], *, goes_on: bool) -> None:
    """Write the list, or remove one that would be empty.

    Args:
        path: of the file.
        skipped: what is known now.
        goes_on: keep lines of blocks of which nothing is known now: a run that goes on has not read them again.

    Raises:
        OSError: if the disk refuses.
    """
    lines = {(one.source, one.block): one.line() for one in skipped if one.rows.count}
    if goes_on:
        lines = {key: line for key, line in _blocks_in(path).items() if key not in lines} | lines
    if lines:
        ordered = sorted(lines.items(), key=lambda item: (item[0][0], item[0][1] or 0))
        replace_file(path, "".join(json.dumps(line) + "\n" for _, line in ordered))
    else:
        path.unlink(missing_ok=True)


def _blocks_in(path: Path) -> dict[tuple[int, int | None], dict[str, Any]]:
    """Return the lines of blocks in a list, as far as they are some."""
    found: dict[tuple[int, int | None], dict[str, Any]] = {}
    with suppress(OSError):
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            content = file.read(_LARGEST_BYTES)
        for text in content.splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                line = json.loads(text)
                if type(line["source"]) is int and type(line["block"]) is int:
                    found[line["source"], line["block"]] = line
    return found
