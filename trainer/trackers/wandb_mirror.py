"""The process that shows a run in Weights & Biases: it reads metrics.jsonl as it grows, and hands it on.

    stdin    orders, a line of JSON; at the end of the run its exit code; nothing more, and no code if it was killed
    stdout   {"text": ..., "is_warning": ..., "place": ...}, a line each, for the run's console; place where it says one

wandb can hang, ask questions, print, and take long to end; here it does so beside the run. How far it has come is known
by step: from its server, or offline from a file. So steps that are taken again are not sent again, and what a killed
mirror has not sent the next one sends. Imports no torch.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainer.atomic_io import open_unshared
from trainer.errors import PREEMPTED
from trainer.metrics.expert_load import layer_loads
from trainer.trackers.tail import EndOfRun, Position, Tail

if TYPE_CHECKING:
    import wandb

_LOOK_S = 0.5
"""Between two looks at metrics.jsonl."""
_SETTINGS: dict[str, object] = {
    "program": "turnout",  # not this file
    "silent": True,  # and so it never asks for a key
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "init_timeout": 30.0,
    "finish_timeout_raises": True,
    "x_disable_stats": True,  # the run measures its own process
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 1.0,
}
_BEST = ("eval/loss", "eval/bits_per_byte")
"""Metrics whose best value (`best/...`) is in the summary beside the last one."""
_ADVICE = "metrics.jsonl has everything, and to start the run again sends the rest"


class Mirror:
    """One run in wandb, from its first line to its last."""

    def __init__(self, orders: dict[str, Any], end: EndOfRun, screen: int) -> None:
        """Prepare.

        Args:
            orders: see `WandbTracker`.
            end: of the run.
            screen: descriptor of what the run's console shows.
        """
        self._orders, self._end, self._screen = orders, end, screen
        self._folder = Path(orders["folder"])
        self._routing = Tail(self._folder / "routing.jsonl")
        self._num_steps = 0
        self._best: dict[str, float] = {}

    def run(self) -> None:
        """Hand on what there is and what comes, until the run ends."""
        place = self._folder / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_unshared(place / ".lock", os.O_WRONLY | os.O_CREAT), "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # a killed run's mirror may still be finishing
            run = self._open()
            position = Position(place / "position.json", self._orders["run_id"])
            self._follow(run, position)
            if self._end.exit_code == PREEMPTED:
                run.mark_preempting()
            try:
                run.finish(exit_code=self._end.exit_code)
            except TimeoutError:
                self.say(f"not all was sent; to send the rest: {_sync(run)}", is_warning=True)
            position.settle()

    def say(self, text: str, *, is_warning: bool = False, place: str | None = None) -> None:
        """Show the user of the run a line; `place` is where the run can be looked at."""
        said = {"text": text, "is_warning": is_warning, "place": place}
        with contextlib.suppress(OSError):  # the run has gone
            os.write(self._screen, json.dumps(said).encode() + b"\n")

    def _open(self) -> "wandb.Run":
        """Begin the run in wandb or go on with it, offline where it cannot be reached."""
        import wandb

        mode, why = self._orders["mode"], None
        if mode != "offline":
            try:
                run = self._init("online")
            except Exception as error:
                why = error
                wandb.teardown()  # else the id counts as taken
            else:
                self.say(run.url or "online", place=run.url)
                return run
        run = self._init("offline")
        kept = f"kept offline; to upload it: {_sync(run)}"
        is_expected = why is None or (mode == "auto" and isinstance(why, wandb.errors.UsageError))  # there is no key
        place = str(Path(run.dir).parent)
        self.say(kept if why is None else f"{reason(why)}; {kept}", is_warning=not is_expected, place=place)
        return run

    def _init(self, mode: Literal["online", "offline"]) -> "wandb.Run":
        import wandb

        orders, known = self._orders, wandb.Settings.model_fields
        wanted = {**_SETTINGS, "finish_timeout": orders["finish_s"]}
        settings = wandb.Settings.model_validate({key: value for key, value in wanted.items() if key in known})
        wandb.setup(settings)  # what `init` alone is told, its login does not know
        run = wandb.init(
            mode=mode,
            dir=self._folder,
            project=orders["project"] or os.environ.get("WANDB_PROJECT") or "turnout",
            entity=orders["entity"],
            group=orders["group"],
            name=orders["name"],
            job_type=orders["job_type"],
            tags=orders["tags"] or None,
            notes=orders["notes"],
            config=orders["config"],
            id=orders["run_id"],
            resume="allow",
            allow_val_change=True,
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def _follow(self, run: "wandb.Run", position: Position) -> None:
        """Log every record that wandb does not have, until the run has ended."""
        start = self._orders["start_step"]
        there = position.read() if run.offline else run.summary.get("step", -1)
        if there > start:
            self.say(f"it has steps {start + 1} to {there}, which are taken again now: they are not sent again")
        metrics = Tail(self._folder / "metrics.jsonl")
        while True:
            is_over = self._end.has_come.is_set()  # if so, the next look is the last one
            for record in metrics.new():
                step = record.get("step")
                if type(step) is not int:
                    continue  # not a line of ours
                self._note_best(run, record)
                # Between a step's own line and that of its evaluation a run may have been killed.
                is_doubtful = step == there > start and "eval/loss" in record
                if step > there or is_doubtful:
                    run.log(self._row(record))
                    position.handed_on(step)
            if is_over:
                return
            self._end.has_come.wait(_LOOK_S)

    def _note_best(self, run: "wandb.Run", record: dict[str, Any]) -> None:
        """Keep the summary's best values: wandb's own are those since the run was resumed."""
        for key in _BEST:
            value = record.get(key)
            if isinstance(value, float) and value < self._best.get(key, float("inf")):
                self._best[key] = run.summary[f"best/{key}"] = value

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what wandb shows of a record: its numbers, and now and then the experts' loads."""
        row: dict[str, Any] = {key: value for key, value in record.items() if isinstance(value, int | float)}
        every = self._orders["heatmap_every"]
        if "loss" in record and every is not None:
            if self._num_steps % every == 0:
                row |= self._loads(record["step"])
            self._num_steps += 1
        return row

    def _loads(self, step: int) -> dict[str, Any]:
        """Return a histogram for each MoE layer, whose bin i is expert i: wandb draws them over steps as a heat map."""
        import wandb

        experts = next((line for line in self._routing.new() if line.get("step") == step), None)
        if experts is None:  # a dense model
            return {}
        return {
            key: wandb.Histogram(np_histogram=(np.array(loads), np.arange(len(loads) + 1)))
            for key, loads in layer_loads(experts, self._orders["moe_layers"]).items()
        }


def main() -> None:
    """Follow the orders on standard input."""
    screen = os.dup(1)
    os.dup2(2, 1)  # whatever wandb prints is no message of ours
    orders = json.loads(sys.stdin.readline())
    mirror = Mirror(orders, EndOfRun(), screen)
    try:
        mirror.run()
    except Exception as error:
        mirror.say(f"{reason(error)}; {_ADVICE}", is_warning=True)
    shutil.rmtree(orders["scratch"], ignore_errors=True)
    os._exit(0)  # what wandb registered for the way out is of no use any more, and can take seconds


def reason(error: Exception) -> str:
    """Return in a line what went wrong."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _sync(run: "wandb.Run") -> str:
    """Return the command that uploads what wandb has written of a run."""
    return f"wandb sync {Path(run.dir).parent}"


if __name__ == "__main__":
    main()
