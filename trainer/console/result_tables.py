"""Tables of results on the screen, and results in files."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.atomic_io import replace_file
from trainer.errors import ResourceError

_WIDTH = 200  # table width in a pipe or file: nothing is truncated there


def write_result(path: Path, content: str | Mapping[str, Any], *, advice: str = "name another file") -> None:
    """Write a picture, or a result as JSON; `advice` is what to do if it cannot be written.

    Raises:
        ResourceError: if the disk refuses.
    """
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text)  # write to /dev/stdout and the like, do not replace them
        else:
            replace_file(path, text)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}; {advice}") from None


def result_screen() -> Console:
    """Return the screen, or the pipe, that results are printed on."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)


def result_table(title: str, first: str, *columns: str) -> Table:
    """Return an empty table of results, whose first column names them."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
