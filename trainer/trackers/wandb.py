"""A run in Weights & Biases, kept up by a process beside it (`wandb_mirror`) that can hang or die without harm."""

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

from trainer.metrics.config import MetricsConfig
from trainer.trackers.base import Logged

_ANSWER_S = 4.0
"""A server that has not answered by the end of the run has so long left."""
_FINISH_S = 6.0
"""One that has may take so long for the rest."""
_ROOT = str(Path(__file__).parents[2])


class WandbTracker:
    """Starts the mirror, shows what it has to say, and waits for it at the end, but not for long.

    The mirror reads metrics.jsonl by itself: nothing is handed to it while training, so nothing can fill up.
    """

    def __init__(
        self,
        config: MetricsConfig,
        *,
        folder: Path,
        run_id: str,
        name: str,
        start_step: int,
        moe_layers: Sequence[int],
        described: Mapping[str, Any],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Start the mirror.

        Args:
            config: the `metrics` section.
            folder: of the run.
            run_id: what the run is known by in wandb.
            name: of the experiment.
            start_step: completed steps.
            moe_layers: numbers of the layers that have experts.
            described: JSON values: the run's config and what else wandb shows as such.
            say: shows a line to the user.
            warn: shows a warning.
        """
        self._folder, self._say, self._warn = folder, say, warn
        self._orders = {
            **config.wandb.model_dump(mode="json"),
            "name": config.wandb.name or name,
            "folder": str(folder.absolute()),
            "run_id": run_id,
            "start_step": start_step,
            "heatmap_every": config.heatmap_every,
            "finish_s": _FINISH_S,
            "moe_layers": list(moe_layers),
            "config": described,
        }
        self._heard, self._has_begun = b"", False
        self._place = str(folder / "wandb")
        """Where the run can be looked at: its folder, or an address once there is one."""
        self._scratch: str | None = None
        self._mirror = self._start()

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Show what the mirror has to say; the record is in metrics.jsonl already, where it reads."""
        if self._mirror is not None and self._has_ended(self._mirror, within_s=0.0):
            self._mirror = None

    def written(self) -> list[tuple[str, str]]:
        """Return where wandb has the run, as far as it has said so by now."""
        if self._mirror is not None:
            self._has_ended(self._mirror, within_s=0.0)
        return [("wandb", self._place)]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Let the mirror finish, and kill it if that takes too long; without patience it finishes by itself."""
        mirror, self._mirror = self._mirror, None
        if mirror is None:
            return
        _tell(mirror, str(exit_code))
        if patience_s == 0 or self._has_ended(mirror, within_s=_ANSWER_S):
            return
        if not self._has_begun and self._orders["mode"] != "offline":
            self._kill(mirror)
            self._orders["mode"] = "offline"
            self._warn("wandb: its server did not answer before the run had ended")
            mirror = self._start()
            if mirror is None:
                return
            _tell(mirror, str(exit_code))
        if not self._has_ended(mirror, within_s=patience_s - _ANSWER_S):
            self._kill(mirror)
            self._warn(f"wandb: it did not finish within {patience_s:.0f} s; {self._advice}")

    def _start(self) -> subprocess.Popen[bytes] | None:
        try:
            # wandb leaves folders where temporary files go; the mirror removes this one when it ends.
            self._orders["scratch"] = self._scratch = tempfile.mkdtemp(prefix="turnout-wandb-")
            mirror = subprocess.Popen(
                [sys.executable, "-m", "trainer.trackers.wandb_mirror"],
                env=_environment(self._folder) | {"TMPDIR": self._scratch},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is the run's, which then closes it
            )
        except OSError as error:
            self._warn(f"wandb: its process does not start ({error.strerror}); {self._advice}")
            self._remove_scratch()
            return None
        assert mirror.stdout is not None
        os.set_blocking(mirror.stdout.fileno(), False)
        _tell(mirror, json.dumps(self._orders))
        return mirror

    def _has_ended(self, mirror: subprocess.Popen[bytes], *, within_s: float) -> bool:
        """Tell whether it ends within some time; show what it has said."""
        with suppress(subprocess.TimeoutExpired):
            mirror.wait(within_s)
        assert mirror.stdout is not None
        *lines, self._heard = (self._heard + (mirror.stdout.read() or b"")).split(b"\n")
        for line in lines:
            self._has_begun = True
            said = json.loads(line)
            if said["place"] is not None:
                self._place = said["place"].replace(str(self._folder.absolute()), str(self._folder), 1)
            (self._warn if said["is_warning"] else self._say)(f"wandb: {said['text']}")
        if mirror.returncode:  # with 0 it has said why
            self._warn(f"wandb: its process ended with {mirror.returncode}; {self._advice}")
        if mirror.returncode is not None:
            self._remove_scratch()  # where it was killed
        return mirror.returncode is not None

    def _kill(self, mirror: subprocess.Popen[bytes]) -> None:
        mirror.kill()
        mirror.wait()
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = None

    @property
    def _advice(self) -> str:
        return f"{self._folder / 'metrics.jsonl'} has everything, and to start the run again sends the rest"


def _tell(mirror: subprocess.Popen[bytes], line: str) -> None:
    assert mirror.stdin is not None
    with suppress(OSError):  # it has ended, which is noticed elsewhere
        mirror.stdin.write(line.encode() + b"\n")
        mirror.stdin.flush()


def _environment(folder: Path) -> dict[str, str]:
    """Return the mirror's environment: nothing is written or sent elsewhere, no other run's service is used."""
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    path = os.pathsep.join(filter(None, [_ROOT, kept.get("PYTHONPATH")]))
    quiet = {"WANDB_CACHE_DIR": str(folder.absolute() / "wandb" / ".cache"), "WANDB_ERROR_REPORTING": "false"}
    return {**quiet, **kept, "PYTHONPATH": path}
