"""Weights & Biases tracker: starts and watches the process that uploads the run (`wandb_upload`).

wandb runs in a process of its own because a thread cannot contain it: `wandb.init` replaces `sys.exit` and
`sys.excepthook`, waits for its service at exit without a limit, and interrupts the main thread when a run is stopped
on the website. Its process can hang or die; the run never waits for it, except briefly at its end.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.atomic_io import replace_file
from trainer.trackers.base import Logged

_FINISH_S = 6.0  # time limit for wandb's own finish at the end of a run: less than a run waits for its trackers
_OUTLIVE_S = 60.0  # longest time the upload process outlives the run, which may have been killed
_SYNC_S = 3600.0
_ROOT = str(Path(__file__).parents[2])


class WandbTracker:
    """Uploads a run to wandb while it trains, by a process that reads metrics.jsonl; offline, `sync` does it later."""

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        run_id: str,
        start_step: int,
        heatmap_every: int | None,
        moe_layers: Sequence[int],
        labels: Mapping[str, Any],
        config: Mapping[str, Any],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Write the settings of the upload to the run folder, and start it unless the mode is offline.

        `auto` is online unless WANDB_MODE or a missing API key prevents it. Every `heatmap_every` logged steps (None:
        never) the loads of the layers `moe_layers` are sent. `labels` are project, entity, group, name, job_type, tags
        and notes of the run in wandb; `config` are JSON values.
        """
        self._folder, self._say, self._warn = folder, say, warn
        self._place = self._sync_command = f"turnout sync-wandb {folder}"
        self._upload: _Upload | None = None
        upload_settings = {
            "mode": mode,
            "run_id": run_id,
            "start_step": start_step,
            "heatmap_every": heatmap_every,
            "moe_layers": list(moe_layers),
            "labels": dict(labels),
            "config": config,
        }
        try:
            path = settings_path(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(upload_settings))
            if mode == "offline" or (mode == "auto" and os.environ.get("WANDB_MODE", "online") != "online"):
                say(f"wandb: offline; to upload the run: {self._sync_command}")
            else:
                self._upload = _Upload(folder, finish_s=_FINISH_S, outlive_s=_OUTLIVE_S)
        except OSError as error:
            warn(f"wandb: cannot start: {error.strerror or error}; {self._advice}")

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Show messages of the upload process; it reads the record from metrics.jsonl itself."""
        if self._upload is not None and self._has_ended(self._upload, within_s=0.0):
            self._upload = None

    def written(self) -> list[tuple[str, str]]:
        """Return the run's address in wandb, or the command that uploads the run."""
        self.log({})
        return [("wandb", self._place)]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Let the upload finish, and kill it after `patience_s`; if that is 0, it finishes in the background."""
        upload, self._upload = self._upload, None
        if upload is None:
            return
        upload.end(exit_code)
        if patience_s > 0 and not self._has_ended(upload, within_s=patience_s):
            upload.kill()
            self._warn(f"wandb: did not finish within {patience_s:.0f} s; {self._advice}")

    def _has_ended(self, upload: "_Upload", *, within_s: float) -> bool:
        code = upload.wait(within_s)
        for message in upload.messages():
            self._place = message["url"] or self._place
            (self._warn if message["is_warning"] else self._say)(f"wandb: {message['text']}")
        if code:  # a process that exits with 0 has reported why
            self._warn(f"wandb: its process exited with code {code}; {self._advice}")
        return code is not None

    @property
    def _advice(self) -> str:
        return f"metrics.jsonl is complete; to upload the rest: {self._sync_command}"


def settings_path(folder: Path) -> Path:
    """Return the file with the settings of a run's upload."""
    return folder / "wandb" / "run.json"


def sync(folder: Path, show: Callable[[str], None]) -> bool:
    """Upload the records of a run that wandb does not have; return whether all of them were sent.

    Raises:
        OSError: if the upload process cannot be started.
    """
    upload = _Upload(folder, finish_s=_SYNC_S, outlive_s=_SYNC_S)
    upload.end(0)
    has_failed = False
    while True:
        code = upload.wait(0.2)
        for message in upload.messages():
            has_failed |= message["is_warning"]
            show(f"wandb: {message['text']}")
        if code is not None:
            return code == 0 and not has_failed


class _Upload:
    """The upload process: it gets the run's exit code on stdin and reports messages as JSON lines on stdout."""

    def __init__(self, folder: Path, *, finish_s: float, outlive_s: float) -> None:
        # wandb leaves folders among temporary files; this one is removed with the process.
        self._scratch, self._buffer = tempfile.mkdtemp(prefix="turnout-wandb-"), b""
        arguments = [str(folder.absolute()), self._scratch, str(finish_s), str(outlive_s)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.trackers.wandb_upload", *arguments],
                env=_environment(folder) | {"TMPDIR": self._scratch},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for the run, which then ends the upload
            )
        except OSError:
            self._remove_scratch()
            raise
        assert self._process.stdin is not None and self._process.stdout is not None, "they are pipes"
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def end(self, exit_code: int) -> None:
        """Report the end of the run."""
        with suppress(OSError):  # the process has ended, which `wait` reports
            self._stdin.write(f"{exit_code}\n".encode())
            self._stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """Wait for the process; return its exit code, None if it still runs."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            self._remove_scratch()
        return self._process.returncode

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages received since the last call."""
        *lines, self._buffer = (self._buffer + (self._stdout.read() or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        self._process.kill()
        self.wait(60.0)

    def _remove_scratch(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    """Return an environment in which wandb writes to the run folder only and uses no other run's service."""
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    path = os.pathsep.join(filter(None, [_ROOT, kept.get("PYTHONPATH")]))
    defaults = {"WANDB_CACHE_DIR": str(folder.absolute() / "wandb" / ".cache"), "WANDB_ERROR_REPORTING": "false"}
    return {**defaults, **kept, "PYTHONPATH": path}
