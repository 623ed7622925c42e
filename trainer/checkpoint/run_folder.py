"""Run folder: its paths, the lock of the process that trains into it, and atomic writes of its small files.

    runs/NAME/
      config.yaml  environment.json  run_id  origin.json  tokenizer.json  made_from.json if it was made from another run
      chat_template.jinja  special_tokens_map.json    if it trains on chats
      source/    as published, if imported
      metrics.jsonl  routing.jsonl  alarms.jsonl  checkpoints/  status/  machines/ with `launch --spares`
      predictions/  skipped_rows.jsonl  experts.svg  report.html  report.json  routing_record/
      wandb/  tensorboard/  profile/  deepspeed/    if enabled

Imports no torch.
"""

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trainer.atomic_io import NotRegular, is_open_file, open_regular, replace_file
from trainer.errors import ConfigError, ResourceError

_log = logging.getLogger(__name__)
_MAX_BYTES = 1 << 20
_PATH = re.compile(r"/[^\x00-\x1f\x7f]{0,4000}")


class RunFolder:
    """Paths, lock and small files of one run."""

    def __init__(self, path: Path, *, place: Path | None = None) -> None:
        """Create the paths of a folder; `place` is that which it gets once it is complete, if it is being made."""
        self.path, self.place = path, place or path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.source = path / "source"
        self.run_id = path / "run_id"
        self.origin = path / "origin.json"
        self.made_from = path / "made_from.json"
        self.metrics = path / "metrics.jsonl"
        self.routing = path / "routing.jsonl"
        self.alarms = path / "alarms.jsonl"
        self.routing_record = path / "routing_record"
        self.checkpoints = path / "checkpoints"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.status = path / "status"
        self.machines = path / "machines"
        self.predictions = path / "predictions"
        self.experts_picture = path / "experts.svg"
        self.report = path / "report.html"
        self.report_numbers = path / "report.json"
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self.deepspeed = path / "deepspeed"
        self._lock: IO[str] | None = None
        self._has_stable_inode = False
        """The file system can tell whether the lock file is still in its place."""
        self._written: dict[Path, str] = {}
        """Content of small files, to restore them if the folder is removed."""

    def lock(self) -> None:
        """Create the folder and lock it until this process ends.

        Raises:
            ConfigError: if another process trains into it, the lock is not a file, or `checkpoints` is not a folder or
                belongs to another run.
            ResourceError: if the folder cannot be written.
        """
        path = self.path / ".lock"
        self._check_own_checkpoints()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._claim(path)
            if os.fstat(lock.fileno()).st_nlink > 1:  # shared with a snapshot made by `cp -al`: unshare it
                replace_file(path, "")
                lock.close()  # after the replacement: whoever opened the old file then finds that it lost its name
                lock = self._claim(path)
        except NotRegular:
            raise ConfigError(f"{path}: is not a regular file; remove it, it is not ours") from None
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written: {error.strerror}; set runs_dir to another place"
            ) from None
        self._lock, self._has_stable_inode = lock, is_open_file(path, lock.fileno())
        with suppress(OSError):  # full disk; the text is only for messages
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{socket.gethostname()} process {os.getpid()}".encode())

    def _check_own_checkpoints(self) -> None:
        """Refuse `checkpoints` if it is not a folder, or links to those of another run, which prunes them too."""
        if os.path.lexists(self.checkpoints) and not self.checkpoints.is_dir():
            raise ConfigError(
                f"{self.checkpoints}: is not a folder, and checkpoints go there; remove it, it is not ours"
            )
        if self.checkpoints.is_symlink():
            theirs = self.checkpoints.resolve().parent
            if any((theirs / name).exists() for name in (".lock", self.run_id.name, self.config.name)):
                raise ConfigError(
                    f"{self.checkpoints}: is a link into another run's folder, {theirs}, whose checkpoints would be "
                    "removed; copy the checkpoint to start from"
                )

    def _claim(self, path: Path, *, attempts: int = 10) -> IO[str]:
        """Open and lock the file; retry if it was replaced meanwhile, or the file system has no stable inodes."""
        lock = os.fdopen(open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel however the process ends
        except BlockingIOError:
            owner = _owner(lock)
            lock.close()
            raise self._taken(owner) from None
        except OSError as error:  # a file system without locks
            _log.warning("%s: cannot be locked (%s); start no second run in it", self.path, error.strerror)
        if attempts == 1 or is_open_file(path, lock.fileno()):
            return lock
        lock.close()
        return self._claim(path, attempts=attempts - 1)

    def is_held(self) -> bool:
        """Return whether the locked folder and its lock file are still in their place; takes microseconds."""
        return (
            self._lock is None or not self._has_stable_inode or is_open_file(self.path / ".lock", self._lock.fileno())
        )

    def regain(self) -> str:
        """Recreate or relock a folder that was moved or removed during the run; return a warning that says which.

        Small files that this run wrote are restored; files that only the disk had are lost.

        Raises:
            ConfigError: if the folder belongs to another run by now.
            ResourceError: if the folder cannot be written.
        """
        assert self._lock is not None, "lock it first"
        is_there, moved_to = self.config.exists(), _current_path(self._lock)
        try:
            self.lock()
            mine = self._written.get(self.run_id)
            with suppress(OSError, ValueError):
                if mine is not None and self.run_id.read_text() != mine:
                    self._lock = None  # closes and so releases it
                    raise ConfigError(f"{self.path}: it has another run_id; use another name=...")
        except ConfigError as error:
            now = "the folder of this run was moved or removed, and is another run's now"
            raise ConfigError(f"{now}: {error}") from None
        for path, text in self._written.items():
            if not path.exists():
                self.write(path, text)
        if is_there:
            return f"{self.path}: its .lock was moved or removed while the run trains; it has been locked again"
        was = "was removed" if moved_to is None else f"was moved to {moved_to.parent}"
        return f"{self.path}: {was} while the run trains; it has been recreated, and the run continues in it"

    def owner(self) -> str | None:
        """Return the host and process that train into the folder now; None if there is none, or it is unknown."""
        with suppress(OSError), os.fdopen(open_regular(self.path / ".lock", os.O_RDONLY)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once, by closing the file
            except BlockingIOError:
                return _owner(lock)
        return None

    def check_free(self) -> None:
        """Raise a ConfigError if another process trains into the folder."""
        if (owner := self.owner()) is not None:
            raise self._taken(owner)

    def _taken(self, owner: str) -> ConfigError:
        advice, lock = "wait for it, or use another name=...", self.path / ".lock"
        with suppress(OSError):
            if lock.lstat().st_nlink > 1:
                advice += f"; if that trains into a folder that this one is a copy of (cp -al), remove {lock}"
        return ConfigError(f"{self.path}: {owner} is training into it; {advice}")

    def write(self, path: Path, text: str, *, is_passing: bool = False) -> None:
        """Replace a small file atomically; `regain` restores it unless `is_passing`."""
        if not is_passing:
            self._written[path] = text
        try:
            replace_file(path, text)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror}") from None

    def write_unless_same(self, path: Path, text: str) -> None:
        """Replace a small file atomically unless it already has this content."""
        self._written[path] = text
        with suppress(OSError, ValueError), os.fdopen(open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
            if file.read(len(text) + 1) == text:
                return
        self.write(path, text)

    def write_environment(self, values: dict[str, Any]) -> None:
        """Write environment.json: versions, fingerprints, and the directory that the config's paths are relative to."""
        places = {"working_directory": str(Path.cwd()), "run_folder": str(self.place.absolute())}
        self.write(self.environment, json.dumps({**values, **places}, indent=1) + "\n")

    def start_directory(self, *, runs_dir: str, name: str) -> Path | None:
        """Return the working directory that the run was started in; None if it is unknown.

        Candidates are the recorded directory, the one at the same relative path from the run folder, in case run and
        text were moved together, and the one that makes the run folder RUNS_DIR/NAME. The current directory is
        preferred if it is one of them, as with a copy of run and text. `runs_dir` and `name` are the run's.
        """
        here, own = self.path.absolute(), Path(runs_dir, name)
        there = self.recorded_directories()
        if not own.is_absolute() and here.parts[-len(own.parts) :] == own.parts:
            there += _accessible([Path(*here.parts[: -len(own.parts)])])
        return next((path for path in there if path.samefile(Path.cwd())), there[0] if there else None)

    def recorded_directories(self) -> list[Path]:
        """Return the recorded working directory, and the one at the same relative path from the run folder."""
        try:
            with os.fdopen(open_regular(self.environment, os.O_RDONLY), "rb") as file:
                values = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return []
        found = map(values.get, ("working_directory", "run_folder")) if isinstance(values, dict) else (None, None)
        started_in, was_at = (value if isinstance(value, str) and _PATH.fullmatch(value) else None for value in found)
        if started_in is None:
            return []
        moved = [] if was_at is None else [os.path.normpath(self.path.absolute() / os.path.relpath(started_in, was_at))]
        return _accessible(map(Path, [started_in, *moved]))


def _accessible(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_dir() and os.access(path, os.X_OK)]


def _current_path(lock: IO[str]) -> Path | None:
    """Return the current path of an open file; None if it was removed, or the system cannot tell."""
    with suppress(OSError):
        path = Path(f"/proc/self/fd/{lock.fileno()}").readlink()
        return path if is_open_file(path, lock.fileno()) else None
    return None


def _owner(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"
