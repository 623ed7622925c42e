"""Find the runs below folders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from trainer.config.nodes import shown_path
from trainer.errors import CheckpointError, ConfigError
from trainer.runs.recorded_run import is_run

_MAX_DEPTH: Final = 3  # runs/SWEEP/TRIAL and one more


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among and below some folders, in the order of names, each once.

    Raises:
        ConfigError: if one is not a folder.
        CheckpointError: if one is a folder inside a run.
    """
    found = dict[Path, None]()
    for path in paths:
        try:
            is_there, is_folder = path.exists(), path.is_dir()
        except (OSError, ValueError):
            is_there = is_folder = False
        if not is_folder:
            what = "is not a folder" if is_there else "no such folder"
            raise ConfigError(f"{shown_path(path)}: {what}; name a run, or a folder of runs such as runs")
        if not is_run(path) and (run := next((up for up in path.absolute().parents if is_run(up)), None)) is not None:
            raise CheckpointError(f"{shown_path(path)}: is inside a run; name the run: {shown_path(run)}")
        found |= dict.fromkeys(_below(path, _MAX_DEPTH))
    return list(found)


def _below(path: Path, depth: int) -> Iterator[Path]:
    """Yield the runs at and below a folder; a run's own folders are not searched."""
    if is_run(path):
        yield path
    elif depth > 0:
        try:
            entries = sorted(path.iterdir())
        except OSError:  # not permitted, or gone
            return
        for entry in entries:
            # A link to a run is one; a link to a folder of them may lead in a circle.
            if not entry.name.startswith(".") and (is_run(entry) or _is_own_folder(entry)):
                yield from _below(entry, depth - 1)


def _is_own_folder(path: Path) -> bool:
    try:
        return path.is_dir() and not path.is_symlink()
    except OSError:  # not permitted
        return False
