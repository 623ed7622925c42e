"""Profile a window of steps with torch: a trace for Perfetto or chrome://tracing, tables, a memory snapshot."""

import os
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from trainer.distributed.collective_errors import barrier_gather
from trainer.distributed.mesh import Mesh
from trainer.metrics.config import ProfileConfig

_T = TypeVar("_T")
_TABLE_ROWS = 100
_ALLOCATIONS = 1_000_000  # most allocations recorded in a memory snapshot


class Profiler:
    """Profiles the steps and ranks of the `profile` section. Errors become warnings; training continues.

    In the trace, the parts of a step have the names of the `time/` metrics.
    """

    def __init__(
        self,
        config: ProfileConfig | None,
        folder: Path,
        mesh: Mesh,
        device: torch.device,
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._mesh, self._device = config, folder, mesh, device
        self._say, self._warn = say, warn
        self._step_timer = mesh.world.recorder.step_timer
        self._is_enabled = config is not None and mesh.layout.rank in config.ranks
        self._running: profile | None = None
        self._first = 0  # first profiled step: later than the start of the window if the run was resumed within it
        self._errors: list[str] = []

    def begin(self, step: int) -> None:
        """Start a step, counted from 1."""
        config = self._config
        if config is None or not self._is_enabled or not config.start - 1 <= step <= config.last:
            return
        if self._running is None:
            self._attempt(lambda: self._start(config, step))
        if step == self._first:
            self._step_timer.region = record_function
            if config.memory and self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)

    def end(self, step: int) -> None:
        """End a step; after the last one all ranks wait until the profiles are written."""
        config, running = self._config, self._running
        if running is not None:
            self._attempt(running.step)
        if config is None or step != config.last:
            return
        self._step_timer.region, self._running = None, None
        name = None if running is None else self._attempt(lambda: self._write(running, config))
        # A barrier without a deadline: a collective would time out while a rank is still writing.
        for rank, (written, errors) in enumerate(barrier_gather(self._mesh.world, (name, self._errors))):
            if written is not None:
                self._say(f"profile of rank {rank}: {self._folder / written}")
            for error in errors:
                self._warn(f"profile of rank {rank}: {error}; training continues")

    def _start(self, config: ProfileConfig, step: int) -> None:
        # The step before the window, if this process runs it, is the profiler's warm-up.
        self._first = max(step, config.start)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing warm-up step
            self._running = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=self._first - step, active=config.last - self._first + 1, repeat=1),
                on_trace_ready=lambda _: None,  # `_write` does it
                record_shapes=config.shapes,
                with_stack=config.stacks,
                profile_memory=config.memory,
            )
        self._running.start()

    def _write(self, running: profile, config: ProfileConfig) -> str:
        """Write a trace, tables of the slowest operations and allocations, and a snapshot; return the trace's name."""
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"steps_{self._first:08d}-{config.last:08d}_rank{self._mesh.layout.rank:05d}"
        names = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
        paths = ([self._folder / f"{name}{end}" for end in (".json.gz", ".txt", "_memory.pickle")] for name in names)
        trace, table, memory = next(three for three in paths if not any(map(os.path.lexists, three)))
        averages, device = running.key_averages(group_by_input_shape=config.shapes), self._device.type
        keys = [f"self_{device}_time_total", *([f"self_{device}_memory_usage"] if config.memory else [])]
        with table.open("x") as file:
            file.writelines(averages.table(sort_by=key, row_limit=_TABLE_ROWS) + "\n\n" for key in keys)
        if config.memory and device == "cuda":
            torch.cuda.memory._dump_snapshot(str(memory))
            torch.cuda.memory._record_memory_history(None)
        running.export_chrome_trace(str(trace))
        return trace.name

    def _attempt(self, act: Callable[[], _T]) -> _T | None:
        """Run `act`; on an error disable the profiler and return None."""
        try:
            return act()
        except Exception as error:
            self._is_enabled, self._running, self._step_timer.region = False, None, None
            self._errors.append((str(error) or type(error).__name__).splitlines()[0])
            return None
