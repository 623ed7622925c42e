"""The process that uploads a run to Weights & Biases: it reads metrics.jsonl as it grows.

    argv     run folder, folder for temporary files, time limits of wandb's finish and of this process, in seconds
    stdin    the run's exit code at its end; closed without one if the run was killed
    stdout   {"text": ..., "is_warning": ..., "url": ...}, one JSON object per line, for the run's console

Rows have wandb's own step number, which the server reports when a run is resumed: so records that are repeated after a
crash are not sent twice, and a later start or `turnout sync-wandb` sends those that are missing. Imports no torch.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.atomic_io import open_unshared
from trainer.errors import PREEMPTED
from trainer.metrics.expert_load import layer_loads
from trainer.trackers.tail import EndOfRun, Tail

if TYPE_CHECKING:
    import wandb

_POLL_S = 0.5  # interval at which metrics.jsonl is read, in seconds
_SETTINGS: dict[str, object] = {
    "program": "turnout",  # not this file
    "silent": True,  # also keeps wandb from asking for a key
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "init_timeout": 30.0,
    "finish_timeout_raises": True,
    "x_disable_stats": True,  # metrics.jsonl has the statistics of the run's own process
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 1.0,
}
_BEST = ("eval/loss", "eval/bits_per_byte")  # metrics whose best value is in the summary as `best/...`


class Uploader:
    """Uploads one run, from its first record to its last."""

    def __init__(self, folder: Path, end: EndOfRun, output: int, *, finish_s: float) -> None:
        self._folder, self._end, self._output, self._finish_s = folder, end, output, finish_s
        self._settings = json.loads((folder / "wandb" / "run.json").read_text())
        self._advice = f"metrics.jsonl is complete; to upload the rest: turnout sync-wandb {folder}"
        self._routing = Tail(folder / "routing.jsonl")
        self._num_steps = 0
        self._best: dict[str, float] = {}

    def run(self) -> None:
        """Upload existing records and new ones until the run ends."""
        with os.fdopen(open_unshared(self._folder / "wandb" / ".lock", os.O_WRONLY | os.O_CREAT), "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # of a run that still trains, or was killed
                    self.say("waiting for another upload of this run to end")
                    fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                run = self._init()
            except Exception as error:
                import wandb

                has_no_key = isinstance(error, wandb.errors.UsageError)
                self.say(error, is_warning=not (has_no_key and self._settings["mode"] == "auto"))
                return
            self.say(run.url or "online", url=run.url)
            self._follow(run)
            if self._end.exit_code == PREEMPTED:
                run.mark_preempting()
            run.finish(exit_code=self._end.exit_code)

    def say(self, text: str | Exception, *, is_warning: bool = False, url: str | None = None) -> None:
        """Show the user a message, or an error with advice."""
        if isinstance(text, Exception):
            is_timeout = isinstance(text, TimeoutError)
            reason = "not all records were sent in time" if is_timeout else getattr(text, "strerror", None) or str(text)
            first_line = (reason or type(text).__name__).splitlines()[0].rstrip(".")
            text = f"{first_line}; {self._advice}"
        message = {"text": text, "is_warning": is_warning, "url": url}
        with contextlib.suppress(OSError):  # the run has ended
            os.write(self._output, json.dumps(message).encode() + b"\n")

    def _init(self) -> "wandb.Run":
        import wandb

        settings, fields = self._settings, wandb.Settings.model_fields
        wanted = {**_SETTINGS, "finish_timeout": self._finish_s}
        wandb_settings = wandb.Settings.model_validate({key: value for key, value in wanted.items() if key in fields})
        wandb.setup(wandb_settings)  # the login does not see settings that only `init` is given
        labels = settings["labels"]
        run = wandb.init(
            mode="online",
            dir=self._folder,
            **{key: labels[key] for key in ("entity", "group", "name", "job_type", "notes")},
            project=labels["project"] or os.environ.get("WANDB_PROJECT") or "turnout",
            tags=labels["tags"] or None,
            config=settings["config"],
            id=settings["run_id"],
            resume="allow",
            allow_val_change=True,
            settings=wandb_settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def _follow(self, run: "wandb.Run") -> None:
        """Log every record that the server does not have, until the run has ended."""
        start, first_missing = self._settings["start_step"], run.starting_step
        last_sent = (first_missing - 1) // 2
        if last_sent > start:
            self.say(f"steps {start + 1} to {last_sent} were sent before and are not sent again")
        metrics, alarms = (Tail(self._folder / name) for name in ("metrics.jsonl", "alarms.jsonl"))
        while True:
            is_over = self._end.has_come.is_set()  # if so, this is the last read
            for alarm in alarms.new():
                if 2 * int(alarm.get("step", 0)) >= first_missing and alarm.get("state") != "ended":
                    run.alert(f"alarm {alarm['alarm']}", f"step {alarm['step']}: {alarm['message']}; {alarm['advice']}")
            for record in metrics.new():
                step = record.get("step")
                if type(step) is not int:
                    continue  # not our record
                self._update_best(run, record)
                row = {key: value for key, value in record.items() if isinstance(value, int | float)}
                row |= self._loads(record)
                number = 2 * step + ("loss" not in record)  # a step's own record, then that of its evaluation
                if number >= first_missing:
                    run.log(row, step=number)
            if is_over:
                return
            self._end.has_come.wait(_POLL_S)

    def _update_best(self, run: "wandb.Run", record: dict[str, Any]) -> None:
        """Keep the best values of the whole run in the summary: wandb's own start afresh when a run is resumed."""
        for key in _BEST:
            value = record.get(key)
            if isinstance(value, float) and value < self._best.get(key, float("inf")):
                self._best[key] = run.summary[f"best/{key}"] = value

    def _loads(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return, every `heatmap_every` logged steps, a histogram per MoE layer whose bin i is the load of expert i."""
        import wandb

        every = self._settings["heatmap_every"]
        if "loss" not in record or every is None:
            return {}
        self._num_steps += 1
        if (self._num_steps - 1) % every:
            return {}
        experts = next((line for line in self._routing.new() if line.get("step") == record["step"]), None)
        if experts is None:  # a dense model
            return {}
        return {
            key: wandb.Histogram(np_histogram=(np.array(loads), np.arange(len(loads) + 1)))
            for key, loads in layer_loads(experts, self._settings["moe_layers"]).items()
        }


def upload(folder: Path, scratch: Path, *, finish_s: float, outlive_s: float) -> None:
    """Upload a run and exit; errors become messages."""
    output = os.dup(1)
    os.dup2(2, 1)  # keep wandb's own output out of the messages
    uploader = Uploader(folder, EndOfRun(outlive_s=outlive_s), output, finish_s=finish_s)
    try:
        uploader.run()
    except Exception as error:
        uploader.say(error, is_warning=True)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)  # wandb's exit hooks have nothing left to do and can take seconds


if __name__ == "__main__":
    upload(Path(sys.argv[1]), Path(sys.argv[2]), finish_s=float(sys.argv[3]), outlive_s=float(sys.argv[4]))
