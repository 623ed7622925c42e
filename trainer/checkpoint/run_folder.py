"""The folder of one run: where things are in it, who may write to it, and whether a config still belongs to it.

    runs/NAME/
      config.yaml  environment.json  run_id  tokenizer.json  metrics.jsonl  routing.jsonl  checkpoints/  status/
      predictions/  skipped_rows.jsonl  experts.svg  wandb/  tensorboard/  profile/    where asked for

Imports no torch, so that a config that does not belong to its run folder is refused at once.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trainer.config.dump import ABSENT, Change, inline
from trainer.durable import NotRegular, open_regular, replace_file
from trainer.errors import ConfigError, ResourceError

_log = logging.getLogger(__name__)
_LARGEST_BYTES = 1 << 20
_PLACE = re.compile(r"/[^\x00-\x1f\x7f]{0,4000}")
_RUN_ID = re.compile(r"[0-9a-z]{8,64}")


class RunFolder:
    """Paths of one run, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.run_id = path / "run_id"
        self.metrics = path / "metrics.jsonl"
        self.routing = path / "routing.jsonl"
        self.checkpoints = path / "checkpoints"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.status = path / "status"
        self.predictions = path / "predictions"
        self.experts_picture = path / "experts.svg"
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Make the folder, and claim it for this process until it ends.

        Raises:
            ConfigError: if another process trains into it, or the lock is no file.
            ResourceError: if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(open_regular(self.path / ".lock", os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+")
        except NotRegular:
            raise ConfigError(f"{self.path / '.lock'}: is no regular file; remove it, it is not ours") from None
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written: {error.strerror}; set runs_dir to another place"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it with the process, however that ends
        except BlockingIOError:
            owner = _owner(lock)
            lock.close()
            raise self._taken(owner) from None
        except OSError as error:  # a file system without locks: nobody can be told apart there
            _log.warning("%s: cannot be locked (%s); start no second run in it", self.path, error.strerror)
        self._lock = lock
        with suppress(OSError):  # a full disk: only messages name the owner
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{socket.gethostname()} process {os.getpid()}".encode())

    def owner(self) -> str | None:
        """Return who trains into the folder now; None if nobody does, or it cannot be told."""
        try:
            with (self.path / ".lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # and closed, and so freed, at once
                except BlockingIOError:
                    return _owner(lock)
        except OSError:
            return None
        return None

    def check_free(self) -> None:
        """Refuse a folder that another process trains into.

        Raises:
            ConfigError: if one does.
        """
        owner = self.owner()
        if owner is not None:
            raise self._taken(owner)

    def _taken(self, owner: str) -> ConfigError:
        return ConfigError(f"{self.path}: {owner} is training into it; wait for it, or use another name=...")

    def write(self, path: Path, text: str) -> None:
        """Replace a small file as a whole."""
        try:
            replace_file(path, text)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror}") from None

    def identify(self, known: object = None) -> str:
        """Return what the run is known by elsewhere, in wandb for one; made up once, and kept in the folder.

        Args:
            known: what a checkpoint of the run says it is, for a folder that has forgotten it.
        """
        try:
            with os.fdopen(open_regular(self.run_id, os.O_RDONLY)) as file:
                kept: object = file.read(100).strip()
        except (OSError, ValueError):
            kept = None
        for found in (kept, known):
            if isinstance(found, str) and _RUN_ID.fullmatch(found):
                break
        else:
            found = secrets.token_hex(8)
        if found != kept:
            self.write(self.run_id, f"{found}\n")
        return found

    def write_environment(self, values: dict[str, Any]) -> None:
        """Record versions and fingerprints, and what the config's paths are relative to."""
        places = {"working_directory": str(Path.cwd()), "run_folder": str(self.path.absolute())}
        self.write(self.environment, json.dumps({**values, **places}, indent=1) + "\n")

    def home(self, *, runs_dir: str, name: str) -> Path | None:
        """Return the working directory that the run was started in; None if it is not known.

        Where that is gone, run and text may have been moved together: then it is at the same place beside the run
        folder. Of a folder that does not say where it was, its place in RUNS_DIR/NAME does. Whoever is in a directory
        that any of this leads to, as with a copy of both, stays there.

        Args:
            runs_dir: of the run's config.
            name: the same.
        """
        here, candidates = self.path.absolute(), list[Path]()
        started_in, was_at = self._places()
        if started_in is not None:
            candidates.append(Path(started_in))
            if was_at is not None:
                candidates.append(Path(os.path.normpath(here / os.path.relpath(started_in, was_at))))
        own = Path(runs_dir, name)
        if not own.is_absolute() and here.parts[-len(own.parts) :] == own.parts:
            candidates.append(Path(*here.parts[: -len(own.parts)]))
        there = [path for path in candidates if path.is_dir() and os.access(path, os.X_OK)]
        return next((path for path in there if path.samefile(Path.cwd())), there[0] if there else None)

    def _places(self) -> tuple[str | None, str | None]:
        """Return working directory and run folder at the last start, as far as the folder says them."""
        try:
            with os.fdopen(open_regular(self.environment, os.O_RDONLY), "rb") as file:
                values = json.loads(file.read(_LARGEST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None, None
        found = [values.get(key) for key in ("working_directory", "run_folder")] if isinstance(values, dict) else []
        places = [value if isinstance(value, str) and _PLACE.fullmatch(value) else None for value in found]
        return (places[0], places[1]) if places else (None, None)


def _owner(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"


_IDENTITY = ("model.", "data.tokenizer")
_COMPARED_BY_CONTENT = ("data.tokenizer.path",)
_LEARNING = ("seed", "data.", "optim.", "schedule.", "train.")
_HARMLESS = ("train.steps", "train.max_consecutive_skips", "data.cache_dir")


def check_belongs(folder: RunFolder, changes: Iterable[Change]) -> list[str]:
    """Judge what changed between the config a run folder was started with and the one given now.

    Args:
        folder: of the run.
        changes: (dotted key, value in the folder, value now).

    Returns:
        One warning for each change of what is learned.

    Raises:
        ConfigError: if the model itself changed; one line for each key.
    """
    changes = list(changes)
    new_kinds = {change.key.rpartition(".")[0] for change in changes if change.key.endswith(".kind")}
    refused, warnings = [], []
    for key, old, new in changes:
        if ABSENT in (old, new) and key.rpartition(".")[0] in new_kinds:
            continue  # an option of the other kind: the line about the kind says it all
        if key in _COMPARED_BY_CONTENT:
            continue
        if key == "model" or key.startswith(_IDENTITY):
            refused.append(
                f"{folder.path}: was written with {key} {inline(old)}, the config has {inline(new)}; "
                f"set '{key}={inline(old)}', or use a new name=..."
            )
        elif key.startswith(_LEARNING) and not key.startswith(_HARMLESS):
            warnings.append(f"{key} was {inline(old)} in {folder.path} and is now {inline(new)}")
    if refused:
        raise ConfigError("\n".join(refused))
    return warnings
