"""Negative controls: remove one protection at a time. The oracles must detect each removal."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import trainer.training.loop
import trainer.training.setup
from tests.chaos.kills import Kill
from tests.chaos.workload import LONGEST_S, STEPS
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.saver import Saved, Saver
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors, _Slices
from trainer.trackers.jsonl import JsonlSink

_LATE = Kill("phase.agreeing_on_a_stop", 13, None)
"""Between two checkpoints: what a resume forgets shows."""


def a_moment_of_one_expert_is_forgotten() -> None:
    """Resume one moment of an expert with zeros, as if a save had taken one rank's experts for replicas."""
    read = StoredTensors.read

    def forgetful(tensors: StoredTensors, name: str, start: int = 0, length: int | None = None) -> torch.Tensor:
        found = read(tensors, name, start, length)
        if name.startswith("optim.exp_avg.") and "experts" in name and len(found):
            found[-1] = 0
        return found

    StoredTensors.read = forgetful  # type: ignore[method-assign]


def the_selection_bias_is_forgotten() -> None:
    """Resume with the router's selection bias at zero."""
    look_up = _Slices.__getitem__

    def forgetful(slices: _Slices, name: str) -> Slice:
        found = look_up(slices, name)
        if name.endswith("router.bias"):
            found.tensor.zero_()
        return found

    _Slices.__getitem__ = forgetful  # type: ignore[method-assign]


def every_rank_takes_the_first_experts() -> None:
    """Read experts from index 0, as if a sharded tensor were a whole one."""
    look_up = _Slices.__getitem__

    def greedy(slices: _Slices, name: str) -> Slice:
        like = slices._like[name]
        tensor = slices._tensors.read(name, 0, like.length)
        return Slice(tensor=tensor, global_shape=like.global_shape) if like.is_of_experts else look_up(slices, name)

    _Slices.__getitem__ = greedy  # type: ignore[method-assign]


def the_position_is_off_by_one() -> None:
    """Resume one row too late."""
    resume = trainer.training.setup.resume

    def careless(run: Any, checkpoint: Any) -> None:
        resume(run, checkpoint)
        run.position += 1

    trainer.training.setup.resume = careless


def the_count_of_updates_is_forgotten() -> None:
    """Resume with AdamW's bias correction of the first step."""
    like = StoredTensors.like

    def forgetful(tensors: StoredTensors, state: TrainState) -> TrainState:
        return TrainState(slices=like(tensors, state).slices, values={"optimizer_steps": 0})

    StoredTensors.like = forgetful  # type: ignore[method-assign]


def checkpoints_are_written_in_place() -> None:
    """Write a checkpoint under its final name."""

    def commit(folder: CheckpointFolder, step: int) -> Path:
        return folder.of_step(step)

    CheckpointFolder.temporary = CheckpointFolder.of_step  # type: ignore[method-assign]
    CheckpointFolder.commit = commit  # type: ignore[method-assign]


def a_save_is_reported_before_it_is_done() -> None:
    """Report a save when its snapshot is taken."""
    start = Saver.start

    def hasty(saver: Saver, step: int, state: TrainState, run: Mapping[str, Any], **options: Any) -> None:
        start(saver, step, state, run, **options)
        path = saver.folder.of_step(step)
        saved = Saved(step=step, path=path, error=None, size_bytes=0, stalled_s=0, behind_s=0)
        print(f"saved runs/chaos/checkpoints/{saved.path.name}", flush=True)

    Saver.start = hasty  # type: ignore[method-assign]


def the_snapshot_is_no_copy() -> None:
    """Write the live state instead of a copy."""
    init = Saver.__init__

    def careless(saver: Saver, *arguments: Any, **options: Any) -> None:
        init(saver, *arguments, **{**options, "copies": False})

    start, begin = Saver.start, CheckpointFolder.begin
    watched: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(saver: Saver, step: int, state: TrainState, run: Mapping[str, Any], **options: Any) -> None:
        weight = next(part.tensor for name, part in state.slices.items() if name.startswith("model."))
        watched[:] = [(weight, weight.clone())]
        start(saver, step, state, run, **options)

    def late(folder: CheckpointFolder, step: int) -> None:
        (weight, before), end = watched[0], time.monotonic() + 2  # after the last step nothing changes any more
        while torch.equal(weight, before) and time.monotonic() < end:
            time.sleep(0.01)
        begin(folder, step)

    Saver.start = watch  # type: ignore[method-assign]
    Saver.__init__ = careless  # type: ignore[method-assign]
    CheckpointFolder.begin = late  # type: ignore[method-assign]


def repeated_steps_stay_in_the_metrics() -> None:
    """Keep metrics of the steps after the checkpoint."""
    JsonlSink.resume_at = lambda sink, step, known=None: None  # type: ignore[method-assign]


def leftovers_are_not_cleaned() -> None:
    """Keep the leftovers of a killed save."""
    CheckpointFolder.clean = lambda folder: None  # type: ignore[method-assign]


def the_end_does_not_wait_for_the_saver() -> None:
    """Exit while the saver's thread still prunes after the last save."""
    prune = CheckpointFolder.prune

    def slow(folder: CheckpointFolder, *, newest: int) -> None:
        time.sleep(LONGEST_S if newest == STEPS else 0)
        prune(folder, newest=newest)

    CheckpointFolder.prune = slow  # type: ignore[method-assign]
    Saver.close = lambda saver: None  # type: ignore[method-assign]


def only_the_rank_that_was_asked_stops() -> None:
    """Stop by this rank's flag alone."""
    trainer.training.loop._agree = lambda run, stop, *, checks_folder: (stop.requested_by, False)  # type: ignore[assignment]


KILLED = {
    a_moment_of_one_expert_is_forgotten: (_LATE, "tensors differ"),
    the_selection_bias_is_forgotten: (_LATE, "tensors differ"),
    every_rank_takes_the_first_experts: (_LATE, "tensors differ"),
    the_position_is_off_by_one: (_LATE, "rows differ"),
    the_count_of_updates_is_forgotten: (_LATE, "tensors differ"),
    the_snapshot_is_no_copy: (_LATE, "tensors differ"),
    repeated_steps_stay_in_the_metrics: (_LATE, "metrics differ"),
    checkpoints_are_written_in_place: (Kill("save.mid_file", 4, 1), "has the name of a checkpoint"),
    a_save_is_reported_before_it_is_done: (Kill("save.before_rename", 3, 0), "was reported as saved and is not there"),
    leftovers_are_not_cleaned: (Kill("remove.out_of_sight", 1, 0), "left behind"),
    the_end_does_not_wait_for_the_saver: (_LATE, "a thread still saves"),
}
"""What is broken, the kill that shows it, and what must be said of it."""
OF_SPREAD_EXPERTS = {every_rank_takes_the_first_experts}
"""What shows only where the experts of a layer are on several ranks."""
STOPPED = {only_the_rank_that_was_asked_stops: "ended with"}
"""What is broken, and what must be said when a rank was asked to stop."""
