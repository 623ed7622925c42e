"""The folder of one run: where things are in it, who may write to it, and whether a config still belongs to it.

    runs/NAME/
      config.yaml  environment.json  run_id  origin.json  tokenizer.json
      metrics.jsonl  routing.jsonl  checkpoints/  status/
      predictions/  skipped_rows.jsonl  experts.svg  wandb/  tensorboard/  profile/  deepspeed/    where asked for

Imports no torch, so that a config that does not belong to its run folder is refused at once.
"""

import fcntl
import json
import logging
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trainer.atomic_io import NotRegular, is_open_file, open_regular, replace_file
from trainer.errors import ConfigError, ResourceError

_log = logging.getLogger(__name__)
_ATTEMPTS = 10  # a file system may not tell which file has a name
_LARGEST_BYTES = 1 << 20
_PLACE = re.compile(r"/[^\x00-\x1f\x7f]{0,4000}")


class RunFolder:
    """Paths of one run, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.run_id = path / "run_id"
        self.origin = path / "origin.json"
        self.metrics = path / "metrics.jsonl"
        self.routing = path / "routing.jsonl"
        self.checkpoints = path / "checkpoints"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.status = path / "status"
        self.predictions = path / "predictions"
        self.experts_picture = path / "experts.svg"
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self.deepspeed = path / "deepspeed"
        """What DeepSpeed writes of its own."""
        self._lock: IO[str] | None = None
        self._is_watched = False
        """The file system can tell whether the lock is still there."""
        self._written: dict[Path, str] = {}
        """Small files by what is in them, for a folder that somebody removes."""

    def lock(self) -> None:
        """Make the folder, and claim it for this process until it ends.

        Raises:
            ConfigError: if another process trains into it, the lock is no file, or its checkpoints are no folder or are
                another run's.
            ResourceError: if it cannot be written.
        """
        path = self.path / ".lock"
        self._check_own_checkpoints()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._claim(path)
            if os.fstat(lock.fileno()).st_nlink > 1:  # with a snapshot by `cp -al`, whose lock it must not be
                replace_file(path, "")
                lock.close()  # only now: who opened it meanwhile waits until it has lost its name
                lock = self._claim(path)
        except NotRegular:
            raise ConfigError(f"{path}: is no regular file; remove it, it is not ours") from None
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written: {error.strerror}; set runs_dir to another place"
            ) from None
        self._lock, self._is_watched = lock, is_open_file(path, lock.fileno())
        with suppress(OSError):  # a full disk: only messages name the owner
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{socket.gethostname()} process {os.getpid()}".encode())

    def _check_own_checkpoints(self) -> None:
        """Refuse what can hold none, and a link to those of another run, which has a lock of its own and prunes too."""
        if os.path.lexists(self.checkpoints) and not self.checkpoints.is_dir():
            raise ConfigError(f"{self.checkpoints}: is no folder, and checkpoints go there; remove it, it is not ours")
        if self.checkpoints.is_symlink():
            theirs = self.checkpoints.resolve().parent
            if any((theirs / name).exists() for name in (".lock", self.run_id.name, self.config.name)):
                raise ConfigError(
                    f"{self.checkpoints}: is a link into another run's folder, {theirs}, whose checkpoints would be "
                    "removed; copy the one to go on from"
                )

    def _claim(self, path: Path, *, attempts: int = _ATTEMPTS) -> IO[str]:
        """Lock the file that has this name."""
        lock = os.fdopen(open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it with the process, however that ends
        except BlockingIOError:
            owner = _owner(lock)
            lock.close()
            raise self._taken(owner) from None
        except OSError as error:  # a file system without locks: nobody can be told apart there
            _log.warning("%s: cannot be locked (%s); start no second run in it", self.path, error.strerror)
        if attempts == 1 or is_open_file(path, lock.fileno()):
            return lock
        lock.close()  # another process has replaced it in between
        return self._claim(path, attempts=attempts - 1)

    def is_held(self) -> bool:
        """Tell whether the folder that was locked still has its name, and the lock its own; costs microseconds."""
        return self._lock is None or not self._is_watched or is_open_file(self.path / ".lock", self._lock.fileno())

    def regain(self) -> str:
        """Make a folder anew that somebody has moved or removed under this run, or lock it again; return what was done.

        Small files that this run has written into it are written again; what only the disk had is gone.

        Raises:
            ConfigError: if the folder is another run's by now.
            ResourceError: if it cannot be written.
        """
        assert self._lock is not None, "lock it first"
        is_there, moved_to = self.config.exists(), _place(self._lock)
        try:
            self.lock()
            if self._is_another_runs():
                self._lock = None  # which frees it
                raise ConfigError(f"{self.path}: it has another run_id; use another name=...")
        except ConfigError as error:
            now = "the folder of this run was moved or removed, and is another run's now"
            raise ConfigError(f"{now}: {error}") from None
        for path, text in self._written.items():
            if not path.exists():
                self.write(path, text)
        if is_there:
            return f"{self.path}: its .lock was moved or removed while the run trains; it is locked again"
        was = "was removed" if moved_to is None else f"was moved to {moved_to.parent}"
        return f"{self.path}: {was} while the run trains; it is made anew, and what follows is saved there"

    def _is_another_runs(self) -> bool:
        mine = self._written.get(self.run_id)
        with suppress(OSError, ValueError):
            return mine is not None and self.run_id.read_text() != mine
        return False

    def owner(self) -> str | None:
        """Return who trains into the folder now; None if nobody does, or it cannot be told."""
        try:
            with os.fdopen(open_regular(self.path / ".lock", os.O_RDONLY)) as lock:
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
        advice, lock = "wait for it, or use another name=...", self.path / ".lock"
        with suppress(OSError):
            if lock.lstat().st_nlink > 1:
                advice += f"; if that trains into a folder that this one is a copy of (cp -al), remove {lock}"
        return ConfigError(f"{self.path}: {owner} is training into it; {advice}")

    def write(self, path: Path, text: str, *, is_passing: bool = False) -> None:
        """Replace a small file as a whole; `regain` writes it again, unless it is a passing one."""
        if not is_passing:
            self._written[path] = text
        try:
            replace_file(path, text)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror}") from None

    def write_unless_same(self, path: Path, text: str) -> None:
        """Replace a small file as a whole, if it is not what it should be."""
        self._written[path] = text
        with suppress(OSError, ValueError), os.fdopen(open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
            if file.read(len(text) + 1) == text:
                return
        self.write(path, text)

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


def _place(lock: IO[str]) -> Path | None:
    """Return where an open file is now; None if it is nowhere, or the system does not tell."""
    with suppress(OSError):
        path = Path(f"/proc/self/fd/{lock.fileno()}").readlink()
        return path if is_open_file(path, lock.fileno()) else None
    return None


def _owner(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"
