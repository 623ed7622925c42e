"""The folder of a new run whose first weights come from elsewhere: complete under its name, or not there.

RUNS_DIR/.NAME.partial/     everything is written here, under a lock; removed after an error
RUNS_DIR/NAME/              its name at the end: a killed command leaves no run that would start from random weights

Imports no torch.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.atomic_io import sync_folder
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown_path
from trainer.errors import ConfigError, ResourceError


def check_nothing_is_at(path: Path) -> Path:
    """Return the path of a new run; raise a ConfigError if there is anything of its name."""
    if os.path.lexists(path):
        raise ConfigError(f"{shown_path(path)}: exists; choose another name=... for the new run, or remove it")
    return path


@contextmanager
def new_folder(final: Path) -> Iterator[RunFolder]:
    """Yield a locked folder that gets its name at the end; after an error nothing is left of it."""
    had_parent = final.parent.exists()
    partial = RunFolder(final.with_name(f".{final.name}.partial"), place=final)
    partial.lock()
    try:
        _empty(partial.path)  # a killed command left it
        yield partial
        sync_folder(partial.path)
        partial.path.rename(final)  # refused if it exists by now, unless that is an empty folder
        sync_folder(final.parent)
    except OSError as error:
        raise ResourceError(f"{shown_path(final)}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial.path, ignore_errors=True)
        if not had_parent:
            with suppress(OSError):  # not empty: it is used by now
                final.parent.rmdir()


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
