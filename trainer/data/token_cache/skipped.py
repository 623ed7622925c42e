"""skipped_rows.jsonl: the skipped records of each ingested source and of each block of a stream, a line each.

{"source": 0, "block": null, "rows": 3, "reasons": {"not JSON": 2, "without text": 1}, "first": ["a.jsonl:7: not ..."]}
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.atomic_io import open_regular, replace_file
from trainer.data.records.bad_records import SkippedRecords, merge_skipped

_MAX_BYTES = 64 << 20


class SourceSkips(NamedTuple):
    """Skipped records of a source, or of a block of a stream."""

    source: int  # index in `data.sources`
    block: int | None  # block of a stream; None for an ingested source
    records: SkippedRecords


def summarize_skipped(skipped: Sequence[SourceSkips]) -> str:
    """Return the number of skipped records, their reasons and their sources, for a line on the screen."""
    total = merge_skipped(one.records for one in skipped)
    sources = ", ".join(str(index) for index in sorted({one.source for one in skipped}))
    records = "1 record" if total.count == 1 else f"{total.count} records"
    return f"left out {records} that cannot be used ({total}), of data.sources {sources}"


def write_skipped(path: Path, skipped: Iterable[SourceSkips], *, keeps_blocks: bool) -> None:
    """Write the file, or remove it if nothing was skipped.

    `keeps_blocks` keeps the lines of other blocks in the file: a resumed run has not read those again.
    """
    lines = _block_lines(path) if keeps_blocks else {}
    for source, block, records in skipped:
        if records.count:
            listed = {"rows": records.count, "reasons": records.reasons, "first": records.first}
            lines[source, block] = {"source": source, "block": block, **listed}
    if lines:
        ordered = sorted(lines.items(), key=lambda item: (item[0][0], item[0][1] or 0))
        replace_file(path, "".join(json.dumps(line) + "\n" for _, line in ordered))
    else:
        path.unlink(missing_ok=True)


def _block_lines(path: Path) -> dict[tuple[int, int | None], dict[str, Any]]:
    """Return the lines of blocks in the file; invalid lines are ignored."""
    found: dict[tuple[int, int | None], dict[str, Any]] = {}
    with suppress(OSError):
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            content = file.read(_MAX_BYTES)
        for text in content.splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                line = json.loads(text)
                if type(line["source"]) is int and type(line["block"]) is int:
                    found[line["source"], line["block"]] = line
    return found
